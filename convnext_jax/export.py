"""Export of a model as a StableHLO program and a weights file, which run without this package."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jax.export import export, symbolic_shape
from PIL import Image

from convnext_jax.data.arrays import pixel_dtype
from convnext_jax.data.augment import normalize
from convnext_jax.interop import PretrainedModel, PretrainedUPerNet
from convnext_jax.interop.configs import check_class_names
from convnext_jax.interop.files import write_folder
from convnext_jax.interop.licence import CARD, model_card
from convnext_jax.interop.processor import processor_for, segmentation_processor
from convnext_jax.models import Weights, get_weights, with_parameters
from convnext_jax.paths import local_path

DECODING = 'turned upright by the EXIF orientation; transparency dropped; 16-bit grey scaled by 255 / 65535'
"""Text of `model.json` that says how `data.decode.decode` decodes images, for users of other decoders."""
ARRAY_DECODING = 'float32; integers divided by the largest value of their type, floats unchanged'
"""The text for images whose number of channels is neither 1 nor 3: how `data.arrays.decode_array` decodes them."""
MASKS = 'resize the logits to the size of the image (bilinear); each pixel has the class with the largest logit'
"""Text of `model.json` of a UPerNet, for the code that runs the program."""
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def export_stablehlo(pretrained: PretrainedModel, folder: str | Path) -> None:
    """Writes `model.stablehlo`, `model.safetensors` and `model.json`: one program for CPU, GPU and TPU, any batch size.

        program = jax.export.deserialize(bytearray(Path('FOLDER/model.stablehlo').read_bytes()))
        weights = safetensors.numpy.load_file('FOLDER/model.safetensors')
        logits = jax.jit(program.call)(weights, images)

    `images` are (N, size, size, C), uint8, or float32 if C is neither 1 nor 3. They are decoded, resized and cropped as
    described in `model.json`; the program normalises them. The logits are (N, classes) float32, or (N, size, size,
    classes) for a UPerNet. `activation` in `model.json` is the function from logits to probabilities: "softmax",
    "sigmoid" (multi-label, or one output), or null for a regression, which has no probabilities. The weights are
    arguments of the program. As constants they would be limited to 2 GB, and ConvNeXt-L would take ten times longer to
    start.

    Args:
        pretrained: model, preprocessing (by default ImageNet's at 224 pixels, or for a UPerNet at 512) and class names.
            A known licence is written into a model card, `README.md`.
        folder: a new or empty folder.

    Raises:
        UserError: the folder is not empty or not writable, or the processor or the class names do not match the model.
    """
    if isinstance(pretrained, PretrainedUPerNet):
        processor = segmentation_processor(pretrained.model.in_channels, pretrained.processor)
        classes, output = pretrained.model.num_classes, {'activation': 'softmax', 'masks': MASKS}
    else:
        pretrained.check_head()
        processor = processor_for(pretrained.model.in_channels, pretrained.processor)
        classes, output = pretrained.model.num_classes, {'activation': pretrained.activation}
    if pretrained.class_names is not None:
        check_class_names(pretrained.class_names, classes)
    model, (mean, std) = pretrained.model, processor.mean_and_std_of_255()

    def logits(weights: Weights, images: jax.Array) -> jax.Array:
        return with_parameters(model, weights)(normalize(images, mean, std))

    weights = get_weights(model)
    dtype = pixel_dtype(model.in_channels)
    (batch,) = symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, processor.size, processor.size, model.in_channels), dtype)
    program = export(jax.jit(logits), platforms=PLATFORMS)(weights, images)
    fields = dataclasses.asdict(processor)
    if isinstance(pretrained, PretrainedUPerNet):
        del fields['crop_pct']  # its images are squashed, not cropped
    preprocessing = fields | {
        'squash': processor.squashes,
        'resample': Image.Resampling(processor.resample).name.lower(),
        'decoding': DECODING if dtype == np.uint8 else ARRAY_DECODING,
    }
    description = {'preprocessing': preprocessing, 'class_names': pretrained.class_names} | output
    files: dict[str, dict | bytes] = {'model.stablehlo': bytes(program.serialize()), 'model.json': description}
    if pretrained.licence:
        files[CARD] = model_card(pretrained.licence)
    write_folder(local_path(folder), jax.tree.map(np.asarray, weights), files)
