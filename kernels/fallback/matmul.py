"""Matrix products in plain torch."""

import torch
from torch import Tensor

# A product adds its rows one after the other, for each of its lanes; where that rounds to the same side (small
# integers, constants) 2^19 rows lost 4,000 eps. Sums over data are made of products of so many rows at most.
ROWS = 1 << 12


def matmul_forward(
    input: Tensor, other: Tensor, bias: Tensor | None, sum_dims: list[int], dtype: torch.dtype
) -> Tensor:
    """``(input @ other).sum(sum_dims, keepdim=True) + bias``; see kernels/triton/matmul.py."""
    if input.dtype != other.dtype:
        wide = torch.promote_types(input.dtype, other.dtype)
        input, other = input.to(wide), other.to(wide)
    if sum_dims:
        result = _summed_product(_wide(input, dtype), _wide(other, dtype), sum_dims)
    elif bias is not None and bias.dim() == 1 and other.dim() == 2 and dtype == bias.dtype == input.dtype:
        return torch.nn.functional.linear(input, other.mT, bias)
    else:
        result = torch.matmul(_wide(input, dtype), _wide(other, dtype))
    if bias is not None:
        result = (
            result.add_(bias)
            if result.shape == torch.broadcast_shapes(result.shape, bias.shape)
            else result + bias
        )
    return result.to(dtype)


def parts_of(rows: int) -> list[slice]:
    """At most ROWS each; of no rows, one."""
    return [slice(start, start + ROWS) for start in range(0, max(1, rows), ROWS)]


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The operand itself, or a wider copy where the result is to be wider than the operands."""
    return tensor if tensor.dtype == dtype else tensor.to(torch.promote_types(tensor.dtype, dtype))


def _summed_product(input: Tensor, other: Tensor, sum_dims: list[int]) -> Tensor:
    """The batch dimensions to be summed join the inner dimension: one product instead of a sum of products."""
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    kept = [dim for dim in range(len(batch)) if dim not in sum_dims]
    rows, columns = len(batch), len(batch) + 1
    left = input.expand(*batch, *input.shape[-2:]).permute(*kept, rows, *sum_dims, columns)
    right = other.expand(*batch, *other.shape[-2:]).permute(*kept, *sum_dims, rows, columns)
    left = left.flatten(len(kept) + 1)
    right = right.flatten(len(kept), -2)
    result = torch.matmul(left, right)
    for dim in sum_dims:
        result = result.unsqueeze(dim)
    return result
