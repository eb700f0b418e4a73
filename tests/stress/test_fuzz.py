"""Whatever a config, a spec, a checkpoint or a memory file holds: it is taken whole, or refused with nothing changed.

Some hundred examples, the same in every run; for a night of others: HYPOTHESIS_PROFILE=long pytest tests/test_fuzz.py
"""
import argparse
import copy
import json
import logging
import math
import os
import pickle
import resource

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from timm_aikd import Aikd, AikdConfig, AikdError, AikdTask, RecordFormat, StoreMemory
from timm_aikd.memory.table import HostTable
from timm_aikd.run import AikdRun
from timm_aikd.script import options
from timm_aikd.teacher import Checkpoint, TeacherSpec

from ..conftest import TinyNet

settings.register_profile(
    'quick', derandomize=True, deadline=None, database=None, max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])
settings.register_profile('long', settings.get_profile('quick'), derandomize=False, max_examples=20_000)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'quick'))

MOST_MEMORY = 256 << 10  # that all examples of a test may take, in kilobytes

# what YAML and a checkpoint of plain containers can hold
NUMBERS = st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2 ** 20, 2 ** 63, 10 ** 400, -0., 1e308])
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5)
OPTIONS = st.sampled_from(list(AikdConfig().to_dict()))
WORDS = st.sampled_from(['auto', 'none', 'store', '1e-3', '0x10', '1_0', ' 1', 'nan', 'infinity', '٣', '1e999', 'sgd'])


@pytest.fixture(autouse=True)
def little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


def assert_one_line(error):
    assert str(error).isprintable() and 0 < len(str(error)) <= 280


@given(OPTIONS, PLAIN | WORDS)
@example('kd_weight', 10 ** 400)
@example('alpha', list(range(1000)))
@example('teacher', 'a\nb\x1b[31m')
@example('memory_topk', ['auto'])
def test_any_value_of_an_option(name, value):
    try:
        config = AikdConfig(**{name: value})
    except AikdError as error:
        return assert_one_line(error)
    kept = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert AikdConfig(**kept) == config
    for option in config.to_dict().values():
        for number in option if isinstance(option, list) else [option]:
            assert not isinstance(number, float) or math.isfinite(number)


@given(st.dictionaries(OPTIONS, PLAIN | WORDS, max_size=3))
@example({'memory_dir': 'a\0b'})
@example({'disc_hidden': [[8]]})
def test_any_defaults_of_the_parser(defaults):
    """As a YAML file sets them: argparse itself may refuse the words, and we what it makes of them."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    options.add_arguments(parser)
    parser.set_defaults(**{f'aikd_{name}': value for name, value in defaults.items()})
    try:
        config = options.config_of(parser.parse_args([]))
    except argparse.ArgumentError:
        return
    except AikdError as error:
        return assert_one_line(error)
    assert AikdConfig(**config.to_dict()) == config


PIECES = st.lists(st.sampled_from([
    'org', 'net', '..', '.', '/', '@', '~', ':', ' ', '\n', '\0', '%2f', '\\', 'a' * 300, 'hf-hub:', 'hf_hub:',
    'HF-HUB:', 'local-dir:', 'none', '.pth', '.safetensors', 'file.pth', 'folder', 'resnet18', 'http://', 'main',
    '\u202e', 'é',
]), max_size=8).map(''.join)


@given(PIECES | st.text(max_size=30))
@example('a' * 300)
@example('a' * 300 + '.pth')
@example('local-dir:' + 'a' * 300)
@example('\0.pth')
@example('hf-hub:../../x@../..')
def test_any_spec(tmp_path, spec):
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        os.makedirs('folder', exist_ok=True)
        open('file.pth', 'w').close()
        found = TeacherSpec.parse(spec)
    except AikdError as error:
        return assert_one_line(error)
    finally:
        os.chdir(before)
    value, revision = found.value, found.revision or ''
    if found.kind == 'hub':
        assert len(value.split('/')) == 2 and '..' not in value + revision
        assert not set(value + revision) & set(' \n\0\\%:~') and not revision.startswith(('/', '.'))
    else:
        assert found.kind in ('name', 'none') or found.kind == 'file' and value.endswith('file.pth')


# the state of a checkpoint

CONFIG = AikdConfig(teacher='given', disc_hidden=(4,), memory='snapshot')
BATCH = torch.linspace(-1, 1, 24).view(6, 4), torch.arange(6) % 5


def student(seed=0):
    torch.manual_seed(seed)
    return TinyNet().eval()


def aikd(seed=0, config=CONFIG):
    return Aikd(5, student(seed), config, epochs=3)


def step(method, net):
    logits = net(BATCH[0])
    return method(BATCH[0], logits, BATCH[1], F.cross_entropy(logits, BATCH[1]))


def valid_state():
    method, net = aikd(), student(2)
    method.fit_teacher_temperature([BATCH])
    method.begin_epoch(1, net)
    step(method, net)
    return method.get_state()


VALID = valid_state()
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]),
    st.sampled_from([0., 1., -1., math.nan, math.inf, 1e38]),
) | st.just(torch.zeros(1).expand(2 ** 40)) | st.just(torch.zeros(1, dtype=torch.float64).expand(2 ** 36, 8))


def paths(value, path=()):
    yield path
    if isinstance(value, (dict, list, tuple)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


@st.composite
def mutations(draw):
    """Where in the valid state, and what becomes of it: dropped, renamed, or another value."""
    path = draw(st.sampled_from([path for path in paths(VALID) if path]))
    return path, draw(st.sampled_from(['drop', 'rename', 'replace', 'replace', 'replace'])), draw(PLAIN | TENSORS)


def mutated(state, path, what, value):
    state = copy.deepcopy(state)
    *outer, last = path
    place = state
    for key in outer:
        place = place[key]
    if isinstance(place, tuple):  # betas
        return mutated(state, tuple(outer), what, value)
    if what == 'replace':
        place[last] = value
    else:
        old = place.pop(last)
        if what == 'rename' and isinstance(place, dict):
            place[f'{last} '] = old
    return state


def bytes_of(value):
    """A state as something that can be compared, NaN and all."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bytes_of(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bytes_of(entry) for entry in value]
    return repr(value)


def everything(method):
    unread = method.progressive._unread  # the memory of a loaded state
    return bytes_of([method.get_state(), method.needs_temperature, method.teacher.temperature, unread])


def assert_whole_or_not_at_all(load, method, net, state):
    before = everything(method)
    discriminator = bytes_of(method.discriminator.mlp.state_dict())
    try:
        load(state)
    except AikdError as error:
        assert_one_line(error)
        assert everything(method) == before
    else:
        loaded = bytes_of(method.discriminator.mlp.state_dict())
        if loaded != discriminator:
            cast = {key: value.float() for key, value in state['discriminator']['weights'].items()}
            assert loaded == bytes_of(cast)
    method.begin_epoch(1, net)
    for _ in range(2):
        assert step(method, net)['loss'].isfinite()
    assert all(tensor.isfinite().all() for tensor in method.discriminator.mlp.state_dict().values())


ADAM = ('discriminator', 'optimizer', 'state', 0)


@settings(max_examples=2 * settings().max_examples)
@given(mutations())
@example((('config',), 'replace', None))
@example((('config',), 'drop', None))
@example((('config', 'alpha'), 'rename', None))
@example((('teacher_temperature',), 'replace', -1.))
@example((('teacher_digest',), 'replace', 7))
@example((('teacher_digest',), 'replace', 'of another teacher'))
@example((('teacher_temperature',), 'replace', math.nan))
@example((('teacher_temperature',), 'replace', 5e-324))
@example((('teacher_metrics',), 'replace', [1]))
@example((('binary',), 'replace', torch.ones(2)))
@example((('version',), 'replace', torch.ones(2)))
@example((('discriminator',), 'replace', 7))
@example((('discriminator', 'weights', '2.bias'), 'replace', torch.ones(3)))
@example((('discriminator', 'weights', '0.weight'), 'replace', torch.full((4, 5), math.nan)))
@example((('discriminator', 'generator'), 'replace', torch.zeros(5056, dtype=torch.uint8)))
@example(((*ADAM, 'exp_avg'), 'replace', torch.ones(2)))
@example(((*ADAM, 'exp_avg'), 'replace', torch.zeros(1).expand(2 ** 40)))
@example(((*ADAM, 'exp_avg'), 'replace', torch.zeros(())))  # over whose end a fused step writes
@example(((*ADAM, 'exp_avg'), 'replace', torch.zeros(1).expand(4, 5)))
@example(((*ADAM, 'exp_avg_sq'), 'drop', None))
@example(((*ADAM, 'exp_avg_sq'), 'replace', torch.full((4, 5), -1.)))
@example(((*ADAM, 'step'), 'replace', -1.))
@example(((*ADAM, 'step'), 'replace', 'x'))
@example((('discriminator', 'optimizer', 'param_groups', 0, 'betas'), 'replace', 'ab'))
@example((('discriminator', 'optimizer', 'param_groups', 0, 'weight_decay'), 'replace', 1e38))
@example((('discriminator', 'optimizer', 'param_groups', 0, 'params'), 'drop', None))
def test_any_mutation_of_a_state(mutation):
    method = aikd()
    assert_whole_or_not_at_all(method.load_state, method, student(), mutated(VALID, *mutation))


@given(PLAIN, st.sampled_from(['Aikd', 'AikdRun', 'AikdTask']), st.booleans())
@example(7, 'AikdTask', False)
@example('aikd', 'AikdRun', False)
@example(['aikd'], 'AikdRun', False)
@example({'version': 1}, 'Aikd', True)
@example({'version': 1, 'config': {1: 2, 'a': 3}}, 'Aikd', True)
def test_any_plain_containers_as_a_state(state, form, is_inner):
    net = student()
    holder = {
        'Aikd': lambda: aikd(),
        'AikdRun': lambda: AikdRun(net, nn.CrossEntropyLoss(), student(1), CONFIG, epochs=3),
        'AikdTask': lambda: AikdTask(
            net, nn.CrossEntropyLoss(), teacher=student(1), config=CONFIG, epochs=3, verbose=False),
    }[form]()
    load = {'Aikd': 'load_state', 'AikdRun': 'load_state', 'AikdTask': 'load_task_state'}[form]
    method = holder if form == 'Aikd' else holder.aikd
    state = {'aikd': state} if is_inner and form != 'Aikd' else state
    assert_whole_or_not_at_all(getattr(holder, load), method, net, state)


def test_the_valid_state_is_taken():
    method = aikd()
    method.load_state(VALID)
    assert bytes_of(method.get_state()) == bytes_of({**VALID, 'epoch': 0})
    assert_whole_or_not_at_all(method.load_state, method, student(), VALID)


# the memory's file

FORMAT, SAMPLES = RecordFormat(5), 7


def written(folder):
    """A memory that has been saved: its file, its state, and its table."""
    kept = StoreMemory(FORMAT, SAMPLES, str(folder))
    kept.begin_epoch(3)
    kept.record(np.arange(6), torch.linspace(-1, 1, 30).view(6, 5), torch.arange(6) % 5)
    kept.end_epoch()
    kept.save(folder)
    return folder / 'aikd-memory-3.safetensors', kept.get_state(), kept.table.records.tobytes()


HEADERS = st.fixed_dictionaries({}, optional={
    'dtype': st.sampled_from(['U8', 'F64', 'BOOL', 'F16', 'X']) | PLAIN,
    'shape': st.lists(st.integers(0, 2 ** 62), max_size=3) | PLAIN,
    'data_offsets': st.lists(st.integers(0, 2 ** 62), min_size=2, max_size=2) | PLAIN,
})
EDITS = st.one_of(
    st.tuples(st.just('bytes'), st.binary(max_size=300)),
    st.tuples(st.just('cut'), st.floats(0, 1)),
    st.tuples(st.just('flip'), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4)),
    st.tuples(st.just('length'), st.integers(0, 2 ** 64 - 1)),
    st.tuples(st.just('entry'), HEADERS),
    st.tuples(st.just('metadata'), st.dictionaries(st.sampled_from(['version', 'epoch', 'records', 'x']), PLAIN)),
    st.tuples(st.just('header'), PLAIN),
)


def edited(content, how, value):
    content = bytearray(content)
    end = 8 + int.from_bytes(content[:8], 'little')
    header, data = json.loads(content[8:end]), content[end:]
    if how == 'bytes':
        return value
    if how == 'cut':
        return content[:int(value * len(content))]
    if how == 'flip':
        for place in value:
            content[int(place * len(content))] ^= 1 << int(place * 8)
        return content
    if how == 'length':
        return value.to_bytes(8, 'little') + content[8:]
    if how == 'entry':
        header['records'].update(value)
    elif how == 'metadata':
        header['__metadata__'].update(value)
    else:
        header = value
    text = json.dumps(header, default=str).encode()
    return len(text).to_bytes(8, 'little') + text + data


@settings(max_examples=2 * settings().max_examples)
@given(EDITS)
@example(('length', 2 ** 60))
@example(('entry', {'shape': [2 ** 60, 18], 'data_offsets': [0, 18 * 2 ** 60]}))
@example(('entry', {'shape': [2 ** 30, 2 ** 30]}))
@example(('metadata', {'epoch': 'x' * 10_000}))
@example(('flip', [0.999]))
@example(('cut', 0.999))
def test_any_memory_file(tmp_path, edit):
    path, state, records = written(tmp_path)
    path.write_bytes(edited(path.read_bytes(), *edit))
    table = HostTable(FORMAT.numpy, SAMPLES, str(tmp_path))
    reason = table.load([path], {'version': '1', 'epoch': '3', 'records': FORMAT.describe()}, state['digest'])
    if reason is None:
        assert table.records.tobytes() == records
    else:
        assert len(table) == 0 and reason.isprintable() and len(reason) < 300 + len(str(path))


@given(st.dictionaries(st.sampled_from(['name', 'folder', 'epoch', 'digest']), PLAIN, max_size=2))
@example({'name': '../../etc/passwd'})
@example({'name': '\0', 'folder': 'a' * 5000})
@example({'epoch': 10 ** 400})
@example({'folder': '\ud800'})
def test_any_state_of_a_memory(tmp_path, caplog, changes):
    """Through the state of a checkpoint: refused, restored, or reported and begun without."""
    caplog.set_level(logging.INFO)
    caplog.clear()
    _, state, records = written(tmp_path)
    method = Aikd(5, student(), AikdConfig(teacher='given', disc_hidden=(4,)), epochs=3)
    fresh = StoreMemory(FORMAT, SAMPLES, str(tmp_path))
    method.use_memory(fresh)
    try:
        method.load_state({**VALID, 'memory': {**state, **changes}}, [tmp_path])
    except AikdError as error:
        assert_one_line(error)
        assert len(fresh.table) == 0 and fresh.get_state() is None
        return
    if 'restored' in caplog.text:
        assert fresh.table.records.tobytes() == records
    else:
        assert 'the progressive term pauses for one epoch' in caplog.text
        assert len(fresh.table) == 0 and fresh.get_state() is None


# weights

@pytest.fixture(scope='module')
def weights_files(tmp_path_factory):
    folder, net = tmp_path_factory.mktemp('weights'), student()
    torch.save({'state_dict': net.state_dict(), 'args': argparse.Namespace(model='x')}, folder / 'zip.pth')
    torch.save(net.state_dict(), folder / 'old.pth', _use_new_zipfile_serialization=False)
    (folder / 'pickle.pth').write_bytes(pickle.dumps({'a': [1, 2]}))
    return [(folder / name).read_bytes() for name in ('zip.pth', 'old.pth', 'pickle.pth')]


PLACES = st.lists(st.floats(0, 1, exclude_max=True), max_size=6)


@given(st.integers(0, 2), PLACES, st.floats(0, 1), st.binary(max_size=9))
def test_any_weights_file(tmp_path, weights_files, which, flips, kept, tail):
    content = bytearray(weights_files[which])
    for place in flips:
        content[int(place * len(content))] ^= 1 << int(place * 1000) % 8
    (tmp_path / 'x.pth').write_bytes(content[:int(len(content) * min(1., 2 * kept))] + tail)
    try:
        weights = Checkpoint.read(str(tmp_path / 'x.pth')).weights
    except AikdError as error:
        return assert_one_line(error)
    assert weights and all(isinstance(value, torch.Tensor) for value in weights.values())
