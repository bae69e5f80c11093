"""linear_mse_fit: the training loops of B linear models of D features and K outputs, each on N rows of its own.

A case is STEPS rounds of Adam with a rate per model, a clone of the parameters and a new optimizer included. Torch's
optimizer has one rate for all models.

bytes   X once (B N D), target once (B N K), weights and moments once, losses once: what a loop in one launch must move,
        if its rows come from the cache in all rounds but the first. A loop of launches moves the rows in each round.
FLOPs   each round B times 4 N D K for predictions and gradients, 5 N K for the error, 15 for each weight.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.ops import torch_linear_mse_fit
from gradkernels.reference import adam
from gradkernels.reference import linear_mse_fit as reference
from torch import Tensor

from .reports.cases import AotCase, Call, Job, meta, randn
from .throughput.case import OURS, Case, Op, Results, Sweep, draw_inputs, function, powers

STEPS = 100
LR = 0.05


Fit = Callable[..., Tensor]


def _stacked_adam(params: list[Tensor]) -> torch.optim.Optimizer:
    rates = params[0].new_full((len(params[0]),), LR)
    return gradkernels.FusedAdam(params, lr=rates, stacked=True)


def _torch_adam(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=LR, foreach=False)


def _fitted(fit: Fit, optimizer: Any, steps: int, *inputs: Tensor) -> Results:
    input, weight, target, bias = inputs
    weight, bias = (param.clone().requires_grad_() for param in (weight, bias))
    losses = fit(input, weight, target, bias, optimizer=optimizer([weight, bias]), steps=steps)
    return [losses, weight.detach(), bias.detach()]


def _loop_of_ours(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor, optimizer: torch.optim.Optimizer, steps: int
) -> Tensor:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = gradkernels.linear_mse_loss(input, weight, target, bias)
        loss.sum().backward()
        losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses)


def _expected(*inputs: np.ndarray) -> list[np.ndarray]:
    models = [
        reference.fit(*model, step=adam.step, lr=LR, steps=STEPS) for model in zip(*inputs, strict=True)
    ]
    losses = np.stack([losses for losses, _, _ in models], 1)
    return [losses, *(np.stack([params[i] for _, params, _ in models]) for i in range(2))]


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    b, n, d, k = shape
    yield Case(
        op="linear_mse_fit",
        variant=f"Adam, {STEPS} rounds",
        label=f"{b} of {n} x {d}" + (f" -> {k}" if k > 1 else ""),
        sizes={"B": b, "N": n, "D": d, "K": k},
        dtype=dtype,
        bytes=b * (n * (d + k) + 6 * (d + 1) * k + STEPS) * dtype.itemsize,
        flops=STEPS * b * (4 * n * d * k + 5 * n * k + 15 * (d + 1) * k),
        make=draw_inputs(dtype, lambda randn: (randn(b, n, d), randn(b, k, d), randn(b, n, k), randn(b, k))),
        implementations=(
            function(OURS, partial(_fitted, gradkernels.linear_mse_fit, _stacked_adam, STEPS)),
            function("eager", partial(_fitted, torch_linear_mse_fit, _torch_adam, STEPS)),
            function("loop of our ops", partial(_fitted, _loop_of_ours, _stacked_adam, STEPS)),
        ),
        reference=_expected,
        compile=shape == (1000, 100, 8, 1),
        passes=STEPS,
    )


OP = Op(
    "linear_mse_fit",
    ("B", "N", "D", "K"),
    build,
    "*1x100x8x1 *1000x100x8x1 100x442x10x1 100x64x16x4 1x1e5x16x1@cpu 1e5x100x8x1@cuda",
    dtypes={"cpu": (torch.float32, torch.float64), "cuda": (torch.float32, torch.float64)},
    sweeps={
        device: (Sweep("B", powers(4, 0, most), (1, 100, 8, 1)), Sweep("N", powers(4, 1, 6), (10, 1, 8, 1)))
        for device, most in (("cpu", 5), ("cuda", 8))
    },
)


def _launch(
    N: int,
    D: int,
    K: int,
    rule: str = "adam",
    weighted: bool = False,
    ragged: bool = False,
    **kept: bool,
) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        from gradkernels.triton.compile_only import update_of

        B, rows = (1000, 1000 * N) if ragged else (1000, N)
        own = 1 if ragged else B
        x, w, y, b = (
            meta(*shape, dtype=dtype) for shape in ((own, rows, D), (B, K, D), (own, rows, K), (B, K))
        )
        s = meta(own, rows, 1, dtype=dtype) if weighted else None
        offsets = meta(B + 1, dtype=torch.int64) if ragged else None
        losses = meta(STEPS, B, dtype=dtype)
        return module.linear_mse_fit_rounds(
            x, w, y, b, s, offsets, rows, losses, update_of(rule, [w, b], **kept)
        )

    return call


AOT_CASES = tuple(
    AotCase("linear_mse_fit", shapes, call, loads=False, stores=False)
    for shapes, call in (
        ("Adam, 8 features", _launch(100, 8, 1)),
        (
            "amsgrad, guarded, weighted, 10 x 4",
            _launch(442, 10, 4, weighted=True, guarded=True, amsgrad=True),
        ),
        ("SGD with momentum, 64 features", _launch(1000, 64, 1, "sgd")),
        ("SGD, guarded, ragged, 3 features", _launch(20, 3, 1, "sgd", ragged=True, guarded=True)),
        ("Adam, 64 x 16", _launch(200, 64, 16)),
    )
)


def traffic_jobs() -> Iterator[Job]:
    """Yield eight rounds: one launch, which reads the rows in each, but from memory once."""
    b, n, d, steps = 2, 256, 8, 8
    inputs = [randn(*shape) for shape in ((b, n, d), (b, 1, d), (b, n, 1), (b, 1))]
    yield Job(
        f"linear_mse_fit, {steps} rounds of Adam, {b} models of {n} x {d} float32",
        partial(_fitted, gradkernels.linear_mse_fit, _stacked_adam, steps, *inputs),
        partial(_fitted, torch_linear_mse_fit, _torch_adam, steps, *inputs),
        4 * b * (n * (d + 1) + 6 * (d + 1) + steps),
        limit=None,
        distinct_limit=1.1,
        launches=1,
    )
