"""Methods of accuracy.py, and how a run trains and evaluates a student."""
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from regimes import CLASSES, PARTS, REGIMES, Images, epoch_batches, evaluation_batches
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import FeatureDistillationTask, LogitDistillationTask
from timm.utils import ModelEmaV3, random_seed
from tqdm import tqdm

from timm_aikd import AikdConfig, AikdTask, RecordFormat, StoreMemory
from timm_aikd.calibration import fit_temperature
from timm_aikd.commands.predictions import Predictions, outputs_of
from timm_aikd.teacher import Teacher, TeacherEnsemble


@dataclass(frozen=True)
class Method:
    """How a student is trained."""

    options: dict  # of AI-KD, other than the defaults
    teacher: str = 'ce-half'  # the method whose student teaches; `imagenet`: the model before its fine-tuning
    members: int = 1  # number of teachers, of the seeds s, s + 100, s + 200
    epochs: float = 1  # as a multiple of the regime's; 0: no training, the teacher is evaluated
    smoothing: float = 0.  # of the labels in the task loss
    mixup: bool = False  # timm's
    ema: bool = False  # evaluate timm's average of the weights
    timm_task: Callable | None = None  # trains in place of AI-KD


PLAIN = {'teacher': 'none', 'alpha': 0.}  # every term off
KD = {'alpha': 0., 'adv_weight': 0., 'teacher_temperature': 1., 'kd_weight': 1., 'temperature': 4.}  # timm's
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
    'kd-tc': Method({**KD, 'teacher_temperature': 'auto'}, 'ce'),
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
    'kd-3': Method({**KD, 'teacher_temperature': 'auto'}, 'ce', members=3),
    'aikd-3': Method({}, members=3),
    'aikd-disc-features': Method({'disc_input': 'features'}),
    **{f'distance-{weight:g}': Method({**FEATURES, 'feature_weight': weight}, 'imagenet') for weight in (1., 3., 10.)},
    'distance-3-half': Method({**FEATURES, 'feature_weight': 3.}, 'imagenet', epochs=0.5),
    **{name: Method({**FEATURES, **options}, 'imagenet') for name, options in {
        'distance-1-disc-0.03': {'feature_weight': 1., 'adv_weight': 0.03},
        'disc-features-0.03': {'adv_weight': 0.03},
        'disc-features-0.1': {'adv_weight': 0.1},
        'disc-features-0.1-slow': {'adv_weight': 0.1, 'disc_lr': 1e-4},
        'disc-features-0.1-small': {'adv_weight': 0.1, 'disc_hidden': (32,)},
        'disc-features-0.3-small': {'adv_weight': 0.3, 'disc_hidden': (32,)},
        'disc-features-0.1-penalty': {'adv_weight': 0.1, 'adv_loss': 'wgan-gp'}}.items()},
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


def create_task(run: Run, images: Images, teacher: nn.Module | None, device: torch.device) -> nn.Module:
    """What computes the loss of a run: its student, and all that regularises it."""
    method, config = METHODS[run.method], run.config
    random_seed(run.seed)  # NumPy's generator too, from which timm's Mixup draws
    student = REGIMES[run.regime].student().to(device)
    criterion = SoftTargetCrossEntropy() if method.mixup else nn.CrossEntropyLoss(label_smoothing=method.smoothing)
    if method.timm_task is not None:
        return method.timm_task(student, teacher, criterion, verbose=False)
    task = AikdTask(student, criterion, teacher=teacher, config=config, epochs=run.epochs)
    if task.aikd.memory is not None:
        task.aikd.use_memory(StoreMemory(RecordFormat(CLASSES), len(images['train'])))
    if config.has_teacher and config.teacher_temperature == 'auto':
        task.calibrate(evaluation_batches(images['calibration']))
    return task


def train(run: Run, images: Images, teachers: list[nn.Module], device: torch.device) -> tuple[nn.Module, list[dict]]:
    """A student of these teachers, and its rows of the results; in fine-tuning those of its best epoch too."""
    regime, method, data = REGIMES[run.regime], METHODS[run.method], images['train']
    if method.teacher == 'imagenet':
        teachers = [regime.student().to(device)]
    teacher = TeacherEnsemble(list(map(Teacher, teachers))) if len(teachers) > 1 else next(iter(teachers), None)
    if run.epochs == 0:
        return teacher, evaluate(teacher, images, PARTS)
    task, steps = create_task(run, images, teacher, device), len(data) // regime.batch
    student, is_aikd = task.get_eval_model(), isinstance(task, AikdTask)
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'adamw', regime.lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, regime.lr, run.epochs * steps, pct_start=0.1, cycle_momentum=False)
    mixup = Mixup(num_classes=CLASSES) if method.mixup else lambda *batch: batch
    ema = ModelEmaV3(student, use_warmup=True) if method.ema else None
    model = best = student if ema is None else ema.module
    lowest, seconds = 101., []
    for epoch in tqdm(range(run.epochs), '-'.join(map(str, run)), disable=None):
        if is_aikd:
            task.begin_epoch(epoch)
        start = time.process_time()  # other processes disturb it least
        for step, (input, target, index) in enumerate(epoch_batches(data, regime, run.seed, epoch), epoch * steps):
            input, target = mixup(input, target)
            task(input, target, *[index] if is_aikd else [])['loss'].backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update(student, step)
        seconds.append((time.process_time() - start) / steps)
        if is_aikd:
            task.end_epoch()
        if regime.is_fine_tuning:
            error = evaluate(model, images, ['validation'])[0]['error']
            if error < lowest:
                lowest, best = error, copy.deepcopy(model)
            student.train()
    facts = {'seconds_per_step': statistics.median(seconds)}
    if is_aikd and run.teachers:
        facts['teacher_temperature'] = task.aikd.teacher.temperature
        on_validation, on_train = evaluate(teacher, images, ['validation', 'train'])
        facts['teacher_gap'] = on_validation['error'] - on_train['error']
    rows = evaluate(model, images, PARTS) + (evaluate(best, images, PARTS, '-best') if regime.is_fine_tuning else [])
    return model, [{**row, **facts} for row in rows]


def evaluate(model: nn.Module, images: Images, parts: Sequence[str], suffix: str = '') -> list[dict]:
    """The metrics on these parts, with the suffix to their names; the temperature is fitted on one, `validation`."""
    outputs = {part: list(outputs_of(model, evaluation_batches(images[part]))) for part in parts}
    temperature = fit_temperature(*map(torch.cat, zip(*outputs['validation'], strict=True)))
    rows = []
    for part, batches in outputs.items():
        plain = Predictions.of(batches).metrics()
        scaled = Predictions.of((logits / temperature, labels) for logits, labels in batches).metrics()
        rows.append({
            **plain, 'part': part + suffix, 'error': 100 - plain['top1'],
            'nll_scaled': scaled['nll'], 'ece_scaled': scaled['ece']})
    return rows
