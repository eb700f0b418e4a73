"""Calibration metrics against plain loops, and the temperature against a search."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from timm_aikd.calibration import (
    area_under_risk_coverage,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)


def test_ece_against_a_loop():
    torch.manual_seed(0)
    confidence, correct = torch.rand(500), torch.rand(500) < 0.6
    expected = 0.
    for b in range(15):
        inside = [i for i, c in enumerate(confidence.tolist()) if b / 15 < c <= (b + 1) / 15]
        if inside:
            accuracy = sum(correct[i].item() for i in inside) / len(inside)
            mean = sum(confidence[i].item() for i in inside) / len(inside)
            expected += len(inside) / 500 * abs(accuracy - mean)
    assert expected_calibration_error(confidence, correct) == pytest.approx(100 * expected, rel=1e-6)


def test_ece_of_the_sure_and_wrong_is_all_of_it():
    assert expected_calibration_error(torch.ones(4), torch.zeros(4, dtype=torch.bool)) == pytest.approx(100)
    assert expected_calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == pytest.approx(0)


def test_bins_are_closed_above():
    share, _, _ = reliability_bins(torch.tensor([0., 0.25, 0.26, 1.]), torch.ones(4, dtype=torch.bool), bins=4)
    assert share.tolist() == [0.5, 0.25, 0, 0.25]


def risk_coverage(order):
    errors = itertools.accumulate(order)
    return 1000 * sum(e / (k + 1) for k, e in enumerate(errors)) / len(order)


def test_aurc_without_ties():
    confidence = torch.tensor([0.9, 0.3, 0.7, 0.5])
    correct = torch.tensor([True, False, False, True])
    assert area_under_risk_coverage(confidence, correct) == pytest.approx(risk_coverage([0, 1, 0, 1]))


def test_aurc_averages_over_the_orders_of_a_tie():
    confidence = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.2])
    correct = torch.tensor([True, False, True, False, True])
    orders = [risk_coverage([0, *tie, 0]) for tie in itertools.permutations([1, 0, 1])]
    assert area_under_risk_coverage(confidence, correct) == pytest.approx(sum(orders) / len(orders))


@pytest.mark.parametrize('scale', [0.3, 1., 4.])
@pytest.mark.parametrize('binary', [False, True])
def test_temperature_has_the_least_nll(scale, binary):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 5, generator=generator) * 1.5
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    logits = logits * scale

    def nll(t):
        if binary:
            return F.binary_cross_entropy_with_logits(logits / t, F.one_hot(target, 5).float()).item()
        return F.cross_entropy(logits / t, target).item()

    fitted = fit_temperature(logits, target, binary)
    grid = [math.exp(x / 50) for x in range(-110, 111)]
    best = min(grid, key=nll)
    assert fitted == pytest.approx(best, rel=0.03)
    if not binary:
        assert fitted == pytest.approx(scale, rel=0.25)  # the labels were drawn at scale 1


def test_temperature_stays_in_its_range_where_nothing_is_wrong():
    logits = torch.eye(4) * 2
    assert fit_temperature(logits, torch.arange(4)) == pytest.approx(0.1, rel=1e-3)
    assert fit_temperature(-logits, torch.arange(4)) == pytest.approx(10, rel=1e-3)
