#!/usr/bin/env python3
"""What AI-KD gains, and whether it is noise: Fashion-MNIST, fine-tuned and from scratch, all methods on one footing.

    apt install dataset-fashion-mnist && pip install 'timm-aikd[examples]'
    python examples/benchmarks/accuracy.py --regimes small-vit  # hours; stop and start again at will
    python examples/benchmarks/accuracy.py --report             # Markdown tables of the runs that are there

The teacher is a plainly trained model of the same regime and seed, at its last epoch: for AI-KD of half the epochs
(`ce-half`). All methods start from the same initial weights and see the same batches, so differences are paired.
Of the 60,000 training images 50,000 are the pool that the regimes draw from, 2,000 are for T_c and 8,000 for
validation, the latter two with true labels. Choose settings on validation images (`--report --on validation`).
A run that is in the results is not done again: after a change of the code or of the defaults, name new --results.
"""
import argparse
import logging
import os
from functools import cache
from pathlib import Path

import pandas as pd
import timm
import torch
from methods import METHODS, Run, train
from regimes import PARTS, REGIMES, load_images
from scipy.stats import t as student_t

import timm_aikd

METRICS = {  # "scaled": with the temperature that fits the validation images best
    'error': ('error %', '.2f'), 'nll': ('NLL', '.3f'), 'ece': ('ECE %', '.2f'), 'aurc': ('AURC', '.1f'),
    'nll_scaled': ('NLL scaled', '.3f'), 'ece_scaled': ('ECE scaled', '.2f')}
FACTS = {'teacher_gap': ('gap', '.1f'), 'teacher_temperature': ('T_c', '.2f'), 'step_time': ('step time', '.2f')}
COLUMNS = [*Run._fields, 'part', *METRICS, 'teacher_gap', 'teacher_temperature', 'seconds_per_step', 'environment']
GAINS = {  # rows of the table of gains: training, labels, model
    'fine-tune': ('fine-tuning', 'right', 'EfficientNet-Lite0'),
    'fine-tune-noisy': ('fine-tuning', '30 % wrong', 'EfficientNet-Lite0'),
    'small-resnet': ('from scratch', 'right', 'ResNet'), 'small-vit': ('from scratch', 'right', 'ViT'),
    'noisy-resnet': ('from scratch', '30 % wrong', 'ResNet'), 'noisy-vit': ('from scratch', '30 % wrong', 'ViT')}


def train_all(runs: list[Run], results: Path, folder: Path, device: torch.device) -> None:
    """Train and evaluate what the results lack; the weights of teachers are kept beside them."""
    rows = pd.read_csv(results) if results.exists() else pd.DataFrame(columns=COLUMNS)
    known = set(map(Run._make, rows[list(Run._fields)].itertuples(index=False)))
    images_of = cache(lambda regime: load_images(REGIMES[regime], folder, device))
    where = torch.cuda.get_device_name(device) if device.type == 'cuda' else torch.backends.cpu.get_cpu_capability()
    environment = f'{where}, torch {torch.__version__}, timm {timm.__version__}, timm-aikd {timm_aikd.__version__}'

    def student_of(run):
        weights = results.with_suffix('.weights') / f'{"-".join(map(str, run))}.pt'
        if run in known and weights.exists():
            student = REGIMES[run.regime].student().to(device)
            student.load_state_dict(torch.load(weights, weights_only=True, map_location=device))
            return student
        student, found = train(run, images_of(run.regime), [student_of(teacher) for teacher in run.teachers], device)
        if run not in known:  # else only the weights were gone
            known.add(run)
            named = [{**run._asdict(), **row, 'environment': environment} for row in found]
            with open(results, 'a') as file:  # written at once: another process may append too
                file.write(pd.DataFrame(named, columns=rows.columns).to_csv(index=False, header=file.tell() == 0))
        if run.method in {method.teacher for method in METHODS.values()}:
            weights.parent.mkdir(exist_ok=True)
            torch.save(student.state_dict(), f'{weights}.tmp')
            os.replace(f'{weights}.tmp', weights)
        print(*run, *(f'{label} {found[0][name]:{form}}' for name, (label, form) in METRICS.items()), flush=True)
        return student

    for run in runs:
        if run not in known:
            student_of(run)


def select(runs: list[Run], part: str, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of these runs by regime; `ce-ts` is `ce` with its temperature scaled."""
    rows = rows.drop_duplicates([*Run._fields, 'part'], keep='last')
    found = pd.DataFrame(runs, columns=Run._fields).assign(part=part).merge(rows, on=[*Run._fields, 'part'])
    plain = found[found.method == 'ce']
    keys = ['regime', 'seed', 'environment']  # a time is compared with those of its own environment
    seconds = plain.set_index(keys).seconds_per_step
    found['step_time'] = found.seconds_per_step / seconds.reindex(found.set_index(keys).index).values
    scaled = plain[plain.nll_scaled.notna()].assign(method='ce-ts', nll=plain.nll_scaled, ece=plain.ece_scaled)
    return dict(iter(pd.concat([found, scaled]).groupby('regime', sort=False)))


def summary(rows: pd.DataFrame, columns: dict[str, tuple[str, str]], reference: str | None = None) -> pd.DataFrame:
    """For each method its number of seeds n, and of each column mean ± standard deviation; with a reference mean ± half
    of the 95 % t-interval of the paired differences from it, bold where that leaves out 0."""
    values = rows.pivot(index='seed', columns='method', values=list(columns))
    if reference is not None:
        values = pd.concat({name: values[name].sub(values[name][reference], axis=0) for name in columns}, axis=1)
    mean, spread, n = values.mean(), values.std(), values.count()
    if reference is not None:
        spread *= student_t.ppf(0.975, n - 1) / n ** 0.5

    def text(key):
        sign, form = '' if reference is None else '+', columns[key[0]][1]
        cell = f'{mean[key]:{sign}{form}} ± {spread[key]:{form}}'.removesuffix(' ± nan')  # of one seed
        return f'**{cell}**' if sign and abs(mean[key]) > spread[key] else cell

    table = pd.Series({key: text(key) if n[key] else '' for key in values}).unstack(0)
    table = table.assign(n=n[next(iter(columns))].astype(str), method=table.index)
    chosen = [name for name in rows.method.unique() if n[:, name].any() and name != reference]
    return table.loc[chosen, ['method', 'n', *columns]].rename(columns={name: columns[name][0] for name in columns})


def print_table(title: str, table: pd.DataFrame) -> None:
    print(f'\n{title}\n')
    for cells in (table.columns, ['---'] * len(table.columns), *table.values):
        print(f'| {" | ".join(cells)} |')


def print_gains(regimes: dict[str, pd.DataFrame]) -> None:
    """What users may expect, over plain training: all with their temperature scaled."""
    def pairs(rows, reference=None):
        table = summary(rows, {name: METRICS[name] for name in ('nll_scaled', 'error')}, reference)
        table = table[table['NLL scaled'] != '']
        return table['error %'] + ' / ' + table['NLL scaled'] + ', n = ' + table.n

    lines = []
    for name, names in GAINS.items():
        if name in regimes and 'ce' in set(regimes[name].method):
            gains, times = pairs(regimes[name], 'ce'), summary(regimes[name], FACTS)['step time']
            lines.append([*names, pairs(regimes[name]).get('ce', ''),
                          *(gains.get(method, '') for method in ('ce-half', 'aikd', 'distance-3')),
                          ' / '.join(times.reindex(['aikd', 'distance-3']).dropna())])
    print_table(
        '## Gains\n\nError % / NLL with the temperature scaled; for the others the difference from plain training, '
        'bold where its paired 95 % interval leaves out 0; step time as a multiple of plain training\'s',
        pd.DataFrame(lines, columns=['training', 'labels', 'model', 'plain', 'plain, half the epochs', 'AI-KD',
                                     'one phase, feature term', 'step time, AI-KD / one phase']))


def report(runs: list[Run], part: str, rows: pd.DataFrame, references: list[str]) -> None:
    """Tables for each regime, of those runs that are there."""
    last, best = select(runs, part, rows), select(runs, f'{part}-best', rows)
    if not last:
        raise SystemExit('error: the results have none of these runs')
    print_gains(last)
    for when, regimes in (('', last), (', each at its best epoch on validation images', best)):
        for name, of_regime in regimes.items():
            print_table(
                f'## {name}: {part} images{when}\n\nMean ± standard deviation. Gap: the teacher\'s top-1 on training '
                'images minus that on validation images. Step time: as a multiple of ce\'s, in CPU time.',
                summary(of_regime, {**METRICS, **FACTS}))
            for reference in references:
                if {reference} < set(of_regime.method):
                    print_table(f'Minus {reference}, paired by seed: mean ± half of the 95 % interval, bold where that '
                                'leaves out 0', summary(of_regime, METRICS, reference))
    print('\nTrained on: ' + '; '.join(sorted(pd.concat(last.values()).environment.unique())))


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
                    help='four .gz files of github.com/zalandoresearch/fashion-mnist (default: %(default)s)')
parser.add_argument('--results', type=Path, nargs='+', default=[Path('accuracy.csv')], metavar='FILE',
                    help='CSV, weights of teachers beside it; --report takes several (default: accuracy.csv)')
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
    if len(args.results) > 1 and not args.report:
        parser.error('--results takes several files with --report only: new rows go to one')
    for path in args.results if args.report else [args.data / 'train-images-idx3-ubyte.gz']:
        if not path.is_file():
            parser.error(f'{path}: no such file' + ('' if args.report else ': apt install dataset-fashion-mnist'))
    if args.report:
        report(runs, args.on, pd.concat(map(pd.read_csv, args.results)), args.minus)
    else:
        train_all(runs, args.results[0], args.data, torch.device(args.device))


if __name__ == '__main__':
    main()
