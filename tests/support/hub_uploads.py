"""What the stand-in for the Hub answers to those who publish a model: create, preupload, LFS, commit."""
import base64
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

_COMMIT = re.compile(r'/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>preupload|commit)/main')
_BATCH = re.compile(r'/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch')
_OBJECT = re.compile(r'/lfs/(?P<oid>[0-9a-f]{64})')


class Uploads:
    """Mixin of the request handler; the server keeps what is on its way in `hub.objects`, by SHA-256."""

    def do_POST(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append(f'{self.command} {path}')
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        asked = _COMMIT.fullmatch(path) or _BATCH.fullmatch(path)
        if path == '/api/validate-yaml':  # open to all, as on the Hub
            self._reply({'errors': [], 'warnings': []})
        elif self.headers.get('Authorization') is None:
            self._refuse('', 'Invalid username or password', 401)
        elif hub.read_only:
            self._refuse('', 'Forbidden', 403)
        elif path == '/api/repos/create':
            wanted = json.loads(body)
            self._create(f'{wanted["organization"]}/{wanted["name"]}')
        elif asked is None or asked['repo'] not in hub.repositories:
            self._refuse('RepoNotFound', 'Repository not found', 404)
        elif asked.re is _BATCH:
            self._reply({'transfer': 'basic', 'objects': [
                {**item, 'actions': {'upload': {'href': f'{hub.url}/lfs/{item["oid"]}'}}}
                for item in json.loads(body)['objects']]})
        elif asked['what'] == 'preupload':
            self._reply({'files': [
                {'path': file['path'], 'shouldIgnore': False, 'oid': None, 'uploadMode':
                 'lfs' if file['path'].endswith(('.safetensors', '.png')) else 'regular'}
                for file in json.loads(body)['files']]})
        else:
            self._commit(asked['repo'], [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        hub, asked = self.server.hub, _OBJECT.fullmatch(urlsplit(self.path).path)
        content = self.rfile.read(int(self.headers['Content-Length']))
        if asked is None or hashlib.sha256(content).hexdigest() != asked['oid']:
            return self._refuse('', 'Content does not match its name', 400)
        hub.objects[asked['oid']] = content
        self._reply({})

    def _create(self, repo_id: str) -> None:
        answer = {'url': f'{self.server.hub.url}/{repo_id}', 'name': repo_id, 'id': repo_id}
        if repo_id in self.server.hub.repositories:
            return self._reply({'error': 'You already created this model repo', **answer}, 409)
        self.server.hub.add(repo_id, Path(tempfile.mkdtemp(dir=self.server.hub.scratch)))
        self._reply(answer)

    def _commit(self, repo_id: str, lines: list[dict]) -> None:
        hub, repository = self.server.hub, self.server.hub.repositories[repo_id]
        folder = Path(tempfile.mkdtemp(dir=hub.scratch))
        shutil.copytree(repository.folders[repository.commit('main')], folder, dirs_exist_ok=True)
        for line in lines:
            value = line['value']
            if line['key'] == 'file':
                (folder / value['path']).write_bytes(base64.b64decode(value['content']))
            elif line['key'] == 'lfsFile':
                (folder / value['path']).write_bytes(hub.objects.pop(value['oid']))
        commit = hub.add(repo_id, folder)
        self._reply({'commitUrl': f'{hub.url}/{repo_id}/commit/{commit}', 'commitOid': commit, 'success': True,
                     'hookOutput': ''})

    def _reply(self, answer: dict, status: int = 200) -> None:
        self._send(status, {'Content-Type': 'application/json'}, json.dumps(answer).encode())
