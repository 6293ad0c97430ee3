"""The numerics of the originals, with transformers and timm as judges, on weights of which none is trivial."""

import jax
import numpy as np
import pytest

from convnext_jax.interop.layouts import from_layout, to_layout
from convnext_jax.models import create_model, get_parameters, get_variant, list_models, with_parameters

BOUND = 2e-5  # of the reference's standard deviation, float32
FEATURES = ['stem', 'stage1', 'stage2', 'stage3', 'stage4']
SIZES = [(224, 224), (160, 256)]

torch = pytest.importorskip('torch', reason='torch is a development requirement')
timm = pytest.importorskip('timm', reason='timm is a development requirement')
transformers = pytest.importorskip('transformers', reason='transformers is a development requirement')


def random_model(name: str, **arguments):
    """Every parameter away from its first value, and large enough that each matters in the output."""
    model = create_model(name, key=jax.random.key(0), num_classes=50, **arguments)
    rng = np.random.default_rng(1)
    parameters = {}
    for parameter, value in get_parameters(model).items():
        if parameter.endswith('.kernel'):
            fan_in = 49 if 'depthwise' in parameter else np.prod(value.shape['blocks' in parameter : -1])
            parameters[parameter] = rng.normal(0, fan_in**-0.5, value.shape).astype(np.float32)
        else:
            centre = 1.0 if parameter.endswith('norm.scale') else 0.0
            parameters[parameter] = rng.normal(centre, 0.3, value.shape).astype(np.float32)
    return with_parameters(model, parameters), parameters


def images(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(2, *size, 3)).astype(np.float32)


def nchw(array: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def difference(ours: jax.Array, theirs) -> float:
    """The largest, in the reference's standard deviations."""
    reference = theirs.detach().numpy().astype(np.float64)
    if reference.ndim == 4:
        reference = reference.transpose(0, 2, 3, 1)
    return float(np.abs(np.asarray(ours, np.float64) - reference).max() / reference.std())


def hugging_face(name: str):
    variant = get_variant(name)
    kind = 'ConvNextV2' if name.startswith('convnextv2') else 'ConvNext'
    config = getattr(transformers, f'{kind}Config')(
        depths=variant.depths, hidden_sizes=variant.widths, num_labels=50, layer_norm_eps=1e-12
    )
    return getattr(transformers, f'{kind}ForImageClassification')(config).eval()


def load(reference, tensors: dict):
    reference.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in tensors.items()}, strict=True)
    return reference


def compare(model, x, logits, maps: dict) -> dict:
    """Feature name → largest difference."""
    ours_logits, ours_maps = jax.jit(lambda model, x: (model(x), model.features(x)))(model, x)
    differences = {'logits': difference(ours_logits, logits)}
    return differences | {feature: difference(ours_maps[feature], theirs) for feature, theirs in maps.items()}


def check(differences: dict, what: str) -> None:
    print(what, {feature: f'{value:.1e}' for feature, value in differences.items()})
    assert max(differences.values()) < BOUND, differences


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', ['convnext_tiny', 'convnextv2_atto', 'convnextv2_tiny'])
def test_logits_and_maps_equal_transformers(name, size):
    model, parameters = random_model(name, layer_norm_eps=1e-12)
    reference = load(hugging_face(name), to_layout(parameters, get_variant(name), 'huggingface'))
    x = images(size)
    with torch.no_grad():
        theirs = reference(nchw(x), output_hidden_states=True)
    maps = dict(zip(FEATURES, theirs.hidden_states, strict=True))
    check(compare(model, x, theirs.logits, maps), f'{name} {size} transformers')


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', ['convnext_atto', 'convnext_tiny', 'convnextv2_atto', 'convnextv2_tiny'])
def test_logits_and_maps_equal_timm(name, size):
    model, parameters = random_model(name)
    reference = load(timm.create_model(name, num_classes=50).eval(), to_layout(parameters, get_variant(name), 'timm'))
    x = images(size)
    with torch.no_grad():
        logits, states = reference(nchw(x)), reference.forward_intermediates(nchw(x), intermediates_only=True)
    maps = dict(zip(FEATURES[1:], states[-4:], strict=True))
    check(compare(model, x, logits, maps), f'{name} {size} timm')


def isotropic_in_torch(variant, classes: int):
    """The paper's isotropic network in plain torch: stem, blocks, norm, head."""

    class Block(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.dwconv = torch.nn.Conv2d(width, width, 7, padding=3, groups=width)
            self.norm = torch.nn.LayerNorm(width, eps=1e-6)
            self.pwconv1 = torch.nn.Linear(width, 4 * width)
            self.pwconv2 = torch.nn.Linear(4 * width, width)

        def forward(self, x):
            branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
            branch = self.pwconv2(torch.nn.functional.gelu(self.pwconv1(branch)))
            return x + branch.permute(0, 3, 1, 2)

    class Isotropic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            width = variant.widths[0]
            self.stem = torch.nn.Conv2d(3, width, 16, stride=16)
            self.blocks = torch.nn.Sequential(*(Block(width) for _ in range(variant.depths[0])))
            self.norm = torch.nn.LayerNorm(width, eps=1e-6)
            self.head = torch.nn.Linear(width, classes)

        def forward(self, x):
            return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))

    return Isotropic().eval()


@pytest.mark.parametrize('size', SIZES)
def test_isotropic_logits_equal_the_paper_in_torch(size):
    """Neither transformers nor timm has it."""
    model, parameters = random_model('convnext_isotropic_small')
    variant = get_variant('convnext_isotropic_small')
    reference = load(isotropic_in_torch(variant, 50), to_layout(parameters, variant, 'original'))
    x = images(size)
    with torch.no_grad():
        maps = {'stem': reference.stem(nchw(x)), 'stage1': reference.blocks(reference.stem(nchw(x)))}
        check(compare(model, x, reference(nchw(x)), maps), f'isotropic small {size} torch')


@pytest.mark.parametrize('name', [name for name in list_models() if 'isotropic' not in name])
def test_every_model_has_the_names_and_shapes_of_timm_and_transformers(name):
    """Without weights: torch's meta device there, views of one number here."""
    model = jax.eval_shape(lambda key: create_model(name, key=key, num_classes=50), jax.random.key(0))
    ours = {parameter: np.broadcast_to(np.float32(0), x.shape) for parameter, x in get_parameters(model).items()}
    with torch.device('meta'):
        references = {'huggingface': hugging_face(name), 'timm': timm.create_model(name, num_classes=50)}
    for layout, reference in references.items():
        theirs = {tensor: tuple(value.shape) for tensor, value in reference.state_dict().items()}
        tensors = to_layout(ours, get_variant(name), layout)
        assert {tensor: value.shape for tensor, value in tensors.items()} == theirs, layout


@pytest.mark.parametrize('layout', ['huggingface', 'timm', 'original'])
@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_there_and_back_is_bit_exact(name, layout):
    _, parameters = random_model(name)
    shapes = {parameter: value.shape for parameter, value in parameters.items()}
    variant = get_variant(name)
    back = from_layout(to_layout(parameters, variant, layout), shapes, variant, layout)
    assert back.keys() == parameters.keys()
    for parameter, value in parameters.items():
        np.testing.assert_array_equal(back[parameter], value, err_msg=parameter)


def test_missing_left_over_and_misshapen_tensors_are_all_named():
    _, parameters = random_model('convnext_atto')
    shapes = {parameter: value.shape for parameter, value in parameters.items()}
    variant = get_variant('convnext_atto')
    tensors = to_layout(parameters, variant, 'timm')
    tensors['extra'] = tensors.pop('stem.0.bias')
    tensors['head.fc.bias'] = tensors['head.fc.bias'][:-1]
    listed = r'extra is unexpected; head.fc.bias is \(49,\), not \(50,\); stem.0.bias is missing'
    with pytest.raises(ValueError, match=listed):
        from_layout(tensors, shapes, variant, 'timm')
