"""The table of architectures: name → depths, widths and the options that distinguish V1 and V2.

Sources: ConvNeXt (arXiv:2201.03545, appendix), ConvNeXt V2 (arXiv:2301.00808, table 14), the model files of the two
original repositories, and timm (models/convnext.py) for the architectures that only timm has.
"""

import dataclasses
import difflib
from typing import Any

from convnext_jax.errors import UserError

STEMS = ('patch', 'overlap', 'overlap_act', 'overlap_tiered')
NORMS = ('layernorm', 'rmsnorm', 'simplenorm')
ACTIVATIONS = ('gelu', 'gelu_tanh', 'silu')


@dataclasses.dataclass(frozen=True)
class Variant:
    """One architecture.

    Attributes:
        depths: number of blocks in each stage.
        widths: number of channels in each stage.
        patch_size: stride of the stem in pixels, and kernel size of a patch stem; 4 for the other stems.
        grn: whether the blocks have global response normalisation (V2).
        layer_scale_init: initial value of the layer scale; 0 if the blocks have no layer scale.
        stem_norm: whether a norm follows the stem's convolutions.
        stem: 'patch': one convolution whose stride is its kernel size. 'overlap': two 3×3 convolutions of stride 2.
            'overlap_act': also an activation between these two. 'overlap_tiered': the first of these two has half of
            the channels.
        norm: the kind of all norms: 'layernorm', 'rmsnorm', or timm's 'simplenorm' (see `models.norms`).
        norm_eps: epsilon of all norms.
        activation: the activation of the blocks and of the stem: 'gelu', its approximation 'gelu_tanh', or 'silu'.
        kernel_size: side of the depthwise kernels; a tuple has one side for each stage.
        head_norm_first: whether the last norm comes before the average pooling, not after it.
        head_hidden: number of channels of a linear layer with a GELU before the head; 0 for no such layer.

    Raises:
        UserError: `stem`, `norm` or `activation` is unknown, or GRN is combined with another activation than GELU.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    patch_size: int = 4
    grn: bool = False
    layer_scale_init: float = 1e-6
    stem_norm: bool = True
    stem: str = 'patch'
    norm: str = 'layernorm'
    norm_eps: float = 1e-6
    activation: str = 'gelu'
    kernel_size: int | tuple[int, ...] = 7
    head_norm_first: bool = False
    head_hidden: int = 0

    def __post_init__(self):
        for field, allowed in (('stem', STEMS), ('norm', NORMS), ('activation', ACTIVATIONS)):
            if getattr(self, field) not in allowed:
                raise UserError(f"{field} must be one of {', '.join(allowed)}, not '{getattr(self, field)}'")
        if self.grn and self.activation != 'gelu':
            raise UserError(f"GRN needs activation='gelu', not '{self.activation}'")

    def replace(self, **changes: int | float | None) -> 'Variant':
        """A copy with these fields changed; a field with the argument None keeps its value.

        Raises:
            UserError: `patch_size` is below 1, or another stem than a patch stem would get another stride.
        """
        given: dict[str, Any] = {field: value for field, value in changes.items() if value is not None}
        if given.get('patch_size', 1) < 1:
            raise UserError(f'patch_size must be at least 1, not {given["patch_size"]}')
        if self.stem != 'patch' and given.get('patch_size', self.patch_size) != self.patch_size:
            raise UserError(f"patch_size={given['patch_size']}: the stem '{self.stem}' always has stride 4")
        return dataclasses.replace(self, **given)

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride of each stage: the distance between neighbouring positions, in pixels of the image."""
        return tuple(self.patch_size * 2**stage for stage in range(len(self.depths)))

    @property
    def total_stride(self) -> int:
        """The stride of the last stage, in pixels of the image."""
        return self.strides[-1]

    @property
    def kernel_sizes(self) -> tuple[int, ...]:
        """The side of the depthwise kernels in each stage."""
        return self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size,) * len(self.depths)

    @property
    def stem_channels(self) -> int:
        """Channels between the two convolutions of a stem that is not a patch stem."""
        if self.stem != 'overlap_tiered':
            return self.widths[0]
        half = self.widths[0] // 2  # rounded to a multiple of 8, but not down by more than 10 %, as in timm
        rounded = max(8, (half + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * half else rounded

    def multiply_adds(
        self, image_size: int = 224, num_classes: int = 1000, in_channels: int = 3, visible: float = 1.0
    ) -> int:
        """Multiply-adds of the convolutions and linear layers in the forward pass of one square image.

        The papers report this number as FLOPs. `visible` is the fraction of the positions at which the linear layers
        of the blocks are computed.
        """
        if self.stem == 'patch':
            side = image_size // self.patch_size
            total = side**2 * self.patch_size**2 * in_channels * self.widths[0]
        else:
            half, side = -(-image_size // 2), -(-image_size // 4)
            total = 9 * self.stem_channels * (half**2 * in_channels + side**2 * self.widths[0])
        stages = zip(self.depths, self.widths, self.kernel_sizes, strict=True)
        for stage, (depth, width, kernel_size) in enumerate(stages):
            if stage > 0:
                side //= 2
                total += side**2 * 4 * self.widths[stage - 1] * width
            total += depth * width * (side**2 * kernel_size**2 + round(side**2 * visible) * 8 * width)
        total += self.widths[-1] * self.head_hidden
        return total + (self.head_hidden or self.widths[-1]) * num_classes


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
    return table | _timm_variants(table)


def _timm_variants(plain: dict[str, Variant]) -> dict[str, Variant]:
    """The architectures that only timm has; `plain` contains the others."""
    zepto = Variant((2, 2, 4, 2), (32, 64, 128, 256), norm='simplenorm')
    test = Variant((1, 1, 1, 1), (32, 64, 96, 128), norm_eps=1e-5, activation='gelu_tanh')
    return {
        'convnext_zepto_rms': zepto,
        'convnext_zepto_rms_ols': dataclasses.replace(zepto, stem='overlap_act'),
        'convnext_atto_ols': dataclasses.replace(plain['convnext_atto'], stem='overlap_tiered'),
        'convnext_atto_rms': dataclasses.replace(plain['convnext_atto'], norm='rmsnorm'),
        'convnext_femto_ols': dataclasses.replace(plain['convnext_femto'], stem='overlap_tiered'),
        'convnext_pico_ols': dataclasses.replace(plain['convnext_pico'], stem='overlap_tiered'),
        'convnext_nano_ols': dataclasses.replace(plain['convnext_nano'], stem='overlap'),
        'convnext_tiny_hnf': dataclasses.replace(plain['convnext_tiny'], head_norm_first=True),
        'convnext_large_mlp': dataclasses.replace(plain['convnext_large'], head_hidden=1536),
        'convnext_xxlarge': Variant((3, 4, 30, 3), (384, 768, 1536, 3072), norm_eps=1e-5),
        'test_convnext': dataclasses.replace(test, depths=(1, 2, 4, 2), widths=(24, 32, 48, 64)),
        'test_convnext2': test,
        'test_convnext3': dataclasses.replace(test, activation='silu', kernel_size=(7, 5, 5, 3)),
    }


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
