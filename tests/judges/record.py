"""Computes the reference results with transformers, timm and torch, and stores them for the tests without torch.

    python -m tests.judges.record          # needs requirements-judges.txt

writes `tests/reference/*.npz` and `tables.json.gz`. `test_recorded.py` recomputes the results and compares them.
"""

import contextlib
import gzip
import importlib.metadata
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import jax
import numpy as np
import PIL.Image
import timm
import torch
import transformers
from timm.data import auto_augment
from timm.optim import param_groups_layer_decay
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from convnext_jax import Backbone, ConvNeXt, create_backbone, create_model
from convnext_jax.interop import upernet
from convnext_jax.interop.layouts import to_layout
from convnext_jax.models import Variant, get_parameters, get_variant, get_weights, list_models
from tests import reference
from tests.interop.random_models import layouts_of
from tests.reference import cases

LIBRARIES = ('torch', 'timm', 'transformers', 'pillow', 'numpy', 'opencv-python-headless')
VERSIONS = {name: importlib.metadata.version(name) for name in LIBRARIES}


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def load(module: torch.nn.Module, tensors: dict[str, np.ndarray]) -> torch.nn.Module:
    """The module with these values for all parameters, in evaluation mode."""
    module.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, strict=True)
    return module.eval()


def shapes_of(model: ConvNeXt | Backbone) -> dict[str, tuple[int, ...]]:
    return {name: x.shape for name, x in get_parameters(model).items()}


def model_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return shapes_of(
        jax.eval_shape(lambda key: create_model(name, key=key, num_classes=cases.CLASSES), jax.random.key(0))
    )


def hugging_face(name: str, epsilon: float = 1e-12) -> torch.nn.Module:
    """The classifier of transformers for one of our variants."""
    variant = get_variant(name)
    kind = 'ConvNextV2' if name.startswith('convnextv2') else 'ConvNext'
    config = getattr(transformers, f'{kind}Config')(
        depths=variant.depths, hidden_sizes=variant.widths, num_labels=cases.CLASSES, layer_norm_eps=epsilon
    )
    return getattr(transformers, f'{kind}ForImageClassification')(config)


def dinov3(variant: Variant) -> torch.nn.Module:
    """DINOv3's model of transformers, which has no head, for one of our variants."""
    config = transformers.DINOv3ConvNextConfig(depths=list(variant.depths), hidden_sizes=list(variant.widths))
    return transformers.DINOv3ConvNextModel(config)


def torchvision(variant: Variant) -> torch.nn.Module:
    """The classifier of torchvision for one of our variants."""
    widths = (*variant.widths, None)
    stages = [CNBlockConfig(widths[i], widths[i + 1], depth) for i, depth in enumerate(variant.depths)]
    return TorchvisionConvNeXt(stages, num_classes=cases.CLASSES)


def isotropic_in_torch(variant: Variant) -> torch.nn.Module:
    """The isotropic network of the paper in plain torch, because neither transformers nor timm has it."""

    class Block(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.dwconv = torch.nn.Conv2d(width, width, 7, padding=3, groups=width)
            self.norm = torch.nn.LayerNorm(width, eps=1e-6)
            self.pwconv1 = torch.nn.Linear(width, 4 * width)
            self.pwconv2 = torch.nn.Linear(4 * width, width)

        def forward(self, x):
            branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
            branch = self.pwconv2(torch.nn.functional.gelu(self.pwconv1(branch)))
            return x + branch.permute(0, 3, 1, 2)

    class Isotropic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            width = variant.widths[0]
            self.stem = torch.nn.Conv2d(3, width, 16, stride=16)
            self.blocks = torch.nn.Sequential(*(Block(width) for _ in range(variant.depths[0])))
            self.norm = torch.nn.LayerNorm(width, eps=1e-6)
            self.head = torch.nn.Linear(width, cases.CLASSES)

        def forward(self, x):
            return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))

    return Isotropic()


@torch.no_grad()
def model_outputs(judge: str, name: str, epsilon: float | None, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Logits and feature maps of a classifier: name of the feature → array in our layout.

    Args:
        judge: 'transformers', 'timm', or 'torch' for isotropic variants.
        name: name of the variant.
        epsilon: epsilon of the last norm; only transformers supports other values than the variant's.
        size: height and width of the images.
    """
    variant, parameters = get_variant(name), reference.draw_parameters(model_shapes(name))
    x = nchw(cases.images(size))
    if judge == 'transformers':
        module = load(hugging_face(name, epsilon), to_layout(parameters, variant, 'huggingface'))
        out = module(x, output_hidden_states=True)
        found = {'logits': out.logits} | dict(zip(cases.FEATURES, out.hidden_states, strict=True))
    elif judge == 'timm':
        with torch.device('meta'):  # without initialisation, which takes longer than the network
            module = timm.create_model(name, num_classes=cases.CLASSES)
        load(module.to_empty(device='cpu'), to_layout(parameters, variant, 'timm'))
        last, maps = module.forward_intermediates(x)
        found = {'logits': module.forward_head(last)} | dict(zip(cases.FEATURES[1:], maps[-4:], strict=True))
    else:
        module = load(isotropic_in_torch(variant), to_layout(parameters, variant, 'original'))
        stem = module.stem(x)
        found = {'logits': module(x), 'stem': stem, 'stage1': module.blocks(stem)}
    return {feature: nhwc(x) for feature, x in found.items()}


def models() -> dict[str, np.ndarray]:
    return {
        f'{judge}/{name}/{feature}': reference.sketch(x)
        for judge, name, epsilon in cases.MODELS
        for feature, x in model_outputs(judge, name, epsilon, cases.SIZE).items()
    }


@torch.no_grad()
def backbone_maps(name: str, size: tuple[int, int], patch_size: int, output_stride: int) -> dict[str, np.ndarray]:
    """The feature maps of timm, without normalisation, for a patch size and an output stride."""
    variant = get_variant(name).replace(patch_size=patch_size)
    backbone = jax.eval_shape(
        lambda key: create_backbone(variant, key=key, output_stride=output_stride), jax.random.key(0)
    )
    drawn = reference.draw_parameters(shapes_of(backbone))
    trunk = {feature: x for feature, x in drawn.items() if not feature.startswith('norms.')}
    arguments = {'output_stride': output_stride, 'patch_size': patch_size}
    module = timm.create_model(name, features_only=True, **arguments)
    # With the default patch size, because `to_layout` refuses sizes for which timm's classifiers differ.
    tensors = to_layout(trunk, get_variant(name), 'timm')
    # features_only changes the names: stem.0 → stem_0, stages.1 → stages_1
    load(module, {t.replace('stem.', 'stem_').replace('stages.', 'stages_', 1): x for t, x in tensors.items()})
    names = [f'stage{stage}' for stage in range(1, 5)]
    strides = {'strides': np.asarray(module.feature_info.reduction())}
    channels = {'channels': np.asarray(module.feature_info.channels())}
    return {f: nhwc(x) for f, x in zip(names, module(nchw(cases.images(size))), strict=True)} | strides | channels


@torch.no_grad()
def hugging_face_backbone(name: str, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The normalised feature maps of transformers' backbone."""
    variant = get_variant(name)
    kind = 'ConvNextV2' if name.startswith('convnextv2') else 'ConvNext'
    config = getattr(transformers, f'{kind}Config')(
        depths=list(variant.depths), hidden_sizes=list(variant.widths), out_features=list(cases.BACKBONE_FEATURES)
    )
    module = getattr(transformers, f'{kind}Backbone')(config)
    backbone = jax.eval_shape(
        lambda key: create_backbone(name, key=key, out_features=cases.BACKBONE_FEATURES), jax.random.key(0)
    )
    tensors = to_layout(reference.draw_parameters(shapes_of(backbone)), variant, 'huggingface')
    load(module, {name.removeprefix(f'{kind.lower()}.'): x for name, x in tensors.items()})
    maps = module(nchw(cases.images(size))).feature_maps
    return {feature: nhwc(x) for feature, x in zip(cases.BACKBONE_FEATURES, maps, strict=True)}


def backbones() -> dict[str, np.ndarray]:
    found = {}
    for name in cases.BACKBONES:
        found |= {f'{name}/{f}': reference.sketch(x) for f, x in hugging_face_backbone(name, cases.ODD_SIZE).items()}
    for case in cases.DILATED:
        maps = backbone_maps(*case[:1], cases.ODD_SIZE, *case[1:])
        found |= {f'{"/".join(map(str, case))}/{f}': reference.sketch(x) for f, x in maps.items()}
    return found


def hugging_face_upernet(kind: str) -> torch.nn.Module:
    """UPerNet of transformers with the weights of `cases.random_upernet`."""
    network = cases.random_upernet(kind)
    variant = network.variant
    arguments = {} if variant.grn else {'layer_scale_init_value': variant.layer_scale_init}
    backbone = getattr(transformers, 'ConvNextV2Config' if variant.grn else 'ConvNextConfig')(
        depths=list(variant.depths),
        hidden_sizes=list(variant.widths),
        out_features=['stage1', 'stage2', 'stage3', 'stage4'],
        **arguments,
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=cases.UPERNET['channels'],
        auxiliary_channels=cases.UPERNET['auxiliary_channels'],
        num_labels=cases.UPERNET['num_classes'],
    )
    tensors = upernet.tensors_of(jax.device_get(get_weights(network)), variant, 'huggingface')
    return load(transformers.UperNetForSemanticSegmentation(config), tensors)


@torch.no_grad()
def upernets() -> dict[str, np.ndarray]:
    return {
        f'{kind}/{height}x{width}': reference.sketch(
            nhwc(hugging_face_upernet(kind)(nchw(cases.segmented((height, width))[0])).logits)
        )
        for kind in cases.UPERNETS
        for height, width in cases.UPERNET_SIZES
    }


def upernet_folders() -> dict:
    """Version of the backbone → transformers' JSON files, and the names and shapes of the tensors."""
    found = {}
    for kind in cases.UPERNETS:
        module = hugging_face_upernet(kind)
        with tempfile.TemporaryDirectory() as folder:
            module.save_pretrained(folder)
            SegformerImageProcessorPil().save_pretrained(folder)
            files = {path.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob('*.json'))}
        found[kind] = {'files': files, 'shapes': {name: list(x.shape) for name, x in module.state_dict().items()}}
    return found


def training_run(name: str) -> tuple[list[float], dict[str, dict[str, np.ndarray]]]:
    """30 steps in torch: the losses; by timm's names, the first gradient, the last parameters and their average."""
    run = cases.Training
    module = timm.create_model(name, num_classes=run.CLASSES).train()
    model = jax.eval_shape(lambda key: create_model(name, key=key, num_classes=run.CLASSES), jax.random.key(0))
    start = to_layout(reference.draw_parameters(shapes_of(model)), get_variant(name), 'timm')
    load(module, start).train()
    groups = param_groups_layer_decay(module, weight_decay=run.DECAY, layer_decay=run.LAYER_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=run.PEAK, betas=(0.9, 0.999), eps=1e-8)
    average = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    losses, gradient = [], {}
    for step, batch in enumerate(run.batches()):
        for group in optimizer.param_groups:
            group['lr'] = run.learning_rate(step) * group['lr_scale']
        pixels = (batch['image'] / np.float32(255) - np.float32(run.MEAN)) / np.float32(run.STD)
        labels = torch.from_numpy(batch['label'].astype(np.int64))
        loss = torch.nn.functional.cross_entropy(module(nchw(pixels)), labels, label_smoothing=run.SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        gradient = gradient or {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                average[name] = run.EMA * average[name] + (1 - run.EMA) * parameter
    found = {'gradient': gradient, 'parameters': dict(module.named_parameters()), 'average': average}
    return losses, {kind: {name: x.detach().numpy() for name, x in tensors.items()} for kind, tensors in found.items()}


def training() -> dict[str, np.ndarray]:
    found = {}
    for name in cases.TRAINED:
        losses, tensors = training_run(name)
        found[f'{name}/losses'] = np.asarray(losses)
        found |= {f'{name}/{kind}': cases.sketch_tensors(named) for kind, named in tensors.items()}
    return found


def pixels(processor: ConvNextImageProcessorPil, image: object) -> np.ndarray:
    return processor(image, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)


def processors() -> dict[str, np.ndarray]:
    """Images processed by transformers and timm."""
    found = {}
    for number, config in enumerate(cases.PROCESSORS):
        for size in cases.PICTURES:
            image = pixels(ConvNextImageProcessorPil(**config), cases.picture(*size))
            found[f'{number}/{size[0]}x{size[1]}'] = reference.sketch(image)
    small = ConvNextImageProcessorPil(size={'shortest_edge': 64})
    with tempfile.TemporaryDirectory() as folder:
        for name, path in cases.write_pictures(Path(folder)).items():
            found[f'file/{name}'] = reference.sketch(pixels(small, transformers.image_utils.load_image(str(path))))
    floats = small(cases.float_picture(), do_rescale=False, return_tensors='np')['pixel_values'][0]
    found['floats'] = reference.sketch(floats.transpose(1, 2, 0))
    for number, images in enumerate(cases.TIMM_PROCESSORS):
        values = {**images, 'input_size': tuple(images['input_size'])}
        transform = timm.data.create_transform(**values, mean=cases.Training.MEAN, std=cases.Training.STD)
        found[f'timm/{number}'] = reference.sketch(transform(cases.picture(400, 500)).numpy().transpose(1, 2, 0))
    return found


def names_and_shapes() -> dict:
    """Variant → layout → tensor name → shape, for every variant that the libraries support."""
    found = {}
    for name in list_models():
        layouts = layouts_of(get_variant(name))
        if 'timm' in layouts:
            with torch.device('meta'):
                modules = {'timm': timm.create_model(name, num_classes=cases.CLASSES)}
                if 'huggingface' in layouts:
                    modules['huggingface'] = hugging_face(name)
                if 'dinov3' in layouts:
                    modules['dinov3'] = dinov3(get_variant(name))
                if 'torchvision' in layouts:
                    modules['torchvision'] = torchvision(get_variant(name))
            found[name] = {
                # Names of DINOv3's tensors begin with 'model.' in memory, but not in saved files.
                layout: {tensor.removeprefix('model.'): list(x.shape) for tensor, x in module.state_dict().items()}
                for layout, module in modules.items()
            }
    return found


def layers() -> dict:
    """Variant → timm's name of a parameter → number of layers between it and the head in layer decay."""
    found = {}
    for name in cases.LAYERED:
        with torch.device('meta'):
            module = timm.create_model(name)
        names = {parameter: name for name, parameter in module.named_parameters()}
        groups = param_groups_layer_decay(module, weight_decay=0.05, layer_decay=0.5)
        found[name] = {names[p]: float(-np.log2(group['lr_scale'])) for group in groups for p in group['params']}
    return found


def randaugment() -> dict:
    """'increasing' or 'plain' → level → the operations in order, each with its possible arguments."""
    found = {}
    for kind in ('plain', 'increasing'):
        names = auto_augment._RAND_INCREASING_TRANSFORMS if kind == 'increasing' else auto_augment._RAND_TRANSFORMS
        found[kind] = {str(level): [[name, _arguments(name, level)] for name in names] for level in cases.LEVELS}
    return found


def _arguments(name: str, level: float) -> list[float] | None:
    """The possible arguments; None if there is no argument or if timm's rule fails."""
    rule = auto_augment.LEVEL_TO_ARG[name]
    if rule is None:
        return None
    try:
        return sorted({float(np.ravel(rule(level, {}))[0]) for _ in range(40)})  # the sign is random
    except TypeError:  # timm's increasing rules expect a tuple from its integer rules, which return a number
        assert name in ('PosterizeIncreasing', 'SolarizeIncreasing')
        return None


@contextlib.contextmanager
def timm_folder(name: str, arguments: dict) -> Iterator[tuple[torch.nn.Module, Path]]:
    """A model of timm with random values, and the folder in which timm has saved it."""
    module = timm.create_model(name, num_classes=3, **arguments).eval()
    with torch.no_grad():
        for tensor, x in module.named_parameters():
            x.copy_(torch.from_numpy(cases.foreign_tensor(tensor, tuple(x.shape))))
    with tempfile.TemporaryDirectory() as folder:
        config = {'label_names': list(cases.NAMES)}
        timm.models.save_for_hf(module, folder, model_config=config, safe_serialization=True)
        yield module, Path(folder)


def timm_folders() -> dict:
    """For each case: timm's config.json, and the names and shapes of the tensors."""
    found = []
    for name, arguments in cases.TIMM_FOLDERS:
        with timm_folder(name, arguments) as (module, folder):
            shapes = {tensor: list(x.shape) for tensor, x in module.state_dict().items()}
            found.append({'config': json.loads((folder / 'config.json').read_text()), 'shapes': shapes})
    return found


def timm_folder_logits() -> dict[str, np.ndarray]:
    found = {}
    for number, (name, arguments) in enumerate(cases.TIMM_FOLDERS):
        with timm_folder(name, arguments) as (module, _), torch.no_grad():
            found[str(number)] = reference.sketch(module(nchw(cases.images((64, 96)))).numpy())
    return found


def hugging_face_folders() -> dict:
    """Kind of model → transformers' JSON files, and the names and shapes of the tensors."""
    names = dict(enumerate(cases.NAMES))
    arguments = {'depths': [2, 2, 6, 2], 'hidden_sizes': [40, 80, 160, 320]}
    labels = {'id2label': names, 'label2id': {name: number for number, name in names.items()}}
    v2 = transformers.ConvNextV2Config
    modules = {
        'convnext_atto': transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(**arguments, **labels, layer_norm_eps=1e-12)
        ),
        'convnextv2_atto': transformers.ConvNextV2ForImageClassification(v2(**arguments, **labels)),
        'without head': transformers.ConvNextV2Model(v2(**arguments)),
        'backbone': transformers.ConvNextV2Backbone(v2(**arguments, out_features=list(cases.BACKBONE_FEATURES))),
    }
    processor = ConvNextImageProcessorPil(
        size={'shortest_edge': 288}, crop_pct=0.9, resample=2, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    found = {}
    for kind, module in modules.items():
        with tempfile.TemporaryDirectory() as folder:
            module.save_pretrained(folder)
            processor.save_pretrained(folder)
            files = {path.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob('*.json'))}
        found[kind] = {'files': files, 'shapes': {name: list(x.shape) for name, x in module.state_dict().items()}}
    return found


def predictions() -> dict[str, np.ndarray]:
    """The class probabilities of each photograph from the pipeline of transformers."""
    found = {}
    for number, (names, kind) in enumerate(cases.PREDICTED):
        with tempfile.TemporaryDirectory() as folder:
            cases.save_predictor(Path(folder) / 'out', names, kind)
            pipeline = transformers.pipeline(
                'image-classification',
                model=f'{folder}/out',
                image_processor=ConvNextImageProcessorPil.from_pretrained(f'{folder}/out'),
            )
            scores = [pipeline(str(path)) for path in cases.write_photos(Path(folder))]
        by_name = [{score['label']: score['score'] for score in photo} for photo in scores]
        found[str(number)] = np.asarray([[photo[name] for name in names] for photo in by_name])
    return found


def distorted(image: np.ndarray, distortion: tuple) -> np.ndarray:
    """An image, (H, W, 3) uint8 RGB, after `PhotoMetricDistortion` of mmsegmentation with these changes."""
    brightness, contrast, contrast_first, saturation, saturates, hue, shifts = distortion

    def linear(x: np.ndarray, factor: float, constant: float = 0.0) -> np.ndarray:
        return (x.astype(np.float32) * np.float32(factor) + np.float32(constant)).clip(0, 255).astype(np.uint8)

    image = linear(image, 1, brightness)
    if contrast_first:
        image = linear(image, contrast)
    if saturates:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 1] = linear(hsv[:, :, 1], saturation)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if shifts:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + hue) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if contrast_first else linear(image, contrast)


def opencv_scaled(image: np.ndarray, limits: tuple[int, int], interpolation: int) -> np.ndarray:
    """`mmcv.imrescale`: the image enlarged or reduced to fit into the limits of the longer and the shorter side."""
    height, width = image.shape[:2]
    factor = min(limits[0] / max(height, width), limits[1] / min(height, width))
    return cv2.resize(image, (int(width * factor + 0.5), int(height * factor + 0.5)), interpolation=interpolation)


def mmsegmentation_crop(image: Path, mask: Path, crop: int, draw: int) -> dict[str, np.ndarray]:
    """The training pipeline of mmsegmentation for ADE20K, up to the flip, and the padding.

    Its transforms are applied one after the other to the whole image. It draws the random numbers of our pipeline.
    """
    rng = np.random.default_rng(draw)
    pixels = cv2.imread(str(image))[:, :, ::-1]
    label = np.array(PIL.Image.open(mask).convert('P'))
    label[label == 0] = 255
    label -= 1
    label[label == 254] = 255

    ratio = rng.uniform(0.5, 2.0)
    limits = (int(2048 * ratio), int(512 * ratio))
    pixels = opencv_scaled(np.ascontiguousarray(pixels), limits, cv2.INTER_LINEAR)
    label = opencv_scaled(label, limits, cv2.INTER_NEAREST)

    def draw_box() -> tuple[slice, slice]:
        top, left = (rng.integers(0, max(side - crop, 0) + 1) for side in label.shape)
        return slice(top, top + crop), slice(left, left + crop)

    box = draw_box()
    for _ in range(10):
        classes, counts = np.unique(label[box], return_counts=True)
        counts = counts[classes != 255]
        if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
        box = draw_box()
    pixels, label = pixels[box], label[box]
    if rng.random() < 0.5:
        pixels, label = pixels[:, ::-1], label[:, ::-1]
    height, width = label.shape
    missing = (0, crop - height, 0, crop - width)
    pixels = cv2.copyMakeBorder(np.ascontiguousarray(pixels), *missing, cv2.BORDER_CONSTANT, value=0)
    label = cv2.copyMakeBorder(np.ascontiguousarray(label), *missing, cv2.BORDER_CONSTANT, value=255)
    return {'image': pixels, 'label': label, 'size': np.array([height, width])}


def opencv() -> dict[str, np.ndarray]:
    """Resized images, images with other colours, and crops with masks, by OpenCV."""
    found = {}
    (image,), (mask,) = (sorted(cases.SAMPLE.glob(f'{kind}/*/*')) for kind in ('images', 'annotations'))
    for draw, crop in cases.MASK_CROPS:
        example = mmsegmentation_crop(image, mask, crop, draw)
        found |= {f'crop {crop} {draw} {name}': reference.sketch(x) for name, x in example.items()}
    for number, distortion in enumerate(cases.DISTORTIONS):
        found[f'distortion {number}'] = reference.sketch(distorted(cases.DISTORTED, distortion))
    for old, new in cases.RESIZED:
        for name, method in {'linear': cv2.INTER_LINEAR, 'nearest': cv2.INTER_NEAREST}.items():
            resized = cv2.resize(cases.resizable(old), new[::-1], interpolation=method)
            found[f'{name} {old} {new}'] = reference.sketch(resized)
    return found


ARRAYS = {
    'models': models,
    'backbones': backbones,
    'upernets': upernets,
    'training': training,
    'processors': processors,
    'timm_folders': timm_folder_logits,
    'predictions': predictions,
    'opencv': opencv,
}
"""File name → function that computes its arrays."""
TABLES = {
    'names_and_shapes': names_and_shapes,
    'layers': layers,
    'randaugment': randaugment,
    'timm_folders': timm_folders,
    'hugging_face_folders': hugging_face_folders,
    'upernet_folders': upernet_folders,
}


def main() -> None:
    about = {'versions': VERSIONS, 'written by': 'python -m tests.judges.record'}
    for name, compute in ARRAYS.items():
        arrays = {key: np.asarray(x, np.float32) for key, x in compute().items()}
        np.savez_compressed(reference.FOLDER / f'{name}.npz', about=json.dumps(about), **arrays)
        print(f'{name}.npz: {len(arrays)} arrays')
    text = json.dumps({'about': about} | {name: compute() for name, compute in TABLES.items()})
    (reference.FOLDER / 'tables.json.gz').write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == '__main__':
    main()
