"""Cost of a mask: an encoder's training step on masked images, compared with its step on whole images.

    launch/cpu.sh python -m benchmarks.masking [--model=convnextv2_atto] [--size=224] [--batch=16] [--rounds=11]
    python -m benchmarks.masking --topology=v5e:2x2 --batch=64

A step is the forward and backward pass of the encoder alone, without the decoder and the optimizer; with a mask it also
draws the visible patches. On CPU, the two steps alternate, and the command prints the median CPU time of each and
the median ratio. With `--topology`, the steps are compiled for one TPU chip, which does not have to be attached, and
the command prints the compiler's estimates of their cycles.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from convnext_jax.models import Execution, Parameters, get_parameters, get_variant, with_parameters
from convnext_jax.models.masked import Visible, draw_patches
from convnext_jax.models.trunk import Trunk
from convnext_jax.plan import tpu_target
from convnext_jax.plan.hlo import read_program

PATCH, VISIBLE = 32, 0.4
STEPS = ('whole', 'masked')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='convnextv2_atto')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--topology', default=None, help='TPU slice to compile for, such as v5e:2x2')
    options = parser.parse_args()
    steps = {kind: make_step(options, masked=kind == 'masked') for kind in STEPS}
    if options.topology:
        jax.config.update('jax_platforms', 'cpu')
        device = tpu_target(options.topology).devices[0]
        whole, masked = (cycles(steps[kind], options, device) for kind in STEPS)
        print(f'estimated cycles: {whole:,} whole, {masked:,} masked, ratio {masked / whole:.3f}')
    else:
        inputs = jax.block_until_ready(jax.jit(lambda: arguments(options))())
        times = [[milliseconds(steps[kind], inputs) for kind in STEPS] for _ in range(options.rounds + 1)][1:]
        whole, masked = map(statistics.median, zip(*times, strict=True))
        ratios = [masked / whole for whole, masked in times]
        spread = f'from {min(ratios):.3f} to {max(ratios):.3f}'
        print(f'{whole:.0f} ms whole, {masked:.0f} ms masked, median ratio {statistics.median(ratios):.3f} ({spread})')


def make_step(options: argparse.Namespace, *, masked: bool) -> Callable:
    """The jitted gradient of the encoder: (parameters, images, keys) → gradients."""
    model, side = jax.eval_shape(lambda: encoder(options)), options.size // PATCH
    count = int(VISIBLE * side**2)

    def loss(parameters: Parameters, images: jax.Array, keys: jax.Array) -> jax.Array:
        visible = Visible(draw_patches(keys, side, side, count), max_visible=count) if masked else None
        last = list(with_parameters(model, parameters).features(images, visible=visible).values())[-1]
        return jnp.square(last.astype(jnp.float32)).mean()

    return jax.jit(jax.grad(loss))


def encoder(options: argparse.Namespace) -> Trunk:
    """The encoder with random parameters; it computes in bfloat16 on a TPU."""
    execution = Execution('bfloat16' if options.topology else 'float32')
    return Trunk(get_variant(options.model), key=jax.random.key(0), execution=execution)


def arguments(options: argparse.Namespace) -> tuple[Parameters, jax.Array, jax.Array]:
    """The arguments of a step."""
    key = jax.random.key(1)
    images = jax.random.normal(key, (options.batch, options.size, options.size, 3))
    return get_parameters(encoder(options)), images, jax.random.split(key, options.batch)


def cycles(step: Callable, options: argparse.Namespace, device: jax.Device) -> int:
    """The cycles that the compiler estimates for one step on a TPU chip."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(lambda: arguments(options))
    )
    program = read_program(step.lower(*shapes).compile().as_text())
    return sum(instruction.runs * instruction.cycles for instruction in program)


def milliseconds(step: Callable, inputs: tuple) -> float:
    """The CPU time of one step, over all threads. Other programs affect it less than they affect the elapsed time."""
    began = time.process_time()
    jax.block_until_ready(step(*inputs))
    return 1000 * (time.process_time() - began)


if __name__ == '__main__':
    main()
