"""create_backbone: feature maps with anybody's weights, in and out of Hugging Face's ConvNextBackbone folders."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.errors import UserError
from convnext_jax.interop.files import Tensors
from convnext_jax.interop.layouts import HEADS, LAST_NORMS, from_layout, to_layout
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

NORM_NAMES = re.compile(r'\w+\.hidden_states_norms\.(\w+)\.\w+')


def create_backbone(
    source: str | Path | Variant,
    *,
    out_features: Iterable[str] | None = None,
    output_stride: int | None = None,
    key: jax.Array | None = None,
    entry: str | None = None,
    revision: str | None = None,
    in_channels: int = 3,
    drop_path_rate: float = 0.0,
    **options: Unpack[ExecutionOptions],
) -> Backbone:
    """Stem and stages that give the chosen feature maps, each through a LayerNorm of its own.

        backbone = cx.create_backbone('facebook/convnext-tiny-224', out_features=('stage2', 'stage4'))
        maps = backbone(images)  # {'stage2': (N, H / 8, W / 8, 192), 'stage4': (N, H / 32, W / 32, 768)}
        backbone.channels['stage2'], backbone.strides['stage2']  # 192, 8

    Args:
        source: one of `list_models()`, or an architecture, for a newly initialised one; or weights, as
            `load_pretrained` reads them, with or without a head (a folder that has a model's name as './name'). Norms
            that the file does not have start as the identity, and a warning says so.
        out_features: of 'stem', 'stage1', 'stage2' …; by default those of the folder's config, or else the stages.
        output_stride: the largest stride, 8 or 16 where the model's own is 32: the stages after it are dilated, and
            their weights are the same.
        key: random key of a newly initialised one.
        entry, revision: of weights, as `read_pretrained`.
        in_channels: of a newly initialised one.
        drop_path_rate: as `create_model`.
        options: how the backbone is computed, as `create_model`: dtype='bfloat16', remat='full' …

    Raises:
        UserError: there is no such model or file, it does not fit, or a value is out of its range.
    """
    execution = Execution.from_keywords(create_backbone, options)
    if _is_architecture(source):
        variant = get_variant(source)
        if key is None:
            raise UserError(
                f'a new {source} is initialised at random: give key=jax.random.key(…), or ./{source} for a folder'
            )
        return Backbone(
            variant,
            key=key,
            out_features=out_features,
            output_stride=output_stride,
            in_channels=in_channels,
            drop_path_rate=drop_path_rate,
            execution=execution,
        )
    opened = open_weights(str(source), name=None, entry=entry, revision=revision)
    given = {match[1] for name in opened.tensors if (match := NORM_NAMES.fullmatch(name))}
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
    fresh = [name for name in model.out_features if name not in given]
    shapes = {name: array.shape for name, array in get_parameters(model).items()}
    norms = {f'norms.{name}.{part}': shapes.pop(f'norms.{name}.{part}') for name in fresh for part in ('scale', 'bias')}
    unasked = set(model.channels) - set(model.out_features)
    kept = _without_heads(opened.tensors, opened.layout, unasked)
    parameters = from_layout(kept, shapes, opened.variant, opened.layout)
    if fresh:
        warnings.warn(f'the norms of {", ".join(fresh)} are newly initialised: the file has none', stacklevel=2)
        parameters |= {
            name: jnp.full(shape, float(name.endswith('scale')), jnp.float32) for name, shape in norms.items()
        }
    return with_parameters(model, parameters)


def backbone_tensors(backbone: Backbone) -> dict[str, np.ndarray]:
    """As ConvNextBackbone or ConvNextV2Backbone names and shapes them: without the classifier's prefix."""
    tensors = to_layout(jax.device_get(get_parameters(backbone)), backbone.variant, 'huggingface')
    return {name.split('.', 1)[1]: x for name, x in tensors.items()}


def _is_architecture(source: str | Path | Variant) -> TypeGuard[str | Variant]:
    """Whether it is no place of weights: a name of ours, or what can only be one, perhaps misspelt."""
    if isinstance(source, str):
        return source in VARIANTS or bool(re.fullmatch(r'\w{1,64}', source) and not Path(source).exists())
    return isinstance(source, Variant)


def _without_heads(tensors: Tensors, layout: str, unasked: set[str]) -> Tensors:
    """Without last norm and head, and without the norms of feature maps that nobody asked for."""
    norms = {name: match[1] for name in tensors if (match := NORM_NAMES.fullmatch(name))}
    heads = HEADS[layout] + LAST_NORMS[layout]
    return {name: x for name, x in tensors.items() if not name.startswith(heads) and norms.get(name) not in unasked}
