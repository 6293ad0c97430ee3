"""Reconstructs image files with the network of an FCMAE run."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convnext_jax.checkpoints.checkpoint import DamagedCheckpoint, restore_parameters
from convnext_jax.checkpoints.workdir import CONFIG, workdir_path
from convnext_jax.config import read_config
from convnext_jax.data.decode import decode, eval_resize
from convnext_jax.errors import UserError
from convnext_jax.models import with_parameters
from convnext_jax.tasks import abstract_model, make_task
from convnext_jax.tasks.fcmae import FCMAE
from convnext_jax.training.weights import newest_checkpoint, weights_field


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """The reconstruction of one image file.

    Attributes:
        path: path of the file.
        pixels: (size, 3 · size, 3) uint8: the image, its visible patches and the reconstruction; None after an error.
        error: reason why the file could not be read, or ''.
    """

    path: Path
    pixels: np.ndarray | None = None
    error: str = ''


def reconstruct_photos(workdir: str, photos: Sequence[Path], params: str = 'raw') -> Iterator[Reconstruction]:
    """Reconstructs images with the newest checkpoint of a run. The index of an image in the list determines its mask.

    Args:
        workdir: workdir of a run of the task fcmae.
        photos: paths of the image files.
        params: 'raw' or 'ema'.

    Raises:
        UserError: the run or the weights do not exist, or the run has another task.
    """
    field = weights_field(params)
    config = read_config(workdir_path(workdir) / CONFIG)
    task = make_task(config)
    if not isinstance(task, FCMAE):
        raise UserError(f'{workdir} is a run of the task {config.task}, but only runs of fcmae reconstruct images')
    directory, step = newest_checkpoint(workdir_path(workdir))
    try:
        weights = restore_parameters(directory, step, field)
    except DamagedCheckpoint as error:
        raise UserError(f'checkpoint {step} of {workdir} is damaged: {error}') from error
    model = with_parameters(abstract_model(config), weights)
    draw, data = jax.jit(task.draw), config.data
    for number, path in enumerate(photos):
        try:
            image = decode(path.read_bytes(), task.channels, str(path))
            pixels = eval_resize(image, data.image_size, data.crop_pct, name=str(path))
        except (OSError, UserError) as error:
            yield Reconstruction(path, error=str(error))
        else:
            yield Reconstruction(path, np.asarray(draw(model, jnp.asarray(pixels[None]), jnp.asarray([number]))))
