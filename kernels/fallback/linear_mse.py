"""Linear model and mean squared error in plain torch."""

import torch
from torch import Tensor

from .matmul import matmul_forward


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def linear_mse_forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    samples: Tensor | None,
    reduction: str,
    needs: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The loss, and what is needed of E, grad_weight and grad_bias; see kernels/triton/linear_mse.py."""
    wide = _accumulator(input)
    residual = matmul_forward(input, weight.mT, bias, [], torch.promote_types(input.dtype, dtype)).to(wide)
    residual = residual.sub_(target)
    error = residual if samples is None else residual * samples
    scale = 1.0 / max(1, target.numel()) if reduction == "mean" else 1.0
    loss = torch.dot(error.reshape(-1), residual.reshape(-1))
    loss = loss / target.numel() if reduction == "mean" else loss
    results = [loss.to(dtype)]
    if needs[0]:
        results.append(error.to(dtype))
    if needs[1]:
        results.append((error.to(input.dtype).mT @ input).to(wide).mul_(2 * scale))
    if needs[2]:
        results.append(error.sum(0).mul_(2 * scale))
    return results


def linear_mse_backward(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, needs: list[bool]
) -> list[Tensor]:
    """``g factor E W`` and ``-g factor E``; see kernels/triton/linear_mse.py."""
    scaled = error * (grad_output.to(_accumulator(error)) * factor)
    results = []
    if needs[0]:
        results.append(scaled.to(weight.dtype) @ weight)
    if needs[1]:
        results.append(scaled.neg_().to(error.dtype) if len(results) == 0 else (-scaled).to(error.dtype))
    return results
