"""Adam and AdamW in plain torch: torch's fused kernel, in batches where it cannot do what is asked alone."""

from collections.abc import Sequence

from torch import Tensor

from ..optim.bucket import AdamOptions, Bucket, Guard
from . import fused
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
    def kernel(
        params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]], scale: Tensor | None
    ) -> None:
        fused.adam(options, params, grads, states, scale, decision.skip)

    run(bucket, chosen, decision, kernel)
