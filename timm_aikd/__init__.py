"""AI-KD self-knowledge distillation (https://arxiv.org/abs/2211.10938) for timm.

The files, in reading order:

    loss           the equations: one pure function a term
    discriminator  the discriminator and its sidecar optimizer
    indices        which samples a batch holds
    records        what is kept of a prediction
    table          one table of records a host
    memory         the student's predictions of the previous epoch: a snapshot of it, or such a table
    hub            timm's loads from the Hub: whole files in bounded time, or one line that says why not
    source         a teacher spec (Hub id, folder, file, timm model name) -> a model with its own weights
    classes        which of its outputs are the student's classes
    inference      networks that only run forward, made cheaper; for teacher and snapshot
    teacher        that model frozen, checked against the student and fed as it was trained
    calibration    temperature scaling, ECE, AURC
    config         every option, once
    aikd           the method: the parts above joined into one regularised loss
    run            the method in a training run: its memory, its samples, its state, its log
    task           a timm training task that holds such a run
    arguments      a script's arguments: what is refused before anything is built
    patch          the only file that touches a training script
    ranks          the run's processes, for all of the above
    autoload       arms patch when torch is imported
    launch         runs a script with the patch armed (`timm-aikd run train.py ...`)
    plots          reliability diagrams and training curves
    evaluate       accuracy and calibration of models on a data set (`timm-aikd evaluate`)
    publish        a finished run -> a model folder for the Hub, with its card (`timm-aikd push`)

Importing this package imports neither torch nor timm.
"""
import importlib
import re
from typing import TYPE_CHECKING

__version__ = '0.1.0'

_HOME = {
    'Aikd': 'aikd',
    'AikdConfig': 'config',
    'AikdTask': 'task',
    'Discriminator': 'discriminator',
    'RecordFormat': 'records',
    'SnapshotMemory': 'memory',
    'StoreMemory': 'memory',
    'Teacher': 'teacher',
    'load_teacher': 'teacher',
}

__all__ = ['AikdError', *_HOME]


class AikdError(ValueError):
    """A mistake the user can mend, said in one line: what is wrong, the value, what is allowed, the remedy.

    Of what would make it longer than that, the middle is left out; what it quotes may hold line breaks, or a token.
    """

    def __str__(self) -> str:
        text = ' '.join(''.join(char if char.isprintable() else ' ' for char in super().__str__()).split())
        text = re.sub(r'hf_[A-Za-z0-9]{20,}|(?<=://)[^/\s]+@', '***', text)
        return text if len(text) <= 270 else f'{text[:110]} ... {text[-155:]}'


if TYPE_CHECKING:
    from .aikd import Aikd as Aikd
    from .config import AikdConfig as AikdConfig
    from .discriminator import Discriminator as Discriminator
    from .memory import SnapshotMemory as SnapshotMemory
    from .memory import StoreMemory as StoreMemory
    from .records import RecordFormat as RecordFormat
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
