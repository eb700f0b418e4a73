"""One run of accuracy.py: its task, its training and its evaluation."""
import copy
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from images import epoch_batches, evaluation_batches
from methods import KD, METHODS, Run
from regimes import CLASSES, LR, OPTIMIZER, REGIMES, STUDENTS, WARMUP
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import FeatureDistillationTask, LogitDistillationTask
from timm.utils import ModelEmaV3
from torch.utils.data import TensorDataset
from tqdm import tqdm

from timm_aikd import AikdTask, RecordFormat, StoreMemory
from timm_aikd.calibration import area_under_risk_coverage, expected_calibration_error
from timm_aikd.loss import top1
from timm_aikd.teacher import Teacher, TeacherEnsemble

TIMM = {  # peers of a method
    'TimmDistillation': partial(LogitDistillationTask, temperature=KD['temperature']),
    'TimmFeatures': FeatureDistillationTask}  # by their squared distance


def load_teacher(run: Run, weights: list[Path], device: torch.device) -> nn.Module | None:
    """The model before fine-tuning, or the students that these files are of."""
    models = [STUDENTS[run.student]().to(device) for _ in weights or range(run.needs_imagenet)]
    for model, path in zip(models, weights, strict=False):
        model.load_state_dict(torch.load(path, weights_only=True))
    if len(models) > 1:
        return TeacherEnsemble([Teacher(model) for model in models])
    return models[0] if models else None


def create_task(
        run: Run, images: dict[str, TensorDataset], teacher: nn.Module | None, device: torch.device) -> nn.Module:
    """What computes the loss of a run: its student, and all that regularises it."""
    method, config = METHODS[run.method], run.config
    torch.manual_seed(run.seed)
    student = STUDENTS[run.student]().to(device)
    criterion = SoftTargetCrossEntropy() if method.mixup else nn.CrossEntropyLoss(label_smoothing=method.smoothing)
    if method.peer in TIMM:
        return TIMM[method.peer](student, teacher, criterion, distill_loss_weight=config.kd_weight, verbose=False)
    task = AikdTask(student, criterion, teacher=teacher, config=config, epochs=run.epochs)
    if task.aikd.memory is not None and config.memory == 'store':
        task.aikd.use_memory(StoreMemory(RecordFormat(CLASSES), len(images['train'])))
    if config.has_teacher and config.teacher_temperature == 'auto':
        task.calibrate(evaluation_batches(images['calibration']))
    return task


def train(run: Run, images: dict[str, TensorDataset], teacher: nn.Module | None,
          device: torch.device) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Train a student; one of no epochs is the teacher.

    Returns:
        The models by the suffix of the parts that they are evaluated under, and what else is known of the run.
    """
    regime, method, config, facts = REGIMES[run.regime], METHODS[run.method], run.config, {}
    if run.epochs == 0:
        return {'': teacher}, facts
    task, data, lr = create_task(run, images, teacher, device), images['train'], LR[run.student]
    model, steps, is_timm = task.get_eval_model(), len(data) // regime.batch, method.peer in TIMM
    optimizer = create_optimizer_v2(task.get_trainable_module(), lr=lr, **OPTIMIZER)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, run.epochs * steps, pct_start=WARMUP, cycle_momentum=False)
    mixup = Mixup(num_classes=CLASSES) if method.mixup else None
    ema = ModelEmaV3(model, use_warmup=True) if method.ema else None
    models, best = {'': ema.module if ema is not None else model}, -1.
    seconds, metrics = [], []
    for epoch in tqdm(range(run.epochs), str(run), disable=None):
        if not is_timm:
            task.begin_epoch(epoch)
        np.random.seed(1000 * run.seed + epoch)  # timm's Mixup draws from it
        start = time.process_time()  # other processes disturb it least
        for step, (input, target, index) in enumerate(epoch_batches(data, regime, run.seed, epoch), epoch * steps):
            if mixup is not None:
                input, target = mixup(input, target)
            task(input, target, *[] if is_timm else [index])['loss'].backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update(model, step)
        seconds.append((time.process_time() - start) / steps)
        if isinstance(task, AikdTask):
            metrics.append(task.end_epoch())
        if regime.is_fine_tuning:
            logits, labels = answers(models[''], images['validation'])
            accuracy = (logits.argmax(-1) == labels).double().mean().item()
            if accuracy > best:
                best, facts['best_epoch'], models['-best'] = accuracy, epoch, copy.deepcopy(models[''])
            model.train()
    facts['seconds_per_step'] = statistics.median(seconds)
    if metrics and config.has_teacher and not run.needs_imagenet:
        facts.update(teacher_temperature=task.aikd.teacher.temperature, teacher_top1=metrics[0]['teacher_top1'])
    if metrics and config.has_teacher and config.adv_weight > 0:
        for when, epoch in (('first', 0), ('middle', run.epochs // 2), ('last', -1)):
            facts[f'disc_{when}'] = metrics[epoch]['disc_accuracy']
    return models, facts


@torch.inference_mode()
def answers(model: nn.Module, images: TensorDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels."""
    model.eval()
    return torch.cat([model(input) for input, _ in evaluation_batches(images)]), images.tensors[1]


def evaluate(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> dict[str, float]:
    """The values of `METRICS`; the scaled ones at this temperature."""
    confidence, correct = top1(logits, labels)
    return {
        'error': 100 - 100 * correct.double().mean().item(),
        'nll': F.cross_entropy(logits.double(), labels).item(),
        'ece': expected_calibration_error(confidence, correct),
        'aurc': area_under_risk_coverage(confidence, correct),
        'nll_scaled': F.cross_entropy(logits.double() / temperature, labels).item(),
        'ece_scaled': expected_calibration_error(*top1(logits / temperature, labels)),
    }
