"""`Execution`, and its fields as keywords of every function that builds a network."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax import create_backbone, create_model, load_pretrained, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.models import Backbone, ConvNeXt, Execution, ExecutionOptions, Variant, get_parameters

SMALL = Variant((1, 1), (8, 16))
KEY = jax.random.key(0)
OPTIONS = {'dtype': jnp.bfloat16, 'remat': 'full', 'unroll': True, 'pallas': True}


def test_the_keywords_are_the_fields():
    """Editors would not complete, and type checkers would reject, a keyword that is missing in `ExecutionOptions`."""
    assert list(ExecutionOptions.__annotations__) == [field.name for field in dataclasses.fields(Execution)]
    assert set(OPTIONS) == set(ExecutionOptions.__annotations__)


def test_a_dtype_and_its_name_give_equal_executions():
    """Models that differ only in the spelling of a dtype would be compiled twice."""
    assert Execution(dtype=jnp.bfloat16) == Execution(dtype=jnp.dtype('bfloat16')) == Execution('bfloat16')
    assert hash(Execution(jnp.float32)) == hash(Execution())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'dtype': 'int8'}, "dtype must be one of float32, bfloat16, float16, not 'int8'"),
        ({'dtype': 'nonsense'}, "dtype must be one of float32, bfloat16, float16, not 'nonsense'"),
        ({'remat': 'half'}, "remat must be one of none, dots, full, not 'half'"),
    ],
)
def test_bad_values(options, message):
    """A bad value would cause an obscure error inside JAX, not one line that names it."""
    with pytest.raises(UserError, match=message):
        dataclasses.replace(Execution(), **options)
    with pytest.raises(UserError, match=message):
        create_model(SMALL, key=KEY, **options)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('execution') / 'weights'
    save_pretrained(create_model(SMALL, key=KEY, num_classes=3), path)
    return path


@pytest.mark.filterwarnings('ignore:the norms of stage2 are newly initialised')
def test_options_reach_every_block(folder):
    """An option that does not reach every block would silently make training slower or take more memory."""
    expected = Execution(**OPTIONS)
    for build in (
        partial(create_model, SMALL, key=KEY),
        partial(create_backbone, SMALL, key=KEY),
        partial(create_backbone, folder, out_features=['stage2']),
        partial(load_pretrained, folder),
    ):
        network = build(**OPTIONS)
        blocks = [stage.blocks for stage in network.stages]
        assert {network.execution, *(block.execution for block in blocks)} == {expected}, build.func
        layers = [network.stem.conv, network.stages[1].downsample.conv]
        layers += [layer for block in blocks for layer in (block.pointwise1, block.pointwise2)]
        assert {layer.dtype for layer in layers} == {'bfloat16'}, build.func
        assert {block.depthwise.execution for block in blocks} == {expected}, build.func


@pytest.mark.parametrize(
    ('build', 'name'),
    [
        (partial(create_model, SMALL, key=KEY), 'create_model'),
        (partial(create_backbone, SMALL, key=KEY), 'create_backbone'),
        (partial(load_pretrained, 'nowhere'), 'read_pretrained'),
    ],
)
def test_the_error_for_a_misspelt_keyword_suggests_the_right_one(build, name):
    """Because of `**options`, Python's own message would name a class that the user never called."""
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'drop_path'. Did you"):
        build(drop_path=0.1)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'dtyp'. Did you mean 'dtype'\?$"):
        build(dtyp='bfloat16')
    with pytest.raises(TypeError, match="unexpected keyword argument 'zzz'$"):
        build(zzz=1)


def test_the_constructors_have_the_defaults_of_the_functions():
    """A constructor and its function would build different networks from one key."""
    for constructed, created in (
        (ConvNeXt(SMALL, key=KEY), create_model(SMALL, key=KEY)),
        (Backbone(SMALL, key=KEY), create_backbone(SMALL, key=KEY)),
    ):
        assert jax.tree.structure(constructed) == jax.tree.structure(created)
        for name, value in get_parameters(created).items():
            np.testing.assert_array_equal(get_parameters(constructed)[name], value, err_msg=name)


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (partial(ConvNeXt, num_classes=-1), 'num_classes must be at least 0, not -1'),
        (partial(ConvNeXt, layer_norm_eps=0), 'layer_norm_eps must be above 0, not 0'),
        (partial(ConvNeXt, drop_path_rate=1.0), r'drop_path_rate must be in \[0, 1\), not 1.0'),
        (partial(ConvNeXt, in_channels=0), 'in_channels must be at least 1, not 0'),
        (partial(Backbone, out_features=('stage5',)), 'out_features must be one or more of'),
        (partial(Backbone, output_stride=12), r'output_stride must be one of \(4, 8\), not 12'),
    ],
)
def test_the_constructors_check_their_arguments(no_shape_checks, build, message):
    """A bad value would cause an obscure error inside JAX, not one line that names it."""
    with pytest.raises(UserError, match=message):
        build(SMALL, key=KEY)
