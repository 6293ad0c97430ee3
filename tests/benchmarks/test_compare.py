"""The comparison, with fake implementations (some fail) and once with real implementations. No speed is asserted."""

import dataclasses
import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ONE_DEVICE, TIMEOUT
from PIL import Image

from benchmarks.compare import __main__ as compare_command
from benchmarks.compare import process, timm_models
from benchmarks.compare.baselines import ours, plain_flax
from benchmarks.compare.baselines.on_jax import jax_device
from benchmarks.compare.baselines.run import time_steps
from benchmarks.compare.baselines.workload import Baseline, Device
from benchmarks.compare.measure import make_cases
from benchmarks.compare.process import BASELINES, IMPLEMENTATIONS, OURS, ROOT, RUN, Implementation
from convnext_jax.errors import UserError
from convnext_jax.models import create_model, get_parameters, get_variant

ON_TORCH = 'benchmarks.compare.baselines.on_torch'


BASELINE = """
import os, signal, time
from benchmarks.compare.baselines.workload import Baseline, Device

steps = 0

def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began

def sleep():
    time.sleep(0.001)

def build(workload):
    {at_build}
    def step():
        global steps
        steps += 1
        time.sleep(0.001)
        {at_step}
    print('output of a library')
    device = Device('{device}', seconds, lambda *_: sleep, lambda _: sleep, lambda: 5 * 10**9)
    return Baseline(step, {parameters}, device)
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A function that replaces or adds an implementation with a small fake one."""
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.setattr(process, 'ROUND_SECONDS', 0.0)  # one step a round
    model = jax.eval_shape(lambda: create_model('convnext_atto', key=jax.random.key(0)))
    right = sum(array.size for array in get_parameters(model).values())

    def put(name: str, packages: tuple[str, ...] = (), **behaviour):
        code = {'at_build': '', 'at_step': '', 'parameters': right, 'device': 'cpu'} | behaviour
        text = BASELINE.format(**code)
        (tmp_path / f'stand_in_{name}.py').write_text(text)
        for table in (IMPLEMENTATIONS,) if name == OURS else (IMPLEMENTATIONS, BASELINES):
            monkeypatch.setitem(table, name, Implementation(f'stand_in_{name}', packages))

    return put


def run(*arguments: str) -> None:
    compare_command.main(['compare', '--models=convnext_atto', '--rounds=3', *arguments])


@pytest.mark.parametrize(('mode', 'batch', 'passes'), [('train', 2, 3), ('latency', 1, 1)])
def test_the_table_the_json_file_and_the_chart(stand_in, capfd, tmp_path, mode, batch, passes):
    """The command writes a wrong ratio or share of the peak, or a file that cannot be read."""
    for name in (OURS, 'flax'):
        stand_in(name, at_step='if steps == 1: time.sleep(0.1)')
    run(f'--mode={mode}', '--size=32', '--batch=2', '--rounds=2', '--peers=flax', f'--output={tmp_path / "made"}')
    rows = [
        [cell.strip() for cell in line.split('|')[1:-1]] for line in capfd.readouterr().out.splitlines() if '|' in line
    ][2:]
    assert [row[:4] for row in rows] == [
        ['convnext_atto', mode, str(batch), 'convnext_jax'],
        ['convnext_atto', mode, str(batch), 'flax'],
    ]
    report = json.loads((tmp_path / 'made' / 'benchmark.json').read_text())
    assert {'python', 'jax', 'flax'} <= report['machine']['versions'].keys()
    assert report['machine']['processor']
    assert report['machine']['load'] >= 0
    assert report['left_out'] == []
    flops = 2 * passes * get_variant('convnext_atto').multiply_adds(32)
    ours = report['results'][0]
    for result, row in zip(report['results'], rows, strict=True):
        speeds, products = (result[name]['rounds'] for name in ('images_per_second', 'matmul_gflops'))
        assert len(speeds) == 2
        ratios = [a / b for a, b in zip(ours['images_per_second']['rounds'], speeds, strict=True)]
        assert result['ratio']['median'] == pytest.approx(statistics.median(ratios))
        shares = [flops * speed / (1e9 * peak) for speed, peak in zip(speeds, products, strict=True)]
        assert result['share_of_peak']['least'] == pytest.approx(min(shares))
        assert result['compile_seconds'] > 0.05
        assert (result['device'], result['dtype'], result['size']) == ('cpu', 'float32', 32)
        assert (result['peak_memory_mb'] is None) == (sys.platform != 'linux')
        assert result['memory_kind'] == 'resident'
        assert result['matmul_side'] == 2048
        assert result['copy_gb_per_second']['least'] > 0
        assert row[4].startswith(f'{result["images_per_second"]["median"]:.1f} (')
        assert row[5] == '–' if result is ours else row[5].startswith(f'{result["ratio"]["median"]:.2f} (')
    with Image.open(tmp_path / 'made' / 'benchmark.png') as chart:
        assert chart.format == 'PNG'
        assert chart.convert('L').getextrema()[0] < 128  # not blank


@pytest.mark.judge
def test_convnext_jax_and_flax_are_measured(small_models, monkeypatch, capfd, tmp_path):
    """An error in the process of a real implementation is found only after hours on a rented accelerator."""
    monkeypatch.setattr(process, 'ROUND_SECONDS', 0.0)
    monkeypatch.setattr(process, 'RUN', (sys.executable, 'tests/small.py', *RUN[1:]))
    monkeypatch.setenv('XLA_FLAGS', ONE_DEVICE['XLA_FLAGS'])
    run('--models=convnextv2_atto', '--size=32', '--batch=2', '--rounds=1', '--peers=flax', f'--output={tmp_path}')
    report = json.loads((tmp_path / 'benchmark.json').read_text())
    assert report['left_out'] == []
    assert [result['implementation'] for result in report['results']] == [OURS, 'flax']
    for result in report['results']:
        assert result['images_per_second']['least'] > 0
        assert result['matmul_gflops']['least'] > 0
        assert result['compile_seconds'] > 0
        assert (result['device'], result['mode'], result['batch']) == ('cpu', 'train', 2)
    assert capfd.readouterr().out.count('| convnextv2_atto') == 2


@pytest.mark.slow
@pytest.mark.parametrize('implementation', [ours, plain_flax])
def test_convnext_jax_and_flax_train(small_models, implementation):
    """An error in a real implementation is found only after hours on a rented accelerator."""
    (case,) = make_cases(['convnextv2_atto'], ['train'], batch=2, size=32, dtype='float32')
    baseline = implementation.build(case.workload('any'))
    assert baseline.parameters == case.parameters
    results = jax.tree.leaves(jax.device_get(baseline.step()))
    assert results
    assert all(np.isfinite(x).all() for x in results)


def test_the_forward_pass_of_flax_gives_logits(small_models):
    """The table shows the latency of another network."""
    (case,) = make_cases(['convnextv2_atto'], ['latency'], batch=2, size=32, dtype='float32')
    baseline = plain_flax.build(case.workload('flax'))
    assert baseline.parameters == case.parameters
    assert baseline.step().shape == (1, 1000)


@pytest.mark.slow
def test_a_baseline_that_is_missing_or_fails_leaves_the_others_running(stand_in, capfd, tmp_path):
    """One broken baseline prevents all measurements, or a wrong model is silently measured."""
    stand_in(OURS)
    stand_in('good')
    stand_in('absent', packages=('json', 'no_such_package'))
    stand_in('killed', at_build='os.kill(os.getpid(), signal.SIGKILL)')
    stand_in('broken', at_build="raise ValueError('no such model\\nand much more')")
    stand_in('late', at_step="if steps > 4: raise MemoryError('no more')")
    stand_in('another', parameters=7)
    run('--peers=absent,killed,broken,late,another,good', f'--output={tmp_path}')
    report = json.loads((tmp_path / 'benchmark.json').read_text())
    assert [(r['implementation'], len(r['ratio']['rounds'])) for r in report['results']] == [(OURS, 3), ('good', 3)]
    reasons = {entry['implementation']: entry['reason'] for entry in report['left_out']}
    assert reasons == {
        'absent': 'not installed: no_such_package',
        'killed': 'its process ended: SIGKILL',
        'broken': 'ValueError: no such model',
        'late': 'MemoryError: no more',
        'another': 'its convnext_atto has 7 parameters, not 3,695,520',
    }
    printed = capfd.readouterr().out
    for name, reason in reasons.items():
        assert re.search(f'^left out: .*{name}, {reason}$', printed, re.MULTILINE)


@pytest.mark.slow
def test_the_first_step_of_a_round_is_not_timed(stand_in, tmp_path):
    """A figure depends on which other implementations are measured, because the first step refills the caches."""
    stand_in(OURS)
    stand_in(
        'slow_to_wake', at_step='if steps > 3 and steps % 2 == 0: time.sleep(1)'
    )  # after the three steps of the set-up
    run('--peers=slow_to_wake', f'--output={tmp_path}')
    baseline = json.loads((tmp_path / 'benchmark.json').read_text())['results'][1]
    assert baseline['images_per_second']['least'] > 8 / 0.9


def test_memory_on_an_accelerator_is_the_memory_of_arrays(stand_in, capfd, tmp_path):
    """The table shows the memory of the host process, which looks plausible but says nothing about the model."""
    stand_in(OURS, device='GPU of a test')
    run('--peers=', f'--output={tmp_path}')
    (result,) = json.loads((tmp_path / 'benchmark.json').read_text())['results']
    assert (result['peak_memory_mb'], result['memory_kind'], result['matmul_side']) == (5000, 'device', 8192)
    table = capfd.readouterr().out
    assert '| 5000 MB device |' in table
    assert 'GPU of a test\n' in table


@pytest.mark.parametrize(
    ('name', 'latency', 'expected'), [('a GPU', False, [5]), ('a GPU', True, [1] * 5), ('cpu', False, [1] * 5)]
)
def test_the_host_waits_for_an_accelerator_once_per_round(name, latency, expected):
    """Accelerators seem slower than they are, because they are idle while the host dispatches each step."""
    steps, waits = [], []

    def seconds(function):
        before = len(steps)
        function()
        waits.append(len(steps) - before)
        return 1.0

    device = Device(name, seconds, None, None, None)
    time_steps(Baseline(lambda: steps.append(1), 1, device), 5, latency)
    assert waits == expected


@pytest.mark.parametrize('library', ['jax', pytest.param('torch', marks=pytest.mark.judge)])
def test_the_peak_is_measured_with_random_numbers_and_real_copies(library):
    """The peak is too high, because constants multiply faster, or because the compiler removes the copy."""
    device = jax_device() if library == 'jax' else importlib.import_module(ON_TORCH).torch_device()
    product = np.asarray(device.make_matmul(16, 'float32')())
    assert len(np.unique(product)) == 256
    copy = device.make_copy(64)
    assert (np.asarray(copy()) == 1).all()
    assert (np.asarray(copy()) == np.ones(16)).all()
    assert device.name == 'cpu'
    assert device.peak_memory() is None
    assert device.seconds(lambda: time.sleep(0.01)) >= 0.01


@pytest.mark.judge
@pytest.mark.parametrize(
    ('implementation', 'modes'), [('timm', []), ('compile', ['default']), ('compile_max', ['max-autotune'])]
)
def test_timm_is_compiled_as_the_name_says(implementation, modes, monkeypatch):
    """A row shows the speed of another mode of torch.compile, or of eager execution."""
    used = []
    monkeypatch.setattr('torch.compile', lambda model, mode: used.append(mode) or model)
    (case,) = make_cases(['convnext_atto'], ['train'], batch=2, size=32, dtype='bfloat16')
    baseline = importlib.import_module(ON_TORCH).build(case.workload(implementation))
    assert used == modes
    assert baseline.step().item() == pytest.approx(np.log(1000), rel=0.3)


@pytest.mark.judge
def test_models_of_timm_run_in_timm_alone(stand_in, capfd, tmp_path):
    """A table of architectures fails, because convnext_jax does not have the models of timm."""
    stand_in(OURS)
    stand_in('another')
    run('--models=timm:test_vit', '--mode=eval', '--size=160', '--peers=another,timm', f'--output={tmp_path}')
    report = json.loads((tmp_path / 'benchmark.json').read_text())
    assert report['left_out'] == []
    (result,) = report['results']
    assert (result['model'], result['implementation'], result['ratio']) == ('timm:test_vit', 'timm', None)
    speed, peak = (result[name]['rounds'][0] for name in ('images_per_second', 'matmul_gflops'))
    share = 2 * result['multiply_adds'] * speed / (1e9 * peak)
    assert result['share_of_peak']['rounds'][0] == pytest.approx(share)
    assert f'{result["parameters"] / 1e6:.1f} M' in capfd.readouterr().out


@pytest.mark.judge
@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_models_of_timm_and_ours_have_equal_counts(name):
    """In a table of architectures, the share of the peak is computed differently for ConvNeXt and for the others."""
    ours, timm = make_cases([name, f'timm:{name}'], ['eval'], batch=1, size=64, dtype='float32')
    assert (timm.parameters, timm.multiply_adds) == (ours.parameters, ours.multiply_adds)
    assert timm_models.count('timm:vit_base_patch16_224', 224, 1000) == (86_567_656, 17_563_828_224)  # with attention


def test_only_ours_has_the_settings_of_its_commands(stand_in, monkeypatch, capfd):
    """Baselines are measured with our settings, or ours without them, although no user runs them like that."""
    monkeypatch.setattr(process, 'missing_settings', lambda: {'A_SETTING': '1'})
    stand_in(OURS, at_build="if 'A_SETTING' not in os.environ: raise ValueError('none')")
    stand_in('baseline', at_build="if 'A_SETTING' in os.environ: raise ValueError('one')")
    run('--peers=baseline')
    assert 'left out' not in capfd.readouterr().out


def test_baselines_are_measured_without_ours_but_the_status_is_1(stand_in, capfd):
    """A script treats a comparison without convnext_jax as a success."""
    stand_in(OURS, at_build="raise RuntimeError('a bug')")
    stand_in('good')
    with pytest.raises(SystemExit) as ended:
        run('--peers=good')
    assert ended.value.code == 1
    printed = capfd.readouterr().out
    assert re.search(r'\| good .*\| –', printed)
    assert 'left out: convnext_atto train, batch 8, convnext_jax, RuntimeError: a bug' in printed


COMMAND_WITH_STAND_IN = """
from benchmarks.compare import __main__, process
from convnext_jax.command_line import run
process.IMPLEMENTATIONS[process.OURS] = process.Implementation(f'stand_in_{process.OURS}', ())
run(__main__.main)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='finds the processes in /proc')
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_process_outlives_the_command(commands, stand_in, number, status):
    """A process that outlives the command slows the machine and all later measurements."""
    stand_in(OURS)
    command = commands.start('-c', COMMAND_WITH_STAND_IN, '--models=convnext_atto', '--rounds=1000000', '--peers=')
    while 'round 1 of' not in (line := command.stderr.readline()):
        assert line, 'the command ended'
    children = Path(f'/proc/{command.pid}/task/{command.pid}/children').read_text().split()
    assert children
    os.kill(command.pid, number)
    command.communicate(timeout=TIMEOUT)
    assert command.returncode == status
    until = time.monotonic() + 300
    while any(map(is_running, children)):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_process_ends_in_the_middle_of_a_step(stand_in):
    """A process compiles for minutes after the command was killed."""
    stand_in('endless', at_step="print('in a step', flush=True); time.sleep(1e6)")
    (case,) = make_cases(['convnext_atto'], ['eval'], batch=1, size=32, dtype='float32')
    command = [*RUN, 'stand_in_endless']
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as worker:
        try:
            print(json.dumps(dataclasses.asdict(case.workload('endless'))), file=worker.stdin, flush=True)
            while 'in a step' not in (line := worker.stderr.readline()):
                assert line, 'the process ended before its first step'
            worker.stdin.close()
            assert worker.wait(timeout=TIMEOUT) == 0
        finally:
            worker.kill()


def is_running(pid: str) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        (('--mode=training',), "there is no mode 'training'; choose from train, eval, latency"),
        (
            ('--peers=tim',),
            "there is no baseline 'tim'; choose from timm, transformers, compile, compile_max, flax, keras",
        ),
        (('--models=convnext_tini',), 'did you mean convnext_tiny'),
        pytest.param(
            ('--models=timm:resnet5O',), "timm has no model 'resnet5O': did you mean resnet50", marks=pytest.mark.judge
        ),
        pytest.param(
            ('--models=timm:vit_tiny_patch16_224', '--size=32'),
            'timm:vit_tiny_patch16_224 does not run at --size=32: ',
            marks=pytest.mark.judge,
        ),
        pytest.param(
            ('--models=timm:resnet18', '--peers=flax'),
            'timm:resnet18 needs one of timm, compile, compile_max in --peers',
            marks=pytest.mark.judge,
        ),
        (('--size=31',), '--size=31 is below the total stride 32 of convnext_atto'),
        (('--rounds=0',), 'flag --rounds=0'),
        (('--output=README.md/here', '--peers='), 'README.md/here cannot be written'),
    ],
)
def test_wrong_arguments_are_refused(arguments, line):
    """A typo is found only after minutes of measuring, or ends in a traceback."""
    with pytest.raises(UserError, match=re.escape(line)):
        run(*arguments)
