"""Linear model and mean squared error in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import accumulator
from .matmul import matmul_forward

# What the last cache holds is read twice at little cost. Larger data are taken in blocks of rows, so that the
# gradient's product finds them in the cache. With many outputs the products are bound by arithmetic.
_CACHED_BYTES = 1 << 25
_BLOCK_BYTES = 1 << 21
_FEW_OUTPUTS = 16


def linear_mse_forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    needs: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The loss, and what is needed of E, grad_weight and grad_bias; see kernels/triton/linear_mse.py."""
    rows = _block_rows(input, target)
    xs, ys = _blocks(input, rows), _blocks(target, rows)
    ss = [None] * len(xs) if sample_weight is None else _blocks(sample_weight, rows)
    sums: list[Tensor] = []
    errors: list[Tensor] = []
    for x, y, s in zip(xs, ys, ss, strict=True):
        loss, error, *grads = _block(x, weight, y, bias, s, needs[1:], dtype)
        if needs[0]:
            errors.append(error.to(dtype))
        sums = [a.add_(b) for a, b in zip(sums, (loss, *grads), strict=True)] if sums else [loss, *grads]
    if reduction == "mean":
        sums[0].div_(target.numel())
        # Of no rows the gradients are 0, as torch's products; the loss is nan.
        sums[1:] = [total.div_(max(1, target.numel())) for total in sums[1:]]
    loss, *grads = sums
    whole = [errors[0] if len(errors) == 1 else torch.cat(errors)] if needs[0] else []
    return [loss.to(dtype), *whole, *(grad.mul_(2) for grad in grads)]


def linear_mse_backward(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, needs: list[bool]
) -> list[Tensor]:
    """``g factor E W`` and ``-g factor E``; see kernels/triton/linear_mse.py."""
    scaled = error * (grad_output.to(accumulator(error)) * factor)
    results = [scaled.to(weight.dtype) @ weight] if needs[0] else []
    return [*results, scaled.neg_().to(error.dtype).contiguous()] if needs[1] else results


def _block_rows(input: Tensor, target: Tensor) -> int:
    rows, features = input.shape
    if input.nbytes <= _CACHED_BYTES or target.shape[1] > _FEW_OUTPUTS or not input.is_cpu:
        return max(1, rows)
    return max(16, _BLOCK_BYTES // max(1, features * input.element_size()))


def _blocks(tensor: Tensor, rows: int) -> Sequence[Tensor]:
    return [tensor] if tensor.shape[0] <= rows else tensor.split(rows)


def _block(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    samples: Tensor | None,
    needs: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """For some of the rows: sum(s e^2), E, and half of grad_weight and grad_bias, as the sum reduces them."""
    wide = accumulator(input, weight, target, bias, samples)
    residual = matmul_forward(input, weight.mT, bias, [], torch.promote_types(input.dtype, dtype)).to(wide)
    residual = residual.sub_(target)
    error = residual if samples is None else residual * samples
    # Not torch.dot, which adds up in one go: its error grows with the number of terms.
    results = [(error * residual).sum(), error]
    if needs[0]:
        results.append((error.to(input.dtype).mT @ input).to(wide))
    if needs[1]:
        results.append(error.sum(0))
    return results
