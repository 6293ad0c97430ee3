"""Writes the tables of README.md and docs/*.md from the measurements in docs/measurements.

    python -m benchmarks.tables

The lines `<!-- table: NAME -->` and `<!-- end of table -->` enclose a table, and `TABLES` defines its content.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
MEASUREMENTS = ROOT / 'docs' / 'measurements'
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
MARKED = re.compile(r'(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)', re.DOTALL)

Result = dict[str, Any]


class Table(NamedTuple):
    """A table of a page.

    Attributes:
        file: name of a file in `docs/measurements`, without its suffix.
        columns: heading → template of the cells for `str.format`, with the fields of a result.
        shows: returns whether a result is shown.
        source: whether a line below the table says where its figures come from.
    """

    file: str
    columns: dict[str, str]
    shows: Callable[[Result], bool] = lambda _: True
    source: bool = True


COMPARE = {
    'Model': '{model}',
    'Mode': '{mode}',
    'Batch': '{batch}',
    'vs timm': '{vs_timm:.2f}',
    'vs transformers': '{vs_transformers:.2f}',
    'vs timm compiled': '{vs_timm_compiled:.2f}',
}
COMPARE_FULL = COMPARE | {
    'Images/s': '{images_per_second:g}',
    'Memory (MB)': '{memory_mb:,}',
    'Memory of timm (MB)': '{timm_memory_mb:,}',
    'Compilation (s)': '{compile_seconds:.1f}',
}
GPU = {
    'Model': '{model}',
    'Implementation': '{implementation}',
    'Settings': '{settings}',
    'Step (ms)': '{ms:.1f}',
    'Images/s': '{images_per_second:,.0f}',
    'MFU (%)': '{mfu_percent}',
    'Memory (GB)': '{memory_gb:.1f}',
    'Compilation or first step (s)': '{first_step_or_compile_seconds:.1f}',
    'Commit': '{commit}',
}
H200 = {
    'Model': '{model}',
    'Mode': '{mode}',
    'Implementation': '{implementation}',
    'Step (ms)': '{ms:.1f}',
    'Images/s': '{images_per_second:,.0f}',
    'MFU (%)': '{mfu_percent}',
    'Memory (GB)': '{memory_gb:.1f}',
    'Machine': '{machine_number}',
    'Commit': '{commit}',
}
GPU_SHORT = {heading: GPU[heading] for heading in ('Model', 'Implementation', 'Step (ms)', 'Images/s', 'Memory (GB)')}
VALUE = {'Measurement': '{what}', 'Result': '{value:,.10g} {unit}', 'Date': '{date}', 'Commit': '{commit}'}
RANGE = {
    'Measurement': '{what}',
    'Result': '{value:,.10g} {unit}',
    'Minimum': '{least:g} {unit}',
    'Maximum': '{most:g} {unit}',
}
PUBLISHED_ARCHITECTURES = {
    'Model': '{model}',
    'Top-1 (%)': '{top1:.1f}',
    'COCO box AP': '{coco:.1f}',
    'ADE20K mIoU (%)': '{ade20k:g}',
    'Differences from the method': '{different}',
    'Sources': '{sources}',
}
RECIPES = {
    'Config': '`{config}`',
    'Pre-training': '{pretraining}',
    'Pixels': '{resolution}',
    'Published top-1 (%)': '{top1:.1f}',
    'Meant for': '{hardware}',
}
EXAMPLES = (
    *('imagenet1k.py:tiny', 'imagenet1k.py:base', 'isotropic.py:small'),
    *('finetune.py:base_22k', 'v2_finetune.py:atto', 'v2_finetune.py:base_22k_1k_384'),
)
"""The recipes that README.md shows."""

TABLES = {
    'compare_amd_avx512': Table('compare_amd_avx512', COMPARE_FULL),
    'compare_amd_avx512_earlier': Table('compare_amd_avx512_earlier', COMPARE),
    'compare_amd_avx2': Table('compare_amd_avx2', COMPARE),
    'compare_intel_avx512': Table('compare_intel_avx512', COMPARE_FULL),
    'compare_intel_jax': Table(
        'compare_intel_jax', {'Implementation': '{implementation}', 'Ratio of images/s': '{ratio:.1f}'}
    ),
    'matmul_cpu': Table('matmul_cpu', {'Processor': '{machine}', 'Library': '{library}', 'GFLOP/s': '{gflops}'}),
    'share_of_peak_amd': Table(
        'share_of_peak_amd', {'Implementation': '{implementation}', 'Share of its peak (%)': '{percent}'}
    ),
    'h100': Table('h100', GPU),
    'h200': Table('h200', H200),
    'h200_short': Table(
        'h200',
        GPU_SHORT,
        lambda result: result['mode'] == 'training' and result['implementation'] != 'timm',
        source=False,
    ),
    'plan_tpu': Table(
        'plan_tpu',
        {
            'Model': '{model}',
            'Chip': '{chip}',
            'Memory of the chip (GB)': '{chip_memory_gb}',
            'Settings': '{settings}',
            'Memory of the step (GiB)': '{memory_gib:.1f}',
            'Time without collectives (ms)': '{ms}',
            'Compilation (s)': '{compile_seconds}',
            'libtpu': '{libtpu}',
            'Commit': '{commit}',
        },
    ),
    'scaling': Table(
        'scaling',
        {
            'Model': '{model}',
            'Mesh': '{mesh}',
            'Slices': '{slices}',
            'Sent in a slice, 8 to 256 chips (MB)': '{inside_mb_8:,} to {inside_mb_256:,}',
            'Sent to the other slice (MB)': '{between_mb_8:g} to {between_mb_256:g}',
            **{f'{chips} chips (%)': f'{{percent_{chips}:.1f}}' for chips in (8, 16, 32, 64, 128, 256)},
            '256 chips, 16 images each (%)': '{percent_256_of_4096_images:.1f}',
        },
    ),
    'many_processes': Table('many_processes', {'Measurement': '{what}', 'Result': '{value:g} {unit}'}),
    'demo': Table('demo', VALUE),
    'loop': Table('loop', RANGE),
    'stall': Table('stall', {'Measurement': '{what}', 'Result': '{value:g} {unit}'}),
    'faults': Table('faults', {'Fault': '{fault}', 'Cases': '{cases}'}),
    'topologies': Table(
        'topologies',
        {
            'Devices': '{topology}',
            'Learning rate': '{learning_rate:g}',
            'Steps': '{steps}',
            'Largest relative difference': '{difference:.1e}',
            'Commit': '{commit}',
        },
    ),
    'parity': Table('parity', VALUE),
    'timm_architectures': Table(
        'timm_architectures', {'Model': '{model}', 'Logits': '{logits}', 'Feature map': '{maps}'}
    ),
    'input_masks': Table('input_masks', RANGE),
    'input': Table('input', {'Compared with': '{what}', 'Ratio of images/s': '{value:g}'}),
    'input_memory': Table(
        'input_memory', {'Workers': '{workers}', 'Minimum (MB)': '{least_mb:,}', 'Maximum (MB)': '{most_mb:,}'}
    ),
    'augment': Table(
        'augment',
        {
            'Machine': '{machine}',
            'Policy': '{policy}',
            'Step (ms)': '{ms:,.1f}',
            'Without augmentation (ms)': '{bare_ms:,.1f}',
            'Ratio of images/s': '{ratio:.3f}',
        },
    ),
    'load': Table(
        'load',
        {
            'Library': '{library}',
            'Seconds (median)': '{seconds:.2f}',
            'Minimum': '{least_seconds:.2f}',
            'Maximum': '{most_seconds:.2f}',
            'Peak memory over the size of the weights': '{peak_over_weights:.2f}',
        },
    ),
    'few_labels': Table(
        'few_labels',
        {
            'Start': '{start}',
            'Learning rate': '{learning_rate:g}',
            'Top-1 (%), mean': '{mean:.1f}',
            'Minimum': '{least:.1f}',
            'Maximum': '{most:.1f}',
        },
        lambda result: 'start' in result,
    ),
    'knn': Table(
        'few_labels',
        {'Epoch of the pre-training': '{epoch}', 'k-NN accuracy (%)': '{knn:.1f}'},
        lambda result: 'knn' in result,
        source=False,
    ),
    'masking': Table(
        'masking',
        {
            'Target': '{target}',
            'Whole images': '{whole:,} {unit}',
            'Masked images': '{masked:,} {unit}',
            'Ratio': '{ratio:.2f}',
        },
    ),
    'published_architectures': Table('published_architectures', PUBLISHED_ARCHITECTURES),
    'recipes': Table('published', RECIPES),
    'recipes_short': Table('published', RECIPES, lambda result: result['config'] in EXAMPLES, source=False),
}


def render(table: Table) -> str:
    """The table as Markdown. A value that was not recorded is shown as –.

    Raises:
        KeyError: a result lacks a field that a column shows.
    """
    measurement = json.loads((MEASUREMENTS / f'{table.file}.json').read_text(encoding='utf-8'))
    shared = {field: measurement[field] for field in ('machine', 'date', 'commit')}
    results = [shared | result for result in measurement['results'] if table.shows(result)]
    rows = [[_cell(form, result) for form in table.columns.values()] for result in results]
    lines = [list(table.columns), ['---'] * len(table.columns), *rows]
    text = ''.join(f'| {" | ".join(line)} |\n' for line in lines)
    return f'{text}\n{_source(table.file, measurement)}\n' if table.source else text


def _source(file: str, measurement: dict[str, Any]) -> str:
    versions = ', '.join(f'{name} {version}' for name, version in (measurement['versions'] or {}).items())
    parts = {
        'Source': f'[{file}.json](measurements/{file}.json)',
        'Machine': measurement['machine'],
        'Method': measurement['method'],
        'Versions': versions,
        'Date': measurement['date'],
        'Commit': measurement['commit'],
        'Note': measurement['note'],
    }
    return ' '.join(f'{name}: {part.rstrip(".")}.' for name, part in parts.items() if part)


def _cell(form: str, result: Result) -> str:
    fields = re.findall(r'{(\w+)', form)
    return '–' if any(result[field] is None for field in fields) else form.format(**result)


def with_tables(page: str) -> str:
    """The text of a page with newly rendered tables.

    Raises:
        KeyError: the page names a table that is not in `TABLES`.
    """
    return MARKED.sub(lambda match: f'{match[1]}{render(TABLES[match[2]])}{match[3]}', page)


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding='utf-8')), encoding='utf-8')


if __name__ == '__main__':
    main()
