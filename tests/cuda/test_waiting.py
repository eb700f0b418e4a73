"""No step waits for the device, and nothing grows over many steps."""
import gc
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy
from torch.utils._python_dispatch import TorchDispatchMode

from timm_aikd import AikdTask, RecordFormat, StoreMemory, Teacher
from timm_aikd.loss import ADV_LOSSES

from .common import CLASSES, Setting, conv_net, descend, given, images, net, points

SIZE, STEPS = 128, 8  # after 1,024 samples the teacher's top-1 is checked, once, and that waits
WAITING = ('_local_scalar_dense', 'nonzero', 'masked_select', 'is_nonzero', 'equal', 'unique')  # on any device


class NoWaiting(TorchDispatchMode):
    """Raises where a value or a shape depends on data of the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition('::')[2].partition('.')[0]
        masks = args[1] if name in ('index', 'index_put', 'index_put_') else ()
        if name in WAITING or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            raise AssertionError(f'{name} waits for the device')
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device):
    if device.type != 'cuda':
        with NoWaiting():
            yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(action='ignore'):  # a prototype, says torch
        torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def labels_of(teacher, input):
    with torch.no_grad():
        return teacher(input).argmax(-1)


def on_points(device, binary=False, topk=None, **options):
    """A task; if its memory is a store, that has twice as many samples as a batch."""
    criterion = BinaryCrossEntropy(smoothing=0.) if binary else nn.CrossEntropyLoss()
    task = AikdTask(
        net(0, device), criterion, teacher=net(1, device), config=given(**options), epochs=4, device=device,
        verbose=False)
    if options['memory'] == 'store':
        task.aikd.use_memory(StoreMemory(RecordFormat(CLASSES, topk, binary), 2 * SIZE, device=device))
    return task


def on_images(device):
    """A task whose teacher has another normalisation, size and order of classes."""
    scale = torch.full((1, 3, 1, 1), 1.1)
    teacher = Teacher(
        conv_net(1), scale=scale, shift=-0.1 * scale, columns=torch.arange(CLASSES).flip(0), size=(40, 40))
    return AikdTask(
        conv_net().to(device), nn.CrossEntropyLoss(), teacher=teacher.to(device), config=given(memory='snapshot'),
        epochs=4, device=device, verbose=False)


CASES = {
    'store': {'memory': 'store'},
    'store, largest': {'memory': 'store', 'topk': 2},
    'store, binary': {'memory': 'store', 'binary': True},
    'sgd': {'memory': 'store', 'disc_opt': 'sgd'},
    **{loss: {'memory': 'snapshot', 'adv_loss': loss} for loss in ADV_LOSSES},
    'images': {},
}


@pytest.mark.parametrize('options', CASES.values(), ids=CASES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_no_step_waits(device, dtype, options):
    task = on_points(device, **options) if options else on_images(device)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.01)
    inputs = (points if options else images)(size=2 * SIZE)[0].to(device)
    labels = labels_of(task.aikd.teacher, inputs)
    uses_index = options.get('memory') == 'store'
    for epoch in range(3):  # in the first all samples are new to a store, in the second half of them
        task.begin_epoch(epoch)
        start = epoch * SIZE // 2
        input, target = inputs[start:start + SIZE], labels[start:start + SIZE]
        index = (torch.arange(start, start + SIZE),) if uses_index else ()
        for _ in range(STEPS if epoch == 0 else 2):
            is_first = task.aikd.steps < STEPS  # kernels are loaded, top-1 is checked
            with nullcontext() if is_first else no_waiting(device), Setting(dtype).autocast(device):
                loss = task(input, target, *index)['loss']
            descend(optimizer, loss)
        assert task.end_epoch()['disc_skipped'] == 0


def test_the_watch_notices(device):
    value = torch.ones(3, device=device)
    for wait in (lambda: value.sum().item(), lambda: value[value > 0], lambda: bool(value.sum() > 0)):
        with pytest.raises((AssertionError, RuntimeError)), no_waiting(device):
            wait()


def in_use(device):
    """Bytes of the device, and of pinned memory where torch tells; without a GPU the number of tensors."""
    gc.collect()
    if device.type != 'cuda':
        return [sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())]
    torch.cuda.synchronize()
    stats = getattr(torch.cuda, 'host_memory_stats', dict)()
    return [torch.cuda.memory_allocated(device), stats.get('allocated_bytes.current', 0)]


@pytest.mark.parametrize('memory', ['store', 'snapshot'])
def test_nothing_grows_over_200_steps(device, memory):
    task = AikdTask(
        net(0, device), nn.CrossEntropyLoss(), teacher=net(1, device), config=given(memory=memory), epochs=10,
        device=device, verbose=False)
    if memory == 'store':
        task.aikd.use_memory(StoreMemory(RecordFormat(CLASSES), 8, device=device))
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.01, momentum=0.9)
    input = points()[0].to(device)
    target = labels_of(task.aikd.teacher, input)
    index = (torch.arange(8),) if memory == 'store' else ()
    uses = []
    for epoch in range(10):
        task.begin_epoch(epoch)
        for _ in range(20):
            descend(optimizer, task(input, target, *index)['loss'])
        task.end_epoch()
        if epoch in (2, 5, 9):
            uses.append(in_use(device))
    assert all(now <= first for use in uses[1:] for now, first in zip(use, uses[0], strict=True)), uses
