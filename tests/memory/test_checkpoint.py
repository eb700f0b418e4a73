"""The memory's files beside the checkpoints: which are kept, and what is restored."""
import hashlib
import logging
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from timm_aikd.memory.records import version_at

from .helpers import names_in, predictions, store


def fill(kept, epoch, seed=0):
    kept.begin_epoch(epoch)
    for part in np.arange(12).reshape(3, 4):
        kept.record(part, predictions(seed=seed + epoch)[0], torch.from_numpy(part % 5))
    kept.end_epoch()


def test_the_newest_file_and_the_checkpoints_are_kept(tmp_path):
    kept = store()
    for epoch in range(6):
        fill(kept, epoch)
        kept.save(tmp_path)
        if epoch in (2, 3):  # --val-interval: the script writes no checkpoint in the others
            assert kept.get_state()['epoch'] == epoch
        named = {3: 2, 4: 3, 5: 3}.get(epoch)
        assert names_in(tmp_path) == [f'aikd-memory-{e}.safetensors' for e in (named, epoch) if e is not None]


def test_files_of_checkpoints_in_the_folder_are_kept(tmp_path):
    """timm's ranked checkpoints have the epoch's number, a milestone that of the epochs completed."""
    kept = store()
    for epoch in range(6):
        fill(kept, epoch)
        kept.save(tmp_path)
        kept.get_state()
        (tmp_path / f'checkpoint-{epoch}.pth.tar').touch()
        if epoch >= 2:
            (tmp_path / f'checkpoint-{epoch - 2}.pth.tar').unlink()
        if epoch == 1:
            (tmp_path / 'milestone-2.pth.tar').touch()
    files = [name for name in names_in(tmp_path) if name.startswith('aikd')]
    assert files == [f'aikd-memory-{epoch}.safetensors' for epoch in (1, 3, 4, 5)]  # 3 had a checkpoint until after 5
    (tmp_path / 'milestone-2.pth.tar').unlink()
    (tmp_path / 'aikd-memory-4.safetensors.tmp').touch()  # what a kill has left
    fill(kept, 6)
    kept.save(tmp_path)
    files = [name for name in names_in(tmp_path) if name.startswith('aikd')]
    assert files == [f'aikd-memory-{epoch}.safetensors' for epoch in (4, 5, 6)]


def test_a_file_of_the_first_version_is_restored(tmp_path, caplog):
    """Written here as 0.1.0 wrote it: packed little-endian time, label and float16 values."""
    z, y = predictions(size=12)
    times = (3 + 1) * 2 ** 40 + np.arange(12) * 2 ** 16
    rows = [
        struct.pack('<qi5e', time, label, *row)
        for time, label, row in zip(times.tolist(), y.tolist(), z.log_softmax(-1).tolist(), strict=True)]
    content = b''.join(rows)
    state = {
        'name': 'aikd-memory-3.safetensors', 'folder': str(tmp_path), 'epoch': 3,
        'digest': hashlib.sha256(content).hexdigest()}
    metadata = {'version': '1', 'epoch': '3', 'records': '5 of 5 log-probabilities in float16'}
    records = np.frombuffer(content, np.uint8).reshape(12, -1)
    save_file({'records': records}, tmp_path / state['name'], metadata)
    kept = store()
    kept.load_state(state, [])
    assert not caplog.messages and kept.get_state() == state
    past, known = kept.recall(None, np.arange(12))
    assert known is None and torch.equal(past, z.log_softmax(-1).half().float())
    assert kept.table.records['label'].tolist() == y.tolist()


def test_a_file_of_today_is_what_the_first_version_reads(tmp_path):
    kept = store()
    fill(kept, 3)
    kept.save(tmp_path)
    state = kept.get_state()
    assert set(state) == {'name', 'folder', 'epoch', 'digest'} and state['epoch'] == 3
    with safe_open(tmp_path / state['name'], 'np') as file:
        assert file.metadata() == {'version': '1', 'epoch': '3', 'records': '5 of 5 log-probabilities in float16'}
        rows = file.get_tensor('records')
    assert rows.dtype == np.uint8 and rows.shape == (12, 8 + 4 + 5 * 2)
    assert hashlib.sha256(rows.tobytes()).hexdigest() == state['digest']
    time, label, *values = struct.unpack('<qi5e', rows[5].tobytes())
    assert (time, label) == (4 * 2 ** 40 + 2 ** 16, 0)
    assert values == pytest.approx(predictions(seed=3)[0][1].log_softmax(-1).tolist(), abs=2e-3)


def test_resumes_to_the_exact_table_wherever_the_folder_has_gone(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    kept = store()
    fill(kept, 3)
    kept.save(tmp_path / 'missing')  # a failure is reported, and forgotten
    assert 'was not saved beside the checkpoints' in caplog.text and kept.get_state() is None
    (tmp_path / 'run').mkdir()
    kept.save(tmp_path / 'run')
    state = kept.get_state()
    fill(kept, 4)
    (tmp_path / 'run').rename(tmp_path / 'moved')
    resumed = store()
    resumed.load_state(state, [tmp_path / 'moved'])
    assert 'prediction memory of epoch 3 restored, 12 samples' in caplog.text
    expected = store()
    fill(expected, 3)
    assert resumed.table.records.tobytes() == expected.table.records.tobytes() != kept.table.records.tobytes()
    assert resumed.get_state() == state


@pytest.mark.parametrize('changes, reason', [
    (dict(classes=4), 'records is 5 of 5 log-probabilities in float16, not 4 of 4'),
    (dict(topk=3), 'not 3 of 5'), (dict(binary=True), 'not 5 of 5 logits'),
    (dict(samples=13), 'the data set had 12 samples when the memory was written, has 13 now'),
    (dict(dtype=torch.float32), 'in float32'),
])
def test_another_runs_file_is_refused_in_one_line(tmp_path, caplog, changes, reason):
    kept = store()
    fill(kept, 3)
    kept.save(tmp_path)
    other = store(**changes)
    other.load_state(kept.get_state(), [])
    message, = caplog.messages
    assert reason in message and 'pauses for one epoch' in message and len(other.table) == 0
    assert '\n' not in message and other.get_state() is None


def test_a_file_names_only_the_epoch_that_it_was_saved_in(tmp_path):
    kept = store()
    fill(kept, 3)
    kept.save(tmp_path)
    resumed = store()
    resumed.load_state(kept.get_state(), [])
    fill(resumed, 4)
    resumed.save(None)
    assert resumed.get_state() is None and names_in(tmp_path) == ['aikd-memory-3.safetensors']


def test_only_files_of_its_own_are_removed(tmp_path):
    for name in ('aikd-memory-5.safetensors.bak', 'aikd-memory-x.safetensors', 'aikd-memory-1.safetensors.tmp'):
        (tmp_path / name).touch()
    kept = store()
    fill(kept, 3)
    kept.save(tmp_path)
    assert names_in(tmp_path) == [
        'aikd-memory-3.safetensors', 'aikd-memory-5.safetensors.bak', 'aikd-memory-x.safetensors']


def test_a_lower_start_epoch_ages_what_was_restored(tmp_path):
    kept = store()
    fill(kept, 50)
    kept.save(tmp_path)
    for epoch, version in ((51, version_at(50, 0, 0)), (50, 1), (0, 1)):
        resumed = store()
        resumed.load_state(kept.get_state(), [])
        resumed.begin_epoch(epoch)
        assert resumed.table.records['version'][0] == version and len(resumed.table) == 12


def test_a_newer_file_of_the_same_name_is_refused(tmp_path, caplog):
    kept = store()
    fill(kept, 3)
    kept.save(tmp_path)
    state = kept.get_state()
    fill(kept, 3, seed=9)
    kept.save(tmp_path)
    (other := store()).load_state(state, [])
    assert 'content is not that of the checkpoint' in caplog.text and len(other.table) == 0
    other.load_state({**state, 'name': '../../etc/passwd'}, [tmp_path])
    assert f'{tmp_path}/passwd is not there' in caplog.text
    other.load_state(None, [])
    assert 'names no prediction memory' in caplog.text
