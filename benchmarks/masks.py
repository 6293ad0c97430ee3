"""CPU time for a training crop with its mask, compared with mmsegmentation's transforms in OpenCV.

    python -m benchmarks.masks DIR [--images=images --masks=annotations --split=training --crop=512 --rounds=7]

DIR holds the images and masks as for `config.data.name=masks`. One thread decodes and crops all images of the split in
each round. CPU time is compared, not elapsed time, so that other programs have little influence. Without OpenCV, only
our times are printed.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from convnext_jax.data.masks import MaskSource, open_masks
from convnext_jax.data.segmentation import TrainMasks, fit_size, pad


def opencv_crop(source: MaskSource, crop: int) -> Callable[[int], object]:
    """mmsegmentation's transforms, which resize the whole image."""
    import cv2

    cv2.setNumThreads(1)

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        example = source[index]
        pixels = cv2.imdecode(np.frombuffer(example.image, np.uint8), cv2.IMREAD_COLOR)
        label = np.array(Image.open(io.BytesIO(example.mask)).convert('P'))
        factor = rng.uniform(0.5, 2.0)
        size = fit_size(label.shape, (int(2048 * factor), int(512 * factor)))
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
        label = cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST)
        for _ in range(11):
            top, left = (rng.integers(max(side - crop, 0) + 1) for side in size)
            box = slice(top, top + crop), slice(left, left + crop)
            counts = np.unique(label[box], return_counts=True)[1]
            if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
                break
        return pad(pixels[box], (crop, crop)), pad(label[box], (crop, crop), 255)

    return load


def milliseconds(load: Callable[[int], object], images: int) -> float:
    """The mean CPU time of this thread for an image."""
    began = time.thread_time()
    for index in range(images):
        load(index)
    return 1000 * (time.thread_time() - began) / images


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument('directory')
    arguments.add_argument('--images', default='images')
    arguments.add_argument('--masks', default='annotations')
    arguments.add_argument('--split', default='training')
    arguments.add_argument('--crop', type=int, default=512)
    arguments.add_argument('--rounds', type=int, default=7)
    options = arguments.parse_args()
    folders = {'image_dir': options.images, 'mask_dir': options.masks}
    source = open_masks('masks', options.directory, options.split, reduce_zero_label=True, **folders)
    data = TrainMasks(source, options.crop)
    loaders = {'a training crop': lambda index: data.load(index, (index,)), 'decoding, included above': data.decode}
    try:
        loaders["mmsegmentation's transforms in OpenCV"] = opencv_crop(source, options.crop)
    except ImportError as error:
        print(f'OpenCV: left out, {error}')
    times = {name: [milliseconds(load, len(source)) for _ in range(options.rounds)] for name, load in loaders.items()}
    print(f'{len(source)} images, crops of {options.crop} pixels, {options.rounds} rounds; ms of CPU time for an image')
    print(f'{"":40}{"median":>8}{"min":>8}{"max":>8}')
    for name, values in times.items():
        print(f'{name:40}{statistics.median(values):8.1f}{min(values):8.1f}{max(values):8.1f}')


if __name__ == '__main__':
    main()
