"""The fit of T_c: the teacher on labelled validation images, calibrated."""
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..calibration import (
    TEMPERATURE_RANGE,
    area_under_risk_coverage,
    expected_calibration_error,
    fit_temperature,
)
from ..errors import AikdError
from ..loss import top1
from ..ranks import gather_rows, is_distributed, logger
from .teacher import Teacher


def fit_metrics(logits: torch.Tensor, target: torch.Tensor, binary: bool) -> dict[str, float]:
    """Fit T_c to a teacher's answers; on all ranks the same.

    Args:
        logits: Uncalibrated logits [N, C].
        target: Labels [N].
        binary: The criterion is a BCE.

    Returns:
        `temperature`, and with it on the `samples` images `top1` and `ece` (percent), `nll` and `aurc` (times 1000).
    """
    fitted = torch.tensor(fit_temperature(logits, target, binary), device=logits.device)
    if is_distributed():
        dist.broadcast(fitted, 0)
    temperature = fitted.item()
    low, high = TEMPERATURE_RANGE
    if not low * 1.01 < temperature < high * 0.99:
        logger.warning(
            f'AI-KD: the fit of T_c ended at the limit of its range {TEMPERATURE_RANGE}: these images do not determine '
            f'it; set `teacher_temperature`')
    confidence, correct = top1(logits / temperature, target)
    return {
        'temperature': temperature,
        'top1': 100 * correct.float().mean().item(),
        'nll': F.cross_entropy(logits / temperature, target).item(),
        'ece': expected_calibration_error(confidence, correct),
        'aurc': area_under_risk_coverage(confidence, correct),
        'samples': len(target),
    }


@torch.no_grad()
def answers(
        teacher: Teacher,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        num_classes: int,
        device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's finite logits [N, C] for labelled images, normalised as the student's, and their labels [N].

    Under torch.distributed every rank calls this with its own share of the images, and gets the answers for all.

    Raises:
        AikdError: No images, labels that are not the student's classes, or no finite logits.
    """
    logits, target = _predictions(teacher, batches, num_classes, device)
    _check(logits, target, num_classes)
    return _finite(logits, target, teacher.name)


def _predictions(
        teacher: Teacher,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        num_classes: int,
        device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, C] and labels [N] of all ranks."""
    logits = [torch.empty(0, num_classes, device=device)]
    labels = [torch.empty(0, dtype=torch.long, device=device)]
    for input, target in batches:
        logits.append(teacher(input))
        labels.append(target.to(logits[-1].device))
    # what is empty lies where the student was made, which may have been moved since
    return gather_rows(torch.cat(logits[1:] or logits)), gather_rows(torch.cat(labels[1:] or labels))


def _check(logits: torch.Tensor, target: torch.Tensor, num_classes: int) -> None:
    if len(target) == 0:
        raise AikdError('AI-KD: no images to fit T_c on; set `teacher_temperature` to a number')
    low, high = int(target.min()), int(target.max())
    if logits.shape[-1] != num_classes or not 0 <= low <= high < num_classes:
        raise AikdError(
            f'AI-KD: the teacher has {logits.shape[-1]} classes, their labels go from {low} to {high}, the '
            f'student has {num_classes} classes: they must agree')


def _finite(logits: torch.Tensor, target: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples with finite logits: a single NaN would make the mean NaN."""
    finite = logits.isfinite().all(-1)
    if finite.all():
        return logits, target
    text = f'AI-KD: {name} has no finite logits for {int((~finite).sum())} of {len(target)} images'
    if not finite.any():
        raise AikdError(f'{text}: a broken checkpoint, or too low a `teacher_dtype`')
    logger.warning(f'{text}, which are left out')
    return logits[finite], target[finite]
