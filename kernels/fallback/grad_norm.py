"""The gradients' sum of squares in plain torch, and how a step is guarded by it."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import acc_dtype
from ..optim.bucket import UNGUARDED, Bucket, Guard
from .pieces import Piece, batch_size, cut, flatten, pieces_of
from .threads import is_small, one_thread

ROW = 1 << 10  # with 1 << 13, the norm of 1e6 bfloat16 elements was off by 1.4 times 4 eps of float32


def grad_norm(bucket: Bucket, grad_scale: Tensor | None, out: Tensor) -> None:
    """Write the sum of squares of the unscaled gradients and the number of tensors with non-finite ones.

    Args:
        bucket: its ``grads`` are read.
        grad_scale: 0-d float32, or None for 1.
        out: (2,), overwritten.
    """
    wide = acc_dtype(bucket.grads[0])
    most = batch_size(out.device, wide)
    norms: list[Tensor] = []

    def add(pieces: list[Piece]) -> None:
        norms.extend(_norms(flatten(pieces_of(bucket.grads, pieces)).to(wide), out.dtype))

    small = [i for i, grad in enumerate(bucket.grads) if is_small(grad)]
    with one_thread():
        for pieces in cut(bucket.grads, small, most):  # joining them copies them
            add(pieces)
    for i, grad in enumerate(bucket.grads):
        if not is_small(grad):
            for pieces in cut(bucket.grads, [i], max(1, grad.numel()) if grad.dtype == wide else most):
                add(pieces)
    norm = norms[0] if len(norms) == 1 else torch.cat(norms) if norms else out.new_zeros(1)
    if grad_scale is not None:
        norm = norm / grad_scale
    square = torch.dot(norm, norm)
    out[0] = square
    if out.is_cpu and math.isfinite(square.item()):
        out[1] = 0
    else:  # a norm may overflow though every gradient is finite
        out[1] = sum(~grad.isfinite().all() for grad in bucket.grads)


def _norms(flat: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The norms of all rows of ROW elements, and of the rest: torch adds up more in too few running sums."""
    rows, rest = divmod(flat.numel(), ROW)
    if rows:
        yield torch.linalg.vector_norm(flat[: rows * ROW].view(rows, ROW), dim=1).to(dtype)
    if rest:
        yield torch.linalg.vector_norm(flat[rows * ROW :], dim=0, keepdim=True, dtype=dtype)


class Decision(NamedTuple):
    """A guard read: Python values on the CPU, 0-d tensors elsewhere, so that nothing waits for the device."""

    skip: bool | Tensor
    scale: Tensor | None
    clip: float | Tensor

    @property
    def clips(self) -> bool:
        return isinstance(self.clip, Tensor) or self.clip != 1.0


GO = Decision(False, None, 1.0)


def decide(guard: Guard) -> Decision:
    """Read the guard, and count the step if it is skipped."""
    if guard is UNGUARDED:
        return GO
    if guard.found_inf is None and guard.norms is None:
        return Decision(False, guard.grad_scale, 1.0)
    found = guard.norms if guard.found_inf is None else guard.found_inf
    assert found is not None
    return _decide_on_host(guard) if found.is_cpu else decide_by_tensors(guard)


def _decide_on_host(guard: Guard) -> Decision:
    skip = guard.found_inf is not None and guard.found_inf.item() != 0
    clip = 1.0
    if guard.norms is not None:
        squares, nonfinite = map(sum, zip(*guard.norms.tolist(), strict=True))
        skip = skip or (guard.skip_nonfinite and nonfinite != 0)
        if guard.max_norm is not None:
            ratio = guard.max_norm / (math.sqrt(squares) + 1e-6)
            clip = 1.0 if ratio > 1.0 else ratio  # NaN stays
    if skip and guard.skipped is not None:
        guard.skipped.add_(1)
    return Decision(skip, guard.grad_scale, clip)


def decide_by_tensors(guard: Guard) -> Decision:
    """``decide`` without a look at any value: for devices, tensors without values, and steps to differentiate."""
    skip: bool | Tensor = False
    scale = guard.grad_scale
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
        if scale is not None:
            scale = scale.where(~skip, 1.0)  # a skipped step leaves the gradients as they are
    return Decision(skip, scale, clip)


def raise_steps(steps: list[Tensor], skip: bool | Tensor) -> None:
    """Count an update of every parameter, unless ``skip``."""
    if not steps:
        return
    if isinstance(skip, Tensor):
        torch._foreach_add_(steps, (~skip).to(steps[0].dtype))
    else:
        # A tensor with alpha: a bare 1 would be wrapped into a tensor once per step on the CPU.
        torch._foreach_add_(steps, torch.ones((), dtype=steps[0].dtype, device=steps[0].device), alpha=1)


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
