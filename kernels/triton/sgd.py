"""SGD over all tensors of a bucket in one launch."""

from collections.abc import Sequence

import triton
import triton.language as tl

from ..optim.bucket import Bucket, Guard, SGDOptions
from .multi_tensor import (
    GRAD,
    MASTER,
    PARAM,
    STATES,
    begin_chunk,
    draw_words,
    dtype_of,
    key_at,
    launch_step,
    load_grad,
    load_option,
    load_param,
    option_columns,
    pointer_at,
    round_to,
    store_param,
    take_step,
    wide_until,
)

LR, MOMENTUM, DAMPENING, DECAY, NESTEROV, MAXIMIZE, MAX_NORM, COLUMNS = option_columns(
    SGDOptions, "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "max_norm"
)


def sgd_step(bucket: Bucket, options: Sequence[SGDOptions], guard: Guard) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states, all optional: ``momentum_buffer``, ``step``, ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
    """
    momentum = dtype_of(bucket.states.get("momentum_buffer"))
    launch_step(_sgd_step_kernel, bucket, options, guard, DTYPE_M=momentum)


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
    """One program updates a chunk, or several in a row, of one tensor.

    chunks_ptr: (C, 2) int32; rows_ptr: (N, WIDTH) int64; options_ptr: (groups, 2, COLUMNS) float64: see
    multi_tensor.py.
    arrivals_ptr: (N,) int32, zeros between launches.
    grad_scale_ptr, found_inf_ptr: 0-d float32 or None; norms_ptr: (NORMS, 2) float64 or None;
    skipped_ptr: (1,) int64 or None: see optim.bucket.Guard.

    Bytes per element: parameter, momentum and master read and written once, gradient read once (and written
    once under grad_scale): 12 for float32, 20 with momentum.
    """
    t, row, start, end, numel, group, skip, inverse_scale, sign, clip = begin_chunk(
        chunks_ptr, rows_ptr, options_ptr, grad_scale_ptr, found_inf_ptr, norms_ptr, skipped_ptr,
        MAXIMIZE, MAX_NORM, COLUMNS, NORMS, SKIP,
    )  # fmt: skip
    UNSCALE: tl.constexpr = grad_scale_ptr is not None
    lr = load_option(options_ptr, group, LR, COLUMNS)
    momentum = load_option(options_ptr, group, MOMENTUM, COLUMNS)
    dampening = load_option(options_ptr, group, DAMPENING, COLUMNS)
    decay = load_option(options_ptr, group, DECAY, COLUMNS)
    nesterov = load_option(options_ptr, group, NESTEROV, COLUMNS) != 0
    first = False
    key = 0
    if DTYPE_STEP is not None:
        step = take_step(row, arrivals_ptr + t, numel, skip, DTYPE_STEP)
        first = step == 0
        if STOCHASTIC:
            key = key_at(row, step)

    scalars = (
        lr.to(ACC),
        momentum.to(ACC),
        # The first gradient enters the buffer whole, whatever the dampening.
        tl.where(first, 1.0, 1.0 - dampening).to(ACC),
        decay.to(ACC),
        nesterov,
        inverse_scale.to(ACC),
        sign.to(ACC) * clip.to(ACC),
    )
    if not skip:
        wide = wide_until(row, numel, BLOCK)
        for i in range(0, tl.minimum(end, wide) - start, BLOCK):
            _update(row, start + i, wide, scalars, first, key, UNSCALE, True, DTYPE_P, DTYPE_G,
                    DTYPE_M, HAS_MASTER, STOCHASTIC, ACC, BLOCK)  # fmt: skip
        rest = tl.maximum(start, wide)
        for i in range(0, end - rest, BLOCK):
            _update(row, rest + i, numel, scalars, first, key, UNSCALE, False, DTYPE_P, DTYPE_G,
                    DTYPE_M, HAS_MASTER, STOCHASTIC, ACC, BLOCK)  # fmt: skip


@triton.jit
def sgd_rule(p, g, m, first, scalars):
    """One step of elements: their new p and m (the gradient without momentum); the scalars broadcast against them."""
    lr, momentum, share, decay, nesterov, _, _ = scalars
    g = tl.where(decay != 0, tl.fma(p, decay, g), g)
    buffer = g
    if m is not None:
        buffer = tl.where(first, g, tl.fma(g, share, m * momentum))
        ahead = tl.where(nesterov, tl.fma(buffer, momentum, g), buffer)
        g = tl.where(momentum == 0, g, ahead)  # one of several models may have none
    return tl.fma(g, -lr, p), buffer


@triton.jit
def _update(
    row,
    start,
    end,
    scalars,
    first,
    key,
    UNSCALE: tl.constexpr,
    WIDE: tl.constexpr,
    DTYPE_P: tl.constexpr,
    DTYPE_G: tl.constexpr,
    DTYPE_M: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update at most BLOCK elements from ``start``, up to ``end``.

    WIDE: every address is a multiple of 16 bytes, and ``end`` one of the elements in them.
    """
    inverse_scale, factor = scalars[5], scalars[6]
    offs = start + tl.arange(0, BLOCK)
    mask = offs < end
    p_at = pointer_at(row, PARAM, DTYPE_P, WIDE) + offs
    g_at = pointer_at(row, GRAD, DTYPE_G, WIDE) + offs
    master_at = pointer_at(row, MASTER, tl.float32, WIDE) + offs if HAS_MASTER else None

    p = load_param(p_at, master_at, mask, ACC)
    g = load_grad(g_at, mask, inverse_scale, factor, UNSCALE, ACC)
    m = None
    if DTYPE_M is not None:
        m_at = pointer_at(row, STATES, DTYPE_M, WIDE) + offs
        m = tl.load(m_at, mask=mask).to(ACC)
    p, m = sgd_rule(p, g, m, first, scalars)
    word = 0
    if STOCHASTIC:
        word, _ = draw_words(key, offs)
    if DTYPE_M is not None:
        tl.store(m_at, round_to(m, word >> 16, DTYPE_M, STOCHASTIC), mask=mask)
    store_param(p_at, master_at, mask, p, word & 0xFFFF, STOCHASTIC)
