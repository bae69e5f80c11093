"""SGD in plain torch: torch's fused kernel where it does what is asked, else one tensor at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from ..buckets import Bucket, Guard, SGDOptions
from ..dtypes import accumulator
from .grad_norm import Decision, decide, store, unscaled
from .rounding import draws, stochastic_bfloat16
from .widening import Widened, pieces_of


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
    steps = bucket.states.get("step", [])
    on_host = not steps or steps[0].is_cpu
    for group in sorted(set(bucket.groups)):
        chosen = [i for i, owner in enumerate(bucket.groups) if owner == group]
        if bucket.seed is not None or not on_host:
            for i in chosen:
                _update(bucket, i, options[group], decision)
            continue
        fresh = {i for i in chosen if steps and steps[i].item() == 0}
        for first in (True, False):
            if entries := [i for i in chosen if (i in fresh) is first]:
                _fused(bucket, entries, options[group], decision, first)
    if steps:
        if isinstance(decision.skip, Tensor):
            torch._foreach_add_(steps, (~decision.skip).to(steps[0].dtype))
        else:
            torch._foreach_add_(steps, torch.ones((), dtype=steps[0].dtype, device=steps[0].device), alpha=1)


def _fused(bucket: Bucket, chosen: list[int], options: SGDOptions, decision: Decision, first: bool) -> None:
    """Torch's kernels for the chosen entries, all before their first step or all after it."""
    if first:
        options = options._replace(dampening=0.0)  # the buffer is 0, and takes the first gradient whole
    params = bucket.states.get("master_param", bucket.params)
    buffers = bucket.states.get("momentum_buffer", [])
    wide = accumulator(params[0])
    if len({tensors[0].dtype for tensors in (bucket.params, bucket.grads, params, buffers) if tensors}) == 1:
        p, g, b = ([tensors[i] for i in chosen if tensors] for tensors in (params, bucket.grads, buffers))
        _call(p, g, b, options, decision)
        return
    for pieces in pieces_of(bucket, chosen):
        wide_params, wide_grads = Widened(params, pieces, wide), Widened(bucket.grads, pieces, wide)
        wide_buffers = Widened(buffers, pieces if buffers else [], wide)
        _call(wide_params.values, wide_grads.values, wide_buffers.values, options, decision)
        wide_params.write_back()
        wide_buffers.write_back()
        if decision.scale is not None:
            wide_grads.write_back()
        if params is not bucket.params:
            rounded = Widened(bucket.params, pieces, wide)
            rounded.values = wide_params.values
            rounded.write_back()


def _call(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], options: SGDOptions, decision: Decision
) -> None:
    scale = decision.scale
    low = params[0].is_cpu and params[0].element_size() == 2
    clips = isinstance(decision.clip, Tensor) or decision.clip != 1.0
    if scale is not None and (low or clips):
        torch._foreach_div_(grads, scale)
        scale = None
    if clips:
        # Clipped copies: the caller's gradients stay as they are.
        grads = list(torch._foreach_mul(grads, decision.clip))
    lr = options.lr
    numbers: dict[str, Any] = {
        "weight_decay": float(options.weight_decay),
        "momentum": options.momentum,
        "lr": lr if isinstance(lr, Tensor) and not lr.is_cpu else float(lr),
        "dampening": options.dampening,
        "nesterov": options.nesterov,
        "maximize": options.maximize,
    }
    if low:
        # On the CPU torch's fused kernel, up to 2.13, leaves whole blocks of 16-bit parameters unmoved
        # (pytorch#191763). Its loop rounds after each operation instead of once.
        sgd(params, grads, list(buffers) or [None] * len(params), foreach=True, **numbers)
        return
    found_inf = decision.skip.float() if isinstance(decision.skip, Tensor) else None
    torch._fused_sgd_(
        params, grads, buffers, is_first_step=False, grad_scale=scale, found_inf=found_inf, **numbers
    )


def _update(bucket: Bucket, i: int, options: SGDOptions, decision: Decision) -> None:
    param = bucket.params[i]
    state = {key: tensors[i] for key, tensors in bucket.states.items()}
    wide = accumulator(param)
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
