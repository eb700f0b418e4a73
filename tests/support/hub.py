"""A stand-in for the Hugging Face Hub on 127.0.0.1: what its client asks for to load or publish a model."""
import hashlib
import itertools
import json
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .hub_uploads import Uploads

LIFETIME = 600  # seconds, after which the server stops by itself
LIMIT = 2000  # requests, after which it answers no more

_RESOLVE = re.compile(r'/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)')
_INFO = re.compile(r'/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?')
_TREE = re.compile(r'/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)/?')


@dataclass
class Repository:
    """Branches and tags, each the hash of a commit, and the folder that each commit holds."""
    gated: bool = False
    broken: bool = False
    revisions: dict[str, str] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    def commit(self, revision: str) -> str | None:
        return self.revisions.get(revision, revision if revision in self.folders else None)

    def files(self, commit: str) -> dict[str, Path]:
        folder = self.folders[commit]
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob('*')) if path.is_file()}


class HubServer:
    """Serves local folders as model repositories for as long as the `with` block lasts.

    `url` is its address, `requests` lists what it was asked for: 'HEAD /org/name/resolve/main/config.json', and
    `ranges` which parts: 'bytes=10-'.

    Example:
        ```python
        with HubServer() as hub:
            hub.add('org/name', folder)
            run('train.py', '--model', 'hf-hub:org/name', **hub.environment(tmp_path / 'home'))
        ```
    """

    def __init__(self):
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.faults: dict[tuple[str, str, str], Iterator[int | str]] = {}
        self.repositories: dict[str, Repository] = {}
        self.read_only = False  # whether nobody may publish
        self.objects: dict[str, bytes] = {}  # uploaded, and not yet part of a commit
        self._scratch = tempfile.TemporaryDirectory()
        self.scratch = self._scratch.name  # of the repositories that were published here
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self._server.hub = self
        self._server.timeout = 0.05
        self.stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.url = f'http://127.0.0.1:{self._server.server_address[1]}'

    def __enter__(self) -> 'HubServer':
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.stopped.set()
        self._thread.join()
        self._scratch.cleanup()

    def _serve(self) -> None:
        end = time.monotonic() + LIFETIME
        with self._server:
            while not self.stopped.is_set() and time.monotonic() < end:
                self._server.handle_request()

    def add(
            self,
            repo_id: str,
            folder: Path,
            revision: str = 'main',
            gated: bool = False,
            broken: bool = False,
    ) -> str:
        """Add a repository, or another revision of one.

        Args:
            repo_id: ORG/NAME.
            folder: What the revision holds.
            revision: Name of a branch or tag.
            gated: Refuse its files.
            broken: Close the connection without an answer.

        Returns:
            The hash of the commit.
        """
        repository = self.repositories.setdefault(repo_id, Repository(gated, broken))
        digest = hashlib.sha1(repo_id.encode())
        for path in sorted(Path(folder).rglob('*')):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
        commit = digest.hexdigest()
        repository.revisions[revision] = commit
        repository.folders[commit] = Path(folder)
        return commit

    def fail(self, repo_id: str, file: str, *faults: int | str, method: str = 'GET', forever: bool = False) -> None:
        """Let the next requests for a file go wrong, one after the other in these ways.

        Args:
            repo_id: ORG/NAME.
            file: Its path in the repository.
            faults: A status to refuse with, or one of
                'stall': the request is read, and nothing said;
                'freeze': half of the content, then nothing more;
                'drop': half of the content, then the connection is closed;
                'short': half of the content, which the headers say is all;
                'corrupt': the last byte is another;
                'etag': the ETag is that of another content.
            method: Of the requests, GET or HEAD.
            forever: After the last, begin again with the first.
        """
        self.faults[method, repo_id, file] = itertools.cycle(faults) if forever else iter(faults)

    def environment(self, home: Path, offline: bool = False) -> dict[str, str | None]:
        """Variables that point a process of its own here and nowhere else; None: to be unset.

        Args:
            home: Where the client keeps its cache.
            offline: The client may use its cache only.
        """
        return {
            **dict.fromkeys((
                'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_TOKEN_PATH', 'HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE',
                'HF_HUB_ENABLE_HF_TRANSFER', 'TRANSFORMERS_OFFLINE',
            )),
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(home),
            'HF_HUB_OFFLINE': '1' if offline else None,
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'HF_HUB_DISABLE_XET': '1',
            'NO_PROXY': '127.0.0.1',
            'no_proxy': '127.0.0.1',
        }


class _Handler(Uploads, BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    timeout = 30  # an idle connection is closed

    def do_HEAD(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append(f'{self.command} {path}')
        asked = _RESOLVE.fullmatch(path) or _TREE.fullmatch(path) or _INFO.fullmatch(path)
        repository = hub.repositories.get(asked['repo']) if asked else None
        if len(hub.requests) > LIMIT or (repository is not None and repository.broken):
            self.close_connection = True
        elif repository is None:
            # the Hub tells nobody what exists: without a token it asks for one
            self._refuse('RepoNotFound', 'Repository not found', 404 if 'Authorization' in self.headers else 401)
        else:
            self._answer(asked, repository)

    do_GET = do_HEAD

    def _answer(self, asked: re.Match, repository: Repository) -> None:
        commit = repository.commit(unquote(asked['revision'] or 'main'))
        if asked.re is _RESOLVE and repository.gated:
            return self._refuse('GatedRepo', 'Access is restricted', 403 if 'Authorization' in self.headers else 401)
        if commit is None:
            return self._refuse('RevisionNotFound', 'Invalid rev id', 404)
        files = repository.files(commit)
        if asked.re is _RESOLVE:
            name = unquote(asked['file'])
            if name not in files:
                return self._refuse('EntryNotFound', 'Entry not found', 404, {'X-Repo-Commit': commit})
            return self._resolve(asked['repo'], name, files[name].read_bytes(), commit)
        if asked.re is _TREE:
            answer = [
                {'type': 'file', 'path': name, 'size': path.stat().st_size, 'oid': _sha(path.read_bytes())[:40]}
                for name, path in files.items()
            ]
        else:
            answer = {
                'id': asked['repo'], 'modelId': asked['repo'], 'sha': commit, 'private': False, 'disabled': False,
                'gated': 'manual' if repository.gated else False, 'downloads': 0, 'likes': 0, 'tags': ['timm'],
                'siblings': [{'rfilename': name} for name in files],
            }
        self._send(200, {'Content-Type': 'application/json'}, json.dumps(answer).encode())

    def _resolve(self, repo_id: str, name: str, content: bytes, commit: str) -> None:
        hub = self.server.hub
        fault = next(hub.faults.get((self.command, repo_id, name), iter(())), None)
        if isinstance(fault, int):
            return self._refuse('', '', fault)
        if fault == 'stall':
            return self._say_no_more()
        headers = {
            'ETag': f'"{_etag(name, content[1:] if fault == "etag" else content)}"', 'X-Repo-Commit': commit,
            'Accept-Ranges': 'bytes', 'Content-Type': 'application/octet-stream',
        }
        if fault == 'short':
            content = content[:len(content) // 2]
        if fault == 'corrupt':
            content = content[:-1] + bytes([content[-1] ^ 255])
        self._send_file(headers, content, fault)

    def _send_file(self, headers: dict[str, str], content: bytes, fault: str | None) -> None:
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if asked is None:
            return self._send(200, headers, content, fault)
        self.server.hub.ranges.append(asked[0])
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return self._send(416, {**headers, 'Content-Range': f'bytes */{len(content)}'}, b'')
        headers['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
        self._send(206, headers, content[first:last + 1], fault)

    def _refuse(self, code: str, message: str, status: int, headers: dict[str, str] | None = None) -> None:
        headers = {
            'X-Error-Code': code, 'X-Error-Message': message,
            'X-Request-Id': 'Root=1-' + '0123456789abcdef' * 2 + ';' + '01234567-89ab' * 3, **(headers or {}),
        }
        self._send(status, headers, json.dumps({'error': message}).encode())

    def _send(self, status: int, headers: dict[str, str], content: bytes, fault: str | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        self.wfile.write(content[:len(content) // 2] if fault in ('drop', 'freeze') else content)
        if fault == 'freeze':
            self._say_no_more()
        self.close_connection |= fault == 'drop'

    def _say_no_more(self) -> None:
        self.server.hub.stopped.wait(LIFETIME)
        self.close_connection = True

    def log_message(self, *args) -> None:
        """Say nothing: `HubServer.requests` is the log."""


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _etag(name: str, content: bytes) -> str:
    """What the Hub gives large files, and those that git keeps itself."""
    if name.endswith(('.safetensors', '.bin')):
        return _sha(content)
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
