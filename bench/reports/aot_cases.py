"""The calls that represent each op in the compile report: one for each class of shapes.

Each calls an op's own launchers, on tensors without memory (torch's meta device); the optimizers, whose
tables hold addresses, on small ones of the CPU. Nothing is launched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Any, torch.dtype], object]  # takes the module of the op and a dtype
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class AotCase:
    """One representative call.

    Attributes:
        op: the module under ``kernels/triton``.
        shapes: the class of shapes it stands for.
        call: makes the call, given the module and a dtype.
        loads, stores: whether the first kernel of the call has large operands and results whose shapes and
            addresses allow 128 bits at a time.
        dtypes: that it is compiled for.
    """

    op: str
    shapes: str
    call: Call
    loads: bool = True
    stores: bool = True
    dtypes: tuple[torch.dtype, ...] = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _matmul(
    left: tuple[int, ...],
    right: tuple[int, ...],
    bias: tuple[int, ...] | None = None,
    sum_dims: Sequence[int] = (),
    transposed: str = "",
    wide: bool = False,
) -> Call:
    """Make the call of a product; with ``wide`` its left operand is float32 whatever the dtype."""

    def call(module: Any, dtype: torch.dtype) -> object:
        operands = [_meta(*left, dtype=FLOAT32 if wide else dtype), _meta(*right, dtype=dtype)]
        if transposed:
            which = ("left", "right").index(transposed)
            operands[which] = operands[which].mT.contiguous().mT
        extra = None if bias is None else _meta(*bias, dtype=dtype)
        return module.matmul_forward(*operands, extra, list(sum_dims), dtype)

    return call


def _mse(name: str, shape: tuple[int, ...], weighted: bool = False) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        input, target = _meta(*shape, dtype=dtype), _meta(*shape, dtype=dtype)
        weight = _meta(*shape, dtype=dtype) if weighted else None
        arguments = (input, target, weight)
        if name == "forward":
            return module.mse_forward(*arguments, "mean", 0, dtype)
        if name == "backward":
            return module.mse_backward(_meta(dtype=dtype), *arguments, "mean", 0, [True, True, weighted])
        if name == "hvp":
            directions = (None, _meta(*shape, dtype=dtype), None, None)
            mask = [True, True, True, False]
            return module.mse_hvp(_meta(dtype=dtype), *arguments, *directions, "mean", 0, mask)
        return module.mse_forward_backward(*arguments, "mean", [True, False, False], dtype)

    return call


def _linear_mse(N: int, D: int, K: int) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        input, weight, target = (_meta(*shape, dtype=dtype) for shape in ((N, D), (K, D), (N, K)))
        bias = _meta(K, dtype=dtype)
        return module.linear_mse_forward(input, weight, target, bias, None, "mean", [True, True, True], dtype)

    return call


def _linear_mse_backward(N: int, D: int, K: int, output_mask: list[bool]) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        error, weight = _meta(N, K, dtype=dtype), _meta(K, D, dtype=dtype)
        return module.linear_mse_backward(_meta(dtype=dtype), error, weight, 2.0, output_mask)

    return call


def _bucket(dtype: torch.dtype, *states: str, master: bool = False, seed: int | None = None) -> Any:
    from gradkernels.buckets import Bucket

    def tensors(of: torch.dtype) -> list[Tensor]:
        return [torch.empty(size, dtype=of) for size in (8192, 1000)]

    state = {key: tensors(FLOAT32 if master else dtype) for key in states}
    state |= {"master_param": tensors(FLOAT32)} if master else {}
    state["step"] = [torch.zeros(()) for _ in range(2)]
    return Bucket(tensors(dtype), tensors(dtype), state, [0, 0], [0, 1], seed)


def _guard() -> Any:
    """Make a guard with everything: a scaled gradient, clipping, and a step that may be skipped."""
    from gradkernels.buckets import Guard

    norms, skipped = torch.empty(4, 2, dtype=FLOAT64), torch.zeros(1, dtype=torch.int64)
    return Guard(torch.ones(()), torch.zeros(()), norms, 1.0, True, skipped)


def _sgd(guarded: bool = False, **kept: Any) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        from gradkernels.buckets import Guard, SGDOptions

        options = SGDOptions(0.1, 0.9, 0, 0.1, True, False)
        bucket = _bucket(dtype, "momentum_buffer", **kept)
        return module.sgd_step(bucket, [options], _guard() if guarded else Guard())

    return call


def _adam(guarded: bool = False, amsgrad: bool = False, **kept: Any) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        from gradkernels.buckets import AdamOptions, Guard

        options = AdamOptions(0.1, 0.9, 0.999, 1e-8, 0.1, True, False)
        states = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
        bucket = _bucket(dtype, *states, **kept)
        return module.adam_step(bucket, [options], _guard() if guarded else Guard())

    return call


def _grad_norm(module: Any, dtype: torch.dtype) -> object:
    return module.grad_norm(_bucket(dtype), None, torch.empty(1, 2, dtype=FLOAT64))


FLOAT32_ERRORS = _matmul((65536, 512), (512, 1024), wide=True)
FLOAT32_ERRORS_BY_DATA = _matmul((512, 65536), (65536, 1024), transposed="left", wide=True)
AOT_CASES = (
    AotCase("matmul", "large", _matmul((4096, 4096), (4096, 4096))),
    AotCase("matmul", "linear", _matmul((4096, 1024), (1024, 4096), (4096,), transposed="right")),
    AotCase("matmul", "gradient of input, bias", _matmul((4096, 1024), (1024, 4096), (4096,))),
    AotCase("matmul", "gradient of weight", _matmul((1024, 65536), (65536, 512), transposed="left")),
    AotCase("matmul", "odd sizes", _matmul((1001, 333), (333, 777), (777,)), loads=False, stores=False),
    AotCase("matmul", "many of 512 by 64 by 512", _matmul((64, 512, 64), (64, 64, 512))),
    AotCase("matmul", "sum over the batch", _matmul((8, 1, 512, 64), (8, 4, 64, 512), sum_dims=[0])),
    AotCase("matmul", "tall data", _matmul((16, 1 << 20), (1 << 20, 8), transposed="left"), stores=False),
    AotCase("matmul", "matrix by column", _matmul((4096, 4096), (4096, 1)), stores=False),
    AotCase("matmul", "row by matrix", _matmul((1, 4096), (4096, 4096)), stores=False),
    AotCase("matmul", "dot product", _matmul((1, 1 << 20), (1 << 20, 1)), stores=False),
    AotCase("matmul", "float32 errors by weights", FLOAT32_ERRORS, dtypes=(BFLOAT16,)),
    AotCase("matmul", "float32 errors by data", FLOAT32_ERRORS_BY_DATA, dtypes=(BFLOAT16,)),
    AotCase("matmul", "outer product", _matmul((4096, 1), (1, 4096)), loads=False),
    AotCase("matmul", "tall and skinny", _matmul((1 << 20, 8), (8, 4), (4,)), loads=False, stores=False),
    AotCase("matmul", "many of 8 by 8", _matmul((1 << 16, 8, 8), (1 << 16, 8, 8)), loads=False, stores=False),
    AotCase("mse", "forward", _mse("forward", (4096, 4096)), stores=False),
    AotCase("mse", "forward, odd size", _mse("forward", (1001 * 333,)), stores=False),
    AotCase("mse", "backward", _mse("backward", (4096, 4096))),
    AotCase("mse", "backward, odd size", _mse("backward", (1001 * 333,))),
    AotCase("mse", "backward, weighted", _mse("backward", (4096, 4096), weighted=True)),
    AotCase("mse", "Hessian-vector product", _mse("hvp", (4096, 4096))),
    AotCase("mse", "loss and gradient", _mse("both", (4096, 4096))),
    AotCase("linear_mse", "1 output of 256", _linear_mse(1 << 16, 256, 1), stores=False),
    AotCase("linear_mse", "1 output of 1024", _linear_mse(1 << 16, 1024, 1), stores=False),
    AotCase("linear_mse", "1 output of 4096", _linear_mse(1 << 16, 4096, 1), stores=False),
    AotCase("linear_mse", "8 outputs of 256", _linear_mse(1 << 16, 256, 8), stores=False),
    AotCase("linear_mse", "16 outputs of 512", _linear_mse(1 << 16, 512, 16), stores=False),
    AotCase("linear_mse", "1024 outputs of 1024", _linear_mse(1 << 14, 1024, 1024)),
    AotCase("linear_mse", "1 output of 16384", _linear_mse(1 << 16, 16384, 1), stores=False),
    AotCase("linear_mse", "77 outputs of 333", _linear_mse(1 << 14, 333, 77), loads=False, stores=False),
    AotCase(
        "linear_mse",
        "gradient of input, 1 output",
        _linear_mse_backward(1 << 16, 1024, 1, [True, False]),
        loads=False,
    ),
    AotCase(
        "linear_mse",
        "gradient of input, 1024 outputs",
        _linear_mse_backward(1 << 14, 1024, 1024, [True, False]),
    ),
    AotCase("linear_mse", "gradient of target", _linear_mse_backward(1 << 16, 1024, 256, [False, True])),
    AotCase("sgd", "momentum, aligned or not", _sgd()),
    AotCase("sgd", "guarded", _sgd(guarded=True)),
    AotCase("sgd", "master weights", _sgd(master=True), dtypes=(FLOAT16, BFLOAT16)),
    AotCase("sgd", "stochastic rounding", _sgd(seed=0), dtypes=(BFLOAT16,)),
    AotCase("adam", "AdamW, aligned or not", _adam()),
    AotCase("adam", "amsgrad, guarded", _adam(guarded=True, amsgrad=True)),
    AotCase("adam", "master weights", _adam(master=True), dtypes=(FLOAT16, BFLOAT16)),
    AotCase("adam", "stochastic rounding", _adam(seed=0), dtypes=(BFLOAT16,)),
    AotCase("grad_norm", "aligned or not", _grad_norm, stores=False),
)
