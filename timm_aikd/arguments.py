"""The arguments of a training script: what is checked, and told from them, before anything is built."""
import argparse
import os
import tempfile
from collections.abc import Callable
from typing import Any

from . import AikdError
from .config import AikdConfig
from .discriminator import Discriminator
from .source import FORMS, naming, parse_spec

# arguments that cannot go with --aikd: what they are compared with, and the remedy
_CONFLICTS: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ('kd_model_name', '--kd-model-name', bool, 'AI-KD has a kd term of its own, with --aikd-teacher'),
    ('jsd_loss', '--jsd-loss', bool, 'use the cross-entropy or --bce-loss'),
    ('aug_splits', '--aug-splits', lambda x: x > 0, 'leave the splits out'),
    ('torchscript', '--torchscript', bool, 'use --torchcompile'),
    ('naflex_loader', '--naflex-loader', bool, 'use a model and loader of fixed-size images'),
    ('amp_impl', '--amp-impl', lambda x: x == 'apex', 'use --amp-impl native: the discriminator must stay in float32'),
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


def store_obstacle(args: argparse.Namespace) -> str | None:
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
    config = AikdConfig.from_args(args)
    if args.epochs < 1:
        raise AikdError(f'--epochs {args.epochs}: with --aikd at least 1')
    resume = getattr(args, 'resume', None)
    if resume and not os.path.isfile(resume):
        raise AikdError(f'--resume {resume}: no such file: check the path')
    for name, flag, conflicts, remedy in _CONFLICTS:
        value = getattr(args, name, None)
        if value is not None and conflicts(value):
            given = flag if value is True else f'{flag} {value}'
            raise AikdError(f'{given} cannot go with --aikd: {remedy}')
    if config.has_teacher:
        if config.teacher is None:
            raise AikdError(f'--aikd needs a teacher: --aikd-teacher with {FORMS}')
        with naming('--aikd-teacher'):
            parse_spec(config.teacher)
    if config.has_teacher and config.adv_weight > 0:
        _check_optimizer(config)
    if config.alpha > 0:
        _check_memory(config, args)
    return config


def _check_memory(config: AikdConfig, args: argparse.Namespace) -> None:
    reason = store_obstacle(args)
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


def scheduled_epochs(args: argparse.Namespace) -> int:
    """Epochs of timm's cosine schedule with its default single cycle, where the script does not tell."""
    warmup = args.warmup_epochs if getattr(args, 'warmup_prefix', False) else 0
    epochs: int = args.epochs + getattr(args, 'cooldown_epochs', 0) + warmup
    return max(1, epochs)
