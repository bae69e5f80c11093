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
from gradkernels.optim.bucket import AdamOptions
from gradkernels.reference import adam as reference

from .reports.cases import BFLOAT16, FLOAT16, FLOAT64, AotCase, Call, Job
from .reports.optimizer import bucket, models, stacked_bucket, stacked_call, stacked_job, step_call, step_job
from .throughput.case import OURS, Case
from .throughput.optimizer import (
    MAX_NORM,
    apex,
    compiled_stepper,
    declare,
    is_stack,
    stacked_case,
    step_case,
    stepper,
    torch_steppers,
)

STATES = ("exp_avg", "exp_avg_sq")


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    if is_stack(shape):
        both = gradkernels.FusedAdam, torch.optim.Adam
        yield stacked_case("adam", shape, dtype, *both, reference.step, STATES, (7, 15), lr=1e-3)
        return
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


def _of_models() -> AdamOptions:
    return AdamOptions(torch.ones(16), 0.9, torch.ones(16), 1e-8, 0.1, True, False)


MAXIMUM = "max_exp_avg_sq"
_step = partial(step_call, "adam", lambda: AdamOptions(0.1, 0.9, 0.999, 1e-8, 0.1, True, False), *STATES)
_stacked = partial(stacked_call, "adam", _of_models, *STATES)


def _stacked_norm(width: int) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        out = torch.empty(2, 16, dtype=FLOAT64)
        return module.stacked_grad_norm(stacked_bucket(dtype, width=width), None, models(), out)

    return call


def _grad_norm(module: Any, dtype: torch.dtype) -> object:
    return module.grad_norm(bucket(dtype), None, torch.empty(1, 2, dtype=FLOAT64))


AOT_CASES = (
    AotCase("adam", "AdamW, aligned or not", _step()),
    AotCase("adam", "amsgrad, guarded", _step(MAXIMUM, guarded=True)),
    AotCase("adam", "master weights", _step(master=True), dtypes=(FLOAT16, BFLOAT16)),
    AotCase("adam", "stochastic rounding", _step(seed=0), dtypes=(BFLOAT16,)),
    AotCase("multi_tensor", "aligned or not", _grad_norm, stores=False),
    AotCase("stacked", "AdamW, long models", _stacked(width=8192)),
    AotCase("stacked", "AdamW, models of 1", _stacked(width=1), loads=False, stores=False),
    AotCase("stacked", "AdamW, models of 3", _stacked(width=3), loads=False, stores=False),
    *(
        AotCase("stacked", shapes, call, False, False, *dtypes)
        for shapes, call, *dtypes in (
            ("amsgrad, guarded, models of 8", _stacked(MAXIMUM, width=8, guarded=True)),
            ("master weights, models of 16", _stacked(width=16, master=True), (FLOAT16, BFLOAT16)),
            ("stochastic rounding, models of 64", _stacked(width=64, seed=0), (BFLOAT16,)),
        )
    ),
    AotCase("stacked", "norm, models of 3", _stacked_norm(3), loads=False, stores=False),
    AotCase("stacked", "norm, long models", _stacked_norm(1 << 16), stores=False),
)


def traffic_jobs() -> Iterator[Job]:
    """Yield a step, and one that clips."""
    yield step_job("adam", gradkernels.FusedAdam, torch.optim.Adam, {}, 28, 1)
    clipped = {"max_norm": 1.0}
    yield step_job("adamw, clipped", gradkernels.FusedAdamW, torch.optim.AdamW, clipped, 32, 2)
    # Of each model the step is read and written and the rate read; clipped, also the norm written and read.
    ours, theirs = gradkernels.FusedAdam, torch.optim.Adam
    yield stacked_job("stacked adam step", ours, theirs, (2000, 3), 28, 12, 1)
    yield stacked_job("stacked adam step", ours, theirs, (500, 8), 28, 12, 1)
    yield stacked_job("stacked adam step", ours, theirs, (3, 10000), 28, 12, 1)
    yield stacked_job("stacked adam, clipped", ours, theirs, (500, 8), 32, 36, 2, max_norm=1.0)
