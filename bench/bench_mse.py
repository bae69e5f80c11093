"""mse_loss on n elements.

bytes   forward: 2 n read. Forward + backward through autograd: 2 n read, then 2 n read and n written.
        Loss and gradient in one pass: 2 n read, n written. (times the size of an element)
FLOPs   a subtraction, a multiplication and an addition per element; the gradient costs two more.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.reference import mse as reference
from torch import Tensor
from torch.nn import functional

from .throughput.case import OURS, Case, Contender, Op, Results, Sweep, compiled, flag_gems, function, randn


def _forward(loss: Callable[..., Tensor], input: Tensor, target: Tensor, _: Tensor) -> Results:
    with torch.no_grad():
        return [loss(input, target)]


def _forward_backward(loss: Callable[..., Tensor], input: Tensor, target: Tensor, grad: Tensor) -> Results:
    value = loss(input, target)
    return [value.detach(), *torch.autograd.grad(value, (input,), grad)]


def _explicit(input: Tensor, target: Tensor, _: Tensor) -> Results:
    loss, (grad_input, _, _) = gradkernels.mse_loss_and_grad(input, target)
    return [loss, grad_input]


def _grad_and_value(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    grad, value = torch.func.grad_and_value(functional.mse_loss)(input, target)
    return value, grad


def _eager_explicit(input: Tensor, target: Tensor, _: Tensor) -> Results:
    return _forward_backward(functional.mse_loss, input, target, input.new_ones(()))


def _contenders(run: Callable[..., Results]) -> tuple[Contender, ...]:
    eager = partial(run, functional.mse_loss)
    return (
        function(OURS, partial(run, lambda *inputs: gradkernels.mse_loss(*inputs))),
        function("eager", eager),
        compiled("compile", functional.mse_loss, run),
        flag_gems(eager),
    )


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    (n,) = shape

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        input, target = (randn((n,), dtype, device, generator, grad) for grad in (True, False))
        return input, target, randn((), dtype, device, generator)

    def expected(input: np.ndarray, target: np.ndarray, grad: np.ndarray) -> list[np.ndarray]:
        return [reference.forward(input, target), reference.backward(grad, input, target)[0]]

    def variant(
        name: str,
        elements: int,
        operations: int,
        contenders: tuple[Contender, ...],
        expect: Callable[..., list[np.ndarray]],
    ) -> Case:
        return Case(
            "mse",
            name,
            f"{n}",
            {"n": n},
            dtype,
            elements * n * dtype.itemsize,
            operations * n,
            make,
            contenders,
            expect,
            compile=n == 1 << 20,
        )

    yield variant("forward", 2, 3, _contenders(_forward), lambda *inputs: expected(*inputs)[:1])
    yield variant("forward + backward", 5, 5, _contenders(_forward_backward), expected)
    yield variant(
        "loss and gradient",
        3,
        5,
        (
            function(OURS, _explicit),
            function("eager", _eager_explicit),
            compiled(
                "compile",
                _grad_and_value,
                lambda run, input, target, _: run(input.detach(), target),
                {"coordinate_descent_tuning": True},
            ),
        ),
        lambda input, target, _: expected(input, target, np.ones(())),
    )


OP = Op(
    name="mse",
    axes=("n",),
    build=build,
    shapes={
        "cpu": tuple((1 << k,) for k in (3, 6, 9, 12, 15, 18, 20, 22, 24, 26)),
        "cuda": tuple((1 << k,) for k in (4, 8, 12, 16, 18, 20, 22, 24, 26, 28, 30)),
    },
    quick={
        "cpu": ((8,), (1 << 14,), (1 << 20,), (1 << 23,)),
        "cuda": ((8,), (1 << 14,), (1 << 20,), (1 << 27,)),
    },
    dtypes={
        "cpu": (torch.float32, torch.float64, torch.bfloat16),
        "cuda": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    },
    sweeps={
        "cpu": (Sweep("n", tuple(4**k for k in range(1, 13)), (1,)),),
        "cuda": (Sweep("n", tuple(4**k for k in range(1, 16)), (1,)),),
    },
)
