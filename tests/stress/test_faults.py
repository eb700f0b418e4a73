"""What can go wrong in a long training: disks, folders, workers, numbers and ranks fail, processes are killed.

Each fault is said in one clear line, and survived where training can go on. test_kills.py kills whole runs.
"""
import errno
import logging
import os
import resource
import shutil
import signal
from contextlib import contextmanager, nullcontext

import pytest
import timm
import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy
from torch.utils.data import DataLoader, TensorDataset

from timm_aikd import AikdConfig, AikdError, AikdTask
from timm_aikd.memory import scratch
from timm_aikd.memory.table import HostTable
from timm_aikd.teacher import check

from ..conftest import SMALL_RUN, training_scripts
from ..script.test_scripts import checkpoint, summary
from ..support import oracle
from ..support.interactions import drive

SAMPLES, BATCH = 36, 6


class Spoilt(TensorDataset):
    """Samples that come out wrong once, as `spoil` makes them."""

    def __init__(self, *tensors, spoil=None):
        super().__init__(*tensors)
        self.spoil = spoil

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample if self.spoil is None else self.spoil(index, *sample)


class Run:
    """AI-KD in a loop of one's own: a tiny student, a teacher that is right, a real loader, a store memory."""

    def __init__(self, tiny_net, criterion=None, spoil=None, workers=0, **options):
        torch.manual_seed(0)
        x, y = torch.randn(SAMPLES, 4), torch.arange(SAMPLES) % 5
        self.student, self.teacher = tiny_net(), nn.Linear(4, 5)
        self.teacher.forward = self.answer
        self.loader = DataLoader(Spoilt(x, y, spoil=spoil), BATCH, shuffle=True, num_workers=workers)
        config = AikdConfig(**{
            'teacher': 'given', 'teacher_temperature': 1., 'disc_hidden': (8,), 'memory': 'store', **options})
        self.task = AikdTask(
            self.student, criterion or nn.CrossEntropyLoss(), teacher=self.teacher, config=config, epochs=10,
            verbose=False)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05)

    def answer(self, x):
        return 3. * x[:, :1] + torch.arange(5.) * x[:, 1:2]

    def epoch(self, epoch, folder=None):
        """As a careful loop does, a step whose loss is not finite is left out."""
        self.task.begin_epoch(epoch, self.loader, checkpoint_folder=folder)
        for input, target in self.loader:
            loss = self.task(input, target)['loss']
            if loss.isfinite():
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
        return self.task.end_epoch()

    @property
    def memory(self):
        return self.task.aikd.memory

    def is_sound(self):
        parameters = (*self.student.parameters(), *self.task.aikd.discriminator.parameters())
        return all(parameter.isfinite().all() for parameter in parameters)


@contextmanager
def full_disk(size=100):
    """No file grows beyond `size` bytes: writes and allocations fail half-way, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def a_file_in_its_place(folder):
    shutil.rmtree(folder)
    folder.touch()


def read_only(folder):
    """A link to a place that not even root can write to."""
    shutil.rmtree(folder)
    folder.symlink_to('/proc/self')


def full(folder):
    return full_disk()


@pytest.mark.parametrize('fault, reason', [
    (full, os.strerror(errno.EFBIG)), (read_only, '/aikd-memory-1.safetensors.tmp'),
    (shutil.rmtree, os.strerror(errno.ENOENT)), (a_file_in_its_place, os.strerror(errno.ENOTDIR)),
])
def test_a_folder_of_checkpoints_that_fails(tiny_net, tmp_path, caplog, fault, reason):
    """Said each time, training goes on with the memory, and the file is there again as soon as the folder is."""
    job, folder = Run(tiny_net), tmp_path / 'run'
    folder.mkdir()
    job.epoch(0, folder)
    first = (folder / 'aikd-memory-0.safetensors').read_bytes()
    with fault(folder) or nullcontext():
        for epoch in (1, 2):
            caplog.clear()
            assert job.epoch(epoch, folder)['progressive'] > 0
            message, = caplog.messages
            assert 'was not saved beside the checkpoints' in message and '\n' not in message
            assert reason in message or epoch == 2
            assert job.task.get_task_state()['aikd'].get('memory') is None
    if fault is full:
        assert [path.name for path in folder.iterdir()] == ['aikd-memory-0.safetensors']
        assert (folder / 'aikd-memory-0.safetensors').read_bytes() == first
    elif folder.is_symlink() or folder.is_file():
        folder.unlink()
    folder.mkdir(exist_ok=True)
    caplog.clear()
    job.epoch(3, folder)
    assert not caplog.messages and len(job.memory.table) == SAMPLES
    state, again = job.task.get_task_state(), Run(tiny_net)
    again.task.begin_epoch(4, again.loader)
    again.task.load_task_state(state)
    assert again.memory.table.records.tobytes() == job.memory.table.records.tobytes()


def test_a_folder_that_goes_while_its_older_files_are_removed(tiny_net, tmp_path, caplog, monkeypatch):
    save = HostTable.save

    def save_and_lose(self, path, metadata):
        digest = save(self, path, metadata)
        shutil.rmtree(path.parent)
        return digest

    monkeypatch.setattr(HostTable, 'save', save_and_lose)
    Run(tiny_net).epoch(0, tmp_path)
    assert 'older files of the prediction memory could not be removed: [Errno 2]' in caplog.text


def test_a_full_disk_at_the_start_is_not_the_end(tiny_net, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with full_disk(), pytest.raises(AikdError, match=r'store: .* cannot hold the prediction table of 36 samples'):
        Run(tiny_net, memory_dir=str(tmp_path)).epoch(0)
    job = Run(tiny_net, memory='auto', memory_dir=str(tmp_path))
    with full_disk():
        job.epoch(0)
    assert job.memory.name == 'snapshot' and list(tmp_path.iterdir()) == []
    assert 'not store, because' in caplog.text and os.strerror(errno.EFBIG) in caplog.text


def test_the_tables_folder_is_not_needed_once_it_is_mapped(tiny_net, tmp_path):
    jobs = [Run(tiny_net, memory_dir=str(tmp_path / name)) for name in 'ab']
    for name, job in zip('ab', jobs, strict=True):
        (tmp_path / name).mkdir()
        torch.manual_seed(1)
        for epoch in range(3):
            job.epoch(epoch)
            if job is jobs[1] and epoch == 0:
                shutil.rmtree(tmp_path / name)
    assert jobs[0].memory.table.records.tobytes() == jobs[1].memory.table.records.tobytes()
    with pytest.raises(AikdError, match=f'{tmp_path}/b cannot hold .*: No such file or directory'):
        Run(tiny_net, memory_dir=str(tmp_path / 'b')).epoch(0)


def test_what_a_kill_leaves_of_a_table_is_gone_at_the_next_start(tiny_net, tmp_path):
    """At once, where it has taken space; what is empty may be another run's that is about to lock it."""
    held, left, new = (tmp_path / f'timm-aikd-{name}.table' for name in ('held', 'left', 'new'))
    for path in (held, left):
        path.write_bytes(bytes(100))
    new.touch()
    with open(held) as file:
        scratch.fcntl.flock(file, scratch.fcntl.LOCK_EX)
        Run(tiny_net, memory_dir=str(tmp_path)).epoch(0)
    assert sorted(tmp_path.iterdir()) == [held, new]


@pytest.mark.filterwarnings('ignore:.*multi-threaded.*fork:DeprecationWarning')
def test_a_loader_process_that_dies(tiny_net, tmp_path):
    """The error is torch's; a loop that begins the epoch again has lost nothing."""
    def die_once(index, x, y):
        if index == 7 and flag.exists():
            flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return x, y

    flag, job = tmp_path / 'flag', Run(tiny_net, spoil=die_once, workers=1)
    job.epoch(0)
    flag.touch()
    before = job.memory.table.records['version'].copy()
    with pytest.raises(RuntimeError, match=r'DataLoader worker \(pid\(?s?\)?.*(killed by signal|exited unexpectedly)'):
        job.epoch(1)
    assert not flag.exists()
    metrics = job.epoch(1)
    assert metrics['progressive'] > 0 and job.is_sound()
    assert (job.memory.table.records['version'] > before).all()


def nan_in(*samples):
    return lambda index, x, y: (x * torch.nan if index in samples else x, y)


class InfiniteOnce(nn.Module):
    """A criterion that is infinite in its eighth call, in the second epoch."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, z, y):
        self.calls += 1
        return nn.functional.cross_entropy(z, y) * (torch.inf if self.calls == 8 else 1.)


@pytest.mark.parametrize('memory', ['store', 'snapshot'])
@pytest.mark.parametrize('fault', ['NaN sample', 'Inf loss'])
def test_a_batch_that_is_not_finite(tiny_net, caplog, fault, memory):
    """Neither D nor the memory takes it in; the loop has seen the loss, and the epoch's end says so to all others."""
    job = Run(tiny_net, InfiniteOnce() if fault == 'Inf loss' else None, memory=memory)
    for module in job.student.modules():  # with a NaN in its statistics a model is lost, AI-KD or not
        if isinstance(module, nn.BatchNorm1d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    job.epoch(0)
    assert 'finite' not in caplog.text
    caplog.clear()
    before = job.memory.table.records.copy() if memory == 'store' else None
    job.loader.dataset.spoil = nan_in(7) if fault == 'NaN sample' else None
    metrics = job.epoch(1)
    message, = caplog.messages
    assert 'epoch 1: the loss of 1 batches was not finite' in message and 'gradient scaler' in message
    assert metrics['disc_skipped'] == (fault == 'NaN sample') and job.is_sound()
    if memory == 'store':
        kept = job.memory.table.records['version'] == before['version']
        assert kept.sum() == (BATCH if fault == 'NaN sample' else 0)  # BatchNorm spreads it over the batch
        assert (job.memory.table.records[kept] == before[kept]).all()
    caplog.clear()
    job.loader.dataset.spoil = None
    metrics = job.epoch(2)
    assert not caplog.messages and metrics['task'] < 10 and metrics['progressive'] < 16 * 10


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('wrong', [torch.nan, torch.inf, -torch.inf])
def test_a_teacher_that_gives_no_finite_answer(tiny_net, caplog, wrong, binary):
    """Its samples have no kd, and D skips their batch; the others learn what they would without them."""
    job = Run(tiny_net, BinaryCrossEntropy(smoothing=0.) if binary else None, memory='snapshot', adv_weight=1e-6)
    x, y = (tensor[:6] for tensor in job.loader.dataset.tensors)
    spoilt = torch.tensor([True, False, False, True, False, False])
    answer, tau = job.answer, job.task.aikd.config.temperature

    def answer_badly(x):
        z = answer(x)
        z[spoilt, 2] = wrong
        return z

    job.teacher.forward = answer_badly
    job.task.begin_epoch(0)
    before = [parameter.clone() for parameter in job.task.aikd.discriminator.parameters()]
    state = torch.get_rng_state()
    result = job.task(x, y)
    result['loss'].backward()
    skips = not (binary and wrong == torch.inf)  # a probability of 1, for D
    assert all(map(torch.equal, before, job.task.aikd.discriminator.parameters())) == skips
    gradients = [parameter.grad.clone() for parameter in job.student.parameters()]
    job.optimizer.zero_grad()
    torch.set_rng_state(state)
    z = job.student(x)
    sound = answer(x)[~spoilt], z[~spoilt], tau
    kd = oracle.binary_kl(*sound, sum_classes=False) if binary else oracle.kl(*sound)
    (job.task.criterion(z, y) + kd.sum().float() / 6).backward()
    for ours, parameter in zip(gradients, job.student.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
    metrics = job.task.end_epoch()
    message, = caplog.messages
    assert 'epoch 0: the teacher had no finite answer for 2 of 6 samples' in message and '`teacher_dtype`' in message
    assert metrics['disc_skipped'] == skips and metrics['kd'] == pytest.approx(result['kd_loss'].item())
    assert all(metrics[name] < 10 for name in ('task', 'kd', 'disc'))


def test_a_teacher_that_gives_no_finite_answer_to_a_validation_image(tiny_net, caplog):
    """T_c is that of the other images; a teacher that answers none is broken."""
    fits = []
    for wrong in (None, torch.nan, torch.inf):
        job = Run(tiny_net, teacher_temperature='auto')
        x = job.loader.dataset.tensors[0]
        y = torch.distributions.Categorical(logits=job.answer(x)).sample()  # so that T_c is about 1
        if wrong is None:
            x, y = x[1:], y[1:]
        else:
            job.teacher.forward = lambda x, wrong=wrong, answer=job.answer: answer(x).index_fill(
                0, torch.tensor([0]), wrong)
        caplog.clear()
        fits.append(job.task.calibrate([(x, y)])['temperature'])
        said = 'no finite logits for 1 of 36 images'
        assert (said in caplog.text) == (wrong is not None)
    assert fits[0] == pytest.approx(fits[1]) == pytest.approx(fits[2]) and 0.3 < fits[0] < 3
    job.teacher.forward = lambda x: torch.full((len(x), 5), torch.nan)
    with pytest.raises(AikdError, match='no finite logits for 36 of 36 images.*`teacher_dtype`'):
        job.task.calibrate([(x, y)])


def test_a_teacher_that_never_answers_stops_the_run(tiny_net, monkeypatch):
    monkeypatch.setattr(check, 'SAMPLES', 2 * SAMPLES)
    job = Run(tiny_net)
    job.teacher.forward = lambda x: torch.full((len(x), 5), torch.nan)
    job.loader.dataset.tensors[1].zero_()  # whose argmax is class 0
    with pytest.raises(AikdError, match='is right on 0.0 % of the first 72 .*no better than chance'):
        for epoch in range(3):
            job.epoch(epoch)


@pytest.mark.filterwarnings('ignore')
def test_a_student_that_diverges(image_folder, tmp_path, monkeypatch, caplog):
    """As without AI-KD the script goes on to its end; what has happened is said in every epoch."""
    torch.manual_seed(1)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'teacher.pth')
    drive(training_scripts()['examples'], [
        '--data-dir', image_folder, *SMALL_RUN, '--output', tmp_path, '--experiment', 'run', '-j', '0', '--opt', 'sgd',
        '--lr', '1e30', '--epochs', '3', '--aikd', '--aikd-teacher', tmp_path / 'teacher.pth', '--aikd-disc-hidden',
        '8'], monkeypatch, caplog)
    said = [record.getMessage() for record in caplog.records if 'was not finite' in record.getMessage()]
    assert [message[:14] for message in said] == [f'AI-KD: epoch {epoch}' for epoch in range(3)]
    rows = summary(tmp_path / 'run')
    assert len(rows) == 3 and rows[2]['train_aikd_task'] == 'nan' and float(rows[2]['train_aikd_disc_skipped']) == 6
    state = checkpoint(tmp_path / 'run')['task_state']['aikd']['discriminator']['weights']
    assert all(tensor.isfinite().all() for tensor in state.values())
