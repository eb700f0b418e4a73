"""The terms of the loss: each adds itself to a step's loss and reports its part by name."""
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from .config import AikdConfig
from .discriminator import Discriminator
from .errors import AikdError
from .loss import alpha_at, binary_soft_loss, feature_distance, soft_loss
from .memory import Memory, SnapshotMemory
from .ranks import logger
from .state import SavedState
from .step import Step, Term

SoftLoss = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # of z, the soft logits and the temperature
_KIND = ('adv_loss', 'disc_input', 'disc_hidden', 'disc_opt')  # options that make another discriminator

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of logits and targets, mean over the batch


def soft_loss_of(binary: bool, sum_classes: bool) -> SoftLoss:
    """The loss against soft targets that goes with the criterion."""
    return partial(binary_soft_loss, sum_classes=sum_classes) if binary else soft_loss


class Progressive(Term):
    """The student learns from its own predictions of the previous epoch.

    Args:
        config: The options.
        soft_loss: Loss against soft targets.
        criterion: The task loss, for samples without an earlier prediction.
    """

    def __init__(self, config: AikdConfig, soft_loss: SoftLoss, criterion: Criterion):
        super().__init__()
        self.final_alpha, self.temperature = config.alpha, config.progressive_temperature
        self.soft_loss, self.criterion = soft_loss, criterion
        self.alpha = 0.
        self.memory: Memory = SnapshotMemory()
        self.has_chosen = False  # else this snapshot is what `auto` starts with
        self._needs_store = config.memory == 'store'
        self._compile_options: dict[str, Any] | None = None
        self._unread: tuple[dict[str, Any] | None, list[Any]] | None = None  # a loaded state's memory, not yet read

    def describe(self) -> str:
        """Options and memory."""
        return (
            f'progressive (alpha to {self.final_alpha:g}, tau_p {self.temperature:g}, memory {self.memory.name})')

    def use_memory(self, memory: Memory) -> None:
        """Take this memory, which gets the predictions of a loaded state."""
        self.memory, self.has_chosen = memory, True
        if self._compile_options is not None:
            memory.compile(**self._compile_options)
        self._read()

    def compile_memory(self, **options: Any) -> None:
        """Compile the memory's network, and that of a memory taken later; arguments as those of `torch.compile`."""
        self._compile_options = options
        self.memory.compile(**options)

    def begin_epoch(self, epoch: int, epochs: int, student: nn.Module, loader: Any) -> None:
        """Set alpha, and let the memory see the student as it is now.

        Raises:
            AikdError: The memory was to be a store, and `use_memory` was not called.
        """
        if self._needs_store and not self.has_chosen:
            raise AikdError('`memory` store: there is none: give begin_epoch the loader, or call use_memory')
        self.alpha = alpha_at(epoch, epochs, self.final_alpha)
        self.memory.begin_epoch(epoch, student, loader)

    def end_epoch(self) -> dict[str, float]:
        """Alpha."""
        self.memory.end_epoch()
        return {'alpha': self.alpha}

    def save(self, state: SavedState) -> None:
        """Name the memory's file."""
        state.memory = self.memory.get_state()

    def load(self, state: SavedState, changed: set[str], folders: list[Any]) -> None:
        """Read the memory's file, now or when the memory is chosen."""
        self._unread = state.memory, folders
        if self.has_chosen:
            self._read()

    def _read(self) -> None:
        if self._unread is not None:
            self.memory.load_state(*self._unread)
            self._unread = None

    def forward(self, step: Step) -> None:
        """Blend the term with the task loss, and keep the new predictions."""
        if self.alpha > 0:
            loss = self._loss(step.logits, step.target, *self.memory.recall(step.input, step.index))
            step.loss = (1 - self.alpha) * step.loss + self.alpha * loss
            step.means['progressive'] = loss
        self.memory.record(step.index, step.logits, step.target)

    def _loss(
            self,
            logits: torch.Tensor,
            target: torch.Tensor,
            past: torch.Tensor,
            known: np.ndarray | None,
    ) -> torch.Tensor:
        """Samples without a prediction contribute the criterion, so their whole loss is the task loss."""
        if known is None:
            return self.soft_loss(logits, past, self.temperature)
        has, lacks = (
            torch.from_numpy(mask.nonzero()[0]).to(logits.device, non_blocking=True) for mask in (known, ~known))
        own = self.criterion(logits.index_select(0, lacks), target.index_select(0, lacks))
        if len(has) == 0:
            return own
        soft = self.soft_loss(logits.index_select(0, has), past.index_select(0, has), self.temperature)
        return (len(has) * soft + len(lacks) * own) / len(logits)


class Distillation(Term):
    """The student learns the teacher's probabilities: the kd term.

    Args:
        config: The options.
        soft_loss: Loss against soft targets.
    """

    def __init__(self, config: AikdConfig, soft_loss: SoftLoss):
        super().__init__()
        self.weight, self.temperature, self.soft_loss = config.kd_weight, config.temperature, soft_loss

    def describe(self) -> str:
        """Options."""
        return f'kd ({self.weight:g}, tau {self.temperature:g})'

    def forward(self, step: Step) -> None:
        """Add the term; a sample without finite teacher logits contributes 0, as the student is its own target."""
        target = torch.where(step.answered[:, None], step.teacher_logits, step.logits.detach())
        loss = self.soft_loss(step.logits, target, self.temperature)
        step.loss = step.loss + self.weight * loss
        step.means['kd'] = loss


class FeatureDistance(Term):
    """The student keeps the teacher's features before the classifier: the feature term.

    Args:
        config: The options.
    """

    def __init__(self, config: AikdConfig):
        super().__init__()
        self.weight = config.feature_weight

    def describe(self) -> str:
        """Options."""
        return f'features ({self.weight:g})'

    def forward(self, step: Step) -> None:
        """Add the term; a sample without finite teacher features contributes 0, as the student is its own target."""
        assert step.features is not None
        target = torch.where(step.answered[:, None], step.teacher_features, step.features.detach())
        loss = feature_distance(step.features, target)
        step.loss = step.loss + self.weight * loss
        step.means['features'] = loss


def distances(config: AikdConfig, soft_loss: SoftLoss) -> list[Term]:
    """The kd and feature terms, as far as they are on."""
    terms: list[Term] = []
    if config.has_kd:
        terms.append(Distillation(config, soft_loss))
    if config.has_feature_term:
        terms.append(FeatureDistance(config))
    return terms


class Adversarial(Term):
    """The student learns to be taken for the teacher by the discriminator, which learns first.

    Args:
        config: The options.
        width: Length of the vectors that D sees: the number of classes C, or of features F.
        binary: Outputs are C independent probabilities (BCE).
        device: Where D lives.
    """

    def __init__(self, config: AikdConfig, width: int, binary: bool, device: torch.device | None = None):
        super().__init__()
        self.sees_features = config.disc_input == 'features'
        self.discriminator = Discriminator(
            width, config.disc_hidden, config.disc_input, config.adv_loss, config.disc_opt, config.disc_lr,
            config.seed, binary, device)
        self.final_weight = self.weight = config.adv_weight
        self.warmup = config.adv_warmup

    def describe(self) -> str:
        """Options."""
        return f'adversarial ({self.final_weight:g}, {self.discriminator.loss} on {self.discriminator.input})'

    def begin_epoch(self, epoch: int, epochs: int, student: nn.Module, loader: Any) -> None:
        """Set the weight."""
        self.weight = self.final_weight * (min(epoch / self.warmup, 1.) if self.warmup else 1.)

    def save(self, state: SavedState) -> None:
        """Keep D, its optimizer and its random stream."""
        state.binary, state.discriminator = self.discriminator.binary, self.discriminator.get_state()

    def load(self, state: SavedState, changed: set[str], folders: list[Any]) -> None:
        """Continue with the state's D, if it is of the same kind."""
        is_same = changed.isdisjoint(_KIND) and state.binary is self.discriminator.binary
        if state.discriminator is None or not is_same:
            logger.warning('AI-KD: the checkpoint has no such discriminator: it starts fresh')
            return
        try:
            self.discriminator.load_state(state.discriminator)
        except Exception as error:  # of torch, which checks some of it, or of what it lets through
            raise AikdError(
                'AI-KD: the checkpoint\'s discriminator cannot be read: resume from another checkpoint') from error

    def forward(self, step: Step) -> None:
        """Let D take its step, then add the term; both are left out where D's gradients are not finite."""
        real, fake = self._pair(step)
        disc, accuracy, stepped = self.discriminator.update(real, fake)
        loss = torch.where(stepped, self.discriminator.generator_loss(fake), 0.)
        step.loss = step.loss + self.weight * loss
        step.means['adv'] = loss
        step.means['disc'] = torch.where(stepped, disc, 0.)
        step.means['disc_accuracy'] = torch.where(stepped, accuracy, 0.)
        step.counts['skipped'] = ~stepped

    def _pair(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's and the student's side of a step, as D is given them."""
        if self.sees_features:
            assert step.features is not None
            return step.teacher_features, step.features
        return step.teacher_logits, step.logits
