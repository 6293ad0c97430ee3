"""What a training step needs on an accelerator that is not here, by compiling it ahead of time."""

from convnext_jax.plan.report import plan
from convnext_jax.plan.targets import gpu_target, tpu_target

__all__ = ['gpu_target', 'plan', 'tpu_target']
