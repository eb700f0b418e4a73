"""One table of records a host, mapped from a scratch file that all ranks of the host share.

A rank reads and writes the records of the samples it visits; within a host nothing is copied or sent. Between hosts
`exchange` sends what was written. A record's stamp says when it was written, the newer one wins, and so the outcome
depends on neither the order nor the chunks in which records arrive. Stamp 0 is a record never written: a new table is
all zeros, as the file system gives it.
"""
import atexit
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from . import AikdError
from .ranks import barrier, gather_objects, rank, this_host

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted anyway
    fcntl = None  # type: ignore[assignment]

_SCRATCH = 'timm-aikd-', '.table'  # first and last part of a scratch file's name
_CHUNK_BYTES = 32 * 2 ** 20  # of records that a rank sends, reads or writes at once
_CHUNK_ALL_RANKS = 256 * 2 ** 20  # that a rank receives at once


class HostTable:
    """Records of `samples` samples, shared by the ranks of this host. Creating one is a collective call.

    Args:
        dtype: Packed numpy dtype of a record; its field `stamp` is an int64.
        samples: Number of records.
        folder: Where the scratch file lies; by default the system's folder for temporary files.
        host: Ranks that give the same name share a table.

    Raises:
        AikdError: On every rank, if the file cannot be made or mapped on any host.
    """

    def __init__(self, dtype: np.dtype, samples: int, folder: str | None = None, host: str | None = None):
        self.dtype, self.samples, self.bytes = dtype, samples, samples * dtype.itemsize
        self.folder = Path(folder or 'the folder for temporary files')
        hosts = gather_objects(host or this_host())
        mine = [other for other, name in enumerate(hosts) if name == hosts[rank()]]
        self.hosts, self._place, self._is_leader = hosts, mine.index(rank()), mine[0] == rank()
        self.has_other_hosts = len(mine) < len(hosts)
        self._chunk = max(1, min(_CHUNK_BYTES, _CHUNK_ALL_RANKS // len(hosts)) // (dtype.itemsize + 8))
        self._scratch: tuple[str, int] | None = None  # path and descriptor, while the file has a name
        if folder is None:
            self.folder = self._on_all_ranks(lambda: Path(tempfile.gettempdir()))[rank()]
        try:
            paths = self._on_all_ranks(self._create if self._is_leader else lambda: None)
            self._on_all_ranks(lambda: self._map(paths[mine[0]]))
        finally:
            self._disown()

    def _on_all_ranks(self, function: Callable[[], Any]) -> list[Any]:
        """What a function returns on each rank, or the same error on all of them."""
        try:
            value, error = function(), None
        except OSError as failure:
            value, error = None, (
                f'{self.folder} cannot hold the prediction table of {self.samples:,} samples, '
                f'{size_text(self.bytes)}: {failure.strerror or failure}')
        results = gather_objects((value, error))
        for _, error in results:
            if error is not None:
                raise AikdError(error)
        return [value for value, _ in results]

    def _map(self, path: str) -> None:
        self.records = np.asarray(np.memmap(path, self.dtype, 'r+', shape=(self.samples,)))
        self._opaque = self.records.view(np.dtype((np.void, self.dtype.itemsize)))  # moved whole: twice as fast

    def _create(self) -> str:
        """An empty scratch file with all its blocks allocated: a full disk would kill whoever writes to the map."""
        _remove_leftovers(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < self.bytes:
            raise OSError(f'it has {size_text(free)} free')
        descriptor, path = tempfile.mkstemp(_SCRATCH[1], _SCRATCH[0], self.folder)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # held while the name exists, so that it is no leftover
            if hasattr(os, 'posix_fallocate'):
                os.posix_fallocate(descriptor, 0, self.bytes)
            else:
                for start in range(0, self.bytes, _CHUNK_BYTES):
                    os.write(descriptor, bytes(min(_CHUNK_BYTES, self.bytes - start)))
        except BaseException:
            os.close(descriptor)
            os.unlink(path)
            raise
        self._scratch = path, descriptor
        return path

    def _disown(self) -> None:
        """Remove the name: the map lives on, and goes with the last of the processes however they end."""
        if self._scratch is None:
            return
        path, descriptor = self._scratch
        self._scratch = None
        try:
            os.unlink(path)
        except OSError:  # Windows: not while it is mapped
            atexit.register(_unlink, path)
        os.close(descriptor)

    def read(self, index: np.ndarray, out: np.ndarray) -> None:
        """Copy the records of the samples `index` [B], none of them out of range, into `out` [B]."""
        np.take(self._opaque, index, out=out.view(self._opaque.dtype), mode='clip')  # 'raise' copies twice

    def write(self, index: np.ndarray, records: np.ndarray) -> None:
        """Overwrite the records of the samples `index` [B]; where one comes twice, the last holds."""
        self._opaque[index] = records.view(self._opaque.dtype)

    def merge(self, index: np.ndarray, records: np.ndarray) -> None:
        """Overwrite the records of different samples `index` [B] where the given ones are newer."""
        newer = records['stamp'] > self.records['stamp'][index]
        self.write(index[newer], records[newer])

    def exchange(self, index: np.ndarray, device: torch.device) -> None:
        """Send the records of the samples `index` to the other hosts, and take in theirs. A collective call.

        A host's ranks share the work: the k-th rank takes in what the k-th ranks of the other hosts send.

        Args:
            index: The samples that this rank has written since the last exchange, each once.
            device: Where the process group can send from.
        """
        places = [self.hosts[:other].count(name) for other, name in enumerate(self.hosts)]
        local = self.hosts.count(self.hosts[rank()])
        most = max(gather_objects(len(index)))
        wire = np.dtype([('index', '<i8'), ('record', self.dtype)])
        for start in range(0, most, self._chunk):
            sent = np.zeros(min(self._chunk, most - start), wire)
            sent['index'] = -1  # what is left of a rank that has fewer than others
            part = index[start:start + self._chunk]
            sent['index'][:len(part)], sent['record'][:len(part)] = part, self.records[part]
            mine = torch.from_numpy(sent.view(np.uint8)).to(device)
            gathered = [torch.empty_like(mine) for _ in self.hosts]
            dist.all_gather(gathered, mine)
            for other, place in enumerate(places):
                if self.hosts[other] != self.hosts[rank()] and place % local == self._place:
                    received = gathered[other].cpu().numpy().view(wire)
                    received = received[received['index'] >= 0]
                    self.merge(received['index'], received['record'])
        barrier()  # nobody reads before all ranks of the host have taken in their part

    def save(self, path: Path, metadata: dict[str, str]) -> str:
        """Write the table to a safetensors file, whole or not at all.

        The format's own writer would hold a second copy of the table in memory, and neither syncs nor renames.

        Returns:
            The SHA-256 of the records.

        Raises:
            OSError: The file cannot be written; what was at `path` is still there.
        """
        entry = {'dtype': 'U8', 'shape': [self.samples, self.dtype.itemsize], 'data_offsets': [0, self.bytes]}
        header = json.dumps({'__metadata__': metadata, 'records': entry}).encode()
        header += b' ' * (-len(header) % 8)
        digest, temporary = hashlib.sha256(), path.with_name(path.name + '.tmp')
        try:
            with open(temporary, 'wb') as file:
                file.write(len(header).to_bytes(8, 'little') + header)
                for start, stop in self._slices():
                    chunk = self._opaque[start:stop].tobytes()
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            _unlink(temporary)
            raise
        _sync_folder(path.parent)
        return digest.hexdigest()

    def age(self) -> None:
        """Make every record older than any that will be written. A collective call."""
        if self._is_leader:
            for start, stop in self._slices():
                stamps = self.records['stamp'][start:stop]
                np.minimum(stamps, 1, out=stamps)
        barrier()

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
            self.records['stamp'] = 0
        barrier()  # nobody reads before all have cleared
        return reason

    def _load_first(self, paths: list[Path], metadata: dict[str, str], digest: str) -> str | None:
        reasons = {}
        for path in paths:
            reasons[str(path)] = reason = self._load(path, metadata, digest)
            if reason is None:
                return None
        where = f' (on {socket.gethostname()})' if self.has_other_hosts else ''
        return '; '.join(f'{path} {reason}' for path, reason in reasons.items()) + where

    def _load(self, path: Path, metadata: dict[str, str], digest: str) -> str | None:
        read = hashlib.sha256()
        try:
            if not path.is_file():
                return 'is not there'
            with safe_open(path, 'np') as file:
                found = file.metadata() or {}
                for name, value in metadata.items():
                    if found.get(name) != value:
                        return f'is refused, its {name} is {str(found.get(name))[:80]}, not {value}'
                rows = file.get_slice('records')
                if rows.get_shape() != [self.samples, self.dtype.itemsize] or rows.get_dtype() != 'U8':
                    return f'is refused, its records are {rows.get_dtype()} {rows.get_shape()}'
                for start, stop in self._slices():
                    chunk = np.ascontiguousarray(rows[start:stop])
                    read.update(chunk.data)
                    self.records[start:stop] = chunk.reshape(-1).view(self.dtype)
        except (OSError, SafetensorError, ValueError) as error:
            return f'cannot be read ({" ".join(str(error).split())[:100]})'
        return None if read.hexdigest() == digest else 'is refused, its content is not what the checkpoint names'

    def _slices(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.samples, self._chunk):
            yield start, min(start + self._chunk, self.samples)

    def __len__(self) -> int:
        """Number of samples that have a record."""
        return sum(int(np.count_nonzero(self.records['stamp'][start:stop])) for start, stop in self._slices())


def size_text(size: int) -> str:
    """A size in bytes as people read it, in decimal units."""
    power = min(max(len(str(size)) - 1, 0) // 3, 4)
    return f'{size / 1000 ** power:.3g} {("bytes", "kB", "MB", "GB", "TB")[power]}'


def _remove_leftovers(folder: Path) -> None:
    """Remove scratch files of runs that were killed in the moment between making and disowning theirs."""
    for path in folder.glob('*'.join(_SCRATCH)):
        try:
            status = path.stat()
            if status.st_size == 0 and time.time() - status.st_mtime < 60:  # perhaps not locked yet
                continue
            with open(path, 'rb') as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:  # in use, or another user's
            pass


def _unlink(path: Path | str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _sync_folder(folder: Path) -> None:
    """Make a rename last over a power failure, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
