"""One view of elementwise operands of any layout: rows and columns, with two strides for each operand."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """How operands are walked: for each of ``slices``, ``rows`` rows of ``n`` columns.

    Attributes:
        slices: product of the kept dims' sizes.
        rows: rows of one slice; 1 if there are several slices.
        n: columns of a row.
        order: the permutation of dims under which the walk is row-major.
        tensors: the operands; those that no two strides describe are copies.
        strides: (row stride, column stride) of each operand; a column stride of None says that it
            does not vary along a row.
    """

    slices: int
    rows: int
    n: int
    order: list[int]
    tensors: list[Tensor | None]
    strides: list[tuple[int, int | None]]


def _merged(sizes: list[int], strides: list[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    """(size, each operand's stride) of the dims, neighbours joined where every operand walks them as one."""
    dims: list[tuple[int, tuple[int, ...]]] = []
    for d, size in enumerate(sizes):
        step = tuple(stride[d] for stride in strides)
        if size == 1:
            continue
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], step, strict=True)):
            dims[-1] = (dims[-1][0] * size, step)
        else:
            dims.append((size, step))
    return dims


def lie_order(kept: int, input: Tensor) -> list[int]:
    """The first ``kept`` dims as they are, the others in the order in which input's elements lie."""
    # What torch gives a new tensor like input: dense, even where input is not.
    dense = torch.empty_like(input, device="meta").stride()
    return [*range(kept), *sorted(range(kept, input.dim()), key=lambda d: -dense[d])]


def walk_rows(kept: int, input: Tensor, *others: Tensor | None) -> Rows:
    """Walk operands of one shape in the order of lie_order; the first ``kept`` dims are slices.

    Operands that lie alike, permuted or not, become one row. One that no two strides describe is copied.
    """
    tensors = [input, *others]
    if kept == 0 and all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        return Rows(1, 1, input.numel(), list(range(input.dim())), tensors, [(0, 1)] * len(tensors))
    order = lie_order(kept, input)
    turned = [None if tensor is None else tensor.permute(order) for tensor in tensors]
    sizes = [input.shape[d] for d in order]
    for _ in range(2):
        strides = [tensor.stride() for tensor in turned if tensor is not None]
        outer = _merged(sizes[:kept], [stride[:kept] for stride in strides])
        inner = _merged(sizes[kept:], [stride[kept:] for stride in strides])
        if len(outer) <= 1 and len(inner) <= (1 if kept else 2):
            break
        turned = [None if tensor is None else tensor.contiguous() for tensor in turned]
    single = (1, (0,) * len(strides))
    columns = inner.pop() if inner else single
    rows = (outer or inner or [single])[0]
    steps = iter([(row, column or None) for row, column in zip(rows[1], columns[1], strict=True)])
    slices = math.prod(sizes[:kept])
    pairs = [(0, None) if tensor is None else next(steps) for tensor in turned]
    return Rows(slices, rows[0] // slices, columns[0], order, turned, pairs)
