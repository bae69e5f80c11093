"""Mean squared error: kernels and launchers.

    e = input - target,  loss = c * sum(w * e^2),  c = 1 or 1 / (number of elements),  w = weight or 1

A kernel receives each operand as a record (dims.py): the pointer, the strides of its rows and the stride along a
row, or no such stride where a row has one value. Operands with the same dense strides are one long row; operands
that are expanded, strided or permuted are read in place. Over 500 lines, since the loss, its gradients and the
Hessian-vector product share a tile's addresses and sums.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import acc_dtype, empty_gradients
from . import config
from .dims import Operand, Walk, coalesce_dims
from .launch import cdiv, launch
from .shared import DTYPES, convert, ordered_sum, tiles_of


@triton.jit
def _tile(
    first, tile, batch, rows, n,
    ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Return row numbers (ROWS, 1), column numbers (1, COLS) and mask of a tile, 64-bit so that offsets may be.

    KEEP "nothing": the ``tile``-th tile of batch element ``first``. "rows": rows of ROWS batch elements, the
    ``first``-th such group; ``tile`` counts what they add up. "columns": of batch element and column tile ``first``,
    the ``tile``-th rows.

    ``ALIGN`` divides n unless FLAT, where the rest is left to _tail: n rounded down shows the compiler a mask
    that is constant over 16 bytes, hence 128-bit loads. Rows past the end are moved back to the last one.
    """
    if FLAT:
        row_tile = 0
        col_tile = tile
    else:
        col_tiles = tiles_of(n, COLS)
        if KEEP == "columns":
            row_tile = tile
            col_tile = first % col_tiles
        else:
            row_tile = tile // col_tiles
            col_tile = tile % col_tiles
    cols = (tl.zeros((), tl.int64) + col_tile) * COLS + tl.arange(0, COLS)
    if KEEP == "rows":
        element = first.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (element < batch)[:, None] & (cols < n // ALIGN * ALIGN)[None, :]
        row = tl.minimum(element, batch - 1) * rows + row_tile
    else:
        row = (tl.zeros((), tl.int64) + row_tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (cols < n // ALIGN * ALIGN)[None, :]
        element = first.to(tl.int64)
        if KEEP == "columns":
            element = element // tiles_of(n, COLS)
        row = element * rows + tl.minimum(row, rows - 1)
    return row[:, None], cols[None, :], mask


@triton.jit
def _tiles(rows, n, ROWS: tl.constexpr, COLS: tl.constexpr, KEEP: tl.constexpr):
    """Return how many tiles are added up to a sum, or to a tile's row or column of sums."""
    if KEEP == "columns":
        tiles = tiles_of(rows, ROWS)
    elif KEEP == "rows":
        tiles = rows * tiles_of(n, COLS)
    else:
        tiles = tiles_of(rows, ROWS) * tiles_of(n, COLS)
    return tiles


@triton.jit
def _tail(n):
    """Return what _tile leaves of a flat operand: the last n % 16 columns."""
    cols = n // 16 * 16 + tl.arange(0, 16).to(tl.int64)
    return tl.zeros((1, 1), tl.int64), cols[None, :], (cols < n)[None, :]


@triton.jit
def _row_offset(row, sizes, strides, ALIGN: tl.constexpr):
    """Return the offset of an operand's rows: ``row`` counts over ``sizes``, of which the last varies slowest."""
    offset = tl.zeros_like(row)
    for dim in tl.static_range(len(sizes)):
        stride = strides[dim] // ALIGN * ALIGN
        if dim == len(sizes) - 1:
            offset += row * stride
        else:
            offset += row % sizes[dim] * stride
            row = row // sizes[dim]
    return offset


@triton.jit
def _load(x, at, sizes, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """Load the tile ``at`` (row, cols, mask) of an Operand or RowOperand, in ACC; 0 outside the mask."""
    row, cols, mask = at
    if len(x) == 2:  # a RowOperand
        value = convert(tl.load(x.ptr + _row_offset(row, sizes, x.strides, 1)), ACC)
        value = tl.where(mask, tl.broadcast_to(value, mask.shape), 0.0)
    else:
        offsets = _row_offset(row, sizes, x.strides, ALIGN) + cols * x.column
        value = convert(tl.load(x.ptr + offsets, mask=mask, other=0.0), ACC)
    return value


@triton.jit
def _store(out, at, sizes, value, ALIGN: tl.constexpr):
    """Write the tile ``at`` of a result, an Operand; nothing for None."""
    if out is not None:
        row, cols, mask = at
        offsets = _row_offset(row, sizes, out.strides, ALIGN) + cols * out.column
        tl.store(out.ptr + offsets, convert(value, out.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(
    ptr, sums, rest, batch, n, divisor, ROWS: tl.constexpr, COLS: tl.constexpr, KEEP: tl.constexpr
):
    """Write what program (r, p) of (R, P) added up to row p of ptr (P, sums); ``rest`` belongs to a tile's one sum.

    Divided already if P is 1: no second stage follows.
    """
    divisor = tl.where(tl.num_programs(1) == 1, divisor, 1)
    program = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64)
    if KEEP == "rows":
        out = first * ROWS + tl.arange(0, ROWS)
        total = convert(tl.sum(sums, axis=1) / divisor, ptr.dtype.element_ty)
        tl.store(ptr + program * batch + out, total, mask=out < batch)
    elif KEEP == "columns":
        col_tiles = tiles_of(n, COLS)
        cols = first % col_tiles * COLS + tl.arange(0, COLS)
        total = convert(tl.sum(sums, axis=0) / divisor, ptr.dtype.element_ty)
        out = program * (tl.num_programs(0) // col_tiles) + first // col_tiles
        tl.store(ptr + out * n + cols, total, mask=cols < n)
    else:
        total = (tl.sum(tl.sum(sums, axis=1), axis=0) + rest) / divisor
        tl.store(ptr + program * tl.num_programs(0) + first, convert(total, ptr.dtype.element_ty))


@triton.jit
def _forward_tile(
    at, x, t, w, loss, grad_x, grad_t, grad_w, scale, sizes, ALIGN: tl.constexpr, ACC: tl.constexpr
):
    """Return w e^2 of one tile; write the losses and gradients that are wanted."""
    error = _load(x, at, sizes, ALIGN, ACC) - _load(t, at, sizes, ALIGN, ACC)
    weighted = error
    if w is not None:
        weighted = error * _load(w, at, sizes, ALIGN, ACC)
    _store(grad_x, at, sizes, weighted * (2 * scale), ALIGN)
    _store(grad_t, at, sizes, weighted * (-2 * scale), ALIGN)
    _store(grad_w, at, sizes, error * error * scale, ALIGN)
    square = weighted * error
    _store(loss, at, sizes, square, ALIGN)
    return square


@triton.jit
def _mse_forward_kernel(
    x, t, w, loss, grad_x, grad_t, grad_w, sums_ptr, batch, rows, n, divisor, sizes, weight_sum_ptr,
    ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, KEEP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Program (r, p) of (R, P) adds up tiles p, p + P, ... of the r-th sum, or row or column of sums.

    x, t, w         (batch * rows, n), any strides; w may be None
    loss            (batch * rows, n) or None: the elements' losses
    grad_*          (batch * rows, n), each or None: d(sum / divisor / weight_sum) / d(x, t, w)
    sums_ptr        (P, sums) or None: each program's / weight_sum, / ``divisor`` if P is 1; sums is batch, times n if
                    columns are kept
    weight_sum_ptr  () or None
    Bytes: each operand once, each result once, and the partial sums.
    """
    first = tl.program_id(0)
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    share = tl.full((), 1, ACC)
    if weight_sum_ptr is not None:
        share /= convert(tl.load(weight_sum_ptr), ACC)
    scale = share / divisor
    sums = tl.zeros((ROWS, COLS), ACC)
    for tile in tl.range(program, _tiles(rows, n, ROWS, COLS, KEEP), programs):
        at = _tile(first, tile, batch, rows, n, ROWS, COLS, ALIGN, FLAT, KEEP)
        sums += _forward_tile(at, x, t, w, loss, grad_x, grad_t, grad_w, scale, sizes, ALIGN, ACC)
    total = tl.zeros((), ACC)
    if FLAT:
        if program == programs - 1:
            rest = _forward_tile(_tail(n), x, t, w, loss, grad_x, grad_t, grad_w, scale, sizes, 1, ACC)
            total += tl.sum(tl.sum(rest, axis=1), axis=0)
    if sums_ptr is not None:
        _store_sums(sums_ptr, sums * share, total * share, batch, n, divisor, ROWS, COLS, KEEP)


@triton.jit
def _mse_sum_kernel(
    partials_ptr, loss_ptr, P, R, divisor, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr
):
    """One program adds BLOCK_R sums over the programs of the first stage, / ``divisor``.

    partials_ptr (P, R)
    loss_ptr     (R,)
    """
    cols = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = ordered_sum(partials_ptr, P, R, cols, cols < R, BLOCK_P, ACC)
    tl.store(loss_ptr + cols, convert(total / divisor, loss_ptr.dtype.element_ty), mask=cols < R)


@triton.jit
def _backward_tile(
    at, x, t, w, g, grad_x, grad_t, grad_w, scale, sizes, ALIGN: tl.constexpr, ACC: tl.constexpr
):
    """Write the gradients of one tile that are wanted; returns g e^2."""
    g = _load(g, at, sizes, ALIGN, ACC) * scale
    error = _load(x, at, sizes, ALIGN, ACC) - _load(t, at, sizes, ALIGN, ACC)
    square = g * error * error
    _store(grad_w, at, sizes, square, ALIGN)
    if (grad_x is not None) or (grad_t is not None):
        grad = 2 * g * error
        if w is not None:
            grad *= _load(w, at, sizes, ALIGN, ACC)
        _store(grad_x, at, sizes, grad, ALIGN)
        _store(grad_t, at, sizes, -grad, ALIGN)
    return square


@triton.jit
def _mse_backward_kernel(
    x, t, w, g, grad_x, grad_t, grad_w, sums_ptr, batch, rows, n, divisor, sizes,
    ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, KEEP: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Program p computes tile p of the gradients 2c g w e, -2c g w e and c g e^2, with c = 1 / ``divisor``.

    If there are sums: program (r, p) of (R, P), tiles p, p + P, ... of the r-th sum, or row or column of sums.

    x, t, w   (batch * rows, n), any strides; w may be None
    g         (batch * rows, n), any strides: read here, so that the host never waits for its value
    grad_*    (batch * rows, n), each or None
    sums_ptr  (P, sums) or None: each program's sums of c g e^2, the gradient of a weight that is broadcast
    Bytes: each operand once, each result once, and the partial sums.
    """
    scale = tl.full((), 1, ACC) / divisor
    if sums_ptr is None:  # a tile for each program, of which a grid has the most along its first dimension
        program = tl.program_id(0)
        at = _tile(tl.program_id(1), program, batch, rows, n, ROWS, COLS, ALIGN, FLAT, KEEP)
        _backward_tile(at, x, t, w, g, grad_x, grad_t, grad_w, scale, sizes, ALIGN, ACC)
        if FLAT:
            if program == tl.num_programs(0) - 1:
                _backward_tile(_tail(n), x, t, w, g, grad_x, grad_t, grad_w, scale, sizes, 1, ACC)
    else:
        first = tl.program_id(0)
        program = tl.program_id(1)
        programs = tl.num_programs(1)
        sums = tl.zeros((ROWS, COLS), ACC)
        for tile in tl.range(program, _tiles(rows, n, ROWS, COLS, KEEP), programs):
            at = _tile(first, tile, batch, rows, n, ROWS, COLS, ALIGN, FLAT, KEEP)
            sums += _backward_tile(at, x, t, w, g, grad_x, grad_t, grad_w, scale, sizes, ALIGN, ACC)
        total = tl.zeros((), ACC)
        if FLAT:
            if program == programs - 1:
                rest = _backward_tile(_tail(n), x, t, w, g, grad_x, grad_t, grad_w, scale, sizes, 1, ACC)
                total += tl.sum(tl.sum(rest, axis=1), axis=0)
        _store_sums(sums_ptr, sums, total, batch, n, 1, ROWS, COLS, KEEP)


@triton.jit
def _hvp_tile(
    at, x, t, w, g, dx, dt, dw, dg, out_g, out_x, out_t, out_w, scale, sizes,
    OF_WEIGHT: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return d(w e^2) = dw e^2 + 2 w e de of one tile, or c d(g e^2) if OF_WEIGHT; write the elementwise results."""
    # What is None is left out of each product: as 0, beside an infinite factor, it would be nan.
    OF_ERROR: tl.constexpr = dx is not None or dt is not None
    zero = tl.zeros(at[2].shape, ACC)
    error = _load(x, at, sizes, ALIGN, ACC) - _load(t, at, sizes, ALIGN, ACC)
    d_error = zero
    if dx is not None:
        d_error += _load(dx, at, sizes, ALIGN, ACC)
    if dt is not None:
        d_error -= _load(dt, at, sizes, ALIGN, ACC)
    weighted = error
    d_weighted = d_error  # d(w e) = dw e + w de
    d_wee_by_e = 2 * d_error  # d(w e^2) / e = dw e + 2 w de
    if w is not None:
        weight = _load(w, at, sizes, ALIGN, ACC)
        weighted *= weight
        if OF_ERROR:
            d_weighted *= weight
            d_wee_by_e *= weight
    if dw is not None:
        dw_error = _load(dw, at, sizes, ALIGN, ACC) * error
        d_weighted += dw_error
        d_wee_by_e += dw_error
    d_gwe = zero  # d(g w e)
    d_gee_by_e = zero  # d(g e^2) / e = dg e + 2 g de
    if g is not None:
        grad = _load(g, at, sizes, ALIGN, ACC)
        if OF_ERROR or dw is not None:
            d_gwe += grad * d_weighted
        if OF_ERROR:
            d_gee_by_e += 2 * grad * d_error
    if dg is not None:
        d_grad = _load(dg, at, sizes, ALIGN, ACC)
        d_gwe += d_grad * weighted
        d_gee_by_e += d_grad * error
    d_gwe *= 2 * scale
    _store(out_x, at, sizes, d_gwe, ALIGN)
    _store(out_t, at, sizes, -d_gwe, ALIGN)
    d_gee = error * d_gee_by_e * scale
    _store(out_w, at, sizes, d_gee, ALIGN)
    d_wee = error * d_wee_by_e
    _store(out_g, at, sizes, d_wee, ALIGN)
    if OF_WEIGHT:
        summed = d_gee
    else:
        summed = d_wee
    return summed


@triton.jit
def _mse_hvp_kernel(
    x, t, w, g, dx, dt, dw, dg, out_g, out_x, out_t, out_w, sums_ptr, batch, rows, n, divisor, sizes,
    OF_WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
    FLAT: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (r, p) of (R, P) computes tiles p, p + P, ... of the Hessian-vector product.

    With e = x - t, de = dx - dt and c = 1 / ``divisor``:
        out_g = dw e^2 + 2 w e de                 out_x = 2c (dg w e + g dw e + g w de)
        out_w = c (dg e^2 + 2 g e de)             out_t = -out_x

    x, t, w, g, dx, dt, dw, dg  (batch * rows, n), any strides
    out_g, out_x, out_t, out_w  (batch * rows, n), each or None
    sums_ptr                    (P, sums) or None: each program's sums of out_g, / ``divisor`` if P is 1; or, if
                                OF_WEIGHT, of out_w, where a weight is broadcast
    All but x and t may be None: a missing direction is 0, a missing weight 1, a missing g 0.
    Bytes: each operand once, each result once, and the partial sums.
    """
    first = tl.program_id(0)
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    scale = tl.full((), 1, ACC) / divisor
    sums = tl.zeros((ROWS, COLS), ACC)
    for tile in tl.range(program, _tiles(rows, n, ROWS, COLS, KEEP), programs):
        at = _tile(first, tile, batch, rows, n, ROWS, COLS, ALIGN, FLAT, KEEP)
        sums += _hvp_tile(
            at, x, t, w, g, dx, dt, dw, dg, out_g, out_x, out_t, out_w, scale, sizes, OF_WEIGHT, ALIGN, ACC
        )
    total = tl.zeros((), ACC)
    if FLAT:
        if program == programs - 1:
            rest = _hvp_tile(
                _tail(n), x, t, w, g, dx, dt, dw, dg, out_g, out_x, out_t, out_w, scale, sizes, OF_WEIGHT, 1, ACC
            )  # fmt: skip
            total += tl.sum(tl.sum(rest, axis=1), axis=0)
    if sums_ptr is not None:
        if OF_WEIGHT:
            _store_sums(sums_ptr, sums, total, batch, n, 1, ROWS, COLS, KEEP)
        else:
            _store_sums(sums_ptr, sums, total, batch, n, divisor, ROWS, COLS, KEEP)


def plan(walk: Walk, block: int, sums: bool = False) -> config.MseTile:
    """Return the tile of ``block`` elements for a walk; ``sums``: over all but the kept dimensions."""
    align = 16
    if walk.sizes or walk.columns_kept:  # not flat
        strides = [s for x in walk.operands if isinstance(x, Operand) for s in x.strides]
        align = math.gcd(16, walk.n, *strides)
    return config.mse_tile(walk.batch, walk.rows, walk.n, align, block, sums, walk.columns_kept)


def _broadcast(grad: Tensor | None, input: Tensor) -> Tensor | None:
    """View a gradient of the losses, one for each batch element or element, in input's shape."""
    if grad is None or grad.dim() == input.dim():
        return grad
    return grad[(..., *(None,) * (input.dim() - grad.dim()))].expand(input.shape)


def _expanded(weight: Tensor | None, input: Tensor) -> Tensor | None:
    """View a weight, or its tangent, in input's shape."""
    return weight if weight is None or weight.shape == input.shape else weight.expand(input.shape)


def _own_dims(weight: Tensor, input: Tensor) -> list[int]:
    """Return the dimensions along which a weight is not broadcast."""
    sizes = zip(weight.shape, input.shape, strict=True)
    return [d for d, (own, size) in enumerate(sizes) if own == size != 1]


def _divisor(reduction: str, shape: torch.Size, batch_dims: int) -> int:
    return math.prod(shape[batch_dims:]) if reduction == "mean" else 1


def _empty_sums(input: Tensor, reduction: str, batch_dims: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor for the loss, filled already if there are no elements to reduce."""
    if reduction == "none":
        return torch.empty_like(input, dtype=dtype)
    if input.numel():
        return input.new_empty(input.shape[:batch_dims], dtype=dtype)
    return input.new_full(input.shape[:batch_dims], math.nan if reduction == "mean" else 0.0, dtype=dtype)


def _elementwise(results: list[Tensor | None], input: Tensor) -> list[Tensor | None]:
    """Return those of input's shape: a kernel writes them as it goes; the others are sums."""
    return [result if result is not None and result.shape == input.shape else None for result in results]


def _given(results: list[Tensor | None]) -> list[Tensor]:
    return [result for result in results if result is not None]


def _launch_reduction(
    kernel: Any, kept: Sequence[int], tensors: Sequence[Tensor | None], results: Sequence[Tensor | None],
    sums: Tensor | None, divisor: int, sums_divisor: int, acc: torch.dtype, block: int,
    *more: Tensor | None, **compiled: Any,
) -> None:  # fmt: skip
    """Run a kernel that writes the ``results`` and adds up ``sums`` over all but the ``kept`` dimensions.

    ``more``: the kernel's last arguments. Where several programs share a sum, a second kernel adds their partial sums.
    """
    input, *others = tensors
    assert input is not None
    device, summing = input.device, sums is not None
    walk = coalesce_dims(kept, input, *others, results=results)
    tile = plan(walk, block, summing)
    R, P = config.mse_grid(tile, walk.batch, walk.rows, walk.n, not summing)
    buffer = partials = None
    if sums is not None:
        target = buffer = sums
        if walk.kept:
            target = sums.view([input.shape[d] for d in kept]).permute([kept.index(d) for d in walk.kept])
            buffer = target if target.is_contiguous() else target.new_empty(target.shape)
        partials = buffer if P == 1 else sums.new_empty((P, sums.numel()), dtype=acc)
    launch(
        kernel, (R, P), *walk.operands, partials, walk.batch, walk.rows, walk.n, divisor, walk.sizes,
        *more, device=device, ACC=DTYPES[acc], **tile._asdict(), **compiled,
    )  # fmt: skip
    if sums is None or buffer is None:
        return
    if P > 1:
        S = sums.numel()
        block_p, block_r = config.mse_sum(S)
        launch(
            _mse_sum_kernel, (cdiv(S, block_r),), partials, buffer, P, S, sums_divisor,
            device=device, BLOCK_P=block_p, BLOCK_R=block_r, ACC=DTYPES[acc],
        )  # fmt: skip
    if buffer is not target:
        target.copy_(buffer)


def _forward(
    input: Tensor, target: Tensor, weight: Tensor | None, weight_sum: Tensor | None, reduction: str, batch_dims: int,
    output_mask: list[bool], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Return the loss and, for grad_output = 1, the needed gradients, divided by ``weight_sum`` if there is one."""
    elementwise = reduction == "none"
    batch_dims = 0 if elementwise else batch_dims
    loss = _empty_sums(input, reduction, batch_dims, dtype)
    gradients = empty_gradients((input, target, weight), output_mask)
    if input.numel() == 0:
        return [loss if weight_sum is None else (loss / weight_sum).to(dtype), *_given(gradients)]
    acc = acc_dtype(input, target, weight)
    divisor = _divisor(reduction, input.shape, batch_dims)
    tensors = input, target, _expanded(weight, input)
    if weight is not None and gradients[2] is not None and weight.shape != input.shape:
        squares = weight.new_empty(weight.shape, dtype=acc)
        one = input.new_ones((), dtype=acc) if weight_sum is None else weight_sum.to(acc).reciprocal()
        _launch_reduction(
            _mse_backward_kernel, _own_dims(weight, input), (*tensors, one.expand(input.shape)),
            [*gradients[:2], None], squares, divisor, 1, acc, config.MSE_BLOCK,
        )  # fmt: skip
        gradients[2].copy_(squares)
        return [(squares * weight).sum().to(dtype), *_given(gradients)]
    _launch_reduction(
        _mse_forward_kernel, range(batch_dims), tensors, [loss if elementwise else None, *gradients],
        None if elementwise else loss, divisor, divisor, acc, config.MSE_BLOCK, weight_sum,
        **config.mse_registers(acc, config.target_of(input.device)),
    )  # fmt: skip
    return [loss, *_given(gradients)]


def mse_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, batch_dims: int, dtype: torch.dtype
) -> Tensor:
    """Return the loss: elementwise for "none", else of shape input.shape[:batch_dims]."""
    return _forward(input, target, weight, None, reduction, batch_dims, [False] * 3, dtype)[0]


def mse_forward_backward(
    input: Tensor, target: Tensor, weight: Tensor | None, weight_sum: Tensor | None, reduction: str,
    output_mask: list[bool], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Return the loss / ``weight_sum`` and its needed gradients by input, target and weight, in one pass."""
    return _forward(input, target, weight, weight_sum, reduction, 0, output_mask, dtype)


def mse_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, batch_dims: int,
    output_mask: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the needed gradients by input, target and weight: 2c g w e, -2c g w e and c g e^2."""
    results = empty_gradients((input, target, weight), output_mask)
    if input.numel() == 0 or not any(output_mask):
        return _given(results)
    acc = acc_dtype(grad_output, input, target, weight)
    divisor = _divisor(reduction, input.shape, 0 if reduction == "none" else batch_dims)
    tensors = input, target, _expanded(weight, input), _broadcast(grad_output, input)
    elementwise = _elementwise(results, input)
    if weight is not None and elementwise[2] is not results[2]:
        _launch_reduction(
            _mse_backward_kernel, _own_dims(weight, input), tensors, elementwise, results[2],
            divisor, 1, acc, config.MSE_BLOCK,
        )  # fmt: skip
        return _given(results)
    walk = coalesce_dims((), *tensors, results=elementwise)
    tile = plan(walk, config.MSE_BLOCK)
    launch(
        _mse_backward_kernel, (cdiv(walk.rows, tile.ROWS) * cdiv(walk.n, tile.COLS),), *walk.operands, None,
        walk.batch, walk.rows, walk.n, divisor, walk.sizes, device=input.device, ACC=DTYPES[acc], **tile._asdict(),
    )  # fmt: skip
    return _given(results)


def mse_hvp(
    grad_output: Tensor | None, input: Tensor, target: Tensor, weight: Tensor | None,
    d_grad: Tensor | None, d_input: Tensor | None, d_target: Tensor | None, d_weight: Tensor | None,
    reduction: str, batch_dims: int, output_mask: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the needed derivatives (grad_output, input, target, weight) of c * sum(g w e^2) along a direction."""
    elementwise = reduction == "none"
    batch_dims = 0 if elementwise else batch_dims
    dtype = (input if grad_output is None else grad_output).dtype
    loss = _empty_sums(input, reduction, batch_dims, dtype) if output_mask[0] else None
    gradients = empty_gradients((input, target, weight), output_mask[1:])
    if input.numel() == 0 or not any(output_mask):
        return _given([loss, *gradients])
    tensors = (
        input, target, _expanded(weight, input), _broadcast(grad_output, input),
        d_input, d_target, _expanded(d_weight, input), _broadcast(d_grad, input),
    )  # fmt: skip
    divisor = _divisor(reduction, input.shape, batch_dims)
    written = [loss if elementwise else None, *_elementwise(gradients, input)]
    acc = acc_dtype(*tensors)
    options = {"num_warps": config.warps(config.target_of(input.device))}
    # At most one kind of sum for each pass.
    of_weight = weight is not None and gradients[2] is not written[3]
    if loss is not None and not elementwise:
        _launch_reduction(
            _mse_hvp_kernel, range(batch_dims), tensors, written, loss, divisor, divisor, acc,
            config.MSE_HVP_BLOCK, OF_WEIGHT=False, **options,
        )  # fmt: skip
        written = [None] * 4
    if of_weight and weight is not None:
        _launch_reduction(
            _mse_hvp_kernel, _own_dims(weight, input), tensors, written, gradients[2], divisor, 1, acc,
            config.MSE_HVP_BLOCK, OF_WEIGHT=True, **options,
        )  # fmt: skip
    elif any(result is not None for result in written):
        _launch_reduction(
            _mse_hvp_kernel, (), tensors, written, None, divisor, 1, acc,
            config.MSE_HVP_BLOCK, OF_WEIGHT=False, **options,
        )  # fmt: skip
    return _given([loss, *gradients])
