"""A teacher is fitted to the student: normalisation, size, precision, classes."""
import copy
import logging
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.models import save_for_hf

from timm_aikd import AikdError, load_teacher

from ..support.teachers import (
    CLASSES,
    HALF,
    ODD,
    arguments,
    assert_one_line,
    batch,
    refused,
    renormalised,
    save,
    source,
)


def test_a_student_within_wrappers_is_looked_at_itself(folder):
    model = source(1)
    save(model, 'x.pth.tar')
    teacher = load_teacher('x.pth.tar', student=nn.parallel.DataParallel(source(9, overlay=ODD)))
    torch.testing.assert_close(teacher(batch()), renormalised(model, batch(), ODD, HALF), rtol=0, atol=1e-5)
    refused('x.pth.tar', nn.parallel.DataParallel(source(9, num_classes=7)), 'has 5 classes, the student has 7')


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
    assert any('x.pth does not tell its normalisation' in message for message in caplog.messages)


@pytest.mark.parametrize('missing', [('mean', 'std'), ('std',)])
def test_arguments_that_lack_the_normalisation_are_as_none(folder, student, caplog, missing):
    model, args = source(1), arguments()
    for name in missing:
        delattr(args, name)
    torch.save({'state_dict': model.state_dict(), 'args': args}, 'x.pth.tar')
    with caplog.at_level(logging.INFO):
        teacher = load_teacher('x.pth.tar', student=student, **ODD)
    assert torch.equal(teacher(batch()), model(batch()))
    assert any('x.pth.tar does not tell its normalisation' in message for message in caplog.messages)


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
    save(model, 'x.pth')
    teacher = load_teacher('x.pth', student, default_model_name=name, model_args={**options, 'img_size': (size, size)})
    assert teacher.size == (size, size) and torch.equal(teacher(batch(size)), model(batch(size)))


def test_any_other_size_goes_in_as_it_comes(folder, student):
    for model, spec in ((source(1), 'x.pth.tar'), (source(1, 'test_vit', img_size=32), 'y.pth.tar')):
        save(model, spec, model='test_vit' if spec[0] == 'y' else 'test_resnet', img_size=32)
        assert torch.equal(load_teacher(spec, student=student)(batch(48)), model(batch(48)))


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
    assert_one_line(error.value, 'local-dir:vit', '`teacher_size` 96', 'takes 224 x 224 pixels only')


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


def test_names_of_another_vocabulary_are_ignored_with_a_warning(folder, student, caplog):
    with caplog.at_level(logging.WARNING):
        model, teacher = named_teacher(['n01', 'n02', 'n03', 'n04', 'n05'], CLASSES, student)
    assert torch.equal(teacher(batch()), model(batch()))
    warning, = (record.message for record in caplog.records if record.name.startswith('timm_aikd'))
    assert "'n01'" in warning and "'ant'" in warning and 'same order is assumed' in warning


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


def test_a_size_of_its_own_is_tried_where_a_model_has_no_patches(folder, student):
    options = {'embed_dim': (8, 16, 32, 32), 'depths': (1, 1, 1, 1)}
    save(source(1, 'coatnet_0_224', **options), 'x.pth.tar', model='coatnet_0_224', model_kwargs=options)
    refused('x.pth.tar', student, '`teacher_size` 96', 'takes 224 x 224 pixels only', size=96)
    for size in (None, 224):
        assert load_teacher('x.pth.tar', student, size=size).size == (224, 224)
