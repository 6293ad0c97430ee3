"""python -m convnext_jax models: the table of architectures."""

import jax
from absl import flags

from convnext_jax.command_line import parse, run
from convnext_jax.errors import UserError
from convnext_jax.models import create_model, get_parameters, get_variant, list_models


def models(arguments: list[str]) -> None:
    """Prints name, parameters and multiply-adds at 224 pixels and 1,000 classes of every model."""
    parse(flags.FlagValues(), arguments, usage=__doc__)
    print(f'{"name":28}{"parameters":>14}{"multiply-adds":>15}')
    for name in list_models():
        model = jax.eval_shape(lambda key, name=name: create_model(name, key=key), jax.random.key(0))
        parameters = sum(array.size for array in get_parameters(model).values())
        print(f'{name:28}{parameters:14,}{get_variant(name).multiply_adds() / 1e9:13.2f} G')


COMMANDS = {'models': models}


def main(arguments: list[str]) -> None:
    name = arguments[1] if len(arguments) > 1 else ''
    if name not in COMMANDS:
        raise UserError(f"there is no command '{name}': python -m convnext_jax {{{' | '.join(COMMANDS)}}}")
    COMMANDS[name]([f'{arguments[0]} {name}', *arguments[2:]])


if __name__ == '__main__':
    run(main)
