"""Paths as people type them, and as libraries written in C++ take them."""

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path

from convnext_jax.errors import UserError, first_line

PLAIN = re.compile(r'[\w/ .,=+~-]*')
"""Paths that every library takes. TensorStore reads a backslash as a slash and [0:3] as part of its own syntax, and
bindings of C++ libraries refuse bytes that are not UTF-8."""


def local_path(text: str | Path) -> Path:
    """A path of this machine, with a `~` or `~user` at its start expanded.

    Raises:
        UserError: the home folder is not known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f'{text} cannot be expanded: {first_line(error)}') from error


def plain_path(folder: Path) -> Path:
    """An absolute path of an existing folder that every library takes.

    Where the folder's own path has unusual characters, this is a link to it in the folder for temporary files, which is
    removed at the end of the process.
    """
    folder = folder.absolute()
    return folder if PLAIN.fullmatch(str(folder)) else _link(folder)


@functools.cache
def _link(folder: Path) -> Path:
    place = Path(tempfile.mkdtemp(prefix='convnext_jax-'))
    atexit.register(shutil.rmtree, place, ignore_errors=True)  # removes the link, and not what it leads to
    (place / 'link').symlink_to(folder, target_is_directory=True)
    return place / 'link'
