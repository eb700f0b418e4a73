"""A plain installation at work, without pytest or an extra: two phases, a comparison, and a model to publish.

    python tests/smoke.py

Run with the Python of an environment that holds an installed package; it exits with 1 where a command does.
"""
import os
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points, version
from pathlib import Path

from PIL import Image

SCRIPT = Path(__file__).parents[2] / 'examples' / 'train.py'
SMALL = ('--data-dir data --model test_resnet --num-classes 3 --input-size 3 32 32 --device cpu -b 6 -j 1 --epochs 2 '
         '--warmup-epochs 0 --opt adamw --lr 2e-3 --output out').split()


def run(*command: str) -> str:
    """Its standard output; the end of everything where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f'error: {" ".join(command)} ended with {done.returncode}')
    return done.stdout


def main() -> None:
    for extra in ('pytest', 'matplotlib', 'sklearn'):
        try:
            __import__(extra)
            print(f'note: {extra} is installed: this is no plain installation')
        except ImportError:
            pass
    script, = entry_points(group='console_scripts', name='timm-aikd')
    command = str(Path(sys.executable).with_name(script.name))
    assert run(command, '--version') == f'timm-aikd {version("timm-aikd")}\n'
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # away from the clone, whose package must not be the one that runs
        for split in ('train', 'validation'):
            for label in range(3):
                folder = Path('data', split, f'class{label}')
                folder.mkdir(parents=True)
                for i in range(12):
                    Image.new('RGB', (32, 32), (70 * label + 2 * i,) * 3).save(folder / f'{i}.png')
        run(sys.executable, str(SCRIPT), *SMALL, '--experiment', 'phase1')
        run(sys.executable, str(SCRIPT), *SMALL, '--experiment', 'phase2', '--aikd', '--aikd-teacher', 'out/phase1')
        assert 'train_aikd_kd' in Path('out/phase2/summary.csv').read_text()
        print(run(command, 'evaluate', 'out/phase1', 'out/phase2', 'data'))
        run(command, 'push', 'out/phase2', '--to-folder', 'model')
        assert Path('model/model.safetensors').stat().st_size > 10_000
        os.chdir('/')
    print(f'timm-aikd {version("timm-aikd")} works with torch {version("torch")}, timm {version("timm")}')


if __name__ == '__main__':
    main()
