"""AI-KD in a training run: what happens around the steps, whoever takes them."""
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy

from . import AikdError, __version__
from .aikd import Aikd, Criterion
from .classes import class_count
from .config import AikdConfig
from .indices import BatchIndices, obstacle
from .memory import StoreMemory
from .records import RecordFormat
from .table import size_text

_logger = logging.getLogger(__name__)


class AikdRun:
    """Chooses the memory, knows which samples a batch holds, keeps the state and says what goes on.

    A task of timm holds one, and so does the seam of a script without tasks.

    Args:
        student: The model, without DDP, compile or EMA around it; its `num_classes` tells the number of classes.
        criterion: The task loss. A BCE (timm's or torch's) makes the soft terms binary cross-entropies too.
        teacher: What `load_teacher` returns, or any module that maps the student's input to logits [B, C].
        config: The options.
        epochs: Scheduled epochs T.
        verbose: Whether this rank writes the log.

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
            verbose: bool = True,
    ):
        self.student, self.criterion, self.verbose = student, criterion, verbose
        self.aikd = Aikd(
            class_count(student), teacher, config, epochs,
            binary=isinstance(criterion, (BinaryCrossEntropy, nn.BCEWithLogitsLoss)),
            sum_classes=getattr(criterion, 'sum_classes', False),
            criterion=criterion,
            device=next(student.parameters()).device)
        self.class_names: list[str] | None = None  # by output, for those who use the checkpoints
        self.resume_folder: Path | None = None  # of the checkpoint that `load_state` is about to see
        self._indices: BatchIndices | None = None
        self._checkpoint_folder: Path | str | None = None
        self._memory_chosen = self._started = False

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
            index: Dataset indices [B] of the samples on the CPU, for a store memory that has no loader to watch.
        """
        task_loss = self.criterion(output, target)
        if index is not None:
            index = np.asarray(index)
        elif self._indices is not None:
            index = self._indices.of_batch(len(output))
        result: dict[str, torch.Tensor] = self.aikd(input, output, target, task_loss, index)
        return result

    def choose_memory(self, loader: Any, reason: str | None = None) -> None:
        """Settle where the previous epoch's predictions come from, once; `begin_epoch` does it by itself.

        Args:
            loader: The training batches.
            reason: Why the samples of a batch cannot be known, if that is so.

        Raises:
            AikdError: The memory is to be a store, and cannot be.
        """
        aikd, config = self.aikd, self.aikd.config
        if self._memory_chosen or aikd.memory is None or isinstance(aikd.memory, StoreMemory):
            return
        self._memory_chosen = True
        records = RecordFormat(
            aikd.num_classes, config.memory_topk if isinstance(config.memory_topk, int) else None, aikd.binary)
        if config.memory == 'snapshot':
            return
        reason = reason or obstacle(loader)
        if reason is None:
            try:
                memory = StoreMemory(records, len(loader.dataset), config.memory_dir)
            except AikdError as error:
                reason = str(error)
        if reason is None:
            self._indices = BatchIndices(loader)
            aikd.use_memory(memory)
        elif config.memory == 'store':
            raise AikdError(f'--aikd-memory store: {reason}; use --aikd-memory snapshot')
        if self.verbose:
            _logger.info(
                f'AI-KD: memory snapshot, which costs a forward a step; not store, because {reason}' if reason else
                f'AI-KD: memory store, {memory.table.samples:,} samples with {records.describe()}, '
                f'{size_text(memory.table.bytes)} a host in {memory.table.folder}')

    def calibrate(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Fit T_c on labelled validation batches, (input, target) each; for `teacher_temperature='auto'`."""
        fit = self.aikd.fit_teacher_temperature(batches)
        if self.verbose:
            _logger.info(
                f'AI-KD: teacher top-1 {fit["top1"]:.2f} % on {fit["samples"]} validation images, '
                f'T_c = {fit["temperature"]:.3f} fits them best')

    def begin_epoch(self, epoch: int, loader: Any = None, checkpoint_folder: Path | str | None = None) -> None:
        """Call before the first batch of an epoch.

        Args:
            epoch: From 0.
            loader: The epoch's batches, for a store memory to know which samples they hold: in every epoch the same
                ones at the same positions of its data set. Without a loader `auto` takes a snapshot.
            checkpoint_folder: Where the primary rank saves a store memory at the end of the epoch; without it a
                resume begins with an empty one.

        Raises:
            AikdError: The memory is to be a store, and cannot be.
        """
        self._checkpoint_folder = checkpoint_folder
        memory = self.aikd.memory
        if not self._started:
            self.choose_memory(loader)
            self._start()
        elif (isinstance(memory, StoreMemory) and self._indices is not None
                and loader is not None and loader is not self._indices.loader):
            if len(loader.dataset) != memory.table.samples:
                raise AikdError(
                    f'--aikd-memory store: the loader of epoch {epoch} has {len(loader.dataset)} samples, the first '
                    f'had {memory.table.samples}; train on one data set, or use --aikd-memory snapshot')
            self._indices = BatchIndices(loader)
        self.aikd.begin_epoch(epoch, self.student)

    def end_epoch(self) -> dict[str, float]:
        """Call after the last batch of an epoch; metrics as `Aikd.end_epoch` returns them."""
        metrics = self.aikd.end_epoch()
        self.aikd.save_memory(self._checkpoint_folder)
        if self.verbose:
            shown = ', '.join(f'{name} {value:.4g}' for name, value in metrics.items())
            _logger.info(f'AI-KD: epoch {self.aikd.epoch}: {shown}')
        return metrics

    def _start(self) -> None:
        self._started = True
        aikd, config = self.aikd, self.aikd.config
        if aikd.needs_temperature and aikd.teacher is not None:
            aikd.needs_temperature = False
            if self.verbose:
                _logger.warning('AI-KD: no validation images to fit T_c on: T_c = 1, the teacher stays as it is')
        terms = []
        if aikd.memory is not None:
            if aikd.memory.kind == 'store' and self._checkpoint_folder is None and self.verbose:
                _logger.warning(
                    'AI-KD: no folder of checkpoints was given: the prediction memory is not saved, and after a resume '
                    'the progressive term would pause for one epoch')
            terms.append(
                f'progressive (alpha to {config.alpha:g}, tau_p {config.progressive_temperature:g}, '
                f'memory {aikd.memory.kind})')
        if aikd.teacher is not None and config.kd_weight > 0:
            terms.append(f'kd ({config.kd_weight:g}, tau {config.temperature:g})')
        if aikd.discriminator is not None:
            terms.append(f'adversarial ({config.adv_weight:g}, {config.adv_loss} on {config.disc_input})')
        teacher = f'{aikd.teacher.name} at T_c {aikd.teacher.temperature:.3f}' if aikd.teacher is not None else 'none'
        if self.verbose:
            # a train.py inside a clone of timm imports the clone's timm, not the installed one
            _logger.info(
                f'AI-KD: teacher {teacher}; terms: {", ".join(terms) or "none, this is plain training"}; '
                f'timm-aikd {__version__} on timm {timm.__version__} of {Path(timm.__file__).parent}')

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain containers, under a key of its own."""
        names = {'class_names': self.class_names} if self.class_names is not None else {}
        return {'aikd': {**self.aikd.get_state(), **names}}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from a checkpoint; from one without AI-KD everything starts fresh, and the log says so."""
        if not isinstance(state, dict) or 'aikd' not in state:
            _logger.warning('AI-KD: the checkpoint is of a run without AI-KD: D, T_c and a store memory start fresh')
            return
        self.aikd.load_state(state['aikd'], [self.resume_folder] if self.resume_folder else [])
