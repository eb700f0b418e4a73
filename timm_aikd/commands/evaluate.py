"""Accuracy and calibration of models on a data set, side by side: `timm-aikd evaluate`."""
import argparse
import os
import tempfile

import torch

from ..calibration import fit_temperature
from ..errors import AikdError
from ..teacher.check import better_than_chance
from .predictions import Outputs, Predictions, outputs_on_data, scale_crosswise

DESCRIPTION = (
    'Top-1, top-5, negative log-likelihood (NLL), expected calibration error (ECE) and area under the risk-coverage '
    'curve (AURC) of models on a labelled data set: one row each, and their reliability diagrams. A model is fed as it '
    'was trained or recommends; its classes are matched with those of the data by name.')
EXAMPLE = 'timm-aikd evaluate out/phase1 out/phase2 DATA --calibrate'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own command line."""
    add = parser.add_argument
    add('models', nargs='+', metavar='MODEL', help='hf-hub:ORG/NAME[@REVISION], local-dir:PATH, a weights file, the '
        'output folder of a run (its model_best), or a timm model name; A+B: the mean of the probabilities of A and B')
    add('data', metavar='DATA', help='folder with a folder of images for each class, or with such a folder a split')
    add('--calibrate', action='store_true', help='add a row a model with its temperature scaled: fitted on one half of '
        'the images and judged on the other half, both ways; the T shown is fitted on all images')
    add('--split', metavar='NAME', help='split of the data (validation, or all of DATA without splits)')
    add('--dataset', default='', metavar='TYPE/NAME', help='data set of timm, such as torch/cifar10 (image folders)')
    add('--class-map', default='', metavar='FILE', help='class names, one a line, in the order of their indices')
    add('--model-name', metavar='NAME', help='architecture of a bare weights file (the one stored in it)')
    add('--use-train-size', action='store_true',
        help='size and crop of the training, where a model recommends others for tests')
    add('--bins', type=int, default=15, metavar='N', help='bins of the ECE, at least 1 (%(default)s)')
    add('--plot', metavar='FILE',
        help='reliability diagrams, as PNG; empty: none (reliability.png where matplotlib is installed)')
    add('-b', '--batch-size', type=int, default=64, metavar='N', help='images a batch (%(default)s)')
    add('-j', '--workers', type=int, default=2, metavar='N', help='loader processes (%(default)s)')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME',
        help='where to run (%(default)s)')


def evaluate(args: argparse.Namespace) -> None:
    """Print one row a model, two with `--calibrate`, and draw their reliability diagrams.

    Raises:
        AikdError: A model or the data cannot be opened, or do not fit each other.
    """
    _check(args)
    plot = _plot_path(args.plot)
    opened = [outputs_on_data(spec, args) for spec in args.models]  # what is wrong with any ends it here
    rows: dict[str, Predictions] = {}
    for spec, outputs in zip(args.models, opened, strict=True):
        rows.update(_rows(spec, outputs, args))
    print(table(rows, args.bins))
    if args.calibrate:
        print(
            'T: fitted on all images. The metrics of its row: each half of the images with the T fitted on the other.\n'
            'Publish a model with its T: timm-aikd push RUN_DIR ORG/NAME --temperature T')
    if plot:
        from .plots import reliability_diagram

        reliability_diagram(plot, {name: (row.confidence, row.correct) for name, row in rows.items()}, args.bins)
        print(f'reliability diagrams: {plot}')


def table(rows: dict[str, Predictions], bins: int = 15) -> str:
    """Number of images and metrics of each row, as a Markdown table."""
    lines = [
        f'| model | images | top-1 % | top-5 % | NLL | ECE % ({bins} bins) | AURC x 1000 |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, row in rows.items():
        metrics = row.metrics(bins)
        lines.append(
            f'| {name} | {len(row.nll):,} | {metrics["top1"]:.2f} | {metrics["top5"]:.2f} | {metrics["nll"]:.4f} | '
            f'{metrics["ece"]:.2f} | {metrics["aurc"]:.2f} |')
    return '\n'.join(lines)


def _check(args: argparse.Namespace) -> None:
    for name, low in (('bins', 1), ('batch_size', 1), ('workers', 0)):
        if getattr(args, name) < low:
            flag = '--' + name.replace('_', '-')
            raise AikdError(f'{flag} {getattr(args, name)}: allowed is a whole number >= {low}')
    processes = os.environ.get('WORLD_SIZE') or '1'
    if processes != '1':
        raise AikdError(
            f'evaluate: started as {processes} processes (WORLD_SIZE), allowed is 1: start it without torchrun or '
            f'accelerate launch')


def _rows(spec: str, outputs: Outputs, args: argparse.Namespace) -> dict[str, Predictions]:
    batches = list(outputs) if args.calibrate else outputs  # all logits are kept only where they are needed
    rows = {spec: Predictions.of(batches)}
    correct, classes = rows[spec].correct, rows[spec].classes
    if classes > 1 and not better_than_chance(int(correct.sum()), len(correct), classes):
        print(f'note: {spec} is no better than chance: wrong class order, untrained, or too few images to tell')
    if args.calibrate:
        logits, target = map(torch.cat, zip(*batches, strict=True))
        name = f'{spec}, T = {fit_temperature(logits, target):.4g}'
        rows[name] = Predictions.of([(scale_crosswise(logits, target), target)])
    return rows


def _plot_path(given: str | None) -> str:
    """Where to draw: checked before hours of predictions, and nowhere if nobody asked and there is no matplotlib."""
    from .plots import require_matplotlib

    if given == '':
        return given
    try:
        require_matplotlib()
    except AikdError as error:
        if given:
            raise
        print(f'note: no reliability diagrams: {error}')
        return ''
    path = given or 'reliability.png'
    if not path.endswith('.png') or os.path.isdir(path):
        raise AikdError(f'--plot {path}: name a file that ends in .png')
    try:
        tempfile.TemporaryFile(dir=os.path.dirname(path) or '.').close()
    except (OSError, ValueError) as error:
        raise AikdError(
            f'--plot {path}: cannot be written: name a file in an existing folder that you may write to') from error
    return path
