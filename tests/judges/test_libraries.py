"""Comparison with transformers and timm: all output values, and the files that either side loads of the other."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from convnext_jax import ImageProcessor, create_backbone, load_pretrained, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop import read_pretrained
from convnext_jax.models import get_parameters, with_parameters
from tests import reference
from tests.interop.random_models import assert_equal, random_model
from tests.judges import record
from tests.reference import cases

NAMES = cases.NAMES
BOUND = 2e-5  # in standard deviations of the reference, for float32
PHOTOS = Path(__file__).parents[3] / 'shared' / 'data'

call = jax.jit(lambda model, x: model(x))


def differences(ours: dict, theirs: dict) -> dict[str, float]:
    """Feature → largest difference, in standard deviations of the reference."""
    assert {name: ours[name].shape for name in theirs} == {name: x.shape for name, x in theirs.items()}
    return {name: float(np.abs(ours[name] - x).max() / x.std()) for name, x in theirs.items()}


def logits_differ(model, judge) -> float:
    x = cases.images((64, 96), model.in_channels if hasattr(model, 'in_channels') else 3)
    with torch.no_grad():
        theirs = judge(record.nchw(x))
    theirs = getattr(theirs, 'logits', theirs).numpy()
    return float(np.abs(call(model, x) - theirs).max() / theirs.std())


@pytest.mark.parametrize(('judge', 'name', 'epsilon'), cases.MODELS)
def test_every_value_of_logits_and_maps(judge, name, epsilon):
    """Published weights would give other predictions. The stored values are sketches for another image size."""
    model = random_model(name, num_classes=cases.CLASSES, layer_norm_eps=epsilon)
    x = cases.images((224, 224))
    ours = jax.jit(lambda model, x: {'logits': model(x)} | model.features(x))(model, x)
    found = differences(ours, record.model_outputs(judge, name, epsilon, (224, 224)))
    print(judge, name, {feature: f'{value:.1e}' for feature, value in found.items()})
    assert max(found.values()) < BOUND


@pytest.mark.parametrize('name', cases.BACKBONES)
def test_transformers_and_we_load_each_other_s_backbones(tmp_path, name):
    """Detectors trained on Hugging Face's backbone would get other maps."""
    shapes = jax.eval_shape(
        lambda key: create_backbone(name, key=key, out_features=cases.BACKBONE_FEATURES), jax.random.key(0)
    )
    backbone = with_parameters(shapes, reference.draw_parameters(record.shapes_of(shapes)))
    save_pretrained(backbone, tmp_path / 'ours')
    kind = transformers.ConvNextV2Backbone if 'v2' in name else transformers.ConvNextBackbone
    theirs, info = kind.from_pretrained(tmp_path / 'ours', output_loading_info=True)
    assert not any(info[problem] for problem in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    assert tuple(theirs.out_features) == cases.BACKBONE_FEATURES
    assert theirs.channels == [backbone.channels[feature] for feature in cases.BACKBONE_FEATURES]
    maps = record.hugging_face_backbone(name, (224, 224))
    assert max(differences(call(backbone, cases.images((224, 224))), maps).values()) < BOUND
    with torch.no_grad():
        loaded = theirs.eval()(record.nchw(cases.images((224, 224)))).feature_maps
    for feature, map_ in zip(cases.BACKBONE_FEATURES, loaded, strict=True):
        np.testing.assert_allclose(record.nhwc(map_), maps[feature], rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / 'theirs')
    again = create_backbone(tmp_path / 'theirs')
    assert again.out_features == cases.BACKBONE_FEATURES
    jax.tree.map(np.testing.assert_array_equal, get_parameters(again), get_parameters(backbone))


@pytest.mark.parametrize('name', ['convnext_tiny', 'convnextv2_atto'])
def test_transformers_and_we_load_each_other_s_models(tmp_path, name):
    """A fine-tuned model could not be used with transformers, or the other way round."""
    model = random_model(name, layer_norm_eps=1e-12)
    processor = ImageProcessor(size=288, crop_pct=0.9, resample=2, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_pretrained(model, tmp_path / 'ours', class_names=NAMES, processor=processor)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'ours').eval()
    assert logits_differ(model, theirs) < BOUND
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert theirs.config.layer_norm_eps == 1e-12
    assert theirs.config.image_size == 288
    prepared = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'ours')
    assert (prepared.size['shortest_edge'], prepared.crop_pct, prepared.resample) == (288, 0.9, 2)

    theirs.save_pretrained(tmp_path / 'sharded', max_shard_size='5MB')
    prepared.save_pretrained(tmp_path / 'sharded')
    assert len(list((tmp_path / 'sharded').glob('*.safetensors'))) > 1
    loaded = read_pretrained(tmp_path / 'sharded')
    assert_equal(loaded.model, model)
    assert loaded.model.norm.epsilon == 1e-12
    assert loaded.class_names == NAMES
    assert loaded.processor == processor


def test_transformers_loads_a_greyscale_model_with_another_patch_size(tmp_path):
    """The demo's model could not be used with transformers."""
    model = random_model('convnextv2_atto', patch_size=2, in_channels=1)
    grey = ImageProcessor(size=32, crop_pct=1.0, mean=(0.3,), std=(0.4,))
    save_pretrained(model, tmp_path / 'out', processor=grey)
    judge = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'out').eval()
    x = cases.images((32, 48), channels=1)
    theirs = judge(record.nchw(x)).logits.detach().numpy()
    assert np.abs(call(model, x) - theirs).max() / theirs.std() < BOUND


@pytest.mark.parametrize('name', ['convnext_atto', 'convnext_tiny', 'convnextv2_atto'])
def test_timm_loads_our_folder_and_our_file(tmp_path, name):
    """A fine-tuned model could not be used with timm."""
    model = random_model(name)
    save_pretrained(model, tmp_path / 'out', layout='timm', class_names=NAMES)
    folder = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    file = timm.create_model(name, num_classes=3, checkpoint_path=str(tmp_path / 'out' / 'model.safetensors')).eval()
    assert logits_differ(model, folder) < BOUND
    assert logits_differ(model, file) < BOUND
    assert folder.pretrained_cfg['label_names'] == list(NAMES)
    assert folder.pretrained_cfg['crop_pct'] == 0.875
    assert_equal(load_pretrained(tmp_path / 'out' / 'model.safetensors', name=f'{name}.fb_in1k'), model)


@pytest.mark.parametrize(('name', 'arguments'), cases.TIMM_FOLDERS, ids=str)
def test_a_folder_of_timm_loads(name, arguments):
    """A model that was fine-tuned with timm could not be used."""
    with record.timm_folder(name, arguments) as (theirs, folder):
        loaded = read_pretrained(folder)
        assert logits_differ(loaded.model, theirs) < BOUND
        assert loaded.class_names == NAMES


@pytest.mark.parametrize('patch_size', [8, 16])
def test_a_dilated_model_of_timm_is_refused(tmp_path, patch_size):
    """The tensors have equal shapes, but the networks differ: logits would be meaningless."""
    theirs = timm.create_model('convnext_atto', patch_size=patch_size, num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
    with pytest.raises(UserError, match=f'timm builds a different network for patch_size={patch_size}'):
        load_pretrained(tmp_path / 'theirs.pth')


def test_transformers_reads_the_layer_scale_of_our_backbone(tmp_path):
    """transformers would build a backbone without layer scale."""
    backbone = create_backbone('convnext_atto', key=jax.random.key(0), out_features=('stage2',))
    save_pretrained(backbone, tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    theirs = transformers.ConvNextBackbone.from_pretrained(tmp_path / 'out')
    assert theirs.config.layer_scale_init_value == config['layer_scale_init_value']


@pytest.mark.parametrize('folder', ['imagenet_samples', 'clothing'])
def test_the_preprocessing_of_photographs_equals_transformers(folder):
    """Other pixels would cost published models a part of their accuracy."""
    photos = sorted(path for path in (PHOTOS / folder).rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg'))
    if not photos:
        pytest.skip(f'needs the photographs in {PHOTOS / folder}')
    theirs = record.ConvNextImageProcessorPil(size={'shortest_edge': 224})
    ours = ImageProcessor.from_huggingface(theirs.to_dict())
    for path in photos:
        photo = transformers.image_utils.load_image(str(path))
        assert np.abs(ours(path)[0] - record.pixels(theirs, photo)).max() == 0, path


def test_the_preprocessing_of_files_and_its_config(tmp_path):
    """A rotated JPEG or our config would be processed differently. (transformers clips 16 bits, as is checked here.)"""
    theirs = record.ConvNextImageProcessorPil(size={'shortest_edge': 64})
    ours = ImageProcessor.from_huggingface(theirs.to_dict())
    exif = Image.Exif()
    exif[0x0112] = 6
    cases.picture(90, 70).save(tmp_path / 'rotated.jpg', exif=exif)
    load_image = transformers.image_utils.load_image
    rotated = record.pixels(theirs, load_image(str(tmp_path / 'rotated.jpg')))
    assert np.abs(ours(tmp_path / 'rotated.jpg')[0] - rotated).max() == 0
    Image.fromarray((np.arange(90 * 70).reshape(70, 90) * 9).astype(np.uint16)).save(tmp_path / 'deep.png')
    assert np.asarray(load_image(str(tmp_path / 'deep.png'))).mean() > 250
    processor = ImageProcessor(size=288, crop_pct=0.95, resample=2, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    processor.save(tmp_path)
    again = record.ConvNextImageProcessorPil.from_pretrained(tmp_path)
    picture = cases.picture(300, 400)
    assert np.abs(processor(picture)[0] - record.pixels(again, picture)).max() == 0
