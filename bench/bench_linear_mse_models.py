"""linear_mse_loss of B models in one call: K outputs from D features of N rows of their own, shared, or ragged.

bytes   X once (B N D; shared N D), target once (B N K), weights read and their gradients written (2 B K D), losses
        written (B), times the size of an element; the count is the same for all, so that GB/s compares.
FLOPs   2 B N K D for the predictions, as many for the weights' gradients, 5 B N K for the errors.

``bmm`` is what one writes by hand: a batched product, the errors, their squares, a batched product for the gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.reference import linear_mse_models as reference
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn import functional

from .reports.cases import AotCase, Call, HostCall, Job, meta, randn
from .throughput.case import Case, Implementation, Op, Results, Sweep, compiled, dtype_name, function, powers

LOOPED = 1000  # models; a loop over more is not timed


def _ours(input: Tensor, weight: Tensor, target: Tensor, offsets: Tensor | None) -> Results:
    loss, (_, grad, _, _) = gradkernels.linear_mse_loss_and_grad(input, weight, target, offsets=offsets)
    return [loss, grad]


def _bmm(input: Tensor, weight: Tensor, target: Tensor, _: None) -> Results:
    error = torch.matmul(input, weight.mT) - target
    return [error.square().mean((1, 2)), torch.matmul(error.mT, input) * (2 / error[0].numel())]


def _one(weight: Tensor, input: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(functional.linear(input, weight), target)


def _vmap(input: Tensor, weight: Tensor, target: Tensor, _: None) -> Results:
    in_dims = (0, 0 if input.dim() == 3 else None, 0)
    grads, losses = vmap(grad_and_value(_one), in_dims)(weight, input, target)
    return [losses, grads]


def _loop(input: Tensor, weight: Tensor, target: Tensor, offsets: Tensor | None) -> Results:
    if offsets is not None:
        cuts = offsets.tolist()
        rows: Sequence[Any] = [(input[start:end], target[start:end]) for start, end in pairwise(cuts)]
    else:
        own = input if input.dim() == 3 else input.expand(len(weight), *input.shape)
        rows = list(zip(own, target, strict=True))
    found = [grad_and_value(_one)(w, x, y) for w, (x, y) in zip(weight, rows, strict=True)]
    return [torch.stack([loss for _, loss in found]), torch.stack([grad for grad, _ in found])]


def _expected(
    input: np.ndarray, weight: np.ndarray, target: np.ndarray, offsets: np.ndarray | None
) -> list[np.ndarray]:
    offsets = None if offsets is None else offsets.astype(np.int64)
    operands = {"input": input, "weight": weight, "target": target, "offsets": offsets}
    return [reference.forward(**operands), reference.backward(np.ones(len(weight)), **operands)[1]]


def _make(
    layout: str, b: int, n: int, d: int, k: int, dtype: torch.dtype
) -> Callable[[torch.device, torch.Generator], tuple[Any, ...]]:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        weight = draw(b, k, d)
        if layout == "ragged":  # from no rows at all to twice as many as on average
            cuts = torch.rand(b, device=device, generator=generator).cumsum(0)
            offsets = functional.pad((cuts * (b * n / cuts[-1])).long(), (1, 0))
            return draw(b * n, d), weight, draw(b * n, k), offsets
        return draw(*((b, n, d) if layout == "own" else (n, d))), weight, draw(b, n, k), None

    return make


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    b, n, d, k = shape
    for layout in ("own", "shared", "ragged"):
        loop = Implementation(
            "loop", function("", _loop).prepare, absent="" if b <= LOOPED else f"more than {LOOPED} models"
        )
        batched = (function("bmm", _bmm), function("vmap", _vmap), compiled("compile", _bmm))
        yield Case(
            op="linear_mse_models",
            variant=f"loss and gradients, {layout}",
            label=f"{b} x {n} x {d}" + (f" -> {k}" if k > 1 else ""),
            sizes={"B": b, "N": n, "D": d, "K": k},
            dtype=dtype,
            bytes=((1 if layout == "shared" else b) * n * d + b * n * k + 2 * b * k * d + b) * dtype.itemsize,
            flops=4 * b * n * k * d + 5 * b * n * k,
            make=_make(layout, b, n, d, k, dtype),
            implementations=(function("gradkernels", _ours), *([] if layout == "ragged" else batched), loop),
            reference=_expected,
            compile=b == 1000,
        )


OP = Op(
    "linear_mse_models",
    ("B", "N", "D", "K"),
    build,
    """
    10x100000x8x1 100x10000x8x1 *1000x100x8x1 10000x100x8x1 100000x100x8x1@cuda 1000000x100x8x1@cuda
    1000x1000x64x1@cuda *1000x1000x32x4@cuda 100x1000x256x16
    """,
    sweeps={
        "cpu": (Sweep("B", powers(4, 1, 6), (1, 100, 8, 1)),),
        "cuda": (Sweep("B", powers(4, 1, 10), (1, 100, 8, 1)),),
    },
)


def _launch(layout: str, B: int, N: int, D: int, K: int) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        rows = (B, N) if layout == "own" else (N,)
        input, weight = meta(*rows, D, dtype=dtype), meta(B, K, D, dtype=dtype)
        target = meta(*((N,) if layout == "ragged" else (B, N)), K, dtype=dtype)
        bias = meta(B, K, dtype=dtype)
        bounds = meta(B + 1, dtype=torch.int64).unfold(0, 2, 1) if layout == "ragged" else None
        output_mask = [False, True, True]
        return module.linear_mse_models_forward(
            input, weight, target, bias, None, bounds, "mean", output_mask, dtype
        )

    return call


def _launch_product(R: int, B: int, K: int, D: int) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        bounds = meta(B + 1, dtype=torch.int64).unfold(0, 2, 1)
        return module.linear_mse_models_product(
            meta(R, D, dtype=dtype), meta(B, K, D, dtype=dtype), bounds, dtype
        )

    return call


AOT_CASES = (
    AotCase("linear_mse_models", "1,000 models of 100 x 8", _launch("own", 1000, 100, 8, 1), stores=False),
    AotCase(
        "linear_mse_models", "10 models of 100,000 x 64", _launch("own", 10, 100_000, 64, 1), stores=False
    ),
    AotCase(
        "linear_mse_models",
        "4 outputs of 256, ragged",
        _launch("ragged", 1000, 1 << 18, 256, 4),
        stores=False,
    ),
    AotCase(
        "linear_mse_models",
        "1,000 models of shared rows",
        _launch("shared", 1000, 1 << 14, 64, 1),
        stores=False,
    ),
    AotCase(
        "linear_mse_models",
        "32 outputs of 128, ragged",
        _launch("ragged", 100, 1 << 18, 128, 32),
        stores=False,
    ),
    AotCase("linear_mse_models", "ragged product", _launch_product(1 << 18, 100, 64, 64), stores=False),
)

HOST_CALLS: tuple[HostCall, ...] = ()


def traffic_jobs() -> Iterator[Job]:
    """The losses with the gradients of weights: rows are read once, however many models there are.

    Where the models share them, a program reads them for 128 models at once; each reads the weights.
    """
    b, n, d = 20, 512, 8
    weight, target = randn(b, 1, d), randn(b * n, 1)
    bounds = torch.sort(torch.randint(0, b * n + 1, (b + 1,), generator=torch.Generator().manual_seed(0)))[0]
    bounds[0], bounds[-1] = 0, b * n
    for layout, rows, y, offsets, launches in (
        ("own", randn(b, n, d), target.view(b, n, 1), None, 2),
        ("ragged", randn(b * n, d), target, bounds, 2),
        ("shared", randn(n, d), target.view(b, n, 1), None, 2),
    ):
        own = rows if layout == "shared" else rows.view(b, n, d)
        yield Job(
            f"linear_mse_models, losses and gradients of weights, {layout}, {b}x{n}x{d} {dtype_name(y.dtype)}",
            partial(_ours, rows, weight, y, offsets),
            partial(_bmm, own, weight, y.view(b, n, 1), None),
            4 * (rows.numel() + b * n + 2 * b * d + b),
            1.10,
            1.10,
            launches,
        )
