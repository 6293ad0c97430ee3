"""Every ConvNeXt of timm: parameters, logits and maps, names and shapes of published weights, and timm's folders."""

import re

import jax
import numpy as np
import pytest
import timm
import torch

from convnext_jax import load_pretrained, save_pretrained
from convnext_jax.interop import read_pretrained
from convnext_jax.interop.layouts import HEADS, check_tensors
from convnext_jax.interop.published import published_weights
from convnext_jax.interop.recognition import recognize_layout, recognize_variant
from convnext_jax.models import AFTER_TRUNK, create_model, get_parameters, get_variant, list_models
from tests.interop.random_models import assert_equal, random_model
from tests.judges import published, record
from tests.reference import cases

NAMES = sorted([*timm.list_models('convnext*'), *timm.list_models('test_convnext*')])
TAGS = sorted([*timm.list_pretrained('convnext*'), *timm.list_pretrained('test_convnext*')])
BOUND = 1e-5  # in standard deviations of the reference, for float32
LARGE = re.compile('small|base|large|huge')  # 50 to 850 million parameters
NEW = [name for name in NAMES if 'ols' in name or 'rms' in name or 'test' in name]


def with_marks(names: list[str]) -> list:
    """The parameters of a test. Large models have the mark `large`."""
    return [pytest.param(name, marks=[pytest.mark.large] if LARGE.search(name) else []) for name in names]


outputs = jax.jit(lambda model, x: {'logits': model(x)} | model.features(x))


def test_every_model_of_timm_is_in_the_table():
    """Published weights of a model could not be loaded."""
    assert set(NAMES) == {name for name in list_models() if 'isotropic' not in name}


def test_the_table_of_published_weights_is_timm_s_registry():
    """New weights would be missing, or a licence wrong. `python -m tests.judges.published` writes the table."""
    top1 = {}
    for weights in published_weights():
        name = f'{weights.model}.{weights.tag}'
        top1 |= {(name, weights.size): weights.top1, (name, weights.test_size): weights.test_top1}
    assert list(published_weights()) == published.from_timm(top1)


@pytest.mark.parametrize('name', with_marks(NAMES))
def test_logits_and_maps_equal_timm(name):
    """Published weights would give other predictions."""
    model = random_model(name, num_classes=cases.CLASSES)
    with torch.device('meta'):
        theirs = timm.create_model(name, num_classes=cases.CLASSES)
    assert sum(x.size for x in get_parameters(model).values()) == sum(x.numel() for x in theirs.parameters())
    found = {feature: np.asarray(x) for feature, x in outputs(model, cases.images(cases.SIZE)).items()}
    del model
    expected = record.model_outputs('timm', name, None, cases.SIZE)
    assert {feature: found[feature].shape for feature in expected} == {f: x.shape for f, x in expected.items()}
    differences = {f: float(np.abs(found[f] - x).max() / x.std()) for f, x in expected.items()}
    print(name, {feature: f'{value:.1e}' for feature, value in differences.items()})
    assert max(differences.values()) < BOUND


@pytest.mark.parametrize('tag', TAGS)
def test_published_names_and_shapes_load(tag):
    """Published weights could not be loaded. Broadcast zeros replace the tensors, to save memory."""
    classes = timm.get_pretrained_cfg(tag).num_classes
    with torch.device('meta'):
        module = timm.create_model(tag.split('.')[0], num_classes=classes)
    tensors = {name: np.broadcast_to(np.float32(0), tuple(x.shape)) for name, x in module.state_dict().items()}
    if tag.endswith('.fcmae'):
        tensors = {name: x for name, x in tensors.items() if not name.startswith('head.')}
    assert recognize_layout(tensors) == 'timm'
    variant = recognize_variant(tensors, {}, None, 'timm')
    assert variant == get_variant(tag.split('.')[0])
    model = jax.eval_shape(lambda key: create_model(variant, key=key, num_classes=classes or 1), jax.random.key(0))
    shapes = {name: x.shape for name, x in get_parameters(model).items()}
    if not classes:
        absent = AFTER_TRUNK if tag.endswith('.fcmae') else ('head.kernel', 'head.bias')
        assert not any(name.startswith(HEADS['timm']) for name in tensors)
        shapes = {name: shape for name, shape in shapes.items() if name not in absent}
    check_tensors(tensors, shapes, variant, 'timm')


@pytest.mark.parametrize(('name', 'channels'), [('convnext_atto', 1), ('test_convnext', 2), ('convnext_atto_ols', 5)])
def test_other_channels_are_those_of_timm(tmp_path, name, channels):
    """A model for other images would start from other weights than in timm, or give other features."""
    model = random_model(name)
    save_pretrained(model, tmp_path / 'out', layout='timm')
    theirs = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, in_chans=channels, num_classes=0)
    ours = read_pretrained(tmp_path / 'out', in_channels=channels, num_classes=0).model
    kernel = ours.stem.conv.kernel if hasattr(ours.stem, 'conv') else ours.stem.first_conv.kernel
    np.testing.assert_array_equal(np.transpose(kernel[...], (3, 2, 0, 1)), theirs.stem[0].weight.detach().numpy())
    x = cases.images((64, 96), channels)
    with torch.no_grad():
        features = theirs.eval()(record.nchw(x)).numpy()
    assert np.abs(ours(x) - features).max() / features.std() < BOUND


@pytest.mark.parametrize('name', NEW)
def test_timm_loads_our_folders_and_we_load_folders_of_timm(tmp_path, name):
    """A fine-tuned model could not be used with timm, or the other way round."""
    model = random_model(name)
    save_pretrained(model, tmp_path / 'ours', layout='timm', class_names=cases.NAMES)
    theirs = timm.create_model(f'local-dir:{tmp_path / "ours"}', pretrained=True).eval()
    x = cases.images((64, 96))
    with torch.no_grad():
        logits = theirs(record.nchw(x)).numpy()
    assert np.abs(model(x) - logits).max() / logits.std() < BOUND
    timm.models.save_for_hf(theirs, tmp_path / 'theirs', model_config={'label_names': list(cases.NAMES)})
    loaded = read_pretrained(tmp_path / 'theirs')
    assert_equal(loaded.model, model)
    assert (loaded.model.variant, loaded.class_names) == (model.variant, cases.NAMES)
    assert_equal(load_pretrained(tmp_path / 'ours' / 'model.safetensors'), model)
