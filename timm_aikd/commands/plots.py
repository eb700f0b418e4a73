"""Pictures of a model's calibration and of a run's epochs, as PNG. Needs matplotlib."""
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..calibration import expected_calibration_error, reliability_bins
from ..errors import AikdError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, ORANGE = '#4477aa', '#cc3311', '#ee9933'
COLUMNS = {  # of summary.csv -> title of a panel; each has a scale of its own
    'eval_top1': 'validation: top-1 error, %',
    'eval_loss': 'validation: NLL',
    'eval_ece': 'validation: ECE, %',
    'train_aikd_task': 'training: task loss',
    'train_aikd_progressive': 'training: progressive term',
    'train_aikd_kd': 'training: kd term',
    'train_aikd_features': 'training: feature term',
    'train_aikd_adv': 'training: adversarial term',
    'train_aikd_disc': 'training: discriminator loss',
    'train_aikd_disc_accuracy': 'training: discriminator accuracy',
}


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
    figure, panels = _figure(len(predictions), legend_height=1.2)
    edges = torch.arange(bins + 1).numpy() / bins
    for panel, (name, (confidence, correct)) in zip(panels, predictions.items(), strict=True):
        share, mean_confidence, accuracy = reliability_bins(confidence.cpu(), correct.cpu(), bins)
        lower = torch.minimum(accuracy, mean_confidence)
        for label, color, bottom, top in (
                ('accuracy', BLUE, torch.zeros(bins), lower),
                ('confidence above accuracy', RED, lower, mean_confidence),
                ('accuracy above confidence', ORANGE, lower, accuracy),
        ):
            panel.bar(
                edges[:-1], (top - bottom).numpy(), bottom=bottom.numpy(), width=1 / bins, align='edge', color=color,
                edgecolor='white', label=label)
        panel.plot([0, 1], [0, 1], '--', color='grey', label='accuracy = confidence')
        panel.step(edges, [*share.tolist(), share[-1].item()], where='post', color='black', label='share of images')
        panel.set(
            xlim=(0, 1), ylim=(0, 1), xlabel='confidence', ylabel='accuracy',
            title=f'{name if len(name) <= 40 else f"...{name[-37:]}"}\n'
            f'ECE {expected_calibration_error(confidence, correct, bins):.2f} %')
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(len(panels), 3))
    figure.savefig(path, dpi=100)


def training_curves(path: Path | str, epochs: Sequence[Mapping[str, str]]) -> list[str]:
    """Validation metrics and AI-KD's terms, epoch by epoch, one panel each.

    Args:
        path: The PNG to write.
        epochs: The rows of summary.csv.

    Returns:
        The titles of the panels; without one, nothing is written.
    """
    shown = {name: title for name, title in COLUMNS.items() if any(float(row.get(name) or 0) for row in epochs)}
    if not shown:
        return []
    figure, panels = _figure(len(shown))
    for panel, (name, title) in zip(panels, shown.items(), strict=True):
        panel.plot([float(row['epoch']) for row in epochs], _column(epochs, name), color=BLUE)
        panel.set(title=title, xlabel='epoch')
    figure.savefig(path, dpi=100)
    return list(shown.values())


def _column(epochs: Sequence[Mapping[str, str]], name: str) -> list[float]:
    """A column of summary.csv; top-1 as the error."""
    values = [float(row.get(name) or 'nan') for row in epochs]
    return [100 - value for value in values] if name == 'eval_top1' else values


def _figure(count: int, legend_height: float = 0.) -> tuple['Figure', list['Axes']]:
    """A figure with panels in rows of up to three; without pyplot, whose backend is the user's business."""
    require_matplotlib()
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.8 * columns, 4.8 * rows + legend_height), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]
