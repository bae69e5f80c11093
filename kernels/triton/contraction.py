"""The normal form of a batched product with summed dimensions: as few dimensions as the strides allow."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Dimension(NamedTuple):
    """One index: how far it runs, and how many elements each operand advances by; a stride of 0 repeats."""

    size: int
    input: int
    other: int
    bias: int


class Contraction(NamedTuple):
    """``result[b, m, n] = sum over s, k of input[b, s, m, k] * other[b, s, k, n], + bias[b, m, n]``.

    Attributes:
        m, n, k: the matrix dimensions; batch and summed dimensions are folded into them where strides allow.
        batch: what is left of the batch dimensions, innermost first. The result is contiguous.
        sums: what is left of the summed dimensions.
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
    """The normal form of ``(input @ other).sum(sum_dims, keepdim=True) + bias``."""
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    M, K, N = input.shape[-2], input.shape[-1], other.shape[-1]
    input, other = input.expand(*batch, M, K), other.expand(*batch, K, N)
    kept = [1 if dim in sum_dims else size for dim, size in enumerate(batch)]
    extra = bias.expand(*kept, M, N).stride() if bias is not None else (0,) * (len(batch) + 2)
    m = Dimension(M, input.stride(-2), 0, extra[-2])
    n = Dimension(N, 0, other.stride(-1), extra[-1])
    k = Dimension(K, input.stride(-1), other.stride(-2), 0)
    outer = [Dimension(*dim) for dim in zip(batch, input.stride(), other.stride(), extra)]  # noqa: B905
    left = _collapsed([dim for index, dim in enumerate(outer) if index not in sum_dims])
    summed = [dim._replace(bias=0) for index, dim in enumerate(outer) if index in sum_dims]
    swapped = False
    while left:
        inner = left[-1]
        if inner.other == 0 and (folded := _merged(inner, m)):
            m = folded
        elif m.size == 1 and inner.input == 0 and (folded := _merged(inner, n)):
            n = folded
        elif n.size == 1 and inner.input == 0:  # then the other way round it folds into m
            m, n, k, left, summed = _swapped(m, n, k, left, summed)
            swapped = not swapped
            continue
        else:
            break
        left.pop()
    if m.size == 1 and n.size > 1:
        m, n, k, left, summed = _swapped(m, n, k, left, summed)
        swapped = not swapped
    summed = _collapsed(sorted([*summed, k], key=lambda dim: (dim.input + dim.other, dim.size), reverse=True))
    # The kernel's own K is best long, and contiguous in one of the operands.
    k = max(
        summed, key=lambda dim: (min(dim.size, 16), 1 in dim[1:3], dim.size), default=Dimension(1, 0, 0, 0)
    )
    if summed:
        summed.remove(k)
    return Contraction(m, n, k, tuple(reversed(left)), tuple(summed), swapped)


def _swapped(
    m: Dimension, n: Dimension, k: Dimension, *rest: list[Dimension]
) -> tuple[Dimension, Dimension, Dimension, list[Dimension], list[Dimension]]:
    """The dimensions when input and other change places, and m and n with them."""

    def swap(dim: Dimension) -> Dimension:
        return Dimension(dim.size, dim.other, dim.input, dim.bias)

    left, summed = ([swap(dim) for dim in dims] for dims in rest)
    return swap(n), swap(m), swap(k), left, summed


def _merged(outer: Dimension, inner: Dimension) -> Dimension | None:
    """The two dimensions as one, if stepping ``outer`` is stepping past the end of ``inner``."""
    if inner.size == 1:
        return outer
    if all(far == inner.size * near for far, near in zip(outer[1:], inner[1:], strict=True)):
        return inner._replace(size=outer.size * inner.size)
    return None


def _collapsed(dims: list[Dimension]) -> list[Dimension]:
    """The same index space in as few dimensions as the strides allow; outermost first."""
    result: list[Dimension] = []
    for dim in dims:
        if dim.size == 1:
            continue
        merged = _merged(result[-1], dim) if result else None
        if merged:
            result[-1] = merged
        else:
            result.append(dim)
    return result
