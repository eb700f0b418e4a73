"""The prediction memories: what reaches the table, and whether it is what the CPU would have kept."""
import copy

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from timm_aikd import RecordFormat, SnapshotMemory, StoreMemory

from .common import conv_net, host, images, net

SAMPLES, SIZE, EPOCHS = 48, 12, 3
FORMATS = {
    'all': {'num_classes': 20},
    'largest': {'num_classes': 20, 'topk': 6},
    'many classes': {'num_classes': 40_000, 'topk': 6},
    'binary': {'num_classes': 20, 'binary': True},
    'binary, largest': {'num_classes': 20, 'topk': 6, 'binary': True},
}


def batches(epoch, classes):
    generator = torch.Generator().manual_seed(epoch)
    for index in torch.randperm(SAMPLES, generator=generator).split(SIZE):
        yield index.numpy(), 3 * torch.randn(len(index), classes, generator=generator), index % classes


def busy(device):
    """Work in front of what follows, so that copies from the device are late."""
    if device.type == 'cuda':
        torch.cuda._sleep(20_000_000)


def table(memory, folder):
    """All records, as the file that goes with a checkpoint holds them."""
    memory.save(folder)
    rows = load_file(folder / memory.get_state()['name'])['records']
    return rows.view(memory.format.numpy).squeeze(-1)


def run(device, options, folder):
    """The table after a few epochs, what was recalled, and what the device itself says the last epoch's rows are."""
    folder.mkdir()
    memory = StoreMemory(RecordFormat(**options), SAMPLES, device=device)
    recalled, encoded = [], torch.empty(SAMPLES, memory.format.numpy.itemsize, dtype=torch.uint8)
    for epoch in range(EPOCHS):
        memory.begin_epoch(epoch, None)
        for index, logits, target in batches(epoch, options['num_classes']):
            if epoch > 0:
                past, known = memory.recall(None, index)
                assert known is None
                recalled.append(past.cpu())
            busy(device)
            logits, target = logits.to(device), target.to(device)
            memory.record(index, logits, target)
            encoded[index] = memory.format.encode(logits, target, 0).cpu()
        memory.end_epoch()
    return table(memory, folder), torch.cat(recalled), encoded.numpy()


def by_class(records):
    """Values in the order of their ids; the order of the largest is not defined."""
    order = np.argsort(records['ids'], -1)
    return np.take_along_axis(records['ids'], order, -1), np.take_along_axis(records['values'], order, -1)


@pytest.mark.parametrize('options', FORMATS.values(), ids=FORMATS)
def test_the_table_is_that_of_the_cpu(device, options, tmp_path):
    ours, recalled, encoded = run(device, options, tmp_path / 'device')
    theirs, expected, _ = run(torch.device('cpu'), options, tmp_path / 'cpu')
    version, label = ours.dtype.names[:2]
    assert np.array_equal(ours[version], theirs[version]) and np.array_equal(ours[label], theirs[label])
    assert (ours[version] > 0).all() and np.array_equal(ours[label], np.arange(SAMPLES) % options['num_classes'])
    # bit by bit, what the device made
    assert np.array_equal(ours.view(np.uint8).reshape(SAMPLES, -1)[:, 8:], encoded[:, 8:])
    values = ours['values'], theirs['values']
    if 'ids' in ours.dtype.names:
        (ids, first), (other_ids, second) = by_class(ours), by_class(theirs)
        assert np.array_equal(ids, other_ids)
        values = first, second
    if options.get('binary'):  # no arithmetic but rounding
        assert np.array_equal(*values)
    steps = np.abs(values[0].view(np.int16).astype(int) - values[1].view(np.int16))
    assert steps.max() <= 1 and (steps > 0).mean() < 0.01  # float16 values, as logarithms differ in the last bit
    torch.testing.assert_close(recalled, expected, rtol=2e-3, atol=2e-3)


def test_a_sample_that_is_not_finite_keeps_its_earlier_prediction(device):
    memory = StoreMemory(RecordFormat(4), 3, device=device)
    index, target = np.arange(3), torch.arange(3, device=device)
    for epoch, bad in enumerate((None, 1)):
        memory.begin_epoch(epoch, None)
        logits = torch.full((3, 4), float(epoch), device=device)
        logits[:, 0] += 1 + epoch
        if bad is not None:
            logits[bad] = torch.nan
        memory.record(index, logits, target)
        memory.end_epoch()
    past, known = memory.recall(None, index)
    assert known is None and past.isfinite().all()
    expected = torch.stack([torch.tensor([x, 0., 0., 0.]).log_softmax(-1) for x in (2., 1., 2.)])
    torch.testing.assert_close(past.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_only_some_samples_are_known(device):
    memory = StoreMemory(RecordFormat(4), 6, device=device)
    memory.begin_epoch(0, None)
    memory.record(np.arange(3), torch.randn(3, 4, device=device), torch.arange(3, device=device))
    memory.end_epoch()
    past, known = memory.recall(None, np.arange(1, 5))
    assert known.tolist() == [True, True, False, False] and past.device.type == device.type


def test_a_snapshot_is_the_student_of_the_previous_epoch(device):
    student, memory = net(0, device), SnapshotMemory()
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(device)
    for epoch in range(1, 4):
        student.train()(inputs + epoch)  # BatchNorm's statistics move
        memory.begin_epoch(epoch, student)
        expected = copy.deepcopy(student).eval()(inputs)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 1
        past, known = memory.recall(inputs, None)
        assert known is None and torch.equal(past, expected)


def test_a_folded_snapshot_answers_as_the_student(device, setting):
    student, memory = setting.place(conv_net(), device), SnapshotMemory()
    input = setting.place(images()[0], device)
    for epoch in (1, 2):
        for _ in range(5):
            student.train()(input)
        memory.begin_epoch(epoch, student)
        with setting.autocast(device), torch.no_grad():
            expected, past = student.eval()(input), memory.recall(input, None)[0]
        tolerance = 1e-2 if setting.dtype == torch.float32 else 1e-1
        scale = expected.float().std().item()
        torch.testing.assert_close(host(past), host(expected), rtol=0, atol=tolerance * scale)
