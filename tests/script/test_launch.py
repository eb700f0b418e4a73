"""`python -m timm_aikd script.py` against `python script.py`: the script must not see a difference."""
import json
import signal
from importlib.metadata import entry_points

import pytest

from timm_aikd import __version__
from timm_aikd.__main__ import main

from ..conftest import run

WORLD = '''"""A script that prints its own world."""
import json, os, sys, __main__
print(json.dumps(dict(
    argv=sys.argv, path=sys.path, name=__name__, file=__file__, doc=__doc__, package=__package__, spec=str(__spec__),
    loader=type(__loader__).__name__, main=__main__.__file__, same=__main__.__dict__ is globals(),
    names=sorted(name for name in globals() if name.startswith("__")), cwd=os.getcwd(),
    builtins=type(__builtins__).__name__,
)))
'''


def both(script, *arguments, cwd, **env):
    """The script run by Python and by us."""
    return [
        run('-c', f'import os, sys; os.chdir({str(cwd)!r}); os.execv(sys.executable, [sys.executable, *{command!r}])',
            check=False, TORCH_DEVICE_BACKEND_AUTOLOAD='0', **env)
        for command in ([script, *arguments], ['-m', 'timm_aikd', script, *arguments])
    ]


@pytest.mark.parametrize('where', ['script.py', 'folder/script.py'])
def test_the_script_sees_the_same_world(tmp_path, where):
    (tmp_path / 'folder').mkdir()
    (tmp_path / where).write_text(WORLD)
    python, ours = both(where, '--flag', '-m', 'x y', cwd=tmp_path)
    assert json.loads(python.stdout) == json.loads(ours.stdout), ours.stderr


@pytest.mark.parametrize('body', [
    'import sys; sys.exit(17)',
    'import sys; sys.exit("last words")',
    'raise SystemExit',
    'def f():\n    return 1 / 0\nf()',
    'try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError("x") from e',
    'this is no Python',
    'raise KeyboardInterrupt',
    'import atexit, __main__\natexit.register(lambda: print(__main__.value))\nvalue = 3\nraise ValueError(value)',
])
def test_ends_as_python_ends_it(tmp_path, body):
    (tmp_path / 'script.py').write_text(body)
    python, ours = both('script.py', cwd=tmp_path)
    assert (python.returncode, python.stdout, python.stderr) == (ours.returncode, ours.stdout, ours.stderr)
    if 'KeyboardInterrupt' in body:
        assert ours.returncode == -signal.SIGINT


def test_spawned_workers_import_the_script_as_python_would(tmp_path):
    (tmp_path / 'script.py').write_text(
        'import multiprocessing\n\ndef square(x):\n    return x * x\n\nif __name__ == "__main__":\n'
        '    with multiprocessing.get_context("spawn").Pool(1) as pool:\n        print(pool.map(square, [2, 3]))\n')
    python, ours = both('script.py', cwd=tmp_path)
    assert python.stdout == ours.stdout == '[4, 9]\n', ours.stderr


def test_the_command_run_is_the_same(tmp_path):
    (tmp_path / 'script.py').write_text(WORLD)
    script = tmp_path / 'script.py'
    assert run('-m', 'timm_aikd', 'run', script, '--help').stdout == run('-m', 'timm_aikd', script, '--help').stdout


@pytest.mark.parametrize('arguments, code, stream, text', [
    ([], 2, 'stdout', 'usage: timm-aikd COMMAND'),
    (['--help'], 0, 'stdout', 'usage: timm-aikd COMMAND'),
    (['--version'], 0, 'stdout', f'timm-aikd {__version__}'),
    (['nowhere.py'], 1, 'stderr', 'nowhere.py is neither a command (run, evaluate, push) nor the path of a script'),
    (['run'], 2, 'stdout', 'usage: timm-aikd run SCRIPT'),
    (['run', '--help'], 0, 'stdout', 'train.py --help` lists the options'),
    (['run', 'nowhere.py'], 1, 'stderr', 'cannot read nowhere.py: No such file or directory; give the path of a'),
    (['evaluate', '--help'], 0, 'stdout', 'usage: timm-aikd evaluate'),
    (['evaluate'], 2, 'stderr', 'required: MODEL, DATA'),
    (['push', '--help'], 0, 'stdout', 'usage: timm-aikd push'),
    (['push', 'x', '--bad'], 2, 'stderr', 'unrecognized arguments: --bad'),
])
def test_its_own_messages(arguments, code, stream, text):
    done = run('-m', 'timm_aikd', *arguments, check=False)
    assert done.returncode == code and text in getattr(done, stream) and 'Traceback' not in done.stderr


def test_the_console_script_is_the_module():
    script, = entry_points(group='console_scripts', name='timm-aikd')
    assert script.load() is main
