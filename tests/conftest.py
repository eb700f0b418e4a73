"""Shared fixtures: tiny models, tiny image folders, and the training scripts to drive."""
import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from PIL import Image

from timm_aikd.__main__ import main
from timm_aikd.script import autoload

from .support.warm import run_warm

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'  # of all processes: sums in another order are other sums


class TinyNet(nn.Module):
    """Two layers with BatchNorm and dropout: all that tells train mode from eval mode."""

    def __init__(self, num_classes=5, size=4):
        super().__init__()
        self.num_classes = num_classes
        self.body = nn.Sequential(nn.Linear(size, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def tiny_net():
    return TinyNet


def write_images(folder: Path, classes: int = 3, per_class: int = 12, size: int = 16) -> Path:
    """An image folder with a train and a validation split; a class is told by its brightness."""
    generator = torch.Generator().manual_seed(0)
    for split in ('train', 'validation'):
        for label in range(classes):
            target = folder / split / f'class{label}'
            target.mkdir(parents=True)
            for i in range(per_class):
                level = 40 + 80 * label + torch.randint(-15, 15, (size, size), generator=generator)
                Image.fromarray(level.to(torch.uint8).numpy()).convert('RGB').save(target / f'{i}.png')
    return folder


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images') / 'data')


def unwatch_parsers() -> None:
    """Give argparse its own method back, as if torch had not been imported."""
    if autoload._original is not None:
        argparse.ArgumentParser.parse_known_args, autoload._original = autoload._original, None


WITHOUT_TASKS = ('v1.0.22', 'legacy')


def training_scripts() -> dict[str, Path]:
    """Our own script, and those of timm that `TIMM_TRAIN_SCRIPTS` holds: FOLDER/<version>/train.py."""
    scripts = {'examples': ROOT / 'examples' / 'train.py'}
    folder = os.environ.get('TIMM_TRAIN_SCRIPTS')
    for version in ('v1.0.27', 'v1.0.28', 'newest', *WITHOUT_TASKS):
        scripts[version] = Path(folder) / version / 'train.py' if folder else None
    return scripts


@pytest.fixture(params=[name for name, path in training_scripts().items() if path is not None])
def train_script(request):
    """Each training script that is at hand; test_scripts tells in one line where those of timm are not."""
    return training_scripts()[request.param]


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls `timm-aikd` in this process; its exit code or last words, and what it printed."""
    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['timm-aikd', *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, capsys.readouterr().out
    return call


SMALL_RUN = (
    '--model', 'test_resnet', '--num-classes', '3', '--input-size', '3', '32', '32', '--device', 'cpu', '-b', '6',
    '--opt', 'adamw', '--lr', '2e-3', '--sched', 'cosine', '--warmup-epochs', '0', '--epochs', '2', '--no-aug',
    '--smoothing', '0', '-j', '1', '--log-interval', '100',
)


def run(*command, check: bool = True, timeout: float = 240, **env) -> subprocess.CompletedProcess:
    """Run Python with the arguments given, in the tests' environment changed by `env`; a value None unsets."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), **env}
    environment = {name: value for name, value in environment.items() if value is not None}
    words = list(map(str, command))
    if not env and (words[:2] == ['-m', 'timm_aikd'] or (ROOT / 'examples') in Path(words[0]).parents):
        done = run_warm(words, environment, timeout)
    else:
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, timeout=timeout, env=environment)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done
