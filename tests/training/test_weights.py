"""Weights from which a run starts, or which are evaluated."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convnext_jax import create_model, save_pretrained
from convnext_jax.checkpoints.checkpoint import read_about, restore_parameters
from convnext_jax.commands.eval import main as evaluate_command
from convnext_jax.config import default_config
from convnext_jax.errors import UserError
from convnext_jax.models import get_parameters, parameter_roles
from convnext_jax.tasks import make_task
from convnext_jax.training import standalone_evaluation
from convnext_jax.training.sharding import make_mesh, parameter_shardings
from convnext_jax.training.standalone_evaluation import EvaluationProtocol, evaluate_weights
from convnext_jax.training.weights import load_weights, newest_checkpoint


def load(weights, initial, names, head='match'):
    config = default_config()
    config.init.weights, config.init.head = str(weights), head
    return load_weights(make_task(config), initial, {'class names': names})[:2]


@pytest.mark.parametrize(
    ('classes', 'kind', 'called'),
    [
        (3, 'multi_label_classification', 'multi_label_classification, with 3 output'),
        (3, 'regression', 'regression, with 3 output'),
        (1, None, 'independent sigmoid outputs, with 1 output'),
    ],
)
def test_heads_without_a_softmax_are_not_trained_or_evaluated_as_softmax_heads(tmp_path, classes, kind, called):
    """A multi-label or regression model would get a meaningless top-1 accuracy."""
    model = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=classes)
    save_pretrained(model, tmp_path / 'out', problem_type=kind)
    with pytest.raises(UserError, match=f'the head of .*out is for {called}'):
        # The error comes before the data is opened.
        next(evaluate_weights(default_config(), str(tmp_path / 'out'), 'raw', EvaluationProtocol()))
    mine = get_parameters(create_model('convnextv2_atto', key=jax.random.key(1), num_classes=classes))
    with pytest.raises(
        UserError, match=f'the head of .*out is for {called}.*--config.init.head=new for a newly initialised head'
    ):
        load(tmp_path / 'out', mine, list('abc')[:classes])
    loaded, notes = load(tmp_path / 'out', mine, list('abc')[:classes], head='new')
    np.testing.assert_array_equal(loaded['head.kernel'], mine['head.kernel'])
    assert notes[-1] == 'the head is newly initialised'
    other = get_parameters(create_model('convnextv2_atto', key=jax.random.key(1), num_classes=5))
    loaded, notes = load(tmp_path / 'out', other, list('abcde'))
    assert loaded['head.bias'].shape == (5,)
    assert 'the head is newly initialised' in notes[-1]


def test_rgb_weights_start_a_run_on_greyscale_images(tmp_path):
    """Fine-tuning on greyscale images would need a conversion of the weights first."""
    old = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=2)
    save_pretrained(old, tmp_path / 'out', class_names=['ant', 'bee'])
    initial = get_parameters(create_model('convnextv2_atto', key=jax.random.key(1), num_classes=2, in_channels=1))
    loaded, notes = load(tmp_path / 'out', initial, ['ant', 'bee'])
    rgb = np.asarray(get_parameters(old)['stem.conv.kernel'])
    np.testing.assert_allclose(loaded['stem.conv.kernel'], rgb.sum(2, keepdims=True), atol=1e-7)
    assert 'the stem is adapted from RGB to 1 channel(s): its kernels are summed' in notes


def test_resolution_test_uses_the_size_and_crop_of_timm_s_config(tmp_path, monkeypatch):
    """The accuracy that timm publishes could not be reproduced."""
    seen = []
    result = {'data': 'imagenet2012', 'split': 'validation'}
    monkeypatch.setattr(standalone_evaluation, '_evaluate', lambda config, *_: seen.append(config) or iter([result]))
    save_pretrained(
        create_model('convnextv2_atto', key=jax.random.key(0), num_classes=2), tmp_path / 'out', layout='timm'
    )
    evaluate = ['eval.py', '--config=configs/imagenet1k.py:tiny', f'--weights={tmp_path / "out"}', '--resolution=test']
    with pytest.raises(UserError, match='--resolution=test: .*out states no test size; give a number of pixels'):
        evaluate_command(evaluate)
    path = tmp_path / 'out' / 'config.json'
    config = json.loads(path.read_text())
    config['pretrained_cfg'] |= {'test_input_size': [3, 288, 288], 'test_crop_pct': 0.95}
    path.write_text(json.dumps(config))
    evaluate_command(evaluate)
    evaluate_command([*evaluate, '--crop_pct=1.0'])
    evaluate_command(evaluate[:-1])
    assert [(c.data.image_size, c.data.crop_pct) for c in seen] == [(288, 0.95), (288, 1.0), (224, 0.875)]
    for resolution in ('tests', '0', '-3', '2.5'):
        with pytest.raises(UserError, match=f'--resolution={resolution} must be a number of pixels'):
            evaluate_command([*evaluate[:-1], f'--resolution={resolution}'])


def test_outputs_of_the_head_follow_their_class_names(tmp_path):
    """Fine-tuning on equally many different classes would keep wrong outputs, with a loss far above ln(classes)."""
    old = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=3)
    save_pretrained(old, tmp_path / 'out', class_names=['ant', 'bee', 'cat'])
    initial = get_parameters(create_model('convnextv2_atto', key=jax.random.key(1), num_classes=3))
    initial['head.bias'] += 1
    loaded, notes = load(tmp_path / 'out', initial, ['bee', 'cat', 'dog'])
    theirs = get_parameters(old)
    for name in ('head.kernel', 'head.bias'):
        np.testing.assert_array_equal(loaded[name][..., :2], theirs[name][..., 1:])
        np.testing.assert_array_equal(loaded[name][..., 2], initial[name][..., 2])
    np.testing.assert_array_equal(loaded['stem.conv.kernel'], theirs['stem.conv.kernel'])
    assert notes[-1] == 'the head keeps the outputs of 2 of 3 classes; newly initialised: dog'


def test_the_head_of_a_run_is_matched_by_class_names(finished_run):
    """Fine-tuning from a run would mix up the classes: here they are in another order, and one is new."""
    directory, step = newest_checkpoint(finished_run)
    theirs = restore_parameters(directory, step, 'parameters')
    names = read_about(directory, step)['data']['class names']
    initial = {name: jnp.zeros_like(x) for name, x in theirs.items()}
    initial |= {name: jnp.zeros((*initial[name].shape[:-1], 11)) for name in ('head.kernel', 'head.bias')}
    loaded, notes = load(finished_run, initial, ['new', *reversed(names)])
    assert notes == [
        f'starts from the raw weights of {finished_run}, step {step}',
        'the head keeps the outputs of 10 of 11 classes; newly initialised: new',
    ]
    np.testing.assert_array_equal(loaded['head.kernel'][:, 1:], theirs['head.kernel'][:, ::-1])
    assert not loaded['head.kernel'][:, 0].any()


def test_sharded_heads_keep_their_sharding(tmp_path):
    """With mesh.fsdp, a large head would be replicated on every device while its classes are matched."""
    old = create_model('convnextv2_atto', key=jax.random.key(0), num_classes=128)
    save_pretrained(old, tmp_path / 'out', class_names=[f'old {label}' for label in range(128)])
    mesh = make_mesh(fsdp=8)
    parameters = get_parameters(old)
    initial = jax.device_put(parameters, parameter_shardings(mesh, parameter_roles(old), parameters))
    loaded, _ = load(tmp_path / 'out', initial, ['new', *(f'old {label}' for label in range(127))])
    assert 'fsdp' in loaded['head.kernel'].sharding.spec
    assert {name: x.sharding for name, x in loaded.items()} == {name: x.sharding for name, x in initial.items()}
    np.testing.assert_array_equal(loaded['head.kernel'][:, 1:], get_parameters(old)['head.kernel'][:, :127])
