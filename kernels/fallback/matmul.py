"""Matrix products in plain torch."""

import math

import torch
from torch import Tensor

# A product adds its rows one after the other, for each of its lanes; where that rounds to the same side (small
# integers, constants) 2^19 rows lost 4,000 eps. Sums over data are made of products of so many rows at most.
ROWS = 1 << 12

# Numbers from which blocks gain: below, the start of their threads costs more.
MANY = 1 << 20
# As MANY, for the gradient of one output; fewer are in the last cache, where one thread is as fast.
MANY_FOR_ONE = 1 << 22
# Outputs up to which a gradient of theirs is faster by blocks.
FEW = 64
# Features from which torch multiplies rows that lie side by side by a vector faster with the rows as the left factor.
WIDE = 64


def matmul_forward(
    input: Tensor, other: Tensor, bias: Tensor | None, sum_dims: list[int], dtype: torch.dtype
) -> Tensor:
    """Return ``(input @ other).sum(sum_dims, keepdim=True) + bias``; see kernels/triton/matmul.py."""
    if input.dtype != other.dtype:
        wide = torch.promote_types(input.dtype, other.dtype)
        input, other = input.to(wide), other.to(wide)
    if sum_dims:
        result = _summed_product(_wide(input, dtype), _wide(other, dtype), sum_dims)
    elif bias is not None and bias.dim() == 1 and other.dim() == 2 and dtype == bias.dtype == input.dtype:
        if not _is_long_column(input, other):
            return torch.nn.functional.linear(input, other.mT, bias)
        result = _product(input, other)
    else:
        result = _product(_wide(input, dtype), _wide(other, dtype))
    if bias is not None:
        result = (
            result.add_(bias)
            if result.shape == torch.broadcast_shapes(result.shape, bias.shape)
            else result + bias
        )
    return result.to(dtype)


def rows_by_vectors(rows: Tensor, vectors: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``(B, N, 1)``: rows (B, N, D) times vectors (B, 1, D)."""
    if WIDE <= rows.shape[2] <= rows.stride(1) < 1.5 * rows.shape[2]:
        return torch.bmm(rows, vectors.mT, out=out)
    out = rows.new_empty(*rows.shape[:2], 1) if out is None else out
    return torch.bmm(vectors, rows.mT, out=out.mT).mT


def parts_of(rows: int) -> list[slice]:
    """Cut rows into slices of at most ROWS; no rows are one slice."""
    return [slice(start, start + ROWS) for start in range(0, max(1, rows), ROWS)]


def _product(input: Tensor, other: Tensor) -> Tensor:
    """Multiply matrices, of many rows by blocks: torch's product of a matrix and a vector has one thread, that of a
    batch has all. 16 bits are multiplied as a whole: parts of a sum would be rounded before they are added."""
    if input.dim() > 2 and other.dim() == 2 and input.is_contiguous():
        return _product(input.flatten(0, -2), other).view(*input.shape[:-1], other.shape[1])
    if not (input.dim() == other.dim() == 2 and input.is_cpu and input.element_size() > 2):
        return torch.matmul(input, other)
    if _is_long_column(input, other):
        return _column(input, other)
    (rows, inner), columns = input.shape, other.shape[1]
    if columns == 1 == rows and inner >= 2 * ROWS and input.stride(1) == 0 and input[0, 0] == 1:
        return other.sum(0, keepdim=True)  # the gradient of a bias
    left, right = (other, input.mT) if columns == 1 else (input.mT, other)
    # Where the numbers of a sum lie together, torch's product of a matrix and a vector has all threads, too.
    across = right.shape[1] == 1 or right.stride(1) == 1
    few, many = sorted((rows, columns))
    enough = MANY_FOR_ONE if few == 1 < many else MANY
    if inner >= 2 * ROWS and max(input.numel(), other.numel()) >= enough and few <= FEW and across:
        return _summed_over_rows(left, right).view(rows, columns)
    return torch.matmul(input, other)


def _is_long_column(input: Tensor, other: Tensor) -> bool:
    """Return whether ``_column`` serves the product; not in 16 bits, whose sums are rounded before a bias is added."""
    (*rows, inner), columns = input.shape, other.shape[1]
    return (
        columns == 1
        and math.prod(rows) >= 2 * ROWS
        and (inner == 1 or input.numel() >= MANY)
        and input.is_cpu
        and input.element_size() > 2
    )


def _column(input: Tensor, other: Tensor) -> Tensor:
    """Return ``input @ other``, ``(N, 1)``."""
    result = input.new_empty(len(input), 1)
    if input.shape[1] == 1:
        return torch.mul(input, other, out=result)
    blocks, rest = _blocks(input)
    whole, last = _blocks(result)
    # Not a view of ``other``, for its strides; see _blocks.
    rows_by_vectors(blocks, other.reshape(1, 1, -1).expand(len(blocks), -1, -1), whole)
    torch.mm(rest, other, out=last)
    return result


def _blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(N, D)`` as ``(blocks, ROWS, D)``, and the rows that are left."""
    whole = len(rows) // ROWS * ROWS
    if rows.shape[1] == 1:  # BLAS takes no column whose strides are both 1
        return rows[:whole, 0].unflatten(0, (-1, 1, ROWS)).mT, rows[whole:]
    return rows[:whole].unflatten(0, (-1, ROWS)), rows[whole:]


def _summed_over_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left^T right``."""
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
            per_sample_weights=left.squeeze(1).contiguous(),  # of others one thread takes care
        )
        return parts.sum(0, keepdim=True)
    (lefts, last_left), (rights, last_right) = _blocks(left), _blocks(right)
    return torch.bmm(lefts.mT, rights).sum(0).addmm_(last_left.mT, last_right)


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the operand itself, or a wider copy where the result is to be wider than the operands."""
    return tensor if tensor.dtype == dtype else tensor.to(torch.promote_types(tensor.dtype, dtype))


def _summed_product(input: Tensor, other: Tensor, sum_dims: list[int]) -> Tensor:
    """Join the batch dimensions to be summed to the inner dimension: one product instead of a sum of products."""
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    kept = [dim for dim in range(len(batch)) if dim not in sum_dims]
    rows, columns = len(batch), len(batch) + 1
    left = input.expand(*batch, *input.shape[-2:]).permute(*kept, rows, *sum_dims, columns)
    right = other.expand(*batch, *other.shape[-2:]).permute(*kept, *sum_dims, rows, columns)
    left = left.flatten(len(kept) + 1)
    right = right.flatten(len(kept), -2)
    result = _product(left, right)
    for dim in sum_dims:
        result = result.unsqueeze(dim)
    return result
