"""Tables and a picture of accuracy.py's results: means over the seeds, and paired differences with their intervals."""
import csv
import sys
from collections.abc import Iterable, Mapping
from math import isnan, nan
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from methods import Run
from regimes import REGIMES
from scipy.stats import t as student_t

Rows = Mapping[int, dict]  # of a method, by seed
Methods = dict[str, Rows]
Units = dict[tuple[str, str], Methods]  # by regime and student

METRICS = {
    'error': ('error %', '.2f'), 'nll': ('NLL', '.3f'), 'ece': ('ECE %', '.2f'), 'aurc': ('AURC', '.1f'),
    # with the temperature that fits the validation images best
    'nll_scaled': ('NLL scaled', '.3f'), 'ece_scaled': ('ECE scaled', '.2f')}
SUMMARY = ('error', 'nll', 'ece')
DISC = ('disc_first', 'disc_middle', 'disc_last')  # the discriminator's accuracy in these epochs
NUMBERS = (*METRICS, 'teacher_temperature', 'teacher_top1', 'seconds_per_step', *DISC, 'best_epoch')
COLUMNS = ('regime', 'student', 'method', 'seed', 'part', 'options', *NUMBERS, 'epochs', 'digest', 'environment')
REFERENCES = ('ce', 'ce-ts', 'ce-long', 'ls', 'kd', 'pskd')  # what the others are compared with
GAINS = {  # rows of the table of gains: training, labels
    'fine-tune': ('fine-tuning', 'right'), 'fine-tune-noisy': ('fine-tuning', '30 % wrong'),
    'small': ('from scratch', 'right'), 'noisy': ('from scratch', '30 % wrong')}
MODELS = {'lite0': 'EfficientNet-Lite0', 'resnet': 'ResNet', 'vit': 'ViT'}


def read_rows(paths: Iterable[Path]) -> dict[tuple[str, str], dict]:
    """The rows of several CSVs by digest and part; a number that a file has no column for is NaN."""
    rows = {}
    for path in paths:
        with open(path, newline='') as file:
            for row in csv.DictReader(file):
                rows[row['digest'], row['part']] = {**row, **{name: float(row.get(name) or nan) for name in NUMBERS}}
    return rows


def select(runs: list[Run], part: str, rows: dict[tuple[str, str], dict]) -> Units:
    """The rows of these runs; plain training that knows its scaled metrics is `ce-ts` too."""
    units: Units = {}
    for run in runs:
        if row := rows.get((run.digest, part)):
            units.setdefault((run.regime, run.student), {}).setdefault(run.method, {})[run.seed] = row
    for methods in units.values():
        if twin := scaled(methods, 'ce'):
            methods.setdefault('ce-ts', twin)
    return units


def scaled(methods: Methods, name: str) -> Rows:
    """A method's rows after temperature scaling: its own, or those of `ce-ts` and `aikd-ts`."""
    own = {seed: {**row, 'nll': row['nll_scaled'], 'ece': row['ece_scaled']}
           for seed, row in methods.get(name, {}).items() if not isnan(row['nll_scaled'])}
    return own or methods.get(f'{name.removesuffix("-store")}-ts', {})


# ------------------------------------------------------------ cells

def spread(values: Iterable[float], form: str = '.2f') -> str:
    """Mean ± standard deviation of those that are known."""
    known = [value for value in values if not isnan(value)]
    deviation = f' ± {stdev(known):{form}}' if len(known) > 1 else ''
    return f'{mean(known):{form}}{deviation}' if known else ''


def column(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows.values()]


def paired(ours: Rows, theirs: Rows, metric: str) -> tuple[float, float]:
    """Mean of the differences, over the seeds that both have, and half of its 95 % t-interval; NaN where unknown."""
    values = [ours[seed][metric] - theirs[seed][metric] for seed in ours if seed in theirs]
    if not values or any(map(isnan, values)):
        return nan, nan
    count = len(values)
    return mean(values), student_t.ppf(0.975, count - 1) * stdev(values) / count ** 0.5 if count > 1 else nan


def bold(text: str, ours: Rows, theirs: Rows, metric: str) -> str:
    """Where the interval of the differences leaves out 0."""
    change, half = paired(ours, theirs, metric)
    return f'**{text}**' if abs(change) > half else text


def difference(ours: Rows, theirs: Rows, metric: str) -> str:
    """With its interval, but for one seed's."""
    (change, half), form = paired(ours, theirs, metric), METRICS[metric][1]
    text = f'{change:+{form}} ± {half:{form}}'.removesuffix(' ± nan')
    return '' if isnan(change) else bold(text, ours, theirs, metric)


def step_time(methods: Methods, name: str) -> str:
    """As a multiple of plain training's."""
    plain = methods.get('ce', {})
    return spread(row['seconds_per_step'] / plain[seed]['seconds_per_step']
                  for seed, row in methods.get(name, {}).items() if seed in plain)


# ------------------------------------------------------------ tables

def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f'\n{title}\n')
    for cells in (header, ['---'] * len(header), *rows):
        print(f'| {" | ".join(cells)} |')


def print_unit(title: str, methods: Methods) -> None:
    """Every method by itself, then its differences from each reference."""
    forms = {metric: form for metric, (_, form) in METRICS.items()
             if not all(isnan(value) for rows in methods.values() for value in column(rows, metric))}
    labels = ['method', 'n', *(METRICS[metric][0] for metric in forms)]
    print_table(
        f'## {title}\n\nMean ± standard deviation; step time in CPU time of ce\'s',
        [*labels, 'T_c', 'D accuracy, first / middle / last epoch', 'step time'],
        [[name, str(len(rows)), *(spread(column(rows, metric), form) for metric, form in forms.items()),
          spread(column(rows, 'teacher_temperature')),
          ' / '.join(filter(None, (spread(column(rows, when)).split(' ')[0] for when in DISC))),
          step_time(methods, name)] for name, rows in methods.items()])
    for reference in filter(methods.get, REFERENCES):
        theirs, shown_above = methods[reference], ('ce',) if reference == 'ce' else REFERENCES[1:]
        print_table(
            f'Minus {reference}, paired by seed: mean ± half of the 95 % interval, bold where that leaves out 0',
            labels, [[name, str(common), *(difference(ours, theirs, metric) for metric in forms)]
                     for name, ours in methods.items()
                     if name not in shown_above and (common := len(ours.keys() & theirs.keys()))])


def print_summary(units: Units, names: Iterable[str]) -> None:
    """Means of error, NLL and ECE in all regimes."""
    def cell(methods, name):
        return ' / '.join(bold(f'{mean(column(methods[name], metric)):{METRICS[metric][1]}}',
                               methods[name], methods.get('ce', {}), metric) for metric in SUMMARY)

    rows = []
    for name in names:
        if counts := {len(methods[name]) for methods in units.values() if name in methods}:
            rows.append([name, '/'.join(map(str, sorted(counts))),
                         *(cell(methods, name) if name in methods else '' for methods in units.values())])
    print_table(
        '## Summary\n\nMean error % / NLL / ECE %, bold where the paired 95 % interval of the difference from ce '
        'leaves out 0', ['method', 'n', *map(', '.join, units)], rows)


def print_gaps(units: Units, part: str) -> None:
    """Beside what AI-KD gains, how much better the teacher knows its training images than others."""
    rows = []
    for unit, methods in units.items():
        plain = methods.get('ce', {})
        ours = {seed: row for seed, row in methods.get('aikd-store', {}).items()
                if seed in plain and not isnan(row['teacher_top1'])}
        if ours:
            train, other = mean(column(ours, 'teacher_top1')), 100 - mean(plain[seed]['error'] for seed in ours)
            rows.append([', '.join(unit), str(len(ours)), f'{train:.1f}', f'{other:.1f}', f'{train - other:.1f}',
                         spread(column(ours, 'teacher_temperature')),
                         *(difference(ours, plain, metric) for metric in SUMMARY)])
    print_table(
        '## Teachers and gains\n\nTop-1 of the teachers (ce) on the training batches, with their labels, and on '
        f'{part} images; the gap between the two; T_c; and aikd-store minus ce',
        ['', 'n', 'training %', f'{part} %', 'gap', 'T_c', *(METRICS[metric][0] for metric in SUMMARY)], rows)


def print_gains(units: Units) -> None:
    """Gains over plain training, all with their temperature scaled, where users train."""
    def cells(methods, model, is_fine_tuning):
        plain, changes, times = scaled(methods, 'ce'), [], []
        if not plain:
            return [model, *['not measured yet'] * 3, '']
        for name, is_possible in (('aikd-store', True), ('distance-3', is_fine_tuning)):
            ours = scaled(methods, name)
            if common := len(ours.keys() & plain.keys()):
                pair = ' / '.join(difference(ours, plain, metric) for metric in ('error', 'nll'))
                changes.append(f'{pair}, n = {common}')
            else:
                changes.append('not measured yet' if is_possible else 'needs a pre-trained model')
            times.append(step_time(methods, name).split(' ')[0] or '-')
        error, nll = (mean(column(plain, metric)) for metric in ('error', 'nll'))
        return [model, f'{error:.2f} / {nll:.3f}, n = {len(plain)}', *changes, ' / '.join(times)]

    rows = []
    for name, setting in GAINS.items():
        lines = [cells(units.get((name, student), {}), MODELS[student], REGIMES[name].is_fine_tuning)
                 for student in REGIMES[name].students]
        rows.append([*setting, *map('<br>'.join, zip(*lines, strict=True))])
    print_table(
        '## Gains\n\nError % / NLL with the temperature scaled; for the others the difference from plain training, '
        'bold where its paired 95 % interval leaves out 0; step time as a multiple of plain training\'s',
        ['training', 'labels', 'model', 'plain', 'AI-KD', 'one phase, feature term', 'step time, AI-KD / one phase'],
        rows)


# ------------------------------------------------------------ picture and report

def plot_summary(path: Path, units: Units) -> None:
    """Differences of AI-KD from the references, with their 95 % intervals."""
    figure = Figure(figsize=(11, 5), layout='constrained')
    for axis, metric in zip(figure.subplots(1, len(SUMMARY), sharey=True), SUMMARY, strict=True):
        for number, (unit, methods) in enumerate(units.items()):
            change, half = np.transpose([paired(methods.get('aikd-store', {}), methods.get(other, {}), metric)
                                         for other in REFERENCES])
            heights = np.arange(len(REFERENCES)) + 0.7 * (number + 0.5) / len(units) - 0.35
            axis.errorbar(np.where(np.isnan(half), nan, change), heights, xerr=half, fmt='o', markersize=4,
                          label=', '.join(unit))
        axis.axvline(0, color='black', linewidth=0.8)
        axis.set_title(f'{METRICS[metric][0]}: aikd-store minus')
        axis.grid(alpha=0.3)
    axis.set_yticks(range(len(REFERENCES)), REFERENCES)
    axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), loc='outside lower center', ncols=4)
    figure.savefig(path, dpi=110)


def report(runs: list[Run], part: str, rows: dict, picture: Path | None = None) -> None:
    """Tables for each regime and student, of those runs that are there."""
    units, best = select(runs, part, rows), select(runs, f'{part}-best', rows)
    if not units:
        sys.exit('error: the results have none of these runs')
    print_gains(units)
    for when, of_part in (('', units), (', each at its best epoch on validation images', best)):
        for unit, methods in of_part.items():
            print_unit(f'{", ".join(unit)}: {part} images{when}', methods)
    print_summary(units, dict.fromkeys([*(run.method for run in runs), 'ce-ts']))
    print_gaps(units, part)
    if picture is not None:
        plot_summary(picture, units)
    print('\nTrained on: ' + '; '.join(sorted({
        rows[run.digest, part]['environment'] for run in runs if (run.digest, part) in rows})))
