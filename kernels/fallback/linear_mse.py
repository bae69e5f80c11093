"""Linear model and mean squared error in plain torch."""

import torch
from torch import Tensor

from ..checks import acc_dtype
from .matmul import matmul_forward


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
    """Return the loss, and what is needed of E, grad_weight and grad_bias; see kernels/triton/linear_mse.py."""
    wide = acc_dtype(input, weight, target, bias, sample_weight)
    # Each product over all rows: if a block went through both, threads would be waited for twice a block.
    residual = matmul_forward(input, weight.mT, bias, [], torch.promote_types(input.dtype, dtype))
    residual = residual.to(wide).sub_(target)
    error = residual if sample_weight is None else residual * sample_weight
    # Not torch.dot, which adds up in one go: its error grows with the number of terms.
    loss = torch.mul(error, residual, out=None if any(output_mask) else residual).sum()
    factor = 2.0
    if reduction == "mean":
        # Of no rows the loss is nan, but the gradients are 0, as torch's products.
        loss = loss.div_(target.numel())
        factor /= max(1, target.numel())
    results = [loss.to(dtype)]
    if output_mask[0]:
        results.append(error.to(dtype))
    if output_mask[1]:
        # E^T X is divided by the number of samples afterwards: before that it may not fit float16, nor may E.
        operand = wide if input.dtype == torch.float16 else input.dtype
        product = matmul_forward(error.to(operand).mT, input.to(operand), None, [], operand)
        results.append(product.to(wide).mul_(factor))
    if output_mask[2]:
        results.append(error.sum(0).mul_(factor))
    return results


def linear_mse_backward(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, output_mask: list[bool]
) -> list[Tensor]:
    """Return ``g factor E W`` and ``-g factor E``; see kernels/triton/linear_mse.py."""
    scaled = error * (grad_output.to(acc_dtype(error)) * factor)
    results = [scaled.to(weight.dtype) @ weight] if output_mask[0] else []
    return [*results, scaled.neg_().to(error.dtype).contiguous()] if output_mask[1] else results
