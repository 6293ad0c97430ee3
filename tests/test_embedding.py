"""`python -m convnext_jax embed`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shrink_models
from PIL import Image
from safetensors.numpy import load_file, save_file

from convnext_jax import __main__ as package_command
from convnext_jax import create_model
from convnext_jax.embedding import check_format, save_embeddings
from convnext_jax.errors import UserError
from convnext_jax.interop import ImageProcessor, save_pretrained
from convnext_jax.interop.layouts import LAST_NORMS
from convnext_jax.models import get_parameters, with_parameters

PROCESSOR = ImageProcessor(size=40, mean=(0.4,) * 3, std=(0.3,) * 3)


@pytest.fixture
def model(monkeypatch):
    """A small classifier with random norms."""
    shrink_models(monkeypatch)
    model = create_model('convnext_atto', num_classes=3, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    noise = {name: x + rng.normal(size=x.shape).astype(np.float32) for name, x in get_parameters(model).items()}
    return with_parameters(model, noise)


@pytest.fixture
def photos(tmp_path):
    """A folder with three photos in several folders, and one that cannot be read."""
    folder = tmp_path / 'photos'
    (folder / 'deep' / 'er').mkdir(parents=True)
    for number, name in enumerate(('b.png', 'deep/a.png', 'deep/er/c.png')):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / 'broken.png').write_bytes(b'no image')
    return folder


def features_of(model, paths, *, norm=True):
    last = model.features(jnp.asarray(PROCESSOR(paths)))['stage2'].mean((1, 2))
    return np.asarray(model.norm(last) if norm else last)


def read(path):
    if path.suffix == '.npz':
        with np.load(path, allow_pickle=False) as file:
            return list(file['path']), file['features']
    from pyarrow import parquet

    table = parquet.read_table(path)
    return table['path'].to_pylist(), np.asarray(table['features'].to_pylist(), np.float32)


@pytest.mark.parametrize('suffix', ['npz', 'parquet'])
def test_vectors_are_the_input_of_the_head_in_the_order_of_the_files(model, photos, suffix, tmp_path, capsys):
    """A search by these vectors would return the wrong photos."""
    save_pretrained(model, tmp_path / 'out', processor=PROCESSOR)
    output = tmp_path / f'vectors.{suffix}'
    extra = photos / 'deep' / 'a.png'
    arguments = (str(extra), str(photos), f'--weights={tmp_path / "out"}', f'--output={output}', '--batch=2')
    with pytest.raises(UserError, match='1 of 5 files could not be embedded'):
        package_command.main(['convnext_jax', 'embed', *arguments])
    shown = capsys.readouterr()
    assert f'skipped: {photos / "broken.png"}' in shown.err
    assert shown.out == f'{output} holds the features of 4 images, 16 numbers each\n'
    paths, features = read(output)
    assert paths == [str(photos / name) for name in ('deep/a.png', 'b.png', 'deep/a.png', 'deep/er/c.png')]
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, features_of(model, paths), rtol=1e-4, atol=1e-4)
    assert np.abs(features[0] - features[1]).max() > 0.01
    assert [path.name for path in tmp_path.iterdir() if 'partial' in path.name] == []


def test_an_encoder_without_a_norm_gives_the_average(model, photos, tmp_path, capsys):
    """The vectors of a pre-trained encoder would go through a norm that was not trained."""
    save_pretrained(model, tmp_path / 'out', layout='timm', processor=PROCESSOR, head=False)
    encoder = tmp_path / 'out' / 'model.safetensors'
    tensors = load_file(encoder)
    save_file({f'module.{name}': x for name, x in tensors.items() if not name.startswith(LAST_NORMS['timm'])}, encoder)
    output, names = tmp_path / 'vectors.npz', [str(photos / 'deep' / 'er' / 'c.png'), str(photos / 'b.png')]
    package_command.main(['convnext_jax', 'embed', *names, f'--workdir={tmp_path / "out"}', f'--output={output}'])
    assert capsys.readouterr().err.splitlines()[1:] == ["the prefix 'module.' of the names in the file is ignored"]
    paths, features = read(output)
    assert paths == names
    np.testing.assert_allclose(features, features_of(model, names, norm=False), rtol=1e-4, atol=1e-4)


def test_nothing_is_written_without_a_vector(model, photos, tmp_path, capsys):
    """An empty file would look like a result."""
    bias = get_parameters(model)['norm.bias'] + np.nan
    save_pretrained(with_parameters(model, get_parameters(model) | {'norm.bias': bias}), tmp_path / 'out')
    arguments = (str(photos / 'b.png'), f'--weights={tmp_path / "out"}', f'--output={tmp_path / "x.npz"}')
    with pytest.raises(UserError, match='1 of 1 files could not be embedded'):
        package_command.main(['convnext_jax', 'embed', *arguments])
    assert f'skipped: the features of {photos / "b.png"} are not finite' in capsys.readouterr().err
    assert not (tmp_path / 'x.npz').exists()


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        (('--output=x.npz',), '--weights is missing'),
        (('--weights=x',), '--output is missing'),
        (('--weights=x', '--output=x.csv'), '--output=x.csv must be a file name that ends in .npz or .parquet'),
        (('--weights=x', '--output=nowhere/x.npz'), 'nowhere is not a folder: create it'),
        (('--weights=x', '--workdir=x', '--output=x.npz'), 'give --weights or --workdir, not both'),
    ],
)
def test_embed_refuses_what_it_cannot_do(arguments, line):
    """The mistake would be found after all images have been read."""
    with pytest.raises(UserError, match=line):
        package_command.main(['convnext_jax', 'embed', 'README.md', *arguments])


def test_parquet_without_pyarrow_is_refused_before_the_work(tmp_path, monkeypatch):
    """Hours of computing would end in an ImportError."""
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(UserError, match='needs pyarrow: pip install pyarrow, or write an .npz file'):
        check_format(tmp_path / 'x.parquet')


def test_a_name_that_is_not_utf_8_is_refused_by_parquet_and_stored_by_npz(tmp_path):
    """The command would end in a traceback after its work."""
    name, vectors = b'\xff.png'.decode(errors='surrogateescape'), np.zeros((1, 3), np.float32)
    save_embeddings(tmp_path / 'x.npz', [name], vectors)
    assert read(tmp_path / 'x.npz')[0] == [name]
    with pytest.raises(UserError, match='the name of an image is not UTF-8'):
        save_embeddings(tmp_path / 'x.parquet', [name], vectors)
