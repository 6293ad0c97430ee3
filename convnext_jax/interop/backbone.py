"""create_backbone, with the weights of any supported library, and the layout of Hugging Face's ConvNextBackbone."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.errors import UserError
from convnext_jax.interop.channels import with_channels
from convnext_jax.interop.files import Tensors
from convnext_jax.interop.layouts import HEADS, LAST_NORMS, from_layout, normed_feature, to_layout
from convnext_jax.interop.recognition import open_weights
from convnext_jax.models import (
    VARIANTS,
    Backbone,
    Execution,
    ExecutionOptions,
    Variant,
    get_parameters,
    get_variant,
    with_parameters,
)


def create_backbone(
    source: str | Path | Variant,
    *,
    out_features: Iterable[str] | None = None,
    output_stride: int | None = None,
    key: jax.Array | None = None,
    entry: str | None = None,
    revision: str | None = None,
    in_channels: int | None = None,
    drop_path_rate: float = 0.0,
    **options: Unpack[ExecutionOptions],
) -> Backbone:
    """A backbone: stem and stages that return feature maps, each normalised by its own LayerNorm.

        backbone = cx.create_backbone('facebook/convnext-tiny-224', out_features=('stage2', 'stage4'))
        maps = backbone(images)  # {'stage2': (N, H / 8, W / 8, 192), 'stage4': (N, H / 32, W / 32, 768)}
        backbone.channels['stage2'], backbone.strides['stage2']  # 192, 8

    Args:
        source: one of `list_models()` or a `Variant`, for a newly initialised backbone; or the path or hub id of
            weights, as for `load_pretrained`, with or without heads. If a folder has the name of a model, write
            './name'. Norms that are missing in the file are initialised as the identity, with a warning.
        out_features: names of the returned feature maps: some of 'stem', 'stage1', 'stage2', …; by default the names in
            the folder's config, or else all stages.
        output_stride: the largest stride in pixels, such as 8 or 16 for a model with stride 32: later stages are
            dilated instead, with unchanged weights.
        key: random key of the initialisation; only for a newly initialised backbone.
        entry, revision: as for `read_pretrained`; only for weights.
        in_channels: channels of the images, by default 3 or those of the weights; as for `read_pretrained`.
        drop_path_rate: as for `create_model`.
        options: how the backbone is computed, as for `create_model`: dtype='bfloat16', remat='full', …

    Raises:
        TypeError: an unknown keyword.
        UserError: the model or file does not exist, the weights do not match, or a value is out of its range.
    """
    execution = Execution.from_keywords(create_backbone, options)
    if _is_architecture(source):
        variant = get_variant(source)
        if key is None:
            raise UserError(
                f'a new {source} needs a random key: pass key=jax.random.key(…); to load a folder, pass ./{source}'
            )
        return Backbone(
            variant,
            key=key,
            out_features=out_features,
            output_stride=output_stride,
            in_channels=3 if in_channels is None else in_channels,
            drop_path_rate=drop_path_rate,
            execution=execution,
        )
    opened, notes = with_channels(open_weights(str(source), name=None, entry=entry, revision=revision), in_channels)
    for note in [*opened.notes, *notes]:
        warnings.warn(note, stacklevel=2)
    given = {feature for name in opened.tensors if (feature := normed_feature(name))}
    if out_features is None:
        out_features = (given and opened.config.get('out_features')) or given or None
    model = jax.eval_shape(
        lambda key: Backbone(
            opened.variant,
            key=key,
            out_features=out_features,
            output_stride=output_stride,
            in_channels=opened.in_channels,
            drop_path_rate=drop_path_rate,
            execution=execution,
        ),
        jax.random.key(0),
    )
    missing = [name for name in model.out_features if name not in given]
    shapes = {name: array.shape for name, array in get_parameters(model).items()}
    norms = {
        f'norms.{name}.{part}': shapes.pop(f'norms.{name}.{part}') for name in missing for part in ('scale', 'bias')
    }
    unused = set(model.channels) - set(model.out_features)
    tensors = _without_heads(opened.tensors, opened.layout, unused)
    parameters = from_layout(tensors, shapes, opened.variant, opened.layout)
    if missing:
        warnings.warn(f'the norms of {", ".join(missing)} are newly initialised: the file has none', stacklevel=2)
        parameters |= {
            name: jnp.full(shape, float(name.endswith('scale')), jnp.float32) for name, shape in norms.items()
        }
    return with_parameters(model, parameters)


def backbone_tensors(backbone: Backbone) -> dict[str, np.ndarray]:
    """The parameters with the names and shapes of ConvNextBackbone or ConvNextV2Backbone; the names have no prefix."""
    tensors = to_layout(jax.device_get(get_parameters(backbone)), backbone.variant, 'huggingface')
    return {name.split('.', 1)[1]: x for name, x in tensors.items()}


def _is_architecture(source: str | Path | Variant) -> TypeGuard[str | Variant]:
    """Whether `source` is an architecture or its (possibly misspelt) name, and not a path or hub id."""
    if isinstance(source, str):
        return source in VARIANTS or bool(re.fullmatch(r'\w{1,64}', source) and not Path(source).exists())
    return isinstance(source, Variant)


def _without_heads(tensors: Tensors, layout: str, unused: set[str]) -> Tensors:
    """The tensors except the last norm, the head, and the norms of unused feature maps."""
    heads = HEADS[layout] + LAST_NORMS[layout]
    return {name: x for name, x in tensors.items() if not name.startswith(heads) and normed_feature(name) not in unused}
