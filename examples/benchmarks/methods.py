"""Methods of accuracy.py, and its runs."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from regimes import REGIMES
from timm.task import FeatureDistillationTask, LogitDistillationTask

from timm_aikd import AikdConfig


@dataclass(frozen=True)
class Method:
    """How a student is trained."""

    options: dict  # of AI-KD, other than the defaults
    teacher: str = 'ce-half'  # whose student of the same seed teaches; `imagenet`: the model before its fine-tuning
    members: int = 1  # teachers, which are students of other seeds
    epochs: float = 1  # as a multiple of the regime's; 0: the student is the teacher
    smoothing: float = 0.  # of the labels in the task loss
    mixup: bool = False  # timm's
    ema: bool = False  # evaluate timm's average of the weights
    timm_task: Callable | None = None  # trains in place of AI-KD


PLAIN = {'teacher': 'none', 'alpha': 0.}  # every term off
KD = {  # as timm's script distills unless told otherwise
    'alpha': 0., 'adv_weight': 0., 'teacher_temperature': 1., 'kd_weight': 1., 'temperature': 4.}
KD_TC = {**KD, 'teacher_temperature': 'auto'}
TIMM_KD = partial(LogitDistillationTask, distill_loss_weight=1., temperature=4.)
FEATURES = {  # of the model before fine-tuning, in one phase
    'alpha': 0., 'kd_weight': 0., 'adv_weight': 0., 'teacher_temperature': 1., 'disc_input': 'features'}
METHODS = {
    'ce': Method(PLAIN),
    'ce-half': Method(PLAIN, epochs=0.5),
    'ce-long': Method(PLAIN, epochs=2),  # what a teacher costs, spent on plain training
    'ls': Method(PLAIN, smoothing=0.1),
    'mixup': Method(PLAIN, mixup=True),
    'ema': Method(PLAIN, ema=True),
    'pskd': Method({'teacher': 'none', 'alpha': 0.8, 'progressive_temperature': 1.}),
    'kd': Method(KD, 'ce'),
    'kd-tc': Method(KD_TC, 'ce'),
    'timm-kd': Method(KD, 'ce', timm_task=TIMM_KD),
    'timm-kd-from-half': Method(KD, timm_task=TIMM_KD),
    'timm-features': Method(KD, 'imagenet', timm_task=partial(FeatureDistillationTask, distill_loss_weight=1.)),
    'aikd': Method({}),
    'aikd-no-kd': Method({'kd_weight': 0.}),
    'aikd-no-progressive': Method({'alpha': 0.}),
    'aikd-no-adv': Method({'adv_weight': 0.}),
    'aikd-adv-0.3': Method({'adv_weight': 0.3}),
    'aikd-alpha-0.3': Method({'alpha': 0.3}),
    'aikd-from-ce': Method({}, 'ce'),
    'aikd-from-ce-alpha-0.3': Method({'alpha': 0.3}, 'ce'),
    'ensemble': Method(KD, 'ce', members=3, epochs=0),
    'kd-3': Method(KD_TC, 'ce', members=3),
    'aikd-3': Method({}, members=3),
    **{f'distance-{weight:g}': Method({**FEATURES, 'feature_weight': weight}, 'imagenet') for weight in (1., 3., 10.)},
    'distance-3-half': Method({**FEATURES, 'feature_weight': 3.}, 'imagenet', epochs=0.5),
    'disc-features-0.03': Method({**FEATURES, 'adv_weight': 0.03}, 'imagenet'),
    'distance-1-disc-0.03': Method({**FEATURES, 'feature_weight': 1., 'adv_weight': 0.03}, 'imagenet'),
}


class Run(NamedTuple):
    """One student to train, as the results know it."""

    regime: str
    method: str
    seed: int
    epochs_scale: float

    @property
    def epochs(self) -> int:
        return round(max(2, round(REGIMES[self.regime].epochs * self.epochs_scale)) * METHODS[self.method].epochs)

    @property
    def config(self) -> AikdConfig:
        return AikdConfig(**{'seed': self.seed, 'memory': 'store', **METHODS[self.method].options})

    @property
    def teachers(self) -> list['Run']:
        """The runs whose students teach it."""
        method = METHODS[self.method]
        if method.teacher == 'imagenet' or not self.config.has_teacher:
            return []
        return [self._replace(method=method.teacher, seed=self.seed + 100 * number) for number in range(method.members)]
