"""Files are read as data, and in one line refused: pickles with code, lying headers, half folders."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from random_models import assert_equal, random_model, state_dict

from convnext_jax import load_pretrained, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop.layouts import to_layout
from convnext_jax.models import get_parameters

torch = pytest.importorskip('torch', reason='torch is a development requirement')

NAMES = ('cat', 'dog', 'emu')


def test_half_precision_files_load_exactly(tmp_path):
    from safetensors.torch import save_file

    for dtype in (torch.bfloat16, torch.float16):
        halves = {name: x.to(dtype) for name, x in state_dict(random_model(), 'timm').items()}
        save_file(halves, tmp_path / 'model.safetensors')
        loaded = load_pretrained(tmp_path / 'model.safetensors')
        ours = to_layout(jax.device_get(get_parameters(loaded)), loaded.variant, 'timm')
        for name, x in halves.items():
            np.testing.assert_array_equal(ours[name], x.float().numpy())


@pytest.mark.parametrize(
    'tensor',
    [
        torch.zeros(1, dtype=torch.half).expand(10**13),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device='meta'),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.float8_e4m3fn),
    ],
    ids=['stride 0', 'sparse', 'meta', 'int64', 'float8'],
)
def test_tensors_that_are_no_weights_are_refused_and_take_no_memory(tmp_path, tensor):
    torch.save(state_dict(random_model()) | {'norm.bias': tensor}, tmp_path / 'model.pth')
    with pytest.raises(UserError, match='no plain float weights: norm.bias'):
        load_pretrained(tmp_path / 'model.pth')


def test_parameters_with_gradients_load(tmp_path):
    model = random_model()
    torch.save({name: torch.nn.Parameter(x) for name, x in state_dict(model).items()}, tmp_path / 'model.pth')
    assert_equal(load_pretrained(tmp_path / 'model.pth'), model)


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path('hostile-code-ran'),))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': state_dict(random_model()), 'args': Hostile()}, tmp_path / 'model.pth')
    with pytest.raises(UserError, match='cannot be read as weights alone'):
        load_pretrained(tmp_path / 'model.pth')
    assert not (tmp_path / 'hostile-code-ran').exists()


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, 'little') + text


STEM = {'dtype': 'F32', 'shape': [96, 3, 4, 4], 'data_offsets': [0, 18432]}
HOSTILE = {
    'empty': b'',
    'a header longer than the file': (10**12).to_bytes(8, 'little') + b'{}',
    'a claim of 10 GB': header(**{'stem.0.weight': STEM | {'shape': [2_500_000_000], 'data_offsets': [0, 10**10]}}),
    'a shape that is not its bytes': header(**{'stem.0.weight': STEM | {'shape': [96, 3, 4, 40]}}) + bytes(18432),
    'cut short': header(**{'stem.0.weight': STEM}) + bytes(100),
    'no JSON': (4).to_bytes(8, 'little') + b'\xff\xfe\x00\x01',
}


@pytest.mark.parametrize('content', HOSTILE.values(), ids=HOSTILE.keys())
def test_broken_and_hostile_safetensors_are_one_line(tmp_path, content):
    (tmp_path / 'model.safetensors').write_bytes(content)
    with pytest.raises(UserError, match='is no whole safetensors file'):
        load_pretrained(tmp_path / 'model.safetensors')


@pytest.mark.parametrize(
    ('name', 'content', 'match'),
    [
        (
            'model.safetensors.index.json',
            '{"weight_map": {"a": "../secret.safetensors"}}',
            'no safetensors of its folder',
        ),
        ('model.safetensors.index.json', '{"weight_map": {"a": "/etc/passwd"}}', 'no safetensors of its folder'),
        ('model.safetensors.index.json', '{"weight_map": 3}', 'has no weight_map'),
        ('model.safetensors.index.json', '{"weight_map": {"a": "gone.safetensors"}}', 'there is no file'),
        ('model.safetensors.index.json', '{', 'is damaged'),
        ('pytorch_model.bin', 'PK', 'cannot be read as weights alone'),
        ('notes.txt', '', 'holds no weights: none of model.safetensors'),
    ],
)
def test_broken_folders_are_one_line(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path)


def test_where_there_is_nothing_the_line_says_so(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='is no file or folder, and no hub id'):
        load_pretrained(tmp_path / 'nowhere' / 'at' / 'all')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(UserError, match='the hub cannot be reached for it'):
        load_pretrained('facebook/convnext-tiny-224')


def test_a_hub_id_is_read_from_the_cache(tmp_path, monkeypatch):
    """Machines without a network work from what was downloaded before."""
    model = random_model()
    save_pretrained(model, tmp_path / 'out')
    repository = tmp_path / 'cache' / 'models--someone--convnext'
    snapshot = repository / 'snapshots' / ('0' * 40)
    snapshot.parent.mkdir(parents=True)
    (tmp_path / 'out').rename(snapshot)
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text('0' * 40)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert_equal(load_pretrained('someone/convnext'), model)


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path):
    (tmp_path / 'precious').write_text('')
    with pytest.raises(UserError, match='is not empty'):
        save_pretrained(random_model(), tmp_path)


@pytest.mark.parametrize('change', ['cut', 'removed', 'other shape', 'other type'])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, change):
    """A download that goes on beside the reading, or a folder that is saved over."""
    from safetensors.numpy import load_file, save_file

    from convnext_jax.interop import pretrained

    save_pretrained(random_model(), tmp_path / 'out')
    file = tmp_path / 'out' / 'model.safetensors'
    tensors, content = load_file(file), file.read_bytes()
    bias = 'convnextv2.encoder.stages.0.layers.0.dwconv.bias'
    read = pretrained.from_layout

    def change_then_read(*arguments):
        if change == 'cut':
            file.write_bytes(content[: len(content) // 2])
        elif change == 'removed':
            file.unlink()
        else:
            other = tensors[bias][:1] if change == 'other shape' else tensors[bias].astype(np.int32)
            save_file(tensors | {bias: other}, file)
        return read(*arguments)

    monkeypatch.setattr(pretrained, 'from_layout', change_then_read)
    with pytest.raises(UserError, match='was changed while it was read'):
        load_pretrained(tmp_path / 'out')


def test_saving_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    """A folder with weights and no config would be refused as not empty the next time."""
    from convnext_jax.interop import files

    model = random_model()
    monkeypatch.setattr(files, 'save_file', lambda *_, **__: (_ for _ in ()).throw(OSError(28, 'No space left')))
    with pytest.raises(UserError, match='out cannot be written: .*No space left'):
        save_pretrained(model, tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    for names in (np.arange(3), (b'a', b'b', b'c'), 'abc', ('a', 'a', 'b')):
        with pytest.raises(UserError, match='class names for 3 classes'):
            save_pretrained(model, tmp_path / 'out', class_names=names)
    assert list(tmp_path.iterdir()) == []
    save_pretrained(model, tmp_path / 'out', class_names=NAMES)


def test_a_file_of_thousands_of_tensors_is_refused_at_once(tmp_path):
    from safetensors.numpy import save_file

    tensors = {f'x{i}': np.zeros(0, np.float32) for i in range(4000)} | {'a.kernel': np.zeros((1, 1), np.float32)}
    save_file(tensors, tmp_path / 'many.safetensors')
    with pytest.raises(UserError, match='holds 4001 tensors: no ConvNeXt has so many'):
        load_pretrained(tmp_path / 'many.safetensors')


def test_a_tensor_in_two_files_of_a_folder_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    save_pretrained(random_model(), tmp_path / 'out')
    file = tmp_path / 'out' / 'model.safetensors'
    tensors = load_file(file)
    save_file(tensors, file.with_name('a.safetensors'))
    save_file({'classifier.bias': tensors['classifier.bias'] + 1}, file.with_name('b.safetensors'))
    file.unlink()
    index = {'weight_map': dict.fromkeys(tensors, 'a.safetensors')}
    file.with_name('model.safetensors.index.json').write_text(json.dumps(index))
    assert_equal(load_pretrained(tmp_path / 'out'), random_model())  # what no index names is not read
    index['weight_map']['classifier.weight'] = 'b.safetensors'
    file.with_name('model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match='and its files differ in classifier.bias, classifier.weight'):
        load_pretrained(tmp_path / 'out')
