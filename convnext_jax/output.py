"""What the commands print and write as text: results, progress, and JSON."""

import contextlib
import json
import math
import os
import sys

from tqdm import tqdm

from convnext_jax.errors import UserError


class OutputClosed(Exception):
    """The reader of standard output has ended, as `head` does after its lines."""


def show(text: str) -> None:
    """Prints lines of a command's result on stdout, above a progress bar.

    Raises:
        OutputClosed: nobody reads stdout any more.
        UserError: stdout cannot be written, for example because its disk is full.
    """
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise OutputClosed('standard output is closed') from error
    except OSError as error:
        raise UserError(f'standard output cannot be written: {error.strerror}') from error


def say(line: str, *, error: bool = False) -> None:
    """Prints a line of progress on stdout, or on stderr, above a progress bar; never raises.

    A line is lost where the stream cannot be written (a closed pipe, a lost terminal, a full disk): training goes on.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # the process was started without it
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed, or cannot encode the line
        tqdm.write(line, file=stream)
        stream.flush()


def say_in_handler(line: str) -> None:
    """As `say` on stderr, for signal handlers: the buffered stream may be in use by the code that was interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f'\n{line}\n'.encode())


def open_streams() -> None:
    """Prepares stdin, stdout and stderr: characters that a stream cannot encode are escaped, closed ones are replaced.

    A closed stream gets the null device. Otherwise the next file that the process opens gets its number, and whatever
    is printed goes into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115 - open until the process ends
        if hasattr(getattr(sys, name), 'reconfigure'):  # a notebook's streams have no encoding to change
            getattr(sys, name).reconfigure(errors='backslashreplace')


def drop_unwritten() -> None:
    """Drops what is left in the buffers of streams that cannot be written.

    Python would try to write it once more at exit, and end with a message and status 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # the stream has no descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def to_json(value: object, indent: int | None = None) -> str:
    """A value as JSON text. JSON has no NaN or infinity: null stands for them."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: object) -> object:
    """A JSON value with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
