"""Device functions and dtypes that the kernels of several ops share."""

import torch
import triton
import triton.language as tl

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def convert(value, dtype: tl.constexpr):
    """Return ``value.to(dtype)``, between bfloat16 and float64 by float32, since the interpreter has no other."""
    if (value.dtype == tl.bfloat16) | (dtype == tl.bfloat16):
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def tiles_of(size, BLOCK: tl.constexpr):
    """Return how many tiles of BLOCK cover ``size``, which is not 0: ``tl.cdiv`` would pass 2^31 on the way there."""
    return (size - 1) // BLOCK + 1


@triton.jit
def tile_of(tile, m_tiles, n_tiles, GROUP_M: tl.constexpr):
    """Return row and column of the ``tile``-th tile: GROUP_M rows run side by side, sharing columns in the cache."""
    group = tile // (GROUP_M * n_tiles)
    rows = tl.minimum(m_tiles - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * n_tiles)
    return group * GROUP_M + within % rows, within // rows


@triton.jit
def store_product(ptr, rows, cols, M, N, product):
    """Write what ``tl.dot`` gave to ``rows`` and ``cols`` of a contiguous (M, N) matrix.

    Pairs of rows are a dimension of their own: otherwise AMD's compiler stores each thread's part of the product in
    the layout of the matrix instruction, 64 bits at a time.
    """
    product = tl.reshape(product, (rows.shape[0] // 2, 2, cols.shape[0]))
    rows = tl.reshape(rows, (rows.shape[0] // 2, 2))[:, :, None]
    cols = cols[None, None, :]
    tl.store(ptr + rows * N + cols, product.to(ptr.dtype.element_ty), mask=(rows < M) & (cols < N))


@triton.jit
def ordered_sum(ptr, P, stride, cols, mask, BLOCK_P: tl.constexpr, ACC: tl.constexpr):
    """Sum ``P`` rows of partial sums, ``stride`` apart, of ``cols``: the second stage of a reduction.

    The order depends on P, BLOCK_P and the block's layout alone: no atomics, so the bits never change.
    """
    sums = tl.zeros((BLOCK_P, cols.shape[0]), ACC)
    for start in tl.range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        inside = (rows < P)[:, None] & mask[None, :]
        sums += tl.load(ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    return tl.sum(sums, axis=0)
