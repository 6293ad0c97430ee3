"""FCMAE weights in and out: the original's files with their decoder, and encoders without a head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import metadata_load
from PIL import Image
from random_models import assert_equal, fcmae_state_dict, random_model, save

from convnext_jax import __main__ as package_command
from convnext_jax import save_pretrained
from convnext_jax.config import default_config
from convnext_jax.errors import UserError
from convnext_jax.interop import read_pretrained
from convnext_jax.interop.fcmae import PARTS
from convnext_jax.interop.files import read_file
from convnext_jax.models import get_parameters, with_parameters
from convnext_jax.models.fcmae import MaskedAutoencoder, split_decoder
from convnext_jax.tasks import abstract_model, make_task
from convnext_jax.training.weights import load_weights
from tests.reference import draw_parameters


def decoder_shapes(width):
    """The original's, by its names."""
    block = {'dwconv.weight': (512, 1, 7, 7), 'pwconv1.weight': (2048, 512), 'pwconv2.weight': (512, 2048)}
    block |= {'dwconv.bias': (512,), 'norm.weight': (512,), 'norm.bias': (512,), 'pwconv2.bias': (512,)}
    block |= {'pwconv1.bias': (2048,), 'grn.gamma': (1, 1, 1, 2048), 'grn.beta': (1, 1, 1, 2048)}
    others = {'proj.weight': (512, width, 1, 1), 'proj.bias': (512,), 'mask_token': (1, 512, 1, 1)}
    others |= {'pred.weight': (3072, 512, 1, 1), 'pred.bias': (3072,)}
    return {f'decoder.0.{name}': shape for name, shape in block.items()} | others


@pytest.fixture(scope='module')
def encoder():
    return random_model()


@pytest.fixture
def file(tmp_path, encoder):
    """As the original's pre-training saves it, decoder and all."""
    decoder = draw_parameters(decoder_shapes(320))
    save(fcmae_state_dict(encoder) | decoder, tmp_path / 'fcmae.safetensors')
    return tmp_path / 'fcmae.safetensors', decoder


def start(weights, task, **facts):
    """The parameters with which a run of a task starts from weights, and the lines for the user."""
    config = default_config(task)
    config.model.name, config.init.weights = 'convnextv2_atto', str(weights)
    make_task(config).assume_data()
    shapes = get_parameters(abstract_model(config))
    initial = {name: jnp.full(x.shape, 7, x.dtype) for name, x in shapes.items()}
    loaded, notes, _ = load_weights(make_task(config), initial, facts)
    return jax.device_get(loaded), [note.replace(str(weights), 'FILE') for note in notes]


def test_somebody_else_s_pretraining_goes_on_with_its_decoder(file, encoder):
    """A decoder that starts again ruins the encoder for some epochs."""
    path, theirs = file
    loaded, notes = start(path, 'fcmae')
    assert notes == ['starts from the original weights of FILE']
    ours = get_parameters(encoder)
    parameters, decoder = split_decoder(loaded)
    for name, x in parameters.items():
        np.testing.assert_array_equal(x, ours[name], err_msg=name)
    np.testing.assert_array_equal(decoder['decoder.mask_token'], theirs['mask_token'].ravel())
    np.testing.assert_array_equal(decoder['decoder.project.kernel'], theirs['proj.weight'][:, :, 0, 0].T)
    np.testing.assert_array_equal(decoder['decoder.predict.kernel'], theirs['pred.weight'][:, :, 0, 0].T)
    np.testing.assert_array_equal(decoder['decoder.block.grn.beta'], theirs['decoder.0.grn.beta'].ravel())
    np.testing.assert_array_equal(decoder['decoder.block.pointwise1.kernel'], theirs['decoder.0.pwconv1.weight'].T)
    depthwise = theirs['decoder.0.dwconv.weight'][:, 0].transpose(1, 2, 0)
    np.testing.assert_array_equal(decoder['decoder.block.depthwise.kernel'], depthwise)
    assert decoder.keys() == PARTS.keys()


def test_fine_tuning_drops_the_decoder_and_says_so(file, encoder):
    """The user sees that the whole encoder came over, and that nothing else did."""
    loaded, notes = start(file[0], 'classification', **{'class names': [f'class {n}' for n in range(1000)]})
    assert notes == [
        'starts from the original weights of FILE',
        'the last norm and the head are newly initialised: the file has none',
        'the decoder of the pre-training is dropped',
    ]
    for name, x in get_parameters(encoder).items():
        if name.startswith(('stem', 'stages')):
            np.testing.assert_array_equal(loaded[name], x, err_msg=name)
        else:
            assert (loaded[name] == 7).all()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'decoder.1.norm.weight': np.zeros(512, np.float32)}, r'decoder\.1\.norm\.weight is unexpected'),
        (
            {'pred.weight': np.zeros((768, 512, 1, 1), np.float32)},
            r'pred\.weight is \(768, 512, 1, 1\), which does not',
        ),
        ({'proj.bias': None}, r'proj\.bias is missing'),
    ],
)
def test_another_decoder_is_refused(tmp_path, encoder, change, message):
    """In part it would start from noise without a word."""
    tensors = fcmae_state_dict(encoder) | draw_parameters(decoder_shapes(320)) | change
    save({name: x for name, x in tensors.items() if x is not None}, tmp_path / 'other.safetensors')
    with pytest.raises(UserError, match=message):
        start(tmp_path / 'other.safetensors', 'fcmae')


def test_a_classifier_can_be_pretrained_further(tmp_path, encoder):
    """Its head is dropped, its decoder is new, and the user reads both."""
    save_pretrained(encoder, tmp_path / 'out')
    loaded, notes = start(tmp_path / 'out', 'fcmae')
    assert (loaded['decoder.predict.kernel'] == 7).all()
    assert notes[-2:] == [
        'the decoder is newly initialised',
        'FCMAE has no classifier, so these are dropped: norm.scale, norm.bias, head.kernel, head.bias',
    ]


@pytest.mark.parametrize('layout', ['huggingface', 'timm'])
def test_a_file_of_the_original_is_converted_with_its_licence(file, encoder, tmp_path, capsys, layout):
    """Other libraries could not load published encoders, or users would miss their non-commercial licence."""
    path, _ = file
    (path.parent / 'README.md').write_text('---\nlicense: cc-by-nc-4.0\n---\n')
    package_command.main(['convnext_jax', 'convert', str(path), str(tmp_path / 'out'), f'--layout={layout}'])
    shown = capsys.readouterr()
    assert shown.err == 'licence of the weights: cc-by-nc-4.0 (README.md)\n'
    assert shown.out.endswith(f'(original layout), in the {layout} layout, an encoder without a head\n')
    assert metadata_load(tmp_path / 'out' / 'README.md') == {'license': 'cc-by-nc-4.0'}
    back = read_pretrained(tmp_path / 'out', num_classes=1, key=jax.random.key(0))
    ours = get_parameters(encoder)
    for name, x in get_parameters(back.model).items():
        if name.startswith(('stem', 'stages')):
            np.testing.assert_array_equal(x, ours[name], err_msg=name)
    loaded, notes = start(tmp_path / 'out', 'fcmae')
    assert 'the decoder is newly initialised' in notes
    assert (loaded['decoder.predict.kernel'] == 7).all()


def test_an_encoder_is_not_taken_for_a_classifier(file, tmp_path):
    """The user gets predictions of a random head."""
    Image.new('RGB', (32, 32)).save(tmp_path / 'photo.png')
    for command in (['predict', str(tmp_path / 'photo.png'), f'--weights={file[0]}'], ['export', str(file[0]), 'out']):
        with pytest.raises(UserError, match='has no classes: fine-tune it first'):
            package_command.main(['convnext_jax', *command])


@pytest.mark.parametrize('layout', ['huggingface', 'timm'])
@pytest.mark.parametrize('name', ['convnextv2_atto', 'convnext_atto'])
def test_encoders_go_out_without_a_head_and_come_back(tmp_path, layout, name):
    """Other libraries fine-tune what was pre-trained here."""
    config = default_config('fcmae')
    config.model.name = name
    task = make_task(config)
    shapes = {name: x.shape for name, x in get_parameters(abstract_model(config)).items()}
    drawn = {name: jnp.asarray(x) for name, x in draw_parameters(shapes).items()}
    model = jax.eval_shape(lambda key: MaskedAutoencoder(task.variant(), key=key), jax.random.key(0))
    pretrained = task.pretrained(with_parameters(model, drawn), {})
    assert not pretrained.has_head
    save_pretrained(pretrained.model, tmp_path / 'out', layout=layout, processor=pretrained.processor, head=False)
    tensors = read_file(next((tmp_path / 'out').glob('model.*'))).tensors
    assert not any('head.fc' in name or 'classifier' in name or name.startswith('head.w') for name in tensors)
    back = read_pretrained(tmp_path / 'out', num_classes=1, key=jax.random.key(0), name=name)
    assert_equal(back.model, pretrained.model, but=('head.kernel', 'head.bias'))
    assert back.newly_initialised == ('head.kernel', 'head.bias')
