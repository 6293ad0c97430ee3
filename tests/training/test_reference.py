"""A run of ours against the same run in torch: timm's model and parameter groups, torch's AdamW, the published rates.

Augmentation and drop path are off, since their draws differ; everything else is the recipe.
"""

import jax
import numpy as np
import pytest

from convnext_jax.config import default_config
from convnext_jax.interop.layouts import from_layout, to_layout
from convnext_jax.models import get_parameters, get_variant, parameter_roles
from convnext_jax.tasks import make_task
from convnext_jax.training.optimizer import adamw, cosine_schedule, layer_factors
from convnext_jax.training.setup import abstract_model
from convnext_jax.training.sharding import make_mesh
from convnext_jax.training.state import initial_state
from convnext_jax.training.step import make_train_step

torch = pytest.importorskip('torch', reason='torch is a development requirement')
timm = pytest.importorskip('timm', reason='timm is a development requirement')

STEPS, WARMUP, IMAGES, SIZE, CLASSES = 30, 5, 8, 64, 10
PEAK, MINIMUM, DECAY, LAYER_DECAY, EMA, SMOOTHING = 1e-3, 1e-6, 0.05, 0.8, 0.99, 0.1


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        label = rng.integers(0, CLASSES, IMAGES, dtype=np.int32)
        image = rng.integers(0, 128, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
        image[:, :, :, 0] += (12 * label)[:, None, None].astype(np.uint8)  # something to learn
        yield {'image': image, 'label': label}


def learning_rate(step):
    """`cosine_scheduler` of the original's utils.py."""
    if step < WARMUP:
        return PEAK * step / (WARMUP - 1)
    return MINIMUM + 0.5 * (PEAK - MINIMUM) * (1 + np.cos(np.pi * (step - WARMUP) / (STEPS - WARMUP)))


def torch_run(model, config):
    """Losses, and at the end parameters and average by timm's names."""
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(model, weight_decay=DECAY, layer_decay=LAYER_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.999), eps=1e-8)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for step, batch in enumerate(batches()):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step) * group['lr_scale']
        pixels = (batch['image'] / np.float32(255) - np.float32(config.data.mean)) / np.float32(config.data.std)
        logits = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        labels = torch.from_numpy(batch['label'].astype(np.int64))
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name] = EMA * average[name] + (1 - EMA) * parameter
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return losses, parameters, average


def our_run(parameters, config):
    model = abstract_model(config)
    optimizer = adamw(
        layer_factors(list(parameters), model.variant.depths, 'single', LAYER_DECAY),
        parameter_roles(model),
        weight_decay=DECAY,
    )
    schedule, mesh = cosine_schedule(PEAK, MINIMUM, WARMUP, STEPS), make_mesh(devices=jax.devices()[:1])
    step = jax.jit(make_train_step(make_task(config), model, optimizer, schedule, config, STEPS, mesh))
    state = initial_state(parameters, optimizer, ema=True)
    losses = []
    for batch in batches():
        state, metrics = step(state, batch)
        losses.append(float(metrics['loss']))
    return losses, state.parameters, state.ema


@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_thirty_steps_follow_torch(name):
    """Decay mask, layer decay, schedule, bias correction, average: what is off by a little in one shows in all."""
    config = default_config()
    config.model.name = name
    config.model.num_classes = CLASSES
    config.data.image_size = SIZE
    config.augment.flip = False
    config.augment.policy = ''
    config.augment.erasing = 0.0
    config.label_smoothing = SMOOTHING
    config.ema.decay = EMA
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=CLASSES).train()
    variant = get_variant(name)
    shapes = {parameter: x.shape for parameter, x in get_parameters(abstract_model(config)).items()}
    start = {tensor: x.detach().numpy() for tensor, x in reference.state_dict().items()}
    losses, parameters, average = our_run(from_layout(start, shapes, variant, 'timm'), config)
    their_losses, their_parameters, their_average = torch_run(reference, config)
    difference = max(abs(a - b) / b for a, b in zip(losses, their_losses, strict=True))
    print(name, 'loss', losses[0], losses[-1], 'largest relative difference', difference)
    assert difference < 1e-4
    assert losses[-1] < losses[0] - 0.1
    for ours, theirs in ((parameters, their_parameters), (average, their_average)):
        largest = max(
            float(np.abs(x - theirs[tensor].numpy()).max())
            for tensor, x in to_layout(jax.device_get(ours), variant, 'timm').items()
        )
        print(name, 'parameters differ by', largest / PEAK, 'peak learning rates')
        assert largest < 0.1 * PEAK
