"""curves.png, drawn from the records of a run."""

import io
from collections.abc import Sequence
from pathlib import Path

from convnext_jax.checkpoints.workdir import CURVES, write_atomically
from convnext_jax.monitoring.records import read_records
from convnext_jax.tasks import Headline


def draw_curves(workdir: Path, headlines: Sequence[Headline]) -> None:
    """Draws the loss, the headline metrics (raw and EMA), the learning rate and the throughput over epochs.

    Args:
        workdir: the workdir of the run. metrics.jsonl is read, and curves.png is written or replaced.
        headlines: the evaluation metrics to draw; the first is drawn beside the loss, the others in further rows.
    """
    from matplotlib.figure import Figure  # imported here because the import takes a second

    records = read_records(workdir)
    training = [record for record in records if record['split'] == 'train']
    evaluations = [record for record in records if record['split'] != 'train']
    rows = 2 + len(headlines) // 2
    height = 3.5 * rows
    figure = Figure(figsize=(10, height))
    # A computed layout would draw the figure twice. Margins at the top and bottom are in inches.
    figure.subplots_adjust(
        left=0.07, right=0.98, bottom=0.55 / height, top=(height - 0.35) / height, wspace=0.2, hspace=0.3
    )
    loss, metric, rate, speed, *more = figure.subplots(rows, 2).flat

    def curve(axes, rows: list[dict], name: str, label: str, marker: str = '') -> None:
        rows = [row for row in rows if row.get(name) is not None]
        if rows:
            axes.plot([row['epoch'] for row in rows], [row[name] for row in rows], marker, label=label)

    curve(loss, training, 'loss', 'training')
    curve(loss, evaluations, 'loss', 'evaluation, raw', '.-')
    curve(loss, evaluations, 'ema_loss', 'evaluation, EMA', '.-')
    curve(rate, training, 'learning_rate', 'learning rate')
    curve(speed, training, 'images_per_second', 'images/s')
    titles = {loss: 'loss', rate: 'learning rate', speed: 'training images per second'}
    for axes, headline in zip([metric, *more], headlines, strict=False):
        curve(axes, evaluations, headline.name, 'raw', '.-')
        curve(axes, evaluations, f'ema_{headline.name}', 'EMA', '.-')
        titles[axes] = f'{headline.title} ({headline.unit.strip()})' if headline.unit else headline.title
    for axes in more[len(headlines) - 1 :]:
        axes.remove()
    for axes, title in titles.items():
        axes.set_title(title)
        axes.set_xlabel('epoch')
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    speed.set_ylim(0, 1.1 * max((row['images_per_second'] for row in training), default=1))
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=100)
    write_atomically(workdir / CURVES, image.getvalue())
