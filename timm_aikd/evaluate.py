"""Accuracy and calibration of models on a data set, side by side: `timm-aikd evaluate`."""
import argparse
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import create_dataset, create_loader, resolve_data_config
from tqdm import tqdm

from . import AikdError
from .calibration import area_under_risk_coverage, expected_calibration_error
from .classes import data_set_classes, match_classes
from .hub import one_line
from .loss import top1
from .source import load_model
from .teacher import better_than_chance


@dataclass(frozen=True)
class Predictions:
    """What is kept of a model's answers to N samples, all [N]: confidence and correctness of the predicted class,
    whether the label is among the five most probable ones, and its negative log-likelihood (nats)."""
    confidence: torch.Tensor
    correct: torch.Tensor
    in_top5: torch.Tensor
    nll: torch.Tensor

    def metrics(self, bins: int = 15) -> dict[str, float]:
        """`top1`, `top5` and `ece` in percent, `nll`, `aurc` times 1000.

        Args:
            bins: Number of bins of the ECE.
        """
        return {
            'top1': 100 * self.correct.double().mean().item(),
            'top5': 100 * self.in_top5.double().mean().item(),
            'nll': self.nll.double().mean().item(),
            'ece': expected_calibration_error(self.confidence, self.correct, bins),
            'aurc': area_under_risk_coverage(self.confidence, self.correct),
        }


@torch.inference_mode()
def predict(
        model: nn.Module,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        columns: torch.Tensor | None = None,
) -> Predictions:
    """The model's predictions for all batches, in eval mode.

    Args:
        model: Maps an input to logits [B, C].
        batches: Input and class indices [B] each.
        columns: For each class of the data, the model's output; None where they are the same.

    Raises:
        AikdError: No batch, or a label that is no class of the model.
    """
    model.eval()
    kept: list[tuple[torch.Tensor, ...]] = []
    for input, target in batches:
        logits = model(input)
        logits = (logits[0] if isinstance(logits, (tuple, list)) else logits).float()
        if columns is not None:
            logits = logits.index_select(-1, columns.to(logits.device))
        classes = logits.shape[-1]
        if not 0 <= int(target.min()) <= int(target.max()) < classes:
            raise AikdError(
                f'evaluate: the labels go from {int(target.min())} to {int(target.max())}, the model has {classes} '
                f'classes: check --split and --class-map')
        in_top5 = (logits.topk(min(5, classes)).indices == target[:, None]).any(-1)
        nll = F.cross_entropy(logits, target, reduction='none')
        kept.append(tuple(values.cpu() for values in (*top1(logits, target), in_top5, nll)))
    if not kept:
        raise AikdError('evaluate: the data set has no images: check DATA and --split')
    return Predictions(*map(torch.cat, zip(*kept, strict=True)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own command line."""
    parser.add_argument(
        'models', nargs='+', metavar='MODEL',
        help='hf-hub:ORG/NAME[@REVISION], local-dir:PATH, a weights file, the output folder of a run (its model_best), '
        'or a timm model name')
    parser.add_argument(
        'data', metavar='DATA', help='folder with a folder of images for each class, or with such a folder a split')
    parser.add_argument('--split', metavar='NAME', help='split of the data (validation, or all of DATA without splits)')
    parser.add_argument(
        '--dataset', default='', metavar='TYPE/NAME', help='data set of timm, such as torch/cifar10 (image folders)')
    parser.add_argument(
        '--class-map', default='', metavar='FILE', help='class names, one a line, in the order of their indices')
    parser.add_argument(
        '--model-name', metavar='NAME', help='architecture of a bare weights file (the one stored in it)')
    parser.add_argument(
        '--use-train-size', action='store_true',
        help='size and crop of the training, where a model recommends others for tests')
    parser.add_argument('--bins', type=int, default=15, metavar='N', help='bins of the ECE, at least 1 (%(default)s)')
    parser.add_argument(
        '--plot', metavar='FILE',
        help='reliability diagrams, as PNG; empty: none (reliability.png where matplotlib is installed)')
    parser.add_argument('-b', '--batch-size', type=int, default=64, metavar='N', help='images a batch (%(default)s)')
    parser.add_argument('-j', '--workers', type=int, default=2, metavar='N', help='loader processes (%(default)s)')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME',
        help='where to run (%(default)s)')


def evaluate(args: argparse.Namespace) -> None:
    """Print one row a model and draw their reliability diagrams.

    Raises:
        AikdError: A model or the data cannot be opened, or do not fit each other.
    """
    for name, low in (('bins', 1), ('batch_size', 1), ('workers', 0)):
        if getattr(args, name) < low:
            flag = '--' + name.replace('_', '-')
            raise AikdError(f'{flag} {getattr(args, name)}: allowed is a whole number >= {low}')
    plot = _plot_path(args.plot)
    predictions = {spec: _predictions(spec, args) for spec in args.models}
    print(table({spec: (len(kept.nll), kept.metrics(args.bins)) for spec, kept in predictions.items()}, args.bins))
    if plot:
        from .plots import reliability_diagram

        reliability_diagram(
            plot, {spec: (kept.confidence, kept.correct) for spec, kept in predictions.items()}, args.bins)
        print(f'reliability diagrams: {plot}')


def table(rows: dict[str, tuple[int, dict[str, float]]], bins: int = 15) -> str:
    """Number of images and metrics of each model, as a Markdown table."""
    lines = [
        f'| model | images | top-1 % | top-5 % | NLL | ECE % ({bins} bins) | AURC x 1000 |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, (images, metrics) in rows.items():
        lines.append(
            f'| {name} | {images:,} | {metrics["top1"]:.2f} | {metrics["top5"]:.2f} | {metrics["nll"]:.4f} | '
            f'{metrics["ece"]:.2f} | {metrics["aurc"]:.2f} |')
    return '\n'.join(lines)


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
    _check_writable(path)
    return path


def _check_writable(path: str) -> None:
    if not path.endswith('.png') or os.path.isdir(path):
        raise AikdError(f'--plot {path}: name a file that ends in .png')
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(path) or '.'):
            pass
    except (OSError, ValueError) as error:
        raise AikdError(
            f'--plot {path}: cannot be written: name a file in an existing folder that you may write to') from error


def _predictions(spec: str, args: argparse.Namespace) -> Predictions:
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()  # as one that is no device has none
    except (RuntimeError, AssertionError) as error:
        raise AikdError(
            f'--device {args.device}: is not available here ({one_line(error)}): choose another, such as cpu'
        ) from error
    model, config, is_published = load_model(spec, args.model_name)
    data_config = resolve_data_config(
        {}, pretrained_cfg=config or model.pretrained_cfg, use_test_size=not args.use_train_size)
    data_set = _data_set(args, data_config['input_size'][0])
    names = data_set_classes(data_set)
    columns = match_classes(
        spec, model.pretrained_cfg, model.num_classes, len(names) if names else model.num_classes, names, is_published,
        student='data set')
    if columns is not None:
        print(f'note: {spec}: {len(columns)} of its {model.num_classes} classes, found by name')
    loader = create_loader(
        data_set,
        input_size=data_config['input_size'],
        batch_size=args.batch_size,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        num_workers=args.workers,
        persistent_workers=False,
        device=device,
    )
    predictions = predict(
        model.to(device),
        tqdm(loader, desc=spec, unit='batch', disable=None),  # None: no bar where nobody watches
        None if columns is None else torch.tensor(columns))
    correct, classes = predictions.correct, len(names) if names else model.num_classes
    if classes > 1 and not better_than_chance(int(correct.sum()), len(correct), classes):
        print(f'note: {spec} is no better than chance: wrong class order, untrained, or too few images to tell')
    return predictions


def _data_set(args: argparse.Namespace, channels: int) -> Any:
    try:
        data_set = create_dataset(
            args.dataset, root=args.data, split=args.split or 'validation', class_map=args.class_map, is_training=False,
            input_img_mode='L' if channels == 1 else 'RGB')
    except Exception as error:  # of each kind of data set its own
        what = f'{args.dataset} in {args.data}' if args.dataset else args.data
        raise AikdError(
            f'evaluate: the data {what} cannot be opened ({" ".join(str(error).split())[:100]}): check DATA, '
            f'--dataset, --split and --class-map') from error
    splits = [name for name in ('train', 'test', 'val') if not args.dataset and os.path.isdir(f'{args.data}/{name}')]
    is_whole = str(getattr(getattr(data_set, 'reader', None), 'root', '')) == args.data
    if is_whole and not args.split and splits:
        raise AikdError(
            f'evaluate: {args.data} has no folder validation, but others: name the split, such as --split {splits[-1]}')
    if is_whole and args.split:
        raise AikdError(
            f'--split {args.split}: {args.data} has no such folder: name another, or leave it out for all of DATA')
    return data_set
