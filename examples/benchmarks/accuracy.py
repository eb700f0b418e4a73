#!/usr/bin/env python3
"""What AI-KD gains, and whether it is noise: Fashion-MNIST, fine-tuned and from scratch, all methods on one footing.

    apt install dataset-fashion-mnist && pip install 'timm-aikd[examples]'
    python examples/benchmarks/accuracy.py --regimes small      # hours; stop and start again at will
    python examples/benchmarks/accuracy.py --report             # Markdown tables of the runs that are there

For every regime, student and seed, plain training is phase 1, and its last weights are the teacher: for half the epochs
(`ce-half`) or for all (`ce`). All methods start from the same initial weights, see the same batches and use the same
optimizer, so that differences are paired.
The 60,000 training images, in a fixed order, are the pool that the regimes draw from (50,000), images to fit T_c on
(2,000) and validation images (8,000), whose labels are always the true ones. Settings are chosen on the validation
images, `--report --on validation`; the 10,000 test images are for the report.

A run is known by a digest of all that determines it, the defaults of its options included, and not by its method's
name: what is in the results is not done again, and what a changed default affects is. New code of the package that
trains differently with the same options calls for new --results.
"""
import argparse
import csv
import itertools
import json
import logging
import os
import platform
import sys
from functools import cache
from pathlib import Path

import timm
import torch
from images import load_images, regime_images
from methods import FINE_TUNED, METHODS, SCRATCH, Run
from regimes import REGIMES, STUDENTS
from report import COLUMNS, METRICS, read_rows, report
from training import answers, evaluate, load_teacher, train

import timm_aikd
from timm_aikd.calibration import fit_temperature

PARTS = ('test', 'validation')
TEACHERS = {method.teacher for method in METHODS.values()}


def train_all(runs: list[Run], results: list[Path], folder: Path, device: torch.device) -> None:
    """Train, evaluate and keep whatever is missing; rows go to the first of the results, weights of teachers beside."""
    if results[0].exists() and results[0].read_text().partition('\n')[0] != ','.join(COLUMNS):
        sys.exit(f'error: {results[0]} has other columns than this script writes: give --results another file')
    images, known = load_images(folder), set(read_rows(path for path in results if path.exists()).digest)
    images_of = cache(lambda regime: regime_images(REGIMES[regime], images, device))
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    environment = (f'{where}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, '
                   f'torch {torch.__version__}, timm {timm.__version__}, timm-aikd {timm_aikd.__version__}')

    def weights(run):
        return results[0].with_suffix('.weights') / f'{run.digest}.pt'

    def finish(run):
        for teacher in run.teachers:
            if not weights(teacher).exists():
                finish(teacher)
        data, rows = images_of(run.regime), []
        models, facts = train(run, data, load_teacher(run, list(map(weights, run.teachers)), device), device)
        for suffix, model in models.items():
            outputs = {part: answers(model, data[part]) for part in PARTS}
            temperature = fit_temperature(*outputs['validation'])
            rows += [{
                'regime': run.regime, 'student': run.student, 'method': run.method, 'seed': run.seed,
                'part': f'{part}{suffix}', 'options': json.dumps(METHODS[run.method].options, sort_keys=True),
                **evaluate(*outputs[part], temperature), **facts, 'epochs': run.epochs, 'digest': run.digest,
                'environment': environment} for part in PARTS]
        if run.method in TEACHERS:
            weights(run).parent.mkdir(exist_ok=True)
            torch.save(models[''].state_dict(), f'{weights(run)}.tmp')
            os.replace(f'{weights(run)}.tmp', weights(run))
        if run.digest not in known:  # else only the weights were gone
            with open(results[0], 'a', newline='') as file:  # written at once: another process may append too
                writer = csv.DictWriter(file, COLUMNS, restval='nan', lineterminator='\n')
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerows(rows)
            known.add(run.digest)
        print(f'{run}: ' + ', '.join(f'{label} {rows[0][name]:{form}}' for name, (label, form) in METRICS.items()),
              flush=True)

    for run in runs:
        if run.digest not in known:
            finish(run)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--report', action='store_true', help='train nothing: tables of what is there')
parser.add_argument('--on', choices=PARTS, default='test', help='with --report: of these images (default: test)')
parser.add_argument('--minus', choices=[*METHODS, 'ce-ts'], default='ce', metavar='NAME',
                    help='with --report: the method that the others are compared with (default: ce)')
parser.add_argument('--methods', nargs='+', choices=METHODS, metavar='NAME',
                    help=f'of {", ".join(METHODS)} (default: all that are meant for the regime)')
for name, choices in (('regimes', REGIMES), ('students', STUDENTS)):
    parser.add_argument(f'--{name}', nargs='+', choices=choices, default=list(choices), metavar='NAME',
                        help='of ' + ', '.join(choices) + ' (default: all)')
parser.add_argument('--seeds', nargs='+', type=int, metavar='N', help='default: 0 to 4, in full 0 and 1')
parser.add_argument('--epochs-scale', type=float, default=1., metavar='X', help='multiplies the epochs, for trials')
parser.add_argument('--data', type=Path, default=Path('/usr/share/datasets/fashion-mnist'), metavar='FOLDER',
                    help='with the four .gz files of Fashion-MNIST (default: %(default)s)')
parser.add_argument('--results', type=Path, nargs='+', default=[Path('accuracy.csv')], metavar='FILE',
                    help='CSV of the runs, weights of teachers beside it, and others to read (default: accuracy.csv)')
parser.add_argument('--device', default='cpu', help='to train on (default: cpu)')
parser.add_argument('--threads', type=int, default=1, metavar='N', help='to compute with (default: 1)')


def select_runs(args: argparse.Namespace) -> list[Run]:
    """The runs that the command line names, as far as they are possible."""
    runs = []
    for name, student in itertools.product(args.regimes, args.students):
        regime = REGIMES[name]
        if student in regime.students:
            methods = args.methods or (FINE_TUNED if regime.is_fine_tuning else SCRATCH)
            seeds = range(regime.seeds) if args.seeds is None else args.seeds
            runs += [Run(name, student, method, seed, args.epochs_scale) for seed in seeds for method in methods]
    return [run for run in runs if REGIMES[run.regime].is_fine_tuning or not run.needs_imagenet]


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger('timm_aikd').setLevel(logging.ERROR)
    runs = select_runs(args)
    if not args.report:
        return train_all(runs, args.results, args.data, torch.device(args.device))
    for path in args.results:
        if not path.is_file():
            parser.error(f'--results {path}: no such file')
    report(runs, args.on, read_rows(args.results), args.minus)


if __name__ == '__main__':
    main()
