"""The table of architectures against the numbers in the papers and the original repositories."""

from functools import partial

import jax
import pytest

from convnext_jax.errors import UserError
from convnext_jax.models import Variant, create_model, get_parameters, get_variant, list_models

PARAMETERS = {
    'convnext_atto': 3_695_520,
    'convnext_femto': 5_217_784,
    'convnext_pico': 9_045_672,
    'convnext_nano': 15_593_560,
    'convnext_tiny': 28_589_128,
    'convnext_small': 50_223_688,
    'convnext_base': 88_591_464,
    'convnext_large': 197_767_336,
    'convnext_xlarge': 350_196_968,
    'convnextv2_atto': 3_708_400,
    'convnextv2_femto': 5_233_240,
    'convnextv2_pico': 9_066_280,
    'convnextv2_nano': 15_623_800,
    'convnextv2_tiny': 28_635_496,
    'convnextv2_small': 50_318_440,
    'convnextv2_base': 88_717_800,
    'convnextv2_large': 197_956_840,
    'convnextv2_huge': 660_289_640,
    'convnext_isotropic_small': 22_308_712,
    'convnext_isotropic_base': 87_083_752,
    'convnext_isotropic_large': 305_942_504,
    'convnext_zepto_rms': 2_155_656,
    'convnext_zepto_rms_ols': 2_164_232,
    'convnext_atto_ols': 3_702_912,
    'convnext_atto_rms': 3_693_040,
    'convnext_femto_ols': 5_226_520,
    'convnext_pico_ols': 9_061_928,
    'convnext_nano_ols': 15_649_560,
    'convnext_tiny_hnf': 28_589_128,
    'convnext_large_mlp': 200_128_168,
    'convnext_xxlarge': 846_471_016,
    'test_convnext': 272_128,
    'test_convnext2': 477_800,
    'test_convnext3': 468_840,
}


@pytest.mark.parametrize(('name', 'count'), PARAMETERS.items())
def test_parameter_count_is_the_published_one(name, count):
    """With a wrong depth, width or layer, published weights would not fit."""
    model = jax.eval_shape(partial(create_model, name), key=jax.random.key(0))
    parameters = get_parameters(model)
    assert sum(leaf.size for leaf in parameters.values()) == count
    assert all(leaf.dtype == 'float32' for leaf in parameters.values())


@pytest.mark.parametrize(
    ('size', 'giga'), {'tiny': 4.5, 'small': 8.7, 'base': 15.4, 'large': 34.4, 'xlarge': 60.9}.items()
)
def test_multiply_adds_are_the_papers(size, giga):
    """The reported FLOPs and FLOP utilisation would be wrong."""
    assert get_variant(f'convnext_{size}').multiply_adds() / 1e9 == pytest.approx(giga, abs=0.05)


@pytest.mark.parametrize(
    ('name', 'strides'), [('convnext_tiny', 32), ('convnextv2_huge', 32), ('convnext_isotropic_base', 16)]
)
def test_total_stride(name, strides):
    """Images that are too small would be accepted, or valid ones rejected."""
    assert get_variant(name).total_stride == strides


def test_layer_scale_and_grn_where_the_papers_have_them():
    """V2 has GRN and no layer scale, V1 the opposite; only the largest isotropic model has a layer scale."""
    found = {name: (get_variant(name).grn, get_variant(name).layer_scale_init) for name in list_models()}
    for name, value in found.items():
        if name.startswith('convnextv2'):
            assert value == (True, 0), name
        else:
            assert value == (False, 0 if name in ('convnext_isotropic_small', 'convnext_isotropic_base') else 1e-6), (
                name
            )


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        ({'stem': 'wide'}, "stem must be one of patch, overlap, overlap_act, overlap_tiered, not 'wide'"),
        ({'norm': 'batchnorm'}, "norm must be one of layernorm, rmsnorm, simplenorm, not 'batchnorm'"),
        ({'activation': 'relu'}, "activation must be one of gelu, gelu_tanh, silu, not 'relu'"),
        ({'activation': 'silu', 'grn': True}, "GRN needs activation='gelu', not 'silu'"),
    ],
)
def test_an_unknown_part_is_refused(changes, match):
    """A typing error in a new architecture would end in a traceback, or be ignored."""
    with pytest.raises(UserError, match=match):
        Variant((1,), (8,), **changes)


def test_list_models_is_sorted_and_complete():
    """Users could not find a model that is missing from the list."""
    assert list_models() == sorted(PARAMETERS)


def test_replace_with_none_keeps_the_value():
    """An option that is not set would overwrite the value of the architecture; 0 is a value, None is not."""
    variant = get_variant('convnext_tiny')
    assert variant.replace(patch_size=None, layer_scale_init=None) == variant
    assert variant.replace(patch_size=2, layer_scale_init=0).layer_scale_init == 0
    assert variant.replace(patch_size=2).patch_size == 2


@pytest.mark.parametrize(
    ('name', 'similar'),
    [('convnext_tinny', 'convnext_tiny'), ('convnextv2_attto', 'convnextv2_atto'), ('ConvNeXt_Base', 'convnext_base')],
)
def test_an_unknown_name_suggests_similar_ones(name, similar):
    """After a typing error, users would have to search the documentation."""
    with pytest.raises(UserError, match=f"there is no model '{name}': did you mean .*{similar}") as error:
        get_variant(name)
    assert '\n' not in str(error.value)


def test_an_unknown_name_without_similar_ones_points_to_the_list():
    """The message would not say where to find the valid names."""
    with pytest.raises(UserError, match='python -m convnext_jax models lists them'):
        get_variant('xyz')
