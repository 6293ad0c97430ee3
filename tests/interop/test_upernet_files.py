"""UPerNet in files: folders of transformers, round trips, new classifiers, backbones, and error messages."""

import json
import re

import jax
import numpy as np
import pytest
from random_models import random_model, save

from convnext_jax import ImageProcessor, create_backbone, load_pretrained, save_pretrained
from convnext_jax.config import default_config
from convnext_jax.errors import UserError
from convnext_jax.interop import as_classifier, read_pretrained, read_upernet
from convnext_jax.interop.upernet import UPERNET_LAYOUTS, tensors_of
from convnext_jax.models import ConvNeXt, UPerNet, get_parameters, get_weights
from convnext_jax.tasks import make_task
from convnext_jax.training.weights import load_weights, read_weights
from tests import reference
from tests.reference import cases

NAMES = tuple(f'class {number}' for number in range(7))
KINDS = pytest.mark.parametrize('kind', cases.UPERNETS)


def assert_equal(a, b, but=()):
    ours, theirs = get_weights(a), get_weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - set(but):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def state_dict(network, layout):
    tensors = tensors_of(jax.device_get(get_weights(network)), network.variant, layout)
    return {name: np.array(x) for name, x in tensors.items()}


@KINDS
def test_a_folder_of_transformers_loads(tmp_path, kind):
    """The published folders could not be used."""
    stored, network = reference.table('upernet_folders')[kind], cases.random_upernet(kind)
    tensors = state_dict(network, 'huggingface')
    assert {name: list(x.shape) for name, x in tensors.items()} == stored['shapes']
    for name, content in stored['files'].items():
        (tmp_path / name).write_text(json.dumps(content))
    save(tensors, tmp_path / 'model.safetensors')
    loaded = read_upernet(tmp_path)
    assert_equal(loaded.model, network)
    assert (loaded.layout, loaded.notes, loaded.newly_initialised) == ('huggingface', [], ())
    assert ImageProcessor.from_pretrained(tmp_path).size == 512


@KINDS
def test_configs_equal_those_of_transformers(tmp_path, kind):
    """transformers would build another network from our config.json."""
    stored = reference.table('upernet_folders')[kind]['files']
    save_pretrained(cases.random_upernet(kind), tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    ours, theirs = config.pop('backbone_config'), stored['config.json'].pop('backbone_config')
    for mine, other in ((config, stored['config.json']), (ours, theirs)):
        both = mine.keys() & other.keys() - {'image_size', 'architectures'}
        assert len(both) > 8
        assert {key: mine[key] for key in both} == {key: other[key] for key in both}


@KINDS
def test_round_trip_is_bit_exact(tmp_path, kind):
    """Weights, running statistics or class names would change when they are saved and loaded."""
    network = cases.random_upernet(kind)
    save_pretrained(network, tmp_path / 'out', class_names=NAMES)
    loaded = read_upernet(tmp_path / 'out')
    assert_equal(loaded.model, network)
    assert loaded.class_names == NAMES
    assert_equal(load_pretrained(tmp_path / 'out'), network)


@pytest.mark.parametrize('layout', ['mmsegmentation', 'original'])
@pytest.mark.parametrize(('name', 'wrapper'), [('convnext_atto', ''), ('convnextv2_atto', 'module.')])
def test_names_of_mmsegmentation_and_of_the_original_load(tmp_path, name, wrapper, layout):
    """Their weights could not be used; `tests/judges` tests their PyTorch files."""
    network = cases.random_upernet(name)
    save({wrapper + name: x for name, x in state_dict(network, layout).items()}, tmp_path / 'model.safetensors')
    loaded = read_upernet(tmp_path / 'model.safetensors')
    assert_equal(loaded.model, network)
    assert loaded.model.variant == network.variant
    assert (loaded.layout, loaded.class_names) == (layout, None)


def test_a_network_without_auxiliary_head(tmp_path):
    """Networks whose auxiliary head was removed after training could not be used."""
    network = cases.random_upernet('v1')
    tensors = state_dict(network, 'huggingface')
    save_pretrained(network, tmp_path / 'out')
    kept = {name: x for name, x in tensors.items() if not name.startswith('auxiliary_head.')}
    save(kept, tmp_path / 'out' / 'model.safetensors')
    loaded = load_pretrained(tmp_path / 'out')
    assert loaded.auxiliary_head is None
    save_pretrained(loaded, tmp_path / 'again')
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['use_auxiliary_head'] is False
    assert_equal(load_pretrained(tmp_path / 'again'), loaded)


def test_tensors_that_do_not_match_are_listed(tmp_path):
    """A part of the network would silently keep its initial weights."""
    save_pretrained(cases.random_upernet('v1'), tmp_path / 'out')
    tensors = state_dict(cases.random_upernet('v1'), 'huggingface')
    del tensors['decode_head.fpn_convs.1.batch_norm.running_mean']
    tensors['decode_head.extra.weight'] = np.ones(3, np.float32)
    tensors['auxiliary_head.convs.0.conv.weight'] = np.ones((12, 24, 1, 1), np.float32)
    save(tensors, tmp_path / 'out' / 'model.safetensors')
    with pytest.raises(
        UserError,
        match=r'auxiliary_head.convs.0.conv.weight is \(12, 24, 1, 1\), not \(12, 24, 3, 3\); '
        'decode_head.extra.weight is unexpected; decode_head.fpn_convs.1.batch_norm.running_mean is missing',
    ):
        load_pretrained(tmp_path / 'out')
    tensors = state_dict(cases.random_upernet('v1'), 'huggingface')
    del tensors['backbone.hidden_states_norms.stage2.bias']
    save(tensors, tmp_path / 'out' / 'model.safetensors')
    with pytest.raises(UserError, match=r'hidden_states_norms.stage2.bias is missing'):
        load_pretrained(tmp_path / 'out')


def test_another_number_of_classes_gets_new_classifiers_with_a_warning(tmp_path):
    """Users would not notice that the classifiers are random, or could not fine-tune on their own classes."""
    network = cases.random_upernet('v1')
    save_pretrained(network, tmp_path / 'out', class_names=NAMES)
    with pytest.raises(UserError, match='3 classes here, 7 in the file: pass key='):
        load_pretrained(tmp_path / 'out', num_classes=3)
    with pytest.warns(UserWarning, match='the classifiers are newly initialised: 3 classes here, 7 in the file'):
        loaded = load_pretrained(tmp_path / 'out', num_classes=3, key=jax.random.key(0))
    assert loaded.num_classes == 3
    read = read_upernet(tmp_path / 'out', num_classes=3, key=jax.random.key(0))
    assert read.class_names is None
    assert len(read.newly_initialised) == 4
    assert_equal(loaded, network, but=read.newly_initialised)
    assert float(loaded.decode_head.classifier.kernel[...].std()) == pytest.approx(0.01, rel=0.3)


@pytest.mark.parametrize('layout', ['huggingface', 'mmsegmentation', 'original'])
def test_the_backbone_of_a_upernet(tmp_path, layout):
    """A detector could not start from a segmentation network, or would lose its output norms."""
    network = cases.random_upernet('convnext_atto')
    save(state_dict(network, layout), tmp_path / 'model.safetensors')
    backbone = create_backbone(tmp_path / 'model.safetensors')
    weights = {name.removeprefix('backbone.'): x for name, x in get_weights(network).items() if 'head' not in name}
    ours = get_parameters(backbone)
    assert ours.keys() == weights.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, weights)
    two = create_backbone(tmp_path / 'model.safetensors', out_features=('stage2', 'stage4'))
    assert set(two.norms) == {'stage2', 'stage4'}


def test_options_apply_to_the_loaded_network(tmp_path):
    """Options of `load_pretrained` would be ignored for a UPerNet."""
    save_pretrained(cases.random_upernet('v1'), tmp_path / 'out')
    options = {'output_stride': 16, 'dropout_rate': 0.1, 'drop_path_rate': 0.2, 'dtype': 'bfloat16'}
    loaded = load_pretrained(tmp_path / 'out', **options)
    backbone = loaded.backbone
    assert (backbone.output_stride, backbone.drop_path_rate, backbone.execution.dtype) == (16, 0.2, 'bfloat16')
    assert loaded.decode_head.dropout_rate == 0.1
    for layout in ('huggingface', 'original'):
        with pytest.raises(UserError, match='output_stride=16'):
            save_pretrained(loaded, tmp_path / layout, layout=layout)
    with pytest.raises(TypeError, match='drop_path_rat'):
        load_pretrained(tmp_path / 'out', drop_path_rat=0.1)


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        ({'auxiliary_num_convs': 2}, 'auxiliary_num_convs=2 is not supported'),
        ({'auxiliary_concat_input': True}, 'auxiliary_concat_input=True is not supported'),
        ({'pool_scales': [0]}, 'pool_scales must be numbers of at least 1'),
        ({'pool_scales': 3}, 'pool_scales must be numbers of at least 1'),
        ({'backbone_config': None}, 'backbone_config must be an object'),
        ({'backbone_config': {'model_type': 'swin'}}, "model_type is 'swin'"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path, changes, match):
    """The masks would be meaningless."""
    save_pretrained(cases.random_upernet('v1'), tmp_path / 'out')
    path = tmp_path / 'out' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path / 'out')


@pytest.mark.parametrize('layout', UPERNET_LAYOUTS)
def test_a_backbone_that_only_timm_has_is_not_saved(tmp_path, layout):
    """Another library would compute something else with the weights."""
    with pytest.raises(UserError, match='library has no ConvNeXt with norm=rmsnorm'):
        save_pretrained(cases.random_upernet('convnext_atto_rms'), tmp_path / 'out', layout=layout)


def test_classifiers_and_upernets_are_not_confused(tmp_path):
    """Commands for classifiers would end with a traceback."""
    save_pretrained(cases.random_upernet('v1'), tmp_path / 'upernet')
    with pytest.raises(UserError, match='is a UPerNet, not a classifier'):
        read_pretrained(tmp_path / 'upernet')
    save_pretrained(random_model(), tmp_path / 'classifier')
    with pytest.raises(UserError, match='is not a UPerNet'):
        read_upernet(tmp_path / 'classifier')
    for folder, network in (('upernet', UPerNet), ('classifier', ConvNeXt)):
        assert isinstance(read_weights(str(tmp_path / folder), 'raw').model, network)
    message = f'the raw weights of {tmp_path / "upernet"} (huggingface layout): this is a UPerNet'
    with pytest.raises(UserError, match=re.escape(message)):
        as_classifier(read_weights(str(tmp_path / 'upernet'), 'raw'))


@pytest.mark.parametrize('task', ['classification', 'fcmae'])
def test_runs_of_other_tasks_do_not_start_from_a_upernet(tmp_path, task):
    """The run would fail with the names of all parameters."""
    save_pretrained(cases.random_upernet('v1'), tmp_path / 'upernet')
    config = default_config(task)
    config.model.name, config.init.weights = 'convnextv2_atto', str(tmp_path / 'upernet')
    with pytest.raises(UserError, match='has the weights of a UPerNet: only the task segmentation can start from it'):
        load_weights(make_task(config), {}, {'class names': ['a']})


def test_the_preprocessing_of_a_folder_is_read(tmp_path):
    """Masks would be predicted from other pixels. A config without fields has the defaults of transformers."""
    processor = ImageProcessor(size=48, resample=3, squash=True, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_pretrained(cases.random_upernet('v1'), tmp_path / 'out', processor=processor)
    assert read_upernet(tmp_path / 'out').processor == processor
    short = {'image_processor_type': 'SegformerImageProcessor'}
    (tmp_path / 'out' / 'preprocessor_config.json').write_text(json.dumps(short))
    assert read_upernet(tmp_path / 'out').processor == ImageProcessor(size=512, resample=2, squash=True)


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ({'layout': 'timm'}, 'can only be saved as a whole, as huggingface, mmsegmentation, original'),
        ({'head': False}, 'can only be saved as a whole'),
        ({'problem_type': 'regression'}, 'has no problem_type'),
        ({'class_names': ('wall', 'sky')}, '2 class names for 7 classes'),
        ({'processor': ImageProcessor(size=224)}, 'use a processor with squash=True'),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, arguments, match):
    """A folder would be written that no library can read."""
    with pytest.raises(UserError, match=match):
        save_pretrained(cases.random_upernet('v1'), tmp_path / 'out', **arguments)
    assert not (tmp_path / 'out').exists()
