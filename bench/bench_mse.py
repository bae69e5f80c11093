"""mse_loss on n elements.

bytes   forward: 2 n read. Forward + backward through autograd: 2 n read, then 2 n read and n written.
        Loss and gradient in one pass: 2 n read, n written. (times the size of an element)
FLOPs   a subtraction, a multiplication and an addition per element; the gradient costs two more.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.reference import mse as reference
from torch import Tensor
from torch.nn import functional

from .reports.cases import AotCase, Call, HostCall, Job, gradients, meta, randn
from .throughput.case import (
    Case,
    Op,
    Results,
    Sweep,
    draw_inputs,
    forward,
    forward_backward,
    powers,
    through_autograd,
    without_autograd,
)


def _explicit(input: Tensor, target: Tensor, _: Tensor) -> Results:
    loss, (grad, _, _) = gradkernels.mse_loss_and_grad(input, target)
    return [loss, grad]


def _expected(input: np.ndarray, target: np.ndarray, grad: np.ndarray) -> list[np.ndarray]:
    return [reference.forward(input, target), reference.backward(grad, input, target)[0]]


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    (n,) = shape
    size = n * dtype.itemsize
    ours, plain = gradkernels.mse_loss, functional.mse_loss
    case = partial(
        Case,
        op="mse",
        label=str(n),
        sizes={"n": n},
        dtype=dtype,
        make=draw_inputs(dtype, lambda randn: (randn(n, grad=True), randn(n), randn())),
        compile=n == 1 << 20,
    )
    yield case(
        variant="forward",
        bytes=2 * size,
        flops=3 * n,
        implementations=through_autograd(forward, ours, plain),
        reference=lambda *inputs: _expected(*inputs)[:1],
    )
    yield case(
        variant="forward + backward",
        bytes=5 * size,
        flops=5 * n,
        implementations=through_autograd(forward_backward, ours, plain),
        reference=_expected,
    )
    yield case(
        variant="loss and gradient",
        bytes=3 * size,
        flops=5 * n,
        implementations=without_autograd(_explicit, plain, (0,)),
        reference=lambda input, target, _: _expected(input, target, np.ones(())),
    )


OP = Op(
    "mse",
    ("n",),
    build,
    """
    *8 64@cpu 16@cuda 256@cuda 512@cpu 4096 *2^14 2^15@cpu 2^16@cuda 2^18 *2^20 2^22 *2^23@cpu 2^24 2^26
    *2^27@cuda 2^28@cuda 2^30@cuda
    """,
    dtypes={
        "cpu": (torch.float32, torch.float64, torch.bfloat16),
        "cuda": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    },
    sweeps={"cpu": (Sweep("n", powers(4, 1, 12), (1,)),), "cuda": (Sweep("n", powers(4, 1, 15), (1,)),)},
)


def _launch(name: str, shape: tuple[int, ...], weighted: bool = False) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        input, target = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype)
        weight = meta(*shape, dtype=dtype) if weighted else None
        arguments = (input, target, weight)
        if name == "forward":
            return module.mse_forward(*arguments, "mean", 0, dtype)
        if name == "backward":
            return module.mse_backward(meta(dtype=dtype), *arguments, "mean", 0, [True, True, weighted])
        if name == "hvp":
            directions = (None, meta(*shape, dtype=dtype), None, None)
            mask = [True, True, True, False]
            return module.mse_hvp(meta(dtype=dtype), *arguments, *directions, "mean", 0, mask)
        return module.mse_forward_backward(*arguments, "mean", [True, False, False], dtype)

    return call


AOT_CASES = (
    AotCase("mse", "forward", _launch("forward", (4096, 4096)), stores=False),
    AotCase("mse", "forward, odd size", _launch("forward", (1001 * 333,)), stores=False),
    AotCase("mse", "backward", _launch("backward", (4096, 4096))),
    AotCase("mse", "backward, odd size", _launch("backward", (1001 * 333,))),
    AotCase("mse", "backward, weighted", _launch("backward", (4096, 4096), weighted=True)),
    AotCase("mse", "Hessian-vector product", _launch("hvp", (4096, 4096))),
    AotCase("mse", "loss and gradient", _launch("both", (4096, 4096))),
)
HOST_CALLS = (HostCall("mse_loss", gradkernels.mse_loss, functional.mse_loss, ((64,), (64,))),)


def traffic_jobs() -> Iterator[Job]:
    """The loss and the input's gradient, through autograd and in one pass."""
    n = 1 << 17
    pair = randn(n), randn(n)
    eager = gradients(functional.mse_loss, *pair, wrt=(0,))
    ours = gradients(gradkernels.mse_loss, *pair, wrt=(0,))
    yield Job(f"mse, loss and backward through autograd, {n} float32", ours, eager, 4 * 5 * n, 1.01, 1.01, 3)
    ours = partial(gradkernels.mse_loss_and_grad, *pair)
    yield Job(f"mse_loss_and_grad, {n} float32", ours, eager, 4 * 3 * n, 1.01, 1.01, 2)
