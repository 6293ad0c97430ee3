"""Feature vectors of image files, and the files in which they are stored."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.errors import UserError, first_line
from convnext_jax.interop import Pretrained
from convnext_jax.interop.open_clip import image_embedding
from convnext_jax.interop.processor import processor_for
from convnext_jax.prediction import read_batches
from convnext_jax.probing.features import pooled_features

FORMATS = ('.npz', '.parquet')


@dataclasses.dataclass(frozen=True)
class Embedding:
    """The features of one file.

    Attributes:
        path: the file.
        vector: (channels,) float32; None if the file could not be read or a feature is not finite.
        error: why `vector` is None; '' otherwise.
    """

    path: Path
    vector: np.ndarray | None = None
    error: str = ''


def embed(pretrained: Pretrained, photos: Iterable[Path], *, batch_size: int = 16) -> Iterator[Embedding]:
    """An iterator over the features of files, in the order of the files.

    Args:
        pretrained: the model and its preprocessing; without the latter, the default of `predict` is used. The features
            are the input of the head, or, if no norm was trained, the average of the last feature map. An OpenCLIP
            image tower gives its projected embeddings, normalised to length 1.
        photos: the files, which are read batch by batch.
        batch_size: number of images in a batch.

    Raises:
        UserError: the processor does not match the model.
    """
    processor = processor_for(pretrained.model.in_channels, pretrained.processor)
    pooled = functools.partial(pooled_features, norm=pretrained.has_norm)
    features = jax.jit(image_embedding if pretrained.is_image_tower else pooled)
    for batch, images, errors in read_batches(photos, processor, batch_size):
        vectors = np.asarray(features(pretrained.model, jnp.asarray(images)))
        for i, path in enumerate(batch):
            if i in errors:
                yield Embedding(path, error=errors[i])
            elif not np.isfinite(vectors[i]).all():
                yield Embedding(path, error=f'the features of {path} are not finite: use other weights')
            else:
                yield Embedding(path, vectors[i])


def check_format(path: Path) -> None:
    """Checks the suffix and the folder of a file for embeddings, before they are computed.

    Raises:
        UserError: the suffix is not one of `FORMATS`, the folder does not exist, or parquet is chosen without pyarrow.
    """
    if path.suffix not in FORMATS:
        raise UserError(f'--output={path} must be a file name that ends in {" or ".join(FORMATS)}')
    if not path.parent.is_dir():
        raise UserError(f'--output={path}: {path.parent} is not a folder: create it')
    if path.suffix == '.parquet':
        try:
            import pyarrow.parquet  # noqa: F401 - only to see whether it is installed
        except ImportError as error:
            raise UserError(f'--output={path} needs pyarrow: pip install pyarrow, or write an .npz file') from error


def save_embeddings(path: Path, files: Sequence[Path], vectors: np.ndarray) -> None:
    """Writes a file with the paths of images and their features.

    An .npz file has the arrays `path` (N,) and `features` (N, channels). A .parquet file has columns of these names.

    Args:
        path: the file, as for `check_format`. It appears only when it is complete.
        files: paths of the images.
        vectors: (N, channels) float32.

    Raises:
        UserError: the file cannot be written, or parquet cannot store the name of an image.
    """
    names = [str(file) for file in files]
    partial = path.with_name(f'{path.name}.partial')
    try:
        if path.suffix == '.npz':
            with partial.open('wb') as file:
                np.savez(file, path=np.asarray(names), features=vectors)
        else:
            _write_parquet(partial, names, vectors)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f'{path} cannot be written: {error.strerror or first_line(error)}') from error
    except UnicodeEncodeError as error:
        raise UserError(f'{path}: the name of an image is not UTF-8: write an .npz file') from error


def _write_parquet(path: Path, names: list[str], vectors: np.ndarray) -> None:
    import pyarrow
    from pyarrow import parquet

    features = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
    parquet.write_table(pyarrow.table({'path': pyarrow.array(names), 'features': features}), path)
