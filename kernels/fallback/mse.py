"""Mean squared error in plain torch."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import REDUCTIONS, acc_dtype, empty_gradients

# Elements of a block: what is made of them stays in the cache. For all elements at once torch would need new
# memory at each call, which the system clears page by page: that takes longer than the sum. A few blocks need none.
_BLOCK = 1 << 19
_FEW = 4

# From so many elements on their squared errors are added up a row at a time, within a row one after the other. Where
# squares have few bits (bfloat16 values in float32) each addition rounds to the same side, and rows of 1,024 lost
# 60 eps; with these the error is that of torch's own loss.
_MANY = 1 << 19
_ROW = 1 << 4


def _scale(input: Tensor, reduction: str, batch_dims: int) -> float:
    return 1.0 / max(1, math.prod(input.shape[batch_dims:])) if reduction == "mean" else 1.0


def _reduce(values: Tensor, reduction: str, batch_dims: int) -> Tensor:
    if reduction == "none" or batch_dims == values.dim():
        return values
    dims = list(range(batch_dims, values.dim()))
    return values.mean(dims) if reduction == "mean" else values.sum(dims)


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """Return ``values`` in the dtype and layout of ``torch.empty_like(tensor)``."""
    result = torch.empty_like(tensor)
    same = values.dtype == result.dtype and values.stride() == result.stride()
    return values if same else result.copy_(values)


def _broadcast(grad: Tensor, input: Tensor, reduction: str, batch_dims: int) -> Tensor:
    if reduction == "none":
        return grad
    return grad.reshape((*grad.shape, *(1,) * (input.dim() - batch_dims)))


def _blocks(wide: torch.dtype, input: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yield what broadcasts to input's shape, a block of input's memory at a time; all at once where it is little.

    Before them scratch memory for a block, the same for all: what is freed may go back to the system each time.
    """
    tensors: list[Any] = [input, *others]
    if all(x is None or (x.shape == input.shape and x.is_contiguous()) for x in tensors):
        tensors = [None if x is None else x.view(-1) for x in tensors]
    else:
        strides = input.stride()
        order = sorted(range(input.dim()), key=lambda d: -strides[d])
        tensors = [None if x is None else x.permute(order) for x in tensors]
    shape = tensors[0].shape
    if input.numel() <= _FEW * _BLOCK or not input.is_cpu:
        yield input.new_empty(shape, dtype=wide), *tensors
        return
    steps, inner = list(shape), 1
    for d in reversed(range(len(shape))):
        steps[d] = min(shape[d], max(1, _BLOCK // inner))
        inner = inner * shape[d] if steps[d] == shape[d] else _BLOCK + 1
    scratch = input.new_empty(math.prod(steps), dtype=wide)
    parts = (
        [slice(i, i + step) for i in range(0, size, step)] for size, step in zip(shape, steps, strict=True)
    )
    for index in itertools.product(*parts):
        block = tensors[0][index].shape
        yield (
            scratch[: math.prod(block)].view(block),
            *(None if x is None else x[index] if x.shape == shape else x[_own(index, x)] for x in tensors),
        )


def _own(index: tuple[slice, ...], tensor: Tensor) -> tuple[slice, ...]:
    """Return the index of a block in a tensor that broadcasts."""
    return tuple(slice(None) if size == 1 else part for part, size in zip(index, tensor.shape, strict=True))


def _are_plain(*tensors: Tensor) -> bool:
    """Return whether ``_sum_of_squares`` serves them."""
    return all(
        tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.float64)
        for tensor in tensors
    )


def _sum_of_squares(input: Tensor, target: Tensor, kept: Sequence[int] = ()) -> Tensor:
    """Sum the squared errors of contiguous tensors over all but the leading dimensions ``kept``.

    They are squared distances between rows, which take one pass and one parallel region, where torch's own loss writes
    all squares and then reads them. Beside ``kept`` the number of elements of a sum is a multiple of ``_ROW``.
    """
    rows = input.numel() // _ROW
    x, y = input.view(-1), target.view(-1)
    split = rows * _ROW
    pairs = (x[:split].view(rows, 1, _ROW), y[:split].view(rows, 1, _ROW))
    squares = torch.ops.aten._cdist_forward(*pairs, 2.0, 2).square_()  # the last 2: not by way of products
    if kept:
        return squares.view(*kept, -1).sum(-1)
    rest = torch.nn.functional.mse_loss(x[split:], y[split:], reduction="sum")
    return squares.sum().add_(rest)


def _mean(total: Tensor, input: Tensor, reduction: str, batch_dims: int = 0) -> Tensor:
    """Return ``total``, divided by how many elements are in it if that is wanted."""
    count = math.prod(input.shape[batch_dims:])
    return total if reduction != "mean" else total.div_(count) if count else total.fill_(math.nan)


def _error(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    return torch.sub(x, y, out=out) if x.dtype == out.dtype else out.copy_(x).sub_(y)


def _common(*tensors: Tensor | None) -> torch.Size:
    """Return the shape that tensors broadcast to."""
    return torch.broadcast_shapes(*(tensor.shape for tensor in tensors if tensor is not None))


class _Sums:
    """Sums over dimensions of what comes in blocks, in the blocks' order.

    Attributes:
        parts: where to add, a tensor that broadcasts to ``input``; in float64 where many blocks meet in one of few.
    """

    def __init__(self, input: Tensor, shape: Sequence[int], wide: torch.dtype) -> None:
        few = math.prod(shape) <= input.numel() // 64 and input.is_cpu
        self.parts = input.new_zeros(shape, dtype=torch.float64 if few else wide)
        self._dtype = wide
        self._alone: list[Tensor] = []

    def add(self, part: Tensor, values: Tensor) -> None:
        """Add ``values`` up to ``part``, a block of ``parts``."""
        if self.parts.numel() == 1:
            self._alone.append(values.sum())  # of any shape: contiguous blocks have one dimension
        else:
            part += values.sum_to_size(part.shape)

    def result(self) -> Tensor:
        if self._alone:
            total = self._alone[0] if len(self._alone) == 1 else torch.stack(self._alone).sum()
            return total.view(self.parts.shape)
        return self.parts.to(self._dtype)


def _sums_of_squares(
    input: Tensor, target: Tensor, weight: Tensor | None, batch_dims: int, wide: torch.dtype
) -> Tensor:
    """Sum ``w e^2`` over all but the first ``batch_dims`` dimensions."""
    kept = input.shape[:batch_dims]
    if input.numel() == 0:  # 0 times a broadcast weight that is infinite would be nan
        return input.new_zeros(kept, dtype=wide)
    shape = (*kept, *(1,) * (input.dim() - batch_dims))
    sums = _Sums(input, shape, wide)
    for scratch, x, y, w, part in _blocks(wide, input, target, weight, sums.parts):
        squares = _error(x, y, scratch).square_()
        sums.add(part, squares if w is None else squares.sum_to_size(_common(part, w)).mul_(w))
    return sums.result().view(kept)


def mse_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, batch_dims: int, dtype: torch.dtype
) -> Tensor:
    """Return ``c * sum(w e^2)``; see kernels/triton/mse.py."""
    numel, kept = input.numel(), input.shape[:batch_dims]
    if weight is None and input.dtype == target.dtype == dtype:
        whole_rows = not kept or math.prod(input.shape[batch_dims:]) % _ROW == 0
        if reduction != "none" and numel >= _MANY and whole_rows and _are_plain(input, target):
            return _mean(_sum_of_squares(input, target, kept), input, reduction, batch_dims)
        # A sum of float16 is not torch's, which squares in float16: 300 is too much.
        if reduction == "none" or (not kept and numel <= _FEW * _BLOCK and dtype != torch.float16):
            loss = torch.nn.functional.mse_loss(input, target, reduction=reduction)
            return _like(loss, input) if reduction == "none" else loss
    wide = acc_dtype(input, target, weight)
    if reduction != "none":
        sums = _sums_of_squares(input, target, weight, batch_dims, wide)
        return _mean(sums, input, reduction, batch_dims).to(dtype)
    loss = torch.empty_like(input, dtype=dtype)
    for scratch, x, y, w, out in _blocks(wide, input, target, weight, loss):
        squares = _error(x, y, scratch).square_()
        out.copy_(squares if w is None else squares.mul_(w))
    return loss


def _gradients(
    grad: Tensor, tensors: Sequence[Any], output_mask: Sequence[bool], wide: torch.dtype, total: _Sums | None
) -> list[Tensor]:
    """Return the needed ones of ``2 g w e``, its negative and ``g e^2``; add ``w e^2`` up to a ``total`` on the way.

    ``grad`` and the weight may have dimensions of size 1 where input's are larger.
    """
    input, _, weight = tensors
    results = empty_gradients(tensors, output_mask)
    if input.numel() == 0:
        return [result for result in results if result is not None]
    sums: _Sums | None = None
    if results[2] is not None and weight.shape != input.shape:
        sums = _Sums(input, weight.shape, wide)
    added = None if sums is None else sums.parts
    for scratch, x, y, w, g, grad_x, grad_y, grad_w, part in _blocks(
        wide, *tensors, grad, *results[:2], results[2] if sums is None else None, added
    ):
        in_place = grad_x is not None and grad_x.dtype == wide
        error = _error(x, y, grad_x if in_place else scratch)
        if total is not None or grad_w is not None or part is not None:
            squares = torch.mul(error, error, out=scratch if in_place else None)
            if grad_w is not None:
                torch.mul(squares, g, out=grad_w)
            if sums is not None:
                sums.add(part, squares.sum_to_size(_common(part, g)) * g)
            if total is not None:
                total.add(total.parts, squares if w is None else squares.sum_to_size(w.shape).mul_(w))
        if grad_x is None and grad_y is None:
            continue
        slope = error.mul_(2 * g)
        if w is not None:
            slope.mul_(w)
        if grad_y is not None:
            torch.mul(slope, -1, out=grad_y)
        if grad_x is not None and not in_place:
            grad_x.copy_(slope)
    if sums is not None and results[2] is not None:
        results[2].copy_(sums.result())
    return [result for result in results if result is not None]


def _slopes(
    grad: Tensor, input: Tensor, target: Tensor, output_mask: Sequence[bool], reduction: str
) -> list[Tensor]:
    """Return the needed ones of ``2c g e`` and its negative, by torch's own op: one pass and one parallel region."""
    first, second = (input, target) if output_mask[0] else (target, input)
    slope = torch.empty_like(first)  # torch would fill it with zeros first
    torch.ops.aten.mse_loss_backward.grad_input(
        grad, first, second, REDUCTIONS.index(reduction), grad_input=slope
    )
    return [slope, *([torch.neg(slope, out=torch.empty_like(target))] if all(output_mask[:2]) else [])]


def mse_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    batch_dims: int,
    output_mask: list[bool],
) -> list[Tensor]:
    """Return the gradients ``2c g w e``, its negative, and ``c g e^2``; see kernels/triton/mse.py."""
    if (
        weight is None
        and batch_dims == 0
        and input.dtype == target.dtype == grad_output.dtype
        and input.dtype != torch.float16  # torch rounds 2 / n to float16
        and any(output_mask)
    ):
        return _slopes(grad_output, input, target, output_mask, reduction)
    wide = acc_dtype(grad_output, input, target, weight)
    grad = grad_output.to(wide) * _scale(input, reduction, batch_dims)
    grad = _broadcast(grad, input, reduction, batch_dims)
    few_weights = weight is None or (weight.shape != input.shape and not output_mask[2])
    if few_weights and any(output_mask) and input.is_cpu and input.dtype == target.dtype == wide:
        grad = grad if weight is None else grad * weight
        return _slopes(grad.expand(input.shape), input, target, output_mask, "none")
    return _gradients(grad, (input, target, weight), output_mask, wide, None)


def mse_hvp(
    grad_output: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    d_grad: Tensor | None,
    d_input: Tensor | None,
    d_target: Tensor | None,
    d_weight: Tensor | None,
    reduction: str,
    batch_dims: int,
    output_mask: list[bool],
) -> list[Tensor]:
    """Return the Hessian of ``c * sum(g w e^2)`` times a direction; see kernels/triton/mse.py."""
    primals, tangents = (grad_output, input, target, weight), (d_grad, d_input, d_target, d_weight)
    d_loss, *gradients = hessian_vector_product(primals, tangents, reduction, batch_dims, output_mask)
    results = []
    if d_loss is not None:
        dtype = input.dtype if grad_output is None else grad_output.dtype
        d_loss = d_loss.to(dtype)
        results.append(_like(d_loss, input.to(dtype)) if reduction == "none" else d_loss)
    pairs = zip(gradients, (input, target, weight), strict=True)
    return results + [
        _like(value, like) if like.shape == input.shape else value.sum_to_size(like.shape).to(like.dtype)
        for value, like in pairs
        if value is not None and like is not None
    ]


def hessian_vector_product(
    primals: Sequence[Any],
    tangents: Sequence[Tensor | None],
    reduction: str,
    batch_dims: int,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Return ``mse_hvp`` in the dtype of accumulation, of input's shape but for the first; it is differentiable."""
    acc = acc_dtype(*primals, *tangents)
    input = primals[1]
    g, dg = (
        None if tensor is None else _broadcast(tensor.to(acc), input, reduction, batch_dims)
        for tensor in (primals[0], tangents[0])
    )
    w, dx, dy, dw = (None if tensor is None else tensor.to(acc) for tensor in (primals[3], *tangents[1:]))
    error = input.to(acc) - primals[2].to(acc)
    d_error = dx if dy is None else -dy if dx is None else dx - dy
    one = torch.ones((), dtype=acc, device=input.device)
    w = one if w is None else w
    scale = _scale(input, reduction, batch_dims)
    d_loss = slope = d_weight = None
    if output_mask[0]:
        d_loss = _sum_of((dw, error, error), (2 * w, d_error, error), like=error)
        d_loss = _reduce(d_loss, reduction, batch_dims)
    if output_mask[1] or output_mask[2]:
        slope = _sum_of((dg, w, error), (g, dw, error), (g, w, d_error), like=error) * (2 * scale)
    if output_mask[3]:
        d_weight = _sum_of((dg, error, error), (2 * one, g, d_error, error), like=error) * scale
    return [
        d_loss,
        slope if output_mask[1] else None,
        -slope if output_mask[2] and slope is not None else None,
        d_weight,
    ]


def _sum_of(*products: tuple[Tensor | None, ...], like: Tensor) -> Tensor:
    """Sum products, without those that lack a factor: as 0, beside an infinite one, they would be nan."""
    total = None
    for factors in products:
        given = [factor for factor in factors if factor is not None]
        if len(given) == len(factors):
            term = functools.reduce(torch.mul, given)
            total = term if total is None else total + term
    return torch.zeros_like(like) if total is None else total


def mse_forward_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_sum: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the loss / ``weight_sum`` and the gradients for an upstream gradient of one; see kernels/triton/mse.py."""
    if weight is weight_sum is None and input.dtype == target.dtype == dtype and _are_plain(input, target):
        one = input.new_ones(())
        loss = mse_forward(input, target, None, reduction, 0, dtype)
        return [loss, *mse_backward(one, input, target, None, reduction, 0, output_mask)]
    wide = acc_dtype(input, target, weight)
    ones = (1,) * input.dim()
    share = input.new_ones((), dtype=wide) if weight_sum is None else weight_sum.to(wide).reciprocal()
    total = _Sums(input, ones, wide)
    grad = (share * _scale(input, reduction, 0)).view(ones)
    gradients = _gradients(grad, (input, target, weight), output_mask, wide, total)
    return [(_mean(total.result().view(()), input, reduction) * share).to(dtype), *gradients]
