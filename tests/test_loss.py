"""Each term against the oracle, which derives it from exponentials and logarithms, and against other methods."""
import math

import pytest
import torch
import torch.nn.functional as F

from timm_aikd import loss as L

from .support import oracle


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 5) * 3, torch.randn(6, 5) * 3


@pytest.mark.parametrize('tau', [0.5, 1., 4.])
def test_the_oracle_has_the_divergences_of_torch(batch, tau):
    z, soft = (tensor.double() for tensor in batch)
    categorical, bernoulli = (
        torch.distributions.kl_divergence(kind(logits=soft / tau), kind(logits=z / tau))
        for kind in (torch.distributions.Categorical, torch.distributions.Bernoulli))
    torch.testing.assert_close(oracle.kl(soft, z, tau), tau ** 2 * categorical)
    torch.testing.assert_close(oracle.binary_kl(soft, z, tau, sum_classes=True), tau ** 2 * bernoulli.sum(-1))
    torch.testing.assert_close(oracle.binary_kl(soft, z, tau, sum_classes=False), tau ** 2 * bernoulli.mean(-1))


@pytest.mark.parametrize('temperature', [0.5, 1., 4.])
def test_soft_loss_is_scaled_kl_divergence(batch, temperature):
    z, soft = batch
    expected = oracle.kl(soft, z, temperature).mean()
    torch.testing.assert_close(L.soft_loss(z, soft, temperature), expected.float())
    # log q and logits differ by a constant a sample, which must not matter
    torch.testing.assert_close(L.soft_loss(z, soft.log_softmax(-1), temperature), expected.float())
    assert L.soft_loss(z, z, temperature).abs() < 1e-6


def test_progressive_blend_has_the_gradient_of_ps_kd(batch):
    z, past = batch[0].requires_grad_(), batch[1]
    alpha, target = 0.3, torch.tensor([0, 1, 2, 3, 4, 0])
    blended = (1 - alpha) * F.one_hot(target, 5) + alpha * past.softmax(-1)
    ours = (1 - alpha) * F.cross_entropy(z, target) + alpha * L.soft_loss(z, past, 1.)
    ours, theirs = (torch.autograd.grad(loss, z)[0] for loss in (ours, F.cross_entropy(z, blended)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('sum_classes', [False, True])
def test_binary_term_is_the_kl_divergence_of_each_class(batch, sum_classes):
    z, soft = batch
    tau = 2.
    expected = oracle.binary_kl(soft, z, tau, sum_classes).mean()
    torch.testing.assert_close(L.binary_soft_loss(z, soft, tau, sum_classes), expected.float())
    assert L.binary_soft_loss(z, z, tau, sum_classes).abs() < 1e-6


def test_binary_term_at_temperature_1_has_the_gradient_of_the_criterion_of_timm():
    from timm.loss import BinaryCrossEntropy

    torch.manual_seed(0)
    z, soft = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    for sum_classes in (False, True):
        criterion = BinaryCrossEntropy(smoothing=0., sum_classes=sum_classes)
        losses = L.binary_soft_loss(z, soft, 1., sum_classes), criterion(z, soft.sigmoid())
        ours, theirs = (torch.autograd.grad(loss, z)[0] for loss in losses)
        torch.testing.assert_close(ours, theirs)


def test_alpha_grows_to_its_final_value():
    assert L.alpha_at(0, 10, 0.8) == 0  # nothing to learn from yet
    assert L.alpha_at(4, 10, 0.8) == pytest.approx(0.8 * 5 / 10)
    assert L.alpha_at(9, 10, 0.8) == L.alpha_at(12, 10, 0.8) == 0.8


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize('kind, disc, gen', [
    ('bce', lambda r, f: softplus(-r) + softplus(f), lambda f: softplus(-f)),
    ('hinge', lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda f: -f),
    ('lsgan', lambda r, f: ((r - 1) ** 2 + f ** 2) / 2, lambda f: (f - 1) ** 2 / 2),
    ('wgan', lambda r, f: f - r, lambda f: -f),
    ('wgan-gp', lambda r, f: f - r, lambda f: -f),
])
def test_adversarial_losses(kind, disc, gen):
    real, fake = [0.3, -1.2, 2.5], [-0.4, 0.8, -2.]
    expected_disc = sum(map(disc, real, fake)) / 3
    expected_gen = sum(map(gen, fake)) / 3
    real, fake = torch.tensor(real), torch.tensor(fake)
    assert L.discriminator_loss(real, fake, kind).item() == pytest.approx(expected_disc, rel=1e-5)
    assert L.generator_loss(fake, kind).item() == pytest.approx(expected_gen, rel=1e-5)
    # between the two targets of every loss the student wants a higher score and D a lower one
    undecided = torch.full((3,), 0.5, requires_grad=True)
    assert torch.autograd.grad(L.generator_loss(undecided, kind), undecided)[0].max() < 0
    assert torch.autograd.grad(L.discriminator_loss(real, undecided, kind), undecided)[0].min() > 0


def test_gradient_penalty_of_a_known_slope():
    weight = torch.tensor([3., 4.])  # a linear score has this gradient everywhere, of norm 5
    penalty = L.gradient_penalty(lambda x: x @ weight, torch.randn(4, 2), torch.randn(4, 2), torch.rand(4, 1))
    assert penalty.item() == pytest.approx((5 - 1) ** 2)


def test_gradient_penalty_looks_between_the_two():
    real, fake, mix = torch.full((1, 1), 2.), torch.zeros(1, 1), torch.tensor([[0.25]])
    # D(x) = x^2 has slope 2x; at 0.25 * 2 = 0.5 that is 1, which is not penalised
    assert L.gradient_penalty(lambda x: x.square().squeeze(-1), real, fake, mix).item() == pytest.approx(0., abs=1e-6)


@pytest.mark.parametrize('kind', L.DISC_INPUTS)
@pytest.mark.parametrize('binary', [False, True])
def test_output_vector(batch, kind, binary):
    z = batch[0]
    log_probs = oracle.disc_input(z, binary)
    centred = z.double() - z.double().mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = {
        'probs': log_probs.exp(), 'log-probs': log_probs, 'logits': z.double(), 'features': normalised}[kind]
    torch.testing.assert_close(L.output_vector(z, kind, binary), expected.float())


@pytest.mark.parametrize('call', [
    lambda: L.output_vector(torch.zeros(1, 2), 'softmax'),
    lambda: L.discriminator_loss(torch.zeros(1), torch.zeros(1), 'gan'),
    lambda: L.generator_loss(torch.zeros(1), 'gan'),
])
def test_unknown_names_are_refused_with_the_known_ones(call):
    with pytest.raises(ValueError, match=r'Unknown .* expected one of'):
        call()


def test_pairwise_accuracy_counts_ties_as_half():
    assert L.pairwise_accuracy(torch.tensor([1., 2., 0.]), torch.tensor([0., 2., 1.])).item() == pytest.approx(0.5)


def test_terms_are_float32_and_finite_for_half_precision_logits():
    z = torch.tensor([[60000., -60000.], [3., 1.]], dtype=torch.float16)
    for value in (L.soft_loss(z, -z, 4.), L.binary_soft_loss(z, -z, 4., True)):
        assert value.dtype == torch.float32 and value.isfinite()


def test_top1_takes_hard_and_soft_targets():
    logits = torch.tensor([[2., 0.], [0., 1.]])
    confidence, correct = L.top1(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(confidence, torch.tensor([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))]))
    assert correct.tolist() == [True, False]
    assert L.top1(logits, torch.tensor([[0.6, 0.4], [0.3, 0.7]]))[1].tolist() == [True, True]
