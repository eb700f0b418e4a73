"""Tables and a picture of accuracy.py's results: means over the seeds, and paired differences with their intervals."""
import csv
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from matplotlib.figure import Figure
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
SETTINGS = (  # rows of the table of gains: training, labels, regime, students
    ('fine-tuning', 'right', 'fine-tune', {'lite0': 'EfficientNet-Lite0'}),
    ('fine-tuning', '30 % wrong', 'fine-tune-noisy', {'lite0': 'EfficientNet-Lite0'}),
    ('from scratch', 'right', 'small', {'resnet': 'ResNet', 'vit': 'ViT'}),
    ('from scratch', '30 % wrong', 'noisy', {'resnet': 'ResNet', 'vit': 'ViT'}))
ONE_PHASE = 'disc-features-0.03'


def read_rows(paths: Iterable[Path]) -> dict[tuple[str, str], dict]:
    """The rows of several CSVs by digest and part; a number that a file has no column for is NaN."""
    rows = {}
    for path in paths:
        with open(path, newline='') as file:
            for row in csv.DictReader(file):
                numbers = {name: float(row.get(name) or 'nan') for name in NUMBERS}
                rows[row['digest'], row['part']] = {**row, **numbers}
    return rows


# ------------------------------------------------------------ statistics

def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation."""
    values = [value for value in values if not math.isnan(value)]
    deviation = f' ± {statistics.stdev(values):{form}}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{form}}{deviation}' if values else ''


def mean(rows: Rows, metric: str) -> float:
    return statistics.mean(row[metric] for row in rows.values())


def half_width(values: list[float]) -> float:
    """Of the 95 % t-interval of the mean; infinite for one value."""
    if len(values) < 2:
        return math.inf
    return student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def paired(ours: Rows, theirs: Rows, metric: str) -> tuple[float, float]:
    """Mean of the differences, over the seeds that both have, and half of its 95 % interval."""
    values = [ours[seed][metric] - theirs[seed][metric] for seed in ours if seed in theirs]
    return (math.nan, math.inf) if any(map(math.isnan, values)) else (statistics.mean(values), half_width(values))


def difference(ours: Rows, theirs: Rows, metric: str) -> str:
    """Bold where the interval leaves out 0; of one seed without an interval."""
    (change, half), form = paired(ours, theirs, metric), METRICS[metric][1]
    if math.isnan(change):
        return ''
    if half == math.inf:
        return f'{change:+{form}}'
    mark = '**' if abs(change) > half else ''
    return f'{mark}{change:+{form}} ± {half:{form}}{mark}'


def step_time(ours: Rows, plain: Rows) -> str:
    """As a multiple of plain training's."""
    return spread([row['seconds_per_step'] / plain[seed]['seconds_per_step']
                   for seed, row in ours.items() if seed in plain], '.2f')


def scaled(methods: Methods, name: str) -> Rows:
    """A method's rows after temperature scaling: its own, or those of `ce-ts` and `aikd-ts`."""
    own = {seed: {**row, 'nll': row['nll_scaled'], 'ece': row['ece_scaled']}
           for seed, row in methods.get(name, {}).items() if not math.isnan(row['nll_scaled'])}
    return own or methods.get(f'{name.removesuffix("-store")}-ts', {})


# ------------------------------------------------------------ tables

def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f'\n{title}\n')
    for cells in (header, ['---'] * len(header), *rows):
        print(f'| {" | ".join(cells)} |')


def print_tables(title: str, methods: Methods, references: list[str]) -> None:
    """Every method by itself, then its differences from each reference."""
    metrics = [metric for metric in METRICS
               if not all(math.isnan(row[metric]) for rows in methods.values() for row in rows.values())]
    labels, plain = [METRICS[metric][0] for metric in metrics], methods.get(references[0], {})
    rows = []
    for name, by_seed in methods.items():
        def column(key, form, by_seed=by_seed):
            return spread([row[key] for row in by_seed.values()], form)
        rows.append([
            name, str(len(by_seed)), *(column(metric, METRICS[metric][1]) for metric in metrics),
            column('teacher_temperature', '.2f'),
            ' / '.join(filter(None, (column(when, '.2f').split(' ')[0] for when in DISC))), step_time(by_seed, plain)])
    print_table(f'## {title}\n\nMean ± standard deviation; step time in CPU time of {references[0]}\'s',
                ['method', 'n', *labels, 'T_c', 'D accuracy, first / middle / last epoch', 'step time'], rows)
    for reference in filter(methods.get, references):
        known = references[1:] if reference != references[0] else [reference]  # the first is what they are told by
        theirs = methods[reference]
        others = {name: rows for name, rows in methods.items() if name not in known and rows.keys() & theirs.keys()}
        print_table(
            f'Minus {reference}, paired by seed: mean ± half of the 95 % interval, bold where that leaves out 0',
            ['method', 'n', *labels],
            [[name, str(len(rows.keys() & theirs.keys())), *(difference(rows, theirs, metric) for metric in metrics)]
             for name, rows in others.items()])


def print_summary(units: Units, names: list[str], reference: str) -> None:
    """Means of error, NLL and ECE in all regimes; bold where the difference from the reference leaves out 0."""
    def cell(methods, name, metric):
        rows, (_, form), plain = methods[name], METRICS[metric], methods.get(reference, {})
        text = format(mean(rows, metric), form)
        if name == reference or not rows.keys() & plain.keys():
            return text
        change, half = paired(rows, plain, metric)
        return f'**{text}**' if abs(change) > half else text

    def count(name):
        return '/'.join(map(str, sorted({len(methods[name]) for methods in units.values() if name in methods})))

    print_table(
        f'## Summary\n\nMean error % / NLL / ECE %, bold where the paired 95 % interval of the difference from '
        f'{reference} leaves out 0', ['method', 'n', *map(', '.join, units)],
        [[name, count(name), *(
            ' / '.join(cell(methods, name, metric) for metric in SUMMARY) if name in methods else ''
            for methods in units.values())] for name in names])


def print_gaps(units: Units, part: str) -> None:
    """Beside what AI-KD gains, how much better the teacher knows its training images than others."""
    rows = []
    for unit, methods in units.items():
        ours, plain = methods.get('aikd-store', {}), methods.get('ce', {})
        ours = {seed: row for seed, row in ours.items() if seed in plain and not math.isnan(row['teacher_top1'])}
        if ours:
            train, other = mean(ours, 'teacher_top1'), 100 - mean({seed: plain[seed] for seed in ours}, 'error')
            rows.append([', '.join(unit), str(len(ours)), f'{train:.1f}', f'{other:.1f}', f'{train - other:.1f}',
                         spread([row['teacher_temperature'] for row in ours.values()], '.2f'),
                         *(difference(ours, plain, metric) for metric in SUMMARY)])
    print_table(
        '## Teachers and gains\n\nTop-1 of the teachers (ce) on the training batches, with their labels, and on '
        f'{part} images; the gap between the two; T_c; and aikd-store minus ce',
        ['', 'n', 'training %', f'{part} %', 'gap', 'T_c', *(METRICS[metric][0] for metric in SUMMARY)], rows)


def print_gains(units: Units) -> None:
    """Gains over plain training, all with their temperature scaled, where users train."""
    rows = []
    for training, labels, regime, students in SETTINGS:
        lines = [gains_cells(units[regime, student], name, training) for student, name in students.items()
                 if 'ce' in units.get((regime, student), {})]
        rows.append([training, labels, *map('<br>'.join, zip(*lines, strict=True))] if lines else
                    [training, labels, ', '.join(students.values()), *['not measured yet'] * 3, ''])
    print_table(
        '## Gains\n\nError % / NLL with the temperature scaled; for the others the difference from plain training, '
        'bold where its paired 95 % interval leaves out 0; step time as a multiple of plain training\'s',
        ['training', 'labels', 'model', 'plain', 'AI-KD', 'one phase, D on features', 'step time, AI-KD / one phase'],
        rows)


def gains_cells(methods: Methods, model: str, training: str) -> list[str]:
    """Model, plain training, AI-KD, one phase on features, times of their steps."""
    plain, pair = scaled(methods, 'ce'), ('error', 'nll')
    cells = [f'{" / ".join(format(mean(plain, metric), METRICS[metric][1]) for metric in pair)}, n = {len(plain)}']
    times = []
    for name in ('aikd-store', ONE_PHASE):
        ours = scaled(methods, name)
        count = len(ours.keys() & plain.keys())
        if count:
            cells.append(f'{" / ".join(difference(ours, plain, metric) for metric in pair)}, n = {count}')
        else:
            is_possible = name != ONE_PHASE or training == 'fine-tuning'
            cells.append('not measured yet' if is_possible else 'needs a pre-trained model')
        times.append(step_time(methods.get(name, {}), methods['ce']).split(' ')[0] or '-')
    return [model, *cells, ' / '.join(times)]


# ------------------------------------------------------------ picture and report

def plot_summary(path: Path, units: Units, name: str) -> None:
    """Differences of a method from the references, with their 95 % intervals."""
    figure = Figure(figsize=(11, 5), layout='constrained')
    for axis, metric in zip(figure.subplots(1, len(SUMMARY), sharey=True), SUMMARY, strict=True):
        for number, (unit, methods) in enumerate(units.items()):
            known = [other for other in REFERENCES if min(len(methods.get(each, ())) for each in (other, name)) > 1]
            points = [paired(methods[name], methods[other], metric) for other in known]
            axis.errorbar(
                [change for change, _ in points],
                [REFERENCES.index(other) + 0.7 * (number + 0.5) / len(units) - 0.35 for other in known],
                xerr=[half for _, half in points], fmt='o', markersize=4, label=', '.join(unit))
        axis.axvline(0, color='black', linewidth=0.8)
        axis.set_title(f'{METRICS[metric][0]}: {name} minus')
        axis.grid(alpha=0.3)
    axis.set_yticks(range(len(REFERENCES)), REFERENCES)
    axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), loc='outside lower center', ncols=4)
    figure.savefig(path, dpi=110)


def select(runs: list, part: str, rows: dict[tuple[str, str], dict]) -> Units:
    """The rows of these runs; plain training that knows its scaled metrics is `ce-ts` too."""
    units: Units = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        if (row := rows.get((run.digest, part))) is not None:
            units[run.regime, run.student][run.method][run.seed] = row
    for methods in units.values():
        if 'ce' in methods and (twin := scaled(methods, 'ce')) and 'ce-ts' not in methods:
            methods['ce-ts'] = twin
    return units


def report(
        runs: list, part: str, rows: dict, references: list[str], is_trial: bool, picture: Path | None = None) -> None:
    """Tables for each regime and student, of those runs that are there; trials sorted by NLL."""
    units, best = select(runs, part, rows), select(runs, f'{part}-best', rows)
    if not units:
        sys.exit('error: the results have none of these runs')
    if not is_trial:
        print_gains(units)
    for when, of_part in (('', units), (', each at its best epoch on validation images', best)):
        for (regime, student), methods in of_part.items():
            if is_trial:
                methods = dict(sorted(methods.items(), key=lambda item: mean(item[1], 'nll')))
            print_tables(f'{regime}, {student}: {part} images{when}', methods, references)
    names = dict.fromkeys(name for methods in units.values() for name in methods)
    order = dict.fromkeys(run.method for run in runs)
    print_summary(units, [name for name in {**order, **names} if name in names], references[0])
    if not is_trial:
        print_gaps(units, part)
    if picture is not None:
        plot_summary(picture, units, 'aikd-store')
    print('\nTrained on: ' + '; '.join(sorted({
        row['environment'] for methods in units.values() for by_seed in methods.values() for row in by_seed.values()})))
