"""UPerNet against transformers: logits, losses, gradients, running statistics, and the files that either side loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from convnext_jax import ImageProcessor, load_pretrained, save_pretrained
from convnext_jax.__main__ import main
from convnext_jax.interop import read_upernet
from convnext_jax.interop.upernet import tensors_of
from convnext_jax.mask_prediction import predict_masks
from convnext_jax.models import (
    UPerNet,
    get_parameters,
    get_statistics,
    get_variant,
    get_weights,
    with_parameters,
)
from convnext_jax.tasks.segmentation_loss import segmentation_loss
from tests.judges import record
from tests.reference import cases

BOUND = 1e-5  # in standard deviations of the reference, for float32
KINDS = pytest.mark.parametrize('kind', cases.UPERNETS)
SIZES = pytest.mark.parametrize('size', cases.UPERNET_SIZES)


def difference(ours, theirs) -> float:
    """The largest difference in standard deviations of the reference."""
    return float(np.abs(ours - theirs).max() / theirs.std())


@KINDS
@SIZES
def test_logits_of_inference(kind, size):
    """Published weights would give other masks. The sizes are not multiples of any stride or number of bins."""
    images, _ = cases.segmented(size)
    with torch.no_grad():
        theirs = record.nhwc(record.hugging_face_upernet(kind)(record.nchw(images)).logits)
    ours = jax.jit(lambda network, x: network(x))(cases.random_upernet(kind), images)
    assert ours.shape == (*images.shape[:3], 7)
    assert ours.dtype == jnp.float32
    print(kind, size, f'{difference(ours, theirs):.1e}')
    assert difference(ours, theirs) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
@KINDS
def test_losses_gradients_and_running_statistics(kind, training):
    """Fine-tuning would follow another gradient than in mmsegmentation and transformers.

    The reference is computed in float64: in float32, a ReLU may switch by rounding in either library.
    """
    size = (75, 101)
    images, labels = cases.segmented(size)
    network = cases.random_upernet(kind)
    statistics = get_statistics(network)

    def run(parameters):
        called = with_parameters(network, parameters | statistics)
        logits = called.head_logits(images, key=jax.random.key(0) if training else None)
        losses = {average: segmentation_loss(logits, labels, average=average) for average in ('all', 'labelled')}
        return losses['labelled'].total / losses['labelled'].weight, (losses, get_statistics(called))

    (mean, (losses, updated)), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(get_parameters(network))

    module = record.hugging_face_upernet(kind).double().train(training)
    pixels, classes = record.nchw(images).double(), torch.from_numpy(labels).long()
    output = module(pixels, labels=classes)
    output.loss.backward()
    assert mean == pytest.approx(output.loss.item(), rel=1e-5)

    def in_mmsegmentation(logits):  # the mean over all pixels, in which ignored pixels count as 0
        return torch.nn.functional.cross_entropy(logits, classes, ignore_index=255, reduction='none').mean()

    with torch.no_grad():
        small = module.auxiliary_head(module.backbone(pixels).feature_maps)
        auxiliary = in_mmsegmentation(torch.nn.functional.interpolate(small, size=size, mode='bilinear'))
        main = in_mmsegmentation(output.logits)
    total, weight, terms = losses['all']
    assert terms['auxiliary_loss'] / weight == pytest.approx(auxiliary.item(), rel=1e-5)
    assert total / weight == pytest.approx((main + 0.4 * auxiliary).item(), rel=1e-5)

    ours = tensors_of(jax.device_get(gradient | updated), network.variant, 'huggingface')
    expected = {name: x.grad.numpy() for name, x in module.named_parameters()}
    largest = max(np.linalg.norm(x) for x in expected.values())
    found = {
        name: float(np.linalg.norm(ours[name] - x) / max(np.linalg.norm(x), 1e-4 * largest))
        for name, x in expected.items()
    }
    worst = max(found, key=found.__getitem__)
    print(kind, training, worst, f'{found[worst]:.1e}')
    assert found[worst] < 1e-3, worst
    if not training:
        assert all(np.array_equal(updated[name], statistics[name]) for name in statistics)
        return
    once = record.hugging_face_upernet(kind).double().train()
    once(pixels)
    for name, x in once.named_buffers():
        if 'running' in name:
            np.testing.assert_allclose(ours[name], x.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


@KINDS
def test_transformers_and_we_load_each_other_s_folders(tmp_path, kind):
    """Networks that were trained on one side could not be used on the other."""
    network, names = cases.random_upernet(kind), [f'class {number}' for number in range(7)]
    save_pretrained(network, tmp_path / 'ours', class_names=names)
    theirs, info = transformers.UperNetForSemanticSegmentation.from_pretrained(
        tmp_path / 'ours', output_loading_info=True
    )
    assert not any(info[problem] for problem in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    images, _ = cases.segmented((64, 96))
    with torch.no_grad():
        logits = record.nhwc(theirs.eval()(record.nchw(images)).logits)
    assert difference(jax.jit(lambda network, x: network(x))(network, images), logits) < BOUND
    assert list(theirs.config.id2label.values()) == names

    theirs.save_pretrained(tmp_path / 'theirs')
    loaded = read_upernet(tmp_path / 'theirs')
    assert loaded.class_names == tuple(names)
    assert (loaded.layout, loaded.notes, loaded.newly_initialised) == ('huggingface', [], ())
    jax.tree.map(np.testing.assert_array_equal, get_weights(loaded.model), get_weights(network))


@pytest.mark.parametrize('layout', ['mmsegmentation', 'original'])
@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_files_of_mmsegmentation_and_of_the_original(tmp_path, name, layout):
    """Published .pth files, which also hold an optimizer and a description, could not be used."""
    network = cases.random_upernet(name)
    save_pretrained(network, tmp_path / 'out', layout=layout)
    content = torch.load(tmp_path / 'out' / 'model.pth', weights_only=True)
    block = 'depthwise_conv' if layout == 'mmsegmentation' else 'dwconv'
    assert {f'backbone.stages.2.1.{block}.weight', 'backbone.norm3.bias'} <= content['state_dict'].keys()
    assert content['state_dict']['decode_head.psp_modules.3.1.bn.running_var'].shape == (16,)
    assert content['state_dict']['decode_head.conv_seg.weight'].shape == (7, 16, 1, 1)
    if 'v2' in name:
        shape = (160,) if layout == 'mmsegmentation' else (1, 1, 1, 160)
        assert content['state_dict']['backbone.stages.0.0.grn.gamma'].shape == shape
    meta = {'CLASSES': ('wall', 'sky'), 'PALETTE': np.zeros((2, 3), np.uint8), 'epoch': 3, 'env_info': 'torch'}
    optimizer = {'state': {0: {'step': 3, 'exp_avg': torch.zeros(2)}}, 'param_groups': [{'lr': 1e-4, 'params': [0]}]}
    torch.save({'meta': meta, 'state_dict': content['state_dict'], 'optimizer': optimizer}, tmp_path / 'published.pth')
    loaded = load_pretrained(tmp_path / 'published.pth')
    jax.tree.map(np.testing.assert_array_equal, get_weights(loaded), get_weights(network))


@pytest.mark.parametrize('name', ['tiny', 'small', 'base', 'large', 'xlarge'])
def test_names_and_shapes_of_the_published_networks(name):
    """A published folder would be refused."""
    variant = get_variant(f'convnext_{name}')
    network = jax.eval_shape(lambda key: UPerNet(variant, key=key), jax.random.key(0))
    empty = {ours: np.broadcast_to(np.float32(0), x.shape) for ours, x in get_weights(network).items()}
    backbone = transformers.ConvNextConfig(
        depths=list(variant.depths),
        hidden_sizes=list(variant.widths),
        out_features=['stage1', 'stage2', 'stage3', 'stage4'],
    )
    with torch.device('meta'):
        module = transformers.UperNetForSemanticSegmentation(
            transformers.UperNetConfig(backbone_config=backbone, num_labels=150)
        )
    ours = {theirs: x.shape for theirs, x in tensors_of(empty, variant, 'huggingface').items()}
    assert ours == {theirs: tuple(x.shape) for theirs, x in module.state_dict().items()}


def test_the_preprocessing_of_a_folder_equals_transformers(tmp_path):
    """Masks would be predicted from other pixels."""
    save_pretrained(cases.random_upernet('v1'), tmp_path / 'ours')
    theirs = SegformerImageProcessorPil.from_pretrained(tmp_path / 'ours')
    assert theirs.to_dict()['size'] == {'height': 512, 'width': 512}
    SegformerImageProcessorPil().save_pretrained(tmp_path / 'theirs')
    for folder in ('ours', 'theirs'):
        processor = ImageProcessor.from_pretrained(tmp_path / folder)
        picture = cases.picture(300, 400)
        assert np.abs(processor(picture)[0] - record.pixels(theirs, picture)).max() == 0


@KINDS
def test_masks_of_photographs_equal_transformers(tmp_path, kind):
    """The masks of published weights would differ. Pixels whose two largest logits are close may differ by rounding."""
    processor = ImageProcessor(size=96, resample=2, squash=True)
    save_pretrained(cases.random_upernet(kind), tmp_path / 'upernet', processor=processor)
    photos = cases.write_photos(tmp_path)
    theirs = SegformerImageProcessorPil.from_pretrained(tmp_path / 'upernet')
    network = record.hugging_face_upernet(kind)
    for found in predict_masks(read_upernet(tmp_path / 'upernet'), photos):
        size = (found.photo.height, found.photo.width)
        with torch.no_grad():
            output = network(**theirs(found.photo, return_tensors='pt'))
            (expected,) = theirs.post_process_semantic_segmentation(output, target_sizes=[size])
            logits = torch.nn.functional.interpolate(output.logits, size=size, mode='bilinear')[0]
        largest, second = logits.topk(2, dim=0).values
        clear = (largest - second > BOUND * logits.std()).numpy()
        assert clear.mean() > 0.999
        assert len(found.areas) > 1
        np.testing.assert_array_equal(found.classes[clear], expected.numpy()[clear])


def test_convert_writes_files_of_mmsegmentation(tmp_path):
    """The weights of a run could not be used in mmsegmentation."""
    network = cases.random_upernet('convnext_atto')
    save_pretrained(network, tmp_path / 'hf')
    main(['convnext_jax', 'convert', str(tmp_path / 'hf'), str(tmp_path / 'mm'), '--layout=mmsegmentation'])
    main(['convnext_jax', 'convert', str(tmp_path / 'mm'), str(tmp_path / 'original'), '--layout=original'])
    for folder, block in (('mm', 'depthwise_conv'), ('original', 'dwconv')):
        content = torch.load(tmp_path / folder / 'model.pth', weights_only=True)
        assert f'backbone.stages.2.1.{block}.weight' in content['state_dict']
        jax.tree.map(
            np.testing.assert_array_equal, get_weights(load_pretrained(tmp_path / folder)), get_weights(network)
        )


@pytest.mark.parametrize('version', [0, 1])
def test_class_names_of_mmsegmentation_are_read(tmp_path, version):
    """The classes of published weights would be called 'class 0', 'class 1' and so on."""
    network, names = cases.random_upernet('convnext_atto'), [f'thing {number}' for number in range(7)]
    tensors = tensors_of(jax.device_get(get_weights(network)), network.variant, 'mmsegmentation')
    state_dict = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}

    def read(names):
        meta = {'dataset_meta': {'classes': names}} if version else {'CLASSES': names, 'PALETTE': [[0, 0, 0]]}
        torch.save({'state_dict': state_dict, 'meta': meta | {'mmseg_version': '1'}}, tmp_path / 'model.pth')
        return read_upernet(tmp_path / 'model.pth')

    loaded = read(tuple(f'{name} ' for name in names))  # as 'bed ' of ADE20K
    assert (loaded.class_names, loaded.layout, loaded.notes) == (tuple(names), 'mmsegmentation', [])
    short = read(names[:5])
    assert (short.class_names, short.notes) == (None, ['5 class names for 7 classes are ignored'])
    for odd in ([], [1, 2], 'names', {'a': 1}, None):
        assert read(odd).class_names is None
