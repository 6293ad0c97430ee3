"""timm, eager and under torch.compile, and transformers; channels_last, as is fastest there."""

from collections.abc import Callable

import torch
from contender import LEARNING_RATE, MATMUL_SIDE, WEIGHT_DECAY, Contender, Task, example_batch

Forward = Callable[[torch.Tensor], torch.Tensor]


def build(task: Task) -> Contender:
    """Sets it up."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model, forward = _transformers(task) if task.contender == 'transformers' else _timm(task)
    model.to(device, memory_format=torch.channels_last).train(task.training)
    images, labels = (torch.from_numpy(array).to(device) for array in example_batch(task))
    images = images.permute(0, 3, 1, 2)  # NCHW to the eye, NHWC in memory: channels_last
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=task.dtype == 'bfloat16')
    square = torch.ones(MATMUL_SIDE, MATMUL_SIDE, dtype=getattr(torch, task.dtype), device=device)
    optimizer = _adamw(model)

    def train() -> None:
        optimizer.zero_grad()
        with autocast:
            logits = forward(images)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        _wait(device)

    def evaluate() -> None:
        with torch.inference_mode(), autocast:
            forward(images)
        _wait(device)

    def matmul() -> None:
        square @ square
        _wait(device)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = 'cpu' if device.type == 'cpu' else torch.cuda.get_device_name()
    return Contender(train if task.training else evaluate, matmul, parameters, name)


def _timm(task: Task) -> tuple[torch.nn.Module, Forward]:
    import timm

    model = timm.create_model(task.model, num_classes=task.classes)
    return model, torch.compile(model) if task.contender == 'compile' else model


def _transformers(task: Task) -> tuple[torch.nn.Module, Forward]:
    import transformers

    kind = 'ConvNextV2' if task.variant['grn'] else 'ConvNext'
    config = getattr(transformers, f'{kind}Config')(
        depths=task.variant['depths'],
        hidden_sizes=task.variant['widths'],
        num_stages=len(task.variant['depths']),
        patch_size=task.variant['patch_size'],
        num_labels=task.classes,
    )
    model = getattr(transformers, f'{kind}ForImageClassification')(config)
    return model, lambda images: model(images).logits


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{'params': decayed, 'weight_decay': WEIGHT_DECAY}, {'params': others, 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize()
