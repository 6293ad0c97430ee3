"""Weights come in from each library and go out to it without a bit of difference, or not at all."""

import json
import warnings

import jax
import numpy as np
import pytest
from random_models import assert_equal, fcmae_state_dict, random_model, save, state_dict

from convnext_jax import load_pretrained, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, read_pretrained
from convnext_jax.interop.layouts import to_layout
from convnext_jax.interop.recognition import recognize_layout, recognize_variant
from convnext_jax.models import create_model, get_parameters, get_variant, list_models
from tests import reference
from tests.reference import cases

NAMES = cases.NAMES
BOUND = 2e-5  # of the reference's standard deviation, float32


@pytest.mark.parametrize('layout', ['huggingface', 'timm'])
@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto', 'convnext_tiny'])
def test_round_trip_is_bit_exact(tmp_path, name, layout):
    model = random_model(name)
    save_pretrained(model, tmp_path / 'out', layout=layout, class_names=NAMES)
    loaded = read_pretrained(tmp_path / 'out')
    assert_equal(loaded.model, model)
    assert (loaded.layout, loaded.notes, loaded.fresh) == (layout, [], ())
    assert loaded.class_names == NAMES


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto', 'convnext_isotropic_small'])
def test_the_original_s_names_load(tmp_path, name):
    """Those files are PyTorch's, for which `tests/judges` has the same; the names do not depend on the format."""
    model = random_model(name)
    save(state_dict(model), tmp_path / 'model.safetensors')
    loaded = read_pretrained(tmp_path / 'model.safetensors')
    assert_equal(loaded.model, model)
    assert (loaded.layout, loaded.notes, loaded.fresh) == ('original', [], ())


def test_timm_has_no_isotropic_models(tmp_path):
    with pytest.raises(UserError, match='timm library has no isotropic'):
        save_pretrained(random_model('convnext_isotropic_small'), tmp_path / 'other', layout='timm')


def write_folder(folder, files, shapes, shards=1):
    """A folder as another library saves it, with drawn tensors: its files, the tensors' names and shapes."""
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    tensors = {name: cases.foreign_tensor(name, tuple(shape)) for name, shape in shapes.items()}
    if shards == 1:
        save(tensors, folder / 'model.safetensors')
        return tensors
    places = {name: f'model-{number % shards:05}.safetensors' for number, name in enumerate(tensors)}
    for place in set(places.values()):
        save({name: x for name, x in tensors.items() if places[name] == place}, folder / place)
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))
    return tensors


def assert_holds(model, tensors, layout):
    ours = state_dict(model, layout)
    assert ours.keys() == tensors.keys()
    for name, value in tensors.items():  # a product may be stored as a convolution of one pixel
        np.testing.assert_array_equal(ours[name].reshape(value.shape), value, err_msg=name)


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_what_transformers_saves_loads(tmp_path, name):
    """Configs of its own, several files with an index, the preprocessing: all that the hub's folders hold."""
    stored = reference.table('hugging_face_folders')[name]
    tensors = write_folder(tmp_path, stored['files'], stored['shapes'], shards=3)
    loaded = read_pretrained(tmp_path)
    assert_holds(loaded.model, tensors, 'huggingface')
    assert loaded.model.norm.epsilon == 1e-12
    assert loaded.class_names == NAMES
    assert loaded.processor == ImageProcessor(size=288, crop_pct=0.9, resample=2, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_configs_say_what_those_of_transformers_say(tmp_path, name):
    """Its classes read our config.json: a field with another meaning builds another network."""
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


def test_a_hugging_face_model_without_a_head_takes_a_fresh_one(tmp_path):
    stored = reference.table('hugging_face_folders')['without head']
    write_folder(tmp_path, stored['files'], stored['shapes'])
    with pytest.raises(UserError, match='has no head: load_pretrained\\(…, num_classes=, key=\\) initialises one'):
        load_pretrained(tmp_path)
    with pytest.warns(UserWarning, match='the head is newly initialised: the file has none'):
        model = load_pretrained(tmp_path, num_classes=3, key=jax.random.key(0))
    assert model.head.bias.shape == (3,)


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_a_file_of_timm_loads_by_the_name_of_its_model(tmp_path, name):
    model = random_model(name)
    save(state_dict(model, 'timm'), tmp_path / 'model.safetensors')
    assert_equal(load_pretrained(tmp_path / 'model.safetensors', name=f'{name}.fb_in1k'), model)


@pytest.mark.parametrize('layout', ['huggingface', 'timm', 'original'])
def test_every_model_is_told_by_its_names_and_shapes(layout):
    """Of none is the memory taken: a zero of no strides stands for each tensor."""
    for name in list_models():
        if 'isotropic' in name and layout != 'original':
            continue
        model = jax.eval_shape(lambda name=name: create_model(name, key=jax.random.key(0), num_classes=3))
        zeros = {name: np.broadcast_to(np.float32(0), x.shape) for name, x in get_parameters(model).items()}
        tensors = {theirs: x.shape for theirs, x in _shapes(zeros, model.variant, layout).items()}
        empty = {theirs: np.broadcast_to(np.float32(0), shape) for theirs, shape in tensors.items()}
        assert recognize_layout(empty) == layout
        assert recognize_variant(empty, {}, None, layout) == get_variant(name)


def _shapes(parameters, variant, layout):
    from convnext_jax.interop.layouts import _outward, entries

    shapes = {name: x.shape for name, x in parameters.items()}
    return {
        theirs: _outward(parameters[ours] if block is None else parameters[ours][block], ours, variant, layout)
        for theirs, ours, block in entries(shapes, variant, layout)
    }


def test_another_patch_size_and_grey_images_survive(tmp_path):
    """The demo's model."""
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
    with pytest.raises(UserError, match='timm builds a ConvNeXt of patch_size=2 otherwise'):
        save_pretrained(model, tmp_path / 'timm', layout='timm', processor=grey)


@pytest.mark.parametrize('wrapper', ['', 'module.'])
def test_an_fcmae_encoder_becomes_dense(tmp_path, wrapper):
    """A pre-trained encoder that lost a transposition would start fine-tuning from noise."""
    model = random_model()
    save({wrapper + name: x for name, x in fcmae_state_dict(model).items()}, tmp_path / 'fcmae.safetensors')
    loaded = read_pretrained(tmp_path / 'fcmae.safetensors', num_classes=9, key=jax.random.key(0))
    assert loaded.fresh == ('norm.scale', 'norm.bias', 'head.kernel', 'head.bias')
    assert loaded.notes == ['the last norm and the head are newly initialised: the file has none']
    assert_equal(loaded.model, model, but=loaded.fresh)


def test_another_number_of_classes_has_a_fresh_head_and_says_so(tmp_path):
    model = random_model()
    save_pretrained(model, tmp_path / 'out', layout='timm')
    with pytest.raises(UserError, match='give key='):
        load_pretrained(tmp_path / 'out', num_classes=7)
    with pytest.warns(UserWarning, match='the head is newly initialised: 7 classes here, 3 in the file'):
        loaded = load_pretrained(tmp_path / 'out', num_classes=7, key=jax.random.key(3))
    assert_equal(loaded, model, but=('head.kernel', 'head.bias'))
    assert float(loaded.head.kernel[...].std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ({'num_classes': 0}, 'num_classes must be at least 1'),
        ({'drop_path_rate': -0.1}, 'drop_path_rate must be in'),
        ({'dtype': 'int8'}, "dtype must be one of .*, not 'int8'"),
    ],
)
def test_bad_arguments_are_refused_as_by_create_model(tmp_path, arguments, match):
    save_pretrained(random_model(), tmp_path / 'out')
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path / 'out', key=jax.random.key(0), **arguments)


@pytest.mark.parametrize('change', ['missing', 'unexpected', 'misshapen'])
def test_tensors_that_do_not_fit_are_listed(tmp_path, change):
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
def test_a_folder_that_timm_saves_loads(tmp_path, number):
    """Its config.json has the arguments of the model, most of which change nothing."""
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
@pytest.mark.parametrize('place', ['top', 'pretrained_cfg'])
def test_names_of_timm_may_be_a_list_or_a_dictionary(tmp_path, label_names, place):
    """timm moves them into its pretrained_cfg when it loads a folder and saves the model again."""
    save_pretrained(random_model(), tmp_path / 'out', layout='timm')
    path = tmp_path / 'out' / 'config.json'
    config = json.loads(path.read_text())
    (config if place == 'top' else config['pretrained_cfg'])['label_names'] = label_names
    path.write_text(json.dumps(config))
    assert read_pretrained(tmp_path / 'out').class_names == NAMES


def test_names_of_some_classes_are_left_out_and_it_says_so(tmp_path):
    save_pretrained(random_model(), tmp_path / 'out', layout='timm')
    path = tmp_path / 'out' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'label_names': {'0': 'cat', '7': 'emu'}}))
    with pytest.warns(UserWarning, match='does not name each of the 3 classes'):
        assert read_pretrained(tmp_path / 'out').class_names is None


def test_a_new_head_has_none_of_the_names_of_the_old(tmp_path):
    """The first two of a thousand classes are not the two of who fine-tunes."""
    save_pretrained(random_model(), tmp_path / 'out', class_names=NAMES, problem_type='multi_label_classification')
    loaded = read_pretrained(tmp_path / 'out', num_classes=2, key=jax.random.key(0))
    assert (loaded.class_names, loaded.problem_type) == (None, None)


@pytest.mark.parametrize('layout', ['huggingface', 'timm'])
def test_two_classes_may_have_one_name(tmp_path, layout):
    """ImageNet has two called crane, and two called maillot."""
    names = ('crane', 'tench', 'crane')
    save_pretrained(random_model(), tmp_path / 'out', layout=layout, class_names=names)
    assert read_pretrained(tmp_path / 'out').class_names == names
    if layout == 'huggingface':
        config = json.loads((tmp_path / 'out' / 'config.json').read_text())
        assert config['label2id'] == {'crane': 2, 'tench': 1}, 'the last, as transformers does'


@pytest.mark.parametrize('kind', [None, 'single_label_classification', 'multi_label_classification', 'regression'])
def test_the_problem_type_stays_and_where_it_cannot_a_warning_says_so(tmp_path, kind):
    """A multi-label head that is read by a softmax gives other probabilities."""
    model = random_model()
    save_pretrained(model, tmp_path / 'hf', problem_type=kind)
    loaded = read_pretrained(tmp_path / 'hf')
    assert loaded.problem_type == kind
    expected = {'multi_label_classification': 'sigmoid', 'regression': None}.get(kind, 'softmax')
    assert loaded.activation == expected
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        save_pretrained(model, tmp_path / 'timm', layout='timm', problem_type=kind)
    told = [str(warning.message) for warning in said]
    assert len(told) == (expected != 'softmax')
    assert all(line.startswith(f'timm has no place for problem_type={kind}') for line in told)


def test_a_problem_type_that_transformers_does_not_know_is_refused(tmp_path):
    model = random_model()
    for kind in ('multi-label', ['regression']):
        with pytest.raises(UserError, match='problem_type must be one of single_label_classification, '):
            save_pretrained(model, tmp_path / 'out', problem_type=kind)
    one = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=1)
    with pytest.raises(UserError, match='transformers refuses single_label_classification with one class'):
        save_pretrained(one, tmp_path / 'out', problem_type='single_label_classification')
    save_pretrained(one, tmp_path / 'out', layout='timm')
    assert read_pretrained(tmp_path / 'out').activation == 'sigmoid'
    save_pretrained(model, tmp_path / 'hf')
    path = tmp_path / 'hf' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'problem_type': 'segmentation'}))
    with pytest.raises(UserError, match='problem_type must be one of .*, not segmentation'):
        read_pretrained(tmp_path / 'hf')


def test_layer_scale_is_as_the_tensors_say(tmp_path):
    """A V1 may be trained without one, and timm trains a V2 with one; Hugging Face's V2 would drop it in silence."""
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


def test_weights_without_a_head_that_do_not_fit_say_what_does_not(tmp_path):
    """That the head is missing is then the smaller problem, and often none."""
    tensors = {name: x for name, x in state_dict(random_model(), 'timm').items() if not name.startswith('head.fc.')}
    save(tensors | {'fc.weight': np.ones((3, 320), np.float32)}, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match='do not fit the model: fc.weight is unexpected$'):
        load_pretrained(tmp_path / 'model.safetensors')


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ({'stem_type': 'overlap'}, 'stem_type=overlap in model_args changes'),
        ({'output_stride': 16}, 'output_stride=16 in model_args changes'),
        ({'global_pool': 'max'}, 'global_pool=max in model_args changes'),
        (
            {'head_hidden_size': 64, 'colour': 'red'},
            'head_hidden_size=64, colour=red in model_args changes .* not known',
        ),
        ({'depths': [2, 2, 10**9, 2]}, 'depths must be four numbers above 0'),
        ({'depths': [2, 2, 60_000, 2]}, 'tensors are too few for the depths'),
        ({'dims': 'wide'}, 'dims must be four numbers above 0, not wide'),
    ],
)
def test_arguments_of_timm_that_change_the_model_are_refused_by_name(tmp_path, arguments, match):
    save_pretrained(random_model(), tmp_path / 'out', layout='timm')
    path = tmp_path / 'out' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'model_args': arguments}))
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path / 'out')


def test_a_timm_model_that_computes_something_else_is_refused(tmp_path):
    save_pretrained(random_model(), tmp_path / 'out', layout='timm')
    path = tmp_path / 'out' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'model_args': {'act_layer': 'relu', 'norm_eps': 1e-3}}))
    with pytest.raises(UserError, match='act_layer=relu, norm_eps=0.001 in model_args changes what the model computes'):
        load_pretrained(tmp_path / 'out')


@pytest.mark.parametrize(
    ('field', 'value', 'match'),
    [
        ('model_type', 'resnet', "model_type is 'resnet'"),
        ('hidden_act', 'relu', "hidden_act is 'relu'"),
        ('depths', [2, 2, 10**9, 2], 'do not fit'),
        ('hidden_sizes', [40, 80, 160, 60_000], 'is .* not'),
        ('hidden_sizes', 'wide', 'do not fit'),
        ('layer_norm_eps', 'small', 'layer_norm_eps is small'),
        ('patch_size', 10**30, 'do not fit'),
    ],
)
def test_a_config_that_lies_is_one_line_and_takes_no_memory(tmp_path, field, value, match):
    save_pretrained(random_model(), tmp_path / 'out')
    path = tmp_path / 'out' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path / 'out')


def test_timm_has_no_place_for_another_epsilon(tmp_path):
    with pytest.warns(UserWarning, match="no place for the last norm's epsilon"):
        save_pretrained(random_model(layer_norm_eps=1e-12), tmp_path / 'out', layout='timm')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        save_pretrained(random_model(), tmp_path / 'silent', layout='timm')


@pytest.mark.parametrize('patch_size', [8, 16])
def test_timm_dilates_where_ours_strides_so_neither_takes_the_other_s(tmp_path, patch_size):
    """The tensors are the same and the numbers are not: without a word the logits would be off by their own size."""
    model = random_model('convnext_atto', patch_size=patch_size)
    with pytest.raises(UserError, match=f'timm builds a ConvNeXt of patch_size={patch_size} otherwise'):
        save_pretrained(model, tmp_path / 'out', layout='timm')
    theirs = to_layout(get_parameters(model), get_variant('convnext_atto'), 'timm')  # whose names are the same
    save({name: np.array(x) for name, x in theirs.items()}, tmp_path / 'theirs.safetensors')
    with pytest.raises(UserError, match=f'timm builds a ConvNeXt of patch_size={patch_size} otherwise'):
        load_pretrained(tmp_path / 'theirs.safetensors')


def test_a_processor_for_other_channels_is_refused(tmp_path):
    with pytest.raises(UserError, match='the processor is for 3 channels, the model for 1'):
        save_pretrained(random_model(in_channels=1), tmp_path / 'out', processor=ImageProcessor())
    with pytest.raises(UserError, match='images of 4 channels have no processor'):
        save_pretrained(random_model(in_channels=4), tmp_path / 'out')
