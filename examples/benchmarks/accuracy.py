#!/usr/bin/env python3
"""What AI-KD gains, and whether it is noise: Fashion-MNIST, fine-tuned and from scratch, all methods on one footing.

    apt install dataset-fashion-mnist && pip install 'timm-aikd[examples]'
    python examples/benchmarks/accuracy.py --regimes small      # hours; stop and start again at will, or two at once
    python examples/benchmarks/accuracy.py --report             # Markdown tables of the runs that are there
    python examples/benchmarks/accuracy.py --override '{"alpha": 0.8}'      # other options, on validation images

For every regime, student and seed, plain training (`ce`) is phase 1, and its last weights are the teacher. All methods
start from the same initial weights, see the same batches and use the same optimizer, so that differences are paired.
The 60,000 training images, in a fixed order, are the pool that the regimes draw from (50,000), images to fit T_c on
(2,000) and validation images (8,000), whose labels are always the true ones; the 10,000 test images are for
`--part test` alone.

A run is known by a digest of all that determines it, the defaults of its options included, and not by its method's
name: what is in the results is not done again, and what a changed default affects is. New code of the package that
trains differently with the same options calls for new --results.
"""
import argparse
import csv
import io
import itertools
import json
import logging
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from images import load_images, regime_images
from methods import FINE_TUNED, METHODS, SCRATCH, Run, find_method
from regimes import REGIMES, STUDENTS
from tqdm import tqdm
from training import answers, create_task, evaluate, load_teacher, train

import timm_aikd
from timm_aikd import AikdError, AikdTask
from timm_aikd.calibration import fit_temperature

try:
    from report import COLUMNS, DISC, METRICS, REFERENCES, read_rows, report
except ImportError as error:
    sys.exit(f'{error}: pip install "timm-aikd[examples]"')

PARTS = ('test', 'validation')


# ------------------------------------------------------------ results

def result_row(run: Run, part: str, metrics: dict, curves: dict, task: torch.nn.Module) -> dict:
    teacher = task.aikd.teacher if isinstance(task, AikdTask) and not run.needs_imagenet else None
    accuracy = curves['disc_accuracy'] if run.config.has_teacher and run.config.adv_weight > 0 else []
    device = next(task.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    return {
        'regime': run.regime, 'student': run.student, 'method': run.method, 'seed': run.seed, 'part': part,
        'options': json.dumps(find_method(run.method).options, sort_keys=True), **metrics,
        'teacher_temperature': teacher.temperature if teacher is not None else math.nan,
        'teacher_top1': curves['teacher_top1'][0] if teacher is not None else math.nan,
        'seconds_per_step': statistics.median(curves['seconds_per_step'] or [math.nan]),
        **dict(zip(DISC, [accuracy[0], accuracy[run.epochs // 2], accuracy[-1]] if accuracy else [math.nan] * 3,
                   strict=True)),
        'best_epoch': curves['best_epoch'][0] if curves['best_epoch'] else math.nan,
        'epochs': run.epochs, 'digest': run.digest,
        'environment': f'{name}, {torch.get_num_threads()} thread(s), Python '
                       f'{platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, timm-aikd '
                       f'{timm_aikd.__version__}'}


class Results:
    """The CSV that finished runs are added to, and others to read; the weights of teachers lie beside it (.weights)."""

    def __init__(self, path: Path, *others: Path):
        self.path = path
        try:
            with open(path, 'x') as file:
                file.write(','.join(COLUMNS) + '\n')
        except FileExistsError:
            with open(path) as file:
                if file.readline().strip() != ','.join(COLUMNS):
                    sys.exit(f'error: {path} has other columns than this script writes: give --results another file')
        self.rows = read_rows([path, *others])

    def weights(self, run: Run) -> Path:
        return self.path.with_suffix('.weights') / f'{run.digest}.pt'

    def add(self, run: Run, row: dict, model: torch.nn.Module) -> None:
        """Keep a run; its row comes last, for it says that the weights are there."""
        if run.method in {method.teacher for method in METHODS.values()}:
            path = self.weights(run)
            path.parent.mkdir(exist_ok=True)
            torch.save(model.state_dict(), f'{path}.tmp')
            os.replace(f'{path}.tmp', path)
        key = row['digest'], row['part']
        if key not in self.rows:  # else only the weights were gone
            line = io.StringIO()
            csv.DictWriter(line, COLUMNS, lineterminator='\n').writerow(row)
            with open(self.path, 'ab', buffering=0) as file:  # in one write: another process may append too
                file.write(line.getvalue().encode())
            self.rows[key] = row


def pending(runs: list[Run], part: str, results: Results) -> list[Run]:
    """What is to be trained, every teacher before its students."""
    order: dict[Run, None] = {}

    def need(run: Run) -> None:
        for teacher in run.teachers:
            if not results.weights(teacher).exists():
                need(teacher)
        order.setdefault(run)

    seen = {digest for digest, known_part in results.rows if known_part == part}
    for run in runs:
        if run.digest not in seen:
            need(run)
            seen.add(run.digest)
    return list(order)


def train_all(runs: list[Run], part: str, folder: Path, results: Results, device: torch.device) -> None:
    """Train, evaluate and keep whatever is missing."""
    todo, images = pending(runs, part, results), load_images(folder)
    sets = {name: regime_images(REGIMES[name], images, device) for name in {run.regime for run in todo}}
    total = sum(run.epochs * len(sets[run.regime]['train']) for run in todo)
    with tqdm(total=total, unit=' img', unit_scale=True, disable=None) as bar:
        for run in todo:
            bar.set_description(str(run))
            data = sets[run.regime]
            task = create_task(run, data, load_teacher(run, results.weights, device), device)
            curves, models = train(task, run, data, bar)
            for suffix, model in reversed(models.items()):
                known = answers(model, data['validation'])
                temperature = fit_temperature(*known)
                is_trial = run.method not in METHODS
                for each in (part,) if is_trial else (*(other for other in PARTS if other != part), part):
                    outputs = known if each == 'validation' else answers(model, data[each])  # one training serves both
                    metrics = evaluate(*outputs, temperature)
                    results.add(run, result_row(run, f'{each}{suffix}', metrics, curves, task), models[''])
            bar.write(f'{time.strftime("%H:%M:%S")} {run}: ' + ', '.join(
                f'{label} {metrics[name]:{form}}' for name, (label, form) in METRICS.items()))


# ------------------------------------------------------------ command line

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--report', action='store_true', help='train nothing: tables of what is there')
parser.add_argument('--picture', type=Path, metavar='PNG', help='with --report: AI-KD minus the other methods')
which = parser.add_argument_group('which runs')
which.add_argument('--methods', nargs='+', choices=METHODS, metavar='NAME',
                   help=f'of {", ".join(METHODS)} (default: all that are meant for the regime)')
which.add_argument('--override', nargs='+', type=json.loads, metavar='JSON',
                   help='instead of these AI-KD with the store and these options, e.g. \'{"alpha": 0.8}\'')
for name, choices in (('regimes', REGIMES), ('students', STUDENTS)):
    which.add_argument(f'--{name}', nargs='+', choices=choices, default=list(choices), metavar='NAME',
                       help='of ' + ', '.join(choices) + ' (default: all)')
which.add_argument('--seeds', nargs='+', type=int, metavar='N', help='default: 0 to 4, in full 0 and 1')
which.add_argument('--epochs-scale', type=float, default=1., metavar='X', help='multiplies the epochs, for trials')
which.add_argument('--part', choices=PARTS, help='images to evaluate on (default: test; with --override validation)')
where = parser.add_argument_group('where')
where.add_argument('--data', type=Path, default=Path('/usr/share/datasets/fashion-mnist'), metavar='FOLDER',
                   help='with the four files of Fashion-MNIST, .gz or not (default: %(default)s)')
where.add_argument('--results', type=Path, nargs='+', default=[Path('accuracy.csv')], metavar='FILE',
                   help='CSV of the runs, weights of teachers beside it, and others to read (default: accuracy.csv)')
where.add_argument('--device', default='cpu', help='to train on (default: cpu)')
where.add_argument('--threads', type=int, default=1, metavar='N', help='to compute with (default: 1)')


def select(args: argparse.Namespace, methods: list[str] | None) -> list[Run]:
    """The runs that the command line names, as far as they are possible."""
    runs = []
    for regime, student in itertools.product(args.regimes, args.students):
        setting = REGIMES[regime]
        if student in setting.students:
            names = methods or list(FINE_TUNED if setting.is_fine_tuning else SCRATCH)
            seeds = range(setting.seeds) if args.seeds is None else args.seeds
            runs += [Run(regime, student, method, seed, args.epochs_scale) for seed in seeds for method in names]
    return [run for run in runs if REGIMES[run.regime].is_fine_tuning or not run.needs_imagenet]


def main(references: Sequence[str] = REFERENCES) -> None:
    """With other references than its own the methods are trials, and the report has these too."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger('timm_aikd').setLevel(logging.ERROR)  # the bar says enough
    methods, is_trial = args.methods, bool(args.override) or tuple(references) != REFERENCES
    if args.override:
        methods = [f'custom:{json.dumps(options, sort_keys=True)}' for options in args.override]
    if args.report and is_trial:
        methods = list(dict.fromkeys([*methods, *references]))
    part = args.part or ('validation' if args.override else 'test')
    try:
        runs = select(args, methods)
    except (AikdError, TypeError) as error:
        parser.error(str(error))
    if args.report:
        for path in args.results:
            if not path.is_file():
                parser.error(f'--results {path}: no such file')
        report(runs, part, read_rows(args.results), list(references), is_trial, args.picture)
    else:
        train_all(runs, part, args.data, Results(*args.results), torch.device(args.device))


if __name__ == '__main__':
    main()
