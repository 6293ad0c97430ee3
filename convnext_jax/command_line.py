"""What the commands share: flags with a config file, errors in one line, exit status."""

import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from convnext_jax.errors import UserError
from convnext_jax.training.stop import Stopped


def run(command: Callable[[list[str]], None]) -> None:
    """Runs a command on the process's arguments and exits: 0 done, 2 the user's to mend, 128 + signal stopped."""
    try:
        command(sys.argv)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.status)


def parse(values: flags.FlagValues, arguments: Sequence[str], usage: str) -> flags.FlagValues:
    """Parses the arguments, config overrides among them.

    Raises:
        UserError: an unknown flag, config field or file, or a value of the wrong type.
    """
    flags.DEFINE_bool('help', False, 'Show this help.', short_name='h', flag_values=values, allow_override=True)
    try:
        left_over = values(list(arguments))[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise UserError(' '.join(str(error).split())) from error
    if values.help:
        print(f'{usage}\n{values.main_module_help()}')
        sys.exit(0)
    if left_over:
        raise UserError(f'not understood: {" ".join(left_over)}')
    return values


def define_config(values: flags.FlagValues) -> None:
    """Adds --config=FILE[:VARIANT] and --config.FIELD=VALUE."""
    config_flags.DEFINE_config_file('config', None, 'The experiment: configs/NAME.py[:VARIANT].', flag_values=values)


def required(values: flags.FlagValues, name: str) -> object:
    """The value of a flag that must be given.

    Raises:
        UserError: it was not.
    """
    if values[name].value is None:
        raise UserError(f'--{name} is missing; --help says more')
    return values[name].value
