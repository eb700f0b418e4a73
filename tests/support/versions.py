#!/usr/bin/env python3
"""The test suite on other versions of Python, torch and timm, each in a virtual environment of its own.

    python tests/versions.py                    # all of the table below; hours, and some GB each
    python tests/versions.py oldest middle      # some of it
    python tests/versions.py oldest -- -k loss  # with arguments for pytest

The Pythons are looked for on PATH, as `python3.10`. It prints a Markdown table of what was installed and how the tests
ended, and exits with 1 unless all passed. Bounds in pyproject.toml are what passed here.
"""
import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = {  # name: Python, and what is asked for beyond the newest that it can have
    'oldest': ('3.10', 'torch==2.5.0', 'timm==1.0.27', 'safetensors==0.4.5', 'huggingface-hub==0.27.0', 'numpy<2.3'),
    'middle': ('3.12', 'torch==2.9.1', 'timm==1.0.29'),
    'current': ('3.11', 'torch', 'timm'),
    'newest': ('3.13', 'torch', 'timm'),
}
SHOWN = ('torch', 'timm', 'huggingface_hub', 'safetensors', 'numpy')


def run_tests(python: str, wanted: tuple[str, ...], arguments: list[str], folder: Path) -> list[str]:
    """Cells of the table: what was installed, and the last line of pytest or of what went wrong before it."""
    interpreter = shutil.which(f'python{python}')
    if interpreter is None:
        return [python, *[''] * len(SHOWN), f'error: no python{python} on PATH']
    own = str(folder / 'bin' / 'python')
    for command in (
        [interpreter, '-m', 'venv', folder],  # a shim of pyenv is on PATH for Pythons that it does not run, too
        [own, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', *wanted, '-e', f'{ROOT}[test]'],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            return [python, *[''] * len(SHOWN), f'error: {" ".join(done.stdout.split())[-200:]}']
    versions = subprocess.run(
        [own, '-c', 'import importlib.metadata as m, platform, sys; print(platform.python_version(), '
         '*map(m.version, sys.argv[1:]), sep="\\n")', *SHOWN], check=True, stdout=subprocess.PIPE, text=True)
    log = ROOT / 'output' / f'versions-{folder.name}.log'
    log.parent.mkdir(exist_ok=True)
    with open(log, 'w') as file:
        tests = subprocess.run([own, '-m', 'pytest', '-q', *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    result = log.read_text().strip().splitlines()[-1].strip('= ')
    return [*versions.stdout.split(), result if tests.returncode == 0 else f'error: {result}, see {log}']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'of {", ".join(VERSIONS)} (default: all)')
    own = sys.argv[1:]
    arguments = own[own.index('--') + 1:] if '--' in own else []
    names = parser.parse_args(own[:len(own) - len(arguments)]).names or list(VERSIONS)
    for name in names:
        if name not in VERSIONS:
            parser.error(f'{name!r}: allowed are {", ".join(VERSIONS)}')
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            python, *wanted = VERSIONS[name]
            rows.append([name, *run_tests(python, tuple(wanted), arguments, Path(scratch) / name)])
        print(f'note: {name}: {rows[-1][-1]}', file=sys.stderr)
    for cells in (['', 'Python', *SHOWN, 'tests'], ['---'] * (len(SHOWN) + 3), *rows):
        print(f'| {" | ".join(cells)} |')
    sys.exit(any(re.match('error', row[-1]) is not None for row in rows))


if __name__ == '__main__':
    main()
