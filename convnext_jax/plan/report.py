"""plan(config, target, images): compiles the training step and prints what the compiler says of it."""

import sys
from concurrent.futures import ThreadPoolExecutor, wait

from ml_collections import ConfigDict
from tqdm import tqdm

from convnext_jax.config import check_values
from convnext_jax.errors import UserError
from convnext_jax.output import show
from convnext_jax.plan.compile import Compiled, Memory, compile_step
from convnext_jax.plan.hlo import Found, Instruction, bytes_sent, collectives, read_program
from convnext_jax.plan.targets import Target
from convnext_jax.training.sharding import describe_mesh, make_mesh

HEAVIEST = 12
GIB = 2**30


def plan(config: ConfigDict, target: Target, images: int | None) -> None:
    """Prints memory, collectives and estimated cycles of the training step, and the largest batch that fits.

    Args:
        config: as `default_config`.
        target: the chips.
        images: on each of them at once; None: as many as the config's batch makes.

    Raises:
        UserError: as `compile_step`, the batch does not divide evenly, or not even one image on each chip fits.
    """
    check_values(config)
    images = images or _images(config, target)
    size, chips = config.data.image_size, len(target.devices)
    mesh = describe_mesh(make_mesh(**config.mesh, devices=target.devices))
    show(f'{config.model.name} at {size}×{size}, {config.model.dtype}, on {target.name}: {chips} chips, mesh {mesh}')
    show(f'compiler {target.compiler}: all figures are its own, none is measured')
    compiled = _compile(config, target, images)
    while compiled.memory is None:
        if compiled.images == 1:
            raise UserError(f'one image on each chip does not fit {target.name}: try --config.model.remat=full')
        compiled = _compile(config, target, compiled.images // 2)
    for line in describe(compiled, target):
        show(line)
    if compiled.images > 1:
        show(_largest_batch_line(_compile(config, target, compiled.images // 2), compiled, target))


def _images(config: ConfigDict, target: Target) -> int:
    parts = len(target.devices) * config.accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f'batch_size={config.batch_size} is no multiple of {len(target.devices)} chips × '
            f'{config.accumulation_steps} accumulation steps: say with --batch how many images a chip takes at once'
        )
    return config.batch_size // parts


def _compile(config: ConfigDict, target: Target, images: int) -> Compiled:
    show(f'compiling the training step for {images} images on each chip at once …')
    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(bar_format='{elapsed}', leave=False, disable=not sys.stderr.isatty()) as clock,
    ):
        future = pool.submit(compile_step, config, target, images)
        while wait([future], timeout=1).not_done:
            clock.refresh()
    compiled = future.result()
    outcome = 'compiled' if compiled.memory else f'does not fit ({compiled.text}); found'
    show(f'{outcome} in {compiled.seconds:.1f} s')
    return compiled


def _largest_batch_line(smaller: Compiled, larger: Compiled, target: Target) -> str:
    points = f'{smaller.images} ({_gib(smaller.memory.total)}) and {larger.images} ({_gib(larger.memory.total)})'
    if larger.memory.total <= smaller.memory.total:
        return f'the memory does not grow between {points} images: plan with a larger --batch'
    images = largest_batch(smaller, larger, target.chip.memory)
    return f'about {images:,} images fit on a chip, by the line through {points}; to be sure plan with --batch={images}'


def largest_batch(smaller: Compiled, larger: Compiled, capacity: float) -> int:
    """Images on a chip of so many GiB, by the straight line through the memory of two programs."""
    for_each = (larger.memory.total - smaller.memory.total) / (larger.images - smaller.images)
    return int(larger.images + (capacity * GIB - larger.memory.total) / for_each)


def describe(compiled: Compiled, target: Target) -> list[str]:
    """The lines about a program: memory, collectives, cycles, communication."""
    program = read_program(compiled.text)
    found = collectives(program, len(target.devices))
    return [
        *_memory_lines(compiled.memory, target.chip.memory),
        *_collective_lines(found),
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
        '\nmemory on each chip',
        *(f'  {name:16}{_gib(size):>12}' for name, size in rows.items()),
        f'  {"all":16}{_gib(memory.total):>12} of {capacity:g}: {fits}',
    ]


def _collective_lines(found: Found) -> list[str]:
    rows = [
        f'  {kind:20}{dtype:8}{same.runs:4} × over {chips:4} chips {same.size / 1e6:10.2f} MB in all'
        for (kind, dtype, chips), same in sorted(found.items())
    ]
    return [
        '\ncollectives in one step, with the bytes of their results on each chip',
        *(rows or ['  none']),
        f'  each chip sends {bytes_sent(found) / 1e6:.2f} MB at the least',
    ]


def _cycle_lines(program: list[Instruction], found: Found, target: Target) -> list[str]:
    total = sum(instruction.runs * instruction.cycles for instruction in program)
    if not total:
        return ['\nestimated cycles: this compiler tells none']
    heaviest = sorted(program, key=lambda instruction: instruction.runs * instruction.cycles, reverse=True)[:HEAVIEST]
    seconds = total / target.chip.clock / 1e9
    again = sum(instruction.runs * instruction.cycles for instruction in program if '.remat' in instruction.name)
    linked = bytes_sent(found) / target.chip.link / 1e9
    return [
        f'\nestimated cycles of all but collectives: {total:,}, {1000 * seconds:.1f} ms at {target.chip.clock:g} GHz; '
        'share, runs × cycles and origin of the heaviest',
        *(
            f'  {i.runs * i.cycles / total:6.1%}{i.runs:4} × {i.cycles:10,}  {i.name}  '
            f'{i.operation.removeprefix("jit(train_step)/")}'
            for i in heaviest
        ),
        f'recomputed by the compiler of its own accord, to save memory: {again / total:.1%}',
        f'communication: {1000 * linked:.2f} ms at the {target.chip.link:g} GB/s of the links, which is the least: '
        f'{linked / (linked + seconds):.1%} of the step if nothing runs beside it\n',
    ]


def _gib(size: int) -> str:
    return f'{size / GIB:.2f} GiB'
