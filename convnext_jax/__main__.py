"""convnext-jax COMMAND, or python -m convnext_jax COMMAND; COMMAND --help lists the flags

train --config=fashion_mnist --workdir=DIR   train a model, or resume the run in DIR; --config=imagenet1k:tiny is a
                                             recipe of the package with its variant, --config=FILE.py a file
eval --workdir=DIR                           evaluate a run, or with --config and --weights any weights
prepare imagenet2012 --manual_dir=TARS --data_dir=DATA
                                             write ImageNet-1k as a data set for training, from the official tars
prepare folder --manual_dir=DIR --data_dir=DATA --name=NAME
                                             write DIR/SPLIT/CLASS/*.jpg as a data set of a few large files
prepare masks --manual_dir=DIR --data_dir=DATA --name=NAME
                                             write DIR/images/SPLIT/* and the masks DIR/annotations/SPLIT/*.png likewise
measure --config=CONFIG [--channels=N]       print mean and std of each channel over the training split, as flags
models [NAME]                                list the architectures, or the published weights of one
predict PHOTO... --weights=WEIGHTS           classify image files, folders of images, or glob patterns; with a UPerNet
                                             and --output=DIR, write masks with the class of each pixel
embed PHOTO... --weights=WEIGHTS --output=FILE.npz
                                             write the feature vectors of images, or FILE.parquet
reconstruct PHOTO... --workdir=WORKDIR       write pictures of images as an fcmae run masks and reconstructs them
convert SOURCE TARGET --layout=huggingface   write the weights of a run, or of another library, for another library;
                                             --push=ACCOUNT/NAME uploads them to the Hugging Face hub, after a question
export SOURCE TARGET --format=stablehlo      write a program for CPU, GPU and TPU that runs without this package
plan --config=CONFIG --topology=v5e:4x4      compile a training step for TPUs that are not attached (or GPUs, with
                                             --gpu=h100:8), and print its memory, communication and cycles
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from convnext_jax.checkpoints.workdir import CURVES
from convnext_jax.command_line import define_config, parse, required, required_config, run
from convnext_jax.commands.eval import main as evaluate
from convnext_jax.commands.train import main as train
from convnext_jax.data.measure import mean_and_std
from convnext_jax.data.prepare import prepare_folder, prepare_imagenet2012, prepare_masks
from convnext_jax.data.unlabelled_images import open_images
from convnext_jax.embedding import check_format, embed, save_embeddings
from convnext_jax.errors import UserError
from convnext_jax.export import export_stablehlo
from convnext_jax.interop import Pretrained, PretrainedModel, PretrainedUPerNet, as_classifier, save_pretrained
from convnext_jax.interop.card import upload_card
from convnext_jax.interop.hub import check_hub_id, upload
from convnext_jax.interop.layouts import LAYOUTS
from convnext_jax.interop.licence import CARD
from convnext_jax.interop.published import published_weights
from convnext_jax.interop.upernet import UPERNET_LAYOUTS
from convnext_jax.mask_prediction import MODES, mask_files, predict_masks
from convnext_jax.models import create_model, get_parameters, get_variant, list_models
from convnext_jax.output import say, show, to_json
from convnext_jax.paths import local_path
from convnext_jax.pictures import indexed_mask, overlay, save_picture
from convnext_jax.plan import gpu_target, plan, tpu_target
from convnext_jax.prediction import Prediction, find_photos, predict
from convnext_jax.reconstruction import reconstruct_photos
from convnext_jax.run_card import run_section
from convnext_jax.training.weights import read_weights, run_folder

MASK_FLAGS = ('output', 'mode', 'resolution')
"""Flags of `predict` for a UPerNet only."""


def prepare(arguments: list[str]) -> None:
    """Writes a data set in ArrayRecord format. Running the command again continues after an interruption."""
    values = flags.FlagValues()
    flags.DEFINE_string('manual_dir', None, 'Folder with the tars or the folders of images.', flag_values=values)
    flags.DEFINE_string(
        'data_dir', None, 'Folder to write the data set to; training reads it as data.dir.', flag_values=values
    )
    flags.DEFINE_string(
        'name', None, 'Name of the data set made from folders; training reads it as data.name.', flag_values=values
    )
    flags.DEFINE_string('image_dir', 'images', 'prepare masks: folder in manual_dir with images.', flag_values=values)
    flags.DEFINE_string(
        'mask_dir', 'annotations', 'prepare masks: folder in manual_dir with masks.', flag_values=values
    )
    flags.DEFINE_string('classes', '', "prepare masks: file of class names; '': beside the masks.", flag_values=values)
    flags.DEFINE_bool(
        'reduce_zero_label', False, 'prepare masks: pixels of value 0 have no class, as in ADE20K.', flag_values=values
    )
    (what,) = parse(values, arguments, usage=__doc__, positional=('imagenet2012, folder or masks',))
    if what not in ('imagenet2012', 'folder', 'masks'):
        raise UserError(f"prepare needs 'imagenet2012', 'folder' or 'masks', not '{what}'")
    manual_dir, data_dir = (local_path(required(values, name)) for name in ('manual_dir', 'data_dir'))
    if what == 'folder':
        prepare_folder(manual_dir, data_dir, required(values, 'name'))
    elif what == 'masks':
        prepare_masks(
            manual_dir,
            data_dir,
            required(values, 'name'),
            image_dir=values.image_dir,
            mask_dir=values.mask_dir,
            classes=values.classes,
            reduce_zero_label=values.reduce_zero_label,
        )
    else:
        prepare_imagenet2012(manual_dir, data_dir)


def measure(arguments: list[str]) -> None:
    """Prints the mean and standard deviation of each channel over the training split, as flags for training."""
    values = flags.FlagValues()
    define_config(values, arguments)
    flags.DEFINE_integer(
        'channels',
        None,
        'Number of channels; by default the number of values in data.mean.',
        lower_bound=1,
        flag_values=values,
    )
    parse(values, arguments, usage=__doc__)
    data = required_config(values).data
    source = open_images(data.name, data.dir, data.train_split)
    say(f'measuring {len(source):,} images of the split {data.train_split}', error=True)
    for name, numbers in zip(('mean', 'std'), mean_and_std(source, values.channels or len(data.mean)), strict=True):
        show(f"--config.data.{name}='({', '.join(f'{x:.6g}' for x in numbers)},)'")


def models(arguments: list[str]) -> None:
    """Prints the size of every model for 224-pixel images and 1,000 classes, or the published weights of one model."""
    names = parse(flags.FlagValues(), arguments, usage=__doc__, positional=('...',))
    if len(names) > 1:
        raise UserError(f'models takes one name, not {" ".join(names)}')
    if names:
        get_variant(names[0])  # checks the name
        _show_weights(names[0])
        return
    show(f'{"name":28}{"parameters":>14}{"multiply-adds":>15}{"weights":>9}{"best top-1":>12}')
    for name in list_models():
        model = jax.eval_shape(lambda key, name=name: create_model(name, key=key), jax.random.key(0))
        parameters = sum(array.size for array in get_parameters(model).values())
        weights = [entry for entry in published_weights() if entry.model == name]
        best = max((entry.best_top1 for entry in weights if entry.best_top1 is not None), default=None)
        show(
            f'{name:28}{parameters:14,}{get_variant(name).multiply_adds() / 1e9:13.2f} G{len(weights):9}'
            f'{_percent(best):>12}'
        )
    show('\n`models NAME` lists the weights of an architecture.')


def _show_weights(name: str) -> None:
    """Prints hub id, classes, sizes of images, accuracy and licence of the published weights of a model."""
    weights = [entry for entry in published_weights() if entry.model == name]
    if not weights:
        show(f'timm publishes no weights of {name}')
        return
    width = max(len(entry.hub_id) for entry in weights) + 2
    show(f'{"weights":{width}}{"classes":>8}{"size":>6}{"top-1":>9}{"test size":>11}{"top-1":>9}  licence')
    for entry in weights:
        show(
            f'{entry.hub_id:{width}}{entry.classes:8}{entry.size:6}{_percent(entry.top1):>9}{entry.test_size:11}'
            f'{_percent(entry.test_top1):>9}  {entry.licence}'
        )


def _percent(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f} %'


def convert(arguments: list[str]) -> None:
    """Writes the weights of a run, or of another library, as a folder that another library loads."""
    values = flags.FlagValues()
    layouts = list(dict.fromkeys((*LAYOUTS, *UPERNET_LAYOUTS)))
    flags.DEFINE_enum('layout', 'huggingface', layouts, 'Library that loads the folder.', flag_values=values)
    flags.DEFINE_string(
        'push', None, 'Upload the folder to this repository of the Hugging Face hub, ACCOUNT/NAME.', flag_values=values
    )
    _define_weights(values)
    source, target = parse(values, arguments, usage=__doc__, positional=('SOURCE', 'TARGET'))
    if values.push is not None:
        check_hub_id(values.push)
    pretrained = read_weights(source, values.params, values.name)
    if values.push is not None:
        as_classifier(pretrained)  # the model card describes classifiers and encoders
    is_upernet = isinstance(pretrained, PretrainedUPerNet)
    head = is_upernet or pretrained.has_head
    save_pretrained(
        pretrained.model,
        target,
        layout=values.layout,
        class_names=pretrained.class_names,
        processor=pretrained.processor,
        problem_type=None if is_upernet else pretrained.problem_type,
        licence=pretrained.licence,
        head=head,
    )
    _say_notes_and_licence(pretrained)
    part = '' if head else ', an encoder without a head'
    show(f'{target} holds {pretrained.origin}, in the {values.layout} layout{part}')
    if values.push is not None:
        _push(as_classifier(pretrained), values.layout, local_path(target), values.push, run_folder(source))


def _push(pretrained: Pretrained, layout: str, folder: Path, hub_id: str, workdir: Path | None) -> None:
    """Writes a model card into a saved folder and uploads the folder, if the user agrees.

    Args:
        pretrained: the saved model.
        layout: the layout of the folder.
        folder: the saved folder.
        hub_id: the repository, 'ACCOUNT/NAME'.
        workdir: the run that trained the model; the card describes it. None for other weights.
    """
    training = run_section(workdir) if workdir else ''
    if workdir and (workdir / CURVES).exists():
        (folder / CURVES).write_bytes((workdir / CURVES).read_bytes())
    (folder / CARD).write_bytes(upload_card(pretrained, layout, hub_id, training))
    if pretrained.licence is None:
        say(f'the licence of the weights is unknown: state it in {folder / CARD}', error=True)
    elif pretrained.licence.is_special:
        say(f'this licence may require that you add its text as {folder / "LICENSE"}', error=True)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    say(
        f'upload {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, to the public repository '
        f'https://huggingface.co/{hub_id}? [y/N]',
        error=True,
    )
    if sys.stdin.readline().strip().lower() not in ('y', 'yes'):
        show('nothing was uploaded')
        return
    show(f'uploaded to {upload(folder, hub_id)}')


def export(arguments: list[str]) -> None:
    """Writes the model of a run, or of another library, as a program with its weights and preprocessing."""
    values = flags.FlagValues()
    flags.DEFINE_enum('format', 'stablehlo', ['stablehlo'], 'Format of the program.', flag_values=values)
    _define_weights(values)
    source, target = parse(values, arguments, usage=__doc__, positional=('SOURCE', 'TARGET'))
    pretrained = read_weights(source, values.params, values.name)
    export_stablehlo(pretrained, target)
    _say_notes_and_licence(pretrained)
    show(f'{target} holds model.stablehlo, model.safetensors ({pretrained.origin}) and model.json (classes and images)')


def predict_photos(arguments: list[str]) -> None:
    """Prints the most probable classes of images. With a UPerNet, writes masks with the class of each pixel.

    If a file cannot be read, or its scores are not finite, the command reports it, continues with the other files, and
    exits with status 2.
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        'weights', None, 'Workdir of a run, or a folder, file or hub id of weights.', flag_values=values
    )
    _define_weights(values)
    flags.DEFINE_integer('top', 5, 'Number of classes to print for each image.', lower_bound=1, flag_values=values)
    flags.DEFINE_integer('batch', 16, 'Classifier: number of images in a batch.', lower_bound=1, flag_values=values)
    flags.DEFINE_bool('json', False, 'Print one JSON object per image.', flag_values=values)
    flags.DEFINE_string('output', None, 'UPerNet: folder for the masks.', flag_values=values)
    flags.DEFINE_enum(
        'mode',
        None,
        MODES,
        "UPerNet: 'slide' windows over the images, predict 'whole' images, or 'squash' the images to a square. The "
        'default comes from the run or from the stored preprocessing.',
        flag_values=values,
    )
    flags.DEFINE_integer(
        'resolution',
        None,
        'UPerNet: side of the windows or of the square in pixels.',
        lower_bound=1,
        flag_values=values,
    )
    photos = find_photos(parse(values, arguments, usage=__doc__, positional=('PHOTO', '...')))
    pretrained = read_weights(required(values, 'weights'), values.params, values.name)
    is_upernet = isinstance(pretrained, PretrainedUPerNet)
    unused = [f'--{name}' for name in (('batch',) if is_upernet else MASK_FLAGS) if values[name].present]
    if unused:
        kind = 'a UPerNet' if is_upernet else 'a classifier'
        raise UserError(f'{", ".join(unused)} cannot be used with {pretrained.origin}, because it is {kind}')
    say(f'predicting with {"; ".join([pretrained.origin, *pretrained.notes])}', error=True)
    _say_licence(pretrained)
    if is_upernet:
        _write_masks(pretrained, photos, values)
    else:
        _show_classes(pretrained, photos, values)


def _show_classes(pretrained: Pretrained, photos: Sequence[Path], values: flags.FlagValues) -> None:
    unread, not_finite = 0, []
    with tqdm(total=len(photos), unit='photo', disable=not sys.stderr.isatty()) as bar:
        for prediction in predict(pretrained, photos, top=values.top, batch_size=values.batch):
            bar.update()
            if prediction.error:
                unread += 1
                say(f'skipped: {prediction.error}', error=True)
            else:
                show(_as_json(prediction) if values.json else _as_table(prediction.path, prediction.best))
                if not prediction.best:
                    not_finite.append(prediction.path)
    _check_all_predicted(len(photos), unread, not_finite)


def _write_masks(pretrained: PretrainedUPerNet, photos: Sequence[Path], values: flags.FlagValues) -> None:
    if values.output is None:
        raise UserError('--output is missing: a UPerNet predicts a mask for each photograph, so give --output=FOLDER')
    files = mask_files(photos, local_path(values.output))
    unread, not_finite = 0, []
    predictions = predict_masks(pretrained, photos, mode=values.mode, resolution=values.resolution)
    with tqdm(total=len(photos), unit='photo', disable=not sys.stderr.isatty()) as bar:
        for (mask, picture), prediction in zip(files, predictions, strict=True):
            bar.update()
            if prediction.photo is None or prediction.classes is None:
                unread += 1
                say(f'skipped: {prediction.error}', error=True)
                continue
            if prediction.areas:
                save_picture(indexed_mask(prediction.classes), mask)
                save_picture(overlay(prediction.photo, prediction.classes, prediction.areas), picture)
            else:
                not_finite.append(prediction.path)
            areas = prediction.areas[: values.top]
            show(_mask_as_json(prediction.path, mask, areas) if values.json else _as_table(prediction.path, areas))
    _check_all_predicted(len(photos), unread, not_finite)


def _check_all_predicted(photos: int, unread: int, not_finite: Sequence[Path]) -> None:
    problems = [f'{unread} of {photos} files could not be read'] if unread else []
    if not_finite:
        listed = ', '.join(map(str, not_finite[:5]))
        problems.append(
            f'the scores of {len(not_finite)} of {photos} files are not finite ({listed}): '
            'the weights contain NaN or infinity, or the outputs overflow; use other weights'
        )
    if problems:
        raise UserError('; '.join(problems))


def embed_photos(arguments: list[str]) -> None:
    """Writes a file with the feature vector of each image and its path.

    If a file cannot be read, the command reports it, continues with the other files, and exits with status 2.
    """
    values = flags.FlagValues()
    flags.DEFINE_string(
        'weights', None, 'Folder, file or hub id of weights, with or without a head.', flag_values=values
    )
    flags.DEFINE_string('workdir', None, 'Folder of a run, instead of --weights.', flag_values=values)
    _define_weights(values)
    flags.DEFINE_integer('batch', 16, 'Number of images in a batch.', lower_bound=1, flag_values=values)
    flags.DEFINE_string('output', None, 'File to write, FILE.npz or FILE.parquet.', flag_values=values)
    photos = find_photos(parse(values, arguments, usage=__doc__, positional=('PHOTO', '...')))
    output = local_path(required(values, 'output'))
    check_format(output)
    if values.weights is not None and values.workdir is not None:
        raise UserError('give --weights or --workdir, not both')
    weights = required(values, 'weights') if values.workdir is None else values.workdir
    pretrained = as_classifier(read_weights(weights, values.params, values.name))
    say(f'embedding with {pretrained.origin}', error=True)
    _say_notes_and_licence(pretrained)
    files, vectors = [], []
    with tqdm(total=len(photos), unit='photo', disable=not sys.stderr.isatty()) as bar:
        for embedding in embed(pretrained, photos, batch_size=values.batch):
            bar.update()
            if embedding.vector is None:
                say(f'skipped: {embedding.error}', error=True)
            else:
                files.append(embedding.path)
                vectors.append(embedding.vector)
    if vectors:
        save_embeddings(output, files, np.stack(vectors))
        show(f'{output} holds the features of {len(files)} images, {len(vectors[0])} numbers each')
    if len(files) < len(photos):
        raise UserError(f'{len(photos) - len(files)} of {len(photos)} files could not be embedded')


def _define_weights(values: flags.FlagValues) -> None:
    """Adds the flags --params and --name of all commands that read weights."""
    flags.DEFINE_string(
        'params', 'raw', "Weights to use: 'raw', or 'ema' for their moving average.", flag_values=values
    )
    flags.DEFINE_string('name', None, 'Name of the architecture, if the file does not contain it.', flag_values=values)


def _say_notes_and_licence(pretrained: PretrainedModel) -> None:
    """Prints what was changed or dropped in the file of the weights, and their licence."""
    for note in pretrained.file_notes:
        say(note, error=True)
    _say_licence(pretrained)


def _say_licence(pretrained: PretrainedModel) -> None:
    if pretrained.licence:
        say(pretrained.licence.line, error=True)


def _as_json(prediction: Prediction) -> str:
    best = [{'label': label, 'name': name, 'probability': round(p, 6)} for label, name, p in prediction.best]
    return to_json({'file': str(prediction.path), 'best': best})


def _as_table(path: Path, classes: Sequence[tuple[int, str, float]]) -> str:
    lines = [f'  {100 * share:6.2f} %  {name}' for _, name, share in classes] or ['  the scores are not finite']
    return '\n'.join([f'{path}', *lines])


def _mask_as_json(photo: Path, mask: Path, areas: Sequence[tuple[int, str, float]]) -> str:
    classes = [{'label': label, 'name': name, 'share': round(share, 6)} for label, name, share in areas]
    return to_json({'file': str(photo), 'mask': str(mask) if areas else None, 'classes': classes})


def reconstruct(arguments: list[str]) -> None:
    """Writes a PNG for each image: the image, its visible patches, and the reconstruction.

    If a file cannot be read, the command reports it, continues with the other files, and exits with status 2.
    """
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', None, 'Folder of a run of the task fcmae.', flag_values=values)
    flags.DEFINE_string(
        'params', 'raw', "Weights to use: 'raw', or 'ema' for their moving average.", flag_values=values
    )
    flags.DEFINE_string(
        'output', None, 'Folder for the pictures; WORKDIR/reconstructions by default.', flag_values=values
    )
    photos = find_photos(parse(values, arguments, usage=__doc__, positional=('PHOTO', '...')))
    workdir = required(values, 'workdir')
    folder = local_path(values.output or f'{workdir}/reconstructions')
    unread = 0
    for number, reconstruction in enumerate(reconstruct_photos(workdir, photos, values.params)):
        if reconstruction.pixels is None:
            unread += 1
            say(f'skipped: {reconstruction.error}', error=True)
        else:
            picture = folder / f'{number:04d}_{reconstruction.path.stem}.png'
            save_picture(Image.fromarray(reconstruction.pixels), picture)
            show(f'{picture}')
    if unread:
        raise UserError(f'{unread} of {len(photos)} files could not be read')


def plan_step(arguments: list[str]) -> None:
    """Prints the compiler's figures for the training step of a config on accelerators that are not attached."""
    values = flags.FlagValues()
    define_config(values, arguments)
    flags.DEFINE_string('topology', None, 'TPU slice, such as v5e:16x16, v5p:4x4x4 or v6e:8x8.', flag_values=values)
    flags.DEFINE_string('gpu', None, 'GPUs of one machine, such as h100:8.', flag_values=values)
    flags.DEFINE_integer(
        'batch', None, 'Images per chip in one pass; overrides config.batch_size.', lower_bound=1, flag_values=values
    )
    parse(values, arguments, usage=__doc__)
    config = required_config(values)
    if (values.topology is None) == (values.gpu is None):
        raise UserError('give either --topology, for example v5e:4x4, or --gpu, for example h100:8')
    jax.config.update('jax_platforms', 'cpu')  # do not occupy the accelerators of this machine
    with tempfile.TemporaryDirectory() as listings:
        folder = Path(listings) if config.model.pallas else None
        target = tpu_target(values.topology, folder) if values.topology else gpu_target(values.gpu)
        plan(config, target, values.batch)


COMMANDS = {
    'train': train,
    'eval': evaluate,
    'prepare': prepare,
    'measure': measure,
    'models': models,
    'predict': predict_photos,
    'embed': embed_photos,
    'reconstruct': reconstruct,
    'convert': convert,
    'export': export,
    'plan': plan_step,
}


def main(arguments: list[str]) -> None:
    name = arguments[1] if len(arguments) > 1 else ''
    if name in ('--help', '-h'):
        show(__doc__.rstrip())
        return
    if name not in COMMANDS:
        raise UserError(f"there is no command '{name}'; usage: convnext-jax {{{' | '.join(COMMANDS)}}}")
    COMMANDS[name]([f'{arguments[0]} {name}', *arguments[2:]])


def script() -> None:
    """Runs the console script `convnext-jax`."""
    run(main)


if __name__ == '__main__':
    script()
