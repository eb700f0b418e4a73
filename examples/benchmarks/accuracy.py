#!/usr/bin/env python3
"""What AI-KD gains, and whether it is noise: Fashion-MNIST, fine-tuned and from scratch, all methods on one footing.

    apt install dataset-fashion-mnist && pip install 'timm-aikd[examples]'
    python examples/benchmarks/accuracy.py --regimes small-vit  # hours; stop and start again at will
    python examples/benchmarks/accuracy.py --report             # Markdown tables of the runs that are there

For every regime and seed, plain training is phase 1, and its last weights are the teacher: for half the epochs
(`ce-half`) or for all (`ce`). All methods start from the same initial weights, see the same batches and use the same
optimizer, so that differences are paired.
The 60,000 training images, in a fixed order, are the pool that the regimes draw from (50,000), images to fit T_c on
(2,000) and validation images (8,000), whose labels are always the true ones. Settings are chosen on the validation
images, `--report --on validation`; the 10,000 test images are for the report.
A run that is in the results is not done again, so new code and new defaults call for new --results.
"""
import argparse
import logging
import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pandas as pd
import timm
import torch
from methods import METHODS, Run
from regimes import PARTS, REGIMES, load_images
from report import COLUMNS, METRICS, report
from training import create_teacher, train

import timm_aikd

TEACHERS = {method.teacher for method in METHODS.values()}


def after_teachers(runs: list[Run]) -> Iterator[Run]:
    """These runs, each after those whose students teach it."""
    for run in runs:
        yield from after_teachers(run.teachers)
        yield run


def train_all(runs: list[Run], results: Path, folder: Path, device: torch.device) -> None:
    """Train and evaluate whatever is missing; weights of teachers are kept beside the results."""
    rows = pd.read_csv(results) if results.exists() else pd.DataFrame(columns=COLUMNS)
    known = set(map(Run._make, rows[list(Run._fields)].itertuples(index=False)))
    images_of = cache(lambda regime: load_images(REGIMES[regime], folder, device))
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    environment = (f'{where}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, '
                   f'torch {torch.__version__}, timm {timm.__version__}, timm-aikd {timm_aikd.__version__}')

    def weights(run):
        return results.with_suffix('.weights') / f'{"-".join(map(str, run))}.pt'

    for run in after_teachers([run for run in runs if run not in known]):
        if run in known and (run.method not in TEACHERS or weights(run).exists()):
            continue
        teacher = create_teacher(run, [torch.load(weights(of), weights_only=True) for of in run.teachers], device)
        model, found = train(run, images_of(run.regime), teacher, device)
        if run.method in TEACHERS:
            weights(run).parent.mkdir(exist_ok=True)
            torch.save(model.state_dict(), f'{weights(run)}.tmp')
            os.replace(f'{weights(run)}.tmp', weights(run))
        if run not in known:  # else only the weights were gone
            known.add(run)
            named = [{**run._asdict(), **row, 'environment': environment} for row in found]
            with open(results, 'a') as file:  # written at once: another process may append too
                file.write(pd.DataFrame(named, columns=rows.columns).to_csv(index=False, header=file.tell() == 0))
        print(*run, *(f'{label} {found[0][name]:{form}}' for name, (label, form) in METRICS.items()), flush=True)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--report', action='store_true', help='train nothing: tables of what is there')
parser.add_argument('--on', choices=PARTS, default='test', help='with --report: of these images (default: test)')
parser.add_argument('--minus', nargs='+', choices=[*METHODS, 'ce-ts'], default=['ce', 'aikd'], metavar='NAME',
                    help='with --report: the methods that the others are compared with (default: ce aikd)')
for name, choices in (('regimes', REGIMES), ('methods', METHODS)):
    parser.add_argument(f'--{name}', nargs='+', choices=choices, default=list(choices), metavar='NAME',
                        help='of ' + ', '.join(choices) + ' (default: all)')
parser.add_argument('--seeds', nargs='+', type=int, default=list(range(5)), metavar='N', help='default: 0 to 4')
parser.add_argument('--epochs-scale', type=float, default=1., metavar='X', help='multiplies the epochs, for trials')
parser.add_argument('--data', type=Path, default=Path('/usr/share/datasets/fashion-mnist'), metavar='FOLDER',
                    help='with the four .gz files of Fashion-MNIST (default: %(default)s)')
parser.add_argument('--results', type=Path, nargs='+', default=[Path('accuracy.csv')], metavar='FILE',
                    help='CSV of the runs, weights of teachers beside it; --report takes several (accuracy.csv)')
parser.add_argument('--device', default='cpu', help='to train on, with one thread (default: cpu)')


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger('timm_aikd').setLevel(logging.ERROR)
    runs = [Run(regime, method, seed, args.epochs_scale)
            for regime in args.regimes for seed in args.seeds for method in args.methods
            if REGIMES[regime].is_fine_tuning or METHODS[method].teacher != 'imagenet']
    if not runs:
        parser.error(f'--methods {" ".join(args.methods)}: only where ImageNet weights are fine-tuned, in fine-tune*')
    if not args.report:
        if not (args.data / 'train-images-idx3-ubyte.gz').is_file():
            parser.error(f'--data {args.data}: no train-images-idx3-ubyte.gz there: apt install dataset-fashion-mnist, '
                         'or get the four files of https://github.com/zalandoresearch/fashion-mnist (data/fashion)')
        return train_all(runs, args.results[0], args.data, torch.device(args.device))
    for path in args.results:
        if not path.is_file():
            parser.error(f'--results {path}: no such file')
    report(runs, args.on, pd.concat(map(pd.read_csv, args.results)), args.minus)


if __name__ == '__main__':
    main()
