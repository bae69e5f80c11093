"""A batch of linear models and their squared errors: kernels and launchers.

For each model b, with its own rows or rows that all share,

    E = s * (X W^T + b - Y),  loss = c * sum(s * (X W^T + b - Y)^2),  grad_W = 2c E^T X,  grad_b = 2c sum_n E.

Rows of a model are cut into pieces of at most SPAN rows; a program computes one piece. A piece has a slot of its own
for its partial sums, and the slots of a model stand in a row, so that a second stage adds them in order. Where all
models have N rows, model b has the slots b * parts, ..., b * parts + parts - 1. Ragged rows are cut at each multiple
of SPAN and at each bound between models: the piece of model b in the p-th span has slot p + b, which no other has,
as from one piece to the next p or b grows. So R and B give the number of slots, and a program finds its piece by a
binary search; a slot that belongs to no piece has no rows.

Over 500 lines, since the ways through a model's rows share their pieces and their second stage.

The kernels share these arguments; X, W, Y and s are records (Batch) of any strides:

    x, w, y, s   X (B, N, D), W (B, K, D), Y and s (B, N, K); s may be None; ragged rows have a model stride of 0
    b_ptr        (B, K) or None
    bounds       (B, 2) or None: start and end of each model's rows, clamped to [0, N]; N is then the number of all rows
    error_ptr    (B, N, K), for ragged rows (N, K), or None: E
    results      Results: what the last stage writes, and partial sums, ``width`` numbers for each slot, in the order
                 G = K * D of grad_W (or G = 0), K of sum_n E, L of the loss
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import acc_dtype
from . import config
from .dims import Batch, Matrix
from .launch import cdiv, launch
from .linear_mse import _alignment, _multiplied
from .matmul import write_scaled_product
from .shared import DTYPES


class Results(NamedTuple):
    """What a forward call writes.

    Attributes:
        grad: (B, K, D) or None. bias: (B, K) or None. loss: (B, L).
        partials: (slots, width); None if each model has one piece.
    """

    grad: Tensor | None
    bias: Tensor | None
    loss: Tensor
    partials: Tensor | None


@triton.jit
def _bounds_of(bounds, b, N):
    """Return the first row of model b, and the row after its last."""
    at = bounds.ptr + b * bounds.row
    start = tl.load(at).to(tl.int64)
    end = tl.load(at + bounds.col).to(tl.int64)
    return tl.minimum(tl.maximum(start, 0), N), tl.minimum(tl.maximum(end, 0), N)


@triton.jit
def _piece(slot, bounds, B, N, parts, span):
    """Return a slot's model, its piece's first row and the row after its last, the model's rows, if the piece is all.

    Of ragged rows the model is the last whose first slot is not behind this one.
    """
    if bounds is None:
        b = (slot // parts).to(tl.int64)
        begin = (slot % parts).to(tl.int64) * span
        end = tl.minimum(begin + span, N)
        return b, begin, end, tl.zeros((), tl.int64) + N, parts == 1
    else:
        low = slot * 0
        high = low + B
        while high - low > 1:
            middle = (low + high) // 2
            start, _ = _bounds_of(bounds, middle.to(tl.int64), N)
            before = start // span + middle <= slot
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        b = low.to(tl.int64)
        start, stop = _bounds_of(bounds, b, N)
        first = (slot - b) * span
        begin = tl.maximum(start, first)
        end = tl.minimum(stop, first + span)
        return b, begin, end, stop - start, (begin == start) & (end == stop)


@triton.jit
def _linear_mse_models_chunks_kernel(
    x, w_ptr, y, b_ptr, s, bounds, error_ptr, results, B, N, D, parts, span,
    K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ALIGN: tl.constexpr,
    STAGES: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program reads each row of one piece once and holds it as CHUNKS tiles of CHUNK columns; few outputs.

    w_ptr: contiguous. L = 1. A model of one piece has its results written here.
    Bytes: X, Y and s once, E once, W and the results once; for a piece of a model that has several W, and
    K * D + K + 1 partial sums.
    """
    slot = tl.program_id(0)
    b, begin, end, count, whole = _piece(slot, bounds, B, N, parts, span)
    if end > begin:
        chunk = tl.arange(0, CHUNK)
        inside_d = D // ALIGN * ALIGN
        weights = ()
        grads = ()
        for j in tl.static_range(CHUNKS):
            cols = j * CHUNK + chunk
            for k in tl.static_range(K):
                w_at = w_ptr + (b * K + k) * inside_d + cols
                weights = weights + (tl.load(w_at, mask=cols < inside_d, other=0.0).to(ACC),)
                grads = grads + (tl.zeros((ROWS, CHUNK), ACC),)
        biases = ()
        bias_grads = ()
        for k in tl.static_range(K):
            if b_ptr is not None:
                biases = biases + (tl.load(b_ptr + b * K + k).to(ACC),)
            bias_grads = bias_grads + (tl.zeros((ROWS,), ACC),)
        losses = tl.zeros((ROWS,), ACC)
        x_ptr = x.ptr + b * (x.model // ALIGN * ALIGN)
        y_ptr = y.ptr + b * y.model
        if s is not None:
            s_ptr = s.ptr + b * s.model
        for tile in tl.range(0, tl.cdiv(end - begin, ROWS), num_stages=STAGES):
            rows = begin + tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
            inside = rows < end
            base = x_ptr + (rows * (x.row // ALIGN * ALIGN))[:, None]
            xs = ()
            for j in tl.static_range(CHUNKS):
                cols = j * CHUNK + chunk
                x_at = base + (cols.to(tl.int64) * x.col)[None, :]
                values = tl.load(x_at, mask=inside[:, None] & (cols < inside_d)[None, :], other=0.0)
                xs = xs + (values.to(ACC),)
            new_bias_grads = ()
            errors = ()
            for k in tl.static_range(K):
                products = tl.zeros((ROWS, CHUNK), ACC)
                for j in tl.static_range(CHUNKS):
                    row = tl.broadcast_to(weights[j * K + k][None, :], (ROWS, CHUNK))
                    products = tl.fma(xs[j], row, products)
                error = tl.sum(products, axis=1)
                if b_ptr is not None:
                    error += biases[k]
                col = tl.full((), k, tl.int64)
                error -= tl.load(y_ptr + rows * y.row + col * y.col, mask=inside, other=0.0).to(ACC)
                error = tl.where(inside, error, 0.0)
                weighted = error
                if s is not None:
                    scale = tl.load(s_ptr + rows * s.row + col * s.col, mask=inside, other=0.0)
                    weighted = error * scale.to(ACC)
                losses = tl.fma(error, weighted, losses)
                new_bias_grads = new_bias_grads + (bias_grads[k] + weighted,)
                if error_ptr is not None:
                    place = rows
                    if bounds is None:
                        place = b * N + rows
                    tl.store(error_ptr + place * K + k, weighted.to(error_ptr.dtype.element_ty), mask=inside)
                errors = errors + (tl.broadcast_to(weighted[:, None], (ROWS, CHUNK)),)
            bias_grads = new_bias_grads
            if results.grad is not None:
                new_grads = ()
                for j in tl.static_range(CHUNKS):
                    for k in tl.static_range(K):
                        new_grads = new_grads + (tl.fma(xs[j], errors[k], grads[j * K + k]),)
                grads = new_grads
        share = tl.full((), 1, ACC)
        if MEAN:
            share = share / (count * K).to(ACC)
        width = K + 1
        if results.grad is not None:
            width = K * inside_d + K + 1
        if results.partials is not None:
            part = results.partials + slot.to(tl.int64) * width
        if results.grad is not None:
            for j in tl.static_range(CHUNKS):
                cols = j * CHUNK + chunk
                for k in tl.static_range(K):
                    total = tl.sum(grads[j * K + k], axis=0)
                    if whole:
                        at = results.grad + (b * K + k) * inside_d + cols
                        tl.store(at, total * 2 * share, mask=cols < inside_d)
                    else:
                        if results.partials is not None:
                            tl.store(part + k * inside_d + cols, total, mask=cols < inside_d)
        for k in tl.static_range(K):
            total = tl.sum(bias_grads[k], axis=0)
            if whole:
                if results.bias is not None:
                    tl.store(results.bias + b * K + k, total * 2 * share)
            else:
                if results.partials is not None:
                    tl.store(part + (width - K - 1 + k), total)
        total = tl.sum(losses, axis=0)
        if whole:
            tl.store(results.loss + b, (total * share).to(results.loss.dtype.element_ty))
        else:
            if results.partials is not None:
                tl.store(part + width - 1, total)


@triton.jit
def _linear_mse_models_tiles_kernel(
    x, w, y, b_ptr, s, bounds, out_ptr, partials_ptr, B, N, D, K, cols, parts,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SHARED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program computes a tile of a piece's rows and BLOCK_N outputs: X W^T, or where y is given E and its sums.

    SHARED: all models have the same rows, and all their outputs, ``cols`` = B * K, are columns of one matrix.
    out_ptr: as error_ptr, or None. partials_ptr: (slots, 2K), SHARED (slots, B, 2K), or None: of a slot
    sum_n E, then the sums of s e^2, for each output.
    Bytes: X once for each tile of columns, W for each piece (from cache where tiles share them), Y and s once, E once.
    """
    col_tiles = tl.cdiv(cols, BLOCK_N)
    slot = tl.program_id(0) // col_tiles
    b, begin, end, _, _ = _piece(slot, bounds, B, N, parts, BLOCK_M)
    if end > begin:
        rows = begin + tl.arange(0, BLOCK_M)
        columns = (tl.program_id(0) % col_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n = columns < cols
        models = b + columns * 0
        ks = columns
        if SHARED:
            models = columns // K
            ks = columns % K
        inside_d = D // ALIGN * ALIGN
        ds = tl.arange(0, BLOCK_K).to(tl.int64)
        x_row = x.ptr + b * (x.model // ALIGN * ALIGN) + rows * (x.row // ALIGN * ALIGN)
        w_row = w.ptr + models * (w.model // ALIGN * ALIGN) + ks * (w.row // ALIGN * ALIGN)
        products = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for d in tl.range(0, inside_d, BLOCK_K):
            now = d + ds
            inside_k = now < inside_d
            left = tl.load(
                x_row[:, None] + now[None, :] * x.col,
                mask=(rows < end)[:, None] & inside_k[None, :],
                other=0.0,
            )
            right = tl.load(
                w_row[None, :] + now[:, None] * w.col, mask=inside_k[:, None] & inside_n[None, :], other=0.0
            )
            products = tl.dot(
                left.to(OPERAND), right.to(OPERAND), products, input_precision=PRECISION, out_dtype=ACC
            )
        inside = (rows < end)[:, None] & inside_n[None, :]
        values = products
        if b_ptr is not None:
            values += tl.load(b_ptr + models * K + ks, mask=inside_n, other=0.0).to(ACC)[None, :]
        if y is not None:
            at = y.ptr + (models * y.model + ks * y.col)[None, :] + (rows * y.row)[:, None]
            error = tl.where(inside, values - tl.load(at, mask=inside, other=0.0).to(ACC), 0.0)
            values = error
            if s is not None:
                at = s.ptr + (models * s.model + ks * s.col)[None, :] + (rows * s.row)[:, None]
                values = error * tl.load(at, mask=inside, other=0.0).to(ACC)
            if partials_ptr is not None:
                sums = partials_ptr + slot.to(tl.int64) * (2 * cols) + ks
                if SHARED:
                    sums += models * (2 * K)
                tl.store(sums, tl.sum(values, axis=0), mask=inside_n)
                tl.store(sums + K, tl.sum(values * error, axis=0), mask=inside_n)
        if out_ptr is not None:
            place = rows[:, None] * K + ks[None, :]
            if bounds is None:
                place += models[None, :] * N * K
            tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _linear_mse_models_shared_kernel(
    x, w, y, b_ptr, s, bounds, error_ptr, partials_ptr, N, D, K, cols, span,
    GRAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, OUTPUTS: tl.constexpr, ALIGN: tl.constexpr,
    STAGES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program goes through a span of the rows that all models share, for OUTPUTS of their ``cols`` = B * K outputs:
    each tile of rows is read once and used in two products, X W^T and X^T E.

    COLS: D or the next power of 2. bounds: None. partials_ptr: (spans, B, G + 2K), G = K * D or without GRAD 0: of a
    model X^T E, sum_n E and the sums of s e^2, for each output.
    Bytes: X once for each tile of outputs (from cache where tiles share it), Y and s once, E once, and for each span
    W once and its partial sums.
    """
    col_tiles = tl.cdiv(cols, OUTPUTS)
    part = tl.program_id(0) // col_tiles
    columns = (tl.program_id(0) % col_tiles).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside_n = columns < cols
    models = columns // K
    ks = columns % K
    inside_d = D // ALIGN * ALIGN
    ds = tl.arange(0, COLS)
    w_at = w.ptr + (models * (w.model // ALIGN * ALIGN) + ks * (w.row // ALIGN * ALIGN))[None, :]
    w_at += ds.to(tl.int64)[:, None] * w.col
    weights = tl.load(w_at, mask=(ds < inside_d)[:, None] & inside_n[None, :], other=0.0).to(OPERAND)
    y_at = y.ptr + (models * y.model + ks * y.col)[None, :]
    if s is not None:
        s_at = s.ptr + (models * s.model + ks * s.col)[None, :]
    biases = tl.zeros((OUTPUTS,), ACC)
    if b_ptr is not None:
        biases += tl.load(b_ptr + columns, mask=inside_n, other=0.0).to(ACC)
    grads = tl.zeros((COLS, OUTPUTS), ACC)
    bias_grads = tl.zeros((OUTPUTS,), ACC)
    losses = tl.zeros((OUTPUTS,), ACC)
    begin = part.to(tl.int64) * span
    end = tl.minimum(begin + span, N)
    for tile in tl.range(0, tl.cdiv(end - begin, ROWS), num_stages=STAGES):
        rows = begin + tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        x_at = x.ptr + rows[:, None] * (x.row // ALIGN * ALIGN) + ds.to(tl.int64)[None, :] * x.col
        values = tl.load(x_at, mask=(rows < end)[:, None] & (ds < inside_d)[None, :], other=0.0).to(OPERAND)
        error = tl.dot(values, weights, input_precision=PRECISION, out_dtype=ACC) + biases[None, :]
        inside = (rows < end)[:, None] & inside_n[None, :]
        target = tl.load(y_at + (rows * y.row)[:, None], mask=inside, other=0.0).to(ACC)
        error = tl.where(inside, error - target, 0.0)
        weighted = error
        if s is not None:
            weighted = error * tl.load(s_at + (rows * s.row)[:, None], mask=inside, other=0.0).to(ACC)
        losses += tl.sum(error * weighted, axis=0)
        bias_grads += tl.sum(weighted, axis=0)
        if error_ptr is not None:
            place = (models * N * K + ks)[None, :] + rows[:, None] * K
            tl.store(error_ptr + place, weighted.to(error_ptr.dtype.element_ty), mask=inside)
        if GRAD:
            right = weighted.to(OPERAND)
            grads = tl.dot(tl.trans(values), right, grads, input_precision=PRECISION, out_dtype=ACC)
    size = 0
    if GRAD:
        size = K * inside_d
    width = size + 2 * K
    sums = partials_ptr + part.to(tl.int64) * (cols // K) * width + models * width + ks
    if GRAD:
        at = sums[None, :] + (ks * (inside_d - 1))[None, :] + ds[:, None]
        tl.store(at, grads, mask=(ds < inside_d)[:, None] & inside_n[None, :])
    tl.store(sums + size, bias_grads, mask=inside_n)
    tl.store(sums + size + K, losses, mask=inside_n)


@triton.jit
def _linear_mse_models_outer_kernel(
    left, right, bounds, out_ptr, partials_ptr, B, N, K, D, span, factor,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    MEAN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program computes a (BLOCK_M, BLOCK_N) tile of L^T R over a piece's rows, BLOCK_K at a time; ragged rows.

    left: L (N, K). right: R (N, D); ALIGN divides D and its row stride. out_ptr: (B, K, D), written where a model
    has one piece. partials_ptr: (slots, K * D). MEAN: out is divided by the number of a model's elements of L.
    Bytes: L and R once for each tile (from cache where tiles share them), the results once.
    """
    k_tiles = tl.cdiv(K, BLOCK_M)
    d_tiles = tl.cdiv(D, BLOCK_N)
    slot = tl.program_id(0) // (k_tiles * d_tiles)
    b, begin, end, count, whole = _piece(slot, bounds, B, N, 1, span)
    if end > begin:
        tile = tl.program_id(0) % (k_tiles * d_tiles)
        ks = (tile // d_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        ds = (tile % d_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_d = ds < D // ALIGN * ALIGN
        products = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for step in tl.range(0, tl.cdiv(end - begin, BLOCK_K)):
            rows = begin + tl.cast(step, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
            left_at = left.ptr + rows[None, :] * left.row + ks[:, None] * left.col
            a = tl.load(left_at, mask=(rows < end)[None, :] & (ks < K)[:, None], other=0.0)
            right_at = right.ptr + rows[:, None] * (right.row // ALIGN * ALIGN) + ds[None, :] * right.col
            c = tl.load(right_at, mask=(rows < end)[:, None] & inside_d[None, :], other=0.0)
            products = tl.dot(
                a.to(OPERAND), c.to(OPERAND), products, input_precision=PRECISION, out_dtype=ACC
            )
        place = ks[:, None] * (D // ALIGN * ALIGN) + ds[None, :]
        inside = (ks < K)[:, None] & inside_d[None, :]
        size = tl.cast(K, tl.int64) * D
        if whole:
            scale = tl.full((), 1, ACC) * factor
            if MEAN:
                scale = scale / (count * K).to(ACC)
            tl.store(out_ptr + b * size + place, (products * scale).to(out_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(partials_ptr + slot.to(tl.int64) * size + place, products, mask=inside)


@triton.jit
def _linear_mse_models_sum_kernel(
    partials_ptr, bounds, grad_ptr, bias_ptr, loss_ptr, B, N, K, G, H, L, slot_width, parts, span, factor,
    SHARED: tl.constexpr, ALL: tl.constexpr, MEAN: tl.constexpr, MODELS: tl.constexpr, PARTS: tl.constexpr,
    COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program adds the partial sums of COLS columns of MODELS models in order, PARTS at a time: the second stage.

    grad_ptr (B, G), bias_ptr (B, H): None, or factor * share times their sums; loss_ptr (B, L): None, or share times
    them; share: 1, MEAN: 1 over the number of elements, K for each row. slot_width: from a slot to the next.
    SHARED: a slot has the sums of all models. ALL: False if models of one piece have their results already.
    """
    col_tiles = tl.cdiv(G + H + L, COLS)
    b = (tl.program_id(0) // col_tiles).to(tl.int64) * MODELS + tl.arange(0, MODELS)
    cols = (tl.program_id(0) % col_tiles) * COLS + tl.arange(0, COLS)
    some = b < B
    count = tl.zeros((MODELS,), tl.int64)
    if bounds is None:
        first = b * parts
        base = b * 0
        if SHARED:
            first = b * 0
            base = b * (G + H + L)
        pieces = tl.where(some, count + parts, 0)
        count = count + N
    else:
        at = bounds.ptr + b * bounds.row
        start = tl.minimum(tl.maximum(tl.load(at, mask=some, other=0).to(tl.int64), 0), N)
        end = tl.minimum(tl.maximum(tl.load(at + bounds.col, mask=some, other=0).to(tl.int64), 0), N)
        count = tl.maximum(end - start, 0)
        first = start // span + b
        base = b * 0
        pieces = tl.where(count > 0, tl.maximum(end - 1, 0) // span - start // span + 1, 0)
    wanted = some
    if not ALL:
        wanted = some & (pieces != 1)
        pieces = tl.where(wanted, pieces, 0)
    sums = tl.zeros((MODELS, PARTS, COLS), ACC)
    inside_cols = (cols < G + H + L)[None, None, :]
    for at_part in tl.range(0, tl.max(pieces, axis=0), PARTS):
        part = at_part + tl.arange(0, PARTS)
        place = (base[:, None] + (first[:, None] + part[None, :]) * slot_width)[:, :, None] + cols[
            None, None, :
        ]
        inside = (part[None, :] < pieces[:, None])[:, :, None] & inside_cols
        sums += tl.load(partials_ptr + place, mask=inside, other=0.0)
    total = tl.sum(sums, axis=1)
    share = tl.full((MODELS, 1), 1, ACC)
    loss_share = share
    if MEAN:
        elements = (count * K)[:, None]
        share = share / tl.maximum(elements, 1).to(ACC)
        loss_share = loss_share / elements.to(ACC)
    mask = wanted[:, None] & (cols < G)[None, :]
    if grad_ptr is not None:
        at = grad_ptr + b[:, None] * G + cols[None, :]
        tl.store(at, (total * factor * share).to(grad_ptr.dtype.element_ty), mask=mask)
    if bias_ptr is not None:
        mask = wanted[:, None] & ((cols >= G) & (cols < G + H))[None, :]
        at = bias_ptr + b[:, None] * H + (cols - G)[None, :]
        tl.store(at, (total * factor * share).to(bias_ptr.dtype.element_ty), mask=mask)
    if loss_ptr is not None:
        mask = wanted[:, None] & ((cols >= G + H) & (cols < G + H + L))[None, :]
        at = loss_ptr + b[:, None] * L + (cols - G - H)[None, :]
        tl.store(at, (total * loss_share).to(loss_ptr.dtype.element_ty), mask=mask)


def _rows(tensor: Tensor) -> Batch:
    """Return rows as a Batch, whether each model has its own or all share them."""
    strides = tensor.stride() if tensor.dim() == 3 else (0, *tensor.stride())
    return Batch(tensor, *strides)


def _edges(bounds: Tensor | None) -> Matrix | None:
    return None if bounds is None else Matrix(bounds, *bounds.stride())


class _Pieces(NamedTuple):
    """How the rows are cut: ``parts`` pieces of ``span`` rows for each of ``models`` models, or ragged."""

    bounds: Tensor | None
    models: int
    rows: int
    span: int

    @property
    def parts(self) -> int:
        return 1 if self.bounds is not None else cdiv(self.rows, self.span)

    @property
    def slots(self) -> int:
        if self.bounds is None:
            return self.models * self.parts
        return cdiv(self.rows, self.span) + self.models - 1


def _add_up(
    pieces: _Pieces,
    partials: Tensor,
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
    sizes: tuple[int, int, int],
    outputs: int,
    mean: bool,
    every: bool,
    shared: bool = False,
    factor: int = 2,
) -> None:
    """Run the second stage. ``results``: grad, bias and loss; ``sizes``: G, H and L; ``outputs``: elements of a row."""
    models, parts, cols = config.MODELS_SUM_BLOCK
    B = len(next(result for result in results if result is not None))
    launch(
        _linear_mse_models_sum_kernel, (cdiv(B, models) * cdiv(sum(sizes), cols),),
        partials, _edges(pieces.bounds), *results, B, pieces.rows, outputs, *sizes, partials.shape[1], pieces.parts,
        pieces.span, factor,
        device=partials.device, SHARED=shared, ALL=every, MEAN=mean, MODELS=models, PARTS=parts, COLS=cols,
        ACC=DTYPES[partials.dtype],
    )  # fmt: skip


class _Call(NamedTuple):
    """The operands of one forward call, and what it writes."""

    input: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    sample_weight: Tensor | None
    bounds: Tensor | None
    loss: Tensor
    error: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    mean: bool
    acc: torch.dtype

    @property
    def rows(self) -> int:
        """Return N, or the rows of all models where they are ragged."""
        return self.input.shape[-2]

    @property
    def elementwise(self) -> tuple[Batch, Tensor | None, Batch | None, Matrix | None]:
        """Return the operands y, b_ptr, s and bounds of a kernel."""
        s = self.sample_weight
        return _rows(self.target), self.bias, None if s is None else _rows(s), _edges(self.bounds)

    def partials(self, *shape: int) -> Tensor:
        return self.input.new_empty(shape, dtype=self.acc)


def _by_chunks(call: _Call, chosen: config.LinearMseChunks) -> None:
    """Read each row once."""
    B, K, D = call.weight.shape
    total = call.rows if call.bounds is not None else B * call.rows
    span = config.models_span(total, chosen.ROWS, K, call.input.element_size(), call.acc)
    pieces = _Pieces(call.bounds, B, call.rows, span)
    sizes = (0 if call.grad_weight is None else K * D, K, 1)
    partials = (
        call.partials(pieces.slots, sum(sizes)) if call.bounds is not None or pieces.parts > 1 else None
    )
    x = _rows(call.input)
    launch(
        _linear_mse_models_chunks_kernel, (pieces.slots,), x, call.weight.contiguous(), *call.elementwise, call.error,
        Results(call.grad_weight, call.grad_bias, call.loss, partials), B, call.rows, D, pieces.parts, span,
        device=call.input.device, K=K, ROWS=chosen.ROWS, CHUNK=chosen.CHUNK, CHUNKS=chosen.CHUNKS,
        ALIGN=_alignment((call.input, call.weight), D, x.model, x.row), STAGES=chosen.STAGES, MEAN=call.mean,
        ACC=DTYPES[call.acc], **chosen.compiled,
    )  # fmt: skip
    if partials is not None:
        results = call.grad_weight, call.grad_bias, call.loss
        _add_up(pieces, partials, results, sizes, K, call.mean, every=False)


def _by_shared(call: _Call, chosen: config.LinearMseDot) -> None:
    """Read the rows that all models share once."""
    B, K, D = call.weight.shape
    target = config.target_of(call.input.device)
    operand = _multiplied(torch.promote_types(call.input.dtype, call.weight.dtype), call.acc, target)
    tiles = cdiv(B * K, chosen.OUTPUTS)
    span = config.models_shared_span(call.rows, tiles, D, chosen.ROWS, call.input.element_size(), call.acc)
    pieces = _Pieces(None, 1, call.rows, span)
    size = 0 if call.grad_weight is None else K * D
    partials = call.partials(pieces.parts, B * (size + 2 * K))
    x, w = _rows(call.input), _rows(call.weight)
    launch(
        _linear_mse_models_shared_kernel, (pieces.parts * tiles,), x, w, *call.elementwise, call.error, partials,
        call.rows, D, K, B * K, span,
        device=call.input.device, GRAD=call.grad_weight is not None,
        ALIGN=_alignment((call.input, call.weight), D, x.row, w.model, w.row), OPERAND=DTYPES[operand],
        PRECISION=config.dot_precision(operand, target, torch.backends.cuda.matmul.fp32_precision),
        ACC=DTYPES[call.acc], **chosen._asdict(), **config.registers(config.ALL_REGISTERS, target),
    )  # fmt: skip
    _add_up_outputs(call, pieces, partials, call.grad_weight, shared=True)


def _add_up_outputs(
    call: _Call, pieces: _Pieces, partials: Tensor, grad: Tensor | None, shared: bool
) -> None:
    """Add up partial sums that have a loss for each output: their second stage."""
    B, K, D = call.weight.shape
    losses = call.loss.unsqueeze(1) if K == 1 else call.partials(B, K)
    sizes = (0 if grad is None else K * D, K, K)
    results = grad, call.grad_bias, losses
    _add_up(pieces, partials, results, sizes, K, call.mean, every=True, shared=shared)
    if K > 1:
        call.loss.copy_(losses.sum(1))


def _precision(operand: torch.dtype, target: config.Target, D: int) -> str:
    """Return the precision of a product of D columns. One column scales or adds rows: torch never means tf32 there."""
    setting = "ieee" if D == 1 else torch.backends.cuda.matmul.fp32_precision
    return config.dot_precision(operand, target, setting)


def _tiles(
    rows: Tensor, weight: Tensor, bounds: Tensor | None, acc: torch.dtype, loads: bool
) -> tuple[_Pieces, dict[str, Any]]:
    """Return how the rows are cut, and how the kernel of tiles is compiled."""
    B, K, D = weight.shape
    N = rows.shape[-2]
    shared = bounds is None and rows.dim() == 2
    operand = torch.promote_types(rows.dtype, weight.dtype)
    target = config.target_of(rows.device)
    multiplied = _multiplied(operand, acc, target)
    each = N if bounds is None else cdiv(N, B)
    tile = config.models_tile(multiplied, each, B * K if shared else K, D, loads, target)
    x, w = _rows(rows), _rows(weight)
    options = {
        "ALIGN": _alignment((rows, weight), D, x.model, x.row, w.model, w.row), "SHARED": shared,
        "OPERAND": DTYPES[multiplied], "ACC": DTYPES[acc],
        "PRECISION": _precision(multiplied, target, D),
        **tile._asdict(), **config.registers(config.ALL_REGISTERS, target),
    }  # fmt: skip
    return _Pieces(bounds, 1 if shared else B, N, tile.BLOCK_M), options


def _launch_tiles(
    rows: Tensor, weight: Tensor, elementwise: tuple[Any, ...], out: Tensor | None, partials: Tensor | None,
    pieces: _Pieces, options: dict[str, Any],
) -> None:  # fmt: skip
    B, K, D = weight.shape
    cols = B * K if options["SHARED"] else K
    launch(
        _linear_mse_models_tiles_kernel, (pieces.slots * cdiv(cols, options["BLOCK_N"]),), _rows(rows), _rows(weight),
        *elementwise, out, partials, B, pieces.rows, D, K, cols, pieces.parts, device=rows.device, **options,
    )  # fmt: skip


def _by_tiles(call: _Call) -> None:
    """Compute products that end in the errors, then E^T X."""
    B, K, _ = call.weight.shape
    pieces, options = _tiles(call.input, call.weight, call.bounds, call.acc, loads=True)
    shared = options["SHARED"]
    error = call.error
    if error is None and call.grad_weight is not None:
        error = call.target.new_empty(
            call.target.shape, dtype=torch.promote_types(call.input.dtype, call.weight.dtype)
        )
    partials = call.partials(pieces.slots, 2 * K * (B if shared else 1))
    _launch_tiles(call.input, call.weight, call.elementwise, error, partials, pieces, options)
    _add_up_outputs(call, pieces, partials, None, shared)
    if call.grad_weight is None:
        return
    assert error is not None
    if call.bounds is None:
        write_scaled_product(error.mT, call.input, call.grad_weight, 2 / (call.rows * K if call.mean else 1))
    else:
        _by_outer(error, call.input, call.bounds, call.grad_weight, call.acc, call.mean, 2)


def _by_outer(
    left: Tensor, right: Tensor, bounds: Tensor, out: Tensor, acc: torch.dtype, mean: bool, factor: int
) -> None:
    """Compute ``factor * left^T right`` over the rows of each model."""
    B, K, D = out.shape
    rows = len(left)
    target = config.target_of(left.device)
    operand = _multiplied(torch.promote_types(left.dtype, right.dtype), acc, target)
    tile = config.models_tile(operand, K, D, cdiv(rows, B), False, target)
    span = config.models_span(rows, tile.BLOCK_K, K, right.element_size(), acc)
    pieces = _Pieces(bounds, B, rows, span)
    partials = left.new_empty((pieces.slots, K * D), dtype=acc)
    tiles = cdiv(K, tile.BLOCK_M) * cdiv(D, tile.BLOCK_N)
    launch(
        _linear_mse_models_outer_kernel, (pieces.slots * tiles,), Matrix(left, *left.stride()),
        Matrix(right, *right.stride()), _edges(bounds), out, partials, B, rows, K, D, span, factor,
        device=left.device, ALIGN=_alignment((right,), D, right.stride(0)), MEAN=mean, OPERAND=DTYPES[operand],
        PRECISION=_precision(operand, target, D),
        ACC=DTYPES[acc], **tile._asdict(), **config.registers(config.ALL_REGISTERS, target),
    )  # fmt: skip
    _add_up(pieces, partials, (out, None, None), (K * D, 0, 0), K, mean, every=False, factor=factor)


def linear_mse_models_forward(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, sample_weight: Tensor | None,
    bounds: Tensor | None, reduction: str, output_mask: list[bool], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Return the losses (B,) and, as needed, E in ``dtype``, grad_weight and grad_bias for grad_output = 1."""
    B, K, D = weight.shape
    acc = acc_dtype(input, weight, target, bias, sample_weight)
    loss = input.new_empty(B, dtype=dtype)
    error = None
    if output_mask[0]:
        fill = input.new_empty if bounds is None else input.new_zeros  # rows of no model
        error = fill(target.shape, dtype=dtype)
    grad_weight = input.new_empty((B, K, D), dtype=acc) if output_mask[1] else None
    grad_bias = input.new_empty((B, K), dtype=acc) if output_mask[2] else None
    results = [loss, *(result for result in (error, grad_weight, grad_bias) if result is not None)]
    if B == 0 or target.numel() == 0:
        loss.fill_(math.nan if reduction == "mean" else 0.0)
        for result in results[1:]:
            result.zero_()
        return results
    bias = None if bias is None else bias.contiguous()
    operands = (input, weight, target, bias, sample_weight, bounds)
    call = _Call(*operands, loss, error, grad_weight, grad_bias, reduction == "mean", acc)
    chosen = plan(input, weight, bounds, acc).tile
    if isinstance(chosen, config.LinearMseChunks):
        _by_chunks(call, chosen)
    elif isinstance(chosen, config.LinearMseDot):
        _by_shared(call, chosen)
    else:
        _by_tiles(call)
    return results


def plan(input: Tensor, weight: Tensor, bounds: Tensor | None, acc: torch.dtype) -> config.Plan:
    """Return how the fused losses of these operands are computed."""
    B, K, D = weight.shape
    target = config.target_of(input.device)
    if bounds is None and input.dim() == 2:
        operand = _multiplied(torch.promote_types(input.dtype, weight.dtype), acc, target)
        name, tile = "shared", config.models_shared(B * K, D, operand, target)
    else:
        rows = input.shape[-2] if bounds is None else cdiv(len(input), max(B, 1))
        name, tile = "chunks", config.models_chunks(K, D, input.element_size(), acc, rows, target)
    return config.Plan("tiles", None, {name: tile}) if isinstance(tile, str) else config.Plan(name, tile)


def linear_mse_models_product(rows: Tensor, models: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(R, K)``: each row (R, D) times its own of the models (B, K, D), transposed; 0 in rows of no model."""
    out = rows.new_zeros((len(rows), models.shape[1]), dtype=dtype)
    if out.numel() and len(models):
        pieces, options = _tiles(rows, models, bounds, acc_dtype(rows, models), loads=False)
        _launch_tiles(rows, models, (None, None, None, _edges(bounds)), out, None, pieces, options)
    return out


def linear_mse_models_outer(left: Tensor, right: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(B, K, D)``: the sums of ``left[r, k] * right[r, d]`` over the rows of each model."""
    out = left.new_empty((len(bounds), left.shape[1], right.shape[1]), dtype=dtype)
    if len(left) == 0:
        return out.zero_()
    if out.numel():
        _by_outer(left, right, bounds, out, acc_dtype(left, right), False, 1)
    return out
