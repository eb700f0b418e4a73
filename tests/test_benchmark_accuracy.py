"""The evidence: that it is kept, resumed and summed up rightly; on made-up images, and quickly on the real ones."""
import csv
import json
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from .conftest import ROOT, run

SCRIPT = ROOT / 'examples' / 'benchmark_accuracy.py'
PLAIN_SCRIPT = SCRIPT.with_name('benchmark_variants.py')
VARIANTS = re.findall(r"^    '([\w.-]+)': Method\(", PLAIN_SCRIPT.read_text(), re.MULTILINE)
FASHION = Path('/usr/share/datasets/fashion-mnist')
BRIEF = ('--regimes', 'small', '--students', 'resnet', '--epochs-scale', '0.04')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Four files such as Fashion-MNIST's, of ten noisy patterns."""
    folder, generator = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    patterns = generator.integers(0, 120, (10, 28, 28), dtype=np.uint8)
    for name, count in (('train', 60_000), ('t10k', 10_000)):
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        pixels = patterns[labels] + generator.integers(0, 135, (count, 1, 28), dtype=np.uint8)
        for kind, data in (('images-idx3', pixels), ('labels-idx1', labels)):
            head = bytes([0, 0, 8, data.ndim]) + np.array(data.shape, '>u4').tobytes()
            (folder / f'{name}-{kind}-ubyte').write_bytes(head + data.tobytes())
    return folder


def test_runs_resumes_and_reports(images, tmp_path):
    results = tmp_path / 'results.csv'
    where = ('--data', images, '--results', results, *BRIEF)
    run(SCRIPT, *where, '--methods', 'ce', 'aikd-store', '--seeds', '0', '--shard', '1/1')
    first = results.read_bytes()
    done = run(SCRIPT, *where, '--methods', 'ce', 'aikd-store', '--seeds', '0', '1')
    assert results.read_bytes().startswith(first)  # what is there is kept, and not done again
    assert 'seed 0' not in done.stdout + done.stderr
    with open(results) as file:
        rows = [row for row in csv.DictReader(file) if row['part'] == 'test']
    assert sorted((row['method'], row['seed']) for row in rows) == [
        ('aikd-store', '0'), ('aikd-store', '1'), ('ce', '0'), ('ce', '1')]

    report = run(SCRIPT, *where, '--report', '--seeds', '0', '1').stdout
    nll = {name: [float(row['nll']) for row in rows if row['method'] == name] for name in ('ce', 'aikd-store')}
    low, high = ttest_rel(nll['aikd-store'], nll['ce']).confidence_interval(0.95)
    row = next(line for line in report.partition('Minus ce')[2].splitlines() if line.startswith('| aikd-store | 2 | '))
    assert f'{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}' in row
    assert f'{statistics.mean(nll["ce"]):.3f} ± {statistics.stdev(nll["ce"]):.3f}' in report
    for picture in ('metrics', 'terms', 'reliability'):
        assert (tmp_path / f'results-test-small-resnet-{picture}.png').stat().st_size > 5000


def test_written_plainly_it_trains_as_the_package_does(images, tmp_path):
    rows = validation_rows(images, tmp_path / 'results.csv', 'plain')
    nll = {name: float(row['nll']) for name, row in rows.items()}
    assert nll['plain'] == pytest.approx(nll['aikd-store'], rel=1e-3)  # but for the store's float16
    assert rows['ce-ts']['error'] == rows['ce']['error'] and nll['ce-ts'] < nll['ce']  # as calibration leaves it


@pytest.mark.slow
def test_every_variant_changes_something(images, tmp_path):
    rows = validation_rows(images, tmp_path / 'results.csv', *VARIANTS)
    assert len({row['nll'] for row in rows.values()}) == len(rows) == len(VARIANTS) + 3


def validation_rows(images, results, *variants):
    """Of these, `aikd-store`, `ce` and `ce-ts`, after three epochs with wrong labels among the images."""
    where = ('--data', images, '--results', results, *BRIEF, '--regimes', 'noisy', '--seeds', '0',
             '--epochs-scale', '0.075', '--methods')
    run(SCRIPT, *where, 'aikd-store', 'ce-ts')
    run(PLAIN_SCRIPT, *where, *variants)
    assert '| plain | 1 |' in run(PLAIN_SCRIPT, *where, *variants, '--report').stdout.partition('Minus ce')[2]
    with open(results) as file:
        return {row['method']: row for row in csv.DictReader(file) if row['part'] == 'validation'}


def test_the_tables_of_the_readme_are_those_of_the_runs(tmp_path):
    """With today's defaults: a changed one has other digests, and its rows would be missing."""
    for name in ('accuracy.csv', 'accuracy.jsonl'):
        shutil.copy(ROOT / 'examples' / 'results' / name, tmp_path)
    printed = run(SCRIPT, '--report', '--results', tmp_path / 'accuracy.csv').stdout
    tables = [line for line in printed.splitlines() if line.startswith('|')]
    assert set(tables) <= set((ROOT / 'examples' / 'results' / 'README.md').read_text().splitlines())
    section = re.search(r'^## What it gains$.*?^## ', (ROOT / 'README.md').read_text(), re.MULTILINE | re.DOTALL)[0]
    shown = [line for line in section.splitlines() if line.startswith('|')]
    assert any(line.startswith('| aikd-store |') for line in shown) and set(shown) <= set(tables)


@pytest.mark.slow
def test_a_sweep_never_sees_the_test_images(images, tmp_path):
    where = ('--data', images, '--results', tmp_path / 'sweep.csv', *BRIEF, '--seeds', '0')
    run(SCRIPT, *where, '--sweep', 'adv_weight', '--base', '{"alpha": 0.5}')
    with open(tmp_path / 'sweep.csv') as file:
        rows = list(csv.DictReader(file))
    tried = [json.loads(row['options']) for row in rows if row['method'].startswith('sweep')]
    assert {row['part'] for row in rows if row['method'] != 'ce'} == {'validation'}
    assert all(options['alpha'] == 0.5 for options in tried)
    assert {options.get('adv_weight') for options in tried} >= {0., 0.01, 0.3}
    report = run(SCRIPT, *where, '--sweep', 'adv_weight', '--base', '{"alpha": 0.5}', '--report').stdout
    assert '"adv_weight": 0.3' in report
    done = run(SCRIPT, *where, '--sweep', '--part', 'test', check=False)
    assert done.returncode == 2 and 'options are not chosen on test images' in done.stderr


@pytest.mark.parametrize('arguments, text', [
    (('--data', 'nowhere'), r'no train-images-idx3-ubyte\[.gz\] in nowhere: apt install dataset-fashion-mnist'),
    (('--report', '--results', 'nowhere.csv'), 'nowhere.csv: no such file'),
    (('--override', '{"alpha": 2}'), '--aikd-alpha 2: allowed is'),
    (('--shard', '3/2'), '--shard'),
])
def test_bad_input(tmp_path, arguments, text):
    done = run(SCRIPT, *BRIEF, '--results', tmp_path / 'x.csv', *arguments, check=False)
    assert done.returncode in (1, 2) and re.search(text, done.stderr) and 'Traceback' not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason='NOT run: apt install dataset-fashion-mnist')
def test_quick():
    assert 'NLL of plain training' in run(SCRIPT, '--quick').stdout
