"""Models of timm (`timm:NAME`) as cases of the comparison. Only timm runs them, eager and compiled."""

import difflib
import importlib.util

from convnext_jax.errors import UserError, first_line

PREFIX = 'timm:'


def count(model: str, size: int, classes: int) -> tuple[int, int]:
    """The parameters of a model, and the multiply-adds of its forward pass for one image by torch's FLOP counter.

    The model and the image are on torch's meta device, which has shapes but no data.

    Args:
        model: 'timm:NAME'.
        size: height and width of the image in pixels.
        classes: outputs of the head.

    Raises:
        UserError: timm is not installed or has no such model, or the model does not accept images of this size.
    """
    if importlib.util.find_spec('timm') is None:
        raise UserError(f'{model} needs timm: pip install timm')
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    name = model.removeprefix(PREFIX)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f': did you mean {", ".join(near)}?' if near else ''
        raise UserError(f"timm has no model '{name}'{hint}")
    try:
        with torch.device('meta'), torch.inference_mode(), FlopCounterMode(display=False) as counter:
            network = timm.create_model(name, num_classes=classes).eval()
            network(torch.empty(1, 3, size, size))
    except Exception as error:  # each architecture checks the size in its own way
        raise UserError(f'{model} does not run at --size={size}: {first_line(error)}') from error
    return sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops() // 2
