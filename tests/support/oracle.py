"""The equations of AI-KD once more, from exponentials and logarithms in float64, for tests to compare with.

Letters are those of README: z student logits, q the previous epoch's prediction, tau temperatures.
Losses are per sample [B] unless said otherwise.
"""
import copy

import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy


def log_softmax(z: torch.Tensor, tau: float = 1.) -> torch.Tensor:
    z = z.double() / tau
    z = z - z.max(-1, keepdim=True).values
    return z - z.exp().sum(-1, keepdim=True).log()


def log_sigmoid(z: torch.Tensor, tau: float = 1.) -> torch.Tensor:
    z = z.double() / tau
    return z.clamp(max=0) - (1 + (-z.abs()).exp()).log()


def kl(target: torch.Tensor, z: torch.Tensor, tau: float) -> torch.Tensor:
    """tau^2 * KL( softmax(target / tau) || softmax(z / tau) )."""
    log_p, log_q = log_softmax(target, tau), log_softmax(z, tau)
    return tau ** 2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def binary_kl(target: torch.Tensor, z: torch.Tensor, tau: float, sum_classes: bool) -> torch.Tensor:
    """tau^2 * KL of each class's probability, summed or averaged over the classes."""
    each = sum(
        log_sigmoid(sign * target, tau).exp() * (log_sigmoid(sign * target, tau) - log_sigmoid(sign * z, tau))
        for sign in (1, -1))
    return tau ** 2 * (each.sum(-1) if sum_classes else each.mean(-1))


def disc_input(z: torch.Tensor, binary: bool) -> torch.Tensor:
    """What D sees by default: log-probabilities [B, C]."""
    return log_sigmoid(z) if binary else log_softmax(z)


def layer_norm(features: torch.Tensor) -> torch.Tensor:
    """What D sees of features [B, F]."""
    centred = features.double() - features.double().mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def teacher_logits(teacher: nn.Module, input: torch.Tensor, binary: bool) -> torch.Tensor:
    """z_T; of several teachers from the mean of their probabilities."""
    members = getattr(teacher, 'members', None)
    if members is None:
        return teacher(input)
    if binary:
        mean = sum(log_sigmoid(member(input)).exp() for member in members) / len(members)
        return (mean.log() - (1 - mean).log()) / teacher.temperature
    return (sum(log_softmax(member(input)).exp() for member in members) / len(members)).log() / teacher.temperature


def disc_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Loss of D for its scores (`bce`)."""
    return -log_sigmoid(real) - log_sigmoid(-fake)


def adv_loss(fake: torch.Tensor) -> torch.Tensor:
    """Loss of the student for D's scores (`bce`)."""
    return -log_sigmoid(fake)


def alpha_at(epoch: int, epochs: int, alpha: float) -> float:
    return alpha * min((epoch + 1) / epochs, 1) if epoch else 0.


def ramp(epoch: int, warmup: float) -> float:
    """Share of the adversarial weight while D warms up."""
    return min(epoch / warmup, 1) if warmup else 1.


def feature_distance(features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    return (layer_norm(features) - layer_norm(teacher_features)).square().mean(-1)


def total(
        parts: dict,
        alpha: float,
        kd_weight: float,
        adv_weight: float,
        feature_weight: float = 0.,
) -> torch.Tensor:
    of_features = feature_weight * parts['features'] if feature_weight else 0.
    return ((1 - alpha) * parts['task'] + alpha * parts['progressive'] + kd_weight * parts['kd'] + of_features
            + adv_weight * parts['adv'])


class RunOracle:
    """The loss that each step of a run should have; it keeps its own memory of earlier predictions."""

    def __init__(self):
        self.snapshot, self.kept, self.epoch = None, {}, 0

    def begin_epoch(self, student: nn.Module, epoch: int) -> None:
        self.epoch = epoch
        self.snapshot = copy.deepcopy(student).eval() if epoch > 0 else None

    @torch.no_grad()
    def loss(
            self,
            run,
            input: torch.Tensor,
            output: torch.Tensor,
            target: torch.Tensor,
            index: list[int] | None,
            features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The step's loss; to be asked after D's step. `index` is None where the memory is a snapshot."""
        aikd, config, z = run.aikd, run.aikd.config, output.detach().float()
        binary = isinstance(run.criterion, (BinaryCrossEntropy, nn.BCEWithLogitsLoss))

        def soft_loss(target, tau):
            if binary:
                return binary_kl(target, z, tau, getattr(run.criterion, 'sum_classes', False))
            return kl(target, z, tau)

        seen = disc_input(z, binary) if features is None else layer_norm(features)
        with torch.autocast(z.device.type, enabled=False):
            scores = aikd.discriminator(seen.float())
        past, known = self.past(input, z if binary else log_softmax(z), index)
        own = [run.criterion(z[i:i + 1], target[i:i + 1]) for i in range(len(z)) if not known[i]]
        progressive = (soft_loss(past, config.progressive_temperature)[known].sum() + sum(own)) / len(z)
        parts = {
            'task': run.criterion(output, target),
            'progressive': progressive,
            'kd': soft_loss(teacher_logits(aikd.teacher, input, binary), config.temperature).mean(),
            'adv': adv_loss(scores).mean(),
        }
        if config.feature_weight:
            aikd.teacher(input)
            parts['features'] = feature_distance(features, aikd.teacher.take_features()).mean()
        adv_weight = config.adv_weight * ramp(self.epoch, config.adv_warmup)
        alpha = alpha_at(self.epoch, aikd.epochs, config.alpha)
        return total(parts, alpha, config.kd_weight, adv_weight, config.feature_weight)

    def past(self, input, fresh, index) -> tuple[torch.Tensor, torch.Tensor]:
        """The previous epoch's predictions and which samples have one; the fresh predictions are kept for the next."""
        if index is None and self.snapshot is not None:
            return self.snapshot(input), torch.ones(len(fresh), dtype=torch.bool)
        index = index or [None] * len(fresh)
        known = torch.tensor([i in self.kept for i in index])
        past = torch.stack([self.kept.get(i, torch.zeros(fresh.shape[-1])).double() for i in index])
        self.kept.update((i, row) for i, row in zip(index, fresh, strict=True) if i is not None)
        return past, known
