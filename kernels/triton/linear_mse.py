"""Linear layer and mean squared error in one pass: kernels and launchers.

    E = s * (X W^T + b - Y),  loss = c * sum(s * (X W^T + b - Y)^2),  c = 1 or 1 / (N K),  s = sample weight or 1
    grad_W = 2c E^T X,  grad_b = 2c sum_n E,  grad_X = 2c E W,  grad_Y = -2c E

X (N, D), W (K, D), Y (N, K). The predictions are never stored. Three plans (``plan``; config.LINEAR_MSE_PLANS):
``chunks`` for few outputs, ``dot`` for a few dozen in 16 bits, ``tiles`` for everything else. Over 500 lines, since
they share the errors (``_errors``), the second stage (``_Call.add_up``) and the backward.

The forward kernels share these arguments; matrices of any strides are records (dims.Matrix):

    x          (N, D); ALIGN divides D and its row stride
    w          (K, D)
    y          (N, K); ALIGN_K divides K and its row stride
    b_ptr      (K,) or None
    s          (N, K) or None
    error_ptr  (N, K) or None: E
    grad_ptr   (P, K, D) or None: program p's part of E^T X
    sums_ptr   (P, K + 1): its part of sum_n E, and of the sum of s e^2
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..checks import acc_dtype
from . import config
from .dims import Matrix
from .launch import cdiv, launch
from .matmul import write_scaled_product
from .shared import DTYPES, ordered_sum, store_product, tile_of, tiles_of


class Partials(NamedTuple):
    """Partial sums, as a kernel receives them: ``P`` rows of ``size`` columns, ``stride`` apart."""

    ptr: Tensor
    P: int
    stride: int
    size: int


@triton.jit
def _linear_mse_chunks_kernel(
    x, w_ptr, y, b_ptr, s, error_ptr, grad_ptr, sums_ptr, N, D,
    K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ALIGN: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program p of P adds up the row tiles p, p + P, ..., each read once and held as CHUNKS tiles of CHUNK columns.

    w_ptr: contiguous. EVEN: CHUNK divides D.
    Bytes: X, Y and s once, E once, and for each program W once and K * D + K + 1 partial sums.
    """
    program = tl.program_id(0)
    chunk = tl.arange(0, CHUNK)
    weights = ()
    grads = ()
    for j in tl.static_range(CHUNKS):
        cols = j * CHUNK + chunk
        for k in tl.static_range(K):
            if EVEN:
                weight = tl.load(w_ptr + k * D + cols)
            else:
                weight = tl.load(w_ptr + k * D + cols, mask=cols < D // ALIGN * ALIGN, other=0.0)
            weights = weights + (weight.to(ACC),)
            grads = grads + (tl.zeros((ROWS, CHUNK), ACC),)
    biases = ()
    bias_grads = ()
    for k in tl.static_range(K):
        if b_ptr is not None:
            biases = biases + (tl.load(b_ptr + k).to(ACC),)
        bias_grads = bias_grads + (tl.zeros((ROWS,), ACC),)
    losses = tl.zeros((ROWS,), ACC)
    # Asynchronous copies are of 4 bytes at least: a narrower target is loaded one tile ahead, into registers.
    AHEAD: tl.constexpr = y.ptr.dtype.element_ty.primitive_bitwidth < 32
    if AHEAD:
        ahead = _targets(y, tl.cast(program, tl.int64) * ROWS + tl.arange(0, ROWS), N, K)
    for tile in tl.range(program, tiles_of(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = rows < N
        if AHEAD:
            targets = ahead
            ahead = _targets(y, rows + tl.num_programs(0).to(tl.int64) * ROWS, N, K)
        else:
            targets = _targets(y, rows, N, K)
        base = x.ptr + (rows * (x.row // ALIGN * ALIGN))[:, None]
        xs = ()
        for j in tl.static_range(CHUNKS):
            cols = j * CHUNK + chunk
            at = base + (cols.to(tl.int64) * x.col)[None, :]
            if EVEN:
                values = tl.load(at, mask=inside[:, None], other=0.0)
            else:
                values = tl.load(at, mask=inside[:, None] & (cols < D // ALIGN * ALIGN)[None, :], other=0.0)
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
            error = tl.where(inside, error - targets[k].to(ACC), 0.0)
            weighted = error
            if s is not None:
                scale = tl.load(s.ptr + rows * s.row + col * s.col, mask=inside, other=0.0)
                weighted = error * scale.to(ACC)
            losses = tl.fma(error, weighted, losses)
            new_bias_grads = new_bias_grads + (bias_grads[k] + weighted,)
            if error_ptr is not None:
                tl.store(error_ptr + rows * K + k, weighted.to(error_ptr.dtype.element_ty), mask=inside)
            errors = errors + (tl.broadcast_to(weighted[:, None], (ROWS, CHUNK)),)
        bias_grads = new_bias_grads
        if grad_ptr is not None:
            new_grads = ()
            for j in tl.static_range(CHUNKS):
                for k in tl.static_range(K):
                    new_grads = new_grads + (tl.fma(xs[j], errors[k], grads[j * K + k]),)
            grads = new_grads
    if grad_ptr is not None:
        for j in tl.static_range(CHUNKS):
            cols = j * CHUNK + chunk
            for k in tl.static_range(K):
                at = grad_ptr + (program.to(tl.int64) * K + k) * D + cols
                tl.store(at, tl.sum(grads[j * K + k], axis=0), mask=cols < D // ALIGN * ALIGN)
    for k in tl.static_range(K):
        tl.store(sums_ptr + program * (K + 1) + k, tl.sum(bias_grads[k], axis=0))
    tl.store(sums_ptr + program * (K + 1) + K, tl.sum(losses, axis=0))


@triton.jit
def _targets(y, rows, N, K: tl.constexpr):
    """Return column k of Y at ``rows``, for each k."""
    targets = ()
    for k in tl.static_range(K):
        col = tl.full((), k, tl.int64)
        targets = targets + (tl.load(y.ptr + rows * y.row + col * y.col, mask=rows < N, other=0.0),)
    return targets


@triton.jit
def _linear_mse_dot_kernel(
    x, w, y, b_ptr, s, error_ptr, grad_ptr, sums_ptr, N, D, K,
    ROWS: tl.constexpr, COLS: tl.constexpr, OUTPUTS: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_K: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program p of P adds up the row tiles p, p + P, ..., each read once and used in two matrix products.

    COLS: D or the next power of 2. OUTPUTS: K or the next power of 2.
    Bytes: X, Y and s once, E once, and for each program W once and K * D + K + 1 partial sums.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, COLS)
    ks = tl.arange(0, OUTPUTS).to(tl.int64)
    inside_d = cols < D // ALIGN * ALIGN
    w_at = w.ptr + ks[None, :] * w.row + cols.to(tl.int64)[:, None] * w.col
    weights = tl.load(w_at, mask=inside_d[:, None] & (ks < K)[None, :], other=0.0).to(OPERAND)
    grads = tl.zeros((COLS, OUTPUTS), ACC)
    bias_grads = tl.zeros((OUTPUTS,), ACC)
    losses = tl.zeros((OUTPUTS,), ACC)
    for tile in tl.range(program, tiles_of(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        x_at = x.ptr + rows[:, None] * (x.row // ALIGN * ALIGN) + cols.to(tl.int64)[None, :] * x.col
        values = tl.load(x_at, mask=(rows < N)[:, None] & inside_d[None, :], other=0.0).to(OPERAND)
        products = tl.dot(values, weights, out_dtype=ACC)
        error, square = _errors(products, rows, ks, N, K, y, b_ptr, s, error_ptr, ALIGN_K, ACC)
        losses += tl.sum(square, axis=0)
        bias_grads += tl.sum(error, axis=0)
        if grad_ptr is not None:
            grads = tl.dot(tl.trans(values), error.to(OPERAND), grads, out_dtype=ACC)
    if grad_ptr is not None:
        at = grad_ptr + (program.to(tl.int64) * K + ks[None, :]) * D + cols[:, None]
        tl.store(at, grads, mask=inside_d[:, None] & (ks < K)[None, :])
    tl.store(sums_ptr + program * (K + 1) + ks, bias_grads, mask=ks < K)
    tl.store(sums_ptr + program * (K + 1) + K, tl.sum(losses, axis=0))


@triton.jit
def _errors(products, rows, ks, N, K, y, b_ptr, s, error_ptr, ALIGN_K: tl.constexpr, ACC: tl.constexpr):
    """Return E and s e^2 of a tile, given its part of X W^T; write E unless error_ptr is None.

    rows, ks are 64-bit offsets (R,) and (C,); elements outside (N, K) are 0.
    """
    K = K // ALIGN_K * ALIGN_K
    inside = (rows < N)[:, None] & (ks < K)[None, :]
    error = products
    if b_ptr is not None:
        error += tl.load(b_ptr + ks, mask=ks < K, other=0.0).to(ACC)[None, :]
    y_at = y.ptr + rows[:, None] * (y.row // ALIGN_K * ALIGN_K) + ks[None, :] * y.col
    error = tl.where(inside, error - tl.load(y_at, mask=inside, other=0.0).to(ACC), 0.0)
    weighted = error
    if s is not None:
        scale = tl.load(s.ptr + rows[:, None] * s.row + ks[None, :] * s.col, mask=inside, other=0.0)
        weighted = error * scale.to(ACC)
    if error_ptr is not None:
        at = error_ptr + rows[:, None] * K + ks[None, :]
        tl.store(at, weighted.to(error_ptr.dtype.element_ty), mask=inside)
    return weighted, weighted * error


@triton.jit
def _product(
    a, b, M, N, K, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, DESCRIPTORS: tl.constexpr, TRANSPOSED: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return this program's tile of A (M, K) times B (K, N), its row tile, and its 64-bit row and column numbers.

    a, b: Matrix A and B, or B^T if TRANSPOSED; ALIGN divides their row strides. With DESCRIPTORS: descriptors.
    """
    m_tiles = tiles_of(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), m_tiles, n_tiles, GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    products = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if DESCRIPTORS:
        for k in tl.range(0, K, BLOCK_K):
            left = a.load([tile_m * BLOCK_M, k]).to(OPERAND)
            if TRANSPOSED:
                right = b.load([tile_n * BLOCK_N, k]).to(OPERAND).T
            else:
                right = b.load([k, tile_n * BLOCK_N]).to(OPERAND)
            products = tl.dot(left, right, products, input_precision=PRECISION, out_dtype=ACC)
    else:
        ks = tl.arange(0, BLOCK_K).to(tl.int64)
        step = tl.full((), BLOCK_K, tl.int64)
        row_stride = b.row // ALIGN * ALIGN
        if TRANSPOSED:
            stride_bk = b.col
            stride_bn = row_stride
        else:
            stride_bk = row_stride
            stride_bn = b.col
        a_tile = a.ptr + rows[:, None] * (a.row // ALIGN * ALIGN) + ks[None, :] * a.col
        b_tile = b.ptr + ks[:, None] * stride_bk + cols[None, :] * stride_bn
        for k in tl.range(0, K, BLOCK_K):
            inside = k + ks < K
            left = tl.load(a_tile, mask=(rows < M)[:, None] & inside[None, :], other=0.0).to(OPERAND)
            right = tl.load(b_tile, mask=inside[:, None] & (cols < N)[None, :], other=0.0).to(OPERAND)
            products = tl.dot(left, right, products, input_precision=PRECISION, out_dtype=ACC)
            a_tile += step * a.col
            b_tile += step * stride_bk
    return products, tile_m, rows, cols


@triton.jit
def _linear_mse_tiles_kernel(
    x, w, y, b_ptr, s, error_ptr, bias_ptr, loss_ptr, N, D, K,
    ALIGN: tl.constexpr, ALIGN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, DESCRIPTORS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program computes a (BLOCK_M, BLOCK_N) tile of E = s * (X W^T + b - Y), its loss and its part of sum_n E.

    x, w: ALIGN divides D and both row strides; tensor descriptors if DESCRIPTORS.
    bias_ptr: (row tiles, K) or None: the columns of E, added within each tile.
    loss_ptr: (tiles,): sum of s e^2.
    Bytes: X and W once for each tile column and row (from cache where tiles share them), Y and s once, E once.
    """
    products, tile_m, rows, ks = _product(
        x, w, N, K, D // ALIGN * ALIGN, ALIGN, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, DESCRIPTORS, True, OPERAND,
        PRECISION, ACC,
    )  # fmt: skip
    error, square = _errors(products, rows, ks, N, K, y, b_ptr, s, error_ptr, ALIGN_K, ACC)
    if bias_ptr is not None:
        tl.store(bias_ptr + tile_m.to(tl.int64) * K + ks, tl.sum(error, axis=0), mask=ks < K)
    # One flat sum: triton 3.6 fails to compile a sum of sums of a product for sm_100.
    square = tl.reshape(square, (BLOCK_M * BLOCK_N,))
    tl.store(loss_ptr + tl.program_id(0), tl.sum(square, axis=0))


@triton.jit
def _linear_mse_grad_input_kernel(
    g_ptr, error, w, grad_ptr, N, D, K, factor,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, DESCRIPTORS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program computes a (BLOCK_M, BLOCK_N) tile of grad_X = g * factor * E W; the factor, often tiny, scales sums.

    g_ptr: (). error: (N, K) and w: (K, D); ALIGN divides D, K and both row strides; descriptors if DESCRIPTORS.
    grad_ptr: (N, D).
    Bytes: E and W once for each tile column and row (from cache where tiles share them), grad_X once.
    """
    products, _, rows, ds = _product(
        error, w, N, D // ALIGN * ALIGN, K // ALIGN * ALIGN, ALIGN, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
        DESCRIPTORS, False, OPERAND, PRECISION, ACC,
    )  # fmt: skip
    grad = products * (tl.load(g_ptr).to(ACC) * factor)
    store_product(grad_ptr, rows, ds, N, D // ALIGN * ALIGN, grad)


@triton.jit
def _sum_columns(
    partials, result_ptr, block, factor, divisor,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add up columns block * BLOCK, ... of a result: its partial sums in order, times factor / divisor."""
    cols = block * BLOCK + tl.arange(0, BLOCK)
    mask = cols < partials.size
    total = ordered_sum(partials.ptr, partials.P, partials.stride, cols, mask, BLOCK_P, ACC)
    tl.store(result_ptr + cols, (total * factor / divisor).to(result_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_mse_sum_kernel(
    grads, biases, losses, grad_ptr, bias_ptr, loss_ptr, divisor,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, LOSS_BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program adds up a block of columns of grad_W, then of grad_b, then the loss, from Partials of each.

    grad_ptr (K * D,), bias_ptr (K,): None, or 2 / divisor times the sums of ``grads`` and ``biases``.
    loss_ptr (): the sum of ``losses`` / divisor.
    """
    block = tl.program_id(0)
    grad_blocks = 0
    if grad_ptr is not None:
        grad_blocks = tl.cdiv(grads.size, BLOCK)
        if block < grad_blocks:
            _sum_columns(grads, grad_ptr, block, 2, divisor, BLOCK_P, BLOCK, ACC)
    if bias_ptr is not None:
        if (block >= grad_blocks) & (block < tl.num_programs(0) - 1):
            _sum_columns(biases, bias_ptr, block - grad_blocks, 2, divisor, BLOCK_P, BLOCK, ACC)
    if block == tl.num_programs(0) - 1:
        _sum_columns(losses, loss_ptr, 0, 1, divisor, LOSS_BLOCK_P, 1, ACC)


@triton.jit
def _linear_mse_outer_kernel(
    g_ptr, error, w, grad_ptr, N, D, factor,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program computes a (ROWS, COLS) tile of grad_X = g * factor * E W for few outputs.

    g_ptr: (). error: (N, K). w: (K, D); ALIGN divides D and its row stride. grad_ptr: (N, D).
    Bytes: grad_X once; E and W from cache.
    """
    tile = tl.program_id(0)
    col_tiles = tl.cdiv(D, COLS)
    rows = (tile // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tile % col_tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = cols < D // ALIGN * ALIGN
    grad = tl.zeros((ROWS, COLS), ACC)
    for k in tl.static_range(K):
        i = tl.full((), k, tl.int64)
        e = tl.load(error.ptr + rows * error.row + i * error.col, mask=rows < N, other=0.0).to(ACC)
        weight = tl.load(w.ptr + i * (w.row // ALIGN * ALIGN) + cols * w.col, mask=inside, other=0.0).to(ACC)
        grad += e[:, None] * weight[None, :]
    grad *= tl.load(g_ptr).to(ACC) * factor
    at = grad_ptr + rows[:, None] * (D // ALIGN * ALIGN) + cols[None, :]
    tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=(rows < N)[:, None] & inside[None, :])


@triton.jit
def _linear_mse_grad_target_kernel(
    g_ptr, error_ptr, grad_ptr, size, factor, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """One program computes a block of grad_Y = -g * factor * E.

    g_ptr: (). error_ptr, grad_ptr: (size,).
    Bytes: E once, grad_Y once.
    """
    scale = tl.load(g_ptr).to(ACC) * -factor
    even = size // 16 * 16  # a mask that is constant over 16 bytes keeps the loads wide
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(error_ptr + offsets, mask=offsets < even, other=0.0).to(ACC) * scale
    tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=offsets < even)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tail = even + tl.arange(0, 16).to(tl.int64)
        rest = tl.load(error_ptr + tail, mask=tail < size, other=0.0).to(ACC) * scale
        tl.store(grad_ptr + tail, rest.to(grad_ptr.dtype.element_ty), mask=tail < size)


class _Call(NamedTuple):
    """The operands of one forward call, and what it writes."""

    input: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    sample_weight: Tensor | None
    loss: Tensor
    error: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    divisor: int
    acc: torch.dtype

    @property
    def elementwise(self) -> tuple[Matrix, Tensor | None, Matrix | None]:
        """Return the operands y, b_ptr and s of a kernel."""
        s = self.sample_weight
        return (
            Matrix(self.target, *self.target.stride()),
            self.bias,
            None if s is None else Matrix(s, *s.stride()),
        )

    def partials(self, *shape: int) -> Tensor:
        return self.input.new_empty(shape, dtype=self.acc)

    def add_up(self, grads: Tensor | None, biases: Tensor, losses: Tensor) -> None:
        """Run the second stage: add the partial sums along dim 0 of each into the results."""
        K, D = self.weight.shape
        (block_p, block), loss_block_p = config.SUM_BLOCK, config.SUM_LOSS_BLOCK
        blocks = 1 + (0 if grads is None else cdiv(K * D, block))
        blocks += 0 if self.grad_bias is None else cdiv(K, block)
        launch(
            _linear_mse_sum_kernel, (blocks,),
            None if grads is None else Partials(grads, grads.shape[0], K * D, K * D),
            Partials(biases, biases.shape[0], biases.stride(0), K),
            Partials(losses, losses.shape[0], losses.stride(0), 1),
            None if grads is None else self.grad_weight, self.grad_bias, self.loss, self.divisor,
            device=self.input.device, BLOCK_P=block_p, BLOCK=block, LOSS_BLOCK_P=loss_block_p, ACC=DTYPES[self.acc],
        )  # fmt: skip


def _alignment(tensors: Sequence[Tensor], *sizes: int) -> int:
    """Return the elements in 16 bytes if they divide all of ``sizes``, else 1: two classes, so few kernels."""
    whole = 16 // min(tensor.element_size() for tensor in tensors)
    return 1 if any(size % whole for size in sizes) else whole


class _Product(NamedTuple):
    """How a matrix product is compiled."""

    operand: torch.dtype
    tile: config.MatmulConfig
    precision: str
    descriptors: bool

    def options(self) -> dict[str, Any]:
        """Return the kernels' constexpr arguments, but for ALIGN and ACC."""
        return {
            "DESCRIPTORS": self.descriptors, "OPERAND": DTYPES[self.operand], "PRECISION": self.precision,
            "GROUP_M": config.GROUP_M, **self.tile._asdict(),
        }  # fmt: skip

    def operands(self, left: Tensor, right: Tensor, transposed: bool) -> tuple[Any, Any]:
        """Return the operands of _product: descriptors of the tiles, or matrices."""
        if not self.descriptors:
            return Matrix(left, *left.stride()), Matrix(right, *right.stride())
        m, n, k = self.tile[:3]
        blocks = ([m, k], [n, k] if transposed else [k, n])
        a, b = (
            TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
            for matrix, block in zip((left, right), blocks, strict=True)
        )
        return a, b


def _product_of(
    M: int, N: int, K: int, align: int, operands: Sequence[Tensor], operand: torch.dtype, acc: torch.dtype,
    loads: bool = False,
) -> _Product:  # fmt: skip
    """Return how an (M, K) by (K, N) product of ``operands`` as ``operand`` is compiled.

    ``align``: rows of operands and result begin at multiples of so many elements. ``loads``: the last step reads
    a tile as large as the result's.
    """
    target = config.target_of(operands[0].device)
    rows = all(
        tensor.dtype == operand
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1]  # rows neither repeat nor overlap
        for tensor in operands
    )
    operand = _multiplied(operand, acc, target)
    aligned = align * operand.itemsize >= 16
    tile, descriptors = config.linear_mse_product(operand, M, N, K, loads, aligned, aligned and rows, target)
    precision = config.dot_precision(operand, target, torch.backends.cuda.matmul.fp32_precision)
    return _Product(operand, tile, precision, descriptors)


def _multiplied(operand: torch.dtype, acc: torch.dtype, target: config.Target) -> torch.dtype:
    """Return the dtype in which matrix instructions multiply operands of a dtype."""
    # The interpreter multiplies the bits of bfloat16; float32 holds the same values.
    return acc if acc == torch.float64 or target.backend == "interpreter" else operand


def plan(input: Tensor, weight: Tensor, acc: torch.dtype) -> config.Plan:
    """Return how the fused loss of these operands is computed."""
    K, D = weight.shape
    operand = acc if acc == torch.float64 else torch.promote_types(input.dtype, weight.dtype)
    target = config.target_of(input.device)
    return config.linear_mse_plan(K, D, input.element_size(), acc, operand, target)


def _one_pass(call: _Call, kernel: Any, weight: Any, sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    """Read X once, by rows or tiles of rows."""
    N, D = call.input.shape
    K = call.weight.shape[0]
    P = config.linear_mse_programs(N, D, K, call.input.element_size(), call.acc)
    grads = None if call.grad_weight is None else call.partials(P, K, D)
    sums = call.partials(P, K + 1)
    launch(
        kernel, (P,), Matrix(call.input, *call.input.stride()), weight, *call.elementwise, call.error, grads, sums,
        *sizes,
        device=call.input.device, ACC=DTYPES[call.acc],
        ALIGN=_alignment((call.input,), D, call.input.stride(0)), **options,
    )  # fmt: skip
    call.add_up(grads, sums[:, :K], sums[:, K])


def _by_chunks(call: _Call, chosen: config.LinearMseChunks) -> None:
    N, D = call.input.shape
    options = {
        "K": call.weight.shape[0], "ROWS": chosen.ROWS, "CHUNK": chosen.CHUNK, "CHUNKS": chosen.CHUNKS,
        "EVEN": D == chosen.CHUNK * chosen.CHUNKS, "STAGES": chosen.STAGES, **chosen.compiled,
    }  # fmt: skip
    _one_pass(call, _linear_mse_chunks_kernel, call.weight.contiguous(), (N, D), options)


def _by_dot(call: _Call, chosen: config.LinearMseDot) -> None:
    (N, D), K = call.input.shape, call.weight.shape[0]
    operand = _multiplied(call.input.dtype, call.acc, config.target_of(call.input.device))
    align_k = _alignment((call.target,), K, call.target.stride(0))
    options = {"ALIGN_K": align_k, "OPERAND": DTYPES[operand], **chosen._asdict()}
    _one_pass(call, _linear_mse_dot_kernel, Matrix(call.weight, *call.weight.stride()), (N, D, K), options)


def _by_tiles(call: _Call) -> None:
    """Compute the errors by a matrix product, and E^T X by another."""
    N, D = call.input.shape
    K = call.weight.shape[0]
    device = call.input.device
    operand = torch.promote_types(call.input.dtype, call.weight.dtype)
    error = call.error
    if error is None and call.grad_weight is not None:
        error = call.input.new_empty((N, K), dtype=operand)
    operands = (call.input, call.weight, call.target)
    align = _alignment(operands, D, call.input.stride(0), call.weight.stride(0))
    align_k = _alignment(operands, K, call.target.stride(0))
    product = _product_of(N, K, D, min(align, align_k), operands[:2], operand, call.acc, loads=True)
    m_tiles, n_tiles = cdiv(N, product.tile.BLOCK_M), cdiv(K, product.tile.BLOCK_N)
    biases, losses = call.partials(m_tiles, K), call.partials(m_tiles * n_tiles)
    launch(
        _linear_mse_tiles_kernel, (m_tiles * n_tiles,), *product.operands(call.input, call.weight, transposed=True),
        *call.elementwise, error, None if call.grad_bias is None else biases, losses, N, D, K,
        device=device, ALIGN=align, ALIGN_K=align_k, ACC=DTYPES[call.acc], **product.options(),
        **config.registers(config.ALL_REGISTERS, config.target_of(device)),
    )  # fmt: skip
    call.add_up(None, biases, losses)
    if call.grad_weight is not None and error is not None:
        write_scaled_product(error.t(), call.input, call.grad_weight, 2 / call.divisor)


def linear_mse_forward(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, sample_weight: Tensor | None,
    reduction: str, output_mask: list[bool], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Return the loss and, as needed, the errors E in ``dtype``, grad_weight and grad_bias for grad_output = 1."""
    N, D = input.shape
    K = weight.shape[0]
    acc = acc_dtype(input, weight, target, bias, sample_weight)
    loss = input.new_empty((), dtype=dtype)
    error = input.new_empty((N, K), dtype=dtype) if output_mask[0] else None
    grad_weight = input.new_empty((K, D), dtype=acc) if output_mask[1] else None
    grad_bias = input.new_empty((K,), dtype=acc) if output_mask[2] else None
    if N * K == 0:
        loss.fill_(math.nan if reduction == "mean" else 0.0)
        for grad in (grad_weight, grad_bias):
            if grad is not None:
                grad.zero_()
    else:
        bias = None if bias is None else bias.contiguous()
        divisor = N * K if reduction == "mean" else 1
        operands = (input, weight, target, bias, sample_weight)
        call = _Call(*operands, loss, error, grad_weight, grad_bias, divisor, acc)
        chosen = plan(input, weight, acc).tile
        if isinstance(chosen, config.LinearMseChunks):
            _by_chunks(call, chosen)
        elif isinstance(chosen, config.LinearMseDot):
            _by_dot(call, chosen)
        else:
            _by_tiles(call)
    return [loss, *(result for result in (error, grad_weight, grad_bias) if result is not None)]


def linear_mse_backward(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, output_mask: list[bool]
) -> list[Tensor]:
    """Return, as needed, grad_input = g * factor * error @ weight and grad_target = -g * factor * error."""
    N, K = error.shape
    D = weight.shape[1]
    device = error.device
    acc = acc_dtype(grad_output, error, weight)
    if acc == torch.float64:  # Triton passes a Python float as float32
        grad_output, factor = grad_output.to(acc) * factor, 1.0
    results = []
    if output_mask[0]:
        grad_input = torch.empty((N, D), dtype=weight.dtype, device=device)
        by_rows = config.linear_mse_grad_input(K, D)
        if by_rows is not None:
            rows, cols = by_rows
            launch(
                _linear_mse_outer_kernel, (cdiv(N, rows) * cdiv(D, cols),),
                grad_output, Matrix(error, *error.stride()), Matrix(weight, *weight.stride()), grad_input, N, D, factor,
                device=device, K=K, ROWS=rows, COLS=cols,
                ALIGN=_alignment((weight,), D, weight.stride(0)), ACC=DTYPES[acc],
            )  # fmt: skip
        else:
            align = _alignment((error, weight), D, K, error.stride(0), weight.stride(0))
            product = _product_of(N, D, K, align, (error, weight), weight.dtype, acc)
            tiles = cdiv(N, product.tile.BLOCK_M) * cdiv(D, product.tile.BLOCK_N)
            launch(
                _linear_mse_grad_input_kernel, (tiles,), grad_output,
                *product.operands(error, weight, transposed=False), grad_input, N, D, K, factor,
                device=device, ALIGN=align, ACC=DTYPES[acc], **product.options(),
            )  # fmt: skip
        results.append(grad_input)
    if output_mask[1]:
        error = error.contiguous()
        grad_target = torch.empty_like(error)
        launch(
            _linear_mse_grad_target_kernel, (cdiv(N * K, config.BLOCK),), grad_output, error, grad_target, N * K,
            factor, device=device, BLOCK=config.BLOCK, ACC=DTYPES[acc],
            num_warps=config.warps(config.target_of(device)),
        )  # fmt: skip
        results.append(grad_target)
    return results
