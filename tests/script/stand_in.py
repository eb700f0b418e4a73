"""A stand-in for a training script, as far as its globals and its parser go."""
from collections import OrderedDict

import torch
import torch.nn as nn
from timm.data import create_loader
from timm.task import ClassificationTask, resume_task_checkpoint

from timm_aikd.script import bindings, options

from .test_autoload import training_parser


def train_one_epoch(epoch, model, loader, optimizer, args, task=None):
    for input, target in loader:
        task(input, target)['loss'].backward()
    return OrderedDict(loss=1.)


def validate(model, loader, loss_fn, args, log_suffix=''):
    losses = [loss_fn(model(input), target) for input, target in loader]
    return OrderedDict(loss=sum(losses).item() / len(losses))


def train_by_loss(epoch, model, loader, optimizer, loss_fn, args, saver=None, output_dir=None):
    """The epoch of a script without tasks, one batch of each two an accumulated update."""
    for step, (input, target) in enumerate(loader):
        loss = loss_fn(model(input), target)
        loss /= 2
        loss.backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return OrderedDict(loss=1.)


WITHOUT_TASKS = dict(ClassificationTask=None, resume_task_checkpoint=None, train_one_epoch=train_by_loss)


class Script:
    """A training script as far as its globals and its parser go."""

    def __init__(self, **changes):
        self.parser = training_parser()
        self.parser.set_defaults(epochs=3, model='test_resnet')
        for flag in ('--kd-model-name', '--task', '--config', '--eval-metric', '--resume', '--output', '--experiment'):
            self.parser.add_argument(flag)
        self.parser.add_argument('--aug-splits', type=int, default=0)
        self.parser.add_argument('--num-classes', type=int)
        self.parser.add_argument('--dataset', default='')
        self.parser.add_argument('--cutmix-minmax', type=float, nargs='+')
        for flag in ('--jsd-loss', '--torchscript', '--naflex-loader'):
            self.parser.add_argument(flag, action='store_true')
        self.globals = dict(
            __name__='train', __file__='somewhere/train.py', ClassificationTask=ClassificationTask,
            train_one_epoch=train_one_epoch, resume_task_checkpoint=resume_task_checkpoint,
            create_loader=create_loader, validate=validate)
        for name, value in changes.items():
            self.globals[name] = value
        self.globals = {name: value for name, value in self.globals.items() if value is not None}
        self.before = dict(self.globals)
        options.adopt(self.parser, self.globals)

    def parse(self, *words):
        return self.parser.parse_args(list(words))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        bindings.restore(self.globals)


def args(script, *words):
    return script.parse('--aikd', '--aikd-teacher', 'none', *words)


class Net(nn.Linear):
    num_classes = 3


def batches(count=2):
    return [(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])) for _ in range(count)]


class Indexed(torch.utils.data.TensorDataset):
    """What timm's loader factory makes a loader of, with images that need no transform."""


def image_loader(script, **options):
    dataset = Indexed(torch.rand(24, 3, 8, 8), torch.arange(24) % 3)
    return script.globals['create_loader'](
        dataset, input_size=(3, 8, 8), batch_size=4, is_training=True, use_prefetcher=False,
        device=torch.device('cpu'), num_workers=0, persistent_workers=False, **options)


class ImageNet3(nn.Module):
    """A linear net on images."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 3)

    def forward(self, x):
        return self.head(x.flatten(1))
