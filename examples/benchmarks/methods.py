"""Methods of accuracy.py, and the digest that a run is known by."""
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property

from regimes import LR, OPTIMIZER, REGIMES, WARMUP

from timm_aikd import AikdConfig

RECIPE = 2  # to be raised when the benchmark trains differently in a way that the digests do not see


@dataclass(frozen=True)
class Method:
    """How a student is trained."""

    options: dict  # of AI-KD, other than the defaults
    teacher: str = 'ce'  # whose student of the same seed teaches; `imagenet`: the student before its fine-tuning
    smoothing: float = 0.  # of the labels in the task loss
    epochs: float = 1  # as a multiple of the regime's; 0: the student is the teacher
    peer: str | None = None  # what trains if not AI-KD
    members: int = 1  # teachers, which are students of other seeds
    mixup: bool = False  # timm's
    ema: bool = False  # evaluate timm's average of the weights


PLAIN = {'teacher': 'none', 'alpha': 0.}  # every term off
KD = {  # as timm's script distills unless told otherwise
    'alpha': 0., 'adv_weight': 0., 'teacher_temperature': 1., 'kd_weight': 1., 'temperature': 4.}
KD_TC = {**KD, 'teacher_temperature': 'auto'}
STORE = {'memory': 'store'}
PSKD = {**STORE, 'teacher': 'none', 'alpha': 0.8, 'progressive_temperature': 1.}
OLD = {**STORE, 'alpha': 0.3}  # the defaults with which the losses were compared from scratch


def aikd(teacher: str = 'ce-half', members: int = 1, **options) -> Method:
    """The defaults but for these options; the teacher trained for half the epochs, or as long as the student (`ce`)."""
    return Method({**STORE, **options}, teacher, members=members)


def features(distance: float = 0., disc: float = 0., alpha: float = 0., epochs: float = 1) -> Method:
    """One phase: the teacher is the model before fine-tuning, and only its features are used."""
    return Method({
        **STORE, 'kd_weight': 0., 'teacher_temperature': 1., 'feature_weight': distance, 'adv_weight': disc,
        'disc_input': 'features', 'alpha': alpha}, teacher='imagenet', epochs=epochs)


BOTH = {
    'ce': Method(PLAIN),
    'ce-half': Method(PLAIN, epochs=0.5),
    'ce-long': Method(PLAIN, epochs=2),  # what a teacher costs, spent on plain training
    'ls': Method(PLAIN, smoothing=0.1),
    'kd-tc': Method(KD_TC),
    'timm-kd': Method(KD, peer='TimmDistillation'),
    'pskd': Method(PSKD),
    'aikd': aikd(),
    'aikd-from-ce': aikd('ce'),
    'aikd-from-ce-alpha-0.3': aikd('ce', alpha=0.3),
}
SCRATCH = {
    **BOTH,
    'kd': Method(KD),
    'old-ls': Method(OLD, smoothing=0.1),  # timm's script smooths by default
    'old-snapshot': Method({**OLD, 'memory': 'snapshot'}),
    'old-no-kd': Method({**OLD, 'kd_weight': 0.}),
    'old-no-progressive': Method({**OLD, 'alpha': 0.}),
    'old-no-adv': Method({**OLD, 'adv_weight': 0.}),
    **{f'old-{loss}': Method({**OLD, 'adv_loss': loss}) for loss in ('hinge', 'lsgan', 'wgan', 'wgan-gp')},
    'old-gen2': Method(OLD, teacher='aikd-from-ce-alpha-0.3'),
}
FINE_TUNED = {
    **BOTH,
    'timm-kd-from-half': Method(KD, peer='TimmDistillation', teacher='ce-half'),
    'aikd-no-adv': aikd(adv_weight=0.),
    'aikd-no-kd': aikd(kd_weight=0.),
    'aikd-no-progressive': aikd(alpha=0.),
    'aikd-alpha-0.3': aikd(alpha=0.3),
    'aikd-from-ce-no-adv': aikd('ce', adv_weight=0.),
    'aikd-from-ce-no-kd': aikd('ce', kd_weight=0.),
    'aikd-from-ce-alpha-1': aikd('ce', alpha=1.),
    'aikd-from-ce-adv-0.3': aikd('ce', adv_weight=0.3),
    'mixup': Method(PLAIN, mixup=True),
    'ema': Method(PLAIN, ema=True),
    'ensemble': Method(KD, epochs=0, members=3),
    'kd-3': Method(KD_TC, members=3),
    'aikd-3': aikd('ce', members=3),
    'aikd-3-alpha-0.3': aikd('ce', members=3, alpha=0.3),
    **{f'timm-features-{weight:g}': Method({**KD, 'kd_weight': weight}, teacher='imagenet', peer='TimmFeatures')
       for weight in (1., 10.)},
    **{f'distance-{weight:g}': features(weight) for weight in (1., 3., 10.)},
    **{f'distance-{weight:g}-half': features(weight, epochs=0.5) for weight in (1., 3.)},
    'disc-features-0.03': features(0., 0.03),
    'distance-1-disc-0.03': features(1., 0.03),
}
METHODS = {**SCRATCH, **FINE_TUNED}


@dataclass(frozen=True)
class Run:
    """One student to train."""

    regime: str
    student: str
    method: str
    seed: int
    epochs_scale: float = 1.

    @cached_property
    def epochs(self) -> int:
        return round(max(2, round(REGIMES[self.regime].epochs * self.epochs_scale)) * METHODS[self.method].epochs)

    @cached_property
    def config(self) -> AikdConfig:
        return AikdConfig(**{'seed': self.seed, **METHODS[self.method].options})

    @property
    def needs_imagenet(self) -> bool:
        """Whether the teacher is the student before its fine-tuning."""
        return self.config.has_teacher and METHODS[self.method].teacher == 'imagenet'

    @cached_property
    def teachers(self) -> list['Run']:
        """The runs whose students are the teacher."""
        method = METHODS[self.method]
        if not self.config.has_teacher or self.needs_imagenet:
            return []
        return [replace(self, method=method.teacher, seed=self.seed + 100 * number) for number in range(method.members)]

    @cached_property
    def digest(self) -> str:
        """Of all that determines the run."""
        method, regime = METHODS[self.method], REGIMES[self.regime]
        what = [
            RECIPE, regime.per_class, regime.batch, regime.noise, regime.augment, regime.pixels, self.student,
            self.seed, self.epochs, OPTIMIZER, LR[self.student], WARMUP, method.smoothing, method.peer, method.mixup,
            method.ema, effective_options(self.config), [teacher.digest for teacher in self.teachers],
            self.needs_imagenet]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self):
        return f'{self.regime} {self.student} {self.method} seed {self.seed}'


def effective_options(config: AikdConfig) -> dict:
    """All options that are set, but those of terms that are off, which change nothing."""
    kd, adv = config.has_teacher and config.kd_weight, config.has_teacher and config.adv_weight
    is_on = {'teacher': config.has_teacher, 'progressive': config.alpha, 'memory': config.alpha,
             'kd': kd, 'temperature': kd, 'adv': adv, 'disc': adv, 'seed': adv}
    return {name: value for name, value in config.to_dict().items() if value and is_on.get(name.split('_')[0], True)}
