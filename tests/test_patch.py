"""What a training script is bound to, and what is refused before anything is built."""
import argparse
import logging
import re
import sys
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from timm.data import FastCollateMixup, create_loader
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver

from timm_aikd import AikdError, AikdTask, arguments, patch, table

from .test_autoload import training_parser

TEACHER = ['--aikd', '--aikd-teacher', 'test_resnet']
STORE = [*TEACHER, '--aikd-memory', 'store']


def train_one_epoch(epoch, model, loader, optimizer, args, task=None):
    for input, target in loader:
        task(input, target)['loss'].backward()
    return OrderedDict(loss=1.)


def validate(model, loader, loss_fn, args, log_suffix=''):
    losses = [loss_fn(model(input), target) for input, target in loader]
    return OrderedDict(loss=sum(losses).item() / len(losses))


class Script:
    """A training script as far as its globals and its parser go."""

    def __init__(self, **changes):
        self.parser = training_parser()
        self.parser.set_defaults(epochs=3, model='test_resnet')
        for flag in ('--kd-model-name', '--task', '--config'):
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
        patch.adopt(self.parser, self.globals)

    def parse(self, *words):
        return self.parser.parse_args(list(words))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        patch.restore(self.globals)


REFUSED = [
    (['--aikd'], '--aikd needs a teacher: --aikd-teacher with hf-hub:ORG/NAME'),
    (['--aikd', '--aikd-teacher', 'nowhere.pth'], 'no such file'),
    (['--aikd', '--aikd-teacher', 'resnet_of_nobody'], 'no such file, folder or timm model'),
    (['--aikd', '--aikd-teacher', 'timm/resnet18'], 'did you mean hf-hub:timm/resnet18'),
    (['--aikd', '--aikd-teacher', 'local-dir:/nowhere'], 'no config.json'),
    (['--aikd', '--aikd-teacher', '.'], 'not the output of a run'),
    ([*TEACHER, '--kd-model-name', 'resnet18'], '--kd-model-name resnet18 cannot go with --aikd'),
    ([*TEACHER, '--jsd-loss'], '--jsd-loss cannot go with --aikd'),
    ([*TEACHER, '--aug-splits', '3'], '--aug-splits 3 cannot go with --aikd'),
    ([*TEACHER, '--torchscript'], 'use --torchcompile'),
    ([*TEACHER, '--naflex-loader'], '--naflex-loader cannot go with --aikd'),
    ([*TEACHER, '--task', 'multilabel'], 'AI-KD is for single-label classification'),
    ([*TEACHER, '--aikd-alpha', '2'], '--aikd-alpha 2.0: allowed is number >= 0 and <= 1'),
    ([*TEACHER, '--aikd-alpha', 'x'], "argument --aikd-alpha: invalid float value: 'x'"),
    ([*TEACHER, '--aikd-teacher-temperature', 'x'], "invalid number or auto value: 'x'"),
    ([*TEACHER, '--aikd-adv-loss', 'gan'], "--aikd-adv-loss 'gan': allowed is bce, hinge"),
    ([*TEACHER, '--aikd-disc-hidden', '8', '0'], '--aikd-disc-hidden 0'),
    ([*TEACHER, '--aikd-disc-opt', 'nonsense'], '--aikd-disc-opt nonsense: cannot be used'),
    ([*TEACHER, '--aikd-disc-opt', 'adahessian'], 'needs second-order gradients'),
    ([*STORE, '--mixup', '0.4'], '--aikd-memory store: --mixup 0.4 mixes the samples of a batch; use --aikd-memory'),
    ([*STORE, '--cutmix', '1'], '--cutmix 1 mixes the samples'),
    ([*STORE, '--cutmix-minmax', '0.2', '0.8'], '--cutmix-minmax 0.2 0.8 mixes the samples'),
    ([*STORE, '--dataset', 'wds/shards'], '--dataset wds/shards is an iterable data set'),
    ([*STORE, '--dataset', 'hfids/name'], '--dataset hfids/name is an iterable data set'),
    ([*STORE, '--aug-splits', '3'], '--aug-splits 3 cannot go with --aikd'),
    ([*STORE, '--naflex-loader'], '--naflex-loader cannot go with --aikd'),
    ([*STORE, '--aikd-memory-topk', '0'], '--aikd-memory-topk 0: allowed is whole number >= 1'),
    ([*STORE, '--aikd-memory-topk', '11', '--num-classes', '10'], '11: allowed is 1 to the number of classes, 10'),
    ([*STORE, '--aikd-memory-topk', '1.5'], "invalid number or auto value: '1.5'"),
    ([*TEACHER, '--aikd-memory-dir', '/nowhere'], '--aikd-memory-dir /nowhere: cannot be written to (No such file'),
    ([*TEACHER, '--aikd-memory-dir', '/proc'], '--aikd-memory-dir /proc: cannot be written to'),
    ([*TEACHER, '--aikd-memory', 'disk'], 'allowed is auto, store, snapshot'),
    (['--aikd-teacher', 'test_resnet'], '--aikd-teacher does nothing without --aikd'),
    (['--aikd-alpha=0.5'], '--aikd-alpha does nothing without --aikd'),
]


@pytest.mark.parametrize('words, message', REFUSED, ids=lambda x: ' '.join(x) if isinstance(x, list) else '')
def test_refused_by_the_parser_in_one_line(words, message, capsys):
    with Script() as script, pytest.raises(SystemExit) as caught:
        script.parse(*words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and message in error and len(error) < 330
    assert script.globals == script.before


@pytest.mark.parametrize('changes, missing', [
    ({'ClassificationTask': None}, 'ClassificationTask'),
    ({'train_one_epoch': None}, 'train_one_epoch(epoch, loader, task)'),
    ({'train_one_epoch': lambda epoch, model, loader, optimizer, loss_fn, args: None}, 'train_one_epoch(epoch, loader'),
    ({'resume_task_checkpoint': None}, 'resume_task_checkpoint'),
])
def test_a_script_without_the_seams_is_refused(changes, missing, capsys):
    with Script(**changes) as script, pytest.raises(SystemExit):
        script.parse(*TEACHER)
    error = capsys.readouterr().err
    assert f'somewhere/train.py has no {missing}' in error and 'timm 1.0.27 and later' in error
    script.parse()  # without --aikd it is no matter of ours


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


@pytest.mark.parametrize('wrap', [lambda model: model, lambda model: torch.compile(model, backend='eager')])
def test_a_script_without_tasks(tmp_path, caplog, wrap):
    """The method, its metrics and its state go through loss_fn and the saver; nothing is left on model or torch."""
    caplog.set_level(logging.INFO)
    torch_save = torch.save
    states = []
    for resume in ('', str(tmp_path / 'last.pth.tar')):
        with Script(**WITHOUT_TASKS) as script:
            parsed = args(script, '--aikd-memory-dir', str(tmp_path), '--aikd-disc-hidden', '8')
            bound = patch._patched[id(script.globals)]
            bound.args.resume = resume
            bound.config = replace(bound.config, teacher='given')
            bound._teacher = lambda *_: ImageNet3()
            loader, model = image_loader(script), wrap(ImageNet3())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            saver = CheckpointSaver(
                model, optimizer, args=parsed, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
            criterion = nn.CrossEntropyLoss()
            before = [p.clone() for p in model.parameters()]
            for epoch in (2,) if resume else (0, 1):
                metrics = script.globals['train_one_epoch'](
                    epoch, model, loader, optimizer, criterion, parsed, saver=saver, output_dir=str(tmp_path))
                saver.save_checkpoint(epoch, metric=float(epoch))
            saver.save_recovery(epoch)
            assert not model._forward_pre_hooks and torch.save is torch_save
            assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        saved = torch.load(tmp_path / 'last.pth.tar', weights_only=False)
        recovery, = (torch.load(path, weights_only=False) for path in tmp_path.glob(f'recovery-{epoch}-*'))
        assert recovery['task_state']['aikd']['epoch'] == epoch
        assert metrics['aikd_progressive'] > 0 and metrics['aikd_kd'] > 0 and bound.run.aikd.steps == 6 * len(
            range(epoch, 3) if resume else range(2))
        states.append(saved['task_state']['aikd'])
    steps = [state['discriminator']['optimizer']['state'][0]['step'].item() for state in states]
    assert steps == [12, 18] and 'prediction memory of epoch 1 restored, 24 samples' in caplog.text
    assert saved['state_dict'].keys() == ImageNet3().state_dict().keys()


def test_a_script_without_tasks_has_the_loss_of_each_batch():
    """kd alone, a teacher that looks at the images: the loss handed to the script is that of the batch at hand."""
    losses = []

    def train(epoch, model, loader, optimizer, loss_fn, args, saver=None):
        for input, target in loader:
            output = model(input)
            loss = loss_fn(output, target)
            soft = (teacher(input) / 2).softmax(-1)
            kd = nn.functional.kl_div((output / 2).log_softmax(-1), soft, reduction='batchmean')
            losses.append((loss.item(), (nn.functional.cross_entropy(output, target) + 4 * kd).item()))
        return OrderedDict(loss=1.)

    with Script(**{**WITHOUT_TASKS, 'train_one_epoch': train}) as script:
        parsed, teacher = args(script, '--aikd-alpha', '0', '--aikd-adv-weight', '0'), ImageNet3()
        bound = patch._patched[id(script.globals)]
        bound.config = replace(bound.config, teacher='given', teacher_temperature=1.)
        bound._teacher = lambda *_: teacher
        script.globals['train_one_epoch'](0, ImageNet3(), image_loader(script), None, nn.CrossEntropyLoss(), parsed)
    assert len(losses) == 6 and len({loss for loss, _ in losses}) == 6
    assert all(loss == pytest.approx(expected, rel=1e-5) for loss, expected in losses)


def test_a_misfit_is_found_before_training_in_a_script_without_tasks(tmp_path):
    with Script(**WITHOUT_TASKS, create_optimizer_v2=create_optimizer_v2) as script:
        torch.save(ImageNet3().state_dict(), tmp_path / 'teacher.pth')
        script.parse('--aikd', '--aikd-teacher', str(tmp_path / 'teacher.pth'))
        script.globals['create_optimizer_v2'](ImageNet3(), opt='sgd', lr=0.1)
        with pytest.raises(AikdError, match='these weights are not those of a test_resnet'):
            image_loader(script)


def test_a_plain_checkpoint_resumes_without_tasks(tmp_path, caplog):
    torch.save({'state_dict': {}, 'epoch': 1}, tmp_path / 'plain.pth.tar')
    for name, message in (('plain', 'of a run without AI-KD'), ('broken', 'never unpickled')):
        with Script(**WITHOUT_TASKS) as script:
            parsed = args(script)
            patch._patched[id(script.globals)].args.resume = str(tmp_path / f'{name}.pth.tar')
            (tmp_path / 'broken.pth.tar').write_bytes(b'cos\nsystem\n(S"echo"\ntR.')
            words = (0, ImageNet3(), image_loader(script), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.),
                     nn.CrossEntropyLoss(), parsed)
            if name == 'broken':
                with pytest.raises(AikdError, match=message):
                    script.globals['train_one_epoch'](*words)
            else:
                script.globals['train_one_epoch'](*words)
                assert message in caplog.text


@pytest.mark.parametrize('changes', [{'create_loader': None}, {'validate': None}, {'validate': lambda model: None}])
def test_optional_seams_may_be_missing(changes):
    with Script(**changes) as script:
        script.parse(*TEACHER)
        assert script.globals['train_one_epoch'] is not train_one_epoch


def test_binds_and_puts_back():
    hook = sys.excepthook
    with Script() as script:
        script.parse()
        assert script.globals == script.before and sys.excepthook is hook
        script.parse(*TEACHER)
        script.parse(*TEACHER)  # a second main() in one process
        bound = {name for name, value in script.globals.items() if value != script.before[name]}
        assert bound == {
            'ClassificationTask', 'train_one_epoch', 'resume_task_checkpoint', 'create_loader', 'validate'}
        script.parse()
        assert script.globals == script.before and sys.excepthook is hook
        script.parse(*TEACHER)
    assert script.globals == script.before and sys.excepthook is hook


def args(script, *words):
    return script.parse('--aikd', '--aikd-teacher', 'none', *words)


class Net(nn.Linear):
    num_classes = 3


def batches(count=2):
    return [(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])) for _ in range(count)]


def test_an_epoch_through_the_seams():
    with Script() as script:
        parsed = args(script)
        task = script.globals['ClassificationTask'](model=Net(5, 3), criterion=nn.CrossEntropyLoss(), verbose=False)
        assert isinstance(task, AikdTask) and isinstance(task, ClassificationTask) and task.aikd.epochs == 3
        columns = []
        for epoch in range(2):
            metrics = script.globals['train_one_epoch'](epoch, Net(5, 3), batches(), None, parsed, task=task)
            columns.append(list(metrics))
        assert columns[0] == columns[1] == ['loss'] + [f'aikd_{name}' for name in (
            'task', 'progressive', 'kd', 'adv', 'disc', 'disc_accuracy', 'teacher_top1', 'alpha', 'disc_skipped')]
        assert metrics['aikd_alpha'] == pytest.approx(parsed.aikd_alpha * 2 / 3) and task.aikd.epoch == 1
        evaluated = script.globals['validate'](task.trainable_module, batches(), nn.CrossEntropyLoss(), parsed)
        assert list(evaluated) == ['loss', 'ece', 'aurc']


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


def with_output(epoch, model, loader, optimizer, args, task=None, output_dir=None):
    return train_one_epoch(epoch, model, loader, optimizer, args, task)


def test_the_store_is_chosen_when_the_task_is_built_and_saved_with_the_checkpoints(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Script(train_one_epoch=with_output) as script:
        parsed = args(script, '--aikd-memory-dir', str(tmp_path))
        loader = image_loader(script)
        task = script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())
        assert f'memory store, 24 samples with 3 of 3 log-probabilities in float16, 432 bytes a host in {tmp_path}' in (
            caplog.text)
        for epoch in range(2):
            metrics = script.globals['train_one_epoch'](
                epoch, None, loader, None, parsed, task=task, output_dir=tmp_path)
        assert metrics['aikd_progressive'] > 0 and len(task.aikd.memory.table) == 24
        assert (tmp_path / 'aikd-memory-1.safetensors').is_file()
        assert task.get_task_state()['aikd']['memory']['epoch'] == 1


def test_mixup_outside_the_loader_takes_the_snapshot_once(caplog):
    """Without the prefetcher the loader shows no mixup; the arguments do."""
    caplog.set_level(logging.INFO)
    with Script() as script:
        parsed = args(script, '--mixup', '0.4')
        loader = image_loader(script)
        task = script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())
        script.globals['train_one_epoch'](0, None, loader, None, parsed, task=task)
        assert task.aikd.memory.kind == 'snapshot' and caplog.text.count('memory s') == 2  # chosen, and the terms


def test_the_store_without_the_create_loader_seam(caplog):
    caplog.set_level(logging.INFO)
    with Script(create_loader=None) as script:
        parsed = args(script, '--aikd-memory', 'store')
        loader = image_loader(script=type('Plain', (), {'globals': {'create_loader': create_loader}}))
        task = script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())
        script.globals['train_one_epoch'](0, None, loader, None, parsed, task=task)
        assert task.aikd.memory.kind == 'store' and 'no folder of checkpoints' in caplog.text


@pytest.mark.parametrize('words, options, reason', [
    (['--mixup', '0.4'], {}, '--mixup 0.4 mixes the samples'),
    ([], {'collate_fn': FastCollateMixup(1., num_classes=3)}, 'mixup or cutmix mixes the samples'),
    (['--aikd-memory-dir', 'full'], {}, 'full cannot hold the prediction table of 24 samples, 432 bytes: it has 0'),
])
def test_auto_says_why_it_takes_the_snapshot_and_store_stops(words, options, reason, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'full').mkdir()
    monkeypatch.setattr(table.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 0}))
    with Script() as script:
        args(script, *words)
        image_loader(script, **options)
        task = script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())
        assert task.aikd.memory.kind == 'snapshot'
        assert f'memory snapshot, which costs a forward a step; not store, because {reason}' in caplog.text
        if '--mixup' not in words:  # the parser refuses that
            args(script, *words, '--aikd-memory', 'store')
            image_loader(script, **options)
            with pytest.raises(AikdError, match=re.escape(f'--aikd-memory store: {reason}')):
                script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())


def test_topk_above_the_classes_is_refused_when_the_task_is_built():
    with Script() as script:
        args(script, '--aikd-memory-topk', '4')
        image_loader(script)
        with pytest.raises(AikdError, match='--aikd-memory-topk 4: allowed is 1 to the number of classes, 3'):
            script.globals['ClassificationTask'](ImageNet3(), nn.CrossEntropyLoss())


def test_yaml_options_without_the_switch_are_reported(caplog):
    with Script() as script:
        script.parse()
        assert not caplog.messages
        script.parser.set_defaults(aikd_alpha=0.6)
        script.parse()
    assert caplog.messages == ['AI-KD: aikd_alpha is set, but aikd is not: this is plain training']


def test_a_lazy_global_does_not_hide_the_parser():
    class Proxy:
        @property
        def __class__(self):
            raise RuntimeError('not loaded yet')

    from timm_aikd import autoload

    assert not autoload._is_training(Proxy()) and autoload._is_training(training_parser())


@pytest.mark.parametrize('total, epochs', [(10, 5), (None, 3)])
def test_scheduled_epochs_are_what_the_script_says(total, epochs):
    def train(epoch, model, loader, optimizer, args, task=None, num_updates_total=None):
        return train_one_epoch(epoch, model, loader, optimizer, args, task)

    with Script(train_one_epoch=train) as script:
        parsed = args(script)
        bound = patch._patched[id(script.globals)]
        bound.args.grad_accum_steps = 2
        task = script.globals['ClassificationTask'](Net(5, 3), nn.CrossEntropyLoss(), verbose=False)
        script.globals['train_one_epoch'](
            0, None, batches(3), None, parsed, task=task, num_updates_total=total)  # 2 updates an epoch
        assert task.aikd.epochs == epochs


def test_a_script_that_trains_without_its_task_is_an_error():
    with Script() as script:
        parsed = args(script)
        with pytest.raises(AikdError, match='without the task'):
            script.globals['train_one_epoch'](0, None, batches(), None, parsed, task=None)
    with Script(train_one_epoch=lambda epoch, model, loader, optimizer, args, task=None: OrderedDict()) as script:
        parsed = args(script)
        task = script.globals['ClassificationTask'](Net(5, 3), nn.CrossEntropyLoss(), verbose=False)
        with pytest.raises(AikdError, match='without one AI-KD step'):
            script.globals['train_one_epoch'](0, None, batches(), None, parsed, task=task)


@pytest.mark.parametrize('words, epochs', [
    ([], 5), (['--cooldown-epochs', '2'], 7), (['--warmup-epochs', '3'], 5),
    (['--warmup-epochs', '3', '--warmup-prefix'], 8),
])
def test_counts_epochs_as_timms_scheduler_does(words, epochs):
    from timm.scheduler import create_scheduler_v2, scheduler_kwargs

    parser = argparse.ArgumentParser()
    for name in ('epochs', 'cooldown', 'warmup'):
        parser.add_argument(f'--{name}-epochs' if name != 'epochs' else '--epochs', type=int, default=0)
    parser.add_argument('--warmup-prefix', action='store_true')
    parsed = parser.parse_args(['--epochs', '5', *words])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    kwargs = scheduler_kwargs(argparse.Namespace(**vars(parsed), sched='cosine', min_lr=0., warmup_lr=0.))
    assert arguments.scheduled_epochs(parsed) == create_scheduler_v2(optimizer, **kwargs)[1] == epochs


# timm's readers leave their files to the garbage collector
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_calibration_images_are_spread_over_the_classes_and_move_no_stream(image_folder, monkeypatch):
    import random

    import numpy
    from timm.data import create_dataset

    monkeypatch.setattr(patch, '_CALIBRATION_IMAGES', 9)
    seen = []
    with Script() as script:
        parsed = args(script)
        dataset = create_dataset('', root=str(image_folder), split='validation')
        script.globals['create_loader'](
            dataset, input_size=(3, 32, 32), batch_size=4, is_training=False, num_workers=1, use_prefetcher=True,
            device=torch.device('cpu'))
        bound = patch._patched[id(script.globals)]
        bound.task = script.globals['ClassificationTask'](Net(5, 3), nn.CrossEntropyLoss(), verbose=False)
        states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
        with patch._random_streams_kept():
            for _, target in bound._calibration_batches():
                seen += target.tolist()
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        assert (numpy.random.get_state()[1] == states[2]).all()
        assert parsed.aikd
    assert sorted(seen) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
