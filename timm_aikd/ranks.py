"""The run's processes as torch.distributed knows them; without it, a run of one."""
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from . import AikdError

T = TypeVar('T')


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if is_distributed() else 0


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
    """What each rank gives, in order of rank; small things only."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def this_host() -> str:
    """The machine's name, and where the system has it a number of this boot: names are not always unique."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    except OSError:
        boot = ''
    return f'{socket.gethostname()} {boot}'


def first_on_each_host(function: Callable[[], T]) -> T:
    """Call a function on all ranks, but let the first of each host be done before the others of it begin.

    Raises:
        AikdError: On all ranks, the first that one of them met. What else a rank meets passes through there, and is an
            AikdError that tells of it on the others.
    """
    if not is_distributed():
        return function()
    hosts = gather_objects(this_host())
    is_first = hosts.index(hosts[rank()]) == rank()
    results: list[T] = []
    failure: Exception | None = None
    message: str | None = None
    for is_turn in (is_first, not is_first):
        if is_turn:
            try:
                results.append(function())
            except Exception as error:
                failure, message = error, str(error)
                if not isinstance(error, AikdError):
                    text = ' '.join(message.split())[:100]
                    message = f'rank {rank()} failed ({type(error).__name__}: {text}): see what it says itself'
        met = [each for each in gather_objects(message) if each is not None]
        if met:
            raise AikdError(met[0]) if failure is None or isinstance(failure, AikdError) else failure
    return results[0]


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
