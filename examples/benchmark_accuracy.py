#!/usr/bin/env python3
"""What AI-KD gains, and whether it is noise: Fashion-MNIST, four regimes, two students, all methods on one footing.

    apt install dataset-fashion-mnist && pip install 'timm-aikd[examples]'
    python examples/benchmark_accuracy.py --shard 1/2      # hours; start 2/2 beside it, stop and start again at will
    python examples/benchmark_accuracy.py --report         # Markdown tables and PNG plots of the runs that are there
    python examples/benchmark_accuracy.py --sweep          # options one at a time, judged on validation images
    python examples/benchmark_accuracy.py --quick          # for CI: does it run, and does AI-KD beat plain training?

For every regime, student and seed, plain training (`ce`) is phase 1, and its last weights are the teacher. All methods
start from the same initial weights, see the same batches and use the same optimizer, so that differences are paired.
The 60,000 training images, in a fixed order, are the pool that the regimes draw from (50,000), images to fit T_c on
(2,000) and validation images (8,000), whose labels are always the true ones; the 10,000 test images are for
`--part test` alone.

A run is known by a digest of all that determines it, the defaults of its options included, and not by its method's
name: what is in the results is not done again, and what a changed default affects is. New code of the package that
trains differently with the same options calls for new --results.
"""
import argparse
import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import platform
import statistics
import struct
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask
from torch.utils.data import TensorDataset
from tqdm import tqdm

import timm_aikd
from timm_aikd import AikdConfig, AikdError, AikdTask, RecordFormat, StoreMemory
from timm_aikd.calibration import (
    area_under_risk_coverage,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)
from timm_aikd.loss import ADV_LOSSES, DISC_INPUTS, top1
from timm_aikd.plots import reliability_diagram

try:
    from matplotlib.figure import Figure
    from scipy.stats import t as student_t
except ImportError as error:
    sys.exit(f'{error}: pip install "timm-aikd[examples]"')

# ------------------------------------------------------------ what is compared

RECIPE = 1  # to be raised when this script trains differently in a way that the digests do not see
CLASSES, PIXELS, MEAN, STD = 10, 28, 72.9, 90.  # the last two are of the training images' pixels, 0 to 255
OPTIMIZER = {'opt': 'adamw', 'weight_decay': 0.05, 'fused': True}
WARMUP = 0.1  # share of the steps; then a cosine


@dataclass(frozen=True)
class Regime:
    """Training images and budget, the same images and labels for every seed."""

    per_class: int | None  # the pool's first images of each class; None: the whole pool
    epochs: int
    batch: int  # divides the number of images
    seeds: int = 5
    noise: float = 0.  # share of the labels replaced by one drawn uniformly from all ten: a tenth of them stays true
    augment: bool = False  # flip, and crop after a padding of 2 pixels


REGIMES = {
    'small': Regime(100, epochs=60, batch=50),
    'noisy': Regime(300, epochs=40, batch=100, noise=0.3),
    'underfit': Regime(200, epochs=30, batch=50, augment=True),
    'full': Regime(None, epochs=8, batch=100, seeds=2, augment=True),
}


def resnet8() -> nn.Module:
    """timm's ResNet as it is for CIFAR: a 3x3 stem, no pooling, three stages of one block."""
    model = timm.create_model(
        'resnet10t', num_classes=CLASSES, in_chans=1, layers=(1, 1, 1), channels=(16, 32, 64), stem_type='deep',
        stem_width=8, avg_down=False)
    model.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
    model.maxpool = model.layer4 = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def vit() -> nn.Module:
    """timm's ViT on 16 patches."""
    return timm.create_model(
        'test_vit', num_classes=CLASSES, in_chans=1, img_size=PIXELS, patch_size=7, dynamic_img_size=False,
        embed_dim=48, depth=4, num_heads=3, class_token=False, global_pool='avg')


@dataclass(frozen=True)
class Student:
    """An architecture, and a learning rate picked for its plain training on validation images of `small`."""

    create: Callable[[], nn.Module]
    lr: float


STUDENTS = {'resnet': Student(resnet8, lr=3e-3), 'vit': Student(vit, lr=1e-3)}


class Peer:
    """The verbs of `AikdTask` for tasks that are not ours."""

    def begin_epoch(self, epoch):
        self.epoch = epoch

    def end_epoch(self):
        return {}


class TimmDistillation(Peer, LogitDistillationTask):
    """timm's own distillation."""

    def __init__(self, student, criterion, teacher, config, epochs, samples):
        super().__init__(
            student, teacher, criterion, distill_loss_weight=config.kd_weight, temperature=config.temperature,
            verbose=False)

    def forward(self, input, target, index):
        return super().forward(input, target)


class PsKdReference(Peer, ClassificationTask):
    """PS-KD (https://arxiv.org/abs/2006.12000) written plainly: a blended target, a dense table of probabilities."""

    def __init__(self, student, criterion, teacher, config, epochs, samples):
        super().__init__(student, criterion, verbose=False)
        self.alpha_final, self.epochs, self.past = config.alpha, epochs, torch.zeros(samples, CLASSES)

    def forward(self, input, target, index):
        alpha = self.alpha_final * (self.epoch + 1) / self.epochs if self.epoch > 0 else 0.
        output = self.trainable_module(input)
        blended = (1 - alpha) * F.one_hot(target, CLASSES) + alpha * self.past[index]
        self.past[index] = output.detach().softmax(-1)
        return {'loss': F.cross_entropy(output, blended)}


@torch.no_grad()
def best_temperature(model: nn.Module, batches) -> float:
    logits, labels = zip(*((model(input), target) for input, target in batches), strict=True)
    return fit_temperature(torch.cat(logits), torch.cat(labels))


class Scaled(nn.Module):
    """A model with its logits divided by T_c."""

    def __init__(self, model, temperature=1.):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, input):
        return self.model(input) / self.temperature


class TemperatureScaling(Peer, ClassificationTask):
    """Nothing is trained: the student is the teacher, calibrated (https://arxiv.org/abs/1706.04599)."""

    def __init__(self, student, criterion, teacher, config, epochs, samples):
        super().__init__(Scaled(teacher.eval()), criterion, verbose=False)

    def calibrate(self, batches):
        self.trainable_module.temperature = best_temperature(self.trainable_module, batches)


@dataclass(frozen=True)
class Method:
    """How a student is trained: `options` other than the defaults, the method whose student (of the same seed) is the
    teacher, label `smoothing` of the task loss, `epochs` as a multiple of the regime's (0: not at all), a `peer` in
    AikdTask's place, and T_c fitted on labels as noisy as the regime's.
    """

    options: dict
    teacher: str = 'ce'
    smoothing: float = 0.
    epochs: int = 1
    peer: Callable | None = None
    noisy_calibration: bool = False


PLAIN = {'teacher': 'none', 'alpha': 0.}  # every term off
KD = {  # as timm's script distills unless told otherwise
    'alpha': 0., 'adv_weight': 0., 'teacher_temperature': 1., 'kd_weight': 1., 'temperature': 4.}
KD_TC = {**KD, 'teacher_temperature': 'auto'}
PSKD = {'teacher': 'none', 'alpha': 0.8, 'progressive_temperature': 1., 'memory': 'store'}
STORE = {'memory': 'store'}

METHODS = {
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
REFERENCES = ('ce', 'ce-ts', 'ce-long', 'ls', 'kd', 'pskd')  # what the others are compared with

GRID = {  # values of a sweep, one option at a time
    'teacher_temperature': (1., 1.5, 2., 3., 'auto'),
    'kd_weight': (0., 0.5, 1., 2., 4.),
    'temperature': (1., 2., 4.),
    'alpha': (0., 0.3, 0.5, 0.8, 1.),
    'progressive_temperature': (1., 2., 4.),
    'adv_weight': (0., 0.01, 0.1, 0.3),
    'adv_loss': ADV_LOSSES,
    'adv_warmup': (0., 5., 20.),
    'disc_input': DISC_INPUTS,
    'disc_lr': (1e-4, 1e-3, 1e-2),
}
SWEEP_SEEDS = 3


def find_method(name: str) -> Method:
    """One of the table, or AI-KD with the options in the name, `sweep:JSON` or `custom:JSON`."""
    return METHODS[name] if name in METHODS else Method({**STORE, **json.loads(name.partition(':')[2])})


def sweep_names(base: dict, options: list[str]) -> list[str]:
    """The base first, then what differs from it in one option."""
    points = [base, *({**base, option: value} for option in options for value in GRID[option])]
    different: dict[str, dict] = {}
    for point in points:
        different.setdefault(json.dumps(effective_options(AikdConfig(**STORE, **point))), point)
    return [f'sweep:{json.dumps(point, sort_keys=True)}' for point in different.values()]


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
        return max(2, round(REGIMES[self.regime].epochs * self.epochs_scale)) * find_method(self.method).epochs

    @cached_property
    def config(self) -> AikdConfig:
        return AikdConfig(**{'seed': self.seed, **find_method(self.method).options})

    @cached_property
    def teacher(self) -> 'Run | None':
        return replace(self, method=find_method(self.method).teacher) if self.config.has_teacher else None

    @cached_property
    def digest(self) -> str:
        method, regime = find_method(self.method), REGIMES[self.regime]
        what = [
            RECIPE, regime.per_class, regime.batch, regime.noise, regime.augment, self.student, self.seed, self.epochs,
            OPTIMIZER, STUDENTS[self.student].lr, WARMUP, method.smoothing, getattr(method.peer, '__name__', None),
            effective_options(self.config), self.teacher.digest if self.teacher else None,
            method.noisy_calibration and regime.noise > 0]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def __str__(self):
        return f'{self.regime} {self.student} {self.method} seed {self.seed}'


def effective_options(config: AikdConfig) -> dict:
    """All options but those of terms that are off, which change nothing."""
    off = set()
    if config.alpha == 0:
        off |= {'progressive', 'memory'}
    if not config.has_teacher:
        off |= {'teacher'}
    if not config.has_teacher or config.kd_weight == 0:
        off |= {'kd', 'temperature'}
    if not config.has_teacher or config.adv_weight == 0:
        off |= {'adv', 'disc', 'seed'}
    options = {name: value for name, value in config.to_dict().items() if name.split('_')[0] not in off}
    return {name: float(value) if isinstance(value, int) else value for name, value in options.items()}


# ------------------------------------------------------------ images: pixels [N, 1, 28, 28] of uint8, labels [N]

def read_idx(folder: Path, name: str) -> torch.Tensor:
    """A file of the MNIST family: number of dimensions, their sizes, bytes."""
    for path, opener in ((folder / name, open), (folder / f'{name}.gz', gzip.open)):
        if path.is_file():
            with opener(path, 'rb') as file:
                data = file.read()
            start = 4 + 4 * data[3]
            return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).view(
                struct.unpack(f'>{data[3]}I', data[4:start]))
    sys.exit(f'error: no {name}[.gz] in {folder}: apt install dataset-fashion-mnist, or give --data a folder with the '
             f'four files of https://github.com/zalandoresearch/fashion-mnist (data/fashion)')


def load_images(folder: Path) -> dict[str, TensorDataset]:
    """All images by their use."""
    train, test = (
        TensorDataset(read_idx(folder, f'{name}-images-idx3-ubyte').unsqueeze(1),
                      read_idx(folder, f'{name}-labels-idx1-ubyte').long()) for name in ('train', 't10k'))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    parts = zip(('pool', 'calibration', 'validation'), order.split([50_000, 2_000, 8_000]), strict=True)
    return {'test': test, **{part: TensorDataset(*train[index]) for part, index in parts}}


def training_images(regime: Regime, pool: TensorDataset) -> TensorDataset:
    """What a regime trains on, the same for all seeds and methods."""
    if regime.per_class is None:
        return pool
    pixels, labels = pool[torch.cat(
        [(pool.tensors[1] == label).nonzero()[:regime.per_class, 0] for label in range(CLASSES)])]
    return TensorDataset(pixels, with_noise(labels, regime.noise))


def with_noise(labels: torch.Tensor, share: float) -> torch.Tensor:
    """A copy in which so many labels, the same ones each time, are drawn anew."""
    labels, generator = labels.clone(), torch.Generator().manual_seed(0)
    replaced = torch.randperm(len(labels), generator=generator)[:round(share * len(labels))]
    labels[replaced] = torch.randint(CLASSES, (len(replaced),), generator=generator)
    return labels


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float().sub_(MEAN).div_(STD)


def flip_and_crop(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count = len(pixels)
    flip = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    windows = F.pad(torch.where(flip, pixels.flip(-1), pixels), [2] * 4).unfold(2, PIXELS, 1).unfold(3, PIXELS, 1)
    top, left = torch.randint(5, (2, count), generator=generator)
    return windows[torch.arange(count), :, top, left]


def epoch_batches(images: TensorDataset, regime: Regime, seed: int, epoch: int):
    """Input, target and index of an epoch's batches; they depend on nothing else."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    for index in torch.randperm(len(images), generator=generator).split(regime.batch):
        pixels, target = images[index]
        yield normalise(flip_and_crop(pixels, generator) if regime.augment else pixels), target, index


def evaluation_batches(images: TensorDataset):
    """Input and target of all images in turn."""
    pixels, labels = images.tensors
    return zip(map(normalise, pixels.split(1000)), labels.split(1000), strict=True)


# ------------------------------------------------------------ one run

def create_aikd(student, criterion, teacher, config, epochs, samples) -> AikdTask:
    task = AikdTask(student, criterion, teacher=teacher, config=config, epochs=epochs, verbose=False)
    if task.aikd.memory is not None and config.memory == 'store':
        task.aikd.use_memory(StoreMemory(RecordFormat(CLASSES), samples))
    return task


def create_task(run: Run, images: dict[str, TensorDataset], samples: int, teacher_weights: Path | None) -> nn.Module:
    """What computes the loss of a run: its student, and all that regularises it."""
    method, teacher = find_method(run.method), None
    if teacher_weights is not None:
        teacher = STUDENTS[run.student].create()
        teacher.load_state_dict(torch.load(teacher_weights, weights_only=True))
    torch.manual_seed(run.seed)
    student = STUDENTS[run.student].create()
    criterion = LabelSmoothingCrossEntropy(method.smoothing) if method.smoothing else nn.CrossEntropyLoss()
    create = method.peer or create_aikd
    task = create(student, criterion, teacher, run.config, run.epochs, samples)
    if run.teacher and run.config.teacher_temperature == 'auto':
        pixels, labels = images['calibration'].tensors
        noise = REGIMES[run.regime].noise if method.noisy_calibration else 0.
        task.calibrate(evaluation_batches(TensorDataset(pixels, with_noise(labels, noise))))
    return task


def train(task: nn.Module, run: Run, images: TensorDataset, bar: tqdm) -> dict[str, list[float]]:
    """Train the task's student; what the task says of each epoch, and the CPU seconds of its steps."""
    curves = defaultdict(list)
    if run.epochs == 0:
        return curves
    regime, lr = REGIMES[run.regime], STUDENTS[run.student].lr
    steps = len(images) // regime.batch
    optimizer = create_optimizer_v2(task.get_trainable_module(), lr=lr, **OPTIMIZER)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, run.epochs * steps, pct_start=WARMUP, cycle_momentum=False)
    for epoch in range(run.epochs):
        task.begin_epoch(epoch)
        start = time.process_time()  # other processes disturb it least
        for input, target, index in epoch_batches(images, regime, run.seed, epoch):
            task(input, target, index)['loss'].backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        curves['seconds_per_step'].append((time.process_time() - start) / steps)
        for name, value in task.end_epoch().items():
            curves[name].append(value)
        bar.update(len(images))
    return curves


@torch.inference_mode()
def evaluate(model: nn.Module, images: TensorDataset) -> tuple[dict[str, float], list[list[float]]]:
    """The values of `METRICS`; share, confidence and accuracy of the reliability bins."""
    model.eval()
    logits, labels = torch.cat([model(input) for input, _ in evaluation_batches(images)]), images.tensors[1]
    confidence, correct = top1(logits, labels)
    return {
        'error': 100 - 100 * correct.double().mean().item(),
        'nll': F.cross_entropy(logits.double(), labels).item(),
        'ece': expected_calibration_error(confidence, correct),
        'aurc': area_under_risk_coverage(confidence, correct),
    }, [values.tolist() for values in reliability_bins(confidence, correct)]


# ------------------------------------------------------------ results

PARTS = ('test', 'validation')
METRICS = {'error': ('error %', '.2f'), 'nll': ('NLL', '.3f'), 'ece': ('ECE %', '.2f'), 'aurc': ('AURC', '.1f')}
SUMMARY = ('error', 'nll', 'ece')
DISC = ('disc_first', 'disc_middle', 'disc_last')  # the discriminator's accuracy in these epochs
NUMBERS = (*METRICS, 'teacher_temperature', 'seconds_per_step', *DISC)
COLUMNS = ('regime', 'student', 'method', 'seed', 'part', 'options', *NUMBERS, 'epochs', 'digest', 'environment')


def result_row(run: Run, part: str, metrics: dict, curves: dict, task: nn.Module) -> dict:
    accuracy = curves['disc_accuracy'] if run.teacher and run.config.adv_weight > 0 else []
    return {
        'regime': run.regime, 'student': run.student, 'method': run.method, 'seed': run.seed, 'part': part,
        'options': json.dumps(find_method(run.method).options, sort_keys=True), **metrics,
        'teacher_temperature': (
            task.aikd.teacher.temperature if run.teacher and isinstance(task, AikdTask) else math.nan),
        'seconds_per_step': statistics.median(curves['seconds_per_step'] or [math.nan]),
        **dict(zip(DISC, [accuracy[0], accuracy[run.epochs // 2], accuracy[-1]] if accuracy else [math.nan] * 3,
                   strict=True)),
        'epochs': run.epochs, 'digest': run.digest,
        'environment': f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), Python '
                       f'{platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, timm-aikd '
                       f'{timm_aikd.__version__}'}


class Results:
    """The CSV of finished runs; beside it their curves (.jsonl) and the weights of teachers (.weights)."""

    def __init__(self, path: Path):
        self.path, self.details_path = path, path.with_suffix('.jsonl')
        try:
            with open(path, 'x') as file:
                file.write(','.join(COLUMNS) + '\n')
        except FileExistsError:
            pass
        with open(path, newline='') as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                sys.exit(f'error: {path} has other columns than this script writes: give --results another file')
            self.rows = {
                (row['digest'], row['part']): {**row, **{name: float(row[name]) for name in NUMBERS}} for row in reader}

    def details(self) -> dict[tuple[str, str], dict]:
        """Curves and bins."""
        with open(self.details_path) as file:
            return {(entry['digest'], entry['part']): entry for entry in map(json.loads, file)}

    def weights(self, run: Run) -> Path:
        return self.path.with_suffix('.weights') / f'{run.digest}.pt'

    def add(self, run: Run, row: dict, curves: dict, bins: list, model: nn.Module) -> None:
        """Keep a run; its row comes last, for it says that all the rest is there."""
        if run.method in {method.teacher for method in METHODS.values()}:
            path = self.weights(run)
            path.parent.mkdir(exist_ok=True)
            torch.save(model.state_dict(), f'{path}.tmp')
            os.replace(f'{path}.tmp', path)
        key = row['digest'], row['part']
        if key not in self.rows:  # else only the weights were gone
            rounded = {name: [float(f'{value:.4g}') for value in values] for name, values in curves.items()}
            details = json.dumps({'digest': key[0], 'part': key[1], 'curves': rounded, 'bins': bins})
            line = io.StringIO()
            csv.DictWriter(line, COLUMNS, lineterminator='').writerow(row)
            for path, text in ((self.details_path, details), (self.path, line.getvalue())):
                with open(path, 'ab', buffering=0) as file:  # appends in one write: another shard may do so too
                    file.write(f'{text}\n'.encode())
            self.rows[key] = row


def pending(runs: list[Run], part: str, results: Results) -> list[Run]:
    """What is to be trained, every teacher before its students."""
    order: dict[Run, None] = {}

    def need(run: Run) -> None:
        if run.teacher is not None and not results.weights(run.teacher).exists():
            need(run.teacher)
        order.setdefault(run)

    seen = {digest for digest, known_part in results.rows if known_part == part}
    for run in runs:
        if run.digest not in seen:
            need(run)
            seen.add(run.digest)
    return list(order)


def train_all(runs: list[Run], part: str, folder: Path, results: Results) -> None:
    """Train, evaluate and keep whatever is missing."""
    todo, images = pending(runs, part, results), load_images(folder)
    train_sets = {name: training_images(regime, images['pool']) for name, regime in REGIMES.items()}
    with tqdm(total=sum(run.epochs * len(train_sets[run.regime]) for run in todo), unit=' img', unit_scale=True) as bar:
        for run in todo:
            bar.set_description(str(run))
            data = train_sets[run.regime]
            task = create_task(run, images, len(data), results.weights(run.teacher) if run.teacher else None)
            curves, model = train(task, run, data, bar), task.get_trainable_module()
            is_swept = run.method.startswith('sweep:')
            for each in (part,) if is_swept else (*(other for other in PARTS if other != part), part):
                metrics, bins = evaluate(model, images[each])  # one training serves both
                results.add(run, result_row(run, each, metrics, curves, task), curves, bins, model)
            bar.write(f'{run}: ' + ', '.join(
                f'{label} {metrics[name]:{form}}' for name, (label, form) in METRICS.items()))


# ------------------------------------------------------------ report

def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation."""
    values = [value for value in values if not math.isnan(value)]
    deviation = f' ± {statistics.stdev(values):{form}}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{form}}{deviation}' if values else ''


def half_width(values: list[float]) -> float:
    """Of the 95 % t-interval of the mean; infinite for one value."""
    if len(values) < 2:
        return math.inf
    return student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def paired(ours: dict, theirs: dict, metric: str) -> tuple[float, float]:
    """Mean of the differences, over the seeds that both have, and half of its 95 % interval."""
    values = [ours[seed][metric] - theirs[seed][metric] for seed in ours if seed in theirs]
    return statistics.mean(values), half_width(values)


def difference(ours: dict, theirs: dict, metric: str) -> str:
    (mean, half), form = paired(ours, theirs, metric), METRICS[metric][1]
    mark = '**' if abs(mean) > half else ''
    return f'{mark}{mean:+{form}} ± {half:{form}}{mark}'


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f'\n{title}\n')
    for cells in (header, ['---'] * len(header), *rows):
        print(f'| {" | ".join(cells)} |')


def print_tables(title: str, methods: dict[str, dict[int, dict]], references: list[str]) -> None:
    """Every method by itself, then its differences from each reference; `methods` is name -> seed -> row."""
    labels, plain = [label for label, _ in METRICS.values()], methods.get(references[0], {})
    rows = []
    for name, by_seed in methods.items():
        def column(key, form, by_seed=by_seed):
            return spread([row[key] for row in by_seed.values()], form)
        rows.append([
            name, str(len(by_seed)), *(column(metric, form) for metric, (_, form) in METRICS.items()),
            column('teacher_temperature', '.2f'),
            ' / '.join(filter(None, (column(when, '.2f').split(' ')[0] for when in DISC))),
            spread([row['seconds_per_step'] / plain[seed]['seconds_per_step']
                    for seed, row in by_seed.items() if seed in plain], '.2f')])
    print_table(f'## {title}\n\nMean ± standard deviation; step time in CPU time of {references[0]}\'s',
                ['method', 'n', *labels, 'T_c', 'D accuracy, first / middle / last epoch', 'step time'], rows)
    for reference in filter(methods.get, references):
        known = references[1:] if reference != references[0] else [reference]  # the first is what they are told by
        others = {name: rows for name, rows in methods.items()
                  if name not in known and rows.keys() & methods[reference].keys()}
        print_table(
            f'Minus {reference}, paired by seed: mean ± half of the 95 % interval, bold where that leaves out 0',
            ['method', 'n', *labels],
            [[name, str(len(rows.keys() & methods[reference].keys())),
              *(difference(rows, methods[reference], metric) for metric in METRICS)] for name, rows in others.items()])


def print_summary(units: dict[tuple[str, str], dict[str, dict[int, dict]]], names: list[str], reference: str) -> None:
    """Means of error, NLL and ECE in all regimes; bold where the difference from the reference leaves out 0."""
    def cell(methods, name, metric):
        rows, (_, form), plain = methods[name], METRICS[metric], methods.get(reference, {})
        text = format(statistics.mean(row[metric] for row in rows.values()), form)
        if name == reference or not rows.keys() & plain.keys():
            return text
        mean, half = paired(rows, plain, metric)
        return f'**{text}**' if abs(mean) > half else text

    def count(name):
        return '/'.join(map(str, sorted({len(methods[name]) for methods in units.values() if name in methods})))

    print_table(
        f'## Summary\n\nMean error % / NLL / ECE %, bold where the paired 95 % interval of the difference from '
        f'{reference} leaves out 0', ['method', 'n', *map(', '.join, units)],
        [[name, count(name), *(
            ' / '.join(cell(methods, name, metric) for metric in SUMMARY) if name in methods else ''
            for methods in units.values())] for name in names])


def print_gaps(units: dict[tuple[str, str], dict[str, dict[int, dict]]], details: dict, part: str) -> None:
    """Beside what AI-KD gains, how much better the teacher knows its training images than others."""
    rows = []
    for unit, methods in units.items():
        ours, plain = methods.get('aikd-store', {}), methods.get('ce', {})
        if ours and ours.keys() == plain.keys():
            train = statistics.mean(
                details[row['digest'], row['part']]['curves']['teacher_top1'][0] for row in ours.values())
            other = 100 - statistics.mean(row['error'] for row in plain.values())
            rows.append([', '.join(unit), str(len(ours)), f'{train:.1f}', f'{other:.1f}', f'{train - other:.1f}',
                         spread([row['teacher_temperature'] for row in ours.values()], '.2f'),
                         *(difference(ours, plain, metric) for metric in SUMMARY)])
    print_table(
        '## Teachers and gains\n\nTop-1 of the teachers (ce) on the training batches, with their labels, and on '
        f'{part} images; the gap between the two; T_c; and aikd-store minus ce',
        ['', 'n', 'training %', f'{part} %', 'gap', 'T_c', *(METRICS[metric][0] for metric in SUMMARY)], rows)


def plot_summary(path: str, units: dict[tuple[str, str], dict[str, dict[int, dict]]], name: str) -> None:
    """Differences of a method from the references, with their 95 % intervals."""
    figure = Figure(figsize=(11, 5), layout='constrained')
    for axis, metric in zip(figure.subplots(1, len(SUMMARY), sharey=True), SUMMARY, strict=True):
        for number, (unit, methods) in enumerate(units.items()):
            known = [other for other in REFERENCES if min(len(methods.get(each, ())) for each in (other, name)) > 1]
            points = [paired(methods[name], methods[other], metric) for other in known]
            axis.errorbar(
                [mean for mean, _ in points],
                [REFERENCES.index(other) + 0.7 * (number + 0.5) / len(units) - 0.35 for other in known],
                xerr=[half for _, half in points], fmt='o', markersize=4, label=', '.join(unit))
        axis.axvline(0, color='black', linewidth=0.8)
        axis.set_title(f'{METRICS[metric][0]}: {name} minus')
        axis.grid(alpha=0.3)
    axis.set_yticks(range(len(REFERENCES)), REFERENCES)
    axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), loc='outside lower center', ncols=4)
    figure.savefig(path, dpi=110)


def plot_metrics(path: str, methods: dict[str, dict[int, dict]]) -> None:
    """Error, NLL and ECE with their 95 % intervals."""
    figure = Figure(figsize=(12, 1 + 0.25 * len(methods)), layout='constrained')
    for axis, metric in zip(figure.subplots(1, len(SUMMARY), sharey=True), SUMMARY, strict=True):
        values = [[row[metric] for row in by_seed.values()] for by_seed in methods.values()]
        bars = [half_width(each) if len(each) > 1 else 0. for each in values]
        axis.errorbar(list(map(statistics.mean, values)), list(methods), xerr=bars, fmt='o')
        axis.set_title(METRICS[metric][0])
        axis.grid(alpha=0.3)
    axis.invert_yaxis()
    figure.savefig(path, dpi=110)


def plot_terms(path: str, methods: dict[str, dict[int, dict]], details: dict) -> None:
    """AI-KD's terms over the epochs, and the discriminator's accuracy for every adversarial loss; means of seeds."""
    figure = Figure(figsize=(10, 4), layout='constrained')
    terms, accuracy = figure.subplots(1, 2)
    lines = [(terms, 'aikd-store', name, name) for name in ('task', 'progressive', 'kd', 'adv', 'disc')]
    lines += [(accuracy, f'aikd-{loss}', 'disc_accuracy', loss) for loss in ADV_LOSSES]
    for axis, method, curve, label in lines:
        if method in methods:
            rows = methods[method].values()
            curves = torch.tensor([details[row['digest'], row['part']]['curves'][curve] for row in rows])
            axis.plot(curves.mean(0), label=label)
    for axis, title in ((terms, 'aikd-store: terms, unweighted'), (accuracy, 'discriminator accuracy')):
        axis.set(title=title, xlabel='epoch')
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=110)


def binned_predictions(rows: dict[int, dict], details: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence and correctness that fill the reliability bins as those of all seeds together did."""
    confidence, correct = [], []
    for row in rows.values():
        for share, mean_confidence, accuracy in zip(*details[row['digest'], row['part']]['bins'], strict=True):
            count = round(10_000 * share)
            confidence.append(torch.full((count,), mean_confidence))
            correct.append(torch.arange(count) < round(accuracy * count))
    return torch.cat(confidence), torch.cat(correct)


def report(runs: list[Run], part: str, results: Results, references: list[str], are_trials: bool) -> None:
    """Tables for each regime and student, of those runs that are there; trials sorted by NLL, the others with plots."""
    units, environments = defaultdict(lambda: defaultdict(dict)), set()
    for run in runs:
        row = results.rows.get((run.digest, part))
        if row is not None:
            units[run.regime, run.student][run.method][run.seed] = row
            environments.add(row['environment'])
    if not units:
        sys.exit(f'error: {results.path} has none of these runs')
    names = {name for methods in units.values() for name in methods}
    for (regime, student), methods in units.items():
        if are_trials:
            nll = {name: statistics.mean(row['nll'] for row in rows.values()) for name, rows in methods.items()}
            methods = {name: methods[name] for name in sorted(nll, key=nll.get)}
        print_tables(f'{regime}, {student}: {part} images', methods, references)
        if not are_trials:
            stem = results.path.with_name(f'{results.path.stem}-{part}-{regime}-{student}')
            plot(stem, methods, results.details())
            print(f'\nPlots: {stem}-*.png')
    print_summary(units, list(dict.fromkeys(run.method for run in runs if run.method in names)), references[0])
    if not are_trials:
        print_gaps(units, results.details(), part)
        plot_summary(results.path.with_suffix('.png'), units, 'aikd-store')
        print(f'\nPlot: {results.path.with_suffix(".png")}')
    print('\nTrained on: ' + '; '.join(sorted(environments)))


def plot(stem: Path, methods: dict[str, dict[int, dict]], details: dict) -> None:
    plot_metrics(f'{stem}-metrics.png', methods)
    plot_terms(f'{stem}-terms.png', methods, details)
    shown = [name for name in (*REFERENCES, 'aikd-store') if name in methods]
    if shown:
        reliability_diagram(
            f'{stem}-reliability.png', {name: binned_predictions(methods[name], details) for name in shown})


# ------------------------------------------------------------ command line

def shard(text: str) -> tuple[int, int]:
    number, count = map(int, text.split('/'))
    if not 1 <= number <= count:
        raise ValueError
    return number, count


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
mode = parser.add_argument_group('what to do', 'by default the runs that are missing').add_mutually_exclusive_group()
mode.add_argument('--report', action='store_true', help='train nothing: tables and plots of what is there')
mode.add_argument('--quick', action='store_true', help='two methods, two seeds, in a scratch folder, a minute or two; '
                  'exit code 1 unless AI-KD has the lower NLL')
which = parser.add_argument_group('which runs')
which.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS), metavar='NAME',
                   help='of ' + ', '.join(METHODS) + ' (default: all)')
which.add_argument('--override', nargs='+', type=json.loads, metavar='JSON',
                   help='instead of these AI-KD with the store and these options, e.g. \'{"alpha": 0.8}\'')
which.add_argument('--sweep', nargs='*', choices=GRID, metavar='OPTION',
                   help='instead of these AI-KD with one option changed at a time, of ' + ', '.join(GRID) +
                   ' (default: each of them)')
which.add_argument('--base', type=json.loads, default={}, metavar='JSON', help='options that --sweep starts from')
for name, choices in (('regimes', REGIMES), ('students', STUDENTS)):
    which.add_argument(f'--{name}', nargs='+', choices=choices, default=list(choices), metavar='NAME',
                       help='of ' + ', '.join(choices) + ' (default: all)')
which.add_argument('--seeds', nargs='+', type=int, metavar='N',
                   help=f'default: 0 to 4, in full 0 and 1; with --sweep 0 to {SWEEP_SEEDS - 1}')
which.add_argument('--epochs-scale', type=float, default=1., metavar='X', help='multiplies the epochs, for trials')
which.add_argument('--part', choices=PARTS,
                   help='images to evaluate on (default: test; with --sweep validation, nothing else being allowed)')
which.add_argument('--shard', type=shard, default=(1, 1), metavar='I/N',
                   help='only part I of N; a regime, student and seed belongs to one part with all its methods')
where = parser.add_argument_group('where')
where.add_argument('--data', type=Path, default=Path('/usr/share/datasets/fashion-mnist'), metavar='FOLDER',
                   help='with the four files of Fashion-MNIST, .gz or not (default: %(default)s)')
where.add_argument('--results', type=Path, default=Path('benchmark_accuracy.csv'), metavar='FILE',
                   help='CSV of the runs; curves, weights and plots go beside it (default: %(default)s)')
where.add_argument('--threads', type=int, default=1, metavar='N', help='to compute with (default: 1)')


def select(args: argparse.Namespace, methods: list[str]) -> list[Run]:
    """The runs that the command line names."""
    units = []
    for regime, student in itertools.product(args.regimes, args.students):
        count = SWEEP_SEEDS if args.sweep is not None else REGIMES[regime].seeds
        units += [(regime, student, seed) for seed in (range(count) if args.seeds is None else args.seeds)]
    number, count = args.shard
    return [Run(regime, student, method, seed, args.epochs_scale)
            for regime, student, seed in units[number - 1::count] for method in methods]


def quick(folder: Path) -> None:
    """Exit with 1 unless AI-KD beats plain training in the mean NLL of two seeds."""
    methods = ('ce', 'aikd-store')
    runs = [Run('small', 'resnet', method, seed, 0.5) for seed in (0, 1) for method in methods]
    with tempfile.TemporaryDirectory() as scratch:
        results = Results(Path(scratch) / 'quick.csv')
        train_all(runs, 'test', folder, results)
    plain, ours = (
        statistics.mean(results.rows[run.digest, 'test']['nll'] for run in runs if run.method == method)
        for method in methods)
    print(f'NLL of plain training {plain:.3f}, of AI-KD {ours:.3f}')
    sys.exit(0 if ours < plain else 'error: AI-KD does not beat plain training')


def main(references: Sequence[str] = REFERENCES) -> None:
    """With other references than its own the methods are trials, and the report has these too."""
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        quick(args.data)
    methods, references, are_trials = args.methods, list(references), tuple(references) != REFERENCES
    if args.sweep is not None:
        if args.override or args.part == 'test':
            parser.error('--sweep: not with --override, nor with --part test: options are not chosen on test images')
        methods, are_trials = sweep_names(args.base, args.sweep or list(GRID)), True
        references = methods[:1]
    elif args.override:
        methods, are_trials = [f'custom:{json.dumps(options, sort_keys=True)}' for options in args.override], True
    if args.report and are_trials:
        methods += [name for name in references if name not in methods]
    part, runs = args.part or ('test' if args.sweep is None else 'validation'), select(args, methods)
    try:
        for run in runs:
            run.config  # noqa: B018
    except (AikdError, TypeError) as error:
        parser.error(str(error))
    if args.report:
        if not args.results.is_file():
            parser.error(f'--results {args.results}: no such file')
        report(runs, part, Results(args.results), references, are_trials)
    else:
        train_all(runs, part, args.data, Results(args.results))


if __name__ == '__main__':
    main()
