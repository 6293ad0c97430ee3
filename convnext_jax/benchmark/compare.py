"""Contenders beside each other: they take turns, so that a busy machine slows all alike."""

import contextlib
import dataclasses
import importlib.util
import statistics
from collections.abc import Callable, Sequence

import jax

from convnext_jax.benchmark.contenders.contender import Task
from convnext_jax.benchmark.process import OURS, PEERS, Entrant, Lost
from convnext_jax.errors import UserError
from convnext_jax.models import create_model, get_parameters, get_variant

MODES = ('train', 'eval', 'latency')
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: a model in one mode.

    Attributes:
        model: its name.
        mode: 'train': the training step; 'eval': the forward pass; 'latency': the same with one image.
        batch: images to a step.
        size: side of the images in pixels.
        dtype: of matrix products and convolutions.
    """

    model: str
    mode: str
    batch: int
    size: int
    dtype: str

    @property
    def flops(self) -> int:
        """For one image: two for each multiply-add of the forward pass, and in training twice as many more."""
        forward = 2 * get_variant(self.model).multiply_adds(self.size, CLASSES)
        return 3 * forward if self.mode == 'train' else forward

    def task(self, contender: str) -> Task:
        """What a contender's process is told."""
        return Task(
            contender=contender,
            model=self.model,
            variant=dataclasses.asdict(get_variant(self.model)),
            training=self.mode == 'train',
            batch=self.batch,
            size=self.size,
            classes=CLASSES,
            dtype=self.dtype,
        )

    def __str__(self) -> str:
        return f'{self.model} {self.mode}, batch {self.batch}'


def make_cases(models: Sequence[str], modes: Sequence[str], batch: int, size: int, dtype: str) -> list[Case]:
    """Every model in every mode.

    Raises:
        UserError: an unknown model or mode, or images that are too small for a model.
    """
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"there is no mode '{mode}': {', '.join(MODES)}")
    for model in models:
        stride = get_variant(model).total_stride
        if size < stride:
            raise UserError(f'--size={size} is below the total stride {stride} of {model}')
    return [
        Case(model, mode, 1 if mode == 'latency' else batch, size, dtype)
        for model in dict.fromkeys(models)
        for mode in dict.fromkeys(modes)
    ]


def choose_peers(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The peers that are installed; and for each other one, what is not.

    Raises:
        UserError: an unknown name.
    """
    chosen, left_out = [], {}
    for name in dict.fromkeys(names):
        if name not in PEERS:
            raise UserError(f"there is no peer '{name}': {', '.join(PEERS)}")
        missing = [package for package in PEERS[name].needs if importlib.util.find_spec(package) is None]
        if missing:
            left_out[name] = f'not installed: {", ".join(missing)}'
        else:
            chosen.append(name)
    return chosen, left_out


def compare(case: Case, peers: Sequence[str], rounds: int, say: Callable[[str], None]) -> tuple[list[dict], dict]:
    """Measures ours and the peers.

    Args:
        case: what is measured.
        peers: their names.
        rounds: turns of each.
        say: is given lines about the progress.

    Returns:
        What was measured of each contender, as benchmark.json has it; and for each that was lost, the reason.
    """
    running: dict[str, Entrant] = {}
    lost: dict[str, str] = {}
    parameters = _count_parameters(case.model)
    with contextlib.ExitStack() as stack:
        for name in (OURS, *peers):
            try:
                entrant = stack.enter_context(Entrant(case.task(name), parameters))
            except Lost as error:
                lost[name] = str(error)
                say(f'{case}: {name} is lost: {error}')
            else:
                running[name] = entrant
                say(f'{case}: {name} is ready, compiled in {entrant.compile_seconds:.1f} s')
        for number in range(rounds):
            for name in list(running):
                try:
                    running[name].turn()
                except Lost as error:
                    del running[name]
                    lost[name] = str(error)
                    say(f'{case}: {name} is lost: {error}')
            say(f'{case}: round {number + 1} of {rounds}')
    return [_measured(case, name, running[name], running.get(OURS)) for name in running], lost


def _count_parameters(name: str) -> int:
    model = jax.eval_shape(lambda: create_model(name, num_classes=CLASSES, key=jax.random.key(0)))
    return sum(array.size for array in get_parameters(model).values())


def _measured(case: Case, name: str, entrant: Entrant, ours: Entrant | None) -> dict:
    """Ratio: images/s of ours to this contender's. Share of peak: of the matrix product in the contender's process."""
    speeds = entrant.images_per_second
    shares = [case.flops * speed / peak for speed, peak in zip(speeds, entrant.matmul_flops, strict=True)]
    ratios = None if ours is None else [a / b for a, b in zip(ours.images_per_second, speeds, strict=True)]
    return dataclasses.asdict(case) | {
        'contender': name,
        'images_per_second': _spread(speeds),
        'ratio': ratios and _spread(ratios),
        'share_of_peak': _spread(shares),
        'matmul_gflops': _spread([flops / 1e9 for flops in entrant.matmul_flops]),
        'peak_memory_mb': None if entrant.peak_memory is None else round(entrant.peak_memory / 1e6, 1),
        'compile_seconds': round(entrant.compile_seconds, 2),
        'device': entrant.device,
    }


def _spread(values: list[float]) -> dict:
    return {'median': statistics.median(values), 'least': min(values), 'most': max(values), 'rounds': values}
