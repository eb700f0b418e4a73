"""The tasks that accuracy.py trains with: AI-KD, and what it is compared with, all made alike."""
from dataclasses import replace

import torch
import torch.nn.functional as F
from regimes import CLASSES
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask

from timm_aikd import AikdTask, RecordFormat, StoreMemory
from timm_aikd.calibration import fit_temperature
from timm_aikd.features import FeatureTap
from timm_aikd.teacher import Teacher


class Aikd(AikdTask):
    """The package's own, with its store memory where the options name it."""

    def __init__(self, student, criterion, teacher, config, epochs, samples):
        super().__init__(student, criterion, teacher=teacher, config=config, epochs=epochs)
        if self.aikd.memory is not None and config.memory == 'store':
            self.aikd.use_memory(StoreMemory(RecordFormat(CLASSES), samples))


class Features(AikdTask):
    """One phase: the teacher of features, layer-normalised before the classifier, is the model before fine-tuning.

    `adv_weight` weighs the package's discriminator on features, `kd_weight` their squared distance.
    """

    def __init__(self, student, criterion, teacher, config, epochs, samples):
        super().__init__(
            student, criterion, teacher=teacher, epochs=epochs,
            config=replace(config, kd_weight=0., disc_input='features'))
        self.teacher, self.distance_weight = teacher.eval().requires_grad_(False), config.kd_weight
        self.taps = FeatureTap(student, 'the student'), FeatureTap(teacher, 'the teacher')

    def forward(self, input, target, index):
        result = super().forward(input, target)
        if self.distance_weight > 0:
            if self.aikd.teacher is None:  # else it has run
                with torch.no_grad():
                    self.teacher(input)
            student, teacher = (F.layer_norm(features, features.shape[-1:])
                                for features in (tap.take() for tap in self.taps))
            result['loss'] = result['loss'] + self.distance_weight * F.mse_loss(student, teacher)
        return result


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


class TimmFeatures(Peer, FeatureDistillationTask):
    """timm's own distillation of features; `kd_weight` weighs their squared distance."""

    def __init__(self, student, criterion, teacher, config, epochs, samples):
        super().__init__(student, teacher, criterion, distill_loss_weight=config.kd_weight, verbose=False)

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


class TemperatureScaling(Peer, ClassificationTask):
    """Nothing is trained: the student is the teacher, calibrated (https://arxiv.org/abs/1706.04599)."""

    def __init__(self, student, criterion, teacher, config, epochs, samples):
        super().__init__(teacher if isinstance(teacher, Teacher) else Teacher(teacher), criterion, verbose=False)

    def calibrate(self, batches):
        self.trainable_module.set_temperature(best_temperature(self.trainable_module, batches))


@torch.no_grad()
def best_temperature(model, batches) -> float:
    logits, labels = zip(*((model(input), target) for input, target in batches), strict=True)
    return fit_temperature(torch.cat(logits), torch.cat(labels))
