"""SGD in plain torch: torch's fused kernel where it does what is asked, else one tensor at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..buckets import Bucket, Guard, SGDOptions
from .grad_norm import Decision, decide, store, unscaled
from .rounding import draws, stochastic_bfloat16


def sgd_step(bucket: Bucket, options: Sequence[SGDOptions], guard: Guard) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states, all optional: ``momentum_buffer``, ``step``, ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
    """
    decision = decide(guard)
    if decision.skip is True:
        return
    for group in sorted(set(bucket.groups)):
        chosen = [i for i, owner in enumerate(bucket.groups) if owner == group]
        if _fused_is_right(bucket):
            _fused(bucket, chosen, options[group], decision)
        else:
            for i in chosen:
                _update(bucket, i, options[group], decision)
    if steps := bucket.states.get("step"):
        if isinstance(decision.skip, Tensor):
            torch._foreach_add_(steps, (~decision.skip).to(steps[0].dtype))
        else:
            torch._foreach_add_(steps, torch.ones((), dtype=steps[0].dtype, device=steps[0].device), alpha=1)


def _fused_is_right(bucket: Bucket) -> bool:
    """Whether torch's fused kernel serves: one dtype of 32 or 64 bits, and no first step to tell apart.

    On the CPU, torch up to 2.13 leaves whole blocks of 16-bit parameters unmoved (pytorch#191763); the flag
    for the first step is one for the whole call.
    """
    operands = [bucket.params, bucket.grads, *bucket.states.values()]
    dtypes = {tensors[0].dtype for tensors in operands}
    return set(bucket.states) <= {"momentum_buffer"} and dtypes in ({torch.float32}, {torch.float64})


def _fused(bucket: Bucket, chosen: list[int], options: SGDOptions, decision: Decision) -> None:
    grads = [bucket.grads[i] for i in chosen]
    scale = decision.scale
    if not (isinstance(decision.clip, float) and decision.clip == 1.0):
        if scale is not None:
            torch._foreach_div_(grads, scale)
            scale = None
        # Clipped copies: the caller's gradients stay as they are.
        grads = list(torch._foreach_mul(grads, decision.clip))
    buffers = bucket.states.get("momentum_buffer")
    lr = options.lr
    torch._fused_sgd_(
        [bucket.params[i] for i in chosen],
        grads,
        [] if buffers is None else [buffers[i] for i in chosen],
        weight_decay=float(options.weight_decay),
        momentum=options.momentum,
        lr=lr if isinstance(lr, Tensor) and not lr.is_cpu else float(lr),
        dampening=options.dampening,
        nesterov=options.nesterov,
        maximize=options.maximize,
        is_first_step=False,
        grad_scale=scale,
        found_inf=decision.skip.float() if isinstance(decision.skip, Tensor) else None,
    )


def _update(bucket: Bucket, i: int, options: SGDOptions, decision: Decision) -> None:
    param = bucket.params[i]
    state = {key: tensors[i] for key, tensors in bucket.states.items()}
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    lr, decay = (
        x if not isinstance(x, Tensor) else x.item() if x.is_cpu else x.squeeze().to(wide)
        for x in (options.lr, options.weight_decay)
    )
    g = unscaled(bucket.grads[i], decision, wide)
    g = -g if options.maximize else g
    p = state.get("master_param", param).to(wide)
    if isinstance(decay, Tensor) or decay != 0:
        g = g + decay * p
    new = {}
    if "momentum_buffer" in state:
        buffer = state["momentum_buffer"].to(wide) * options.momentum + g * (1 - options.dampening)
        if "step" in state:
            buffer = torch.where(state["step"] == 0, g, buffer)
        new["momentum_buffer"] = buffer
        g = g + options.momentum * buffer if options.nesterov else buffer
    p = p - lr * g

    new = {"param": p, **new}
    out = {"param": param, **state}
    if bucket.seed is not None:
        for (key, value), draw in zip(
            new.items(), draws(param, bucket.seed, bucket.indices[i], state["step"]), strict=False
        ):
            new[key] = stochastic_bfloat16(value, draw)
    if "master_param" in state:
        new["master_param"] = p
    for key, value in new.items():
        store(out[key], value, decision.skip)
