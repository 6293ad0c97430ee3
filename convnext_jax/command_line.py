"""Code that all commands share: flags and configs, one-line errors, exit statuses."""

import contextlib
import errno
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import TextIO

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from convnext_jax.configs import RECIPES
from convnext_jax.errors import UserError
from convnext_jax.output import OutputClosed, drop_unwritten, open_streams, say, show
from convnext_jax.paths import local_path
from convnext_jax.runtime import processes
from convnext_jax.runtime.stop import Stopped
from convnext_jax.runtime.watchdog import Watchdog

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a disk that is full or read-only, or of a path without write permission."""

INVALID_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
"""Error numbers of a path that is too long or contains a loop of symbolic links."""

OUTPUT_CLOSED = 141
"""The exit status that a shell reports for a process ended by SIGPIPE: 128 + 13."""


def run(command: Callable[[list[str]], None]) -> None:
    """Runs a command with the arguments of this process, and turns its errors into messages and exit statuses.

    The exit status is 0 after success, 2 after an error that the user can fix, 128 + N after signal N, 141 if the
    program that reads stdout ended before the command, and 1 after any other error.

    Args:
        command: takes `sys.argv`.
    """
    open_streams()
    # Orbax logs tracebacks of errors that it also raises, and asyncio logs errors of tasks that are never awaited.
    logging.set_verbosity(logging.FATAL)
    getLogger('asyncio').setLevel(CRITICAL)
    sys.unraisablehook = _show_unraisable
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # ty: ignore[invalid-assignment]  # ty allows no other function
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
    if isinstance(error, OSError) and error.errno in INVALID_PATH:
        return f'error: {error.filename} cannot be found: {error.strerror}', 2
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        where = f'{error.filename} cannot be written: ' if error.filename else ''
        return f'error: {where}{error.strerror}', 2
    return ''.join(traceback.format_exception(error)), 1


def define_processes(values: flags.FlagValues) -> None:
    """Adds the flags for jobs of several processes that JAX does not detect automatically."""
    flags.DEFINE_string(
        'coordinator', None, 'HOST:PORT of process 0; give all processes this value.', flag_values=values
    )
    flags.DEFINE_integer('process_count', None, 'Number of processes of the job.', lower_bound=1, flag_values=values)
    flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.', lower_bound=0, flag_values=values)
    flags.DEFINE_integer(
        'process_timeout',
        180,
        'Seconds to wait for processes that have not started or no longer respond.',
        lower_bound=4,
        flag_values=values,
    )


@contextlib.contextmanager
def all_processes(values: flags.FlagValues) -> Generator[None]:
    """Runs the body with JAX's distributed runtime if the job has several processes.

    The processes leave the body together. If it raises in one of them, all exit with the status of that error.

    Args:
        values: parsed flags, with those that `define_processes` adds.

    Raises:
        UserError: the flags of `define_processes` contradict each other, or the processes cannot connect.
    """
    if not processes.start(values.coordinator, values.process_count, values.process_id, values.process_timeout):
        yield
        return
    watchdog = Watchdog(values.process_timeout)
    try:
        processes.connect_devices()
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
    """Prints a warning of this package on one line, without file and line number. Other warnings keep their format."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        say(f'warning: {message}', error=True)
    else:
        say(warnings.formatwarning(message, category, filename, lineno).rstrip(), error=True)


def _show_unraisable(unraisable: 'sys.UnraisableHookArgs') -> None:
    # When a save or a restore fails, Orbax raises one error and abandons hundreds of other coroutines. Without the hook
    # each is reported when it is deleted, and again when TensorStore calls back into the closed event loop.
    if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(unraisable)


def define_config(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Adds --config=NAME_OR_FILE[:VARIANT] and --config.FIELD=VALUE."""
    config_flags.DEFINE_config_file(
        'config',
        None,
        'Recipe of the package (NAME[:VARIANT]) or config file (PATH.py[:VARIANT]); --config.FIELD=VALUE overrides a '
        'value.',
        flag_values=values,
        sys_argv=list(arguments),
    )


def define_stored_config(values: flags.FlagValues, arguments: Sequence[str], config: ConfigDict) -> None:
    """Adds --config.FIELD=VALUE, which overrides values of a copy of a config that a run stored.

    Raises:
        UserError: an unknown config field.
    """
    with flag_errors_as_user_errors():
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
    """Parses flags and config overrides, and returns the positional arguments.

    Args:
        values: the defined flags; their values are set.
        arguments: the command line, with the name of the program first.
        usage: text that --help prints before the flags.
        positional: names of the positional arguments; '...' after a name allows any number of them.

    Raises:
        UserError: a flag, a config field or a file is unknown, a value has the wrong type, or a positional argument is
            missing or unexpected.
    """
    flags.DEFINE_bool('help', False, 'Show this help.', short_name='h', flag_values=values)
    with flag_errors_as_user_errors():
        given = values(_with_config_path(arguments))[1:]
    if values.help:
        show(f'{usage}\n{values.get_help()}')
        sys.exit(0)
    repeatable = '...' in positional
    positional = tuple(name for name in positional if name != '...')
    if len(given) < len(positional):
        raise UserError(f'{positional[len(given)]} is missing; see --help')
    if len(given) > len(positional) and not repeatable:
        raise UserError(f'unexpected argument: {" ".join(given[len(positional) :])}; see --help')
    return given


@contextlib.contextmanager
def flag_errors_as_user_errors() -> Generator[None]:
    """Turns the errors that absl and ml_collections raise about flags into a one-line UserError."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        # The message of ml_collections has the unknown name in quotes, and perhaps a similar name on another line.
        name, *near = re.findall(r'\w+(?=\\?["\'])', str(error))
        hint = f': did you mean {near[0]}?' if near else ''
        raise UserError(f"the config has no field '{name}'{hint}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(_last_line(error)) from error


def required(values: flags.FlagValues, name: str) -> str:
    """The text of a required flag.

    Raises:
        UserError: the flag was not given.
    """
    value = values[name].value
    if value is None:
        raise UserError(f'--{name} is missing; see --help')
    return value


def required_config(values: flags.FlagValues) -> ConfigDict:
    """The config given by --config, with the overrides applied.

    Raises:
        UserError: the flag was not given, or the file does not exist.
    """
    if values['config'].value is None:
        raise UserError('--config is missing: give a recipe or a file, and override fields with --config.FIELD=VALUE')
    path = Path(config_flags.get_config_filename(values['config']).split(':')[0])
    if not path.is_file():
        raise UserError(f'--config: there is no file {path}')
    return values['config'].value


def _with_config_path(arguments: Sequence[str]) -> list[str]:
    """The arguments, in which the value of --config is the path of a file instead of the name of a recipe."""
    result: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition('=')
        if flag in ('--config', '-config') and equals:
            argument = f'{flag}={_config_path(value)}'
        elif result and result[-1] in ('--config', '-config'):
            argument = _config_path(argument)
        result.append(argument)
    return result


def _config_path(text: str) -> str:
    """The path of the recipe NAME[:VARIANT] in the package; a path is returned unchanged, with a leading ~ expanded.

    Raises:
        UserError: the text is neither a path nor the name of a recipe.
    """
    name, colon, variant = text.partition(':')
    if name in RECIPES:
        return f'{RECIPES[name]}{colon}{variant}'
    if '/' in name or name.endswith('.py') or Path(name).is_file():
        return str(local_path(text)) if text.startswith('~') else text
    known = ', '.join(RECIPES)
    raise UserError(f"--config: there is no recipe '{name}'; choose one of {known}, or give the path of a config file")


def _last_line(error: Exception) -> str:
    # If a config file raises, absl puts the whole traceback into its message. The cause is on the last line.
    line = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
    return line.removeprefix(f'{UserError.__module__}.{UserError.__name__}: ')
