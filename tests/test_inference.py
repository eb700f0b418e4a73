"""Teacher and snapshot are made cheaper and answer as the networks they were made of."""
import pytest
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf

from timm_aikd import SnapshotMemory, load_teacher
from timm_aikd.inference import forward_layout

from .support.teachers import source


def test_a_snapshot_is_folded_and_overwritten_in_place():
    student, memory = source(1).train(), SnapshotMemory()
    memory.remember(student)
    where = [tensor.data_ptr() for tensor in memory.state_dict().values()]
    student.load_state_dict(source(2).state_dict())
    memory.remember(student)
    assert where == [tensor.data_ptr() for tensor in memory.state_dict().values()]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in memory.modules())
    input = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(memory(input), source(2)(input), rtol=1e-4, atol=1e-5)
    assert student.training and any(isinstance(module, nn.BatchNorm2d) for module in student.modules())


def teacher_of(model, folder, **options):
    save_for_hf(model, folder, safe_serialization=True)
    return load_teacher(f'local-dir:{folder}', source(9, num_classes=model.num_classes), **options)


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet', 'test_convnext'])
def test_a_teacher_is_folded_and_answers_as_its_source(tmp_path, name):
    model = source(1, name)
    config = model.pretrained_cfg
    teacher = teacher_of(model, tmp_path, dtype='float32', mean=config['mean'], std=config['std'])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher.modules())
    convolutions = [module.weight for module in teacher.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    input = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(teacher(input), model(input), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('device, layout, expected', [
    ('cpu', torch.contiguous_format, torch.channels_last), ('cpu', torch.channels_last, torch.channels_last),
    ('meta', torch.contiguous_format, torch.preserve_format), ('meta', torch.channels_last, torch.channels_last),
])
def test_the_layout_is_what_is_fast_or_what_the_student_has(device, layout, expected):
    student = timm.create_model('test_resnet').to(device).to(memory_format=layout)
    assert forward_layout(student) == expected
