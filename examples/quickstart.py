#!/usr/bin/env python3
"""AI-KD against plain training on real images, in minutes on a CPU.

    pip install "timm-aikd[examples]"
    python examples/quickstart.py

The images are scikit-learn's digits: 300 to train on, 300 to validate, 1,197 to test. For every seed,

    phase 1   train.py                                       plain training: the baseline, and the teacher of phase 2
    phase 2   train.py --aikd --aikd-teacher PHASE-1-FOLDER  the same seed, and so the same initial weights and batches

after which both are measured on the test images as they are after the last epoch. Everything is written below --output:
the images, one folder and one log for each run, and curves.png.
"""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.models import load_checkpoint

from timm_aikd.calibration import expected_calibration_error, fit_temperature

try:
    import matplotlib
    from scipy.stats import t as student_t
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    sys.exit(f'{error}: pip install "timm-aikd[examples]"')

SPLITS = {'train': 300, 'validation': 300, 'test': 1197}
MODEL = {'model_name': 'test_efficientnet_gn', 'num_classes': 10, 'in_chans': 1}
IMAGES = {'input_size': (1, 16, 16), 'mean': (0.5,), 'std': (0.5,), 'crop_pct': 1.}
METRICS = {'top-1 %': ('.2f', 'higher'), 'NLL': ('.3f', 'lower'), 'ECE %': ('.2f', 'lower')}

parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
parser.add_argument('--output', type=Path, default=Path('output/quickstart'), metavar='DIR')
parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N')
parser.add_argument('--epochs', type=int, default=30, metavar='N')
parser.add_argument('--train-script', type=Path, default=Path(__file__).with_name('train.py'), metavar='FILE',
                    help='the training script: that of this folder, or timm\'s own train.py')
parser.add_argument('--device', default='cpu', metavar='NAME')


class RunError(Exception):
    """A training has failed."""


def main():
    args = parser.parse_args()
    if not args.train_script.is_file():
        parser.error(f'--train-script {args.train_script}: no such file')
    start = time.time()
    write_images(args.output / 'digits')
    jobs = min(2, os.cpu_count() or 1) if args.device == 'cpu' else 1
    print(f'{len(args.seeds)} seeds, {args.epochs} epochs, {jobs} at a time; files go to {args.output}', flush=True)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            seconds = list(pool.map(lambda seed: train_pair(args, seed), args.seeds))
    except RunError as error:
        sys.exit(f'error: {error}')
    report(args, seconds)
    plot_curves(args)
    print(f'\nCurves: {args.output / "curves.png"}. {time.time() - start:.0f} s in all.')


def write_images(folder):
    """The 8x8 images as PNG files, every class in equal parts in every split."""
    digits = load_digits()
    rest = range(len(digits.target))
    for split, count in SPLITS.items():
        chosen = rest
        if count < len(rest):
            chosen, rest = train_test_split(rest, train_size=count, stratify=digits.target[rest], random_state=0)
        for index in chosen:
            path = folder / split / str(digits.target[index]) / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index] * 255 / 16).round().astype('uint8')).save(path)


def run_folder(args, phase, seed):
    return args.output / f'{phase}-seed{seed}'


def train_pair(args, seed):
    """Seconds of phase 1 and of phase 2."""
    teacher = run_folder(args, 'baseline', seed)
    return train(args, 'baseline', seed), train(args, 'aikd', seed, '--aikd', '--aikd-teacher', teacher)


def train(args, phase, seed, *options):
    """Run the training script; its log is kept next to the run's folder."""
    folder = run_folder(args, phase, seed)
    (folder / 'summary.csv').unlink(missing_ok=True)  # of an earlier run; timm would append to it
    command = [
        sys.executable, args.train_script, '--data-dir', args.output / 'digits',
        '--output', folder.parent, '--experiment', folder.name, '--seed', seed, '--device', args.device,
        '--model', MODEL['model_name'], '--num-classes', MODEL['num_classes'], '--in-chans', MODEL['in_chans'],
        '--input-size', *IMAGES['input_size'], '--mean', *IMAGES['mean'], '--std', *IMAGES['std'],
        '--crop-pct', IMAGES['crop_pct'], '--no-aug', '--smoothing', 0, '--workers', 1,
        '--batch-size', 50, '--validation-batch-size', 300, '--opt', 'adamw', '--lr', 3e-3, '--weight-decay', 0.05,
        '--epochs', args.epochs, '--warmup-epochs', min(2, args.epochs - 1), '--checkpoint-hist', 1, *options,
    ]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'} if args.device == 'cpu' else None
    start = time.time()
    log = Path(f'{folder}.log')
    with open(log, 'w') as file:
        done = subprocess.run(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode != 0:
        tail = '\n'.join(log.read_text().splitlines()[-15:])
        raise RunError(f'{phase} of seed {seed} ended with exit code {done.returncode}; {log} ends with\n{tail}')
    seconds = time.time() - start
    print(f'  seed {seed}  {phase:<8}  validation top-1 {read_curve(folder)[-1][0]:.1f} %  {seconds:.0f} s', flush=True)
    return seconds


def read_curve(folder):
    """Top-1 and NLL on the validation images, epoch by epoch."""
    with open(folder / 'summary.csv') as file:
        return [(float(row['eval_top1']), float(row['eval_loss'])) for row in csv.DictReader(file)]


@torch.inference_mode()
def predict(args, phase, seed, split):
    """Logits [N, C] of a run's last epoch, and the labels [N]."""
    model = timm.create_model(**MODEL)
    load_checkpoint(model, run_folder(args, phase, seed) / 'last.pth.tar', use_ema=False)
    model.eval()
    dataset = create_dataset('', root=args.output / 'digits', split=split, input_img_mode='L')
    loader = create_loader(dataset, batch_size=100, num_workers=1, device=torch.device('cpu'), **IMAGES)
    logits, target = zip(*[(model(input), target.clone()) for input, target in loader], strict=True)
    return torch.cat(logits), torch.cat(target)


def measure(logits, target):
    """The values of `METRICS`."""
    confidence, predicted = logits.softmax(-1).max(-1)
    correct = predicted == target
    return (
        100 * correct.double().mean().item(),
        F.cross_entropy(logits.double(), target).item(),
        expected_calibration_error(confidence, correct),
    )


def report(args, seconds):
    """Print the table, and what it says."""
    values = {'baseline': [], 'baseline, temperature-scaled': [], 'AI-KD': []}
    for seed in args.seeds:
        logits, target = predict(args, 'baseline', seed, 'test')
        temperature = fit_temperature(*predict(args, 'baseline', seed, 'validation'))
        values['baseline'].append(measure(logits, target))
        values['baseline, temperature-scaled'].append(measure(logits / temperature, target))
        values['AI-KD'].append(measure(*predict(args, 'aikd', seed, 'test')))

    print(f'\nAfter the last epoch, {SPLITS["test"]:,} test images; mean ± standard deviation, n = {len(args.seeds)}\n')
    print(f'{"":<30}' + ''.join(f'{metric:<18}' for metric in METRICS))
    for name, rows in values.items():
        columns = zip(*rows, strict=True)
        cells = [spread(column, form) for column, (form, _) in zip(columns, METRICS.values(), strict=True)]
        print(f'{name:<30}' + ''.join(f'{cell:<18}' for cell in cells))
    for name in list(values)[:2]:
        print(f'\nAI-KD minus {name}, seed by seed:')
        for i, (metric, (form, better)) in enumerate(METRICS.items()):
            differences = [ours[i] - theirs[i] for ours, theirs in zip(values['AI-KD'], values[name], strict=True)]
            print(f'  {metric:<8} {spread(differences, "+" + form):<18} {verdict(differences, better)}')
    plain, aikd = (statistics.mean(column) for column in zip(*seconds, strict=True))
    print(f'''
Beyond the noise: the 95 % interval of a paired t-test over the seeds leaves out 0.
AI-KD makes use of the validation labels: its T_c is one number fitted to them, and its teacher is phase 1's best epoch
on them. The temperature-scaled baseline has its logits divided by one number fitted to the same labels, so the second
comparison shows what AI-KD does beyond calibration. A run took {plain:.0f} s in phase 1, {aikd:.0f} s in phase 2.''')


def spread(numbers, form):
    deviation = f' ± {statistics.stdev(numbers):{form.strip("+")}}' if len(numbers) > 1 else ''
    return f'{statistics.mean(numbers):{form}}{deviation}'


def verdict(differences, better):
    """Whether a mean difference can be told from none, in words."""
    if len(differences) < 2:
        return 'one seed cannot tell it from noise'
    mean, count = statistics.mean(differences), len(differences)
    half_width = student_t.ppf(0.975, count - 1) * statistics.stdev(differences) / count ** 0.5
    if abs(mean) <= half_width:
        return 'within the noise'
    return f'{"better" if (mean > 0) == (better == "higher") else "worse"}, beyond the noise'


def plot_curves(args):
    """Validation top-1 and NLL over the epochs: thin lines are seeds, thick ones their mean."""
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for phase, label, color in (('baseline', 'baseline', 'tab:gray'), ('aikd', 'AI-KD', 'tab:blue')):
        curves = torch.tensor([read_curve(run_folder(args, phase, seed)) for seed in args.seeds])
        for axis, column in zip(axes, curves.unbind(-1), strict=True):
            axis.plot(column.T, color=color, alpha=0.3, linewidth=1)
            axis.plot(column.mean(0), color=color, linewidth=2.5, label=label)
    for axis, title in zip(axes, ('top-1 %', 'NLL'), strict=True):
        axis.set(title=f'Validation {title}', xlabel='epoch')
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylim(bottom=50)
    axes[1].set_ylim(0, 1.5)
    figure.savefig(args.output / 'curves.png', dpi=120)


if __name__ == '__main__':
    main()
