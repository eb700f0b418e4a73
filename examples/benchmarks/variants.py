#!/usr/bin/env python3
"""Variants of AI-KD that were tried and are not in the package, on the footing of accuracy.py.

    python examples/benchmarks/variants.py --regimes small noisy underfit --seeds 0 1          # whatever is missing
    python examples/benchmarks/variants.py --regimes small noisy underfit --seeds 0 1 --report

`plain` is AI-KD with the package's defaults, its store memory written as a dense table; each of the others changes a
part of it. They are judged on validation images; the options are those of accuracy.py.
"""
from dataclasses import replace

import accuracy as bench
import torch
import torch.nn.functional as F
from methods import METHODS, STORE, Method
from peers import Aikd, Peer, best_temperature
from regimes import CLASSES
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3

from timm_aikd.discriminator import Discriminator
from timm_aikd.loss import alpha_at, soft_loss


class Plain(Peer, ClassificationTask):
    """AI-KD in plain code, for the others to override parts of; their names go into the digests of the runs."""

    disc_width = CLASSES

    def __init__(self, student, criterion, teacher, config, epochs, samples):
        super().__init__(student, criterion, verbose=False)
        self.config, self.epochs, self.teacher = config, epochs, teacher.eval().requires_grad_(False)
        self.past = torch.zeros(samples, CLASSES)  # log-probabilities
        self.discriminator = Discriminator(
            self.disc_width, config.disc_hidden, 'logits', config.adv_loss, config.disc_opt, config.disc_lr,
            config.seed)

    def calibrate(self, batches):
        self.teacher_temperature = best_temperature(self.teacher, batches)

    def begin_epoch(self, epoch):
        super().begin_epoch(epoch)
        self.disc_accuracy = []

    def end_epoch(self):
        return {'disc_accuracy': torch.stack(self.disc_accuracy).mean().item()}

    def forward(self, input, target, index):
        logits = self.trainable_module(input)
        with torch.no_grad():
            teacher_logits = self.teacher(input) / self.teacher_temperature
        alpha = self.alpha()
        loss = (1 - alpha) * self.task(logits, target, teacher_logits)
        if alpha > 0:
            loss = loss + alpha * soft_loss(logits, self.recall(input, index), self.config.progressive_temperature)
        self.record(index, logits.detach().log_softmax(-1))
        kd = self.kd(logits, teacher_logits, target)
        loss = loss + self.kd_weight(logits, loss, kd) * kd
        real, fake = self.seen(teacher_logits, target), self.seen(logits, target)
        self.disc_accuracy.append(self.discriminator.update(real, fake)[1])
        adv = self.discriminator.generator_loss(fake)
        return {'loss': loss + self.adv_weight(logits, loss, adv) * adv}

    def alpha(self):
        return alpha_at(self.epoch, self.epochs, self.config.alpha)

    def task(self, logits, target, teacher_logits):
        return self.criterion(logits, target)

    def recall(self, input, index):
        return self.past[index]

    def record(self, index, log_probs):
        self.past[index] = log_probs

    def kd_weight(self, logits, rest, kd):
        return self.config.kd_weight

    def kd(self, logits, teacher_logits, target):
        return soft_loss(logits, teacher_logits, self.config.temperature)

    def seen(self, logits, target):
        """What D sees of an output."""
        return logits.log_softmax(-1)

    def adv_weight(self, logits, rest, adv):
        return self.config.adv_weight


class AlphaConstant(Plain):
    """alpha from epoch 1 on."""

    def alpha(self):
        return self.config.alpha if self.epoch > 0 else 0.


class AlphaLate(Plain):
    """alpha by the square of its growth, late but far."""

    def alpha(self):
        return alpha_at(self.epoch, self.epochs, 1.) ** 2 * self.config.alpha


class KdFades(Plain):
    """kd from twice its weight to 0 after the last epoch (a teacher helps most at first, arxiv.org/abs/1910.01348)."""

    def kd_weight(self, logits, rest, kd):
        return 2 * self.config.kd_weight * (1 - self.epoch / self.epochs)


class TemperatureFalls(Plain):
    """kd's temperature from twice its own down to 1 (https://arxiv.org/abs/2104.07163 has such an annealing)."""

    def kd(self, logits, teacher_logits, target):
        share = self.epoch / max(self.epochs - 1, 1)
        return soft_loss(logits, teacher_logits, (1 - share) * 2 * self.config.temperature + share)


class AdvFades(Plain):
    """adv from twice its weight to 0 after the last epoch."""

    def adv_weight(self, logits, rest, adv):
        return 2 * self.config.adv_weight * (1 - self.epoch / self.epochs)


def gradient_ratio(logits, rest, term):
    """Length of the rest's gradient on the logits, as a multiple of that of the term."""
    rest, term = (torch.autograd.grad(loss, logits, retain_graph=True)[0].norm() for loss in (rest, term))
    return rest / term.clamp_min(1e-8)


class AdvBalanced(Plain):
    """adv_weight is the length of its gradient as a share of the rest's (as in https://arxiv.org/abs/2012.09841)."""

    def adv_weight(self, logits, rest, adv):
        return self.config.adv_weight * gradient_ratio(logits, rest, adv)


class KdNormalised(Plain):
    """kd with a gradient as long as that of task and progressive together."""

    def kd_weight(self, logits, rest, kd):
        return self.config.kd_weight * gradient_ratio(logits, rest, kd)


class KdWhereRight(Plain):
    """No kd where the teacher's first class is not the label."""

    def kd(self, logits, teacher_logits, target):
        right = (teacher_logits.argmax(-1) == target)[:, None]
        return super().kd(logits, torch.where(right, teacher_logits, logits.detach()), target)


class KdByConfidence(Plain):
    """Each sample's kd in proportion to the calibrated teacher's confidence, 1 on average."""

    def kd(self, logits, teacher_logits, target):
        confidence = teacher_logits.softmax(-1).amax(-1)
        student, teacher = ((x / self.config.temperature).log_softmax(-1) for x in (logits, teacher_logits))
        each = F.kl_div(student, teacher, reduction='none', log_target=True).sum(-1)
        return self.config.temperature ** 2 * (confidence / confidence.mean() * each).mean()


class TaskByTeacher(Plain):
    """Each sample's task loss in proportion to the label's probability over the largest, by the calibrated teacher."""

    def task(self, logits, target, teacher_logits):
        probs = teacher_logits.softmax(-1)
        trust = probs.gather(-1, target[:, None])[:, 0] / probs.amax(-1)
        return (trust * F.cross_entropy(logits, target, reduction='none')).mean()


class EmaWeights(Plain):
    """Progressive targets from an average of the weights over about the last epoch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.average, self.steps = None, 0

    def forward(self, input, target, index):
        self.steps += self.epoch == 0
        result = super().forward(input, target, index)
        if self.average is not None:
            self.average.update(self.trainable_module)
        return result

    def begin_epoch(self, epoch):
        super().begin_epoch(epoch)
        if epoch == 1:
            self.average = ModelEmaV3(self.trainable_module, decay=1 - 1 / self.steps)

    @torch.no_grad()
    def recall(self, input, index):
        return self.average(input)


class EmaPredictions(Plain):
    """Progressive targets from an average of all past predictions (https://arxiv.org/abs/1610.02242)."""

    def record(self, index, log_probs):
        if self.epoch > 0:
            log_probs = (0.6 * self.past[index].exp() + 0.4 * log_probs.exp()).log()
        super().record(index, log_probs)


class DiscConditional(Plain):
    """D also sees the label (https://arxiv.org/abs/1411.1784)."""

    disc_width = 2 * CLASSES

    def seen(self, logits, target):
        return torch.cat([logits.log_softmax(-1), F.one_hot(target, CLASSES)], -1)


class DiscFeatures(Aikd):
    """The package's D on the features before the classifier."""

    def __init__(self, student, criterion, teacher, config, *args):
        super().__init__(student, criterion, teacher, replace(config, disc_input='features'), *args)


VARIANTS = {
    'plain': Method(STORE, peer=Plain),
    'alpha-constant': Method(STORE, peer=AlphaConstant),
    'alpha-late': Method({**STORE, 'alpha': 0.8}, peer=AlphaLate),
    'kd-fades': Method(STORE, peer=KdFades),
    'temperature-falls': Method(STORE, peer=TemperatureFalls),
    'adv-fades': Method(STORE, peer=AdvFades),
    'adv-balanced-0.1': Method({**STORE, 'adv_weight': 0.1}, peer=AdvBalanced),
    'adv-balanced-0.3': Method({**STORE, 'adv_weight': 0.3}, peer=AdvBalanced),
    'kd-normalised': Method(STORE, peer=KdNormalised),
    'kd-where-right': Method(STORE, peer=KdWhereRight),
    'kd-by-confidence': Method(STORE, peer=KdByConfidence),
    'task-by-teacher': Method(STORE, peer=TaskByTeacher),
    'ema-weights': Method(STORE, peer=EmaWeights),
    'ema-predictions': Method(STORE, peer=EmaPredictions),
    'disc-conditional': Method(STORE, peer=DiscConditional),
    'disc-features': Method(STORE, peer=DiscFeatures),
    'disc-features-0.02': Method({**STORE, 'adv_weight': 0.02}, peer=DiscFeatures),
}


if __name__ == '__main__':
    METHODS.update(VARIANTS)
    bench.parser.description = __doc__
    bench.parser.set_defaults(
        methods=list(VARIANTS), regimes=['small', 'noisy', 'underfit', 'full'], part='validation')
    bench.main(references=['plain', 'ce'])
