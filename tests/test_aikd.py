"""The whole step against a plain reference twin, and what a term of weight 0 must not do."""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from timm_aikd import Aikd, AikdConfig, AikdError

from .support import oracle

CONFIG = AikdConfig(
    teacher='given', teacher_temperature=1.5, kd_weight=0.7, temperature=3., alpha=0.6, progressive_temperature=2.,
    adv_weight=0.2, adv_warmup=2, disc_hidden=(8,), disc_lr=0.01)
EPOCHS, STEPS = 5, 10


class Twin:
    """AI-KD written down plainly: copies, full loops, autograd; no attention to cost."""

    def __init__(self, teacher, mlp, criterion, binary):
        self.teacher, self.mlp, self.criterion, self.binary = teacher, mlp, criterion, binary
        self.disc_optimizer = torch.optim.AdamW(mlp.parameters(), lr=CONFIG.disc_lr, weight_decay=0.)
        self.past = None

    def soft(self, z, target_logits, tau):
        if self.binary:
            return oracle.binary_kl(target_logits, z, tau, sum_classes=False).mean().float()
        return oracle.kl(target_logits, z, tau).mean().float()

    def score(self, z):
        return self.mlp(oracle.disc_input(z, self.binary).float()).squeeze(-1)

    def loss(self, epoch, x, z, y):
        z_t = self.teacher(x).detach() / CONFIG.teacher_temperature
        d_loss = oracle.disc_loss(self.score(z_t), self.score(z.detach())).mean().float()
        self.disc_optimizer.zero_grad()
        d_loss.backward()
        self.disc_optimizer.step()
        parts = {
            'task': self.criterion(z, y), 'progressive': torch.zeros(()),
            'kd': self.soft(z, z_t, CONFIG.temperature), 'adv': oracle.adv_loss(self.score(z)).mean().float()}
        if self.past is not None:
            parts['progressive'] = self.soft(z, self.past(x).detach(), CONFIG.progressive_temperature)
        alpha = oracle.alpha_at(epoch, EPOCHS, CONFIG.alpha)
        adv_weight = CONFIG.adv_weight * oracle.ramp(epoch, CONFIG.adv_warmup)
        return oracle.total(parts, alpha, CONFIG.kd_weight, adv_weight), {**parts, 'disc': d_loss}


@pytest.mark.parametrize('binary', [False, True])
def test_fifty_steps_equal_the_reference_twin(tiny_net, binary):
    torch.manual_seed(0)
    student, teacher = tiny_net(), tiny_net().eval()
    criterion = BinaryCrossEntropy(smoothing=0.) if binary else nn.CrossEntropyLoss()
    aikd = Aikd(5, copy.deepcopy(teacher), CONFIG, EPOCHS, binary=binary)
    mirror, twin = copy.deepcopy(student), Twin(teacher, copy.deepcopy(aikd.discriminator.mlp), criterion, binary)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (student, mirror)]
    for epoch in range(EPOCHS):
        aikd.begin_epoch(epoch, student)
        if epoch > 0:
            twin.past = copy.deepcopy(mirror).eval()
        sums = {}
        for step in range(STEPS):
            x = torch.randn(8, 4)
            y = teacher(x).argmax(-1)
            torch.manual_seed(step)  # dropout
            z = student(x)
            result = aikd(x, z, y, criterion(z, y))
            torch.manual_seed(step)
            expected, parts = twin.loss(epoch, x, mirror(x), y)
            torch.testing.assert_close(result['loss'], expected, rtol=1e-4, atol=1e-5)
            for name, part in parts.items():
                torch.testing.assert_close(result[f'{name}_loss'], part.detach(), rtol=1e-4, atol=1e-5)
                sums[name] = sums.get(name, 0) + part.item() / STEPS
            for optimizer, loss in zip(optimizers, (result['loss'], expected), strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        metrics = aikd.end_epoch()
        for name, mean in sums.items():
            assert metrics[name] == pytest.approx(mean, rel=1e-3, abs=1e-5)
        assert metrics['alpha'] == pytest.approx(0.6 * (epoch + 1) / EPOCHS if epoch else 0)
    for ours, theirs in zip(student.parameters(), mirror.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def batch(seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(0, 5, (size,), generator=generator)


def step(aikd, student, x, y):
    z = student(x)
    return aikd(x, z, y, F.cross_entropy(z, y))


class Explodes(nn.Module):
    def forward(self, x):
        raise AssertionError('this term is off')


@pytest.mark.parametrize('off', ['kd_weight', 'alpha', 'adv_weight'])
def test_a_term_of_weight_0_does_no_work(tiny_net, off):
    config = AikdConfig(teacher='given', teacher_temperature=1., **{off: 0})
    student = tiny_net()
    aikd = Aikd(5, tiny_net(), config, epochs=4)
    aikd.begin_epoch(1, student)
    parts = step(aikd, student, *batch())
    name = {'kd_weight': 'kd', 'alpha': 'progressive', 'adv_weight': 'adv'}[off]
    on = {'kd', 'progressive', 'adv'} - {name}
    assert parts[f'{name}_loss'] == 0 and all(parts[f'{other}_loss'] != 0 for other in on)
    assert (aikd.memory is None) == (off == 'alpha') and (aikd.discriminator is None) == (off == 'adv_weight')
    assert set(parts) == {'loss', 'task_loss', 'progressive_loss', 'kd_loss', 'features_loss', 'adv_loss', 'disc_loss'}


def test_no_teacher_forward_where_no_term_needs_it(tiny_net):
    aikd = Aikd(5, Explodes(), AikdConfig(kd_weight=0, adv_weight=0), epochs=4)
    aikd.begin_epoch(1, student := tiny_net())
    assert aikd.teacher is None and step(aikd, student, *batch())['progressive_loss'] > 0


def test_no_snapshot_in_the_first_epoch(tiny_net):
    aikd = Aikd(5, None, AikdConfig(teacher='none'), epochs=4)
    aikd.begin_epoch(0, student := tiny_net())
    parts = step(aikd, student, *batch())
    assert aikd.memory.model is None and torch.equal(parts['loss'], parts['task_loss'])


def test_all_off_is_the_task_loss_itself(tiny_net):
    aikd = Aikd(5, None, AikdConfig(teacher='none', alpha=0), epochs=4)
    aikd.begin_epoch(2, student := tiny_net())
    x, y = batch()
    z = student(x)
    task = F.cross_entropy(z, y)
    result = aikd(x, z, y, task)
    assert result['loss'] is task
    result['loss'] /= 2  # as the script does under gradient accumulation
    assert result['task_loss'] == 2 * task


def test_gradients_stay_on_their_side(tiny_net):
    teacher, student = tiny_net(), tiny_net()
    buffers = {name: value.clone() for name, value in teacher.state_dict().items()}
    aikd = Aikd(5, teacher, AikdConfig(teacher='given', teacher_temperature=1.), epochs=4)
    for epoch in range(2):
        aikd.train()
        aikd.begin_epoch(epoch, student)
        for seed in range(3):
            step(aikd, student, *batch(seed))['loss'].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in aikd.parameters())
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, buffers[name])


def test_bf16_autocast_and_scaled_fp16_gradients_are_finite(tiny_net):
    for dtype, scale in ((torch.bfloat16, 1.), (torch.float16, 65536.)):
        student = tiny_net()
        aikd = Aikd(5, tiny_net(), AikdConfig(teacher='given', teacher_temperature=1.), epochs=2)
        aikd.begin_epoch(1, student)
        with torch.autocast('cpu', dtype=dtype):
            x, y = batch()
            z = student(x)
            loss = aikd(x, z, y, F.cross_entropy(z.float(), y))['loss']
        assert z.dtype == dtype and loss.dtype == torch.float32
        (loss * scale).backward()
        assert all(parameter.grad.isfinite().all() for parameter in student.parameters())


def test_a_batch_that_is_not_finite_is_skipped_by_d_and_counted(tiny_net):
    aikd = Aikd(5, tiny_net(), AikdConfig(teacher='given', teacher_temperature=1.), epochs=2)
    aikd.begin_epoch(0, student := tiny_net())
    x, y = batch()
    step(aikd, student, x, y)
    x[0] = float('nan')
    assert step(aikd, student, x, y)['adv_loss'] == 0
    assert aikd.end_epoch()['disc_skipped'] == 1


@pytest.mark.parametrize('binary', [False, True])
def test_teacher_temperature_is_fitted_and_used(binary):
    """Labels drawn from a known model: its logits times 3 need T_c = 3 to be themselves again."""
    torch.manual_seed(0)
    source = nn.Linear(4, 5)
    nn.init.normal_(source.weight, std=1.)
    x = torch.randn(2000, 4)
    y = torch.multinomial(source(x).softmax(-1), 1).squeeze(-1)
    sure = nn.Linear(4, 5)
    sure.load_state_dict({name: 3 * value for name, value in source.state_dict().items()})
    aikd = Aikd(5, sure, AikdConfig(teacher='given'), epochs=2, binary=binary)
    assert aikd.needs_temperature
    fit = aikd.fit_teacher_temperature([(x[i:i + 500], y[i:i + 500]) for i in range(0, 2000, 500)])
    if not binary:
        assert fit['temperature'] == pytest.approx(3., rel=0.15)
    assert fit['samples'] == 2000 and not aikd.needs_temperature
    assert fit['top1'] == pytest.approx(100 * (source(x).argmax(-1) == y).float().mean().item(), abs=1e-3)
    torch.testing.assert_close(aikd.teacher(x), sure(x) / fit['temperature'])


def chance_aikd(right: float, classes=5):
    """A teacher that is right on a share of the samples: the first input column is the label, or is not."""
    class Oracle(nn.Module):
        def forward(self, x):
            return F.one_hot(x[:, 0].long(), classes).float() * 10

    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (2048,), generator=generator)
    known = torch.rand(2048, generator=generator) < right
    guess = torch.where(known, y, torch.randint(0, classes, (2048,), generator=generator))
    aikd = Aikd(classes, Oracle(), AikdConfig(teacher='given', teacher_temperature=1., alpha=0), epochs=2)
    aikd.begin_epoch(0, nn.Identity())
    return aikd, guess.float()[:, None].expand(-1, 4), y


def feed(aikd, x, y, samples):
    for i in range(0, samples, 64):
        z = torch.zeros(64, 5, requires_grad=True)
        aikd(x[i:i + 64], z, y[i:i + 64], z.sum())


def test_a_teacher_no_better_than_chance_stops_the_run():
    aikd, x, y = chance_aikd(right=0.)
    feed(aikd, x, y, 1024 - 64)
    with pytest.raises(AikdError, match=r'first 1024 training samples, no better than chance \(20.0 %\)'):
        feed(aikd, x[960:], y[960:], 64)
    aikd, x, y = chance_aikd(right=0.)
    with pytest.raises(AikdError, match='no better than chance'):
        for epoch in range(6):  # short epochs must not hide it
            aikd.begin_epoch(epoch, nn.Identity())
            feed(aikd, x, y, 256)
            aikd.end_epoch()
    assert epoch == 3


def test_a_teacher_better_than_chance_passes():
    aikd, x, y = chance_aikd(right=0.3)
    feed(aikd, x, y, 2048)
    assert aikd.end_epoch()['teacher_top1'] == pytest.approx(100 * (x[:, 0] == y).float().mean().item(), abs=1e-3)


@pytest.mark.parametrize('teacher_classes', [1, 4])
def test_a_teacher_of_another_shape_is_refused(tiny_net, teacher_classes):
    aikd = Aikd(5, tiny_net(teacher_classes), AikdConfig(teacher='given', teacher_temperature=1.), epochs=2)
    aikd.begin_epoch(0, student := tiny_net())
    with pytest.raises(AikdError, match='same classes'):
        step(aikd, student, *batch())


@pytest.mark.parametrize('arguments, message', [
    (dict(num_classes=1), 'at least 2 classes'),
    (dict(num_classes=5, epochs=0), 'at least 1 scheduled epoch'),
    (dict(num_classes=5), 'needs a teacher'),
])
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(AikdError, match=message):
        Aikd(**{'epochs': 2, **arguments})


def test_state_restores_everything_and_reports_changed_options(tiny_net, tmp_path, caplog):
    teacher = tiny_net()

    def new(**options):
        return Aikd(5, copy.deepcopy(teacher), AikdConfig(teacher='given', **options), epochs=4)

    aikd, student = new(), tiny_net()
    aikd.fit_teacher_temperature([batch(1, 64)])
    caplog.clear()  # labels at random cannot tell T_c, which it says
    aikd.begin_epoch(2, student)
    step(aikd, student, *batch())
    torch.save(aikd.get_state(), tmp_path / 'state')
    state = torch.load(tmp_path / 'state', weights_only=True)  # as timm resumes

    same = new()
    same.load_state(state)
    assert same.teacher.temperature == aikd.teacher.temperature and not same.needs_temperature
    assert not caplog.messages
    ours, theirs = aikd.get_state()['discriminator'], same.get_state()['discriminator']
    for name, value in ours['weights'].items():
        assert torch.equal(value, theirs['weights'][name])
    for index, entry in ours['optimizer']['state'].items():
        for name, value in entry.items():
            assert torch.equal(value, theirs['optimizer']['state'][index][name])

    new(alpha=0.6, temperature=3.).load_state(state)
    assert [message.split()[1] for message in caplog.messages] == ['aikd_alpha', 'aikd_temperature']
    with pytest.raises(AikdError, match='cannot be read'):
        new().load_state({**state, 'discriminator': {**state['discriminator'], 'weights': {}}})
    with pytest.raises(AikdError, match='version 99'):
        new().load_state({**state, 'version': 99})
    with pytest.raises(AikdError, match='weights of teacher .* under another path'):
        Aikd(5, tiny_net(), AikdConfig(teacher='given'), epochs=4).load_state(state)
    Aikd(5, tiny_net(), AikdConfig(teacher='another'), epochs=4).load_state(state)


@pytest.mark.parametrize('options', [
    dict(disc_opt='lion'), dict(disc_hidden=(3,)), dict(adv_loss='wgan'), dict(disc_input='probs')], ids=str)
def test_another_discriminator_starts_fresh_and_says_so(tiny_net, caplog, options):
    config, teacher = dict(teacher='given', teacher_temperature=1., alpha=0), tiny_net()
    old = Aikd(5, teacher, AikdConfig(**config), epochs=4)
    new, fresh = (Aikd(5, teacher, AikdConfig(**config, **options), epochs=4) for _ in range(2))
    old.begin_epoch(0, student := tiny_net())
    step(old, student, *batch())
    new.load_state(old.get_state())
    assert 'starts fresh' in caplog.messages[-1]
    for ours, theirs in zip(new.discriminator.parameters(), fresh.discriminator.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    step(new, student, *batch())


def test_changed_numbers_hold_after_a_resume(tiny_net):
    teacher = tiny_net()

    def new(**options):
        config = AikdConfig(**{'teacher': 'given', 'alpha': 0, **options})
        return Aikd(5, copy.deepcopy(teacher), config, epochs=4)

    fixed = new(teacher_temperature=3., disc_lr=0.01)
    auto = new(disc_lr=0.002)
    auto.load_state(fixed.get_state())
    assert auto.needs_temperature  # a number that was given is no fit
    assert [group['lr'] for group in auto.discriminator.optimizer.param_groups] == [0.002]
    auto.fit_teacher_temperature([batch(1, 64)])
    other, number = new(teacher='another'), new(teacher_temperature=2.)
    for aikd in (other, number):
        aikd.load_state(auto.get_state())
    assert other.needs_temperature and number.teacher.temperature == 2.


def test_chance_level_of_the_metrics(tiny_net):
    """disc_accuracy is a share, not a loss: identical outputs are told apart half the time."""
    student = tiny_net().eval()
    aikd = Aikd(5, copy.deepcopy(student), AikdConfig(teacher='given', teacher_temperature=1.), epochs=2)
    aikd.begin_epoch(0, student)
    step(aikd, student, *batch())
    metrics = aikd.end_epoch()
    assert metrics['disc_accuracy'] == pytest.approx(0.5) and metrics['kd'] == pytest.approx(0, abs=1e-6)
    assert metrics['disc'] == pytest.approx(2 * math.log(2), abs=0.3)


def test_options_without_effect_on_a_module_are_told(tiny_net, caplog):
    Aikd(5, tiny_net(), AikdConfig(teacher='given', teacher_dtype='bfloat16', teacher_size=64), epochs=2)
    told = [message for message in caplog.messages if 'has no effect' in message]
    assert ['`teacher_dtype` bfloat16' in told[0], '`teacher_size` 64' in told[1], len(told)] == [True, True, 2]
    caplog.clear()
    Aikd(5, tiny_net(), AikdConfig(teacher='given'), epochs=2)
    assert not caplog.messages
