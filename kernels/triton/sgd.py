"""SGD over all tensors of a bucket in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..buckets import Bucket, Guard, SGDOptions
from .launch import launch
from .tables import (
    ALIGNED,
    CHUNK,
    GRAD,
    GROUP,
    KEY,
    MASTER,
    NUMEL,
    PARAM,
    STATES,
    STEP,
    WARPS,
    WIDTH,
    block_of,
    count_step,
    draw_words,
    dtype_of,
    load_guard,
    load_option,
    mix,
    pointer_at,
    round_to,
    tables_of,
)


def sgd_step(bucket: Bucket, options: Sequence[SGDOptions], guard: Guard) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states, all optional: ``momentum_buffer``, ``step``, ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
    """
    tables = tables_of(bucket)
    launch(
        _sgd_step_kernel,
        (tables.programs,),
        tables.chunks.tensor,
        tables.rows.tensor,
        tables.arrivals,
        tables.options(options, guard.max_norm),
        guard.grad_scale,
        guard.found_inf,
        guard.norms,
        guard.skipped,
        device=bucket.params[0].device,
        DTYPE_P=dtype_of(bucket.params),
        DTYPE_G=dtype_of(bucket.grads),
        DTYPE_M=dtype_of(bucket.states.get("momentum_buffer")),
        DTYPE_STEP=dtype_of(bucket.states.get("step")),
        HAS_MASTER="master_param" in bucket.states,
        STOCHASTIC=bucket.seed is not None,
        NORMS=0 if guard.norms is None else len(guard.norms),
        SKIP=guard.skip_nonfinite,
        ACC=tl.float64 if bucket.params[0].dtype == torch.float64 else tl.float32,
        BLOCK=block_of(bucket),
        num_warps=WARPS,
    )


@triton.jit
def _sgd_step_kernel(
    chunks_ptr,
    rows_ptr,
    arrivals_ptr,
    options_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    norms_ptr,
    skipped_ptr,
    DTYPE_P: tl.constexpr,
    DTYPE_G: tl.constexpr,
    DTYPE_M: tl.constexpr,
    DTYPE_STEP: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NORMS: tl.constexpr,
    SKIP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program updates one chunk (at most CHUNK elements) of one tensor.

    chunks_ptr: (C, 2) int32; rows_ptr: (N, WIDTH) int64; options_ptr: (groups, 2, 7) float64: see tables.py.
    arrivals_ptr: (N,) int32, zeros between launches.
    grad_scale_ptr, found_inf_ptr: 0-d float32 or None; norms_ptr: (NORMS, 2) float64 or None;
    skipped_ptr: (1,) int64 or None: see buckets.Guard.

    Bytes per element: parameter, momentum and master read and written once, gradient read once (and written
    once under grad_scale): 12 for float32, 20 with momentum.
    """
    pid = tl.program_id(0)
    t = tl.load(chunks_ptr + 2 * pid).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64) * CHUNK
    row = rows_ptr + t * WIDTH
    numel = tl.load(row + NUMEL)
    group = tl.load(row + GROUP)

    lr = load_option(options_ptr, group, 0, 7)
    momentum = load_option(options_ptr, group, 1, 7)
    dampening = load_option(options_ptr, group, 2, 7)
    decay = load_option(options_ptr, group, 3, 7)
    nesterov = load_option(options_ptr, group, 4, 7) != 0
    sign = tl.where(load_option(options_ptr, group, 5, 7) != 0, -1.0, 1.0)
    max_norm = load_option(options_ptr, group, 6, 7)

    skip, clip = load_guard(found_inf_ptr, norms_ptr, max_norm, NORMS, SKIP)
    first = False
    key = 0
    if DTYPE_STEP is not None:
        step_ptr = tl.load(row + STEP).to(tl.pointer_type(DTYPE_STEP))
        step = tl.load(step_ptr)
        count_step(step_ptr, step, arrivals_ptr + t, tl.maximum(tl.cdiv(numel, CHUNK), 1), skip)
        first = step == 0
        if STOCHASTIC:
            key = mix(tl.load(row + KEY).to(tl.uint32) ^ step.to(tl.int64).to(tl.uint32))
    UNSCALE: tl.constexpr = grad_scale_ptr is not None
    inverse_scale = tl.full((), 1.0, tl.float64)
    if UNSCALE:
        inverse_scale = 1.0 / tl.load(grad_scale_ptr).to(tl.float64)
    if skipped_ptr is not None:
        counts = (pid == 0) & skip
        tl.store(skipped_ptr, tl.load(skipped_ptr, mask=counts) + 1, mask=counts)

    scalars = (
        lr.to(ACC),
        momentum.to(ACC),
        # The first gradient enters the buffer whole, whatever the dampening.
        tl.where(first, 1.0, 1.0 - dampening).to(ACC),
        decay.to(ACC),
        nesterov,
        sign.to(ACC),
        clip.to(ACC),
        inverse_scale.to(ACC),
    )
    if not skip:
        if (tl.load(row + ALIGNED) != 0) & (start + CHUNK <= numel):
            for i in range(0, CHUNK, BLOCK):
                _update(row, start + i, numel, scalars, first, key, UNSCALE, True, DTYPE_P, DTYPE_G,
                        DTYPE_M, HAS_MASTER, STOCHASTIC, ACC, BLOCK)  # fmt: skip
        else:
            end = tl.minimum(start + CHUNK, numel)
            while start < end:
                _update(row, start, numel, scalars, first, key, UNSCALE, False, DTYPE_P, DTYPE_G,
                        DTYPE_M, HAS_MASTER, STOCHASTIC, ACC, BLOCK)  # fmt: skip
                start += BLOCK


@triton.jit
def _update(
    row,
    start,
    numel,
    scalars,
    first,
    key,
    UNSCALE: tl.constexpr,
    FULL: tl.constexpr,
    DTYPE_P: tl.constexpr,
    DTYPE_G: tl.constexpr,
    DTYPE_M: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update BLOCK elements from ``start``. FULL: all exist and every address is a multiple of 16 bytes."""
    lr, momentum, share, decay, nesterov, sign, clip, inverse_scale = scalars
    offs = start + tl.arange(0, BLOCK)
    mask = None if FULL else offs < numel
    p_at = pointer_at(row, PARAM, DTYPE_P, FULL) + offs
    g_at = pointer_at(row, GRAD, DTYPE_G, FULL) + offs

    if HAS_MASTER:
        master_at = pointer_at(row, MASTER, tl.float32, FULL) + offs
        p = tl.load(master_at, mask=mask)
    else:
        p = tl.load(p_at, mask=mask).to(ACC)
    g = tl.load(g_at, mask=mask).to(ACC)

    if UNSCALE:
        g = g * inverse_scale
        tl.store(g_at, g.to(DTYPE_G), mask=mask)
    g = g * (sign * clip)
    g = tl.where(decay != 0, tl.fma(p, decay, g), g)
    word = 0
    if STOCHASTIC:
        word, _ = draw_words(key, offs)
    if DTYPE_M is not None:
        m_at = pointer_at(row, STATES, DTYPE_M, FULL) + offs
        m = tl.load(m_at, mask=mask).to(ACC)
        m = tl.where(first, g, tl.fma(g, share, m * momentum))
        g = tl.where(nesterov, tl.fma(m, momentum, g), m)
        tl.store(m_at, round_to(m, word >> 16, DTYPE_M, STOCHASTIC), mask=mask)
    p = tl.fma(g, -lr, p)
    if HAS_MASTER:
        tl.store(master_at, p, mask=mask)
    tl.store(p_at, round_to(p, word & 0xFFFF, DTYPE_P, STOCHASTIC), mask=mask)
