"""How a script under AI-KD ends."""
import atexit
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import AikdError, with_flags

SUPPORTED = 'train.py of timm 1.0.27 and later, or without tasks: up to 1.0.22, and legacy_train.py'


class Ending:
    """Watches a script's end: an AikdError is one line, and a run that took no AI-KD step is an error.

    Args:
        is_main: The script is the program: its end is the end of the process.
        is_finished: Whether the run that the script continues has no epoch left.
    """

    def __init__(self, is_main: bool, is_finished: Callable[[], bool]):
        self._is_main = self._step_is_due = is_main
        self._is_finished = is_finished
        self._excepthook, self._exit = sys.excepthook, sys.exit

    def watch(self) -> None:
        """From now on."""
        self._excepthook, sys.excepthook = sys.excepthook, self._on_error
        if self._is_main:
            self._exit, sys.exit = sys.exit, self._on_exit
            atexit.register(self._check_steps)

    def unwatch(self) -> None:
        """No longer."""
        atexit.unregister(self._check_steps)
        if sys.excepthook == self._on_error:
            sys.excepthook = self._excepthook
        if sys.exit == self._on_exit:
            sys.exit = self._exit

    def excuse(self) -> None:
        """No step is due any more: one was taken, or the script failed or was interrupted."""
        self._step_is_due = False

    def _on_error(
            self,
            kind: type[BaseException],
            error: BaseException,
            traceback: types.TracebackType | None,
    ) -> None:
        self.excuse()
        if isinstance(error, AikdError) and os.environ.get('TIMM_AIKD_TRACEBACK') != '1':
            from .options import FLAGS

            print(f'error: {with_flags(str(error), FLAGS)}', file=sys.stderr)
        else:
            self._excepthook(kind, error, traceback)

    def _on_exit(self, status: Any = None) -> NoReturn:
        if status not in (None, 0):  # a script that fails says so itself
            self.excuse()
        self._exit(status)

    def _check_steps(self) -> None:
        if not self._step_is_due or self._is_finished():
            return
        print(
            'error: --aikd was given, but no AI-KD step was ever taken: the script does not train through its '
            f'train_one_epoch; supported is {SUPPORTED}', file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the only way to fail from here; nothing has been trained
