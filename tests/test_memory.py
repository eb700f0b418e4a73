"""The snapshot is the student as it was; the store is PS-KD's memory, at a fraction of its size and cost."""
import gc
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from timm_aikd import Aikd, AikdConfig, AikdError, RecordFormat, SnapshotMemory, StoreMemory, Teacher, memory
from timm_aikd.records import stamp_at

from .distributed import spawn


def test_is_the_student_of_the_previous_epoch_in_eval_mode(tiny_net):
    torch.manual_seed(0)
    student, memory = tiny_net(), SnapshotMemory()
    x = torch.randn(6, 4)
    for _ in range(3):
        student.train()
        student(x).sum().backward()  # moves BatchNorm's statistics
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.1 * parameter.grad
        student.eval()
        expected = student(x).detach()
        student.train()
        memory.remember(student)
        student(x)
        with torch.no_grad():
            student.head.bias += 1
        assert torch.equal(memory(x), expected)


def test_is_overwritten_in_place_and_trains_nothing(tiny_net):
    student, memory = tiny_net(), SnapshotMemory()
    memory.remember(student)
    addresses = [tensor.data_ptr() for tensor in memory.state_dict().values()]
    model = memory.model
    with torch.no_grad():
        student.head.weight.zero_()
    memory.remember(student.train())
    memory.train()
    assert memory.model is model and not model.training
    assert [tensor.data_ptr() for tensor in memory.state_dict().values()] == addresses
    assert torch.equal(model.head.weight, student.head.weight)
    assert model.head.weight.data_ptr() != student.head.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in memory.parameters())
    assert not memory(torch.randn(2, 4)).requires_grad
    assert student.training and student.head.weight.requires_grad


def test_copying_moves_no_random_stream(tiny_net):
    student, state = tiny_net(), torch.get_rng_state()
    SnapshotMemory().remember(student)
    assert torch.equal(torch.get_rng_state(), state)


def store(samples=12, classes=5, tmp_path=None, **options):
    return StoreMemory(RecordFormat(classes, **options), samples, tmp_path and str(tmp_path))


def predictions(size=4, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, classes, generator=generator), torch.randint(0, classes, (size,), generator=generator)


def test_recalls_each_sample_as_it_was_last_seen():
    kept = store(dtype=torch.float32)
    index = np.array([7, 2, 11, 0])
    before = None
    for epoch in range(3):
        kept.begin_epoch(epoch)
        past, known = kept.recall(None, index)
        if before is None:
            assert not known.any()
        else:
            assert known is None and torch.equal(past, before)
        z, y = predictions(seed=epoch)
        kept.record(index, z, predictions()[1])
        kept.end_epoch()
        before = z.log_softmax(-1)
    past, known = kept.recall(None, np.array([1, 0, 7]))
    assert known.tolist() == [False, True, True] and torch.equal(past[1:], before[[3, 0]])
    assert set(kept.table.records['stamp'][index].tolist()) == {stamp_at(2, 0, 0)}


def test_what_is_not_finite_is_not_kept():
    kept = store()
    kept.begin_epoch(0)
    z, y = predictions()
    kept.record(np.arange(4), z, y)
    bad = torch.ones_like(z)
    bad[1, 2] = torch.nan
    kept.begin_epoch(1)
    kept.record(np.arange(4), bad, y)
    past, known = kept.recall(None, np.arange(4))
    assert known is None
    torch.testing.assert_close(past[1], z[1].log_softmax(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(past[0], torch.full((5,), 0.2).log(), rtol=1e-3, atol=1e-3)


def test_soft_targets_and_unknown_samples_are_refused():
    kept = store(samples=4)
    with pytest.raises(AikdError, match=r'targets of shape \[4, 5\] are soft.*use --aikd-memory snapshot'):
        kept.record(np.arange(4), predictions()[0], torch.rand(4, 5))
    for call in (lambda index: kept.record(index, *predictions(1)), lambda index: kept.recall(None, index)):
        for index in (-1, 4):
            with pytest.raises(AikdError, match='the training set has 4'):
                call(np.array([index]))


def test_labels_that_change_stop_the_run_unless_they_are_few(caplog):
    kept = store(samples=1000, classes=2)
    labels = torch.zeros(1000, dtype=torch.long)
    for changed in (0, 10):
        labels[:changed] = 1
        kept.record(np.arange(1000), torch.zeros(1000, 2), labels)
        kept.end_epoch()
    assert '10 of 1000 samples had another label' in caplog.text
    labels[:31] = 1
    kept.record(np.arange(1000), torch.zeros(1000, 2), labels)
    with pytest.raises(AikdError, match='21 of 1000 samples had another label'):
        kept.end_epoch()


class Event:
    """A CUDA event whose work is done when the test says so."""

    done = False

    def query(self):
        return Event.done

    def synchronize(self):
        Event.done = True


def test_records_under_way_are_waited_for_by_nobody(monkeypatch):
    """The CUDA path with its event stubbed: nothing waits within an epoch, the end of the epoch does."""
    class Arriving(memory._Arriving):
        def __init__(self, index, records):
            super().__init__(index, records)
            self.event = Event()

    monkeypatch.setattr(memory, '_Arriving', Arriving)
    Event.done, kept = False, store()
    kept.begin_epoch(0)
    for step in range(3):
        kept.record(np.arange(4), predictions(seed=step)[0], torch.zeros(4, dtype=torch.long))
        assert len(kept.table) == 0 and not Event.done
    kept.recall(None, np.arange(4))
    kept.end_epoch()
    assert Event.done and set(kept.table.records['stamp'][:4].tolist()) == {stamp_at(0, 2, 0)}
    Event.done = True
    kept.record(np.arange(4, 8), *predictions())
    assert len(kept.table) == 4
    kept.record(np.arange(8, 12), *predictions())
    assert len(kept.table) == 8  # a step later


class PsKd:
    """PS-KD's memory in eight lines, on F.cross_entropy."""

    def __init__(self, samples, classes, alpha, epochs):
        self.past, self.alpha, self.epochs = torch.zeros(samples, classes), alpha, epochs

    def __call__(self, epoch, index, z, y):
        a = self.alpha * (epoch + 1) / self.epochs if epoch > 0 else 0.
        loss = (1 - a) * F.cross_entropy(z, y) + a * F.cross_entropy(z, self.past[index].softmax(-1))
        self.past[index] = z.detach().log_softmax(-1)
        return loss


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 0.), (torch.float16, 1e-3)])
def test_parity_with_ps_kd(tiny_net, dtype, tolerance):
    """With float32 rows bit for bit, in losses and in weights; with float16 rows within 1e-3 of the loss."""
    samples, epochs = 64, 6
    x, y = predictions(samples, 4)[0], predictions(samples, 5)[1]
    config = AikdConfig(teacher='none', alpha=0.8, progressive_temperature=1., memory='store')
    runs = []
    for method in ('ours', 'PS-KD'):
        torch.manual_seed(0)
        net = tiny_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
        aikd, reference = Aikd(5, config=config, epochs=epochs), PsKd(samples, 5, 0.8, epochs)
        aikd.use_memory(store(samples, dtype=dtype))
        losses = []
        for epoch in range(epochs):
            aikd.begin_epoch(epoch, net)
            for index in torch.randperm(samples).split(16):
                z = net(x[index])
                loss = reference(epoch, index, z, y[index]) if method == 'PS-KD' else aikd(
                    x[index], z, y[index], F.cross_entropy(z, y[index]), index.numpy())['loss']
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            aikd.end_epoch()
        runs.append((losses, net.state_dict()))
    (ours, our_weights), (theirs, their_weights) = runs
    if tolerance:
        assert ours == pytest.approx(theirs, abs=tolerance) and ours != theirs
    else:
        assert ours == theirs
        assert all(torch.equal(our_weights[name], their_weights[name]) for name in our_weights)


def test_the_linear_form_is_ps_kds_blended_target():
    """PS-KD mixes targets, here losses are mixed: the same, for cross-entropy is linear in its target."""
    z, y = predictions()
    past = predictions(seed=1)[0].softmax(-1)
    blended = 0.7 * F.one_hot(y, 5) + 0.3 * past
    mixed = 0.7 * F.cross_entropy(z, y) + 0.3 * F.cross_entropy(z, past)
    torch.testing.assert_close(-(blended * z.log_softmax(-1)).sum(-1).mean(), mixed, rtol=1e-6, atol=0)


def saved(folder):
    return sorted(path.name for path in Path(folder).iterdir())


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
        assert saved(tmp_path) == [f'aikd-memory-{e}.safetensors' for e in (named, epoch) if e is not None]


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
    (dict(classes=4), 'its records is 5 of 5 log-probabilities in float16, not 4 of 4'),
    (dict(topk=3), 'not 3 of 5'), (dict(binary=True), 'not 5 of 5 logits'), (dict(samples=13), 'its records are U8'),
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
    assert resumed.get_state() is None and saved(tmp_path) == ['aikd-memory-3.safetensors']


def test_only_files_of_its_own_are_removed(tmp_path):
    for name in ('aikd-memory-5.safetensors.bak', 'aikd-memory-x.safetensors', 'aikd-memory-1.safetensors.tmp'):
        (tmp_path / name).touch()
    kept = store()
    fill(kept, 3)
    kept.save(tmp_path)
    assert saved(tmp_path) == [
        'aikd-memory-3.safetensors', 'aikd-memory-5.safetensors.bak', 'aikd-memory-x.safetensors']


def test_a_lower_start_epoch_ages_what_was_restored(tmp_path):
    kept = store()
    fill(kept, 50)
    kept.save(tmp_path)
    for epoch, stamp in ((51, stamp_at(50, 0, 0)), (50, 1), (0, 1)):
        resumed = store()
        resumed.load_state(kept.get_state(), [])
        resumed.begin_epoch(epoch)
        assert resumed.table.records['stamp'][0] == stamp and len(resumed.table) == 12


def test_a_batch_without_its_samples_is_an_error():
    with pytest.raises(AikdError, match='the samples of the batch are not known'):
        store().record(None, *predictions())


def test_a_newer_file_of_the_same_name_is_refused(tmp_path, caplog):
    kept = store()
    fill(kept, 3)
    kept.save(tmp_path)
    state = kept.get_state()
    fill(kept, 3, seed=9)
    kept.save(tmp_path)
    (other := store()).load_state(state, [])
    assert 'its content is not what the checkpoint names' in caplog.text and len(other.table) == 0
    other.load_state({**state, 'name': '../../etc/passwd'}, [tmp_path])
    assert f'{tmp_path}/passwd is not there' in caplog.text
    other.load_state(None, [])
    assert 'names no prediction memory' in caplog.text


def _rank_trains(rank, argument):
    hosts, folder = argument
    kept = StoreMemory(RecordFormat(5), 40, folder, host=hosts[rank])
    for epoch in range(3):
        kept.begin_epoch(epoch)
        for step in range(4):
            index = batch_of(rank, epoch, step)
            kept.recall(None, index)
            kept.record(index, predictions(5, seed=100 * epoch + 10 * step + rank)[0], torch.from_numpy(index % 5))
        kept.end_epoch()
    table = kept.table.records.copy()
    kept.save(folder if rank == 0 else None)
    resumed = StoreMemory(RecordFormat(5), 40, folder, host=hosts[rank])
    state = [kept.get_state()]
    torch.distributed.broadcast_object_list(state, 0)
    resumed.load_state(state[0], [])
    return table.tobytes(), resumed.table.records.tobytes(), saved(folder)


def batch_of(rank, epoch, step):
    order = np.random.default_rng(epoch).permutation(40)
    return order[step * 10 + rank * 5:step * 10 + rank * 5 + 5]


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('hosts', ['ab', 'aa'])
def test_two_hosts_have_the_table_of_one_process_that_sees_the_same_batches(tmp_path, hosts):
    alone = StoreMemory(RecordFormat(5), 40, str(tmp_path))
    for epoch in range(3):
        for step in range(4):
            for rank in range(2):
                index = batch_of(rank, epoch, step)
                alone._epoch, alone._step = epoch, step
                alone.record(index, predictions(5, seed=100 * epoch + 10 * step + rank)[0],
                             torch.from_numpy(index % 5))
                alone.recall(None, index)  # commits
                alone.table.records['stamp'][index] += rank  # the only thing that it cannot know
    for table, resumed, files in spawn(_rank_trains, 2, (hosts, str(tmp_path))):
        assert table == resumed == alone.table.records.tobytes()
        assert files == ['aikd-memory-2.safetensors']


def test_memory_is_flat_over_twenty_epochs():
    kept = store(samples=20000, classes=100)
    z, y = torch.randn(500, 100), torch.arange(500) % 100

    def resident():
        gc.collect()
        fields = Path('/proc/self/statm').read_text().split()
        return int(fields[1]) * os.sysconf('SC_PAGE_SIZE')

    sizes = []
    for epoch in range(20):
        kept.begin_epoch(epoch)
        for part in np.arange(20000).reshape(-1, 500):
            kept.recall(None, part)
            kept.record(part, z, y)
        kept.end_epoch()
        sizes.append(resident())
    assert max(sizes[2:]) - sizes[1] < kept.table.bytes / 4


@pytest.mark.parametrize('binary', [False, True])
@pytest.mark.parametrize('smoothing', [0., 0.1])
def test_samples_without_a_row_keep_exactly_their_task_loss(binary, smoothing):
    """A batch half known: known samples get the progressive term, the others their criterion and nothing else."""
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

    if binary:
        criterion = BinaryCrossEntropy(smoothing=smoothing, target_threshold=0.05 if smoothing else None)
    else:
        criterion = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    config = AikdConfig(teacher='none', alpha=0.6, progressive_temperature=2., memory='store')
    aikd = Aikd(
        5, config=config, epochs=2, binary=binary, criterion=criterion)
    aikd.use_memory(store(binary=binary, dtype=torch.float32))
    old, y = predictions()
    aikd.begin_epoch(0, nn.Identity())
    first = aikd(None, old[:2], y[:2], criterion(old[:2], y[:2]), np.array([5, 1]))
    assert first['loss'] == first['task_loss']
    aikd.end_epoch()
    aikd.begin_epoch(1, nn.Identity())
    z = predictions(seed=1)[0].requires_grad_()
    result = aikd(None, z, y, criterion(z, y), np.array([5, 1, 0, 2]))

    alpha, known = 0.6, 0.
    for i in range(2):
        if binary:
            soft = F.binary_cross_entropy_with_logits(z[i] / 2, torch.sigmoid(old[i] / 2))
        else:
            soft = F.cross_entropy(z[i] / 2, torch.softmax(old[i] / 2, -1))
        known += (1 - alpha) * criterion(z[i:i + 1], y[i:i + 1]) + alpha * 4 * soft
    expected = (known + sum(criterion(z[i:i + 1], y[i:i + 1]) for i in (2, 3))) / 4
    torch.testing.assert_close(result['loss'], expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (result['loss'], expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


class Synchronising(TorchDispatchMode):
    """Fails on operators for which a host waits for its device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        waits = name in ('aten::_local_scalar_dense', 'aten::nonzero', 'aten::equal', 'aten::masked_select',
                         'aten::is_nonzero', 'aten::unique_consecutive', 'aten::_unique2')
        masks = name in ('aten::index', 'aten::index_put_') and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1])
        assert not waits and not masks, name
        return function(*args, **kwargs or {})


@pytest.mark.parametrize('memory, classes, topk', [('store', 5, None), ('store', 40, 6), ('snapshot', 5, None)])
def test_no_operator_of_a_step_waits_for_the_device(tiny_net, memory, classes, topk):
    """All terms, samples without a row and a teacher on trial among them; the test against chance, once a run, is not
    of a step."""
    config = AikdConfig(teacher='given', teacher_temperature=1., memory=memory, disc_hidden=(8,))
    net = tiny_net(classes)
    teacher = Teacher(tiny_net(classes), trial=tiny_net(classes).bfloat16())
    aikd = Aikd(classes, teacher, config, epochs=3)
    if memory == 'store':
        aikd.use_memory(store(classes=classes, topk=topk))
    x, y = torch.randn(4, 4), torch.randint(0, classes, (4,))
    for epoch in range(3):
        aikd.begin_epoch(epoch, net)
        with Synchronising():
            z = net(x)
            index = np.array([epoch, 7, 5, 11])
            aikd(x, z, y, F.cross_entropy(z, y), index)['loss'].backward()
        aikd.end_epoch()
    with pytest.raises(AssertionError, match='_local_scalar_dense'), Synchronising():
        x.sum().item()


def test_a_store_that_nobody_gave_is_an_error(tiny_net):
    aikd = Aikd(5, config=AikdConfig(teacher='none', memory='store'), epochs=2)
    with pytest.raises(AikdError, match='--aikd-memory store: there is none'):
        aikd.begin_epoch(0, tiny_net())
