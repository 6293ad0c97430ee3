"""Files of mmpretrain and of mmdetection: classifiers, and the backbones of detectors."""

import jax
import numpy as np
import pytest
from random_models import assert_equal, random_model, save, state_dict

from convnext_jax import create_backbone
from convnext_jax.errors import UserError
from convnext_jax.interop import read_pretrained
from convnext_jax.interop.layouts import to_layout
from convnext_jax.interop.openmmlab import BLOCK
from convnext_jax.models import get_parameters, with_parameters
from tests.reference import draw_parameters

DETECTOR = {
    'neck.fpn_convs.0.conv.weight': np.ones((2, 2, 3, 3), np.float32),
    'rpn_head.rpn_cls.bias': np.ones(3, np.float32),
    'roi_head.mask_head.conv_logits.weight': np.ones((3, 2, 1, 1), np.float32),
    'roi_head.bbox_head.fc_cls.bias': np.ones(4, np.float32),
}


def openmmlab(tensors, *, convolutions=False):
    """Tensors of the original repository, named as in mmpretrain."""
    names = {original: theirs for theirs, original in BLOCK.items()}
    result = {}
    for name, x in tensors.items():
        name = '.'.join(names.get(part, part) for part in name.split('.'))
        if name.startswith('head.'):
            name = name.replace('head.', 'head.fc.')
        else:
            name = 'backbone.' + name.replace('norm.', 'norm3.') if name.startswith('norm.') else f'backbone.{name}'
        if '.grn.' in name:
            x = x.reshape(-1)
        elif convolutions and 'pointwise_conv' in name and name.endswith('.weight'):
            x = x[:, :, None, None]
        result[name] = np.ascontiguousarray(x)
    return result


@pytest.mark.parametrize(('name', 'convolutions'), [('convnext_atto', True), ('convnextv2_atto', False)])
def test_a_classifier_of_mmpretrain_loads(tmp_path, name, convolutions):
    """Its weights could not be used, although it is the same network."""
    model = random_model(name)
    tensors = openmmlab(state_dict(model), convolutions=convolutions)
    assert {'backbone.norm3.bias', 'head.fc.weight', 'backbone.stages.1.0.pointwise_conv2.bias'} <= tensors.keys()
    save(tensors, tmp_path / 'epoch_300.safetensors')
    loaded = read_pretrained(tmp_path / 'epoch_300.safetensors')
    assert_equal(loaded.model, model)
    assert loaded.layout == 'original'


@pytest.mark.parametrize(
    'spelling', [openmmlab, lambda tensors: {f'backbone.{name}': x for name, x in tensors.items()}]
)
def test_the_backbone_of_a_detector_loads_with_its_norms(tmp_path, spelling):
    """Training could not start from detectors of mmdetection or of the original repository."""
    backbone = jax.eval_shape(lambda key: create_backbone('convnext_atto', key=key), jax.random.key(0))
    drawn = draw_parameters({name: x.shape for name, x in get_parameters(backbone).items()})
    backbone = with_parameters(backbone, drawn)
    tensors = to_layout(jax.device_get(get_parameters(backbone)), backbone.variant, 'original')
    file = tmp_path / 'mask_rcnn.safetensors'
    save(spelling(tensors) | DETECTOR, file)
    dropped = r'except the backbone are dropped: neck \(1 tensors\), roi_head \(2 tensors\), rpn_head \(1 tensors\)$'
    with pytest.warns(UserWarning, match=dropped):
        loaded = create_backbone(file)
    ours, theirs = get_parameters(loaded), get_parameters(backbone)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name], err_msg=name)
    with pytest.raises(UserError, match='has a norm for each feature map: create_backbone reads it'):
        read_pretrained(file, num_classes=0)


def test_other_parts_are_refused(tmp_path):
    """A part of the network would be dropped silently."""
    tensors = openmmlab(state_dict(random_model('convnext_atto')))
    save(tensors | {'query_embedding.weight': np.ones((2, 3), np.float32)}, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match='query_embedding.weight is unexpected$'):
        read_pretrained(tmp_path / 'model.safetensors')
    del tensors['backbone.stages.2.1.pointwise_conv1.bias']
    tensors['backbone.stages.0.0.pointwise_conv1.weight'] = np.ones((160, 40, 3, 3), np.float32)
    save(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match=r'0.0.pwconv1.weight is \(160, 40, 3, 3\).*2.1.pwconv1.bias is missing'):
        read_pretrained(tmp_path / 'model.safetensors')
