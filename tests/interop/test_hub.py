"""The Hugging Face hub, imitated by a server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from random_models import assert_equal, random_model

from convnext_jax import load_pretrained, save_pretrained
from convnext_jax.errors import UserError

COMMIT = '0' * 40


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub for the repositories someone/{good,old,gated}; `files` are the files of the first."""

    files: dict[str, bytes]

    def do_GET(self):
        path = self.path.split('?')[0]
        if '/someone/old' in path:  # renamed
            self.answer(307, {'Location': self.path.replace('/someone/old', '/someone/good')})
        elif '/someone/gated' in path:
            self.answer(403, {'X-Error-Code': 'GatedRepo', 'X-Error-Message': 'Access to model is restricted'})
        elif not path.startswith(('/api/models/someone/good', '/someone/good')):
            self.answer(401, {'X-Error-Code': 'RepoNotFound', 'X-Error-Message': 'Repository not found'})
        elif 'nowhere' in path:
            self.answer(404, {'X-Error-Code': 'RevisionNotFound', 'X-Error-Message': 'Invalid rev id'})
        elif path.startswith('/api/') and '/tree/' in path:
            files = [
                {'type': 'file', 'path': name, 'size': len(content), 'oid': COMMIT}
                for name, content in self.files.items()
            ]
            self.answer(200, {}, json.dumps(files).encode())
        elif path.startswith('/api/'):
            files = [{'rfilename': name} for name in self.files]
            self.answer(200, {}, json.dumps({'id': 'someone/good', 'sha': COMMIT, 'siblings': files}).encode())
        else:
            content = self.files[path.rsplit('/', 1)[1]]
            self.answer(200, {'ETag': f'"{hash(path)}"', 'X-Repo-Commit': COMMIT}, content)

    do_HEAD = do_GET  # noqa: N815 - the name that the server calls

    def answer(self, status, headers, content=b''):
        self.send_response(status)
        for name, value in (headers | {'Content-Length': str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def model():
    return random_model()


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """Starts the server and an empty cache."""
    save_pretrained(model, tmp_path / 'out')
    handler = type(
        'Handler', (Hub,), {'files': {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}}
    )
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', address)
    monkeypatch.setattr(
        'huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE', address + '/{repo_id}/resolve/{revision}/{filename}'
    )
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('name', ['someone/good', 'someone/old', 'hf_hub:someone/good'])
def test_a_repository_is_downloaded_also_by_its_old_name(hub, model, name):
    """Weights of the hub could not be used, or not after their repository was renamed."""
    assert_equal(load_pretrained(name), model)


@pytest.mark.parametrize(
    ('name', 'revision', 'match'),
    [
        (
            'someone/gated',
            None,
            'someone/gated is gated: accept its terms at https://huggingface.co/someone/gated, then',
        ),
        (
            'someone/missing',
            None,
            'someone/missing is neither a local path nor a repository on the hub; if it is private',
        ),
        ('someone/good', 'nowhere', 'someone/good on the hub has no revision nowhere$'),
    ],
)
def test_what_the_hub_does_not_provide_is_one_line_with_a_remedy(hub, name, revision, match):
    """Users would not know whether to log in, to accept a licence, or to correct the name."""
    with pytest.raises(UserError, match=match) as refused:
        load_pretrained(name, revision=revision)
    assert '\n' not in str(refused.value)


def test_the_cache_is_used_offline(hub, model, monkeypatch):
    """Machines without a network could not use weights that were downloaded before."""
    load_pretrained('someone/good')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert_equal(load_pretrained('someone/good'), model)
    with pytest.raises(UserError, match='someone/other is not a local path, and the hub cannot be reached'):
        load_pretrained('someone/other')
