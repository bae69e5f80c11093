"""The gradients' sum of squares in plain torch, and how a step is guarded by it."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..buckets import Bucket, Guard
from ..dtypes import accumulator


def grad_norm(bucket: Bucket, grad_scale: Tensor | None, out: Tensor) -> None:
    """Write the sum of squares of the unscaled gradients and the number of tensors with non-finite ones.

    Args:
        bucket: its ``grads`` are read.
        grad_scale: 0-d float32, or None for 1.
        out: (2,), overwritten.
    """
    wide = accumulator(bucket.grads[0])
    norms = torch.stack([torch.linalg.vector_norm(grad, dtype=wide) for grad in bucket.grads]).to(out.dtype)
    if grad_scale is not None:
        norms = norms / grad_scale
    out[0] = norms.square().sum()
    finite = norms.isfinite()
    if not (out.is_cpu and finite.all()):
        # A norm may overflow though every gradient is finite.
        finite = torch.stack([grad.isfinite().all() for grad in bucket.grads])
    out[1] = (~finite).sum()


class Decision(NamedTuple):
    """A guard read: Python values on the CPU, 0-d tensors elsewhere, so that nothing waits for the device."""

    skip: bool | Tensor
    scale: Tensor | None
    clip: float | Tensor


def decide(guard: Guard) -> Decision:
    """Read the guard, and count the step if it is skipped."""
    skip: bool | Tensor = False
    clip: float | Tensor = 1.0
    if guard.found_inf is not None:
        skip = guard.found_inf != 0
    if guard.norms is not None:
        squares, nonfinite = guard.norms.sum(0)
        if guard.skip_nonfinite:
            skip = (nonfinite != 0) | skip
        if guard.max_norm is not None:
            clip = (guard.max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    if isinstance(skip, Tensor):
        if guard.skipped is not None:
            guard.skipped.add_(skip)
        if skip.is_cpu:
            skip = bool(skip)
    if isinstance(clip, Tensor) and clip.is_cpu:
        clip = clip.item()
    return Decision(skip, guard.grad_scale, clip)


def unscaled(grad: Tensor, decision: Decision, dtype: torch.dtype) -> Tensor:
    """The gradient in ``dtype``, unscaled and clipped; the unscaled one is written back as torch does."""
    wide = grad.to(dtype)
    if decision.scale is not None:
        wide = wide / decision.scale
        store(grad, wide, decision.skip)
    return wide if isinstance(decision.clip, float) and decision.clip == 1.0 else wide * decision.clip


def store(out: Tensor, value: Tensor, skip: bool | Tensor) -> None:
    """Write ``value`` into ``out`` unless ``skip``."""
    out.copy_(torch.where(skip, out, value.to(out.dtype)) if isinstance(skip, Tensor) else value)
