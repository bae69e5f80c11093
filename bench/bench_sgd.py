"""FusedSGD: one step over any number of parameters.

bytes   parameter and gradient read, parameter written: 3 elements; with momentum the buffer read and written
        as well: 5.
FLOPs   2 a parameter; with momentum and weight decay 6.
"""

from collections.abc import Iterator
from functools import partial

import gradkernels
import torch
from gradkernels.optim.bucket import SGDOptions
from gradkernels.reference import sgd as reference

from .reports.cases import BFLOAT16, FLOAT16, AotCase, Job
from .reports.optimizer import stacked_call, stacked_job, step_call, step_job
from .throughput.case import OURS, Case
from .throughput.optimizer import (
    apex,
    compiled_stepper,
    declare,
    is_stack,
    stacked_case,
    step_case,
    stepper,
    torch_steppers,
)

BUFFER = "momentum_buffer"
MOMENTUM = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    if is_stack(shape):
        both = gradkernels.FusedSGD, torch.optim.SGD
        yield stacked_case("sgd", shape, dtype, *both, reference.step, (BUFFER,), (5, 6), **MOMENTUM)
        return
    count, numel = shape
    common = ([(numel,)] * count, f"{count} x {numel}", dtype)
    for variant, options, per_parameter in (("plain", {"lr": 0.01}, (3, 2)), ("momentum", MOMENTUM, (5, 6))):
        implementations = (
            stepper(OURS, lambda params, options=options: gradkernels.FusedSGD(params, **options)),
            *torch_steppers(partial(torch.optim.SGD, **options)),
            *compiled_stepper(partial(torch.optim.SGD, **options), shape),
            apex("FusedSGD", **options),
        )
        states = (BUFFER,) if "momentum" in options else ()
        step = partial(reference.step, **options)
        yield step_case("sgd", variant, *common, implementations, step, states, per_parameter)


OP = declare("sgd", build)


def _of_models() -> SGDOptions:
    return SGDOptions(torch.ones(16), torch.ones(16), 0, 0.1, True, False)


_step = partial(step_call, "sgd", lambda: SGDOptions(0.1, 0.9, 0, 0.1, True, False), BUFFER)
_stacked = partial(stacked_call, "sgd", _of_models, BUFFER)
AOT_CASES = (
    AotCase("sgd", "momentum, aligned or not", _step()),
    AotCase("sgd", "guarded", _step(guarded=True)),
    AotCase("sgd", "master weights", _step(master=True), dtypes=(FLOAT16, BFLOAT16)),
    AotCase("sgd", "stochastic rounding", _step(seed=0), dtypes=(BFLOAT16,)),
    AotCase("stacked", "SGD, long models", _stacked(width=8192)),
    AotCase(
        "stacked", "SGD, guarded, models of 3", _stacked(width=3, guarded=True), loads=False, stores=False
    ),
)


def traffic_jobs() -> Iterator[Job]:
    """Yield a step, plain and with momentum."""
    sgd = gradkernels.FusedSGD, torch.optim.SGD
    yield step_job("sgd", *sgd, {"lr": 0.1}, 12, 1)
    yield step_job("sgd, momentum", *sgd, {"lr": 0.1, "momentum": 0.9}, 20, 1)
    yield stacked_job("stacked sgd, momentum", *sgd, (2000, 3), 20, 12, 1, momentum=0.9)
