"""timm, eager and under torch.compile, and transformers; channels_last, which is fastest."""

from collections.abc import Callable

import torch

from benchmarks.compare.baselines.workload import (
    LEARNING_RATE,
    MATMUL_SIDE,
    WEIGHT_DECAY,
    Baseline,
    Workload,
    example_batch,
)

Forward = Callable[[torch.Tensor], torch.Tensor]


def build(workload: Workload) -> Baseline:
    """Sets up the workload."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model, forward = _transformers(workload) if workload.implementation == 'transformers' else _timm(workload)
    model.to(device, memory_format=torch.channels_last).train(workload.training)
    images, labels = (torch.from_numpy(array).to(device) for array in example_batch(workload))
    images = images.permute(0, 3, 1, 2)  # NCHW to the eye, NHWC in memory: channels_last
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=workload.dtype == 'bfloat16')
    square = torch.ones(MATMUL_SIDE, MATMUL_SIDE, dtype=getattr(torch, workload.dtype), device=device)
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
    return Baseline(train if workload.training else evaluate, matmul, parameters, name)


def _timm(workload: Workload) -> tuple[torch.nn.Module, Forward]:
    import timm

    model = timm.create_model(workload.model, num_classes=workload.classes)
    return model, torch.compile(model) if workload.implementation == 'compile' else model


def _transformers(workload: Workload) -> tuple[torch.nn.Module, Forward]:
    import transformers

    kind = 'ConvNextV2' if workload.variant['grn'] else 'ConvNext'
    config = getattr(transformers, f'{kind}Config')(
        depths=workload.variant['depths'],
        hidden_sizes=workload.variant['widths'],
        num_stages=len(workload.variant['depths']),
        patch_size=workload.variant['patch_size'],
        num_labels=workload.classes,
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
