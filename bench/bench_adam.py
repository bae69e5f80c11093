"""FusedAdam and FusedAdamW: one step over any number of parameters.

bytes   parameter, gradient and both moments read, all but the gradient written: 7 elements. Clipping reads
        the gradient once more: 8.
FLOPs   about 15 a parameter; 17 with clipping.
"""

from collections.abc import Iterator
from functools import partial

import gradkernels
import torch
from gradkernels.reference import adam as reference

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
