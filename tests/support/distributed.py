"""Runs a function on several gloo ranks of this machine."""
import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import warm  # noqa: F401  (what the fork server imports)


def spawn(function: Callable, ranks: int, argument=None, method: str = 'forkserver', seconds: float = 120) -> list:
    """`function(rank, argument)` on each rank; what each returns, in order of rank.

    A rank that waits for another for more than `seconds` fails.

    With the method `spawn` they import everything afresh, as what reads the environment at import needs.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (function, ranks, argument, folder, seconds), nprocs=ranks, start_method=method)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _rank(rank: int, function: Callable, ranks: int, argument, folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=ranks,
        timeout=timedelta(seconds=seconds))
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(rank, argument)))
    dist.destroy_process_group()
