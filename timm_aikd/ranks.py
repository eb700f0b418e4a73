"""The run's processes as torch.distributed knows them; without it, a run of one."""
import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from .errors import AikdError, one_line

T = TypeVar('T')

logger = logging.getLogger(__package__)  # the package's only one: its filter lets rank 0 alone speak


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if is_distributed() else 0


def _speaks(record: logging.LogRecord) -> bool:
    """Whether this process logs; before there is a process group, as its launcher says."""
    return (rank() if is_distributed() else int(os.environ.get('RANK') or 0)) == 0


logger.addFilter(_speaks)


def group_device(device: torch.device) -> torch.device:
    """Where the process group can send from, for a rank that trains on `device`."""
    return device if is_distributed() and dist.get_backend() != 'gloo' else torch.device('cpu')


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' tensors, in a new one."""
    values = values.clone()
    if is_distributed():
        dist.all_reduce(values)
    return values


def gather_objects(value: T) -> list[T]:
    """Each rank's value, in order of rank; for small objects."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def this_host() -> str:
    """The machine's name and, where the system has one, the id of this boot, since names are not always unique."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    except OSError:
        boot = ''
    return f'{socket.gethostname()} {boot}'


def in_touch(function: Callable[[], T] | None) -> T | None:
    """Run a function on some ranks, and nothing on those that give None; return when all are done.

    The ranks exchange a word each second meanwhile: however long a download or a file takes, no collective waits longer
    than the process group's time-out. The function runs in a thread of its own, and must not use the process group.

    Raises:
        Exception: What the function raised, on its rank.
    """
    if not is_distributed():
        return function() if function is not None else None
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(function if function is not None else lambda: None)
        while not all(gather_objects(future.done())):
            wait([future], timeout=1.)
        return future.result()


def first_on_each_host(function: Callable[[], T]) -> T:
    """Call a function on all ranks; on each host one rank goes first, and the others wait until it is done.

    Raises:
        AikdError: If any rank fails, all ranks raise. Other exceptions propagate on the failing rank.
    """
    if not is_distributed():
        return function()
    hosts = gather_objects(this_host())
    is_first = hosts.index(hosts[rank()]) == rank()
    results: list[T] = []
    for is_turn in (is_first, not is_first):
        failure: Exception | None = None
        try:
            result = in_touch(function if is_turn else None)
            if is_turn:
                results.append(cast(T, result))
        except Exception as error:
            failure = error
        _fail_together(failure)
    return results[0]


def _fail_together(failure: Exception | None) -> None:
    """Raise on all ranks, if any rank has failed."""
    message = None if failure is None else str(failure)
    if failure is not None and not isinstance(failure, AikdError):
        message = f'rank {rank()} failed ({type(failure).__name__}: {one_line(failure)}): see its own message'
    messages = [each for each in gather_objects(message) if each is not None]
    if messages and (failure is None or isinstance(failure, AikdError)):
        raise AikdError(messages[0])
    if failure is not None:
        raise failure


def barrier() -> None:
    """Wait for all ranks."""
    gather_objects(None)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, rank after rank; ranks may hold different numbers of them."""
    if not is_distributed():
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    lengths = [int(c) for c in counts]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[:len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])
