"""How a network is computed: float type, recomputation in the backward pass, unrolling, kernels."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from typing import TypedDict

import jax.numpy as jnp
from jax.typing import DTypeLike

from convnext_jax.errors import UserError

DTYPES = ('float32', 'bfloat16', 'float16')
REMAT = ('none', 'dots', 'full')


class ExecutionOptions(TypedDict, total=False):
    """The fields of `Execution`, as keyword arguments of `create_model` and other functions that build a network."""

    dtype: DTypeLike
    remat: str
    unroll: bool
    pallas: bool


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a network is computed. It changes speed, memory and rounding, never the parameters or their shapes.

    Attributes:
        dtype: name of the float type of matrix products and convolutions: 'float32', 'bfloat16' or 'float16'; a dtype
            such as `jnp.bfloat16` is accepted as well. Parameters, their gradients, norms and logits are float32.
        remat: what the backward pass recomputes: 'none'; all but the 'dots', which keeps the results of matrix
            products and convolutions and the means of norms (half the memory); or the 'full' block (a third of the
            memory, a third more work).
        unroll: compiles every block on its own instead of one block for each stage and a loop. Compilation takes about
            twice as long; training is 1 to 3 % faster on CPU (evaluation is slower) and takes a quarter less memory
            on TPU.
        pallas: uses the kernel of `depthwise_tpu.py` for the depthwise convolutions on TPU v5e, v5p and v6e, where it
            supports their shapes, instead of the compiler's convolution; no effect on CPU and GPU. On several devices
            such a network must be called inside `jax.shard_map`. The kernel has not been run on a TPU.

    Raises:
        UserError: `dtype` or `remat` is none of the values above.
    """

    dtype: DTypeLike = 'float32'
    remat: str = 'dots'
    unroll: bool = False
    pallas: bool = False

    def __post_init__(self):
        try:
            dtype = jnp.dtype(self.dtype).name
        except TypeError:
            dtype = None
        if dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not '{self.dtype}'")
        if self.remat not in REMAT:
            raise UserError(f"remat must be one of {', '.join(REMAT)}, not '{self.remat}'")
        object.__setattr__(self, 'dtype', dtype)  # one value for each type, so that equal executions compare equal

    @classmethod
    def from_keywords(cls, function: Callable, keywords: ExecutionOptions) -> 'Execution':
        """The execution that a caller of `function` asked for in its `**keywords`.

        Raises:
            TypeError: a keyword is not a field; the message names `function` and the most similar argument.
            UserError: a value is not allowed.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in keywords:
            if name not in fields:
                arguments = [*inspect.signature(function).parameters, *fields]
                near = difflib.get_close_matches(name, arguments, n=1)
                hint = f". Did you mean '{near[0]}'?" if near else ''
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument '{name}'{hint}")
        return cls(**keywords)
