"""The real loop in processes of its own: resume, kill, refuse."""

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
from conftest import FINE_TUNING, FINE_TUNING_STEPS, LONGEST, SMALL_TRAIN, STEPS, fingerprints
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


def test_a_run_leaves_what_it_promises(finished_run):
    """Scripts read these names."""
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
    run = copy_of(finished_run, tmp_path)
    again = train_here(run)
    assert again.startswith('finished: top-1 ')
    assert f'{run}/curves.png' in again
    assert len(again.splitlines()) == 1
    assert fingerprints(run) == fingerprints(finished_run)


def test_killed_at_any_moment_and_resumed_it_is_the_unbroken_run(commands, train_here, finished_run, tmp_path):
    """Preempted jobs lose nothing: after two SIGKILLs every array has the bits of the run that was left alone.

    While it runs, no other process may write there.
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
    last = commands.train(run)
    assert 'finished' in last.stdout
    assert fingerprints(run) == fingerprints(finished_run)
    ours = restore_parameters(run / 'checkpoints', STEPS, 'parameters')
    unbroken = restore_parameters(finished_run / 'checkpoints', STEPS, 'parameters')
    for name, value in unbroken.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    steps = [(record['split'], record['step']) for record in read_records(run)]
    assert len(steps) == len(set(steps))
    evaluations = [[r['top1'] for r in read_records(w) if r['split'] != 'train'] for w in (run, finished_run)]
    assert evaluations[0] == evaluations[1]


def test_a_finished_run_with_a_damaged_last_checkpoint_is_made_whole(commands, finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path)
    (run / 'checkpoints' / str(STEPS) / 'manifest' / 'metadata').write_text('')
    again = commands.train(run)
    assert f'checkpoint {STEPS} is damaged' in again.stdout
    assert f'resumes at step 20 of {STEPS}' in again.stdout
    assert fingerprints(run) == fingerprints(finished_run)


def test_a_run_says_who_decodes():
    """Whoever tunes a slow input must see what there is: threads or processes, and how many."""
    config = get_config()
    config.data.workers = 2
    sources = make_task(config).open()
    model, mesh, durations = abstract_model(config), make_mesh(), make_durations(config, len(sources[0]))

    def line():
        lines = describe(config, durations, mesh, model, *sources, Path('run'))
        return next(line for line in lines if line.startswith('data'))

    assert re.search(r'10 classes, decoded by \d+ thread', line()), 'kept images are decoded once, by threads'
    config.data.crop_scale = (0.5, 1.0)
    sources = make_task(config).open()
    assert '10 classes, decoded by 2 process(es) of' in line()


def test_with_the_kernel_for_tpu_step_and_evaluation_are_programs_for_many_devices():
    """`jax.jit` cannot spread the kernel over devices: a job on a pod would end at its first evaluation."""
    config = get_config()
    config.model.pallas = True
    sources = make_task(config).open()
    mesh, durations = make_mesh(), make_durations(config, len(sources[0]))
    run = Run(config, durations, mesh, *sources, checkpoints=None)
    batch = abstract_batch(eval_features(sources[1]), 64, batch_sharding(mesh))
    evaluation = run.eval_step.trace(run.abstract_state.weights, batch).lower(lowering_platforms=('tpu',))
    training = run.train_step.trace(run.abstract_state, run.abstract_batch).lower(lowering_platforms=('tpu',))
    assert mesh.size == 8
    assert 'tpu_custom_call' in training.as_text()
    assert 'tpu_custom_call' in evaluation.as_text()


def test_a_run_says_its_settings(monkeypatch):
    """A speed that nobody can explain: what the process was started with must stand in its log."""
    monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=0')
    config = get_config()
    sources = make_task(config).open()
    durations = make_durations(config, len(sources[0]))
    lines = describe(config, durations, make_mesh(), abstract_model(config), *sources, Path('run'))
    (line,) = (line for line in lines if line.startswith('settings'))
    assert 'GLIBC_TUNABLES=glibc.malloc.hugetlb=0' in line


def test_saves_that_fail_for_a_time_are_told_at_once_and_the_run_is_whole(commands, finished_run, tmp_path):
    """A disk that someone else filled, and emptied: of a job that ran on, nobody wants to lose a day."""
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
    assert process.wait(timeout=LONGEST) == 0, errors
    assert 'Traceback' not in errors
    told = [number for number, line in enumerate(lines) if 'could not be saved' in line]
    assert told
    assert any(line.startswith('step 16/') for line in lines[told[0] :]), 'told only when there was nothing to do'
    assert 'some saves failed, at step' in ''.join(lines)
    assert fingerprints(run) == fingerprints(finished_run)
    assert all(path.name.isdecimal() for path in (run / 'checkpoints').iterdir())


def test_a_longer_run_goes_on_although_the_newest_checkpoint_is_damaged(train_here, finished_run, tmp_path):
    """Both say so: an end that was put off, and a checkpoint that is gone with the four steps after the one before."""
    run = copy_of(finished_run, tmp_path)
    shutil.rmtree(run / 'checkpoints' / str(STEPS) / 'optimizer')
    again = train_here(run, '--config.steps=28')
    assert 'steps was 24, is 28' in again
    assert f'checkpoint {STEPS} is damaged' in again
    assert 'resumes at step 20 of 28' in again
    assert saved_steps(run / 'checkpoints')[-1] == 28
    assert [record['step'] for record in read_records(run) if record['split'] == 'train'] == [4, 8, 12, 16, 20, 24, 28]


@pytest.mark.parametrize(
    ('override', 'line'),
    [
        ('--config.model.name=convnextv2_femto', 'model.name was convnextv2_atto, is convnextv2_femto'),
        ('--config.seed=7', 'seed was 0, is 7'),
        ('--config.data.train_split=train[:320]', 'data.train_split was train[:160], is train[:320]'),
    ],
)
def test_resuming_something_else_is_refused(train_here, finished_run, override, line):
    with pytest.raises(UserError, match=re.escape(line)) as refused:
        train_here(finished_run, override)
    assert '\n' not in str(refused.value)


def test_a_loss_that_stays_broken_stops_the_run(train_here, tmp_path):
    """With the step, the last good checkpoint, and what to try."""
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
    tuned = train_here(
        tmp_path / 'tuned',
        f'--config.init.weights={finished_run}',
        '--config.init.params=ema',
        *FINE_TUNING,
    )
    assert f'starts from the ema weights of {finished_run}, step {STEPS}' in tuned
    assert 'the head keeps 10 of 10 classes by their names; newly initialised: 2 outputs' in tuned
    ours = restore_parameters(tmp_path / 'tuned' / 'checkpoints', FINE_TUNING_STEPS, 'parameters')
    theirs = restore_parameters(finished_run / 'checkpoints', STEPS, 'ema')
    for name, value in theirs.items():
        kept = ours[name][..., :10] if name.startswith('head.') else ours[name]
        np.testing.assert_allclose(kept, value, atol=1e-6, err_msg=name)


def test_fine_tuning_another_architecture_is_refused_with_the_difference(train_here, finished_run, tmp_path):
    with pytest.raises(UserError, match='stages.0.blocks.grn.beta is unexpected') as refused:
        train_here(tmp_path / 'tuned', f'--config.init.weights={finished_run}', '--config.model.name=convnext_atto')
    assert 'stages.0.blocks.layer_scale is missing' in str(refused.value)


def test_a_folder_of_photographs_trains(one_device, small_models, tmp_path, capsys):
    """Of any size, grey and colour, one cut short: that one is named."""

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
    other = "class names [1]: 'dog' became 'emu'; training images: 32 became 33"
    with pytest.raises(UserError, match=re.escape(other)):
        train_command.main([*arguments, '--config.steps=9'])


UNUSUAL = 'a [x] %20 #1 \'q\' "d" é\nnew \\b ' + os.fsdecode(b'\xff')


def photographs(folder: Path, classes: tuple[str, ...], **splits: int) -> Path:
    """Small images of noise in folder/SPLIT/CLASS, so many of each class."""
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


def test_names_of_any_bytes_a_run_that_goes_on_and_its_evaluation(
    one_device, small_models, tmp_path, monkeypatch, capsys
):
    """Folders come from other systems, and a run goes on with less memory, moved data and fewer evaluation images.

    Checkpoints, records, events and tables must hold whatever a file system allows in a name.
    """
    photos = photographs(tmp_path / f'data {UNUSUAL}', (UNUSUAL, 'cafe\N{COMBINING ACUTE ACCENT}'), train=16, val=8)
    run = tmp_path / f'run {UNUSUAL}'
    sys.stdout.reconfigure(errors='backslashreplace')
    monkeypatch.chdir(photos.parent)
    train(small_config(photos.name, steps=4), run, ProfileWindow(1, 1))
    config = read_config(run / CONFIG)
    assert config.data.dir == str(photos), 'it means the same from another folder'
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
    assert 'accumulation_steps was 1, is 2' in out
    assert 'evaluation images were 16, are 15' in out
    assert 'resumes at step 4 of 6' in out
    assert saved_steps(run / CHECKPOINTS)[-1] == 6

    table = tmp_path / f'table {UNUSUAL}.csv'
    evaluation.main(['eval.py', f'--workdir={run}', f'--per_class={table}'])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['images'] == 15
    with table.open(newline='', encoding='utf-8', errors='surrogateescape') as file:
        assert UNUSUAL in [row['class'] for row in csv.DictReader(file)]


def test_a_training_set_with_other_images_is_another_one(finished_run, tmp_path):
    """Every step from there on would see other examples in another order."""
    config = read_config(finished_run / CONFIG)
    run = copy_of(finished_run, tmp_path)
    with Checkpoints(run / CHECKPOINTS, keep=2, best_metric='ema_top1') as checkpoints:
        train_set, eval_set = make_task(config).open()
        train_set.facts['class names'][0] = 'T-shirt'
        run = Run(config, make_durations(config, 160), make_mesh(), train_set, eval_set, checkpoints)
        line = r"began on another data set: class names \[0\]: 'T-shirt/top' became 'T-shirt'"
        with pytest.raises(UserError, match=line):
            run.restored_state()


def test_a_signal_while_the_evaluation_images_are_read(tmp_path, monkeypatch):
    """The pass over a large split takes minutes, and a job that is preempted in it ends with the usual status."""

    def told_to_stop(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        yield {}
        raise AssertionError('nothing more is read')

    monkeypatch.setattr(loop, 'find_unreadable', told_to_stop)
    photos = photographs(tmp_path / 'photos', ('cat', 'dog'), train=8, val=1)
    with pytest.raises(Stopped, match='stopped by SIGTERM before a step was saved') as stopped:
        train(small_config(photos, steps=4), tmp_path / 'run')
    assert stopped.value.status == 128 + signal.SIGTERM
