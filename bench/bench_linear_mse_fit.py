"""linear_mse_fit: the training loop of a linear model of D features and K outputs on N rows.

A case is STEPS rounds of Adam from zero weights, a clone of the parameters and a new optimizer included.

bytes   X once (N D), target once (N K), weights and moments once, losses once: what a loop in one launch must move,
        if its rows come from the cache in all rounds but the first. A loop of launches moves the rows in each round.
FLOPs   each round 4 N D K for predictions and gradients, 5 N K for the error, 15 for each weight.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.ops import torch_linear_mse_fit
from gradkernels.reference import adam
from gradkernels.reference import linear_mse_fit as reference
from torch import Tensor

from .reports.cases import AotCase, Call, HostCall, Job, meta, randn
from .throughput.case import OURS, Case, Op, Results, Sweep, draw_inputs, function, powers

STEPS = 100
LR = 0.05


def _torch_adam(params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr, foreach=False)


def _fitted(fit: Any, optimizer: Any, steps: int, *inputs: Tensor) -> Results:
    input, weight, target, bias = inputs
    weight, bias = (param.clone().requires_grad_() for param in (weight, bias))
    losses = fit(input, weight, target, bias, optimizer=optimizer([weight, bias], lr=LR), steps=steps)
    return [losses, weight.detach(), bias.detach()]


def _ours(*inputs: Tensor) -> Results:
    return _fitted(gradkernels.linear_mse_fit, gradkernels.FusedAdam, STEPS, *inputs)


def _loop_of_ours(*inputs: Tensor) -> Results:
    def fit(
        input: Tensor, weight: Tensor, target: Tensor, bias: Tensor, optimizer: Any, steps: int
    ) -> Tensor:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = gradkernels.linear_mse_loss(input, weight, target, bias)
            loss.sum().backward()
            losses.append(loss.detach())
            optimizer.step()
        return torch.stack(losses)

    return _fitted(fit, gradkernels.FusedAdam, STEPS, *inputs)


def _eager(*inputs: Tensor) -> Results:
    return _fitted(torch_linear_mse_fit, _torch_adam, STEPS, *inputs)


def _expected(*inputs: np.ndarray) -> list[np.ndarray]:
    losses, params, _ = reference.fit(*inputs, step=adam.step, lr=LR, steps=STEPS)
    return [losses, *params]


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    n, d, k = shape
    yield Case(
        op="linear_mse_fit",
        variant=f"Adam, {STEPS} rounds",
        label=f"{n} x {d}" + (f" -> {k}" if k > 1 else ""),
        sizes={"N": n, "D": d, "K": k},
        dtype=dtype,
        bytes=(n * (d + k) + 6 * (d + 1) * k + STEPS) * dtype.itemsize,
        flops=STEPS * (4 * n * d * k + 5 * n * k + 15 * (d + 1) * k),
        make=draw_inputs(dtype, lambda randn: (randn(n, d), randn(k, d), randn(n, k), randn(k))),
        implementations=(
            function(OURS, _ours),
            function("eager", _eager),
            function("loop of our ops", _loop_of_ours),
        ),
        reference=_expected,
        compile=(n, d, k) == (1000, 8, 1),
    )


OP = Op(
    "linear_mse_fit",
    ("N", "D", "K"),
    build,
    "*100x8x1 *1000x8x1 1000x64x1 442x10x4 1e5x16x1@cpu",
    dtypes={"cpu": (torch.float32, torch.float64), "cuda": (torch.float32, torch.float64)},
    sweeps={
        device: (Sweep("N", powers(4, 1, 7), (1, 8, 1)), Sweep("D", powers(4, 0, 3), (256, 1, 1)))
        for device in ("cpu", "cuda")
    },
)


def _launch(
    N: int, D: int, K: int, rule: str = "adam", weighted: bool = False, guarded: bool = False, **kept: bool
) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        from gradkernels.triton.compile_only import update_of

        x, w, y, b = (meta(*shape, dtype=dtype) for shape in ((1, N, D), (1, K, D), (1, N, K), (1, K)))
        s = meta(1, N, 1, dtype=dtype) if weighted else None
        return module.linear_mse_fit_rounds(
            x, w, y, b, s, N, meta(STEPS, 1, dtype=dtype), update_of(rule, [w, b], guarded, **kept)
        )

    return call


AOT_CASES = (
    AotCase("linear_mse_fit", "Adam, 8 features", _launch(100, 8, 1), loads=False, stores=False),
    AotCase(
        "linear_mse_fit",
        "amsgrad, guarded, weighted, 10 x 4",
        _launch(442, 10, 4, weighted=True, guarded=True, amsgrad=True),
        loads=False,
        stores=False,
    ),
    AotCase(
        "linear_mse_fit", "SGD with momentum, 64", _launch(1000, 64, 1, "sgd"), loads=False, stores=False
    ),
    AotCase("linear_mse_fit", "Adam, 64 x 16", _launch(200, 64, 16), loads=False, stores=False),
)
HOST_CALLS: tuple[HostCall, ...] = ()


def traffic_jobs() -> Iterator[Job]:
    """Eight rounds: one launch, which reads the rows in each, but from memory once."""
    n, d, steps = 256, 8, 8
    inputs = [randn(*shape) for shape in ((n, d), (1, d), (n, 1), (1,))]
    yield Job(
        f"linear_mse_fit, {steps} rounds of Adam, {n} x {d} float32",
        partial(_fitted, gradkernels.linear_mse_fit, gradkernels.FusedAdam, steps, *inputs),
        partial(_fitted, torch_linear_mse_fit, _torch_adam, steps, *inputs),
        4 * (n * (d + 1) + 6 * (d + 1) + steps),
        limit=None,
        distinct_limit=1.1,
        launches=1,
    )
