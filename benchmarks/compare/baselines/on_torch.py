"""timm, eager and with torch.compile, and transformers; in channels_last, which is the fastest layout."""

import time
from collections.abc import Callable

import torch

from benchmarks.compare.baselines.workload import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    Baseline,
    Device,
    Workload,
    example_batch,
)

Forward = Callable[[torch.Tensor], torch.Tensor]
COMPILE_MODES = {'compile': 'default', 'compile_max': 'max-autotune'}
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def build(workload: Workload) -> Baseline:
    """Sets up the workload."""
    if DEVICE.type == 'cuda':
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision('high')  # TensorFloat-32, as JAX multiplies float32 by default
    model, forward = _transformers(workload) if workload.implementation == 'transformers' else _timm(workload)
    model.to(DEVICE, memory_format=torch.channels_last).train(workload.training)
    images, labels = (torch.from_numpy(array).to(DEVICE) for array in example_batch(workload))
    images = images.permute(0, 3, 1, 2)  # shape NCHW, memory NHWC: channels_last
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=workload.dtype == 'bfloat16')
    optimizer = _adamw(model)

    def train() -> torch.Tensor:
        optimizer.zero_grad()
        with autocast:
            logits = forward(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    def evaluate() -> torch.Tensor:
        with torch.inference_mode(), autocast:
            return forward(images)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Baseline(train if workload.training else evaluate, parameters, torch_device())


def _timm(workload: Workload) -> tuple[torch.nn.Module, Forward]:
    import timm

    model = timm.create_model(workload.model, num_classes=workload.classes)
    mode = COMPILE_MODES.get(workload.implementation)
    return model, torch.compile(model, mode=mode) if mode else model


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


def torch_device() -> Device:
    """The GPU, or else the CPU."""
    if DEVICE.type == 'cpu':
        return Device('cpu', _cpu_seconds, _make_matmul, _make_copy, lambda: None)
    return Device(
        torch.cuda.get_device_name(), _cuda_seconds, _make_matmul, _make_copy, torch.cuda.max_memory_allocated
    )


def _cpu_seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _cuda_seconds(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _make_matmul(side: int, dtype: str) -> Callable[[], torch.Tensor]:
    left, right = torch.randn(2, side, side, dtype=getattr(torch, dtype), device=DEVICE)
    return lambda: left @ right


def _make_copy(size: int) -> Callable[[], torch.Tensor]:
    source, target = torch.ones(size // 4, device=DEVICE), torch.zeros(size // 4, device=DEVICE)
    return lambda: target.copy_(source)
