"""linear_mse_loss: predictions of K outputs from N rows of D features, their squared error, its gradients.

bytes   X once (N D), target once (N K), weight and bias read and their gradients written (2 (D + 1) K), times
        the size of an element. Plain torch reads X twice and moves the predictions several times; the count
        is the same for all, so that GB/s compares.
FLOPs   2 N D K for the predictions, as many for the weight's gradient, 5 N K for the error.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.reference import linear_mse as reference
from torch import Tensor
from torch.nn import functional

from .reports.cases import AotCase, Call, HostCall, Job, gradients, meta, randn
from .throughput.case import (
    Case,
    Op,
    Results,
    Sweep,
    draw_inputs,
    dtype_name,
    forward_backward,
    powers,
    through_autograd,
    without_autograd,
)


def _plain(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    return functional.mse_loss(functional.linear(input, weight, bias), target)


def _explicit(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor, _: Tensor) -> Results:
    loss, (_, grad_weight, _, grad_bias) = gradkernels.linear_mse_loss_and_grad(input, weight, target, bias)
    return [loss, grad_weight, grad_bias]


def _expected(*inputs: np.ndarray) -> list[np.ndarray]:
    *operands, grad = inputs
    _, grad_weight, _, grad_bias, _ = reference.backward(grad, *operands)
    return [reference.forward(*operands), grad_weight, grad_bias]


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    n, d, k = shape
    case = partial(
        Case,
        op="linear_mse",
        label=f"{n} x {d}" + (f" -> {k}" if k > 1 else ""),
        sizes={"N": n, "D": d, "K": k},
        dtype=dtype,
        bytes=(n * d + n * k + 2 * (d + 1) * k) * dtype.itemsize,
        flops=4 * n * d * k + 5 * n * k,
        make=draw_inputs(
            dtype,
            lambda randn: (randn(n, d), randn(k, d, grad=True), randn(n, k), randn(k, grad=True), randn()),
        ),
        compile=n * d in (64 * 10**6, 1 << 22),
    )
    yield case(
        variant="forward + backward",
        implementations=through_autograd(forward_backward, gradkernels.linear_mse_loss, _plain),
        reference=_expected,
    )
    yield case(
        variant="loss and gradients",
        implementations=without_autograd(_explicit, _plain, (1, 3)),
        reference=lambda *inputs: _expected(*inputs[:-1], np.ones(())),
    )


OP = Op(
    "linear_mse",
    ("N", "D", "K"),
    build,
    """
    *4x2x1 *1000x16x1 1e5x64x1 *65536x64x1@cpu *1e6x64x1 1e6x256x1@cuda 2e5x512x1 *2e5x1024x1@cuda 5e4x2048x1@cpu
    1e5x2048x1@cuda 65536x4096x1@cuda 16384x16384x1@cuda 1e5x64x8@cpu *1e6x64x8@cuda 2e5x512x4@cuda 2e5x256x32@cuda
    8192x512x64@cpu 65536x1024x256@cuda 4096x1024x1024@cpu *8192x256x16@cpu *32768x1024x1024@cuda
    16384x4096x4096@cuda
    """,
    sweeps={
        device: (
            Sweep("N", powers(4, 1, n), (1, 64, 1)),
            Sweep("D", powers(4, 0, d), (few, 1, 1)),
            Sweep("K", powers(4, 0, k), (many, 64, 1)),
        )
        for device, n, d, k, few, many in (("cpu", 10, 6, 4, 4096, 4096), ("cuda", 12, 7, 5, 16384, 65536))
    },
)


def _launch(N: int, D: int, K: int) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        input, weight, target = (meta(*shape, dtype=dtype) for shape in ((N, D), (K, D), (N, K)))
        bias = meta(K, dtype=dtype)
        return module.linear_mse_forward(input, weight, target, bias, None, "mean", [True, True, True], dtype)

    return call


def _launch_backward(N: int, D: int, K: int, output_mask: list[bool]) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        error, weight = meta(N, K, dtype=dtype), meta(K, D, dtype=dtype)
        return module.linear_mse_backward(meta(dtype=dtype), error, weight, 2.0, output_mask)

    return call


_aot = partial(AotCase, "linear_mse")
AOT_CASES = (
    _aot("1 output of 256", _launch(1 << 16, 256, 1), stores=False),
    _aot("1 output of 1024", _launch(1 << 16, 1024, 1), stores=False),
    _aot("1 output of 2048", _launch(1 << 16, 2048, 1), stores=False),
    _aot("1 output of 4096", _launch(1 << 16, 4096, 1), stores=False),
    _aot("8 outputs of 256", _launch(1 << 16, 256, 8), stores=False),
    _aot("16 outputs of 512", _launch(1 << 16, 512, 16), stores=False),
    _aot("1024 outputs of 1024", _launch(1 << 14, 1024, 1024)),
    _aot("1 output of 16384", _launch(1 << 16, 16384, 1), stores=False),
    _aot("77 outputs of 333", _launch(1 << 14, 333, 77), loads=False, stores=False),
    _aot("gradient of input, 1 output", _launch_backward(1 << 16, 1024, 1, [True, False]), loads=False),
    _aot("gradient of input, 1024 outputs", _launch_backward(1 << 14, 1024, 1024, [True, False])),
    _aot("gradient of target", _launch_backward(1 << 16, 1024, 256, [False, True])),
)

HOST_CALLS = (
    HostCall("linear_mse_loss", gradkernels.linear_mse_loss, _plain, ((16, 4), (4, 4), (16, 4), (4,))),
)


def traffic_jobs() -> Iterator[Job]:
    """Yield the loss with the gradients of weight and bias.

    Few outputs read X once; with few rows for each SM the partial sums of many programs count: 3PK / N. More
    outputs read it twice, and the target, and write and read the error.
    """
    for n, d, k, dtype, twice, limit, distinct, launches in (
        (8192, 256, 1, torch.float32, False, 1.10, 1.10, 2),
        (8192, 256, 1, torch.bfloat16, False, 1.10, 1.10, 2),
        (2048, 64, 8, torch.float32, False, 1.45, 1.45, 2),
        (1024, 128, 128, torch.float32, True, None, 1.25, 4),
    ):
        inputs = [randn(*shape, dtype=dtype) for shape in ((n, d), (k, d), (n, k), (k,))]
        yield Job(
            f"linear_mse, loss and gradients of weight and bias, {n}x{d}x{k} {dtype_name(dtype)}",
            gradients(gradkernels.linear_mse_loss, *inputs, wrt=(1, 3)),
            gradients(_plain, *inputs, wrt=(1, 3)),
            dtype.itemsize * (n * d + n * k + 2 * d * k + 2 * k + twice * (n * d + 2 * n * k)),
            *(limit, distinct, launches),
        )
