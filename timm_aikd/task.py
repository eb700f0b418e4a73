"""AI-KD as a training task of timm."""
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from .config import AikdConfig
from .run import AikdRun
from .teaching import Batches
from .terms import Criterion


class AikdTask(ClassificationTask):
    """A `ClassificationTask` whose loss is regularised by AI-KD.

    Everything of AI-KD lies outside the trainable module: in no optimizer, EMA, DDP wrapper, clipping or
    `state_dict` of the student.

    Args:
        model: The student; its `num_classes` tells the number of classes.
        criterion: The task loss. A BCE (timm's or torch's) makes the soft terms binary divergences too.
        teacher: What `load_teacher` returns, or any module that maps the student's input to logits [B, C].
        config: The options.
        epochs: Scheduled epochs T.
        class_names: The classes' names, in the order of the outputs, for those who use the checkpoints.
        resume_folder: Folder of the checkpoint that the task will be resumed from.
        **kwargs: Passed to `ClassificationTask`: device, dtype, verbose, ...

    Raises:
        AikdError: The model does not tell its classes, or AI-KD cannot work on them.

    Example:
        ```python
        task = AikdTask(model, criterion, teacher=load_teacher('hf-hub:...', student=model), epochs=90)
        for epoch in range(90):
            task.begin_epoch(epoch, loader)
            for input, target in loader:
                task(input, target)['loss'].backward()
                optimizer.step()
                optimizer.zero_grad()
            metrics = task.end_epoch()
        ```
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Criterion | None = None,
            *args: Any,
            teacher: nn.Module | None = None,
            config: AikdConfig | None = None,
            epochs: int = 1,
            class_names: list[str] | None = None,
            resume_folder: Path | None = None,
            **kwargs: Any,
    ):
        super().__init__(model, criterion, *args, **kwargs)
        self.run = AikdRun(
            unwrap_model(model), self.criterion, teacher, config, epochs, class_names, resume_folder)
        self.aikd = self.run.aikd

    def forward(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            index: np.ndarray | torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One training step's forward; D takes its own step in it.

        Args:
            input: Input [B, ...].
            target: Targets [B] or [B, C].
            index: Dataset indices [B] of the samples on the CPU, for a store memory that has no loader to watch.

        Returns:
            `loss` to descend, `output` (logits [B, C]), and the detached parts `task_loss`, `progressive_loss`,
            `kd_loss`, `features_loss`, `adv_loss`, `disc_loss`.
        """
        output = self.trainable_module(input)
        return {'output': output, **self.run.loss(input, output, target, index)}

    def calibrate(self, batches: Batches, training: Batches | None = None) -> dict[str, float]:
        """Fit T_c on labelled validation batches; see `AikdRun.calibrate`."""
        return self.run.calibrate(batches, training)

    def begin_epoch(
            self,
            epoch: int,
            loader: Any = None,
            checkpoint_folder: Path | str | None = None,
            epochs: int | None = None,
    ) -> None:
        """Call before the first batch of an epoch; see `AikdRun.begin_epoch`."""
        self.run.begin_epoch(epoch, loader, checkpoint_folder, epochs)

    def end_epoch(self) -> dict[str, float]:
        """Call after the last batch of an epoch; metrics as `Aikd.end_epoch` returns them."""
        return self.run.end_epoch()

    def prepare_distributed(
            self,
            device_ids: list[int | torch.device] | None = None,
            **ddp_kwargs: Any,
    ) -> 'AikdTask':
        """Wrap the student in DDP and give all ranks one discriminator."""
        if self.device.type == 'cpu':
            device_ids = None  # timm's script names the CPU, which DDP refuses
        super().prepare_distributed(device_ids=device_ids, **ddp_kwargs)
        self.aikd.broadcast()
        return self

    def create_evaluator(self, **kwargs: Any) -> Any:
        """timm's evaluator of this task, which also computes ECE and AURC; for timm 1.0.31 and later."""
        from .evaluator import CalibrationEvaluator  # older timm has no evaluators

        return CalibrationEvaluator(device=self.device, **kwargs)

    def compile(  # type: ignore[override]  # as timm's, which answers otherwise than torch's
            self,
            backend: str = 'inductor',
            mode: str | None = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile student, teacher and snapshot; losses and discriminator stay eager."""
        self.aikd.compile(backend=backend, mode=mode, **compile_kwargs)
        return super().compile(backend=backend, mode=mode, **compile_kwargs)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """AI-KD's state, once a checkpoint: EMA has none of its own."""
        return {} if ema else self.run.get_state()

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Continue from a checkpoint; from one without AI-KD everything starts fresh, and the log says so."""
        if not ema:
            self.run.load_state(state)
