"""Files are read as data, and in one line refused: pickles with code, lying headers, half folders."""

import argparse
import json
import pickle
import types
from pathlib import Path, PureWindowsPath

import jax
import numpy as np
import pytest
from random_models import assert_equal, random_model, state_dict

from convnext_jax import load_pretrained, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop.files import write_folder
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
    with pytest.raises(UserError, match='not plain float weights: norm.bias'):
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
    with pytest.raises(UserError, match='needs the code of .*, and no code of a file is run: save the weights alone'):
        load_pretrained(tmp_path / 'model.pth')
    assert not (tmp_path / 'hostile-code-ran').exists()


class Metric:
    """Of a training program that is not installed here."""


def test_what_training_programs_keep_beside_the_weights_does_not_hinder(tmp_path):
    """The original repositories and timm write their arguments into each checkpoint."""
    model = random_model()
    arguments = argparse.Namespace(
        lr=4e-3, output=Path('runs') / 'x', device=torch.device('cuda:0'), dtype=torch.bfloat16, betas=(0.9, 0.999)
    )
    beside = {
        'args': arguments,
        'best': np.float64(81.25),
        'random': np.random.RandomState(0).get_state(),
        'more': types.SimpleNamespace(when=argparse.Namespace(epoch=3)),
        'epoch': 9,
        'optimizer': {'state': {0: {'exp_avg': torch.zeros(3)}}, 'param_groups': [{'lr': 1e-3}]},
    }
    torch.save({'model': state_dict(model)} | beside, tmp_path / 'checkpoint-9.pth')
    assert_equal(load_pretrained(tmp_path / 'checkpoint-9.pth'), model)
    torch.save({'model': state_dict(model), 'metric': Metric()}, tmp_path / 'metric.pth')
    with pytest.raises(UserError, match=r'needs the code of test_files.Metric, .* save the weights alone, torch.save'):
        load_pretrained(tmp_path / 'metric.pth')


def test_a_path_of_windows_does_not_hinder_on_linux(tmp_path, monkeypatch):
    """Python refuses to make such a path here; nothing needs it."""

    class WindowsPath(PureWindowsPath):
        pass

    WindowsPath.__module__, WindowsPath.__qualname__ = 'pathlib', 'WindowsPath'
    monkeypatch.setattr('pathlib.WindowsPath', WindowsPath)
    content = {'model': state_dict(random_model()), 'args': argparse.Namespace(output=WindowsPath('C:/runs'))}
    torch.save(content, tmp_path / 'model.pth')
    monkeypatch.undo()
    assert_equal(load_pretrained(tmp_path / 'model.pth'), random_model())


@pytest.mark.parametrize(
    'name', ['model.safetensors', 'model.bin', 'last.ckpt', 'model_best.pth.tar', 'MODEL.PTH', 'x.pkl', 'checkpoint']
)
def test_the_content_and_not_the_name_tells_what_a_file_is(tmp_path, name):
    from safetensors.torch import save_file

    model, file = random_model(), tmp_path / name
    save_file(state_dict(model), file)
    assert_equal(load_pretrained(file), model)
    if name != 'model.safetensors':
        for zipped in (True, False):
            torch.save({'model': state_dict(model)}, file, _use_new_zipfile_serialization=zipped)
            assert_equal(load_pretrained(file), model)
        file.write_text('<html>404</html>')
        with pytest.raises(UserError, match='is neither a safetensors file nor a PyTorch file'):
            load_pretrained(file)


def test_a_pickle_that_torch_did_not_write_is_one_line(tmp_path):
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps({'stem.0.weight': np.zeros((96, 3, 4, 4))}))
    with pytest.raises(UserError, match='x.pkl cannot be read as weights alone: Unsupported operand 149') as refused:
        load_pretrained(tmp_path / 'x.pkl')
    assert str(refused.value).isprintable()


@pytest.mark.parametrize('layout', ['huggingface', 'timm', 'original'])
@pytest.mark.parametrize('wrapper', ['module.', '_orig_mod.', 'module._orig_mod.', 'model.', 'net.backbone.'])
def test_names_of_wrapped_models_load(tmp_path, layout, wrapper):
    """DataParallel, torch.compile and Lightning wrap a model, and its names say so."""
    model = random_model()
    tensors = {wrapper + name: x for name, x in state_dict(model, layout).items()}
    counters = {'n_averaged': torch.tensor(7), f'{wrapper}bn.num_batches_tracked': torch.tensor(3)}
    torch.save({'state_dict': tensors | counters}, tmp_path / 'last.ckpt')
    assert_equal(load_pretrained(tmp_path / 'last.ckpt'), model)


def test_a_head_beside_the_wrapped_trunk_is_found(tmp_path):
    """Hugging Face's classifier is outside of `convnext.`, and other people's often beside their backbone."""
    model = random_model()
    tensors = state_dict(model)
    names = {name: name if name.startswith('head.') else f'backbone.{name}' for name in tensors}
    torch.save({f'model.{names[name]}': x for name, x in tensors.items()}, tmp_path / 'model.pth')
    assert_equal(load_pretrained(tmp_path / 'model.pth'), model)
    torch.save({names[name]: x for name, x in tensors.items()} | {'loss.weight': torch.ones(3)}, tmp_path / 'loss.pth')
    with pytest.raises(UserError, match='do not fit the model: loss.weight is unexpected$'):
        load_pretrained(tmp_path / 'loss.pth')


def test_several_models_in_one_state_dict_are_told_apart(tmp_path):
    """Which of them is meant nobody can guess, and a mixture of both would be silent nonsense."""
    tensors = state_dict(random_model())
    both = {f'{who}.backbone.{name}': x for who in ('student', 'teacher') for name, x in tensors.items()}
    torch.save({'state_dict': both}, tmp_path / 'last.ckpt')
    with pytest.raises(UserError, match="several models, .* begin with 'student.backbone.', 'teacher.backbone.'"):
        load_pretrained(tmp_path / 'last.ckpt')
    torch.save({f'model.{name}': x for name, x in tensors.items()} | {'norm.bias': torch.ones(320)}, tmp_path / 'x.pth')
    with pytest.raises(UserError, match='holds norm.bias twice, once below model'):
        load_pretrained(tmp_path / 'x.pth')


def test_entries_of_training_programs(tmp_path):
    """timm says state_dict and state_dict_ema where the original says model and model_ema; DINO has two networks."""
    raw, average = random_model(), random_model(layer_norm_eps=1e-6)
    average.head.bias[...] += 1
    pair = {'raw': state_dict(raw), 'average': state_dict(average)}
    file = tmp_path / 'last.pth.tar'
    for names in (('model', 'model_ema'), ('state_dict', 'state_dict_ema')):
        torch.save(dict(zip(names, pair.values(), strict=True)) | {'epoch': 3, 'arch': 'convnext'}, file)
        assert_equal(load_pretrained(file), raw)
        assert_equal(load_pretrained(file, entry='ema'), average)
        assert_equal(load_pretrained(file, entry=names[1]), average)
    torch.save({'network': pair['raw'], 'epoch': 3}, file)
    assert_equal(load_pretrained(file), raw)
    with pytest.raises(UserError, match='holds no model_ema or state_dict_ema: its state dicts are network'):
        load_pretrained(file, entry='ema')
    torch.save({'student': pair['raw'], 'teacher': pair['average'], 'epoch': 3}, file)
    with pytest.raises(UserError, match=r"the state dicts student, teacher: choose one, .*entry='student'\)"):
        load_pretrained(file)
    assert_equal(load_pretrained(file, entry='teacher'), average)
    torch.save({'optimizer': {'lr': 0.1}, 'epoch': 3}, file)
    with pytest.raises(UserError, match='holds no state dict: its entries are optimizer, epoch'):
        load_pretrained(file)
    torch.save([1, 2], file)
    with pytest.raises(UserError, match='holds no state dict, but a list'):
        load_pretrained(file)


@pytest.mark.parametrize('name', ['model.safetensors', 'model.pth'])
def test_float64_weights_load_where_float32_holds_them(tmp_path, name):
    """Rounded in silence they would not be the weights that were trained."""
    from safetensors.torch import save_file

    model = random_model()
    tensors = {name: x.double() for name, x in state_dict(model).items()} | {'steps': torch.tensor(5)}
    save = save_file if name.endswith('.safetensors') else torch.save
    save(tensors, tmp_path / name)
    assert_equal(load_pretrained(tmp_path / name), model)
    tensors['norm.bias'] = tensors['norm.bias'] + 1e-12
    save(tensors, tmp_path / name)
    with pytest.raises(UserError, match='float64 values that float32 does not hold exactly, as in norm.bias'):
        load_pretrained(tmp_path / name)


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
    for names in (np.arange(3), (b'a', b'b', b'c'), 'abc', ('a', 'b')):
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


def test_an_empty_folder_stays_the_folder_that_it_is(tmp_path, monkeypatch):
    """`convert … .` put another folder in the place of the current one, and the shell saw an empty one."""
    folder = tmp_path / 'out'
    folder.mkdir()
    monkeypatch.chdir(folder)
    number = folder.stat().st_ino
    write_folder(Path('.'), {'x': np.zeros(2, np.float32)}, {'config.json': {}})
    assert folder.stat().st_ino == number
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
    assert [path.name for path in tmp_path.iterdir()] == ['out']
