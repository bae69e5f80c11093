"""One view of elementwise operands of any layout: rows and columns, in place, whatever their strides."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Steps = tuple[int, ...]  # each operand's stride along one dimension


class Rows(NamedTuple):
    """How operands are walked: for each of ``slices``, ``rows`` rows of ``n`` columns.

    Attributes:
        slices: product of the batch_dims dims' sizes.
        rows: rows of one slice; 1 if there are several slices.
        n: columns of a row.
        order: the permutation of dims under which the walk is row-major.
        sizes: what the number of a row counts, slices included: the sizes of dims, the last varying slowest.
        strides: of each operand along ``sizes``, and along a row; None there says that it does not vary.
    """

    slices: int
    rows: int
    n: int
    order: list[int]
    sizes: tuple[int, ...]
    strides: Sequence[tuple[tuple[int, ...], int | None]]


def _merged(dims: list[tuple[int, Steps]]) -> list[tuple[int, Steps]]:
    """The (size, strides) of the dims, outermost first, neighbours joined where every operand walks them as one."""
    merged: list[tuple[int, Steps]] = []
    for size, steps in dims:
        if size == 1:
            continue
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    return merged


def lie_order(batch_dims: int, input: Tensor) -> list[int]:
    """The first ``batch_dims`` dims as they are, the others in the order in which input's elements lie."""
    # What torch gives a new tensor like input: dense, even where input is not.
    dense = torch.empty_like(input, device="meta").stride()
    return [*range(batch_dims), *sorted(range(batch_dims, input.dim()), key=lambda d: -dense[d])]


def walk_rows(batch_dims: int, input: Tensor, *others: Tensor | None) -> Rows:
    """Walk operands of one shape in the order of lie_order; the first ``batch_dims`` dims are slices.

    Operands that lie alike, permuted or not, become one row. Nothing is copied.
    """
    tensors = [input, *others]
    if batch_dims == 0 and all(tensor is None or _flat(tensor) for tensor in tensors):
        flat = [((), 1 if tensor is not None and tensor.is_contiguous() else None) for tensor in tensors]
        return Rows(1, 1, input.numel(), list(range(input.dim())), (), flat)
    order = lie_order(batch_dims, input)
    strides = [(0,) * input.dim() if tensor is None else tensor.stride() for tensor in tensors]
    dims = [(input.shape[d], tuple(stride[d] for stride in strides)) for d in order]
    inner = _merged(dims[batch_dims:])
    n, columns = inner.pop() if inner else (1, (0,) * len(tensors))
    outer = _merged([*dims[:batch_dims], *inner])[::-1]
    slices = math.prod(input.shape[:batch_dims])
    pairs = [(tuple(steps[i] for _, steps in outer), column or None) for i, column in enumerate(columns)]
    return Rows(slices, input.numel() // (slices * n), n, order, tuple(size for size, _ in outer), pairs)


def _flat(tensor: Tensor) -> bool:
    """Whether it is one row: dense, or one number everywhere."""
    return tensor.is_contiguous() or not any(tensor.stride())
