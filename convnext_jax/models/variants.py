"""The table of architectures: name → depths, widths and the options that distinguish V1 and V2.

Sources: ConvNeXt (arXiv:2201.03545, appendix), ConvNeXt V2 (arXiv:2301.00808, table 14), and the model files of the
two original repositories.
"""

import dataclasses
import difflib
from typing import Any

from convnext_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Variant:
    """One architecture.

    Attributes:
        depths: number of blocks in each stage.
        widths: number of channels in each stage.
        patch_size: kernel size and stride of the stem, in pixels.
        grn: whether the blocks have global response normalisation (V2).
        layer_scale_init: initial value of the layer scale; 0 if the blocks have no layer scale.
        stem_norm: whether a LayerNorm follows the stem's convolution.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    patch_size: int = 4
    grn: bool = False
    layer_scale_init: float = 1e-6
    stem_norm: bool = True

    def replace(self, **changes: int | float | None) -> 'Variant':
        """A copy with these fields changed; a field with the argument None keeps its value.

        Raises:
            UserError: `patch_size` is below 1.
        """
        given: dict[str, Any] = {field: value for field, value in changes.items() if value is not None}
        if given.get('patch_size', 1) < 1:
            raise UserError(f'patch_size must be at least 1, not {given["patch_size"]}')
        return dataclasses.replace(self, **given)

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride of each stage: the distance between neighbouring positions, in pixels of the image."""
        return tuple(self.patch_size * 2**stage for stage in range(len(self.depths)))

    @property
    def total_stride(self) -> int:
        """The stride of the last stage, in pixels of the image."""
        return self.strides[-1]

    def multiply_adds(
        self, image_size: int = 224, num_classes: int = 1000, in_channels: int = 3, visible: float = 1.0
    ) -> int:
        """Multiply-adds of the convolutions and linear layers in the forward pass of one square image.

        The papers report this number as FLOPs. `visible` is the fraction of the positions at which the linear layers
        of the blocks are computed.
        """
        side = image_size // self.patch_size
        total = side**2 * self.patch_size**2 * in_channels * self.widths[0]
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage > 0:
                side //= 2
                total += side**2 * 4 * self.widths[stage - 1] * width
            total += depth * width * (side**2 * 49 + round(side**2 * visible) * 8 * width)
        return total + self.widths[-1] * num_classes


def _variants() -> dict[str, Variant]:
    sizes = {
        'atto': ((2, 2, 6, 2), 40),
        'femto': ((2, 2, 6, 2), 48),
        'pico': ((2, 2, 6, 2), 64),
        'nano': ((2, 2, 8, 2), 80),
        'tiny': ((3, 3, 9, 3), 96),
        'small': ((3, 3, 27, 3), 96),
        'base': ((3, 3, 27, 3), 128),
        'large': ((3, 3, 27, 3), 192),
        'xlarge': ((3, 3, 27, 3), 256),
        'huge': ((3, 3, 27, 3), 352),
    }
    table = {}
    for size, (depths, width) in sizes.items():
        widths = tuple(width * 2**stage for stage in range(4))
        if size != 'huge':
            table[f'convnext_{size}'] = Variant(depths, widths)
        if size != 'xlarge':
            table[f'convnextv2_{size}'] = Variant(depths, widths, grn=True, layer_scale_init=0)
    isotropic = {'small': (18, 384, 0), 'base': (18, 768, 0), 'large': (36, 1024, 1e-6)}
    for size, (depth, width, layer_scale_init) in isotropic.items():
        table[f'convnext_isotropic_{size}'] = Variant(
            (depth,), (width,), patch_size=16, layer_scale_init=layer_scale_init, stem_norm=False
        )
    return table


VARIANTS = _variants()


def list_models() -> list[str]:
    """The names that `create_model` accepts, sorted."""
    return sorted(VARIANTS)


def get_variant(name: str | Variant) -> Variant:
    """The architecture with this name; a `Variant` is returned unchanged.

    Raises:
        UserError: no model has this name; the message suggests similar names.
    """
    if isinstance(name, Variant):
        return name
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.5)
        hint = f'did you mean {", ".join(near)}?' if near else 'python -m convnext_jax models lists them.'
        raise UserError(f"there is no model '{name}': {hint}")
    return VARIANTS[name]
