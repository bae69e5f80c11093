"""matmul: B products of (M, K) by (K, N), all of their own operands.

bytes   both operands read and the result written: B (M K + K N + M N) times the size of an element; the
        backward is two more products of the same three matrices.
FLOPs   2 B M N K a product.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.reference import matmul as reference
from torch import Tensor

from .throughput.case import OURS, Case, Contender, Op, Results, Sweep, compiled, flag_gems, function, randn

CHECKED_WHOLE = 1 << 33  # FLOPs; a larger product is checked on 64 rows of each result


def _forward(product: Callable[..., Tensor], input: Tensor, other: Tensor, _: Tensor) -> Results:
    with torch.no_grad():
        return [product(input, other)]


def _forward_backward(product: Callable[..., Tensor], input: Tensor, other: Tensor, grad: Tensor) -> Results:
    value = product(input, other)
    return [value.detach(), *torch.autograd.grad(value, (input, other), grad)]


def _contenders(run: Callable[..., Results]) -> tuple[Contender, ...]:
    eager = partial(run, torch.matmul)
    return (
        function(OURS, partial(run, lambda *inputs: gradkernels.matmul(*inputs))),
        function("eager", eager),
        compiled("compile", torch.matmul, run),
        flag_gems(eager),
    )


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    b, m, k, n = shape
    batch = (b,) if b > 1 else ()
    elements, flops = b * (m * k + k * n + m * n), 2 * b * m * n * k
    whole = flops <= CHECKED_WHOLE

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        def values(*shape: int, grad: bool = False) -> Tensor:
            return randn(batch + shape, dtype, device, generator, grad)

        return values(m, k, grad=True), values(k, n, grad=True), values(m, n)

    def rows(count: int) -> np.ndarray:
        return np.arange(count) if whole else np.unique(np.linspace(0, count - 1, 64).astype(int))

    def expected(input: np.ndarray, other: np.ndarray, grad: np.ndarray) -> list[np.ndarray]:
        across, down = rows(m), rows(k)
        output = reference.forward(input[..., across, :], other)
        grad_input, _, _ = reference.backward(grad[..., across, :], input[..., across, :], other)
        _, grad_other, _ = reference.backward(grad, input[..., down], other[..., down, :])
        return [output, grad_input, grad_other]

    def pick(results: Results) -> Results:
        chosen = (rows(m), rows(m), rows(k))
        return [
            result[..., torch.from_numpy(index).to(result.device), :]
            for result, index in zip(results, chosen, strict=False)
        ]

    def forward_only(input: np.ndarray, other: np.ndarray, _: np.ndarray) -> list[np.ndarray]:
        return [reference.forward(input[..., rows(m), :], other)]

    for name, run, times, expect in (
        ("forward", _forward, 1, forward_only),
        ("forward + backward", _forward_backward, 3, expected),
    ):
        yield Case(
            "matmul",
            name,
            (f"{b} of " if b > 1 else "") + f"{m} x {k} x {n}",
            {"B": b, "M": m, "K": k, "N": n},
            dtype,
            times * elements * dtype.itemsize,
            times * flops,
            make,
            _contenders(run),
            expect,
            pick,
            compile=m == 1024,
        )


OP = Op(
    name="matmul",
    axes=("B", "M", "K", "N"),
    build=build,
    shapes={
        "cpu": (
            (1, 1, 64, 64),
            (1, 256, 2, 2),
            (1, 4096, 8, 8),
            (1, 40960, 16, 16),
            (1, 10**6, 64, 1),
            (1, 64, 10**5, 64),
            (1, 255, 257, 253),
            (10**4, 8, 8, 8),
            (64, 64, 64, 64),
            (1, 1024, 1024, 1024),
            (1, 2048, 2048, 2048),
        ),
        "cuda": (
            (1, 1, 4096, 4096),
            (1, 256, 2, 2),
            (1, 4096, 2, 2),
            (1, 40960, 2, 2),
            (1, 4096, 8, 8),
            (1, 40960, 8, 8),
            (1, 40960, 16, 16),
            (1, 40960, 32, 32),
            (1, 10**6, 64, 8),
            (1, 10**6, 64, 1),
            (1, 64, 10**6, 64),
            (1, 4096, 1, 4096),
            (5 * 10**5, 8, 8, 8),
            (1024, 64, 64, 64),
            (1, 1000, 1000, 1000),
            (1, 1024, 1024, 1024),
            (1, 4096, 4096, 4096),
            (1, 65536, 1024, 1024),
            (1, 8192, 8192, 8192),
        ),
    },
    quick={
        "cpu": (
            (1, 4096, 8, 8),
            (1, 10**6, 64, 1),
            (2048, 8, 8, 8),
            (1, 255, 257, 253),
            (1, 1024, 1024, 1024),
        ),
        "cuda": (
            (1, 40960, 2, 2),
            (1, 40960, 16, 16),
            (1, 10**6, 64, 1),
            (1, 64, 10**6, 64),
            (5 * 10**5, 8, 8, 8),
            (1, 1024, 1024, 1024),
            (1, 8192, 8192, 8192),
        ),
    },
    dtypes={
        "cpu": (torch.float32, torch.float64, torch.bfloat16),
        "cuda": (torch.float32, torch.bfloat16, torch.float16),
    },
    sweeps={
        "cpu": (
            Sweep("M", tuple(4**k for k in range(1, 10)), (1, 1, 64, 8)),
            Sweep("K", tuple(4**k for k in range(1, 9)), (1, 64, 1, 64)),
            Sweep("B", tuple(4**k for k in range(8)), (1, 8, 8, 8)),
        ),
        "cuda": (
            Sweep("M", tuple(4**k for k in range(1, 12)), (1, 1, 64, 8)),
            Sweep("K", tuple(4**k for k in range(1, 11)), (1, 64, 1, 64)),
            Sweep("B", tuple(4**k for k in range(10)), (1, 8, 8, 8)),
        ),
    },
)
