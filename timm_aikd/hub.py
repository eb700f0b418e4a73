"""The Hugging Face Hub as timm loads from it: whole files in bounded time, or one line that says why not."""
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from timm.models import _hub as timm_hub
from timm.models import is_model

from . import AikdError

PATIENCE = 30  # seconds from the start of a load, after which what the Hub failed to give is not asked for again

# hf_xet, through which most large files come, else waits five minutes for an answer, six times over
_XET = {
    'HF_XET_CLIENT_CONNECT_TIMEOUT': '10s',
    'HF_XET_CLIENT_READ_TIMEOUT': '10s',
    'HF_XET_CLIENT_RETRY_BASE_DELAY': '1s',
    'HF_XET_CLIENT_RETRY_MAX_ATTEMPTS': '4',
}
_SECRETS = re.compile(r'hf_[A-Za-z0-9]{8,}|(?<=[Bb]earer )\S+|(?<=://)[^/\s]+@|(?<=\w)\?\S+')


# What timm would take from a config.json as it is, and what is expected there.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(('mean', 'std', 'input_size'), lambda value: (
        isinstance(value, list) and all(isinstance(number, (int, float)) for number in value))),
    'label_names': lambda value: isinstance(value, (list, dict)) and all(
        isinstance(name, str) for name in (value.values() if isinstance(value, dict) else value)),
    'hf_hub_filename': lambda value: isinstance(value, str) and '..' not in value and not os.path.isabs(value),
    'custom_load': lambda value: isinstance(value, bool),  # 'hf' is a format of its own
    'features_only': lambda value: value is False,  # no classifier
    'pretrained_strict': lambda value: value is True,  # weights that are missing would be random
}


class Unfit(Exception):
    """A file, or the folder it should go to, is of no use; the message goes on from the spec and has a remedy."""


@contextmanager
def careful_downloads() -> Iterator[None]:
    """Let timm load from the Hub through `_Downloads`, and hf_xet give up as soon as the rest of the client does."""
    download, unset = timm_hub.hf_hub_download, _XET.keys() - os.environ.keys()
    timm_hub.hf_hub_download = _Downloads(download)  # type: ignore[assignment]
    os.environ.update((name, _XET[name]) for name in unset)
    try:
        yield
    finally:
        timm_hub.hf_hub_download = download
        for name in unset:
            os.environ.pop(name, None)


class _Downloads:
    """`hf_hub_download` with an end to its patience, and an eye on what arrives.

    By itself the client waits more than six minutes for a Hub that takes connections and does not answer, gives up on
    the first server error in a download, and takes any content that has the right length.
    """

    def __init__(self, download: Callable[..., str]):
        self.download = download
        self.deadline = time.monotonic() + PATIENCE
        self.trouble: Exception | None = None  # once there is one, only the cache is asked

    def __call__(self, repo_id: str, filename: str, **place: Any) -> str:
        path = self._get({'repo_id': repo_id, 'filename': filename, **place})
        if filename == 'config.json':
            check_config(Path(path))
        return path

    def _get(self, file: dict[str, Any]) -> str:
        wait = 1.
        while self.trouble is None:
            try:
                return self._ask(file)
            except Exception as error:
                _check_folder(error)
                if not _may_pass(error):
                    raise
                if isinstance(error, errors.OfflineModeIsEnabled) or time.monotonic() + wait > self.deadline:
                    self.trouble = error
                    break
                if _status(error) == 416:  # what older clients kept of another try is no beginning of the file
                    file['force_download'] = True
            time.sleep(wait)
            wait *= 2
        try:
            return _checked(self.download(**{**file, 'local_files_only': True, 'force_download': False}))
        except errors.LocalEntryNotFoundError as missing:  # on which timm tries another name
            raise missing from self.trouble

    def _ask(self, file: dict[str, Any]) -> str:
        name = file['repo_id'], file['filename']
        place: dict[str, Any] = {key: file.get(key) for key in ('cache_dir', 'revision')}
        if not isinstance(try_to_load_from_cache(*name, **place), str):
            # one request; where it fails, `hf_hub_download` would make seven, and wait a minute for most of them
            url = hf_hub_url(*name, revision=place['revision'])
            get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return _checked(self.download(**file))


def _may_pass(error: Exception) -> bool:
    """Whether it is the network, an overloaded or failing server, or a damaged file, and no answer to the request."""
    status = _status(error)
    if status is not None:
        return status in (408, 416, 429) or status >= 500
    return not isinstance(error, ValueError)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, 'response', None), 'status_code', None)


def _check_folder(error: Exception) -> None:
    """Raise `Unfit` where it is the cache folder that the error is about."""
    number = None if isinstance(error, (ConnectionError, TimeoutError)) else getattr(error, 'errno', None)
    if number in (errno.ENOSPC, errno.EDQUOT) or 'No space left' in str(error):  # hf_xet raises a RuntimeError
        state, remedy = 'is full', 'free some space'
    elif number is not None:
        state, remedy = f'cannot be used ({os.strerror(number)})', 'mend that'
    else:
        return
    raise Unfit(f'the cache folder {constants.HF_HUB_CACHE} {state}: {remedy} or set HF_HOME to another') from error


def _checked(path: str) -> str:
    """The path of a file of the cache, if the content is that which the Hub has; about half a second a gigabyte.

    In the cache a file is a link to what is named by its ETag: the SHA-256 of large files, else git's hash. Where there
    are no links, or a mirror makes up other ETags, there is nothing to compare with.

    Raises:
        Unfit: It is another, and has been removed for the next try.
    """
    link = Path(path)
    blob = link.parent / os.readlink(link) if link.is_symlink() else link
    hashes = {
        64: (hashlib.sha256(),),
        40: (hashlib.sha1(b'blob %d\0' % link.stat().st_size, usedforsecurity=False),
             hashlib.sha1(usedforsecurity=False)),  # the plain one is what some mirrors take
    }.get(len(blob.name) if re.fullmatch('[0-9a-f]+', blob.name) else 0)
    if hashes is None:
        return path
    with link.open('rb') as file:
        while block := file.read(1 << 20):
            for each in hashes:
                each.update(block)
    if blob.name in [each.hexdigest() for each in hashes]:
        return path
    for damaged in (link.resolve(), blob, link):
        with suppress(OSError):  # of a cache that is not ours to mend
            damaged.unlink()
    raise Unfit(
        f'{link.name} is damaged, its content has not the checksum that the Hub tells: load it again online; if that '
        f'does not help, suspect the proxy or the disk')


def check_config(path: Path) -> None:
    """Refuse a config.json that timm cannot build a model after.

    Raises:
        Unfit: Not JSON, of something else, or of an architecture that this timm has not.
    """
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise Unfit('its config.json is not JSON; save the model again with save_for_hf of timm') from error
    architecture = config.get('architecture') if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise Unfit('its config.json names no architecture, so it is not of a timm model; choose one that is')
    if not is_model(architecture):
        raise Unfit(
            f'its config.json names the architecture {architecture[:60]!r}, which timm {timm.__version__} does not '
            f'have; upgrade timm, or choose another')
    entries = {**config, **_dictionary(config.get('pretrained_cfg')), **_dictionary(config.get('model_args'))}
    for key, is_fine in _ENTRIES.items():
        if entries.get(key) is not None and not is_fine(entries[key]):
            raise Unfit(
                f'its config.json has {key} {str(entries[key])[:60]!r}, which is no use here; save the model again '
                f'with save_for_hf of timm')


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def explain(error: Exception, spec: str) -> AikdError:
    """Whatever stopped the Hub client or timm, as one line with a remedy."""
    is_missing = isinstance(error, errors.LocalEntryNotFoundError)
    cause: BaseException = error
    while isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    status = _status(cause)
    login = 'log in with `hf auth login` or HF_TOKEN'
    elsewhere = 'or give it as local-dir:PATH or a weights file'
    what = f'{type(cause).__name__}: {one_line(cause)}'
    cases = (
        (isinstance(cause, Unfit), str(cause)),
        (isinstance(cause, errors.GatedRepoError), f'is gated; accept its terms on the Hub, then {login}'),
        (isinstance(cause, errors.RepositoryNotFoundError), (
            f'no such repository on the Hub, or a private one: check the name, or {login}')),
        (isinstance(cause, errors.RevisionNotFoundError), (
            'the repository has no such branch, tag or commit: check what follows the @')),
        (isinstance(cause, errors.EntryNotFoundError) and status == 404, (
            f'the repository has no {_file_name(cause)}, which a timm model needs; choose another')),
        (status == 401, f'the Hub does not accept the token it was given: {login} again'),
        (status == 403, f'the Hub denies access (403): ask its owner, or {login} of somebody who has it'),
        (status == 429, f'rate limited, the Hub had too many requests from here: wait some minutes, or {login}'),
        (status is not None and status >= 500, f'the Hub fails with server error {status}: try again, {elsewhere}'),
        (is_missing and isinstance(cause, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)), (
            f'not in the cache, and the Hub is offline: unset HF_HUB_OFFLINE, point HF_HOME at a filled cache, '
            f'{elsewhere}')),
        (is_missing, (
            f'not in the cache, and the Hub does not send it ({what}): check the network and HF_ENDPOINT, try again, '
            f'{elsewhere}')),
        (True, (
            f'could not be loaded as a timm model with pretrained weights ({what}); check it, try again, {elsewhere}')),
    )
    return AikdError(f'{spec}: {next(text for applies, text in cases if applies)}')


def _file_name(error: BaseException) -> str:
    response: Any = getattr(error, 'response', None)
    return str(response.url).rpartition('/')[2] if _status(error) else ''


def one_line(error: BaseException) -> str:
    """The message of an error in at most 80 characters, without what is secret in URLs and headers."""
    text = _SECRETS.sub('***', ' '.join(str(error).split())) or type(error).__name__
    return text if len(text) <= 80 else f'{text[:77]}...'
