"""Class probabilities of image files."""

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
from convnext_jax.interop import ImageProcessor, Pretrained
from convnext_jax.interop.processor import processor_for
from convnext_jax.paths import local_path


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one file.

    Attributes:
        path: the file.
        best: (label, class name, probability) of the most probable classes in descending order; empty if the file could
            not be read or the scores are not finite. The probabilities of a multi-label head are independent: their sum
            may differ from 1.
        error: the reason why the file could not be read, or ''.
    """

    path: Path
    best: tuple[tuple[int, str, float], ...] = ()
    error: str = ''


def find_photos(arguments: Iterable[str]) -> list[Path]:
    """The image files that the arguments of a command name, in the order of the arguments.

    An argument is a file, a folder, or a pattern such as 'photos/*.jpg'. In folders, `find_images` finds the images,
    and a warning counts the ignored files. Files that are named directly or match a pattern are always returned.

    Raises:
        UserError: an argument matches no file.
    """
    photos = []
    for argument in arguments:
        path = local_path(argument)
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
            raise UserError(f'{argument} is not a file, a folder with images or a pattern that matches files')
        photos += found
    return photos


def predict(
    pretrained: Pretrained, photos: Iterable[Path], *, top: int = 5, batch_size: int = 16
) -> Iterator[Prediction]:
    """An iterator over the predictions for files, in the order of the files.

    The prediction for an unreadable file contains the error.

    Args:
        pretrained: model, preprocessing and class names. The defaults are ImageNet's preprocessing at 224 pixels, and
            class names such as 'class 7'.
        photos: the files, which are read batch by batch.
        top: number of classes in a prediction.
        batch_size: number of images in a batch.

    Raises:
        UserError: the model is a regression, or the processor does not match the model.
    """
    pretrained.check_head()
    if pretrained.activation is None:
        raise UserError('the model has a regression head: its outputs are values, not probabilities of classes')
    activation = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}[pretrained.activation]
    processor = processor_for(pretrained.model.in_channels, pretrained.processor)
    classes = pretrained.model.num_classes
    names = pretrained.class_names or [f'class {label}' for label in range(classes)]
    probabilities = jax.jit(lambda model, images: activation(model(images)))
    for batch, images, errors in read_batches(photos, processor, batch_size):
        scores = np.asarray(probabilities(pretrained.model, jnp.asarray(images)))
        for i, path in enumerate(batch):
            if i in errors:
                yield Prediction(path, error=errors[i])
            else:
                finite = np.isfinite(scores[i]).all()
                best = np.argsort(-scores[i], kind='stable')[:top] if finite else ()
                yield Prediction(path, tuple((int(label), names[label], float(scores[i, label])) for label in best))


def read_batches(
    photos: Iterable[Path], processor: ImageProcessor, batch_size: int
) -> Iterator[tuple[tuple[Path, ...], np.ndarray, dict[int, str]]]:
    """Reads image files batch by batch.

    Args:
        photos: the files.
        processor: the preprocessing.
        batch_size: number of images in a batch.

    Yields:
        The files of the batch, at most `batch_size`; the images, (batch_size, size, size, C) float32, which are 0 after
        the last file and for unreadable files; and index in the batch → error message of each unreadable file.
    """
    photos = iter(photos)
    while batch := tuple(itertools.islice(photos, batch_size)):
        images = np.zeros((batch_size, processor.size, processor.size, len(processor.mean)), np.float32)
        errors = {}
        for i, path in enumerate(batch):
            try:
                images[i] = processor(path)[0]
            except UserError as error:
                errors[i] = str(error)
        yield batch, images, errors
