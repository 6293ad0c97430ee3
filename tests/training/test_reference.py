"""A training run compared with torch: timm's model and parameter groups, torch's AdamW, the published learning rates.

Augmentation and drop path are off because their random numbers differ; everything else follows the recipe. The values
of torch are stored in `tests/reference`.
"""

import jax
import numpy as np
import optax
import pytest

from convnext_jax.checkpoints.state import initial_state
from convnext_jax.config import default_config
from convnext_jax.interop.layouts import to_layout
from convnext_jax.models import get_parameters, get_variant, parameter_roles
from convnext_jax.tasks import abstract_model, make_task
from convnext_jax.training.optimizer import adamw, cosine_schedule, layer_factors
from convnext_jax.training.sharding import make_mesh
from convnext_jax.training.step import make_train_step
from tests import reference
from tests.reference import cases

RUN = cases.Training


def our_run(config):
    """The losses; and the first gradient, the final parameters and their average, under the names of this package."""
    model = abstract_model(config)
    parameters = reference.draw_parameters({name: x.shape for name, x in get_parameters(model).items()})
    optimizer = adamw(
        layer_factors(list(parameters), model.variant.depths, 'single', RUN.LAYER_DECAY),
        parameter_roles(model),
        weight_decay=RUN.DECAY,
    )
    schedule = cosine_schedule(RUN.PEAK, RUN.MINIMUM, RUN.WARMUP, RUN.STEPS)
    mesh = make_mesh(devices=jax.devices()[:1])
    step = jax.jit(make_train_step(make_task(config), model, optimizer, schedule, config, RUN.STEPS, mesh))
    state = jax.jit(lambda parameters: initial_state(parameters, optimizer, ema=True))(parameters)
    losses, gradient = [], None
    for batch in RUN.batches():
        state, metrics = step(state, batch)
        losses.append(float(metrics['loss']))
        if gradient is None:  # after one step the first moment is a tenth of the gradient
            mean = next(part.mu for part in state.optimizer if isinstance(part, optax.ScaleByAdamState))
            gradient = jax.tree.map(lambda x: 10 * np.asarray(x), mean)
    return losses, {'gradient': gradient, 'parameters': state.parameters, 'average': state.ema}


@pytest.mark.slow
@pytest.mark.parametrize('name', cases.TRAINED)
def test_thirty_steps_follow_torch(name):
    """A small error in decay mask, layer decay, schedule, bias correction or average would change every recipe."""
    config = default_config()
    config.model.name = name
    config.model.num_classes = RUN.CLASSES
    config.data.image_size = RUN.SIZE
    config.augment.flip = False
    config.augment.policy = ''
    config.augment.erasing = 0.0
    config.label_smoothing = RUN.SMOOTHING
    config.ema.decay = RUN.EMA
    losses, found = our_run(config)
    stored = {key.split('/')[1]: x for key, x in reference.arrays('training').items() if key.startswith(f'{name}/')}
    their_losses = stored['losses']
    difference = np.abs(losses / their_losses - 1).max()
    print(name, 'loss', losses[0], losses[-1], 'largest relative difference', difference)
    assert difference < 1e-4
    assert losses[-1] < losses[0] - 0.1

    tensors = {
        kind: {
            tensor: np.asarray(x) for tensor, x in to_layout(jax.device_get(arrays), get_variant(name), 'timm').items()
        }
        for kind, arrays in found.items()
    }
    for kind in ('parameters', 'average'):
        largest = np.abs(cases.sketch_tensors(tensors[kind]) - stored[kind]).max()
        print(name, kind, 'differ by', largest / RUN.PEAK, 'peak learning rates')
        assert largest < 0.1 * RUN.PEAK
    first = 0
    for tensor in sorted(tensors['gradient']):
        ours = reference.sketch(tensors['gradient'][tensor], 16)
        theirs = stored['gradient'][first : first + len(ours)]
        first += len(ours)
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max(), tensor
    assert first == len(stored['gradient'])
