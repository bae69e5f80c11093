"""mse_loss on n elements.

bytes   forward: 2 n read. Forward + backward through autograd: 2 n read, then 2 n read and n written.
        Loss and gradient in one pass: 2 n read, n written. (times the size of an element)
        "per sample" is the loss of diffusion models: a mean for each of SAMPLES samples, weighted outside, against a
        target of at least float32.
FLOPs   a subtraction, a multiplication and an addition per element; the gradient costs two more.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.ops import torch_mse_loss
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


SAMPLES = 64


def _per_sample(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (gradkernels.mse_loss(input, target, dim=1) * weight).mean()


def _as_written_today(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    losses = functional.mse_loss(input.to(target.dtype), target, reduction="none")
    return (losses * weight[:, None]).mean(dim=1).mean()


def _per_sample_expected(
    input: np.ndarray, target: np.ndarray, weight: np.ndarray, grad: np.ndarray
) -> list[np.ndarray]:
    loss = (reference.forward(input, target, dim=1) * weight).mean()
    upstream = grad * weight / len(weight)
    return [np.asarray(loss), reference.backward(upstream, input, target, dim=1)[0]]


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
    if n % SAMPLES or n < SAMPLES**2:
        return
    rows, wide = (SAMPLES, n // SAMPLES), torch.promote_types(dtype, torch.float32)
    samples = partial(
        case,
        make=draw_inputs(
            dtype,
            lambda randn: (
                randn(*rows, grad=True),
                randn(*rows).to(wide),
                randn(SAMPLES).to(wide).abs(),
                randn().to(wide),
            ),
        ),
    )
    size += n * wide.itemsize
    yield samples(
        variant="per sample, forward",
        bytes=size,
        flops=3 * n,
        implementations=through_autograd(forward, _per_sample, _as_written_today),
        reference=lambda *inputs: _per_sample_expected(*inputs)[:1],
    )
    yield samples(
        variant="per sample, forward + backward",
        bytes=2 * size + n * dtype.itemsize,
        flops=5 * n,
        implementations=through_autograd(forward_backward, _per_sample, _as_written_today),
        reference=_per_sample_expected,
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
        return module.mse_forward_backward(*arguments, None, "mean", [True, False, False], dtype)

    return call


def _kept(name: str, shape: tuple[int, ...], order: tuple[int, ...], batch_dims: int) -> Call:
    """Yield the sums over all but the first dimensions of a permuted tensor, of a float32 target and weight."""

    def call(module: Any, dtype: torch.dtype) -> object:
        wide = torch.promote_types(dtype, torch.float32)
        input, target = (meta(*shape, dtype=each).permute(order) for each in (dtype, wide))
        if name == "forward":
            return module.mse_forward(input, target, None, "mean", batch_dims, wide)
        weight = meta(*input.shape[:batch_dims], *(1 for _ in shape[batch_dims:]), dtype=wide)
        upstream = meta(*input.shape[:batch_dims], dtype=wide)
        return module.mse_backward(upstream, input, target, weight, "sum", batch_dims, [True, False, True])

    return call


_aot = partial(AotCase, "mse")
AOT_CASES = (
    _aot("forward", _launch("forward", (4096, 4096)), stores=False),
    _aot("forward, odd size", _launch("forward", (1001 * 333,)), stores=False),
    _aot("backward", _launch("backward", (4096, 4096))),
    _aot("backward, odd size", _launch("backward", (1001 * 333,))),
    _aot("backward, weighted", _launch("backward", (4096, 4096), weighted=True)),
    _aot("Hessian-vector product", _launch("hvp", (4096, 4096))),
    _aot("loss and gradient", _launch("both", (4096, 4096))),
    _aot("mean per sample", _kept("forward", (64, 4096, 4), (0, 1, 2), 1), stores=False),
    _aot("mean of each column", _kept("forward", (4096, 1024), (1, 0), 1), stores=False),
    _aot("mean of each short row", _kept("forward", (65536, 16), (0, 1), 1), stores=False),
    _aot("backward, weight per column", _kept("backward", (4096, 1024), (1, 0), 1)),
    _aot("backward, weight per sample", _kept("backward", (64, 4096, 4), (0, 1, 2), 1)),
)
HOST_CALLS = (HostCall("mse_loss", gradkernels.mse_loss, functional.mse_loss, ((64,), (64,))),)


def traffic_jobs() -> Iterator[Job]:
    """Yield the loss and the input's gradient, through autograd and in one pass; and as trainers write it."""
    n = 1 << 17
    pair = randn(n), randn(n)
    eager = gradients(functional.mse_loss, *pair, wrt=(0,))
    ours = gradients(gradkernels.mse_loss, *pair, wrt=(0,))
    yield Job(f"mse, loss and backward through autograd, {n} float32", ours, eager, 4 * 5 * n, 1.01, 1.01, 3)
    ours = partial(gradkernels.mse_loss_and_grad, *pair)
    yield Job(f"mse_loss_and_grad, {n} float32", ours, eager, 4 * 3 * n, 1.01, 1.01, 2)
    weights = torch.rand(n)
    eager = gradients(partial(functional.mse_loss, weight=weights), *pair, wrt=(0,))
    ours = partial(
        gradkernels.mse_loss_and_grad, *pair, weight=weights
    )  # reads the weights for their sum, too
    yield Job(f"mse_loss_and_grad, {n} float32, weighted mean", ours, eager, 4 * 4 * n, 1.26, 1.26, 4)
    shape = (8, 3, 64, 80)
    n = math.prod(shape)
    mixed = randn(*shape, dtype=torch.bfloat16), randn(*shape)
    weight = randn(8, 1, 1, 1).abs()
    for name, dims, given, wrt, limit, launches in (
        ("mean per sample", (1, 2, 3), (), (0,), (1.001, 1.001), (2, 3)),
        ("mean of each pixel", (0, 1), (), (0,), (1.05, 1.05), (1, 2)),
        ("weight per sample", None, (weight,), (0,), (1.005, 1.005), (2, 3)),
        ("weight per sample and its gradient", None, (weight,), (0, 2), (1.005, 1.005), (2, 4)),
    ):
        ours, eager = (partial(_total, function, dims) for function in (gradkernels.mse_loss, torch_mse_loss))
        forward_only = torch.no_grad()(partial(ours, *mixed, *given))
        what = f"{name}, {'x'.join(map(str, shape))} bfloat16 against float32"
        yield Job(
            f"mse, {what}",
            forward_only,
            partial(eager, *mixed, *given),
            6 * n,
            limit[0],
            limit[0],
            launches[0],
        )
        if dims is None:
            names = {"wrt": ("input", "weight") if 2 in wrt else ("input",), "weight": weight}
            yield Job(
                f"mse_loss_and_grad, {what}",
                partial(gradkernels.mse_loss_and_grad, *mixed, **names),
                gradients(eager, *mixed, *given, wrt=wrt, dtype=torch.float32),
                8 * n,
                *limit,
                2,
            )
        yield Job(
            f"mse, {what}, loss and backward",
            gradients(ours, *mixed, *given, wrt=wrt, dtype=torch.float32),
            gradients(eager, *mixed, *given, wrt=wrt, dtype=torch.float32),
            14 * n,
            limit[1],
            limit[1],
            launches[1],
        )


def _total(function: Any, dims: Any, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    return function(input, target, weight=weight, dim=dims).sum()
