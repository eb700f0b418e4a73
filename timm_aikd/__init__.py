"""AI-KD self-knowledge distillation (https://arxiv.org/abs/2211.10938) for timm.

The method, in reading order:

    loss           the equations, as pure functions
    discriminator  the discriminator and its sidecar optimizer
    step           one training step, and the interface of a term
    terms          the progressive, kd, feature and adversarial terms
    teaching       the frozen teacher at work: its logits, its T_c, its features
    aikd           the terms that are on, joined into one regularised loss
    epoch          what an epoch adds up
    state          what a checkpoint keeps
    run            the method in a training run
    task           a timm training task that holds such a run
    evaluator      timm's evaluator, with ECE and AURC

What it stands on:

    config         every option, once
    errors         how messages are made
    ranks          the run's processes, and the package's logger
    calibration    temperature scaling, ECE, AURC
    features       features before the classifier
    inference      networks that only run forward, made cheaper (folding: BatchNorms folded into convolutions)

Four rooms, each with one door:

    memory/        the student's predictions of the previous epoch
    teacher/       from a spec to a frozen teacher
    script/        all that touches a training script
    commands/      `timm-aikd evaluate` and `timm-aikd push`

Importing this package imports neither torch nor timm.
"""
import importlib
from typing import TYPE_CHECKING

from .errors import AikdError as AikdError

__version__ = '0.1.0'

_HOME = {
    'Aikd': 'aikd',
    'AikdConfig': 'config',
    'AikdTask': 'task',
    'Discriminator': 'discriminator',
    'RecordFormat': 'memory',
    'SnapshotMemory': 'memory',
    'StoreMemory': 'memory',
    'Teacher': 'teacher',
    'load_teacher': 'teacher',
}

__all__ = ['AikdError', *_HOME]


if TYPE_CHECKING:
    from .aikd import Aikd as Aikd
    from .config import AikdConfig as AikdConfig
    from .discriminator import Discriminator as Discriminator
    from .memory import RecordFormat as RecordFormat
    from .memory import SnapshotMemory as SnapshotMemory
    from .memory import StoreMemory as StoreMemory
    from .task import AikdTask as AikdTask
    from .teacher import Teacher as Teacher
    from .teacher import load_teacher as load_teacher
else:
    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        return getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
