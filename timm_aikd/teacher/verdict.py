"""Does AI-KD pay with this teacher? What its top-1 on training and on other images says, by examples/results."""
from collections.abc import Mapping, Sequence

import torch

# The columns "gap" of examples/results/README.md: the NLL fell wherever it was 12 points and more (11.5 in single
# runs), and below -6.5. Between the two it fell much only where training labels were wrong, with gaps of up to 6.4
# points in single runs, with right ones by 0.02 at most. No teacher needed a T_c above 1.9.
PAYS, COSTS = 11.5, 6.5
_HIGHEST_TEMPERATURE = 2.5
_SLACK = 5.  # points of top-1 by which a checkpoint's own metric may differ
_ENOUGH = 5  # images of a class


def verdict(fit: Mapping[str, float]) -> str:
    """One line on whether AI-KD pays.

    Args:
        fit: `top1` and `train_top1` of the teacher, percent, on validation and on unaugmented training images, with
            their numbers `samples` and `train_samples`; `temperature`, T_c.
    """
    gap = fit['train_top1'] - fit['top1']
    if gap >= PAYS:
        meaning = 'expect a lower NLL than plain training'
    elif gap > COSTS:
        meaning = 'cannot tell, our runs had no such gap'
    elif gap > -COSTS:
        meaning = (
            'expect little gain, or a loss, if the training labels are right, for the teacher underfits: more epochs '
            'help more; if many are wrong, expect a gain')
    else:
        meaning = (
            'many training labels are wrong, and the teacher has not learnt them by heart: expect a lower error and '
            'NLL than plain training; but a teacher that was trained too briefly looks the same and does harm, so its '
            'validation top-1 should be near that of plain training')
    text = (
        f'teacher top-1 {fit["train_top1"]:.1f} % on {fit["train_samples"]:.0f} unaugmented training images, '
        f'{fit["top1"]:.1f} % on {fit["samples"]:.0f} validation images, a gap of {gap:.1f} points: {meaning}')
    if fit['temperature'] > _HIGHEST_TEMPERATURE:
        text += f'; but T_c {fit["temperature"]:.2f} is too high for right validation labels: check them'
    return text


def misfit(top1: float, stored_top1: float | None) -> str | None:
    """A warning where the teacher's top-1 on the validation images is far from what its checkpoint stores, percent."""
    if stored_top1 is None or top1 >= stored_top1 - _SLACK:
        return None
    return (
        f'its checkpoint stores a top-1 of {stored_top1:.1f} %, on these validation images it has {top1:.1f} %: '
        f'another order of the classes, another data set or another normalisation?')


def swapped_classes(predicted: torch.Tensor, target: torch.Tensor) -> list[tuple[int, int]]:
    """Pairs of classes that are each other's most frequent prediction.

    Args:
        predicted: Predicted classes [N].
        target: Labels [N].
    """
    most: dict[int, int] = {}  # the most frequent prediction of a label
    for label in target.unique().tolist():
        of_label = predicted[target == label]
        if len(of_label) >= _ENOUGH:
            most[label] = int(of_label.mode().values)
    return [(a, b) for a, b in most.items() if a < b and most.get(b) == a]


def swapped_text(pairs: Sequence[tuple[int, int]], class_names: Sequence[str] | None) -> str:
    """A warning that names the pairs."""
    names = class_names or [f'class {index}' for index in range(max(map(max, pairs)) + 1)]
    listed = ', '.join(f'{names[a]} and {names[b]}' for a, b in pairs[:3])
    return f'it takes {listed} for each other: are their labels or the teacher\'s classes swapped?'
