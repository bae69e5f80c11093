"""The gradients' sum of squares over all tensors of a bucket in one launch, in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..optim.bucket import Bucket
from . import config
from .launch import launch
from .tables import CHUNK, GRAD, chunk_of, dtype_of, is_whole, pointer_at, tables_of


def grad_norm(bucket: Bucket, grad_scale: Tensor | None, out: Tensor) -> None:
    """Write the sum of squares of the unscaled gradients, and how many programs saw a non-finite one.

    Args:
        bucket: its ``grads`` are read.
        grad_scale: 0-d float32, or None for 1.
        out: (2,) float64, overwritten.
    """
    tables = tables_of(bucket)
    partials = bucket.memory.get("partials")
    if partials is None:
        partials = bucket.memory["partials"] = torch.empty(
            config.NORM_PROGRAMS, 2, dtype=out.dtype, device=out.device
        )
    launch(
        _grad_norm_kernel,
        (min(tables.programs, config.NORM_PROGRAMS),),
        tables.chunks.tensor,
        tables.rows.tensor,
        tables.arrivals[len(bucket.params) :],
        grad_scale,
        partials,
        out,
        tables.programs,
        device=out.device,
        DTYPE_G=dtype_of(bucket.grads),
        ACC=tl.float64 if bucket.grads[0].dtype == torch.float64 else tl.float32,
        PROGRAMS=config.NORM_PROGRAMS,
        BLOCK=config.BLOCK,
        num_warps=config.warps(config.target_of(out.device)),
    )


@triton.jit(do_not_specialize=["chunks"])
def _grad_norm_kernel(
    chunks_ptr,
    rows_ptr,
    arrivals_ptr,
    grad_scale_ptr,
    partials_ptr,
    out_ptr,
    chunks,
    DTYPE_G: tl.constexpr,
    ACC: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program sums the squares of every PROGRAMS-th chunk; the last one to finish adds up all sums in order.

    chunks_ptr: (C, 2) int32; rows_ptr: (N, WIDTH) int64: see tables.py. chunks: C.
    arrivals_ptr: (1,) int32, 0 between launches. grad_scale_ptr: 0-d float32 or None.
    partials_ptr: (PROGRAMS, 2) float64, overwritten; out_ptr: (2,) float64.

    Bytes: each gradient read once.
    """
    pid = tl.program_id(0)
    inverse = tl.full((), 1.0, ACC)
    if grad_scale_ptr is not None:
        inverse = 1.0 / tl.load(grad_scale_ptr).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    bad = tl.zeros((BLOCK,), tl.int32)
    c = pid
    while c < chunks:
        _, row, start, numel = chunk_of(chunks_ptr, rows_ptr, c)
        if is_whole(row, start, numel):
            g_ptr = pointer_at(row, GRAD, DTYPE_G, True)
            for i in range(0, CHUNK, BLOCK):
                g = tl.load(g_ptr + (start + i + tl.arange(0, BLOCK))).to(ACC) * inverse
                total = tl.fma(g, g, total)
                bad = bad | (tl.abs(g) < float("inf")).to(tl.int32) ^ 1
        else:
            g_ptr = pointer_at(row, GRAD, DTYPE_G, False)
            end = tl.minimum(start + CHUNK, numel)
            while start < end:
                offs = start + tl.arange(0, BLOCK)
                g = tl.load(g_ptr + offs, mask=offs < end, other=0.0).to(ACC) * inverse
                total = tl.fma(g, g, total)
                bad = bad | (tl.abs(g) < float("inf")).to(tl.int32) ^ 1
                start += BLOCK
        c += tl.num_programs(0)
    tl.store(partials_ptr + 2 * pid, tl.sum(total.to(tl.float64), 0))
    tl.store(partials_ptr + 2 * pid + 1, tl.max(bad, 0).to(tl.float64))
    tl.debug_barrier()  # this program's sums are written before it counts as arrived
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        tl.store(arrivals_ptr, 0)
        rows = tl.arange(0, PROGRAMS)
        mask = rows < tl.num_programs(0)
        squares = tl.load(partials_ptr + 2 * rows, mask=mask, other=0.0, cache_modifier=".cg")
        nonfinite = tl.load(partials_ptr + 2 * rows + 1, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(out_ptr, tl.sum(squares, 0))
        tl.store(out_ptr + 1, tl.sum(nonfinite, 0))
