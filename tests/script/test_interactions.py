"""Whatever a training script can do, AI-KD does right or refuses: each row of the table is run.

Each run goes through the script's own main() on a few tiny images, and the loss of every step is compared with the
equations; rows with a `check` look at something more.
`TIMM_TRAIN_SCRIPTS=... pytest tests/script/test_interactions.py` runs the rows through all of timm's scripts.
"""
import csv
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from ..conftest import ROOT, SMALL_RUN, training_scripts
from ..support.interactions import Recorder, compiled_graphs, drive
from .interactions_table import ROWS, Row, Seen

# warnings of the scripts and of timm are not ours to fail on
pytestmark = pytest.mark.filterwarnings('ignore')


def images(folder: Path, mode: str) -> Path:
    """A copy of the image folder in another mode, for other numbers of channels."""
    copy = folder.with_name(f'{folder.name}_{mode}')
    for path in folder.rglob('*.png'):
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert(mode).save(target)
    return copy


@pytest.fixture(scope='session')
def teachers(tmp_path_factory):
    """Teachers of all the architectures and channels in the table: random weights are enough for the loss."""
    folder = tmp_path_factory.mktemp('teachers')

    def teacher(model, channels, seed=1):
        path = folder / f'{model}-{channels}-{seed}.pth'
        if not path.exists():
            torch.manual_seed(seed)
            torch.save(timm.create_model(model, num_classes=3, in_chans=channels).state_dict(), path)
        return path

    return teacher


def is_known(row: Row, words: list[str], script: Path) -> bool:
    """Whether the script has the row's flags."""
    known = script.read_text() + timm.__version__
    flags = [word for word in words if word.startswith('--') and 'aikd' not in word]
    return row.only in known and all(f"'{flag}'" in known for flag in flags)


@pytest.mark.parametrize('variant', [
    'one teacher', *(pytest.param(name, marks=pytest.mark.slow) for name in ('two teachers', 'features'))])
@pytest.mark.parametrize('name', [name for name, path in training_scripts().items() if path is not None])
@pytest.mark.parametrize('row', [pytest.param(row, marks=row.marks, id=row.words) for row in ROWS if row.words])
def test_row(row, name, variant, image_folder, teachers, tmp_path, monkeypatch, caplog, capsys):
    script = training_scripts()[name]
    words = shlex.split(row.words.replace('DATA', str(image_folder)))
    if not is_known(row, words, script):
        pytest.skip('scripts that do not have the flags of a row')
    model = 'test_vit' if 'test_vit' in words else 'test_resnet'
    seeds = (1, 2) if variant == 'two teachers' else (1,)
    command = [
        '--data-dir', images(image_folder, row.data) if row.data else image_folder, *SMALL_RUN, '--output', tmp_path,
        '--experiment', 'run', '--aikd', '--aikd-teacher',
        *(teachers(model, {'L': 1, 'RGBA': 4}.get(row.data, 3), seed) for seed in seeds),
        *(('--aikd-disc-input', 'features', '--aikd-feature-weight', '0.5') if variant == 'features' else ()),
        '--aikd-disc-hidden', '8', '--aikd-adv-weight', '0.3', *words]
    if row.refused:
        with pytest.raises(SystemExit) as caught:
            drive(script, command, monkeypatch, caplog)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 2 and row.refused in error and len(error) < 300
        assert not (tmp_path / 'run').exists()
        return
    recorder = Recorder()
    monkeypatch.setattr('timm_aikd.teacher.check.better_than_chance', lambda *_: True)  # random weights are not
    torch._dynamo.reset()
    drive(script, command, monkeypatch, caplog, recorder)
    accumulate = words[words.index('--grad-accum-steps') + 1] if '--grad-accum-steps' in words else 1
    recorder.check_backward(int(accumulate))
    with open(tmp_path / 'run/summary.csv') as file:
        rows = list(csv.DictReader(file))
    assert 'train_aikd_kd' in rows[-1]
    files = sorted(path.name for path in (tmp_path / 'run').glob('aikd-memory-*'))
    assert row.check(Seen(
        recorder.run, recorder.steps, rows, caplog.text, files, [*recorder.graphs, compiled_graphs()]))


@pytest.mark.parametrize('factor', [0.5, 2.])
@pytest.mark.parametrize('accumulate', [1, 4])
def test_a_gradient_of_another_size_would_be_noticed(accumulate, factor):
    """In the check itself: six batches in updates of four have divisors 4 4 4 4 2 2."""
    recorder = Recorder()
    recorder.steps = [{'epoch': 0, 'output': torch.float32}] * 6
    recorder.expected = [1. + i for i in range(6)]
    divisors = {1: [1] * 6, 4: [4, 4, 4, 4, 2, 2]}[accumulate]
    recorder.backward = [loss / divisor for loss, divisor in zip(recorder.expected, divisors, strict=True)]
    recorder.check_backward(accumulate)
    recorder.backward[5] *= factor
    with pytest.raises(AssertionError):
        recorder.check_backward(accumulate)


def test_rows_without_a_run_name_a_test_that_is_collected():
    named = {f'tests/script/{row.test}' for row in ROWS if not row.words}
    files = sorted({name.split('::')[0] for name in named})
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '--collect-only', '-q', '-n0', *files], cwd=ROOT, capture_output=True,
        text=True)
    collected = {line.split('[')[0] for line in done.stdout.splitlines()}
    assert done.returncode == 0 and named - collected == set(), done.stdout[-1000:]
