"""Mean squared error: kernels and launchers.

    e = input - target,  loss = c * sum(w * e^2),  c = 1 or 1 / (number of elements),  w = weight or 1

A kernel receives each operand as a record (dims.py): the pointer, the strides of its rows and the stride along a
row, or no such stride where a row has one value. Operands with the same dense strides are one long row; operands
that are expanded, strided or permuted are read in place.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import acc_dtype
from . import config
from .dims import Operand, Walk, coalesce_dims
from .launch import cdiv, launch
from .shared import DTYPES, convert, ordered_sum


@triton.jit
def _tile(
    tile, first_row, rows, n, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr
):
    """Row numbers (ROWS, 1), column numbers (1, COLS) and mask of a tile, 64-bit so that offsets may be.

    ``ALIGN`` divides n unless FLAT, where the rest is left to _tail: n rounded down shows the compiler a mask
    that is constant over 16 bytes, hence 128-bit loads. Rows past the end are moved back to the last one.
    """
    if FLAT:
        row_tile = 0
        col_tile = tile
    else:
        col_tiles = tl.cdiv(n, COLS)
        row_tile = tile // col_tiles
        col_tile = tile % col_tiles
    row = row_tile * ROWS + tl.arange(0, ROWS)
    cols = (tl.zeros((), tl.int64) + col_tile) * COLS + tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (cols < n // ALIGN * ALIGN)[None, :]
    row = first_row + tl.minimum(row, rows - 1).to(tl.int64)
    return row[:, None], cols[None, :], mask


@triton.jit
def _tail(n):
    """What _tile leaves of a flat operand: the last n % 16 columns."""
    cols = n // 16 * 16 + tl.arange(0, 16).to(tl.int64)
    return tl.zeros((1, 1), tl.int64), cols[None, :], (cols < n)[None, :]


@triton.jit
def _row_offset(row, sizes, strides, ALIGN: tl.constexpr):
    """The offset of an operand's rows: ``row`` counts over ``sizes``, of which the last varies slowest."""
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
    """The tile ``at`` (row, cols, mask) of an Operand or RowOperand, in ACC; 0 outside the mask."""
    row, cols, mask = at
    if len(x) == 2:  # a RowOperand
        value = convert(tl.load(x.ptr + _row_offset(row, sizes, x.strides, 1)), ACC)
        value = tl.where(mask, tl.broadcast_to(value, mask.shape), 0.0)
    else:
        offsets = _row_offset(row, sizes, x.strides, ALIGN) + cols * x.column
        value = convert(tl.load(x.ptr + offsets, mask=mask, other=0.0), ACC)
    return value


@triton.jit
def _store(ptr, at, n, value, ALIGN: tl.constexpr):
    """Write the tile ``at`` of a dense (rows, n) result; nothing for a ptr of None."""
    if ptr is not None:
        row, cols, mask = at
        tl.store(ptr + row * (n // ALIGN * ALIGN) + cols, convert(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sum(ptr, total, divisor):
    """Write the sum of program (r, p) of (R, P) to ptr (P, R), divided already if P is 1: no second stage follows."""
    total = total / tl.where(tl.num_programs(1) == 1, divisor, 1)
    out = ptr + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out, convert(total, ptr.dtype.element_ty))


@triton.jit
def _forward_tile(
    at, x, t, w, loss_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale, sizes,
    ELEMENTWISE: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """w e^2 of one tile; writes the gradients and, if ELEMENTWISE, the losses."""
    error = _load(x, at, sizes, ALIGN, ACC) - _load(t, at, sizes, ALIGN, ACC)
    weighted = error
    if w is not None:
        weighted = error * _load(w, at, sizes, ALIGN, ACC)
    _store(grad_x_ptr, at, n, weighted * (2 * scale), ALIGN)
    _store(grad_t_ptr, at, n, weighted * (-2 * scale), ALIGN)
    _store(grad_w_ptr, at, n, error * error * scale, ALIGN)
    square = weighted * error
    if ELEMENTWISE:
        _store(loss_ptr, at, n, square, ALIGN)
    return square


@triton.jit
def _mse_forward_kernel(
    x, t, w, loss_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr, rows, n, divisor, sizes,
    ELEMENTWISE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
    FLAT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (r, p) of (R, P): the tiles p, p + P, ... of batch element r, which is ``rows`` rows of n columns.

    x, t, w     (R * rows, n), any strides; w may be None
    loss_ptr    ELEMENTWISE: (R * rows, n); else (P, R): each program's sum, / ``divisor`` if P is 1
    grad_*_ptr  (R * rows, n) or None: d(sum / divisor) / d(x, t, w)
    Bytes: each operand once, each result once, and R * P partial sums.
    """
    first = tl.program_id(0).to(tl.int64) * rows
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    scale = tl.full((), 1, ACC) / divisor
    sums = tl.zeros((ROWS, COLS), ACC)
    for tile in tl.range(program, tl.cdiv(rows, ROWS) * tl.cdiv(n, COLS), programs):
        at = _tile(tile, first, rows, n, ROWS, COLS, ALIGN, FLAT)
        sums += _forward_tile(
            at, x, t, w, loss_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale, sizes, ELEMENTWISE, ALIGN, ACC
        )  # fmt: skip
    total = tl.sum(tl.sum(sums, axis=1), axis=0)
    if FLAT:
        if program == programs - 1:
            rest = _forward_tile(
                _tail(n), x, t, w, loss_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale, sizes, ELEMENTWISE, 1, ACC
            )  # fmt: skip
            total += tl.sum(tl.sum(rest, axis=1), axis=0)
    if not ELEMENTWISE:
        _store_sum(loss_ptr, total, divisor)


@triton.jit
def _mse_sum_kernel(
    partials_ptr, loss_ptr, P, R, divisor, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr
):
    """BLOCK_R sums over the programs of the first stage, / ``divisor``.

    partials_ptr (P, R)
    loss_ptr     (R,)
    """
    cols = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = ordered_sum(partials_ptr, P, R, cols, cols < R, BLOCK_P, ACC)
    tl.store(loss_ptr + cols, convert(total / divisor, loss_ptr.dtype.element_ty), mask=cols < R)


@triton.jit
def _backward_tile(
    at,
    x,
    t,
    w,
    g,
    grad_x_ptr,
    grad_t_ptr,
    grad_w_ptr,
    n,
    scale,
    sizes,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write the gradients of one tile."""
    g = _load(g, at, sizes, ALIGN, ACC) * scale
    error = _load(x, at, sizes, ALIGN, ACC) - _load(t, at, sizes, ALIGN, ACC)
    _store(grad_w_ptr, at, n, g * error * error, ALIGN)
    if (grad_x_ptr is not None) or (grad_t_ptr is not None):
        grad = 2 * g * error
        if w is not None:
            grad *= _load(w, at, sizes, ALIGN, ACC)
        _store(grad_x_ptr, at, n, grad, ALIGN)
        _store(grad_t_ptr, at, n, -grad, ALIGN)


@triton.jit
def _mse_backward_kernel(
    x, t, w, g, grad_x_ptr, grad_t_ptr, grad_w_ptr, rows, n, divisor, sizes,
    ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program p: tile p of the gradients 2c g w e, -2c g w e and c g e^2, with c = 1 / ``divisor``.

    x, t, w     (rows, n), any strides; w may be None
    g           (rows, n), any strides: read here, so that the host never waits for its value
    grad_*_ptr  (rows, n), each or None
    Bytes: each operand once, each result once.
    """
    program = tl.program_id(0)
    scale = tl.full((), 1, ACC) / divisor
    at = _tile(program, 0, rows, n, ROWS, COLS, ALIGN, FLAT)
    _backward_tile(at, x, t, w, g, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale, sizes, ALIGN, ACC)
    if FLAT:
        if program == tl.num_programs(0) - 1:
            _backward_tile(_tail(n), x, t, w, g, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale, sizes, 1, ACC)


@triton.jit
def _hvp_tile(
    at, x, t, w, g, dx, dt, dw, dg, out_g_ptr, out_x_ptr, out_t_ptr, out_w_ptr, n, scale, sizes,
    ELEMENTWISE: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d(w e^2) = dw e^2 + 2 w e de of one tile; writes the elementwise results."""
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
        d_gwe += grad * d_weighted
        d_gee_by_e += 2 * grad * d_error
    if dg is not None:
        d_grad = _load(dg, at, sizes, ALIGN, ACC)
        d_gwe += d_grad * weighted
        d_gee_by_e += d_grad * error
    d_gwe *= 2 * scale
    _store(out_x_ptr, at, n, d_gwe, ALIGN)
    _store(out_t_ptr, at, n, -d_gwe, ALIGN)
    _store(out_w_ptr, at, n, error * d_gee_by_e * scale, ALIGN)
    d_wee = error * d_wee_by_e
    if ELEMENTWISE:
        _store(out_g_ptr, at, n, d_wee, ALIGN)
    return d_wee


@triton.jit
def _mse_hvp_kernel(
    x, t, w, g, dx, dt, dw, dg, out_g_ptr, out_x_ptr, out_t_ptr, out_w_ptr, rows, n, divisor, sizes,
    ELEMENTWISE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
    FLAT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (r, p) of (R, P): tiles p, p + P, ... of batch element r of the Hessian-vector product.

    With e = x - t, de = dx - dt and c = 1 / ``divisor``:
        out_g = c * sum(dw e^2 + 2 w e de)        out_x = 2c (dg w e + g dw e + g w de)
        out_w = c (dg e^2 + 2 g e de)             out_t = -out_x

    x, t, w, g, dx, dt, dw, dg  (R * rows, n), any strides; a batch element is ``rows`` rows of n columns
    out_x, out_t, out_w         (R * rows, n), dense
    out_g                       ELEMENTWISE: (R * rows, n); else (P, R): each program's sum, / ``divisor`` if P is 1
    All but x and t may be None: a missing direction is 0, a missing weight 1, a missing g 0.
    Bytes: each operand once, each result once, and R * P partial sums.
    """
    first = tl.program_id(0).to(tl.int64) * rows
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    scale = tl.full((), 1, ACC) / divisor
    sums = tl.zeros((ROWS, COLS), ACC)
    for tile in tl.range(program, tl.cdiv(rows, ROWS) * tl.cdiv(n, COLS), programs):
        at = _tile(tile, first, rows, n, ROWS, COLS, ALIGN, FLAT)
        sums += _hvp_tile(
            at, x, t, w, g, dx, dt, dw, dg, out_g_ptr, out_x_ptr, out_t_ptr, out_w_ptr, n, scale, sizes,
            ELEMENTWISE, ALIGN, ACC,
        )  # fmt: skip
    total = tl.sum(tl.sum(sums, axis=1), axis=0)
    if FLAT:
        if program == programs - 1:
            rest = _hvp_tile(
                _tail(n), x, t, w, g, dx, dt, dw, dg, out_g_ptr, out_x_ptr, out_t_ptr, out_w_ptr, n, scale, sizes,
                ELEMENTWISE, 1, ACC,
            )  # fmt: skip
            total += tl.sum(tl.sum(rest, axis=1), axis=0)
    if (not ELEMENTWISE) and (out_g_ptr is not None):
        _store_sum(out_g_ptr, total, divisor)


def plan(walk: Walk, block: int, batched: bool) -> config.MseTile:
    """The tile of ``block`` elements for a walk; ``batched``: see config.mse_tile."""
    align = 16
    if walk.sizes:
        strides = [s for x in walk.operands if isinstance(x, Operand) for s in x.strides]
        align = math.gcd(16, walk.n, *strides)
    return config.mse_tile(walk.batch, walk.rows, walk.n, align, block, batched)


def _broadcast(grad: Tensor | None, input: Tensor) -> Tensor | None:
    """A gradient of the losses, one for each batch element or element, as a view of input's shape."""
    if grad is None or grad.dim() == input.dim():
        return grad
    return grad[(..., *(None,) * (input.dim() - grad.dim()))].expand(input.shape)


def _divisor(reduction: str, shape: torch.Size, batch_dims: int) -> int:
    return math.prod(shape[batch_dims:]) if reduction == "mean" else 1


def _empty_likes(tensors: tuple[Tensor | None, ...], output_mask: list[bool]) -> list[Tensor | None]:
    return [
        torch.empty_like(tensor) if need and tensor is not None else None
        for tensor, need in zip(tensors, output_mask, strict=True)
    ]


def _empty_sums(input: Tensor, reduction: str, batch_dims: int, dtype: torch.dtype) -> Tensor:
    """A tensor for the loss, filled already if there are no elements to reduce."""
    if reduction == "none":
        return torch.empty_like(input, dtype=dtype)
    if input.numel():
        return input.new_empty(input.shape[:batch_dims], dtype=dtype)
    return input.new_full(input.shape[:batch_dims], math.nan if reduction == "mean" else 0.0, dtype=dtype)


def _in_order(result: Tensor, order: list[int]) -> Tensor:
    """``result`` if its memory order is the walk's, else a new tensor in that order."""
    if result.permute(order).is_contiguous():
        return result
    return torch.empty_permuted(result.shape, order, dtype=result.dtype, device=result.device)


def _all_in_order(results: list[Tensor | None], order: list[int]) -> list[Tensor | None]:
    return [None if result is None else _in_order(result, order) for result in results]


def _delivered(results: list[Tensor | None], buffers: list[Tensor | None]) -> list[Tensor]:
    """The results that are not None, each copied from its buffer if that is another tensor."""
    for result, buffer in zip(results, buffers, strict=True):
        if result is not None and buffer is not None and result is not buffer:
            result.copy_(buffer)
    return [result for result in results if result is not None]


def _launch_reduction(
    kernel: Any, walk: Walk, sums: Tensor | None, results: list[Tensor | None], divisor: int, acc: torch.dtype,
    elementwise: bool, block: int, device: torch.device, **compiled: int,
) -> None:  # fmt: skip
    """Run a kernel that writes ``results`` and sums over each batch element, or ``elementwise`` terms, to ``sums``.

    Where several programs share a sum, a second kernel adds their partial sums.
    """
    tile = plan(walk, block, batched=walk.batch > 1)
    tiles = cdiv(walk.rows, tile.ROWS) * cdiv(walk.n, tile.COLS)
    P, R = config.mse_programs(tiles, walk.batch, elementwise), walk.batch
    partials = sums
    if sums is not None and not elementwise and P > 1:
        partials = sums.new_empty((P, R), dtype=acc)
    launch(
        kernel, (R, P), *walk.operands, partials, *results, walk.rows, walk.n, divisor, walk.sizes,
        device=device, ELEMENTWISE=elementwise, ACC=DTYPES[acc], **tile._asdict(), **compiled,
    )  # fmt: skip
    if sums is not None and partials is not sums:
        block_p, block_r = config.mse_sum(R)
        launch(
            _mse_sum_kernel, (cdiv(R, block_r),), partials, sums, P, R, divisor,
            device=device, BLOCK_P=block_p, BLOCK_R=block_r, ACC=DTYPES[acc],
        )  # fmt: skip


def _forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, batch_dims: int, output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """The loss and, for grad_output = 1, the needed gradients."""
    tensors = (input, target, weight)
    elementwise = reduction == "none"
    batch_dims = 0 if elementwise else batch_dims
    loss = _empty_sums(input, reduction, batch_dims, dtype)
    grads = _empty_likes(tensors, output_mask)
    if input.numel() == 0:
        return [loss, *(grad for grad in grads if grad is not None)]
    walk = coalesce_dims(batch_dims, *tensors)
    loss_buffer = _in_order(loss, walk.order) if elementwise else loss
    buffers = _all_in_order(grads, walk.order)
    _launch_reduction(
        _mse_forward_kernel, walk, loss_buffer, buffers, _divisor(reduction, input.shape, batch_dims),
        acc_dtype(*tensors), elementwise, config.MSE_BLOCK, input.device,
    )  # fmt: skip
    return _delivered([loss, *grads], [loss_buffer, *buffers])


def mse_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, batch_dims: int, dtype: torch.dtype
) -> Tensor:
    """The loss: elementwise for "none", else of shape input.shape[:batch_dims]."""
    return _forward(input, target, weight, reduction, batch_dims, [False] * 3, dtype)[0]


def mse_forward_backward(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """The loss and its needed gradients by input, target and weight, in one pass."""
    return _forward(input, target, weight, reduction, 0, output_mask, dtype)


def mse_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, batch_dims: int,
    output_mask: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed gradients by input, target and weight: 2c g w e, -2c g w e and c g e^2."""
    tensors = (input, target, weight)
    results = _empty_likes(tensors, output_mask)
    if input.numel() == 0 or not any(output_mask):
        return [result for result in results if result is not None]
    batch_dims = 0 if reduction == "none" else batch_dims
    walk = coalesce_dims(batch_dims, *tensors, _broadcast(grad_output, input))
    rows = walk.batch * walk.rows
    tile = plan(walk, config.MSE_BLOCK, batched=False)
    tiles = cdiv(rows, tile.ROWS) * cdiv(walk.n, tile.COLS)
    buffers = _all_in_order(results, walk.order)
    launch(
        _mse_backward_kernel, (tiles,), *walk.operands, *buffers,
        rows, walk.n, _divisor(reduction, input.shape, batch_dims), walk.sizes,
        device=input.device, ACC=DTYPES[acc_dtype(grad_output, *tensors)], **tile._asdict(),
    )  # fmt: skip
    return _delivered(results, buffers)


def mse_hvp(
    grad_output: Tensor | None, input: Tensor, target: Tensor, weight: Tensor | None,
    d_grad: Tensor | None, d_input: Tensor | None, d_target: Tensor | None, d_weight: Tensor | None,
    reduction: str, batch_dims: int, output_mask: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed derivatives (grad_output, input, target, weight) of c * sum(g w e^2) along a direction."""
    elementwise = reduction == "none"
    batch_dims = 0 if elementwise else batch_dims
    dtype = (input if grad_output is None else grad_output).dtype
    sums = _empty_sums(input, reduction, batch_dims, dtype) if output_mask[0] else None
    results = _empty_likes((input, target, weight), output_mask[1:])
    if input.numel() == 0 or not any(output_mask):
        return [result for result in (sums, *results) if result is not None]
    g, dg = (_broadcast(grad, input) for grad in (grad_output, d_grad))
    tensors = (input, target, weight, g, d_input, d_target, d_weight, dg)
    walk = coalesce_dims(batch_dims, *tensors)
    sums_buffer = _in_order(sums, walk.order) if sums is not None and elementwise else sums
    buffers = _all_in_order(results, walk.order)
    _launch_reduction(
        _mse_hvp_kernel, walk, sums_buffer, buffers, _divisor(reduction, input.shape, batch_dims),
        acc_dtype(*tensors), elementwise, config.MSE_HVP_BLOCK, input.device,
        num_warps=config.warps(config.target_of(input.device)),
    )  # fmt: skip
    return _delivered([sums, *results], [sums_buffer, *buffers])
