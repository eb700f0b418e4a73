"""The test against chance."""
import math

import pytest

from timm_aikd.teacher.check import better_than_chance


@pytest.mark.parametrize('count, num_classes', [(128, 2), (128, 10), (128, 1000), (200, 5), (1024, 2), (1024, 1000)])
def test_better_than_chance_is_the_exact_binomial_test(count, num_classes):
    ways = [math.comb(count, k) * (num_classes - 1) ** (count - k) for k in range(count + 1)]
    exact = [sum(ways[correct:]) * 1000 < num_classes ** count for correct in range(count + 1)]
    first = exact.index(True)
    assert count / num_classes < first < count
    for correct in {0, 1, first - 2, first - 1, first, first + 1, count}:
        assert better_than_chance(correct, count, num_classes) == exact[correct], correct
    assert not better_than_chance(0, 0, num_classes)
