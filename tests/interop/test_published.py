"""The table of the weights that timm publishes."""

from convnext_jax.interop.published import published_weights
from convnext_jax.models import list_models


def test_every_entry_is_a_model_with_plausible_values():
    """`models` would list weights that cannot be loaded."""
    table = published_weights()
    assert len(table) > 100
    assert len({weights.hub_id for weights in table}) == len(table)
    for weights in table:
        assert weights.model in list_models()
        assert 160 <= weights.size <= weights.test_size <= 512
        assert weights.licence
        assert all(40 < top1 < 90 for top1 in (weights.top1, weights.test_top1) if top1 is not None)
        assert weights.classes == 1000 or weights.top1 is weights.test_top1 is None


def test_known_values():
    """The accuracies would be those of other weights or another size."""
    table = {weights.hub_id: weights for weights in published_weights()}
    tiny = table['timm/convnext_tiny.fb_in1k']
    assert (tiny.size, tiny.test_size, tiny.top1, tiny.test_top1) == (224, 288, 82.066, 82.694)
    assert tiny.licence == 'apache-2.0'
    assert table['timm/convnextv2_huge.fcmae_ft_in22k_in1k_512'].licence == 'cc-by-nc-4.0'
    assert table['timm/convnext_base.dinov3_lvd1689m'][2:] == (0, 224, 224, None, None, 'dinov3-license')
