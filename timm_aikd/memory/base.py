"""What a prediction memory can be asked and told."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn


class Memory(nn.Module):
    """Gives back the student's predictions of the previous epoch.

    An epoch is `begin_epoch`, then for each batch `recall` and `record`, then `end_epoch` and `save`. All ranks call
    these together. Everything but `recall` does nothing unless a subclass needs it.
    """

    name = ''  # for the log
    needs_file = False  # whether a resume needs what `save` writes

    def compile(self, **kwargs: Any) -> None:
        """Compile the network in it, if there is one; arguments as those of `torch.compile`."""

    def begin_epoch(self, epoch: int, student: nn.Module, loader: Any = None) -> None:
        """Call before the first batch of an epoch, from 0, with the unwrapped student and the epoch's batches."""

    def recall(self, input: torch.Tensor, index: np.ndarray | None) -> tuple[torch.Tensor, np.ndarray | None]:
        """Predictions of the previous epoch for a batch.

        Args:
            input: The batch [B, ...] as the student sees it.
            index: Dataset indices [B] on the CPU; None: those of the loader's batch in use.

        Returns:
            Log q [B, C], up to a constant a sample, and a mask [B] on the CPU of the samples that have one; None: all.
        """
        raise NotImplementedError

    def record(self, index: np.ndarray | None, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Keep the student's logits [B, C] for a batch with targets [B]; `index` as for `recall`."""

    def end_epoch(self) -> None:
        """Call after the last batch."""

    def save(self, folder: Path | str | None) -> None:
        """Write what does not fit in a checkpoint beside the checkpoints in `folder`; None: nowhere."""

    def get_state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of it; None: nothing."""
        return None

    def load_state(self, state: dict[str, Any] | None, folders: Sequence[Path]) -> None:
        """Continue from `get_state`; `folders` are searched first for what `save` wrote."""

    def describe(self) -> str:
        """Its name and cost in words, for the log."""
        return self.name
