"""The names of our architectures in timm, and which models of timm have 1×1 convolutions as linear layers."""

import dataclasses

from convnext_jax.models import VARIANTS, Variant

CONV_MLP = ('atto', 'femto', 'nano', 'pico', 'tiny_hnf', 'zepto')
"""Prefixes of the sizes whose models have conv_mlp=True: the kernels of linear layers are (out, in, 1, 1)."""
ONLY_IN_TIMM = ('stem', 'norm', 'norm_eps', 'activation', 'kernel_size', 'head_norm_first', 'head_hidden')
"""Fields of a variant that have their default values in all models of the other libraries."""


def special_fields(variant: Variant, stored: tuple[str, ...] = ()) -> list[str]:
    """The fields in which the architecture differs from all models of the other libraries, such as 'norm=rmsnorm'.

    `stored` lists fields that may differ, because the other library stores them.
    """
    return [
        f'{field.name}={getattr(variant, field.name)}'
        for field in dataclasses.fields(variant)
        if field.name in ONLY_IN_TIMM and field.name not in stored and getattr(variant, field.name) != field.default
    ]


def timm_name(variant: Variant) -> str | None:
    """The name of the architecture in timm, or None. Patch size and initial value of the layer scale are ignored."""
    if len(variant.depths) == 1:
        return None
    return next((name for name, other in VARIANTS.items() if _key(other) == _key(variant)), None)


def has_conv_mlp(variant: Variant) -> bool:
    """Whether timm's model of this architecture has 1×1 convolutions as linear layers."""
    size = (timm_name(variant) or '').removeprefix('convnextv2_').removeprefix('convnext_')
    return size.startswith(CONV_MLP)


def _key(variant: Variant) -> Variant:
    """The variant without the fields that are arguments of timm's models and not part of their names."""
    return variant.replace(patch_size=4, layer_scale_init=float(variant.layer_scale_init > 0))
