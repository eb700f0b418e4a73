"""The table of a host: shared by its ranks, and exchanged between hosts."""
import os
import shutil

import numpy as np
import pytest
import torch

from timm_aikd import AikdError
from timm_aikd.memory import table
from timm_aikd.memory.table import HostTable

from ..support.distributed import spawn
from .helpers import RECORD, content, records


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
    assert tables[0].records['version'].tolist() == [6, 9, 0, 2]


@pytest.mark.parametrize('name', ['missing', 'file'])
def test_a_folder_that_cannot_hold_it(tmp_path, name):
    (tmp_path / 'file').touch()
    with pytest.raises(AikdError, match=r'cannot hold the prediction table of 1,000,000 samples, 18.0MB: '):
        HostTable(RECORD, 1_000_000, str(tmp_path / name))


def test_too_little_space_says_how_much_is_needed_and_there(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 1_000_000}))
    with pytest.raises(AikdError, match=r'1,000,000 samples, 18.0MB: it has 1.00MB free'):
        HostTable(RECORD, 1_000_000, str(tmp_path))


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
    table.CHUNK_BYTES = chunk * len(hosts) * RECORD.itemsize
    mine = HostTable(RECORD, 40, folder, host=hosts[rank])
    index, made = visits(rank)
    for turn in range(len(hosts)):  # to merge is to read and then write: ranks of a host must not do it at once
        if turn == rank:
            mine.merge(index, made)
        torch.distributed.barrier()
    mine.exchange(np.unique(index))
    return content(mine)


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('hosts, chunk', [('ab', 0), ('ab', 1000), ('aab', 4), ('abba', 2)])
def test_hosts_exchange_to_the_table_of_one_process(tmp_path, hosts, chunk):
    alone = HostTable(RECORD, 40, str(tmp_path))
    for rank in range(len(hosts)):
        alone.merge(*visits(rank))
    results = spawn(_rank_exchanges, len(hosts), (hosts, chunk, str(tmp_path)))
    assert set(results) == {content(alone)} and alone.records['version'][39] == 99 + len(hosts)


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
