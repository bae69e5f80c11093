"""FusedSGD: one step over any number of parameters.

bytes   parameter and gradient read, parameter written: 3 elements; with momentum the buffer read and written
        as well: 5.
FLOPs   2 a parameter; with momentum and weight decay 6.
"""

from collections.abc import Iterator
from functools import partial

import gradkernels
import torch
from gradkernels.reference import sgd as reference

from .throughput.case import OURS, Case
from .throughput.optimizer import apex, compiled_stepper, declare, step_case, stepper, torch_steppers


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
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
