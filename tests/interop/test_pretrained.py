"""load_pretrained and save_pretrained: bit-exact conversion, configs, class names, and error messages."""

import dataclasses
import functools
import json
import warnings

import jax
import numpy as np
import pytest
from random_models import assert_equal, fcmae_state_dict, layouts_of, random_model, save, state_dict

from convnext_jax import create_backbone, load_pretrained, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, read_pretrained
from convnext_jax.interop.layouts import LAYOUTS, to_layout
from convnext_jax.interop.recognition import recognize_layout, recognize_variant
from convnext_jax.models import create_model, get_parameters, get_variant, list_models
from tests import reference
from tests.reference import cases

NAMES = cases.NAMES
BOUND = 2e-5  # in standard deviations of the reference, for float32


@pytest.mark.parametrize('layout', ['huggingface', 'timm'])
@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto', 'convnext_tiny'])
def test_round_trip_is_bit_exact(tmp_path, name, layout):
    """Weights would change when they are saved and loaded."""
    model = random_model(name)
    save_pretrained(model, tmp_path / 'out', layout=layout, class_names=NAMES)
    loaded = read_pretrained(tmp_path / 'out')
    assert_equal(loaded.model, model)
    assert (loaded.layout, loaded.notes, loaded.newly_initialised) == (layout, [], ())
    assert loaded.class_names == NAMES


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto', 'convnext_isotropic_small'])
def test_the_original_layout_loads(tmp_path, name):
    """Weights of the original repositories could not be used; `tests/judges` tests their PyTorch files."""
    model = random_model(name)
    save(state_dict(model), tmp_path / 'model.safetensors')
    loaded = read_pretrained(tmp_path / 'model.safetensors')
    assert_equal(loaded.model, model)
    assert (loaded.layout, loaded.notes, loaded.newly_initialised) == ('original', [], ())


def test_timm_has_no_isotropic_models(tmp_path):
    """timm could not load the folder."""
    with pytest.raises(UserError, match='timm library has no isotropic'):
        save_pretrained(random_model('convnext_isotropic_small'), tmp_path / 'other', layout='timm')


def test_a_folder_of_dinov3_is_saved_and_loaded(tmp_path):
    """The distilled weights of DINOv3 could not be used, or only with a random head."""
    model = random_model('convnext_atto', num_classes=0)
    save_pretrained(model, tmp_path / 'out', layout='dinov3')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert (config['model_type'], config['layer_norm_eps']) == ('dinov3_convnext', 1e-6)
    loaded = read_pretrained(tmp_path / 'out', num_classes=0)
    assert_equal(loaded.model, model)
    assert (loaded.layout, loaded.notes, loaded.has_head) == ('dinov3', [], False)
    assert loaded.processor == ImageProcessor(resample=2, squash=True)
    with pytest.raises(UserError, match='has no head: .* num_classes=0 gives a model without a head'):
        load_pretrained(tmp_path / 'out')
    with pytest.warns(UserWarning, match='the head is newly initialised: the file has none'):
        assert load_pretrained(tmp_path / 'out', num_classes=3, key=jax.random.key(0)).num_classes == 3


def test_torchvision_s_names_are_read(tmp_path):
    """Weights of torchvision could not be used; `tests/judges` tests its PyTorch files."""
    model = random_model('convnext_atto')
    save(state_dict(model, 'torchvision'), tmp_path / 'model.safetensors')
    loaded = read_pretrained(tmp_path / 'model.safetensors')
    assert_equal(loaded.model, model)
    assert (loaded.layout, loaded.notes) == ('torchvision', [])


@pytest.mark.parametrize(
    ('name', 'layout', 'match'),
    [
        ('convnext_atto', 'dinov3', 'transformers has no classifier of DINOv3: save the model without its head'),
        ('convnextv2_atto', 'dinov3', 'the dinov3 library only has the ConvNeXt V1 with layer scale'),
        ('convnextv2_atto', 'torchvision', 'the torchvision library only has the ConvNeXt V1 with layer scale'),
        ('convnext_atto_rms', 'torchvision', 'the torchvision library has no ConvNeXt with norm=rmsnorm'),
    ],
)
def test_what_a_library_does_not_have_is_refused(tmp_path, name, layout, match):
    """The other library would build another network, or fail to load the folder."""
    with pytest.raises(UserError, match=match):
        save_pretrained(random_model(name), tmp_path / 'out', layout=layout)


@pytest.mark.parametrize('layout', ['huggingface', 'timm'])
def test_num_classes_0_gives_a_model_without_a_head(tmp_path, layout):
    """Users of features would have to initialise a head that they do not use."""
    model = random_model()
    save_pretrained(model, tmp_path / 'out', layout=layout, class_names=NAMES)
    loaded = read_pretrained(tmp_path / 'out', num_classes=0)
    assert (loaded.model.head, loaded.notes, loaded.has_head, loaded.class_names) == (None, [], False, None)
    x = cases.images((64, 96))
    np.testing.assert_array_equal(loaded.model(x), model.head_input(x))
    save_pretrained(loaded.model, tmp_path / 'again', layout=layout)
    assert_equal(load_pretrained(tmp_path / 'again', num_classes=0), loaded.model)


@pytest.mark.parametrize('channels', [1, 2, 5])
def test_rgb_weights_are_adapted_to_other_channels_with_a_note(tmp_path, channels):
    """Greyscale or multispectral images could not use pretrained weights, or users would not know what was changed."""
    model = random_model()
    save_pretrained(model, tmp_path / 'out', layout='timm')
    loaded = read_pretrained(tmp_path / 'out', in_channels=channels)
    kernel, rgb = loaded.model.stem.conv.kernel[...], np.asarray(model.stem.conv.kernel[...])
    assert_equal(loaded.model, model, but=('stem.conv.kernel',))
    expected = rgb.sum(2, keepdims=True) if channels == 1 else rgb[:, :, [0, 1, 2, 0, 1][:channels]] * 3 / channels
    np.testing.assert_allclose(kernel, expected, rtol=1e-6, atol=1e-7)
    how = 'summed' if channels == 1 else f'repeated and multiplied by 3 / {channels}'
    assert loaded.notes == [f'the stem is adapted from RGB to {channels} channel(s): its kernels are {how}']
    assert loaded.processor is None
    with pytest.warns(UserWarning, match='the stem is adapted from RGB'):
        assert load_pretrained(tmp_path / 'out', in_channels=channels).in_channels == channels
    with pytest.warns(UserWarning, match='the stem is adapted from RGB'):
        backbone = create_backbone(tmp_path / 'out', in_channels=channels)
    np.testing.assert_array_equal(backbone.stem.conv.kernel[...], kernel)
    assert read_pretrained(tmp_path / 'out', in_channels=3).notes == []


def test_weights_that_are_not_for_rgb_are_not_adapted(tmp_path):
    """The channels of a multispectral model would be mixed up."""
    save(state_dict(random_model(in_channels=5)), tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=r'the weights are for images with 5 channel\(s\): only weights for RGB'):
        load_pretrained(tmp_path / 'model.safetensors', in_channels=3)
    save(state_dict(random_model()), tmp_path / 'rgb.safetensors')
    with pytest.raises(UserError, match='in_channels must be at least 1, not 0'):
        load_pretrained(tmp_path / 'rgb.safetensors', in_channels=0)


def write_folder(folder, files, shapes, shards=1):
    """Writes a folder with the files, tensor names and shapes of another library, and with random tensors."""
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    tensors = {name: cases.foreign_tensor(name, tuple(shape)) for name, shape in shapes.items()}
    if shards == 1:
        save(tensors, folder / 'model.safetensors')
        return tensors
    weight_map = {name: f'model-{number % shards:05}.safetensors' for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save({name: x for name, x in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    return tensors


def assert_holds(model, tensors, layout):
    ours = state_dict(model, layout)
    assert ours.keys() == tensors.keys()
    for name, value in tensors.items():  # a linear kernel may be stored as a 1×1 convolution
        np.testing.assert_array_equal(ours[name].reshape(value.shape), value, err_msg=name)


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_a_folder_of_transformers_loads(tmp_path, name):
    """Folders from the hub, with several weights files, config and preprocessing, could not be used."""
    stored = reference.table('hugging_face_folders')[name]
    tensors = write_folder(tmp_path, stored['files'], stored['shapes'], shards=3)
    loaded = read_pretrained(tmp_path)
    assert_holds(loaded.model, tensors, 'huggingface')
    assert loaded.model.norm.epsilon == 1e-12
    assert loaded.class_names == NAMES
    assert loaded.processor == ImageProcessor(size=288, crop_pct=0.9, resample=2, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_configs_equal_those_of_transformers(tmp_path, name):
    """transformers would build another network from our config.json."""
    stored = reference.table('hugging_face_folders')[name]['files']
    model = random_model(name, layer_norm_eps=1e-12)
    processor = ImageProcessor(size=288, crop_pct=0.9, resample=2, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_pretrained(model, tmp_path / 'out', class_names=NAMES, processor=processor)
    for file in ('config.json', 'preprocessor_config.json'):
        ours, theirs = json.loads((tmp_path / 'out' / file).read_text()), stored[file]
        assert {key: theirs[key] for key in ours if key in theirs} == {
            key: ours[key] for key in ours if key in theirs
        } | ({'image_size': 224} if file == 'config.json' else {})
        assert set(ours) >= REQUIRED[file]


REQUIRED = {
    'config.json': {'model_type', 'depths', 'hidden_sizes', 'layer_norm_eps', 'id2label', 'label2id', 'architectures'},
    'preprocessor_config.json': {'size', 'crop_pct', 'resample', 'image_mean', 'image_std'},
}


def test_a_hugging_face_model_without_a_head_gets_a_new_one(tmp_path):
    """Pretrained trunks could not be fine-tuned."""
    stored = reference.table('hugging_face_folders')['without head']
    write_folder(tmp_path, stored['files'], stored['shapes'])
    with pytest.raises(UserError, match='has no head: load_pretrained\\(…, num_classes=, key=\\) initialises one'):
        load_pretrained(tmp_path)
    with pytest.warns(UserWarning, match='the head is newly initialised: the file has none'):
        model = load_pretrained(tmp_path, num_classes=3, key=jax.random.key(0))
    assert model.head.bias.shape == (3,)


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_a_timm_file_loads_with_the_name_of_its_model(tmp_path, name):
    """Names with timm's tags would be rejected."""
    model = random_model(name)
    save(state_dict(model, 'timm'), tmp_path / 'model.safetensors')
    assert_equal(load_pretrained(tmp_path / 'model.safetensors', name=f'{name}.fb_in1k'), model)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_model_is_recognised_by_names_and_shapes(layout):
    """Files without a config could not be loaded. Broadcast zeros replace the tensors, to save memory."""
    for name in list_models():
        if layout not in layouts_of(get_variant(name)):
            continue
        build = functools.partial(create_model, name, num_classes=0 if layout == 'dinov3' else 3)
        model = jax.eval_shape(lambda build=build: build(key=jax.random.key(0)))
        zeros = {name: np.broadcast_to(np.float32(0), x.shape) for name, x in get_parameters(model).items()}
        tensors = {theirs: x.shape for theirs, x in _shapes(zeros, model.variant, layout).items()}
        empty = {theirs: np.broadcast_to(np.float32(0), shape) for theirs, shape in tensors.items()}
        assert recognize_layout(empty) == layout
        assert recognize_variant(empty, {}, None, layout) == get_variant(name)


def _shapes(parameters, variant, layout):
    from convnext_jax.interop.layouts import _to_their_shape, entries

    shapes = {name: x.shape for name, x in parameters.items()}
    return {
        theirs: _to_their_shape(parameters[ours] if block is None else parameters[ours][block], ours, variant, layout)
        for theirs, ours, block in entries(shapes, variant, layout)
    }


def test_patch_size_and_greyscale_are_preserved(tmp_path):
    """The demo's model could not be saved and loaded."""
    model = random_model('convnextv2_atto', patch_size=2, in_channels=1)
    grey = ImageProcessor(size=32, crop_pct=1.0, mean=(0.3,), std=(0.4,))
    save_pretrained(model, tmp_path / 'huggingface', processor=grey)
    loaded = read_pretrained(tmp_path / 'huggingface')
    assert_equal(loaded.model, model)
    assert loaded.model.variant.patch_size == 2
    assert loaded.processor == grey
    save(state_dict(model), tmp_path / 'original.safetensors')
    loaded = read_pretrained(tmp_path / 'original.safetensors')
    assert_equal(loaded.model, model)
    assert loaded.model.variant.patch_size == 2
    with pytest.raises(UserError, match='timm builds a different network for patch_size=2'):
        save_pretrained(model, tmp_path / 'timm', layout='timm', processor=grey)


@pytest.mark.parametrize('wrapper', ['', 'module.'])
def test_an_fcmae_encoder_becomes_dense(tmp_path, wrapper):
    """With a missing transposition, fine-tuning would start from meaningless weights."""
    model = random_model()
    save({wrapper + name: x for name, x in fcmae_state_dict(model).items()}, tmp_path / 'fcmae.safetensors')
    loaded = read_pretrained(tmp_path / 'fcmae.safetensors', num_classes=9, key=jax.random.key(0))
    assert loaded.newly_initialised == ('norm.scale', 'norm.bias', 'head.kernel', 'head.bias')
    prefix = [f"the prefix '{wrapper}' of the names in the file is ignored"] if wrapper else []
    assert loaded.notes == [*prefix, 'the last norm and the head are newly initialised: the file has none']
    assert_equal(loaded.model, model, but=loaded.newly_initialised)


def test_another_number_of_classes_gets_a_new_head_with_a_warning(tmp_path):
    """Users would not notice that the head is random."""
    model = random_model()
    save_pretrained(model, tmp_path / 'out', layout='timm')
    with pytest.raises(UserError, match='pass key='):
        load_pretrained(tmp_path / 'out', num_classes=7)
    with pytest.warns(UserWarning, match='the head is newly initialised: 7 classes here, 3 in the file'):
        loaded = load_pretrained(tmp_path / 'out', num_classes=7, key=jax.random.key(3))
    assert_equal(loaded, model, but=('head.kernel', 'head.bias'))
    assert float(loaded.head.kernel[...].std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ({'num_classes': -1}, 'num_classes must be at least 0'),
        ({'drop_path_rate': -0.1}, 'drop_path_rate must be in'),
        ({'dtype': 'int8'}, "dtype must be one of .*, not 'int8'"),
    ],
)
def test_bad_arguments_are_refused_as_by_create_model(tmp_path, arguments, match):
    """A bad value would cause an obscure error inside JAX, not one line that names it."""
    save_pretrained(random_model(), tmp_path / 'out')
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path / 'out', key=jax.random.key(0), **arguments)


@pytest.mark.parametrize('change', ['missing', 'unexpected', 'misshapen'])
def test_tensors_that_do_not_match_are_listed(tmp_path, change):
    """A part of the model would silently keep its initial weights."""
    tensors = state_dict(random_model())
    if change == 'missing':
        del tensors['stages.2.3.grn.beta'], tensors['norm.bias']
        match = 'norm.bias is missing; stages.2.3.grn.beta is missing'
    elif change == 'unexpected':
        tensors['stages.1.0.gamma'] = np.ones(80, np.float32)
        match = 'stages.1.0.gamma is unexpected'
    else:
        tensors['stages.0.0.pwconv1.bias'] = np.ones(161, np.float32)
        match = r'stages.0.0.pwconv1.bias is \(161,\), not \(160,\)'
    save(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path / 'model.safetensors')


@pytest.mark.parametrize('number', range(len(cases.TIMM_FOLDERS)), ids=[str(case) for case in cases.TIMM_FOLDERS])
def test_a_folder_of_timm_loads(tmp_path, number):
    """The arguments in timm's config.json, most of which have no effect, would be ignored or refused wrongly."""
    stored = reference.table('timm_folders')[number]
    assert stored['config']['model_args']
    tensors = write_folder(tmp_path, {'config.json': stored['config']}, stored['shapes'])
    loaded = read_pretrained(tmp_path)
    assert_holds(loaded.model, tensors, 'timm')
    assert loaded.class_names == NAMES
    logits = jax.jit(lambda model, x: model(x))(loaded.model, cases.images((64, 96)))
    assert reference.difference(logits, reference.arrays('timm_folders')[str(number)]) < BOUND


@pytest.mark.parametrize(
    'label_names',
    [list(NAMES), dict(enumerate(NAMES)), {'2': 'emu', '0': 'cat', '1': 'dog'}],
    ids=['list', 'int', 'str'],
)
@pytest.mark.parametrize('section', ['top', 'pretrained_cfg'])
def test_class_names_of_timm_may_be_a_list_or_a_dict(tmp_path, label_names, section):
    """Class names would be lost; timm moves them to pretrained_cfg when it loads and saves a folder."""
    save_pretrained(random_model(), tmp_path / 'out', layout='timm')
    path = tmp_path / 'out' / 'config.json'
    config = json.loads(path.read_text())
    (config if section == 'top' else config['pretrained_cfg'])['label_names'] = label_names
    path.write_text(json.dumps(config))
    assert read_pretrained(tmp_path / 'out').class_names == NAMES


def test_incomplete_class_names_are_ignored_with_a_warning(tmp_path):
    """Some classes would have wrong names."""
    save_pretrained(random_model(), tmp_path / 'out', layout='timm')
    path = tmp_path / 'out' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'label_names': {'0': 'cat', '7': 'emu'}}))
    with pytest.warns(UserWarning, match='does not name each of the 3 classes'):
        assert read_pretrained(tmp_path / 'out').class_names is None


def test_a_new_head_does_not_get_the_class_names_of_the_file(tmp_path):
    """The classes of a fine-tuned model would have the names of the first ImageNet classes."""
    save_pretrained(random_model(), tmp_path / 'out', class_names=NAMES, problem_type='multi_label_classification')
    loaded = read_pretrained(tmp_path / 'out', num_classes=2, key=jax.random.key(0))
    assert (loaded.class_names, loaded.problem_type) == (None, None)


@pytest.mark.parametrize('layout', ['huggingface', 'timm'])
def test_two_classes_may_have_one_name(tmp_path, layout):
    """ImageNet models could not be saved: two classes have the name crane, and two maillot."""
    names = ('crane', 'tench', 'crane')
    save_pretrained(random_model(), tmp_path / 'out', layout=layout, class_names=names)
    assert read_pretrained(tmp_path / 'out').class_names == names
    if layout == 'huggingface':
        config = json.loads((tmp_path / 'out' / 'config.json').read_text())
        assert config['label2id'] == {'crane': 2, 'tench': 1}, 'the last class, as in transformers'


@pytest.mark.parametrize('kind', [None, 'single_label_classification', 'multi_label_classification', 'regression'])
def test_the_problem_type_is_stored_or_a_warning_is_given(tmp_path, kind):
    """With a softmax, a multi-label model would give wrong probabilities."""
    model = random_model()
    save_pretrained(model, tmp_path / 'hf', problem_type=kind)
    loaded = read_pretrained(tmp_path / 'hf')
    assert loaded.problem_type == kind
    expected = {'multi_label_classification': 'sigmoid', 'regression': None}.get(kind, 'softmax')
    assert loaded.activation == expected
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        save_pretrained(model, tmp_path / 'timm', layout='timm', problem_type=kind)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (expected != 'softmax')
    assert all(line.startswith(f'the timm layout does not store problem_type={kind}') for line in messages)


def test_a_problem_type_that_transformers_does_not_know_is_refused(tmp_path):
    """transformers could not load the folder."""
    model = random_model()
    for kind in ('multi-label', ['regression']):
        with pytest.raises(UserError, match='problem_type must be one of single_label_classification, '):
            save_pretrained(model, tmp_path / 'out', problem_type=kind)
    one = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=1)
    with pytest.raises(UserError, match='transformers does not support single_label_classification with one class'):
        save_pretrained(one, tmp_path / 'out', problem_type='single_label_classification')
    save_pretrained(one, tmp_path / 'out', layout='timm')
    assert read_pretrained(tmp_path / 'out').activation == 'sigmoid'
    save_pretrained(model, tmp_path / 'hf')
    path = tmp_path / 'hf' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'problem_type': 'segmentation'}))
    with pytest.raises(UserError, match='problem_type must be one of .*, not segmentation'):
        read_pretrained(tmp_path / 'hf')


def test_the_tensors_determine_whether_there_is_a_layer_scale(tmp_path):
    """V1 models without it and timm's V2 models with it could not be loaded; Hugging Face's V2 would ignore it."""
    without = random_model('convnext_atto', layer_scale_init=0)
    save(state_dict(without), tmp_path / 'without.safetensors')
    assert_equal(load_pretrained(tmp_path / 'without.safetensors'), without)
    with pytest.raises(UserError, match=r'timm has no name for a ConvNeXt of depths .* without layer scale'):
        save_pretrained(without, tmp_path / 'timm', layout='timm')
    scaled = random_model('convnextv2_atto', layer_scale_init=1e-6)
    save(state_dict(scaled, 'timm'), tmp_path / 'scaled.safetensors')
    assert_equal(load_pretrained(tmp_path / 'scaled.safetensors'), scaled)
    with pytest.raises(UserError, match="Hugging Face's ConvNeXt V2 has no layer scale"):
        save_pretrained(scaled, tmp_path / 'hf')


def test_other_problems_are_reported_before_a_missing_head(tmp_path):
    """A head with another name would be reported as missing."""
    tensors = {name: x for name, x in state_dict(random_model(), 'timm').items() if not name.startswith('head.fc.')}
    save(tensors | {'fc.weight': np.ones((3, 320), np.float32)}, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match='do not match the model: fc.weight is unexpected$'):
        load_pretrained(tmp_path / 'model.safetensors')


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ({'conv_bias': False}, 'conv_bias=False in model_args changes'),
        ({'stem_type': 'wide'}, 'stem_type=wide in model_args changes'),
        ({'output_stride': 16}, 'output_stride=16 in model_args changes'),
        ({'global_pool': 'max'}, 'global_pool=max in model_args changes'),
        (
            {'norm_layer': 'groupnorm', 'colour': 'red'},
            'norm_layer=groupnorm, colour=red in model_args changes .* is unknown',
        ),
        ({'depths': [2, 2, 10**9, 2]}, 'depths must be four numbers above 0'),
        ({'depths': [2, 2, 60_000, 2]}, 'tensors are too few for the depths'),
        ({'dims': 'wide'}, 'dims must be four numbers above 0, not wide'),
        ({'kernel_sizes': [7, 7, 4, 7]}, r'kernel_sizes must be an odd number, or four of them, not \[7, 7, 4, 7\]'),
        ({'head_hidden_size': -1}, 'head_hidden_size must be a number, not -1'),
        ({'norm_eps': 2.0}, r'norm_eps must be a number in \(0, 1\), not 2.0'),
    ],
)
def test_unsupported_arguments_of_timm_are_named(tmp_path, arguments, match):
    """The model would silently compute something else than timm's."""
    save_pretrained(random_model(), tmp_path / 'out', layout='timm')
    path = tmp_path / 'out' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'model_args': arguments}))
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path / 'out')


@pytest.mark.parametrize(
    ('arguments', 'fields'),
    [
        ({'kernel_sizes': [7, 7, 7, 7], 'norm_layer': 'layernorm2d', 'head_hidden_size': 0}, {}),
        ({'act_layer': 'silu', 'norm_eps': 1e-3}, {'activation': 'silu', 'norm_eps': 1e-3}),
        ({'norm_layer': 'rmsnorm2d', 'kernel_sizes': 5}, {'norm': 'rmsnorm', 'kernel_size': 5}),
        (
            {'stem_type': 'overlap', 'kernel_sizes': [7, 5, 5, 3], 'head_norm_first': True},
            {'stem': 'overlap', 'kernel_size': (7, 5, 5, 3), 'head_norm_first': True},
        ),
        ({'head_hidden_size': 64}, {'head_hidden': 64}),
    ],
)
def test_arguments_of_timm_change_the_architecture(tmp_path, arguments, fields):
    """A model that was built with timm's options would be read as another one."""
    variant = dataclasses.replace(get_variant('convnext_atto'), **fields)
    save(state_dict(random_model(variant), 'timm'), tmp_path / 'model.safetensors')
    config = {'architecture': 'convnext_atto', 'model_args': arguments}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    loaded = load_pretrained(tmp_path)
    assert loaded.variant == variant
    assert loaded.norm.epsilon == variant.norm_eps
    if fields:
        with pytest.raises(UserError, match='timm has no name for a ConvNeXt of depths .*, \\w+='):
            save_pretrained(loaded, tmp_path / 'out', layout='timm')


def test_a_file_of_dinov3_or_eupe(tmp_path):
    """Their copies of the last norm and their projectors would be refused as unexpected tensors."""
    model = random_model('convnext_atto', num_classes=1)
    tensors = {name: x for name, x in state_dict(model).items() if not name.startswith('head.')}
    copies = {name.replace('norm.', 'norms.3.'): x for name, x in tensors.items() if name.startswith('norm.')}
    assert sorted(copies) == ['norms.3.bias', 'norms.3.weight']
    save(tensors | copies | {'projectors.0.weight': np.ones((8, 320), np.float32)}, tmp_path / 'eupe.safetensors')
    with pytest.warns(UserWarning, match=r'distillation are dropped \(1 tensors, projectors.\*\)'):
        loaded = read_pretrained(tmp_path / 'eupe.safetensors', num_classes=1, key=jax.random.key(0))
    assert loaded.newly_initialised == ('head.kernel', 'head.bias')
    assert_equal(loaded.model, model, but=loaded.newly_initialised)
    save(tensors | copies | {'norms.3.bias': copies['norms.3.bias'] + 1}, tmp_path / 'other.safetensors')
    with pytest.raises(UserError, match=r'norms.3.bias is not a copy of norm.bias'):
        load_pretrained(tmp_path / 'other.safetensors', num_classes=1, key=jax.random.key(0))


@pytest.mark.parametrize('layout', ['huggingface', 'original'])
@pytest.mark.parametrize(
    ('name', 'match'),
    [
        ('convnext_zepto_rms_ols', 'stem=overlap_act, norm=simplenorm'),
        ('test_convnext3', 'norm_eps=1e-05, activation=silu, kernel_size=\\(7, 5, 5, 3\\)'),
    ],
)
def test_other_layouts_refuse_the_parts_that_only_timm_has(tmp_path, layout, name, match):
    """Another library would compute something else with the weights."""
    with pytest.raises(UserError, match=f'the {layout} library has no ConvNeXt with {match}: use the timm layout'):
        save_pretrained(random_model(name), tmp_path / 'out', layout=layout)


@pytest.mark.parametrize(
    'name', ['convnext_zepto_rms_ols', 'convnext_atto_ols', 'convnext_atto_rms', 'test_convnext', 'test_convnext3']
)
def test_a_folder_of_a_model_that_only_timm_has(tmp_path, name):
    """The weights would change, or another architecture would be recognised."""
    model = random_model(name)
    save_pretrained(model, tmp_path / 'out', layout='timm')
    for where in (tmp_path / 'out', tmp_path / 'out' / 'model.safetensors'):
        loaded = load_pretrained(where)
        assert_equal(loaded, model)
        assert loaded.variant == model.variant


def test_a_timm_model_with_other_layers_is_refused(tmp_path):
    """The model would silently compute something else than timm's."""
    save_pretrained(random_model(), tmp_path / 'out', layout='timm')
    path = tmp_path / 'out' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'model_args': {'act_layer': 'relu', 'norm_layer': 'x'}}))
    with pytest.raises(UserError, match='act_layer=relu, norm_layer=x in model_args changes what the model computes'):
        load_pretrained(tmp_path / 'out')


@pytest.mark.parametrize(
    ('field', 'value', 'match'),
    [
        ('model_type', 'resnet', "model_type is 'resnet'"),
        ('hidden_act', 'relu', "hidden_act is 'relu'"),
        ('depths', [2, 2, 10**9, 2], 'are invalid'),
        ('hidden_sizes', [40, 80, 160, 60_000], 'is .* not'),
        ('hidden_sizes', 'wide', 'are invalid'),
        ('layer_norm_eps', 'small', 'layer_norm_eps must be a number in .* not small'),
        ('patch_size', 10**30, 'are invalid'),
    ],
)
def test_a_wrong_config_is_a_user_error_and_takes_no_memory(tmp_path, field, value, match):
    """A damaged config.json would cause a traceback or fill the memory."""
    save_pretrained(random_model(), tmp_path / 'out')
    path = tmp_path / 'out' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path / 'out')


def test_a_warning_if_timm_cannot_store_the_epsilon(tmp_path):
    """timm would silently compute slightly different logits."""
    with pytest.warns(UserWarning, match="does not store the last norm's epsilon"):
        save_pretrained(random_model(layer_norm_eps=1e-12), tmp_path / 'out', layout='timm')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        save_pretrained(random_model(), tmp_path / 'silent', layout='timm')


@pytest.mark.parametrize('patch_size', [8, 16])
def test_patch_sizes_that_timm_dilates_are_refused(tmp_path, patch_size):
    """The tensors have equal shapes, but the networks differ: logits would be meaningless."""
    model = random_model('convnext_atto', patch_size=patch_size)
    with pytest.raises(UserError, match=f'timm builds a different network for patch_size={patch_size}'):
        save_pretrained(model, tmp_path / 'out', layout='timm')
    theirs = to_layout(get_parameters(model), get_variant('convnext_atto'), 'timm')  # with equal names
    save({name: np.array(x) for name, x in theirs.items()}, tmp_path / 'theirs.safetensors')
    with pytest.raises(UserError, match=f'timm builds a different network for patch_size={patch_size}'):
        load_pretrained(tmp_path / 'theirs.safetensors')


def test_a_processor_for_other_channels_is_refused(tmp_path):
    """The saved preprocessing could not be used with the model."""
    with pytest.raises(UserError, match='the processor is for 3 channels, the model for 1'):
        save_pretrained(random_model(in_channels=1), tmp_path / 'out', processor=ImageProcessor())
    with pytest.raises(UserError, match='there is no image processor for 4 channels'):
        save_pretrained(random_model(in_channels=4), tmp_path / 'out')
