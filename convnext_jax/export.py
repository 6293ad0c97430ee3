"""A model as a StableHLO program that runs without this package, beside its weights."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import export, symbolic_shape

from convnext_jax.interop import ImageProcessor, Pretrained
from convnext_jax.interop.files import write_folder
from convnext_jax.models import Parameters, get_parameters, with_parameters

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def export_stablehlo(pretrained: Pretrained, folder: str | Path) -> None:
    """Writes `model.stablehlo`, `model.safetensors` and `model.json`: one program for CPU, GPU and TPU, any batch size.

        program = jax.export.deserialize(bytearray(Path('FOLDER/model.stablehlo').read_bytes()))
        weights = safetensors.numpy.load_file('FOLDER/model.safetensors')
        logits = jax.jit(program.call)(weights, images)

    `images` are (N, size, size, C) uint8, resized and cropped as `model.json` says; the program normalises them. The
    logits are (N, classes) float32. The weights stay out of the program: as constants they make ConvNeXt-L start ten
    times slower, and stop at 2 GB.

    Args:
        pretrained: model, preprocessing (by default ImageNet's at 224 pixels) and class names.
        folder: new or empty.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    model, processor = pretrained.model, pretrained.processor or ImageProcessor()

    def logits(weights: Parameters, images: jax.Array) -> jax.Array:
        mean, std = (jnp.asarray(values, jnp.float32) for values in (processor.mean, processor.std))
        rescaled = images.astype(jnp.float32) * jnp.float32(processor.rescale_factor)
        return with_parameters(model, weights)((rescaled - mean) / std)

    weights = get_parameters(model)
    (batch,) = symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, processor.size, processor.size, model.in_channels), jnp.uint8)
    program = export(jax.jit(logits), platforms=PLATFORMS)(weights, images)
    about = {'preprocessing': dataclasses.asdict(processor), 'class_names': pretrained.class_names}
    files = {'model.stablehlo': bytes(program.serialize()), 'model.json': about}
    write_folder(Path(folder), jax.tree.map(np.asarray, weights), files)
