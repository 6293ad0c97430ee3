"""create_backbone, compared with the feature maps of transformers and timm in `tests/reference`."""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax import Backbone, create_backbone, create_model, save_pretrained
from convnext_jax.errors import UserError
from convnext_jax.interop.layouts import to_layout
from convnext_jax.models import Variant, get_parameters, get_variant, with_parameters
from tests import reference
from tests.reference import cases

BOUND = 2e-5  # in standard deviations of the reference, for float32


def random_backbone(name='convnextv2_atto', **arguments):
    """A backbone whose parameters are all random and large enough to matter."""
    return randomized(jax.eval_shape(lambda key: create_backbone(name, key=key, **arguments), jax.random.key(0)))


def randomized(model):
    drawn = reference.draw_parameters({name: x.shape for name, x in get_parameters(model).items()})
    return with_parameters(model, jax.tree.map(jnp.asarray, drawn))


def images(height, width):
    return cases.images((height, width))


def largest_difference(maps, case):
    """The largest difference over all features of a case, in standard deviations of the stored values."""
    arrays = reference.arrays('backbones')
    stored = {key.rpartition('/')[2]: x for key, x in arrays.items() if key.rpartition('/')[0] == case}
    assert set(maps) == set(stored) - {'strides', 'channels'}
    differences = {feature: reference.difference(x, stored[feature]) for feature, x in maps.items()}
    print(case, differences)
    return max(differences.values())


call = jax.jit(lambda backbone, x: backbone(x))


@pytest.mark.parametrize('name', cases.BACKBONES)
def test_equals_the_backbone_of_transformers(name):
    """Detectors trained on Hugging Face's backbone would get other maps; 100×143 is not a multiple of any stride."""
    backbone = random_backbone(name, out_features=cases.BACKBONE_FEATURES)
    assert largest_difference(call(backbone, cases.images(cases.ODD_SIZE)), name) < BOUND


def test_a_backbone_folder_of_transformers_loads(tmp_path):
    """Features or norms of the folder would be ignored."""
    from safetensors.numpy import save_file

    stored = reference.table('hugging_face_folders')['backbone']
    for name, content in stored['files'].items():
        (tmp_path / name).write_text(json.dumps(content))
    tensors = {name: cases.foreign_tensor(name, tuple(shape)) for name, shape in stored['shapes'].items()}
    save_file(tensors, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    backbone = create_backbone(tmp_path)
    assert backbone.out_features == cases.BACKBONE_FEATURES
    back = to_layout(jax.device_get(get_parameters(backbone)), backbone.variant, 'huggingface')
    back = {name.removeprefix('convnextv2.'): x for name, x in back.items()}  # a backbone is not part of a classifier
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize(('name', 'patch_size', 'output_stride'), cases.DILATED)
def test_dilated_stages_equal_timm(name, patch_size, output_stride):
    """A wrong dilation or padding would shift every segmentation mask."""
    variant = get_variant(name).replace(patch_size=patch_size)
    backbone = random_backbone(variant, output_stride=output_stride)
    maps = jax.jit(lambda backbone, x: backbone.features(x))(backbone, cases.images(cases.ODD_SIZE))
    maps.pop('stem')
    case = f'{name}/{patch_size}/{output_stride}'
    assert largest_difference(maps, case) < BOUND
    stored = reference.arrays('backbones')
    assert [backbone.strides[feature] for feature in maps] == stored[f'{case}/strides'].tolist()
    assert [backbone.channels[feature] for feature in maps] == stored[f'{case}/channels'].tolist()


@pytest.mark.parametrize('layout', ['huggingface', 'timm'])
def test_a_classifier_folder_gives_a_backbone_with_new_norms_and_a_warning(tmp_path, layout):
    """Users would not notice that the norms are untrained."""
    model = randomized(create_model('convnext_atto', key=jax.random.key(0), num_classes=3))
    save_pretrained(model, tmp_path / 'out', layout=layout)
    with pytest.warns(UserWarning, match='the norms of stage1, stage3 are newly initialised: the file has none'):
        backbone = create_backbone(tmp_path / 'out', out_features=('stage3', 'stage1'), output_stride=8)
    assert backbone.out_features == ('stage1', 'stage3'), 'in the order of computation'
    trunk = get_parameters(model)
    for name, value in get_parameters(backbone).items():
        expected = trunk.get(name, np.full(value.shape, name.endswith('scale'), np.float32))
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_other_features_of_a_backbone_folder(tmp_path):
    """Trained norms would be lost, or unused ones be an error."""
    backbone = random_backbone(out_features=('stage1', 'stage2'))
    save_pretrained(backbone, tmp_path / 'out')
    with pytest.warns(UserWarning, match='the norms of stage4 are newly initialised'):
        other = create_backbone(tmp_path / 'out', out_features=('stage2', 'stage4'))
    assert set(other.norms) == {'stage2', 'stage4'}
    np.testing.assert_array_equal(other.norms['stage2'].scale, backbone.norms['stage2'].scale)


def test_a_wrapped_backbone_loads(tmp_path):
    """Backbones inside a detector or segmentation model could not be loaded."""
    from safetensors.numpy import load_file, save_file

    backbone = random_backbone(out_features=('stage1', 'stage2'))
    save_pretrained(backbone, tmp_path / 'out')
    file = tmp_path / 'out' / 'model.safetensors'
    save_file({f'model.backbone.{name}': x for name, x in load_file(file).items()}, file)
    again = create_backbone(tmp_path / 'out')
    for name, value in get_parameters(backbone).items():
        np.testing.assert_array_equal(value, get_parameters(again)[name], err_msg=name)


def test_tensors_that_do_not_match_are_listed(tmp_path):
    """A part of the backbone would silently keep its initial weights."""
    from safetensors.numpy import load_file, save_file

    save_pretrained(random_backbone(), tmp_path / 'out')
    file = tmp_path / 'out' / 'model.safetensors'
    tensors = load_file(file)
    tensors['extra'] = tensors.pop('hidden_states_norms.stage2.bias')
    tensors['hidden_states_norms.stage1.weight'] = tensors['hidden_states_norms.stage1.weight'][:-1]
    save_file(tensors, file)
    listed = r'stage1.weight is \(39,\), not \(40,\); .*stage2.bias is missing; extra is unexpected'
    with pytest.raises(UserError, match=listed):
        create_backbone(tmp_path / 'out')


def test_every_parameter_has_a_gradient_and_keys_drop_paths():
    """A part of the backbone would not be trained."""
    backbone = random_backbone(Variant((2, 2), (8, 16), grn=True), output_stride=4, drop_path_rate=0.5)
    x = images(32, 32)

    def loss(backbone, key):
        return sum(jnp.square(x).sum() for x in backbone(images(32, 32), key=key).values())

    value, gradients = jax.jit(jax.value_and_grad(loss))(backbone, jax.random.key(0))
    assert np.isfinite(value)
    assert all((np.abs(x).max() > 0) for x in get_parameters(gradients).values())
    assert value != jax.jit(loss)(backbone, jax.random.key(1))
    assert max(np.abs(a).max() for a in call(backbone, x).values()) > 0


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ({'source': 'convnext_tinny'}, "there is no model 'convnext_tinny': did you mean convnext_tiny"),
        ({'key': None}, 'pass key='),
        ({'out_features': ('stage5',)}, r"out_features must be one or more of \('stem', 'stage1'"),
        ({'out_features': 'stage1'}, 'out_features must be one or more of'),
        ({'out_features': ()}, 'out_features must be one or more of'),
        ({'output_stride': 12}, r'output_stride must be one of \(4, 8, 16, 32\), not 12'),
        ({'output_stride': 8.0}, r'output_stride must be one of \(4, 8, 16, 32\), not 8.0'),
        ({'out_features': 5}, 'out_features must be one or more of'),
        ({'out_features': [['stage1']]}, 'out_features must be one or more of'),
        ({'source': 'x' * 5000}, 'is not a path'),
        ({'source': 'nope.safetensors'}, 'nope.safetensors is not a file, a folder'),
        ({'output_stride': 0}, r'output_stride must be one of \(4, 8, 16, 32\), not 0'),
        ({'dtype': 'int8'}, 'dtype must be one of'),
    ],
)
def test_bad_arguments(no_shape_checks, arguments, match):
    """A bad value would cause an obscure error, not one line that names it."""
    options = {'source': 'convnext_atto', 'key': jax.random.key(0)} | arguments
    with pytest.raises(UserError, match=match):
        create_backbone(options.pop('source'), **options)


def test_backbones_that_other_libraries_do_not_support_are_not_written(tmp_path):
    """The other library could not load the folder, or would compute other maps."""
    with pytest.raises(UserError, match='can only be saved in the huggingface layout'):
        save_pretrained(random_backbone(), tmp_path / 'a', layout='timm')
    with pytest.raises(UserError, match='no backbone of output_stride=16'):
        save_pretrained(random_backbone(output_stride=16), tmp_path / 'b')
    assert not list(tmp_path.iterdir())


def test_features_may_be_an_iterator():
    """A generator would be empty after the first check."""
    assert random_backbone(out_features=(f'stage{i}' for i in (1, 2))).out_features == ('stage1', 'stage2')


def test_a_folder_with_the_name_of_a_model(tmp_path, monkeypatch):
    """The weights in ./convnext_atto would be ignored, and the backbone be random."""
    monkeypatch.chdir(tmp_path)
    backbone = random_backbone(Variant((1, 1), (8, 16)))
    save_pretrained(backbone, 'convnext_atto')
    for path in (Path('convnext_atto'), './convnext_atto', tmp_path / 'convnext_atto'):
        assert create_backbone(path, key=jax.random.key(0)).variant.depths == (1, 1)
    with pytest.raises(UserError, match='to load a folder, pass ./convnext_atto'):
        create_backbone('convnext_atto')


@pytest.mark.parametrize(
    ('features', 'expected'),
    [(['stage2'], ('stage2',)), (None, ('stem', 'stage1', 'stage2')), (['stage9'], None), (5, None)],
)
def test_the_config_determines_the_default_features(no_shape_checks, tmp_path, features, expected):
    """A detector would get other feature maps than with Hugging Face."""
    save_pretrained(random_backbone(out_features=('stem', 'stage1', 'stage2')), tmp_path / 'out')
    path = tmp_path / 'out' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'out_features': features}))
    if expected:
        assert create_backbone(tmp_path / 'out').out_features == expected
    else:
        with pytest.raises(UserError, match='out_features must be one or more of'):
            create_backbone(tmp_path / 'out')


def test_new_norms_are_float32(tmp_path):
    """With a weak type the training step would be compiled twice, or be float64 with x64 enabled."""
    save_pretrained(create_model('convnext_atto', key=jax.random.key(0)), tmp_path / 'out')
    with pytest.warns(UserWarning, match='are newly initialised'):
        backbone = create_backbone(tmp_path / 'out')
    assert all(x.dtype == jnp.float32 and not x.weak_type for x in get_parameters(backbone).values())


def test_a_greyscale_v1_without_layer_scale_round_trips(tmp_path):
    """The config would describe another architecture."""
    variant = Variant((1, 1), (8, 16), patch_size=2, layer_scale_init=0)
    backbone = Backbone(variant, key=jax.random.key(0), out_features=('stage2',), in_channels=1)
    save_pretrained(backbone, tmp_path / 'out')
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['num_channels'] == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = create_backbone(tmp_path / 'out')
    assert again.variant == variant
    assert again(jnp.ones((1, 9, 5, 1)))['stage2'].shape == (1, 2, 1, 16)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['layer_scale_init_value'] == 0
