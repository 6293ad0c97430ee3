"""Saved and fine-tuned weights keep their licence, because some weights must not be used commercially."""

import json

import jax
import pytest
from huggingface_hub import metadata_load
from random_models import random_model

from convnext_jax import create_backbone, save_pretrained
from convnext_jax.interop import Licence, read_pretrained
from convnext_jax.interop.licence import read_licence

DINO = '---\nlicense: other\nlicense_name: dinov3-license\nlicense_link: LICENSE.md\n---\n# A model\n'
CARDS = {
    '---\nlicense: cc-by-nc-4.0\ntags:\n- timm\n---\n': Licence('cc-by-nc-4.0', source='README.md'),
    DINO: Licence('other', 'dinov3-license', 'LICENSE.md', 'README.md'),
    '---\nlicense: [mit, apache-2.0]\n---\n': Licence('mit, apache-2.0', source='README.md'),
    '---\nlicense: 3\n---\n': None,
    '---\ntags:\n- timm\n---\n': None,
    '# My photographs\n\nlicense: mit\n': None,
}


@pytest.fixture
def folder(tmp_path):
    save_pretrained(random_model(), tmp_path / 'saved', layout='timm')
    return tmp_path / 'saved'


def set_config(folder, **fields):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | fields))


@pytest.mark.parametrize(('card', 'licence'), CARDS.items())
def test_a_model_card_states_the_licence(folder, card, licence):
    (folder / 'README.md').write_text(card)
    assert read_pretrained(folder).licence == licence


@pytest.mark.parametrize('layout', ['huggingface', 'timm'])
def test_a_saved_folder_keeps_the_licence(tmp_path, layout):
    """Users of converted weights would not know that the licence of the original weights applies."""
    licence = Licence('other', 'dinov3-license', 'https://example.org/licence')
    save_pretrained(random_model(), tmp_path / 'out', layout=layout, licence=licence)
    assert read_pretrained(tmp_path / 'out').licence == Licence(
        'other', 'dinov3-license', 'https://example.org/licence', 'README.md'
    )
    assert metadata_load(tmp_path / 'out' / 'README.md') == {
        'license': 'other',
        'license_name': 'dinov3-license',
        'license_link': 'https://example.org/licence',
    }


def test_a_saved_backbone_keeps_the_licence(tmp_path, folder):
    with pytest.warns(UserWarning, match='newly initialised'):
        backbone = create_backbone(folder)
    save_pretrained(backbone, tmp_path / 'out', licence=Licence('cc-by-nc-4.0'))
    assert metadata_load(tmp_path / 'out' / 'README.md') == {'license': 'cc-by-nc-4.0'}


def test_without_a_licence_none_is_invented(folder):
    """A model card would make a statement about the licence that nobody has made."""
    assert read_pretrained(folder).licence is None
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']


def test_the_config_of_timm_states_the_licence_where_the_card_does_not(folder):
    pretrained_cfg = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    set_config(folder, pretrained_cfg=pretrained_cfg | {'license': 'cc-by-nc-4.0'})
    assert read_pretrained(folder).licence == Licence('cc-by-nc-4.0', source='config.json')
    (folder / 'README.md').write_text('---\nlicense: apache-2.0\n---\n')
    assert read_pretrained(folder).licence == Licence('apache-2.0', source='README.md')


def test_a_licence_that_the_hub_does_not_list_is_stated_as_other(tmp_path, folder):
    """The hub would refuse the model card of weights that start from timm's copies of DINOv3."""
    pretrained_cfg = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    set_config(folder, pretrained_cfg=pretrained_cfg | {'license': 'dinov3-license'})
    licence = read_pretrained(folder).licence
    assert licence.line == 'licence of the weights: dinov3-license (config.json)'
    save_pretrained(random_model(), tmp_path / 'out', licence=licence)
    assert metadata_load(tmp_path / 'out' / 'README.md') == {
        'license': 'other',
        'license_name': 'dinov3-license',
        'license_link': 'https://ai.meta.com/resources/models-and-libraries/dinov3-license',
    }


@pytest.mark.parametrize(
    ('name', 'licence'),
    [
        ('dinov3_convnext_tiny_pretrain_lvd1689m-21b726bb.pth', 'dinov3-license'),
        ('EUPE-ConvNeXt-T.pt', 'fair-noncommercial-research-license'),
        ('eupe_convnext_tiny.pth', 'fair-noncommercial-research-license'),
        ('dinov3_convnext_tiny_of_mine.pth', None),
        ('convnext_tiny_1k_224_ema.pth', None),
    ],
)
def test_published_files_without_a_card_have_their_licence(tmp_path, name, licence):
    """Users who fine-tune the original files and upload the result would violate the licence."""
    found = read_licence(tmp_path / name, {})
    assert (found and found.identifier) == licence
    assert found is None or found.source == 'file name'


def test_a_new_head_does_not_change_the_licence(folder):
    """Fine-tuned weights, which are derived from the original weights, would lose the licence."""
    (folder / 'README.md').write_text(DINO)
    assert read_pretrained(folder, num_classes=7, key=jax.random.key(0)).licence.name == 'dinov3-license'


@pytest.mark.parametrize('content', [b'---\nlicense: [\n---\n', b'---\n- mit\n---\n', b'---\nlicense: \xff\n---\n'])
def test_a_damaged_card_is_reported_and_the_weights_load(folder, content):
    """A model card with a syntax error would prevent the use of undamaged weights."""
    (folder / 'README.md').write_bytes(content)
    with pytest.warns(UserWarning, match=r'README.md cannot be read, so its licence is unknown'):
        assert read_pretrained(folder).licence is None


def test_the_line_says_what_the_licence_is_called_and_where_it_is_stated():
    """A name from a file could print misleading lines of output."""
    assert Licence('cc-by-nc-4.0', source='README.md').line == 'licence of the weights: cc-by-nc-4.0 (README.md)'
    assert Licence('other', 'dinov3-license').line == 'licence of the weights: dinov3-license'
    assert '\n' not in Licence('mit\nfree').line
