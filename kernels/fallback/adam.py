"""Adam and AdamW in plain torch: torch's fused kernel where it is right, else one tensor at a time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..buckets import AdamOptions, Bucket, Guard
from ..dtypes import accumulator
from .grad_norm import Decision, decide, store, unscaled
from .rounding import draws, stochastic_bfloat16


def adam_step(bucket: Bucket, options: Sequence[AdamOptions], guard: Guard) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states ``exp_avg``, ``exp_avg_sq``, ``step``, perhaps ``max_exp_avg_sq`` and ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
    """
    decision = decide(guard)
    if decision.skip is True:
        return
    steps = bucket.states["step"]
    if isinstance(decision.skip, Tensor):
        torch._foreach_add_(steps, (~decision.skip).to(steps[0].dtype))
    else:
        # A tensor with alpha: a bare 1 would be wrapped into a tensor once per step on the CPU.
        torch._foreach_add_(steps, torch.ones((), dtype=steps[0].dtype, device=steps[0].device), alpha=1)
    for group in sorted(set(bucket.groups)):
        chosen = [i for i, owner in enumerate(bucket.groups) if owner == group]
        if _fused_is_right(bucket):
            _fused(bucket, chosen, options[group], decision)
        else:
            for i in chosen:
                _update(bucket, i, options[group], decision)


def _fused_is_right(bucket: Bucket) -> bool:
    """Whether torch's fused kernel serves: one dtype for all, rounded to nearest."""
    operands = [bucket.params, bucket.grads]
    operands += [tensors for key, tensors in bucket.states.items() if key != "step"]
    return (
        bucket.seed is None
        and "master_param" not in bucket.states
        and len({tensors[0].dtype for tensors in operands}) == 1
    )


def _fused(bucket: Bucket, chosen: list[int], options: AdamOptions, decision: Decision) -> None:
    grads = [bucket.grads[i] for i in chosen]
    scale = decision.scale
    if not (isinstance(decision.clip, float) and decision.clip == 1.0):
        if scale is not None:
            torch._foreach_div_(grads, scale)
            scale = None
        # Clipped copies: the caller's gradients stay as they are.
        grads = list(torch._foreach_mul(grads, decision.clip))
    pick = {key: [tensors[i] for i in chosen] for key, tensors in bucket.states.items()}
    update = torch._fused_adamw_ if options.decoupled else torch._fused_adam_
    lr = options.lr
    update(
        [bucket.params[i] for i in chosen],
        grads,
        pick["exp_avg"],
        pick["exp_avg_sq"],
        pick.get("max_exp_avg_sq", []),
        pick["step"],
        amsgrad="max_exp_avg_sq" in pick,
        lr=lr if isinstance(lr, Tensor) and not lr.is_cpu else float(lr),
        beta1=float(options.beta1),
        beta2=float(options.beta2),
        weight_decay=float(options.weight_decay),
        eps=options.eps,
        maximize=options.maximize,
        grad_scale=scale,
        found_inf=decision.skip.float() if isinstance(decision.skip, Tensor) else None,
    )


def _number(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A float where reading one does not wait for a device, else a 0-d tensor of ``like``'s dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.is_cpu else value.squeeze().to(like.dtype)


def _update(bucket: Bucket, i: int, options: AdamOptions, decision: Decision) -> None:
    param = bucket.params[i]
    state = {key: tensors[i] for key, tensors in bucket.states.items()}
    wide = accumulator(param)
    lr, beta1, beta2, decay = (
        _number(x, torch.empty((), dtype=wide))
        for x in (options.lr, options.beta1, options.beta2, options.weight_decay)
    )
    g = unscaled(bucket.grads[i], decision, wide)
    g = -g if options.maximize else g
    p = state.get("master_param", param).to(wide)
    if isinstance(decay, Tensor) or decay != 0:
        if options.decoupled:
            p = p * (1 - lr * decay)
        else:
            g = g + decay * p
    m = state["exp_avg"].to(wide)
    m = m + (g - m) * (1 - beta1)
    v = state["exp_avg_sq"].to(wide) * beta2 + g * g * (1 - beta2)
    step = _number(state["step"], p)
    largest = v
    if "max_exp_avg_sq" in state:
        largest = torch.maximum(state["max_exp_avg_sq"].to(wide), v)
    denominator = (largest / _correction(beta2, step)).sqrt() + options.eps
    p = p - lr / _correction(beta1, step) * (m / denominator)

    new = {"param": p, "exp_avg": m, "exp_avg_sq": v}
    if "max_exp_avg_sq" in state:
        new["max_exp_avg_sq"] = largest
    out = {"param": param, **state}
    if bucket.seed is not None:
        for (key, value), draw in zip(
            new.items(), draws(param, bucket.seed, bucket.indices[i], state["step"] - 1), strict=False
        ):
            new[key] = stochastic_bfloat16(value, draw)
    if "master_param" in state:
        new["master_param"] = p
    for key, value in new.items():
        store(out[key], value, decision.skip)


def _correction(beta: float | Tensor, step: float | Tensor) -> float | Tensor:
    """1 - beta^step, accurate in float32 too, where 1 - 0.999 alone would lose three digits."""
    if not isinstance(step, Tensor):
        return 1 - float(beta) ** step
    log = beta.log() if isinstance(beta, Tensor) else math.log(beta) if beta else -math.inf
    return -torch.expm1(step * log)
