"""The memory's files beside the checkpoints, `aikd-memory-EPOCH.safetensors`."""
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..ranks import in_touch, logger, rank
from .table import HostTable

_FORMAT_VERSION = '1'
_NAME = re.compile(r'aikd-memory-(?P<epoch>\d+)\.safetensors(?P<part>\.tmp)?')


class MemoryFiles:
    """Saves a table after each epoch and restores it from the file that a checkpoint names.

    The newest file stays, and those of the checkpoints that are still in the folder. Saving and loading are collective
    calls.

    Args:
        table: The table.
        content: What a record holds, in words: a file of another content is refused.
    """

    def __init__(self, table: HostTable, content: str):
        self.table, self.content = table, content
        self._state: dict[str, Any] | None = None  # the newest file: name, folder, epoch, digest
        self._named: str | None = None  # the file that the newest checkpoint names
        self._loaded_epoch: int | None = None

    def before_epoch(self, epoch: int) -> None:
        """Where training goes back to an earlier epoch (`--start-epoch`), make what was loaded older than the new."""
        if self._loaded_epoch is not None and epoch <= self._loaded_epoch:
            self.table.age()
        self._loaded_epoch = None

    def forget(self) -> None:
        """The table has changed: no file holds it until the next `save`."""
        self._state = None

    def save(self, epoch: int, folder: Path | str | None) -> None:
        """Write the table and remove files that no checkpoint needs; only the primary rank's `folder` counts.

        The other ranks wait, for the table must not change meanwhile. A failure is logged and training goes on.
        """
        saves = folder is not None and rank() == 0
        in_touch(partial(self._write, epoch, Path(folder or '').resolve()) if saves else None)

    def _write(self, epoch: int, folder: Path) -> None:
        name = f'aikd-memory-{epoch}.safetensors'
        try:
            digest = self.table.save(folder / name, self._metadata(epoch))
        except OSError as error:
            size = tqdm.format_sizeof(self.table.bytes, 'B')
            logger.warning(
                f'AI-KD: the prediction memory ({size}) was not saved beside the checkpoints: {error}; training '
                f'goes on, a resume from this epoch would pause the progressive term for one epoch')
            return
        self._state = {'name': name, 'folder': str(folder), 'epoch': epoch, 'digest': digest}
        self._remove_older(folder, name)

    def _remove_older(self, folder: Path, newest: str) -> None:
        try:
            for path in folder.iterdir():
                match = _NAME.fullmatch(path.name)
                if match is None or path.name in (newest, self._named):
                    continue
                if match['part'] or not _has_checkpoint(folder, int(match['epoch'])):
                    path.unlink()
        except OSError as error:
            logger.warning(f'AI-KD: older files of the prediction memory could not be removed: {error}')

    def get_state(self) -> dict[str, Any] | None:
        """The file that belongs to a checkpoint written now; None if there is none."""
        if self._state is not None:
            self._named = self._state['name']
        return self._state

    def load(self, state: dict[str, Any] | None, folders: Sequence[Path]) -> None:
        """Fill the table from the file of a checkpoint, or log why not and leave it empty.

        Args:
            state: What `get_state` returned.
            folders: Where to look for the file before the folder that it was written to.
        """
        pause = 'the progressive term pauses for one epoch'
        if not state:
            logger.warning(f'AI-KD: the checkpoint names no prediction memory: {pause}')
            return
        epoch = state['epoch']
        paths = [Path(folder) / Path(state['name']).name for folder in (*folders, state['folder'])]
        reason = self.table.load(paths, self._metadata(epoch), state['digest'])
        if reason is not None:
            logger.warning(f'AI-KD: no prediction memory of epoch {epoch}: {reason}; {pause}')
            return
        self._state, self._named, self._loaded_epoch = state, state['name'], epoch
        logger.info(f'AI-KD: prediction memory of epoch {epoch} restored, {len(self.table):,} samples')

    def _metadata(self, epoch: int) -> dict[str, str]:
        return {'version': _FORMAT_VERSION, 'epoch': str(epoch), 'records': self.content}


def _has_checkpoint(folder: Path, epoch: int) -> bool:
    """Whether timm's saver keeps a checkpoint of this epoch; a milestone counts completed epochs."""
    return any((folder / f'{name}.pth.tar').exists() for name in (f'checkpoint-{epoch}', f'milestone-{epoch + 1}'))
