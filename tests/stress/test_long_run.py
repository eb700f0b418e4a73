"""Two hundred epochs: what a run holds at the end is what it held early on."""
import gc
import os
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from torch.multiprocessing import reductions
from torch.utils.data import DataLoader, TensorDataset

from timm_aikd import AikdConfig, AikdTask
from timm_aikd.run import AikdRun

from ..conftest import SMALL_RUN, training_scripts
from ..support.interactions import drive

pytestmark = pytest.mark.skipif(not Path('/proc/self').is_dir(), reason='looks at itself in /proc')

EPOCHS, EARLY, SAMPLES, CLASSES = 200, 50, 256, 1000
# Of 150 epochs. The allocator splits and keeps freed pieces, up to 4.4 MB of them seen, but a copy of the table
# (0.5 MB) or of D (0.3 MB) an epoch would be 40 MB or more; caches of Python and of torch take a little, less than one
# object or 700 bytes an epoch.
SLACK = {'resident': 16_000_000, 'allocated': 100_000, 'objects': 100}


def held() -> dict[str, int]:
    """What this process holds now."""
    reductions.shared_cache.free_dead_references()  # to batches of loader processes, which torch does now and then
    gc.collect()
    return {
        'resident': int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE'),
        'allocated': tracemalloc.get_traced_memory()[0],  # by Python and NumPy
        'objects': len(gc.get_objects()),
        'tensors': sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects()),
        'files': len(os.listdir('/proc/self/fd')),
        'threads': len(os.listdir('/proc/self/task')),
        'python threads': threading.active_count(),
    }


def is_flat(early: dict[str, int], late: dict[str, int]) -> None:
    grown = {name: late[name] - early[name] for name in early if late[name] - early[name] > SLACK.get(name, 0)}
    assert not grown, grown


@pytest.fixture(autouse=True)
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')
@pytest.mark.parametrize('memory, workers', [
    ('store', 1),
    pytest.param('store', 0, marks=pytest.mark.slow),
    pytest.param('snapshot', 0, marks=pytest.mark.slow),
])
def test_two_hundred_epochs_of_a_loop_hold_no_more_than_fifty(tiny_net, tmp_path, monkeypatch, memory, workers):
    monkeypatch.setattr('timm_aikd.teacher.check.SAMPLES', 10 ** 9)  # random weights are no better than chance
    torch.manual_seed(0)
    student, teacher = tiny_net(CLASSES), tiny_net(CLASSES)
    loader = DataLoader(
        TensorDataset(torch.randn(SAMPLES, 4), torch.arange(SAMPLES) % CLASSES), 64, shuffle=True,
        num_workers=workers, persistent_workers=workers > 0)
    config = AikdConfig(
        teacher='given', teacher_temperature=1., memory=memory, disc_hidden=(32,), memory_dir=str(tmp_path / 'table'))
    task = AikdTask(student, nn.CrossEntropyLoss(), teacher=teacher, config=config, epochs=EPOCHS, verbose=False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'table').mkdir()
    early = None
    for epoch in range(EPOCHS):
        task.begin_epoch(epoch, loader, checkpoint_folder=tmp_path / 'run')
        for input, target in loader:
            task(input, target)['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
        task.end_epoch()
        torch.save(task.get_task_state(), tmp_path / 'run/last.pth')
        if epoch in (EARLY - 1, EARLY):  # the first look takes memory itself
            early = held()
    is_flat(early, held())
    files = sorted(path.name for path in (tmp_path / 'run').iterdir())
    kept = [f'aikd-memory-{epoch}.safetensors' for epoch in (198, 199)] if memory == 'store' else []
    assert files == [*kept, 'last.pth'] and list((tmp_path / 'table').iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_two_hundred_epochs_of_the_script_hold_no_more_than_fifty(image_folder, tmp_path, monkeypatch):
    """The script's main, with validation, checkpoints and summaries; without a log, which pytest would hold."""
    measured, begin_epoch = {}, AikdRun.begin_epoch

    def watched(run, epoch, *args, **kwargs):
        measured[epoch] = held() if epoch in (EARLY - 1, EARLY, EPOCHS - 1) else None
        begin_epoch(run, epoch, *args, **kwargs)

    monkeypatch.setattr(AikdRun, 'begin_epoch', watched)
    torch.manual_seed(1)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'teacher.pth')
    monkeypatch.setattr('timm_aikd.teacher.check.SAMPLES', 10 ** 9)
    monkeypatch.setattr('timm.utils.setup_default_logging', lambda: None)
    drive(training_scripts()['examples'], [
        '--data-dir', image_folder, *SMALL_RUN, '--output', tmp_path, '--experiment', 'run', '-j', '0', '--epochs',
        str(EPOCHS), '--aikd', '--aikd-teacher', tmp_path / 'teacher.pth', '--checkpoint-hist', '2'],
        monkeypatch, SimpleNamespace(set_level=lambda level: None))
    is_flat(measured[EARLY], measured[EPOCHS - 1])
    files, checkpoints = (
        {int(path.name.split('.')[0].rpartition('-')[2]) for path in (tmp_path / 'run').glob(pattern)}
        for pattern in ('aikd-memory-*', 'checkpoint-*'))
    assert {198, 199} | checkpoints <= files and len(files) <= 5  # one may have lost its checkpoint in the last epoch
