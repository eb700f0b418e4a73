"""Scratch files that no crash leaves behind."""
import atexit
import os
import shutil
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted anyway
    fcntl = None  # type: ignore[assignment]

_PREFIX, _SUFFIX = 'timm-aikd-', '.table'
CHUNK_BYTES = 2 ** 25


class ScratchFile:
    """A file of zeros for several processes to map, which has a name only until they have.

    Args:
        folder: Where it lies.
        size: Its size in bytes.
    """

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size
        self._path = ''
        self._descriptor: int | None = None

    def create(self) -> str:
        """Make the file and return its path. All its blocks are allocated: a full disk would kill who writes to a map.

        Raises:
            OSError: It cannot be made.
        """
        _remove_leftovers(self.folder)
        free = shutil.disk_usage(self.folder).free
        if free < self.size:
            raise OSError(f'it has {tqdm.format_sizeof(free, "B")} free')
        self._descriptor, self._path = tempfile.mkstemp(_SUFFIX, _PREFIX, self.folder)
        if fcntl is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)  # held while it has a name: so it is no leftover
        if hasattr(os, 'posix_fallocate'):
            os.posix_fallocate(self._descriptor, 0, self.size)
        else:
            for start in range(0, self.size, CHUNK_BYTES):
                os.write(self._descriptor, bytes(min(CHUNK_BYTES, self.size - start)))
        return self._path

    def remove(self) -> None:
        """Remove the name. The map lives on, and is gone with the last of the processes, however they end."""
        if self._descriptor is None:
            return
        try:
            os.unlink(self._path)
        except OSError:  # Windows: not while it is mapped
            atexit.register(Path(self._path).unlink, missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None


def _remove_leftovers(folder: Path) -> None:
    """Remove scratch files of runs that were killed before they could remove the name."""
    for path in folder.glob(f'{_PREFIX}*{_SUFFIX}'):
        try:
            status = path.stat()
            if status.st_size == 0 and time.time() - status.st_mtime < 60:  # its owner may not have locked it yet
                continue
            with open(path, 'rb') as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:  # in use, or another user's
            pass
