"""Runs our own script and commands in a fork of a process that has imported torch and timm: most of a test's time.

Nothing else is imported there, and nothing has been run. Scripts of timm, and whatever depends on the environment at
import, get a process of their own.
"""
import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['torchvision', 'timm.data', 'timm.task', 'timm.optim', 'timm_aikd.task', __name__])


def run_warm(command: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
    """As `subprocess.run` with captured text; the command is a script or -m with a module, and arguments."""
    with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
        files = [_context.reducer.DupFd(file.fileno()) for file in (out, err)]
        process = _context.Process(target=_child, args=(command, environment, os.getcwd(), files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(command, process.exitcode, out.read(), err.read())


def _child(command: list[str], environment: dict[str, str], folder: str, files: list) -> None:
    """What Python does with a command, from its arguments to its exit code."""
    for number, file in enumerate(files, start=1):
        os.dup2(file.detach(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # for the script's workers the default, not ours
    code = 0
    try:
        if command[0] == '-m':
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name='__main__', alter_sys=True)
        else:
            from timm_aikd.script.launch import run_script

            run_script(command[0], command[1:])
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
        if code and not isinstance(exit.code, int):
            print(exit.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
