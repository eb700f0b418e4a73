"""A small student, batches, and what a step does with autocast and a gradient scaler."""
from dataclasses import dataclass

import timm
import torch
import torch.nn as nn

from timm_aikd import AikdConfig

CLASSES = 5


class Net(nn.Module):
    """A network without convolutions, whose output overflows on request."""

    def __init__(self, num_classes=CLASSES, size=4):
        super().__init__()
        self.num_classes, self.boost = num_classes, 1.
        self.body = nn.Sequential(nn.Linear(size, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.boost * self.head(self.body(x))


@dataclass(frozen=True)
class Setting:
    """Precision of autocast, float32 for none, and layout of the convolutions."""

    dtype: torch.dtype
    channels_last: bool = False

    def __str__(self):
        return str(self.dtype).removeprefix('torch.') + (', channels-last' if self.channels_last else '')

    def autocast(self, device):
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def place(self, tensor_or_module, device):
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return tensor_or_module.to(device).to(memory_format=layout)


def net(seed, device):
    torch.manual_seed(seed)
    return Net().to(device)


def conv_net(seed=0, num_classes=CLASSES):
    torch.manual_seed(seed)
    return timm.create_model('test_resnet', num_classes=num_classes)


def images(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def points(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def given(**options):
    return AikdConfig(**{'teacher': 'given', 'teacher_temperature': 1.5, 'disc_hidden': (8,), **options})


def host(tensor):
    return tensor.detach().double().cpu()


def descend(optimizer, loss):
    """A step of the student; its loss as it was."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
