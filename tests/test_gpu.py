"""An NVIDIA GPU gives the results of a CPU, and resumes a killed run exactly. Run with `pytest -m gpu`."""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SMALL_RUN, TIMEOUT, fingerprints

from convnext_jax import ImageProcessor, create_model
from convnext_jax.data.augment import augment
from convnext_jax.export import export_stablehlo
from convnext_jax.interop import Pretrained
from convnext_jax.models import get_parameters, with_parameters
from convnext_jax.monitoring.records import read_records

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if jax.default_backend() != 'gpu':
        pytest.skip('there is no NVIDIA GPU, or JAX does not use it')


def randomized(name, dtype):
    """A model, and random values of its parameters with which each of them changes the result."""
    model = create_model(name, key=jax.random.key(0), num_classes=10, dtype=dtype)
    rng = np.random.default_rng(0)
    values = {
        name: jnp.asarray(rng.normal(name.endswith(('norm.scale', 'layer_scale')), 0.2, x.shape), jnp.float32)
        for name, x in get_parameters(model).items()
    }
    return model, values


def on_both(function, *arguments):
    """Results of the jitted function on the GPU and on CPU."""
    results = []
    for platform in ('gpu', 'cpu'):
        device = jax.devices(platform)[0]
        with jax.default_device(device), jax.default_matmul_precision('highest'):
            results.append(jax.device_get(jax.jit(function)(*jax.device_put(arguments, device))))
    return results


def differences(ours, expected):
    """The largest difference in each array, relative to its largest value."""
    return {
        name: float(np.abs(ours[name].astype(np.float64) - value).max() / max(np.abs(value).max(), 1e-30))
        for name, value in expected.items()
    }


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-5), ('bfloat16', 0.1)])
def test_logits_and_gradients_agree_with_the_cpu(name, dtype, tolerance):
    """A wrong GPU kernel would train another network, and the loss would not show it."""
    model, values = randomized(name, dtype)
    images = jnp.asarray(np.random.default_rng(1).standard_normal((4, 96, 96, 3)), jnp.float32)

    def loss(values):
        logits = with_parameters(model, values)(images)
        return jnp.square(logits).mean(), logits

    def everything(values):
        (_, logits), gradient = jax.value_and_grad(loss, has_aux=True)(values)
        return gradient | {'logits': logits}

    found = differences(*on_both(everything, values))
    assert {name: difference for name, difference in found.items() if difference > tolerance} == {}


def test_augmentation_agrees_with_the_cpu():
    """A recipe would train on other images on a GPU than on a CPU, although their keys are equal."""
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3)), jnp.uint8)

    def augmented(images):
        options = {'policy': 'rand-m9-mstd0.5-inc1', 'flip': True, 'erasing': 0.25}
        keys = jax.random.split(jax.random.key(0), len(images))
        return {'image': augment(images, keys, mean=(0.5,) * 3, std=(0.25,) * 3, **options)}

    ours, expected = on_both(augmented, images)
    different = np.abs(ours['image'] - expected['image']) > 1e-4
    assert different.mean() < 1e-3  # a value between two pixel levels may be rounded to either of them


def test_a_run_that_is_killed_and_resumed_equals_an_uninterrupted_run(tmp_path):
    """A preempted run would end with other weights, even with the deterministic operations of XLA."""
    flags = os.environ['XLA_FLAGS'] + ' --xla_gpu_deterministic_ops=true'
    environment = os.environ | {'XLA_FLAGS': flags, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}

    def start(workdir):
        command = [sys.executable, 'train.py', *SMALL_RUN, f'--workdir={workdir}', '--config.model.dtype=bfloat16']
        return subprocess.Popen(command, cwd=ROOT, env=environment)

    assert start(tmp_path / 'unbroken').wait(TIMEOUT) == 0
    process = start(tmp_path / 'killed')
    while process.poll() is None and not read_records(tmp_path / 'killed'):
        time.sleep(0.02)
    process.kill()
    assert process.wait() < 0
    assert start(tmp_path / 'killed').wait(TIMEOUT) == 0
    assert fingerprints(tmp_path / 'killed') == fingerprints(tmp_path / 'unbroken')
    command = [sys.executable, 'eval.py', f'--workdir={tmp_path / "unbroken"}']
    assert (
        '"top1"'
        in subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    )


def test_an_exported_model_runs_on_the_gpu(tmp_path):
    """Users could not serve an exported model on a GPU."""
    model, values = randomized('convnext_atto', 'float32')
    model = with_parameters(model, values)
    processor = ImageProcessor(size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    export_stablehlo(Pretrained(model, 'timm', tuple('abcdefghij'), processor, (), []), tmp_path)
    program = jax.export.deserialize(bytearray((tmp_path / 'model.stablehlo').read_bytes()))
    assert 'cuda' in program.platforms
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    logits = jax.jit(program.call)(get_parameters(model), images)
    assert {device.platform for device in logits.devices()} == {'gpu'}
    expected = model(processor.normalize(images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-2 * float(jnp.abs(expected).max()))
