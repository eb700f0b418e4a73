"""A step in every precision, beside the reference twin on the CPU and timm's own task; overflows."""
import copy

import pytest
import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy
from timm.task import LogitDistillationTask

from timm_aikd import Aikd, AikdTask

from ..test_aikd import CONFIG, EPOCHS, Twin
from .common import CLASSES, Setting, conv_net, descend, given, host, images, net, points

EPS = {torch.float32: 1e-5, torch.bfloat16: 2 ** -8, torch.float16: 2 ** -11}  # of the gradient on the logits


@pytest.mark.parametrize('binary', [False, True], ids=['softmax', 'binary'])
@pytest.mark.parametrize('dtype', EPS, ids=str)
def test_steps_equal_the_reference_twin(device, dtype, binary):
    """The twin computes on the CPU, outside autocast, from the same logits of student, teacher and past student."""
    autocast = Setting(dtype).autocast

    def on_host(model):
        def logits(x):
            with autocast(device):
                return host(model(x))
        return logits
    student, teacher = net(0, device), net(1, device).eval()
    criterion = BinaryCrossEntropy(smoothing=0.) if binary else nn.CrossEntropyLoss()
    aikd = Aikd(CLASSES, copy.deepcopy(teacher), CONFIG, EPOCHS, binary=binary, device=device)
    mlp = copy.deepcopy(aikd.discriminator.mlp).cpu()
    twin = Twin(on_host(teacher), mlp, criterion, binary)
    scaler = torch.amp.GradScaler(device.type, init_scale=2. ** 10, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(EPOCHS):
        aikd.begin_epoch(epoch, student)
        if epoch > 0:
            twin.past = on_host(copy.deepcopy(student).eval())
        for step in range(6):
            x = points(10 * epoch + step)[0].to(device)
            with autocast(device):
                y = teacher(x).argmax(-1)
                z = student(x)
                z.retain_grad()
                result = aikd(x, z, y, criterion(z, y))
            same = host(z).requires_grad_()
            expected, parts = twin.loss(epoch, x, same, y.cpu())
            torch.testing.assert_close(host(result['loss']), expected.detach().double(), rtol=1e-4, atol=1e-5)
            for name, part in parts.items():
                torch.testing.assert_close(host(result[f'{name}_loss']), host(part), rtol=1e-4, atol=1e-5)
            scaler.scale(result['loss']).backward()
            expected.backward()
            gradient = host(z.grad) / scaler.get_scale()
            atol = 2 * EPS[dtype] * same.grad.abs().max().item()  # each term's gradient is rounded
            torch.testing.assert_close(gradient, same.grad, rtol=4 * EPS[dtype], atol=atol)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert aikd.end_epoch()['disc_skipped'] == 0
    for ours, theirs in zip(aikd.discriminator.mlp.parameters(), mlp.parameters(), strict=True):
        torch.testing.assert_close(host(ours), host(theirs), rtol=1e-3, atol=1e-4)


def test_kd_alone_is_timms_logit_distillation(device, setting):
    models = [setting.place(conv_net(), device) for _ in range(2)]
    teacher = setting.place(conv_net(1), device).eval()
    theirs = LogitDistillationTask(
        models[0], copy.deepcopy(teacher), nn.CrossEntropyLoss(), distill_loss_weight=0.7, temperature=3.,
        device=device, verbose=False)
    config = given(alpha=0, adv_weight=0, kd_weight=0.7, temperature=3., teacher_temperature=1.)
    ours = AikdTask(
        models[1], nn.CrossEntropyLoss(), teacher=teacher, config=config, epochs=3, device=device, verbose=False)
    ours.begin_epoch(1)
    losses = []
    for task in (theirs, ours):
        optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.01)
        for step in range(3):
            input, target = images(step)
            with setting.autocast(device):
                loss = task(setting.place(input, device), target.to(device))['loss']
            losses.append(descend(optimizer, loss).item())
    # timm divides the logits by the temperature in half precision
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4 if setting.dtype == torch.float32 else 2e-2)


def states(task, optimizer):
    """Copies of the student's weights and of D with its optimizer."""
    return copy.deepcopy([
        [parameter.detach() for parameter in task.trainable_module.parameters()],
        list(task.aikd.discriminator.mlp.state_dict().values()),
        [value for entry in task.aikd.discriminator.optimizer.state.values() for value in entry.values()]])


def is_same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def scaled_step(task, scaler, optimizer, seed, device):
    x, y = (tensor.to(device) for tensor in points(seed))
    with torch.autocast(device.type, torch.float16):
        loss = task(x, y)['loss']
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss.detach()


def scaled_task(device, **options):
    task = AikdTask(
        net(0, device), nn.CrossEntropyLoss(), teacher=net(1, device), config=given(**options), epochs=3,
        device=device, verbose=False)
    task.begin_epoch(0)
    return task, torch.optim.SGD(task.trainable_module.parameters(), lr=0.05)


@pytest.mark.parametrize('opt', ['adamw', 'sgd', 'lamb'])
def test_logits_that_overflow_leave_discriminator_and_student_alone(device, opt):
    task, optimizer = scaled_task(device, disc_opt=opt)
    scaler = torch.amp.GradScaler(device.type, init_scale=2. ** 10)
    for seed in range(3):
        scaled_step(task, scaler, optimizer, seed, device)
    before = states(task, optimizer)
    task.trainable_module.boost = 1e6  # beyond float16
    assert not scaled_step(task, scaler, optimizer, 3, device).isfinite()
    student, disc, moments = states(task, optimizer)
    assert is_same(before[0], student) and is_same(before[1], disc)
    if opt == 'adamw':  # an optimizer without `found_inf` counts the step that it takes back
        assert is_same(before[2], moments)
    assert scaler.get_scale() == 2. ** 9
    task.trainable_module.boost = 1.
    assert scaled_step(task, scaler, optimizer, 4, device).isfinite()
    after = states(task, optimizer)
    assert not is_same(before[0], after[0]) and not is_same(before[1], after[1])
    metrics = task.end_epoch()
    assert metrics['disc_skipped'] == 1 and all(tensor.isfinite().all() for part in after for tensor in part)


def test_a_scale_that_is_too_large_skips_the_student_alone(device):
    task, optimizer = scaled_task(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2. ** 40)
    before = states(task, optimizer)
    assert scaled_step(task, scaler, optimizer, 0, device).isfinite()
    first = states(task, optimizer)
    assert is_same(before[0], first[0]) and not is_same(before[1], first[1])
    for seed in range(1, 40):
        scaled_step(task, scaler, optimizer, seed, device)
    last = states(task, optimizer)
    assert not is_same(first[0], last[0]) and all(tensor.isfinite().all() for part in last for tensor in part)
    assert task.end_epoch()['disc_skipped'] == 0
