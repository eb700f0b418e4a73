"""Prediction memory: what the student said of the same samples in the previous epoch.

Both memories have the same four verbs: `begin_epoch`, `recall` (log q of a batch, and which samples have one), `record`
(what the student says now) and `end_epoch`.
"""
import copy
import logging
import re
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from . import AikdError
from .inference import Pairs, folded, forward_layout, load_folded_
from .ranks import barrier, group_device, rank, sum_over_ranks
from .records import RecordFormat, stamp_at
from .table import HostTable, size_text

_logger = logging.getLogger(__name__)

_FILE_VERSION = '1'
_FILE_NAME = re.compile(r'aikd-memory-\d+\.safetensors(\.tmp)?')
_WORTH_SAYING = 0.01  # share of an epoch's samples; below it, they are the odd ones out


class SnapshotMemory(nn.Module):
    """A frozen copy of the student as it was at the end of the previous epoch, run in eval mode on the same input.

    Exact under any augmentation, mixup, iterable data and input size, for the price of one forward a step and one
    copy of the weights. The copy is made once and overwritten in place each epoch, so that a compiled graph stays
    valid. It needs no place in a checkpoint: where an epoch begins, it *is* the student.
    """

    kind = 'snapshot'

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None
        self._folded: Pairs = []
        self._compile_kwargs: dict[str, Any] | None = None

    def train(self, mode: bool = True) -> 'SnapshotMemory':
        """Stay in eval mode."""
        return super().train(False)

    def compile(self, **kwargs: Any) -> None:
        """Compile the copy, now or when it is made."""
        self._compile_kwargs = kwargs
        if self.model is not None:
            self.model.compile(**kwargs)

    def begin_epoch(self, epoch: int, student: nn.Module) -> None:
        """Remember the student as it is now; in epoch 0 it knows nothing yet."""
        if epoch > 0:
            self.remember(student)

    @torch.no_grad()
    def remember(self, student: nn.Module) -> None:
        """Take over the weights and buffers of the (unwrapped) student."""
        if self.model is not None:
            load_folded_(self.model, self._folded, student)
            return
        model = copy.deepcopy(student).requires_grad_(False).eval()
        set_grad_checkpointing = getattr(model, 'set_grad_checkpointing', None)
        if set_grad_checkpointing is not None:
            set_grad_checkpointing(False)  # nothing is kept for a backward, so nothing is recomputed
        model, self._folded = folded(model)
        self.model = model.to(memory_format=forward_layout(student))
        if self._compile_kwargs is not None:
            self.model.compile(**self._compile_kwargs)

    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of the previous epoch's student: log q up to a constant a sample, which a softmax ignores."""
        assert self.model is not None
        logits: torch.Tensor = self.model(input)
        return logits

    def recall(self, input: torch.Tensor, index: np.ndarray | None) -> tuple[torch.Tensor, None]:
        """Log q of a batch, which all of its samples have."""
        return self(input), None

    def record(self, index: np.ndarray | None, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Nothing to keep: the weights are."""

    def end_epoch(self) -> None:
        """Nothing to settle."""


class StoreMemory(nn.Module):
    """Each training sample's prediction from its last visit, in one table a host; no second forward.

    A prediction is what the student said in training mode, on the augmented input, before the step's update, as in
    PS-KD (https://arxiv.org/abs/2006.12000). One that is not finite is not kept. Where a sample comes again in the same
    epoch, a later step may find what the earlier one said.

    Creating the memory and `end_epoch`, `save` and `load_state` are collective calls.

    Args:
        records: What is kept of a prediction.
        samples: Number of samples of the training set.
        folder: Where the table's scratch file lies; None: the system's folder for temporary files.
        device: Where the student runs; `Aikd.use_memory` sets it.
        host: Ranks that give the same name share a table; None: this machine's.

    Raises:
        AikdError: The table cannot be made.
    """

    kind = 'store'

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
        self.saved: dict[str, Any] | None = None  # the newest file: name, folder, epoch, digest
        self._named: str | None = None  # the file that the newest checkpoint names
        self._loaded_epoch: int | None = None
        self._epoch = self._step = 0
        self._arriving: deque[_Arriving] = deque()
        self._written: list[np.ndarray] = []  # indices not yet sent to the other hosts
        # samples of this epoch: recalled, of these without a prediction; seen again, of these with another label
        self._counts = np.zeros(4)

    def compile(self, **kwargs: Any) -> None:
        """There is no network to compile."""

    def begin_epoch(self, epoch: int, student: nn.Module | None = None) -> None:
        """Start an epoch's stamps."""
        self._commit(wait=True)  # of an epoch cut short
        self._epoch, self._step = epoch, 0
        if self._loaded_epoch is not None and epoch <= self._loaded_epoch:
            self.table.age()  # --start-epoch: what is to come must be newer
        self._loaded_epoch = None

    @torch.no_grad()
    def recall(
            self,
            input: torch.Tensor | None,
            index: np.ndarray | None,
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        """Predictions kept for the samples `index` [B].

        Returns:
            Log q [B, C], and a mask [B] of the samples that have one, or None if all have. The mask lies on the host,
            where the table is, so that nobody has to wait for it.

        Raises:
            AikdError: An index is missing or out of range.
        """
        index = self._checked(index)
        self._commit()
        # pinned memory is not given out again before the copy is done
        staged = torch.empty(len(index), self.table.dtype.itemsize, dtype=torch.uint8, pin_memory=self._is_async)
        records = staged.numpy().view(self.table.dtype).squeeze(-1)
        self.table.read(index, records)
        known = records['stamp'] > 0
        self._counts[:2] += len(index), int(np.count_nonzero(~known))
        return self.format.decode(staged.to(self.device, non_blocking=True)), None if known.all() else known

    @torch.no_grad()
    def record(self, index: np.ndarray | None, logits: torch.Tensor, target: torch.Tensor) -> None:
        """Keep the student's predictions for the samples `index`.

        They reach the table a step later: on CUDA they have arrived by then, and nowhere does a copy of a sample in the
        same step, as repeated augmentation has them on several ranks, find it half written.

        Args:
            index: Dataset indices [B].
            logits: The student's output [B, C].
            target: Class indices [B].

        Raises:
            AikdError: The targets are soft, as mixed samples have them, or an index is missing or out of range.
        """
        if target.ndim != 1:
            raise AikdError(
                f'--aikd-memory store: targets of shape {list(target.shape)} are soft, as those of mixed samples are; '
                f'use --aikd-memory snapshot')
        index = self._checked(index)
        self._commit()
        records = self.format.encode(logits, target, stamp_at(self._epoch, self._step, rank()))
        self._arriving.append(_Arriving(index, records))
        self._step += 1

    def end_epoch(self) -> None:
        """Commit what is under way and exchange what was written with the other hosts.

        Raises:
            AikdError: The samples have other labels than at their last visit: the indices are not theirs.
        """
        self.saved = None  # until it is saved again
        self._commit(wait=True)
        device = group_device(self.device)
        if self.table.has_other_hosts:
            written = np.unique(np.concatenate(self._written)) if self._written else np.empty(0, np.int64)
            self.table.exchange(written, device)
            self._written.clear()
        counts = sum_over_ranks(torch.tensor(self._counts, device=device, dtype=torch.float32))
        recalled, missing, seen, changed = counts.tolist()
        self._counts[:] = 0
        if missing > _WORTH_SAYING * recalled and rank() == 0:
            _logger.info(f'AI-KD: {missing:.0f} of {recalled:.0f} samples had no earlier prediction, only their labels')
        if changed > _WORTH_SAYING * seen:
            raise AikdError(
                f'--aikd-memory store: {changed:.0f} of {seen:.0f} samples had another label when they were last seen: '
                f'the loader\'s indices do not identify samples, or the data set has changed since the checkpoint; '
                f'use --aikd-memory snapshot')
        if changed and rank() == 0:
            _logger.warning(
                f'AI-KD: {changed:.0f} of {seen:.0f} samples had another label when they were last seen; timm answers '
                f'a file that it cannot read with the next one')

    def save(self, folder: Path | str | None) -> None:
        """Write the table beside the checkpoints; remove older files but the one that the newest checkpoint names.

        The primary rank writes, and all ranks wait, for the table must not change meanwhile. A failure is reported
        and does not end the training.

        Args:
            folder: Of the checkpoints; only the primary rank's counts, None there saves nothing.
        """
        if folder is not None and rank() == 0:
            folder = Path(folder).resolve()
            name = f'aikd-memory-{self._epoch}.safetensors'
            try:
                digest = self.table.save(folder / name, self._metadata(self._epoch))
                self.saved = {'name': name, 'folder': str(folder), 'epoch': self._epoch, 'digest': digest}
            except OSError as error:
                _logger.warning(
                    f'AI-KD: the prediction memory ({size_text(self.table.bytes)}) was not saved beside the '
                    f'checkpoints: {error}; training goes on, a resume from this epoch would pause the progressive '
                    f'term for one epoch')
            else:
                self._remove_older(folder, name)
        barrier()

    def _remove_older(self, folder: Path, name: str) -> None:
        try:
            for path in folder.iterdir():
                if _FILE_NAME.fullmatch(path.name) and path.name not in (name, self._named):
                    path.unlink()
        except OSError as error:
            _logger.warning(f'AI-KD: older files of the prediction memory could not be removed: {error}')

    def get_state(self) -> dict[str, Any] | None:
        """Which file belongs to a checkpoint that is written now; None if there is none."""
        self._named = self.saved['name'] if self.saved else self._named
        return self.saved

    def load_state(self, state: dict[str, Any] | None, folders: list[Path]) -> None:
        """Fill the table from the file that a checkpoint names, or report why not and start empty.

        Args:
            state: What `get_state` returned.
            folders: Where to look for the file before the folder that it was written to.
        """
        if not state:
            if rank() == 0:
                _logger.warning(
                    'AI-KD: the checkpoint names no prediction memory: the progressive term pauses for one epoch')
            return
        paths = [Path(folder) / Path(state['name']).name for folder in (*folders, state['folder'])]
        reason = self.table.load(paths, self._metadata(state['epoch']), state['digest'])
        if reason is None:
            self.saved, self._named, self._loaded_epoch = state, state['name'], state['epoch']
        if rank() != 0:
            return
        if reason is None:
            _logger.info(f'AI-KD: prediction memory of epoch {state["epoch"]} restored, {len(self.table):,} samples')
        else:
            _logger.warning(
                f'AI-KD: no prediction memory of epoch {state["epoch"]}: {reason}; the progressive term pauses for one '
                f'epoch')

    def _metadata(self, epoch: int) -> dict[str, str]:
        return {'version': _FILE_VERSION, 'epoch': str(epoch), 'records': self.format.describe()}

    @property
    def _is_async(self) -> bool:
        return self.device.type == 'cuda'

    def _checked(self, index: np.ndarray | None) -> np.ndarray:
        if index is None:
            raise AikdError(
                '--aikd-memory store: the samples of the batch are not known: give their dataset indices with it, or '
                'let begin_epoch choose the memory for its loader')
        if index.min() < 0 or index.max() >= self.table.samples:
            raise AikdError(
                f'--aikd-memory store: the loader yields samples {index.min()} to {index.max()}, the training set has '
                f'{self.table.samples}; use --aikd-memory snapshot')
        return index

    def _commit(self, wait: bool = False) -> None:
        """Move records that have arrived into the table; without `wait`, the others are left for a later step."""
        while self._arriving and (wait or self._arriving[0].is_there()):
            index, records = self._arriving.popleft().take(self.table.dtype)
            finite = ~np.isnan(records['values'][:, 0])
            if not finite.all():
                index, records = index[finite], records[finite]
            before = self.table.records['stamp'][index] > 0
            changed = before & (self.table.records['label'][index] != records['label'])
            self._counts[2:] += before.sum(), changed.sum()
            self.table.write(index, records)
            if self.table.has_other_hosts:
                self._written.append(index)


class _Arriving:
    """Records on their way from the device; on CUDA through pinned memory, and nobody waits for them."""

    def __init__(self, index: np.ndarray, records: torch.Tensor):
        self.index = index
        self.event: torch.cuda.Event | None = None
        if records.device.type == 'cuda':
            self.bytes = torch.empty(records.shape, dtype=records.dtype, pin_memory=True)
            self.bytes.copy_(records, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(records.device))
        else:
            self.bytes = records.cpu()

    def is_there(self) -> bool:
        return self.event is None or self.event.query()

    def take(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Index and records [B], waiting for them if need be."""
        if self.event is not None:
            self.event.synchronize()
        return self.index, self.bytes.numpy().view(dtype).squeeze(-1)
