"""A run goes on on another device than it began on."""
import io

import pytest
import torch
import torch.nn as nn

from timm_aikd import AikdTask, RecordFormat, StoreMemory

from .common import CLASSES, descend, given, host, net, points

EPOCHS = 4


def a_run(device, folder, memory='store', **options):
    task = AikdTask(
        net(0, device), nn.CrossEntropyLoss(), teacher=net(1, device), config=given(memory=memory, **options),
        epochs=EPOCHS, device=device, verbose=False, resume_folder=folder)
    if memory == 'store':
        task.aikd.use_memory(StoreMemory(RecordFormat(CLASSES), 24, device=device))
    return task, torch.optim.SGD(task.trainable_module.parameters(), lr=0.05, momentum=0.9)


def epoch_of(run, epoch, folder, device, memory):
    """The epoch's losses."""
    task, optimizer = run
    task.begin_epoch(epoch, checkpoint_folder=folder)
    losses = []
    for step in range(3):
        x, y = (tensor.to(device) for tensor in points(step))
        index = (torch.arange(8 * step, 8 * step + 8),) if memory == 'store' else ()
        losses.append(descend(optimizer, task(x, y, *index)['loss']).item())
    task.end_epoch()
    return losses


def saved(run):
    task, optimizer = run
    file = io.BytesIO()
    torch.save({**task.get_checkpoint_state(), 'optimizer': optimizer.state_dict()}, file)
    file.seek(0)
    return file


@pytest.mark.parametrize('options', [
    {'memory': 'store'}, {'memory': 'snapshot'}, {'memory': 'snapshot', 'adv_loss': 'wgan-gp'},
    {'memory': 'snapshot', 'disc_opt': 'sgd'}, {'memory': 'snapshot', 'disc_opt': 'lamb'},
], ids=lambda options: ', '.join(options.values()))
@pytest.mark.parametrize('way', ['to the CPU', 'from the CPU', 'stays'])
def test_a_run_goes_on_on_another_device(device, way, options, tmp_path):
    cpu = torch.device('cpu')
    first, second = {'to the CPU': (device, cpu), 'from the CPU': (cpu, device), 'stays': (device, device)}[way]
    memory = options['memory']
    before = a_run(first, tmp_path, **options)
    for epoch in range(2):
        epoch_of(before, epoch, tmp_path, first, memory)
    checkpoint = torch.load(saved(before), map_location=second, weights_only=True)
    after = a_run(second, tmp_path, **options)
    after[0].trainable_module.load_state_dict(checkpoint['state_dict'])
    after[0].load_task_state(checkpoint['task_state'])
    after[1].load_state_dict(checkpoint['optimizer'])
    for epoch in range(2, EPOCHS):
        ours, theirs = (epoch_of(run, epoch, None, at, memory) for run, at in ((after, second), (before, first)))
        assert ours == pytest.approx(theirs, rel=1e-3)
    for ours, theirs in zip(*(run[0].aikd.discriminator.mlp.parameters() for run in (after, before)), strict=True):
        assert ours.device.type == second.type
        torch.testing.assert_close(host(ours), host(theirs), rtol=1e-2, atol=1e-3)


def test_a_task_may_be_moved_after_it_was_made(device):
    task = AikdTask(
        net(0, 'cpu'), nn.CrossEntropyLoss(), teacher=net(1, 'cpu'), config=given(teacher_temperature='auto'),
        epochs=3, verbose=False).to(device)
    fit = task.calibrate([tuple(tensor.to(device) for tensor in points(seed, 64)) for seed in range(2)])
    assert fit['samples'] == 128 and fit['temperature'] > 0
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.05)
    for epoch in range(2):
        task.begin_epoch(epoch)
        assert descend(optimizer, task(*(tensor.to(device) for tensor in points()))['loss']).isfinite()
        assert task.end_epoch()['disc_skipped'] == 0
