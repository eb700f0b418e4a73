"""One training step, and the interface of a term: each term adds itself to the step's loss."""
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from .state import SavedState

PARTS = ('task', 'progressive', 'kd', 'features', 'adv', 'disc')


@dataclass
class Step:
    """A batch, the loss so far, and what the terms report.

    Attributes:
        input: The batch as the student saw it [B, ...].
        logits: The student's output [B, C].
        target: Hard [B] or soft [B, C] targets.
        index: Dataset indices [B] of the samples, where the caller knows them.
        features: The student's features [B, F] before its classifier, where a term needs them.
        loss: The task loss plus the terms so far, weighted.
        teacher_logits: z_T [B, C], once the teacher has run.
        answered: Which samples [B] have finite teacher logits, or features where only these are used, once the teacher
            has run.
        teacher_features: The teacher's features [B, F], once it has run, where a term needs them.
        means: Unweighted losses and other values whose mean over the epoch is reported, by name.
        counts: Events counted over the epoch, by name.
    """

    input: torch.Tensor
    logits: torch.Tensor
    target: torch.Tensor
    index: np.ndarray | None
    features: torch.Tensor | None
    loss: torch.Tensor
    teacher_logits: torch.Tensor = field(init=False)
    answered: torch.Tensor = field(init=False)
    teacher_features: torch.Tensor = field(init=False)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)

    def result(self) -> dict[str, torch.Tensor]:
        """`loss` and the detached, unweighted parts; 0 for a term that is off."""
        zero = torch.zeros((), device=self.logits.device)
        # clones: the script divides result['loss'] in place, which may be the task loss itself
        parts = {f'{name}_loss': self.means.get(name, zero).detach().clone() for name in PARTS}
        return {'loss': self.loss, **parts}


class Term(nn.Module):
    """One term. Called with a step, it changes the step's `loss` and reports into `means` and `counts`."""

    def describe(self) -> str:
        """For the log; empty for a term that adds nothing to the loss."""
        return ''

    def begin_epoch(self, epoch: int, epochs: int, student: nn.Module, loader: Any) -> None:
        """Set the epoch's weight."""

    def end_epoch(self) -> dict[str, float]:
        """Metrics of the epoch that are no sums over its steps."""
        return {}

    def save(self, state: SavedState) -> None:
        """Put the term's entries into a state."""

    def check(self, state: SavedState, changed: set[str]) -> None:
        """Refuse a state before anything is loaded. `changed` names the options that differ from the state's."""

    def load(self, state: SavedState, changed: set[str], folders: list[Any]) -> None:
        """Take the term's entries from a state; a term that fails leaves itself as it was.

        Args:
            state: The state of a checkpoint.
            changed: Names of the options that differ from the state's.
            folders: Where files that the state names may lie.
        """
