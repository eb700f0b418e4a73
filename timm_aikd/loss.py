"""The equations of AI-KD, as pure functions.

    z            logits               [B, C]  student logits of this step
    z_T          teacher_logits       [B, C]  teacher logits on the same batch, already divided by T_c
    log q        past_log_probs       [B, C]  the student's prediction for the same samples in the previous epoch
    alpha_t      alpha                        weight of the progressive term in epoch t
    tau, tau_p   temperature
    h, h_T       features             [B, F]  student's and teacher's features before the classifier
    D(.)         real, fake           [B]     discriminator scores of the teacher's and of the student's output

    loss = (1 - alpha_t) * task + alpha_t * progressive + lambda_kd * kd + lambda_f * features + lambda_adv * adv

With a BCE criterion a prediction is C independent probabilities: the `binary_*` functions take the logits of the
previous epoch in place of log q, and reduce as the criterion does, over the batch and either the sum or the mean of
the classes.

    task         the criterion of the training script
    progressive  tau_p^2 * KL( softmax(log q / tau_p) || softmax(z / tau_p) )    soft_loss
    kd           tau^2 * KL( softmax(z_T / tau) || softmax(z / tau) )            soft_loss
    features     mean( (norm(h) - norm(h_T))^2 )                                 feature_distance
    adv          loss of the student against a fixed D                           generator_loss
    disc         loss of D on real and fake                                      discriminator_loss

Only the abstract of the AI-KD paper (https://arxiv.org/abs/2211.10938) was at hand; these equations are this
project's formulation of it. At tau_p = 1 the progressive term has the gradient of PS-KD's blended targets
(https://arxiv.org/abs/2006.12000).
All functions compute in float32, whatever the dtype of the logits.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F

ADV_LOSSES = ('bce', 'hinge', 'lsgan', 'wgan', 'wgan-gp')
DISC_INPUTS = ('probs', 'log-probs', 'logits', 'features')


def alpha_at(epoch: int, epochs: int, alpha_final: float) -> float:
    """Weight of the progressive term, constant within an epoch: alpha_final * (t + 1) / T.

    0 in epoch 0, where there is no previous epoch; alpha_final from the last scheduled epoch on.
    """
    return alpha_final * min((epoch + 1) / epochs, 1.) if epoch > 0 else 0.


def soft_loss(logits: torch.Tensor, soft_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """tau^2 * KL( softmax(soft / tau) || softmax(z / tau) ), mean over the batch (https://arxiv.org/abs/1503.02531).

    The kd term with soft = z_T and tau; the progressive term with soft = log q and tau_p.
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    soft = F.log_softmax(soft_logits.float() / temperature, dim=-1)
    return temperature ** 2 * F.kl_div(student, soft, reduction='batchmean', log_target=True)


def binary_soft_loss(
        logits: torch.Tensor,
        soft_logits: torch.Tensor,
        temperature: float,
        sum_classes: bool,
) -> torch.Tensor:
    """tau^2 * KL( sigmoid(soft / tau) || sigmoid(z / tau) ) of each class, for a BCE criterion."""
    soft = soft_logits.float() / temperature
    probs = torch.sigmoid(soft)
    cross_entropy = F.binary_cross_entropy_with_logits(logits.float() / temperature, probs, reduction='none')
    entropy = F.binary_cross_entropy_with_logits(soft, probs, reduction='none')
    divergence = cross_entropy - entropy
    return temperature ** 2 * (divergence.sum(-1) if sum_classes else divergence.mean(-1)).mean()


def feature_distance(features: torch.Tensor, teacher_features: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of layer-normalised features [B, F]: about 2 (1 - r), r their correlation."""
    return F.mse_loss(_normalised(features), _normalised(teacher_features))


def _normalised(features: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(features.float(), features.shape[-1:])


def output_vector(logits: torch.Tensor, kind: str, binary: bool = False) -> torch.Tensor:
    """What the discriminator sees of an output, [B, C] -> [B, C]: `probs`, `log-probs` or `logits`.

    For `features`, the argument is not logits but features [B, F], which are layer-normalised.
    """
    if kind == 'features':
        return _normalised(logits)
    logits = logits.float()
    if kind == 'logits':
        return logits
    if kind == 'probs':
        return logits.sigmoid() if binary else logits.softmax(-1)
    if kind == 'log-probs':
        return F.logsigmoid(logits) if binary else logits.log_softmax(-1)
    raise ValueError(f'Unknown discriminator input {kind!r}, expected one of {DISC_INPUTS}.')


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor, kind: str) -> torch.Tensor:
    """Loss that D descends; `real` and `fake` are scores [B].

    bce (https://arxiv.org/abs/1406.2661), hinge (https://arxiv.org/abs/1705.02894),
    lsgan (https://arxiv.org/abs/1611.04076), wgan (https://arxiv.org/abs/1701.07875);
    wgan-gp (https://arxiv.org/abs/1704.00028) adds `gradient_penalty`.
    """
    if kind == 'bce':
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind == 'hinge':
        return F.relu(1. - real).mean() + F.relu(1. + fake).mean()
    if kind == 'lsgan':
        return 0.5 * ((real - 1.).square().mean() + fake.square().mean())
    if kind in ('wgan', 'wgan-gp'):
        return fake.mean() - real.mean()
    raise ValueError(f'Unknown adversarial loss {kind!r}, expected one of {ADV_LOSSES}.')


def generator_loss(fake: torch.Tensor, kind: str) -> torch.Tensor:
    """Loss that the student descends to be taken for the teacher; `fake` are scores [B] of a fixed D."""
    if kind == 'bce':
        return F.softplus(-fake).mean()  # non-saturating
    if kind == 'lsgan':
        return 0.5 * (fake - 1.).square().mean()
    if kind in ('hinge', 'wgan', 'wgan-gp'):
        return -fake.mean()
    raise ValueError(f'Unknown adversarial loss {kind!r}, expected one of {ADV_LOSSES}.')


def gradient_penalty(
        score: Callable[[torch.Tensor], torch.Tensor],
        real: torch.Tensor,
        fake: torch.Tensor,
        mix: torch.Tensor,
) -> torch.Tensor:
    """E[ (|grad D(x)|_2 - 1)^2 ] at x = mix * real + (1 - mix) * fake, with `mix` uniform in [0, 1), [B, 1]."""
    x = torch.lerp(fake, real, mix).requires_grad_()
    gradient, = torch.autograd.grad(score(x).sum(), x, create_graph=True)
    norm: torch.Tensor = gradient.norm(dim=-1)
    return (norm - 1.).square().mean()


def pairwise_accuracy(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """How often D scores the teacher's output above the student's for the same sample; 0.5 is chance, 1 is certain."""
    return (real > fake).float().mean() + 0.5 * (real == fake).float().mean()


def top1(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidence and correctness of the largest class, [B] each; soft targets count by their largest class."""
    confidence, predicted = logits.float().softmax(-1).max(-1)
    return confidence, predicted == (target if target.ndim == 1 else target.argmax(-1))
