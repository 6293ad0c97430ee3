"""python -m convnext_jax COMMAND

models                                       the table of architectures
convert SOURCE TARGET --layout=huggingface   weights of a run or of another library, for another library
"""

import jax
from absl import flags

from convnext_jax.command_line import parse, run
from convnext_jax.errors import UserError
from convnext_jax.interop import save_pretrained
from convnext_jax.interop.layouts import LAYOUTS
from convnext_jax.models import create_model, get_parameters, get_variant, list_models
from convnext_jax.training.weights import read_weights


def models(arguments: list[str]) -> None:
    """Prints name, parameters and multiply-adds at 224 pixels and 1,000 classes of every model."""
    parse(flags.FlagValues(), arguments, usage=__doc__)
    print(f'{"name":28}{"parameters":>14}{"multiply-adds":>15}')
    for name in list_models():
        model = jax.eval_shape(lambda key, name=name: create_model(name, key=key), jax.random.key(0))
        parameters = sum(array.size for array in get_parameters(model).values())
        print(f'{name:28}{parameters:14,}{get_variant(name).multiply_adds() / 1e9:13.2f} G')


def convert(arguments: list[str]) -> None:
    """Writes a run's or another library's weights as a folder of another library."""
    values = flags.FlagValues()
    flags.DEFINE_enum('layout', 'huggingface', LAYOUTS, 'What the folder is for.', flag_values=values)
    flags.DEFINE_string('params', None, "Which weights: 'ema' or 'raw'.", flag_values=values)
    flags.DEFINE_string('name', None, 'The architecture, for a file that does not say it.', flag_values=values)
    source, target = parse(values, arguments, usage=__doc__, positional=('SOURCE', 'TARGET'))
    pretrained = read_weights(source, values.params or 'raw', values.name)
    save_pretrained(
        pretrained.model,
        target,
        layout=values.layout,
        class_names=pretrained.class_names,
        processor=pretrained.processor,
    )
    print(f'{target} holds the {pretrained.layout} weights of {source} in the {values.layout} layout')


COMMANDS = {'models': models, 'convert': convert}


def main(arguments: list[str]) -> None:
    name = arguments[1] if len(arguments) > 1 else ''
    if name not in COMMANDS:
        raise UserError(f"there is no command '{name}': python -m convnext_jax {{{' | '.join(COMMANDS)}}}")
    COMMANDS[name]([f'{arguments[0]} {name}', *arguments[2:]])


if __name__ == '__main__':
    run(main)
