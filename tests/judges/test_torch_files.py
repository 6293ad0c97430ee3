"""Reading of PyTorch files: weights, other objects beside them, and code, which is never run."""

import argparse
import json
import pickle
import types
from pathlib import Path, PureWindowsPath

import jax
import numpy as np
import pytest
import torch

import eval as eval_command
from convnext_jax import load_pretrained, save_pretrained
from convnext_jax.__main__ import main
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, read_pretrained
from tests.interop import random_models
from tests.interop.random_models import assert_equal, random_model

NAMES = ('cat', 'dog', 'emu')


def state_dict(model, layout: str = 'original') -> dict:
    return {name: torch.from_numpy(x) for name, x in random_models.state_dict(model, layout).items()}


def test_half_precision_files_load_exactly(tmp_path):
    """16-bit weights would be rounded or refused."""
    from safetensors.torch import save_file

    for dtype in (torch.bfloat16, torch.float16):
        halves = {name: x.to(dtype) for name, x in state_dict(random_model(), 'timm').items()}
        save_file(halves, tmp_path / 'model.safetensors')
        loaded = load_pretrained(tmp_path / 'model.safetensors')
        ours = random_models.state_dict(loaded, 'timm')
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
def test_tensors_that_are_not_weights_are_refused_and_take_no_memory(tmp_path, tensor):
    """A small file could claim terabytes of memory."""
    torch.save(state_dict(random_model()) | {'norm.bias': tensor}, tmp_path / 'model.pth')
    with pytest.raises(UserError, match='not plain float weights: norm.bias'):
        load_pretrained(tmp_path / 'model.pth')


def test_parameters_with_gradients_load(tmp_path):
    """Files with nn.Parameter objects could not be loaded."""
    model = random_model()
    torch.save({name: torch.nn.Parameter(x) for name, x in state_dict(model).items()}, tmp_path / 'model.pth')
    assert_equal(load_pretrained(tmp_path / 'model.pth'), model)


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path('hostile-code-ran'),))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    """A downloaded file could run any code."""
    monkeypatch.chdir(tmp_path)
    torch.save({'model': state_dict(random_model()), 'args': Hostile()}, tmp_path / 'model.pth')
    with pytest.raises(UserError, match='needs the code of .*, but code in files is never run: save only the weights'):
        load_pretrained(tmp_path / 'model.pth')
    assert not (tmp_path / 'hostile-code-ran').exists()


class Metric:
    """A class of a training program that is not installed."""


def test_objects_beside_the_weights_are_ignored(tmp_path):
    """Checkpoints of timm and the original repositories, which contain the arguments, could not be loaded."""
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
    with pytest.raises(
        UserError,
        match=r'needs the code of test_torch_files.Metric, .* save only the weights, with torch.save',
    ):
        load_pretrained(tmp_path / 'metric.pth')


def test_a_windows_path_beside_the_weights_is_ignored(tmp_path, monkeypatch):
    """Python cannot create such a path on Linux: checkpoints from Windows could not be loaded."""

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
def test_the_content_determines_the_format(tmp_path, name):
    """Files with other names could not be loaded."""
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


def test_a_pickle_that_torch_did_not_write_is_a_user_error(tmp_path):
    """The errors of torch have many lines."""
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps({'stem.0.weight': np.zeros((96, 3, 4, 4))}))
    with pytest.raises(
        UserError, match='x.pkl cannot be read without running code: Unsupported operand 149'
    ) as refused:
        load_pretrained(tmp_path / 'x.pkl')
    assert str(refused.value).isprintable()


@pytest.mark.parametrize('layout', ['huggingface', 'timm', 'original'])
@pytest.mark.parametrize('wrapper', ['module.', 'module._orig_mod.'])
def test_names_of_wrapped_models_load(tmp_path, layout, wrapper):
    """Files of models wrapped by DataParallel, torch.compile or Lightning could not be loaded."""
    model = random_model()
    tensors = {wrapper + name: x for name, x in state_dict(model, layout).items()}
    counters = {'n_averaged': torch.tensor(7), f'{wrapper}bn.num_batches_tracked': torch.tensor(3)}
    torch.save({'state_dict': tensors | counters}, tmp_path / 'last.ckpt')
    assert_equal(load_pretrained(tmp_path / 'last.ckpt'), model)


def test_entries_of_training_programs(tmp_path):
    """The entries of timm (state_dict), the original (model) or DINO (student, teacher) could not be selected."""
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
    with pytest.raises(UserError, match='does not contain model_ema or state_dict_ema: its state dicts are network'):
        load_pretrained(file, entry='ema')
    torch.save({'student': pair['raw'], 'teacher': pair['average'], 'epoch': 3}, file)
    with pytest.raises(UserError, match=r"the state dicts student, teacher: choose one, .*entry='student'\)"):
        load_pretrained(file)
    assert_equal(load_pretrained(file, entry='teacher'), average)
    torch.save({'optimizer': {'lr': 0.1}, 'epoch': 3}, file)
    with pytest.raises(UserError, match='does not contain a state dict: its entries are optimizer, epoch'):
        load_pretrained(file)
    torch.save([1, 2], file)
    with pytest.raises(UserError, match='does not contain a state dict, but a list'):
        load_pretrained(file)


@pytest.mark.parametrize('name', ['model.safetensors', 'model.pth'])
def test_float64_weights_load_if_float32_represents_them(tmp_path, name):
    """Weights would silently be rounded."""
    from safetensors.torch import save_file

    model = random_model()
    tensors = {name: x.double() for name, x in state_dict(model).items()} | {'steps': torch.tensor(5)}
    save = save_file if name.endswith('.safetensors') else torch.save
    save(tensors, tmp_path / name)
    assert_equal(load_pretrained(tmp_path / name), model)
    tensors['norm.bias'] = tensors['norm.bias'] + 1e-12
    save(tensors, tmp_path / name)
    with pytest.raises(UserError, match='float64 values that float32 does not represent exactly, as in norm.bias'):
        load_pretrained(tmp_path / name)


def test_original_files_contain_raw_and_average_weights(tmp_path):
    """The moving average of a published checkpoint could not be used."""
    raw, average = random_model(), random_model()
    average.head.bias[...] += 1
    torch.save({'model': state_dict(raw), 'model_ema': state_dict(average), 'epoch': 7}, tmp_path / 'both.pth')
    assert_equal(load_pretrained(tmp_path / 'both.pth'), raw)
    assert_equal(load_pretrained(tmp_path / 'both.pth', entry='model_ema'), average)
    torch.save(state_dict(raw), tmp_path / 'bare.bin')
    assert_equal(load_pretrained(tmp_path / 'bare.bin'), raw)
    with pytest.raises(UserError, match="contains only one set of weights, and no entry 'model_ema'"):
        load_pretrained(tmp_path / 'bare.bin', entry='model_ema')


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto', 'convnext_tiny', 'convnext_isotropic_small'])
def test_the_original_layout_round_trip_is_bit_exact(tmp_path, name):
    """Weights would change when they are saved and loaded."""
    model = random_model(name)
    save_pretrained(model, tmp_path / 'out', layout='original', class_names=NAMES)
    assert_equal(load_pretrained(tmp_path / 'out' / 'model.pth'), model)
    loaded = read_pretrained(tmp_path / 'out')
    assert_equal(loaded.model, model)
    assert (loaded.layout, loaded.notes, loaded.newly_initialised) == ('original', [], ())


def test_options_that_the_original_layout_stores(tmp_path):
    """Patch size, channels and layer scale would be lost, or a lost problem type not be reported."""
    model = random_model('convnextv2_atto', patch_size=2, in_channels=1)
    grey = ImageProcessor(size=32, crop_pct=1.0, mean=(0.3,), std=(0.4,))
    save_pretrained(model, tmp_path / 'grey', layout='original', processor=grey)
    loaded = load_pretrained(tmp_path / 'grey')
    assert_equal(loaded, model)
    assert loaded.variant.patch_size == 2
    without = random_model('convnext_atto', layer_scale_init=0)
    save_pretrained(without, tmp_path / 'without', layout='original')
    assert_equal(load_pretrained(tmp_path / 'without'), without)
    kind = 'multi_label_classification'
    with pytest.warns(UserWarning, match=f'^the original layout does not store problem_type={kind}'):
        save_pretrained(model, tmp_path / 'labels', layout='original', problem_type=kind)


@pytest.mark.parametrize('wrapper', ['', 'module.'])
def test_an_fcmae_checkpoint_is_read(tmp_path, wrapper):
    """Encoders from the original's FCMAE pre-training could not be fine-tuned."""
    model = random_model()
    tensors = {wrapper + name: torch.from_numpy(x) for name, x in random_models.fcmae_state_dict(model).items()}
    torch.save({'model': tensors}, tmp_path / 'fcmae.pt')
    loaded = read_pretrained(tmp_path / 'fcmae.pt', num_classes=9, key=jax.random.key(0))
    assert_equal(loaded.model, model, but=loaded.newly_initialised)


def test_a_folder_with_an_incomplete_pytorch_file_is_a_user_error(tmp_path):
    """The errors of torch have many lines."""
    (tmp_path / 'pytorch_model.bin').write_text('PK')
    with pytest.raises(UserError, match='cannot be read without running code'):
        load_pretrained(tmp_path)


def test_the_command_converts_into_the_original_layout_and_evaluates_it(finished_run, tmp_path, capsys):
    """Runs could not be used with the scripts of the original repositories, nor their files be evaluated."""
    main(['convnext_jax', 'convert', str(finished_run), str(tmp_path / 'hf')])
    capsys.readouterr()
    main(['convnext_jax', 'convert', str(tmp_path / 'hf'), str(tmp_path / 'original'), '--layout=original'])
    line = f'holds the raw weights of {tmp_path / "hf"} (huggingface layout), in the original layout'
    assert line in capsys.readouterr().out
    config = ('--config=configs/fashion_mnist.py', '--config.data.eval_split=test[:40]', '--config.batch_size=16')
    results = []
    eval_command.main(['eval.py', f'--workdir={finished_run}'])
    results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    with pytest.warns(UserWarning, match='classes are matched by position'):  # the layout does not store names
        eval_command.main(['eval.py', *config, f'--weights={tmp_path / "original" / "model.pth"}'])
    results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    run, theirs = results
    assert (theirs['top1'], theirs['images'], theirs['params']) == (run['top1'], 40, 'raw')
    assert theirs['loss'] == pytest.approx(run['loss'], rel=1e-5)
