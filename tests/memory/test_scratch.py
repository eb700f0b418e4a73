"""Scratch files: gone with the run, however it ends."""
import os
import subprocess
import sys
import time

import pytest

from timm_aikd import AikdError
from timm_aikd.memory import scratch
from timm_aikd.memory.scratch import ScratchFile
from timm_aikd.memory.table import HostTable

from ..conftest import ROOT
from .helpers import RECORD


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(AikdError, match='No space left'):
        HostTable(RECORD, 100, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path):
    leftover, locked, young, other, filled = (tmp_path / f'timm-aikd-{name}' for name in (
        'a.table', 'b.table', 'c.table', 'd.txt', 'e.table'))
    for path in (leftover, locked, young, other):
        path.touch()
    filled.write_bytes(bytes(9))  # has taken space, so its owner must have locked it
    for path in (leftover, locked, other):
        os.utime(path, (time.time() - 3600,) * 2)
    with open(locked) as file:
        scratch.fcntl.flock(file, scratch.fcntl.LOCK_EX)
        HostTable(RECORD, 3, str(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted([locked, young, other])


@pytest.mark.parametrize('size', [1, 8, 20])
def test_blocks_are_written_where_the_system_cannot_allocate(tmp_path, monkeypatch, size):
    monkeypatch.delattr(os, 'posix_fallocate')
    monkeypatch.setattr(scratch, 'CHUNK_BYTES', 8)
    file = ScratchFile(tmp_path, size)
    with open(file.create(), 'rb') as made:
        assert made.read() == bytes(size)
    file.remove()
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_file(tmp_path):
    code = f'''
import os, numpy as np
from timm_aikd.memory.table import HostTable
table = HostTable(np.dtype({RECORD.descr!r}), 5, {str(tmp_path)!r})
table.records['version'] = 1
os.kill(os.getpid(), 9)
'''
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == -9 and list(tmp_path.iterdir()) == []
