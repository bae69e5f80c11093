"""FusedAdam and FusedAdamW: one step over any number of parameters.

bytes   parameter, gradient and both moments read, all but the gradient written: 7 elements. Clipping reads
        the gradient once more: 8.
FLOPs   about 15 a parameter; 17 with clipping.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradkernels
import torch
from gradkernels.reference import adam as reference

from .reports.cases import BFLOAT16, FLOAT16, FLOAT64, AotCase, Call, HostCall, Job
from .reports.optimizer import bucket, guard, step_job
from .throughput.case import OURS, Case
from .throughput.optimizer import (
    MAX_NORM,
    apex,
    compiled_stepper,
    declare,
    step_case,
    stepper,
    torch_steppers,
)

STATES = ("exp_avg", "exp_avg_sq")


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    count, numel = shape
    common = ([(numel,)] * count, f"{count} x {numel}", dtype)
    implementations = [
        stepper(OURS, lambda params: gradkernels.FusedAdam(params)),
        *torch_steppers(torch.optim.Adam),
        *compiled_stepper(torch.optim.Adam, shape),
        apex("FusedAdam", adam_w_mode=False),
    ]
    yield step_case("adam", "Adam", *common, implementations, reference.step, STATES, (7, 15))
    implementations = [
        stepper(OURS, lambda params: gradkernels.FusedAdamW(params, max_norm=MAX_NORM)),
        *torch_steppers(torch.optim.AdamW, clip=True),
    ]
    step = partial(reference.step, decoupled_weight_decay=True, weight_decay=0.01)
    yield step_case("adam", "AdamW, clipped", *common, implementations, step, STATES, (8, 17), clip=True)


OP = declare("adam", build)


def _launch(guarded: bool = False, amsgrad: bool = False, **kept: Any) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        from gradkernels.optim.bucket import AdamOptions, Guard

        options = AdamOptions(0.1, 0.9, 0.999, 1e-8, 0.1, True, False)
        states = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
        tensors = bucket(dtype, *states, **kept)
        return module.adam_step(tensors, [options], guard() if guarded else Guard())

    return call


def _grad_norm(module: Any, dtype: torch.dtype) -> object:
    return module.grad_norm(bucket(dtype), None, torch.empty(1, 2, dtype=FLOAT64))


AOT_CASES = (
    AotCase("adam", "AdamW, aligned or not", _launch()),
    AotCase("adam", "amsgrad, guarded", _launch(guarded=True, amsgrad=True)),
    AotCase("adam", "master weights", _launch(master=True), dtypes=(FLOAT16, BFLOAT16)),
    AotCase("adam", "stochastic rounding", _launch(seed=0), dtypes=(BFLOAT16,)),
    AotCase("multi_tensor", "aligned or not", _grad_norm, stores=False),
)
HOST_CALLS: tuple[HostCall, ...] = ()


def traffic_jobs() -> Iterator[Job]:
    """A step, and one that clips."""
    yield step_job("adam", gradkernels.FusedAdam, torch.optim.Adam, {}, 28, 1)
    clipped = {"max_norm": 1.0}
    yield step_job("adamw, clipped", gradkernels.FusedAdamW, torch.optim.AdamW, clipped, 32, 2)
