"""Weights files and checkpoints of all makes, and those that are none."""
import os
import pickle

import pytest
import torch
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3

from timm_aikd import load_teacher

from ..support.teachers import Payload, arguments, assert_same_weights, batch, refused, save, source


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


@pytest.mark.parametrize('name', ['x.pth.tar', 'x.pth', 'x.safetensors'])
@pytest.mark.parametrize('kept', [0, 10, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder, student, name, kept):
    path = folder / save(source(1), name)
    content = path.read_bytes()
    path.write_bytes(content[:int(kept * len(content)) if kept < 1 else kept])
    refused(name, student, 'truncated', 'save it again')


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


@pytest.mark.parametrize('key', ['model_state_dict', 'net', 'module', 'network', 'ema_state_dict'])
def test_other_training_code_keeps_weights_under_other_keys(folder, student, key):
    model = source(1)
    torch.save({key: model.state_dict(), 'epoch': 3}, 'x.pth')
    assert_same_weights(load_teacher('x.pth', student, default_model_name='test_resnet').model, model)


def test_the_keys_of_a_file_without_a_state_dict_are_named(folder, student):
    torch.save({'generator': source(1).state_dict(), 'epoch': 3}, 'x.pth')
    refused('x.pth', student, 'holds no state dict (its keys: generator, epoch)', 'model.state_dict()')
