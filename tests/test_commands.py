"""The commands as a user types them."""

import asyncio
import io
import json
import re
import runpy
import shutil
import signal
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import FINE_TUNING, ROOT, SMALL_RUN, STEPS, strict_json
from PIL import Image

import convnext_jax as cx
import eval as eval_command
import train as train_command
from convnext_jax import __main__ as package_command
from convnext_jax.command_line import run
from convnext_jax.config import read_config
from convnext_jax.data.sources import BUNDLED, open_source
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, save_pretrained
from convnext_jax.models import create_model, get_parameters, list_models, with_parameters
from convnext_jax.prediction import find_photos


@pytest.fixture
def evaluate(one_device, capsys):
    """The result that eval.py prints, in this process."""

    def evaluate(*arguments) -> dict:
        capsys.readouterr()
        eval_command.main(['eval.py', *arguments])
        return strict_json(capsys.readouterr().out.splitlines()[-1])

    return evaluate


@pytest.fixture
def package(one_device, capsys):
    """What `python -m convnext_jax …` prints on stdout, in this process."""

    def package(*arguments) -> str:
        capsys.readouterr()
        package_command.main(['convnext_jax', *map(str, arguments)])
        return capsys.readouterr().out

    return package


def test_eval_gives_the_numbers_of_the_run_raw_and_ema(commands, evaluate, finished_run):
    """By the command itself, whose last line is for scripts."""
    records = [json.loads(line) for line in (finished_run / 'metrics.jsonl').read_text().splitlines()]
    last = [record for record in records if record['split'] != 'train'][-1]
    out = commands.run('tests/small.py', 'eval.py', f'--workdir={finished_run}').stdout
    raw = strict_json(out.splitlines()[-1])  # raw as predict, convert and export
    ema = evaluate(f'--workdir={finished_run}', '--params=ema')
    assert (ema['params'], ema['step'], ema['images']) == ('ema', 24, 40)
    assert ema['top1'] == last['ema_top1']
    assert ema['loss'] == pytest.approx(last['ema_loss'], rel=1e-6)
    assert raw['params'] == 'raw'
    assert raw['loss'] == pytest.approx(last['loss'], rel=1e-6)


def test_eval_of_several_splits_by_another_protocol(evaluate, finished_run, tmp_path, capsys):
    """A table for people, one JSON object for scripts, and a file for those who ask which class it is."""
    file = tmp_path / 'classes.csv'
    splits = '--splits=fashion_mnist_mini@test[:40],fashion_mnist_mini@test[40:60]'
    arguments = (f'--workdir={finished_run}', splits, '--flip', '--resolution=32', f'--per_class={file}')
    eval_command.main(['eval.py', *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:-1]] == [
        'data',
        'fashion_mnist_mini@test[:40]',
        'fashion_mnist_mini@test[40:60]',
    ]
    results = json.loads(lines[-1])['splits']
    assert [result['images'] for result in results] == [40, 20]
    assert results[0]['loss'] != evaluate(f'--workdir={finished_run}')['loss']
    rows = [line.split(',') for line in file.read_text().splitlines()]
    assert rows[0] == ['data', 'split', 'label', 'class', 'top1']
    assert len(rows) == 21
    for result in results:
        scores = [float(row[4]) for row in rows[1:] if row[1] == result['split'] and row[4]]
        assert min(scores) <= result['top1'] <= max(scores)


def test_eval_of_a_run_with_other_values_of_its_config(finished_run, capsys):
    """The data set has moved, or another split is to be scored: a run that nobody can evaluate is lost."""
    moved = BUNDLED['fashion_mnist_mini'].parent.parent
    overrides = (f'--config.data.dir={moved}', '--config.data.eval_split=test[:24]', '--config.batch_size=8')
    eval_command.main(['eval.py', f'--workdir={finished_run}', *overrides])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result['split'], result['images']) == ('test[:24]', 24)
    assert read_config(finished_run / 'config.json').data.eval_split == 'test[:40]', 'the run keeps its own'


def test_eval_and_predict_agree_on_a_folder_that_lacks_classes(finished_run, tmp_path, capsys):
    """Labels numbered by the folder's own order scored 0 % where predict was right about every photograph."""

    def predicted(folder):
        """File → the class that the run finds most probable."""
        package_command.main(['convnext_jax', 'predict', str(folder), f'--weights={finished_run}', '--top=1', '--json'])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return {Path(line['file']): line['best'][0]['name'] for line in lines}

    source = open_source('fashion_mnist_mini', '', 'test')
    (tmp_path / 'images').mkdir()
    for index in range(200):
        (tmp_path / 'images' / f'{index}.png').write_bytes(source[index].image)
    # So few steps teach little: the folders have the predicted names, and one image in four is in a wrong folder.
    folders = ['Coat', 'Dress', 'Trouser']
    for number, (file, name) in enumerate(predicted(tmp_path / 'images').items()):
        if name in folders:
            name = folders[folders.index(name) - (number % 4 == 0)]
            (tmp_path / 'test' / name).mkdir(parents=True, exist_ok=True)
            file.rename(tmp_path / 'test' / name / file.name)
    arguments = [f'--workdir={finished_run}', '--splits=folder@test', f'--config.data.dir={tmp_path}']
    eval_command.main(['eval.py', *arguments])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    right = [file.parent.name == name for file, name in predicted(tmp_path / 'test').items()]
    assert {path.name for path in (tmp_path / 'test').iterdir()} == set(folders)
    assert result['images'] == len(right) > 40
    assert result['top1'] == pytest.approx(100 * np.mean(right))
    assert 60 < result['top1'] < 90
    (tmp_path / 'test' / 'Dress').rename(tmp_path / 'test' / 'Flip-flop')
    with pytest.raises(UserError, match='^folder test: the model lacks these classes: Flip-flop$'):
        eval_command.main(['eval.py', *arguments])


def test_eval_of_an_earlier_step(evaluate, finished_run):
    assert evaluate(f'--workdir={finished_run}', '--step=20')['step'] == 20


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        ((), '--workdir is missing'),
        (('--workdir=nowhere',), 'nowhere holds no run'),
        (('--workdir={run}', '--params=best'), "weights are 'raw' or 'ema', not 'best'"),
        (('--workdir={run}', '--splits=test'), "--splits needs NAME@SPLIT, for example imagenet_v2@test, not 'test'"),
        (('--workdir={run}', '--splits=fashion_mnist_mini@train[:0]'), "has no split 'train[:0]'"),
        (('--workdir={run}', '--per_class=nowhere/a.csv'), 'nowhere/a.csv cannot be written'),
        (('--workdir={run}', '--step=3'), 'has no checkpoint of step 3, only of'),
        (('--workdir={run}', '--config=configs/fashion_mnist.py'), 'drop --config=configs/fashion_mnist.py, and'),
        (('--config=configs/fashion_mnist.py', '--workdir={run}'), 'drop --config=configs/fashion_mnist.py, and'),
        (
            ('--weights={run}', '--step=3', '--config=configs/fashion_mnist.py'),
            '--step selects a checkpoint of',
        ),
        (('--workdir={run}', '--config.seed=1'), '--config.seed cannot be changed for an evaluation, only batch_size'),
        (('--workdir={run}', '--config.data.dri=x'), "the config has no field 'dri'"),
        (('--workdir={run}', '--config.batch_size=x'), '--config.batch_size=x'),
        (('--workdir={run}', '--config.batch_size=0'), 'batch_size must be above 0'),
        (
            ('--workdir={run}', '--config.data.dir=nowhere'),
            'data.dir=DIR where fashion_mnist_mini is',
        ),
        (('--workdir={run}', '--stap=3'), "Unknown command line flag 'stap'"),
    ],
)
def test_eval_refuses_what_it_cannot_do(finished_run, arguments, line):
    with pytest.raises(UserError, match=re.escape(line)):
        eval_command.main(['eval.py', *(argument.format(run=finished_run) for argument in arguments)])


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        ((), '--config is missing'),
        (('--config=configs/nowhere.py',), 'there is no file configs/nowhere.py'),
        (('--config=configs/imagenet1k.py:tiney',), "there is no model 'convnext_tiney': did you mean convnext_tiny"),
        (('--config=configs/fashion_mnist.py', '--config.sead=1'), "has no field 'sead': did you mean seed?"),
        (('--config=configs/fashion_mnist.py', '--config.optimizer.rate=1'), "the config has no field 'rate'"),
        (('--config=configs/fashion_mnist.py', '--config.epochs=many'), '--config.epochs=many'),
        (('--config=configs/fashion_mnist.py', 'stray'), 'unexpected argument: stray'),
        (('--config=configs/fashion_mnist.py', '--config.batch_size=5001'), 'lower it'),
        (('--config=configs/fashion_mnist.py', '--config.data.crop_scale=(0.5,)'), 'data.crop_scale must be two'),
        (('--config=configs/fashion_mnist.py', '--config.model.patch_size=4'), 'below the total stride 32'),
        (('--config=configs/fashion_mnist.py', '--config.steps=10'), 'and the warm-up alone takes'),
        (('--config=configs/imagenet1k.py:tiny',), 'data.dir is not set'),
        (
            ('--config=configs/fashion_mnist.py', '--config.log_every_steps=0', '--config.ema.decay=1.5'),
            'log_every_steps must be above 0, not 0; ema.decay must be in [0, 1), not 1.5',
        ),
        (('--config=configs/fashion_mnist.py', '--config.data.std=(0.1, 0.2)'), 'must have one value (grey) or three'),
        (('--config=configs/fashion_mnist.py', '--config.optimizer.learning_rate=inf'), 'must be finite, not inf'),
        (('--config=configs/fashion_mnist.py', "--config.data.crop_scale=('a', 1)"), 'data.crop_scale must be two'),
        (
            ('--config=configs/fashion_mnist.py', '--profile=5'),
            "--profile needs START:STEPS, not '5'; for example",
        ),
        (
            ('--config=configs/fashion_mnist.py', '--config.compilation_cache_dir=README.md/cache'),
            'README.md/cache cannot be written: Not a directory',
        ),
    ],
)
def test_train_refuses_what_it_cannot_do(tmp_path, arguments, line):
    with pytest.raises(UserError, match=re.escape(line)):
        train_command.main(['train.py', f'--workdir={tmp_path / "run"}', *arguments])


def test_the_home_folder_in_every_path(tmp_path, monkeypatch, capsys):
    """After = the shell leaves a ~: commands would make a folder of that name, or miss the one that is meant."""
    home, here = tmp_path / 'home', tmp_path / 'here'
    here.mkdir()
    for name in ('cat', 'dog'):
        (home / 'photos' / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(home / 'photos' / 'train' / name / 'a.png')
    (home / 'fashion.py').write_text((ROOT / 'configs' / 'fashion_mnist.py').read_text())
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.chdir(here)
    cached = jax.config.jax_compilation_cache_dir
    arguments = ('--config.batch_size=5001', '--config.compilation_cache_dir=~/cache')
    try:
        with pytest.raises(UserError, match='lower it'):
            train_command.main(['train.py', '--config=~/fashion.py', '--workdir=~/run', *arguments])
    finally:
        jax.config.update('jax_compilation_cache_dir', cached)
    package_command.main(['m', 'prepare', 'folder', '--manual_dir=~/photos', '--data_dir=~/DATA', '--name=mine'])
    processor = ImageProcessor()
    cx.save_pretrained(cx.create_model('convnext_atto', key=jax.random.key(0)), '~/saved', processor=processor)
    processor.save('~/DATA')
    assert ImageProcessor.from_pretrained('~/saved') == ImageProcessor.from_pretrained('~/DATA') == processor
    assert processor('~/photos/train/cat/a.png').shape == (1, 224, 224, 3)
    assert find_photos(['~/photos/*/c*/*.png']) == [home / 'photos' / 'train' / 'cat' / 'a.png']
    assert len(open_source('mine', '~/DATA', 'train')) == len(open_source('folder', '~/photos', 'train')) == 2
    assert not list(here.iterdir())


def test_a_refusal_is_one_line_and_exit_status_2(commands, tmp_path):
    refused = commands.run('train.py', '--config=configs/nowhere.py', f'--workdir={tmp_path}', status=2)
    assert refused.stderr == 'error: --config: there is no file configs/nowhere.py\n'
    assert refused.stdout == ''


def test_a_disk_that_is_full_at_the_start_is_one_line_too(capsys):
    """Whoever submits a job sees what to mend, not where in the code it was noticed."""

    def command(_):
        with open('/dev/full', 'w') as file:
            file.write('config')

    with pytest.raises(SystemExit) as ended:
        run(command)
    assert ended.value.code == 2
    assert capsys.readouterr().err == 'error: No space left on device\n'


def test_a_warning_of_ours_is_one_line(tmp_path, capsys, monkeypatch):
    """Two lines of code and a path per warning hide what was left out of a data set."""
    (tmp_path / 'photos').mkdir()
    for name in ('a.png', '.b.png'):
        Image.new('L', (2, 2)).save(tmp_path / 'photos' / name)
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)  # put back after
    monkeypatch.setattr(sys, 'argv', ['convnext_jax', 'predict', str(tmp_path / 'photos')])
    with warnings.catch_warnings():
        warnings.simplefilter('default')
        with pytest.raises(SystemExit):
            run(package_command.main)
    left_out = f'warning: {tmp_path / "photos"}: left out: hidden files (1)\n'
    assert capsys.readouterr().err == f'{left_out}error: --weights is missing; see --help\n'


def test_models_lists_every_name_with_its_parameters(package):
    table = package('models').splitlines()[1:]
    assert [line.split()[0] for line in table] == list_models()
    assert table[list_models().index('convnext_tiny')].split()[1:] == ['28,589,128', '4.46', 'G']


def test_weights_leave_a_run_and_come_back(package, evaluate, train_here, finished_run, tmp_path):
    """In the layout of Hugging Face: the same accuracy, and a run that starts from them."""
    assert package('convert', finished_run, tmp_path / 'hf', '--params=ema') == (
        f'{tmp_path / "hf"} holds the ema weights of {finished_run}, step {STEPS}, in the huggingface layout\n'
    )
    config = ('--config=configs/fashion_mnist.py', '--config.data.eval_split=test[:40]', '--config.batch_size=16')
    run = evaluate(f'--workdir={finished_run}', '--params=ema')
    theirs = evaluate(*config, f'--weights={tmp_path / "hf"}')
    assert (theirs['top1'], theirs['images'], theirs['params']) == (run['top1'], 40, 'raw')
    assert theirs['loss'] == pytest.approx(run['loss'], rel=1e-5)
    with pytest.raises(UserError, match='timm builds a ConvNeXt of patch_size=2 otherwise'):
        package('convert', tmp_path / 'hf', tmp_path / 'timm', '--layout=timm')
    started = train_here(tmp_path / 'tuned', f'--config.init.weights={tmp_path / "hf"}', *FINE_TUNING)
    assert f'starts from the huggingface weights of {tmp_path / "hf"}' in started
    kept = 'the head keeps 10 of 10 classes by their names; newly initialised: 2 outputs without a class'
    assert kept in started


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        (('convert', 'nowhere'), 'TARGET is missing'),
        (('convert', 'a', 'b', 'c'), 'unexpected argument: c'),
        (('convert', './nowhere', 'out'), './nowhere is no file or folder'),
        (('convert', '{run}', '{run}'), 'is not empty'),
        (('convert', '{run}', 'out', '--layout=keras'), 'flag --layout=keras'),
        (('convert', '{run}', 'out', '--params=best'), "weights are 'raw' or 'ema', not 'best'"),
    ],
)
def test_convert_refuses_what_it_cannot_do(finished_run, arguments, line):
    with pytest.raises(UserError, match=re.escape(line)):
        package_command.main(['convnext_jax', *(argument.format(run=finished_run) for argument in arguments)])


@pytest.fixture
def photos(tmp_path):
    """Two that can be read, in a folder with one that cannot and one that is no image."""
    folder = tmp_path / 'photos'
    (folder / 'deep').mkdir(parents=True)
    for number, name in enumerate(('b.jpg', 'deep/a.PNG')):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / 'broken.jpg').write_bytes((folder / 'b.jpg').read_bytes()[:300])
    (folder / 'notes.txt').write_text('')
    return folder


def test_predict_prints_the_best_classes_and_reports_what_it_skips(commands, package, finished_run, photos):
    options = (f'--weights={finished_run}', '--top=3', '--batch=2')
    done = commands.run('tests/small.py', '-m', 'convnext_jax', 'predict', photos, *options, '--json', status=2)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line['file'] for line in lines] == [str(photos / 'b.jpg'), str(photos / 'deep' / 'a.PNG')]
    for line in lines:
        probabilities = [best['probability'] for best in line['best']]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
        assert {best['name'] for best in line['best']} < {'T-shirt/top', *FASHION}
    left_out, first, second, _ = done.stderr.splitlines()
    assert left_out == f'warning: {photos}: left out: .txt files (1)'
    weights = f'the raw weights of {finished_run}, step {STEPS}; --params=ema uses the moving average'
    assert first == f'predicting with {weights}'
    assert second.startswith('skipped: ')
    assert done.stderr.splitlines()[-1] == 'error: 1 of 3 files could not be read'
    table = package('predict', photos / 'b.jpg', photos / 'deep' / '*.PNG', *options)
    assert [line for line in table.splitlines() if not line.startswith(' ')] == [line['file'] for line in lines]
    assert f'{100 * lines[0]["best"][0]["probability"]:.2f} %  {lines[0]["best"][0]["name"]}' in table


@pytest.fixture
def infinite_weights(tmp_path):
    """A folder of Hugging Face whose head holds infinities of both signs."""
    model = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=10)
    parameters = dict(get_parameters(model))
    parameters['head.kernel'] = parameters['head.kernel'].at[0, :2].set(np.asarray([np.inf, -np.inf]))
    processor = ImageProcessor(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    broken = with_parameters(model, parameters)
    save_pretrained(broken, tmp_path / 'infinite', processor=processor, class_names=['T-shirt/top', *FASHION])
    return tmp_path / 'infinite'


def test_eval_says_which_metric_is_not_finite(infinite_weights, photos, capsys):
    """A script that reads NaN stops at it, or takes weights that are broken for a result."""
    for split in ('train', 'val'):
        shutil.copytree(photos / 'deep', photos.parent / 'data' / split / 'Bag')
    data = ('--config=configs/image_folder.py:atto', f'--config.data.dir={photos.parent / "data"}')
    with pytest.raises(UserError, match='^not finite: loss of folder@val; the weights contain NaN or infinity'):
        eval_command.main(['eval.py', *data, f'--weights={infinite_weights}'])
    result = strict_json(capsys.readouterr().out.splitlines()[-1])
    assert result['loss'] is None
    assert result['images'] == 1


def test_predict_says_which_scores_are_not_finite(infinite_weights, photos, capsys):
    """NaN has no order: the class at the top would be chance."""
    files = [str(photos / 'b.jpg'), str(photos / 'deep')]
    arguments = ['convnext_jax', 'predict', *files, f'--weights={infinite_weights}']
    with pytest.raises(UserError, match=r'^the scores of 2 of 2 files are not finite \(.*b.jpg, .*a.PNG\)'):
        package_command.main([*arguments, '--json'])
    rows = [strict_json(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{'file': str(photos / name), 'best': []} for name in ('b.jpg', 'deep/a.PNG')]
    with pytest.raises(UserError, match='are not finite'):
        package_command.main(arguments)
    assert f'{photos / "b.jpg"}\n  the scores are not finite\n' in capsys.readouterr().out


class NotebookStream(io.StringIO):
    """As a notebook's: text alone, no descriptor, no encoding to change."""

    reconfigure = property()


def test_the_scripts_run_inside_another_program(one_device, small_models, tmp_path, monkeypatch):
    """A notebook's `%run train.py …`: in its process and event loop, several times; its signals stay its own."""
    monkeypatch.chdir(ROOT)
    for stream in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, stream, NotebookStream())
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)  # put back after
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    async def cell(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [script, *arguments, f'--workdir={tmp_path / "run"}'])
        runpy.run_path(script, run_name='__main__')

    for _ in range(2):  # the second time there is nothing left to do
        asyncio.run(cell('train.py', *SMALL_RUN))
        assert sys.stdout.getvalue().splitlines()[-1].startswith('finished: top-1')
    asyncio.run(cell('eval.py'))
    assert strict_json(sys.stdout.getvalue().splitlines()[-1])['step'] == STEPS
    assert sys.stdout.getvalue().count('compiled in') == 1
    assert {number: signal.getsignal(number) for number in handlers} == handlers


FASHION = ['Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot']


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        (('predict',), 'PHOTO is missing'),
        (('predict', 'README.md'), '--weights is missing'),
        (('predict', 'nowhere/*.jpg', '--weights={run}'), 'nowhere/*.jpg is not a file, a folder with images'),
        (('predict', 'README.md', '--weights={run}', '--top=0'), 'flag --top=0'),
    ],
)
def test_predict_refuses_what_it_cannot_do(finished_run, arguments, line):
    with pytest.raises(UserError, match=re.escape(line)):
        package_command.main(['convnext_jax', *(argument.format(run=finished_run) for argument in arguments)])


def test_eval_takes_a_run_or_weights_and_not_both(finished_run):
    with pytest.raises(UserError, match='give --workdir or --weights, not both'):
        eval_command.main(['eval.py', f'--workdir={finished_run}', '--weights=x'])


def test_an_unknown_command_lists_those_there_are():
    with pytest.raises(
        UserError, match=re.escape('{train | eval | prepare | models | predict | convert | export | plan}')
    ):
        package_command.main(['convnext_jax', 'modles'])


def test_what_a_failed_restore_leaves_behind_is_not_shown_and_other_errors_are(monkeypatch, capsys):
    """Pages of a coroutine's traceback hide the one line that says which checkpoint is damaged."""

    async def read():
        try:
            await asyncio.sleep(0)
        finally:
            raise ValueError('the array is damaged')

    class Other:
        def __del__(self):
            raise ValueError('of our own')

    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)  # put back after
    run(lambda arguments: None)
    abandoned, other = read(), Other()
    abandoned.send(None)  # until it waits
    del abandoned
    assert capsys.readouterr().err == ''
    del other
    assert 'of our own' in capsys.readouterr().err
