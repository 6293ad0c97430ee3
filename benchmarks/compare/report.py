"""The report of the comparison: a table, benchmark.json and benchmark.png."""

import importlib.metadata
import itertools
import os
import platform
from pathlib import Path

from benchmarks.compare.process import OURS
from convnext_jax.errors import UserError
from convnext_jax.output import to_json

PACKAGES = ('jax', 'flax', 'torch', 'timm', 'transformers', 'keras')
COLUMNS = (
    'model',
    'mode',
    'batch',
    'implementation',
    'images/s',
    'ratio',
    'of peak',
    'bandwidth',
    'memory',
    'compile',
    'parameters',
    'multiply-adds',
)
LEGEND = """\
Medians of the rounds, with the minimum and the maximum.
ratio: images/s of convnext_jax over those of the implementation in the same round.
of peak: FLOP/s of the model over FLOP/s of matrix products in the same process (side 2048; on an accelerator 8192).
bandwidth: bytes read plus written in a large copy in the same process.
memory: peak over set-up, compilation and three steps. resident: of the process with its imports; device: of the arrays
on the accelerator.
compile: time of the first step minus a warm step.
multiply-adds: of convolutions and matrix products in the forward pass of one image.
settings: convnext_jax runs with the environment variables of launch/cpu.sh, the others without.
training: forward, backward, AdamW with weight decay; no augmentation, drop path or moving average; the batch stays on
the device.
synchronisation: on an accelerator after the last step of a round; on CPU, and in the mode latency, after every step.
float32 on a GPU: matrix products in TensorFloat-32."""


def describe_machine() -> dict:
    """Processor, operating system, versions of libraries, and the load average before the comparison."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        'processor': _processor(),
        'cores': os.cpu_count(),
        'system': platform.system(),
        'load': os.getloadavg()[0],
        'versions': {'python': platform.python_version()} | versions,
    }


def _processor() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text(encoding='utf-8').splitlines() if cpuinfo.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def as_table(machine: dict, results: list[dict]) -> str:
    """The results as text: the machine, a Markdown table with a row for each implementation, and a legend."""
    devices = sorted({result['device'] for result in results} - {'cpu'})
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    rows = [COLUMNS, *map(_row, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, ' | '.join('-' * width for width in widths))
    return '\n'.join(
        [
            f'{machine["processor"]}, {machine["cores"]} cores, {machine["system"]}, load {machine["load"]:.1f} before',
            *devices,
            versions,
            '',
            *(f'| {line} |' for line in lines),
            '',
            LEGEND,
        ]
    )


def _row(result: dict) -> tuple[str, ...]:
    ratio, memory = result['ratio'], result['peak_memory_mb']
    return (
        result['model'],
        result['mode'],
        str(result['batch']),
        result['implementation'],
        _with_range(result['images_per_second'], 1),
        '–' if ratio is None or result['implementation'] == OURS else _with_range(ratio, 2),
        f'{result["share_of_peak"]["median"]:.0%} of {result["matmul_gflops"]["median"]:.0f} GFLOP/s',
        f'{result["copy_gb_per_second"]["median"]:.1f} GB/s',
        '–' if memory is None else f'{memory:.0f} MB {result["memory_kind"]}',
        f'{result["compile_seconds"]:.1f} s',
        f'{result["parameters"] / 1e6:.1f} M',
        f'{result["multiply_adds"] / 1e9:.2f} G',
    )


def _with_range(spread: dict, digits: int) -> str:
    return f'{spread["median"]:.{digits}f} ({spread["least"]:.{digits}f}–{spread["most"]:.{digits}f})'


def make_folder(folder: Path) -> None:
    """Creates the folder of a report.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{folder} cannot be written: {error.strerror}') from error
    if not os.access(folder, os.W_OK):
        raise UserError(f'{folder} cannot be written')


def write_report(folder: Path, machine: dict, results: list[dict], left_out: list[dict]) -> None:
    """Writes benchmark.json and benchmark.png into an existing folder."""
    report = {'machine': machine, 'results': results, 'left_out': left_out}
    (folder / 'benchmark.json').write_text(to_json(report, indent=2) + '\n', encoding='utf-8')
    draw(folder / 'benchmark.png', results)


def draw(path: Path, results: list[dict]) -> None:
    """Draws bars of images/s with the range over rounds, in one plot for each model and mode."""
    from matplotlib.figure import Figure  # imported here because the import takes a second

    groups = [list(group) for _, group in itertools.groupby(results, lambda r: (r['model'], r['mode'], r['batch']))]
    heights = [1 + 0.4 * len(group) for group in groups]
    figure = Figure(figsize=(8, 0.5 + sum(heights)), layout='constrained')
    plots = figure.subplots(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for axes, group in zip(plots, groups, strict=True):
        names = [result['implementation'] for result in group]
        speeds = [result['images_per_second'] for result in group]
        medians = [speed['median'] for speed in speeds]
        below = [speed['median'] - speed['least'] for speed in speeds]
        above = [speed['most'] - speed['median'] for speed in speeds]
        colors = ['tab:orange' if name == OURS else 'tab:blue' for name in names]
        axes.barh(names, medians, xerr=[below, above], color=colors, ecolor='0.3', capsize=3)
        for position, speed in enumerate(speeds):
            axes.annotate(
                f'{speed["median"]:.1f}', (speed['most'], position), (6, 0), textcoords='offset points', va='center'
            )
        axes.set_title(f'{group[0]["model"]} {group[0]["mode"]}, batch {group[0]["batch"]}, {group[0]["dtype"]}')
        axes.set_xlim(0, 1.15 * max(speed['most'] for speed in speeds))
        axes.invert_yaxis()
        axes.grid(axis='x', alpha=0.3)
    plots[-1].set_xlabel('images per second: median, minimum and maximum')
    figure.savefig(path, dpi=100)
