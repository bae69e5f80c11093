"""The training loop of linear models in one launch: a program per model goes through all rounds.

Weights, gradients and moments stay in registers. The rows are read anew in each round, from the cache: where they do
not fit one, or the weights not the registers, the launcher declines, and the rounds are launched one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import acc_dtype
from ..optim.bucket import AdamOptions, SGDOptions, Update
from . import config
from .adam import adam_rule, adam_scalars, correction
from .dims import Batch
from .launch import cdiv, launch
from .multi_tensor import clip_factor, round_to
from .sgd import sgd_rule
from .shared import DTYPES

# Columns of Update.table: the options, then max_norm.
SGD_COLUMNS = tl.constexpr(len(SGDOptions._fields) + 1)
ADAM_COLUMNS = tl.constexpr(len(AdamOptions._fields) + 1)


def _rows(tensor: Tensor, columns: int) -> Batch:
    model, row, col = tensor.stride()
    return Batch(tensor, 0 if len(tensor) == 1 else model, row, 0 if tensor.shape[2] < columns else col)


def linear_mse_fit_rounds(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, sample_weight: Tensor | None,
    offsets: Tensor | None, batch_size: int, losses: Tensor, update: Update,
) -> bool:  # fmt: skip
    """Run ``len(losses)`` rounds; see kernels/fallback/linear_mse_fit.py.

    Returns:
        False, with nothing done, if a model does not fit a program.
    """
    B, K, D = weight.shape
    N = input.shape[1]
    chip = config.target_of(input.device)
    rows = batch_size if offsets is None else cdiv(N, max(B, 1))
    tile = config.linear_mse_fit(rows, K, D, input.dtype, chip).tile
    guard, models = update.guard, update.models
    alone = models is not None or B == 1  # each model has a step, a clip and a guard of its own
    if tile is None or not (alone or guard.norms is None):
        return False
    states: list[Tensor | None] = []
    for param, state in zip((weight, bias), (*update.states, {}), strict=False):
        moments = [state.get(key) for key in _MOMENTS[update.operator]]
        if any(tensor is not None and not tensor.is_contiguous() for tensor in (param, *moments)):
            return False
        states += [*moments, state.get("step")]
    options = update.table(input.device)
    launch(
        _linear_mse_fit_kernel, (B,), _rows(input, D), _rows(target, K),
        None if sample_weight is None else _rows(sample_weight, K), weight, *states[:4], bias, *states[4:], options,
        None if models is None or models.active is None else models.active.contiguous().view(torch.uint8),
        None if offsets is None else offsets.contiguous(), losses, guard.norms, guard.skipped, N, batch_size,
        len(losses), 1 if options.shape[2] == 1 else B,
        device=input.device, ADAM=update.operator == "adam", SKIP=guard.skip_nonfinite, ALONE=alone, K=K, D=D,
        ACC=DTYPES[acc_dtype(weight)], **tile, **config.registers(config.ALL_REGISTERS, chip),
    )  # fmt: skip
    if not alone:  # programs cannot tell when the others have read the one step
        for state in update.states:
            if "step" in state:
                state["step"].add_(len(losses))
    return True


# The states in the order of the kernel's parameters.
_MOMENTS = {"sgd": ("momentum_buffer", "", ""), "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}


@triton.jit
def _linear_mse_fit_kernel(
    x, y, s, w_ptr, w_m_ptr, w_v_ptr, w_u_ptr, w_step_ptr, b_ptr, b_m_ptr, b_v_ptr, b_u_ptr, b_step_ptr, options_ptr,
    active_ptr, offsets_ptr, losses_ptr, norms_ptr, skipped_ptr, N, count, steps, option_stride,
    ADAM: tl.constexpr, SKIP: tl.constexpr, ALONE: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program runs all rounds of one model.

    x: (B, N, D). y: (B, N, K). s: (B, N, K) or None. w_ptr: (B, K, D); b_ptr: (B, K) or None. Each with its
    moments m, v and u (the largest v), None where the rule has none, and its step, (B,) if ALONE, else (), or None.
    options_ptr: (2, options + 1, B or 1) float64, of weight and bias; max_norm last, or -1. active_ptr: (B,) or None.
    offsets_ptr: (B + 1,), where each model's rows begin among all N, or None.
    losses_ptr: (steps, B). norms_ptr: (2, B) float64, the last round's sums of squares and counts of non-finite
    gradients, or None. skipped_ptr: (B,) int64 or None.
    count: rows of a round, unless there are offsets. option_stride: B, or 1 for all.
    Bytes: rows once a round, from the cache; weights and moments once in all.
    """
    model = tl.program_id(0).to(tl.int64)
    ks, ds, slots = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    wide_ks, wide_ds = ks.to(tl.int64)[None, :], ds.to(tl.int64)[None, :]
    mask_k = ks < K
    mask_w = mask_k[:, None] & (ds < D)[None, :]
    w_at = model * (K * D) + ks[:, None] * D + ds[None, :]
    b_at = model * K + ks
    HAS_BIAS: tl.constexpr = b_ptr is not None
    COLUMNS: tl.constexpr = ADAM_COLUMNS if ADAM else SGD_COLUMNS

    w, w_m, w_v, w_u = _load(w_ptr, w_m_ptr, w_v_ptr, w_u_ptr, w_at, mask_w, ACC)
    w_rule = _load_options(options_ptr, model, option_stride, COLUMNS - 1)
    own = model if ALONE else 0
    w_t, w_first, w_second = _load_step(w_step_ptr, own, w_rule, ADAM)
    b, b_m, b_v, b_u = _load(b_ptr, b_m_ptr, b_v_ptr, b_u_ptr, b_at, mask_k, ACC)
    b_rule = w_rule
    if HAS_BIAS:
        b_options_ptr = options_ptr + _option_at(COLUMNS, 0, option_stride)
        b_rule = _load_options(b_options_ptr, model, option_stride, COLUMNS - 1)
    b_t, b_first, b_second = _load_step(b_step_ptr, own, b_rule, ADAM)
    max_norm = tl.load(options_ptr + _option_at(COLUMNS - 1, model, option_stride))

    skips = tl.full((), 0, tl.int64)
    squares = tl.full((), 0.0, ACC)
    bad = tl.full((), 0, tl.int32)
    begin = tl.full((), 0, tl.int64)
    x_ptr = x.ptr + model * x.model
    y_ptr = y.ptr + model * y.model
    s_ptr = x.ptr
    if s is not None:
        s_ptr = s.ptr + model * s.model
    if offsets_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(offsets_ptr + model).to(tl.int64), 0), N)
        last = tl.minimum(tl.maximum(tl.load(offsets_ptr + model + 1).to(tl.int64), 0), N)
        count = tl.maximum(last - first, 0)
        x_ptr += first * x.row
        y_ptr += first * y.row
        if s is not None:
            s_ptr += first * s.row
    active = True
    if active_ptr is not None:
        active = tl.load(active_ptr + model) != 0
    for t in range(steps):
        square = tl.zeros((ROWS, BLOCK_K), ACC)
        total = tl.zeros((ROWS, BLOCK_K), ACC)
        b_sum = tl.zeros((ROWS, BLOCK_K), ACC)
        w_sum = tl.zeros((ROWS, BLOCK_K, BLOCK_D), ACC)
        for start in range(0, count, ROWS):
            valid = slots < count - start
            row = begin + start + slots
            row = tl.where(row >= N, row - N, row)
            mask = valid[:, None] & mask_k[None, :]
            features = tl.load(
                x_ptr + row[:, None] * x.row + wide_ds * x.col,
                mask=valid[:, None] & (ds < D)[None, :],
                other=0.0,
            ).to(ACC)
            error = tl.sum(features[:, None, :] * w[None, :, :], 2)
            if HAS_BIAS:
                error += b[None, :]
            error -= tl.load(y_ptr + row[:, None] * y.row + wide_ks * y.col, mask=mask, other=0.0).to(ACC)
            error = tl.where(mask, error, 0.0)
            weighted = error
            if s is not None:
                at = s_ptr + row[:, None] * s.row + wide_ks * s.col
                sample_weight = tl.load(at, mask=mask, other=0.0).to(ACC)
                total += sample_weight
                weighted = error * sample_weight
            square = tl.fma(weighted, error, square)
            b_sum += weighted
            w_sum = tl.fma(features[:, None, :], weighted[:, :, None], w_sum)
        if offsets_ptr is None:
            begin = (begin + count) % N

        divisor = tl.cast(count * K, ACC)  # a count of 1 is a constant
        if s is not None:
            divisor = tl.sum(tl.sum(total, 1), 0)
            divisor = tl.where(divisor == 0, float("nan"), divisor)
        loss = tl.sum(tl.sum(square, 1), 0) / divisor
        tl.store(
            losses_ptr + t * tl.num_programs(0).to(tl.int64) + model, loss.to(losses_ptr.dtype.element_ty)
        )
        share = tl.where(count > 0, 2.0 / divisor, 0.0)
        # Where there is no feature or output, an infinite error would leave nan.
        w_grad = round_to(
            tl.where(mask_w, tl.sum(w_sum, 0) * share, 0.0), 0, w_ptr.dtype.element_ty, False
        ).to(ACC)
        b_grad = tl.where(mask_k, tl.sum(b_sum, 0) * share, 0.0)
        if HAS_BIAS:
            b_grad = round_to(b_grad, 0, b_ptr.dtype.element_ty, False).to(ACC)

        clip = tl.full((), 1.0, tl.float64)
        go = active
        if norms_ptr is not None:
            squares = tl.sum(tl.sum(w_grad * w_grad, 1), 0)
            bad = tl.sum(tl.sum((tl.abs(w_grad) < float("inf")).to(tl.int32) ^ 1, 1), 0)
            if HAS_BIAS:
                squares += tl.sum(b_grad * b_grad, 0)
                bad += tl.sum((tl.abs(b_grad) < float("inf")).to(tl.int32) ^ 1, 0)
            clip = clip_factor(max_norm, squares.to(tl.float64))
            if SKIP:
                go = active & (bad == 0)
                skips += (active & (bad != 0)).to(tl.int64)
        w, w_m, w_v, w_u, w_t, w_first, w_second = _update(
            w, w_grad, w_m, w_v, w_u, w_t, w_first, w_second, w_rule, clip, go, w_ptr, w_m_ptr, w_v_ptr, w_u_ptr,
            w_step_ptr, ADAM, ACC,
        )  # fmt: skip
        if HAS_BIAS:
            b, b_m, b_v, b_u, b_t, b_first, b_second = _update(
                b, b_grad, b_m, b_v, b_u, b_t, b_first, b_second, b_rule, clip, go, b_ptr, b_m_ptr, b_v_ptr, b_u_ptr,
                b_step_ptr, ADAM, ACC,
            )  # fmt: skip

    _store(w_ptr, w_m_ptr, w_v_ptr, w_u_ptr, w_at, mask_w, w, w_m, w_v, w_u)
    if w_step_ptr is not None and ALONE:
        tl.store(w_step_ptr + model, w_t.to(w_step_ptr.dtype.element_ty))
    if HAS_BIAS:
        _store(b_ptr, b_m_ptr, b_v_ptr, b_u_ptr, b_at, mask_k, b, b_m, b_v, b_u)
        if b_step_ptr is not None and ALONE:
            tl.store(b_step_ptr + model, b_t.to(b_step_ptr.dtype.element_ty))
    if norms_ptr is not None:
        tl.store(norms_ptr + model, tl.where(active, squares, float("nan")).to(tl.float64))
        tl.store(norms_ptr + tl.num_programs(0).to(tl.int64) + model, tl.where(active, bad, 0).to(tl.float64))
    if skipped_ptr is not None:
        tl.store(skipped_ptr + model, tl.load(skipped_ptr + model) + skips)


@triton.jit
def _load(p_ptr, m_ptr, v_ptr, u_ptr, at, mask, ACC: tl.constexpr):
    """Load a parameter and its moments, 0 where there is none."""
    p = tl.zeros(at.shape, ACC)
    m, v, u = p, p, p
    if p_ptr is not None:
        p = tl.load(p_ptr + at, mask=mask, other=0.0).to(ACC)
    if m_ptr is not None:
        m = tl.load(m_ptr + at, mask=mask, other=0.0).to(ACC)
    if v_ptr is not None:
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(ACC)
    if u_ptr is not None:
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(ACC)
    return p, m, v, u


@triton.jit
def _store(p_ptr, m_ptr, v_ptr, u_ptr, at, mask, p, m, v, u):
    tl.store(p_ptr + at, round_to(p, 0, p_ptr.dtype.element_ty, False), mask=mask)
    if m_ptr is not None:
        tl.store(m_ptr + at, round_to(m, 0, m_ptr.dtype.element_ty, False), mask=mask)
    if v_ptr is not None:
        tl.store(v_ptr + at, round_to(v, 0, v_ptr.dtype.element_ty, False), mask=mask)
    if u_ptr is not None:
        tl.store(u_ptr + at, round_to(u, 0, u_ptr.dtype.element_ty, False), mask=mask)


@triton.jit
def _option_at(column, model, stride):
    """Return where an option stands: columns times models may be more than 32 bits count."""
    return column * tl.cast(stride, tl.int64) + tl.where(stride == 1, 0, model)


@triton.jit
def _load_options(options_ptr, model, stride, COUNT: tl.constexpr):
    """Load one parameter's options in float64, in the order of SGDOptions or AdamOptions."""
    options = ()
    for column in tl.static_range(COUNT):
        options = options + (tl.load(options_ptr + _option_at(column, model, stride)),)
    return options


@triton.jit
def _load_step(step_ptr, model, rule, ADAM: tl.constexpr):
    """Load a parameter's count of updates, and compute Adam's ``1 - beta^t`` of it."""
    t = tl.full((), 1, tl.int64)
    if step_ptr is not None:
        t = tl.load(step_ptr + model).to(tl.int64)
    first, second = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    if ADAM:
        first, second = correction(1.0 - rule[1], t), correction(1.0 - rule[2], t)
    return t, first, second


@triton.jit
def _update(
    p, g, m, v, u, t, first, second, rule, clip, go, p_ptr, m_ptr, v_ptr, u_ptr, step_ptr,
    ADAM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return a parameter, its moments, its step and corrections after a round, or as they were unless ``go``."""
    if ADAM:
        lr, beta1, beta2, eps, decay, decoupled, maximize = rule
        first_new = first + (1.0 - beta1) * (1.0 - first)
        second_new = second + (1.0 - beta2) * (1.0 - second)
        scalars = adam_scalars(lr, beta1, beta2, eps, decay, decoupled != 0, first_new, second_new, ACC)
        factor = tl.where(maximize != 0, -clip, clip).to(ACC)
        largest = u if u_ptr is not None else None
        p_new, m_new, v_new, largest = adam_rule(p, g * factor, m, v, largest, scalars)
        first, second = tl.where(go, first_new, first), tl.where(go, second_new, second)
        v_new = round_to(v_new, 0, v_ptr.dtype.element_ty, False).to(ACC)
        v = tl.where(go, v_new, v)
        if u_ptr is not None:
            u_new = round_to(largest, 0, u_ptr.dtype.element_ty, False).to(ACC)
            u = tl.where(go, u_new, u)
    else:
        lr, momentum, dampening, decay, nesterov, maximize = rule
        scalars = lr.to(ACC), momentum.to(ACC), (1.0 - dampening).to(ACC), decay.to(ACC), nesterov != 0
        factor = tl.where(maximize != 0, -clip, clip).to(ACC)
        buffer = m if m_ptr is not None else None
        p_new, m_new = sgd_rule(p, g * factor, buffer, t == 0, scalars)
    # A model without momentum leaves buffer and step as they are.
    counted = go if ADAM else go & (rule[1] != 0)
    if m_ptr is not None:
        m_new = round_to(m_new, 0, m_ptr.dtype.element_ty, False).to(ACC)
        m = tl.where(counted, m_new, m)
    p_new = round_to(p_new, 0, p_ptr.dtype.element_ty, False).to(ACC)
    t = tl.where(counted, t + 1, t)
    return tl.where(go, p_new, p), m, v, u, t, first, second
