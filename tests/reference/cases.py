"""The inputs of the stored results: models, images, files and a training run; needs none of the other libraries."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from convnext_jax import ImageProcessor, create_model, save_pretrained
from convnext_jax.models import UPerNet, Variant, get_parameters, get_variant, get_weights, with_parameters
from tests.reference import draw, draw_bytes, draw_parameters, sketch

CLASSES = 50
NAMES = ('cat', 'dog', 'emu')
FEATURES = ('stem', 'stage1', 'stage2', 'stage3', 'stage4')
SIZE = (96, 160)
ODD_SIZE = (100, 143)
"""Not a multiple of any stride."""

MODELS = (
    ('transformers', 'convnext_tiny', 1e-6),
    ('transformers', 'convnextv2_atto', 1e-12),
    ('transformers', 'convnextv2_tiny', 1e-6),
    ('timm', 'convnext_atto', 1e-6),
    ('timm', 'convnext_tiny', 1e-6),
    ('timm', 'convnextv2_atto', 1e-6),
    ('timm', 'convnextv2_tiny', 1e-6),
    *(('timm', name, None) for name in ('convnext_zepto_rms_ols', 'convnext_atto_ols', 'convnext_atto_rms')),
    *(('timm', name, None) for name in ('test_convnext', 'test_convnext3')),
    ('torch', 'convnext_isotropic_small', 1e-6),
)
"""(Library, variant, epsilon of the last norm or None for the variant's)."""
BACKBONES = ('convnext_tiny', 'convnextv2_atto')
BACKBONE_FEATURES = ('stem', 'stage2', 'stage4')
DILATED = (
    ('convnext_tiny', 4, 8),
    ('convnext_tiny', 4, 16),
    ('convnextv2_atto', 4, 8),
    ('convnextv2_atto', 4, 16),
    ('convnextv2_atto', 8, 8),
)
"""(Variant, patch size, output stride)."""
LAYERED = ('convnext_tiny', 'convnext_base', 'convnextv2_large', 'convnextv2_atto')
LEVELS = (0.0, 3.3, 9.0, 10.0)
TRAINED = ('convnext_atto', 'convnextv2_atto')


def images(size: tuple[int, int], channels: int = 3) -> np.ndarray:
    return draw(f'images {size}', (2, *size, channels))


class Training:
    """A run of 30 steps with the recipe, but without augmentation and drop path, which are random in each library."""

    STEPS, WARMUP, IMAGES, SIZE, CLASSES = 30, 5, 8, 64, 10
    PEAK, MINIMUM, DECAY, LAYER_DECAY, EMA, SMOOTHING = 1e-3, 1e-6, 0.05, 0.8, 0.99, 0.1
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    @classmethod
    def batches(cls) -> Iterator[dict[str, np.ndarray]]:
        for step in range(cls.STEPS):
            label = draw_bytes(f'labels {step}', (cls.IMAGES,), cls.CLASSES)
            image = draw_bytes(f'batch {step}', (cls.IMAGES, cls.SIZE, cls.SIZE, 3), 128)
            image[:, :, :, 0] += (12 * label)[:, None, None]  # makes the labels learnable
            yield {'image': image, 'label': label.astype(np.int32)}

    @classmethod
    def learning_rate(cls, step: int) -> float:
        """The learning rate of `cosine_scheduler` in the original's utils.py."""
        if step < cls.WARMUP:
            return cls.PEAK * step / (cls.WARMUP - 1)
        fraction = (step - cls.WARMUP) / (cls.STEPS - cls.WARMUP)
        return cls.MINIMUM + 0.5 * (cls.PEAK - cls.MINIMUM) * (1 + np.cos(np.pi * fraction))


def sketch_tensors(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Concatenated short sketches of tensors, in the order of their names."""
    return np.concatenate([sketch(tensors[name], 16) for name in sorted(tensors)])


# Semantic segmentation.

UPERNETS = {
    'v1': Variant((1, 1, 2, 1), (8, 16, 24, 32), layer_scale_init=0.5),
    'v2': Variant((1, 1, 2, 1), (8, 16, 24, 32), grn=True, layer_scale_init=0),
}
UPERNET = {'num_classes': 7, 'channels': 16, 'auxiliary_channels': 12}
UPERNET_SIZES = ((64, 96), (75, 101), (200, 130))


def random_upernet(kind: str, **arguments) -> UPerNet:
    """A small UPerNet whose parameters and statistics are all random and large enough to matter.

    Args:
        kind: key of `UPERNETS`, or the name of a variant.
        arguments: of `UPerNet`.
    """
    variant = UPERNETS[kind] if kind in UPERNETS else get_variant(kind)
    network = jax.eval_shape(lambda key: UPerNet(variant, key=key, **UPERNET, **arguments), jax.random.key(0))
    drawn = draw_parameters({name: x.shape for name, x in get_weights(network).items()})
    drawn = {name: 0.5 + x**2 if name.endswith('.variance') else x for name, x in drawn.items()}
    return with_parameters(network, jax.tree.map(jax.numpy.asarray, drawn))


def segmented(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Four images, and the class of each pixel: 255, the ignored value, for about a third of them."""
    pixels = draw(f'pixels {size}', (4, *size, 3)) + draw('means', (4, 1, 1, 3))
    labels = draw_bytes(f'classes {size}', (4, *size), 10).astype(np.int32)
    return pixels, np.where(labels < UPERNET['num_classes'], labels, 255)


# Images and image processors.

PICTURES = ((500, 375), (333, 501), (60, 45), (224, 224), (1021, 300))
"""(Width, height)."""
PROCESSORS = (
    {'size': {'shortest_edge': 224}},
    {'size': {'shortest_edge': 224}, 'resample': 2, 'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.2, 0.3, 0.4]},
    {'size': {'shortest_edge': 288}, 'crop_pct': 0.95, 'do_normalize': False},
    {'size': {'shortest_edge': 383}, 'crop_pct': 1.0},
    {'size': {'shortest_edge': 384}, 'do_rescale': False},
)
TIMM_PROCESSORS = (
    {'input_size': [3, 224, 224], 'crop_pct': 0.875, 'interpolation': 'bicubic'},
    {'input_size': [3, 384, 384], 'crop_pct': 1.0, 'interpolation': 'bicubic', 'crop_mode': 'squash'},
    {'input_size': [3, 384, 384], 'crop_pct': 1.0, 'interpolation': 'bilinear'},
)
MODES = ('L', 'RGBA', 'P', 'CMYK', 'LA', '1')


def picture(width: int, height: int, mode: str = 'RGB') -> Image.Image:
    """A smooth image with a little noise, like a photograph."""
    coarse = Image.fromarray(draw_bytes(f'coarse {width}', (6, 8, 4)), 'RGBA').resize((width, height))
    noise = draw_bytes(f'noise {width}', (height, width, 4), 19).astype(int) - 9
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8), 'RGBA').convert(mode)


def write_pictures(folder: Path) -> dict[str, Path]:
    """Writes one file for each mode; mode → path."""
    paths = {mode: folder / (f'{mode}.tif' if mode == 'CMYK' else f'{mode}.png') for mode in MODES}
    for mode, path in paths.items():
        picture(90, 70, 'RGB' if mode in ('P', 'CMYK', '1') else mode).convert(mode).save(path)
    return paths


def float_picture() -> np.ndarray:
    return draw_bytes('floats', (70, 90, 3)) / np.float32(255)


# Predictions.

PREDICTED = (
    (('rust', 'crack', 'dent'), 'multi_label_classification'),
    (('rust', 'crack', 'dent'), 'single_label_classification'),
    (('rust', 'crack', 'dent'), None),
    (('rust',), 'multi_label_classification'),
    (('rust',), None),
)
"""(Class names, problem type)."""


def save_predictor(folder: Path, names: tuple[str, ...], kind: str | None) -> None:
    """Saves, in the Hugging Face layout, a model whose scores differ between the photographs."""
    model = jax.eval_shape(
        lambda key: create_model('convnextv2_atto', key=key, num_classes=len(names), layer_norm_eps=1e-12),
        jax.random.key(0),
    )
    drawn = draw_parameters({name: x.shape for name, x in get_parameters(model).items()})
    drawn['head.bias'] = np.asarray([1.0, 0.5, -1.0][: len(names)], np.float32)
    processor = ImageProcessor(size=64)
    save_pretrained(with_parameters(model, drawn), folder, class_names=names, processor=processor, problem_type=kind)


def write_photos(folder: Path) -> list[Path]:
    """Writes three different images."""
    paths = []
    for number, size in enumerate(((40, 50), (96, 64), (70, 70))):
        coarse = Image.fromarray(draw_bytes(f'photo {number}', (5, 5, 3)))
        paths.append(folder / f'{number}.png')
        coarse.resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


# Folders of the other libraries.

TIMM_FOLDERS = (
    ('convnext_nano', {}),
    ('convnext_tiny', {'patch_size': 7, 'drop_path_rate': 0.1, 'ls_init_value': 1e-5, 'norm_eps': 1e-6}),
    ('convnext_atto', {'conv_mlp': False, 'global_pool': 'fast', 'output_stride': 32, 'kernel_sizes': (7,) * 4}),
    ('convnext_pico', {'depths': (1, 1, 2, 1), 'dims': (24, 48, 96, 192), 'head_init_scale': 0.1}),
    ('convnextv2_atto', {'drop_rate': 0.2, 'act_layer': 'gelu', 'norm_layer': 'layernorm2d'}),
    ('convnextv2_tiny', {'depths': (1, 1, 1, 1), 'conv_mlp': True, 'ls_init_value': 1e-6}),
    ('convnext_femto', {'use_grn': True}),
)
"""(Name in timm, arguments); most arguments have no effect."""


def foreign_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values for a tensor of another library, large enough to matter in the output."""
    mean = float('norm' in name and name.endswith('weight'))
    scale = 0.3 if len(shape) < 2 else float(np.prod(shape[1:])) ** -0.5
    return np.float32(mean) + np.float32(scale) * draw(name, shape)


# OpenCV.

RESIZED = (
    ((37, 53), (101, 144)),
    ((101, 144), (37, 53)),
    ((64, 80), (32, 40)),
    ((50, 70), (50, 41)),
    ((3, 1), (7, 5)),
    ((200, 300), (1, 2)),
)
"""(Height and width, height and width of the resized image)."""


DISTORTIONS = (
    (0.0, 1.0, True, 1.0, False, 0, False),
    (-31.7, 1.0, True, 1.0, False, 0, False),
    (25.3, 1.41, True, 1.0, False, 0, False),
    (0.0, 0.53, False, 0.62, True, 0, False),
    (0.0, 1.27, True, 1.0, False, -18, True),
    (12.9, 1.5, False, 1.38, True, 17, True),
    (-20.1, 0.81, True, 0.5, True, -3, True),
)
"""The fields of `Distortion`."""
DISTORTED = draw_bytes('distorted', (5, 32, 3))


SAMPLE = Path(__file__).parents[1] / 'data' / 'ade20k_sample'
MASK_CROPS = tuple((draw, crop) for draw in range(4) for crop in (96, 512))
"""(Seed, side of the crop)."""


def resizable(size: tuple[int, int]) -> np.ndarray:
    return draw_bytes(f'resizable {size}', (*size, 3))
