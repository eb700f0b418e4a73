"""The arguments of a training script: what is checked, and told from them, before anything is built."""
import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import AikdConfig
from ..discriminator import Discriminator
from ..errors import AikdError
from ..state import SavedState
from ..teacher import FORMS, TeacherSpec, load_checkpoint, naming
from .options import config_of

# arguments that cannot go with --aikd: what they are compared with, and the remedy
_CONFLICTS: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ('kd_model_name', '--kd-model-name', bool, 'AI-KD has a kd term of its own, with --aikd-teacher'),
    ('jsd_loss', '--jsd-loss', bool, 'use the cross-entropy or --bce-loss'),
    ('aug_splits', '--aug-splits', lambda x: x > 0, 'leave the splits out'),
    ('torchscript', '--torchscript', bool, 'use --torchcompile'),
    ('naflex_loader', '--naflex-loader', bool, 'use a model and loader of fixed-size images'),
    ('amp_impl', '--amp-impl', lambda x: x == 'apex', 'use --amp-impl native: the discriminator must stay in float32'),
    ('eval_metric', '--eval-metric', lambda x: x in ('ece', 'aurc'),
     'the script would keep the checkpoint with the largest value, which is the worst; allowed is loss, top1, top5'),
    ('task', '--task', lambda x: 'multi' in str(x), 'AI-KD is for single-label classification'),
)


# arguments with which the samples of a batch cannot be known
_STORE_CONFLICTS: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ('mixup', '--mixup', lambda x: float(x) > 0, 'mixes the samples of a batch'),
    ('cutmix', '--cutmix', lambda x: float(x) > 0, 'mixes the samples of a batch'),
    ('cutmix_minmax', '--cutmix-minmax', bool, 'mixes the samples of a batch'),
    ('dataset', '--dataset', lambda x: str(x).startswith(('wds/', 'tfds/', 'hfids/')),
     'is an iterable data set, whose samples have no index'),
)


def why_not_store(args: argparse.Namespace) -> str | None:
    """Why a script's arguments rule out the store memory, or None if they do not."""
    for name, flag, conflicts, reason in _STORE_CONFLICTS:
        value = getattr(args, name, None)
        if value is not None and conflicts(value):
            return f'{flag} {value if not isinstance(value, list) else " ".join(map(str, value))} {reason}'
    return None


def check_arguments(args: argparse.Namespace) -> AikdConfig:
    """The options among a script's arguments, checked as far as it goes before anything is built.

    Raises:
        AikdError: A bad option, a conflict with another argument, or a teacher that is not there.
    """
    config = config_of(args)
    if args.epochs < 1:
        raise AikdError(f'--epochs {args.epochs}: with --aikd at least 1')
    _check_resume(args)
    _check_conflicts(args)
    if config.has_teacher:
        _check_teachers(config, args)
    if config.has_adversary:
        _check_optimizer(config)
    if config.alpha > 0:
        _check_memory(config, args)
    return config


def _check_conflicts(args: argparse.Namespace) -> None:
    for name, flag, conflicts, remedy in _CONFLICTS:
        value = getattr(args, name, None)
        if value is not None and conflicts(value):
            given = flag if value is True else f'{flag} {value}'
            raise AikdError(f'{given} cannot go with --aikd: {remedy}')


def _check_teachers(config: AikdConfig, args: argparse.Namespace) -> None:
    if config.teacher is None:
        raise AikdError(f'--aikd needs a teacher: --aikd-teacher with {FORMS}')
    for spec in config.teachers:
        _check_teacher(spec, args)


def _check_resume(args: argparse.Namespace) -> None:
    resume = getattr(args, 'resume', None)
    if not resume or resume == 'auto' or os.path.isfile(resume):
        return
    if os.path.isdir(resume):
        last = os.path.join(resume, 'last.pth.tar')
        raise AikdError(f'--resume {resume}: is a folder: name a checkpoint in it, such as {last}')
    raise AikdError(f'--resume {resume}: no such file: check the path')


def _check_teacher(spec: str, args: argparse.Namespace) -> None:
    with naming('--aikd-teacher'):
        teacher = TeacherSpec.parse(spec)
    if teacher.kind not in ('file', 'folder'):
        return
    folder = os.path.dirname(teacher.value) if teacher.kind == 'file' else teacher.value
    output = output_folder(args)
    if output is not None and os.path.realpath(folder) == os.path.realpath(output):
        raise AikdError(
            f'--aikd-teacher {spec}: lies in {output}, where this run writes and would overwrite it; give the run '
            f'another --experiment')


def _check_memory(config: AikdConfig, args: argparse.Namespace) -> None:
    reason = why_not_store(args)
    if config.memory == 'store' and reason is not None:
        raise AikdError(f'--aikd-memory store: {reason}; use --aikd-memory snapshot')
    classes = getattr(args, 'num_classes', None)
    if config.memory_topk != 'auto' and classes is not None and config.memory_topk > classes:
        raise AikdError(
            f'--aikd-memory-topk {config.memory_topk}: allowed is 1 to the number of classes, {classes}')
    if config.memory_dir is not None:
        try:
            with tempfile.TemporaryFile(dir=config.memory_dir):
                pass
        except (OSError, ValueError) as error:
            raise AikdError(
                f'--aikd-memory-dir {config.memory_dir}: cannot be written to ({getattr(error, "strerror", error)}); '
                f'name an existing folder with room for the prediction table') from error


def _check_optimizer(config: AikdConfig) -> None:
    try:
        Discriminator(2, config.disc_hidden[:0], opt=config.disc_opt, lr=config.disc_lr)
    except Exception as error:  # timm's own of many kinds
        raise AikdError(
            f'--aikd-disc-opt {config.disc_opt}: cannot be used ({" ".join(str(error).split())[:100]}); '
            f'timm.optim.list_optimizers() lists the names') from error


def output_folder(args: argparse.Namespace) -> Path | None:
    """Where the script will write, as far as its arguments tell."""
    experiment = getattr(args, 'experiment', None)
    return Path(getattr(args, 'output', None) or './output/train', experiment) if experiment else None


def resume_file(args: argparse.Namespace) -> Path | None:
    """The checkpoint that the script continues from, if it does."""
    resume = getattr(args, 'resume', None)
    if resume != 'auto':
        return Path(resume) if resume else None
    folder = output_folder(args)
    last = folder / 'last.pth.tar' if folder is not None else None
    return last if last is not None and last.is_file() else None


def resume_folder(args: argparse.Namespace) -> Path | None:
    """The folder of `resume_file`."""
    path = resume_file(args)
    return path.parent if path is not None else None


def resumed_state(args: argparse.Namespace) -> SavedState | None:
    """What the script's checkpoint keeps of AI-KD; None where that is nothing, or the file is not readable."""
    path = resume_file(args)
    try:
        return SavedState.of_checkpoint(load_checkpoint(str(path))) if path is not None else None
    except Exception:  # the script will say what is wrong with the file
        return None


def resumed_specs(args: argparse.Namespace, specs: tuple[str, ...]) -> tuple[str, ...]:
    """The teachers to load: in a resumed run the commits that it began with, if the specs are still the same."""
    state = resumed_state(args)
    given = specs[0] if len(specs) == 1 else list(specs)
    if state is None or state.teacher_given != given:
        return specs
    pinned = state.config['teacher']
    return (pinned,) if isinstance(pinned, str) else tuple(pinned)


def scheduled_epochs(args: argparse.Namespace) -> int:
    """Epochs of timm's cosine schedule with its default single cycle, where the script does not tell."""
    warmup = args.warmup_epochs if getattr(args, 'warmup_prefix', False) else 0
    epochs: int = args.epochs + getattr(args, 'cooldown_epochs', 0) + warmup
    return max(1, epochs)


def is_finished(args: argparse.Namespace) -> bool:
    """Whether the run that the script continues has no epoch left."""
    start = getattr(args, 'start_epoch', None)
    path = resume_file(args)
    if start is None and path is not None:
        checkpoint = load_checkpoint(str(path))
        start = checkpoint.get('epoch', 0) + (checkpoint.get('version', 1) > 1)  # version 1 counts from 1
    return start is not None and start >= (getattr(args, 'stop_epoch', None) or scheduled_epochs(args))
