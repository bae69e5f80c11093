"""What the optimizers declare to the reports in common: buckets for the compiler, steps whose bytes are counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import FLOAT32, FLOAT64, Job, randn


def bucket(dtype: torch.dtype, *states: str, master: bool = False, seed: int | None = None) -> Any:
    from gradkernels.optim.bucket import Bucket

    def tensors(of: torch.dtype) -> list[Tensor]:
        return [torch.empty(size, dtype=of) for size in (8192, 1000)]

    state = {key: tensors(FLOAT32 if master else dtype) for key in states}
    state |= {"master_param": tensors(FLOAT32)} if master else {}
    state["step"] = [torch.zeros(()) for _ in range(2)]
    return Bucket(tensors(dtype), tensors(dtype), state, [0, 0], [0, 1], seed)


def guard() -> Any:
    """Make a guard with everything: a scaled gradient, clipping, and a step that may be skipped."""
    from gradkernels.optim.bucket import Guard

    norms, skipped = torch.empty(4, 2, dtype=FLOAT64), torch.zeros(1, dtype=torch.int64)
    return Guard(torch.ones(()), torch.zeros(()), norms, 1.0, True, skipped)


def step_job(
    name: str,
    ours: type[torch.optim.Optimizer],
    theirs: type[torch.optim.Optimizer],
    options: dict[str, Any],
    per_element: int,
    launches: int,
) -> Job:
    """A step over tensors of many sizes; ``per_element`` counts the bytes that must move for each parameter."""
    shapes = [(1 << 16,), (300, 41), (1000,)] + [(64,)] * 20
    count = sum(torch.Size(shape).numel() for shape in shapes)
    plain = {key: value for key, value in options.items() if key != "max_norm"}
    steps = []
    for cls, chosen in ((ours, options), (theirs, {**plain, "foreach": False})):
        params = [randn(*shape).requires_grad_() for shape in shapes]
        optimizer = cls(params, **chosen)
        for param in params:
            param.grad = randn(*param.shape)
        optimizer.step()  # the first step makes the state
        if cls is theirs and "max_norm" in options:
            steps.append(_clipped(params, options["max_norm"], optimizer))
        else:
            steps.append(optimizer.step)
    job = f"{name} step, {len(shapes)} tensors, {count} float32 parameters"
    return Job(job, *steps, per_element * count, 1.02, 1.02, launches)


def _clipped(params: list[Tensor], max_norm: float, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=False)
        optimizer.step()

    return step
