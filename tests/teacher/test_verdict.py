"""Whether AI-KD pays, and what looks wrong, told before the first step."""
import logging
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_aikd import Aikd, AikdConfig, AikdError, Teacher
from timm_aikd.run import AikdRun
from timm_aikd.teacher.verdict import COSTS, PAYS, misfit, swapped_classes, verdict

from ..conftest import ROOT


def fit(train, validation, temperature=1.):
    return dict(train_top1=train, top1=validation, temperature=temperature, samples=2000, train_samples=1000)


@pytest.mark.parametrize('train, validation, words', [
    (100., 80., 'expect a lower NLL'), (92., 84., 'cannot tell'), (86., 84., 'expect little gain'),
    (84., 86., 'expect little gain'), (70., 85., 'not learnt them by heart: expect a lower error')])
def test_the_gap_decides(train, validation, words):
    text = verdict(fit(train, validation))
    assert words in text and f'gap of {train - validation:.1f} points' in text and '2000' in text and '1000' in text


def test_a_temperature_that_contradicts_right_labels_is_told():
    assert 'check them' in verdict(fit(100., 56., 3.2)) and 'check them' not in verdict(fit(100., 80., 1.8))


def gaps_and_gains():
    """Of each AI-KD row of the results: regime, gap, and mean and interval of the change of the NLL."""
    text = (ROOT / 'examples' / 'results' / 'README.md').read_text()
    for regime, section in re.findall(r'^## (\S+): test images\n(.*?)(?=^## )', text, re.MULTILINE | re.DOTALL):
        values, _, changes = section.partition('Minus ce,')
        for method in ('aikd', 'aikd-from-ce', 'aikd-from-ce-alpha-0.3'):
            row = re.search(rf'^\| {method} \|.* (-?[\d.]+)( ± \S+ \| \S+){{2}} ± \S+ \|$', values, re.MULTILINE)
            change = re.search(
                rf'^\| {method} \| \d+ \| \S+ ± \S+ \| \**([-+.\d]+) ± ([.\d]+)', changes, re.MULTILINE)
            if row and change:
                yield regime, float(row[1]), float(change[1]), float(change[2])


def test_the_thresholds_are_those_of_the_results():
    """The NLL fell beyond the noise with every gap from PAYS on or below -COSTS; near 0 much only with wrong labels."""
    rows = list(gaps_and_gains())
    assert len(rows) >= 16
    assert all(change < -noise for _, gap, change, noise in rows if gap >= PAYS or gap < -COSTS)
    assert all(change > -0.025 for regime, gap, change, _ in rows if abs(gap) <= COSTS and 'noisy' not in regime)
    assert any(change < -noise for regime, gap, change, noise in rows if abs(gap) <= COSTS and 'noisy' in regime)
    assert not any(COSTS < gap < PAYS for _, gap, _, _ in rows)
    assert sum(gap < -COSTS for _, gap, _, _ in rows) >= 2


def test_a_metric_far_below_the_stored_one_is_told():
    assert misfit(60., None) is None and misfit(60., 63.) is None and misfit(70., 63.) is None
    assert '75.0' in misfit(60., 75.) and '60.0' in misfit(60., 75.)


def test_swapped_classes():
    target = torch.arange(4).repeat_interleave(10)
    predicted = target.clone()
    assert swapped_classes(predicted, target) == []
    predicted[target == 1], predicted[target == 3] = 3, 1
    assert swapped_classes(predicted, target) == [(1, 3)]
    predicted[target == 3] = 0  # 1 is taken for 3, but not 3 for 1
    assert swapped_classes(predicted, target) == []


class OneHot(nn.Module):
    """Knows the label, which is the first column of the input, but for a permutation of the classes."""

    def __init__(self, order, right=1.):
        super().__init__()
        self.order, self.right = torch.tensor(order), right

    def forward(self, x):
        label = torch.where(x[:, 1] < self.right, x[:, 0], (x[:, 0] + 2) % 5).long()
        return F.one_hot(self.order[label], 5).float() * 4


def data(size=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (size,), generator=generator)
    return [(torch.stack([y.float(), torch.rand(size, generator=generator)], 1), y)]


class Student(nn.Module):
    num_classes = 5

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 5)


def calibrated(teacher, training=None):
    run = AikdRun(Student(), nn.CrossEntropyLoss(), teacher, AikdConfig(teacher='given'), epochs=2,
                  class_names=['ant', 'bee', 'cat', 'dog', 'elk'])
    return run, run.calibrate(data(), training)


def test_a_run_tells_the_verdict_and_keeps_the_numbers(caplog):
    caplog.set_level(logging.INFO)
    run, found = calibrated(OneHot(range(5), right=0.8), data(seed=1))
    told = [message for message in caplog.messages if 'does it pay?' in message]
    assert len(told) == 1 and 'expect little gain' in told[0]
    kept = run.get_state()['aikd']['teacher_metrics']
    assert kept['train_samples'] == 512 and kept['train_top1'] == found['train_top1'] == pytest.approx(80, abs=6)
    caplog.clear()
    calibrated(OneHot(range(5), right=0.8))
    assert any('Not measured' in message for message in caplog.messages)


def test_a_run_names_swapped_classes_and_a_metric_that_is_missed(caplog):
    calibrated(Teacher(OneHot([0, 2, 1, 3, 4]), 'T', stored_top1=99.))
    assert any('bee and cat' in message for message in caplog.messages)
    assert any('stores a top-1 of 99.0 %' in message for message in caplog.messages)


def test_a_wrong_class_order_ends_the_run_before_the_first_step():
    with pytest.raises(AikdError, match='512 training samples, no better than chance'):
        calibrated(OneHot([1, 2, 3, 4, 0], right=1.1), data(seed=1))
    run, _ = calibrated(OneHot(range(5)), data(seed=1))
    assert run.aikd.teaching.check_chance.is_done


def test_nothing_to_calibrate_is_told():
    with pytest.raises(AikdError, match='no teacher to calibrate'):
        Aikd(5, None, AikdConfig(teacher='none'), epochs=2).fit_teacher_temperature([])
