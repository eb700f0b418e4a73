"""The teacher as it runs: frozen, fed as it was trained, answering with calibrated logits of the student's classes."""
import hashlib
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..features import FeatureTap


class Teacher(nn.Module):
    """A frozen model in eval mode that maps the student's input to calibrated logits.

    Args:
        model: The pre-trained model; frozen here, its buffers never change.
        name: What to call it in messages.
        scale: Together with `shift` turns the student's normalised input into the model's, `x * scale + shift`,
            [1, channels, 1, 1]; None where both are normalised alike.
        shift: See `scale`.
        columns: For each of the student's classes, the model's class [C]; None where they are the same.
        size: (height, width) the batch is resized to; None takes it as it comes.
        dtype: Run in this dtype, outside autocast; None runs as the student does.
        temperature: T_c, a number > 0: logits are divided by it; above 1 the teacher becomes less sure.
        given: The spec as the user gave it, where `name` is more exact.
        stored_top1: Top-1 on its validation images that its checkpoint tells, percent.
        digest: What `weights_digest` says of the model; None: it is asked now.
    """

    scale: torch.Tensor | None
    shift: torch.Tensor | None
    columns: torch.Tensor | None

    def __init__(
            self,
            model: nn.Module,
            name: str = 'teacher',
            scale: torch.Tensor | None = None,
            shift: torch.Tensor | None = None,
            columns: torch.Tensor | None = None,
            size: tuple[int, int] | None = None,
            dtype: torch.dtype | None = None,
            temperature: float = 1.,
            given: str | None = None,
            digest: str | None = None,
            stored_top1: float | None = None,
    ):
        super().__init__()
        self._digest = digest or weights_digest(model)
        self.model = model.requires_grad_(False)
        if dtype is not None:
            self.model.to(dtype)
        self.name, self.size, self.dtype, self.temperature = name, size, dtype, temperature
        self._given = given
        self.stored_top1 = stored_top1
        self._tap: FeatureTap | None = None
        self.register_buffer('scale', scale, persistent=False)
        self.register_buffer('shift', shift, persistent=False)
        self.register_buffer('columns', columns, persistent=False)
        self.eval()

    @property
    def specs(self) -> tuple[str, ...]:
        """The exact specs of the models in it."""
        return (self.name,)

    @property
    def given(self) -> str | list[str] | None:
        """The spec as the user gave it, where the name is more exact."""
        return self._given

    @property
    def digest(self) -> str:
        """Changes with the weights; the same on all machines."""
        return self._digest

    def use_sigmoid(self, binary: bool) -> None:
        """Whether a prediction is C independent probabilities (BCE); logits of one model are the same either way."""

    def watch_features(self) -> int:
        """Keep the features before the classifier at each forward, for `take_features`; their number F.

        Raises:
            AikdError: The model has no classifier to take them before.
        """
        self._tap = FeatureTap(self.model, self.name if self.name == 'teacher' else f'teacher {self.name}')
        return self._tap.width

    def take_features(self) -> torch.Tensor:
        """The features [B, F] of the last forward."""
        assert self._tap is not None
        return self._tap.take()

    def features(self, input: torch.Tensor) -> torch.Tensor:
        """The features [B, F] for the student's input; of several teachers only the first one runs."""
        self(input)
        return self.take_features()

    def set_temperature(self, temperature: float) -> None:
        """Divide the logits by another T_c, a number > 0, from now on."""
        self.temperature = temperature

    def train(self, mode: bool = True) -> 'Teacher':
        """Stay in eval mode."""
        return super().train(False)

    def compile(self, **kwargs: Any) -> None:
        """Compile the model, not this wrapper."""
        self.model.compile(**kwargs)

    @torch.no_grad()  # inference_mode tensors could not be saved for the student's backward
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] / T_c in float32, in the student's class order, for the student's input."""
        scale, shift = self.scale, self.shift
        if scale is not None and shift is not None:
            input = (input * scale + shift).to(input.dtype)
        if self.size is not None and tuple(input.shape[-2:]) != self.size:
            input = F.interpolate(input.float(), self.size, mode='bicubic', antialias=True).to(input.dtype)
        if self.dtype is not None:
            input = input.to(self.dtype)
        with torch.autocast(input.device.type, enabled=False) if self.dtype is not None else nullcontext():
            output = self.model(input)
        logits: torch.Tensor = (output[0] if isinstance(output, (tuple, list)) else output).float()
        if self.columns is not None:
            logits = logits.index_select(-1, self.columns)
        return logits / self.temperature if self.temperature != 1. else logits


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and a sample of each tensor: cheap, and another for other weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f'{name} {tuple(tensor.shape)}'.encode())
        values = tensor.detach().flatten()
        digest.update(values[::max(1, len(values) // 64)].cpu().double().numpy().tobytes())
    return digest.hexdigest()
