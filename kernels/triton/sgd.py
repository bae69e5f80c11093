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
    tables, guard,
    DTYPE_P: tl.constexpr, DTYPE_G: tl.constexpr, DTYPE_M: tl.constexpr, DTYPE_STEP: tl.constexpr,
    HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, NORMS: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates a chunk, or several in a row, of one tensor.

    tables, guard: StepTables and GuardTensors.

    Bytes per element: parameter, momentum and master read and written once, gradient read once (and written
    once under grad_scale): 12 for float32, 20 with momentum.
    """
    t, row, start, end, numel, group, skip, inverse_scale, sign, clip = begin_chunk(
        tables, guard, MAXIMIZE, MAX_NORM, COLUMNS, NORMS, SKIP
    )
    UNSCALE: tl.constexpr = guard.grad_scale is not None
    lr = load_option(tables.options, group, LR, COLUMNS)
    momentum = load_option(tables.options, group, MOMENTUM, COLUMNS)
    dampening = load_option(tables.options, group, DAMPENING, COLUMNS)
    decay = load_option(tables.options, group, DECAY, COLUMNS)
    nesterov = load_option(tables.options, group, NESTEROV, COLUMNS) != 0
    first = False
    key = 0
    if DTYPE_STEP is not None:
        step = take_step(row, tables.arrivals + t, numel, skip, DTYPE_STEP)
        first = step == 0
        if STOCHASTIC:
            key = key_at(row, step)

    scalars = lr.to(ACC), momentum.to(ACC), (1.0 - dampening).to(ACC), decay.to(ACC), nesterov
    factors = inverse_scale.to(ACC), sign.to(ACC) * clip.to(ACC)
    if not skip:
        wide = wide_until(row, numel, BLOCK)
        for i in range(0, tl.minimum(end, wide) - start, BLOCK):
            offs = start + i + tl.arange(0, BLOCK)
            mask = offs < wide
            update_sgd(row, offs, mask, mask, scalars, factors, first, key, UNSCALE, True, DTYPE_P, DTYPE_G,
                       DTYPE_M, HAS_MASTER, STOCHASTIC, ACC)  # fmt: skip
        rest = tl.maximum(start, wide)
        for i in range(0, end - rest, BLOCK):
            offs = rest + i + tl.arange(0, BLOCK)
            mask = offs < numel
            update_sgd(row, offs, mask, mask, scalars, factors, first, key, UNSCALE, False, DTYPE_P, DTYPE_G,
                       DTYPE_M, HAS_MASTER, STOCHASTIC, ACC)  # fmt: skip


@triton.jit
def sgd_rule(p, g, m, first, scalars):
    """Make one step of elements: return their new p and m (the gradient without momentum); the scalars broadcast."""
    lr, momentum, share, decay, nesterov = scalars
    g = tl.where(decay != 0, tl.fma(p, decay, g), g)
    buffer = g
    if m is not None:
        # The first gradient enters the buffer whole, whatever the dampening.
        buffer = tl.where(first, g, tl.fma(g, share, m * momentum))
        ahead = tl.where(nesterov, tl.fma(buffer, momentum, g), buffer)
        g = tl.where(momentum == 0, g, ahead)  # one of several models may have none
    return tl.fma(g, -lr, p), buffer


@triton.jit
def update_sgd(
    row, offs, mask, kept, scalars, factors, first, key,
    UNSCALE: tl.constexpr, WIDE: tl.constexpr, DTYPE_P: tl.constexpr, DTYPE_G: tl.constexpr, DTYPE_M: tl.constexpr,
    HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Update the elements at the places ``offs`` where ``mask`` says so, the buffers where ``kept`` does.

    factors, WIDE: as of update_adam.
    """
    p_at = pointer_at(row, PARAM, DTYPE_P, WIDE) + offs
    g_at = pointer_at(row, GRAD, DTYPE_G, WIDE) + offs
    master_at = pointer_at(row, MASTER, tl.float32, WIDE) + offs if HAS_MASTER else None

    p = load_param(p_at, master_at, mask, ACC)
    g = load_grad(g_at, mask, factors, UNSCALE, ACC)
    m = None
    if DTYPE_M is not None:
        m_at = pointer_at(row, STATES, DTYPE_M, WIDE) + offs
        m = tl.load(m_at, mask=mask).to(ACC)
    p, m = sgd_rule(p, g, m, first, scalars)
    word = 0
    if STOCHASTIC:
        word, _ = draw_words(key, offs)
    if DTYPE_M is not None:
        tl.store(m_at, round_to(m, word >> 16, DTYPE_M, STOCHASTIC), mask=kept)
    store_param(p_at, master_at, mask, p, word & 0xFFFF, STOCHASTIC)
