"""Class probabilities of photographs, in batches."""

import dataclasses
import glob
import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.data.image_files import describe_left_out, find_images
from convnext_jax.errors import UserError
from convnext_jax.interop import Pretrained
from convnext_jax.interop.processor import processor_for
from convnext_jax.paths import local_path


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model sees in one file.

    Attributes:
        path: of the file.
        best: (label, class name, probability) of the most probable classes, the best first; empty after an error, and
            where the scores are not finite: NaN has no order. The probabilities of a multi-label head are
            independent and need not add up to 1.
        error: why the file could not be read, or ''.
    """

    path: Path
    best: tuple[tuple[int, str, float], ...] = ()
    error: str = ''


def find_photos(places: Iterable[str]) -> list[Path]:
    """Finds the files that paths, folders and patterns like 'photos/*.jpg' name, in that order.

    Below a folder `find_images` says what counts as an image; a warning counts what is left out. A file that is named
    itself, or by a pattern, is taken whatever it is.

    Raises:
        UserError: one of the places names no file.
    """
    photos = []
    for place in places:
        path = local_path(place)
        named = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        found: list[Path] = []
        for entry in named:
            if entry.is_dir():
                images = find_images(entry)
                found += map(Path, images.paths)
                if images.left_out:
                    warnings.warn(f'{entry}: {describe_left_out(images.left_out)}', stacklevel=2)
            else:
                found.append(entry)
        if not found:
            raise UserError(f'{place} is not a file, a folder with images or a pattern that matches any')
        photos += found
    return photos


def predict(
    pretrained: Pretrained, photos: Iterable[Path], *, top: int = 5, batch_size: int = 16
) -> Iterator[Prediction]:
    """One prediction for each photograph, in their order; a file that cannot be read gives one with its error.

    Args:
        pretrained: model, preprocessing and class names; without them, ImageNet's preprocessing at 224 pixels and
            'class 7' for a name.
        photos: read batch by batch.
        top: how many classes for each.
        batch_size: photographs at once.

    Raises:
        UserError: the head is a regression, or the processor is of another model.
    """
    if pretrained.activation is None:
        raise UserError('the head is a regression: its outputs are values, not probabilities of classes')
    activation = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}[pretrained.activation]
    processor = processor_for(pretrained.model.in_channels, pretrained.processor)
    classes = pretrained.model.head.bias.shape[0]
    names = pretrained.class_names or [f'class {label}' for label in range(classes)]
    probabilities = jax.jit(lambda model, images: activation(model(images)))
    photos = iter(photos)
    while batch := tuple(itertools.islice(photos, batch_size)):
        images = np.zeros((batch_size, processor.size, processor.size, len(processor.mean)), np.float32)
        errors = {}
        for row, path in enumerate(batch):
            try:
                images[row] = processor(path)[0]
            except UserError as error:
                errors[row] = str(error)
        rows = np.asarray(probabilities(pretrained.model, jnp.asarray(images)))
        for row, path in enumerate(batch):
            if row in errors:
                yield Prediction(path, error=errors[row])
            else:
                finite = np.isfinite(rows[row]).all()
                best = np.argsort(-rows[row], kind='stable')[:top] if finite else ()
                yield Prediction(path, tuple((int(label), names[label], float(rows[row, label])) for label in best))
