"""Tables of accuracy.py's results: means over the seeds, and paired differences with their intervals."""
import sys

import pandas as pd
from methods import Run
from scipy.stats import t as student_t

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


def select(runs: list[Run], part: str, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of these runs by regime; `ce-ts` is `ce` with its temperature scaled."""
    rows = rows.drop_duplicates([*Run._fields, 'part'], keep='last')
    found = pd.DataFrame(runs, columns=Run._fields).assign(part=part).merge(rows, on=[*Run._fields, 'part'])
    plain = found[found.method == 'ce']
    seconds = plain.set_index(['regime', 'seed']).seconds_per_step.rename('plain')
    found['step_time'] = found.seconds_per_step / found.join(seconds, ['regime', 'seed']).plain
    scaled = plain[plain.nll_scaled.notna()].assign(method='ce-ts', nll=plain.nll_scaled, ece=plain.ece_scaled)
    return dict(iter(pd.concat([found, scaled]).groupby('regime', sort=False)))


def summary(rows: pd.DataFrame, columns: dict[str, tuple[str, str]], reference: str | None = None) -> pd.DataFrame:
    """A row of text for each method: the number of seeds, and of each column the mean ± the standard deviation.

    With a reference, its paired differences: mean ± half of the 95 % t-interval, bold where that leaves out 0.
    """
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
    table['n'] = n[next(iter(columns))].astype(str)
    table['method'] = table.index
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
        sys.exit('error: the results have none of these runs')
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
