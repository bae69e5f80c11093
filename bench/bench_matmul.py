"""matmul: B products of (M, K) by (K, N), all of their own operands.

bytes   both operands read and the result written: B (M K + K N + M N) times the size of an element; the
        backward is two more products of the same three matrices.
FLOPs   2 B M N K a product.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.reference import matmul as reference
from torch import Tensor
from torch.nn import functional

from .reports.cases import BFLOAT16, FLOAT32, AotCase, Call, HostCall, Job, meta, randn
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
)

CHECKED_WHOLE = 1 << 33  # FLOPs; a larger product is checked on 64 rows of each result


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    b, m, k, n = shape
    batch = (b,) if b > 1 else ()
    elements, flops = b * (m * k + k * n + m * n), 2 * b * m * n * k
    whole = flops <= CHECKED_WHOLE

    def draw(randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        return randn(*batch, m, k, grad=True), randn(*batch, k, n, grad=True), randn(*batch, m, n)

    def rows(count: int) -> np.ndarray:
        return np.arange(count) if whole else np.unique(np.linspace(0, count - 1, 64).astype(int))

    def forward_only(input: np.ndarray, other: np.ndarray, _: np.ndarray) -> list[np.ndarray]:
        return [reference.forward(input[..., rows(m), :], other)]

    def expected(input: np.ndarray, other: np.ndarray, grad: np.ndarray) -> list[np.ndarray]:
        across, down = rows(m), rows(k)
        grad_input, _, _ = reference.backward(grad[..., across, :], input[..., across, :], other)
        _, grad_other, _ = reference.backward(grad, input[..., down], other[..., down, :])
        return [*forward_only(input, other, grad), grad_input, grad_other]

    def pick(results: Results) -> Results:
        chosen = (torch.from_numpy(rows(count)) for count in (m, m, k))
        return [
            result[..., index.to(result.device), :] for result, index in zip(results, chosen, strict=False)
        ]

    for name, run, times, expect in (
        ("forward", forward, 1, forward_only),
        ("forward + backward", forward_backward, 3, expected),
    ):
        yield Case(
            op="matmul",
            variant=name,
            label=(f"{b} of " if b > 1 else "") + f"{m} x {k} x {n}",
            sizes={"B": b, "M": m, "K": k, "N": n},
            dtype=dtype,
            bytes=times * elements * dtype.itemsize,
            flops=times * flops,
            make=draw_inputs(dtype, draw),
            implementations=through_autograd(run, gradkernels.matmul, torch.matmul),
            reference=expect,
            pick=pick,
            compile=m == 1024,
        )


OP = Op(
    "matmul",
    ("B", "M", "K", "N"),
    build,
    """
    1x1x64x64@cpu 1x1x4096x4096@cuda 1x256x2x2 1x4096x2x2@cuda *1x40960x2x2@cuda *1x4096x8x8@cpu 1x4096x8x8@cuda
    1x40960x8x8@cuda 1x40960x16x16@cpu *1x40960x16x16@cuda 1x40960x32x32@cuda 1x1e6x64x8@cuda *1x1e6x64x1
    1x64x1e5x64@cpu *1x64x1e6x64@cuda 1x4096x1x4096@cuda *2048x8x8x8@cpu 10000x8x8x8@cpu *5e5x8x8x8@cuda
    64x64x64x64@cpu 1024x64x64x64@cuda *1x255x257x253@cpu 1x1000x1000x1000@cuda *1x1024x1024x1024
    1x2048x2048x2048@cpu 1x4096x4096x4096@cuda 1x65536x1024x1024@cuda *1x8192x8192x8192@cuda
    """,
    sweeps={
        device: (
            Sweep("M", powers(4, 1, m), (1, 1, 64, 8)),
            Sweep("K", powers(4, 1, k), (1, 64, 1, 64)),
            Sweep("B", powers(4, 0, b), (1, 8, 8, 8)),
        )
        for device, m, k, b in (("cpu", 9, 8, 7), ("cuda", 11, 10, 9))
    },
)


def _product(
    left: tuple[int, ...],
    right: tuple[int, ...],
    bias: tuple[int, ...] | None = None,
    sum_dims: Sequence[int] = (),
    transposed: str = "",
    wide: bool = False,
) -> Call:
    """Make the call of a product; with ``wide`` its left operand is float32 whatever the dtype."""

    def call(module: Any, dtype: torch.dtype) -> object:
        operands = [meta(*left, dtype=FLOAT32 if wide else dtype), meta(*right, dtype=dtype)]
        if transposed:
            which = ("left", "right").index(transposed)
            operands[which] = operands[which].mT.contiguous().mT
        extra = None if bias is None else meta(*bias, dtype=dtype)
        return module.matmul_forward(*operands, extra, list(sum_dims), dtype)

    return call


FLOAT32_ERRORS = _product((65536, 512), (512, 1024), wide=True)
FLOAT32_ERRORS_BY_DATA = _product((512, 65536), (65536, 1024), transposed="left", wide=True)
_aot = partial(AotCase, "matmul")
AOT_CASES = (
    _aot("large", _product((4096, 4096), (4096, 4096))),
    _aot("linear", _product((4096, 1024), (1024, 4096), (4096,), transposed="right")),
    _aot("gradient of input, bias", _product((4096, 1024), (1024, 4096), (4096,))),
    _aot("gradient of weight", _product((1024, 65536), (65536, 512), transposed="left")),
    _aot("odd sizes", _product((1001, 333), (333, 777), (777,)), loads=False, stores=False),
    _aot("many of 512 by 64 by 512", _product((64, 512, 64), (64, 64, 512))),
    _aot("sum over the batch", _product((8, 1, 512, 64), (8, 4, 64, 512), sum_dims=[0])),
    _aot("tall data", _product((16, 1 << 20), (1 << 20, 8), transposed="left"), stores=False),
    _aot("matrix by column", _product((4096, 4096), (4096, 1)), stores=False),
    _aot("row by matrix", _product((1, 4096), (4096, 4096)), stores=False),
    _aot("dot product", _product((1, 1 << 20), (1 << 20, 1)), stores=False),
    _aot("float32 errors by weights", FLOAT32_ERRORS, dtypes=(BFLOAT16,)),
    _aot("float32 errors by data", FLOAT32_ERRORS_BY_DATA, dtypes=(BFLOAT16,)),
    _aot("outer product", _product((4096, 1), (1, 4096)), loads=False),
    _aot("tall and skinny", _product((1 << 20, 8), (8, 4), (4,)), loads=False, stores=False),
    _aot("many of 8 by 8", _product((1 << 16, 8, 8), (1 << 16, 8, 8)), loads=False, stores=False),
)
HOST_CALLS = (
    HostCall("matmul", gradkernels.matmul, torch.matmul, ((16, 4), (4, 4))),
    HostCall("linear", gradkernels.linear, functional.linear, ((16, 4), (4, 4), (4,))),
)


def traffic_jobs() -> Iterator[Job]:
    """Yield tall data and a square product."""
    for m, k, n, limit in ((4096, 16, 8, 1.20), (256, 256, 256, None)):
        pair = randn(m, k), randn(k, n)
        ours, eager = partial(gradkernels.matmul, *pair), partial(torch.matmul, *pair)
        minimum = 4 * (m * k + k * n + m * n)
        yield Job(f"matmul, {m}x{k} @ {k}x{n} float32", ours, eager, minimum, limit, 1.01, 1)
