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
from convnext_jax.interop import ImageProcessor, read_upernet, save_pretrained
from convnext_jax.models import create_model, get_parameters, get_weights, list_models, with_parameters
from convnext_jax.prediction import find_photos
from tests.reference import cases


@pytest.fixture
def evaluate(one_device, capsys):
    """Runs eval.py in this process, and returns the result that it prints."""

    def evaluate(*arguments) -> dict:
        capsys.readouterr()
        eval_command.main(['eval.py', *arguments])
        return strict_json(capsys.readouterr().out.splitlines()[-1])

    return evaluate


@pytest.fixture
def package(one_device, capsys):
    """Runs `python -m convnext_jax …` in this process, and returns what it prints on stdout."""

    def package(*arguments) -> str:
        capsys.readouterr()
        package_command.main(['convnext_jax', *map(str, arguments)])
        return capsys.readouterr().out

    return package


def test_eval_gives_the_raw_and_ema_metrics_of_the_run(commands, evaluate, finished_run):
    """eval.py would contradict the log of the run. Scripts read the last line that the command prints."""
    records = [json.loads(line) for line in (finished_run / 'metrics.jsonl').read_text().splitlines()]
    last = [record for record in records if record['split'] != 'train'][-1]
    out = commands.run('tests/small.py', 'eval.py', f'--workdir={finished_run}').stdout
    raw = strict_json(out.splitlines()[-1])  # the default, as in predict, convert and export
    ema = evaluate(f'--workdir={finished_run}', '--params=ema')
    assert (ema['params'], ema['step'], ema['images']) == ('ema', 24, 40)
    assert ema['top1'] == last['ema_top1']
    assert ema['loss'] == pytest.approx(last['ema_loss'], rel=1e-6)
    assert raw['params'] == 'raw'
    assert raw['loss'] == pytest.approx(last['loss'], rel=1e-6)


def test_eval_scores_several_splits_by_another_protocol(evaluate, finished_run, tmp_path, capsys):
    """The table for people, the JSON object for scripts, or the file with the accuracy of each class would be wrong."""
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


def test_eval_of_a_run_accepts_other_config_values(finished_run, capsys):
    """A run could not be evaluated after its data set moved, or on another split."""
    moved = BUNDLED['fashion_mnist_mini'].parent.parent
    overrides = (f'--config.data.dir={moved}', '--config.data.eval_split=test[:24]', '--config.batch_size=8')
    eval_command.main(['eval.py', f'--workdir={finished_run}', *overrides])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result['split'], result['images']) == ('test[:24]', 24)
    assert read_config(finished_run / 'config.json').data.eval_split == 'test[:40]', 'the run is unchanged'


def test_eval_and_predict_agree_on_a_folder_that_lacks_classes(finished_run, tmp_path, capsys):
    """With labels numbered in the order of folders, eval would score 0 % on photos that predict gets right."""

    def predicted(folder):
        """File → its most probable class."""
        package_command.main(['convnext_jax', 'predict', str(folder), f'--weights={finished_run}', '--top=1', '--json'])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return {Path(line['file']): line['best'][0]['name'] for line in lines}

    source = open_source('fashion_mnist_mini', '', 'test')
    (tmp_path / 'images').mkdir()
    for index in range(200):
        (tmp_path / 'images' / f'{index}.png').write_bytes(source[index].image)
    # The short run learns little, so the folders are named after its predictions; one image in four is misplaced.
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


def test_eval_can_restore_an_earlier_step(evaluate, finished_run):
    """Users could not compare the checkpoints of a run."""
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
            'set --config.data.dir=DIR to the folder of fashion_mnist_mini',
        ),
        (('--workdir={run}', '--stap=3'), "Unknown command line flag 'stap'"),
    ],
)
def test_eval_refuses_what_it_cannot_do(finished_run, arguments, line):
    """A mistake would end in a traceback, or in an evaluation of something else."""
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
        (('--config=configs/fashion_mnist.py', '--config.data.std=(0.1, 0.2)'), 'must have one value for each channel'),
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
    """A mistake would end in a traceback, or in the training of something else."""
    with pytest.raises(UserError, match=re.escape(line)):
        train_command.main(['train.py', f'--workdir={tmp_path / "run"}', *arguments])


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch, capsys):
    """The shell does not expand ~ after =, so commands would create a folder called ~, or not find the right one."""
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
    """Users would have to find the problem in a traceback, and scripts could not recognise it."""
    refused = commands.run('train.py', '--config=configs/nowhere.py', f'--workdir={tmp_path}', status=2)
    assert refused.stderr == 'error: --config: there is no file configs/nowhere.py\n'
    assert refused.stdout == ''


def test_a_disk_that_is_full_at_the_start_is_reported_in_one_line(capsys):
    """Users would see where the code failed instead of what to fix."""

    def command(_):
        with open('/dev/full', 'w') as file:
            file.write('config')

    with pytest.raises(SystemExit) as ended:
        run(command)
    assert ended.value.code == 2
    assert capsys.readouterr().err == 'error: No space left on device\n'


def test_a_warning_of_the_package_is_one_line(tmp_path, capsys, monkeypatch):
    """The path and the code that Python adds to a warning would hide which files were left out of a data set."""
    (tmp_path / 'photos').mkdir()
    for name in ('a.png', '.b.png'):
        Image.new('L', (2, 2)).save(tmp_path / 'photos' / name)
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)  # restored after the test
    monkeypatch.setattr(sys, 'argv', ['convnext_jax', 'predict', str(tmp_path / 'photos')])
    with warnings.catch_warnings():
        warnings.simplefilter('default')
        with pytest.raises(SystemExit):
            run(package_command.main)
    left_out = f'warning: {tmp_path / "photos"}: left out: hidden files (1)\n'
    assert capsys.readouterr().err == f'{left_out}error: --weights is missing; see --help\n'


def test_models_lists_every_name_with_its_parameters(package):
    """Users could not find a model of the right size."""
    table = package('models').splitlines()[1:-2]
    assert [line.split()[0] for line in table] == list_models()
    assert table[list_models().index('convnext_tiny')].split()[1:] == ['28,589,128', '4.46', 'G', '9', '85.15', '%']
    assert table[list_models().index('convnext_atto_rms')].split()[-2:] == ['0', '–']


def test_models_lists_the_published_weights_of_a_name(package):
    """Users could not find the hub ids, the image size of the published accuracy, or the licence."""
    table = package('models', 'convnext_base').splitlines()
    assert 'timm/convnext_base.fb_in1k 1000 224 83.84 % 288 84.47 % apache-2.0' in [
        ' '.join(line.split()) for line in table
    ]
    assert len(table) == 1 + 16
    assert package('models', 'convnext_atto_rms') == 'timm publishes no weights of convnext_atto_rms\n'
    with pytest.raises(UserError, match="there is no model 'convnext_tinny': did you mean convnext_tiny"):
        package('models', 'convnext_tinny')
    with pytest.raises(UserError, match='models takes one name, not convnext_tiny convnext_small'):
        package('models', 'convnext_tiny', 'convnext_small')


def test_converted_weights_give_equal_results_and_start_a_run(package, evaluate, train_here, finished_run, tmp_path):
    """Weights in the Hugging Face layout would have another accuracy, or could not be fine-tuned."""
    assert package('convert', finished_run, tmp_path / 'hf', '--params=ema') == (
        f'{tmp_path / "hf"} holds the ema weights of {finished_run}, step {STEPS}, in the huggingface layout\n'
    )
    config = ('--config=configs/fashion_mnist.py', '--config.data.eval_split=test[:40]', '--config.batch_size=16')
    run = evaluate(f'--workdir={finished_run}', '--params=ema')
    theirs = evaluate(*config, f'--weights={tmp_path / "hf"}')
    assert (theirs['top1'], theirs['images'], theirs['params']) == (run['top1'], 40, 'raw')
    assert theirs['loss'] == pytest.approx(run['loss'], rel=1e-5)
    with pytest.raises(UserError, match='timm builds a different network for patch_size=2'):
        package('convert', tmp_path / 'hf', tmp_path / 'timm', '--layout=timm')
    started = train_here(tmp_path / 'tuned', f'--config.init.weights={tmp_path / "hf"}', *FINE_TUNING)
    assert f'starts from the huggingface weights of {tmp_path / "hf"}' in started
    kept = 'the head keeps the outputs of 10 of 10 classes; newly initialised: 2 outputs without a class'
    assert kept in started


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        (('convert', 'nowhere'), 'TARGET is missing'),
        (('convert', 'a', 'b', 'c'), 'unexpected argument: c'),
        (('convert', './nowhere', 'out'), './nowhere is not a file, a folder or a hub id'),
        (('convert', '{run}', '{run}'), 'is not empty'),
        (('convert', '{run}', 'out', '--layout=keras'), 'flag --layout=keras'),
        (('convert', '{run}', 'out', '--params=best'), "weights are 'raw' or 'ema', not 'best'"),
    ],
)
def test_convert_refuses_what_it_cannot_do(finished_run, arguments, line):
    """A mistake would end in a traceback, or overwrite a folder."""
    with pytest.raises(UserError, match=re.escape(line)):
        package_command.main(['convnext_jax', *(argument.format(run=finished_run) for argument in arguments)])


def test_convert_keeps_a_upernet_with_its_classes_and_preprocessing(package, tmp_path):
    """A segmentation network could not be given to other libraries, or would lose its class names."""
    names = tuple(f'class {number}' for number in range(7))
    processor = ImageProcessor(size=64, resample=2, squash=True)
    save_pretrained(cases.random_upernet('v2'), tmp_path / 'hf', class_names=names, processor=processor)
    shown = package('convert', tmp_path / 'hf', tmp_path / 'out')
    origin = f'the raw weights of {tmp_path / "hf"} (huggingface layout)'
    assert shown == f'{tmp_path / "out"} holds {origin}, in the huggingface layout\n'
    before, after = (read_upernet(tmp_path / folder) for folder in ('hf', 'out'))
    assert (after.class_names, after.processor) == (names, processor)
    jax.tree.map(np.testing.assert_array_equal, get_weights(after.model), get_weights(before.model))
    with pytest.raises(UserError, match='can only be saved as a whole, as huggingface, mmsegmentation, original'):
        package('convert', tmp_path / 'hf', tmp_path / 'timm', '--layout=timm')


def test_commands_for_classifiers_refuse_a_upernet(package, photos, tmp_path):
    """They would end with a traceback."""
    save_pretrained(cases.random_upernet('v1'), tmp_path / 'upernet')
    weights = f'--weights={tmp_path / "upernet"}'
    with pytest.raises(UserError, match='this is a UPerNet for semantic segmentation'):
        package('embed', photos / 'b.jpg', weights, f'--output={tmp_path / "out.npz"}')
    for probe in ((), ('--probe=knn',)):
        with pytest.raises(UserError, match='this is a UPerNet for semantic segmentation'):
            eval_command.main(['eval.py', '--config=configs/fashion_mnist.py', weights, *probe])


@pytest.fixture
def photos(tmp_path):
    """A folder with two photos, one photo that cannot be read, and a text file."""
    folder = tmp_path / 'photos'
    (folder / 'deep').mkdir(parents=True)
    for number, name in enumerate(('b.jpg', 'deep/a.PNG')):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / 'broken.jpg').write_bytes((folder / 'b.jpg').read_bytes()[:300])
    (folder / 'notes.txt').write_text('')
    return folder


def test_predict_prints_the_best_classes_and_reports_what_it_skips(commands, package, finished_run, photos):
    """One broken photo would end the command, or be missing from its output without a message."""
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
    """Weights in the Hugging Face layout whose head contains infinities of both signs."""
    model = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=10)
    parameters = dict(get_parameters(model))
    parameters['head.kernel'] = parameters['head.kernel'].at[0, :2].set(np.asarray([np.inf, -np.inf]))
    processor = ImageProcessor(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    broken = with_parameters(model, parameters)
    save_pretrained(broken, tmp_path / 'infinite', processor=processor, class_names=['T-shirt/top', *FASHION])
    return tmp_path / 'infinite'


def test_eval_says_which_metric_is_not_finite(infinite_weights, photos, capsys):
    """A script would fail to parse NaN, or take the result of broken weights as valid."""
    for split in ('train', 'val'):
        shutil.copytree(photos / 'deep', photos.parent / 'data' / split / 'Bag')
    data = ('--config=configs/image_folder.py:atto', f'--config.data.dir={photos.parent / "data"}')
    with pytest.raises(UserError, match='^not finite: loss of folder@val; the weights contain NaN or infinity'):
        eval_command.main(['eval.py', *data, f'--weights={infinite_weights}'])
    result = strict_json(capsys.readouterr().out.splitlines()[-1])
    assert result['loss'] is None
    assert result['images'] == 1


def test_predict_says_which_scores_are_not_finite(infinite_weights, photos, capsys):
    """NaN cannot be sorted, so the best class would be random."""
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
    """A stream as in a notebook: text only, without a descriptor, and with a fixed encoding."""

    reconfigure = property()


def test_the_scripts_run_inside_another_program(one_device, small_models, tmp_path, monkeypatch):
    """`%run train.py …` in a notebook would fail in its event loop or the second time, or take over its signals."""
    monkeypatch.chdir(ROOT)
    for stream in ('stdout', 'stderr'):
        monkeypatch.setattr(sys, stream, NotebookStream())
    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)  # restored after the test
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    async def cell(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [script, *arguments, f'--workdir={tmp_path / "run"}'])
        runpy.run_path(script, run_name='__main__')

    for _ in range(2):  # the second time, the run is already finished
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
    """A mistake would end in a traceback, or in predictions for other files."""
    with pytest.raises(UserError, match=re.escape(line)):
        package_command.main(['convnext_jax', *(argument.format(run=finished_run) for argument in arguments)])


def test_eval_takes_a_run_or_weights_and_not_both(finished_run):
    """Users could not tell which of them was evaluated."""
    with pytest.raises(UserError, match='give --workdir or --weights, not both'):
        eval_command.main(['eval.py', f'--workdir={finished_run}', '--weights=x'])


def test_an_unknown_command_lists_the_commands():
    """Users would have to look up the name of the command that they misspelt."""
    commands = 'train | eval | prepare | measure | models | predict | embed | reconstruct | convert | export | plan'
    with pytest.raises(UserError, match=re.escape(f'{{{commands}}}')):
        package_command.main(['convnext_jax', 'modles'])


def test_tracebacks_of_abandoned_coroutines_are_hidden_and_others_are_shown(monkeypatch, capsys):
    """After a failed restore, pages of traceback would hide the line that says which checkpoint is damaged."""

    async def read():
        try:
            await asyncio.sleep(0)
        finally:
            raise ValueError('the array is damaged')

    class Other:
        def __del__(self):
            raise ValueError('of our own')

    monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)  # restored after the test
    run(lambda arguments: None)
    abandoned, other = read(), Other()
    abandoned.send(None)  # runs to its first await
    del abandoned
    assert capsys.readouterr().err == ''
    del other
    assert 'of our own' in capsys.readouterr().err
