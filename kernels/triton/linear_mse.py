"""Linear layer and mean squared error in one pass: kernels and launchers.

    E = s * (X W^T + b - Y),  loss = c * sum(s * (X W^T + b - Y)^2),  c = 1 or 1 / (N K),  s = sample weight or 1
    grad_W = 2c E^T X,  grad_b = 2c sum_n E,  grad_X = 2c E W,  grad_Y = -2c E

X (N, D), W (K, D), Y (N, K). The predictions are never stored. Three plans (``plan``):

``chunks``  few outputs: a row of X stays in registers while its errors are found and its gradient is added up, so
            that X is read once
``dot``     a few dozen outputs in 16 bits: the same with matrix instructions
``tiles``   everything else: a matrix product whose last step is the error, then E^T X as a second product
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dtypes import accumulator
from . import config
from .launch import cdiv, launch
from .matmul import store_product, write_scaled_product
from .ordered_sum import ordered_sum

_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
_OPERAND = {**_ACC, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _linear_mse_chunks_kernel(
    x_ptr, w_ptr, y_ptr, b_ptr, s_ptr, error_ptr, grad_ptr, sums_ptr,
    N, D, stride_xn, stride_xd, stride_yn, stride_yk, stride_sn, stride_sk,
    K: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ALIGN: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program p of P: the row tiles p, p + P, ..., each read once and held as CHUNKS tiles of CHUNK columns.

    x_ptr      (N, D), any strides; ALIGN divides D and stride_xn, EVEN says that CHUNK divides D
    w_ptr      (K, D)
    y_ptr      (N, K), any strides
    b_ptr      (K,) or None
    s_ptr      (N, K), any strides, or None
    error_ptr  (N, K) or None: E
    grad_ptr   (P, K, D) or None: this program's part of E^T X
    sums_ptr   (P, K + 1): its part of sum_n E, and of the sum of s e^2
    Bytes: X, Y and s once, E once, and for each program W once and K * D + K + 1 partial sums.
    """
    program = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    weights = ()
    grads = ()
    for j in tl.static_range(CHUNKS):
        cols = j * CHUNK + lanes
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
    for tile in tl.range(program, tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = rows < N
        base = x_ptr + (rows * (stride_xn // ALIGN * ALIGN))[:, None]
        xs = ()
        for j in tl.static_range(CHUNKS):
            cols = j * CHUNK + lanes
            at = base + (cols.to(tl.int64) * stride_xd)[None, :]
            if EVEN:
                x = tl.load(at, mask=inside[:, None], other=0.0)
            else:
                x = tl.load(at, mask=inside[:, None] & (cols < D // ALIGN * ALIGN)[None, :], other=0.0)
            xs = xs + (x.to(ACC),)
        new_bias_grads = ()
        errors = ()
        for k in tl.static_range(K):
            products = tl.zeros((ROWS, CHUNK), ACC)
            for j in tl.static_range(CHUNKS):
                spread = tl.broadcast_to(weights[j * K + k][None, :], (ROWS, CHUNK))
                products = tl.fma(xs[j], spread, products)
            error = tl.sum(products, axis=1)
            if b_ptr is not None:
                error += biases[k]
            error -= tl.load(
                y_ptr + rows * stride_yn + tl.full((), k, tl.int64) * stride_yk, mask=inside, other=0.0
            ).to(ACC)
            error = tl.where(inside, error, 0.0)
            weighted = error
            if s_ptr is not None:
                scale = tl.load(
                    s_ptr + rows * stride_sn + tl.full((), k, tl.int64) * stride_sk, mask=inside, other=0.0
                )
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
            cols = j * CHUNK + lanes
            for k in tl.static_range(K):
                at = grad_ptr + (program.to(tl.int64) * K + k) * D + cols
                tl.store(at, tl.sum(grads[j * K + k], axis=0), mask=cols < D // ALIGN * ALIGN)
    for k in tl.static_range(K):
        tl.store(sums_ptr + program * (K + 1) + k, tl.sum(bias_grads[k], axis=0))
    tl.store(sums_ptr + program * (K + 1) + K, tl.sum(losses, axis=0))


@triton.jit
def _linear_mse_dot_kernel(
    x_ptr, w_ptr, y_ptr, b_ptr, s_ptr, error_ptr, grad_ptr, sums_ptr,
    N, D, K, stride_xn, stride_xd, stride_wk, stride_wd, stride_yn, stride_yk, stride_sn, stride_sk,
    ROWS: tl.constexpr, COLS: tl.constexpr, OUTPUTS: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_K: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program p of P: the row tiles p, p + P, ..., each read once and used in two matrix products.

    x_ptr      (N, D), any strides; ALIGN divides D and stride_xn; COLS is D or the next power of 2
    w_ptr      (K, D), any strides; OUTPUTS is K or the next power of 2
    y_ptr      (N, K), any strides; ALIGN_K divides K and stride_yn
    b_ptr      (K,) or None
    s_ptr      (N, K), any strides, or None
    error_ptr  (N, K) or None: E
    grad_ptr   (P, K, D) or None: this program's part of E^T X
    sums_ptr   (P, K + 1): its part of sum_n E, and of the sum of s e^2
    Bytes: X, Y and s once, E once, and for each program W once and K * D + K + 1 partial sums.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, COLS)
    ks = tl.arange(0, OUTPUTS).to(tl.int64)
    inside_d = cols < D // ALIGN * ALIGN
    w_at = w_ptr + ks[None, :] * stride_wk + cols.to(tl.int64)[:, None] * stride_wd
    w = tl.load(w_at, mask=inside_d[:, None] & (ks < K)[None, :], other=0.0).to(OPERAND)
    grads = tl.zeros((COLS, OUTPUTS), ACC)
    bias_grads = tl.zeros((OUTPUTS,), ACC)
    losses = tl.zeros((OUTPUTS,), ACC)
    for tile in tl.range(program, tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        x_at = x_ptr + rows[:, None] * (stride_xn // ALIGN * ALIGN) + cols.to(tl.int64)[None, :] * stride_xd
        x = tl.load(x_at, mask=(rows < N)[:, None] & inside_d[None, :], other=0.0).to(OPERAND)
        products = tl.dot(x, w, out_dtype=ACC)
        error, square = _errors(
            products, rows, ks, N, K, y_ptr, b_ptr, s_ptr, error_ptr,
            stride_yn, stride_yk, stride_sn, stride_sk, ALIGN_K, ACC,
        )  # fmt: skip
        losses += tl.sum(square, axis=0)
        bias_grads += tl.sum(error, axis=0)
        if grad_ptr is not None:
            grads = tl.dot(tl.trans(x), error.to(OPERAND), grads, out_dtype=ACC)
    if grad_ptr is not None:
        at = grad_ptr + (program.to(tl.int64) * K + ks[None, :]) * D + cols[:, None]
        tl.store(at, grads, mask=inside_d[:, None] & (ks < K)[None, :])
    tl.store(sums_ptr + program * (K + 1) + ks, bias_grads, mask=ks < K)
    tl.store(sums_ptr + program * (K + 1) + K, tl.sum(losses, axis=0))


@triton.jit
def _errors(
    products, rows, ks, N, K, y_ptr, b_ptr, s_ptr, error_ptr, stride_yn, stride_yk, stride_sn, stride_sk,
    ALIGN_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """E and s e^2 of a tile from its part of X W^T; E is written if there is a place for it.

    rows, ks are 64-bit offsets (R,) and (C,); what lies outside (N, K) is 0. ALIGN_K divides K and stride_yn.
    """
    K = K // ALIGN_K * ALIGN_K
    inside = (rows < N)[:, None] & (ks < K)[None, :]
    error = products
    if b_ptr is not None:
        error += tl.load(b_ptr + ks, mask=ks < K, other=0.0).to(ACC)[None, :]
    y_at = y_ptr + rows[:, None] * (stride_yn // ALIGN_K * ALIGN_K) + ks[None, :] * stride_yk
    error = tl.where(inside, error - tl.load(y_at, mask=inside, other=0.0).to(ACC), 0.0)
    weighted = error
    if s_ptr is not None:
        scale = tl.load(s_ptr + rows[:, None] * stride_sn + ks[None, :] * stride_sk, mask=inside, other=0.0)
        weighted = error * scale.to(ACC)
    if error_ptr is not None:
        at = error_ptr + rows[:, None] * K + ks[None, :]
        tl.store(at, weighted.to(error_ptr.dtype.element_ty), mask=inside)
    return weighted, weighted * error


@triton.jit
def _product(
    a_ptr, b_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr, TURNED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """This program's tile of A (M, K) times B (K, N), its row tile, and its 64-bit row and column numbers.

    DESCRIPTORS: a_ptr, b_ptr are descriptors of A and, if TURNED, of B^T, else of B; strides are not looked at.
    """
    tile = tl.program_id(0)
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    # Tiles of GROUP_M rows run side by side, so that they share columns of B in the cache.
    group = tile // (GROUP_M * n_tiles)
    group_rows = tl.minimum(m_tiles - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + tile % (GROUP_M * n_tiles) % group_rows
    tile_n = tile % (GROUP_M * n_tiles) // group_rows
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    products = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if DESCRIPTORS:
        for k in tl.range(0, K, BLOCK_K):
            a = a_ptr.load([tile_m * BLOCK_M, k]).to(OPERAND)
            if TURNED:
                b = b_ptr.load([tile_n * BLOCK_N, k]).to(OPERAND).T
            else:
                b = b_ptr.load([k, tile_n * BLOCK_N]).to(OPERAND)
            products = tl.dot(a, b, products, input_precision=PRECISION, out_dtype=ACC)
    else:
        ks = tl.arange(0, BLOCK_K).to(tl.int64)
        a_tile = a_ptr + rows[:, None] * stride_am + ks[None, :] * stride_ak
        b_tile = b_ptr + ks[:, None] * stride_bk + cols[None, :] * stride_bn
        for k in tl.range(0, K, BLOCK_K):
            inside = k + ks < K
            a = tl.load(a_tile, mask=(rows < M)[:, None] & inside[None, :], other=0.0).to(OPERAND)
            b = tl.load(b_tile, mask=inside[:, None] & (cols < N)[None, :], other=0.0).to(OPERAND)
            products = tl.dot(a, b, products, input_precision=PRECISION, out_dtype=ACC)
            a_tile += BLOCK_K * stride_ak
            b_tile += BLOCK_K * stride_bk
    return products, tile_m, rows, cols


@triton.jit
def _linear_mse_tiles_kernel(
    x_ptr, w_ptr, y_ptr, b_ptr, s_ptr, error_ptr, bias_ptr, loss_ptr,
    N, D, K, stride_xn, stride_xd, stride_wk, stride_wd, stride_yn, stride_yk, stride_sn, stride_sk,
    ALIGN: tl.constexpr, ALIGN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, DESCRIPTORS: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of E = s * (X W^T + b - Y), and its part of the loss and of sum_n E.

    x_ptr      (N, D), any strides; ALIGN divides D, stride_xn and stride_wk; a descriptor if DESCRIPTORS
    w_ptr      (K, D), any strides; likewise
    y_ptr      (N, K), any strides; ALIGN_K divides K and stride_yn
    b_ptr      (K,) or None
    s_ptr      (N, K), any strides, or None
    error_ptr  (N, K) or None
    bias_ptr   (row tiles, K) or None: the columns of E, added within each tile
    loss_ptr   (tiles,): sum of s e^2
    Bytes: X and W once for each tile column and row (from cache where tiles share them), Y and s once, E once.
    """
    products, tile_m, rows, ks = _product(
        x_ptr, w_ptr, N, K, D // ALIGN * ALIGN,
        stride_xn // ALIGN * ALIGN, stride_xd, stride_wd, stride_wk // ALIGN * ALIGN,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, DESCRIPTORS, True, OPERAND, PRECISION, ACC,
    )  # fmt: skip
    error, square = _errors(
        products, rows, ks, N, K, y_ptr, b_ptr, s_ptr, error_ptr,
        stride_yn, stride_yk, stride_sn, stride_sk, ALIGN_K, ACC,
    )  # fmt: skip
    if bias_ptr is not None:
        tl.store(bias_ptr + tile_m.to(tl.int64) * K + ks, tl.sum(error, axis=0), mask=ks < K)
    # In one go: triton 3.6 fails to compile a sum of sums of a product for sm_100.
    square = tl.reshape(square, (BLOCK_M * BLOCK_N,))
    tl.store(loss_ptr + tl.program_id(0), tl.sum(square, axis=0))


@triton.jit
def _linear_mse_grad_input_kernel(
    g_ptr, error_ptr, w_ptr, grad_ptr, N, D, K, stride_en, stride_ek, stride_wk, stride_wd, factor,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, DESCRIPTORS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of grad_X = g * factor * E W; the small factor meets the sums, not the operands.

    g_ptr      ()
    error_ptr  (N, K), any strides; ALIGN divides D, K, stride_en and stride_wk; a descriptor if DESCRIPTORS
    w_ptr      (K, D), any strides; likewise
    grad_ptr   (N, D)
    Bytes: E and W once for each tile column and row (from cache where tiles share them), grad_X once.
    """
    products, _, rows, ds = _product(
        error_ptr, w_ptr, N, D // ALIGN * ALIGN, K // ALIGN * ALIGN,
        stride_en // ALIGN * ALIGN, stride_ek, stride_wk // ALIGN * ALIGN, stride_wd,
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, DESCRIPTORS, False, OPERAND, PRECISION, ACC,
    )  # fmt: skip
    grad = products * (tl.load(g_ptr).to(ACC) * factor)
    store_product(grad_ptr, rows, ds, N, D // ALIGN * ALIGN, grad)


@triton.jit
def _sum_columns(
    partials_ptr, P, stride, result_ptr, size, block, factor, divisor,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns block * BLOCK, ... of a result: its partial sums added in order, times factor / divisor."""
    cols = block * BLOCK + tl.arange(0, BLOCK)
    total = ordered_sum(partials_ptr, P, stride, cols, cols < size, BLOCK_P, ACC)
    tl.store(result_ptr + cols, (total * factor / divisor).to(result_ptr.dtype.element_ty), mask=cols < size)


@triton.jit
def _linear_mse_sum_kernel(
    grad_partials_ptr, bias_partials_ptr, loss_partials_ptr, grad_ptr, bias_ptr, loss_ptr,
    grad_size, bias_size, P, bias_P, bias_stride, loss_P, loss_stride, divisor, ACC: tl.constexpr,
):  # fmt: skip
    """One block of columns of grad_W, then of grad_b, then the loss: the partial sums of the first stage.

    grad_partials_ptr  (P, grad_size) or None;      grad_ptr  (grad_size,): 2 / divisor times the sums
    bias_partials_ptr  (bias_P, bias_size) or None; bias_ptr  (bias_size,): likewise
    loss_partials_ptr  (loss_P,), loss_stride apart; loss_ptr (): 1 / divisor times the sum
    """
    block = tl.program_id(0)
    grad_blocks = 0
    if grad_ptr is not None:
        grad_blocks = tl.cdiv(grad_size, 32)
        if block < grad_blocks:
            _sum_columns(grad_partials_ptr, P, grad_size, grad_ptr, grad_size, block, 2, divisor, 64, 32, ACC)
    if bias_ptr is not None:
        if (block >= grad_blocks) & (block < tl.num_programs(0) - 1):
            _sum_columns(
                bias_partials_ptr, bias_P, bias_stride, bias_ptr, bias_size, block - grad_blocks, 2, divisor,
                64, 32, ACC,
            )  # fmt: skip
    if block == tl.num_programs(0) - 1:
        _sum_columns(loss_partials_ptr, loss_P, loss_stride, loss_ptr, 1, 0, 1, divisor, 1024, 1, ACC)


@triton.jit
def _linear_mse_outer_kernel(
    g_ptr, error_ptr, w_ptr, grad_ptr, N, D, stride_en, stride_ek, stride_wk, stride_wd, factor,
    K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One (ROWS, COLS) tile of grad_X = g * factor * E W for few outputs.

    g_ptr      ()
    error_ptr  (N, K), any strides
    w_ptr      (K, D), any strides; ALIGN divides D and stride_wk
    grad_ptr   (N, D)
    Bytes: grad_X once; E and W from cache.
    """
    tile = tl.program_id(0)
    col_tiles = tl.cdiv(D, COLS)
    rows = (tile // col_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tile % col_tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = cols < D // ALIGN * ALIGN
    grad = tl.zeros((ROWS, COLS), ACC)
    for k in tl.static_range(K):
        row = tl.full((), k, tl.int64)
        error = tl.load(error_ptr + rows * stride_en + row * stride_ek, mask=rows < N, other=0.0).to(ACC)
        weight = tl.load(
            w_ptr + row * (stride_wk // ALIGN * ALIGN) + cols * stride_wd, mask=inside, other=0.0
        ).to(ACC)
        grad += error[:, None] * weight[None, :]
    grad *= tl.load(g_ptr).to(ACC) * factor
    at = grad_ptr + rows[:, None] * (D // ALIGN * ALIGN) + cols[None, :]
    tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=(rows < N)[:, None] & inside[None, :])


@triton.jit
def _linear_mse_grad_target_kernel(
    g_ptr, error_ptr, grad_ptr, size, factor, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """One block of grad_Y = -g * factor * E.

    g_ptr                ()
    error_ptr, grad_ptr  (size,)
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


class _Job(NamedTuple):
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

    def element_strides(self) -> tuple[int, ...]:
        """Strides of target and sample weight."""
        s = self.sample_weight
        return (*self.target.stride(), *((0, 0) if s is None else s.stride()))

    def partials(self, *shape: int) -> Tensor:
        return self.input.new_empty(shape, dtype=self.acc)

    def add_up(self, grads: Tensor | None, biases: Tensor, losses: Tensor) -> None:
        """Second stage: the partial sums along dim 0 of each, into the results."""
        K, D = self.weight.shape
        grad, grad_bias = (None if grads is None else self.grad_weight), self.grad_bias
        blocks = 1 + (0 if grad is None else cdiv(K * D, 32))
        blocks += 0 if grad_bias is None else cdiv(K, 32)
        launch(
            _linear_mse_sum_kernel, (blocks,), grads, biases, losses, grad, grad_bias, self.loss,
            K * D, K, 0 if grads is None else grads.shape[0], biases.shape[0], biases.stride(0),
            losses.shape[0], losses.stride(0), self.divisor,
            device=self.input.device, ACC=_ACC[self.acc],
        )  # fmt: skip


def _alignment(tensors: Sequence[Tensor], *sizes: int) -> int:
    """The elements in 16 bytes, if they divide all of ``sizes``, else 1: few classes, so few kernels are compiled."""
    whole = 16 // min(tensor.element_size() for tensor in tensors)
    return 1 if any(size % whole for size in sizes) else whole


def _by_chunks(job: _Job, config_: config.LinearMseChunks) -> None:
    """One read of X, a row at a time in registers."""
    N, D = job.input.shape
    K = job.weight.shape[0]
    P = config.linear_mse_programs(N, K, job.input.element_size(), job.acc)
    grads = None if job.grad_weight is None else job.partials(P, K, D)
    sums = job.partials(P, K + 1)
    launch(
        _linear_mse_chunks_kernel, (P,), job.input, job.weight.contiguous(), job.target, job.bias,
        job.sample_weight, job.error, grads, sums, N, D, *job.input.stride(), *job.element_strides(),
        device=job.input.device, K=K, ROWS=config_.ROWS, CHUNK=config_.CHUNK, CHUNKS=config_.CHUNKS,
        ALIGN=_alignment((job.input,), D, job.input.stride(0)), EVEN=D == config_.CHUNK * config_.CHUNKS,
        STAGES=config_.STAGES, ACC=_ACC[job.acc], **config_.compiled,
    )  # fmt: skip
    job.add_up(grads, sums[:, :K], sums[:, K])


class _Multiply(NamedTuple):
    """How a matrix product is compiled."""

    operand: torch.dtype
    tile: config.MatmulConfig
    precision: str
    descriptors: bool

    def options(self) -> dict[str, Any]:
        """The kernels' constexpr arguments, but for ALIGN and ACC."""
        return {
            "DESCRIPTORS": self.descriptors, "OPERAND": _OPERAND[self.operand], "PRECISION": self.precision,
            "GROUP_M": 8, **self.tile._asdict(),
        }  # fmt: skip


def _multiply(
    M: int, N: int, K: int, align: int, operands: Sequence[Tensor], operand: torch.dtype, acc: torch.dtype,
    loads: bool = False,
) -> _Multiply:  # fmt: skip
    """The plan of an (M, K) by (K, N) product of ``operands`` as ``operand``.

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
    # The interpreter multiplies the bits of bfloat16; float32 holds the same values.
    operand = acc if acc == torch.float64 or target.backend == "interpreter" else operand
    aligned = align * operand.itemsize >= 16
    tile, descriptors = config.linear_mse_product(operand, M, N, K, loads, aligned, aligned and rows, target)
    precision = config.dot_precision(operand, target, torch.backends.cuda.matmul.fp32_precision)
    return _Multiply(operand, tile, precision, descriptors)


def _descriptor(matrix: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def _by_dot(job: _Job, config_: config.LinearMseDot) -> None:
    """One read of X, a tile of rows at a time, for both products."""
    N, D = job.input.shape
    K = job.weight.shape[0]
    P = config.linear_mse_programs(N, K, job.input.element_size(), job.acc)
    grads = None if job.grad_weight is None else job.partials(P, K, D)
    sums = job.partials(P, K + 1)
    launch(
        _linear_mse_dot_kernel, (P,), job.input, job.weight, job.target, job.bias, job.sample_weight,
        job.error, grads, sums, N, D, K, *job.input.stride(), *job.weight.stride(), *job.element_strides(),
        device=job.input.device, ALIGN=_alignment((job.input,), D, job.input.stride(0)),
        ALIGN_K=_alignment((job.target,), K, job.target.stride(0)),
        OPERAND=_OPERAND[_multiply(N, K, D, 1, (job.input, job.weight), job.input.dtype, job.acc).operand],
        ACC=_ACC[job.acc], **config_._asdict(),
    )  # fmt: skip
    job.add_up(grads, sums[:, :K], sums[:, K])


def _by_tiles(job: _Job) -> None:
    """A matrix product that ends in the errors, and E^T X by another."""
    N, D = job.input.shape
    K = job.weight.shape[0]
    device = job.input.device
    operand = torch.promote_types(job.input.dtype, job.weight.dtype)
    error = job.error
    if error is None and job.grad_weight is not None:
        error = job.input.new_empty((N, K), dtype=operand)
    operands = (job.input, job.weight, job.target)
    align = _alignment(operands, D, job.input.stride(0), job.weight.stride(0))
    align_k = _alignment(operands, K, job.target.stride(0))
    plan = _multiply(N, K, D, min(align, align_k), operands[:2], operand, job.acc, loads=True)
    left, right = operands[:2]
    if plan.descriptors:
        left = _descriptor(left, plan.tile.BLOCK_M, plan.tile.BLOCK_K)
        right = _descriptor(right, plan.tile.BLOCK_N, plan.tile.BLOCK_K)
    m_tiles, n_tiles = cdiv(N, plan.tile.BLOCK_M), cdiv(K, plan.tile.BLOCK_N)
    biases, losses = job.partials(m_tiles, K), job.partials(m_tiles * n_tiles)
    launch(
        _linear_mse_tiles_kernel, (m_tiles * n_tiles,), left, right, job.target, job.bias,
        job.sample_weight, error, None if job.grad_bias is None else biases, losses,
        N, D, K, *job.input.stride(), *job.weight.stride(), *job.element_strides(),
        device=device, ALIGN=align, ALIGN_K=align_k, ACC=_ACC[job.acc], **plan.options(),
        **config.registers(255, config.target_of(device)),
    )  # fmt: skip
    job.add_up(None, biases, losses)
    if job.grad_weight is not None and error is not None:
        write_scaled_product(error.t(), job.input, job.grad_weight, 2 / job.divisor)


def _by_plan(job: _Job) -> None:
    K, D = job.weight.shape
    target = config.target_of(job.input.device)
    operand = torch.promote_types(job.input.dtype, job.weight.dtype)
    in_chunks = config.linear_mse_chunks(K, D, job.input.element_size(), job.acc, target)
    in_dots = config.linear_mse_dot(K, D, operand, target)
    # From five outputs on, 16-bit sums are bound by instructions, unless they are matrix instructions.
    if in_chunks and not (in_dots and K > 4):
        _by_chunks(job, in_chunks)
    elif in_dots:
        _by_dot(job, in_dots)
    else:
        _by_tiles(job)


def linear_mse_forward(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, sample_weight: Tensor | None,
    reduction: str, output_mask: list[bool], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """The loss and, as needed, the errors E in ``dtype``, grad_weight and grad_bias for grad_output = 1."""
    N, D = input.shape
    K = weight.shape[0]
    bias = None if bias is None else bias.contiguous()
    acc = accumulator(input, weight, target, bias, sample_weight)
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
        _by_plan(
            _Job(
                input, weight, target, bias, sample_weight, loss, error, grad_weight, grad_bias, divisor, acc
            )
        )
    return [loss, *(result for result in (error, grad_weight, grad_bias) if result is not None)]


def linear_mse_backward(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, output_mask: list[bool]
) -> list[Tensor]:
    """As needed, grad_input = g * factor * error @ weight and grad_target = -g * factor * error."""
    N, K = error.shape
    D = weight.shape[1]
    device = error.device
    acc = accumulator(grad_output, error, weight)
    if acc == torch.float64:  # Triton passes a Python float as float32
        grad_output, factor = grad_output.to(acc) * factor, 1.0
    results = []
    if output_mask[0]:
        grad_input = torch.empty((N, D), dtype=weight.dtype, device=device)
        operands = grad_output, error, weight, grad_input
        if K <= 8:
            cols = min(max(triton.next_power_of_2(D), 16), 1024)
            rows = 2048 // cols
            launch(
                _linear_mse_outer_kernel, (cdiv(N, rows) * cdiv(D, cols),), *operands,
                N, D, *error.stride(), *weight.stride(), factor, device=device, K=K, ROWS=rows, COLS=cols,
                ALIGN=_alignment((weight,), D, weight.stride(0)), ACC=_ACC[acc],
            )  # fmt: skip
        else:
            align = _alignment((error, weight), D, K, error.stride(0), weight.stride(0))
            plan = _multiply(N, D, K, align, (error, weight), weight.dtype, acc)
            left, right = error, weight
            if plan.descriptors:
                left = _descriptor(left, plan.tile.BLOCK_M, plan.tile.BLOCK_K)
                right = _descriptor(right, plan.tile.BLOCK_K, plan.tile.BLOCK_N)
            tiles = cdiv(N, plan.tile.BLOCK_M) * cdiv(D, plan.tile.BLOCK_N)
            launch(
                _linear_mse_grad_input_kernel, (tiles,), grad_output, left, right, grad_input,
                N, D, K, *error.stride(), *weight.stride(), factor, device=device, ALIGN=align,
                ACC=_ACC[acc], **plan.options(),
            )  # fmt: skip
        results.append(grad_input)
    if output_mask[1]:
        error = error.contiguous()
        grad_target = torch.empty_like(error)
        launch(
            _linear_mse_grad_target_kernel, (cdiv(N * K, 1024),), grad_output, error, grad_target, N * K,
            factor, device=device, BLOCK=1024, ACC=_ACC[acc], num_warps=config.warps(config.target_of(device)),
        )  # fmt: skip
        results.append(grad_target)
    return results
