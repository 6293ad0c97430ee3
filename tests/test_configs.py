"""All recipes, compared with golden files, so that an accidental change of a hyperparameter is found.

    python -m tests.test_configs    # rewrites tests/golden/

tests/golden/default.json has all fields, and default_TASK.json those of another task. The other files have, for each
variant, the fields that differ.
"""

import importlib
import json
from pathlib import Path

import pytest

from configs import ade20k, fcmae, finetune, imagenet22k, isotropic, v2_finetune
from convnext_jax.config import as_dict, changed_fields, check_values, default_config
from convnext_jax.errors import UserError
from convnext_jax.models import get_parameters, list_models
from convnext_jax.tasks import abstract_model, make_task

GOLDEN = Path(__file__).parent / 'golden'
VARIANTS = {
    'fashion_mnist': [None],
    'image_folder': ['atto', 'tiny'],
    'imagenet1k': ['tiny', 'small', 'base', 'large', 'xlarge', *(name for name in list_models() if 'v2' in name)],
    'isotropic': list(isotropic.DROP_PATH_RATES),
    'imagenet22k': list(imagenet22k.DROP_PATH_RATES),
    'finetune': finetune.VARIANTS,
    'v2_finetune': list(v2_finetune.RECIPES),
    'fcmae': list(fcmae.VARIANTS),
    'ade20k': list(ade20k.RECIPES),
    'masks': ['tiny', 'convnextv2_atto'],
    'shapes': [None],
}
DEFAULTS = {'default': 'classification', 'default_fcmae': 'fcmae', 'default_segmentation': 'segmentation'}
CASES = [(family, variant) for family, variants in VARIANTS.items() for variant in variants]


def build(family, variant):
    get_config = importlib.import_module(f'configs.{family}').get_config
    return get_config() if variant is None else get_config(variant)


def differences(config):
    changed = changed_fields(as_dict(default_config(config.task)), as_dict(config))
    return {field: new for field, (_, new) in changed.items()}


def golden(name):
    return json.loads((GOLDEN / f'{name}.json').read_text())


@pytest.mark.parametrize(('name', 'task'), DEFAULTS.items())
def test_defaults_equal_the_golden_file(name, task):
    """A default changes by accident, and with it every recipe."""
    assert as_dict(default_config(task)) == golden(name)


@pytest.mark.parametrize('family', VARIANTS)
def test_recipes_equal_the_golden_files(family):
    """A published recipe changes by accident, and its score is not reached."""
    ours = {str(variant): differences(build(family, variant)) for variant in VARIANTS[family]}
    assert ours == golden(family)


@pytest.mark.parametrize(('family', 'variant'), CASES)
def test_recipes_pass_the_checks_of_a_run(family, variant):
    """A typo in a recipe is found only after the data has been prepared."""
    config = build(family, variant)
    check_values(config)
    make_task(config).assume_data()
    prefix = 'backbone.' if config.task == 'segmentation' else ''
    assert f'{prefix}stem.conv.kernel' in get_parameters(abstract_model(config))
    assert config.optimizer.warmup_epochs < config.epochs
    assert config.optimizer.warmup_steps <= config.steps


@pytest.mark.parametrize(
    ('batch_size', 'learning_rate', 'family', 'variant'),
    [
        (4096, 4e-3, 'imagenet1k', 'tiny'),
        (4096, 4e-3, 'imagenet22k', 'xlarge'),
        (512, 5e-5, 'finetune', 'large_1k_384'),
        (1024, 8e-4, 'v2_finetune', 'atto'),
        (1024, 3.2e-3, 'v2_finetune', 'tiny'),
        (1024, 2.5e-3, 'v2_finetune', 'base'),
        (1024, 5e-3, 'v2_finetune', 'huge'),
        (4096, 4e-3, 'v2_finetune', 'nano_22k'),
        (512, 5e-5, 'v2_finetune', 'huge_22k_1k_512'),
        (4096, 2.4e-3, 'fcmae', 'huge'),
        (16, 1e-4, 'ade20k', 'base_22k'),
        (16, 8e-5, 'ade20k', 'xlarge'),
    ],
)
def test_the_peak_is_the_published_learning_rate(batch_size, learning_rate, family, variant):
    """A recipe does not reach its score, because papers give the rate per batch, and configs give it per 256 images."""
    config = build(family, variant)
    assert config.batch_size == batch_size
    assert config.optimizer.learning_rate * batch_size / 256 == pytest.approx(learning_rate)


@pytest.mark.parametrize('family', ['isotropic', 'imagenet22k', 'finetune', 'v2_finetune', 'fcmae', 'ade20k'])
def test_an_unknown_variant_is_refused_with_the_known_ones(family):
    """The user sees a traceback for a mistyped variant."""
    with pytest.raises(UserError, match=f"configs/{family}.py has no variant 'medium'; choose one of .*, "):
        build(family, 'medium')


def main():
    GOLDEN.mkdir(exist_ok=True)
    families = {family: {str(v): differences(build(family, v)) for v in names} for family, names in VARIANTS.items()}
    defaults = {name: as_dict(default_config(task)) for name, task in DEFAULTS.items()}
    for name, content in (defaults | families).items():
        (GOLDEN / f'{name}.json').write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
    main()
