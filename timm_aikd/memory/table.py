"""One table of records a host, in a mapped file that all ranks of the host share.

Ranks of one host read and write the same memory; `exchange` sends what was written to the other hosts. A record's
version grows with time, and the newer record wins, so the result depends on neither the order nor the chunks in which
records arrive. Version 0 means never written; a new table is all zeros.
"""
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import AikdError
from ..ranks import barrier, gather_objects, rank, this_host
from .scratch import ScratchFile
from .table_file import load_table, save_table

CHUNK_BYTES = 64 * 2 ** 20  # of records that a rank receives at once


class HostTable:
    """Records of `samples` samples, shared by the ranks of this host. Creating one is a collective call.

    Args:
        dtype: Packed numpy dtype of a record; its field `version` is an int64.
        samples: Number of records.
        folder: Where the scratch file lies; by default the system's folder for temporary files.
        host: Ranks that give the same name share a table.

    Raises:
        AikdError: On every rank, if the file cannot be made or mapped on any host.
    """

    def __init__(self, dtype: np.dtype, samples: int, folder: str | None = None, host: str | None = None):
        self.dtype, self.samples, self.bytes = dtype, samples, samples * dtype.itemsize
        self.hosts = gather_objects(host or this_host())
        leader = self.hosts.index(self.hosts[rank()])
        self.has_other_hosts, self._is_leader = len(set(self.hosts)) > 1, leader == rank()
        self.folder = Path(folder or 'the folder for temporary files')
        if folder is None:
            self.folder = self._on_all_ranks(lambda: Path(tempfile.gettempdir()))[rank()]
        scratch = ScratchFile(self.folder, self.bytes)
        try:
            paths = self._on_all_ranks(scratch.create if self._is_leader else lambda: None)
            self._on_all_ranks(lambda: self._map(paths[leader]))
        finally:
            scratch.remove()

    def _on_all_ranks(self, function: Callable[[], Any]) -> list[Any]:
        """What a function returns on each rank; if any rank has an OSError, all ranks raise."""
        try:
            value, error = function(), None
        except OSError as failure:
            value, error = None, (
                f'{self.folder} cannot hold the prediction table of {self.samples:,} samples, '
                f'{tqdm.format_sizeof(self.bytes, "B")}: {failure.strerror or failure}')
        results = gather_objects((value, error))
        for _, error in results:
            if error is not None:
                raise AikdError(error)
        return [value for value, _ in results]

    def _map(self, path: str) -> None:
        self.records = np.asarray(np.memmap(path, self.dtype, 'r+', shape=(self.samples,)))
        self._opaque = self.records.view(np.dtype((np.void, self.dtype.itemsize)))  # moved whole: twice as fast

    def read(self, index: np.ndarray, out: np.ndarray) -> None:
        """Copy the records of the samples `index` [B], none of them out of range, into `out` [B]."""
        np.take(self._opaque, index, out=out.view(self._opaque.dtype), mode='clip')  # 'raise' copies twice

    def write(self, index: np.ndarray, records: np.ndarray) -> None:
        """Overwrite the records of the samples `index` [B]; where one comes twice, the last holds."""
        self._opaque[index] = records.view(self._opaque.dtype)

    def merge(self, index: np.ndarray, records: np.ndarray) -> None:
        """Overwrite the records of different samples `index` [B] where the given ones are newer.

        It reads, then writes: ranks that share the table must not do it at once.
        """
        newer = records['version'] > self.records['version'][index]
        self.write(index[newer], records[newer])

    def exchange(self, index: np.ndarray) -> None:
        """Send the records of the samples `index`, each once, to the other hosts; take in theirs. A collective call."""
        chunk = max(1, CHUNK_BYTES // (len(self.hosts) * self.dtype.itemsize))
        for start in range(0, max(gather_objects(len(index))), chunk):
            part = index[start:start + chunk]
            received = gather_objects((part, self.records[part]))
            for host, (samples, records) in zip(self.hosts, received, strict=True):
                if self._is_leader and host != self.hosts[rank()]:
                    self.merge(samples, records)
            barrier()  # no rank of the host reads while its leader writes

    def age(self) -> None:
        """Make every record older than any that will be written. A collective call."""
        if self._is_leader:
            versions = self.records['version']
            np.minimum(versions, 1, out=versions)
        barrier()

    def save(self, path: Path, metadata: dict[str, str]) -> str:
        """Write the table to a file, as `save_table` does."""
        return save_table(path, self.records, metadata)

    def load(self, paths: list[Path], metadata: dict[str, str], digest: str) -> str | None:
        """Fill the table from a file of `save`, on all hosts or on none. A collective call.

        Args:
            paths: Where the file may be; the first that is the right one is taken.
            metadata: What its metadata must be.
            digest: What `save` returned.

        Returns:
            None, or why no file was taken; the table is empty then.
        """
        reason = self._load_first(paths, metadata, digest) if self._is_leader else None
        reason = next(filter(None, gather_objects(reason)), None)
        if reason is not None and self._is_leader:
            self.records['version'] = 0
        barrier()  # nobody reads before all have cleared
        return reason

    def _load_first(self, paths: list[Path], metadata: dict[str, str], digest: str) -> str | None:
        reasons = {}
        for path in paths:
            reasons[str(path)] = reason = load_table(path, self.records, metadata, digest)
            if reason is None:
                return None
        where = f' (on {socket.gethostname()})' if self.has_other_hosts else ''
        return '; '.join(f'{path} {reason}' for path, reason in reasons.items()) + where

    def __len__(self) -> int:
        """Number of samples that have a record."""
        return int(np.count_nonzero(self.records['version']))
