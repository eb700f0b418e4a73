"""Which memory a run gets."""
from typing import Any

import torch

from ..config import AikdConfig
from ..errors import AikdError
from ..ranks import logger
from .base import Memory
from .indices import why_not_indexable
from .records import RecordFormat
from .snapshot import SnapshotMemory
from .store import StoreMemory


def choose_memory(
        config: AikdConfig,
        loader: Any,
        num_classes: int,
        binary: bool,
        device: torch.device,
        why_not: str | None = None,
) -> Memory:
    """The memory that `config.memory` asks for; `auto` is the store where it can be, else the snapshot.

    A collective call.

    Args:
        config: The options.
        loader: The training batches, not yet iterated; None: there is no loader.
        num_classes: Number of classes C.
        binary: The criterion is a BCE.
        device: Where the student runs.
        why_not: Why the store cannot be used, if the caller knows.

    Raises:
        AikdError: The memory must be a store and cannot be; or `config.memory_topk` is above C.
    """
    records = RecordFormat(num_classes, config.memory_topk if isinstance(config.memory_topk, int) else None, binary)
    if config.memory == 'snapshot':
        return SnapshotMemory()
    memory: Memory = SnapshotMemory()
    why_not = why_not or why_not_indexable(loader)
    if why_not is None:
        try:
            store = StoreMemory(records, len(loader.dataset), config.memory_dir, device)
            store.follow(loader)
            memory = store
        except AikdError as error:
            why_not = str(error)
    if why_not is not None and config.memory == 'store':
        raise AikdError(f'`memory` store: {why_not}; use `memory` snapshot')
    reason = f'; not store, because {why_not}' if why_not is not None else ''
    logger.info(f'AI-KD: memory {memory.describe()}{reason}')
    return memory
