"""Runs a script as Python would, with the patch armed."""
import builtins
import os
import sys
import types
from importlib.machinery import SourceFileLoader

from . import autoload


def run_script(path: str, argv: list[str]) -> None:
    """Run a script as `python path argv...` does: a fresh `__main__`, `sys.argv` and `sys.path[0]` of its own.

    What the script raises passes through, its traceback printed without the frames of this package.

    Raises:
        OSError: The script cannot be read.
    """
    with open(path, 'rb') as file:
        source = file.read()
    sys.argv = [path, *argv]
    path = os.path.abspath(path)
    main = types.ModuleType('__main__')
    main.__dict__.update(
        __builtins__=builtins, __cached__=None, __file__=path, __loader__=SourceFileLoader('__main__', path))
    if sys.version_info < (3, 14):
        main.__dict__['__annotations__'] = {}
    sys.modules['__main__'] = main
    if not getattr(sys.flags, 'safe_path', False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    autoload.watch_parsers()
    try:
        exec(compile(source, path, 'exec', dont_inherit=True), main.__dict__)
    except BaseException as error:
        _show_only(error.__traceback__ and error.__traceback__.tb_next)  # the script's frames; the compiler has none
        raise


def _show_only(traceback: types.TracebackType | None) -> None:
    show = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, _: types.TracebackType | None) -> None:
        show(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = excepthook
