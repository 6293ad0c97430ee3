"""Ahead-of-time compilation of a training step for accelerators that are not attached."""

from convnext_jax.plan.report import plan
from convnext_jax.plan.targets import gpu_target, tpu_target

__all__ = ['gpu_target', 'plan', 'tpu_target']
