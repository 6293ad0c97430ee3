"""The image preprocessing of Hugging Face's ConvNeXt processor, with the resize of the data pipeline."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from convnext_jax.data.arrays import PILLOW_CHANNELS, ArrayImage, to_image
from convnext_jax.data.decode import convert_mode, decode, decode_channels, eval_resize
from convnext_jax.errors import UserError
from convnext_jax.interop.files import locate, read_json
from convnext_jax.output import to_json
from convnext_jax.paths import local_path

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # default mean and std of a preprocessor_config.json
TIMM_RESAMPLING = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}

Picture = Image.Image | np.ndarray | str | Path


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """The preprocessing of images: resize, crop, rescaling and normalisation.

    Attributes:
        size: side of the result in pixels.
        crop_pct: `size` as a fraction of the shorter side of the resized image before the crop; unused with `squash`.
        resample: Pillow's number of the resampling filter: 2 is bilinear, 3 bicubic.
        squash: whether to resize to a square, without a crop and ignoring the aspect ratio; None means True for sizes
            of 384 and above, else False.
        rescale_factor: factor by which pixel values from 0 to 255 are multiplied.
        mean, std: mean and standard deviation of each channel after rescaling; one value for greyscale, three for RGB,
            and any other number for images in .npy and TIFF files.

    Raises:
        UserError: a value is out of its range.
    """

    size: int = 224
    crop_pct: float = 224 / 256
    resample: int = int(Image.Resampling.BICUBIC)
    squash: bool | None = None
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        numbers = (self.size, self.crop_pct, self.rescale_factor, *self.mean, *self.std)
        if not all(isinstance(value, int | float) and abs(value) < 1e9 for value in numbers):  # False for NaN
            raise UserError(f'an image processor needs numbers, not {numbers}')
        if not (isinstance(self.size, int) and 1 <= self.size <= 8192):
            raise UserError(f'the size of an image processor must be in [1, 8192] pixels, not {self.size}')
        if not 0.1 <= self.crop_pct <= 1:
            raise UserError(f'crop_pct must be in [0.1, 1], not {self.crop_pct}')
        if not isinstance(self.resample, int) or self.resample not in list(Image.Resampling):
            raise UserError(f"resample must be one of Pillow's filters, 0 to 5, not {self.resample}")
        if not self.mean or len(self.std) != len(self.mean) or not all(std > 0 for std in self.std):
            raise UserError(f'mean and std need one value for each channel, std above 0: {self.mean}, {self.std}')

    @classmethod
    def from_pretrained(cls, where: str, *, revision: str | None = None) -> 'ImageProcessor':
        """A processor from Hugging Face's `preprocessor_config.json` or timm's `config.json`.

        Args:
            where: a folder or hub id.
            revision: branch, tag or commit on the hub.

        Raises:
            UserError: neither file exists, or it describes another kind of processor.
        """
        folder = locate(str(where), revision)
        if (folder / 'preprocessor_config.json').is_file():
            return cls.from_huggingface(read_json(folder / 'preprocessor_config.json'))
        if (folder / 'config.json').is_file():
            config = read_json(folder / 'config.json')
            if 'pretrained_cfg' in config:
                return cls.from_timm(config['pretrained_cfg'])
        raise UserError(f'{where} contains neither a preprocessor_config.json nor a config.json of timm')

    @classmethod
    def from_huggingface(cls, config: dict) -> 'ImageProcessor':
        """A processor from the `preprocessor_config.json` of a classifier, a UPerNet or DINOv3.

        Missing fields have Hugging Face's defaults. DINOv3's processor resizes floats and ours bytes, so that pixels
        may differ by one grey level.

        Raises:
            UserError: the content describes another kind of processor.
        """
        if not config.get('do_resize', True) or config.get('do_center_crop'):
            raise UserError(
                'preprocessor_config.json: do_resize=false and do_center_crop=true are not supported for ConvNeXt'
            )
        kind = str(config.get('image_processor_type') or config.get('feature_extractor_type'))
        squash = True if kind.startswith(('Segformer', 'DINOv3')) else None  # Segformer: the processor of UPerNet
        size = config.get('size', 512 if kind.startswith('Segformer') else 384)
        if squash and isinstance(size, dict):
            if size.get('height') != size.get('width'):
                raise UserError(f'preprocessor_config.json: height and width must be equal, not {size}')
            size = size.get('height')
        size = size.get('shortest_edge') if isinstance(size, dict) else size
        if not isinstance(size, int):
            raise UserError(f'preprocessor_config.json: size must have a shortest_edge, not {config["size"]}')
        mean = _three(config.get('image_mean') or (IMAGENET_MEAN if squash else HALF))
        std = _three(config.get('image_std') or (IMAGENET_STD if squash else HALF))
        return cls(
            size=size,
            crop_pct=config.get('crop_pct') or 224 / 256,
            resample=config.get('resample', Image.Resampling.BILINEAR if squash else Image.Resampling.BICUBIC),
            squash=squash,
            rescale_factor=config.get('rescale_factor', 1 / 255) if config.get('do_rescale', True) else 1,
            mean=mean if config.get('do_normalize', True) else (0.0,) * len(mean),
            std=std if config.get('do_normalize', True) else (1.0,) * len(std),
        )

    @classmethod
    def from_timm(cls, config: dict, *, test: bool = False) -> 'ImageProcessor':
        """A processor from timm's `pretrained_cfg`, with the size and crop of the training.

        With `test` the size and crop are `test_input_size` and `test_crop_pct`, if the config has them. They give the
        accuracy that timm publishes.

        If the margin around the crop is odd, timm's crop is one pixel further right and down than ours.

        Raises:
            UserError: the config is invalid, or has a resampling filter or crop mode that ConvNeXts do not use.
        """
        if test and isinstance(config, dict):
            names = {'input_size': 'test_input_size', 'crop_pct': 'test_crop_pct'}
            config = config | {name: config[tested] for name, tested in names.items() if config.get(tested)}
        input_size = config.get('input_size') if isinstance(config, dict) else None
        if not (isinstance(input_size, list) and len(input_size) == 3 and input_size[1] == input_size[2]):
            raise UserError(f'config.json of timm: input_size must be [channels, side, side], not {input_size}')
        interpolation, mode = config.get('interpolation', 'bicubic'), config.get('crop_mode', 'center')
        if interpolation not in list(TIMM_RESAMPLING) or mode not in ('center', 'squash'):  # it may not be hashable
            raise UserError(
                f"config.json of timm: interpolation '{interpolation}' with crop_mode '{mode}' is not supported"
            )
        return cls(
            size=input_size[1],
            crop_pct=config.get('crop_pct', 224 / 256),
            resample=int(TIMM_RESAMPLING[interpolation]),
            squash=mode == 'squash',
            mean=_three(config.get('mean', IMAGENET_MEAN)),
            std=_three(config.get('std', IMAGENET_STD)),
        )

    def to_huggingface(self) -> dict:
        """The content of a `preprocessor_config.json`.

        Raises:
            UserError: `squash` has a value that Hugging Face's processor does not support at this size.
        """
        if self.squashes != (self.size >= 384):
            raise UserError(
                f"at {self.size} pixels Hugging Face's processor {'crops' if self.squashes else 'does not crop'}: "
                'use a processor with squash=None'
            )
        return self._values() | {
            'image_processor_type': 'ConvNextImageProcessor',
            'size': {'shortest_edge': self.size},
            'crop_pct': self.crop_pct,
        }

    def to_dinov3(self) -> dict:
        """The content of the `preprocessor_config.json` of Hugging Face's DINOv3.

        DINOv3's processor does not crop. If this one does, the content is for Hugging Face's other ConvNeXts.
        """
        if not self.squashes:
            return self.to_huggingface()
        return self._values() | {
            'image_processor_type': 'DINOv3ViTImageProcessorFast',
            'size': {'height': self.size, 'width': self.size},
        }

    def to_segformer(self) -> dict:
        """The content of the `preprocessor_config.json` of Hugging Face's UPerNet.

        Raises:
            UserError: the processor crops, which theirs does not.
        """
        if not self.squashes:
            raise UserError("Hugging Face's processor of a UPerNet does not crop: use a processor with squash=True")
        return self._values() | {
            'image_processor_type': 'SegformerImageProcessor',
            'size': {'height': self.size, 'width': self.size},
            'do_reduce_labels': False,
        }

    def _values(self) -> dict:
        """The fields that Hugging Face's processors have in common."""
        return {
            'do_resize': True,
            'resample': int(self.resample),
            'do_rescale': True,
            'rescale_factor': self.rescale_factor,
            'do_normalize': True,
            'image_mean': list(self.mean),
            'image_std': list(self.std),
        }

    def to_timm(self) -> dict:
        """The entries of timm's `pretrained_cfg` that describe the preprocessing.

        Raises:
            UserError: timm does not support the resampling filter.
        """
        names = {int(number): name for name, number in TIMM_RESAMPLING.items()}
        if int(self.resample) not in names:
            raise UserError(f'timm supports {list(TIMM_RESAMPLING)}, not resample={self.resample}')
        mean, std = self.mean_and_std_of_255()  # timm always divides by 255
        return {
            'input_size': [len(self.mean), self.size, self.size],
            'interpolation': names[int(self.resample)],
            'crop_pct': 1.0 if self.squashes else self.crop_pct,
            'crop_mode': 'squash' if self.squashes else 'center',
            'mean': list(mean),
            'std': list(std),
        }

    def mean_and_std_of_255(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The equivalent mean and std for a rescale factor of 1 / 255."""
        factor = 255 * self.rescale_factor
        return tuple(value / factor for value in self.mean), tuple(value / factor for value in self.std)

    @property
    def squashes(self) -> bool:
        """Whether images are resized to a square without a crop."""
        return self.size >= 384 if self.squash is None else self.squash

    def save(self, folder: str | Path) -> None:
        """Writes `preprocessor_config.json`."""
        text = to_json(self.to_huggingface(), indent=2) + '\n'
        (local_path(folder) / 'preprocessor_config.json').write_text(text, encoding='utf-8')

    def __call__(self, images: Picture | Sequence[Picture]) -> np.ndarray:
        """The preprocessed images, (N, size, size, C) float32.

        Args:
            images: one image or a sequence. An image is a Pillow image of any mode; an array (H, W) or (H, W, C), uint8
                from 0 to 255 or float from 0 to 1; or a path. If the number of channels is neither 1 nor 3, an array is
                read like a .npy file. Files are decoded as in training and evaluation (`data.decode.decode_channels`)
                and rotated by their EXIF orientation. Pillow images are not rotated.

        Raises:
            UserError: an image cannot be read, or an array has another shape, dtype or range.
        """
        if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
            images = [images]
        if not hasattr(images, '__len__'):
            raise UserError(f'images must be one image or a sequence of images, not {type(images).__name__}')
        if len(images) == 0:
            raise UserError('there are no images to process')
        channels = len(self.mean)
        opened = (_open(image, channels, f'image {number}') for number, image in enumerate(images))
        return np.stack([self.normalize(self.resize(image)) for image in opened])

    def resize(self, image: Image.Image | ArrayImage) -> np.ndarray:
        """The image resized and cropped: (size, size, C) uint8, or float32 for an `ArrayImage`."""
        if isinstance(image, Image.Image):
            image = convert_mode(image, len(self.mean))
        return eval_resize(image, self.size, self.crop_pct, squash=self.squash, resample=self.resample)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """The result of `resize`, (…, C), normalised: float32, rounded in the order of Hugging Face's processor."""
        factor = self.rescale_factor if pixels.dtype == np.uint8 else 255 * self.rescale_factor
        rescaled = (pixels.astype(np.float64) * factor).astype(np.float32)
        return (rescaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def stored_processor(path: Path, config: dict) -> ImageProcessor | None:
    """The processor that is stored with weights; None if there is none.

    Args:
        path: file or folder of the weights.
        config: content of the folder's `config.json`, or {}.

    Raises:
        UserError: as for `ImageProcessor.from_pretrained`.
    """
    if path.is_dir() and (path / 'preprocessor_config.json').is_file():
        return ImageProcessor.from_pretrained(str(path))
    return ImageProcessor.from_timm(config['pretrained_cfg']) if 'pretrained_cfg' in config else None


def processor_for(channels: int, given: ImageProcessor | None = None) -> ImageProcessor:
    """The given processor, or a default one for 224 pixels.

    The default is ImageNet's normalisation for RGB images, and a scaling to [−1, 1] for greyscale images.

    Args:
        channels: channels of the model's images.
        given: a processor, or None.

    Raises:
        UserError: the processor has another number of channels, or there is no default for this number.
    """
    if given is None and channels not in PILLOW_CHANNELS:
        raise UserError(f'there is no image processor for {channels} channels: store mean and std with the weights')
    processor = given or (ImageProcessor(mean=(0.5,), std=(0.5,)) if channels == 1 else ImageProcessor())
    if len(processor.mean) != channels:
        raise UserError(f'the processor is for {len(processor.mean)} channels, the model for {channels}')
    return processor


def segmentation_processor(channels: int, given: ImageProcessor | None = None) -> ImageProcessor:
    """The given processor, or the processor of the published UPerNets, which resizes to 512 × 512 pixels.

    Raises:
        UserError: as for `processor_for`, or the given processor crops images: masks would not cover whole images.
    """
    processor = processor_for(channels, given)
    if given is None:
        return dataclasses.replace(processor, size=512, resample=int(Image.Resampling.BILINEAR), squash=True)
    if not processor.squashes:
        raise UserError('a UPerNet needs preprocessing that does not crop images: use a processor with squash=True')
    return processor


def open_image(path: str | Path, channels: int) -> Image.Image:
    """The upright image in a file, as `decode` returns it.

    Raises:
        UserError: the file cannot be read, or as for `decode`.
    """
    return decode(_read(path), channels, str(path))


def _read(path: str | Path) -> bytes:
    try:
        return local_path(path).read_bytes()
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from error


def _open(image: Picture, channels: int, name: str) -> Image.Image | ArrayImage:
    if isinstance(image, Image.Image):
        if channels not in PILLOW_CHANNELS:
            raise UserError(f'{name} is a Pillow image, but images of {channels} channels must be arrays or files')
        return image
    if isinstance(image, np.ndarray):
        return _from_array(image, name) if channels in PILLOW_CHANNELS else to_image(image, channels, name)
    if not isinstance(image, str | Path):
        raise UserError(f'{name} is a {type(image).__name__}, not an image, an array or a path')
    return decode_channels(_read(image), channels, str(image))


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise UserError(f'{name} has shape {array.shape}, not (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)')
    if array.dtype.kind == 'f':
        if not (array.min() >= 0 and array.max() <= 1):
            raise UserError(
                f'{name} is {array.dtype} with values outside [0, 1]: use uint8 for pixel values from 0 to 255'
            )
        array = (array * 255).astype(np.uint8)  # truncates as Hugging Face's processor
    if array.dtype != np.uint8:
        raise UserError(f'{name} is {array.dtype}, not uint8 or float')
    return Image.fromarray(array)


def _three(values: object) -> tuple:
    """One value for each channel. A single number is used for all three channels; a list is used as it is."""
    return tuple(values) if isinstance(values, list | tuple) else (values,) * 3
