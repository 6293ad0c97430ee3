"""Options that say how a network is computed: dtype, recomputation in the backward pass, unrolling, Pallas kernel."""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import Any, TypedDict

import jax.numpy as jnp
from jax.typing import DTypeLike

from convnext_jax.errors import UserError

DTYPES = ('float32', 'bfloat16', 'float16')
REMAT = ('none', 'dots', 'full')


class ExecutionOptions(TypedDict, total=False):
    """The fields of `Execution` as keyword arguments, for `create_model` and other functions that build a network."""

    dtype: DTypeLike
    remat: str
    unroll: bool
    pallas: bool


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a network is computed. The options change speed, memory and rounding, but no parameter and no shape.

    Attributes:
        dtype: dtype of matrix products and convolutions: 'float32', 'bfloat16' or 'float16', as a name or as a dtype
            such as `jnp.bfloat16`. Parameters, their gradients, norms and logits are always float32.
        remat: what the backward pass recomputes. 'none': nothing. 'dots': everything except the results of matrix
            products and convolutions and the statistics of norms (half the memory of 'none'). 'full': whole blocks (a
            third of the memory, a third more computation).
        unroll: compile each block separately instead of a loop over one compiled block per stage. Compilation takes
            two to three times as long. Training is 1 to 3 % faster on CPU (evaluation is slower), and takes an eighth
            fewer cycles on TPU, because a loop copies the arrays that the backward pass needs.
        pallas: use the kernel of `depthwise_tpu.py` instead of the compiler's depthwise convolution on TPU v5e, v5p and
            v6e, for the shapes that it supports; no effect on CPU and GPU. On several devices the network must then be
            called inside `jax.shard_map`. The kernel has not run on a TPU.

    Raises:
        UserError: `dtype` or `remat` has another value.
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
        object.__setattr__(self, 'dtype', dtype)  # one spelling for each dtype, so that equal executions compare equal

    @classmethod
    def from_keywords(cls, function: FunctionType, keywords: Mapping[str, Any]) -> 'Execution':
        """An execution from the `**keywords` with which a caller has called `function`.

        Raises:
            TypeError: a keyword is not a field; the message names `function` and the most similar argument.
            UserError: a field has a value that is not allowed.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in keywords:
            if name not in fields:
                arguments = [*inspect.signature(function).parameters, *fields]
                near = difflib.get_close_matches(name, arguments, n=1)
                hint = f". Did you mean '{near[0]}'?" if near else ''
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument '{name}'{hint}")
        return cls(**keywords)
