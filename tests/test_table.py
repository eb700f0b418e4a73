"""The table of a host: shared, exchanged, saved whole or not at all, and gone with the run."""
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

from timm_aikd import AikdError, table
from timm_aikd.table import HostTable

from .conftest import ROOT
from .distributed import spawn

RECORD = np.dtype([('stamp', '<i8'), ('label', '<i4'), ('values', '<f2', (3,))])


def records(stamps, seed=0):
    made = np.zeros(len(stamps), RECORD)
    made['stamp'], made['label'] = stamps, np.arange(len(stamps))
    made['values'] = np.random.default_rng(seed).normal(size=(len(stamps), 3))
    return made


def content(host_table):
    return host_table.records.tobytes()


def test_reads_what_was_written_and_leaves_no_file(tmp_path):
    host_table = HostTable(RECORD, 9, str(tmp_path))
    assert list(tmp_path.iterdir()) == [] and len(host_table) == 0
    written = records([5, 6, 7])
    host_table.write(np.array([8, 0, 8]), written)  # the last holds
    out = np.empty(4, RECORD)
    host_table.read(np.array([0, 1, 8, 0]), out)
    assert out.tobytes() == np.concatenate([written[1:2], np.zeros(1, RECORD), written[2:3], written[1:2]]).tobytes()
    assert len(host_table) == 2


def test_the_newer_record_wins_in_any_order(tmp_path):
    tables = [HostTable(RECORD, 4, str(tmp_path)) for _ in range(2)]
    parts = [(np.array([0, 1, 3]), records([5, 9, 2], 1)), (np.array([1, 0]), records([8, 6], 2))]
    for host_table, order in zip(tables, (parts, parts[::-1]), strict=True):
        for part in (*order, order[0]):
            host_table.merge(*part)
    assert content(tables[0]) == content(tables[1])
    assert tables[0].records['stamp'].tolist() == [6, 9, 0, 2]


@pytest.mark.parametrize('chunk', [1, 2, 100])
def test_a_file_holds_the_table_and_is_plain_safetensors(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(table, '_CHUNK_BYTES', chunk * (RECORD.itemsize + 8))
    first, second = HostTable(RECORD, 5, str(tmp_path)), HostTable(RECORD, 5, str(tmp_path))
    first.write(np.arange(5), records([1, 2, 0, 4, 5]))
    path, metadata = tmp_path / 'memory.safetensors', {'epoch': '3'}
    digest = first.save(path, metadata)
    assert os.listdir(tmp_path) == [path.name]
    with safe_open(path, 'np') as file:
        assert file.metadata() == metadata and file.get_tensor('records').tobytes() == content(first)
    assert second.load([path], metadata, digest) is None
    assert content(second) == content(first) and len(second) == 4


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if how == 'truncated':
        data = data[:-1]
    elif how == 'flipped':
        data[-1] ^= 1
    elif how == 'empty':
        data = b''
    elif how == 'not safetensors':
        data = b'\x80\x04' + bytes(200)
    elif how == 'huge header':
        data[:8] = (2 ** 62).to_bytes(8, 'little')
    path.write_bytes(data)


@pytest.mark.parametrize('how, reason', [
    ('truncated', 'cannot be read'), ('flipped', 'content is not'), ('empty', 'cannot be read'),
    ('not safetensors', 'cannot be read'), ('huge header', 'cannot be read'),
])
def test_a_damaged_file_is_refused_and_the_table_empty(tmp_path, how, reason):
    host_table = HostTable(RECORD, 5, str(tmp_path))
    host_table.write(np.arange(5), records([1, 2, 3, 4, 5]))
    path = tmp_path / 'memory.safetensors'
    digest = host_table.save(path, {'epoch': '3'})
    damaged(path, how)
    assert reason in host_table.load([path], {'epoch': '3'}, digest)
    assert len(host_table) == 0


@pytest.mark.parametrize('metadata, digest, samples, reason', [
    ({'epoch': '4'}, None, 5, 'its epoch is 3, not 4'),
    ({'epoch': '3', 'version': '1'}, None, 5, 'its version is None, not 1'),
    ({'epoch': '3'}, '00', 5, 'content is not what the checkpoint names'),
    ({'epoch': '3'}, None, 6, r'its records are U8 [5, 18]'),
])
def test_a_foreign_file_is_refused(tmp_path, metadata, digest, samples, reason):
    path = tmp_path / 'memory.safetensors'
    right = HostTable(RECORD, 5, str(tmp_path)).save(path, {'epoch': '3'})
    host_table = HostTable(RECORD, samples, str(tmp_path))
    assert reason in host_table.load([path], metadata, digest or right)
    assert host_table.load([tmp_path / 'none'], {}, '') == f'{tmp_path}/none is not there'
    exact = HostTable(RECORD, 5, str(tmp_path))
    assert exact.load([tmp_path / 'none', tmp_path, path], {'epoch': '3'}, right) is None


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    host_table = HostTable(RECORD, 5, str(tmp_path))
    path = tmp_path / 'memory.safetensors'
    host_table.save(path, {'epoch': '1'})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        host_table.save(path, {'epoch': '2'})
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize('name', ['missing', 'file'])
def test_a_folder_that_cannot_hold_it(tmp_path, name):
    (tmp_path / 'file').touch()
    with pytest.raises(AikdError, match=r'cannot hold the prediction table of 1,000,000 samples, 18 MB: '):
        HostTable(RECORD, 1_000_000, str(tmp_path / name))


def test_too_little_space_says_how_much_is_needed_and_there(tmp_path, monkeypatch):
    monkeypatch.setattr(table.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 1_000_000}))
    with pytest.raises(AikdError, match=r'1,000,000 samples, 18 MB: it has 1 MB free'):
        HostTable(RECORD, 1_000_000, str(tmp_path))


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(AikdError, match='No space left'):
        HostTable(RECORD, 100, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path):
    leftover, locked, young, other = (tmp_path / name for name in (
        'timm-aikd-a.table', 'timm-aikd-b.table', 'timm-aikd-c.table', 'timm-aikd-d.txt'))
    for path in (leftover, locked, young, other):
        path.touch()
    for path in (leftover, locked, other):
        os.utime(path, (time.time() - 3600,) * 2)
    with open(locked) as file:
        table.fcntl.flock(file, table.fcntl.LOCK_EX)
        HostTable(RECORD, 3, str(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted([locked, young, other])


def test_a_killed_process_leaves_no_file(tmp_path):
    code = f'''
import os, numpy as np
from timm_aikd.table import HostTable
table = HostTable(np.dtype({RECORD.descr!r}), 5, {str(tmp_path)!r})
table.records['stamp'] = 1
os.kill(os.getpid(), 9)
'''
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == -9 and list(tmp_path.iterdir()) == []


def test_a_kill_within_a_save_leaves_the_old_file_whole(tmp_path):
    code = f'''
import os, numpy as np
from pathlib import Path
from timm_aikd.table import HostTable
table = HostTable(np.dtype({RECORD.descr!r}), 5, {str(tmp_path)!r})
path = Path({str(tmp_path)!r}) / 'memory.safetensors'
print(table.save(path, dict(epoch='1')), flush=True)
table.records['stamp'] = 1
os.replace = lambda *_: os.kill(os.getpid(), 9)
table.save(path, dict(epoch='1'))
'''
    done = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -9
    host_table = HostTable(RECORD, 5, str(tmp_path))
    assert host_table.load([tmp_path / 'memory.safetensors'], {'epoch': '1'}, done.stdout.strip()) is None


def _rank_shares(rank, folder):
    shared = HostTable(RECORD, 8, folder)
    shared.write(np.array([rank, rank + 4]), records([rank + 1, rank + 1], rank))
    torch.distributed.barrier()
    return content(shared), os.listdir(folder)


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_ranks_of_a_host_share_one_table(tmp_path):
    first, second = spawn(_rank_shares, 2, str(tmp_path))
    assert first == second and first[1] == []
    alone = HostTable(RECORD, 8, str(tmp_path))
    for rank in range(2):
        alone.write(np.array([rank, rank + 4]), records([rank + 1, rank + 1], rank))
    assert first[0] == content(alone)


def visits(rank):
    """Samples with one that every rank visits, and of different number on each rank."""
    index = np.arange(rank, 40 - 10 * rank, 4)
    return np.append(index, 39), records([100 + rank] * (len(index) + 1), rank)


def _rank_exchanges(rank, argument):
    hosts, chunk, folder = argument
    table._CHUNK_BYTES = chunk * (RECORD.itemsize + 8)
    mine = HostTable(RECORD, 40, folder, host=hosts[rank])
    index, made = visits(rank)
    mine.merge(index, made)
    torch.distributed.barrier()
    mine.exchange(np.unique(index), torch.device('cpu'))
    return content(mine)


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('hosts, chunk', [('ab', 3), ('ab', 1000), ('aab', 4), ('abba', 2)])
def test_hosts_exchange_to_the_table_of_one_process(tmp_path, hosts, chunk):
    alone = HostTable(RECORD, 40, str(tmp_path))
    for rank in range(len(hosts)):
        alone.merge(*visits(rank))
    results = spawn(_rank_exchanges, len(hosts), (hosts, chunk, str(tmp_path)))
    assert set(results) == {content(alone)} and alone.records['stamp'][39] == 99 + len(hosts)


def _rank_fails(rank, folder):
    where = folder if rank == 0 else os.path.join(folder, 'missing')
    try:
        HostTable(RECORD, 8, where, host=str(rank))
    except AikdError as error:
        return str(error)


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_a_failure_on_one_host_is_the_same_error_on_all(tmp_path):
    first, second = spawn(_rank_fails, 2, str(tmp_path))
    assert first == second and 'missing cannot hold the prediction table' in first and os.listdir(tmp_path) == []


def test_sizes_as_people_read_them():
    sizes = (0, 999, 1000, 2_578_000_000, 7_496_080_416, 10 ** 15)
    assert [table.size_text(size) for size in sizes] == [
        '0 bytes', '999 bytes', '1 kB', '2.58 GB', '7.5 GB', '1e+03 TB']
