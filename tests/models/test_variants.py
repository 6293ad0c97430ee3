"""The table of architectures against the published numbers (papers, and ../shared/reference/variants.md)."""

from functools import partial

import jax
import pytest

from convnext_jax.errors import UserError
from convnext_jax.models import create_model, get_parameters, get_variant, list_models

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
}


@pytest.mark.parametrize(('name', 'count'), PARAMETERS.items())
def test_parameter_count_is_the_published_one(name, count):
    """A wrong depth, width or missing part: no published weights would fit, no published accuracy be reached."""
    model = jax.eval_shape(partial(create_model, name), key=jax.random.key(0))
    parameters = get_parameters(model)
    assert sum(leaf.size for leaf in parameters.values()) == count
    assert all(leaf.dtype == 'float32' for leaf in parameters.values())


@pytest.mark.parametrize(
    ('size', 'giga'), {'tiny': 4.5, 'small': 8.7, 'base': 15.4, 'large': 34.4, 'xlarge': 60.9}.items()
)
def test_multiply_adds_are_the_papers(size, giga):
    """Reported cost, and every utilisation figure made from it, would be wrong."""
    assert get_variant(f'convnext_{size}').multiply_adds() / 1e9 == pytest.approx(giga, abs=0.05)


@pytest.mark.parametrize(
    ('name', 'strides'), [('convnext_tiny', 32), ('convnextv2_huge', 32), ('convnext_isotropic_base', 16)]
)
def test_total_stride(name, strides):
    """Too small an image would be let through, or a fitting one turned away."""
    assert get_variant(name).total_stride == strides


def test_layer_scale_and_grn_where_the_papers_have_them():
    """V2 has GRN and no layer scale, V1 the reverse; of the isotropic models only the large has a layer scale."""
    found = {name: (get_variant(name).grn, get_variant(name).layer_scale_init) for name in list_models()}
    for name, value in found.items():
        if name.startswith('convnextv2'):
            assert value == (True, 0), name
        else:
            assert value == (False, 0 if name in ('convnext_isotropic_small', 'convnext_isotropic_base') else 1e-6), (
                name
            )


def test_list_models_is_sorted_and_complete():
    """A model missing from the list cannot be found by its user."""
    assert list_models() == sorted(PARAMETERS)


def test_replace_with_none_keeps_the_value():
    """An option left unset would overwrite the architecture's own value; 0 is a value, not unset."""
    variant = get_variant('convnext_tiny')
    assert variant.replace(patch_size=None, layer_scale_init=None) == variant
    assert variant.replace(patch_size=2, layer_scale_init=0).layer_scale_init == 0
    assert variant.replace(patch_size=2).patch_size == 2


@pytest.mark.parametrize(
    ('name', 'neighbour'),
    [('convnext_tinny', 'convnext_tiny'), ('convnextv2_attto', 'convnextv2_atto'), ('ConvNeXt_Base', 'convnext_base')],
)
def test_unknown_name_suggests_neighbours(name, neighbour):
    """A typing error would cost a search through the documentation."""
    with pytest.raises(UserError, match=f"there is no model '{name}': did you mean .*{neighbour}") as error:
        get_variant(name)
    assert '\n' not in str(error.value)


def test_unknown_name_without_neighbour_says_where_the_list_is():
    with pytest.raises(UserError, match='python -m convnext_jax models lists them'):
        get_variant('xyz')
