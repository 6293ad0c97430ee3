"""The type checker of jaxtyping's import hook, see conftest.py."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

with_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may be passed as a float


def check(function: Callable) -> Callable:
    """The function, with run-time checks of the arguments and results whose shapes are annotated."""
    if function.__qualname__ == 'Visible.__init__':  # JAX builds this pytree with placeholders instead of arrays
        return function
    hints = {name: hint for name, hint in function.__annotations__.items() if 'jaxtyping.' in str(hint)}
    function.__annotations__ = hints
    return with_beartype(function)
