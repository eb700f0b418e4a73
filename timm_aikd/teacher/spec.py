"""A teacher's spec: `TeacherSpec.parse` tells its form, and checks it against the disk but not the network."""
import difflib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from timm.models import is_model, list_models

from ..errors import AikdError

HUB_ID = re.compile(r'(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?')
FORMS = (
    'hf-hub:ORG/NAME[@REVISION], local-dir:PATH, a weights file, the output folder of a run, a timm model name, or none'
)
BEST = 'model_best.pth.tar'
_FILE_ENDINGS = ('.pth.tar', '.pth', '.pt', '.bin', '.ckpt', '.safetensors')


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher's spec, parsed.

    Args:
        text: As it was given.
        kind: 'none', 'hub', 'folder', 'file' or 'name'.
        value: Hub repository, folder with a config.json, weights file or timm model name.
        revision: Branch, tag or commit of a Hub repository; None: its default branch.
    """
    text: str
    kind: str
    value: str = ''
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> 'TeacherSpec':
        """The spec that a text is.

        Raises:
            AikdError: An unknown form, or a file or folder that does not exist.
        """
        source, _, value = text.partition(':')
        if not text.strip():
            raise AikdError(f'{text!r}: is empty; allowed: {FORMS}')
        if text == 'none':
            return cls(text, 'none')
        if source in ('hf-hub', 'hf_hub'):
            return cls._hub(text, value)
        if source == 'local-dir':
            return cls._folder(text, _expanded(value))
        path = _expanded(text)
        if os.path.isfile(path):
            return cls(text, 'file', path)
        if os.path.isdir(path):
            return cls._run(text, path)
        if is_model(text):
            return cls(text, 'name', text)
        raise _not_found(text, path)

    @classmethod
    def _hub(cls, text: str, value: str) -> 'TeacherSpec':
        found = HUB_ID.fullmatch(value)
        if found is None or '..' in value:
            raise AikdError(f'{text}: a Hub teacher is written hf-hub:ORG/NAME[@REVISION]')
        return cls(text, 'hub', found['repository'], found['revision'])

    @classmethod
    def _folder(cls, text: str, path: str) -> 'TeacherSpec':
        if not os.path.isfile(os.path.join(path, 'config.json')):
            raise AikdError(f'{text}: no config.json in this folder; save_for_hf of timm writes one')
        return cls(text, 'folder', path)

    @classmethod
    def _run(cls, text: str, path: str) -> 'TeacherSpec':
        best = os.path.join(path, BEST)
        if os.path.isfile(best):
            return cls(text, 'file', best)
        remedy = 'name a weights file'
        runs = [name for name in _names_in(path) if os.path.isfile(os.path.join(path, name, BEST))]
        if os.path.isfile(os.path.join(path, 'config.json')):
            remedy = f'use local-dir:{text}'
        elif runs:
            remedy = f'it holds runs, name one: {", ".join(os.path.join(text, name) for name in runs[:3])}'
        raise AikdError(f'{text}: not the output of a run, it has no {BEST}; {remedy}')


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Put the option before errors that begin with its value."""
    try:
        yield
    except AikdError as error:
        raise AikdError(f'{option} {error.args[0]}') from error.__cause__


def closest(name: str, known: Iterable[str]) -> str:
    """'; did you mean NAME' for the known name that is most like it; empty where none is."""
    found = difflib.get_close_matches(name, set(known) - {name}, 1, 0.75)
    return f'; did you mean {found[0]}' if found else ''


def _expanded(path: str) -> str:
    return os.path.expanduser(path) if path.startswith('~/') else path


def _not_found(text: str, path: str) -> AikdError:
    folder, name = os.path.split(path)
    here = os.path.dirname(text)
    hint = closest(text, [os.path.join(here, each) for each in _names_in(folder or '.')])
    if text.lower().endswith(_FILE_ENDINGS):
        return AikdError(f'{text}: no such file{hint or ": check the path"}')
    if not hint and HUB_ID.fullmatch(text) and not os.path.isdir(folder):
        hint = f'; did you mean hf-hub:{text}'
    hint = hint or closest(name.partition('.')[0], list_models()) or f'; allowed: {FORMS}'
    return AikdError(f'{text}: no such file, folder or timm model{hint}')


def _names_in(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):  # no such folder, or no path at all
        return []
