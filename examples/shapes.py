"""Writes pictures of coloured shapes with their masks, in the folders that segmentation reads.

python examples/shapes.py runs/shapes
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = {'background': None, 'disc': (190, 70, 60), 'square': (70, 160, 70), 'triangle': (70, 90, 190)}
"""Name of a class → the mean colour of its shapes."""


def write_shapes(folder: Path, images: dict[str, int], seed: int = 0) -> None:
    """Writes FOLDER/images/SPLIT/*.jpg, FOLDER/annotations/SPLIT/*.png and FOLDER/classes.txt.

    The colour of a shape differs from the mean colour of its class, and the background is grey.

    Args:
        folder: a folder that need not exist. The file classes.txt is written last.
        images: number of images of each split.
        seed: seed of the pictures.
    """
    rng = np.random.default_rng(seed)
    for split, count in images.items():
        for kind in ('images', 'annotations'):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture, mask = draw_picture(rng)
            picture.save(folder / 'images' / split / f'{number:04}.jpg', quality=90)
            mask.save(folder / 'annotations' / split / f'{number:04}.png')
    (folder / 'classes.txt').write_text('\n'.join(CLASSES) + '\n')


def draw_picture(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A picture of three shapes on a grey background, and its mask, whose pixel values are the classes."""
    width, height = (int(side) for side in rng.integers(96, 144, 2))
    grey = Image.fromarray(rng.integers(0, 256, (6, 6)).astype(np.uint8)).resize((width, height))
    picture, mask = grey.convert('RGB'), Image.new('L', (width, height))
    for _ in range(3):
        label = int(rng.integers(1, len(CLASSES)))
        name, mean = list(CLASSES.items())[label]
        radius = rng.integers(14, 26)
        centre = rng.integers(radius, (width - radius, height - radius))
        colour = tuple(int(value) for value in np.clip(mean + rng.normal(0, 30, 3), 0, 255))
        for image, fill in ((picture, colour), (mask, label)):
            draw_shape(ImageDraw.Draw(image), name, centre, radius, fill)
    noise = rng.normal(0, 8, (height, width, 3))
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6))) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def draw_shape(draw: ImageDraw.ImageDraw, name: str, centre: np.ndarray, radius: int, fill: object) -> None:
    left, top, right, bottom = (float(value) for value in (*(centre - radius), *(centre + radius)))
    if name == 'disc':
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif name == 'square':
        draw.rectangle((left, top, right, bottom), fill=fill)
    else:
        draw.polygon(((left, bottom), (right, bottom), (float(centre[0]), top)), fill=fill)


if __name__ == '__main__':
    write_shapes(Path(sys.argv[1]), {'training': 640, 'validation': 80})
