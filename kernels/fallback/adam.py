"""Adam and AdamW in plain torch: torch's fused kernel, in batches where it cannot do what is asked alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..optim.bucket import AdamOptions, Bucket, Guard
from .multi_tensor import Decision, by_group, decide, raise_steps, run


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
    raise_steps(bucket.states["step"], decision.skip)
    for group, chosen in by_group(bucket):
        _update(bucket, chosen, options[group], decision)


def _update(bucket: Bucket, chosen: list[int], options: AdamOptions, decision: Decision) -> None:
    lr, skip = options.lr, decision.skip

    def kernel(
        params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]], scale: Tensor | None
    ) -> None:
        update = torch._fused_adamw_ if options.decoupled else torch._fused_adam_
        update(
            params,
            grads,
            states["exp_avg"],
            states["exp_avg_sq"],
            states.get("max_exp_avg_sq", []),
            states["step"],
            amsgrad="max_exp_avg_sq" in states,
            lr=lr if isinstance(lr, Tensor) and not lr.is_cpu else float(lr),
            beta1=float(options.beta1),
            beta2=float(options.beta2),
            weight_decay=float(options.weight_decay),
            eps=options.eps,
            maximize=options.maximize,
            grad_scale=scale,
            found_inf=skip.float() if isinstance(skip, Tensor) else None,
        )

    run(bucket, chosen, decision, kernel)
