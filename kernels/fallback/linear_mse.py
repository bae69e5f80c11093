"""Linear model and mean squared error in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import accumulator
from .matmul import matmul_forward

# What the last cache holds is read twice at little cost. Larger data are taken in blocks of rows, so that the
# gradient's product finds them in the cache. With many outputs the products are bound by arithmetic.
_CACHED_BYTES = 1 << 25
_BLOCK_BYTES = 1 << 22
_FEW_OUTPUTS = 16


def linear_mse_forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The loss, and what is needed of E, grad_weight and grad_bias; see kernels/triton/linear_mse.py."""
    wide = accumulator(input, weight, target, bias, sample_weight)
    rows = _block_rows(input, target) if output_mask[1] else max(1, input.shape[0])
    xs, ys = _blocks(input, rows), _blocks(target, rows)
    ss = [None] * len(xs) if sample_weight is None else _blocks(sample_weight, rows)
    # E^T X is divided by the number of samples afterwards: before that it may not fit float16, nor may E.
    operand = wide if input.dtype == torch.float16 else input.dtype
    residuals, errors = [], []
    grad_weight = None
    for x, y, s in zip(xs, ys, ss, strict=True):
        residual = _predictions(x, weight, bias, dtype).to(wide).sub_(y)
        error = residual if s is None else residual * s
        residuals.append(residual)
        errors.append(error)
        if output_mask[1]:
            product = (error.to(operand).mT @ x.to(operand)).to(wide)
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
    residual = _joined(residuals)
    error = residual if sample_weight is None else _joined(errors)
    # Not torch.dot, which adds up in one go: its error grows with the number of terms.
    loss = (error * residual).sum()
    factor = 2.0
    if reduction == "mean":
        # Of no rows the loss is nan, but the gradients are 0, as torch's products.
        loss = loss.div_(target.numel())
        factor /= max(1, target.numel())
    results = [loss.to(dtype)]
    if output_mask[0]:
        results.append(error.to(dtype))
    if grad_weight is not None:
        results.append(grad_weight.mul_(factor))
    if output_mask[2]:
        results.append(error.sum(0).mul_(factor))
    return results


def linear_mse_backward(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, output_mask: list[bool]
) -> list[Tensor]:
    """``g factor E W`` and ``-g factor E``; see kernels/triton/linear_mse.py."""
    scaled = error * (grad_output.to(accumulator(error)) * factor)
    results = [scaled.to(weight.dtype) @ weight] if output_mask[0] else []
    return [*results, scaled.neg_().to(error.dtype).contiguous()] if output_mask[1] else results


def _block_rows(input: Tensor, target: Tensor) -> int:
    rows, features = input.shape
    if input.nbytes <= _CACHED_BYTES or target.shape[1] > _FEW_OUTPUTS or not input.is_cpu:
        return max(1, rows)
    return max(16, _BLOCK_BYTES // max(1, features * input.element_size()))


def _blocks(tensor: Tensor, rows: int) -> Sequence[Tensor]:
    return [tensor] if tensor.shape[0] <= rows else tensor.split(rows)


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _predictions(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if input.dtype == dtype:
        return torch.nn.functional.linear(input, weight, bias)
    return matmul_forward(input, weight.mT, bias, [], torch.promote_types(input.dtype, dtype))
