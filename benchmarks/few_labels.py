"""The effect of FCMAE pre-training when labels are few: Fashion-MNIST with 10 labels for each class.

    python -m benchmarks.few_labels --output=DIR [--seeds=3]

A small ConvNeXt V2 is pre-trained on the 5,000 bundled training images without their labels. For each seed, 100
labelled images are drawn, and networks are trained on them from the pre-trained weights and from scratch, with the same
settings and learning rates. The runs use the training loop of `train.py`, and are evaluated on the 1,000 test images.
For each checkpoint of the pre-training, one per epoch, k-NN on the features of 2,000 training images also classifies
the test images.

The command writes `few_labels.json`, `few_labels.png` and `reconstructions.png` into DIR. If the command is
repeated, it skips the finished runs.
"""

import argparse
import datetime
import io
import json
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks.compare.report import describe_machine
from convnext_jax.checkpoints.checkpoint import restore_parameters, saved_steps
from convnext_jax.checkpoints.state import init_key
from convnext_jax.checkpoints.workdir import CHECKPOINTS
from convnext_jax.configs import fashion_mnist, fcmae
from convnext_jax.data.augment import normalize
from convnext_jax.data.labelled_images import EvalImages
from convnext_jax.data.sources import Source, open_source
from convnext_jax.models import with_parameters
from convnext_jax.models.fcmae import MaskedAutoencoder
from convnext_jax.models.variants import VARIANTS, Variant
from convnext_jax.monitoring.records import read_records
from convnext_jax.paths import local_path
from convnext_jax.probing.knn import knn_accuracy
from convnext_jax.tasks import make_task
from convnext_jax.training.loop import train

DATA = 'fashion_mnist_mini'
MODEL = 'convnextv2_micro'
VARIANT = Variant((1, 1, 2, 1), (32, 64, 128, 256), grn=True, layer_scale_init=0)
SIDE = 64
"""Pixels along a side of the enlarged images, which are four patches of 32 pixels."""
LABELS = 10
"""Labelled images for each class."""
PRETRAINING_EPOCHS = 12
FINE_TUNING_EPOCHS = 60
LEARNING_RATES = (1e-3, 3e-3)
"""Peak learning rates. Networks are trained with both, from the pre-trained weights and from scratch."""
KNN_IMAGES = 2000
"""Training images among which the nearest neighbours are searched."""
BATCH = 100
STARTS = {'pre-trained': 'pre-trained without labels', 'scratch': 'from scratch'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', required=True, help='folder for the runs, the results and the pictures')
    parser.add_argument('--seeds', type=int, default=3)
    arguments = parser.parse_args()
    VARIANTS[MODEL] = VARIANT
    output = local_path(arguments.output)
    pretrained = output / 'pretrained'
    train(pretraining_config(), pretrained)
    top1 = {
        (start, rate): [fine_tune(output, start, rate, seed) for seed in range(arguments.seeds)]
        for rate in LEARNING_RATES
        for start in STARTS
    }
    knn = knn_curve(pretraining_config(), pretrained)
    write_results(output, top1, knn)
    print(f'{output} holds few_labels.json, few_labels.png and reconstructions.png')


def pretraining_config() -> ConfigDict:
    """The config of a pre-training. Half of the four patches of an image are masked."""
    config, demo = fcmae.get_config('atto'), fashion_mnist.get_config()
    config.epochs = float(PRETRAINING_EPOCHS)
    config.batch_size = 32
    config.model.name = MODEL
    config.model.dtype, config.model.remat = 'float32', 'none'
    config.fcmae.mask_ratio = 0.5
    config.data.name, config.data.eval_split, config.data.image_size = DATA, 'test', SIDE
    config.data.mean, config.data.std = demo.data.mean, demo.data.std
    config.data.crop_pct, config.data.crop_scale = 1.0, (0.6, 1.0)
    config.optimizer.learning_rate = 1.5e-3 * 256 / config.batch_size
    config.optimizer.warmup_epochs = 1.0
    config.log_every_steps = config.checkpoint_every_steps = 156  # an epoch
    config.eval_every_epochs = 3.0
    config.keep_checkpoints = PRETRAINING_EPOCHS
    return config


def fine_tuning_config(data: Path, seed: int, rate: float, weights: str) -> ConfigDict:
    """The config of a fine-tuning, or of a training from scratch if `weights` is ''.

    Args:
        data: folder that `write_labelled_images` wrote.
        seed: seed of the run and of the choice of the labelled images.
        rate: peak learning rate.
        weights: workdir of the pre-training.
    """
    config = fashion_mnist.get_config()
    config.seed, config.init.weights = seed, weights
    config.epochs = float(FINE_TUNING_EPOCHS)
    config.batch_size = 25
    config.model.name, config.model.patch_size, config.model.remat = MODEL, 0, 'none'
    config.data.name, config.data.dir = 'folder', str(data)
    config.data.train_split, config.data.eval_split = f'labelled_{seed}', 'test'
    config.data.image_size = SIDE
    config.augment.crop_padding = 4
    config.optimizer.learning_rate = rate * 256 / config.batch_size
    config.optimizer.warmup_epochs = FINE_TUNING_EPOCHS / 10
    config.ema.decay = 0.0
    config.eval_every_epochs = config.epochs
    config.log_every_steps, config.checkpoint_every_steps = 40, 10**6
    config.compilation_cache_dir = str(data.parent / 'compiled')
    return config


def fine_tune(output: Path, start: str, rate: float, seed: int) -> float:
    """Trains on the labelled images of a seed, and returns the accuracy on the test images in percent."""
    write_labelled_images(output / 'data', seed)
    workdir, weights = output / f'{start}_{seed}_{rate:g}', str(output / 'pretrained')
    train(fine_tuning_config(output / 'data', seed, rate, weights if start == 'pre-trained' else ''), workdir)
    return [record['top1'] for record in read_records(workdir) if 'top1' in record][-1]


def write_labelled_images(folder: Path, seed: int) -> None:
    """Writes `LABELS` random images of each class to `folder/labelled_SEED`, and all test images to `folder/test`."""
    source = open_source(DATA, '', 'train')
    labels = np.asarray([source[index].label for index in range(len(source))])
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(labels == label), LABELS, replace=False) for label in range(labels.max() + 1)]
    _write_images(source, np.concatenate(chosen), folder / f'labelled_{seed}')
    test = open_source(DATA, '', 'test')
    _write_images(test, range(len(test)), folder / 'test')


def _write_images(source: Source, indices, folder: Path) -> None:
    for index in map(int, indices):
        example = source[index]
        name = source.class_names[example.label].replace('/', ' or ')
        path = folder / name / f'{index:05}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(example.image)


def knn_curve(config: ConfigDict, workdir: Path) -> list[tuple[int, float]]:
    """(epoch, k-NN accuracy in percent) before the first step, and for each checkpoint of a pre-training."""
    task = make_task(config)
    train_images, test_images = (
        EvalImages(open_source(DATA, '', split), SIDE, 1, crop_pct=1.0) for split in (f'train[:{KNN_IMAGES}]', 'test')
    )
    steps_per_epoch, curve = 5000 // config.batch_size, []
    features = jax.jit(lambda model, x: features_of(model, normalize(x, config.data.mean, config.data.std)))
    for step, model in _models(task, config, workdir):
        known, new = (_features(features, model, images) for images in (train_images, test_images))
        curve.append((round(step / steps_per_epoch), 100 * knn_accuracy(*known, *new)))
        print(f'epoch {curve[-1][0]}: k-NN accuracy {curve[-1][1]:.1f} %', flush=True)
    return curve


def _models(task, config: ConfigDict, workdir: Path) -> Iterator[tuple[int, MaskedAutoencoder]]:
    model = jax.jit(task.build)(init_key(config.seed))
    yield 0, model
    for step in saved_steps(workdir / CHECKPOINTS):
        yield step, with_parameters(model, restore_parameters(workdir / CHECKPOINTS, step, 'parameters'))


def features_of(model: MaskedAutoencoder, images: jax.Array) -> jax.Array:
    """The last feature map of the encoder, averaged over its positions: (N, H, W, C) → (N, channels)."""
    return list(model.features(images).values())[-1].mean((1, 2))


def _features(features, model: MaskedAutoencoder, images: EvalImages) -> tuple[np.ndarray, np.ndarray]:
    examples = [images.load(index) for index in range(len(images))]
    parts = [
        np.asarray(features(model, jnp.asarray(np.stack([example['image'] for example in examples[i : i + BATCH]]))))
        for i in range(0, len(examples), BATCH)
    ]
    return np.concatenate(parts), np.asarray([example['label'] for example in examples])


def write_results(output: Path, top1: dict[tuple[str, float], list[float]], knn: list[tuple[int, float]]) -> None:
    """Writes the results as JSON, and draws them.

    Args:
        output: folder of the runs.
        top1: (start, learning rate) → accuracy for each seed, in percent.
        knn: from `knn_curve`.
    """
    rows: list[dict[str, Any]] = []
    for start, words in STARTS.items():
        for rate in LEARNING_RATES:
            each = [round(value, 1) for value in top1[start, rate]]
            mean = round(statistics.mean(each), 1)
            rows.append({'start': words, 'learning_rate': rate, 'mean': mean, 'least': min(each), 'most': max(each)})
    rows += [{'epoch': epoch, 'knn': round(accuracy, 1)} for epoch, accuracy in knn]
    measurement = describe(len(each)) | {'results': rows}
    (output / 'few_labels.json').write_text(json.dumps(measurement, indent=1, ensure_ascii=False) + '\n')
    draw(top1, knn, output / 'few_labels.png')
    draw_reconstructions(output / 'pretrained' / 'figures' / 'reconstructions.png', output / 'reconstructions.png')


def describe(seeds: int) -> dict[str, Any]:
    """The fields that all measurements have: what was measured, where, and with which versions."""
    machine = describe_machine()
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=False)
    return {
        'what': f'Top-1 on 1,000 test images of Fashion-MNIST after training with {LABELS} labels for each class',
        'machine': f'{machine["cores"]} cores of {machine["processor"]}',
        'versions': {name: machine['versions'][name] for name in ('python', 'jax')},
        'date': datetime.date.today().isoformat(),
        'commit': commit.stdout.strip() or None,
        'command': 'python -m benchmarks.few_labels --output=DIR',
        'method': f'one pre-training; {seeds} seeds of the fine-tuning, each with different labelled images',
        'note': None,
    }


def draw(top1: dict[tuple[str, float], list[float]], knn: list[tuple[int, float]], path: Path) -> None:
    """Draws the accuracy of each fine-tuning, and the k-NN accuracy during the pre-training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout='constrained')
    left, right = figure.subplots(1, 2)
    for place, ((start, _), values) in enumerate(top1.items()):
        color = f'C{list(STARTS).index(start)}'
        left.bar(place, statistics.mean(values), color=color, alpha=0.4)
        left.plot([place] * len(values), values, 'o', color=color)
    left.set_xticks(range(len(top1)), [f'{start}\n{rate:g}' for start, rate in top1])
    left.set_ylim(bottom=max(0, min(min(values) for values in top1.values()) - 10))
    left.set_title(f'top-1 with {LABELS} labels for each class (%)')
    left.set_xlabel('start and learning rate')
    right.plot(*zip(*knn, strict=True), '.-')
    right.set_title('k-NN accuracy (%)')
    right.set_xlabel('epochs of pre-training')
    right.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=100)
    Image.open(image).convert('RGB').quantize(32).save(path, optimize=True)


def draw_reconstructions(figure: Path, path: Path) -> None:
    """Arranges the first 8 rows of a figure of reconstructions in two columns, and writes it to `path`."""
    rows = np.asarray(Image.open(figure).convert('L'))[: 8 * SIDE]
    Image.fromarray(np.concatenate(np.split(rows, 2), 1)).save(path, optimize=True)


if __name__ == '__main__':
    main()
