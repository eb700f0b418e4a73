"""One run of accuracy.py: its task, its training and its evaluation."""
import copy
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from images import epoch_batches, evaluation_batches, with_noise
from methods import Run, find_method
from peers import Aikd
from regimes import CLASSES, OPTIMIZER, REGIMES, STUDENTS, WARMUP
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.utils.data import TensorDataset
from tqdm import tqdm

from timm_aikd.calibration import area_under_risk_coverage, expected_calibration_error
from timm_aikd.loss import top1
from timm_aikd.teacher import Teacher, TeacherEnsemble


def load_teacher(run: Run, weights: Callable[[Run], Path], device: torch.device) -> nn.Module | None:
    create, models = STUDENTS[run.student].create, []
    if run.needs_imagenet:
        return create().to(device)
    for teacher in run.teachers:
        model = create()
        model.load_state_dict(torch.load(weights(teacher), weights_only=True))
        models.append(model.to(device))
    if len(models) > 1:
        return TeacherEnsemble([Teacher(model) for model in models])
    return models[0] if models else None


def create_task(
        run: Run, images: dict[str, TensorDataset], teacher: nn.Module | None, device: torch.device) -> nn.Module:
    """What computes the loss of a run: its student, and all that regularises it."""
    method = find_method(run.method)
    torch.manual_seed(run.seed)
    student = STUDENTS[run.student].create().to(device)
    if method.mixup:
        criterion = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(method.smoothing) if method.smoothing else nn.CrossEntropyLoss()
    task = (method.peer or Aikd)(student, criterion, teacher, run.config, run.epochs, len(images['train']))
    if run.config.has_teacher and run.config.teacher_temperature == 'auto':
        pixels, labels = images['calibration'].tensors
        noise = REGIMES[run.regime].noise if method.noisy_calibration else 0.
        task.calibrate(evaluation_batches(TensorDataset(pixels, with_noise(labels.cpu(), noise).to(device))))
    return task


def train(task: nn.Module, run: Run, images: dict[str, TensorDataset], bar: tqdm) -> tuple[dict, dict[str, nn.Module]]:
    """Train the task's student.

    Returns:
        For each epoch what the task says and the CPU seconds of a step; and the models by the suffix of the parts that
        they are evaluated under.
    """
    regime, method = REGIMES[run.regime], find_method(run.method)
    curves, model = defaultdict(list), task.get_eval_model()
    models = {'': model}
    if run.epochs == 0:
        return curves, models
    data, lr = images['train'], STUDENTS[run.student].lr
    steps = len(data) // regime.batch
    optimizer = create_optimizer_v2(task.get_trainable_module(), lr=lr, **OPTIMIZER)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, run.epochs * steps, pct_start=WARMUP, cycle_momentum=False)
    mixup = Mixup(num_classes=CLASSES) if method.mixup else None
    ema = ModelEmaV3(model, use_warmup=True) if method.ema else None
    if ema is not None:
        models[''] = ema.module
    for epoch in range(run.epochs):
        task.begin_epoch(epoch)
        np.random.seed(1000 * run.seed + epoch)  # timm's Mixup draws from it
        start = time.process_time()  # other processes disturb it least
        for step, (input, target, index) in enumerate(epoch_batches(data, regime, run.seed, epoch), epoch * steps):
            if mixup is not None:
                input, target = mixup(input, target)
            task(input, target, index)['loss'].backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update(model, step)
        curves['seconds_per_step'].append((time.process_time() - start) / steps)
        for name, value in task.end_epoch().items():
            curves[name].append(value)
        if regime.is_fine_tuning:
            keep_best(models, epoch, images['validation'], curves)
            model.train()
        bar.update(len(data))
    return curves, models


def keep_best(models: dict[str, nn.Module], epoch: int, images: TensorDataset, curves: dict[str, list]) -> None:
    """Copy the model where its top-1 is the best so far."""
    logits, labels = answers(models[''], images)
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    if accuracy > max(curves['best'], default=-1.):
        models['-best'] = copy.deepcopy(models[''])
        curves['best'].append(accuracy)
        curves['best_epoch'] = [epoch]


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
