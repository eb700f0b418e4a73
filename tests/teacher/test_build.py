"""Models are built after their weights, whatever is said beside them."""
import json
import re

import pytest
import timm
import torch
from timm.models import register_model, save_for_hf

from timm_aikd import load_teacher
from timm_aikd.teacher import load_model

from ..support.teachers import ODD, assert_same_weights, batch, refused, save, source


@pytest.mark.parametrize('safe', [True, False])
def test_local_dir_answers_as_its_source_bit_for_bit(folder, student, safe):
    model = source(1)
    save_for_hf(model, 'kept', safe_serialization=safe)
    teacher = load_teacher('local-dir:kept', student=student)
    assert_same_weights(teacher.model, model)
    assert torch.equal(teacher(batch()), model(batch()))
    assert not torch.equal(teacher(batch()), student(batch()))


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


def test_weights_of_another_architecture_are_refused(folder, student):
    save(source(1), 'x.pth.tar', model='test_vit')
    refused('x.pth.tar', student, 'not those of a test_vit', '`teacher_model`')
    save(source(1, stem_width=8), 'x.pth')
    refused('x.pth', student, 'conv1.0.weight is [8, 3, 3, 3], not [16, 3, 3, 3]', '`teacher_model`')
    refused('x.pth', student, 'no such architecture \'resnet_of_mine\'', model_name='resnet_of_mine')
    refused('x.pth', student, 'stores no architecture', '`teacher_model`', default_model_name=None)
    save_for_hf(source(1), 'kept', safe_serialization=True)
    save(source(1, stem_width=8), 'kept/model.safetensors')
    refused('local-dir:kept', student, 'could not be loaded as a timm model', 'Error(s) in loading')


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
    ('{"architecture": "test_resnet", "pretrained_cfg": 7}', "has pretrained_cfg '7'"),
    ('{"architecture": "test_resnet", "model_args": [1]}', "has model_args '[1]'"),
    ('{"architecture": "test_resnet", "num_classes": 5, "pretrained_cfg": {}, "model_args": {"no_such_argument": 1}}', (
        'could not be loaded as a timm model')),
])
def test_a_folder_with_a_config_of_something_else_is_refused(folder, student, config, fragment):
    save_for_hf(source(1), 'kept', safe_serialization=True)
    (folder / 'kept' / 'config.json').write_text(config)
    refused('local-dir:kept', student, fragment)


def test_input_size_may_be_one_number(folder, student):
    """As DeiT's script has it."""
    model = source(1, 'test_vit', img_size=32)
    save(model, 'x.pth.tar', model='test_vit', input_size=32)
    assert load_model('x.pth.tar').data_config['input_size'] == (3, 32, 32)
    assert torch.equal(load_teacher('x.pth.tar', student)(batch(32)), model(batch(32)))


def as_its_authors_have_it(weights):
    """A ConvNeXt of timm in the layout of its authors."""
    names = (
        (r'^stem\.', 'downsample_layers.0.'), (r'stages\.(\d)\.blocks\.', r'stages.\1.'),
        (r'stages\.(\d)\.downsample', r'downsample_layers.\1'), ('conv_dw', 'dwconv'), (r'mlp\.fc', 'pwconv'),
        (r'head\.norm', 'norm'), (r'head\.fc', 'head'))
    renamed = {}
    for name, tensor in weights.items():
        for pattern, other in names:
            name = re.sub(pattern, other, name)
        renamed[name] = tensor
    return renamed


def test_weights_in_their_authors_layout_are_converted_as_timm_does(folder, student):
    model = source(1, 'test_convnext')
    weights = as_its_authors_have_it(model.state_dict())
    assert weights.keys().isdisjoint({'stem.0.weight', 'head.fc.weight'})
    torch.save({'model': weights}, 'x.pth')
    teacher = load_teacher('x.pth', student, model_name='test_convnext')
    assert_same_weights(teacher.model, model)
    del weights['norm.weight']
    torch.save({'model': weights}, 'x.pth')
    refused('x.pth', student, 'not those of a test_convnext', model_name='test_convnext')


def test_bare_weights_of_the_students_architecture_have_its_arguments(folder, student):
    options = {'stem_width': 8, 'global_pool': 'max'}
    model = source(1, **options)
    save(model, 'x.pth')
    load = dict(default_model_name='test_resnet', model_args={**options, 'bn_eps': None, 'num_classes': 9})
    assert torch.equal(load_teacher('x.pth', student, **load)(batch(96)), model(batch(96)))
    save(source(1, 'test_efficientnet'), 'y.pth')
    teacher = load_teacher('y.pth', student, model_name='test_efficientnet', **load)  # another: its own
    assert torch.equal(teacher(batch(96)), source(1, 'test_efficientnet')(batch(96)))
    refused('x.pth', student, 'conv1.0.weight is [8, 3, 3, 3], not [16, 3, 3, 3]', 'that stores its arguments')
    vit = source(1, 'test_vit', img_size=32)
    save(vit, 'z.pth')
    teacher = load_teacher('z.pth', student, default_model_name='test_vit', model_args={'img_size': 32})
    assert torch.equal(teacher(batch(32)), vit(batch(32)))


@pytest.mark.parametrize('name, where', [
    ('hf-hub:org/net', 'cache'), ('hf_hub:org/net@main', 'cache'), ('local-dir:kept', 'folder'),
    ('hf-hub:timm/test_resnet.r160_in1k', 'name'), ('hf-hub:org/test_resnet@v1', 'name'),
])
def test_the_architecture_of_a_run_on_a_hub_model_needs_no_network(folder, student, monkeypatch, name, where):
    def offline(*args, **kwargs):
        raise AssertionError('the network was asked')

    model = source(1, stem_width=8 if where != 'name' else 16)
    save_for_hf(model, 'kept', safe_serialization=True, model_args={'stem_width': 8})
    config = json.loads((folder / 'kept/config.json').read_text())
    config['pretrained_cfg'].update({key: list(value) for key, value in ODD.items()})
    (folder / 'kept/config.json').write_text(json.dumps(config))
    monkeypatch.setattr(
        'timm_aikd.teacher.build.try_to_load_from_cache',
        lambda repository, file, revision: str(folder / 'kept' / file) if where == 'cache' else None)
    for module in ('timm.models._hub', 'timm_aikd.teacher.hub'):
        monkeypatch.setattr(f'{module}.hf_hub_download', offline)
    save(model, 'x.pth.tar', model=name)
    loaded = load_model('x.pth.tar')
    assert_same_weights(loaded.model, model)
    if where != 'name':
        assert (tuple(loaded.data_config['mean']), tuple(loaded.data_config['std'])) == (ODD['mean'], ODD['std'])


def test_an_architecture_that_only_the_hub_knows_is_asked_for(folder, student, monkeypatch):
    monkeypatch.setattr('timm_aikd.teacher.build.try_to_load_from_cache', lambda *args, **kwargs: None)
    save(source(1), 'x.pth.tar', model='hf-hub:org/mine')
    refused('x.pth.tar', student, "no such architecture 'hf-hub:org/mine'", '`teacher_model`')
    assert_same_weights(load_teacher('x.pth.tar', student, model_name='test_resnet').model, source(1))
    refused('x.pth.tar', student, 'did you mean test_resnet', model_name='test_rsnet')


def test_an_architecture_of_the_users_own(folder, student):
    @register_model
    def my_own_resnet(pretrained=False, **kwargs):
        return timm.create_model('test_resnet', **{k: v for k, v in kwargs.items() if not k.startswith('pretrained')})

    save(source(1), 'x.pth.tar', model='my_own_resnet')
    assert_same_weights(load_teacher('x.pth.tar', student).model, source(1))
    save(source(1), 'y.pth.tar', model='not_imported')
    refused('y.pth.tar', student, "no such architecture 'not_imported'", 'import your code', '--import')


@pytest.mark.parametrize('form', ['local-dir', 'run', 'weights'])
def test_a_model_without_a_classifier_is_refused(folder, student, form):
    model = source(1, num_classes=0)
    spec = {'run': 'x.pth.tar', 'weights': 'x.pth'}.get(form, 'local-dir:kept')
    if form == 'local-dir':
        save_for_hf(model, 'kept', safe_serialization=True)
    else:
        save(model, spec, num_classes=0)
    refused(spec, student, 'has no classifier', 'num_classes is 0', 'choose a model that has one')
