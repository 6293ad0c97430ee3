"""The training loop in real runs: what it writes, resumes, survives and refuses."""

import csv
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import FINE_TUNING, FINE_TUNING_STEPS, SMALL_TRAIN, STEPS, TIMEOUT, fingerprints
from PIL import Image

import eval as evaluation
import train as train_command
from configs import image_folder
from configs.fashion_mnist import get_config
from convnext_jax.checkpoints.checkpoint import read_about, restore_parameters, saved_steps
from convnext_jax.checkpoints.manager import Checkpoints
from convnext_jax.checkpoints.workdir import CHECKPOINTS, CONFIG
from convnext_jax.config import read_config
from convnext_jax.data.pipeline import abstract_batch, eval_features
from convnext_jax.errors import UserError
from convnext_jax.monitoring.records import read_records
from convnext_jax.monitoring.trace import ProfileWindow
from convnext_jax.runtime.stop import Stopped
from convnext_jax.tasks import abstract_model, make_task
from convnext_jax.training import loop
from convnext_jax.training.describe import describe
from convnext_jax.training.durations import make_durations
from convnext_jax.training.loop import Run, train
from convnext_jax.training.sharding import batch_sharding, make_mesh


def copy_of(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / 'run')


def test_a_run_writes_the_promised_files_and_fields(finished_run):
    """Scripts that read these files and fields would break."""
    records = read_records(finished_run)
    training = [record for record in records if record['split'] == 'train']
    assert [record['step'] for record in training] == [4, 8, 12, 16, 20, 24]
    assert {'step', 'epoch', 'split', 'loss', 'learning_rate', 'images_per_second'} <= training[0].keys()
    evaluations = [record for record in records if record['split'] == 'test[:40]']
    assert [record['epoch'] for record in evaluations] == [1.0, 2.0, 2.4]
    assert {'loss', 'top1', 'top5', 'ema_loss', 'ema_top1', 'ema_top5'} <= evaluations[0].keys()
    assert all(record['images'] == 40 for record in evaluations)
    assert training[-1]['loss'] < training[0]['loss']
    assert Image.open(finished_run / 'curves.png').size == (1000, 700)
    assert list((finished_run / 'tensorboard').glob('events*'))
    assert json.loads((finished_run / 'config.json').read_text())['model']['num_classes'] == 10
    assert STEPS in saved_steps(finished_run / 'checkpoints')


def test_a_finished_run_says_so(train_here, finished_run, tmp_path):
    """A scheduler that starts a finished run again would change its checkpoints."""
    run = copy_of(finished_run, tmp_path)
    again = train_here(run)
    assert again.startswith('finished: top-1 ')
    assert f'{run}/curves.png' in again
    assert len(again.splitlines()) == 1
    assert fingerprints(run) == fingerprints(finished_run)


def test_a_run_that_is_killed_and_resumed_equals_an_uninterrupted_run(commands, train_here, finished_run, tmp_path):
    """A preempted job would end with other weights than an uninterrupted one: two SIGKILLs must not change a bit.

    While a run is active, no other process may write to its workdir.
    """
    run = tmp_path / 'run'
    rng = np.random.default_rng(0)
    kills = 0
    for attempt in range(2):
        process = commands.start(*SMALL_TRAIN, f'--workdir={run}')
        before = len(read_records(run))
        while process.poll() is None and not (run / CONFIG).exists():
            time.sleep(0.02)
        if attempt == 0:
            with pytest.raises(UserError, match=f'in use by process {process.pid}'):
                train_here(run)
        while process.poll() is None and len(read_records(run)) <= before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 2
    assert 'finished' in train_here(run)
    assert fingerprints(run) == fingerprints(finished_run)
    ours = restore_parameters(run / 'checkpoints', STEPS, 'parameters')
    unbroken = restore_parameters(finished_run / 'checkpoints', STEPS, 'parameters')
    for name, value in unbroken.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    steps = [(record['split'], record['step']) for record in read_records(run)]
    assert len(steps) == len(set(steps))
    evaluations = [[r['top1'] for r in read_records(w) if r['split'] != 'train'] for w in (run, finished_run)]
    assert evaluations[0] == evaluations[1]


def test_a_finished_run_repeats_the_steps_of_a_damaged_last_checkpoint(train_here, finished_run, tmp_path):
    """One damaged file after the end of training would make the whole run unusable."""
    run = copy_of(finished_run, tmp_path)
    (run / 'checkpoints' / str(STEPS) / 'manifest' / 'metadata').write_text('')
    again = train_here(run)
    assert f'checkpoint {STEPS} is damaged' in again
    assert f'resumes at step 20 of {STEPS}' in again
    assert fingerprints(run) == fingerprints(finished_run)


def test_a_run_logs_whether_threads_or_processes_decode():
    """Users could not tune a slow input pipeline without knowing how many threads or processes decode."""
    config = get_config()
    config.data.workers = 2
    sources = make_task(config).open()
    model, mesh, durations = abstract_model(config), make_mesh(), make_durations(config, len(sources[0]))

    def line():
        lines = describe(config, durations, mesh, model, *sources, Path('run'))
        return next(line for line in lines if line.startswith('data'))

    assert re.search(r'10 classes, decoded by \d+ thread', line()), 'cached images are decoded once, by threads'
    config.data.crop_scale = (0.5, 1.0)
    sources = make_task(config).open()
    assert '10 classes, decoded by 2 process(es) of' in line()


@pytest.mark.slow
def test_training_and_evaluation_with_the_tpu_kernel_lower_for_many_devices():
    """A run on a pod would fail at its first evaluation, because `jax.jit` cannot partition the kernel over devices."""
    config = get_config()
    config.model.pallas = True
    sources = make_task(config).open()
    mesh, durations = make_mesh(), make_durations(config, len(sources[0]))
    run = Run(config, durations, mesh, *sources, checkpoints=None)
    batch = abstract_batch(eval_features(sources[1]), 64, batch_sharding(mesh))
    evaluation = run.eval_steps[0].trace(run.abstract_state.weights, batch).lower(lowering_platforms=('tpu',))
    training = run.train_step.trace(run.abstract_state, run.abstract_batch).lower(lowering_platforms=('tpu',))
    assert mesh.size == 8
    assert 'tpu_custom_call' in training.as_text()
    assert 'tpu_custom_call' in evaluation.as_text()


def test_a_run_logs_the_settings_of_its_process(monkeypatch):
    """Nobody could explain the speed of a run whose log lacks the environment variables that JAX reads."""
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=0')
    config = get_config()
    sources = make_task(config).open()
    durations = make_durations(config, len(sources[0]))
    lines = describe(config, durations, make_mesh(), abstract_model(config), *sources, Path('run'))
    (line,) = (line for line in lines if line.startswith('settings'))
    assert 'GLIBC_TUNABLES=glibc.malloc.hugetlb=0' in line


def test_failed_saves_are_reported_immediately_and_the_run_loses_nothing(commands, finished_run, tmp_path):
    """A disk that another user filled for a while would end the run, or the run would hide that it is not saved."""
    run = tmp_path / 'run'
    process = commands.start(*SMALL_TRAIN, f'--workdir={run}')
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(('step 4/', 'step 16/')):
            size = 20_000 if line.startswith('step 4/') else resource.RLIM_INFINITY
            hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))
    errors = process.stderr.read()
    assert process.wait(timeout=TIMEOUT) == 0, errors
    assert 'Traceback' not in errors
    told = [number for number, line in enumerate(lines) if 'could not be saved' in line]
    assert told
    assert any(line.startswith('step 16/') for line in lines[told[0] :]), 'reported only after the last step'
    assert 'some saves failed, at step' in ''.join(lines)
    assert fingerprints(run) == fingerprints(finished_run)
    assert all(path.name.isdecimal() for path in (run / 'checkpoints').iterdir())


def test_a_run_can_be_extended_although_its_newest_checkpoint_is_damaged(train_here, finished_run, tmp_path):
    """A damaged checkpoint would prevent a longer run; the log reports the new end and the four repeated steps."""
    run = copy_of(finished_run, tmp_path)
    shutil.rmtree(run / 'checkpoints' / str(STEPS) / 'optimizer')
    again = train_here(run, '--config.steps=28')
    assert 'steps was 24, is now 28' in again
    assert f'checkpoint {STEPS} is damaged' in again
    assert 'resumes at step 20 of 28' in again
    assert saved_steps(run / 'checkpoints')[-1] == 28
    assert [record['step'] for record in read_records(run) if record['split'] == 'train'] == [4, 8, 12, 16, 20, 24, 28]


@pytest.mark.parametrize(
    ('override', 'line'),
    [
        ('--config.model.name=convnextv2_femto', 'model.name was convnextv2_atto, is now convnextv2_femto'),
        ('--config.seed=7', 'seed was 0, is now 7'),
        ('--config.data.train_split=train[:320]', 'data.train_split was train[:160], is now train[:320]'),
    ],
)
def test_resuming_with_another_model_seed_or_training_set_is_refused(train_here, finished_run, override, line):
    """The run would continue as a different experiment without a message."""
    with pytest.raises(UserError, match=re.escape(line)) as refused:
        train_here(finished_run, override)
    assert '\n' not in str(refused.value)


def test_a_loss_that_stays_infinite_or_nan_stops_the_run(train_here, tmp_path):
    """Days of compute would be wasted; the error names the step, the last good checkpoint and what to try."""
    run = tmp_path / 'run'
    broken = ('--config.optimizer.learning_rate=1e30', '--config.optimizer.min_learning_rate=1e30')
    with pytest.raises(UserError) as stopped:
        train_here(run, *broken, '--config.optimizer.warmup_steps=5')
    error = str(stopped.value)
    assert 'has not been finite since step' in error
    assert 'the last checkpoint is of step' in error
    assert 'optimizer.learning_rate' in error
    assert None in [record['loss'] for record in read_records(run)]
    good = saved_steps(run / 'checkpoints')[-1]
    assert all(np.isfinite(value).all() for value in restore_parameters(run / 'checkpoints', good, 'ema').values())


def test_fine_tuning_starts_from_a_run_and_adds_outputs(train_here, finished_run, tmp_path):
    """Fine-tuning would discard what the run learned, or the outputs of the classes that it keeps."""
    tuned = train_here(
        tmp_path / 'tuned',
        f'--config.init.weights={finished_run}',
        '--config.init.params=ema',
        *FINE_TUNING,
    )
    assert f'starts from the ema weights of {finished_run}, step {STEPS}' in tuned
    assert 'the head keeps the outputs of 10 of 10 classes; newly initialised: 2 outputs' in tuned
    ours = restore_parameters(tmp_path / 'tuned' / 'checkpoints', FINE_TUNING_STEPS, 'parameters')
    theirs = restore_parameters(finished_run / 'checkpoints', STEPS, 'ema')
    for name, value in theirs.items():
        kept = ours[name][..., :10] if name.startswith('head.') else ours[name]
        np.testing.assert_allclose(kept, value, atol=1e-6, err_msg=name)


def test_fine_tuning_another_architecture_is_refused_with_the_difference(train_here, finished_run, tmp_path):
    """Training would start from partly random weights without a message."""
    with pytest.raises(UserError, match='stages.0.blocks.grn.beta is unexpected') as refused:
        train_here(tmp_path / 'tuned', f'--config.init.weights={finished_run}', '--config.model.name=convnext_atto')
    assert 'stages.0.blocks.layer_scale is missing' in str(refused.value)


def test_a_folder_of_photos_trains_and_unreadable_ones_are_named(one_device, small_models, tmp_path, capsys):
    """Users' photos differ in size and colour, and a run would fail on a truncated file without naming it."""

    def trained(*overrides):
        capsys.readouterr()
        train_command.main([*arguments, *overrides])
        return capsys.readouterr().out

    rng = np.random.default_rng(0)
    for split, images in (('train', 16), ('val', 3)):
        for name in ('cat', 'dog'):
            folder = tmp_path / 'photos' / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                shape = (40 + number, 50, 3) if number % 2 else (50, 40 + number)
                Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f'{number:02}.jpg')
    arguments = (
        'train.py',
        '--config=configs/image_folder.py:convnextv2_atto',
        f'--config.data.dir={tmp_path / "photos"}',
        '--config.data.image_size=32',
        '--config.batch_size=8',
        '--config.steps=8',
        '--config.optimizer.warmup_steps=1',
        '--config.eval_every_epochs=2',
        '--config.augment.policy=',  # RandAugment takes long to compile, and has tests of its own
        f'--workdir={tmp_path / "run"}',
    )
    broken = tmp_path / 'photos' / 'train' / 'cat' / '03.jpg'
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(UserError, match=f'^{re.escape(str(broken))} cannot be decoded'):
        trained()
    shutil.copy(broken.with_name('05.jpg'), broken)
    photo = tmp_path / 'photos' / 'val' / 'cat' / '00.jpg'
    whole = photo.read_bytes()
    photo.write_bytes(whole[:300])
    capsys.readouterr()
    with pytest.raises(UserError, match=f'^1 of the 6 images of val cannot be read: {re.escape(str(photo))} cannot'):
        train_command.main([*arguments])
    assert 'compiling' not in capsys.readouterr().out, 'known before the first step'
    photo.unlink()
    mended = trained()
    assert 'finished: top-1' in mended
    assert 'on 5 images' in mended
    photo.write_bytes(whole)
    shutil.copy(broken, broken.with_name('99.jpg'))
    for split in ('train', 'val'):
        (tmp_path / 'photos' / split / 'dog').rename(tmp_path / 'photos' / split / 'emu')
    capsys.readouterr()
    other = "training images: 32 became 33; class names [1]: 'dog' became 'emu'"
    with pytest.raises(UserError, match=re.escape(other)):
        train_command.main([*arguments, '--config.steps=9'])
    assert 'changed since the run began: evaluation images were 5, are now 6' in capsys.readouterr().out


UNUSUAL = 'a [x] %20 #1 \'q\' "d" é\nnew \\b ' + os.fsdecode(b'\xff')


def write_photos(folder: Path, classes: tuple[str, ...], **splits: int) -> Path:
    """Writes small images of noise to folder/SPLIT/CLASS; `splits` gives the number of images per class."""
    rng = np.random.default_rng(0)
    for split, images in splits.items():
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(images):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{name} {number:02}.jpg')
    return folder


def small_config(photos: Path | str, steps: int):
    config = image_folder.get_config('convnext_atto')
    config.update_from_flattened_dict(
        {
            'data.dir': str(photos),
            'data.image_size': 32,
            'data.workers': 0,
            'batch_size': 16,
            'steps': steps,
            'optimizer.warmup_steps': 1,
            'augment.policy': '',
        }
    )
    return config


def test_a_run_whose_file_names_have_any_bytes_trains_resumes_and_evaluates(
    one_device, small_models, tmp_path, monkeypatch, capsys
):
    """Users could not train on folders from other systems, nor resume after these moved or lost an evaluation image.

    Checkpoints, records, events and tables must hold every name that a file system allows.
    """
    photos = write_photos(tmp_path / f'data {UNUSUAL}', (UNUSUAL, 'cafe\N{COMBINING ACUTE ACCENT}'), train=16, val=8)
    run = tmp_path / f'run {UNUSUAL}'
    sys.stdout.reconfigure(errors='backslashreplace')
    monkeypatch.chdir(photos.parent)
    train(small_config(photos.name, steps=4), run, ProfileWindow(1, 1))
    config = read_config(run / CONFIG)
    assert config.data.dir == str(photos), 'the path must be valid from every working directory'
    assert read_about(run / CHECKPOINTS, 4)['data']['class names'] == sorted(path.name for path in photos.glob('val/*'))
    assert list(run.glob('tensorboard/plugins/profile/*/*'))
    monkeypatch.chdir('/')

    moved = photos.rename(tmp_path / 'moved')
    for folder in list(moved.glob('*/cafe*')):
        folder.rename(folder.with_name('caf\N{LATIN SMALL LETTER E WITH ACUTE}'))
    next((moved / 'val' / UNUSUAL).iterdir()).unlink()
    config = small_config(moved, steps=6)
    config.accumulation_steps = 2
    capsys.readouterr()
    train(config, run)
    out = capsys.readouterr().out
    assert 'accumulation_steps was 1, is now 2' in out
    assert 'evaluation images were 16, are now 15' in out
    assert 'resumes at step 4 of 6' in out
    assert saved_steps(run / CHECKPOINTS)[-1] == 6

    table = tmp_path / f'table {UNUSUAL}.csv'
    evaluation.main(['eval.py', f'--workdir={run}', f'--per_class={table}'])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['images'] == 15
    with table.open(newline='', encoding='utf-8', errors='surrogateescape') as file:
        assert UNUSUAL in [row['class'] for row in csv.DictReader(file)]


def test_resuming_with_other_class_names_is_refused(finished_run, tmp_path):
    """The run would continue with examples and labels of another data set."""
    config = read_config(finished_run / CONFIG)
    run = copy_of(finished_run, tmp_path)
    with Checkpoints(run / CHECKPOINTS, keep=2, best_metric='ema_top1') as checkpoints:
        train_set, eval_set = make_task(config).open()
        train_set.facts['class names'][0] = 'T-shirt'
        run = Run(config, make_durations(config, 160), make_mesh(), train_set, eval_set, checkpoints)
        line = r"began on another data set: class names \[0\]: 'T-shirt/top' became 'T-shirt'"
        with pytest.raises(UserError, match=line):
            run.restored_state()


@pytest.mark.slow
def test_a_signal_while_the_evaluation_images_are_checked_stops_the_run(tmp_path, monkeypatch):
    """Checking a large split takes minutes, and a job preempted meanwhile would end with the wrong exit status."""

    def send_sigterm(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        yield {}
        raise AssertionError('the loop read another image after the signal')

    monkeypatch.setattr(loop, 'find_unreadable', send_sigterm)
    photos = write_photos(tmp_path / 'photos', ('cat', 'dog'), train=8, val=1)
    with pytest.raises(Stopped, match='stopped by SIGTERM before a step was saved') as stopped:
        train(small_config(photos, steps=4), tmp_path / 'run')
    assert stopped.value.status == 128 + signal.SIGTERM
