"""The safetensors file that a table is saved to: one tensor `records`, U8 [samples, bytes]."""
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import one_line

CHUNK_BYTES = 32 * 2 ** 20  # read or written at once


def save_table(path: Path, records: np.ndarray, metadata: dict[str, str]) -> str:
    """Write records [samples] to a file, whole or not at all.

    The header is made here because `safetensors.numpy.save_file` copies the whole table first (before safetensors 0.8).

    Returns:
        The SHA-256 of the records.

    Raises:
        OSError: The file cannot be written; the older file at `path` is still there.
    """
    shape = [len(records), records.dtype.itemsize]
    entry = {'dtype': 'U8', 'shape': shape, 'data_offsets': [0, records.nbytes]}
    header = json.dumps({'__metadata__': metadata, 'records': entry}).encode()
    header += b' ' * (-len(header) % 8)
    digest, temporary = hashlib.sha256(), path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(len(header).to_bytes(8, 'little') + header)
            for chunk in chunks(records):
                digest.update(chunk.data)
                file.write(chunk.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # is there only where something failed
            temporary.unlink()
    return digest.hexdigest()


def load_table(path: Path, records: np.ndarray, metadata: dict[str, str], digest: str) -> str | None:
    """Fill records [samples] from a file of `save_table`.

    Args:
        path: The file.
        records: Overwritten, also by a file that turns out to be damaged.
        metadata: As given to `save_table`.
        digest: What `save_table` returned.

    Returns:
        None, or why the file is refused, as a sentence without its subject.
    """
    read = hashlib.sha256()
    try:
        if not path.is_file():
            return 'is not there'
        with safe_open(path, 'np') as file:
            reason = _why_foreign(file, records, metadata)
            if reason is not None:
                return reason
            rows, start = file.get_slice('records'), 0
            for chunk in chunks(records):
                chunk[:] = rows[start:start + len(chunk)]
                read.update(chunk.data)
                start += len(chunk)
    except (OSError, SafetensorError, ValueError) as error:
        return f'cannot be read ({one_line(error)})'
    return None if read.hexdigest() == digest else 'is refused: its content is not that of the checkpoint'


def chunks(records: np.ndarray) -> Iterator[np.ndarray]:
    """Views of the records as bytes [some, bytes], at most CHUNK_BYTES each."""
    size = max(1, CHUNK_BYTES // records.dtype.itemsize)
    for start in range(0, len(records), size):
        yield records[start:start + size].view(np.uint8).reshape(-1, records.dtype.itemsize)


def _why_foreign(file: Any, records: np.ndarray, metadata: dict[str, str]) -> str | None:
    found = file.metadata() or {}
    for name, value in metadata.items():
        if found.get(name) != value:
            return f'is refused: its {name} is {str(found.get(name))[:80]}, not {value}'
    rows = file.get_slice('records')
    kind, shape = rows.get_dtype(), rows.get_shape()
    if kind != 'U8' or len(shape) != 2 or shape[1] != records.dtype.itemsize:
        return f'is refused: its records are {kind} {shape}'
    if shape[0] != len(records):
        return f'is refused: the data set had {shape[0]} samples when the memory was written, has {len(records)} now'
    return None
