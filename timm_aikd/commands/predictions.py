"""A model's predictions on a labelled data set, and their metrics."""
import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import create_dataset, create_loader, resolve_data_config
from tqdm import tqdm

from ..calibration import area_under_risk_coverage, expected_calibration_error, fit_temperature
from ..errors import AikdError, one_line
from ..loss import top1
from ..teacher import data_set_classes, load_model, match_classes
from ..teacher.ensemble import mean_logits

Outputs = Iterable[tuple[torch.Tensor, torch.Tensor]]  # logits [B, C] and class indices [B] of each batch


@dataclass(frozen=True)
class Predictions:
    """What the metrics of N predictions need, [N] each."""
    confidence: torch.Tensor  # probability of the predicted class
    correct: torch.Tensor  # whether that is the label
    in_top5: torch.Tensor  # whether the label is among the five most probable classes
    nll: torch.Tensor  # negative log-likelihood of the label, in nats
    classes: int  # number of classes C

    @classmethod
    def of(cls, outputs: Outputs) -> 'Predictions':
        """From a model's outputs.

        Raises:
            AikdError: There are none.
        """
        kept, classes = [], 0
        for logits, target in outputs:
            classes = logits.shape[-1]
            in_top5 = (logits.topk(min(5, classes)).indices == target[:, None]).any(-1)
            kept.append((*top1(logits, target), in_top5, F.cross_entropy(logits, target, reduction='none')))
        if not kept:
            raise AikdError('evaluate: the data set has no images: check DATA and --split')
        confidence, correct, in_top5, nll = map(torch.cat, zip(*kept, strict=True))
        return cls(confidence, correct, in_top5, nll, classes)

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
def outputs_of(model: nn.Module, batches: Outputs, columns: torch.Tensor | None = None) -> Iterator[Any]:
    """The model's logits and the labels of each batch, on the CPU; the model is put in eval mode.

    Args:
        model: Maps an input to logits [B, C].
        batches: Input and class indices [B] each.
        columns: For each class of the data, the model's output; None where they are the same.

    Raises:
        AikdError: A label is no class of the model.
    """
    model.eval()
    for input, target in batches:
        logits = model(input)
        logits = (logits[0] if isinstance(logits, (tuple, list)) else logits).float().cpu()
        if columns is not None:
            logits = logits.index_select(-1, columns)
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= logits.shape[-1]:
            raise AikdError(
                f'evaluate: the labels go from {low} to {high}, the model has {logits.shape[-1]} classes: check '
                f'--split and --class-map')
        yield logits, target.cpu()


def scale_crosswise(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Temperature-scaled logits [N, C]: each half of the images has the temperature fitted on the other half.

    Raises:
        AikdError: Fewer than two images.
    """
    if len(target) < 2:
        raise AikdError(f'--calibrate: needs at least 2 images, the data set has {len(target)}: leave it out')
    halves = torch.randperm(len(target), generator=torch.Generator().manual_seed(0)).chunk(2)
    scaled = torch.empty_like(logits)
    for half, other in (halves, halves[::-1]):
        scaled[half] = logits[half] / fit_temperature(logits[other], target[other])
    return scaled


def outputs_on_data(spec: str, args: argparse.Namespace) -> Iterator[Any]:
    """The outputs of a model on the command line's data set; of models joined by + those of their mean probabilities.

    The model runs, and moves to the device, when the first output is asked for.

    Raises:
        AikdError: A model, device or data cannot be used, or do not fit each other.
    """
    members = [spec] if os.path.exists(spec) else spec.split('+')
    outputs = [_outputs_of_one(member, args) for member in members]
    return outputs[0] if len(outputs) == 1 else mean_outputs(spec, outputs)


def mean_outputs(spec: str, outputs: list[Iterator[Any]]) -> Iterator[Any]:
    """Logits of the mean probabilities of several models' outputs on the same batches, and the labels.

    Raises:
        AikdError: The models have different numbers of classes.
    """
    for batches in zip(*outputs, strict=True):
        logits = [each for each, _ in batches]
        classes = {each.shape[-1] for each in logits}
        if len(classes) > 1:
            counts = ' and '.join(map(str, sorted(classes)))
            raise AikdError(f'evaluate: {spec}: have {counts} classes: join models of the same classes')
        yield mean_logits(logits, binary=False), batches[0][1]


def _outputs_of_one(spec: str, args: argparse.Namespace) -> Iterator[Any]:
    """Load a model and feed it the data set of the command line, as it was trained or as it recommends.

    Raises:
        AikdError: Model, device or data cannot be used, or do not fit each other.
    """
    device = _device(args.device)
    loaded = load_model(spec, args.model_name)
    model = loaded.model
    data_config = resolve_data_config(
        {}, pretrained_cfg=loaded.data_config or model.pretrained_cfg, use_test_size=not args.use_train_size)
    data_set = _data_set(args, data_config['input_size'][0])
    names = data_set_classes(data_set)
    columns = match_classes(
        spec, model.pretrained_cfg, model.num_classes, len(names) if names else model.num_classes, names,
        origin=loaded.origin, student='data set')
    if columns is not None:
        print(f'note: {spec}: {len(columns)} of its {model.num_classes} classes, found by name')
    loader = create_loader(
        data_set,
        **{key: data_config[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')},
        batch_size=args.batch_size,
        num_workers=args.workers,
        persistent_workers=False,
        device=device,
    )

    def predict() -> Iterator[Any]:
        progress = tqdm(loader, desc=spec, unit='batch', disable=None)  # None: only on a terminal
        yield from outputs_of(model.to(device), progress, None if columns is None else torch.tensor(columns))

    return predict()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fail early for an unusable device
    except (RuntimeError, AssertionError) as error:
        raise AikdError(
            f'--device {name}: is not available here ({one_line(error)}): choose another, such as cpu') from error
    return device


def _data_set(args: argparse.Namespace, channels: int) -> Any:
    if not args.dataset and not os.path.exists(args.data):
        raise AikdError(f'evaluate: DATA {args.data}: no such folder: check the path')
    try:
        data_set = create_dataset(
            args.dataset, root=args.data, split=args.split or 'validation', class_map=args.class_map, is_training=False,
            input_img_mode='L' if channels == 1 else 'RGB')
    except Exception as error:  # each kind of data set raises its own
        what = f'{args.dataset} in {args.data}' if args.dataset else args.data
        raise AikdError(
            f'evaluate: the data {what} cannot be opened ({one_line(error)}): check DATA, --dataset, --split and '
            f'--class-map') from error
    _check_split(args, data_set)
    return data_set


def _check_split(args: argparse.Namespace, data_set: Any) -> None:
    """Refuse to take a folder of splits as one data set."""
    is_whole = str(getattr(getattr(data_set, 'reader', None), 'root', '')) == args.data
    splits = [name for name in ('train', 'test', 'val') if not args.dataset and os.path.isdir(f'{args.data}/{name}')]
    if is_whole and args.split:
        raise AikdError(
            f'--split {args.split}: {args.data} has no such folder: name another, or leave it out for all of DATA')
    if is_whole and splits:
        raise AikdError(
            f'evaluate: {args.data} has no folder validation, but others: name the split, such as --split {splits[-1]}')
