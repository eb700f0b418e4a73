"""The method: the terms that are on, joined into one regularised loss."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy

from .config import AikdConfig
from .discriminator import Discriminator
from .epoch import EpochSums
from .errors import AikdError
from .features import FEATURE_OPTIONS
from .memory import Memory
from .ranks import is_distributed, logger
from .state import SavedState
from .step import Step, Term
from .teacher import Teacher
from .teaching import Batches, teaching_of
from .terms import Adversarial, Criterion, Progressive, distances, soft_loss_of


class Aikd(nn.Module):
    """AI-KD's regularisation of a task loss; it does not depend on how the student is trained.

    Between `begin_epoch` and `end_epoch`, call the module once a batch. A term of weight 0 does no work: with all
    weights at 0 the loss is the task loss itself. No step waits for the device.

    Args:
        num_classes: Number of classes C, at least 2.
        teacher: A `Teacher`, or any module that maps the student's input to logits [B, C]; frozen here. May be None
            where no term needs one.
        config: The options.
        epochs: Scheduled epochs T, over which the progressive term's weight grows.
        binary: The criterion is a BCE: predictions are C independent probabilities.
        sum_classes: That BCE sums over the classes rather than averaging.
        criterion: The task loss, mean over the batch, for samples that a store memory has no prediction of; by default
            plain cross-entropy or BCE.
        device: Where the student runs.
        num_features: Number of features F before the student's classifier, where a term needs them.

    Raises:
        AikdError: Fewer than two classes, no epochs, or no teacher where one is needed.
        ValueError: The discriminator's optimizer cannot be used.
    """

    def __init__(
            self,
            num_classes: int,
            teacher: nn.Module | None = None,
            config: AikdConfig | None = None,
            epochs: int = 1,
            binary: bool = False,
            sum_classes: bool = False,
            criterion: Criterion | None = None,
            device: torch.device | None = None,
            num_features: int | None = None,
    ):
        super().__init__()
        self.config = config = config or AikdConfig()
        _check(num_classes, epochs, teacher, config, num_features)
        self.num_classes, self.epochs = num_classes, epochs
        soft_loss = soft_loss_of(binary, sum_classes)
        seen = num_features if config.uses_features else None
        width = num_classes if config.disc_input != 'features' or seen is None else seen
        self.progressive = Progressive(
            config, soft_loss, criterion or _default_criterion(binary, sum_classes)) if config.alpha > 0 else None
        self.teaching = teaching_of(teacher, config, seen, num_classes, binary, device)
        self.adversarial = Adversarial(config, width, binary, device) if config.has_adversary else None
        terms = self.progressive, self.teaching, *distances(config, soft_loss), self.adversarial
        self.terms: list[Term] = [term for term in terms if term is not None]
        self.epoch = 0
        self.steps = 0  # taken by this object, in any epoch
        self.sums = EpochSums(device)

    @property
    def teacher(self) -> Teacher | None:
        """None where no term needs one."""
        return self.teaching.teacher if self.teaching is not None else None

    @property
    def discriminator(self) -> Discriminator | None:
        """None where the adversarial term is off."""
        return self.adversarial.discriminator if self.adversarial is not None else None

    @property
    def memory(self) -> Memory | None:
        """The progressive term's; None where that is off."""
        return self.progressive.memory if self.progressive is not None else None

    @property
    def needs_temperature(self) -> bool:
        """Whether T_c is still to be fitted."""
        return self.teaching is not None and self.teaching.needs_temperature

    def compile(self, **kwargs: Any) -> None:
        """Compile the networks that only run forward; arguments as those of `torch.compile`."""
        # with features the teacher stays eager: dynamo may run the graph of a student without the teacher's hook
        if self.teacher is not None and not self.config.uses_features:
            self.teacher.compile(**kwargs)
        if self.progressive is not None:
            self.progressive.compile_memory(**kwargs)

    def broadcast(self) -> None:
        """Give every rank the discriminator of rank 0."""
        if self.discriminator is not None and is_distributed():
            self.discriminator.broadcast()

    def fit_teacher_temperature(self, batches: Batches, training: Batches | None = None) -> dict[str, float]:
        """Fit T_c to labelled validation images, on every rank its share; see `ClassTeaching.calibrate`."""
        if self.teaching is None:
            raise AikdError('AI-KD: no teacher to calibrate: no term needs one')
        return self.teaching.calibrate(batches, training)

    def use_memory(self, memory: Memory) -> None:
        """Take this memory; on all ranks, before the first epoch. It gets the predictions of a loaded state."""
        if self.progressive is not None:
            self.progressive.use_memory(memory)

    def begin_epoch(self, epoch: int, student: nn.Module, loader: Any = None, epochs: int | None = None) -> None:
        """Set the epoch's weights; a snapshot copies the student, which is as the previous epoch left it.

        Args:
            epoch: From 0.
            student: The module in training, without DDP, compile or EMA around it.
            loader: The epoch's batches, for a store memory to follow.
            epochs: Scheduled epochs T, where they are better known now.

        Raises:
            AikdError: The memory was to be a store, and `use_memory` was not called.
        """
        self.epoch = epoch
        self.epochs = epochs or self.epochs
        self.sums.reset()
        for term in self.terms:
            term.begin_epoch(epoch, self.epochs, student, loader)

    def forward(
            self,
            input: torch.Tensor,
            logits: torch.Tensor,
            target: torch.Tensor,
            task_loss: torch.Tensor,
            index: np.ndarray | None = None,
            features: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Regularise the task loss of one batch.

        Args:
            input: The batch as the student saw it [B, ...].
            logits: The student's output [B, C].
            target: Hard [B] or soft [B, C] targets.
            task_loss: The script's criterion on `logits` and `target`.
            index: Dataset indices [B] of the samples, for a store memory that follows no loader.
            features: Features [B, F] before the student's classifier, where a term needs them.

        Returns:
            `loss`, and detached and unweighted `NAME_loss` of task, progressive, kd, features, adv and disc.

        Raises:
            AikdError: The teacher's logits are not shaped as the student's, or its top-1 is no better than chance; a
                store memory cannot tell the samples; or features are needed and not given.
        """
        step = Step(input, logits, target, index, features, loss=task_loss, means={'task': task_loss})
        for term in self.terms:
            term(step)
        self.steps += 1
        self.sums.add(step)
        return step.result()

    def end_epoch(self) -> dict[str, float]:
        """Metrics of the epoch, averaged over its samples and over the ranks; only here the device is waited for.

        Returns:
            Means of the terms, unweighted: `task`, `progressive`, `kd`, `features`, `adv`, `disc`; the weight `alpha`;
            `disc_accuracy`, how often D told the two outputs for a sample apart (0.5 is chance); `disc_skipped`,
            steps that D skipped; `teacher_top1` on the training batches, in percent.

        Raises:
            AikdError: A store memory finds that the indices do not identify samples.
        """
        of_terms = {name: value for term in self.terms for name, value in term.end_epoch().items()}
        sums = self.sums.metrics(self.epoch)
        skipped = sums.pop('disc_skipped')
        return {**sums, 'alpha': 0., **of_terms, 'disc_skipped': skipped}

    def save_memory(self, folder: Path | str | None) -> None:
        """Write the memory beside the checkpoints, for `get_state` to name it; after `end_epoch`, on all ranks.

        Args:
            folder: Of the checkpoints; the primary rank's counts.
        """
        if self.memory is not None:
            self.memory.save(folder)

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as `SavedState` has it; no weights of the teacher or of the memory."""
        state = SavedState(self.config.to_dict(), self.epoch)
        for term in self.terms:
            term.save(state)
        return state.to_dict()

    def load_state(self, state: dict[str, Any], folders: Sequence[Path] = ()) -> None:
        """Continue from `get_state`; options that changed since are reported, and the new ones hold.

        Args:
            state: What `get_state` returned.
            folders: Where to look for the memory's file, before the folder that it was written to.

        Raises:
            AikdError: The state is damaged, not ours or of a newer version, or the teacher's weights are others. This
                object is as it was before.
        """
        saved = SavedState.from_dict(state)
        now, then = self.config.to_dict(), {**AikdConfig().to_dict(), **saved.config}  # older ones have fewer options
        changed = {name for name in now.keys() | then.keys() if now.get(name) != then.get(name)}
        for name in sorted(changed):
            logger.warning(f'AI-KD: aikd_{name} was {then.get(name)!r:.80} in the checkpoint, is {now.get(name)!r} now')
        for term in self.terms:
            term.check(saved, changed)
        for term in reversed(self.terms):  # the discriminator, whose loading may fail, comes first
            term.load(saved, changed, list(folders))


def _check(
        num_classes: int,
        epochs: int,
        teacher: nn.Module | None,
        config: AikdConfig,
        num_features: int | None,
) -> None:
    if num_classes < 2:
        raise AikdError(f'AI-KD needs at least 2 classes, the student has {num_classes}')
    if epochs < 1:
        raise AikdError(f'AI-KD needs at least 1 scheduled epoch, not {epochs}')
    if config.has_teacher and teacher is None:
        raise AikdError('AI-KD needs a teacher: give one, or set all weights but `alpha` to 0')
    if config.uses_features and num_features is None:
        raise AikdError(f'{FEATURE_OPTIONS}: needs `num_features` of the student')


def _default_criterion(binary: bool, sum_classes: bool) -> Criterion:
    return BinaryCrossEntropy(smoothing=0., sum_classes=sum_classes) if binary else nn.CrossEntropyLoss()
