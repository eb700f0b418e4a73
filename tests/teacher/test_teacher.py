"""The teacher itself: frozen, calibrated."""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_aikd import Teacher, load_teacher

from ..support.teachers import batch, save, source


def test_temperature_divides_the_logits():
    model = source(1)
    teacher = Teacher(model, temperature=2.5)
    torch.testing.assert_close(teacher(batch()), model(batch()) / 2.5)
    teacher.set_temperature(1.)
    assert torch.equal(teacher(batch()), model(batch()))


def test_the_first_of_several_outputs_is_the_answer():
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, x

    assert torch.equal(Teacher(Pair())(torch.zeros(2, 3)), torch.ones(2, 3))


def test_training_through_it_leaves_no_trace():
    model, student = source(1).train().requires_grad_(True), source(2).train()
    teacher = Teacher(model)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    before, started = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(3):
        nn.ModuleList([student, teacher]).train()
        assert student.training and not any(module.training for module in model.modules())
        logits = teacher((batch() + step).requires_grad_())
        assert not logits.requires_grad and not logits.is_inference()
        F.kl_div(student(batch()).log_softmax(-1), logits.softmax(-1), reduction='batchmean').backward()
        optimizer.step()
    assert not torch.equal(student.fc.weight, started['fc.weight'])
    assert not torch.equal(student.bn1.running_mean, started['bn1.running_mean'])
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_digest_changes_with_the_weights_alone():
    digest = Teacher(source(1)).digest
    for options in ({'name': 'other', 'temperature': 2.}, {'dtype': torch.bfloat16}):
        assert Teacher(source(1), **options).digest == digest
    assert len({digest, Teacher(source(2)).digest, Teacher(source(1, num_classes=7)).digest}) == 3
    model = source(1)
    with torch.no_grad():
        model.bn1.running_mean += 1e-3
    assert Teacher(model).digest != digest


def test_the_digest_is_the_same_however_the_teacher_is_prepared(tmp_path, student):
    path = save(source(1), str(tmp_path / 'x.pth.tar'))
    digests = [load_teacher(path, student, dtype=dtype).digest for dtype in ('auto', 'bfloat16')]
    assert digests == 2 * [Teacher(source(1)).digest]
