"""Prediction memory: what the student said of the same samples in the previous epoch."""
import copy

import torch
import torch.nn as nn


class SnapshotMemory(nn.Module):
    """A frozen copy of the student as it was at the end of the previous epoch, run in eval mode on the same input.

    Exact under any augmentation, mixup, iterable data and input size, for the price of one forward a step and one
    copy of the weights. The copy is made once and overwritten in place each epoch, so that a compiled graph stays
    valid. It needs no place in a checkpoint: where an epoch begins, it *is* the student.
    """

    def __init__(self):
        super().__init__()
        self.model: nn.Module | None = None
        self._compile_kwargs: dict | None = None

    def train(self, mode: bool = True) -> 'SnapshotMemory':
        """Stay in eval mode."""
        return super().train(False)

    def compile(self, **kwargs) -> None:
        """Compile the copy, now or when it is made."""
        self._compile_kwargs = kwargs
        if self.model is not None:
            self.model.compile(**kwargs)

    @torch.no_grad()
    def remember(self, student: nn.Module) -> None:
        """Take over the weights and buffers of the (unwrapped) student."""
        if self.model is not None:
            self.model.load_state_dict(student.state_dict())
            return
        self.model = copy.deepcopy(student).requires_grad_(False).eval()
        if hasattr(self.model, 'set_grad_checkpointing'):
            self.model.set_grad_checkpointing(False)  # nothing is kept for a backward, so nothing is recomputed
        if self._compile_kwargs is not None:
            self.model.compile(**self._compile_kwargs)

    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of the previous epoch's student: log q up to a constant a sample, which a softmax ignores."""
        assert self.model is not None
        return self.model(input)
