"""The Hub at its best and at its worst: every fault of its client's world, in processes of their own and on ranks."""
import argparse
import http.client
import json
import os
import subprocess
import sys
import time

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

from timm_aikd import AikdError, load_teacher
from timm_aikd.errors import one_line
from timm_aikd.teacher import hub as door

from ..conftest import run
from ..support.distributed import spawn
from ..support.hub import HubServer
from ..support.teachers import assert_one_line, batch, source

# the client reads the environment once, when it is imported
LOAD = """
import json, logging, subprocess, sys, time
import huggingface_hub
import timm
import torch
from timm_aikd import AikdError, load_teacher

pauses, said = [], logging.Handler()
said.messages = []
said.emit = lambda record: said.messages.append(record.getMessage())
logging.getLogger('timm_aikd').addHandler(said)
time.sleep = pauses.append  # between the client's attempts
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096  # so that something of a broken download is written
torch.set_num_threads(1)
answers = {}
for spec, num_classes in json.load(open(sys.argv[1])).items():
    if spec.startswith('mount'):
        subprocess.run(spec.split(), check=True)
        continue
    if spec.startswith('download'):
        for name in ('config.json', 'model.safetensors'):
            huggingface_hub.hf_hub_download(spec.split()[1], name, force_download=True)
        continue
    pauses.clear()
    try:
        teacher = load_teacher(spec, student=timm.create_model('test_resnet', num_classes=num_classes))
        answers[spec] = teacher(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))).tolist()
    except AikdError as error:
        answers[spec] = str(error)
    answers['pauses ' + spec] = sum(pauses)
answers['said'] = said.messages
if len(sys.argv) > 2:
    answers['sha'] = huggingface_hub.HfApi().model_info('org/net', revision='v2').sha
    answers['files'] = huggingface_hub.list_repo_files('org/net')
    answers['tree'] = [entry.path for entry in huggingface_hub.HfApi().list_repo_tree('org/net', revision='v2')]
print(json.dumps(answers))
"""
CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
TOKEN = 'hf_' + 'Secret' * 6


def load(specs, folder, *options, **environment):
    """What teachers answer in a process with this environment, or why there are none."""
    (folder / 'specs').write_text(json.dumps(specs if isinstance(specs, dict) else dict.fromkeys(specs, 5)))
    return json.loads(run('-c', LOAD, folder / 'specs', *options, **environment).stdout)


def publish(model, folder, safe=True):
    """Save a model as the Hub has it; what it answers as a teacher, to the last bit."""
    save_for_hf(model, folder, safe_serialization=safe)
    student = timm.create_model('test_resnet', num_classes=model.num_classes)
    answers = load_teacher(f'local-dir:{folder}', student=student)(batch())
    torch.testing.assert_close(answers, model(batch()))
    return answers.tolist()


@pytest.fixture(scope='module')
def net(tmp_path_factory):
    """The folder of a repository, and what its model answers."""
    folder = tmp_path_factory.mktemp('net')
    return argparse.Namespace(folder=folder, answers=publish(source(1), folder))


# a Hub that does what it should

CONFIGS = {
    'not-json': ('{"architecture": "test_resnet"', 'its config.json is not JSON; save the model again'),
    'binary': ('\0\1\2', 'its config.json is not JSON'),
    'foreign': ('{"architectures": ["BertModel"], "hidden_size": 8}', 'names no architecture'),
    'list': ('["test_resnet"]', 'names no architecture'),
    'newer': ('{"architecture": "resnet_of_tomorrow"}', "'resnet_of_tomorrow', which timm"),
    'sparse': ('{"architecture": "test_resnet", "pretrained_cfg": 7}', "has pretrained_cfg '7'"),
}
REFUSED_ONLINE = {
    'hf-hub:org/missing': 'no such repository on the Hub, or a private one: check the name, or log in',
    'hf-hub:org/gated': 'gated; accept its terms on the Hub, then log in with `hf auth login` or HF_TOKEN',
    'hf-hub:org/net@v3': 'no such branch, tag or commit',
    'hf-hub:org/empty': 'has no config.json',
    'hf-hub:org/unweighted': 'has no pytorch_model.bin, which a timm model needs',
    'hf-hub:org/broken': 'the Hub does not send it',
    'hf-hub:org/a--b': 'Cannot have -- or ..',
    'test_vit2': 'no such repository',
    'resnet18.no_such_tag': 'no_such_tag',
    **{f'hf-hub:org/{name}': fragment for name, (_, fragment) in CONFIGS.items()},
}
REFUSED_OFFLINE = {
    'hf-hub:org/gated': 'not in the cache',
    'hf-hub:org/net@v3': 'unset HF_HUB_OFFLINE',
    'test_vit2': 'point HF_HOME at a filled cache',
}
REFUSED_AWAY = {
    'hf-hub:org/gated': 'not in the cache, and the Hub does not send it',
    'test_vit2': 'check the network and HF_ENDPOINT',
}
REFUSED = {'online': REFUSED_ONLINE, 'offline': REFUSED_OFFLINE, 'away': REFUSED_AWAY}


@pytest.fixture(scope='module')
def hub(tmp_path_factory, net):
    """Answers online, then offline from the cache filled before, then with that cache and the Hub gone."""
    folder = tmp_path_factory.mktemp('hub')
    expected = {
        'main': net.answers,
        'v2': publish(source(2), folder / 'v2'),
        'imagenet': publish(source(3, num_classes=1000), folder / 'imagenet'),
        'pickled': publish(source(4), folder / 'pickled', safe=False),
    }
    for name in ('empty', 'unweighted', *CONFIGS):
        (folder / name).mkdir()
    (folder / 'empty' / 'README.md').write_text('nothing here')
    (folder / 'unweighted' / CONFIG).write_bytes((net.folder / CONFIG).read_bytes())
    for name, (config, _) in CONFIGS.items():
        (folder / name / CONFIG).write_text(config)

    with HubServer() as server:
        server.add('org/net', net.folder)
        commit = server.add('org/net', folder / 'v2', revision='v2')
        server.add('timm/test_resnet.r160_in1k', folder / 'imagenet')
        server.add('org/gated', net.folder, gated=True)
        server.add('org/broken', net.folder, broken=True)
        for name in ('pickled', 'empty', 'unweighted', *CONFIGS):
            server.add(f'org/{name}', folder / name)
        found = dict.fromkeys(('hf-hub:org/net', 'hf-hub:org/net@v2', f'hf-hub:org/net@{commit}'), 5)
        found.update({'hf-hub:org/pickled': 5, 'test_resnet': 1000})
        answers = {}
        for where, refused in REFUSED.items():
            environment = server.environment(folder / 'home', offline=where == 'offline')
            if where == 'away':
                environment['HF_ENDPOINT'] = 'http://127.0.0.1:1'
            options = ['with the interface'] if where == 'online' else []
            answers[where] = load({**found, **dict.fromkeys(refused, 5)}, folder, *options, **environment)
            if where == 'online':
                requests = list(server.requests)
        assert len(server.requests) == len(requests)
    return argparse.Namespace(answers=answers, expected=expected, commit=commit, requests=requests)


@pytest.mark.parametrize('where', REFUSED)
def test_a_hub_teacher_is_the_revision_asked_for(hub, where):
    answers = hub.answers[where]
    assert answers['hf-hub:org/net'] == hub.expected['main']
    assert answers['hf-hub:org/net@v2'] == answers[f'hf-hub:org/net@{hub.commit}'] == hub.expected['v2']
    assert answers['hf-hub:org/pickled'] == hub.expected['pickled']
    assert answers['test_resnet'] == hub.expected['imagenet']
    assert hub.expected['main'] != hub.expected['v2']


@pytest.mark.parametrize('where, spec', [(where, spec) for where, refused in REFUSED.items() for spec in refused])
def test_what_the_hub_refuses_is_said_in_one_line(hub, where, spec):
    assert_one_line(hub.answers[where][spec], spec, REFUSED[where][spec])


def test_the_stand_in_answers_as_the_hub_does(hub):
    online = hub.answers['online']
    assert online['sha'] == hub.commit
    assert sorted(online['files']) == sorted(online['tree']) == [CONFIG, WEIGHTS]
    for revision in ('main', 'v2'):
        assert f'HEAD /org/net/resolve/{revision}/{CONFIG}' in hub.requests
    assert f'GET /org/net/resolve/{hub.commit}/{WEIGHTS}' in hub.requests
    assert not any('/org/gated/' in request and request.startswith('GET') for request in hub.requests)


def test_the_stand_in_serves_parts_of_a_file(tmp_path):
    (tmp_path / 'net').mkdir()
    (tmp_path / 'net' / 'weights').write_bytes(bytes(range(100)))
    with HubServer() as server:
        server.add('org/net', tmp_path / 'net')
        client = http.client.HTTPConnection(server.url.removeprefix('http://'), timeout=10)
        for asked, status, body in (
                ('bytes=90-', 206, bytes(range(90, 100))),
                ('bytes=3-5', 206, bytes([3, 4, 5])),
                ('bytes=100-', 416, b''),
        ):
            client.request('GET', '/org/net/resolve/main/weights', headers={'Range': asked})
            response = client.getresponse()
            assert (response.status, response.read()) == (status, body)
        client.request('GET', '/org/net/resolve/main/..%2Fsecret')
        assert client.getresponse().headers['X-Error-Code'] == 'EntryNotFound'
        client.close()
        assert len(server.requests) == 4


# a Hub that does not

PASSING = {  # of (method, file, faults): enough of them for each attempt of the client but the last
    'limited': [('HEAD', CONFIG, 429, 429), ('GET', WEIGHTS, 429, 429)],
    'failing': [('HEAD', CONFIG, 503), ('HEAD', WEIGHTS, 502)],
    'dropping': [('GET', WEIGHTS, 'drop', 'drop')],
    'freezing': [('GET', WEIGHTS, 'freeze')],
}
RESTARTED = {  # what the client does not try again: the next start does
    'failing-once': ('GET', WEIGHTS, 503, 'server error 503: try again'),
    'failing-config': ('GET', CONFIG, 500, 'server error 500: try again'),
    'short': ('GET', WEIGHTS, 'short', 'the Hub does not send it', 'try again'),
}
DAMAGED = {  # what arrives as if it were whole, and stays in the cache
    'lying': [('HEAD', WEIGHTS, 'short', 'short'), ('GET', WEIGHTS, 'short')],
    'damaging-config': [('GET', CONFIG, 'corrupt')],
}
LASTING = {  # the last fault for ever, and what is said then
    'always-limited': ('HEAD', CONFIG, 429, 'rate limited', 'wait some minutes, or log in with `hf auth login`'),
    'later-limited': ('GET', WEIGHTS, 429, 'rate limited'),
    'always-failing': ('HEAD', CONFIG, 503, 'server error 503: try again'),
    'later-failing': ('GET', WEIGHTS, 500, 'server error 500: try again'),
    'always-stalling': ('HEAD', CONFIG, 'stall', 'not in the cache, and the Hub does not send it', 'check the network'),
    'later-stalling': ('GET', WEIGHTS, 'stall', 'not in the cache, and the Hub does not send it', 'check the network'),
    'always-dropping': ('GET', WEIGHTS, 'drop', 'not in the cache, and the Hub does not send it'),
    'always-short': ('GET', WEIGHTS, 'short', 'not in the cache, and the Hub does not send it'),
    'without-token': ('HEAD', CONFIG, 401, 'does not accept the token', 'HF_TOKEN'),
    'denying': ('HEAD', WEIGHTS, 403, 'denies access', 'HF_TOKEN'),
}


@pytest.fixture(scope='module')
def faulty(tmp_path_factory, net):
    """Answers of a Hub with faults, then offline from the cache that they left, then of the Hub in good health."""
    folder = tmp_path_factory.mktemp('faulty')
    names = (*PASSING, *RESTARTED, *DAMAGED, *LASTING)
    with HubServer() as server:
        for name in (*names, 'killed'):
            server.add(f'org/{name}', net.folder)
        for name, faults in {**PASSING, **DAMAGED}.items():
            for method, file, *kinds in faults:
                server.fail(f'org/{name}', file, *kinds, method=method)
        for name, (method, file, fault, *_) in {**RESTARTED, **LASTING}.items():
            server.fail(f'org/{name}', file, fault, method=method, forever=name in LASTING)
        server.add('org/gated', net.folder, gated=True)
        environment = {
            **server.environment(folder / 'home'), 'HF_TOKEN': TOKEN, 'HF_HUB_ETAG_TIMEOUT': '1',
            'HF_HUB_DOWNLOAD_TIMEOUT': '1',
        }
        specs = [f'hf-hub:org/{name}' for name in names]
        first = load([*specs, 'hf-hub:org/gated', 'hf-hub:org/missing'], folder, **environment)
        ranges, requests = list(server.ranges), list(server.requests)
        kill_in_mid_file(server, folder, environment)
        server.faults.clear()
        offline = load([*specs, 'hf-hub:org/killed'], folder, **{**environment, 'HF_HUB_OFFLINE': '1'})
        again = [f'download org/{name}' for name in DAMAGED]
        then = load([*again, *specs, 'hf-hub:org/killed'], folder, **environment)
    return argparse.Namespace(first=first, offline=offline, then=then, ranges=ranges, requests=requests)


def kill_in_mid_file(server, folder, environment):
    """Kill a process that has written the half of the weights that the Hub sent it."""
    server.fail('org/killed', WEIGHTS, 'freeze')
    (folder / 'killed').write_text('{"hf-hub:org/killed": 5}')
    with subprocess.Popen(
            [sys.executable, '-c', LOAD, folder / 'killed'],
            env={name: value for name, value in {
                **os.environ, 'OMP_NUM_THREADS': '1', **environment, 'HF_HUB_DOWNLOAD_TIMEOUT': '60',
            }.items() if value is not None}) as process:
        end = time.monotonic() + 180
        parts = (folder / 'home' / 'hub' / 'models--org--killed' / 'blobs')
        try:
            while not any(part.stat().st_size for part in parts.glob('*.incomplete')):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
        finally:
            process.kill()
    assert any(part.stat().st_size for part in parts.glob('*.incomplete'))


@pytest.mark.parametrize('name', PASSING)
def test_a_fault_that_passes_is_not_noticed(net, faulty, name):
    assert faulty.first[f'hf-hub:org/{name}'] == faulty.offline[f'hf-hub:org/{name}'] == net.answers


def test_a_broken_download_goes_on_where_it_broke_off(net, faulty):
    half = (net.folder / WEIGHTS).stat().st_size // 2
    assert f'bytes={half - half % 4096}-' in faulty.ranges


@pytest.mark.parametrize('name, texts', [(name, fault[3:]) for name, fault in {**RESTARTED, **LASTING}.items()])
def test_a_fault_that_lasts_is_said_in_one_line(faulty, name, texts):
    assert_one_line(faulty.first[f'hf-hub:org/{name}'], f'`teacher` hf-hub:org/{name}: ', *texts)


@pytest.mark.parametrize('name', DAMAGED)
def test_what_arrived_damaged_is_refused_until_it_is_downloaded_again(net, faulty, name):
    assert_one_line(faulty.first[f'hf-hub:org/{name}'], f'hf-hub:org/{name}: ', '`hf download`', '--force-download')
    assert faulty.then[f'hf-hub:org/{name}'] == net.answers


def test_a_hub_that_never_answers_ends_in_less_than_two_minutes(faulty):
    """By the client's time-out, its requests, and its pauses between them; it alone would take more than six."""
    path = f'/org/always-stalling/resolve/main/{CONFIG}'
    asked = [request for request in faulty.requests if path in request]
    waited = len(asked) * door.constants.DEFAULT_ETAG_TIMEOUT + faulty.first['pauses hf-hub:org/always-stalling']
    assert asked and 10 <= waited < 120


@pytest.mark.parametrize('name', [*RESTARTED, *LASTING, 'killed'])
def test_nothing_half_written_is_used(net, faulty, name):
    spec = f'hf-hub:org/{name}'
    assert_one_line(faulty.offline[spec], spec, 'not in the cache', 'unset HF_HUB_OFFLINE')
    assert faulty.then[spec] == net.answers


def test_with_a_token_the_hub_tells_what_exists(faulty):
    assert_one_line(faulty.first['hf-hub:org/gated'], 'org/gated', 'accept its terms on the Hub, then log in')
    assert_one_line(faulty.first['hf-hub:org/missing'], 'org/missing', 'no such repository')


def test_no_token_gets_into_a_message(faulty):
    assert TOKEN not in json.dumps([faulty.first, faulty.offline])
    for text in (
            f'Illegal header value Bearer {TOKEN}', f'{TOKEN} is no token', f'for url: https://me:{TOKEN}@hub/x',
            f'https://cdn/x?Signature={TOKEN}&Expires=1',
    ):
        assert TOKEN[3:] not in one_line(RuntimeError(text)), text


def test_a_cached_model_is_used_where_the_hub_or_the_new_commit_is_not_to_be_had(tmp_path, net):
    spec, other = 'hf-hub:org/net', tmp_path / 'other'
    assert publish(source(2), other) != net.answers
    config = json.loads((other / CONFIG).read_text())
    with HubServer() as server:
        commit = server.add('org/net', net.folder)
        environment = {
            **server.environment(tmp_path / 'home'), 'HF_HUB_ETAG_TIMEOUT': '1', 'HF_HUB_DOWNLOAD_TIMEOUT': '1'}
        specs = spec, f'{spec}@main', f'{spec}@{commit}'
        first = load(specs, tmp_path, **environment)
        assert [first[each] for each in specs] == 3 * [net.answers] and first['said'] == []
        warm = server.requests[-1:]
        assert warm == [f'HEAD /org/net/resolve/main/{CONFIG}'] and server.requests.count(warm[0]) == 3
        for method, file, fault, why in (
                ('GET', WEIGHTS, 503, '503'),
                ('HEAD', CONFIG, 'stall', 'timed out'),
                ('GET', CONFIG, 'corrupt', 'JSON'),
        ):
            (other / CONFIG).write_text(json.dumps({**config, 'round': fault}))
            server.add('org/net', other)
            server.fail('org/net', file, fault, method=method, forever=True)
            kept = load([spec], tmp_path, **environment)
            assert kept[spec] == net.answers and kept[f'pauses {spec}'] == 0, fault
            message, = kept['said']
            assert all(text in message for text in (spec, why, f'the cached commit {commit} is used'))
            server.faults.clear()
        offline = load([spec], tmp_path, **{**environment, 'HF_HUB_OFFLINE': '1'})
        assert offline[spec] == net.answers and offline['said'] == []


def test_a_cache_folder_that_is_full_or_read_only(tmp_path, net):
    home, other = tmp_path / 'home', tmp_path / 'other'
    home.mkdir()
    publish(source(2), other)
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'aikd', home], capture_output=True).returncode:
        pytest.skip('no file system can be mounted here')
    try:
        with HubServer() as server:
            for name in ('net', 'other'):
                server.add(f'org/{name}', net.folder)
            answers = load((
                'hf-hub:org/net', f'mount -o remount,size=16m {home}', 'hf-hub:org/net@main',
                f'mount -o remount,ro {home}', 'hf_hub:org/net', 'hf-hub:org/other',
            ), tmp_path, **server.environment(home))
            server.add('org/net', other)
            moved = load(['hf-hub:org/net'], tmp_path, **server.environment(home))
    finally:
        subprocess.run(['umount', home], check=True)
    assert (net.folder / WEIGHTS).stat().st_size > 256 << 10
    assert_one_line(
        answers['hf-hub:org/net'], 'hf-hub:org/net', f'the cache folder {home}/hub is full: free some space', 'HF_HOME')
    assert answers['hf-hub:org/net@main'] == answers['hf_hub:org/net'] == moved['hf-hub:org/net'] == net.answers
    assert_one_line(
        answers['hf-hub:org/other'], 'hf-hub:org/other',
        f'the cache folder {home}/hub cannot be used (Read-only file system)', 'HF_HOME')
    message, = moved['said']
    assert 'Read-only file system' in message and 'the cached commit' in message


@pytest.mark.parametrize('error, said', [
    (OSError(28, 'No space left on device'), 'is full: free some space'),
    (OSError(122, 'Disk quota exceeded'), 'is full: free some space'),
    (RuntimeError('Task error: No space left on device (os error 28)'), 'is full: free some space'),
    (PermissionError(13, 'Permission denied', '/x'), 'cannot be used (Permission denied): fix that'),
])
def test_trouble_with_the_cache_folder_is_told_apart(error, said):
    message = door.explain(error, 'hf-hub:org/net')
    assert_one_line(message, 'hf-hub:org/net: the cache folder', door.constants.HF_HUB_CACHE, said, 'set HF_HOME')


# on ranks

def rank_loads(rank, specs):
    """What each spec gives on this rank, which works in a folder of its own."""
    os.chdir(str(rank))
    time.sleep = lambda seconds: None  # between the client's attempts
    student, answers = timm.create_model('test_resnet', num_classes=5), []
    for spec in specs:
        try:
            teacher = load_teacher(spec, student=student, default_model_name='test_resnet')
            answers.append((teacher.name, teacher(batch()).tolist()))
        except AikdError as error:
            answers.append(str(error))
    return answers


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_one_rank_a_host_downloads_and_all_fail_alike(tmp_path, monkeypatch, net):
    weights = net.folder / WEIGHTS
    for path, content in {
            '0/first.safetensors': weights, '1/second.safetensors': weights,
            '0/wide.safetensors': weights, '1/wide.safetensors': tmp_path / 'wide.safetensors',
    }.items():
        if not content.exists():
            safetensors.torch.save_file(source(1, num_classes=7).state_dict(), content)
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).symlink_to(content)
    refused = {
        'hf-hub:org/nobody': 'no such repository',
        'hf-hub:org/stalling': 'the Hub does not send it',
        'first.safetensors': 'no such file',
        'second.safetensors': 'no such file',
        'wide.safetensors': 'has 7 classes, the student has 5',
    }
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        commit = server.add('org/net', net.folder)
        server.add('org/stalling', net.folder)
        server.fail('org/stalling', CONFIG, 'stall', method='HEAD', forever=True)
        for name, value in {**server.environment(tmp_path / 'home'), 'HF_HUB_ETAG_TIMEOUT': '1'}.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        first, second = spawn(rank_loads, 2, ['hf-hub:org/net', *refused], method='spawn')
    assert first == second
    assert first[0] == (f'hf-hub:org/net@{commit}', net.answers)
    assert sum(request.startswith('GET') and WEIGHTS in request for request in server.requests) == 1
    for (spec, fragment), answer in zip(refused.items(), first[1:], strict=True):
        assert_one_line(answer, f'`teacher` {spec}: ', fragment)
