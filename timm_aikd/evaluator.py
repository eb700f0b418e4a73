"""timm's evaluator with calibration metrics; for timm 1.0.31 and later, which have evaluators."""
from typing import Any

import torch
from timm.task.evaluator import ClassificationEvaluator

from .calibration import area_under_risk_coverage, expected_calibration_error
from .loss import top1
from .ranks import gather_rows


class CalibrationEvaluator(ClassificationEvaluator):
    """Adds `ece` (percent) and `aurc` (times 1000) to what timm computes, over the same samples."""

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()  # type: ignore[no-untyped-call]
        self.confidence: list[torch.Tensor] = []
        self.correct: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch: logits [B, C] and class indices [B]."""
        before = self.num_samples
        # it leaves out the padding of distributed samplers
        super().update(output, target)  # type: ignore[no-untyped-call]
        count = self.num_samples - before
        if count:
            confidence, correct = top1(output[:count].detach(), target[:count])
            self.confidence.append(confidence)
            self.correct.append(correct)

    def compute(self, distributed: bool = False) -> Any:
        """The metrics of all samples, over the ranks if `distributed`."""
        metrics = super().compute(distributed=distributed)  # type: ignore[no-untyped-call]
        empty = [torch.empty(0, device=self.device)]
        confidence = torch.cat(self.confidence or empty)
        correct = torch.cat(self.correct or empty).float()
        if distributed:
            confidence, correct = gather_rows(confidence), gather_rows(correct)
        if len(confidence):
            metrics['ece'] = expected_calibration_error(confidence, correct)
            metrics['aurc'] = area_under_risk_coverage(confidence, correct)
        return metrics
