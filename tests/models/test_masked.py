"""The encoder on masked images, against a sparse network that is written out over lists of visible positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import build

from convnext_jax.errors import UserError
from convnext_jax.models import Backbone, Variant, get_parameters, with_parameters
from convnext_jax.models.masked import Visible, masked_gelu_and_response_norm

V1 = Variant((1, 1, 1, 2), (4, 6, 8, 10), patch_size=2, layer_scale_init=0.5)
V2 = Variant((1, 1, 1, 2), (4, 6, 8, 10), patch_size=2, grn=True, layer_scale_init=0)
STRIDE = 16
IMAGES = np.random.default_rng(0).standard_normal((2, 64, 48, 3)).astype(np.float32)
# Neither image sees as many patches as the other, or the middle of a convolution.
PATCHES = np.asarray([[[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]], [[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1]]], bool)


def norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale + bias


def gathered(x, numbers, wanted):
    """The rows of x at some places, zeros where there is none: (P, C), (Q, K) places → (Q, K, C)."""
    rows = [[numbers.get(place, len(x)) for place in places] for places in wanted]
    return jnp.concatenate([x, jnp.zeros_like(x[:1])])[jnp.asarray(rows)]


def sparse_depthwise(x, places, kernel, bias):
    """Each visible position sums over the visible ones of its 7 × 7 neighbours."""
    numbers = {place: number for number, place in enumerate(places)}
    wanted = [[(n, row + i - 3, column + j - 3) for i, j in np.ndindex(7, 7)] for n, row, column in places]
    return jnp.einsum('pkc,kc->pc', gathered(x, numbers, wanted), kernel.reshape(49, -1)) + bias


def sparse_downsampling(x, places, kernel, bias):
    """Each 2 × 2 square with a visible position becomes one position."""
    numbers = {place: number for number, place in enumerate(places)}
    new = sorted({(n, row // 2, column // 2) for n, row, column in places})
    wanted = [[(n, 2 * row + i, 2 * column + j) for i, j in np.ndindex(2, 2)] for n, row, column in new]
    squares = gathered(x, numbers, wanted)
    return jnp.einsum('pkc,kcd->pd', squares, kernel.reshape(4, *kernel.shape[2:])) + bias, new


def sparse_grn(x, places, gamma, beta, statistics):
    """The original pools over all points of its sparse tensor: `torch.norm(x.F, p=2, dim=0)`."""
    images = [n if statistics == 'image' else 0 for n, _, _ in places]
    squares = jnp.zeros((len(PATCHES), x.shape[-1])).at[jnp.asarray(images)].add(jnp.square(x))
    norms = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    weights = norms / (norms.mean(-1, keepdims=True) + 1e-6)
    return gamma * (x * weights[jnp.asarray(images)]) + beta + x


def sparse_features(parameters, pixels, patches, variant, statistics):
    """Name of a feature map → (values at the visible positions, their places)."""
    cell = STRIDE // variant.patch_size
    places = sorted(
        (int(n), int(cell * row + i), int(cell * column + j))
        for n, row, column in np.argwhere(patches)
        for i, j in np.ndindex(cell, cell)
    )
    size = variant.patch_size
    squares = pixels.reshape(len(pixels), 64 // size, size, 48 // size, size, 3).swapaxes(2, 3)
    squares = squares[tuple(np.transpose(places))]
    x = jnp.einsum('pijc,ijcd->pd', squares, parameters['stem.conv.kernel']) + parameters['stem.conv.bias']
    x = norm(x, parameters['stem.norm.scale'], parameters['stem.norm.bias'])
    maps = {'stem': (x, places)}
    for stage, depth in enumerate(variant.depths):
        if stage:
            p = {name: parameters[f'stages.{stage}.downsample.{name}'] for name in ('norm.scale', 'norm.bias')}
            p |= {name: parameters[f'stages.{stage}.downsample.{name}'] for name in ('conv.kernel', 'conv.bias')}
            x = norm(x, p['norm.scale'], p['norm.bias'])
            x, places = sparse_downsampling(x, places, p['conv.kernel'], p['conv.bias'])
        prefix = f'stages.{stage}.blocks.'
        for block in range(depth):
            p = {name.removeprefix(prefix): y[block] for name, y in parameters.items() if name.startswith(prefix)}
            y = sparse_depthwise(x, places, p['depthwise.kernel'], p['depthwise.bias'])
            y = norm(y, p['norm.scale'], p['norm.bias']) @ p['pointwise1.kernel'] + p['pointwise1.bias']
            y = jax.nn.gelu(y, approximate=False)
            if variant.grn:
                y = sparse_grn(y, places, p['grn.gamma'], p['grn.beta'], statistics)
            y = y @ p['pointwise2.kernel'] + p['pointwise2.bias']
            x = x + y * p.get('layer_scale', 1)
        maps[f'stage{stage + 1}'] = (x, places)
    return maps


@pytest.mark.slow
@pytest.mark.parametrize(
    ('variant', 'statistics', 'remat', 'max_visible'),
    [(V1, 'image', 'full', None), (V2, 'image', 'dots', 6), (V2, 'batch', 'none', 6)],
)
def test_every_map_and_gradient_is_that_of_the_sparse_network(variant, statistics, remat, max_visible):
    """Pre-training would otherwise be another method than the paper's, and would show the masked pixels."""
    model = build(variant, remat=remat)
    visible = Visible(jnp.asarray(PATCHES), statistics, max_visible)
    hidden = ~np.kron(PATCHES, np.ones((1, STRIDE, STRIDE), bool))
    images = np.where(hidden[..., None], np.nan, IMAGES)
    trunk = {name: x for name, x in get_parameters(model).items() if name.startswith(('stem', 'stages'))}
    others = {name: x for name, x in get_parameters(model).items() if name not in trunk}
    weights = {name: np.random.default_rng(1).standard_normal(c) for name, c in model.channels.items()}

    def loss(maps):
        return sum((jnp.sin(x) @ weights[name]).sum() for name, x in maps.items()), maps

    def ours(parameters, images):
        maps = with_parameters(model, parameters | others).features(images, visible=visible)
        return loss(maps)

    def sparse(parameters, images):
        maps = {}
        for name, (x, places) in sparse_features(parameters, images, PATCHES, variant, statistics).items():
            shape = (2, 64 // model.strides[name], 48 // model.strides[name], x.shape[-1])
            maps[name] = jnp.zeros(shape).at[tuple(np.transpose(places))].set(x)
        return loss(maps)

    gradients, maps = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(trunk, images)
    expected, sparse_maps = jax.jit(jax.grad(sparse, argnums=(0, 1), has_aux=True))(trunk, IMAGES)
    for name, x in maps.items():
        np.testing.assert_allclose(x, sparse_maps[name], rtol=1e-4, atol=1e-4, err_msg=name)
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradient, expected[0][name], rtol=1e-3, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(gradients[1], expected[1], rtol=1e-3, atol=1e-3)


def test_the_linear_layers_skip_the_masked_patches():
    """A step of pre-training takes twice as long."""
    model = jax.eval_shape(lambda: build(V2, unroll=True))  # XLA counts one iteration of a loop
    images = jax.ShapeDtypeStruct((1, 160, 160, 3), jnp.float32)

    def operations(visible):
        forward = jax.jit(lambda model, images: model.features(images, visible=visible)['stage4'])
        return forward.lower(model, images).cost_analysis()['flops']

    few = Visible(jnp.arange(100).reshape(1, 10, 10) < 10, max_visible=10)
    assert operations(few) < 0.6 * operations(None)


def masked_grn(x, patches, gamma, beta, statistics):
    """Ours, behind a GELU that changes nothing: of large positive values."""
    visible = Visible(jnp.asarray(patches), statistics)
    x, gamma, beta = jnp.asarray(x), jnp.asarray(gamma), jnp.asarray(beta)
    return np.asarray(masked_gelu_and_response_norm(x, jnp.zeros(x.shape[-1]), gamma, beta, visible))


def test_grn_is_by_default_that_of_the_code_which_trained_the_published_weights():
    """The weights were trained by JAX code that pools over an image; the PyTorch code pools over the batch of a GPU."""
    rng = np.random.default_rng(0)
    x = rng.uniform(10, 20, (2, 4, 4, 8)).astype(np.float32)
    gamma, beta = rng.standard_normal((2, 8)).astype(np.float32)
    patches = np.asarray([[[1, 0], [0, 0]], [[1, 1], [0, 1]]], bool)
    hidden = ~np.kron(patches, np.ones((1, 2, 2), bool))[..., None]

    # ConvNeXt-V2, TRAINING.md: GRN of the JAX model.
    kept = x * (1.0 - hidden)
    norms = (np.square(kept).sum((1, 2), keepdims=True) + 1e-6) ** 0.5
    of_jax = gamma * (norms / (norms.mean(-1, keepdims=True) + 1e-6) * x) + beta + x
    # ConvNeXt-V2, models/utils.py: MinkowskiGRN on the features of all points.
    points = x[~hidden[..., 0]]
    norms = np.linalg.norm(points, axis=0, keepdims=True)
    of_pytorch = gamma * (points * norms / (norms.mean(-1, keepdims=True) + 1e-6)) + beta + points

    assert Visible(jnp.asarray(patches)).statistics == 'image'
    seen = ~hidden[..., 0]
    np.testing.assert_allclose(masked_grn(x, patches, gamma, beta, 'image')[seen], of_jax[seen], rtol=1e-5)
    np.testing.assert_allclose(masked_grn(x, patches, gamma, beta, 'batch')[seen], of_pytorch, rtol=1e-5)
    assert np.abs(of_jax[seen] - of_pytorch).max() > 0.1, 'the two are the same here'


def test_patches_that_do_not_fit_the_maps_are_refused():
    """A position that is half visible would be counted as the rounding of an index has it."""
    model = build(V2)
    with pytest.raises(
        UserError, match='8×3 patches of images of 64×48: a side of a patch must be a multiple of the total stride'
    ):
        model.features(jnp.asarray(IMAGES), visible=Visible(jnp.ones((2, 8, 3), bool)))
    dilated = jax.eval_shape(lambda key: Backbone(V2, key=key, output_stride=8), jax.random.key(0))
    with pytest.raises(UserError, match='output_stride=8 is dilated'):
        dilated.features(jnp.asarray(IMAGES), visible=Visible(jnp.asarray(PATCHES)))
