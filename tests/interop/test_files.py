"""Reading of weights files: formats, wrappers, damaged or hostile files. `tests/judges` has the PyTorch files."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from random_models import assert_equal, random_model, save, state_dict

from convnext_jax import load_pretrained, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop import read_pretrained
from convnext_jax.interop.files import write_folder
from convnext_jax.interop.layouts import to_layout
from convnext_jax.models import get_parameters

NAMES = ('cat', 'dog', 'emu')


def test_half_precision_files_load_exactly(tmp_path):
    """16-bit weights from the hub would be rounded or refused."""
    for dtype in (jax.numpy.bfloat16, np.float16):
        halves = {name: x.astype(dtype) for name, x in state_dict(random_model(), 'timm').items()}
        save(halves, tmp_path / 'model.safetensors')
        loaded = load_pretrained(tmp_path / 'model.safetensors')
        ours = to_layout(jax.device_get(get_parameters(loaded)), loaded.variant, 'timm')
        for name, x in halves.items():
            np.testing.assert_array_equal(ours[name], x.astype(np.float32))


@pytest.mark.parametrize('name', ['model.safetensors', 'model.bin', 'checkpoint'])
def test_the_content_determines_the_format(tmp_path, name):
    """Files with other names could not be loaded."""
    model, file = random_model(), tmp_path / name
    save(state_dict(model), file)
    assert_equal(load_pretrained(file), model)
    if name != 'model.safetensors':
        file.write_text('<html>404</html>')
        with pytest.raises(UserError, match='is neither a safetensors file nor a PyTorch file'):
            load_pretrained(file)


def test_the_error_for_a_pytorch_file_without_torch(tmp_path, monkeypatch):
    """torch is optional: users of old checkpoints would not know what to install."""
    monkeypatch.setitem(sys.modules, 'torch', None)
    (tmp_path / 'model.pth').write_bytes(b'PK\3\4 and more')
    with pytest.raises(UserError, match='model.pth is a PyTorch file: pip install torch to read it'):
        load_pretrained(tmp_path / 'model.pth')
    with pytest.raises(UserError, match='this layout is a PyTorch file: pip install torch to write it'):
        save_pretrained(random_model(), tmp_path / 'out', layout='original')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('layout', ['huggingface', 'timm', 'original', 'torchvision'])
@pytest.mark.parametrize('wrapper', ['module.', '_orig_mod.', 'module._orig_mod.', 'model.', 'net.backbone.'])
def test_names_of_wrapped_models_load(tmp_path, layout, wrapper):
    """Files of models wrapped by DataParallel, torch.compile or Lightning could not be loaded."""
    model = random_model('convnext_atto' if layout == 'torchvision' else 'convnextv2_atto')
    tensors = {wrapper + name: x for name, x in state_dict(model, layout).items()}
    counters = {'n_averaged': np.array(7), f'{wrapper}bn.num_batches_tracked': np.array(3)}
    save(tensors | counters, tmp_path / 'last.safetensors')
    loaded = read_pretrained(tmp_path / 'last.safetensors')
    assert_equal(loaded.model, model)
    assert loaded.notes == [f"the prefix '{wrapper}' of the names in the file is ignored"]


def test_a_head_beside_the_wrapped_trunk_is_found(tmp_path):
    """The head would be missing if it does not have the prefix of the trunk, as in Hugging Face's classifiers."""
    model, file = random_model(), tmp_path / 'model.safetensors'
    tensors = state_dict(model)
    names = {name: name if name.startswith('head.') else f'backbone.{name}' for name in tensors}
    save({f'model.{names[name]}': x for name, x in tensors.items()}, file)
    assert_equal(load_pretrained(file), model)
    save({names[name]: x for name, x in tensors.items()} | {'loss.weight': np.ones(3, np.float32)}, file)
    with pytest.raises(UserError, match='do not match the model: loss.weight is unexpected$'):
        load_pretrained(file)


def test_several_models_in_one_state_dict_are_an_error(tmp_path):
    """The model would be a mixture of both."""
    tensors, file = state_dict(random_model()), tmp_path / 'last.safetensors'
    save({f'{model}.backbone.{name}': x for model in ('student', 'teacher') for name, x in tensors.items()}, file)
    with pytest.raises(UserError, match="several models with the prefixes 'student.backbone.', 'teacher.backbone.'"):
        load_pretrained(file)
    save({f'model.{name}': x for name, x in tensors.items()} | {'norm.bias': np.ones(320, np.float32)}, file)
    with pytest.raises(UserError, match='contains norm.bias twice, once with the prefix model'):
        load_pretrained(file)


def test_float64_weights_load_if_float32_represents_them(tmp_path):
    """Weights would silently be rounded."""
    model, file = random_model(), tmp_path / 'model.safetensors'
    tensors = {name: x.astype(np.float64) for name, x in state_dict(model).items()} | {'steps': np.array(5)}
    save(tensors, file)
    assert_equal(load_pretrained(file), model)
    tensors['norm.bias'] = tensors['norm.bias'] + 1e-12
    save(tensors, file)
    with pytest.raises(UserError, match='float64 values that float32 does not represent exactly, as in norm.bias'):
        load_pretrained(file)


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, 'little') + text


STEM = {'dtype': 'F32', 'shape': [96, 3, 4, 4], 'data_offsets': [0, 18432]}
HOSTILE = {
    'empty': b'',
    'a header longer than the file': (10**12).to_bytes(8, 'little') + b'{}',
    'a claim of 10 GB': header(**{'stem.0.weight': STEM | {'shape': [2_500_000_000], 'data_offsets': [0, 10**10]}}),
    'a shape that does not match the bytes': header(**{'stem.0.weight': STEM | {'shape': [96, 3, 4, 40]}})
    + bytes(18432),
    'truncated': header(**{'stem.0.weight': STEM}) + bytes(100),
    'not JSON': (4).to_bytes(8, 'little') + b'\xff\xfe\x00\x01',
}


@pytest.mark.parametrize('content', HOSTILE.values(), ids=HOSTILE.keys())
def test_damaged_and_hostile_safetensors_are_user_errors(tmp_path, content):
    """A damaged file would cause a traceback or fill the memory."""
    (tmp_path / 'model.safetensors').write_bytes(content)
    with pytest.raises(UserError, match='is not a complete safetensors file'):
        load_pretrained(tmp_path / 'model.safetensors')


@pytest.mark.parametrize(
    ('name', 'content', 'match'),
    [
        (
            'model.safetensors.index.json',
            '{"weight_map": {"a": "../secret.safetensors"}}',
            'not safetensors files in its folder',
        ),
        ('model.safetensors.index.json', '{"weight_map": {"a": "/etc/passwd"}}', 'not safetensors files in its folder'),
        ('model.safetensors.index.json', '{"weight_map": 3}', 'has no weight_map'),
        ('model.safetensors.index.json', '{"weight_map": {"a": "gone.safetensors"}}', 'there is no file'),
        ('model.safetensors.index.json', '{', 'is damaged'),
        ('notes.txt', '', 'contains none of model.safetensors'),
    ],
)
def test_damaged_folders_are_user_errors(tmp_path, name, content, match):
    """A damaged index would cause a traceback, or read files outside the folder."""
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path)


def test_missing_files_and_hub_ids_are_user_errors(tmp_path, monkeypatch):
    """The errors of huggingface_hub fill a screen."""
    with pytest.raises(UserError, match='is not a file, a folder or a hub id'):
        load_pretrained(tmp_path / 'nowhere' / 'at' / 'all')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(UserError, match='the hub cannot be reached'):
        load_pretrained('facebook/convnext-tiny-224')


def test_a_hub_id_is_read_from_the_cache(tmp_path, monkeypatch):
    """Machines without a network could not use weights that were downloaded before."""
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


def test_a_folder_that_is_not_empty_is_not_overwritten(tmp_path):
    """Files of the user would be lost."""
    (tmp_path / 'precious').write_text('')
    with pytest.raises(UserError, match='is not empty'):
        save_pretrained(random_model(), tmp_path)


@pytest.mark.parametrize('change', ['truncated', 'removed', 'other shape', 'other dtype'])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, change):
    """During a download, or while the folder is overwritten, the model would be a mixture."""
    from safetensors.numpy import load_file, save_file

    from convnext_jax.interop import pretrained

    save_pretrained(random_model(), tmp_path / 'out')
    file = tmp_path / 'out' / 'model.safetensors'
    tensors, content = load_file(file), file.read_bytes()
    bias = 'convnextv2.encoder.stages.0.layers.0.dwconv.bias'
    read = pretrained.from_layout

    def change_then_read(*arguments):
        if change == 'truncated':
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


def test_a_failed_save_leaves_no_folder(tmp_path, monkeypatch):
    """An incomplete folder would be refused as not empty the next time."""
    from convnext_jax.interop import files

    model = random_model()
    monkeypatch.setattr(files, 'save_file', lambda *_, **__: (_ for _ in ()).throw(OSError(28, 'No space left')))
    with pytest.raises(UserError, match='out cannot be written: .*No space left'):
        save_pretrained(model, tmp_path / 'out')
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    for names in (np.arange(3), (b'a', b'b', b'c'), 'abc', ('a', 'b')):
        with pytest.raises(UserError, match='class names for 3 classes'):
            save_pretrained(model, tmp_path / 'out', class_names=names)
    assert list(tmp_path.iterdir()) == []
    save_pretrained(model, tmp_path / 'out', class_names=NAMES)


def test_a_file_with_thousands_of_tensors_is_refused(tmp_path):
    """The file of a large language model would take minutes to be refused."""
    from safetensors.numpy import save_file

    tensors = {f'x{i}': np.zeros(0, np.float32) for i in range(4000)} | {'a.kernel': np.zeros((1, 1), np.float32)}
    save_file(tensors, tmp_path / 'many.safetensors')
    with pytest.raises(UserError, match='contains 4001 tensors, which is too many'):
        load_pretrained(tmp_path / 'many.safetensors')


def test_a_tensor_in_two_files_of_a_folder_is_refused(tmp_path):
    """One of two different tensors would be chosen at random."""
    from safetensors.numpy import load_file, save_file

    save_pretrained(random_model(), tmp_path / 'out')
    file = tmp_path / 'out' / 'model.safetensors'
    tensors = load_file(file)
    save_file(tensors, file.with_name('a.safetensors'))
    save_file({'classifier.bias': tensors['classifier.bias'] + 1}, file.with_name('b.safetensors'))
    file.unlink()
    index = {'weight_map': dict.fromkeys(tensors, 'a.safetensors')}
    file.with_name('model.safetensors.index.json').write_text(json.dumps(index))
    assert_equal(load_pretrained(tmp_path / 'out'), random_model())  # files that are not in the index are not read
    index['weight_map']['classifier.weight'] = 'b.safetensors'
    file.with_name('model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match='and its files differ in classifier.bias, classifier.weight'):
        load_pretrained(tmp_path / 'out')


def test_an_empty_folder_is_not_replaced(tmp_path, monkeypatch):
    """After `convert … .` the current folder of the shell would be a deleted, empty one."""
    folder = tmp_path / 'out'
    folder.mkdir()
    monkeypatch.chdir(folder)
    number = folder.stat().st_ino
    write_folder(Path('.'), {'x': np.zeros(2, np.float32)}, {'config.json': {}})
    assert folder.stat().st_ino == number
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
    assert [path.name for path in tmp_path.iterdir()] == ['out']
