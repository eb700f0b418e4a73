"""Files of a Hub repository, downloaded by the Hub's client or from its cache, or one line that says why not."""
import errno
import inspect
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import (
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from timm.models import is_model

from ..errors import AikdError, one_line
from ..ranks import logger

CONFIG = 'config.json'
WEIGHTS = ('model.safetensors', 'pytorch_model.bin')
# huggingface_hub before 1.0 cannot retry this request
_HAS_RETRIES = 'retry_on_errors' in inspect.signature(get_hf_file_metadata).parameters

# What timm would take from a config.json unchecked, and what is expected there.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(('mean', 'std', 'input_size'), lambda value: (
        isinstance(value, list) and all(isinstance(number, (int, float)) for number in value))),
    'label_names': lambda value: isinstance(value, (list, dict)) and all(
        isinstance(name, str) for name in (value.values() if isinstance(value, dict) else value)),
    **dict.fromkeys(('pretrained_cfg', 'model_args'), lambda value: isinstance(value, dict)),
    'custom_load': lambda value: isinstance(value, bool),  # 'hf' is a format of its own
    'hf_hub_filename': lambda value: value in WEIGHTS,
    'features_only': lambda value: value is False,  # no classifier
    'pretrained_strict': lambda value: value is True,  # missing weights would be random
}


class Unfit(Exception):
    """A file is not that of a timm model; the message continues the spec and has a remedy."""


def fetch(spec: str, repository: str, revision: str | None = None, with_config: bool = True) -> Path:
    """Weights file of a repository in the client's cache, `.../COMMIT/NAME`; its config.json lies beside it.

    A cached model is used where the Hub cannot be reached or the new commit cannot be downloaded, and the log says so.
    A Hub that accepts connections and never answers costs about 85 seconds, or 10 where the model is cached.

    Args:
        spec: What to call the model in messages.
        repository: ORG/NAME.
        revision: Branch, tag or commit; None: the default branch.
        with_config: Whether a config.json is needed; it is checked.

    Raises:
        AikdError: It cannot be had, or is not of a timm model.
    """
    cached = _cached(repository, revision, with_config)
    if cached is not None and cached.parent.name == revision:
        return cached
    try:
        return _download(repository, revision, with_config, cached)
    except Exception as error:
        if cached is None:
            raise explain(error, spec) from error
        if not isinstance(error, errors.OfflineModeIsEnabled):
            logger.warning(
                f'AI-KD: {spec}: the Hub does not send it ({type(error).__name__}: {one_line(error)}): '
                f'the cached commit {cached.parent.name} is used')
        return cached


def _cached(repository: str, revision: str | None, with_config: bool) -> Path | None:
    def get(name: str) -> str:
        path = try_to_load_from_cache(repository, name, revision=revision)
        if not isinstance(path, str):
            raise errors.LocalEntryNotFoundError(name)
        return path

    try:
        return _find(get, with_config)
    except (errors.LocalEntryNotFoundError, Unfit):
        return None


def _download(repository: str, revision: str | None, with_config: bool, cached: Path | None) -> Path:
    asked = set()

    def ask(name: str, revision: str | None) -> str:
        """Commit of a file. Asked before each download, which alone would wait six minutes for a silent Hub."""
        asked.add(name)
        retries: dict[str, Any] = {'retry_on_errors': cached is None} if _HAS_RETRIES else {}
        url = hf_hub_url(repository, name, revision=revision)
        answer = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, **retries)
        return answer.commit_hash or revision or constants.DEFAULT_REVISION  # None: of no Hub, as the client will say

    def get(name: str) -> str:
        is_cached = isinstance(try_to_load_from_cache(repository, name, revision=commit), str)
        if not is_cached and name not in asked:
            ask(name, commit)
        return hf_hub_download(repository, name, revision=commit)

    commit = _first(lambda name: ask(name, revision), (CONFIG,) if with_config else WEIGHTS)
    if cached is not None and cached.parent.name == commit:
        return cached
    path = _find(get, with_config)
    with suppress(Exception):  # only now the branch in the cache moves to this commit, of which all files are there
        hf_hub_download(repository, CONFIG if with_config else path.name, revision=revision)
    return path


def _find(get: Callable[[str], str], with_config: bool) -> Path:
    if with_config:
        check_config(Path(get(CONFIG)))
    return Path(_first(get, WEIGHTS))


def _first(get: Callable[[str], str], names: tuple[str, ...]) -> str:
    """What `get` gives for the first name that exists."""
    for name in names[:-1]:
        try:
            return get(name)
        except errors.EntryNotFoundError:
            pass
    return get(names[-1])


def check_config(path: Path) -> str:
    """The architecture that a config.json names; refuses one that timm cannot build a model after.

    Raises:
        Unfit: Not JSON, of something else, or of an architecture that this timm does not have.
    """
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise Unfit(
            'its config.json is not JSON; save the model again with save_for_hf of timm, or if it was damaged on the '
            'way, `hf download` it with --force-download') from error
    architecture = config.get('architecture') if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise Unfit('its config.json names no architecture, so it is not of a timm model; choose one that is')
    if not is_model(architecture):
        raise Unfit(
            f'its config.json names the architecture {architecture[:60]!r}, which timm {timm.__version__} does not '
            f'have; upgrade timm, or choose another')
    entries = dict(config)
    for part in ('pretrained_cfg', 'model_args'):
        if isinstance(config.get(part), dict):
            entries.update(config[part])
    for key, is_fine in _ENTRIES.items():
        if entries.get(key) is not None and not is_fine(entries[key]):
            raise Unfit(
                f'its config.json has {key} {str(entries[key])[:60]!r}, which is no use here; save the model again '
                f'with save_for_hf of timm')
    return architecture


def explain(error: Exception, spec: str) -> AikdError:
    """Whatever stopped `fetch`, as one line with a remedy."""
    cause: BaseException = error
    while isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    return AikdError(f'{spec}: {_of_client(cause) or _of_status(cause) or _of_machine(cause)}')


_LOGIN = 'log in with `hf auth login` or HF_TOKEN'
_ELSEWHERE = 'or give it as local-dir:PATH or a weights file'


def _of_client(error: BaseException) -> str | None:
    """What the Hub or its client says of the repository; None where it is something else."""
    name = str(getattr(getattr(error, 'response', None), 'url', '')).rpartition('/')[2]
    texts: tuple[tuple[type[Exception], str], ...] = (
        (Unfit, str(error)),
        (errors.GatedRepoError, f'is gated; accept its terms on the Hub, then {_LOGIN}'),
        (errors.RepositoryNotFoundError, (
            f'no such repository on the Hub, or a private one: check the name, or {_LOGIN}')),
        (errors.RevisionNotFoundError, 'the repository has no such branch, tag or commit: check what follows the @'),
        (errors.OfflineModeIsEnabled, (
            f'not in the cache, and the Hub is offline: unset HF_HUB_OFFLINE, point HF_HOME at a filled cache, '
            f'{_ELSEWHERE}')),
        (errors.EntryNotFoundError, f'the repository has no {name}, which a timm model needs; choose another'),
    )
    return next((text for kind, text in texts if isinstance(error, kind)), None)


def _of_status(error: BaseException) -> str | None:
    """What the status of an HTTP answer means; None where it is none of these."""
    status = getattr(getattr(error, 'response', None), 'status_code', None) or 0
    if status >= 500:
        return f'the Hub fails with server error {status}: try again, {_ELSEWHERE}'
    return {
        401: f'the Hub does not accept the token it was given: {_LOGIN} again',
        403: f'the Hub denies access (403): ask its owner, or {_LOGIN} of somebody who has it',
        429: f'rate limited, the Hub had too many requests from here: wait some minutes, or {_LOGIN}',
    }.get(status)


def _of_machine(error: BaseException) -> str:
    """What is left: the repository's name, the cache folder or the network."""
    what = f'{type(error).__name__}: {one_line(error)}'
    number = None if isinstance(error, (ConnectionError, TimeoutError)) else getattr(error, 'errno', None)
    if number in (errno.ENOSPC, errno.EDQUOT) or 'No space left' in str(error):  # hf_xet raises a RuntimeError
        return f'the cache folder {constants.HF_HUB_CACHE} is full: free some space or set HF_HOME to another'
    if number is not None:
        state = f'cannot be used ({os.strerror(number)})'
        return f'the cache folder {constants.HF_HUB_CACHE} {state}: fix that or set HF_HOME to another'
    if isinstance(error, errors.HFValidationError):
        return f'is no name of a Hub repository ({what}): check it'
    return (
        f'not in the cache, and the Hub does not send it ({what}): check the network and HF_ENDPOINT, try again, '
        f'{_ELSEWHERE}')
