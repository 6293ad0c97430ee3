"""The mesh, the arrays sharded over it, the collectives of the compiled step, and equal results on every mesh."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from convnext_jax.checkpoints.checkpoint import restore, restore_parameters
from convnext_jax.checkpoints.manager import Checkpoints
from convnext_jax.checkpoints.state import initial_state
from convnext_jax.config import default_config
from convnext_jax.errors import UserError
from convnext_jax.interop import create_backbone
from convnext_jax.models import Role, Variant, get_parameters, parameter_roles
from convnext_jax.models.variants import VARIANTS
from convnext_jax.plan.hlo import Collectives, collectives, read_program
from convnext_jax.tasks import Loss, abstract_model
from convnext_jax.tasks.accuracy import Accuracy
from convnext_jax.training.durations import make_durations
from convnext_jax.training.evaluation import make_eval_step
from convnext_jax.training.optimizer import adamw, layer_factors
from convnext_jax.training.program import Program
from convnext_jax.training.sharding import (
    batch_sharding,
    check_batch_size,
    fraction_per_device,
    make_mesh,
    parameter_sharding,
    replicated,
    state_sharding,
)
from convnext_jax.training.step import make_train_step

BATCH_SIZE, SIDE = 32, 16
STEPS = 4
MESHES = {'1': (1, 1), '8': (8, 1), '4 × 2': (4, 2)}
VARIANT = Variant((2, 3), (80, 160), grn=True, layer_scale_init=0)


def small_config():
    """A small ConvNeXt V2 on 16-pixel images, with all randomness except RandAugment, which is slow to compile."""
    config = default_config()
    config.augment.policy = ''
    config.model.name = 'convnextv2_atto'
    config.model.num_classes = 10
    config.model.patch_size = 2
    config.model.drop_path_rate = 0.3
    config.data.image_size = SIDE
    config.batch_size = BATCH_SIZE
    config.mix.mixup = 0.8
    config.mix.cutmix = 1.0
    config.ema.decay = 0.9
    config.epochs = 10
    config.optimizer.warmup_epochs = 0.2
    config.optimizer.learning_rate = 4e-3
    return config


def make_program(config, data, fsdp):
    mesh = make_mesh(data, fsdp, jax.devices()[: data * fsdp])
    return Program(config, make_durations(config, images=10 * BATCH_SIZE), mesh)


def make_batch(program, step):
    rng = np.random.default_rng(step)
    batch = {
        'image': rng.integers(0, 256, (BATCH_SIZE, SIDE, SIDE, 3), dtype=np.uint8),
        'label': rng.integers(0, 10, BATCH_SIZE, dtype=np.int32),
    }
    return jax.device_put(batch, program.batch_sharding)


@dataclasses.dataclass
class Run:
    """A compiled program that has trained for `STEPS` steps.

    Attributes:
        states: The states before the first step and after the last step.
        losses: The loss of each step.
    """

    program: Program
    compiled: jax.stages.Compiled
    states: tuple
    losses: list[float]

    @property
    def collectives(self) -> dict[tuple[str, str, int], Collectives]:
        return collectives(read_program(self.compiled.as_text()), self.program.batch_sharding.mesh.size)


@pytest.fixture(scope='module')
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, 'convnextv2_atto', VARIANT)
        yield


@pytest.fixture(scope='module')
def runs(small_model):
    """The run of one config on each mesh."""
    found = {}
    for name, shape in MESHES.items():
        program = make_program(small_config(), *shape)
        compiled = program.compile(program.abstract_state, program.abstract_batch)
        first = jax.jit(program.newly_initialised_state, out_shardings=program.state_sharding)()
        state, losses = jax.tree.map(jnp.copy, first), []
        for step in range(STEPS):
            state, metrics = compiled(state, make_batch(program, step))
            losses.append(float(metrics['loss']))
        found[name] = Run(program, compiled, (first, state), losses)
    return found


@pytest.mark.parametrize(
    ('axes', 'shape'), [((-1, 1), (8, 1)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((2, 4), (2, 4)), ((8, -1), (8, 1))]
)
def test_an_axis_of_minus_1_takes_the_remaining_devices(axes, shape):
    """Users would have to change the mesh for each number of devices."""
    mesh = make_mesh(*axes)
    assert tuple(mesh.shape.items()) == (('data', shape[0]), ('fsdp', shape[1]))


@pytest.mark.parametrize(
    ('axes', 'line'),
    [
        ((-1, -1), 'only one of them can be −1'),
        ((-1, 3), 'mesh.data=-1, mesh.fsdp=3, but there are 8 devices'),
        ((2, 2), 'mesh.data=2, mesh.fsdp=2, but there are 8 devices'),
        ((0, 8), 'each must be −1 or at least 1'),
        ((-2, 1), 'each must be −1 or at least 1'),
        ((16, -1), 'but there are 8 devices'),
    ],
)
def test_a_mesh_that_does_not_match_the_devices_is_refused(axes, line):
    """Devices would be left unused, or the run would end in a traceback of JAX."""
    with pytest.raises(UserError, match=line):
        make_mesh(*axes)


class Chip:
    """A simulated TPU device of a pod with slices of 4 × 2 devices."""

    platform, device_kind, core_on_chip = 'tpu', 'future TPU', 0

    def __init__(self, number):
        self.id, self.process_index, self.slice_index = number, number // 4, number // 8
        self.coords = (number % 4, number // 4 % 2, 0)


def test_the_fsdp_axis_stays_within_a_slice_of_a_pod():
    """All-gathers of each block over the network between slices, which is ten times slower, would stall every step."""
    chips = [Chip(number) for number in np.random.default_rng(0).permutation(32)]  # 4 slices of 8
    for axes in ((-1, 4), (4, 8), (32, 1)):
        mesh = make_mesh(*axes, devices=chips)
        slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
        assert (slices == slices[:, :1]).all()
        assert (np.diff(slices[:, 0]) >= 0).all(), 'neighbours along the data axis must share a slice where possible'
    with pytest.raises(UserError, match='mesh.fsdp=16 does not fit into one of the 4 slices of 8 devices'):
        make_mesh(-1, 16, devices=chips)


@pytest.mark.parametrize('name', ['convnext_tiny', 'convnextv2_large', 'convnext_isotropic_base'])
def test_large_models_are_sharded_but_never_along_the_block_axis(name):
    """Replicated kernels would fill every device; with a sharded block axis the scan would transfer every block."""
    config = default_config()
    config.model.update(name=name, num_classes=1000)
    model, mesh = abstract_model(config), make_mesh(2, 4)
    parameters, roles = get_parameters(model), parameter_roles(model)
    for parameter, array in parameters.items():
        spec = parameter_sharding(mesh, roles[parameter], array.shape).spec
        assert '.blocks.' not in parameter or not spec or spec[0] is None
    assert 0.25 < fraction_per_device(mesh, roles, parameters) < 0.28
    assert fraction_per_device(make_mesh(), roles, parameters) == 1


class Energy:
    """A task for any backbone: the loss is the mean square of its features."""

    def augment(self, batch, keys):
        return batch

    def mix(self, batch, key, epoch):
        return batch

    def loss(self, model, batch, keys):
        features = model(batch['image'])
        return Loss(sum(jnp.square(x).mean((1, 2, 3)).sum() for x in features.values()), jnp.float32(len(keys)))


@pytest.mark.slow
def test_a_dilated_backbone_trains_on_a_mesh_as_on_one_device():
    """Segmentation could not train with FSDP: a dilated backbone has norms and a kernel that no layer gathers."""
    config = default_config()
    config.batch_size = 8
    variant = Variant((1, 1), (64, 128), patch_size=4)
    model = jax.eval_shape(
        lambda key: create_backbone(variant, out_features=('stage1', 'stage2'), output_stride=4, key=key),
        jax.random.key(0),
    )
    roles = parameter_roles(model)
    assert roles['stages.1.downsample.conv.kernel'] == Role(decays=True, fsdp_axis=None)
    assert roles['stages.1.blocks.pointwise1.kernel'] == Role(decays=True, fsdp_axis=-2)
    assert roles['norms.stage2.scale'] == Role(decays=False, fsdp_axis=None)
    optimizer = adamw(
        layer_factors(list(roles), variant.depths, 'single', 0.9),
        roles,
        weight_decay=0.05,
    )
    shapes = {name: x.shape for name, x in get_parameters(model).items()}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(1), len(shapes)), strict=True))
    parameters = {name: 0.1 * jax.random.normal(keys[name], shape) for name, shape in shapes.items()}
    batch = {'image': jax.random.normal(jax.random.key(2), (8, 16, 16, 3))}

    def trained(mesh):
        state = initial_state(parameters, optimizer, ema=True)
        state = jax.device_put(state, state_sharding(mesh, roles, state))
        step = jax.jit(make_train_step(Energy(), model, optimizer, lambda _: 1e-3, config, 10, mesh))
        for _ in range(2):
            state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        return state.parameters, float(metrics['loss'])

    whole, loss = trained(make_mesh(devices=jax.devices()[:1]))
    sharded, other_loss = trained(make_mesh(4, 2))
    assert 'fsdp' in sharded['stages.1.blocks.pointwise1.kernel'].sharding.spec
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, array in whole.items():
        np.testing.assert_allclose(sharded[name], array, atol=2e-5, err_msg=name)


def test_moments_and_moving_average_are_sharded_like_their_parameters(runs):
    """Replicated moments and averages would use three quarters of the memory that FSDP is to save."""
    state = runs['4 × 2'].states[1]
    kernel = 'stages.1.blocks.pointwise1.kernel'
    adam = next(part for part in state.optimizer if hasattr(part, 'mu'))
    for arrays in (state.parameters, state.ema, adam.mu, adam.nu):
        assert arrays[kernel].sharding.spec == PartitionSpec(None, 'fsdp', None)
        assert arrays[kernel].addressable_shards[0].data.shape == (3, 80, 640)
        assert arrays['head.bias'].sharding.is_fully_replicated


def test_the_losses_are_the_same_on_every_mesh(runs):
    """A recipe tried on one machine would train differently on a pod. Drop path, erasing, mixup and cutmix are on."""
    one_device, data_parallel, fsdp = (np.asarray(runs[name].losses) for name in MESHES)
    first, last = (np.asarray(state.parameters['head.kernel']) for state in runs['1'].states)
    assert np.abs(last - first).max() > 5e-4, 'the parameters must change'
    np.testing.assert_allclose(data_parallel, one_device, rtol=2e-5)
    np.testing.assert_allclose(fsdp, one_device, rtol=2e-5)


def test_the_first_parameters_are_the_same_on_every_mesh(runs):
    """A run would start from other weights if the number of devices changed."""
    for name in ('8', '4 × 2'):
        for here, there in zip(
            jax.tree.leaves(runs[name].states[0]), jax.tree.leaves(runs['1'].states[0]), strict=True
        ):
            np.testing.assert_array_equal(here, there)


def test_data_parallel_sums_each_gradient_once(runs):
    """Other communication would slow every step: a single float32 all-reduce sums gradients and loss."""
    assert runs['1'].collectives == {}
    parameters = sum(x.size for x in runs['8'].program.abstract_state.parameters.values())
    sums = parameters + 2  # the loss and its weight
    assert runs['8'].collectives == {('all-reduce', 'f32', 8): Collectives(1, 4 * sums)}


def test_sharded_kernels_are_gathered_by_block_and_gradients_reduce_scattered(runs):
    """FSDP would save little memory if the step gathered the kernels of all blocks at once."""
    run = runs['4 × 2']
    sizes = {name: x.size for name, x in run.program.abstract_state.parameters.items()}
    sharded = sum(sizes[name] for name in sharded_names(run.program))
    assert sharded > 0.9 * sum(sizes.values())
    found = run.collectives
    assert {(kind, group) for kind, _, group in found} == {
        ('all-gather', 2),  # kernels, forward and backward
        ('reduce-scatter', 2),  # their gradients, within fsdp
        ('all-reduce', 4),  # the sum of these shards over data
        ('all-reduce', 8),  # gradients of replicated parameters, and the loss
        ('all-reduce', 2),  # the norms of the gradient and of the parameters
    }
    assert 4 * sharded < found['all-gather', 'f32', 2].size <= 2 * 4 * sharded
    assert found['reduce-scatter', 'f32', 2].size == 4 * sharded // 2
    assert found['all-reduce', 'f32', 4] == Collectives(1, 4 * sharded // 2)
    assert found['all-reduce', 'f32', 8] == Collectives(1, 4 * (sum(sizes.values()) - sharded + 2))
    assert found['all-reduce', 'f32', 2] == Collectives(2, 2 * 4 * len(sharded_names(run.program)))
    stacks = {
        ','.join(map(str, x.shape))
        for name, x in run.program.abstract_state.parameters.items()
        if name in sharded_names(run.program) and '.blocks.' in name
    }
    for shape in stacks:
        assert f'f32[{shape}]' not in run.compiled.as_text(), 'the kernels of all blocks are gathered at once'


def sharded_names(program):
    return [name for name, x in program.abstract_state.parameters.items() if 'fsdp' in x.sharding.spec]


def test_a_device_holds_only_its_shard_of_the_state(runs):
    """Models that need FSDP would not fit on a device."""
    state = {name: run.compiled.memory_analysis().argument_size_in_bytes for name, run in runs.items()}
    assert state['8'] == pytest.approx(state['1'], rel=0.01)
    program = runs['4 × 2'].program
    share = fraction_per_device(
        program.batch_sharding.mesh, parameter_roles(program.model), program.abstract_state.parameters
    )
    assert share < 0.55
    assert state['4 × 2'] == pytest.approx(share * state['1'], rel=0.01)


def test_evaluation_gathers_only_kernels(runs):
    """Evaluation would be slow, because images that move between devices are much larger than kernels."""
    run = runs['4 × 2']
    program, data = run.program, run.program.config.data
    specs = {name: sharding.spec for name, sharding in program.state_sharding.parameters.items()}
    evaluator, mesh = Accuracy(data.mean, data.std), program.batch_sharding.mesh
    step = jax.jit(make_eval_step(evaluator, program.model, mesh, specs), out_shardings=replicated(mesh))
    weight = jax.ShapeDtypeStruct((BATCH_SIZE,), jnp.float32, sharding=program.batch_sharding)
    batch = program.abstract_batch | {'weight': weight}
    text = step.lower(program.abstract_state.parameters, batch).compile().as_text()
    kernels = sum(4 * program.abstract_state.parameters[name].size for name in sharded_names(program))
    found = collectives(read_program(text), 8)
    assert {kind for kind, _, _ in found} == {'all-gather', 'all-reduce'}
    sent = sum(collective.size for collective in found.values())
    assert kernels <= sent < kernels + 4000  # the rest are the logits of ten classes and the metric sums


@pytest.mark.parametrize(('there', 'here'), [('8', '4 × 2'), ('4 × 2', '1')])
def test_a_run_resumes_on_another_mesh(runs, tmp_path, there, here):
    """A run preempted on one pod could not resume on another: its bits and its next loss must be equal."""
    saved, resumed = runs[there], runs[here]
    with Checkpoints(tmp_path / 'c', keep=1, best_metric='top1') as checkpoints:
        checkpoints.save(saved.states[1], {}, None)
    state = restore(tmp_path / 'c', STEPS, resumed.program.abstract_state)
    for array, other in zip(jax.tree.leaves(state), jax.tree.leaves(saved.states[1]), strict=True):
        np.testing.assert_array_equal(array, other)
    sharding = jax.tree.map(lambda x: x.sharding, state)
    assert sharding == resumed.program.state_sharding
    losses = [
        float(run.compiled(jax.tree.map(jnp.copy, state), make_batch(run.program, STEPS))[1]['loss'])
        for run, state in ((saved, saved.states[1]), (resumed, state))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(('there', 'here'), [((8, 1), (2, 1)), ((8, 1), (1, 2)), ((2, 4), (2, 1)), ((1, 8), (4, 2))])
def test_a_checkpoint_is_resharded_to_any_mesh(runs, tmp_path, there, here):
    """A run could not resume on fewer devices, or with other sizes of `mesh.data` and `mesh.fsdp`."""
    state, roles = some_of(runs['1'].states[1]), parameter_roles(runs['1'].program.model)

    def sharding(axes):
        return state_sharding(make_mesh(*axes, jax.devices()[: np.prod(axes)]), roles, state)

    before = jax.device_put(state, sharding(there))
    with Checkpoints(tmp_path / 'c', keep=1, best_metric='top1') as checkpoints:
        checkpoints.save(before, {}, None)
    like = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), state, sharding(here))
    after = restore(tmp_path / 'c', STEPS, like)
    assert jax.tree.map(lambda x: x.sharding, after) == sharding(here)
    for array, other in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(array, other)
    whole = restore_parameters(tmp_path / 'c', STEPS, 'ema')  # what eval.py, convert and predict read
    np.testing.assert_array_equal(whole['head.bias'], state.ema['head.bias'])


def some_of(state):
    """The state of two parameters: one is sharded, the other is replicated."""
    names = ('stages.1.blocks.pointwise1.kernel', 'head.bias')

    def pick(tree):
        return {name: tree[name] for name in names if name in tree} if isinstance(tree, dict) else tree

    return jax.tree.map(pick, state, is_leaf=lambda tree: isinstance(tree, dict))


def test_the_bytes_that_a_device_sends_do_not_grow_with_the_pod(runs):
    """Training would not scale to a pod: with 16 devices, each one must send as much as with 8."""
    flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=16')
    out = subprocess.run(
        [sys.executable, __file__],
        cwd=Path(__file__).parents[2],
        env=os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': '.'},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=900,
    ).stdout
    found = dict(line.split(': ') for line in out.splitlines())
    eight = runs['4 × 2'].collectives
    for (kind, dtype, group), collective in eight.items():
        over = {2: 2, 4: 8, 8: 16}[group]
        assert found.pop(f'{kind} {dtype} {over}') == f'{collective.runs} {collective.size}'
    assert not found


def test_a_batch_size_that_does_not_divide_is_refused_with_sizes_that_do():
    """Users would have to find a valid batch size by trial."""
    mesh = make_mesh(-1, 2)
    check_batch_size(16, 2, mesh)
    with pytest.raises(UserError, match='8 devices × 2 accumulation steps: try 16 or 32'):
        check_batch_size(20, 2, mesh)


def print_collectives():
    """Prints the collectives of the step on a mesh of 8 × 2, in a process that sees 16 devices."""
    config = small_config()
    config.batch_size = 4 * 16
    VARIANTS['convnextv2_atto'] = VARIANT
    program = make_program(config, 8, 2)
    text = program.compile(program.abstract_state, program.abstract_batch).as_text()
    for (kind, dtype, group), collective in collectives(read_program(text), 16).items():
        print(f'{kind} {dtype} {group}: {collective.runs} {collective.size}')


if __name__ == '__main__':
    print_collectives()
