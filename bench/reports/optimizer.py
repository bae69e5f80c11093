"""What the optimizers declare to the reports in common: buckets for the compiler, steps whose bytes are counted."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from gradkernels.optim.bucket import UNGUARDED, AdamOptions, Bucket, Guard, Models, SGDOptions
from torch import Tensor

from .cases import FLOAT32, FLOAT64, Call, Job, randn


def bucket(
    dtype: torch.dtype,
    *states: str,
    sizes: Sequence[Any] = (8192, 1000),
    steps: tuple[int, ...] = (),
    master: bool = False,
    seed: int | None = None,
) -> Any:
    """Make the bucket of tensors of these sizes, each with a count of steps of the shape ``steps``."""

    def tensors(of: torch.dtype) -> list[Tensor]:
        return [torch.empty(size, dtype=of) for size in sizes]

    state = {key: tensors(FLOAT32 if master else dtype) for key in states}
    state |= {"master_param": tensors(FLOAT32)} if master else {}
    state["step"] = [torch.zeros(steps) for _ in sizes]
    return Bucket(tensors(dtype), tensors(dtype), state, [0] * len(sizes), list(range(len(sizes))), seed)


def stacked_bucket(dtype: torch.dtype, *states: str, width: int, **kept: Any) -> Any:
    """Make the bucket of a batch of 16 models: one tensor with ``width`` elements of each, and one with one."""
    return bucket(dtype, *states, sizes=((16, width), (16,)), steps=(16,), **kept)


def step_call(op: str, options: Callable[[], Any], *states: str, guarded: bool = False, **kept: Any) -> Call:
    """Make the call of a step over two tensors."""

    def call(module: Any, dtype: torch.dtype) -> object:
        given = bucket(dtype, *states, **kept), [options()], guard() if guarded else UNGUARDED
        return getattr(module, f"{op}_step")(*given)

    return call


def stacked_call(
    op: str, options: Callable[[], Any], *states: str, width: int, guarded: bool = False, **kept: Any
) -> Call:
    """Make the call of a step over a batch of 16 models."""

    def call(module: Any, dtype: torch.dtype) -> object:
        tensors = stacked_bucket(dtype, *states, width=width, **kept)
        given = tensors, [options()], stacked_guard() if guarded else UNGUARDED, models()
        return getattr(module, f"stacked_{op}_step")(*given)

    return call


def _options(op: str, rate: float | Tensor) -> Any:
    """Return options that leave out no part of an update."""
    if op == "sgd":
        return SGDOptions(rate, 0.9, 0, 0.1, False, False)
    return AdamOptions(rate, 0.9, 0.999, 1e-8, 0.1, True, False)


def launch_step(
    op: str,
    states: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    clip: bool = False,
    stacked: bool = False,
) -> list[int]:
    """Launch a step over tensors of these shapes that hold no values; return the bytes of each launch.

    Args:
        stacked: one tensor is a batch of models, each with a rate of its own.
    """
    from gradkernels.triton.multi_tensor import grad_norm

    count = shapes[0][0] if stacked else 0
    tensors = bucket(dtype, *states, sizes=shapes, steps=(count,) if stacked else ())
    if op == "sgd":
        del tensors.states["step"]
    size = sum(map(math.prod, shapes)) * dtype.itemsize
    moved = (3 + 2 * len(states)) * size + 12 * count
    options = [_options(op, torch.empty(count) if stacked else 0.1)]
    if stacked:
        module = import_module("gradkernels.triton.stacked")
        getattr(module, f"stacked_{op}_step")(tensors, options, UNGUARDED, Models(count))
        return [moved]
    guarded = Guard(norms=torch.empty(1, 2, dtype=FLOAT64), max_norm=1.0) if clip else UNGUARDED
    if clip:
        grad_norm(tensors, None, guarded.norms[0])
    getattr(import_module(f"gradkernels.triton.{op}"), f"{op}_step")(tensors, options, guarded)
    return [size, moved] if clip else [moved]


def models() -> Any:
    """Make the models of a stacked step, with everything: a mask, and factors of the rates."""
    return Models(16, torch.ones(16, dtype=torch.bool), torch.ones(16))


def stacked_guard() -> Any:
    """Make a guard with everything, per model."""
    norms, skipped = torch.empty(2, 2, 16, dtype=FLOAT64), torch.zeros(16, dtype=torch.int64)
    return guard()._replace(norms=norms, skipped=skipped)


def guard() -> Any:
    """Make a guard with everything: a scaled gradient, clipping, and a step that may be skipped."""
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
    """Return a step over tensors of many sizes; ``per_element`` counts the bytes that must move for each parameter."""
    shapes = [(1 << 16,), (300, 41), (1000,)] + [(64,)] * 20
    count = sum(map(math.prod, shapes))
    steps = _steps(shapes, ours, theirs, options)
    job = f"{name} step, {len(shapes)} tensors, {count} float32 parameters"
    return Job(job, *steps, per_element * count, 1.02, 1.02, launches)


def stacked_job(
    name: str,
    ours: Callable[..., torch.optim.Optimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    shape: tuple[int, ...],
    per_element: int,
    per_model: int,
    launches: int,
    **shared: Any,
) -> Job:
    """Return a step of a batch of models, each at its own rate, beside the plain step of the stack at one rate.

    Args:
        shape: of the stack; its first dimension counts the models.
        per_element, per_model: bytes that must move for each number, and once for each model.
    """
    steps = _steps([shape], ours, theirs, shared, stacked=True, lr=torch.full(shape[:1], 0.1))
    minimum = per_element * math.prod(shape) + per_model * shape[0]
    job = f"{name}, {shape[0]} models x {math.prod(shape[1:])} float32"
    return Job(job, *steps, minimum, 1.1, 1.1, launches)


def _steps(
    shapes: Sequence[tuple[int, ...]],
    ours: Callable[..., torch.optim.Optimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    shared: Mapping[str, Any],
    **own: Any,
) -> list[Callable[[], Any]]:
    """Make a step of ours and one of torch's, which clips before it, over tensors of these shapes."""
    plain = {key: value for key, value in shared.items() if key != "max_norm"}
    steps = []
    for build, options in ((ours, {**shared, **own}), (theirs, {**plain, "foreach": False})):
        params = [randn(*shape).requires_grad_() for shape in shapes]
        for param in params:
            param.grad = randn(*param.shape)
        optimizer = build(params, **options)
        optimizer.step()  # the first step makes the state
        clips = build is theirs and "max_norm" in shared
        steps.append(partial(_clipped, params, shared["max_norm"], optimizer) if clips else optimizer.step)
    return steps


def _clipped(params: list[Tensor], max_norm: float, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=False)
    optimizer.step()
