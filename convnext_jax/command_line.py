"""What the commands share: flags with a config file, errors in one line, exit status."""

import contextlib
import errno
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import TextIO

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from convnext_jax.errors import UserError
from convnext_jax.output import OutputClosed, drop_unwritten, open_streams, say, show
from convnext_jax.paths import local_path
from convnext_jax.runtime import processes
from convnext_jax.runtime.stop import Stopped
from convnext_jax.runtime.watchdog import Watchdog

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""A disk that is full, or that may not be written."""

NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
"""A path that no file can have, or a link that leads to itself."""

OUTPUT_CLOSED = 141
"""The exit status of a process that SIGPIPE ended, as a shell gives it."""


def run(command: Callable[[list[str]], None]) -> None:
    """Runs a command on the process's arguments.

    The process exits with status 2 after an error that the user can fix, 128 + number after a signal, 141 (as after
    SIGPIPE) if the reader of stdout ended before the command, and 1 after any other error.
    """
    open_streams()
    # Orbax logs the tracebacks of errors that it raises besides, and asyncio those of its tasks that nobody waits for.
    logging.set_verbosity(logging.FATAL)
    getLogger('asyncio').setLevel(CRITICAL)
    sys.unraisablehook = _show_unraisable
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command(sys.argv)
    except Stopped as stopped:
        say(str(stopped))
        sys.exit(stopped.status)
    except OutputClosed:
        sys.exit(OUTPUT_CLOSED)
    except (KeyboardInterrupt, UserError, OSError) as error:
        text, status = _text_and_status(error)
        say(text.rstrip(), error=True)
        sys.exit(status)
    finally:
        drop_unwritten()


def _text_and_status(error: BaseException) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt):
        return '\ninterrupted', 130
    if isinstance(error, UserError):
        return f'error: {error}', 2
    if isinstance(error, OutputClosed):
        return f'error: {error}', OUTPUT_CLOSED
    if isinstance(error, OSError) and error.errno in NO_PATH:
        return f'error: {error.filename} cannot be found: {error.strerror}', 2
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        where = f'{error.filename} cannot be written: ' if error.filename else ''
        return f'error: {where}{error.strerror}', 2
    return ''.join(traceback.format_exception(error)), 1


def define_processes(values: flags.FlagValues) -> None:
    """Adds the flags of jobs on several hosts, where JAX does not find these by itself."""
    flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, the same on all hosts.', flag_values=values)
    flags.DEFINE_integer('process_count', None, 'Processes of the job.', lower_bound=1, flag_values=values)
    flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.', lower_bound=0, flag_values=values)
    flags.DEFINE_integer(
        'process_timeout',
        180,
        'Seconds to wait for processes that have not come, or that answer no more.',
        lower_bound=4,
        flag_values=values,
    )


@contextlib.contextmanager
def all_processes(values: flags.FlagValues) -> Iterator[None]:
    """JAX's runtime over all processes of the job, if there are several: they end together, and with one's error all.

    Raises:
        UserError: the flags of `define_processes` do not fit one another.
    """
    if not processes.start(values.coordinator, values.process_count, values.process_id, values.process_timeout):
        yield
        return
    watchdog = Watchdog(values.process_timeout)
    try:
        yield
    except Stopped:
        watchdog.finish()
        raise
    except BaseException as error:
        watchdog.fail(error, *_text_and_status(error))
    else:
        watchdog.finish()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Shows a warning of this package as one line, without the place in the code; those of libraries as usual."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        say(f'warning: {message}', error=True)
    else:
        say(warnings.formatwarning(message, category, filename, lineno).rstrip(), error=True)


def _show_unraisable(unraisable: 'sys.UnraisableHookArgs') -> None:
    # Of a save or a restore that fails, Orbax raises one error and abandons its other coroutines, hundreds of them, and
    # TensorStore tells their closed loop that they have ended.
    if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def define_config(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Adds --config=FILE[:VARIANT] and --config.FIELD=VALUE."""
    config_flags.DEFINE_config_file(
        'config',
        None,
        'The experiment, configs/NAME.py[:VARIANT]; --config.FIELD=VALUE overrides a value.',
        flag_values=values,
        sys_argv=list(arguments),
    )


def define_stored_config(values: flags.FlagValues, arguments: Sequence[str], config: ConfigDict) -> None:
    """Adds --config.FIELD=VALUE, which overrides values of a copy of a config that a run stored.

    Raises:
        UserError: an unknown config field.
    """
    with refusals():
        config_flags.DEFINE_config_dict(
            'config',
            config.copy_and_resolve_references(),
            "The run's config; --config.FIELD=VALUE overrides a value.",
            flag_values=values,
            sys_argv=list(arguments),
        )


def parse(
    values: flags.FlagValues, arguments: Sequence[str], usage: str, positional: tuple[str, ...] = ()
) -> list[str]:
    """Parses the arguments, config overrides among them, and returns those that are no flags.

    Args:
        values: the flags.
        arguments: of the process, its name first.
        usage: what --help shows.
        positional: a name for each argument that is no flag; '...' for any number more of the last.

    Raises:
        UserError: an unknown flag, config field or file, or a value of the wrong type.
    """
    flags.DEFINE_bool('help', False, 'Show this help.', short_name='h', flag_values=values)
    with refusals():
        left_over = values([_with_home(argument) for argument in arguments])[1:]
    if values.help:
        show(f'{usage}\n{values.get_help()}')
        sys.exit(0)
    more = '...' in positional
    positional = tuple(name for name in positional if name != '...')
    if len(left_over) < len(positional):
        raise UserError(f'{positional[len(left_over)]} is missing; --help says more')
    if len(left_over) > len(positional) and not more:
        raise UserError(f'not understood: {" ".join(left_over[len(positional) :])}')
    return left_over


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns what absl and ml_collections raise about flags into one line."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        # ml_collections gives the name in quotes, and on a further line the name that is near.
        name, *near = re.findall(r'\w+(?=\\?["\'])', str(error))
        hint = f': did you mean {near[0]}?' if near else ''
        raise UserError(f"the config has no field '{name}'{hint}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(_last_line(error)) from error


def required(values: flags.FlagValues, name: str) -> str:
    """The text of a flag that must be given.

    Raises:
        UserError: it was not.
    """
    value = values[name].value
    if value is None:
        raise UserError(f'--{name} is missing; --help says more')
    return value


def required_config(values: flags.FlagValues) -> ConfigDict:
    """The config of --config, with the overrides applied.

    Raises:
        UserError: the flag was not given, or there is no such file.
    """
    if values['config'].value is None:
        raise UserError('--config is missing: give configs/NAME.py, and override with --config.FIELD=VALUE')
    path = Path(config_flags.get_config_filename(values['config']).split(':')[0])
    if not path.is_file():
        raise UserError(f'--config: there is no file {path}')
    return values['config'].value


def _with_home(argument: str) -> str:
    """The argument; in --config=~/FILE, where the shell leaves the ~, with the home folder in its place."""
    name, _, path = argument.partition('=')
    return f'{name}={local_path(path)}' if name.lstrip('-') == 'config' and path.startswith('~') else argument


def _last_line(error: Exception) -> str:
    # absl puts the traceback of a config file into its message; the cause is in the last line.
    line = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
    return line.removeprefix(f'{UserError.__module__}.{UserError.__name__}: ')
