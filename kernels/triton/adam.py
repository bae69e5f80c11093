"""Adam and AdamW over all tensors of a bucket in one launch."""

from collections.abc import Sequence

import triton
import triton.language as tl

from ..optim.bucket import AdamOptions, Bucket, Guard
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

LR, BETA1, BETA2, EPS, DECAY, DECOUPLED, MAXIMIZE, MAX_NORM, COLUMNS = option_columns(
    AdamOptions, "lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "maximize", "max_norm"
)


def adam_step(bucket: Bucket, options: Sequence[AdamOptions], guard: Guard) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states ``exp_avg``, ``exp_avg_sq``, ``step``, perhaps ``max_exp_avg_sq`` and ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
    """
    launch_step(
        _adam_step_kernel,
        bucket,
        options,
        guard,
        DTYPE_M=dtype_of(bucket.states["exp_avg"]),
        DTYPE_V=dtype_of(bucket.states["exp_avg_sq"]),
        DTYPE_W=dtype_of(bucket.states.get("max_exp_avg_sq")),
    )


@triton.jit
def _adam_step_kernel(
    tables, guard,
    DTYPE_P: tl.constexpr, DTYPE_G: tl.constexpr, DTYPE_M: tl.constexpr, DTYPE_V: tl.constexpr, DTYPE_W: tl.constexpr,
    DTYPE_STEP: tl.constexpr, HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, NORMS: tl.constexpr,
    SKIP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates a chunk, or several in a row, of one tensor.

    tables, guard: StepTables and GuardTensors.

    Bytes per element: parameter, moments and master read and written once, gradient read once (and written
    once under grad_scale): 28 for float32.
    """
    t, row, start, end, numel, group, skip, inverse_scale, sign, clip = begin_chunk(
        tables, guard, MAXIMIZE, MAX_NORM, COLUMNS, NORMS, SKIP
    )
    UNSCALE: tl.constexpr = guard.grad_scale is not None
    lr = load_option(tables.options, group, LR, COLUMNS)
    beta1 = load_option(tables.options, group, BETA1, COLUMNS)
    beta2 = load_option(tables.options, group, BETA2, COLUMNS)
    eps = load_option(tables.options, group, EPS, COLUMNS)
    decay = load_option(tables.options, group, DECAY, COLUMNS)
    decoupled = load_option(tables.options, group, DECOUPLED, COLUMNS) != 0
    step = take_step(row, tables.arrivals + t, numel, skip, DTYPE_STEP)

    # In float64, once per program: 1 - beta^t loses all digits in float32.
    t_new = step.to(tl.int64) + 1
    correction1 = correction(1.0 - beta1, t_new)
    correction2 = correction(1.0 - beta2, t_new)
    scalars = adam_scalars(lr, beta1, beta2, eps, decay, decoupled, correction1, correction2, ACC)
    factors = inverse_scale.to(ACC), sign.to(ACC) * clip.to(ACC)
    key = key_at(row, step) if STOCHASTIC else 0
    if not skip:
        wide = wide_until(row, numel, BLOCK)
        for i in range(0, tl.minimum(end, wide) - start, BLOCK):
            offs = start + i + tl.arange(0, BLOCK)
            update_adam(row, offs, offs < wide, scalars, factors, key, UNSCALE, True, DTYPE_P, DTYPE_G,
                        DTYPE_M, DTYPE_V, DTYPE_W, HAS_MASTER, STOCHASTIC, ACC)  # fmt: skip
        rest = tl.maximum(start, wide)
        for i in range(0, end - rest, BLOCK):
            offs = rest + i + tl.arange(0, BLOCK)
            update_adam(row, offs, offs < numel, scalars, factors, key, UNSCALE, False, DTYPE_P, DTYPE_G,
                        DTYPE_M, DTYPE_V, DTYPE_W, HAS_MASTER, STOCHASTIC, ACC)  # fmt: skip


@triton.jit
def correction(one_less, exponent):
    """Return 1 - (1 - one_less)^exponent by squaring, for a whole exponent >= 0: nothing cancels."""
    result = tl.full((), 0.0, tl.float64)
    while exponent > 0:
        result = tl.where(exponent & 1 != 0, result + one_less * (1.0 - result), result)
        one_less = one_less * (2.0 - one_less)
        exponent = exponent >> 1
    return result


@triton.jit
def _root(x):
    """Return the square root, of denormal numbers too, which the hardware's fast root of float32 takes for 0."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    return tl.where(x < 1e-30, tl.sqrt(x * 2.0**100) * 2.0**-50, tl.sqrt(x))


@triton.jit
def adam_scalars(lr, beta1, beta2, eps, decay, decoupled, correction1, correction2, ACC: tl.constexpr):
    """Return what ``adam_rule`` takes of a step's options, in float64 until each is rounded to ACC."""
    return (
        (1.0 - tl.where(decoupled, lr * decay, 0.0)).to(ACC),
        tl.where(decoupled, 0.0, decay).to(ACC),
        (1.0 - beta1).to(ACC),
        beta2.to(ACC),
        (1.0 - beta2).to(ACC),
        (1.0 / tl.sqrt(correction2)).to(ACC),
        eps.to(ACC),
        (lr / correction1).to(ACC),
    )


@triton.jit
def adam_rule(p, g, m, v, w, scalars):
    """Make one step of elements: return their new p, m, v and w (v without amsgrad); the scalars broadcast.

    A function of triton 3.6 may not return None beside tensors.
    """
    shrink, decay, one_less_beta1, beta2, one_less_beta2, inverse_root, eps, step_size = scalars
    g = tl.where(decay != 0, tl.fma(p, decay, g), g)
    p = p * shrink
    # As torch's lerp: exact at both ends.
    m = tl.where(one_less_beta1 < 0.5, tl.fma(g - m, one_less_beta1, m), g - (g - m) * (1.0 - one_less_beta1))
    v = tl.fma(g * g, one_less_beta2, v * beta2)
    largest = v
    if w is not None:
        largest = tl.where((v > w) | (v != v), v, w)  # NaN wins, as in torch.maximum
    p = p - step_size * (m / tl.fma(_root(largest), inverse_root, eps))
    return p, m, v, largest


@triton.jit
def update_adam(
    row, offs, mask, scalars, factors, key,
    UNSCALE: tl.constexpr, WIDE: tl.constexpr, DTYPE_P: tl.constexpr, DTYPE_G: tl.constexpr, DTYPE_M: tl.constexpr,
    DTYPE_V: tl.constexpr, DTYPE_W: tl.constexpr, HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Update the elements at the places ``offs`` where ``mask`` says so.

    factors: 1 / grad_scale, and what the unscaled gradient is multiplied by. WIDE: every address is a multiple of
    16 bytes, and the mask is constant over as many.
    """
    p_at = pointer_at(row, PARAM, DTYPE_P, WIDE) + offs
    g_at = pointer_at(row, GRAD, DTYPE_G, WIDE) + offs
    m_at = pointer_at(row, STATES, DTYPE_M, WIDE) + offs
    v_at = pointer_at(row, STATES + 1, DTYPE_V, WIDE) + offs
    master_at = pointer_at(row, MASTER, tl.float32, WIDE) + offs if HAS_MASTER else None

    p = load_param(p_at, master_at, mask, ACC)
    g = load_grad(g_at, mask, factors, UNSCALE, ACC)
    m = tl.load(m_at, mask=mask).to(ACC)
    v = tl.load(v_at, mask=mask).to(ACC)

    w = None
    if DTYPE_W is not None:
        w_at = pointer_at(row, STATES + 2, DTYPE_W, WIDE) + offs
        w = tl.load(w_at, mask=mask).to(ACC)
    p, m, v, w = adam_rule(p, g, m, v, w, scalars)

    word, other = 0, 0
    if STOCHASTIC:
        word, other = draw_words(key, offs)
    store_param(p_at, master_at, mask, p, word & 0xFFFF, STOCHASTIC)
    tl.store(m_at, round_to(m, word >> 16, DTYPE_M, STOCHASTIC), mask=mask)
    tl.store(v_at, round_to(v, other & 0xFFFF, DTYPE_V, STOCHASTIC), mask=mask)
    if DTYPE_W is not None:
        tl.store(w_at, round_to(w, other >> 16, DTYPE_W, STOCHASTIC), mask=mask)
