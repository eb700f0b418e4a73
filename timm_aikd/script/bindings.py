"""Binds names in a training script's globals to AI-KD's hooks, and puts them back."""
import argparse
import inspect
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import AikdError
from .ending import SUPPORTED, Ending

if TYPE_CHECKING:
    from .hooks import Hooks  # only a run with --aikd loads what needs timm


class _Binding(NamedTuple):
    script: dict[str, Any]  # a module's globals
    originals: dict[str, Any]  # the script's own functions
    ending: Ending


_applied: dict[int, _Binding] = {}  # by the id of the globals


def apply(script: dict[str, Any], args: argparse.Namespace) -> None:
    """Check what can be checked before anything is built, then bind the hooks in a script's globals.

    Raises:
        AikdError: A bad option, a conflict with another one, a teacher that is not there, or a script without the
            names that AI-KD needs.
    """
    from .arguments import check_arguments, is_finished

    restore(script)
    kind = _kind_of_hooks(script)
    originals = _originals(script, kind)
    is_main = script.get('__name__') == '__main__' and not hasattr(sys, 'ps1')  # a session goes on after the script
    ending = Ending(is_main, partial(is_finished, args))
    replacements = kind(originals, args, check_arguments(args), ending).replacements()
    script.update({name: replacements[name] for name in originals})
    ending.watch()
    _applied[id(script)] = _Binding(script, originals, ending)


def restore(script: dict[str, Any]) -> None:
    """Put back what `apply` has bound; harmless where nothing is."""
    binding = _applied.pop(id(script), None)
    if binding is not None:
        script.update(binding.originals)
        binding.ending.unwatch()


def restore_all() -> None:
    """Put back what `apply` has bound in any script of this process."""
    for binding in list(_applied.values()):
        restore(binding.script)


def _kind_of_hooks(script: dict[str, Any]) -> 'type[Hooks]':
    if 'ClassificationTask' in script or 'loss_fn' not in _parameters(script.get('train_one_epoch')):
        from .task_hooks import TaskHooks

        return TaskHooks
    from .loss_hooks import LossHooks

    return LossHooks


def _originals(script: dict[str, Any], kind: 'type[Hooks]') -> dict[str, Any]:
    """The script's own functions that the hooks replace."""
    found = {}
    for name, parameters in {**kind.NEEDED, **kind.OPTIONAL}.items():
        if name in script and parameters <= _parameters(script[name]):
            found[name] = script[name]
        elif name in kind.NEEDED:
            what = f'{name}({", ".join(sorted(parameters))})' if parameters else name
            where = script.get('__file__') or script.get('__name__')
            raise AikdError(f'--aikd: {where} has no {what} to hook into; supported is {SUPPORTED}')
    return found


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()
