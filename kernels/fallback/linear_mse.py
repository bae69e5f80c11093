"""Linear model and mean squared error in plain torch."""

import torch
from torch import Tensor

from ..checks import acc_dtype
from .matmul import ROWS, WIDE, blocks_of, matmul_forward, rows_by_vectors


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
    wide = acc_dtype(input, weight, target, bias, sample_weight)
    # Each product over all rows: if a block went through both, threads would be waited for twice a block.
    residual = _predictions(input, weight, bias, dtype).to(wide).sub_(target)
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
        results.append(_summed_over_rows(error.to(operand), input.to(operand)).to(wide).mul_(factor))
    if output_mask[2]:
        results.append(error.sum(0).mul_(factor))
    return results


def linear_mse_backward(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, output_mask: list[bool]
) -> list[Tensor]:
    """``g factor E W`` and ``-g factor E``; see kernels/triton/linear_mse.py."""
    scaled = error * (grad_output.to(acc_dtype(error)) * factor)
    results = [scaled.to(weight.dtype) @ weight] if output_mask[0] else []
    return [*results, scaled.neg_().to(error.dtype).contiguous()] if output_mask[1] else results


def _predictions(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if input.dtype != dtype:
        return matmul_forward(input, weight.mT, bias, [], torch.promote_types(input.dtype, dtype))
    if len(weight) > 1 or len(input) < 2 * ROWS or input.element_size() == 2 or not input.is_cpu:
        return torch.nn.functional.linear(input, weight, bias)
    blocks, rest = blocks_of(input)
    result = input.new_empty(len(input), 1)
    whole, last = result[: len(input) - len(rest)], result[len(input) - len(rest) :]
    rows_by_vectors(blocks, weight.expand(len(blocks), -1, -1), out=whole.view(-1, ROWS, 1))
    torch.mm(rest, weight.mT, out=last)
    return result if bias is None else result.add_(bias)


def _summed_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` by blocks; 16 bits as a whole: parts of them would be rounded before they are added."""
    if len(left) < 2 * ROWS or left.element_size() == 2 or not left.is_cpu:
        return left.mT @ right
    if (
        left.shape[1] == 1
        and right.shape[1] >= WIDE
        and right.dtype == torch.float32
        and right.is_contiguous()
    ):
        parts = torch.nn.functional.embedding_bag(
            torch.arange(len(right), device=right.device),
            right,
            torch.arange(0, len(right), ROWS, device=right.device),
            mode="sum",
            per_sample_weights=left.squeeze(1),
        )
        return parts.sum(0, keepdim=True)
    (lefts, last_left), (rights, last_right) = blocks_of(left), blocks_of(right)
    return torch.bmm(lefts.mT, rights).sum(0).addmm_(last_left.mT, last_right)
