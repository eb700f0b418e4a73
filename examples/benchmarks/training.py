"""One run of accuracy.py: its task, its training and its evaluation."""
import copy
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
from methods import METHODS, Run
from regimes import CLASSES, PARTS, REGIMES, epoch_batches, evaluation_batches
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.utils.data import TensorDataset
from tqdm import tqdm

from timm_aikd import AikdTask, RecordFormat, StoreMemory
from timm_aikd.calibration import fit_temperature
from timm_aikd.commands.predictions import Predictions, outputs_of
from timm_aikd.teacher import Teacher, TeacherEnsemble


def create_teacher(run: Run, weights: list[dict], device: torch.device) -> nn.Module | None:
    """The students that have these weights, or the model before fine-tuning."""
    count = len(weights) or METHODS[run.method].teacher == 'imagenet'
    models = [REGIMES[run.regime].student().to(device) for _ in range(count)]
    for model, of_model in zip(models, weights, strict=False):
        model.load_state_dict(of_model)
    return TeacherEnsemble([Teacher(model) for model in models]) if count > 1 else next(iter(models), None)


def create_task(
        run: Run, images: dict[str, TensorDataset], teacher: nn.Module | None, device: torch.device) -> nn.Module:
    """What computes the loss of a run: its student, and all that regularises it."""
    method, config = METHODS[run.method], run.config
    torch.manual_seed(run.seed)
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


def train(run: Run, images: dict[str, TensorDataset], teacher: nn.Module | None,
          device: torch.device) -> tuple[nn.Module, list[dict]]:
    """A trained student, and its rows of the results; in fine-tuning those of its best epoch too."""
    if run.epochs == 0:
        return teacher, evaluate(teacher, images, PARTS)
    regime, method, data = REGIMES[run.regime], METHODS[run.method], images['train']
    task, steps = create_task(run, images, teacher, device), len(data) // regime.batch
    student, is_aikd = task.get_eval_model(), isinstance(task, AikdTask)
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'adamw', regime.lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, regime.lr, run.epochs * steps, pct_start=0.1, cycle_momentum=False)
    mixup = Mixup(num_classes=CLASSES) if method.mixup else None
    ema = ModelEmaV3(student, use_warmup=True) if method.ema else None
    model = best = student if ema is None else ema.module
    lowest, seconds = 101., []
    for epoch in tqdm(range(run.epochs), '-'.join(map(str, run)), disable=None):
        if is_aikd:
            task.begin_epoch(epoch)
        np.random.seed(1000 * run.seed + epoch)  # timm's Mixup draws from it
        start = time.process_time()  # other processes disturb it least
        for step, (input, target, index) in enumerate(epoch_batches(data, regime, run.seed, epoch), epoch * steps):
            if mixup is not None:
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


def evaluate(model: nn.Module, images: dict[str, TensorDataset], parts: Sequence[str], suffix: str = '') -> list[dict]:
    """The metrics on these parts, whose names get the suffix; the temperature fits one of them, validation."""
    outputs = {}
    for part in parts:
        logits, labels = zip(*outputs_of(model, evaluation_batches(images[part])), strict=True)
        outputs[part] = torch.cat(logits), torch.cat(labels)
    temperature = fit_temperature(*outputs['validation'])
    rows = []
    for part, (logits, labels) in outputs.items():
        plain, scaled = (Predictions.of([(logits / divisor, labels)]).metrics() for divisor in (1., temperature))
        rows.append({
            'part': part + suffix, 'error': 100 - plain['top1'], 'nll': plain['nll'], 'ece': plain['ece'],
            'aurc': plain['aurc'], 'nll_scaled': scaled['nll'], 'ece_scaled': scaled['ece']})
    return rows
