"""What the plug-in adds to `import torch`, and what importing the package costs, in milliseconds.

    python examples/benchmark_import.py [--runs 15]

Medians of fresh processes. The entry point is timed inside the process, around what PyTorch does with it at the end
of `import torch`: load and call. Whole imports of torch are paired with and without plug-ins; their difference is
mostly the machine's noise.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys

IN_PROCESS = '''
import time, torch
from importlib.metadata import entry_points
entry, = (e for e in entry_points(group='torch.backends') if e.name == 'timm_aikd')
start = time.perf_counter()
entry.load()()
print(1000 * (time.perf_counter() - start))
'''
PARSE = '''
import argparse, time
from timm_aikd.autoload import arm
parser = argparse.ArgumentParser()
parser.add_argument('--x')
def once():
    start = time.perf_counter()
    for _ in range(100):
        parser.parse_args([])
    return 10 * (time.perf_counter() - start)
once()
before = once()
arm()
print(once() - before)
'''


def milliseconds(code: str, **env) -> float:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, **env}, check=True, capture_output=True, text=True)
    return float(done.stdout)


def timed(statement: str) -> str:
    return f'import time; start = time.perf_counter(); {statement}; print(1000 * (time.perf_counter() - start))'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', type=int, default=15, help='fresh processes of each kind')
    runs = range(parser.parse_args().runs)
    entry = [milliseconds(IN_PROCESS, TORCH_DEVICE_BACKEND_AUTOLOAD='0') for _ in runs]
    parse = [milliseconds(PARSE) for _ in runs]
    package = [milliseconds(timed('import timm_aikd')) for _ in runs]
    pairs = [
        tuple(milliseconds(timed('import torch'), TORCH_DEVICE_BACKEND_AUTOLOAD=flag) for flag in '10') for _ in runs]
    print(f'Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, {len(runs)} processes')
    for what, values in (
        ('entry point, as PyTorch calls it', entry),
        ('one parse of another program\'s parser, added', parse),
        ('import timm_aikd alone', package),
        ('import torch with all plug-ins', [on for on, _ in pairs]),
        ('import torch without plug-ins', [off for _, off in pairs]),
        ('difference of the pairs', [on - off for on, off in pairs]),
    ):
        print(f'{what:48s} {statistics.median(values):9.3f} ms  ({min(values):.3f} to {max(values):.3f})')


if __name__ == '__main__':
    main()
