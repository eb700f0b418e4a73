"""AI-KD in a training run: what happens around the steps, in a task of timm or in a script without tasks."""
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy

from . import __version__
from .aikd import Aikd
from .config import AikdConfig
from .features import FeatureTap
from .memory import choose_memory
from .ranks import logger
from .state import KEY
from .teacher.classes import class_count
from .teacher.verdict import verdict
from .teaching import Batches
from .terms import Criterion


class AikdRun:
    """Joins the criterion with AI-KD, chooses the memory, carries the state and writes the log.

    Args:
        student: The model, without DDP, compile or EMA around it; its `num_classes` tells the number of classes.
        criterion: The task loss. A BCE (timm's or torch's) makes the soft terms binary divergences too.
        teacher: What `load_teacher` returns, or any module that maps the student's input to logits [B, C].
        config: The options.
        epochs: Scheduled epochs T.
        class_names: The classes' names, in the order of the outputs, for those who use the checkpoints.
        resume_folder: Folder of the checkpoint that `load_state` will be given.

    Raises:
        AikdError: The student does not tell its classes, or AI-KD cannot work on them.
    """

    def __init__(
            self,
            student: nn.Module,
            criterion: Criterion,
            teacher: nn.Module | None = None,
            config: AikdConfig | None = None,
            epochs: int = 1,
            class_names: list[str] | None = None,
            resume_folder: Path | None = None,
    ):
        self.student, self.criterion = student, criterion
        self.class_names, self._resume_folder = class_names, resume_folder
        self.device = next(student.parameters()).device
        self.binary = isinstance(criterion, (BinaryCrossEntropy, nn.BCEWithLogitsLoss))
        config = config or AikdConfig()
        self._tap = FeatureTap(student, 'the student') if config.uses_features else None
        self.aikd = Aikd(
            class_count(student), teacher, config, epochs, self.binary, getattr(criterion, 'sum_classes', False),
            criterion, self.device, self._tap.width if self._tap is not None else None)
        self._checkpoint_folder: Path | str | None = None
        self._memory_is_chosen = self._is_started = False

    def loss(
            self,
            input: torch.Tensor,
            output: torch.Tensor,
            target: torch.Tensor,
            index: np.ndarray | torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The regularised loss of a batch and its parts, as `Aikd.forward` returns them.

        Args:
            input: Input [B, ...].
            output: The student's logits [B, C].
            target: Targets [B] or [B, C].
            index: Dataset indices [B] of the samples on the CPU, for a store memory that follows no loader.
        """
        features = self._tap.take() if self._tap is not None else None
        task_loss = self.criterion(output, target)
        result: dict[str, torch.Tensor] = self.aikd(
            input, output, target, task_loss, None if index is None else np.asarray(index), features)
        return result

    def choose_memory(self, loader: Any, why_not: str | None = None) -> None:
        """Decide where the previous epoch's predictions come from, once; `begin_epoch` does it by itself.

        Args:
            loader: The training batches.
            why_not: Why the samples of a batch cannot be known, if that is so.

        Raises:
            AikdError: The memory is to be a store, and cannot be.
        """
        if self._memory_is_chosen or self.aikd.progressive is None:
            return
        self._memory_is_chosen = True
        if not self.aikd.progressive.has_chosen:
            self.aikd.use_memory(choose_memory(
                self.aikd.config, loader, self.aikd.num_classes, self.binary, self.device, why_not))

    def calibrate(self, batches: Batches, training: Batches | None = None) -> dict[str, float]:
        """Fit T_c on labelled validation batches, for `teacher_temperature='auto'`, and log whether AI-KD pays.

        Args:
            batches: Input and labels each.
            training: The same of training images without augmentation; without them nothing is said of a gain.

        Returns:
            What `ClassTeaching.calibrate` returns.

        Raises:
            AikdError: There is no teacher, the images do not fit it, or it is no better than chance.
        """
        fit = self.aikd.fit_teacher_temperature(batches, training)
        logger.info(
            f'AI-KD: teacher top-1 {fit["top1"]:.2f} % on {fit["samples"]} validation images; T_c fitted to them: '
            f'{fit["temperature"]:.3f}')
        if training is not None:
            logger.info(f'AI-KD: does it pay? {verdict(fit)}')
        else:
            logger.info('AI-KD: does it pay? Not measured: there are no training images without augmentation')
        if self.aikd.teaching is not None:
            for warning in self.aikd.teaching.warnings(self.class_names):
                logger.warning(f'AI-KD: teacher {self.aikd.teaching.teacher.name}: {warning}')
        return fit

    def begin_epoch(
            self,
            epoch: int,
            loader: Any = None,
            checkpoint_folder: Path | str | None = None,
            epochs: int | None = None,
    ) -> None:
        """Call before the first batch of an epoch.

        Args:
            epoch: From 0.
            loader: The epoch's batches, for a store memory to know which samples they hold: in every epoch the same
                ones at the same positions of its data set. Without a loader `auto` takes a snapshot.
            checkpoint_folder: Where the primary rank saves a store memory at the end of the epoch; without it a
                resume begins with an empty one.
            epochs: Scheduled epochs T, where they are better known now.

        Raises:
            AikdError: The memory is to be a store, and cannot be.
        """
        self._checkpoint_folder = checkpoint_folder
        if not self._is_started:
            self._is_started = True
            self.choose_memory(loader)
            self._announce(epochs or self.aikd.epochs)
        self.aikd.begin_epoch(epoch, self.student, loader, epochs)

    def end_epoch(self) -> dict[str, float]:
        """Call after the last batch of an epoch; metrics as `Aikd.end_epoch` returns them."""
        metrics = self.aikd.end_epoch()
        self.aikd.save_memory(self._checkpoint_folder)
        silent = {'disc_skipped'} if self.aikd.config.uses_classes else {'disc_skipped', 'teacher_top1'}
        shown = {name: value for name, value in metrics.items() if value or name not in silent}
        text = ', '.join(f'{name} {value:.4g}' for name, value in shown.items())
        logger.info(f'AI-KD: epoch {self.aikd.epoch}: {text}')
        return metrics

    def _announce(self, epochs: int) -> None:
        aikd = self.aikd
        if aikd.teaching is not None and aikd.needs_temperature:
            aikd.teaching.leave_uncalibrated()
            logger.warning('AI-KD: no validation images to fit T_c on: T_c = 1, the teacher stays as it is')
        if aikd.progressive is not None:
            self._warn_of_memory(aikd.progressive.memory.needs_file, epochs)
        terms = [text for term in aikd.terms if (text := term.describe())]
        teacher = aikd.teaching.introduce() if aikd.teaching is not None else 'none'
        # the path, since a train.py inside a clone of timm imports the clone's timm, not the installed one
        logger.info(
            f'AI-KD: teacher {teacher}; terms: {", ".join(terms) or "none, this is plain training"}; '
            f'timm-aikd {__version__} on timm {timm.__version__} of {Path(timm.__file__).parent}')

    def _warn_of_memory(self, needs_file: bool, epochs: int) -> None:
        if epochs == 1:
            logger.warning('AI-KD: a run of one epoch has no previous epoch: the progressive term does nothing')
        elif needs_file and self._checkpoint_folder is None:
            logger.warning(
                'AI-KD: no `checkpoint_folder` was given: the prediction memory is not saved, and after a resume '
                'the progressive term would pause for one epoch')

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain containers, under a key of its own."""
        names = {'class_names': self.class_names} if self.class_names is not None else {}
        return {KEY: {**self.aikd.get_state(), **names}}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from a checkpoint; from one without AI-KD everything starts fresh, and the log says so."""
        if not isinstance(state, dict) or KEY not in state:
            logger.warning('AI-KD: the checkpoint is of a run without AI-KD: D, T_c and the memory start fresh')
            return
        self.aikd.load_state(state[KEY], [self._resume_folder] if self._resume_folder else [])
