"""Measures cases (a model in a mode) in rounds; every round measures each implementation once."""

import contextlib
import dataclasses
import importlib.util
import statistics
from collections.abc import Callable, Sequence

import jax

from benchmarks.compare import timm_models
from benchmarks.compare.baselines.workload import Workload
from benchmarks.compare.process import BASELINES, OURS, BaselineFailed, BaselineProcess
from convnext_jax.errors import UserError
from convnext_jax.models import create_model, get_parameters, get_variant

MODES = ('train', 'eval', 'latency')
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Case:
    """A model in one mode.

    Attributes:
        model: name; 'timm:NAME' is a model of timm.
        mode: 'train': the training step; 'eval': the forward pass; 'latency': the forward pass of one image.
        batch: images in a step.
        size: height and width of the images in pixels.
        dtype: dtype of matrix products and convolutions.
        parameters: number of parameters of the model.
        multiply_adds: number of multiply-adds of the forward pass of one image.
    """

    model: str
    mode: str
    batch: int
    size: int
    dtype: str
    parameters: int
    multiply_adds: int

    @property
    def of_timm(self) -> bool:
        """Whether the model is a model of timm."""
        return self.model.startswith(timm_models.PREFIX)

    @property
    def flops(self) -> int:
        """FLOPs for one image: two for each multiply-add of the forward pass; training takes three times as many."""
        forward = 2 * self.multiply_adds
        return 3 * forward if self.mode == 'train' else forward

    def workload(self, implementation: str) -> Workload:
        """The workload for the process of an implementation."""
        return Workload(
            implementation=implementation,
            model=self.model.removeprefix(timm_models.PREFIX),
            variant=None if self.of_timm else dataclasses.asdict(get_variant(self.model)),
            training=self.mode == 'train',
            latency=self.mode == 'latency',
            batch=self.batch,
            size=self.size,
            classes=CLASSES,
            dtype=self.dtype,
        )

    def __str__(self) -> str:
        return f'{self.model} {self.mode}, batch {self.batch}'


def make_cases(models: Sequence[str], modes: Sequence[str], batch: int, size: int, dtype: str) -> list[Case]:
    """One case for each model in each mode.

    Raises:
        UserError: a model or mode is unknown, or a model does not support images of this size.
    """
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"there is no mode '{mode}'; choose from {', '.join(MODES)}")
    counts = {}
    for model in models:
        is_of_timm = model.startswith(timm_models.PREFIX)
        counts[model] = timm_models.count(model, size, CLASSES) if is_of_timm else _count(model, size)
    return [
        Case(model, mode, 1 if mode == 'latency' else batch, size, dtype, parameters, multiply_adds)
        for model, (parameters, multiply_adds) in counts.items()
        for mode in dict.fromkeys(modes)
    ]


def _count(name: str, size: int) -> tuple[int, int]:
    """Like `timm_models.count`, for a model of convnext_jax."""
    variant = get_variant(name)
    if size < variant.total_stride:
        raise UserError(f'--size={size} is below the total stride {variant.total_stride} of {name}: raise it')
    model = jax.eval_shape(lambda: create_model(name, num_classes=CLASSES, key=jax.random.key(0)))
    parameters = sum(array.size for array in get_parameters(model).values())
    return parameters, variant.multiply_adds(size, CLASSES)


def choose_baselines(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The names of the installed baselines, and name → reason for the baselines that are not installed.

    Raises:
        UserError: a name is unknown.
    """
    installed, missing = [], {}
    for name in dict.fromkeys(names):
        if name not in BASELINES:
            raise UserError(f"--peers: there is no baseline '{name}'; choose from {', '.join(BASELINES)}")
        absent = [package for package in BASELINES[name].packages if importlib.util.find_spec(package) is None]
        if absent:
            missing[name] = f'not installed: {", ".join(absent)}'
        else:
            installed.append(name)
    return installed, missing


def choose_implementations(case: Case, baselines: Sequence[str]) -> list[str]:
    """The implementations that run a case: ours and the baselines; for a model of timm, only the baselines that run it.

    Raises:
        UserError: the model is a model of timm, and none of the baselines runs it.
    """
    if not case.of_timm:
        return [OURS, *baselines]
    able = [name for name, implementation in BASELINES.items() if implementation.runs_timm_models]
    chosen = [name for name in baselines if name in able]
    if not chosen:
        raise UserError(f'{case.model} needs one of {", ".join(able)} in --peers')
    return chosen


def compare(case: Case, names: Sequence[str], rounds: int, say: Callable[[str], None]) -> tuple[list[dict], dict]:
    """Measures implementations.

    Args:
        case: what is measured.
        names: names of the implementations.
        rounds: number of measurements of each implementation.
        say: called with lines of progress.

    Returns:
        The result of each implementation for benchmark.json; and name → reason for the implementations that failed.
    """
    running: dict[str, BaselineProcess] = {}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                process = stack.enter_context(BaselineProcess(case.workload(name), case.parameters))
            except BaselineFailed as error:
                failed[name] = str(error)
                say(f'{case}: {name} failed: {error}')
            else:
                running[name] = process
                say(f'{case}: {name} is ready, compiled in {process.compile_seconds:.1f} s')
        for number in range(rounds):
            for name in list(running):
                try:
                    running[name].run_round()
                except BaselineFailed as error:
                    del running[name]
                    failed[name] = str(error)
                    say(f'{case}: {name} failed: {error}')
            say(f'{case}: round {number + 1} of {rounds}')
    return [_result(case, name, running[name], running.get(OURS)) for name in running], failed


def _result(case: Case, name: str, process: BaselineProcess, ours: BaselineProcess | None) -> dict:
    """A result for benchmark.json.

    `ratio` is our images/s divided by this implementation's images/s. `share_of_peak` is the model's FLOP/s divided by
    the FLOP/s of a matrix product in the same process.
    """
    speeds = process.images_per_second
    shares = [case.flops * speed / peak for speed, peak in zip(speeds, process.matmul_flops, strict=True)]
    ratios = None if ours is None else [a / b for a, b in zip(ours.images_per_second, speeds, strict=True)]
    return dataclasses.asdict(case) | {
        'implementation': name,
        'images_per_second': _spread(speeds),
        'ratio': ratios and _spread(ratios),
        'share_of_peak': _spread(shares),
        'matmul_side': process.matmul_side,
        'matmul_gflops': _spread([flops / 1e9 for flops in process.matmul_flops]),
        'copy_gb_per_second': _spread([bandwidth / 1e9 for bandwidth in process.copy_bandwidth]),
        'peak_memory_mb': None if process.peak_memory is None else round(process.peak_memory / 1e6, 1),
        'memory_kind': 'resident' if process.device == 'cpu' else 'device',
        'compile_seconds': round(process.compile_seconds, 2),
        'device': process.device,
    }


def _spread(values: list[float]) -> dict:
    return {'median': statistics.median(values), 'least': min(values), 'most': max(values), 'rounds': values}
