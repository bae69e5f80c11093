"""Mean squared error in plain torch."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import REDUCTIONS, acc_dtype

# Elements of a block: what is made of them stays in the cache. For all elements at once torch would need new
# memory at each call, which the system clears page by page: that takes longer than the sum. A few blocks need none.
_BLOCK = 1 << 19
_FEW = 4

# From so many elements on their squared errors are added up a row at a time; a row's sum stays as exact as this short.
_MANY = 1 << 19
_ROW = 1 << 10


def _scale(input: Tensor, reduction: str, batch_dims: int) -> float:
    return 1.0 / max(1, math.prod(input.shape[batch_dims:])) if reduction == "mean" else 1.0


def _reduce(values: Tensor, reduction: str, batch_dims: int) -> Tensor:
    if reduction == "none" or batch_dims == values.dim():
        return values
    dims = list(range(batch_dims, values.dim()))
    return values.mean(dims) if reduction == "mean" else values.sum(dims)


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """``values`` in the dtype and layout of ``torch.empty_like(tensor)``."""
    result = torch.empty_like(tensor)
    same = values.dtype == result.dtype and values.stride() == result.stride()
    return values if same else result.copy_(values)


def _broadcast(grad: Tensor, input: Tensor, reduction: str, batch_dims: int) -> Tensor:
    if reduction == "none":
        return grad
    return grad.reshape((*grad.shape, *(1,) * (input.dim() - batch_dims)))


def _blocks(wide: torch.dtype, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tensors of one shape a block at a time; all at once where they are small, strided, or on another device.

    Before them scratch memory for a block, the same for all: what is freed may go back to the system each time.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    numel = given[0].numel()
    if numel <= _FEW * _BLOCK or not all(tensor.is_cpu and tensor.is_contiguous() for tensor in given):
        yield None, *tensors
        return
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    scratch = given[0].new_empty(_BLOCK, dtype=wide)
    for start in range(0, numel, _BLOCK):
        end = min(start + _BLOCK, numel)
        yield scratch[: end - start], *(None if tensor is None else tensor[start:end] for tensor in flat)


def _are_plain(*tensors: Tensor) -> bool:
    """Whether ``_sum_of_squares`` serves them."""
    return all(
        tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.float64)
        for tensor in tensors
    )


def _total(totals: list[Tensor], input: Tensor, reduction: str) -> Tensor:
    total = totals[0] if len(totals) == 1 else torch.stack(totals).sum()
    return total.div_(input.numel()) if reduction == "mean" else total


def _sum_of_squares(input: Tensor, target: Tensor) -> Tensor:
    """The sum of squared errors of contiguous tensors, as squared distances between rows.

    These take one pass and one parallel region, where torch's own loss writes all squares and then reads them.
    """
    rows = input.numel() // _ROW
    x, y = input.view(-1), target.view(-1)
    split = rows * _ROW
    pairs = (x[:split].view(rows, 1, _ROW), y[:split].view(rows, 1, _ROW))
    distances = torch.ops.aten._cdist_forward(*pairs, 2.0, 2)  # the last 2: not by way of products
    total = distances.square_().sum()
    rest = torch.nn.functional.mse_loss(x[split:], y[split:], reduction="sum")
    return total.add_(rest)


def mse_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, batch_dims: int, dtype: torch.dtype
) -> Tensor:
    """``c * sum(w e^2)``; see kernels/triton/mse.py."""
    numel = input.numel()
    if weight is None and input.dtype == target.dtype == dtype and (reduction == "none" or batch_dims == 0):
        if reduction != "none" and numel >= _MANY and _are_plain(input, target):
            return _total([_sum_of_squares(input, target)], input, reduction)
        if reduction == "none" or numel <= _FEW * _BLOCK:
            loss = torch.nn.functional.mse_loss(input, target, reduction=reduction)
            return _like(loss, input) if reduction == "none" else loss
    wide = acc_dtype(input, target, weight)

    def losses(out: Tensor | None, x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
        squares = torch.sub(x.to(wide), y.to(wide), out=out).square_()
        return squares if w is None else squares.mul_(w)

    if reduction == "none" or batch_dims:
        loss = _reduce(losses(None, input, target, weight), reduction, batch_dims).to(dtype)
        return _like(loss, input.to(dtype)) if reduction == "none" else loss
    totals = [losses(*block).sum() for block in _blocks(wide, input, target, weight)]
    return _total(totals, input, reduction).to(dtype)


def mse_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    batch_dims: int,
    output_mask: list[bool],
) -> list[Tensor]:
    """The gradients ``2c g w e``, its negative, and ``c g e^2``; see kernels/triton/mse.py."""
    if (
        weight is None
        and batch_dims == 0
        and input.dtype == target.dtype == grad_output.dtype
        and any(output_mask)
    ):
        first, second = (input, target) if output_mask[0] else (target, input)
        grad = torch.ops.aten.mse_loss_backward(grad_output, first, second, REDUCTIONS.index(reduction))
        return [_like(grad, first), *([_like(-grad, target)] if all(output_mask[:2]) else [])]
    wide = acc_dtype(grad_output, input, target, weight)
    grad = _broadcast(grad_output.to(wide), input, reduction, batch_dims) * _scale(
        input, reduction, batch_dims
    )
    error = input.to(wide) - target.to(wide)
    results = []
    if output_mask[0] or output_mask[1]:
        slope = error * (2 * grad)
        if weight is not None:
            slope *= weight
        if output_mask[0]:
            results.append(_like(slope, input))
        if output_mask[1]:
            results.append(_like(-slope, target))
    if output_mask[2] and weight is not None:
        results.append(_like(error.square_().mul_(grad), weight))
    return results


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
    """The Hessian of ``c * sum(g w e^2)`` times a direction; see kernels/triton/mse.py."""
    primals, tangents = (grad_output, input, target, weight), (d_grad, d_input, d_target, d_weight)
    d_loss, *gradients = hessian_vector_product(primals, tangents, reduction, batch_dims, output_mask)
    results = []
    if d_loss is not None:
        dtype = input.dtype if grad_output is None else grad_output.dtype
        d_loss = d_loss.to(dtype)
        results.append(_like(d_loss, input.to(dtype)) if reduction == "none" else d_loss)
    pairs = zip(gradients, (input, target, weight), strict=True)
    return results + [_like(value, like) for value, like in pairs if value is not None and like is not None]


def hessian_vector_product(
    primals: Sequence[Any],
    tangents: Sequence[Tensor | None],
    reduction: str,
    batch_dims: int,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """``mse_hvp`` in the dtype of accumulation, of input's shape but for the first; torch can differentiate it."""
    acc = acc_dtype(*primals, *tangents)
    input = primals[1]
    zero = torch.zeros((), dtype=acc, device=input.device)
    g, dg = (
        zero if tensor is None else _broadcast(tensor.to(acc), input, reduction, batch_dims)
        for tensor in (primals[0], tangents[0])
    )
    x, y, w, dx, dy, dw = (
        zero if tensor is None else tensor.to(acc) for tensor in (*primals[1:], *tangents[1:])
    )
    error, d_error = x - y, dx - dy
    if primals[3] is None:
        w = zero + 1
    scale = _scale(input, reduction, batch_dims)
    d_loss = slope = d_weight = None
    if output_mask[0]:
        d_loss = _reduce((dw * error + 2 * w * d_error) * error, reduction, batch_dims)
    if output_mask[1] or output_mask[2]:
        slope = ((dg * w + g * dw) * error + g * w * d_error) * (2 * scale)
    if output_mask[3]:
        d_weight = (dg * error + 2 * g * d_error) * error * scale
    return [
        d_loss,
        slope if output_mask[1] else None,
        -slope if output_mask[2] and slope is not None else None,
        d_weight,
    ]


def mse_forward_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The loss and the gradients for an upstream gradient of one; see kernels/triton/mse.py."""
    if weight is None and input.dtype == target.dtype == dtype and _are_plain(input, target):
        one = input.new_ones(())
        loss = mse_forward(input, target, None, reduction, 0, dtype)
        return [loss, *mse_backward(one, input, target, None, reduction, 0, output_mask)]
    wide = acc_dtype(input, target, weight)
    scale = _scale(input, reduction, 0)
    tensors = (input, target, weight)
    results = [
        torch.empty_like(tensor) if need and tensor is not None else None
        for tensor, need in zip(tensors, output_mask, strict=True)
    ]
    totals = []
    for scratch, x, y, w, grad_x, grad_y, grad_w in _blocks(wide, *tensors, *results):
        in_place = grad_x is not None and grad_x.dtype == wide
        error = torch.sub(x.to(wide), y.to(wide), out=grad_x if in_place else None)
        squares = torch.mul(error, error, out=scratch)
        if grad_w is not None:
            torch.mul(squares, scale, out=grad_w)
        totals.append((squares if w is None else squares.mul_(w)).sum())
        slope = error.mul_(2 * scale)
        if w is not None:
            slope.mul_(w)
        if grad_y is not None:
            torch.mul(slope, -1, out=grad_y)
        if grad_x is not None and not in_place:
            grad_x.copy_(slope)
    return [_total(totals, input, reduction).to(dtype), *(grad for grad in results if grad is not None)]
