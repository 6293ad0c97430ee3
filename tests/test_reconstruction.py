"""`python -m convnext_jax reconstruct`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shrink_models
from PIL import Image

from convnext_jax import __main__ as package_command
from convnext_jax import reconstruction
from convnext_jax.checkpoints.workdir import CHECKPOINTS, CONFIG
from convnext_jax.config import as_dict, default_config
from convnext_jax.errors import UserError
from convnext_jax.models import fcmae as models
from convnext_jax.models import get_parameters
from convnext_jax.output import to_json
from convnext_jax.tasks import make_task


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A workdir with a config, and parameters in place of its checkpoint."""
    shrink_models(monkeypatch, depths=(1, 1, 1, 1), widths=(4, 4, 4, 4))
    monkeypatch.setattr(models, 'DECODER_WIDTH', 8)
    config = default_config('fcmae')
    config.model.name, config.data.image_size = 'convnextv2_atto', 64
    workdir = tmp_path / 'run'
    (workdir / CHECKPOINTS).mkdir(parents=True)
    (workdir / CONFIG).write_text(to_json(as_dict(config)))
    parameters = get_parameters(jax.jit(make_task(config).build)(jax.random.key(0)))
    monkeypatch.setattr(reconstruction, 'newest_checkpoint', lambda workdir: (workdir / CHECKPOINTS, 5))
    monkeypatch.setattr(reconstruction, 'restore_parameters', lambda *_: jax.tree.map(jnp.asarray, parameters))
    return workdir


@pytest.mark.slow
def test_photographs_are_reconstructed_side_by_side(run, tmp_path, capsys):
    """The picture tells at a glance whether a pre-training works."""
    photos = tmp_path / 'photos'
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    for name in ('a.png', 'b.png'):
        Image.fromarray(pixels).resize((73, 73)).save(photos / name)
    (photos / 'c.png').write_bytes(b'no image')
    with pytest.raises(UserError, match='1 of 3 files could not be read'):
        package_command.main(['convnext_jax', 'reconstruct', str(photos), f'--workdir={run}'])
    shown = capsys.readouterr()
    assert shown.err.startswith('skipped: ')
    assert 'c.png' in shown.err
    paths = [run / 'reconstructions' / name for name in ('0000_a.png', '0001_b.png')]
    assert shown.out.splitlines() == list(map(str, paths))
    pictures = [np.asarray(Image.open(path)) for path in paths]
    for picture in pictures:
        assert picture.shape == (64, 3 * 64, 3)
        whole, seen, rebuilt = np.split(picture, 3, axis=1)
        visible = np.asarray([[(seen[y : y + 32, x : x + 32] != 128).any() for x in (0, 32)] for y in (0, 32)])
        assert visible.sum() == 1, '0.6 of 4 patches: one is visible'
        kept = np.kron(visible, np.ones((32, 32), bool))
        np.testing.assert_array_equal(seen[kept], whole[kept])
        assert np.abs(rebuilt[kept].astype(int) - whole[kept]).max() <= 1
        assert (rebuilt[~kept] != whole[~kept]).any()


def test_a_run_of_another_task_is_refused(tmp_path):
    """A classifier has no decoder."""
    (tmp_path / CONFIG).write_text(to_json(as_dict(default_config())))
    with pytest.raises(
        UserError, match='is a run of the task classification, but only runs of fcmae reconstruct images'
    ):
        next(reconstruction.reconstruct_photos(str(tmp_path), [tmp_path / 'a.png']))
