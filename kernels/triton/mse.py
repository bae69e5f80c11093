"""Mean squared error: kernels and launchers.

    e = input - target,  loss = c * sum(w * e^2),  c = 1 or 1 / (number of elements),  w = weight or 1

A kernel sees each operand as rows x columns with strides of its own (rows.py): tensors that lie alike are one
long row, and what is expanded, strided or permuted is read in place.
"""

import math
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import accumulator
from . import config
from .launch import cdiv, launch
from .ordered_sum import ordered_sum
from .rows import Rows, walk_rows

BLOCK = 2048  # elements of one tile
HVP_BLOCK = 1024  # likewise, with up to eight operands in registers
PROGRAMS = 1056  # of a reduction, at most: 8 on each of 132 multiprocessors, and the same on any other chip

_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


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
    """Where an operand's rows begin: ``row`` counts over ``sizes``, the last of them varying slowest."""
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
def _load(ptr, row, cols, mask, sizes, row_strides, stride_col, ALIGN: tl.constexpr, ACC: tl.constexpr):
    """An operand's tile in ACC, 0 outside the mask; with a stride_col of None a row has one value."""
    if stride_col is None:
        value = tl.load(ptr + _row_offset(row, sizes, row_strides, 1)).to(ACC)
        value = tl.where(mask, tl.broadcast_to(value, mask.shape), 0.0)
    else:
        offsets = _row_offset(row, sizes, row_strides, ALIGN) + cols * stride_col
        value = tl.load(ptr + offsets, mask=mask, other=0.0).to(ACC)
    return value


@triton.jit
def _store(ptr, row, cols, mask, n, value, ALIGN: tl.constexpr):
    """Write a tile of a dense (rows, n) result."""
    tl.store(ptr + row * (n // ALIGN * ALIGN) + cols, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_tile(
    row, cols, mask,
    x_ptr, t_ptr, w_ptr, loss_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale,
    sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc,
    ELEMENTWISE: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """w e^2 of one tile; on the way the gradients and, if ELEMENTWISE, the losses are written."""
    x = _load(x_ptr, row, cols, mask, sizes, strides_x, stride_xc, ALIGN, ACC)
    t = _load(t_ptr, row, cols, mask, sizes, strides_t, stride_tc, ALIGN, ACC)
    error = x - t
    weighted = error
    if w_ptr is not None:
        weighted = error * _load(w_ptr, row, cols, mask, sizes, strides_w, stride_wc, ALIGN, ACC)
    if grad_x_ptr is not None:
        _store(grad_x_ptr, row, cols, mask, n, weighted * (2 * scale), ALIGN)
    if grad_t_ptr is not None:
        _store(grad_t_ptr, row, cols, mask, n, weighted * (-2 * scale), ALIGN)
    if grad_w_ptr is not None:
        _store(grad_w_ptr, row, cols, mask, n, error * error * scale, ALIGN)
    square = weighted * error
    if ELEMENTWISE:
        _store(loss_ptr, row, cols, mask, n, square, ALIGN)
    return square


@triton.jit
def _mse_forward_kernel(
    x_ptr, t_ptr, w_ptr, loss_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr,
    rows, n, divisor, sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc,
    ELEMENTWISE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
    FLAT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (r, p) of (R, P): the tiles p, p + P, ... of slice r, which is ``rows`` rows of n columns.

    x_ptr, t_ptr, w_ptr  (R * rows, n), any strides; w_ptr may be None
    loss_ptr             ELEMENTWISE: (R * rows, n); else (P, R): each program's sum, / ``divisor`` if P is 1
    grad_*_ptr           (R * rows, n) or None: d(sum / divisor) / d(x, t, w)
    Bytes: each operand once, each result once, and R * P partial sums.
    """
    slice_ = tl.program_id(0)
    first = slice_.to(tl.int64) * rows
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    scale = tl.full((), 1, ACC) / divisor
    sums = tl.zeros((ROWS, COLS), ACC)
    for tile in tl.range(program, tl.cdiv(rows, ROWS) * tl.cdiv(n, COLS), programs):
        row, cols, mask = _tile(tile, first, rows, n, ROWS, COLS, ALIGN, FLAT)
        sums += _forward_tile(
            row, cols, mask, x_ptr, t_ptr, w_ptr, loss_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale,
            sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc, ELEMENTWISE, ALIGN, ACC,
        )  # fmt: skip
    total = tl.sum(tl.sum(sums, axis=1), axis=0)
    if FLAT:
        if program == programs - 1:
            # A branch may not give a name another type: these are not the loop's.
            tail_row, tail_cols, tail_mask = _tail(n)
            rest = _forward_tile(
                tail_row, tail_cols, tail_mask,
                x_ptr, t_ptr, w_ptr, loss_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale,
                sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc, ELEMENTWISE, 1, ACC,
            )  # fmt: skip
            total += tl.sum(tl.sum(rest, axis=1), axis=0)
    if not ELEMENTWISE:
        total = total / tl.where(programs == 1, divisor, 1)
        out = loss_ptr + program.to(tl.int64) * tl.num_programs(0) + slice_
        tl.store(out, total.to(loss_ptr.dtype.element_ty))


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
    tl.store(loss_ptr + cols, (total / divisor).to(loss_ptr.dtype.element_ty), mask=cols < R)


@triton.jit
def _backward_tile(
    row, cols, mask,
    x_ptr, t_ptr, w_ptr, g_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale,
    sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc, strides_g, stride_gc,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile."""
    g = _load(g_ptr, row, cols, mask, sizes, strides_g, stride_gc, ALIGN, ACC) * scale
    x = _load(x_ptr, row, cols, mask, sizes, strides_x, stride_xc, ALIGN, ACC)
    t = _load(t_ptr, row, cols, mask, sizes, strides_t, stride_tc, ALIGN, ACC)
    error = x - t
    if grad_w_ptr is not None:
        _store(grad_w_ptr, row, cols, mask, n, g * error * error, ALIGN)
    if (grad_x_ptr is not None) or (grad_t_ptr is not None):
        grad = 2 * g * error
        if w_ptr is not None:
            grad *= _load(w_ptr, row, cols, mask, sizes, strides_w, stride_wc, ALIGN, ACC)
        if grad_x_ptr is not None:
            _store(grad_x_ptr, row, cols, mask, n, grad, ALIGN)
        if grad_t_ptr is not None:
            _store(grad_t_ptr, row, cols, mask, n, -grad, ALIGN)


@triton.jit
def _mse_backward_kernel(
    x_ptr, t_ptr, w_ptr, g_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr,
    rows, n, divisor, sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc, strides_g, stride_gc,
    ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program p: tile p of the gradients 2c g w e, -2c g w e and c g e^2, with c = 1 / ``divisor``.

    x_ptr, t_ptr, w_ptr  (rows, n), any strides; w_ptr may be None
    g_ptr                (rows, n), any strides: read here, so that the host never waits for its value
    grad_*_ptr           (rows, n), each or None
    Bytes: each operand once, each result once.
    """
    program = tl.program_id(0)
    scale = tl.full((), 1, ACC) / divisor
    row, cols, mask = _tile(program, 0, rows, n, ROWS, COLS, ALIGN, FLAT)
    _backward_tile(
        row, cols, mask, x_ptr, t_ptr, w_ptr, g_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale,
        sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc, strides_g, stride_gc, ALIGN, ACC,
    )  # fmt: skip
    if FLAT:
        if program == tl.num_programs(0) - 1:
            tail_row, tail_cols, tail_mask = _tail(n)
            _backward_tile(
                tail_row, tail_cols, tail_mask,
                x_ptr, t_ptr, w_ptr, g_ptr, grad_x_ptr, grad_t_ptr, grad_w_ptr, n, scale,
                sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc, strides_g, stride_gc,
                1, ACC,
            )  # fmt: skip


@triton.jit
def _hvp_tile(
    row, cols, mask, x_ptr, t_ptr, w_ptr, g_ptr, dx_ptr, dt_ptr, dw_ptr, dg_ptr,
    out_g_ptr, out_x_ptr, out_t_ptr, out_w_ptr, n, scale,
    sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc, strides_g, stride_gc,
    strides_dx, stride_dxc, strides_dt, stride_dtc, strides_dw, stride_dwc, strides_dg, stride_dgc,
    ELEMENTWISE: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dw e^2 + 2 w e de of one tile; the elementwise results are written on the way."""
    zero = tl.zeros(mask.shape, ACC)
    x = _load(x_ptr, row, cols, mask, sizes, strides_x, stride_xc, ALIGN, ACC)
    t = _load(t_ptr, row, cols, mask, sizes, strides_t, stride_tc, ALIGN, ACC)
    error = x - t
    d_error = zero
    if dx_ptr is not None:
        d_error += _load(dx_ptr, row, cols, mask, sizes, strides_dx, stride_dxc, ALIGN, ACC)
    if dt_ptr is not None:
        d_error -= _load(dt_ptr, row, cols, mask, sizes, strides_dt, stride_dtc, ALIGN, ACC)
    weighted = error
    d_weighted = d_error  # d(w e) = dw e + w de
    twist = 2 * d_error  # dw e + 2 w de
    if w_ptr is not None:
        w = _load(w_ptr, row, cols, mask, sizes, strides_w, stride_wc, ALIGN, ACC)
        weighted *= w
        d_weighted *= w
        twist *= w
    if dw_ptr is not None:
        dw_error = _load(dw_ptr, row, cols, mask, sizes, strides_dw, stride_dwc, ALIGN, ACC) * error
        d_weighted += dw_error
        twist += dw_error
    slope = zero  # d(g w e)
    curve = zero  # dg e + 2 g de
    if g_ptr is not None:
        g = _load(g_ptr, row, cols, mask, sizes, strides_g, stride_gc, ALIGN, ACC)
        slope += g * d_weighted
        curve += 2 * g * d_error
    if dg_ptr is not None:
        dg = _load(dg_ptr, row, cols, mask, sizes, strides_dg, stride_dgc, ALIGN, ACC)
        slope += dg * weighted
        curve += dg * error
    slope *= 2 * scale
    if out_x_ptr is not None:
        _store(out_x_ptr, row, cols, mask, n, slope, ALIGN)
    if out_t_ptr is not None:
        _store(out_t_ptr, row, cols, mask, n, -slope, ALIGN)
    if out_w_ptr is not None:
        _store(out_w_ptr, row, cols, mask, n, error * curve * scale, ALIGN)
    change = error * twist
    if ELEMENTWISE and (out_g_ptr is not None):
        _store(out_g_ptr, row, cols, mask, n, change, ALIGN)
    return change


@triton.jit
def _mse_hvp_kernel(
    x_ptr, t_ptr, w_ptr, g_ptr, dx_ptr, dt_ptr, dw_ptr, dg_ptr,
    out_g_ptr, out_x_ptr, out_t_ptr, out_w_ptr, rows, n, divisor,
    sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc, strides_g, stride_gc,
    strides_dx, stride_dxc, strides_dt, stride_dtc, strides_dw, stride_dwc, strides_dg, stride_dgc,
    ELEMENTWISE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr,
    FLAT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (r, p) of (R, P): tiles p, p + P, ... of slice r of the Hessian-vector product.

    With e = x - t, de = dx - dt and c = 1 / ``divisor``:
        out_g = c * sum(dw e^2 + 2 w e de)        out_x = 2c (dg w e + g dw e + g w de)
        out_w = c (dg e^2 + 2 g e de)             out_t = -out_x

    x, t, w, g, dx, dt, dw, dg  (R * rows, n), any strides; a slice is ``rows`` rows of n columns
    out_x, out_t, out_w         (R * rows, n), dense
    out_g                       ELEMENTWISE: (R * rows, n); else (P, R): each program's sum, / ``divisor`` if P is 1
    All but x and t may be None: a missing direction is 0, a missing weight 1, a missing g 0.
    Bytes: each operand once, each result once, and R * P partial sums.
    """
    slice_ = tl.program_id(0)
    first = slice_.to(tl.int64) * rows
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    scale = tl.full((), 1, ACC) / divisor
    sums = tl.zeros((ROWS, COLS), ACC)
    for tile in tl.range(program, tl.cdiv(rows, ROWS) * tl.cdiv(n, COLS), programs):
        row, cols, mask = _tile(tile, first, rows, n, ROWS, COLS, ALIGN, FLAT)
        sums += _hvp_tile(
            row, cols, mask, x_ptr, t_ptr, w_ptr, g_ptr, dx_ptr, dt_ptr, dw_ptr, dg_ptr,
            out_g_ptr, out_x_ptr, out_t_ptr, out_w_ptr, n, scale,
            sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc, strides_g, stride_gc,
            strides_dx, stride_dxc, strides_dt, stride_dtc, strides_dw, stride_dwc, strides_dg, stride_dgc,
            ELEMENTWISE, ALIGN, ACC,
        )  # fmt: skip
    total = tl.sum(tl.sum(sums, axis=1), axis=0)
    if FLAT:
        if program == programs - 1:
            tail_row, tail_cols, tail_mask = _tail(n)
            rest = _hvp_tile(
                tail_row, tail_cols, tail_mask, x_ptr, t_ptr, w_ptr, g_ptr, dx_ptr, dt_ptr, dw_ptr, dg_ptr,
                out_g_ptr, out_x_ptr, out_t_ptr, out_w_ptr, n, scale,
                sizes, strides_x, stride_xc, strides_t, stride_tc, strides_w, stride_wc, strides_g, stride_gc,
                strides_dx, stride_dxc, strides_dt, stride_dtc, strides_dw, stride_dwc, strides_dg, stride_dgc,
                ELEMENTWISE, 1, ACC,
            )  # fmt: skip
            total += tl.sum(tl.sum(rest, axis=1), axis=0)
    if (not ELEMENTWISE) and (out_g_ptr is not None):
        total = total / tl.where(programs == 1, divisor, 1)
        out = out_g_ptr + program.to(tl.int64) * tl.num_programs(0) + slice_
        tl.store(out, total.to(out_g_ptr.dtype.element_ty))


def _tiling(walk: Rows, block: int, sliced: bool = False) -> dict[str, int | bool]:
    """The constexpr arguments of _tile, for tiles of ``block`` elements; ``sliced``: a tile may not span slices."""
    if walk.slices * walk.rows == 1:
        return {"ROWS": 1, "COLS": block, "ALIGN": 16, "FLAT": True}
    cols = min(block, max(16, triton.next_power_of_2(walk.n)))
    across = (stride for strides, column in walk.strides if column is not None for stride in strides)
    rows = 1 if sliced and walk.rows == 1 else block // cols
    return {"ROWS": rows, "COLS": cols, "ALIGN": math.gcd(16, walk.n, *across), "FLAT": False}


def _spread(grad: Tensor | None, input: Tensor) -> Tensor | None:
    """One value for each slice, or each element, as an operand of input's shape: a view."""
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
    """Where the loss goes; a sum or mean of no elements is there already."""
    if reduction == "none":
        return torch.empty_like(input, dtype=dtype)
    if input.numel():
        return input.new_empty(input.shape[:batch_dims], dtype=dtype)
    return input.new_full(input.shape[:batch_dims], math.nan if reduction == "mean" else 0.0, dtype=dtype)


def _in_order(result: Tensor, order: list[int]) -> Tensor:
    """``result``, or a new tensor that lies in the order of the walk if ``result`` does not."""
    if result.permute(order).is_contiguous():
        return result
    return torch.empty_permuted(result.shape, order, dtype=result.dtype, device=result.device)


def _all_in_order(results: list[Tensor | None], order: list[int]) -> list[Tensor | None]:
    return [None if result is None else _in_order(result, order) for result in results]


def _delivered(results: list[Tensor | None], buffers: list[Tensor | None]) -> list[Tensor]:
    """The results that were asked for, each filled from its buffer where that is another tensor."""
    for result, buffer in zip(results, buffers, strict=True):
        if result is not None and buffer is not None and result is not buffer:
            result.copy_(buffer)
    return [result for result in results if result is not None]


def _programs(tiles: int, slices: int, elementwise: bool) -> int:
    """Programs per slice: from the shape alone, so that every GPU adds in the same order."""
    return min(tiles, 65535 if elementwise else max(1, PROGRAMS // slices))


def _partials(sums: Tensor, programs: int, slices: int, acc: torch.dtype, elementwise: bool) -> Tensor:
    """Where the first stage puts its sums: in place if one program makes each, else (P, R) partial sums."""
    return sums if elementwise or programs == 1 else sums.new_empty((programs, slices), dtype=acc)


def _finish(partials: Tensor, sums: Tensor, divisor: int) -> None:
    """Second stage: ``sums`` (R,) = ``partials`` (P, R) added over P, / ``divisor``."""
    P, R = partials.shape
    block_r = 1 if R == 1 else 32
    launch(
        _mse_sum_kernel, (cdiv(R, block_r),), partials, sums, P, R, divisor,
        device=sums.device, BLOCK_P=1024 // block_r, BLOCK_R=block_r, ACC=_ACC[partials.dtype],
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
    walk = walk_rows(batch_dims, *tensors)
    acc = accumulator(*tensors)
    divisor = _divisor(reduction, input.shape, batch_dims)
    tiling = _tiling(walk, BLOCK, sliced=walk.slices > 1)
    tiles = cdiv(walk.rows, tiling["ROWS"]) * cdiv(walk.n, tiling["COLS"])
    programs = _programs(tiles, walk.slices, elementwise)
    loss_buffer = _in_order(loss, walk.order) if elementwise else loss
    buffers = _all_in_order(grads, walk.order)
    sums = _partials(loss_buffer, programs, walk.slices, acc, elementwise)
    launch(
        _mse_forward_kernel, (walk.slices, programs), *tensors, sums, *buffers,
        walk.rows, walk.n, divisor, walk.sizes, *chain(*walk.strides),
        device=input.device, ELEMENTWISE=elementwise, ACC=_ACC[acc], **tiling,
    )  # fmt: skip
    if sums is not loss_buffer:
        _finish(sums, loss, divisor)
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
    walk = walk_rows(batch_dims, *tensors, _spread(grad_output, input))
    rows = walk.slices * walk.rows
    tiling = _tiling(walk, BLOCK)
    tiles = cdiv(rows, tiling["ROWS"]) * cdiv(walk.n, tiling["COLS"])
    buffers = _all_in_order(results, walk.order)
    launch(
        _mse_backward_kernel, (tiles,), *tensors, grad_output, *buffers,
        rows, walk.n, _divisor(reduction, input.shape, batch_dims), walk.sizes, *chain(*walk.strides),
        device=input.device, ACC=_ACC[accumulator(grad_output, *tensors)], **tiling,
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
    tensors = (input, target, weight, grad_output, d_input, d_target, d_weight, d_grad)
    grads = (_spread(grad, input) for grad in (grad_output, d_grad))
    walk = walk_rows(batch_dims, *tensors[:3], next(grads), *tensors[4:7], next(grads))
    acc = accumulator(*tensors)
    divisor = _divisor(reduction, input.shape, batch_dims)
    tiling = _tiling(walk, HVP_BLOCK, sliced=walk.slices > 1)
    tiles = cdiv(walk.rows, tiling["ROWS"]) * cdiv(walk.n, tiling["COLS"])
    programs = _programs(tiles, walk.slices, elementwise)
    sums_buffer = _in_order(sums, walk.order) if sums is not None and elementwise else sums
    partials = (
        sums_buffer
        if sums_buffer is None
        else _partials(sums_buffer, programs, walk.slices, acc, elementwise)
    )
    buffers = _all_in_order(results, walk.order)
    launch(
        _mse_hvp_kernel, (walk.slices, programs), *tensors, partials, *buffers,
        walk.rows, walk.n, divisor, walk.sizes, *chain(*walk.strides),
        device=input.device, ELEMENTWISE=elementwise, ACC=_ACC[acc], **tiling,
        num_warps=config.warps(config.target_of(input.device)),
    )  # fmt: skip
    if sums is not None and partials is not None and partials is not sums_buffer:
        _finish(partials, sums, divisor)
    return _delivered([sums, *results], [sums_buffer, *buffers])
