"""The store memory: each training sample's prediction from its last visit."""
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from ..errors import AikdError
from ..ranks import gather_objects, logger, rank
from .arriving import Arriving
from .base import Memory
from .checkpoint import MemoryFiles
from .indices import BatchIndices
from .records import RecordFormat, version_at
from .table import HostTable

_WORTH_SAYING = 0.01  # share of an epoch's samples; fewer are exceptions such as unreadable files


class StoreMemory(Memory):
    """Each training sample's prediction from its last visit, in one table a host. It needs no second forward.

    A prediction is the student's output in training mode, on the augmented input, before the step's update, as in PS-KD
    (https://arxiv.org/abs/2006.12000). Predictions that are not finite are not kept. Where a sample comes twice in an
    epoch, the second visit may find the prediction of the first.

    Args:
        records: What is kept of a prediction.
        samples: Number of samples of the training set.
        folder: Where the table's scratch file lies; None: the system's folder for temporary files.
        device: Where predictions are given back, if a batch has no input.
        host: Ranks that give the same name share a table; None: this machine's name.

    Raises:
        AikdError: The table cannot be made.
    """

    name, needs_file = 'store', True

    def __init__(
            self,
            records: RecordFormat,
            samples: int,
            folder: str | None = None,
            device: torch.device | None = None,
            host: str | None = None,
    ):
        super().__init__()
        self.format, self.device = records, device or torch.device('cpu')
        self.table = HostTable(records.numpy, samples, folder, host)
        self._files = MemoryFiles(self.table, records.describe())
        self._indices: BatchIndices | None = None
        self._epoch = self._step = 0
        self._arriving: deque[Arriving] = deque()
        self._written: list[np.ndarray] = []  # indices not yet sent to the other hosts
        self._counts: Counter[str] = Counter()  # arguments of _report

    def follow(self, loader: Any) -> None:
        """Take the samples of each batch from this loader, where no indices are given.

        Raises:
            AikdError: The loader has another data set, or its samples cannot be known.
        """
        if self._indices is not None and self._indices.loader is loader:
            return
        if len(loader.dataset) != self.table.samples:
            raise AikdError(
                f'`memory` store: the loader has {len(loader.dataset)} samples, the memory was made for '
                f'{self.table.samples}; train on one data set, or use `memory` snapshot')
        self._indices = BatchIndices(loader)

    def begin_epoch(self, epoch: int, student: nn.Module | None = None, loader: Any = None) -> None:
        if loader is not None:
            self.follow(loader)
        self._commit(wait=True)  # of an epoch that was cut short
        self._files.before_epoch(epoch)
        self._epoch, self._step = epoch, 0

    @torch.no_grad()
    def recall(
            self,
            input: torch.Tensor | None,
            index: np.ndarray | None,
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        """Predictions kept for a batch. The mask lies on the host, where the table is, so that no step waits for it."""
        index = self._index_of(index, input)
        device = self.device if input is None else input.device
        self._commit()
        # PyTorch does not reuse pinned memory before the copy is done
        staged = torch.empty(len(index), self.table.dtype.itemsize, dtype=torch.uint8, pin_memory=device.type == 'cuda')
        records = staged.numpy().view(self.table.dtype).squeeze(-1)
        self.table.read(index, records)
        known = records['version'] > 0
        self._counts.update(recalled=len(index), new=int(np.count_nonzero(~known)))
        return self.format.decode(staged.to(device, non_blocking=True)), None if known.all() else known

    @torch.no_grad()
    def record(self, index: np.ndarray | None, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Keep the student's predictions for a batch.

        They are written one step later. By then asynchronous copies have finished, and no rank reads a partial record
        where several ranks visit a sample in one step (repeated augmentation).

        Raises:
            AikdError: The targets are soft, as mixed samples have them.
        """
        if target.ndim != 1:
            raise AikdError(
                f'`memory` store: targets of shape {list(target.shape)} are soft, as those of mixed samples are; '
                f'use `memory` snapshot')
        index = self._index_of(index, logits)
        self._commit()
        records = self.format.encode(logits, target, version_at(self._epoch, self._step, rank()))
        self._arriving.append(Arriving(index, records))
        self._step += 1

    def end_epoch(self) -> None:
        """Write what is still arriving, and exchange it with the other hosts.

        Raises:
            AikdError: Many samples have another label than at their last visit: the indices are not theirs.
        """
        self._files.forget()
        self._commit(wait=True)
        if self.table.has_other_hosts:
            self.table.exchange(np.unique(np.concatenate([np.empty(0, np.int64), *self._written])))
            self._written.clear()
        counts = sum(gather_objects(self._counts), Counter[str]())
        self._counts.clear()
        self._report(**counts)

    def _report(self, recalled: int = 0, new: int = 0, seen: int = 0, relabelled: int = 0) -> None:
        if new > _WORTH_SAYING * recalled:
            logger.info(
                f'AI-KD: {new} of {recalled} samples had no prediction of an earlier epoch yet: they trained on their '
                f'labels, as all do in the first epoch, and have one from now on')
        text = f'{relabelled} of {seen} samples had another label when they were last seen'
        if relabelled > _WORTH_SAYING * seen:
            raise AikdError(
                f'`memory` store: {text}: the loader\'s indices do not identify samples, or the data set has changed '
                f'since the checkpoint; use `memory` snapshot')
        if relabelled:
            logger.warning(f'AI-KD: {text}; for a file that it cannot read, timm gives the next one')

    def save(self, folder: Path | str | None) -> None:
        self._files.save(self._epoch, folder)

    def get_state(self) -> dict[str, Any] | None:
        return self._files.get_state()

    def load_state(self, state: dict[str, Any] | None, folders: Sequence[Path]) -> None:
        self._files.load(state, folders)

    def describe(self) -> str:
        size = tqdm.format_sizeof(self.table.bytes, 'B')
        content = self.format.describe()
        return f'store, {self.table.samples:,} samples with {content}, {size} a host in {self.table.folder}'

    def _index_of(self, index: np.ndarray | None, batch: torch.Tensor | None) -> np.ndarray:
        """Given indices, or those of the loader's batch in use; checked, for the table does not check them."""
        if index is None and self._indices is not None and batch is not None:
            index = self._indices.of_batch(len(batch))
        if index is None:
            raise AikdError(
                '`memory` store: the samples of the batch are not known: give their dataset `index` with it, or give '
                'begin_epoch the loader')
        index = np.asarray(index)
        if index.min() < 0 or index.max() >= self.table.samples:
            raise AikdError(
                f'`memory` store: the loader yields samples {index.min()} to {index.max()}, the training set has '
                f'{self.table.samples}; use `memory` snapshot')
        return index

    def _commit(self, wait: bool = False) -> None:
        """Write the records that have arrived; with `wait`, all of them."""
        while self._arriving and (wait or self._arriving[0].is_there()):
            index, records = self._arriving.popleft().take(self.table.dtype)
            finite = ~np.isnan(records['values'][:, 0])
            if not finite.all():
                index, records = index[finite], records[finite]
            seen = self.table.records['version'][index] > 0
            relabelled = seen & (self.table.records['label'][index] != records['label'])
            self._counts.update(seen=int(seen.sum()), relabelled=int(relabelled.sum()))
            self.table.write(index, records)
            if self.table.has_other_hosts:
                self._written.append(index)
