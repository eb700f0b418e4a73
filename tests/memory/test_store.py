"""The store is PS-KD's memory, at a fraction of its size and cost."""
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
from torch.utils.data import DataLoader, TensorDataset

from timm_aikd import Aikd, AikdConfig, AikdError, RecordFormat, StoreMemory, Teacher
from timm_aikd.memory.arriving import Arriving
from timm_aikd.memory.records import version_at

from ..support.distributed import spawn
from .helpers import names_in, predictions, store


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
    assert set(kept.table.records['version'][index].tolist()) == {version_at(2, 0, 0)}


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
    with pytest.raises(AikdError, match=r'targets of shape \[4, 5\] are soft.*use `memory` snapshot'):
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
    class Late(Arriving):
        def __init__(self, index, records):
            super().__init__(index, records)
            self.event = Event()

    monkeypatch.setattr('timm_aikd.memory.store.Arriving', Late)
    Event.done, kept = False, store()
    kept.begin_epoch(0)
    for step in range(3):
        kept.record(np.arange(4), predictions(seed=step)[0], torch.zeros(4, dtype=torch.long))
        assert len(kept.table) == 0 and not Event.done
    kept.recall(None, np.arange(4))
    kept.end_epoch()
    assert Event.done and set(kept.table.records['version'][:4].tolist()) == {version_at(0, 2, 0)}
    Event.done = True
    kept.record(np.arange(4, 8), *predictions())
    assert len(kept.table) == 4
    kept.record(np.arange(8, 12), *predictions())
    assert len(kept.table) == 8  # a step later


class PsKd:
    """PS-KD's memory in a few lines, on F.cross_entropy, whose constant part (the entropy of q) is taken off."""

    def __init__(self, samples, classes, alpha, epochs):
        self.past, self.alpha, self.epochs = torch.zeros(samples, classes), alpha, epochs

    def __call__(self, epoch, index, z, y):
        a = self.alpha * (epoch + 1) / self.epochs if epoch > 0 else 0.
        q = self.past[index].softmax(-1)
        loss = (1 - a) * F.cross_entropy(z, y) + a * (F.cross_entropy(z, q) + (q * q.log()).sum(-1).mean())
        self.past[index] = z.detach().log_softmax(-1)
        return loss


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 2e-6), (torch.float16, 1e-3)])
def test_parity_with_ps_kd(tiny_net, dtype, tolerance):
    """With float32 rows to rounding, in losses and in weights; with float16 rows within 1e-3 of the loss."""
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
    assert ours == pytest.approx(theirs, abs=tolerance)
    if dtype == torch.float32:
        torch.testing.assert_close(our_weights, their_weights, rtol=1e-4, atol=1e-5)
    else:
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 2e-6


def test_a_batch_without_its_samples_is_an_error():
    with pytest.raises(AikdError, match='the samples of the batch are not known'):
        store().record(None, *predictions())


def images(samples=12, **options):
    """A loader whose inputs are their indices."""
    return DataLoader(TensorDataset(torch.arange(float(samples)), torch.arange(samples) % 5), 4, **options)


def one_epoch(kept, epoch, batches):
    kept.begin_epoch(epoch, None, batches)
    for input, target in batches:
        if epoch > 0:
            past, known = kept.recall(input, None)
            assert known is None and past.argmax(-1).tolist() == (input % 5).tolist()
        kept.record(None, 9. * F.one_hot(target, 5), target)
    kept.end_epoch()


def test_follows_the_loader_that_the_epoch_is_given(caplog):
    kept, first = store(), images(shuffle=True)
    for epoch in range(2):
        one_epoch(kept, epoch, first)
    one_epoch(kept, 2, images(shuffle=True))  # another loader of the same data set
    batches = iter(first)
    input, target = next(batches)
    with pytest.raises(AikdError, match='none'):  # the loader before is followed no more
        kept.record(None, 9. * F.one_hot(target, 5), target)
    assert not caplog.messages


def test_given_indices_come_before_those_of_the_loader():
    kept, batches = store(), images()
    kept.begin_epoch(0, None, batches)
    _, target = next(iter(batches))
    kept.record(torch.tensor([11, 10, 9, 8]), predictions()[0], target)
    kept.end_epoch()
    assert kept.table.records['version'].nonzero()[0].tolist() == [8, 9, 10, 11]


def test_a_loader_of_another_data_set_is_refused():
    kept = store()
    one_epoch(kept, 0, images())
    with pytest.raises(AikdError, match='the loader has 13 samples, the memory was made for 12.*`memory` snapshot'):
        kept.begin_epoch(1, None, images(13))


def test_samples_that_are_new_are_told_calmly_and_only_where_they_are_many(caplog):
    caplog.set_level(logging.INFO)
    kept = store(samples=1000, classes=2)
    for epoch, visited in enumerate((980, 989, 1000, 1000)):  # new: 980, 9, 11, 0
        caplog.clear()
        kept.begin_epoch(epoch)
        if epoch > 0:
            kept.recall(None, np.arange(visited))
        kept.record(np.arange(visited), torch.zeros(visited, 2), torch.zeros(visited, dtype=torch.long))
        kept.end_epoch()
        if epoch == 2:
            message, = caplog.messages
            assert message.startswith('AI-KD: 11 of 1000 samples') and 'trained on their labels' in message
        else:
            assert not caplog.messages


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
    return table.tobytes(), resumed.table.records.tobytes(), names_in(Path(folder))


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
                alone.table.records['version'][index] += rank  # the only thing that it cannot know
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
            q = torch.sigmoid(old[i] / 2)
            soft = F.binary_cross_entropy_with_logits(z[i] / 2, q) - F.binary_cross_entropy(q, q)
        else:
            q = torch.softmax(old[i] / 2, -1)
            soft = F.cross_entropy(z[i] / 2, q) + (q * q.log()).sum()
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
    """All terms, with samples that have no row; the check against chance is made once a run, not in a step."""
    config = AikdConfig(teacher='given', teacher_temperature=1., memory=memory, disc_hidden=(8,))
    net = tiny_net(classes)
    teacher = Teacher(tiny_net(classes))
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
    with pytest.raises(AikdError, match='store'):
        aikd.begin_epoch(0, tiny_net())
