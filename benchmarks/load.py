"""Time and peak memory of loading a Hugging Face folder, compared with transformers.

    python -m benchmarks.load [--model=convnext_large] [--rounds=5]

Each load runs in a new process, and the libraries alternate. The measurement starts after the imports and ends when all
weights are in memory. The peak is the growth of the peak resident memory divided by the size of the weights.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = ('convnext_jax', 'transformers')


def load(side: str, folder: str) -> None:
    """Loads the folder once, and prints the time in seconds and the memory growth in bytes."""
    if side == 'transformers':
        import torch
        from transformers import AutoModelForImageClassification as Model

        def materialize() -> None:
            model = Model.from_pretrained(folder)
            sum(float(x.detach().flatten()[:: max(x.numel() // 1000, 1)].sum()) for x in model.parameters())

        torch.zeros(1)
    else:
        import jax

        import convnext_jax as cx

        def materialize() -> None:
            jax.block_until_ready(cx.load_pretrained(folder))

        jax.block_until_ready(jax.numpy.zeros(1))
    before = _resident('VmRSS')
    began = time.perf_counter()
    materialize()
    print(time.perf_counter() - began, 1024 * (_resident('VmHWM') - before))


def _resident(field: str) -> int:
    """A field of /proc/self/status in KiB."""
    status = Path('/proc/self/status').read_text()
    return int(status.split(f'{field}:')[1].split()[0])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('--model', default='convnext_large')
    arguments.add_argument('--rounds', type=int, default=5)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        code = (
            'import jax, convnext_jax as cx;'
            f'model = jax.jit(lambda key: cx.create_model({options.model!r}, key=key))(jax.random.key(0));'
            f'cx.save_pretrained(model, {folder!r})'
        )
        subprocess.run([sys.executable, '-c', code], check=True)
        weights = (Path(folder) / 'model.safetensors').stat().st_size
        seconds, peaks = ({side: [] for side in SIDES} for _ in range(2))
        for _ in range(options.rounds):
            for side in SIDES:
                command = [sys.executable, '-c', f'from benchmarks.load import load; load({side!r}, {folder!r})']
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                took, peak = map(float, out.stdout.split()[-2:])
                seconds[side].append(took)
                peaks[side].append(peak / weights)
    for side in SIDES:
        spread = f'from {min(seconds[side]):.2f} to {max(seconds[side]):.2f}'
        peak = statistics.median(peaks[side])
        print(
            f'{side:13} {statistics.median(seconds[side]):5.2f} s ({spread}), peak {peak:.2f} × {weights / 1e6:.0f} MB'
        )


if __name__ == '__main__':
    main()
