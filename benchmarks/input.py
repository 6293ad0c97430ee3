"""Images per second of the input pipeline on the host, compared with timm's loader, tf.data and the bare decoder.

    python -m benchmarks.input PHOTOS [--rounds=7] [--workers=2] [--size=224] [--epochs=50]

PHOTOS is a folder of JPEGs. Each loader yields endless, shuffled batches of random resized crops (bicubic, uint8), with
the given number of workers. In each round, every loader is timed once, after it has used up its prefetched batches.
timm and tf.data are left out if they are not installed. timm augments on the host, so it is timed with the crop only
and with the full ImageNet recipe; our loader only crops, because augmentation runs on the device. At the end, the
command prints the memory over epochs (Linux only).
"""

import argparse
import collections
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg

from convnext_jax.data import loading
from convnext_jax.data.decode import train_crop
from convnext_jax.data.labelled_images import TrainImages
from convnext_jax.data.pipeline import Share, train_batches
from convnext_jax.data.sources import FolderSource

BATCH = 50
SKIP, MEASURED = 10, 20  # batches
SCALE = (0.08, 1.0)


def ours(folder: Path, size: int, processes: int, threads: int) -> Iterator[np.ndarray]:
    """Our loader with `processes` decoding processes (0: only threads), and `threads` threads in each process."""
    decoders, loading.decoders = loading.decoders, lambda _: (processes, threads)
    images = TrainImages(FolderSource(folder, 'train'), size, 3, crop_scale=SCALE)
    batches = train_batches(images, Share(BATCH), seed=0, start_step=0, workers=processes)
    first = next(batches)
    loading.decoders = decoders
    with contextlib.closing(batches):
        for batch in itertools.chain([first], batches):
            yield batch['image']


def timm_loader(folder: Path, size: int, workers: int, *, recipe: bool) -> Iterator[np.ndarray]:
    import torch
    from timm.data import create_loader
    from torchvision.datasets import ImageFolder

    class Endless(torch.utils.data.Dataset):
        """A dataset without epochs, so that workers do not idle between them."""

        def __init__(self):
            self.folder, self.transform = ImageFolder(folder / 'train'), None

        def __len__(self):
            return 10**6

        def __getitem__(self, index):
            image, label = self.folder[index % len(self.folder)]
            try:
                return self.transform(image), label
            except ValueError:  # timm sometimes posterizes to 0 bits, which Pillow 13 refuses
                return self[index + 1]

    augmentation = {'auto_augment': 'rand-m9-mstd0.5-inc1', 're_prob': 0.25, 're_mode': 'pixel'} if recipe else {}
    loader = create_loader(
        Endless(),
        (3, size, size),
        BATCH,
        is_training=True,
        scale=SCALE,
        interpolation='bicubic',
        num_workers=workers,
        device=torch.device('cpu'),
        use_prefetcher=True,  # workers yield uint8; normalisation is not timed, here or in ours
        **augmentation,
    )
    for images, _ in loader.loader:
        yield images.numpy()


def tf_data(folder: Path, size: int, workers: int) -> Iterator[np.ndarray]:
    import tensorflow as tf

    def crop(path):
        data = tf.io.read_file(path)
        shape = tf.io.extract_jpeg_shape(data)
        box = tf.zeros((1, 0, 4))
        start, extent, _ = tf.image.sample_distorted_bounding_box(
            shape, box, area_range=SCALE, aspect_ratio_range=(3 / 4, 4 / 3), use_image_if_no_bounding_boxes=True
        )
        window = tf.stack([start[0], start[1], extent[0], extent[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, (size, size), method='bicubic')
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    paths = [str(path) for path in sorted((folder / 'train').rglob('*')) if path.is_file()]
    dataset = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    dataset = dataset.map(crop, num_parallel_calls=workers).batch(BATCH).prefetch(2).with_options(options)
    yield from dataset.as_numpy_iterator()


def bare(folder: Path, workers: int, work: Callable[[bytes], object]) -> Iterator[list]:
    """The results of `work` on each photo, in a pool of threads, without a loader."""
    photos = [path.read_bytes() for path in sorted((folder / 'train').rglob('*')) if path.is_file()]
    with ThreadPoolExecutor(workers) as pool:
        futures = collections.deque()
        for photo in itertools.cycle(photos):
            futures.append(pool.submit(work, photo))
            if len(futures) == 2 * BATCH:
                yield [futures.popleft().result() for _ in range(BATCH)]


def images_per_second(batches: Iterator) -> float:
    for _ in range(SKIP):
        next(batches)
    began = time.perf_counter()
    for _ in range(MEASURED):
        next(batches)
    return MEASURED * BATCH / (time.perf_counter() - began)


def memory() -> float:
    """Memory of this process and its descendants in MB, with shared pages counted once."""
    pids, found = [os.getpid()], []
    while pids:
        pid = pids.pop()
        found.append(pid)
        for task in Path(f'/proc/{pid}/task').iterdir():
            pids += map(int, (task / 'children').read_text().split())
    lines = itertools.chain(*(Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines() for pid in found))
    return sum(int(line.split()[1]) for line in lines if line.startswith('Pss:')) / 1000


def photos_as_folder(photos: Path, folder: Path) -> int:
    """Creates links to the photos, as a split of four classes, and returns the number of photos."""
    paths = sorted(path.resolve() for path in photos.rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg'))
    for number, path in enumerate(paths):
        link = folder / 'train' / f'class{number % 4}' / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return len(paths)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('photos', type=Path)
    arguments.add_argument('--rounds', type=int, default=7)
    arguments.add_argument('--workers', type=int, default=2)
    arguments.add_argument('--size', type=int, default=224)
    arguments.add_argument('--epochs', type=int, default=50)
    options = arguments.parse_args()
    size, workers = options.size, options.workers
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        count = photos_as_folder(options.photos, folder)
        seeds = itertools.count()
        crop = {'channels': 3, 'scale': SCALE}
        loaders = {
            'ours, threads': ours(folder, size, 0, workers),
            'ours, processes': ours(folder, size, workers, 1),
            'timm, crop only': timm_loader(folder, size, workers, recipe=False),
            'timm, full recipe': timm_loader(folder, size, workers, recipe=True),
            'tf.data, fused crop': tf_data(folder, size, workers),
            'limit: decode only': bare(folder, workers, simplejpeg.decode_jpeg),
            'limit: our crop': bare(
                folder, workers, lambda photo: train_crop(photo, size, seed=(next(seeds),), **crop)
            ),
        }
        for name in list(loaders):
            try:
                next(loaders[name])
            except ImportError as error:
                print(f'{name}: left out, {error}')
                del loaders[name]
        rates = collections.defaultdict(list)
        for _ in range(options.rounds):
            for name, batches in loaders.items():
                rates[name].append(images_per_second(batches))
        print(f'{count} photos, {size} pixels, {workers} workers, {options.rounds} rounds; ratio: ours, threads / row')
        print(f'{"":22}{"images/s":>10}{"min":>8}{"max":>8}{"ratio":>8}')
        for name, values in rates.items():
            ratio = statistics.median(a / b for a, b in zip(rates['ours, threads'], values, strict=True))
            print(f'{name:22}{statistics.median(values):10.0f}{min(values):8.0f}{max(values):8.0f}{ratio:8.2f}')
        loaders.clear()
        for name, decoders in {'threads': (0, workers), 'processes': (workers, 1)}.items():
            batches = ours(folder, size, *decoders)
            points = []
            for epoch in range(1, options.epochs + 1):
                for _ in range(count // BATCH):
                    next(batches)
                if epoch % max(options.epochs // 5, 1) == 0:
                    points.append(f'{memory():.0f}')
            batches.close()
            print(f'memory with {name} over {options.epochs} epochs: {", ".join(points)} MB')


if __name__ == '__main__':
    main()
