"""The snapshot memory: last epoch's student itself."""
import copy
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from ..inference import Pairs, folded, forward_layout, load_folded_
from .base import Memory


class SnapshotMemory(Memory):
    """A frozen copy of the student as it was at the end of the previous epoch, run in eval mode on the same input.

    It is exact under any augmentation, mixup, iterable data and input size. It costs one forward a step and one copy of
    the weights. The copy is made once and overwritten in place each epoch, so that a compiled graph stays valid. A
    checkpoint needs nothing of it: where an epoch begins, the copy equals the student.
    """

    name = 'snapshot'

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None
        self._folded: Pairs = []
        self._compile_kwargs: dict[str, Any] | None = None

    def train(self, mode: bool = True) -> 'SnapshotMemory':
        """Stay in eval mode."""
        return super().train(False)

    def compile(self, **kwargs: Any) -> None:
        self._compile_kwargs = kwargs
        if self.model is not None:
            self.model.compile(**kwargs)

    def begin_epoch(self, epoch: int, student: nn.Module, loader: Any = None) -> None:
        if epoch > 0:  # in epoch 0 the student has learned nothing yet
            self.remember(student)

    @torch.no_grad()
    def remember(self, student: nn.Module) -> None:
        """Copy the weights and buffers of the student."""
        if self.model is not None:
            load_folded_(self.model, self._folded, student)
            return
        model = copy.deepcopy(student).requires_grad_(False).eval()
        set_grad_checkpointing = getattr(model, 'set_grad_checkpointing', None)
        if set_grad_checkpointing is not None:
            set_grad_checkpointing(False)  # there is no backward to recompute activations for
        model, self._folded = folded(model)
        self.model = model.to(memory_format=forward_layout(student))
        if self._compile_kwargs is not None:
            self.model.compile(**self._compile_kwargs)

    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of the previous epoch's student."""
        assert self.model is not None
        logits: torch.Tensor = self.model(input)
        return logits

    def recall(self, input: torch.Tensor, index: np.ndarray | None) -> tuple[torch.Tensor, None]:
        return self(input), None

    def describe(self) -> str:
        return 'snapshot, which costs a forward a step'
