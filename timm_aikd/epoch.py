"""What an epoch adds up, and its warnings."""
import torch
import torch.nn as nn

from .ranks import logger, sum_over_ranks, world_size
from .step import PARTS, Step

_MEANS = (*PARTS, 'disc_accuracy', 'teacher_top1')  # reported as means over the epoch's samples
_COUNTS = ('lost', 'skipped', 'unanswered')  # batches with a non-finite loss, steps without D's, samples without z_T
_NAMES = (*_MEANS, *_COUNTS, 'samples')


class EpochSums(nn.Module):
    """Sums over an epoch's steps, kept on the device; nothing waits for it before `metrics`.

    Args:
        device: Where the student runs.
    """

    sums: torch.Tensor

    def __init__(self, device: torch.device | None = None):
        super().__init__()
        self.register_buffer('sums', torch.zeros(len(_NAMES), device=device), persistent=False)

    def reset(self) -> None:
        """Start an epoch."""
        self.sums.zero_()

    @torch.no_grad()
    def add(self, step: Step) -> None:
        """Add one step."""
        samples, zero = len(step.logits), torch.zeros((), device=self.sums.device)
        counts = {'lost': ~step.loss.isfinite(), **step.counts}
        self.sums += torch.cat([
            samples * torch.stack([step.means.get(name, zero).float() for name in _MEANS]),
            torch.stack([counts.get(name, zero).sum().float() for name in _COUNTS]),
            (zero + samples)[None]])

    def metrics(self, epoch: int) -> dict[str, float]:
        """The epoch's metrics over all ranks, after its warnings are logged; waits for the device."""
        totals = dict(zip(_NAMES, sum_over_ranks(self.sums).tolist(), strict=True))
        totals['skipped'] /= world_size()  # the ranks skip together
        _warn(epoch, totals)
        metrics = {name: totals[name] / max(totals['samples'], 1) for name in _MEANS}
        metrics['teacher_top1'] *= 100
        return {**metrics, 'disc_skipped': totals['skipped']}


def _warn(epoch: int, totals: dict[str, float]) -> None:
    lost, skipped, unanswered, samples = (int(totals[name]) for name in ('lost', 'skipped', 'unanswered', 'samples'))
    if lost:
        logger.warning(
            f'AI-KD: epoch {epoch}: the loss of {lost} batches was not finite. Unless a gradient scaler skipped them, '
            f'the student is lost: resume from an earlier checkpoint, with a lower --lr or with --clip-grad')
    elif unanswered:
        logger.warning(
            f'AI-KD: epoch {epoch}: the teacher had no finite answer for {unanswered} of {samples} samples, which had '
            f'no kd or feature term; D skipped {skipped} steps; if it overflows, set `teacher_dtype` to float32')
    elif skipped:
        logger.warning(f'AI-KD: epoch {epoch}: D skipped {skipped} steps whose gradients were not finite')
