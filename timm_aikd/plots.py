"""Pictures of a model's calibration and of a run's epochs, as PNG. Needs matplotlib."""
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import AikdError
from .calibration import expected_calibration_error, reliability_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def require_matplotlib() -> None:
    """Raises AikdError where there is none."""
    if importlib.util.find_spec('matplotlib') is None:
        raise AikdError('pictures need matplotlib, which is not installed: pip install \'timm-aikd[plots]\'')


def reliability_diagram(
        path: Path | str,
        predictions: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        bins: int = 15,
) -> None:
    """Accuracy over confidence (https://arxiv.org/abs/1706.04599), one panel a model.

    Args:
        path: The PNG to write.
        predictions: Confidence and correctness [N] of each model, as `expected_calibration_error` takes them.
        bins: Number of equal-width bins.
    """
    figure, panels = _figure(len(predictions), 4, 4)
    left = torch.arange(bins).numpy() / bins
    for panel, (name, (confidence, correct)) in zip(panels, predictions.items(), strict=True):
        share, mean_confidence, accuracy = (
            values.cpu().numpy() for values in reliability_bins(confidence, correct, bins))
        filled = share > 0
        panel.plot([0, 1], [0, 1], '--', color='grey', linewidth=1)
        panel.bar(left, accuracy, width=1 / bins, align='edge', color='C0', edgecolor='white', label='accuracy')
        panel.bar(
            left[filled], (mean_confidence - accuracy)[filled], bottom=accuracy[filled], width=1 / bins, align='edge',
            color='C3', alpha=0.4, label='confidence - accuracy')
        panel.step(left, share, where='post', color='black', linewidth=1, label='share of samples')
        panel.set(
            xlim=(0, 1), ylim=(0, 1), xlabel='confidence', ylabel='accuracy',
            title=f'{_short(name)}\nECE {expected_calibration_error(confidence, correct, bins):.2f} %')
        panel.legend(loc='upper left', fontsize='small')
    figure.savefig(path, dpi=100)


def training_curves(path: Path | str, epochs: Sequence[Mapping[str, str]]) -> list[str]:
    """What a run's summary.csv says of its epochs: validation metrics and AI-KD's terms, one panel each.

    Args:
        path: The PNG to write.
        epochs: The rows of summary.csv.

    Returns:
        The names of the panels; without one, nothing is written.
    """
    columns = {
        'top-1 error, %': {'eval_top1': 'validation'},
        'NLL': {'eval_loss': 'validation'},
        'ECE, %': {'eval_ece': 'validation'},
        'training terms': {f'train_aikd_{name}': name for name in ('task', 'progressive', 'kd', 'adv', 'disc')},
        'discriminator accuracy': {'train_aikd_disc_accuracy': 'training'},
    }
    lines = {
        title: {
            label: [100 - value if name == 'eval_top1' else value for value in _numbers(epochs, name)]
            for name, label in names.items() if any(_numbers(epochs, name))}
        for title, names in columns.items()
    }
    lines = {title: named for title, named in lines.items() if named}
    if not lines:
        return []
    figure, panels = _figure(len(lines), 3.4, 3)
    epoch = _numbers(epochs, 'epoch')
    for panel, (title, named) in zip(panels, lines.items(), strict=True):
        for label, values in named.items():
            panel.plot(epoch, values, label=label)
        panel.set(title=title, xlabel='epoch')
        if len(named) > 1:
            panel.legend(fontsize='small')
    figure.savefig(path, dpi=100)
    return list(lines)


def _numbers(rows: Sequence[Mapping[str, str]], name: str) -> list[float]:
    return [float(row.get(name) or 'nan') for row in rows] if any(row.get(name) for row in rows) else []


def _short(name: str) -> str:
    return name if len(name) <= 40 else f'...{name[-37:]}'


def _figure(panels: int, width: float, height: float) -> tuple['Figure', Sequence['Axes']]:
    """A figure and its panels in a row; without pyplot, whose backend is the user's business."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout='constrained')
    return figure, figure.subplots(1, panels, squeeze=False)[0]
