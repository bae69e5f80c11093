"""linear_mse_loss: predictions of K outputs from N rows of D features, their squared error, its gradients.

bytes   X once (N D), target once (N K), weight and bias read and their gradients written (2 (D + 1) K), times
        the size of an element. Plain torch reads X twice and moves the predictions several times; the count
        is the same for all, so that GB/s compares.
FLOPs   2 N D K for the predictions, as many for the weight's gradient, 5 N K for the error.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.reference import linear_mse as reference
from torch import Tensor
from torch.nn import functional

from .throughput.case import OURS, Case, Contender, Op, Results, Sweep, compiled, function, randn


def _plain(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    return functional.mse_loss(functional.linear(input, weight, bias), target)


def _forward_backward(
    loss: Callable[..., Tensor], input: Tensor, weight: Tensor, target: Tensor, bias: Tensor, grad: Tensor
) -> Results:
    value = loss(input, weight, target, bias)
    return [value.detach(), *torch.autograd.grad(value, (weight, bias), grad)]


def _explicit(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor, _: Tensor) -> Results:
    loss, (_, grad_weight, _, grad_bias) = gradkernels.linear_mse_loss_and_grad(input, weight, target, bias)
    return [loss, grad_weight, grad_bias]


def _grad_and_value(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (grad_weight, grad_bias), value = torch.func.grad_and_value(_plain, argnums=(1, 3))(
        input, weight, target, bias
    )
    return value, grad_weight, grad_bias


def _eager_explicit(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor, _: Tensor) -> Results:
    return _forward_backward(_plain, input, weight, target, bias, input.new_ones(()))


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    n, d, k = shape

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        def values(*shape: int, grad: bool = False) -> Tensor:
            return randn(shape, dtype, device, generator, grad)

        return values(n, d), values(k, d, grad=True), values(n, k), values(k, grad=True), values()

    def expected(
        input: np.ndarray, weight: np.ndarray, target: np.ndarray, bias: np.ndarray, grad: np.ndarray
    ) -> list[np.ndarray]:
        _, grad_weight, _, grad_bias, _ = reference.backward(grad, input, weight, target, bias)
        return [reference.forward(input, weight, target, bias), grad_weight, grad_bias]

    def variant(
        name: str, contenders: tuple[Contender, ...], expect: Callable[..., list[np.ndarray]]
    ) -> Case:
        return Case(
            "linear_mse",
            name,
            f"{n} x {d}" + (f" -> {k}" if k > 1 else ""),
            {"N": n, "D": d, "K": k},
            dtype,
            (n * d + n * k + 2 * (d + 1) * k) * dtype.itemsize,
            4 * n * d * k + 5 * n * k,
            make,
            contenders,
            expect,
            compile=n * d in (64 * 10**6, 1 << 22),
        )

    yield variant(
        "forward + backward",
        (
            function(OURS, partial(_forward_backward, lambda *inputs: gradkernels.linear_mse_loss(*inputs))),
            function("eager", partial(_forward_backward, _plain)),
            compiled("compile", _plain, _forward_backward),
        ),
        expected,
    )
    yield variant(
        "loss and gradients",
        (
            function(OURS, _explicit),
            function("eager", _eager_explicit),
            compiled(
                "compile",
                _grad_and_value,
                lambda run, *inputs: run(*(each.detach() for each in inputs[:-1])),
                {"coordinate_descent_tuning": True},
            ),
        ),
        lambda *inputs: expected(*inputs[:-1], np.ones(())),
    )


OP = Op(
    name="linear_mse",
    axes=("N", "D", "K"),
    build=build,
    shapes={
        "cpu": (
            (4, 2, 1),
            (1000, 16, 1),
            (10**5, 64, 1),
            (10**6, 64, 1),
            (2 * 10**5, 512, 1),
            (5 * 10**4, 2048, 1),
            (10**5, 64, 8),
            (8192, 512, 64),
            (4096, 1024, 1024),
        ),
        "cuda": (
            (4, 2, 1),
            (1000, 16, 1),
            (10**5, 64, 1),
            (10**6, 64, 1),
            (10**6, 256, 1),
            (2 * 10**5, 512, 1),
            (2 * 10**5, 1024, 1),
            (10**5, 2048, 1),
            (65536, 4096, 1),
            (16384, 16384, 1),
            (10**6, 64, 8),
            (2 * 10**5, 512, 4),
            (2 * 10**5, 256, 32),
            (65536, 1024, 256),
            (32768, 1024, 1024),
            (16384, 4096, 4096),
        ),
    },
    quick={
        "cpu": ((4, 2, 1), (1000, 16, 1), (65536, 64, 1), (10**6, 64, 1), (8192, 256, 16)),
        "cuda": (
            (4, 2, 1),
            (1000, 16, 1),
            (10**6, 64, 1),
            (2 * 10**5, 1024, 1),
            (10**6, 64, 8),
            (32768, 1024, 1024),
        ),
    },
    dtypes={
        "cpu": (torch.float32, torch.float64, torch.bfloat16),
        "cuda": (torch.float32, torch.bfloat16, torch.float16),
    },
    sweeps={
        "cpu": (
            Sweep("N", tuple(4**k for k in range(1, 11)), (1, 64, 1)),
            Sweep("D", tuple(4**k for k in range(7)), (4096, 1, 1)),
            Sweep("K", tuple(4**k for k in range(5)), (4096, 64, 1)),
        ),
        "cuda": (
            Sweep("N", tuple(4**k for k in range(1, 13)), (1, 64, 1)),
            Sweep("D", tuple(4**k for k in range(8)), (16384, 1, 1)),
            Sweep("K", tuple(4**k for k in range(6)), (65536, 64, 1)),
        ),
    },
)
