"""The second stage of a reduction: partial sums added in one fixed order, so that the bits never change."""

import triton
import triton.language as tl


@triton.jit
def ordered_sum(ptr, P, stride, cols, mask, BLOCK_P: tl.constexpr, ACC: tl.constexpr):
    """The sums over ``P`` rows of a row-major buffer of partial sums, for the columns ``cols``.

    The order depends on P, BLOCK_P and the block's layout alone: no atomics.
    """
    sums = tl.zeros((BLOCK_P, cols.shape[0]), ACC)
    for start in tl.range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        inside = (rows < P)[:, None] & mask[None, :]
        sums += tl.load(ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    return tl.sum(sums, axis=0)
