"""How kernels index operands of any layout, in place: in as few dimensions as the strides allow.

``coalesce_dims`` serves elementwise kernels, ``contract`` serves matrix products.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Dim = tuple[int, ...]  # a size, then each operand's stride; a stride of 0 repeats


def _merged(outer: Dim, inner: Dim) -> Dim | None:
    """Merge the two dimensions if each operand steps along ``outer`` by going past the end of ``inner``."""
    if inner[0] == 1:
        return outer
    if all(far == inner[0] * near for far, near in zip(outer[1:], inner[1:], strict=True)):
        return outer[0] * inner[0], *inner[1:]
    return None


def _coalesced(dims: Sequence[Dim]) -> list[Dim]:
    """Return the dimensions, outermost first, without those of size 1 and with neighbours merged where possible."""
    result: list[Dim] = []
    for dim in dims:
        if dim[0] == 1:
            continue
        if result and (merged := _merged(result[-1], dim)):
            result[-1] = merged
        else:
            result.append(dim)
    return result


class Operand(NamedTuple):
    """An operand of an elementwise kernel, as the kernel receives it.

    Attributes:
        ptr: the tensor.
        strides: along the dimensions of ``Walk.sizes``.
        column: the stride along a row.
    """

    ptr: Tensor
    strides: tuple[int, ...]
    column: int


class RowOperand(NamedTuple):
    """An operand that has one value per row; fields as of Operand."""

    ptr: Tensor
    strides: tuple[int, ...]


class Walk(NamedTuple):
    """The index space of elementwise operands: ``batch`` times ``rows`` rows of ``n`` columns.

    Attributes:
        batch: the product of the kept dimensions' sizes, but for those that are columns.
        rows: of one element of the batch.
        n: columns of a row.
        kept: the kept dimensions in memory order.
        columns_kept: the columns are kept dimensions, not summed ones.
        sizes: the dimensions that a row's number counts, batch included; the last one varies slowest.
        operands: in the order of the tensors; None for a tensor that is None.
    """

    batch: int
    rows: int
    n: int
    kept: list[int]
    columns_kept: bool
    sizes: tuple[int, ...]
    operands: list[Operand | RowOperand | None]


def memory_order(input: Tensor) -> list[int]:
    """Return the dimensions from the slowest varying in memory to the fastest."""
    # torch gives a tensor like input dense strides in the same order, even where input has gaps.
    dense = torch.empty_like(input, device="meta").stride()
    return sorted(range(input.dim()), key=lambda d: -dense[d])


def coalesce_dims(
    kept: Sequence[int], input: Tensor, *others: Tensor | None, results: Sequence[Tensor | None] = ()
) -> Walk:
    """Return the walk over tensors of one shape in input's memory order; it does not sum over the ``kept`` dimensions.

    If none are kept, tensors of the same dense strides, permuted or not, become one row. The ``results``, dense
    tensors of the same shape, are the last of the operands.
    """
    tensors = [input, *others, *results]
    if not kept and all(tensor is None or _is_flat(tensor) for tensor in tensors):
        flat: list[Operand | RowOperand | None] = [
            None if t is None else Operand(t, (), 1) if t.is_contiguous() else RowOperand(t, ())
            for t in tensors
        ]
        return Walk(1, 1, input.numel(), [], False, (), flat)
    order = memory_order(input)
    strides = [(0,) * input.dim() if tensor is None else tensor.stride() for tensor in tensors]
    dims = [(input.shape[d], *(stride[d] for stride in strides)) for d in order]
    outer = _coalesced([dim for d, dim in zip(order, dims, strict=True) if d in kept])
    inner = _coalesced([dim for d, dim in zip(order, dims, strict=True) if d not in kept])
    fastest = next((d for d in reversed(order) if input.shape[d] != 1), None)
    columns_kept = fastest in kept
    n, *columns = (
        (outer if columns_kept else inner).pop() if fastest is not None else (1, *(0 for _ in tensors))
    )
    batch, rows = (math.prod(dim[0] for dim in half) for half in (outer, inner))
    counted = _coalesced([*outer, *inner])[::-1]
    operands: list[Operand | RowOperand | None] = []
    for i, (tensor, column) in enumerate(zip(tensors, columns, strict=True), 1):
        along = tuple(dim[i] for dim in counted)
        if tensor is None:
            operands.append(None)
        elif column or i > len(tensors) - len(results):
            operands.append(Operand(tensor, along, column or 1))
        else:
            operands.append(RowOperand(tensor, along))
    sizes = tuple(dim[0] for dim in counted)
    return Walk(batch, rows, n, [d for d in order if d in kept], columns_kept, sizes, operands)


def _is_flat(tensor: Tensor) -> bool:
    """Return whether the tensor is one row: contiguous, or the same number everywhere."""
    return tensor.is_contiguous() or not any(tensor.stride())


class Matrix(NamedTuple):
    """A matrix of any strides, as a kernel receives it: its pointer and the strides of its rows and columns."""

    ptr: Tensor
    row: int
    col: int


class Batch(NamedTuple):
    """Matrices of models as a kernel receives them: a pointer and the strides of models, rows and columns.

    A stride is 0 where models, rows or columns share the values.
    """

    ptr: Tensor
    model: int
    row: int
    col: int


class Dimension(NamedTuple):
    """One index of a product: its size and each tensor's stride."""

    size: int
    input: int
    other: int
    bias: int


class Contraction(NamedTuple):
    """``result[b, m, n] = sum over s, k of input[b, s, m, k] * other[b, s, k, n], + bias[b, m, n]``.

    Attributes:
        m, n, k: the matrix dimensions; batch and summed dimensions are folded into them where strides allow.
        batch: the remaining batch dimensions, innermost first. The result is contiguous.
        sums: the remaining summed dimensions.
        swapped: whether input and other have changed places (the transposed product). A result that is one
            row or one column has n = 1.
    """

    m: Dimension
    n: Dimension
    k: Dimension
    batch: tuple[Dimension, ...]
    sums: tuple[Dimension, ...]
    swapped: bool

    @property
    def batches(self) -> int:
        return math.prod(dim.size for dim in self.batch)


def contract(input: Tensor, other: Tensor, bias: Tensor | None, sum_dims: list[int]) -> Contraction:
    """Return the normal form of ``(input @ other).sum(sum_dims, keepdim=True) + bias``."""
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    M, K, N = input.shape[-2], input.shape[-1], other.shape[-1]
    input, other = input.expand(*batch, M, K), other.expand(*batch, K, N)
    kept = [1 if dim in sum_dims else size for dim, size in enumerate(batch)]
    extra = bias.expand(*kept, M, N).stride() if bias is not None else (0,) * (len(batch) + 2)
    m = Dimension(M, input.stride(-2), 0, extra[-2])
    n = Dimension(N, 0, other.stride(-1), extra[-1])
    k = Dimension(K, input.stride(-1), other.stride(-2), 0)
    outer = [Dimension(*dim) for dim in zip(batch, input.stride(), other.stride(), extra)]  # noqa: B905
    left = _coalesced_dimensions([dim for index, dim in enumerate(outer) if index not in sum_dims])
    summed = [dim._replace(bias=0) for index, dim in enumerate(outer) if index in sum_dims]
    swapped = False
    while left:
        inner = left[-1]
        if inner.other == 0 and (folded := _merged(inner, m)):
            m = Dimension(*folded)
        elif m.size == 1 and inner.input == 0 and (folded := _merged(inner, n)):
            n = Dimension(*folded)
        elif n.size == 1 and inner.input == 0:  # the transposed product folds it into m
            m, n, k, left, summed = _swap(m, n, k, left, summed)
            swapped = not swapped
            continue
        else:
            break
        left.pop()
    if m.size == 1 and n.size > 1:
        m, n, k, left, summed = _swap(m, n, k, left, summed)
        swapped = not swapped
    summed.append(k)
    summed.sort(key=lambda dim: (dim.input + dim.other, dim.size), reverse=True)
    summed = _coalesced_dimensions(summed)
    # K is a summed dimension of at least 16, preferably contiguous in one operand, else the longest.
    k = max(
        summed, key=lambda dim: (min(dim.size, 16), 1 in dim[1:3], dim.size), default=Dimension(1, 0, 0, 0)
    )
    if summed:
        summed.remove(k)
    return Contraction(m, n, k, tuple(reversed(left)), tuple(summed), swapped)


def _coalesced_dimensions(dims: Sequence[Dimension]) -> list[Dimension]:
    return [Dimension(*dim) for dim in _coalesced(dims)]


def _swap(
    m: Dimension, n: Dimension, k: Dimension, *rest: list[Dimension]
) -> tuple[Dimension, Dimension, Dimension, list[Dimension], list[Dimension]]:
    """Return the dimensions as they are when input and other, and with them m and n, change places."""

    def swap(dim: Dimension) -> Dimension:
        return dim._replace(input=dim.other, other=dim.input)

    left, summed = ([swap(dim) for dim in dims] for dims in rest)
    return swap(n), swap(m), swap(k), left, summed
