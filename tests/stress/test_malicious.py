"""Files that mean harm are read as data or not at all, and a token stays where it was."""
import argparse
import json
import os
import pickle
import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf

from timm_aikd import AikdError, StoreMemory, load_teacher
from timm_aikd.commands.push import FinishedRun
from timm_aikd.memory.records import RecordFormat
from timm_aikd.teacher import Checkpoint, TeacherSpec, load_model
from timm_aikd.teacher.hub import Unfit, check_config

from ..conftest import SMALL_RUN, run, training_scripts
from ..script.stand_in import WITHOUT_TASKS, ImageNet3, Script, image_loader
from ..support.hub import HubServer
from ..support.teachers import Payload, arguments, batch, source
from ..teacher.test_hub import TOKEN, load


def checkpoints():
    """What an attacker could hand over, by what it looks like."""
    model = source()
    state = {'version': 1, 'config': {'teacher': Payload()}, 'epoch': 0}
    whole = {'state_dict': model.state_dict(), 'args': arguments(), 'epoch': 0}
    return {
        'nothing else': Payload(),
        'weights': {'state_dict': Payload(), 'args': arguments()},
        'a weight': {**model.state_dict(), 'fc.bias': Payload()},
        'an argument': {**whole, 'args': argparse.Namespace(model='test_resnet', lr=Payload())},
        'a task state': {**whole, 'task_state': {'aikd': state}},
        'the optimizer': {**whole, 'optimizer': Payload()},
    }


def resume_with_task(path):
    with Script() as script:
        script.parse('--aikd', '--aikd-teacher', 'none').resume = path
        task = script.globals['ClassificationTask'](source(), nn.CrossEntropyLoss(), verbose=False)
        script.globals['resume_task_checkpoint'](task, path, log_info=False)


def resume_without_task(path):
    with Script(**WITHOUT_TASKS) as script:
        parsed = script.parse('--aikd', '--aikd-teacher', 'none')
        parsed.resume = path
        script.globals['train_one_epoch'](
            0, ImageNet3(), image_loader(script), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.),
            nn.CrossEntropyLoss(), parsed)


def local_dir(path):
    os.rename(path, 'kept/pytorch_model.bin')
    load_teacher('local-dir:kept', student=source())


READERS = {
    'x.pth': lambda path: load_teacher(path, student=source(), default_model_name='test_resnet'),
    'x.pt': Checkpoint.read,
    'x.bin': Checkpoint.read,
    'x.pth.tar': lambda path: load_model(path, 'test_resnet'),
    'x.safetensors': Checkpoint.read,
    'run/model_best.pth.tar': lambda path: load_teacher('run', student=source()),
    'run/last.pth.tar': lambda path: FinishedRun.read('run', 'last.pth.tar'),
    'resumed.pth.tar': resume_with_task,
    'legacy.pth.tar': resume_without_task,
    'weights.bin': local_dir,
}


@pytest.mark.parametrize('name', READERS)
@pytest.mark.parametrize('form', ['zip', 'old', 'pickle'])
def test_no_pickle_is_executed(tmp_path, monkeypatch, name, form):
    monkeypatch.chdir(tmp_path)
    os.mkdir('run')
    save_for_hf(source(), 'kept', safe_serialization=False)
    for where, content in checkpoints().items():
        if form == 'pickle':
            with open(name, 'wb') as file:
                pickle.dump(content, file)
        else:
            torch.save(content, name, _use_new_zipfile_serialization=form == 'zip')
        with pytest.raises(AikdError):
            READERS[name](name)
        assert not os.path.exists('executed'), where


def test_the_payload_does_harm_where_it_is_let(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in checkpoints().values():
        torch.save(content, 'x.pth')
        torch.load('x.pth', weights_only=False)
        os.rmdir('executed')


def test_no_pickle_is_executed_as_a_memory(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    memory = StoreMemory(RecordFormat(3), 4, str(tmp_path))
    for save in (lambda file: pickle.dump(Payload(), file), lambda file: torch.save(Payload(), file),
                 lambda file: np.save(file, np.array([Payload()]), allow_pickle=True)):
        with open('aikd-memory-0.safetensors', 'wb') as file:
            save(file)
        caplog.clear()
        memory.load_state(
            {'name': 'aikd-memory-0.safetensors', 'folder': str(tmp_path), 'epoch': 0, 'digest': ''}, [])
        assert 'cannot be read' in caplog.text and len(memory.table) == 0 and not os.path.exists('executed')


CONFIG = {'architecture': 'test_resnet', 'num_classes': 5}


@pytest.mark.parametrize('config, word', [
    ({'architecture': 'os.system'}, 'architecture'),
    ({'architecture': 'timm.models.resnet.ResNet'}, 'architecture'),
    ({'architecture': 'hf-hub:evil/net'}, 'architecture'),
    ({'architecture': 'local-dir:/somewhere'}, 'architecture'),
    ({'architecture': '../net'}, 'architecture'),
    ({'architecture': {'__reduce__': 'os.system'}}, 'architecture'),
    ({**CONFIG, 'pretrained_cfg': {'hf_hub_filename': '../../../secret.bin'}}, 'hf_hub_filename'),
    ({**CONFIG, 'pretrained_cfg': {'hf_hub_filename': '/etc/passwd'}}, 'hf_hub_filename'),
    ({**CONFIG, 'hf_hub_filename': '..'}, 'hf_hub_filename'),
    ({**CONFIG, 'pretrained_cfg': {'custom_load': 'hf'}}, 'custom_load'),
    ({**CONFIG, 'pretrained_cfg': {}, 'model_args': {'features_only': True}}, 'features_only'),
    ({**CONFIG, 'pretrained_cfg': {}, 'model_args': {'pretrained_strict': False}}, 'pretrained_strict'),
])
def test_a_config_names_no_class_and_no_path(tmp_path, config, word):
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(Unfit, match=word):
        check_config(tmp_path / 'config.json')


@pytest.mark.parametrize('form', ['new', 'old'])
def test_weights_are_those_of_the_folder_whatever_its_config_says(tmp_path, monkeypatch, form):
    """No `file`, `url`, repository or `state_dict` of a config leads anywhere else."""
    monkeypatch.chdir(tmp_path)
    model = source(1)
    save_for_hf(model, 'kept', safe_serialization=True)
    safetensors.torch.save_file(source(2).state_dict(), 'other.safetensors')
    places = {
        'file': str(tmp_path / 'other.safetensors'), 'url': 'http://127.0.0.1:1/x.pth', 'hf_hub_id': 'evil/net',
        'source': 'hf-hub', 'state_dict': {'fc.bias': [0, 0]}}
    config = json.loads((tmp_path / 'kept/config.json').read_text())
    if form == 'old':  # one level, as timm wrote it years ago
        config = {**config.pop('pretrained_cfg'), 'architecture': 'test_resnet'}
        (tmp_path / 'kept/config.json').write_text(json.dumps(config))
        if timm.create_model('local-dir:kept').num_classes != 5:
            pytest.skip('this timm does not look for the number of classes there')
        config.update(places)
    else:
        config['pretrained_cfg'].update(places)
    (tmp_path / 'kept/config.json').write_text(json.dumps(config))
    teacher = load_teacher('local-dir:kept', student=source())
    torch.testing.assert_close(teacher(batch()), model(batch()))


@pytest.mark.parametrize('args', [
    {'checkpoint_path': '../other.pth'}, {'cache_dir': '/'}, {'pretrained_cfg': {'file': '../other.pth'}},
    {'pretrained_cfg_overlay': {'file': '../other.pth'}}, {'pretrained_filter_fn': 'os.system'}, {'block': 'os.system'},
    {'norm_layer': 'os.system'}, {'act_layer': '__import__("os").mkdir("executed")'}, {'__class__': 'x'},
])
def test_model_args_run_nothing(tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    save_for_hf(source(), 'kept', safe_serialization=True)
    torch.save(source(2).state_dict(), 'other.pth')
    config = json.loads((tmp_path / 'kept/config.json').read_text())
    (tmp_path / 'kept/config.json').write_text(json.dumps({**config, 'model_args': args}))
    with pytest.raises(AikdError, match='could not be loaded as a timm model'):
        load_teacher('local-dir:kept', student=source())
    assert sorted(os.listdir()) == ['kept', 'other.pth']


def test_a_repository_leads_nowhere_else(tmp_path):
    """What the Hub is asked for is in the repository of the spec, whatever its config says."""
    save_for_hf(source(1), tmp_path / 'net', safe_serialization=True)
    good = json.loads((tmp_path / 'net/config.json').read_text())
    changes = {
        'file': {'hf_hub_filename': '../../../secret.bin'}, 'custom': {'custom_load': 'hf'},
        'id': {'hf_hub_id': 'evil/net', 'url': 'http://127.0.0.1:1/x', 'file': '/etc/passwd', 'source': 'url'}}
    with HubServer() as hub:
        hub.add('evil/net', tmp_path / 'net')
        for name, change in changes.items():
            folder = tmp_path / name
            folder.mkdir()
            (folder / 'model.safetensors').write_bytes((tmp_path / 'net/model.safetensors').read_bytes())
            config = {**good, 'pretrained_cfg': {**good['pretrained_cfg'], **change}}
            (folder / 'config.json').write_text(json.dumps(config))
            hub.add(f'org/{name}', folder)
        answers = load([f'hf-hub:org/{name}' for name in changes], tmp_path, **hub.environment(tmp_path / 'home'))
    assert 'its config.json has hf_hub_filename' in answers['hf-hub:org/file']
    assert 'its config.json has custom_load' in answers['hf-hub:org/custom']
    torch.testing.assert_close(torch.tensor(answers['hf-hub:org/id']), source(1)(batch()))
    assert not any('evil' in request or '..' in request for request in hub.requests)


@pytest.mark.parametrize('spec', [
    f'hf-hub:https://me:{TOKEN}@hub/net', f'https://{TOKEN}@hub/net.pth', f'hf-hub:org/net@{TOKEN}/', TOKEN,
    f'local-dir:https://me:password@hub/{TOKEN}',
])
def test_no_token_of_a_spec_is_quoted(spec):
    with pytest.raises(AikdError) as caught:
        TeacherSpec.parse(f'{spec} ')
    assert not re.search('Secret|password', str(caught.value)) and '***' in str(caught.value)


def test_a_token_reaches_nothing_that_a_run_writes(image_folder, tmp_path, command):
    """Neither log, arguments, checkpoints and memory of a run with a Hub teacher, nor what is published of it."""
    save_for_hf(source(num_classes=3), tmp_path / 'net', safe_serialization=True)
    with HubServer() as hub:
        hub.add('org/net', tmp_path / 'net')
        environment = {**hub.environment(tmp_path / 'home'), 'HF_TOKEN': TOKEN}
        done = run(
            training_scripts()['examples'], '--data-dir', image_folder, *SMALL_RUN, '--epochs', '1', '-j', '0',
            '--output', tmp_path, '--experiment', 'x', '--aikd', '--aikd-teacher', 'hf-hub:org/net',
            '--aikd-teacher-temperature', '1', **environment)  # not fitted: random weights are not judged on 36 images
    assert 'AI-KD: teacher hf-hub:org/net@' in done.stderr
    code, printed = command('push', tmp_path / 'x', '--to-folder', tmp_path / 'kept')
    assert code == 0
    written = [path for name in ('x', 'kept') for path in (tmp_path / name).rglob('*') if path.is_file()]
    assert {'args.yaml', 'last.pth.tar', 'README.md', 'aikd-memory-0.safetensors'} <= {path.name for path in written}
    for content in (done.stdout.encode(), done.stderr.encode(), printed.encode(), *(x.read_bytes() for x in written)):
        assert TOKEN.encode() not in content
