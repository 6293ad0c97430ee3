"""Each command that loads weights prints their licence in one line, and its output files state the licence."""

import json

import jax
import numpy as np
import pytest
from conftest import FINE_TUNING, ROOT
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.numpy import load_file, save_file

import eval as eval_command
from convnext_jax import __main__ as package_command
from convnext_jax import create_model, save_pretrained
from convnext_jax.interop import ImageProcessor, Licence
from convnext_jax.models import get_parameters, with_parameters
from convnext_jax.training.weights import read_weights
from tests.reference import draw_parameters

LINE = 'licence of the weights: cc-by-nc-4.0'
PREFIX = "the prefix 'module.' of the names in the file is ignored"
CARD = {'license': 'cc-by-nc-4.0'}


@pytest.fixture
def weights(small_models, tmp_path):
    """A folder as the hub has it: weights that must not be used commercially."""
    options = {'num_classes': 10, 'in_channels': 1, 'patch_size': 2}
    model = jax.eval_shape(lambda key: create_model('convnextv2_atto', key=key, **options), jax.random.key(0))
    model = with_parameters(model, draw_parameters({name: x.shape for name, x in get_parameters(model).items()}))
    processor = ImageProcessor(size=32, crop_pct=1.0, mean=(0.5,), std=(0.5,))
    names = (ROOT / 'convnext_jax/data/fashion_mnist_mini/1.0.0/label.labels.txt').read_text().splitlines()
    licence = Licence('cc-by-nc-4.0')
    save_pretrained(model, tmp_path / 'hub', processor=processor, class_names=names, licence=licence)
    return tmp_path / 'hub'


@pytest.mark.slow
def test_convert_export_and_predict_say_the_licence_and_what_they_ignored(weights, tmp_path, capsys):
    """A colleague who gets the folder would not know the licence, and the user would not know what was ignored."""
    file = weights / 'model.safetensors'
    save_file({f'module.{name}': x for name, x in load_file(file).items()}, file)
    for command in ('convert', 'export'):
        package_command.main(['convnext_jax', command, str(weights), str(tmp_path / command)])
        assert capsys.readouterr().err == f'{PREFIX}\n{LINE} (README.md)\n'
        assert metadata_load(tmp_path / command / 'README.md') == CARD
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / 'photo.png')
    package_command.main(['convnext_jax', 'predict', str(tmp_path / 'photo.png'), f'--weights={weights}', '--json'])
    out, err = capsys.readouterr()
    assert err.splitlines()[1:] == [f'{LINE} (README.md)']
    assert json.loads(out)['file'] == str(tmp_path / 'photo.png')


def test_eval_says_the_licence(weights, one_device, capsys):
    data = ('--config=configs/fashion_mnist.py', '--config.data.eval_split=test[:8]', '--config.batch_size=8')
    eval_command.main(['eval.py', *data, f'--weights={weights}'])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f'{LINE} (README.md)'
    assert json.loads(last)['images'] == 8


def test_a_run_says_the_licence_and_its_weights_keep_it(weights, train_here, tmp_path, capsys):
    """Fine-tuned weights are derived from the original weights, so their licence applies, also after a run resumes."""
    said = f'{LINE} (README.md of {weights})'
    start = (f'--config.init.weights={weights}', *FINE_TUNING)
    assert said in train_here(tmp_path / 'run', *start, '--config.steps=6', '--config.optimizer.warmup_steps=2')
    train_here(tmp_path / 'run', *start, '--config.steps=7', '--config.optimizer.warmup_steps=2')
    assert read_weights(str(tmp_path / 'run'), 'raw').licence.line == said
    package_command.main(['convnext_jax', 'convert', str(tmp_path / 'run'), str(tmp_path / 'out')])
    assert capsys.readouterr().err == f'{said}\n'
    assert metadata_load(tmp_path / 'out' / 'README.md') == CARD
