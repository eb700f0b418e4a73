"""The pictures: every colour is explained, nothing covers a bar, each term has its own scale."""
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from timm_aikd.commands.plots import reliability_diagram, training_curves


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', savefig)
    return saved


def predictions(seed, bias):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(2000, generator=generator)
    return confidence, torch.rand(2000, generator=generator) < (confidence + bias).clamp(0, 1)


@pytest.mark.parametrize('models', [1, 2, 5])
def test_the_legend_explains_every_colour_and_covers_no_panel(tmp_path, figures, models):
    reliability_diagram(tmp_path / 'r.png', {f'model {i}': predictions(i, 0.2 - 0.2 * i) for i in range(models)})
    figure, = figures
    panels, (legend,) = figure.axes, figure.legends
    assert len(panels) == models and not any(panel.get_legend() for panel in panels)
    explained = {to_hex(handle.patches[0].get_facecolor() if hasattr(handle, 'patches') else handle.get_color())
                 for handle in panels[0].get_legend_handles_labels()[0]}
    assert len(explained) == len(legend.get_texts()) == 5
    bars = [bar for panel in panels for bar in panel.patches if bar.get_height() > 0]
    assert {to_hex(bar.get_facecolor()) for bar in bars} | {
        to_hex(line.get_color()) for panel in panels for line in panel.lines} <= explained
    assert all(bar.get_alpha() is None for bar in bars)  # no colour that mixes two others
    box = legend.get_window_extent()
    assert not any(box.overlaps(panel.get_tightbbox()) for panel in panels)
    with Image.open(tmp_path / 'r.png') as picture:
        assert picture.width >= 450 * min(models, 3) and picture.height >= 450


def test_the_bars_are_accuracy_and_its_distance_from_confidence(tmp_path, figures):
    confidence = torch.tensor([0.3, 0.3, 0.9, 0.9])
    reliability_diagram(tmp_path / 'r.png', {'m': (confidence, torch.tensor([1, 1, 1, 0]))}, bins=2)
    accuracy, above, below = figures[0].axes[0].containers
    spans = [[(round(bar.get_y(), 6), round(bar.get_y() + bar.get_height(), 6)) for bar in part]
             for part in (accuracy, above, below)]
    assert spans[0] == [(0, 0.3), (0, 0.5)]  # the lower of accuracy and confidence
    assert spans[1] == [(0.3, 0.3), (0.5, 0.9)] and spans[2] == [(0.3, 1), (0.5, 0.5)]


def test_each_term_has_a_panel_and_a_scale_of_its_own(tmp_path, figures):
    rows = [
        {'epoch': str(i), 'train_aikd_task': str(2 - 0.1 * i), 'train_aikd_progressive': '35', 'train_aikd_disc': '0',
         'eval_top1': str(60 + i), 'eval_loss': '', 'train_aikd_kd': str(1 + i)}
        for i in range(3)]
    titles = training_curves(tmp_path / 'c.png', rows)
    figure, = figures
    assert [panel.get_title() for panel in figure.axes] == titles
    assert [title.split()[-2] for title in titles] == ['error,', 'task', 'progressive', 'kd']  # no empty ones
    drawn = [line.get_ydata().tolist() for panel in figure.axes for line in panel.lines]
    assert drawn[0] == [40, 39, 38] and drawn[2] == [35, 35, 35] and drawn[3] == [1, 2, 3]
    with Image.open(tmp_path / 'c.png') as picture:
        assert picture.width / 3 >= 450 and picture.height / 2 >= 400
    assert training_curves(tmp_path / 'none.png', [{'epoch': '0'}]) == [] and not (tmp_path / 'none.png').exists()
