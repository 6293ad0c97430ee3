"""Export: the program runs without this package and gives equal logits."""

import json
import os
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from conftest import TIMEOUT
from safetensors.numpy import load_file
from small import small_variants

from convnext_jax import ImageProcessor, create_model, save_pretrained
from convnext_jax.__main__ import main
from convnext_jax.errors import UserError
from convnext_jax.export import export_stablehlo
from convnext_jax.interop import Pretrained, read_upernet
from convnext_jax.models import get_parameters, with_parameters
from convnext_jax.training.weights import read_weights
from tests.reference import cases

ELSEWHERE = """
import pathlib, sys
sys.modules['convnext_jax'] = None  # an import of it is an error
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file
folder = pathlib.Path(sys.argv[1])
program = export.deserialize(bytearray((folder / 'model.stablehlo').read_bytes()))
weights = load_file(folder / 'model.safetensors')
images = np.load(folder / 'images.npy')
for size in (1, 3):
    np.save(folder / f'logits{size}.npy', jax.jit(program.call)(weights, images[:size]))
"""


def run_elsewhere(folder):
    """The logits of one image and of three, from a process that cannot import this package."""
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    command = [sys.executable, '-c', ELSEWHERE, str(folder)]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=TIMEOUT)
    return [np.load(folder / f'logits{size}.npy') for size in (1, 3)]


def randomized(model):
    rng = np.random.default_rng(0)
    values = {
        name: rng.normal(name.endswith('norm.scale'), 0.2, x.shape).astype(np.float32)
        for name, x in get_parameters(model).items()
    }
    return with_parameters(model, jax.tree.map(jax.numpy.asarray, values))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_runs_in_a_process_without_this_package(tmp_path, name):
    """A deployed model, with only jax and the folder, would give other logits or need a fixed batch size."""
    model = randomized(create_model(name, key=jax.random.key(0), num_classes=7))
    processor = ImageProcessor(size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    pretrained = Pretrained(model, 'timm', tuple('abcdefg'), processor, (), [])
    export_stablehlo(pretrained, tmp_path / 'out')
    images = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    np.save(tmp_path / 'out' / 'images.npy', images)
    expected = np.asarray(jax.jit(lambda model, x: model(x))(model, processor.normalize(images)))
    for logits in run_elsewhere(tmp_path / 'out'):
        difference = np.abs(logits - expected[: len(logits)]).max() / expected.std()
        assert difference < 2e-5, difference
    about = json.loads((tmp_path / 'out' / 'model.json').read_text())
    assert about['class_names'] == list('abcdefg')
    assert about['preprocessing']['size'] == 64
    assert about['preprocessing']['resample'] == 'bicubic'
    assert about['preprocessing']['squash'] is False
    assert about['preprocessing']['decoding'].startswith('turned upright by the EXIF orientation')


def test_the_program_is_for_all_platforms_and_holds_no_weights(tmp_path):
    model = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=7)
    export_stablehlo(Pretrained(model, 'timm', None, None, (), []), tmp_path / 'out')
    file = tmp_path / 'out' / 'model.stablehlo'
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    assert program.platforms == ('cpu', 'cuda', 'rocm', 'tpu')
    assert str(program.in_avals[-1].shape) == '(batch, 224, 224, 3)'
    assert program.in_avals[-1].dtype == np.uint8
    assert file.stat().st_size < 1e6
    with pytest.raises(UserError, match='is not empty'):
        export_stablehlo(Pretrained(model, 'timm', None, None, (), []), tmp_path / 'out')


def test_the_command_exports_a_run(finished_run, tmp_path, capsys):
    """The moving average of a run, which is usually deployed, could not be exported."""
    main(['convnext_jax', 'export', str(finished_run), str(tmp_path / 'out'), '--params=ema'])
    assert f'model.safetensors (the ema weights of {finished_run}, step 24)' in capsys.readouterr().out
    average = get_parameters(read_weights(str(finished_run), 'ema', None).model)
    weights = load_file(tmp_path / 'out' / 'model.safetensors')
    jax.tree.map(np.testing.assert_array_equal, weights, dict(average))
    with pytest.raises(UserError, match='flag --format=onnx'):
        main(['convnext_jax', 'export', str(finished_run), str(tmp_path / 'other'), '--format=onnx'])


@pytest.mark.parametrize(
    ('classes', 'kind', 'activation'),
    [
        (2, None, 'softmax'),
        (2, 'multi_label_classification', 'sigmoid'),
        (1, None, 'sigmoid'),
        (2, 'regression', None),
    ],
)
def test_how_logits_become_probabilities_is_written_down(tmp_path, classes, kind, activation):
    """With a softmax, a deployed multi-label model would give wrong probabilities. Two classes may have one name."""
    model = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=classes)
    export_stablehlo(Pretrained(model, 'timm', ('crane',) * classes, None, (), [], kind), tmp_path / 'out')
    about = json.loads((tmp_path / 'out' / 'model.json').read_text())
    assert about['activation'] == activation
    assert about['class_names'] == ['crane'] * classes


def test_grey_models_and_odd_ones(tmp_path):
    grey = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=2, in_channels=1)
    export_stablehlo(Pretrained(grey, 'timm', None, None, (), []), tmp_path / 'grey')
    assert len(json.loads((tmp_path / 'grey' / 'model.json').read_text())['preprocessing']['mean']) == 1
    four = create_model(small_variants()['convnext_atto'], key=jax.random.key(0), num_classes=2, in_channels=4)
    processor = ImageProcessor(size=8, mean=(0.5,) * 4, std=(0.5,) * 4)
    export_stablehlo(Pretrained(four, 'timm', None, processor, (), []), tmp_path / 'floats')
    program = jax.export.deserialize(bytearray((tmp_path / 'floats' / 'model.stablehlo').read_bytes()))
    assert [x.dtype for x in program.in_avals][-1] == np.float32
    about = json.loads((tmp_path / 'floats' / 'model.json').read_text())['preprocessing']
    assert about['decoding'].startswith('float32')
    with pytest.raises(UserError, match='there is no image processor for 4 channels'):
        export_stablehlo(Pretrained(four, 'timm', None, None, (), []), tmp_path / 'four')
    with pytest.raises(UserError, match='3 class names for 2 classes'):
        export_stablehlo(Pretrained(grey, 'timm', ('a', 'b', 'c'), None, (), []), tmp_path / 'names')


@pytest.mark.slow
def test_a_upernet_is_exported_with_its_preprocessing(tmp_path):
    """A segmentation network could not be deployed, or would get images in another range."""
    processor = ImageProcessor(size=64, resample=2, squash=True, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    names = [f'class {number}' for number in range(7)]
    save_pretrained(cases.random_upernet('v1'), tmp_path / 'folder', processor=processor, class_names=names)
    main(['convnext_jax', 'export', str(tmp_path / 'folder'), str(tmp_path / 'out')])
    program = jax.export.deserialize(bytearray((tmp_path / 'out' / 'model.stablehlo').read_bytes()))
    weights = load_file(tmp_path / 'out' / 'model.safetensors')
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    logits = np.asarray(jax.jit(program.call)(weights, images))
    expected = np.asarray(
        jax.jit(lambda model, x: model(x))(read_upernet(tmp_path / 'folder').model, processor.normalize(images))
    )
    assert logits.shape == (2, 64, 64, 7)
    assert np.abs(logits - expected).max() / expected.std() < 2e-5
    about = json.loads((tmp_path / 'out' / 'model.json').read_text())
    assert about['class_names'] == names
    assert about['activation'] == 'softmax'
    assert about['masks'].startswith('resize the logits to the size of the image')
    expected = {'size': 64, 'squash': True, 'resample': 'bilinear'}
    assert {name: about['preprocessing'][name] for name in expected} == expected
    assert 'crop_pct' not in about['preprocessing'], 'images are squashed, not cropped'
