"""Results of other libraries, stored so that tests can compare with them without these libraries.

`python -m tests.judges.record` computes and writes them. Inputs and weights are not stored: they are random numbers
seeded by their names. A large array is stored as a sketch: some of its values, and sums that together cover all values,
so that every mistake changes the sketch.
"""

import gzip
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform float32 numbers of mean 0 and variance 1, equal for a name on every platform and NumPy version.

    NumPy guarantees the raw bits of PCG64, but not the numbers that `Generator` derives from them.
    """
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    uniform = (bits >> np.uint64(11)) * 2.0**-53
    return (math.sqrt(12) * (uniform - 0.5)).astype(np.float32).reshape(shape)


def draw_bytes(name: str, shape: tuple[int, ...], limit: int = 256) -> np.ndarray:
    """Uniform uint8 integers in [0, `limit`)."""
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return (bits % np.uint64(limit)).astype(np.uint8).reshape(shape)


def draw_parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random values for the parameters of a model, large enough to matter in the output."""
    drawn = {}
    for name, shape in shapes.items():
        fan_in = 49 if 'depthwise' in name else math.prod(shape['blocks' in name : -1])
        scale = fan_in**-0.5 if name.endswith('.kernel') else 0.3
        drawn[name] = np.float32(name.endswith('.scale')) + np.float32(scale) * draw(name, shape)
    return drawn


def sketch(array: np.ndarray, values: int = 256) -> np.ndarray:
    """`values` elements at fixed positions, and `values` sums of neighbours with fixed random signs: float32, flat.

    An array of at most 2 · `values` elements is its own sketch.
    """
    flat = np.asarray(array).astype(np.float64).ravel()
    if flat.size <= 2 * values:
        return flat.astype(np.float32)
    positions = np.random.PCG64(0).random_raw(values) % np.uint64(flat.size)
    signs = 1.0 - 2.0 * (np.random.PCG64(1).random_raw(flat.size) & np.uint64(1))
    first = np.linspace(0, flat.size, values + 1)[:-1].astype(int)
    sums = np.add.reduceat(signs * flat, first) / math.sqrt(flat.size / values)
    return np.concatenate([flat[positions.astype(int)], sums]).astype(np.float32)


def difference(array: np.ndarray, stored: np.ndarray) -> float:
    """The largest difference between an array's sketch and a stored sketch, in the latter's standard deviations."""
    ours = sketch(array)
    assert ours.shape == stored.shape
    return float(np.abs(ours - stored).max() / stored.std())


def arrays(name: str) -> dict[str, np.ndarray]:
    """The stored arrays of one of the files."""
    with np.load(FOLDER / f'{name}.npz') as file:
        return {key: file[key] for key in file.files if key != 'about'}


def table(name: str) -> dict:
    """One of the stored tables: names, shapes, configs."""
    return tables()[name]


def tables() -> dict:
    return json.loads(gzip.decompress((FOLDER / 'tables.json.gz').read_bytes()))
