"""Plans for the training step of a small model, with the CPU compiler and, if they are installed, with the others."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import shrink_models

from configs import fcmae
from configs.fashion_mnist import get_config
from convnext_jax import __main__ as package_command
from convnext_jax.errors import UserError
from convnext_jax.models import fcmae as autoencoder
from convnext_jax.models import get_parameters
from convnext_jax.plan import plan, report, targets
from convnext_jax.plan.compile import Compiled, DoesNotFit, Memory, compile_step
from convnext_jax.plan.hlo import Collectives, collectives, read_program
from convnext_jax.plan.report import describe, largest_batch
from convnext_jax.plan.targets import Target
from convnext_jax.runtime.chips import CHIPS
from convnext_jax.tasks import abstract_model, make_task

CHIP = CHIPS['v5e']
MIB = 2**20


@pytest.fixture
def here():
    """A target with the simulated CPU devices."""
    return Target('cpu:8', CHIP, jax.devices(), 'jaxlib')


def of_size(images, mib, text='ENTRY %main (p: f32[8]) -> f32[8] {\n}'):
    return Compiled(images, 1.0, Memory(arguments=MIB, results=0, temporaries=(mib - 1) * MIB, program=0), text)


@pytest.mark.slow
def test_the_compiled_step_is_the_training_step(here, small_models):
    """The plan describes another program: one all-reduce of the gradients, loss and weight, and an in-place update."""
    config = get_config()
    compiled = compile_step(config, here, images=2)
    config.model.num_classes = 1000
    parameters = sum(array.size for array in get_parameters(abstract_model(config)).values())
    assert collectives(read_program(compiled.text), 8) == {
        ('all-reduce', 'f32', 8): Collectives(1, 4 * (parameters + 2))
    }
    assert compiled.memory.arguments > 4 * 4 * parameters  # parameters, two moments and the moving average
    assert compiled.memory.results < 4 * parameters


@pytest.mark.slow
def test_a_pretraining_is_planned_with_its_decoder(here, monkeypatch):
    """The plan omits the decoder, which has half of the parameters of a small network."""
    shrink_models(monkeypatch, depths=(1, 1, 1, 1), widths=(8, 8, 8, 16))
    monkeypatch.setattr(autoencoder, 'DECODER_WIDTH', 32)
    config = fcmae.get_config('atto')
    config.data.image_size = 64
    compiled = compile_step(config, here, images=2)
    arrays = get_parameters(abstract_model(config))
    assert 'decoder.predict.kernel' in arrays
    parameters = sum(array.size for array in arrays.values())
    found = collectives(read_program(compiled.text), 8)
    assert found == {('all-reduce', 'f32', 8): Collectives(1, 4 * (parameters + 2))}
    assert compiled.memory.arguments > 3 * 4 * parameters  # parameters and two moments
    assert compiled.memory.results < 4 * parameters


def test_the_multiply_adds_of_a_pretraining_are_those_of_its_program():
    """The reported utilisation of the chip is wrong: it follows from the multiply-adds."""
    config = fcmae.get_config('atto')
    config.model.dtype, config.model.unroll = 'float32', True  # XLA counts one iteration of a loop
    task = make_task(config)
    arguments = jax.eval_shape(
        lambda: (task.build(jax.random.key(0)), jnp.zeros((1, 224, 224, 3)), jax.random.split(jax.random.key(0), 1))
    )
    forward = jax.jit(lambda model, images, keys: model(images, task.visible(keys)))
    flops = forward.lower(*arguments).cost_analysis()['flops']
    assert 2 * task.multiply_adds < flops < 1.05 * 2 * task.multiply_adds  # norms and activations count as well


def test_a_program_that_does_not_fit_is_halved_until_it_does(here, monkeypatch, capsys):
    """For a batch that is too large, the user gets an error instead of the largest batch that fits."""
    tried = []

    def compile_for(config, target, images):
        tried.append(images)
        return DoesNotFit(images, 1.0, 'Ran out of memory') if images > 16 else of_size(images, 100 + 500 * images)

    monkeypatch.setattr(report, 'compile_step', compile_for)
    plan(get_config(), here, images=64)
    assert tried == [64, 32, 16, 8]
    out = capsys.readouterr().out
    assert 'does not fit (Ran out of memory)' in out
    assert 'about 32 images fit on a chip' in out  # 100 + 500 · 32 = 16,100 MiB of 16,384
    monkeypatch.setattr(report, 'compile_step', lambda config, target, images: DoesNotFit(images, 1.0, 'no'))
    with pytest.raises(UserError, match='one image per chip does not fit on cpu:8'):
        plan(get_config(), here, images=4)


def test_the_largest_batch_is_extrapolated_linearly():
    """The recommended batch does not fit on the chip."""
    assert largest_batch(of_size(8, 1000), of_size(16, 1800), capacity=2600 / 1024) == 24
    assert largest_batch(of_size(8, 1000), of_size(16, 1800), capacity=1399 / 1024) == 11


def test_the_report_of_a_program(here):
    """The user chooses hardware by wrong numbers."""
    text = """ENTRY %main (p: f32[8]) -> f32[8] {
  %light.remat2 = f32[8] fusion(%p), metadata={op_name="step/add"}, backend_config={"estimated_cycles":"500000"}
  %heavy = f32[8] fusion(%p), metadata={op_name="jit(train_step)/conv"}, backend_config={"estimated_cycles":"1000000"}
  ROOT %all-reduce.1 = f32[25000000] all-reduce(%heavy)
}"""
    lines = '\n'.join(describe(of_size(8, 1024, text), here))
    assert re.search(r'total +1.00 GiB of 16: fits', lines)
    assert re.search(r'all-reduce +f32 +1 × over +8 chips +100.00 MB', lines)
    assert '1,500,000, 1.0 ms at 1.5 GHz' in lines
    assert lines.index('66.7%   1 ×  1,000,000  heavy  conv') < lines.index(
        '33.3%   1 ×    500,000  light.remat2  step/add'
    )
    assert 'to save memory: 33.3%' in lines  # if this is high, a smaller batch may be faster
    assert 'communication: at least 0.88 ms' in lines  # 2 · 7/8 · 100 MB at 200 GB/s
    assert 'does not fit' in '\n'.join(describe(of_size(8, 17 * 1024, text), here))


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        ((), '--config is missing'),
        (('--config=configs/fashion_mnist.py',), 'give either --topology, for example v5e:4x4, or --gpu'),
        (('--config=configs/fashion_mnist.py', '--topology=v3:2x2'), 'a slice of v5e, v5p or v6e'),
        (('--config=configs/fashion_mnist.py', '--topology=v5e'), "for example v5e:16x16 or v5p:4x4x4, not 'v5e'"),
        (('--config=configs/fashion_mnist.py', '--gpu=h100:none'), "for example h100:8, not 'h100:none'"),
        (('--config=configs/fashion_mnist.py', '--topology=v5e:2x2', '--batch=0'), 'flag --batch=0'),
    ],
)
def test_plan_refuses_wrong_arguments(arguments, line):
    """The user sees a traceback for a typo."""
    with pytest.raises(UserError, match=re.escape(line)):
        package_command.main(['convnext_jax', 'plan', *arguments])


def test_a_missing_compiler_is_named_with_its_version(monkeypatch):
    """The user installs the newest libtpu, which may not work with this version of jax."""
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=re.escape(f"no TPU): pip install 'jax[tpu]=={jax.__version__}'")):
        targets.tpu_target('v5e:2x2')
    with pytest.raises(UserError, match=f'no GPU\\): pip install --no-deps jax-cuda13-plugin=={jax.__version__}'):
        targets.gpu_target('h100:8')


def test_a_batch_that_does_not_divide_is_refused(here):
    """The plan is for another batch size than the run."""
    config = get_config()
    config.batch_size = 30
    with pytest.raises(UserError, match='is not a multiple of 8 chips × 1 accumulation steps'):
        plan(config, here, images=None)


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu, the compiler for TPUs, is not installed')
def test_plan_for_a_tpu_slice(commands):
    """The command does not work with the installed libtpu."""
    small = ('--config=configs/fashion_mnist.py', '--topology=v5e:2x2', '--batch=8')
    out = commands.run('-m', 'convnext_jax', 'plan', *small, '--config.model.pallas=True').stdout
    assert 'on v5e:2x2: 4 chips' in out
    assert re.search(r'of 16: fits', out)
    assert re.search(r'all-reduce +f32', out)
    assert re.search(r'Pallas kernels: \d+ with [\d,]{5,} cycles, counted from their instructions$', out, re.M)
    assert re.search(r'estimated cycles without collectives: [\d,]{7,}', out)
    refused = commands.run('-m', 'convnext_jax', 'plan', small[0], '--topology=v5e:5x5', status=2).stderr
    assert 'error: --topology=v5e:5x5: INVALID_ARGUMENT' in refused.splitlines()[-1]


@pytest.mark.skipif(
    not importlib.util.find_spec('jax_cuda13_plugin'),
    reason='jax-cuda13-plugin, the GPU compiler, is not installed',
)
def test_plan_for_gpus(commands):
    """The command does not work with the installed CUDA plugin."""
    small = ('--config=configs/fashion_mnist.py', '--gpu=h100:8', '--batch=1')
    out = commands.run('-m', 'convnext_jax', 'plan', *small).stdout
    assert 'on h100:8: 8 chips' in out
    assert re.search(r'all-reduce +f32', out)
    assert 'not reported by this compiler' in out
