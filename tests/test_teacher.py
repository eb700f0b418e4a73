"""From a spec to a frozen, checked teacher: every form of it, the numbers it answers with, and each refusal."""
import argparse
import copy
import logging
import math
import os
import pickle
import random

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3

from timm_aikd import AikdError, Teacher, load_teacher
from timm_aikd.source import parse_spec
from timm_aikd.teacher import better_than_chance

CLASSES = ('ant', 'bee', 'cat', 'dog', 'elk')
HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}  # as test_resnet's own
ODD = {'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)}


def source(seed=0, name='test_resnet', num_classes=5, overlay=None, **kwargs):
    """A model none of whose parameters and statistics is still neutral, in eval mode."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes, pretrained_cfg_overlay=overlay, **kwargs)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * (torch.rand_like(tensor) - 0.5)
    return model.eval()


def batch(size=32, channels=3):
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0))


def save(module, path, **args):
    """The model as timm's scripts keep it (.pth.tar), or its bare state dict."""
    if path.endswith('.safetensors'):
        safetensors.torch.save_file(module.state_dict(), path)
    elif path.endswith('.pth.tar'):
        torch.save({'state_dict': module.state_dict(), 'epoch': 3, 'args': arguments(**args)}, path)
    else:
        torch.save(module.state_dict(), path)
    return path


def arguments(**given):
    """What a run of train.py keeps of its command line."""
    unset = dict.fromkeys(('in_chans', 'img_size', 'input_size', 'mean', 'std', 'gp', 'num_classes'))
    return argparse.Namespace(**{**unset, 'model': 'test_resnet', 'model_kwargs': {}, 'lr': 0.1, **given})


def assert_same_weights(model, expected):
    for (name, x), y in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.fixture(autouse=True)
def as_it_was_saved(monkeypatch):
    """No folding and no other layout: answers are compared to the last bit. test_inference.py is about those."""
    monkeypatch.setattr('timm_aikd.teacher.folded', lambda model: (model, []))
    monkeypatch.setattr('timm_aikd.teacher.forward_layout', lambda *_: torch.preserve_format)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, so that specs are as short as their users write them."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def student():
    return source(9)


# the forms of a spec

def test_none_is_no_teacher(student):
    assert load_teacher('none', student=student) is None


@pytest.mark.parametrize('spec, parsed', [
    ('none', ('none', '')),
    ('hf-hub:timm/resnet50.a1_in1k', ('hf-hub', 'timm/resnet50.a1_in1k')),
    ('hf-hub:a/b-c_d.e@refs/pr/1', ('hf-hub', 'a/b-c_d.e@refs/pr/1')),
    ('hf_hub:a/b@v1.0', ('hf-hub', 'a/b@v1.0')),
    ('resnet50', ('name', 'resnet50')),
    ('resnet50.a1_in1k', ('name', 'resnet50.a1_in1k')),
    ('local-dir:kept', ('local-dir', 'kept')),
    ('kept/x.safetensors', ('file', 'kept/x.safetensors')),
    ('run', ('file', os.path.join('run', 'model_best.pth.tar'))),
])
def test_a_spec_is_told_by_its_form(folder, spec, parsed):
    for path in ('kept/config.json', 'kept/x.safetensors', 'run/model_best.pth.tar'):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
    assert parse_spec(spec) == parsed


@pytest.mark.parametrize('safe', [True, False])
def test_local_dir_answers_as_its_source_bit_for_bit(folder, student, safe):
    model = source(1)
    save_for_hf(model, 'kept', safe_serialization=safe)
    teacher = load_teacher('local-dir:kept', student=student)
    assert_same_weights(teacher.model, model)
    assert torch.equal(teacher(batch()), model(batch()))
    assert not torch.equal(teacher(batch()), student(batch()))


@pytest.mark.parametrize('name', ['x.pth.tar', 'x.pth', 'x.pt', 'x.bin', 'x.safetensors'])
def test_a_file_answers_as_its_source_bit_for_bit(folder, student, name):
    model = source(1)
    teacher = load_teacher(save(model, name), student=student, default_model_name='test_resnet')
    assert teacher.name == name
    assert torch.equal(teacher(batch()), model(batch()))


@pytest.mark.parametrize('keys, kept', [
    (('state_dict',), 'state_dict'),
    (('model',), 'model'),
    (('state_dict', 'state_dict_ema'), 'state_dict_ema'),
    (('model', 'model_ema'), 'model_ema'),
])
def test_ema_weights_come_first(folder, student, keys, kept):
    models = {key: source(seed) for seed, key in enumerate(keys, start=1)}
    torch.save({key: model.state_dict() for key, model in models.items()}, 'x.pth')
    teacher = load_teacher('x.pth', student=student, default_model_name='test_resnet')
    assert_same_weights(teacher.model, models[kept])


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.'])
def test_wrappers_leave_no_mark(folder, student, prefix):
    model = source(1)
    torch.save({'state_dict': {prefix + name: tensor for name, tensor in model.state_dict().items()}}, 'x.pth')
    teacher = load_teacher('x.pth', student=student, default_model_name='test_resnet')
    assert_same_weights(teacher.model, model)


@pytest.mark.parametrize('with_ema', [False, True])
def test_a_run_folder_gives_its_best_model(folder, student, with_ema):
    model, best, last, best_ema = source(0), source(1), source(2), source(3)
    ema = ModelEmaV3(model) if with_ema else None
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), lr=0.1), args=arguments(), model_ema=ema, checkpoint_dir='run',
        recovery_dir='run')
    os.mkdir('run')
    for epoch, (weights, ema_weights, metric) in enumerate([(best, best_ema, 9.), (last, last, 5.)]):
        model.load_state_dict(weights.state_dict())
        if with_ema:
            ema.module.load_state_dict(ema_weights.state_dict())
        saver.save_checkpoint(epoch, metric=metric)
    teacher = load_teacher('run', student=student)
    assert_same_weights(teacher.model, best_ema if with_ema else best)


def test_batchnorm_keeps_the_eps_of_the_run(folder, student):
    save(source(1, 'test_efficientnet'), 'run.pth.tar', model='test_efficientnet', bn_eps=0.1)
    model = load_teacher('run.pth.tar', student=student).model
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.1}


def test_the_architecture_is_the_one_given_else_stored_else_the_default(folder, student):
    vit = source(1, 'test_vit', img_size=32)
    save(vit, 'stored.pth.tar', model='test_vit', img_size=32)
    save(vit, 'wrong.pth.tar', model='test_resnet', img_size=32)
    save(source(1), 'bare.pth')
    for spec, given, default, kind in (
            ('stored.pth.tar', None, 'test_resnet', 'VisionTransformer'),
            ('wrong.pth.tar', 'test_vit', 'test_resnet', 'VisionTransformer'),
            ('bare.pth', None, 'test_resnet', 'ResNet'),
            ('bare.pth', 'test_resnet', 'test_vit', 'ResNet'),
    ):
        teacher = load_teacher(spec, student=student, model_name=given, default_model_name=default)
        assert type(teacher.model).__name__ == kind


def test_model_arguments_of_the_run_are_used_again(folder, student):
    model = source(1, stem_width=8, global_pool='max')
    save(model, 'x.pth.tar', model_kwargs={'stem_width': 8}, gp='max')
    assert torch.equal(load_teacher('x.pth.tar', student=student)(batch(96)), model(batch(96)))


def test_a_student_within_wrappers_is_looked_at_itself(folder):
    model = source(1)
    save(model, 'x.pth.tar')
    teacher = load_teacher('x.pth.tar', student=nn.parallel.DataParallel(source(9, overlay=ODD)))
    torch.testing.assert_close(teacher(batch()), renormalised(model, batch(), ODD, HALF), rtol=0, atol=1e-5)
    refused('x.pth.tar', nn.parallel.DataParallel(source(9, num_classes=7)), 'has 5 classes, the student has 7')


# the numbers

def renormalised(model, x, ours, theirs):
    """The model's answer to images that were normalised for the student, brought back to pixels and on."""
    mean_s, std_s, mean_t, std_t = (
        torch.tensor(each[key], dtype=torch.float64).view(1, -1, 1, 1) for each in (ours, theirs)
        for key in ('mean', 'std'))
    return model(((x.double() * std_s + mean_s - mean_t) / std_t).float())


@pytest.mark.parametrize('form', ['hub config', 'arguments', 'default of the architecture'])
@pytest.mark.parametrize('given', [True, False])
def test_input_is_renormalised_for_the_teacher(folder, form, given):
    model = source(1, overlay=ODD if form == 'hub config' else None)
    theirs = HALF if form == 'default of the architecture' else ODD
    if form == 'hub config':
        save_for_hf(model, 'kept', safe_serialization=True)
        spec = 'local-dir:kept'
    else:
        spec = save(model, 'x.pth.tar', **(ODD if form == 'arguments' else {}))
    ours = {'mean': (0.7, 0.6, 0.5), 'std': (0.2, 0.3, 0.9)}
    student = source(9, overlay=None if given else ours)
    teacher = load_teacher(spec, student=student, **(ours if given else {}))
    torch.testing.assert_close(teacher(batch()), renormalised(model, batch(), ours, theirs), rtol=0, atol=1e-5)
    assert (teacher(batch()) - model(batch())).abs().max() > 0.01


def test_one_channel_is_renormalised_too(folder):
    ours, theirs = {'mean': [0.28], 'std': [0.35]}, {'mean': (0.5,), 'std': (0.25,)}
    model = source(1, in_chans=1, overlay={**theirs, 'input_size': (1, 32, 32)})
    save_for_hf(model, 'kept', safe_serialization=True, model_args={'in_chans': 1})
    save(model, 'x.pth.tar', in_chans=1, **theirs)
    for spec in ('local-dir:kept', 'x.pth.tar'):
        teacher = load_teacher(spec, student=source(9, in_chans=1), **ours)
        expected = renormalised(model, batch(channels=1), ours, theirs)
        torch.testing.assert_close(teacher(batch(channels=1)), expected, rtol=0, atol=1e-5)
    assert (expected - model(batch(channels=1))).abs().max() > 0.01


def test_bare_weights_are_fed_what_the_student_is_fed(folder, student, caplog):
    model = source(1)
    with caplog.at_level(logging.INFO):
        teacher = load_teacher(save(model, 'x.pth'), student=student, default_model_name='test_resnet', **ODD)
    assert torch.equal(teacher(batch()), model(batch()))
    assert any('nothing of their normalisation' in message for message in caplog.messages)


def resized(x, *size):
    """Bicubic and antialiased as Pillow does it, a channel at a time."""
    channels = [Image.fromarray(channel.numpy()).resize(size[::-1], Image.BICUBIC) for channel in x.flatten(0, 1)]
    return torch.stack([torch.from_numpy(np.array(channel)) for channel in channels]).view(*x.shape[:2], *size)


@pytest.mark.parametrize('size, where', [
    (32, 'local-dir'), ((32, 48), 'local-dir'), (32, 'img_size'), ((32, 48), 'input_size'), (32, 'model_kwargs')])
def test_a_fixed_input_size_is_met_by_resizing(folder, student, size, where):
    options = {'img_size': size, 'dynamic_img_size': False}
    model = source(1, 'test_vit', **options)
    height, width = np.broadcast_to(size, 2).tolist()
    spec = 'x.pth.tar'
    if where == 'local-dir':
        save_for_hf(model, 'kept', safe_serialization=True, model_args=options)
        spec = 'local-dir:kept'
    elif where == 'model_kwargs':
        save(model, spec, model='test_vit', model_kwargs=options)
    else:
        given = {'img_size': 32} if where == 'img_size' else {'input_size': (3, 32, 48)}
        save(model, spec, model='test_vit', model_kwargs={'dynamic_img_size': False}, **given)
    teacher = load_teacher(spec, student=student, **HALF)
    x = batch(96)
    assert torch.equal(teacher(x[..., :height, :width]), model(x[..., :height, :width]))
    torch.testing.assert_close(teacher(x), model(resized(x, height, width)), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name, size, options', [
    ('swin_tiny_patch4_window7_224', 56, {'embed_dim': 8, 'depths': (1, 1), 'num_heads': (1, 1)}),
    ('hiera_tiny_224', 64, {'embed_dim': 8, 'stages': (1, 1, 1, 1)}),
])
@pytest.mark.parametrize('in_model_kwargs', [False, True])
def test_a_fixed_input_size_is_that_of_the_run(folder, student, name, size, options, in_model_kwargs):
    """A Swin's weights fit other sizes as well, and a Hiera does not say which it was built for."""
    model = source(1, name, img_size=size, **options)
    save(model, 'x.pth.tar', model=name, img_size=size, **HALF, model_kwargs={
        **options, **({'img_size': size} if in_model_kwargs else {})})
    teacher = load_teacher('x.pth.tar', student=student, **HALF)
    assert torch.equal(teacher(batch(size)), model(batch(size)))
    torch.testing.assert_close(teacher(batch(96)), model(resized(batch(96), size, size)), rtol=0, atol=1e-5)


def test_any_other_size_goes_in_as_it_comes(folder, student):
    for model, spec in ((source(1), 'x.pth.tar'), (source(1, 'test_vit', img_size=32), 'y.pth.tar')):
        save(model, spec, model='test_vit' if spec[0] == 'y' else 'test_resnet', img_size=32)
        assert torch.equal(load_teacher(spec, student=student)(batch(48)), model(batch(48)))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_runs_in_its_own_dtype_outside_autocast(folder, student, dtype):
    model = source(1)
    teacher = load_teacher(save(model, 'x.pth.tar'), student=student, dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16):
        logits = teacher(batch())
    own = getattr(torch, dtype)
    assert logits.dtype == torch.float32 and next(teacher.parameters()).dtype == own
    assert torch.equal(logits, copy.deepcopy(model).to(own)(batch().to(own)).float())


def test_runs_as_the_student_does_unless_told_otherwise(folder, student):
    model = source(1)
    teacher = load_teacher(save(model, 'x.pth.tar'), student=student)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(teacher(batch()), model(batch()).float())
    assert not torch.equal(teacher(batch()), model.bfloat16()(batch().bfloat16()).float())
    teacher = load_teacher('x.pth.tar', student=copy.deepcopy(student).bfloat16(), **ODD)
    logits = teacher(batch().bfloat16())
    assert logits.dtype == torch.float32 and next(teacher.parameters()).dtype == torch.bfloat16
    close = renormalised(source(1), batch(), ODD, HALF)
    torch.testing.assert_close(logits, close, rtol=0.05, atol=0.05)


def test_temperature_divides_the_logits():
    model = source(1)
    teacher = Teacher(model, temperature=2.5)
    torch.testing.assert_close(teacher(batch()), model(batch()) / 2.5)
    teacher.temperature = 1.
    assert torch.equal(teacher(batch()), model(batch()))


def test_the_first_of_several_outputs_is_the_answer():
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, x

    assert torch.equal(Teacher(Pair())(torch.zeros(2, 3)), torch.ones(2, 3))


# frozen

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


@pytest.mark.parametrize('spec', ['local-dir:kept', 'x.pth.tar', 'x.pth'])
def test_loading_one_moves_no_random_stream(folder, student, spec):
    save_for_hf(source(1), 'kept', safe_serialization=True)
    save(source(1), 'x.pth.tar')
    save(source(1), 'x.pth')

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seed()
    expected = draw()
    seed()
    load_teacher(spec, student=student, default_model_name='test_resnet')
    assert draw() == expected


# class names

def named_teacher(names, ours, student):
    model = source(1, num_classes=len(names))
    save_for_hf(model, 'kept', safe_serialization=True, model_config={'label_names': names})
    return model, load_teacher('local-dir:kept', student=student, class_names=ours)


@pytest.mark.parametrize('as_dict', [False, True])
def test_columns_follow_the_students_class_order(folder, student, as_dict):
    theirs = ['dog', 'ant', 'elk', 'cat', 'bee']
    names = {str(i): name for i, name in enumerate(theirs)} if as_dict else theirs
    model, teacher = named_teacher(names, CLASSES, student)
    logits, own = teacher(batch()), model(batch())
    for i, name in enumerate(CLASSES):
        assert torch.equal(logits[:, i], own[:, theirs.index(name)])
    assert not torch.equal(logits, own)


@pytest.mark.parametrize('names, ours', [(list(CLASSES), CLASSES), (None, CLASSES), (list(reversed(CLASSES)), None)])
def test_columns_stay_where_names_agree_or_are_missing(folder, student, names, ours):
    model = source(1)
    save_for_hf(model, 'kept', safe_serialization=True, model_config={'label_names': names})
    assert torch.equal(
        load_teacher('local-dir:kept', student=student, class_names=ours)(batch()), model(batch()))


@pytest.mark.parametrize('names, odd', [
    (['ant', 'bee', 'fox', 'dog', 'elk'], 'cat'),
    (['fox', 'gnu', 'hen', 'owl', 'elk'], 'ant'),
    (['ant', 'bee', 'cat', 'dog', 'dog'], 'elk'),
])
def test_other_classes_are_refused_with_the_first_odd_one(folder, student, names, odd):
    with pytest.raises(AikdError) as error:
        named_teacher(names, CLASSES, student)
    assert_one_line(error.value, 'local-dir:kept', 'has 5 classes', f"the data set's '{odd}' is none of the teacher's")


def test_a_part_of_the_teachers_classes(folder, student):
    names = ['fox', 'ant', 'bee', 'cat', 'dog', 'elk', 'gnu']
    model, teacher = named_teacher(names, ['bee', 'ant', 'elk', 'cat', 'dog'], student)
    torch.testing.assert_close(teacher(batch()), model(batch())[:, [2, 1, 5, 3, 4]])


def test_a_size_of_its_own(folder):
    """A convolutional teacher runs at the size given, one with a fixed size at that alone."""
    model = timm.create_model('test_resnet', num_classes=5).eval()
    torch.save(model.state_dict(), 'resnet.pth')
    teacher = load_teacher('resnet.pth', student=model, default_model_name='test_resnet', size=48)
    x = torch.randn(2, 3, 32, 32)
    larger = torch.nn.functional.interpolate(x, (48, 48), mode='bicubic', antialias=True)
    torch.testing.assert_close(teacher(x), model(larger))
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=5, depth=1)
    save_for_hf(vit, 'vit', safe_serialization=True, model_args={'depth': 1})
    assert load_teacher('local-dir:vit', student=model, size=224).size == (224, 224)
    with pytest.raises(AikdError) as error:
        load_teacher('local-dir:vit', student=model, size=96)
    assert_one_line(error.value, 'local-dir:vit', '--aikd-teacher-size 96', 'takes 224 x 224 pixels only')


def test_names_of_another_vocabulary_are_ignored_with_a_warning(folder, student, caplog):
    with caplog.at_level(logging.WARNING):
        model, teacher = named_teacher(['n01', 'n02', 'n03', 'n04', 'n05'], CLASSES, student)
    assert torch.equal(teacher(batch()), model(batch()))
    warning, = (record.message for record in caplog.records if record.name.startswith('timm_aikd'))
    assert "'n01'" in warning and "'ant'" in warning and 'same order is assumed' in warning


# refusals

def assert_one_line(error, spec, *fragments):
    message = str(error)
    assert '\n' not in message and len(message) <= 300
    for fragment in (spec, *fragments):
        assert fragment in message


def refused(spec, student, *fragments, **options):
    with pytest.raises(AikdError) as error:
        load_teacher(spec, student=student, **{'default_model_name': 'test_resnet', **options})
    assert_one_line(error.value, spec, *fragments)


@pytest.mark.parametrize('spec, fragment', [
    ('nonsense', 'allowed: hf-hub:ORG/NAME'),
    ('', 'no such file, folder or timm model'),
    ('ftp://host/x', 'allowed: hf-hub:ORG/NAME'),
    ('timm/resnet18', 'did you mean hf-hub:timm/resnet18'),
    ('hf-hub:', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:x', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:a/../b', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:a/..', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:a/b@', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:a/b@../../c', 'hf-hub:ORG/NAME[@REVISION]'),
    ('hf-hub:a/b@v1@v2', 'hf-hub:ORG/NAME[@REVISION]'),
    ('local-dir:missing', 'no config.json'),
    ('local-dir:kept', 'save_for_hf'),
    ('missing.pth', 'no such file'),
    ('missing/model_best.pth.tar', 'no such file'),
    ('folder.pth', 'no such file'),
    ('kept', 'no model_best.pth.tar'),
    ('published', 'use local-dir:published'),
])
def test_a_spec_that_leads_nowhere_is_refused(folder, student, spec, fragment):
    for name in ('kept', 'folder.pth', 'published'):
        (folder / name).mkdir()
    (folder / 'published' / 'config.json').touch()
    refused(spec, student, fragment)


@pytest.mark.parametrize('form', ['local-dir', 'file', 'bare'])
def test_another_number_of_classes_or_channels_is_refused_with_both(folder, student, form):
    for what, options in (('classes', {'num_classes': 7}), ('input channels', {'in_chans': 1})):
        model = source(1, **options)
        if form == 'local-dir':
            spec = f'local-dir:{what}'
            save_for_hf(model, what, safe_serialization=True, model_args=options)
        else:
            spec = save(model, f'{what}.pth.tar' if form == 'file' else f'{what}.pth', **options)
        theirs, ours = (7, 5) if what == 'classes' else (1, 3)
        refused(spec, student, f'has {theirs} {what}, the student has {ours};', 'train or choose')


def test_weights_of_another_architecture_are_refused(folder, student):
    save(source(1), 'x.pth.tar', model='test_vit')
    refused('x.pth.tar', student, 'not those of a test_vit', '--aikd-teacher-model')
    save(source(1, stem_width=8), 'x.pth')
    refused('x.pth', student, 'conv1.0.weight is [8, 3, 3, 3], not [16, 3, 3, 3]', '--aikd-teacher-model')
    refused('x.pth', student, 'no such architecture \'resnet_of_mine\'', model_name='resnet_of_mine')
    refused('x.pth', student, 'stores no architecture', '--aikd-teacher-model', default_model_name=None)
    save_for_hf(source(1), 'kept', safe_serialization=True)
    save(source(1, stem_width=8), 'kept/model.safetensors')
    refused('local-dir:kept', student, 'could not be loaded as a timm model', 'Error(s) in loading')


@pytest.mark.parametrize('name', ['x.pth.tar', 'x.pth', 'x.safetensors'])
@pytest.mark.parametrize('kept', [0, 10, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder, student, name, kept):
    path = folder / save(source(1), name)
    content = path.read_bytes()
    path.write_bytes(content[:int(kept * len(content)) if kept < 1 else kept])
    refused(name, student, 'truncated', 'save it again')


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.safetensors'])
@pytest.mark.parametrize('kept', [0, 10, 0.5])
def test_a_folder_with_a_truncated_file_is_refused(folder, student, name, kept):
    save_for_hf(source(1), 'kept', safe_serialization=name.startswith('model'))
    path = folder / 'kept' / name
    content = path.read_bytes()
    path.write_bytes(content[:int(kept * len(content)) if kept < 1 else kept])
    refused('local-dir:kept', student, 'weights')


@pytest.mark.parametrize('config, fragment', [
    ('', 'is not JSON'),
    ('{"architecture": "test_resnet"', 'is not JSON'),
    ('[]', 'names no architecture'),
    ('{}', 'names no architecture'),
    ('null', 'names no architecture'),
    ('{"architecture": 3}', 'names no architecture'),
    ('{"architecture": "no_such_net"}', "'no_such_net', which timm"),
    ('{"architecture": "test_resnet", "pretrained_cfg": 7}', 'could not be loaded as a timm model'),
    ('{"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": {}, "model_args": {"no_such_argument": 1}}', (
        'could not be loaded as a timm model')),
])
def test_a_folder_with_a_config_of_something_else_is_refused(folder, student, config, fragment):
    save_for_hf(source(1), 'kept', safe_serialization=True)
    (folder / 'kept' / 'config.json').write_text(config)
    refused('local-dir:kept', student, fragment)


class Payload:
    """Its unpickling makes a folder."""

    def __reduce__(self):
        return os.mkdir, ('executed',)


@pytest.mark.parametrize('legacy', [False, True])
def test_a_malicious_pickle_is_refused_unexecuted(folder, student, legacy):
    save_for_hf(source(1), 'kept', safe_serialization=False)
    for path in ('x.pth', 'x.pth.tar', 'kept/pytorch_model.bin'):
        torch.save({'state_dict': Payload()}, path, _use_new_zipfile_serialization=not legacy)
        torch.load(path, weights_only=False)
        os.rmdir('executed')  # so it does harm where it is let
        refused('local-dir:kept' if path.startswith('kept') else path, student, 'weights')
        assert not os.path.exists('executed')
    with open('x.pt', 'wb') as file:
        pickle.dump(Payload(), file)
    refused('x.pt', student, 'never unpickled')
    assert not os.path.exists('executed')


@pytest.mark.parametrize('content', [
    {'epoch': 3}, {}, {'state_dict': None}, [torch.ones(2)], torch.ones(2), 7, {'state_dict': {}}, {0: torch.ones(2)},
])
def test_a_file_without_a_state_dict_is_refused(folder, student, content):
    torch.save(content, 'x.pth')
    refused('x.pth', student, 'holds no state dict')


# the test against chance

@pytest.mark.parametrize('count, num_classes', [(128, 2), (128, 10), (128, 1000), (200, 5), (1024, 2), (1024, 1000)])
def test_better_than_chance_is_the_exact_binomial_test(count, num_classes):
    ways = [math.comb(count, k) * (num_classes - 1) ** (count - k) for k in range(count + 1)]
    exact = [sum(ways[correct:]) * 1000 < num_classes ** count for correct in range(count + 1)]
    first = exact.index(True)
    assert count / num_classes < first < count
    for correct in {0, 1, first - 2, first - 1, first, first + 1, count}:
        assert better_than_chance(correct, count, num_classes) == exact[correct], correct
    assert not better_than_chance(0, 0, num_classes)
