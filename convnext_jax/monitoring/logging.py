"""RunLog: the output of a run as progress lines, metrics.jsonl, TensorBoard events, figures and curves.png."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from convnext_jax.checkpoints.workdir import FIGURES, METRICS, TENSORBOARD, is_local, open_to_append, write_atomically
from convnext_jax.errors import UserError, first_line
from convnext_jax.monitoring.curves import draw_curves
from convnext_jax.monitoring.records import read_records
from convnext_jax.output import say, to_json
from convnext_jax.tasks import Headline


@contextlib.contextmanager
def _without_torch() -> Generator[None]:
    """Makes `import torch` fail in the body, unless torch is imported already."""
    hidden = sys.modules.setdefault('torch', None) is None  # ty: ignore[no-matching-overload]  # None makes the import fail
    try:
        yield
    finally:
        if hidden:
            del sys.modules['torch']


class RunLog:
    """Writes the records of a run. Use as a context manager.

    If the disk is full or read-only, a warning is printed once and training continues. Leaving the context raises
    UserError if metrics.jsonl is incomplete.

    Args:
        workdir: the workdir of the run. Records of steps after `start_step`, which a killed process wrote, are deleted.
        start_step: number of steps that are finished.
        total_steps: number of steps of the whole run.
        headlines: the evaluation metrics to print and to draw.
    """

    def __init__(self, workdir: Path, start_step: int, total_steps: int, *headlines: Headline):
        with _without_torch():  # if torch is installed, tensorboardX imports it, which takes seconds
            # Not SummaryWriter: a full disk ends its thread, and the next call then blocks forever.
            from tensorboardX.event_file_writer import EventsWriter

        self._workdir = workdir
        # For a bucket, tensorboardX calls Google's client, whose errors are not OSError.
        self._write_errors = OSError if is_local(workdir) else Exception
        self._total_steps = total_steps
        self._headlines = headlines
        records = [record for record in read_records(workdir) if record['step'] <= start_step]
        write_atomically(workdir / METRICS, ''.join(to_json(record) + '\n' for record in records).encode())
        self._metrics = open_to_append(workdir / METRICS)
        (workdir / TENSORBOARD).mkdir(exist_ok=True)
        self._events = EventsWriter(str(workdir / TENSORBOARD / 'events'))
        self._warned = False
        if start_step:
            self._drop_events_from(start_step + 1)
        self._live = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=start_step, unit='step', dynamic_ncols=True, disable=not self._live)

    def __enter__(self) -> 'RunLog':
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._bar.close()
        with self._warn_on_write_error():
            self._events.close()
        try:
            self._metrics.close()  # writes the lines that are still in the buffer because the disk was full
        except OSError as error:
            if kind is None:
                path = self._workdir / METRICS
                line = f'{path} is incomplete: {error.strerror}. Free disk space, and run the same command again'
                raise UserError(line) from error

    @contextlib.contextmanager
    def _warn_on_write_error(self) -> Generator[None]:
        """Turns a write error into a warning: records may be missing, but training continues."""
        try:
            yield
        except self._write_errors as error:
            if not self._warned:
                reason = getattr(error, 'strerror', None) or first_line(error)
                say(f'{self._workdir} cannot be written: {reason}; training continues, records may be missing')
            self._warned = True

    def say(self, line: str) -> None:
        """Prints a line with `output.say`."""
        say(line)

    def advance(self) -> None:
        """Counts one step."""
        self._bar.update()

    def train(self, step: int, epoch: float, metrics: dict[str, float], seconds_left: float) -> None:
        """Records the training steps since the last record.

        Args:
            step: number of finished steps.
            epoch: number of finished epochs.
            metrics: `loss`, `learning_rate`, further metrics of the steps, and the metrics from `StepTimer.summary`.
            seconds_left: estimated time until the end of the run.
        """
        self._record(step, epoch, 'train', metrics)
        speed = f'{metrics["images_per_second"]:.0f} images/s  step {metrics["step_ms_median"]:.0f} ms'
        speed += f' (99 %: {metrics["step_ms_p99"]:.0f})  waits for data {metrics["data_wait_share"]:.0%}'
        if 'mfu' in metrics:
            speed += f'  MFU {metrics["mfu"]:.1%}'
        shown = f'loss {metrics["loss"]:.4f}  lr {metrics["learning_rate"]:.2e}  {speed}'
        if self._live:
            self._bar.set_postfix_str(shown)
        else:
            left = tqdm.format_interval(seconds_left)
            self.say(f'step {step}/{self._total_steps}  epoch {epoch:.2f}  {shown}  {left} left')

    def evaluation(self, step: int, epoch: float, split: str, metrics: dict[str, float]) -> None:
        """Records the metrics of an evaluation of a split, and redraws the curves."""
        self._record(step, epoch, split, metrics)
        shown = ', '.join(headline.describe(metrics) for headline in self._headlines)
        self.say(f'step {step}/{self._total_steps}  epoch {epoch:.2f}  {split} {shown}')
        with self._warn_on_write_error():
            draw_curves(self._workdir, self._headlines)

    def figures(self, step: int, split: str, figures: dict[str, np.ndarray]) -> None:
        """Writes the figures of an evaluation to TensorBoard and, as PNG files, to the workdir.

        Args:
            step: number of finished steps.
            split: the evaluated split.
            figures: name → (H, W, 3) uint8.
        """
        from tensorboardX.summary import image

        with self._warn_on_write_error():
            for name, pixels in figures.items():
                (self._workdir / FIGURES).mkdir(exist_ok=True)
                encoded = io.BytesIO()
                Image.fromarray(pixels).save(encoded, 'PNG')
                write_atomically(self._workdir / FIGURES / f'{name}.png', encoded.getvalue())
                self._write_event(step, image(_event_name(f'{split}/{name}'), pixels, dataformats='HWC'))
            self._events.flush()

    def _record(self, step: int, epoch: float, split: str, metrics: dict[str, float]) -> None:
        with self._warn_on_write_error():
            self._metrics.write(to_json({'step': step, 'epoch': round(epoch, 4), 'split': split, **metrics}) + '\n')
            self._metrics.flush()
        with self._warn_on_write_error():
            self._write_events(step, {f'{split}/{name}': value for name, value in metrics.items()})

    def _write_events(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write_event(step, scalar(_event_name(name), value))
        self._events.flush()

    def _write_event(self, step: int, summary: object) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _drop_events_from(self, step: int) -> None:
        """Makes TensorBoard ignore the events of this step and later steps that a killed process wrote."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=step, session_log=start))


def _event_name(name: str) -> str:
    """The name as valid UTF-8, which events require. The name of a split may contain other bytes."""
    return name.encode(errors='replace').decode()


class NullLog:
    """A `RunLog` that writes nothing, for all processes except the main process."""

    def __enter__(self) -> 'NullLog':
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None
