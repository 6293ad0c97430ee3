"""Local paths: expansion of `~`, and paths without characters that C++ libraries do not accept."""

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path

from convnext_jax.errors import UserError, first_line

PLAIN = re.compile(r'[\w/ .,=+~-]*')
"""Paths that all libraries accept. TensorStore interprets a backslash as a slash, and [0:3] as its own syntax. Bindings
of C++ libraries reject bytes that are not UTF-8."""


def local_path(text: str | Path) -> Path:
    """A local path, with `~` or `~user` at its start expanded.

    Raises:
        UserError: the home folder is unknown.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f'{text} cannot be expanded: {first_line(error)}') from error


def plain_path(folder: Path) -> Path:
    """An absolute path of an existing folder that all libraries accept.

    If the path of the folder has unusual characters, the result is a symbolic link to it in the folder for temporary
    files. The link is removed when the process exits.
    """
    folder = folder.absolute()
    return folder if PLAIN.fullmatch(str(folder)) else _link(folder)


@functools.cache
def _link(folder: Path) -> Path:
    parent = Path(tempfile.mkdtemp(prefix='convnext_jax-'))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)  # removes the link, not its target
    (parent / 'link').symlink_to(folder, target_is_directory=True)
    return parent / 'link'
