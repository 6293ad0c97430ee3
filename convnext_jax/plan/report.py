"""plan(config, target, images): compiles a training step and prints the compiler's figures."""

import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait

from ml_collections import ConfigDict
from tqdm import tqdm

from convnext_jax.config import check_values
from convnext_jax.errors import UserError
from convnext_jax.output import show
from convnext_jax.plan.compile import Compiled, DoesNotFit, Memory, compile_step
from convnext_jax.plan.hlo import Found, Instruction, bytes_sent, collectives, read_program
from convnext_jax.plan.targets import Target
from convnext_jax.training.sharding import describe_mesh, make_mesh

MAX_INSTRUCTIONS = 12  # number of instructions to print
GIB = 2**30


def plan(config: ConfigDict, target: Target, images: int | None) -> None:
    """Prints memory, collectives and estimated cycles of the training step, and the largest batch that fits.

    If the program does not fit, it is compiled again with half the images per chip, until it fits. One more program
    with half the images of that program is compiled to extrapolate the largest batch.

    Args:
        config: the config of the experiment.
        target: the chips.
        images: number of images per chip in one accumulation step; None for the number that follows from the config.

    Raises:
        UserError: as for `compile_step`; or the batch does not divide evenly, or one image per chip does not fit.
    """
    check_values(config)
    images = images or _images(config, target)
    size, chips = config.data.image_size, len(target.devices)
    mesh = describe_mesh(make_mesh(**config.mesh, devices=target.devices))
    show(f'{config.model.name} at {size}×{size}, {config.model.dtype}, on {target.name}: {chips} chips, mesh {mesh}')
    show(f'compiler {target.compiler}: all figures are estimates of the compiler, not measurements')
    compiled = _compile(config, target, images)
    while isinstance(compiled, DoesNotFit):
        if compiled.images == 1:
            raise UserError(f'one image per chip does not fit on {target.name}: try --config.model.remat=full')
        compiled = _compile(config, target, compiled.images // 2)
    for line in describe(compiled, target):
        show(line)
    smaller = _compile(config, target, compiled.images // 2) if compiled.images > 1 else None
    if isinstance(smaller, Compiled):
        show(_largest_batch_line(smaller, compiled, target))


def _images(config: ConfigDict, target: Target) -> int:
    parts = len(target.devices) * config.accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f'batch_size={config.batch_size} is not a multiple of {len(target.devices)} chips × '
            f'{config.accumulation_steps} accumulation steps: give the images per chip with --batch'
        )
    return config.batch_size // parts


def _compile(config: ConfigDict, target: Target, images: int) -> Compiled | DoesNotFit:
    show(f'compiling the training step for {images} images per chip …')
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(bar_format='{elapsed}', leave=False, disable=not sys.stderr.isatty()) as clock,
    ):
        future = pool.submit(compile_step, config, target, images)
        while wait([future], timeout=1).not_done:
            clock.refresh()
    compiled = future.result()
    outcome = 'compiled' if isinstance(compiled, Compiled) else f'does not fit ({compiled.error}); stopped'
    show(f'{outcome} after {compiled.seconds:.1f} s')
    return compiled


def _largest_batch_line(smaller: Compiled, larger: Compiled, target: Target) -> str:
    points = f'{smaller.images} ({_gib(smaller.memory.total)}) and {larger.images} ({_gib(larger.memory.total)})'
    if larger.memory.total <= smaller.memory.total:
        return f'the memory does not grow between {points} images: plan with a larger --batch'
    images = largest_batch(smaller, larger, target.chip.memory)
    return f'about {images:,} images fit on a chip, extrapolated from {points}; to verify, plan with --batch={images}'


def largest_batch(smaller: Compiled, larger: Compiled, capacity: float) -> int:
    """The number of images that fit on a chip, extrapolated linearly from the memory of two programs.

    Args:
        smaller, larger: programs for different numbers of images.
        capacity: memory of the chip in GiB.
    """
    per_image = (larger.memory.total - smaller.memory.total) / (larger.images - smaller.images)
    return int(larger.images + (capacity * GIB - larger.memory.total) / per_image)


def describe(compiled: Compiled, target: Target) -> list[str]:
    """The lines to print about a compiled program: memory, collectives, cycles, communication."""
    program = read_program(compiled.text, compiled.kernel_cycles)
    found = collectives(program, len(target.devices))
    return [
        *_memory_lines(compiled.memory, target.chip.memory),
        *_collective_lines(found),
        *(_kernel_lines(program, compiled.kernel_cycles) if target.listings else []),
        *_cycle_lines(program, found, target),
    ]


def _memory_lines(memory: Memory, capacity: float) -> list[str]:
    rows = {
        'state and batch': memory.arguments,
        'other results': memory.results,
        'temporaries': memory.temporaries,
        'program': memory.program,
    }
    fits = 'fits' if memory.total <= capacity * GIB else 'does not fit'
    return [
        '\nmemory per chip',
        *(f'  {name:16}{_gib(size):>12}' for name, size in rows.items()),
        f'  {"total":16}{_gib(memory.total):>12} of {capacity:g}: {fits}',
    ]


def _collective_lines(found: Found) -> list[str]:
    rows = [
        f'  {kind:20}{dtype:8}{total.runs:4} × over {chips:4} chips {total.size / 1e6:10.2f} MB in total'
        for (kind, dtype, chips), total in sorted(found.items())
    ]
    return [
        '\ncollectives in one step, and the bytes of their results per chip',
        *(rows or ['  none']),
        f'  each chip sends at least {bytes_sent(found) / 1e6:.2f} MB',
    ]


def _cycle_lines(program: list[Instruction], found: Found, target: Target) -> list[str]:
    total, chip = sum(instruction.runs * instruction.cycles for instruction in program), target.chip
    if not total or chip.clock is None or chip.link is None:
        return ['\nestimated cycles: not reported by this compiler']
    ordered = sorted(program, key=lambda instruction: instruction.runs * instruction.cycles, reverse=True)
    heaviest = ordered[:MAX_INSTRUCTIONS]
    seconds = total / chip.clock / 1e9
    recomputed = sum(instruction.runs * instruction.cycles for instruction in program if '.remat' in instruction.name)
    communication = bytes_sent(found) / chip.link / 1e9
    return [
        f'\nestimated cycles without collectives: {total:,}, {1000 * seconds:.1f} ms at {chip.clock:g} GHz\n'
        f'the {len(heaviest)} instructions with the most cycles: share, runs × cycles, name, operation',
        *(
            f'  {i.runs * i.cycles / total:6.1%}{i.runs:4} × {i.cycles:10,}  {i.name}  '
            f'{i.operation.removeprefix("jit(train_step)/")}'
            for i in heaviest
        ),
        f'recomputed by the compiler to save memory: {recomputed / total:.1%}',
        f'communication: at least {1000 * communication:.2f} ms over links of {chip.link:g} GB/s, '
        f'{communication / (communication + seconds):.1%} of the step if it is not overlapped with computation\n',
    ]


def _kernel_lines(program: list[Instruction], kernel_cycles: Mapping[str, int]) -> list[str]:
    kernels = [i for i in program if i.opcode == 'custom-call' and 'pallas_call' in i.operation]
    if not kernels:
        return []
    cycles = sum(i.runs * i.cycles for i in kernels)
    missing = sum(i.name not in kernel_cycles for i in kernels)
    return [
        f'\nPallas kernels: {len(kernels)} with {cycles:,} cycles, counted from their instructions'
        + (f'; {missing} are not counted' if missing else '')
    ]


def _gib(size: int) -> str:
    return f'{size / GIB:.2f} GiB'
