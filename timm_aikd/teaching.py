"""The frozen teacher at work in a training run: its logits, its features, its T_c, and whether it is any good."""
from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn

from .config import AikdConfig
from .errors import AikdError
from .features import FEATURE_OPTIONS
from .loss import top1
from .ranks import logger
from .state import SavedState
from .step import Step, Term
from .teacher import Teacher
from .teacher.check import SAMPLES, ChanceCheck
from .teacher.fit import answers, fit_metrics
from .teacher.verdict import misfit, swapped_classes, swapped_text

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]  # inputs and labels [B]
_IDENTITY = ('teacher', 'teacher_model', 'teacher_dtype', 'teacher_size')  # options that make another teacher


class Teaching(Term):
    """Runs the teacher for the terms that follow, which see its features alone; adds nothing to the loss itself.

    Args:
        teacher: The teacher.
        num_features: The student's number of features F; None where no term sees features.

    Raises:
        AikdError: The teacher has another number of features.
    """

    needs_temperature = False

    def __init__(self, teacher: Teacher, num_features: int | None):
        super().__init__()
        self.teacher, self.num_features = teacher, num_features
        if num_features is not None and (theirs := teacher.watch_features()) != num_features:
            raise AikdError(
                f'{FEATURE_OPTIONS}: teacher {teacher.specs[0]} has {theirs} features before its classifier, the '
                f'student {num_features}: they must be as many; choose a teacher of the student\'s architecture')

    def introduce(self) -> str:
        """Its name, for the log, and that only its features are used."""
        return f'{self.teacher.name} (its features alone: classes, T_c and top-1 are neither used nor checked)'

    def calibrate(self, batches: Batches, training: Batches | None = None) -> dict[str, float]:
        """Refused: only a teacher whose classes are used has a T_c."""
        raise AikdError('AI-KD: no T_c to fit: with these options only the teacher\'s features are used')

    def leave_uncalibrated(self) -> None:
        """There is nothing to calibrate."""

    def warnings(self, class_names: Sequence[str] | None) -> list[str]:
        """What looks wrong with the teacher's classes after `calibrate`."""
        return []

    def forward(self, step: Step) -> None:
        """Set the step's `teacher_features` and `answered`.

        Raises:
            AikdError: The student's features were not given.
        """
        _check_features(step)
        step.teacher_features = self.teacher.features(step.input)
        step.answered = step.teacher_features.float().sum(-1).isfinite()
        step.counts['unanswered'] = ~step.answered

    def save(self, state: SavedState) -> None:
        """Keep which teacher it is."""
        state.teacher_given, state.teacher_digest = self.teacher.given, self.teacher.digest

    def check(self, state: SavedState, changed: set[str]) -> None:
        """Refuse to go on with other weights under the same name.

        Raises:
            AikdError: The teacher's weights have changed.
        """
        digests = state.teacher_digest, self.teacher.digest
        if changed.isdisjoint(_IDENTITY) and None not in digests and len(set(digests)) == 2:
            raise AikdError(
                f'AI-KD: the weights of teacher {self.teacher.name} are not those that the checkpoint was trained '
                f'with: put the old ones back, or go on with these by giving them under another path as `teacher`')


class ClassTeaching(Teaching):
    """Runs the teacher for terms that see its classes too, at its calibration temperature.

    Args:
        teacher: The teacher.
        num_features: The student's number of features F; None where no term sees features.
        config: The options; T_c "auto" is 1 until `calibrate` fits it.
        num_classes: Number of classes C.
        binary: The criterion is a BCE.
        device: Where the student runs.
    """

    def __init__(
            self,
            teacher: Teacher,
            num_features: int | None,
            config: AikdConfig,
            num_classes: int,
            binary: bool,
            device: torch.device | None = None,
    ):
        super().__init__(teacher, num_features)
        self.num_classes, self.binary, self.device = num_classes, binary, device
        temperature = config.teacher_temperature
        self.needs_temperature = temperature == 'auto'
        self.fit: dict[str, float] | None = None  # what `calibrate` found
        self.swapped: list[tuple[int, int]] = []  # classes that it takes for each other, likewise
        self.check_chance = ChanceCheck(teacher.name, num_classes, device)
        teacher.use_sigmoid(binary)
        teacher.set_temperature(temperature if isinstance(temperature, (int, float)) else 1.)

    def introduce(self) -> str:
        """Its name and T_c, for the log."""
        return f'{self.teacher.name} at T_c {self.teacher.temperature:.3f}'

    def calibrate(self, batches: Batches, training: Batches | None = None) -> dict[str, float]:
        """Fit T_c to labelled validation images and judge the teacher on unaugmented training images.

        Returns:
            What `fit_metrics` returns, and with training images `train_top1` (percent) and `train_samples`.

        Raises:
            AikdError: The images do not fit the teacher, or it is no better than chance.
        """
        device = self.device or torch.device('cpu')
        self.teacher.set_temperature(1.)
        logits, target = answers(self.teacher, batches, self.num_classes, device)
        self.fit = fit_metrics(logits, target, self.binary)
        self.teacher.set_temperature(self.fit['temperature'])
        self.needs_temperature = False
        self.swapped = swapped_classes(logits.argmax(-1), target)
        if training is not None:
            correct = top1(*answers(self.teacher, training, self.num_classes, device))[1]
            if len(correct) >= SAMPLES // 2:  # fewer tell little: the check counts on during the steps
                self.check_chance.judge(int(correct.sum()), len(correct))
            self.fit['train_top1'] = 100 * correct.float().mean().item()
            self.fit['train_samples'] = len(correct)
        return self.fit

    def warnings(self, class_names: Sequence[str] | None) -> list[str]:
        """What looks wrong with the teacher's classes after `calibrate`."""
        found = [misfit(self.fit['top1'], self.teacher.stored_top1)] if self.fit else []
        found += [swapped_text(self.swapped, class_names)] if self.swapped else []
        return [text for text in found if text is not None]

    def leave_uncalibrated(self) -> None:
        """Do without a fit of T_c, which stays 1."""
        self.needs_temperature = False

    def forward(self, step: Step) -> None:
        """Set the step's `teacher_logits`, `answered` and, where needed, `teacher_features`.

        Raises:
            AikdError: The teacher's logits are not shaped as the student's, or the teacher is no better than chance.
        """
        logits = self.teacher(step.input)
        if self.num_features is not None:
            _check_features(step)
            step.teacher_features = self.teacher.take_features()
        if logits.shape != step.logits.shape:
            raise AikdError(
                f'AI-KD: the teacher\'s logits are {list(logits.shape)}, the student\'s {list(step.logits.shape)}: '
                f'they must have the same classes')
        step.teacher_logits = logits
        step.answered = logits.sum(-1).isfinite()  # the sum is non-finite iff any logit is
        correct = (step.answered & top1(logits, step.target)[1]).float()
        step.means['teacher_top1'] = correct.mean()
        step.counts['unanswered'] = ~step.answered
        self.check_chance(correct)

    def save(self, state: SavedState) -> None:
        """Keep T_c, if fitted, and which teacher it is."""
        super().save(state)
        if self.fit is not None:
            state.teacher_temperature = self.fit['temperature']
            state.teacher_metrics = {name: self.fit[name] for name in self.fit if name != 'temperature'}

    def load(self, state: SavedState, changed: set[str], folders: list[object]) -> None:
        """Take T_c over, if it was fitted to the same teacher."""
        if self.needs_temperature and changed.isdisjoint(_IDENTITY) and state.teacher_temperature is not None:
            self.teacher.set_temperature(state.teacher_temperature)
            self.fit = {'temperature': state.teacher_temperature, **(state.teacher_metrics or {})}
            self.needs_temperature = False


def _check_features(step: Step) -> None:
    if step.features is None:
        raise AikdError(f'{FEATURE_OPTIONS}: the student\'s features were not given: pass them to Aikd as `features`')


def teaching_of(
        teacher: nn.Module | None,
        config: AikdConfig,
        num_features: int | None,
        num_classes: int,
        binary: bool,
        device: torch.device | None,
) -> Teaching | None:
    """The teaching that the options ask for; None where no term needs a teacher."""
    if teacher is None or not config.has_teacher:
        return None
    if not isinstance(teacher, Teacher):
        for name in ('teacher_model', 'teacher_dtype', 'teacher_size'):
            if getattr(config, name) not in (None, 'auto'):
                logger.warning(
                    f'AI-KD: `{name}` {getattr(config, name)} has no effect on a teacher that is given as a module: '
                    f'give load_teacher the option, or wrap the module in Teacher')
        teacher = Teacher(teacher).to(device)
    if not config.uses_classes:
        return Teaching(teacher, num_features)
    return ClassTeaching(teacher, num_features, config, num_classes, binary, device)
