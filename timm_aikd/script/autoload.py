"""The `torch.backends` entry point: makes timm's training scripts understand `--aikd`. Standard library only.

PyTorch calls `arm` at the end of `import torch`. It wraps `argparse.ArgumentParser.parse_known_args` and does nothing
else: at a script's first parse the wrapper looks for a parser with the signature of timm's train.py in the globals of
the calling module, and adds the AI-KD options to it. Parsers of other programs are left alone. The wrapper stays, since
a process may run several scripts. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` or `TIMM_AIKD_AUTOLOAD=0` turns it off.
"""
import argparse
import os
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

# Options that timm's training scripts have had since 0.9 and that no other script of timm has all of.
SIGNATURE = {'model', 'epochs', 'sched', 'opt', 'mixup', 'cutmix', 'smoothing', 'bce_loss', 'model_ema'}

_original: Callable[..., Any] | None = None  # what ours stands in the place of, once it does


def arm() -> None:
    """The entry point. It never raises: no failure here may break `import torch`."""
    try:
        if os.environ.get('TIMM_AIKD_AUTOLOAD', '1') != '0':
            watch_parsers()
    except Exception:
        _say_why()


def watch_parsers() -> None:
    """Wrap argparse; a second call is harmless."""
    global _original
    if _original is None:
        _original = argparse.ArgumentParser.parse_known_args
        argparse.ArgumentParser.parse_known_args = _parse_known_args  # type: ignore[method-assign]


def _parse_known_args(
        self: argparse.ArgumentParser,
        args: Any = None,
        namespace: Any = None,
        *more: Any,
        **kwargs: Any,
) -> Any:
    assert _original is not None
    try:
        script = _calling_globals()
        found = [x for x in {id(x): x for x in [*script.values(), self]}.values() if _is_training(x)]
        if found:
            from . import options
            for parser in found:
                options.adopt(parser, script)
    except Exception:
        _say_why()
        found = []  # whatever is wrong with us, the program parses; it will say that it knows no --aikd
    if self in found:
        return self.parse_known_args(args, namespace, *more, **kwargs)
    return _original(self, args, namespace, *more, **kwargs)


def _calling_globals() -> dict[str, Any]:
    """Globals of the module that asked for the parse: where it trains, however others have wrapped argparse too."""
    first: dict[str, Any] | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if 'train_one_epoch' in frame.f_globals:
            return frame.f_globals
        if first is None and frame.f_globals.get('__name__') not in (__name__, argparse.__name__):
            first = frame.f_globals
        frame = frame.f_back
    return first or {}


def _is_training(parser: Any) -> bool:
    """Whether it is a training script's parser, without options of our names so far."""
    # issubclass: isinstance would ask a lazy proxy among the globals for its __class__
    if not issubclass(type(parser), argparse.ArgumentParser):
        return False
    is_ours = any(flag.startswith('--aikd') for flag in parser._option_string_actions)
    return SIGNATURE <= {action.dest for action in parser._actions} and not is_ours


def _say_why() -> None:
    """Show the exception at hand to those who look for one."""
    if os.environ.get('TIMM_AIKD_TRACEBACK') == '1':
        traceback.print_exc()
