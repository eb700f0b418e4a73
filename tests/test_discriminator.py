"""The discriminator's step: against a plain one, and what it must leave alone."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_aikd import Discriminator
from timm_aikd.loss import ADV_LOSSES

from .support.distributed import spawn


def outputs(seed=0, batch=16, classes=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, classes, generator=generator) * 3, torch.randn(batch, classes, generator=generator)


def weights(module):
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])


def test_bce_steps_equal_a_plain_training_loop():
    ours = Discriminator(5, hidden=(8,), lr=0.01)
    plain = nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    plain.load_state_dict(ours.mlp.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.)
    for step in range(20):
        teacher, student = outputs(step)
        loss, accuracy, stepped = ours.update(teacher, student)
        real, fake = (plain(x.log_softmax(-1)).squeeze(-1) for x in (teacher, student))
        expected = F.binary_cross_entropy_with_logits(real, torch.ones(16)) \
            + F.binary_cross_entropy_with_logits(fake, torch.zeros(16))
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach())
        assert stepped and accuracy == (real > fake).float().mean()
    torch.testing.assert_close(weights(ours), weights(plain))


@pytest.mark.parametrize('kind', ADV_LOSSES)
@pytest.mark.parametrize('input', ['probs', 'log-probs', 'logits'])
def test_learns_to_tell_two_distributions_apart(kind, input):
    disc = Discriminator(5, hidden=(16,), input=input, loss=kind, lr=0.01)
    accuracy = []
    for step in range(60):
        teacher, student = outputs(step, batch=64)
        teacher[:, 0] += 4
        accuracy.append(disc.update(teacher, student)[1].item())
    assert sum(accuracy[-10:]) / 10 > 0.65


def test_wgan_clips_its_weights():
    disc = Discriminator(5, loss='wgan')
    disc.update(*outputs())
    assert weights(disc).abs().max() <= 0.01


@pytest.mark.parametrize('opt', ['sgd', 'adamw', 'lamb', 'lion'])
def test_any_first_order_optimizer_of_timm(opt):
    disc = Discriminator(5, hidden=(8,), opt=opt, lr=0.01)
    before = weights(disc)
    disc.update(*outputs())
    assert not torch.equal(before, weights(disc))


@pytest.mark.parametrize('opt, message', [('adahessian', 'second-order'), ('nonsense', 'nonsense'), ('kron', 'random')])
def test_unusable_optimizers_are_refused(opt, message):
    with pytest.raises(Exception, match=message):
        Discriminator(5, opt=opt)


@pytest.mark.parametrize('kind', ['bce', 'wgan-gp'])
def test_neither_side_touches_the_others_gradients(kind):
    disc = Discriminator(5, hidden=(8,), loss=kind)
    teacher, student = outputs()
    student.requires_grad_()
    disc.update(teacher, student)
    assert student.grad is None
    before = weights(disc)
    disc.generator_loss(student).backward()
    assert student.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in disc.parameters())
    assert torch.equal(before, weights(disc))


def test_adversarial_gradient_raises_the_score():
    disc = Discriminator(5, hidden=(8,), lr=0.01)
    for step in range(30):
        disc.update(*outputs(step))
    student = outputs()[1].requires_grad_()
    gradient, = torch.autograd.grad(disc.generator_loss(student), student)
    score = [disc(x.log_softmax(-1)).mean() for x in (student, student - gradient)]
    assert score[1] > score[0]


@pytest.mark.parametrize('opt', ['adamw', 'momentum', 'lamb', 'adopt'])  # fused, and those that cannot be
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_batch_that_is_not_finite_changes_nothing(bad, opt):
    disc = Discriminator(5, hidden=(8,), opt=opt)
    disc.update(*outputs(0))
    before, state = weights(disc), {
        name: value.clone() for entry in disc.optimizer.state.values() for name, value in entry.items()
        if isinstance(value, torch.Tensor)}
    teacher, student = outputs(1)
    teacher[0, 0] = bad
    stepped = disc.update(teacher, student)[2]
    assert not stepped and torch.equal(before, weights(disc))
    for entry in disc.optimizer.state.values():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor) and value.shape == state[name].shape:
                assert torch.equal(value, state[name])
    assert disc.update(*outputs(2))[2] and not torch.equal(before, weights(disc))


@pytest.mark.parametrize('opt', ['adamw', 'adam', 'sgd', 'momentum', 'rmsprop', 'lamb'])
def test_a_first_batch_that_is_not_finite_leaves_no_mark(opt):
    disc, fresh = (Discriminator(5, hidden=(8,), opt=opt, lr=0.01) for _ in range(2))
    teacher, student = outputs(1)
    assert not disc.update(teacher * float('nan'), student)[2]
    for step in (2, 3):
        disc.update(*outputs(step))
        fresh.update(*outputs(step))
    if opt in ('adamw', 'adam', 'sgd'):  # others count or start with the step that was taken back
        torch.testing.assert_close(weights(disc), weights(fresh))
    assert weights(disc).isfinite().all()


def test_seed_decides_and_the_global_stream_is_left_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    a, b, c = (Discriminator(5, seed=seed, loss='wgan-gp') for seed in (1, 1, 2))
    a.update(*outputs())
    assert torch.equal(torch.get_rng_state(), state)
    b.update(*outputs())
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c))


def test_stays_float32_in_half_precision_and_autocast():
    disc = Discriminator(5, hidden=(8,)).to(torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in disc.parameters())
    teacher, student = outputs()
    reference = Discriminator(5, hidden=(8,))
    reference.load_state_dict(disc.state_dict())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = disc.update(teacher, student)[0]
        adv = disc.generator_loss(student)
    assert loss.dtype == adv.dtype == torch.float32
    assert torch.equal(loss, reference.update(teacher, student)[0])


@pytest.mark.parametrize('kind', ['bce', 'wgan-gp'])
def test_state_continues_exactly(kind):
    straight, stopped = (Discriminator(5, hidden=(8,), loss=kind) for _ in range(2))
    for step in range(3):
        straight.update(*outputs(step))
        stopped.update(*outputs(step))
    resumed = Discriminator(5, hidden=(8,), loss=kind, seed=9)
    resumed.load_state(stopped.get_state())
    for step in range(3, 6):
        straight.update(*outputs(step))
        resumed.update(*outputs(step))
    assert torch.equal(weights(straight), weights(resumed))


def test_a_state_of_before_the_fused_step_continues():
    old, new = (Discriminator(5, hidden=(8,), lr=0.01) for _ in range(2))
    assert old.optimizer.param_groups[0]['fused']
    for group in old.optimizer.param_groups:
        group['fused'] = None
    for step in range(3):
        old.update(*outputs(step))
    new.load_state(copy.deepcopy(old.get_state()))
    assert all(group['fused'] for group in new.optimizer.param_groups)
    for step in range(3, 6):
        old.update(*outputs(step))
        new.update(*outputs(step))
    torch.testing.assert_close(weights(old), weights(new))


def _rank_steps(rank, _):
    disc = Discriminator(5, hidden=(8,), seed=rank)  # different on purpose: `broadcast` must mend it
    disc.broadcast()
    skipped = 0
    for step in range(4):
        teacher, student = outputs(10 * step + rank, batch=8)
        if step == 2 and rank == 1:
            student[0] = float('nan')
        skipped += not disc.update(teacher, student)[2]
    return weights(disc), skipped


def test_two_ranks_are_one_discriminator():
    ranks = spawn(_rank_steps, 2)
    assert torch.equal(ranks[0][0], ranks[1][0])
    assert ranks[0][1] == ranks[1][1] == 1  # one rank's bad batch is skipped by both
    single = Discriminator(5, hidden=(8,), seed=0)
    for step in (0, 1, 3):
        halves = [outputs(10 * step + rank, batch=8) for rank in range(2)]
        single.update(*(torch.cat(pair) for pair in zip(*halves, strict=True)))
    torch.testing.assert_close(ranks[0][0], weights(single))
