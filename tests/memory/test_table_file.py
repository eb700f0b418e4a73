"""The file of a table: plain safetensors, written whole or not at all, and nothing else is taken."""
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from timm_aikd.memory import table_file
from timm_aikd.memory.table import HostTable

from ..conftest import ROOT
from .helpers import RECORD, content, records


@pytest.mark.parametrize('chunk', [1, 2, 100])
def test_a_file_holds_the_table_and_is_plain_safetensors(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(table_file, 'CHUNK_BYTES', chunk * RECORD.itemsize)
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
    ({'epoch': '3'}, '00', 5, 'content is not that of the checkpoint'),
    ({'epoch': '3'}, None, 6, 'the data set had 5 samples when the memory was written, has 6 now'),
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


def test_all_bytes_are_on_the_disk_before_the_file_gets_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / 'memory.safetensors', []
    monkeypatch.setattr(os, 'fsync', lambda descriptor: synced.append((os.fstat(descriptor).st_size, path.exists())))
    HostTable(RECORD, 5, str(tmp_path)).save(path, {'epoch': '1'})
    assert synced == [(path.stat().st_size, False)]


def test_a_kill_within_a_save_leaves_the_old_file_whole(tmp_path):
    code = f'''
import os, numpy as np
from pathlib import Path
from timm_aikd.memory.table import HostTable
table = HostTable(np.dtype({RECORD.descr!r}), 5, {str(tmp_path)!r})
path = Path({str(tmp_path)!r}) / 'memory.safetensors'
print(table.save(path, dict(epoch='1')), flush=True)
table.records['version'] = 1
os.replace = lambda *_: os.kill(os.getpid(), 9)
table.save(path, dict(epoch='1'))
'''
    done = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -9
    host_table = HostTable(RECORD, 5, str(tmp_path))
    assert host_table.load([tmp_path / 'memory.safetensors'], {'epoch': '1'}, done.stdout.strip()) is None
