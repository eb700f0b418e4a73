"""Tables of accuracy.py's results: means over the seeds, and paired differences with their intervals."""
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from methods import Run
from regimes import REGIMES
from scipy.stats import t as student_t

METRICS = {
    'error': ('error %', '.2f'), 'nll': ('NLL', '.3f'), 'ece': ('ECE %', '.2f'), 'aurc': ('AURC', '.1f'),
    # with the temperature that fits other images best
    'nll_scaled': ('NLL scaled', '.3f'), 'ece_scaled': ('ECE scaled', '.2f')}
SUMMARY = ['error', 'nll', 'ece']
DISC = ['disc_first', 'disc_middle', 'disc_last']  # the discriminator's accuracy in these epochs
COLUMNS = ['regime', 'student', 'method', 'seed', 'part', 'options', *METRICS, 'teacher_temperature', 'teacher_top1',
           'seconds_per_step', *DISC, 'best_epoch', 'epochs', 'digest', 'environment']
GAINS = {  # rows of the table of gains: training, labels
    'fine-tune': ('fine-tuning', 'right'), 'fine-tune-noisy': ('fine-tuning', '30 % wrong'),
    'small': ('from scratch', 'right'), 'noisy': ('from scratch', '30 % wrong')}
MODELS = {'lite0': 'EfficientNet-Lite0', 'resnet': 'ResNet', 'vit': 'ViT'}


def read_rows(paths: Iterable[Path]) -> pd.DataFrame:
    """The rows of several CSVs; a number that a file has no column for is NaN."""
    rows = [pd.read_csv(path).reindex(columns=COLUMNS) for path in paths]
    return pd.concat(rows).drop_duplicates(['digest', 'part'], keep='last') if rows else pd.DataFrame(columns=COLUMNS)


def select(runs: list[Run], part: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of these runs; `ce-ts` is `ce` with its temperature scaled."""
    names = ['regime', 'student', 'method', 'seed']
    wanted = pd.DataFrame([[run.digest, *(getattr(run, name) for name in names)] for run in runs],
                          columns=['digest', *names])
    found = wanted.merge(rows[rows.part == part].drop(columns=names), on='digest')
    plain = found[(found.method == 'ce') & found.nll_scaled.notna()]
    scaled = plain.assign(method='ce-ts', nll=plain.nll_scaled, ece=plain.ece_scaled, seconds_per_step=np.nan)
    return pd.concat([found, scaled]) if len(scaled) else found


def by_seed(unit: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A column for each method."""
    return unit.pivot(index='seed', columns='method', values=metric)[unit.method.unique()]


def paired(unit: pd.DataFrame, metric: str, reference: str) -> pd.DataFrame:
    """For each method the mean of its differences from the reference, half of its 95 % t-interval, and their number."""
    values = by_seed(unit, metric)
    change = values.sub(values.get(reference, np.nan), axis=0)
    n = change.count()
    half = student_t.ppf(0.975, n - 1) * change.std() / n ** 0.5
    return pd.DataFrame({'mean': change.mean(), 'half': half, 'n': n})


# ------------------------------------------------------------ cells

def spread(values: pd.Series, form: str = '.2f') -> str:
    """Mean ± standard deviation of those that are known."""
    return '' if values.isna().all() else f'{values.mean():{form}} ± {values.std():{form}}'.removesuffix(' ± nan')


def difference(change: pd.Series, metric: str) -> str:
    """Bold where the interval leaves out 0; without one where there is one seed."""
    form = METRICS[metric][1]
    text = '' if not change.n else f'{change["mean"]:+{form}} ± {change.half:{form}}'.removesuffix(' ± nan')
    return f'**{text}**' if abs(change['mean']) > change.half else text


def step_time(unit: pd.DataFrame, method: str) -> str:
    """As a multiple of plain training's."""
    seconds = by_seed(unit, 'seconds_per_step')
    return spread(seconds[method] / seconds['ce']) if {method, 'ce'} <= set(seconds) else ''


# ------------------------------------------------------------ tables

def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f'\n{title}\n')
    for cells in (header, ['---'] * len(header), *rows):
        print(f'| {" | ".join(cells)} |')


def print_unit(title: str, unit: pd.DataFrame, reference: str) -> None:
    """Every method by itself, then its differences from the reference."""
    metrics = [metric for metric in METRICS if unit[metric].notna().any()]
    labels = ['method', 'n', *(METRICS[metric][0] for metric in metrics)]
    print_table(
        f'## {title}\n\nMean ± standard deviation; step time in CPU time of ce\'s',
        [*labels, 'T_c', 'D accuracy, first / middle / last epoch', 'step time'],
        [[name, str(len(rows)), *(spread(rows[metric], METRICS[metric][1]) for metric in metrics),
          spread(rows.teacher_temperature), ' / '.join(f'{value:.2f}' for value in rows[DISC].mean().dropna()),
          step_time(unit, name)] for name, rows in unit.groupby('method', sort=False)])
    if reference not in set(unit.method):
        return
    changes = {metric: paired(unit, metric, reference) for metric in metrics}
    print_table(
        f'Minus {reference}, paired by seed: mean ± half of the 95 % interval, bold where that leaves out 0', labels,
        [[name, str(count), *(difference(changes[metric].loc[name], metric) for metric in metrics)]
         for name, count in changes['error'].n.items() if name != reference and count])


def print_gaps(units: dict[str, pd.DataFrame], part: str) -> None:
    """Beside what AI-KD gains, how much better the teacher knows its training images than others."""
    lines = []
    for title, unit in units.items():
        for teacher, method in (('ce-half', 'aikd'), ('ce', 'aikd-from-ce-alpha-0.3')):
            ours = unit[(unit.method == method) & unit.teacher_top1.notna()]
            teachers = unit[(unit.method == teacher) & unit.seed.isin(ours.seed)]
            if len(teachers):
                train, other = ours.teacher_top1.mean(), 100 - teachers.error.mean()
                changes = [difference(paired(unit, metric, 'ce').loc[method], metric) for metric in SUMMARY]
                lines.append([title, teacher, str(len(ours)), f'{train:.1f}', f'{other:.1f}', f'{train - other:.1f}',
                              spread(ours.teacher_temperature), *changes])
    print_table(
        '## Teachers and gains\n\nTop-1 of the teachers on the training batches, with their labels, and on '
        f'{part} images; the gap between the two; T_c; and AI-KD from them minus ce, at alpha 0.8 from ce-half and 0.3 '
        'from ce',
        ['', 'teacher', 'n', 'training %', f'{part} %', 'gap', 'T_c', *(METRICS[metric][0] for metric in SUMMARY)],
        lines)


def print_gains(rows: pd.DataFrame) -> None:
    """Gains over plain training, all with their temperature scaled, where users train."""
    def gain(unit, method):
        if method not in set(unit.method) or unit.nll_scaled[unit.method == method].isna().all():
            return 'not measured yet'
        changes = {metric: paired(unit, metric, 'ce').loc[method] for metric in ('error', 'nll_scaled')}
        pair = ' / '.join(difference(change, metric) for metric, change in changes.items())
        return f'{pair}, n = {changes["error"].n:.0f}'

    def cells(regime, student):
        unit = rows[(rows.regime == regime) & (rows.student == student)]
        plain = unit[unit.method == 'ce']
        if plain.empty:
            return [MODELS[student], *['not measured yet'] * 4, '']
        return [MODELS[student], f'{plain.error.mean():.2f} / {plain.nll_scaled.mean():.3f}, n = {len(plain)}',
                gain(unit, 'ce-half'), gain(unit, 'aikd'),
                gain(unit, 'distance-3') if REGIMES[regime].is_fine_tuning else 'needs a pre-trained model',
                ' / '.join(step_time(unit, name).split(' ')[0] or '-' for name in ('aikd', 'distance-3'))]

    lines = []
    for name, setting in GAINS.items():
        students = [cells(name, student) for student in REGIMES[name].students]
        lines.append([*setting, *map('<br>'.join, zip(*students, strict=True))])
    print_table(
        '## Gains\n\nError % / NLL with the temperature scaled; for the others the difference from plain training, '
        'bold where its paired 95 % interval leaves out 0; step time as a multiple of plain training\'s',
        ['training', 'labels', 'model', 'plain', 'plain, half the epochs', 'AI-KD', 'one phase, feature term',
         'step time, AI-KD / one phase'], lines)


def report(runs: list[Run], part: str, rows: pd.DataFrame, reference: str) -> None:
    """Tables for each regime and student, of those runs that are there."""
    found = select(runs, part, rows)
    if found.empty:
        sys.exit('error: the results have none of these runs')
    print_gains(found)
    units, best = ({', '.join(key): unit for key, unit in some.groupby(['regime', 'student'], sort=False)}
                   for some in (found, select(runs, f'{part}-best', rows)))
    for when, of_part in (('', units), (', each at its best epoch on validation images', best)):
        for title, unit in of_part.items():
            print_unit(f'{title}: {part} images{when}', unit, reference)
    print_gaps(units, part)
    print('\nTrained on: ' + '; '.join(sorted(found.environment.unique())))
