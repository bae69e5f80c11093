"""cube on n elements. bytes: n read, n written. FLOPs: 2 n."""

from collections.abc import Iterator
from typing import Any

import torch
from gradkernels.cube import cube
from gradkernels.reference import cube as reference

from .reports.cases import AotCase, HostCall, Job, meta, randn
from .throughput.case import OURS, Case, Op, draw_inputs, function


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    (n,) = shape
    yield Case(
        "cube",
        "forward",
        f"{n}",
        {"n": n},
        dtype,
        2 * n * dtype.itemsize,
        2 * n,
        draw_inputs(dtype, lambda randn: (randn(n),)),
        (function(OURS, lambda x: [cube(x)]), function("eager", lambda x: [x**3])),
        lambda x: [reference.forward(x)],
    )


OP = Op(name="cube", axes=("n",), build=build, shapes="*1000", dtypes={"cpu": (torch.float32,)})


def _launch(module: Any, dtype: torch.dtype) -> object:
    return module.cube_forward(meta(4096, dtype=dtype))


AOT_CASES = (AotCase("cube", "forward", _launch, dtypes=(torch.float32,)),)
HOST_CALLS = (HostCall("cube", cube, lambda x: x**3, ((64,),)),)


def traffic_jobs() -> Iterator[Job]:
    """The result alone."""
    x = randn(4096)
    yield Job("cube, 4096 float32", lambda: cube(x), lambda: x**3, 2 * 4 * 4096, 1.01, 1.01, 1)
