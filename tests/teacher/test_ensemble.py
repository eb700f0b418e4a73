"""Several teachers as one."""
import copy
import logging

import pytest
import torch

from timm_aikd import Aikd, AikdConfig, AikdError, Teacher
from timm_aikd.teacher import TeacherEnsemble
from timm_aikd.teacher.ensemble import mean_logits


@pytest.mark.parametrize('binary', [False, True])
def test_the_mean_of_probabilities(binary):
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 5) * 4
    probs = torch.sigmoid if binary else (lambda z: torch.softmax(z, -1))
    torch.testing.assert_close(probs(mean_logits(list(logits), binary)), probs(logits.double()).mean(0).float())
    sure = [torch.full((1, 5), 200.), torch.full((1, 5), 200.)]
    assert mean_logits(sure, binary).isfinite().all()


def test_each_member_keeps_its_own_input_and_classes(tiny_net):
    torch.manual_seed(0)
    models = tiny_net(5).eval(), tiny_net(7).eval()
    scale, shift, columns = torch.tensor(2.), torch.tensor(-1.), torch.tensor([6, 0, 1, 2, 3])
    members = [
        Teacher(copy.deepcopy(models[0]), 'A', given='a'),
        Teacher(copy.deepcopy(models[1]), 'B', scale=scale, shift=shift, columns=columns)]
    ensemble = TeacherEnsemble(members)
    ensemble.set_temperature(1.5)
    x = torch.randn(4, 4)
    expected = (models[0](x).softmax(-1) + models[1](2 * x - 1)[:, columns].softmax(-1)) / 2
    torch.testing.assert_close(ensemble(x), expected.log() / 1.5)
    assert ensemble.name == 'A + B' and ensemble.specs == ('A', 'B') and ensemble.given == ['a', 'B']
    assert not ensemble.training and not any(p.requires_grad for p in ensemble.parameters())
    ensemble.train()
    assert not models[0].training and not any(module.training for module in ensemble.modules())


def test_equal_members_are_told_and_the_cost_is_logged(tiny_net, caplog):
    caplog.set_level(logging.INFO)
    net = tiny_net()
    TeacherEnsemble([Teacher(copy.deepcopy(net), 'A'), Teacher(net, 'B')])
    assert any('A + B' in message and 'same weights' in message for message in caplog.messages)
    assert any('2 teachers' in message and 'MB' in message for message in caplog.messages)
    caplog.clear()
    TeacherEnsemble([Teacher(tiny_net(), 'A'), Teacher(tiny_net(), 'B')])
    assert not any('same weights' in message for message in caplog.messages)


@pytest.mark.parametrize('binary', [False, True])
def test_kd_learns_from_the_mean(tiny_net, binary):
    """With kd alone the loss is that against the mean; its one T_c is fitted to the mean."""
    torch.manual_seed(0)
    models = [tiny_net().eval() for _ in range(3)]
    config = AikdConfig(teacher=('a', 'b', 'c'), alpha=0, adv_weight=0, temperature=1.)
    aikd = Aikd(5, TeacherEnsemble([Teacher(copy.deepcopy(m), n) for m, n in zip(models, 'abc', strict=True)]),
                config, epochs=2, binary=binary)
    x = torch.randn(64, 4)
    to_probs = torch.sigmoid if binary else (lambda z: torch.softmax(z, -1))
    mean = sum(to_probs(model(x)) for model in models) / 3
    fit = aikd.fit_teacher_temperature([(x, mean.argmax(-1))])
    assert fit['top1'] == 100 and aikd.teacher.temperature == fit['temperature'] < 1
    z = torch.randn(64, 5, requires_grad=True)
    aikd.begin_epoch(0, models[0])
    kd = aikd(x, z, mean.argmax(-1), z.sum())['kd_loss']
    target = to_probs((torch.logit(mean) if binary else mean.log()) / fit['temperature'])
    if binary:
        q = torch.sigmoid(z)
        expected = (target * (target / q).log() + (1 - target) * ((1 - target) / (1 - q)).log()).mean()
    else:
        expected = (target * (target.log() - z.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(kd, expected.detach(), rtol=1e-4, atol=1e-5)
    state = aikd.get_state()
    assert state['config']['teacher'] == ['a', 'b', 'c'] and state['teacher_digest'] == aikd.teacher.digest


@pytest.mark.parametrize('teacher, message', [
    ([], 'empty list'), (['a', 'none'], 'none cannot stand among others'), (['a', 3], '`teacher` 3'),
    (['a', ''], "''")])
def test_lists_that_are_refused(teacher, message):
    with pytest.raises(AikdError, match=message):
        AikdConfig(teacher=teacher)


def test_a_list_of_one_is_that_one():
    assert AikdConfig(teacher=['a']) == AikdConfig(teacher='a')
    assert AikdConfig(teacher=['a', 'b']).to_dict()['teacher'] == ['a', 'b']
    assert AikdConfig(teacher=['a', 'b']).teachers == ('a', 'b') and AikdConfig().teachers == ()
