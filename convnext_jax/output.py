"""Text output of the commands: results, progress and JSON."""

import contextlib
import json
import math
import os
import sys

from tqdm import tqdm

from convnext_jax.errors import UserError


class OutputClosed(Exception):
    """The program that reads standard output has exited, as `head` does after its last line."""


def show(text: str) -> None:
    """Prints the result of a command on stdout, above the progress bar if there is one.

    Raises:
        OutputClosed: the program that reads stdout has exited.
        UserError: stdout cannot be written, for example because the disk is full.
    """
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise OutputClosed('standard output is closed') from error
    except OSError as error:
        raise UserError(f'standard output cannot be written: {error.strerror}') from error


def say(line: str, *, error: bool = False) -> None:
    """Prints a line of progress, above the progress bar if there is one. It never raises an error.

    If the stream cannot be written (a closed pipe, a lost terminal, a full disk), the line is dropped, so that training
    continues.

    Args:
        line: the text.
        error: print on stderr instead of stdout.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # the process was started without this stream
        return
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed, or cannot encode the line
        tqdm.write(line, file=stream)
        stream.flush()


def say_in_handler(line: str) -> None:
    """Prints a line on stderr from a signal handler: unbuffered, because the interrupted code may hold the buffer."""
    with contextlib.suppress(OSError):
        os.write(2, f'\n{line}\n'.encode())


def open_streams() -> None:
    """Prepares stdin, stdout and stderr: escapes characters that a stream cannot encode, and replaces closed streams.

    A closed stream is replaced by the null device. Otherwise the next file that the process opens would get the file
    descriptor of the stream, and printed text would go into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is `number`
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))  # noqa: SIM115 - open until the process ends
        if hasattr(getattr(sys, name), 'reconfigure'):  # the streams of a notebook have no encoding
            getattr(sys, name).reconfigure(errors='backslashreplace')


def drop_unwritten() -> None:
    """Discards the buffered text of streams that cannot be written.

    Otherwise Python tries to write it again at exit, prints a message and exits with status 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # the stream has no file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def to_json(value: object, indent: int | None = None) -> str:
    """A value as JSON text. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: object) -> object:
    """A JSON value in which every NaN and infinity is replaced by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
