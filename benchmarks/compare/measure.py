"""Cases (a model in a mode), and the rounds in which every implementation is measured once."""

import contextlib
import dataclasses
import importlib.util
import statistics
from collections.abc import Callable, Sequence

import jax

from benchmarks.compare.baselines.workload import Workload
from benchmarks.compare.process import BASELINES, OURS, BaselineFailed, BaselineProcess
from convnext_jax.errors import UserError
from convnext_jax.models import create_model, get_parameters, get_variant

MODES = ('train', 'eval', 'latency')
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: a model in one mode.

    Attributes:
        model: its name.
        mode: 'train': the training step; 'eval': the forward pass; 'latency': the forward pass of one image.
        batch: images in a step.
        size: height and width of the images in pixels.
        dtype: of matrix products and convolutions.
    """

    model: str
    mode: str
    batch: int
    size: int
    dtype: str

    @property
    def flops(self) -> int:
        """FLOPs for one image: two for each multiply-add of the forward pass; training takes three times as many."""
        forward = 2 * get_variant(self.model).multiply_adds(self.size, CLASSES)
        return 3 * forward if self.mode == 'train' else forward

    def workload(self, implementation: str) -> Workload:
        """What the process of an implementation computes."""
        return Workload(
            implementation=implementation,
            model=self.model,
            variant=dataclasses.asdict(get_variant(self.model)),
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


def choose_baselines(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits names into the baselines that are installed and, with the reason, those that are not.

    Raises:
        UserError: an unknown name.
    """
    installed, missing = [], {}
    for name in dict.fromkeys(names):
        if name not in BASELINES:
            raise UserError(f"--peers: there is no baseline '{name}': {', '.join(BASELINES)}")
        absent = [package for package in BASELINES[name].packages if importlib.util.find_spec(package) is None]
        if absent:
            missing[name] = f'not installed: {", ".join(absent)}'
        else:
            installed.append(name)
    return installed, missing


def compare(case: Case, baselines: Sequence[str], rounds: int, say: Callable[[str], None]) -> tuple[list[dict], dict]:
    """Measures ours and the baselines.

    Args:
        case: what is measured.
        baselines: their names.
        rounds: how often each is measured.
        say: is called with lines of progress.

    Returns:
        The result of each implementation, as benchmark.json has it; and for each that failed, the reason.
    """
    running: dict[str, BaselineProcess] = {}
    failed: dict[str, str] = {}
    parameters = _count_parameters(case.model)
    with contextlib.ExitStack() as stack:
        for name in (OURS, *baselines):
            try:
                process = stack.enter_context(BaselineProcess(case.workload(name), parameters))
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


def _count_parameters(name: str) -> int:
    model = jax.eval_shape(lambda: create_model(name, num_classes=CLASSES, key=jax.random.key(0)))
    return sum(array.size for array in get_parameters(model).values())


def _result(case: Case, name: str, process: BaselineProcess, ours: BaselineProcess | None) -> dict:
    """Ratio: our images/s to this one's. Share of peak: of the matrix product in its own process."""
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
