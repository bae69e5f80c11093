"""FusedSGD: one step over any number of parameters.

bytes   parameter and gradient read, parameter written: 3 elements; with momentum the buffer read and written
        as well: 5.
FLOPs   2 a parameter; with momentum and weight decay 6.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradkernels
import torch
from gradkernels.reference import sgd as reference

from .reports.cases import BFLOAT16, FLOAT16, AotCase, Call, HostCall, Job
from .reports.optimizer import (
    bucket,
    guard,
    models,
    stacked_bucket,
    stacked_guard,
    stacked_job,
    step_job,
)
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


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    if is_stack(shape):
        options = {"momentum": 0.9, "weight_decay": 0.01}
        rates = partial(torch.full, shape[:1], 0.01)
        yield stacked_case(
            "sgd",
            shape,
            dtype,
            lambda params: gradkernels.FusedSGD(
                params, stacked=True, lr=rates(device=params[0].device), **options
            ),
            partial(torch.optim.SGD, lr=0.01, **options),
            partial(reference.step, lr=0.01, **options),
            ("momentum_buffer",),
            (5, 6),
        )
        return
    count, numel = shape
    common = ([(numel,)] * count, f"{count} x {numel}", dtype)
    momentum = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}
    for variant, options, per_parameter in (("plain", {"lr": 0.01}, (3, 2)), ("momentum", momentum, (5, 6))):
        implementations = (
            stepper(OURS, lambda params, options=options: gradkernels.FusedSGD(params, **options)),
            *torch_steppers(partial(torch.optim.SGD, **options)),
            *compiled_stepper(partial(torch.optim.SGD, **options), shape),
            apex("FusedSGD", **options),
        )
        states = ("momentum_buffer",) if "momentum" in options else ()
        step = partial(reference.step, **options)
        yield step_case("sgd", variant, *common, implementations, step, states, per_parameter)


OP = declare("sgd", build)


def _launch(guarded: bool = False, **kept: Any) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        from gradkernels.optim.bucket import Guard, SGDOptions

        options = SGDOptions(0.1, 0.9, 0, 0.1, True, False)
        tensors = bucket(dtype, "momentum_buffer", **kept)
        return module.sgd_step(tensors, [options], guard() if guarded else Guard())

    return call


def _stacked(width: int, guarded: bool = False, **kept: Any) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        from gradkernels.optim.bucket import Guard, SGDOptions

        options = SGDOptions(torch.ones(16), torch.ones(16), 0, 0.1, True, False)
        tensors = stacked_bucket(dtype, "momentum_buffer", width=width, **kept)
        return module.stacked_sgd_step(tensors, [options], stacked_guard() if guarded else Guard(), models())

    return call


AOT_CASES = (
    AotCase("sgd", "momentum, aligned or not", _launch()),
    AotCase("sgd", "guarded", _launch(guarded=True)),
    AotCase("sgd", "master weights", _launch(master=True), dtypes=(FLOAT16, BFLOAT16)),
    AotCase("sgd", "stochastic rounding", _launch(seed=0), dtypes=(BFLOAT16,)),
    AotCase("stacked", "SGD, long models", _stacked(8192)),
    AotCase("stacked", "SGD, guarded, models of 3", _stacked(3, guarded=True), loads=False, stores=False),
)
HOST_CALLS: tuple[HostCall, ...] = ()


def traffic_jobs() -> Iterator[Job]:
    """A step, plain and with momentum."""
    sgd = gradkernels.FusedSGD, torch.optim.SGD
    yield step_job("sgd", *sgd, {"lr": 0.1}, 12, 1)
    yield step_job("sgd, momentum", *sgd, {"lr": 0.1, "momentum": 0.9}, 20, 1)
    yield stacked_job("stacked sgd, momentum", *sgd, (2000, 3), 20, 12, 1, momentum=0.9)
