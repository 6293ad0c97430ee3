"""Weights come in from each library and go out to it without a bit of difference, or not at all."""

import json
import warnings

import jax
import numpy as np
import pytest
from random_models import assert_equal, random_model, state_dict

from convnext_jax import load_pretrained, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, read_pretrained
from convnext_jax.interop.recognition import recognize_layout, recognize_variant
from convnext_jax.models import ConvNeXt, create_model, get_parameters, get_variant, list_models

torch = pytest.importorskip('torch', reason='torch is a development requirement')

NAMES = ('cat', 'dog', 'emu')
BOUND = 2e-5  # of the reference's standard deviation, float32


def logits_differ(model: ConvNeXt, reference) -> float:
    x = np.random.default_rng(2).normal(size=(2, 64, 96, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    theirs = getattr(theirs, 'logits', theirs).numpy()
    return float(np.abs(jax.jit(lambda model, x: model(x))(model, x) - theirs).max() / theirs.std())


@pytest.mark.parametrize('layout', ['huggingface', 'timm', 'original'])
@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto', 'convnext_tiny'])
def test_round_trip_is_bit_exact(tmp_path, name, layout):
    model = random_model(name)
    save_pretrained(model, tmp_path / 'out', layout=layout, class_names=NAMES)
    loaded = read_pretrained(tmp_path / 'out')
    assert_equal(loaded.model, model)
    assert (loaded.layout, loaded.notes, loaded.fresh) == (layout, [], ())
    if layout != 'original':
        assert loaded.class_names == NAMES


def test_isotropic_round_trip(tmp_path):
    model = random_model('convnext_isotropic_small')
    save_pretrained(model, tmp_path / 'out', layout='original')
    assert_equal(load_pretrained(tmp_path / 'out' / 'model.pth'), model)
    with pytest.raises(UserError, match='timm library has no isotropic'):
        save_pretrained(model, tmp_path / 'other', layout='timm')


@pytest.mark.parametrize('name', ['convnext_tiny', 'convnextv2_atto'])
def test_transformers_loads_what_we_save_and_we_load_what_it_saves(tmp_path, name):
    transformers = pytest.importorskip('transformers')
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


def test_a_hugging_face_model_without_a_head_takes_a_fresh_one(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.ConvNextV2Config(depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320])
    transformers.ConvNextV2Model(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match='has no head: load_pretrained\\(…, num_classes=, key=\\) initialises one'):
        load_pretrained(tmp_path)
    with pytest.warns(UserWarning, match='the head is newly initialised: the file has none'):
        model = load_pretrained(tmp_path, num_classes=3, key=jax.random.key(0))
    assert model.head.bias.shape == (3,)


@pytest.mark.parametrize('name', ['convnext_atto', 'convnext_tiny', 'convnextv2_atto'])
def test_timm_loads_what_we_save_as_a_folder_and_as_a_file(tmp_path, name):
    timm = pytest.importorskip('timm')
    model = random_model(name)
    save_pretrained(model, tmp_path / 'out', layout='timm', class_names=NAMES)
    folder = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    file = timm.create_model(name, num_classes=3, checkpoint_path=str(tmp_path / 'out' / 'model.safetensors')).eval()
    assert logits_differ(model, folder) < BOUND
    assert logits_differ(model, file) < BOUND
    assert folder.pretrained_cfg['label_names'] == list(NAMES)
    assert folder.pretrained_cfg['crop_pct'] == 0.875
    assert_equal(load_pretrained(tmp_path / 'out' / 'model.safetensors', name=f'{name}.fb_in1k'), model)


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
    transformers = pytest.importorskip('transformers')
    model = random_model('convnextv2_atto', patch_size=2, in_channels=1)
    grey = ImageProcessor(size=32, crop_pct=1.0, mean=(0.3,), std=(0.4,))
    x = np.random.default_rng(2).normal(size=(2, 32, 48, 1)).astype(np.float32)
    ours = jax.jit(lambda model, x: model(x))(model, x)
    for layout in ('huggingface', 'original'):
        save_pretrained(model, tmp_path / layout, layout=layout, processor=grey)
        loaded = read_pretrained(tmp_path / layout)
        assert_equal(loaded.model, model)
        assert loaded.model.variant.patch_size == 2
        assert layout == 'original' or loaded.processor == grey
    judge = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'huggingface').eval()
    theirs = judge(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).logits.detach().numpy()
    assert np.abs(ours - theirs).max() / theirs.std() < BOUND
    with pytest.raises(UserError, match='timm builds a ConvNeXt of patch_size=2 otherwise'):
        save_pretrained(model, tmp_path / 'timm', layout='timm', processor=grey)


def test_original_files_hold_raw_and_average_weights(tmp_path):
    raw, average = random_model(), create_model('convnextv2_atto', key=jax.random.key(5), num_classes=3)
    torch.save({'model': state_dict(raw), 'model_ema': state_dict(average), 'epoch': 7}, tmp_path / 'both.pth')
    assert_equal(load_pretrained(tmp_path / 'both.pth'), raw)
    assert_equal(load_pretrained(tmp_path / 'both.pth', entry='model_ema'), average)
    torch.save(state_dict(raw), tmp_path / 'bare.bin')
    assert_equal(load_pretrained(tmp_path / 'bare.bin'), raw)
    with pytest.raises(UserError, match="holds one set of weights: there is no 'model_ema' to choose"):
        load_pretrained(tmp_path / 'bare.bin', entry='model_ema')


@pytest.mark.parametrize('wrapper', ['', 'module.'])
def test_an_fcmae_encoder_becomes_dense(tmp_path, wrapper):
    """Sparse kernels count their places column by column, as the original's remap_checkpoint_keys undoes it."""
    model = random_model()
    sparse = {}
    for name, x in state_dict(model).items():
        if name.startswith(('norm.', 'head.')):
            continue
        module, parameter = name.rsplit('.', 1)
        name = f'encoder.{name}'
        if module.endswith('dwconv') and parameter == 'weight':
            sparse[f'encoder.{module}.kernel'] = x[:, 0].permute(2, 1, 0).reshape(49, -1)
        elif module.startswith('downsample_layers.') and module[18] != '0' and x.ndim == 4:
            sparse[f'encoder.{module}.kernel'] = x.permute(3, 2, 1, 0).reshape(4, x.shape[1], x.shape[0])
        elif 'pwconv' in module:
            sparse[f'encoder.{module}.linear.{parameter}'] = x
        elif module.startswith('stages') and module.endswith('norm'):
            sparse[f'encoder.{module}.ln.{parameter}'] = x
        elif 'grn' in module:
            sparse[name] = x.reshape(1, -1)
        else:
            sparse[name] = x
    sparse['mask_token'] = torch.zeros(1, 2, 1, 1)
    torch.save({'model': {wrapper + name: x for name, x in sparse.items()}}, tmp_path / 'fcmae.pt')
    loaded = read_pretrained(tmp_path / 'fcmae.pt', num_classes=9, key=jax.random.key(0))
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
        tensors['stages.1.0.gamma'] = torch.ones(80)
        match = 'stages.1.0.gamma is unexpected'
    else:
        tensors['stages.0.0.pwconv1.bias'] = torch.ones(161)
        match = r'stages.0.0.pwconv1.bias is \(161,\), not \(160,\)'
    torch.save({'model': tensors}, tmp_path / 'model.pth')
    with pytest.raises(UserError, match=match):
        load_pretrained(tmp_path / 'model.pth')


def randomize(reference):
    """A model of torch whose every parameter matters in its output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in reference.named_parameters():
            mean = float('norm' in name and name.endswith('weight'))
            scale = 0.3 if x.ndim < 2 else x[0].numel() ** -0.5
            x.copy_(mean + scale * torch.randn(x.shape, generator=generator))
    return reference.eval()


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('convnext_nano', {}),
        ('convnext_tiny', {'patch_size': 7, 'drop_path_rate': 0.1, 'ls_init_value': 1e-5, 'norm_eps': 1e-6}),
        ('convnext_atto', {'conv_mlp': False, 'global_pool': 'fast', 'output_stride': 32, 'kernel_sizes': (7,) * 4}),
        ('convnext_pico', {'depths': (1, 1, 2, 1), 'dims': (24, 48, 96, 192), 'head_init_scale': 0.1}),
        ('convnextv2_atto', {'drop_rate': 0.2, 'act_layer': 'gelu', 'norm_layer': 'layernorm2d'}),
        ('convnextv2_tiny', {'depths': (1, 1, 1, 1), 'conv_mlp': True, 'ls_init_value': 1e-6}),
        ('convnext_femto', {'use_grn': True}),
    ],
    ids=str,
)
def test_a_folder_that_timm_saves_loads(tmp_path, name, arguments):
    """Its config.json has the arguments of the model, most of which change nothing."""
    timm = pytest.importorskip('timm')
    theirs = randomize(timm.create_model(name, num_classes=3, **arguments))
    timm.models.save_for_hf(theirs, tmp_path, model_config={'label_names': list(NAMES)}, safe_serialization=True)
    assert json.loads((tmp_path / 'config.json').read_text())['model_args'], 'this timm writes no arguments'
    loaded = read_pretrained(tmp_path)
    assert logits_differ(loaded.model, theirs) < BOUND
    assert loaded.class_names == NAMES


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
    for layout in ('timm', 'original'):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            save_pretrained(model, tmp_path / layout, layout=layout, problem_type=kind)
        told = [str(warning.message) for warning in said]
        assert len(told) == (expected != 'softmax')
        assert all(line.startswith(f'{layout} has no place for problem_type={kind}') for line in told)


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
    save_pretrained(without, tmp_path / 'out', layout='original')
    assert_equal(load_pretrained(tmp_path / 'out'), without)
    with pytest.raises(UserError, match=r'timm has no name for a ConvNeXt of depths .* without layer scale'):
        save_pretrained(without, tmp_path / 'timm', layout='timm')
    scaled = random_model('convnextv2_atto', layer_scale_init=1e-6)
    torch.save(state_dict(scaled, 'timm'), tmp_path / 'scaled.pth')
    assert_equal(load_pretrained(tmp_path / 'scaled.pth'), scaled)
    with pytest.raises(UserError, match="Hugging Face's ConvNeXt V2 has no layer scale"):
        save_pretrained(scaled, tmp_path / 'hf')


def test_weights_without_a_head_that_do_not_fit_say_what_does_not(tmp_path):
    """That the head is missing is then the smaller problem, and often none."""
    tensors = {name: x for name, x in state_dict(random_model(), 'timm').items() if not name.startswith('head.fc.')}
    torch.save(tensors | {'fc.weight': torch.ones(3, 320)}, tmp_path / 'model.pth')
    with pytest.raises(UserError, match='do not fit the model: fc.weight is unexpected$'):
        load_pretrained(tmp_path / 'model.pth')


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
    timm = pytest.importorskip('timm')
    with pytest.raises(UserError, match=f'timm builds a ConvNeXt of patch_size={patch_size} otherwise'):
        save_pretrained(random_model('convnext_atto', patch_size=patch_size), tmp_path / 'out', layout='timm')
    theirs = timm.create_model('convnext_atto', patch_size=patch_size, num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
    with pytest.raises(UserError, match=f'timm builds a ConvNeXt of patch_size={patch_size} otherwise'):
        load_pretrained(tmp_path / 'theirs.pth')


def test_a_processor_for_other_channels_is_refused(tmp_path):
    with pytest.raises(UserError, match='the processor is for 3 channels, the model for 1'):
        save_pretrained(random_model(in_channels=1), tmp_path / 'out', processor=ImageProcessor())
    with pytest.raises(UserError, match='images of 4 channels have no processor'):
        save_pretrained(random_model(in_channels=4), tmp_path / 'out')
