"""The method: task loss, progressive, kd and adversarial terms joined into one regularised loss."""
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from . import AikdError
from .calibration import (
    TEMPERATURE_RANGE,
    area_under_risk_coverage,
    expected_calibration_error,
    fit_temperature,
)
from .config import AikdConfig
from .discriminator import Discriminator
from .loss import alpha_at, binary_soft_loss, kd_loss, progressive_loss, top1
from .memory import SnapshotMemory, StoreMemory
from .ranks import gather_rows, is_distributed, rank, sum_over_ranks, world_size
from .teacher import Teacher, better_than_chance

_logger = logging.getLogger(__name__)

_STATE_VERSION = 1
_SAME_TEACHER = ('teacher', 'teacher_model', 'teacher_dtype', 'teacher_size')  # or its T_c is fitted anew
_SAME_DISCRIMINATOR = ('adv_loss', 'disc_input', 'disc_hidden', 'disc_opt')  # or it starts fresh
_CHANCE_SAMPLES = 1024  # training samples, over all ranks, after which the teacher's top-1 is tested

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of logits and targets, mean over the batch

# What a step adds to the epoch's sums, each times the batch size: its mean over the epoch's samples is reported.
_MEANS = ('task', 'progressive', 'kd', 'adv', 'disc', 'disc_accuracy', 'teacher_top1')
# And what is not finite: batches whose loss is not, steps that D skipped, samples that the teacher did not answer.
_COUNTS = ('lost', 'skipped', 'unanswered')


# What a state holds, besides that of the discriminator: whether a value of an entry can be one of `get_state`.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    'config': lambda x: isinstance(x, dict) and all(isinstance(key, str) and _is_plain(x[key]) for key in x),
    'epoch': lambda x: isinstance(x, int),
    'teacher_temperature': lambda x: x is None or isinstance(x, float) and 0 < x < math.inf,
    'teacher_metrics': lambda x: x is None or isinstance(x, dict) and all(
        isinstance(key, str) and isinstance(value, (int, float)) for key, value in x.items()),
    'teacher_precision': lambda x: isinstance(x, str) and x in ('bfloat16', 'float32'),
    'teacher_given': lambda x: isinstance(x, str),
    'memory': lambda x: x is None or isinstance(x, dict) and isinstance(x.get('epoch'), int) and all(
        isinstance(x.get(key), str) for key in ('name', 'folder', 'digest')),
}


def check_state(state: Any) -> None:
    """Refuse what is no state of `Aikd.get_state`.

    Raises:
        AikdError: It is something else, of a newer version, or damaged.
    """
    if not isinstance(state, dict):
        raise AikdError(
            f'AI-KD: what the checkpoint holds is no state of AI-KD but {state!r:.80}: resume from another checkpoint')
    version = state.get('version')
    if not _is_plain(version) or version != _STATE_VERSION:
        raise AikdError(
            f'AI-KD: the checkpoint\'s state is of version {version!r:.80}, known is {_STATE_VERSION}: install the '
            f'timm-aikd that wrote it')
    for name, is_fine in _ENTRIES.items():
        if (name in state or name == 'config') and not is_fine(state.get(name)):
            raise AikdError(
                f'AI-KD: the checkpoint\'s state is damaged ({name} {state.get(name)!r:.80}): resume from another '
                f'checkpoint')


def _is_plain(value: Any) -> bool:
    """Whether it can be compared: a tensor among others can not."""
    return value is None or isinstance(value, (int, float, str)) or (
        isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


class Aikd(nn.Module):
    """AI-KD's regularisation of a task loss; it knows nothing of how the student is trained.

    Between `begin_epoch` and `end_epoch`, call the module once a batch. A term of weight 0 does no work: with all
    three at 0 the loss is the task loss itself. No step waits for the device.

    Args:
        num_classes: Number of classes C, at least 2.
        teacher: A `Teacher`, or any module that maps the student's input to logits [B, C]; frozen here. May be None
            where neither the kd nor the adversarial term is on.
        config: The options.
        epochs: Scheduled epochs T, over which the progressive term's weight grows.
        binary: The criterion is a BCE: predictions are C independent probabilities.
        sum_classes: That BCE sums over the classes rather than averaging.
        criterion: The task loss, mean over the batch, for samples that a store memory has no prediction of; by default
            plain cross-entropy or BCE.
        device: Where the student runs.

    Raises:
        AikdError: Fewer than two classes, no epochs, or no teacher where one is needed.
        ValueError: The discriminator's optimizer cannot be used.
    """

    _sums: torch.Tensor
    _chance_correct: torch.Tensor

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
    ):
        super().__init__()
        self.config = config = config or AikdConfig()
        if num_classes < 2:
            raise AikdError(f'AI-KD needs at least 2 classes, the student has {num_classes}')
        if epochs < 1:
            raise AikdError(f'AI-KD needs at least 1 scheduled epoch, not {epochs}')
        self.num_classes, self.epochs, self.binary, self.sum_classes = num_classes, epochs, binary, sum_classes
        self.criterion = criterion or (
            BinaryCrossEntropy(smoothing=0., sum_classes=sum_classes) if binary else nn.CrossEntropyLoss())
        self.teacher: Teacher | None = None
        self.discriminator: Discriminator | None = None
        self.needs_temperature = False
        self.fitted_temperature: float | None = None
        self.teacher_metrics: dict[str, float] | None = None  # where T_c was fitted
        self.memory: SnapshotMemory | StoreMemory | None = SnapshotMemory() if config.alpha > 0 else None
        self._memory_state: tuple[dict[str, Any] | None, list[Path]] | None = None  # loaded, and not yet used
        if config.has_teacher:
            if teacher is None:
                raise AikdError('AI-KD needs a teacher: give one, or set the kd and adversarial weights to 0')
            self.teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher).to(device)
            self._set_temperature(config.teacher_temperature)
        if config.has_teacher and config.adv_weight > 0:
            self.discriminator = Discriminator(
                num_classes, config.disc_hidden, config.disc_input, config.adv_loss, config.disc_opt, config.disc_lr,
                config.seed, binary, device)
        self.epoch = 0
        self.alpha, self.adv_weight = 0., config.adv_weight
        self.steps = 0  # taken by this object, in any epoch
        self._chance_seen: int | None = 0  # samples so far; None: tested
        self.register_buffer('_sums', torch.zeros(len(_MEANS) + 1 + len(_COUNTS), device=device), persistent=False)
        self.register_buffer('_chance_correct', torch.zeros((), device=device), persistent=False)

    def _set_temperature(self, temperature: float | str) -> None:
        self.needs_temperature = temperature == 'auto'
        if self.teacher is not None:
            self.teacher.temperature = 1. if self.needs_temperature else float(temperature)

    def compile(self, **kwargs: Any) -> None:
        """Compile the two networks that only run forward; arguments as those of `torch.compile`."""
        for module in (self.teacher, self.memory):
            if module is not None:
                module.compile(**kwargs)

    @torch.no_grad()
    def fit_teacher_temperature(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """Fit T_c to labelled validation images, normalised as the student's, and keep it.

        Under torch.distributed every rank calls this with its own share of the images.

        Returns:
            `temperature`, and of the calibrated teacher on the `samples` images used its `top1` and `ece` (percent),
            `nll` and `aurc` (times 1000).
        """
        assert self.teacher is not None
        self.teacher.temperature = 1.
        trial, self.teacher.trial = self.teacher.trial, None  # only training steps show what precision they run in
        device = self._sums.device
        answers = [torch.empty(0, self.num_classes, device=device)]
        labels = [torch.empty(0, dtype=torch.long, device=device)]
        for input, target in batches:
            answers.append(self.teacher(input))
            labels.append(target)
        self.teacher.trial = trial
        logits, target = gather_rows(torch.cat(answers)), gather_rows(torch.cat(labels))
        if len(target) == 0:
            raise AikdError('AI-KD: no validation images to fit T_c on; set --aikd-teacher-temperature to a number')
        if logits.shape[-1] != self.num_classes or not 0 <= int(target.min()) <= int(target.max()) < self.num_classes:
            raise AikdError(
                f'AI-KD: the teacher has {logits.shape[-1]} classes, the validation labels go from {int(target.min())} '
                f'to {int(target.max())}, the student has {self.num_classes} classes: they must agree')
        answered = logits.isfinite().all(-1)
        if not answered.all():  # one NaN would be the mean's
            text = f'{int((~answered).sum())} of {len(target)} validation images, {self.teacher.name} gives no finite'
            if not answered.any():
                raise AikdError(f'AI-KD: for {text} answer: a broken checkpoint, or too low an --aikd-teacher-dtype')
            _logger.warning(f'AI-KD: for {text} answer: T_c is fitted on the others')
            logits, target = logits[answered], target[answered]
        temperature = torch.tensor(fit_temperature(logits, target, self.binary), device=logits.device)
        if is_distributed():
            dist.broadcast(temperature, 0)
        self._set_temperature(temperature.item())
        self.fitted_temperature = temperature.item()
        if temperature <= TEMPERATURE_RANGE[0] * 1.01 or temperature >= TEMPERATURE_RANGE[1] * 0.99:
            _logger.warning(
                f'AI-KD: T_c ran into the end of its range, {TEMPERATURE_RANGE}: these images cannot tell it; '
                f'set --aikd-teacher-temperature')
        logits = logits / temperature
        confidence, correct = top1(logits, target)
        self.teacher_metrics = {
            'top1': 100 * correct.double().mean().item(),
            'nll': F.cross_entropy(logits, target).item(),
            'ece': expected_calibration_error(confidence, correct),
            'aurc': area_under_risk_coverage(confidence, correct),
            'samples': len(target),
        }
        return {'temperature': self.teacher.temperature, **self.teacher_metrics}

    def use_memory(self, memory: SnapshotMemory | StoreMemory) -> None:
        """Take another memory than the snapshot; before the first epoch, on all ranks. Also before or after
        `load_state`, whose predictions it then gets."""
        self.memory = memory
        if isinstance(memory, StoreMemory):
            memory.device = self._sums.device
        self._restore_memory()

    def begin_epoch(self, epoch: int, student: nn.Module) -> None:
        """Set the epoch's weights; a snapshot remembers the (unwrapped) student as it is now, which is as it was at
        the end of the previous epoch.

        Args:
            epoch: From 0.
            student: The module in training, without DDP, compile or EMA around it.

        Raises:
            AikdError: The memory was to be a store, and `use_memory` was not called.
        """
        config = self.config
        if config.memory == 'store' and isinstance(self.memory, SnapshotMemory):
            raise AikdError('--aikd-memory store: there is none: give begin_epoch the loader, or call use_memory')
        self.epoch = epoch
        self.alpha = alpha_at(epoch, self.epochs, config.alpha)
        self.adv_weight = config.adv_weight * (min(epoch / config.adv_warmup, 1.) if config.adv_warmup else 1.)
        self._sums.zero_()
        if self.memory is not None:
            self.memory.begin_epoch(epoch, student)

    def forward(
            self,
            input: torch.Tensor,
            logits: torch.Tensor,
            target: torch.Tensor,
            task_loss: torch.Tensor,
            index: np.ndarray | None = None,
    ) -> dict[str, torch.Tensor]:
        """Regularise the task loss of one batch.

        Args:
            input: The batch as the student saw it [B, ...].
            logits: The student's output [B, C].
            target: Hard [B] or soft [B, C] targets.
            task_loss: What the script's criterion made of `logits` and `target`.
            index: Dataset indices [B] of the samples, for a store memory.

        Returns:
            `loss`, and detached `task_loss`, `progressive_loss`, `kd_loss`, `adv_loss`, `disc_loss`, unweighted; a
            term that is off is 0.

        Raises:
            AikdError: The teacher's logits are not shaped as the student's, or its top-1 is no better than chance; or
                a store memory cannot tell the samples.
        """
        config = self.config
        zero = torch.zeros((), device=logits.device)
        progressive = kd = adv = disc = accuracy = correct = zero
        stepped = answered = torch.ones((), dtype=torch.bool, device=logits.device)
        loss = task_loss
        if self.memory is not None:
            if self.alpha > 0:
                progressive = self._progressive(logits, target, *self.memory.recall(input, index))
                loss = (1 - self.alpha) * loss + self.alpha * progressive
            self.memory.record(index, logits, target)
        if self.teacher is not None:
            teacher_logits = self.teacher(input)
            if teacher_logits.shape != logits.shape:
                raise AikdError(
                    f'AI-KD: the teacher answers {list(teacher_logits.shape)}, the student {list(logits.shape)}: '
                    f'they must have the same classes')
            answered = teacher_logits.sum(-1).isfinite()  # as no sum with a NaN or an infinity in it is
            correct = (answered & top1(teacher_logits, target)[1]).float()
            if config.kd_weight > 0:
                # where the student is its own teacher, there is nothing to learn
                soft = torch.where(answered[:, None], teacher_logits, logits.detach())
                kd = self._soft_loss(kd_loss, logits, soft, config.temperature)
                loss = loss + config.kd_weight * kd
            if self.discriminator is not None:
                disc, accuracy, stepped = self.discriminator.update(teacher_logits, logits)
                adv = torch.where(stepped, self.discriminator.generator_loss(logits), 0.)
                loss = loss + self.adv_weight * adv
            self._watch_chance(self.teacher, correct)
        counts = ~loss.detach().isfinite(), ~stepped, ~answered
        self._count(len(logits), counts, task_loss, progressive, kd, adv, disc, accuracy, correct.mean())
        parts = {'task': task_loss, 'progressive': progressive, 'kd': kd, 'adv': adv, 'disc': disc}
        # clones: the script divides result['loss'] in place, which may be task_loss itself
        return {'loss': loss, **{f'{name}_loss': part.detach().clone() for name, part in parts.items()}}

    def _progressive(
            self,
            logits: torch.Tensor,
            target: torch.Tensor,
            past: torch.Tensor,
            known: np.ndarray | None,
    ) -> torch.Tensor:
        """The progressive term; samples without a prediction put their task loss in, which so stays what it is."""
        temperature = self.config.progressive_temperature
        if known is None:
            return self._soft_loss(progressive_loss, logits, past, temperature)
        has, lacks = (
            torch.from_numpy(mask.nonzero()[0]).to(logits.device, non_blocking=True) for mask in (known, ~known))
        own = self.criterion(logits.index_select(0, lacks), target.index_select(0, lacks))
        if len(has) == 0:
            return own
        soft = self._soft_loss(
            progressive_loss, logits.index_select(0, has), past.index_select(0, has), temperature)
        return (len(has) * soft + len(lacks) * own) / len(logits)

    def _soft_loss(
            self,
            softmax_loss: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor],
            logits: torch.Tensor,
            soft: torch.Tensor,
            temperature: float,
    ) -> torch.Tensor:
        if self.binary:
            return binary_soft_loss(logits, soft, temperature, self.sum_classes)
        return softmax_loss(logits, soft, temperature)

    @torch.no_grad()
    def _count(self, samples: int, counts: Sequence[torch.Tensor], *means: torch.Tensor) -> None:
        self.steps += 1
        disc = _MEANS.index('disc')
        values = [value.detach().float() for value in means]
        skipped = counts[_COUNTS.index('skipped')]
        values[disc:disc + 2] = [torch.where(skipped, 0., value) for value in values[disc:disc + 2]]
        sums = samples * torch.stack([*values, torch.ones_like(values[0])])
        self._sums += torch.cat([sums, torch.stack([count.sum() for count in counts])])

    def _watch_chance(self, teacher: Teacher, correct: torch.Tensor) -> None:
        if self._chance_seen is not None:
            self._chance_correct += correct.sum()
            self._chance_seen += len(correct)
            if self._chance_seen * world_size() >= _CHANCE_SAMPLES:
                self._test_chance(teacher, self._chance_seen)

    def _test_chance(self, teacher: Teacher, seen: int) -> None:
        """Stop the run if the teacher's first answers were no better than guessing: the one sync of the first epoch."""
        counts = torch.stack([self._chance_correct, self._chance_correct.new_tensor(float(seen))])
        correct, count = map(int, sum_over_ranks(counts).tolist())
        self._chance_seen = None
        teacher.settle()
        if not better_than_chance(correct, count, self.num_classes):
            raise AikdError(
                f'AI-KD: teacher {teacher.name} is right on {100 * correct / count:.1f} % of the first {count} '
                f'training samples, no better than chance ({100 / self.num_classes:.1f} %): wrong class order or a '
                f'broken checkpoint; check --aikd-teacher and the data set\'s --class-map')

    def end_epoch(self) -> dict[str, float]:
        """Metrics of the epoch, averaged over its samples and over the ranks; only here the device is waited for.

        Returns:
            Means of the terms, unweighted: `task`, `progressive`, `kd`, `adv`, `disc`; the weight `alpha`;
            `disc_accuracy`, how often D told the two outputs for a sample apart (0.5 is chance); `disc_skipped`,
            steps that D skipped; `teacher_top1` on the training batches, in percent.

        Raises:
            AikdError: A store memory finds that the indices do not identify samples.
        """
        if self.memory is not None:
            self.memory.end_epoch()
        *totals, samples, lost, skipped, unanswered = sum_over_ranks(self._sums).tolist()
        if rank() == 0:
            self._warn(int(lost), int(skipped) // world_size(), int(unanswered), int(samples))
        metrics = dict(zip(_MEANS, (total / max(samples, 1) for total in totals), strict=True))
        metrics['teacher_top1'] *= 100
        return {**metrics, 'alpha': self.alpha, 'disc_skipped': skipped / world_size()}

    def _warn(self, lost: int, skipped: int, unanswered: int, samples: int) -> None:
        epoch = f'AI-KD: epoch {self.epoch}'
        if lost:
            _logger.warning(
                f'{epoch}: the loss of {lost} batches was not finite: unless a gradient scaler has skipped them, the '
                f'student is lost: resume from an earlier checkpoint, with a lower --lr or with --clip-grad')
        elif unanswered:
            _logger.warning(
                f'{epoch}: for {unanswered} of {samples} samples the teacher gave no finite answer: they had no kd; '
                f'D skipped {skipped} steps; if the teacher overflows, --aikd-teacher-dtype float32')
        elif skipped:
            _logger.warning(f'{epoch}: D skipped {skipped} steps that were not finite')

    def save_memory(self, folder: Path | str | None) -> None:
        """Write a store memory beside the checkpoints, for `get_state` to name it; after `end_epoch`, on all ranks.

        Args:
            folder: Of the checkpoints; the primary rank's counts.
        """
        if isinstance(self.memory, StoreMemory):
            self.memory.save(folder)

    def get_state(self) -> dict[str, Any]:
        """State for a checkpoint: tensors and plain containers, no weights of the teacher or of the memory."""
        state = {'version': _STATE_VERSION, 'config': self.config.to_dict(), 'epoch': self.epoch}
        if self.fitted_temperature is not None:
            state['teacher_temperature'] = self.fitted_temperature
            state['teacher_metrics'] = self.teacher_metrics
        if self.discriminator is not None:
            state['binary'] = self.binary
            state['discriminator'] = self.discriminator.get_state()
        if self.teacher is not None and self.teacher.precision is not None:
            state['teacher_precision'] = self.teacher.precision
        if self.teacher is not None and self.teacher.given is not None:
            state['teacher_given'] = self.teacher.given
        if isinstance(self.memory, StoreMemory):
            state['memory'] = self.memory.get_state()
        return state

    def load_state(self, state: dict[str, Any], folders: Sequence[Path] = ()) -> None:
        """Continue from `get_state`; options that changed since are reported, and the new ones hold.

        Args:
            state: What `get_state` returned.
            folders: Where to look for the store memory's file, before the folder that it was written to.

        Raises:
            AikdError: The state is damaged, not ours or of a newer version. This object is as it was before.
        """
        check_state(state)
        config, changed = self.config.to_dict(), state['config']
        for name in sorted(config.keys() | changed.keys()):
            if config.get(name) != changed.get(name):
                _logger.warning(
                    f'AI-KD: aikd_{name} was {changed.get(name)!r:.80} in the checkpoint, is {config.get(name)!r} now')
        if self.discriminator is not None:
            self._load_discriminator(self.discriminator, state)  # first, for it may fail
        is_same_teacher = all(config[name] == changed.get(name) for name in _SAME_TEACHER)
        if is_same_teacher and self.teacher is not None and 'teacher_precision' in state:
            self.teacher.decide(state['teacher_precision'])
        if self.needs_temperature and is_same_teacher:
            self.fitted_temperature = state.get('teacher_temperature')
            self.teacher_metrics = state.get('teacher_metrics')
            self._set_temperature(self.fitted_temperature or 'auto')
        self._memory_state = state.get('memory'), list(folders)
        self._restore_memory()

    def _load_discriminator(self, discriminator: Discriminator, state: dict[str, Any]) -> None:
        config, changed = self.config.to_dict(), state['config']
        same = all(config[name] == changed.get(name) for name in _SAME_DISCRIMINATOR)
        if 'discriminator' not in state or not same or state.get('binary') is not self.binary:
            _logger.warning('AI-KD: the checkpoint has no such discriminator: it starts fresh')
            return
        try:
            discriminator.load_state(state['discriminator'])
        except Exception as error:  # of torch, which checks some of it, or of what it lets through
            raise AikdError(
                'AI-KD: the checkpoint\'s discriminator cannot be read: resume from another checkpoint') from error

    def _restore_memory(self) -> None:
        if self._memory_state is not None and isinstance(self.memory, StoreMemory):
            self.memory.load_state(*self._memory_state)
            self._memory_state = None
