"""What the plug-in adds to `import torch`, to a script's `--help` and to the way to its first step, in milliseconds.

    python examples/benchmarks/start.py [--runs 15] [--script train.py] [--model resnet50]

Medians of fresh processes. The entry point is timed inside the process, around what PyTorch does with it at the end
of `import torch`: load and call. Whole processes are paired, with and without; their difference is mostly the
machine's noise. The first step is that of the training script on random images, from the launch of the process until
the loss of the first batch is asked for its gradients: with AI-KD that is imports, teacher (a file of the same
architecture), T_c on the validation images, D, and the store.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from PIL import Image

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
FIRST_STEP = '''
import os, runpy, sys, time, torch
launched = float(sys.argv.pop())
def backward(self, *args, **kwargs):
    print('FIRST', 1000 * (time.time() - launched), flush=True)
    os._exit(0)
torch.Tensor.backward = backward
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def milliseconds(code: str, **env) -> float:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, **env}, check=True, capture_output=True, text=True)
    return float(done.stdout)


def timed(statement: str) -> str:
    return f'import time; start = time.perf_counter(); {statement}; print(1000 * (time.perf_counter() - start))'


def wall(*command: str, **env) -> float:
    """How long a process of Python takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], env={**os.environ, **env}, check=True, capture_output=True)
    return 1000 * (time.perf_counter() - start)


def first_step(folder: Path, script: str, model: str, *options: str) -> float:
    """From the launch of a training run to its first backward."""
    done = subprocess.run(
        [sys.executable, '-c', FIRST_STEP, script, '--data-dir', str(folder), '--model', model, '--num-classes', '3',
         '-b', '3', '-j', '1', '--device', 'cpu', '--epochs', '2', '--output', str(folder / 'output'), *options,
         str(time.time())], capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith('FIRST'):
            return float(line.split()[1])
    raise RuntimeError(done.stderr)


def prepare(folder: Path, model: str) -> str:
    """A few random images a class and split, and a teacher's weights."""
    for split in ('train', 'validation'):
        for label in range(3):
            (folder / split / f'class{label}').mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / split / f'class{label}' / f'{i}.png')
    torch.save(timm.create_model(model, num_classes=3).state_dict(), folder / 'teacher.pth')
    return str(folder / 'teacher.pth')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', type=int, default=15, help='fresh processes of each kind')
    parser.add_argument('--script', default=str(Path(__file__).parents[1] / 'train.py'), help='a training script')
    parser.add_argument('--model', default='resnet50', help='what it trains')
    args = parser.parse_args()
    runs = range(args.runs)
    entry = [milliseconds(IN_PROCESS, TORCH_DEVICE_BACKEND_AUTOLOAD='0') for _ in runs]
    parse = [milliseconds(PARSE) for _ in runs]
    package = [milliseconds(timed('import timm_aikd')) for _ in runs]
    pairs = [
        tuple(milliseconds(timed('import torch'), TORCH_DEVICE_BACKEND_AUTOLOAD=flag) for flag in '10') for _ in runs]
    off = {'TIMM_AIKD_AUTOLOAD': '0'}
    texts = [(wall(args.script, '--help'), wall(args.script, '--help', **off)) for _ in runs]
    with tempfile.TemporaryDirectory() as folder:
        teacher = prepare(Path(folder), args.model)
        steps = [
            (first_step(Path(folder), args.script, args.model, '--aikd', '--aikd-teacher', teacher),
             first_step(Path(folder), args.script, args.model)) for _ in runs]
    print(f'Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, {len(runs)} processes')
    for what, values in (
        ('entry point, as PyTorch calls it', entry),
        ('one parse of another program\'s parser, added', parse),
        ('import timm_aikd alone', package),
        ('import torch with all plug-ins', [on for on, _ in pairs]),
        ('import torch without plug-ins', [off for _, off in pairs]),
        ('difference of the pairs', [on - off for on, off in pairs]),
        ('the script\'s --help with the package', [on for on, _ in texts]),
        ('difference from without', [on - off for on, off in texts]),
        ('launch to first step, plain', [plain for _, plain in steps]),
        ('launch to first step, AI-KD', [aikd for aikd, _ in steps]),
        ('difference of the pairs', [aikd - plain for aikd, plain in steps]),
    ):
        print(f'{what:48s} {statistics.median(values):9.3f} ms  ({min(values):.3f} to {max(values):.3f})')


if __name__ == '__main__':
    main()
