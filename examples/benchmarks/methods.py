"""Methods of accuracy.py, and the digest that a run is known by."""
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property

from regimes import LR, OPTIMIZER, PIXELS, REGIMES, WARMUP

from timm_aikd import AikdConfig

RECIPE = 1  # to be raised when the benchmark trains differently in a way that the digests do not see


@dataclass(frozen=True)
class Method:
    """How a student is trained."""

    options: dict  # of AI-KD, other than the defaults
    teacher: str = 'ce'  # whose student of the same seed teaches; `imagenet`: the student before its fine-tuning
    smoothing: float = 0.  # of the labels in the task loss
    epochs: float = 1  # as a multiple of the regime's; 0: the student is the teacher
    peer: str | None = None  # what trains if not AI-KD
    noisy_calibration: bool = False  # T_c is fitted on labels as noisy as the regime's
    members: int = 1  # teachers, which are students of other seeds
    mixup: bool = False  # timm's
    ema: bool = False  # evaluate timm's average of the weights


PLAIN = {'teacher': 'none', 'alpha': 0.}  # every term off
KD = {  # as timm's script distills unless told otherwise
    'alpha': 0., 'adv_weight': 0., 'teacher_temperature': 1., 'kd_weight': 1., 'temperature': 4.}
KD_TC = {**KD, 'teacher_temperature': 'auto'}
PSKD = {'teacher': 'none', 'alpha': 0.8, 'progressive_temperature': 1., 'memory': 'store'}
STORE = {'memory': 'store'}


def features(distance: float = 0., disc: float = 0., alpha: float = 0., epochs: float = 1) -> Method:
    """One phase: the teacher is the model before fine-tuning, and only its features are used."""
    return Method({
        **STORE, 'kd_weight': 0., 'teacher_temperature': 1., 'feature_weight': distance, 'adv_weight': disc,
        'disc_input': 'features', 'alpha': alpha}, teacher='imagenet', epochs=epochs)


SCRATCH = {
    'ce': Method(PLAIN),
    'ce-ts': Method(KD_TC, epochs=0, peer='TemperatureScaling'),
    'ce-long': Method(PLAIN, epochs=2),  # what a teacher costs, spent on plain training
    'ls': Method(PLAIN, smoothing=0.1),
    'kd': Method(KD),
    'kd-tc': Method(KD_TC),
    'timm-kd': Method(KD, peer='TimmDistillation'),
    'pskd': Method(PSKD),
    'pskd-ref': Method(PSKD, peer='PsKdReference'),
    'aikd-store': Method(STORE),
    'aikd-ls': Method(STORE, smoothing=0.1),  # timm's script smooths by default
    'aikd-snapshot': Method({'memory': 'snapshot'}),
    'aikd-no-kd': Method({**STORE, 'kd_weight': 0.}),
    'aikd-no-progressive': Method({**STORE, 'alpha': 0.}),
    'aikd-no-adv': Method({**STORE, 'adv_weight': 0.}),
    **{f'aikd-{loss}': Method({**STORE, 'adv_loss': loss}) for loss in ('bce', 'hinge', 'lsgan', 'wgan', 'wgan-gp')},
    'aikd-gen2': Method(STORE, teacher='aikd-store'),
    'aikd-ts': Method(KD_TC, teacher='aikd-store', epochs=0, peer='TemperatureScaling'),
    'aikd-noisy-tc': Method(STORE, noisy_calibration=True),
}
FINE_TUNED = {
    **{name: SCRATCH[name] for name in (
        'ce', 'ce-long', 'ls', 'kd-tc', 'timm-kd', 'pskd', 'aikd-store', 'aikd-no-kd', 'aikd-no-progressive',
        'aikd-no-adv')},
    'ce-half': Method(PLAIN, epochs=0.5),
    'aikd-half': Method(STORE, teacher='ce-half', epochs=0.5),
    'mixup': Method(PLAIN, mixup=True),
    'ema': Method(PLAIN, ema=True),
    'ensemble': Method(KD, epochs=0, peer='TemperatureScaling', members=3),
    'kd-3': Method(KD_TC, members=3),
    'aikd-3': Method(STORE, members=3),
    **{f'timm-features-{weight:g}': Method({**KD, 'kd_weight': weight}, teacher='imagenet', peer='TimmFeatures')
       for weight in (1., 10.)},
    **{f'distance-{weight:g}': features(weight) for weight in (0.3, 1., 3., 10.)},
    **{f'disc-features-{weight:g}': features(0., weight) for weight in (0.01, 0.03, 0.1)},
    'distance-1-disc-0.03': features(1., 0.03),
    'distance-1-progressive': features(1., alpha=0.3),
    **{f'distance-{weight:g}-half': features(weight, epochs=0.5) for weight in (1., 3.)},
    'disc-features-0.03-half': features(0., 0.03, epochs=0.5),
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
        """Of all that determines the run; the parts that came `later` than the first results only where they differ."""
        method, regime = METHODS[self.method], REGIMES[self.regime]
        what = [
            RECIPE, regime.per_class, regime.batch, regime.noise, regime.augment, self.student, self.seed, self.epochs,
            OPTIMIZER, LR[self.student], WARMUP, method.smoothing, method.peer, effective_options(self.config),
            self.teachers[0].digest if self.teachers else None, method.noisy_calibration and regime.noise > 0]
        later = {
            'pixels': regime.pixels if regime.pixels != PIXELS else None, 'imagenet': self.needs_imagenet,
            'more teachers': [teacher.digest for teacher in self.teachers[1:]],
            'mixup': method.mixup, 'ema': method.ema}
        if any(later.values()):
            what.append({name: value for name, value in later.items() if value})
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def __str__(self):
        return f'{self.regime} {self.student} {self.method} seed {self.seed}'


FIRST_OPTIONS = set(  # those of the first results; later ones count where they are not at their defaults
    'teacher teacher_model teacher_dtype teacher_size teacher_temperature kd_weight temperature alpha '
    'progressive_temperature adv_weight adv_loss adv_warmup disc_input disc_hidden disc_opt disc_lr memory memory_topk '
    'memory_dir seed'.split())


def effective_options(config: AikdConfig) -> dict:
    """All options but those of terms that are off, which change nothing."""
    kd, adv = config.has_teacher and config.kd_weight, config.has_teacher and config.adv_weight
    is_on = {'teacher': config.has_teacher, 'progressive': config.alpha, 'memory': config.alpha,
             'kd': kd, 'temperature': kd, 'adv': adv, 'disc': adv, 'seed': adv}
    defaults = AikdConfig().to_dict()
    return {name: float(value) if isinstance(value, int) else value for name, value in config.to_dict().items()
            if is_on.get(name.split('_')[0], True) and (name in FIRST_OPTIONS or value != defaults[name])}
