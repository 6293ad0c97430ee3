"""Compiled programs that are kept for the next start."""

import tempfile

import jax

from convnext_jax.errors import UserError
from convnext_jax.paths import local_path, plain_path


def cache_compiled(directory: str) -> None:
    """Keeps the programs that take over a second to compile in a folder, for the next start; '' changes nothing.

    To be called before anything is compiled.

    Raises:
        UserError: the folder cannot be written.
    """
    if not directory:
        return
    if '://' not in directory:  # of what lies in a cloud, JAX warns by itself
        folder = local_path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f'compilation_cache_dir={directory} cannot be written: {error.strerror}') from error
        directory = str(plain_path(folder))
    jax.config.update('jax_compilation_cache_dir', directory)
