"""Methods of accuracy.py, and the digest that a run is known by."""
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property

from peers import Features, PsKdReference, TemperatureScaling, TimmDistillation, TimmFeatures
from regimes import OPTIMIZER, PIXELS, REGIMES, STUDENTS, WARMUP

from timm_aikd import AikdConfig
from timm_aikd.loss import ADV_LOSSES

RECIPE = 1  # to be raised when the benchmark trains differently in a way that the digests do not see


@dataclass(frozen=True)
class Method:
    """How a student is trained.

    Args:
        options: Of AI-KD, other than the defaults.
        teacher: The method whose student of the same seed is the teacher, or `imagenet`, the student before its
            fine-tuning.
        smoothing: Of the labels in the task loss.
        epochs: As a multiple of the regime's; 0: nothing is trained.
        peer: The task that trains; AI-KD's by default.
        noisy_calibration: T_c is fitted on labels as noisy as the regime's.
        members: Number of teachers, which are students of other seeds.
        mixup: As timm has it.
        ema: Evaluate timm's average of the weights.
    """

    options: dict
    teacher: str = 'ce'
    smoothing: float = 0.
    epochs: float = 1
    peer: type | None = None
    noisy_calibration: bool = False
    members: int = 1
    mixup: bool = False
    ema: bool = False


PLAIN = {'teacher': 'none', 'alpha': 0.}  # every term off
KD = {  # as timm's script distills unless told otherwise
    'alpha': 0., 'adv_weight': 0., 'teacher_temperature': 1., 'kd_weight': 1., 'temperature': 4.}
KD_TC = {**KD, 'teacher_temperature': 'auto'}
PSKD = {'teacher': 'none', 'alpha': 0.8, 'progressive_temperature': 1., 'memory': 'store'}
STORE = {'memory': 'store'}


def features(distance: float = 0., disc: float = 0.) -> Method:
    return Method({'alpha': 0., 'kd_weight': distance, 'adv_weight': disc, 'teacher_temperature': 1.},
                  teacher='imagenet', peer=Features)


SCRATCH = {
    'ce': Method(PLAIN),
    'ce-ts': Method(KD_TC, epochs=0, peer=TemperatureScaling),
    'ce-long': Method(PLAIN, epochs=2),  # what a teacher costs, spent on plain training
    'ls': Method(PLAIN, smoothing=0.1),
    'kd': Method(KD),
    'kd-tc': Method(KD_TC),
    'timm-kd': Method(KD, peer=TimmDistillation),
    'pskd': Method(PSKD),
    'pskd-ref': Method(PSKD, peer=PsKdReference),
    'aikd-store': Method(STORE),
    'aikd-ls': Method(STORE, smoothing=0.1),  # timm's script smooths by default
    'aikd-snapshot': Method({'memory': 'snapshot'}),
    'aikd-no-kd': Method({**STORE, 'kd_weight': 0.}),
    'aikd-no-progressive': Method({**STORE, 'alpha': 0.}),
    'aikd-no-adv': Method({**STORE, 'adv_weight': 0.}),
    **{f'aikd-{loss}': Method({**STORE, 'adv_loss': loss}) for loss in ADV_LOSSES},
    'aikd-gen2': Method(STORE, teacher='aikd-store'),
    'aikd-ts': Method(KD_TC, teacher='aikd-store', epochs=0, peer=TemperatureScaling),
    'aikd-noisy-tc': Method(STORE, noisy_calibration=True),
}
FINE_TUNED = {
    **{name: SCRATCH[name] for name in (
        'ce', 'ce-long', 'ls', 'kd-tc', 'timm-kd', 'pskd', 'aikd-store', 'aikd-no-kd', 'aikd-no-progressive',
        'aikd-no-adv')},
    'ce-half': Method(PLAIN, epochs=0.5),
    'mixup': Method(PLAIN, mixup=True),
    'ema': Method(PLAIN, ema=True),
    'ensemble': Method(KD, epochs=0, peer=TemperatureScaling, members=3),
    'kd-3': Method(KD_TC, members=3),
    'aikd-3': Method(STORE, members=3),
    **{f'timm-features-{weight:g}': Method({**KD, 'kd_weight': weight}, teacher='imagenet', peer=TimmFeatures)
       for weight in (1., 10.)},
    **{f'distance-{weight:g}': features(weight) for weight in (0.3, 1., 3., 10.)},
    **{f'disc-features-{weight:g}': features(0., weight) for weight in (0.01, 0.03, 0.1)},
    'distance-1-disc-0.03': features(1., 0.03),
}
METHODS = {**SCRATCH, **FINE_TUNED}


def find_method(name: str) -> Method:
    """One of the table, or AI-KD with the options in the name, `custom:JSON`."""
    return METHODS[name] if name in METHODS else Method({**STORE, **json.loads(name.partition(':')[2])})


# ------------------------------------------------------------ runs

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
        return round(max(2, round(REGIMES[self.regime].epochs * self.epochs_scale)) * find_method(self.method).epochs)

    @cached_property
    def config(self) -> AikdConfig:
        return AikdConfig(**{'seed': self.seed, **find_method(self.method).options})

    @property
    def needs_imagenet(self) -> bool:
        """Whether the teacher is the student before its fine-tuning."""
        return self.config.has_teacher and find_method(self.method).teacher == 'imagenet'

    @cached_property
    def teachers(self) -> list['Run']:
        """The runs whose students are the teacher."""
        method = find_method(self.method)
        if not self.config.has_teacher or self.needs_imagenet:
            return []
        return [replace(self, method=method.teacher, seed=self.seed + 100 * number) for number in range(method.members)]

    @cached_property
    def digest(self) -> str:
        method, regime = find_method(self.method), REGIMES[self.regime]
        what = [
            RECIPE, regime.per_class, regime.batch, regime.noise, regime.augment, self.student, self.seed, self.epochs,
            OPTIMIZER, STUDENTS[self.student].lr, WARMUP, method.smoothing, getattr(method.peer, '__name__', None),
            effective_options(self.config), self.teachers[0].digest if self.teachers else None,
            method.noisy_calibration and regime.noise > 0]
        later = {  # than the first results, which do not have them
            'pixels': regime.pixels if regime.pixels != PIXELS else None,
            'imagenet': self.needs_imagenet,
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
    off, defaults = set(), AikdConfig().to_dict()
    if config.alpha == 0:
        off |= {'progressive', 'memory'}
    if not config.has_teacher:
        off |= {'teacher'}
    if not config.has_teacher or config.kd_weight == 0:
        off |= {'kd', 'temperature'}
    if not config.has_teacher or config.adv_weight == 0:
        off |= {'adv', 'disc', 'seed'}
    options = {
        name: value for name, value in config.to_dict().items()
        if name.split('_')[0] not in off and (name in FIRST_OPTIONS or value != defaults[name])}
    return {name: float(value) if isinstance(value, int) else value for name, value in options.items()}
