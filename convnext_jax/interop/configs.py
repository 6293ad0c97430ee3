"""The `config.json` from which Hugging Face and timm build their models."""

import warnings
from collections.abc import Sequence

from convnext_jax.errors import UserError
from convnext_jax.interop.processor import ImageProcessor
from convnext_jax.interop.timm_models import special_fields, timm_name
from convnext_jax.models import Backbone, ConvNeXt, UPerNet

PROBLEM_TYPES = ('single_label_classification', 'multi_label_classification', 'regression')


def classifier_config(
    model: ConvNeXt,
    layout: str,
    class_names: Sequence[str] | None,
    processor: ImageProcessor,
    problem_type: str | None,
) -> dict[str, dict]:
    """'config.json' → its content, {} for a layout without this file; arguments as for `save_pretrained`.

    Raises:
        UserError: the number of class names is wrong, `problem_type` is unknown or does not fit, or the other library
            does not support the architecture.
    """
    num_classes = model.num_classes
    if class_names is not None:
        check_class_names(class_names, num_classes)
    check_problem_type(problem_type)
    if layout == 'huggingface':
        if num_classes == 1 and problem_type == 'single_label_classification':
            raise UserError(f'transformers does not support {problem_type} with one class: pass problem_type=None')
        return {'config.json': _huggingface_config(model, class_names, processor, problem_type)}
    if activation(problem_type, num_classes) != activation(None, num_classes):
        warnings.warn(
            f'the {layout} layout does not store problem_type={problem_type}: users of the weights must know it',
            stacklevel=3,
        )
    _warn_of_epsilon(model, layout)
    return {'config.json': _timm_config(model, class_names, processor)} if layout == 'timm' else {}


def encoder_config(model: ConvNeXt, layout: str, processor: ImageProcessor) -> dict[str, dict]:
    """The layout's `config.json`, if it has one, of a model without its head.

    Raises:
        UserError: the other library has no such model.
    """
    if layout == 'huggingface':
        return {'config.json': _common(model, 'Model', processor) | {'layer_norm_eps': float(model.norm.epsilon)}}
    _warn_of_epsilon(model, layout)
    if layout == 'dinov3':
        kind = {'architectures': ['DINOv3ConvNextModel'], 'model_type': 'dinov3_convnext'}
        config = _common(model, 'Model', processor) | kind | {'layer_norm_eps': float(model.variant.norm_eps)}
        return {'config.json': {key: x for key, x in config.items() if key not in ('num_stages', 'patch_size')}}
    if layout != 'timm':
        return {}
    config = _timm_config(model, None, processor)
    return {'config.json': config | {'num_classes': 0, 'pretrained_cfg': config['pretrained_cfg'] | {'num_classes': 0}}}


def _warn_of_epsilon(model: ConvNeXt, layout: str) -> None:
    if model.norm.epsilon != model.variant.norm_eps:
        warnings.warn(f"the {layout} layout does not store the last norm's epsilon, {model.norm.epsilon}", stacklevel=4)


def check_class_names(class_names: Sequence[str], num_classes: int) -> None:
    """Checks that there is one name for each class; names may be repeated, as 'crane' in ImageNet.

    Raises:
        UserError: there are too few or too many names, or one is not a string.
    """
    names = [] if isinstance(class_names, str) else list(class_names)
    if len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise UserError(f'{len(names)} class names for {num_classes} classes: pass one string for each class')


def check_problem_type(problem_type: object) -> None:
    """Checks that `problem_type` is None or known to transformers.

    Raises:
        UserError: it is neither None nor one of `PROBLEM_TYPES`.
    """
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise UserError(f'problem_type must be one of {", ".join(PROBLEM_TYPES)}, not {problem_type}')


def activation(problem_type: str | None, num_classes: int) -> str | None:
    """The function from logits to probabilities that transformers' image-classification pipeline uses.

    Returns:
        'softmax', 'sigmoid', or None for a regression, whose outputs are not probabilities.
    """
    if problem_type == 'regression':
        return None
    return 'sigmoid' if problem_type == 'multi_label_classification' or num_classes == 1 else 'softmax'


def backbone_config(backbone: Backbone, processor: ImageProcessor) -> dict:
    """The content of the `config.json` of a ConvNextBackbone folder.

    Raises:
        UserError: the backbone is dilated, which the other libraries do not support.
    """
    if backbone.output_stride != backbone.variant.total_stride:
        raise UserError(
            f'Hugging Face and mmsegmentation have no backbone of output_stride={backbone.output_stride}: create it '
            'without output_stride, which does not change the weights'
        )
    names = list(backbone.channels)
    return _common(backbone, 'Backbone', processor) | {
        'layer_norm_eps': 1e-12,
        'stage_names': names,
        'out_features': list(backbone.out_features),
        'out_indices': [names.index(name) for name in backbone.out_features],
    }


def upernet_config(model: UPerNet, class_names: Sequence[str] | None, processor: ImageProcessor) -> dict:
    """The content of the `config.json` of a UperNetForSemanticSegmentation folder.

    Raises:
        UserError: the number of class names is wrong, or the backbone is dilated, which the other libraries do not
            support.
    """
    if class_names is not None:
        check_class_names(class_names, model.num_classes)
    auxiliary = model.auxiliary_head
    return {
        'architectures': ['UperNetForSemanticSegmentation'],
        'model_type': 'upernet',
        'backbone_config': backbone_config(model.backbone, processor),
        'hidden_size': model.decode_head.classifier.kernel.shape[0],
        'pool_scales': list(model.decode_head.pool_scales),
        'use_auxiliary_head': auxiliary is not None,
        'auxiliary_loss_weight': 0.4,
        'auxiliary_in_channels': None,  # the channels of the third stage
        'auxiliary_channels': 256 if auxiliary is None else auxiliary.classifier.kernel.shape[0],
        'auxiliary_num_convs': 1,
        'auxiliary_concat_input': False,
        'loss_ignore_index': 255,
        'torch_dtype': 'float32',
    } | _names(class_names, model.num_classes)


def _names(class_names: Sequence[str] | None, num_classes: int) -> dict:
    names = class_names or [f'LABEL_{label}' for label in range(num_classes)]
    return {
        'id2label': {str(label): name for label, name in enumerate(names)},
        'label2id': {name: label for label, name in enumerate(names)},  # of classes with equal names, the last
    }


def _huggingface_config(
    model: ConvNeXt, class_names: Sequence[str] | None, processor: ImageProcessor, problem_type: str | None
) -> dict:
    config = _common(model, 'ForImageClassification', processor) | {'layer_norm_eps': float(model.norm.epsilon)}
    config |= _names(class_names, model.num_classes)
    return config | ({'problem_type': problem_type} if problem_type else {})


def _timm_config(model: ConvNeXt, class_names: Sequence[str] | None, processor: ImageProcessor) -> dict:
    variant, num_classes = model.variant, model.num_classes
    name = timm_name(variant)
    if not name:
        scale = 'with' if variant.layer_scale_init > 0 else 'without'
        raise UserError(
            f'timm has no name for a ConvNeXt{" V2" * variant.grn} of depths {variant.depths} and widths '
            f'{", ".join([f"{variant.widths} {scale} layer scale", *special_fields(variant)])}'
        )
    images = processor.to_timm()
    config = {
        'architecture': name,
        'num_classes': num_classes,
        'num_features': variant.widths[-1],
        'model_args': {'in_chans': model.in_channels, 'patch_size': variant.patch_size},
        'pretrained_cfg': images | {'num_classes': num_classes, 'first_conv': 'stem.0', 'classifier': 'head.fc'},
    }
    return config | ({'label_names': list(class_names)} if class_names else {})


def _common(model: ConvNeXt | Backbone, architecture: str, processor: ImageProcessor) -> dict:
    """The fields of Hugging Face's `config.json` that classifiers and backbones share.

    Args:
        model: the classifier or backbone.
        architecture: end of the name of Hugging Face's class, such as 'ForImageClassification'.
        processor: the preprocessing of images.
    """
    variant = model.variant
    kind = 'ConvNextV2' if variant.grn else 'ConvNext'
    config = {
        'architectures': [kind + architecture],
        'model_type': kind.lower(),
        'depths': list(variant.depths),
        'hidden_sizes': list(variant.widths),
        'num_stages': len(variant.depths),
        'patch_size': variant.patch_size,
        'num_channels': model.in_channels,
        'image_size': processor.size,
        'hidden_act': 'gelu',
        'drop_path_rate': 0.0,
        'initializer_range': 0.02,
        'torch_dtype': 'float32',
    }
    return config if variant.grn else config | {'layer_scale_init_value': float(variant.layer_scale_init)}


def class_names_in(config: dict, num_classes: int) -> tuple[str, ...] | None:
    """The class names in Hugging Face's or timm's config, a list or a dict by label; None if there are none.

    There is a warning if they do not name every class.
    """
    timm_config = config['pretrained_cfg'] if isinstance(config.get('pretrained_cfg'), dict) else {}
    names = config.get('id2label') or config.get('label_names') or timm_config.get('label_names')
    if not names:
        return None
    if isinstance(names, dict):
        names = [names.get(str(label)) for label in range(num_classes)]  # JSON keys are strings
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        warnings.warn(
            f'config.json does not name each of the {num_classes} classes: its names are ignored', stacklevel=3
        )
        return None
    return tuple(names)
