"""Small teachers and their files, for tests of what loads them."""
import argparse
import os

import pytest
import safetensors.torch
import timm
import torch

from timm_aikd import AikdError, load_teacher

CLASSES = ('ant', 'bee', 'cat', 'dog', 'elk')
HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}  # as test_resnet's own
ODD = {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}


def source(seed=0, name='test_resnet', num_classes=5, overlay=None, **kwargs):
    """A model none of whose parameters and statistics is still neutral, in eval mode."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * (torch.rand_like(tensor) - 0.5)
    return model.eval()


def batch(size=32, channels=3):
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0))


def save(module, path, **args):
    """The model as timm's scripts keep it (.pth.tar), or its bare state dict."""
    if path.endswith('.safetensors'):
        safetensors.torch.save_file(module.state_dict(), path)
    elif path.endswith('.pth.tar'):
        torch.save({'state_dict': module.state_dict(), 'epoch': 3, 'args': arguments(**args)}, path)
    else:
        torch.save(module.state_dict(), path)
    return path


def arguments(**given):
    """What a run of train.py keeps of its command line."""
    unset = dict.fromkeys(('in_chans', 'img_size', 'input_size', 'mean', 'std', 'gp', 'num_classes'))
    return argparse.Namespace(**{**unset, 'model': 'test_resnet', 'model_kwargs': {}, 'lr': 0.1, **given})


def assert_same_weights(model, expected):
    for (name, x), y in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def renormalised(model, x, ours, theirs):
    """The model's answer to images that were normalised for the student, brought back to pixels and on."""
    mean_s, std_s, mean_t, std_t = (
        torch.tensor(each[key], dtype=torch.float64).view(1, -1, 1, 1) for each in (ours, theirs)
        for key in ('mean', 'std'))
    return model(((x.double() * std_s + mean_s - mean_t) / std_t).float())


def assert_one_line(error, spec, *fragments):
    message = str(error)
    assert '\n' not in message and len(message) <= 300
    for fragment in (spec, *fragments):
        assert fragment in message


def refused(spec, student, *fragments, **options):
    with pytest.raises(AikdError) as error:
        load_teacher(spec, student=student, **{'default_model_name': 'test_resnet', **options})
    assert_one_line(error.value, spec, *fragments)


class Payload:
    """Its unpickling makes a folder."""

    def __reduce__(self):
        return os.mkdir, ('executed',)
