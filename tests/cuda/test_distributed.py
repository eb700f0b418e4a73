"""Ranks: NCCL where each has a GPU, elsewhere gloo."""
import pickle
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn

from timm_aikd import AikdTask, RecordFormat, StoreMemory

from ..support import warm  # noqa: F401  (what the fork server imports)
from .common import CLASSES, descend, given, host, images

EPOCHS, STEPS, SIZE = 3, 2, 8


def vit(seed):
    """Without BatchNorm, so that half batches on two ranks are one batch."""
    torch.manual_seed(seed)
    return timm.create_model('test_vit', num_classes=CLASSES, img_size=32)


def train(device, rank=0, ranks=1):
    """Losses of this rank, and D's weights; the ranks share out each batch."""
    options = given(memory='store', disc_opt='sgd', disc_lr=0.1)
    task = AikdTask(
        vit(0).to(device), nn.CrossEntropyLoss(), teacher=vit(1).to(device), config=options, epochs=EPOCHS,
        device=device, verbose=False)
    task.aikd.use_memory(StoreMemory(RecordFormat(CLASSES), STEPS * SIZE, device=device))
    if dist.is_initialized():
        with torch.no_grad():
            for parameter in task.aikd.discriminator.parameters():
                parameter += rank  # rank 0's must count
        task.prepare_distributed(device_ids=[device])
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.05)
    losses, share = [], slice(rank * SIZE // ranks, (rank + 1) * SIZE // ranks)
    for epoch in range(EPOCHS):
        task.begin_epoch(epoch)
        for step in range(STEPS):
            input, target = (tensor[share].to(device) for tensor in images(step, SIZE))
            index = torch.arange(step * SIZE, (step + 1) * SIZE)[share]
            losses.append(descend(optimizer, task(input, target, index)['loss']).item())
        losses.append(task.end_epoch()['kd'])
    return losses, [host(parameter) for parameter in task.aikd.discriminator.parameters()]


def on_rank(rank, ranks, kind, folder):
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == 'cuda' else torch.device(kind)
    if kind == 'cuda':
        torch.cuda.set_device(device)
    dist.init_process_group(
        'nccl' if kind == 'cuda' else 'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=ranks,
        timeout=timedelta(minutes=2))
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(train(device, rank, ranks)))
    dist.destroy_process_group()


@pytest.mark.parametrize('ranks', [1, 2])
def test_ranks_give_the_numbers_of_one_process(device, ranks):
    if device.type == 'cuda' and ranks > torch.cuda.device_count():
        pytest.skip(f'needs {ranks} GPUs')
    if device.type == 'cpu' and ranks == 1:
        pytest.skip('on the CPU two will do')
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(on_rank, (ranks, device.type, folder), nprocs=ranks, start_method='forkserver')
        found = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]
    losses, weights = train(device)
    for step, expected in enumerate(losses):
        assert sum(rank[0][step] for rank in found) / ranks == pytest.approx(expected, rel=1e-3)
    for first, *others in zip(weights, *(rank[1] for rank in found), strict=True):
        assert all(torch.equal(others[0], other) for other in others)
        torch.testing.assert_close(others[0], first, rtol=1e-2, atol=1e-3)
