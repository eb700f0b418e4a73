"""The evidence: that it is kept, resumed and summed up rightly; on made-up images, and quickly on the real ones."""
import csv
import gzip
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from .conftest import ROOT, run

SCRIPT = ROOT / 'examples' / 'benchmarks' / 'accuracy.py'
FASHION = Path('/usr/share/datasets/fashion-mnist')
BRIEF = ('--regimes', 'small-resnet', '--epochs-scale', '0.04')


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
            (folder / f'{name}-{kind}-ubyte.gz').write_bytes(gzip.compress(head + data.tobytes(), 1))
    return folder


def test_runs_resumes_and_reports(images, tmp_path):
    results = tmp_path / 'results.csv'
    where = ('--data', images, '--results', results, *BRIEF)
    run(SCRIPT, *where, '--methods', 'ce', 'aikd', '--seeds', '0')
    first = results.read_bytes()
    done = run(SCRIPT, *where, '--methods', 'ce', 'aikd', '--seeds', '0', '1')
    assert results.read_bytes().startswith(first)  # what is there is kept, and not done again
    assert 'small-resnet ce 1 ' in done.stdout and not re.search(r'small-resnet \S+ 0 ', done.stdout)
    with open(results) as file:
        rows = [row for row in csv.DictReader(file) if row['part'] == 'test']
    assert sorted((row['method'], row['seed']) for row in rows) == [  # ce-half is the teacher
        ('aikd', '0'), ('aikd', '1'), ('ce', '0'), ('ce', '1'), ('ce-half', '0'), ('ce-half', '1')]

    report = run(SCRIPT, *where, '--report', '--seeds', '0', '1').stdout
    nll = {name: [float(row['nll']) for row in rows if row['method'] == name] for name in ('ce', 'aikd')}
    low, high = ttest_rel(nll['aikd'], nll['ce']).confidence_interval(0.95)
    row = next(line for line in report.partition('Minus ce')[2].splitlines() if line.startswith('| aikd | 2 | '))
    assert f'{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}' in row
    assert f'{statistics.mean(nll["ce"]):.3f} ± {statistics.stdev(nll["ce"]):.3f}' in report
    scaled = {row['seed']: row for row in rows if row['method'] == 'ce'}  # plain training knows its scaled metrics
    change = [float(row['nll_scaled']) - float(scaled[row['seed']]['nll_scaled']) for row in rows
              if row['method'] == 'aikd']
    gains = next(line for line in report.splitlines() if line.startswith('| from scratch | right | ResNet |'))
    assert f'{statistics.mean(change):+.3f} ± ' in gains and 'n = 2' in gains


def test_weights_of_a_teacher_that_are_gone_are_trained_again(images, tmp_path):
    results = tmp_path / 'results.csv'
    where = ('--data', images, '--results', results, *BRIEF, '--seeds', '0', '--methods')
    run(SCRIPT, *where, 'ce-half')
    weights, = (tmp_path / 'results.weights').iterdir()
    weights.unlink()
    run(SCRIPT, *where, 'aikd')
    assert weights.exists()
    methods = [line.split(',')[1] for line in results.read_text().splitlines()[1:]]
    assert methods == ['ce-half'] * 2 + ['aikd'] * 2  # its rows are not written twice


@pytest.mark.parametrize('seeds', [1, 2])
def test_the_best_epoch_and_several_files(tmp_path, seeds):
    """Rows as the benchmark writes them, one method a file; the second file has no column of scaled metrics."""
    runs = {'ce': (20., 0.8, 0.7), 'distance-3': (16., 0.6, 0.55), 'aikd': (18., 0.7, 0.65)}
    paths = []
    for method, (error, nll, scaled) in runs.items():
        paths.append(tmp_path / f'{method}.csv')
        with open(paths[-1], 'w') as file:
            file.write('regime,method,seed,epochs_scale,part,seconds_per_step,error,nll,ece,aurc,environment,teacher_gap,'
                       'teacher_temperature' + (',nll_scaled,ece_scaled' if method != 'aikd' else '') + '\n')
            for seed in range(seeds):
                for part, better in (('test', 0), ('test-best', 1)):
                    file.write(
                        f'fine-tune-noisy,{method},{seed},1.0,{part},0.1,{error - better + seed},{nll},5,60,here,,'
                        + (f',{scaled + seed / 10},1' if method != 'aikd' else '') + '\n')
    report = run(SCRIPT, '--report', '--results', *paths, paths[0], '--regimes', 'fine-tune', 'fine-tune-noisy').stdout
    gains, = [line for line in report.splitlines() if line.startswith('| fine-tuning |')]  # no rows of right labels
    interval = ' ± 0.00' if seeds == 2 else ''
    assert f'-4.00{interval}' in gains and f'n = {seeds}' in gains  # no interval of one seed
    assert gains.split('|').count('  ') == 2  # half the epochs, and AI-KD, whose file lacks the scaled metrics
    best = report.partition('each at its best epoch')[2]
    assert f'| distance-3 | {seeds} | {15. + (seeds - 1) / 2:.2f}' in best


def test_the_others_train_as_they_should(images, tmp_path):
    """Three epochs with wrong labels among the images, judged on validation images."""
    where = ('--data', images, '--results', tmp_path / 'results.csv', '--regimes', 'noisy-resnet', '--seeds', '0',
             '--epochs-scale', '0.075', '--methods', 'ce', 'kd', 'timm-kd', 'pskd', 'mixup', 'ema', 'kd-3')
    run(SCRIPT, *where)
    with open(tmp_path / 'results.csv') as file:
        rows = {row['method']: row for row in csv.DictReader(file) if row['part'] == 'validation'}
    nll = {name: float(row['nll']) for name, row in rows.items()}
    assert nll['timm-kd'] == pytest.approx(nll['kd'], rel=1e-5)
    assert len({nll[name] for name in ('ce', 'kd', 'pskd', 'mixup', 'ema', 'kd-3')}) == 6
    assert float(rows['ce']['nll_scaled']) < nll['ce']
    report = run(SCRIPT, *where, '--report', '--on', 'validation', '--minus', 'pskd').stdout
    assert f'| kd | 1 | {float(rows["kd"]["error"]):.2f} |' in report
    assert f'| kd | 1 | {float(rows["kd"]["error"]) - float(rows["pskd"]["error"]):+.2f} |' in report
    assert '| ce-ts | 1 | ' in report.partition('Minus pskd')[2]  # plain training with its temperature scaled


@pytest.mark.parametrize('arguments, text', [
    (('--data', 'nowhere'), 'nowhere/train-images-idx3-ubyte.gz: no such file: apt install dataset-fashion-mnist'),
    (('--report', '--results', 'nowhere.csv'), 'nowhere.csv: no such file'),
    (('--results', 'a.csv', 'b.csv'), 'several files with --report only'),
    (('--methods', 'nothing'), "invalid choice: 'nothing'"),
    (('--methods', 'distance-3'), 'distance-3: only where ImageNet weights are fine-tuned'),
])
def test_bad_input(tmp_path, arguments, text):
    done = run(SCRIPT, *BRIEF, '--results', tmp_path / 'x.csv', *arguments, check=False)
    assert done.returncode in (1, 2) and re.search(text, done.stderr) and 'Traceback' not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason='NOT run: apt install dataset-fashion-mnist')
def test_on_the_real_images_the_nll_falls(tmp_path):
    results = tmp_path / 'results.csv'
    run(SCRIPT, '--regimes', 'small-resnet', '--methods', 'ce', 'aikd', '--seeds', '0', '1',
        '--epochs-scale', '0.5', '--results', results)
    with open(results) as file:
        rows = [row for row in csv.DictReader(file) if row['part'] == 'test']
    plain, ours = (statistics.mean(float(row['nll']) for row in rows if row['method'] == name)
                   for name in ('ce', 'aikd'))
    assert ours < plain
