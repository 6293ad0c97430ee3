"""The Hugging Face hub, imitated by a server on this machine."""

import io
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import metadata_load
from random_models import assert_equal, random_model

from convnext_jax import load_pretrained, save_pretrained
from convnext_jax.__main__ import main
from convnext_jax.errors import UserError
from convnext_jax.interop import Licence

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


class Api:
    """Replaces `HfApi`, and records the calls."""

    calls: list

    def create_repo(self, repo_id, exist_ok):
        if repo_id.startswith('other/'):
            raise OSError('403 Forbidden\nYou need write access')
        self.calls.append(repo_id)
        return f'https://huggingface.co/{repo_id}'

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(sorted(path.name for path in folder_path.iterdir()))


@pytest.fixture
def convert(model, tmp_path, monkeypatch, capsys):
    """Runs `convert --push` with an answer to its question; returns the uploads and the output."""
    save_pretrained(model, tmp_path / 'out', class_names=['a', 'b', 'c'], licence=Licence('cc-by-nc-4.0'))

    def run(answer, hub_id='someone/mine'):
        api = type('RecordingApi', (Api,), {'calls': []})
        monkeypatch.setattr('huggingface_hub.HfApi', api)
        monkeypatch.setattr('sys.stdin', io.StringIO(answer))
        main(
            [
                'convnext_jax',
                'convert',
                str(tmp_path / 'out'),
                str(tmp_path / 'timm'),
                '--layout=timm',
                f'--push={hub_id}',
            ]
        )
        return api.calls, capsys.readouterr()

    return run


def test_a_converted_folder_is_uploaded_with_a_model_card(convert, tmp_path):
    """Weights could not be shared in one command, or without their licence and how to load them."""
    calls, shown = convert('y\n')
    assert calls == ['someone/mine', ['README.md', 'config.json', 'model.safetensors']]
    assert shown.out.endswith('uploaded to https://huggingface.co/someone/mine\n')
    card = (tmp_path / 'timm' / 'README.md').read_text()
    assert metadata_load(tmp_path / 'timm' / 'README.md') == {
        'license': 'cc-by-nc-4.0',
        'library_name': 'timm',
        'pipeline_tag': 'image-classification',
        'tags': ['convnext'],
    }
    assert 'convnextv2_atto with 3.4 million parameters, 3 classes' in card
    assert "timm.create_model('hf_hub:someone/mine', pretrained=True)" in card
    assert "transformers.AutoModelForImageClassification.from_pretrained('someone/mine')" in card
    assert str(tmp_path) not in card


def test_the_text_of_a_special_licence_is_asked_for(convert, tmp_path):
    """The licence of DINOv3 must accompany weights that are made from DINOv3's."""
    card = '---\nlicense: other\nlicense_name: dinov3-license\n---\n'
    (tmp_path / 'out' / 'README.md').write_text(card)
    _, shown = convert('n\n')
    assert f'this licence may require that you add its text as {tmp_path / "timm" / "LICENSE"}\n' in shown.err
    assert metadata_load(tmp_path / 'timm' / 'README.md')['license_name'] == 'dinov3-license'


@pytest.mark.parametrize('answer', ['n\n', '\n', ''])
def test_nothing_is_uploaded_without_a_yes(convert, answer):
    """A private model would become public by mistake, or in a script whose user cannot answer."""
    calls, shown = convert(answer)
    assert calls == []
    assert re.search(
        r'upload 3 files, 13\.\d MB, to the public repository https://huggingface.co/someone/mine\?', shown.err
    )
    assert shown.out.endswith('nothing was uploaded\n')


def test_a_refused_upload_is_one_line(convert, tmp_path):
    """Users would see a traceback, or learn of a wrong name after the conversion."""
    with pytest.raises(UserError, match='other/mine could not be uploaded: 403 Forbidden; check the name, and log in'):
        convert('y\n', 'other/mine')
    shutil.rmtree(tmp_path / 'timm')
    with pytest.raises(UserError, match='a repository on the hub is called ACCOUNT/NAME, not mine'):
        convert('y\n', 'mine')
    assert not (tmp_path / 'timm').exists()


def test_the_cache_is_used_offline(hub, model, monkeypatch):
    """Machines without a network could not use weights that were downloaded before."""
    load_pretrained('someone/good')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert_equal(load_pretrained('someone/good'), model)
    with pytest.raises(UserError, match='someone/other is not a local path, and the hub cannot be reached'):
        load_pretrained('someone/other')
