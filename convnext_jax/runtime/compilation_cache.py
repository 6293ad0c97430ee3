"""JAX's persistent compilation cache."""

import tempfile

import jax

from convnext_jax.errors import UserError
from convnext_jax.paths import local_path, plain_path


def cache_compiled(directory: str) -> None:
    """Stores compiled programs in a folder, so that the next process does not compile them again.

    Call it before anything is compiled. JAX stores programs that take more than a second to compile.

    Args:
        directory: a local folder or a bucket URL; '' does nothing.

    Raises:
        UserError: the folder cannot be written.
    """
    if not directory:
        return
    if '://' not in directory:  # JAX itself warns if a bucket cannot be written
        folder = local_path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f'compilation_cache_dir={directory} cannot be written: {error.strerror}') from error
        directory = str(plain_path(folder))
    jax.config.update('jax_compilation_cache_dir', directory)
