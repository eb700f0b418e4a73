"""What the prediction store costs at the sizes of CIFAR-100, ImageNet-1k and ImageNet-21k, beside PS-KD's dense table.

    python examples/benchmarks/memory.py                 # about 16 GB of disk and memory, 10 minutes
    python examples/benchmarks/memory.py --quick         # a hundredth of the samples, no training step

The tables are real, indices and predictions are simulated: batches of 256 random samples. Reading and writing are timed
through the memory's own calls, with everything they do (log-softmax, top-K, decoding), on one thread; they are set
against a training step of resnet50 at batch 32, per sample, taken in the same run. "Dense" is one float32 tensor of
all probabilities in each process, as PS-KD (https://arxiv.org/abs/2006.12000) keeps it; where it does not fit, it is
timed on the first rows, and its size is computed.
"""
import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tqdm import tqdm

from timm_aikd import RecordFormat, StoreMemory

BATCH = 256
SIZES = {'CIFAR-100': (50_000, 100), 'ImageNet-1k': (1_281_167, 1000), 'ImageNet-21k': (14_197_122, 21_841)}
DENSE_LIMIT = 6e9  # bytes of a dense tensor that are really allocated


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def microseconds(function, calls: int = 30) -> float:
    """Median time of a call, divided by the samples of a batch."""
    function()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / BATCH


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def table_memory() -> int:
    """Resident bytes of the mapped table, counted by this process's share of the pages (Linux)."""
    mapped = Path('/proc/self/smaps').read_text().partition('/timm-aikd-')[2]
    size, = (line.split()[1] for line in mapped.splitlines()[:10] if line.startswith('Pss:'))
    return 1024 * int(size)


def fill(memory: StoreMemory, index: np.ndarray, seed: int = 0) -> None:
    """Write records of all the samples `index`, the same predictions for each batch of them."""
    logits = 4 * torch.randn(4096, memory.format.num_classes, generator=torch.Generator().manual_seed(seed))
    records = memory.format.encode(logits, torch.zeros(len(logits), dtype=torch.long), 2 ** 40 + seed)
    records = records.numpy().view(memory.table.dtype).squeeze(-1)
    for part in np.array_split(index, -(-len(index) // len(records))):
        memory.table.write(part, records[:len(part)])


def on_rank(rank: int, ranks: int, samples: int, classes: int, folder: str, exchange: bool, results) -> None:
    """Fill this rank's share of a table; its memory, and the seconds of an exchange if each rank is a host."""
    torch.set_num_threads(1)
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=ranks)
    memory = StoreMemory(RecordFormat(classes), samples, folder, host=str(rank) if exchange else None)
    fill(memory, np.arange(rank, samples, ranks), rank)
    if exchange:
        memory._written = [np.arange(rank, samples, ranks)]
        dist.barrier()
        took = seconds(memory.end_epoch)
        assert len(memory.table) == samples
        results[rank] = took
    else:
        dist.barrier()
        held = table_memory()
        dist.barrier()
        results[rank] = held
    dist.destroy_process_group()


def over_ranks(ranks: int, samples: int, classes: int, folder: str, exchange: bool) -> list[float]:
    with tempfile.TemporaryDirectory(dir=folder) as scratch, mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(on_rank, (ranks, samples, classes, scratch, exchange, results), nprocs=ranks)
        return [results[rank] for rank in range(ranks)]


def store_times(samples: int, classes: int, folder: str) -> dict[str, float]:
    memory = StoreMemory(RecordFormat(classes), samples, folder)
    fill(memory, np.arange(samples))
    logits, target = 4 * torch.randn(BATCH, classes), torch.randint(classes, (BATCH,))
    chance = np.random.default_rng(0)
    memory._counts[:] = 0
    times = {
        'read': microseconds(lambda: memory.recall(None, chance.integers(samples, size=BATCH))),
        'write': microseconds(lambda: memory.record(chance.integers(samples, size=BATCH), logits, target)),
        'bytes': memory.table.dtype.itemsize,
        'table': memory.table.bytes,
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        times['save'] = seconds(lambda: memory.save(scratch))
        state = memory.get_state()
        times['load'] = seconds(lambda: memory.load_state(state, []))
        assert len(memory.table) == samples
    return times


def dense_times(samples: int, classes: int) -> dict[str, float]:
    """PS-KD's way on one process: read rows, write the softmax back; a rank holds the whole tensor."""
    rows = min(samples, int(DENSE_LIMIT / 4 / classes))
    table = torch.full((rows, classes), 1 / classes)
    logits, chance = 4 * torch.randn(BATCH, classes), torch.Generator().manual_seed(0)

    def index():
        return torch.randint(rows, (BATCH,), generator=chance)

    def write():
        table[index()] = F.softmax(logits, dim=-1)

    return {
        'read': microseconds(lambda: table[index()]), 'write': microseconds(write), 'bytes': 4 * classes,
        'table': 4 * classes * samples}


def step_time(classes: int, batch: int = 32) -> float:
    """Microseconds a sample of a resnet50 training step at 224 px, on all cores."""
    torch.set_num_threads(os.cpu_count())
    model = timm.create_model('resnet50', num_classes=classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(classes, (batch,))

    def step():
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    result = microseconds(step, calls=3) * BATCH / batch
    torch.set_num_threads(1)
    return result


def total_variation(classes: int = 1000, samples: int = 1000) -> str:
    """How far the kept rows are from the true ones, at several K and sharpnesses."""
    kept = (10, 32, 128, classes)
    lines = [
        '| mean top-1 probability | ' + ' | '.join(f'K = {k}' if k < classes else 'all' for k in kept) + ' |',
        '|---' * (len(kept) + 1) + '|']
    for scale in (1., 2., 3., 5., 10.):
        z = scale * torch.randn(samples, classes, generator=torch.Generator().manual_seed(0))
        exact = z.double().softmax(-1)
        row = []
        for k in kept:
            records = RecordFormat(classes, k)
            past = records.decode(records.encode(z, torch.zeros(samples, dtype=torch.long), 1))
            row.append((past.double().softmax(-1) - exact).abs().sum(-1).mean().item() / 2)
        lines.append(f'| {exact.max(-1).values.mean():.2f} | ' + ' | '.join(f'{value:.4f}' for value in row) + ' |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--sizes', nargs='+', choices=SIZES, default=list(SIZES), help='which data sets')
    parser.add_argument('--ranks', type=int, nargs='+', default=[1, 2, 8], help='processes that share a table')
    parser.add_argument('--folder', default=tempfile.gettempdir(), help='where tables and files lie')
    parser.add_argument('--quick', action='store_true', help='a hundredth of the samples, no training step')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name in args.sizes:
        samples, classes = SIZES[name]
        samples //= 100 if args.quick else 1
        say(f'{name}: times of one process')
        store, dense = store_times(samples, classes, args.folder), dense_times(samples, classes)
        step = None if args.quick else step_time(classes)
        held = []
        for ranks in args.ranks:
            say(f'{name}: {ranks} ranks')
            held.append(sum(over_ranks(ranks, samples, classes, args.folder, False)))
        say(f'{name}: two hosts')
        exchange = max(over_ranks(2, samples, classes, args.folder, True))

        def size_text(size):
            return tqdm.format_sizeof(size, 'B')

        def share(times, step=step):
            return '' if step is None else f'{100 * (times["read"] + times["write"]) / step:.4f} %'

        rows += [
            [f'{name}, {samples:,} x {classes:,}', 'store', f'{store["bytes"]:,}', size_text(store['table']),
             ' / '.join(size_text(int(x)) for x in held), f'{store["read"]:.2f}', f'{store["write"]:.2f}', share(store),
             f'{exchange:.2f}', f'{store["save"]:.2f} / {store["load"]:.2f}'],
            ['', 'dense', f'{dense["bytes"]:,}', size_text(dense['table']),
             ' / '.join(size_text(dense['table'] * ranks) for ranks in args.ranks), f'{dense["read"]:.2f}',
             f'{dense["write"]:.2f}', share(dense), '', ''],
        ]
    ranks = ' / '.join(map(str, args.ranks))
    print(f'{os.cpu_count()} cores ({platform.processor() or platform.machine()}), Python {platform.python_version()}, '
          f'torch {torch.__version__}, timm {timm.__version__}\n')
    head = ['data set', 'memory', 'bytes a sample', 'table', f'memory a host with {ranks} ranks', 'read, us a sample',
            'write, us a sample', 'of a resnet50 step', 'exchange, 2 hosts, s', 'save / load, s']
    for row in (head, ['---'] * len(head), *rows):
        print('| ' + ' | '.join(row) + ' |')
    print('\nTotal variation from the true rows, 1,000 classes:\n\n' + total_variation())


if __name__ == '__main__':
    main()
