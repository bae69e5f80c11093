"""Whole training steps: predict, loss, gradients, update.

regression   N rows of D features: linear_mse_loss and FusedSGD, against linear, mse_loss and SGD.
MLP          three layers of linear and relu, mse_loss and FusedSGD with momentum, against torch's.
block        AdamW over the parameter list of transformer blocks (the update alone).

bytes        what must move at least: the data, and the parameters' traffic of the update.
FLOPs        four (regression) or six (MLP) per weight and row.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.reference import adam, linear_mse, matmul, mse, sgd
from torch import Tensor
from torch.nn import functional

from .throughput.case import OURS, Call, Case, Implementation, Op, compiled, draw_inputs
from .throughput.optimizer import step_case, stepper, torch_steppers

STEPS = 3  # before the weights are checked
LR, MOMENTUM = 0.01, 0.9
WIDTHS = (64, 256, 256, 1)


def _plain(input: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.mse_loss(functional.linear(input, weight, bias), target)


def _trainer(
    name: str,
    loss: Callable[..., Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
    compile: bool = False,
) -> Implementation:
    """Make an implementation: ``loss(input, target, *params)``, backward, step; it returns the parameters."""
    program = compiled(name, loss)

    def prepare(input: Tensor, target: Tensor, params: Sequence[Tensor]) -> Call:
        own = [param.clone().requires_grad_() for param in params]
        update = optimizer(own)
        forward = program.prepare(input, target, *own) if compile else partial(loss, input, target, *own)

        def call() -> list[Tensor]:
            update.zero_grad()
            forward().backward()
            update.step()
            return own

        return call

    return Implementation(name, prepare, slow_start=compile)


def _joined(params: Sequence[Tensor]) -> list[Tensor]:
    """Join all parameters into one result, so that the tolerance is on their common scale."""
    return [torch.cat([param.detach().reshape(-1) for param in params])]


def _trainers(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], **options: Any
) -> tuple[Implementation, ...]:
    fused = partial(torch.optim.SGD, fused=True, **options)
    return (
        _trainer(OURS, ours, lambda params: gradkernels.FusedSGD(params, **options)),
        _trainer("eager", plain, partial(torch.optim.SGD, **options)),
        _trainer("fused", plain, fused),
        _trainer("compile", plain, fused, compile=True),
    )


def _ours(input: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gradkernels.linear_mse_loss(input, weight, target, bias)


_case = partial(Case, op="training", pick=_joined, calls=STEPS)


def regression(n: int, d: int, dtype: torch.dtype) -> Case:
    def expected(input: np.ndarray, target: np.ndarray, params: list[np.ndarray]) -> list[np.ndarray]:
        weight, bias = params
        for _ in range(STEPS):
            _, grad_weight, _, grad_bias, _ = linear_mse.backward(np.ones(()), input, weight, target, bias)
            weight, bias = (
                sgd.step(param, grad, lr=LR)[0] for param, grad in ((weight, grad_weight), (bias, grad_bias))
            )
        return [np.concatenate([weight.reshape(-1), bias])]

    return _case(
        variant="regression",
        label=f"{n} x {d}",
        sizes={"N": n, "D": d},
        dtype=dtype,
        bytes=(n * d + n + 3 * (d + 1)) * dtype.itemsize,
        flops=4 * n * d,
        make=draw_inputs(dtype, lambda randn: (randn(n, d), randn(n, 1), [randn(1, d), randn(1)])),
        implementations=_trainers(_ours, _plain, lr=LR),
        reference=expected,
        compile=n == 10**6,
    )


def _mlp(
    linear: Callable[..., Tensor], loss: Callable[..., Tensor], input: Tensor, target: Tensor, *params: Tensor
) -> Tensor:
    output = linear(input, *params[:2])
    for weight, bias in zip(params[2::2], params[3::2], strict=True):
        output = linear(torch.relu(output), weight, bias)
    return loss(output, target)


def mlp(n: int, dtype: torch.dtype) -> Case:
    pairs = list(itertools.pairwise(WIDTHS))
    weights = sum(inner * outer + outer for inner, outer in pairs)

    def draw(randn: Callable[..., Tensor]) -> tuple[Any, ...]:
        params = [tensor for i, o in pairs for tensor in (randn(o, i) / i**0.5, randn(o))]
        return randn(n, WIDTHS[0]), randn(n, WIDTHS[-1]), params

    def expected(input: np.ndarray, target: np.ndarray, params: list[np.ndarray]) -> list[np.ndarray]:
        states: list[dict] = [{} for _ in params]
        for _ in range(STEPS):
            layers = list(zip(params[::2], params[1::2], strict=True))
            hidden, outputs = [input], []
            for weight, bias in layers:
                outputs.append(matmul.forward(hidden[-1], weight.T, bias))
                hidden.append(np.maximum(outputs[-1], 0))
            grad, _, _ = mse.backward(np.ones(()), outputs[-1], target)
            grads: list[np.ndarray] = []
            for i, (weight, bias) in reversed(list(enumerate(layers))):
                grad = grad if i == len(layers) - 1 else grad * (outputs[i] > 0)
                grad, grad_weight, grad_bias = matmul.backward(grad, hidden[i], weight.T, bias)
                grads = [grad_weight.T, grad_bias, *grads]
            stepped = [
                sgd.step(*triple, lr=LR, momentum=MOMENTUM)
                for triple in zip(params, grads, states, strict=True)
            ]
            params, states = map(list, zip(*stepped, strict=True))
        return [np.concatenate([param.reshape(-1) for param in params])]

    ours = partial(_mlp, gradkernels.linear, gradkernels.mse_loss)
    plain = partial(_mlp, functional.linear, functional.mse_loss)
    return _case(
        variant="MLP " + "-".join(map(str, WIDTHS)),
        label=f"{n} rows",
        sizes={"N": n},
        dtype=dtype,
        bytes=(n * (WIDTHS[0] + WIDTHS[-1]) + 5 * weights) * dtype.itemsize,
        flops=6 * n * weights,
        make=draw_inputs(dtype, draw),
        implementations=_trainers(ours, plain, lr=LR, momentum=MOMENTUM),
        reference=expected,
        compile=True,
    )


def block(width: int, layers: int, dtype: torch.dtype) -> Case:
    d = width
    norm = [(d,), (d,)]
    shapes = [*norm, (3 * d, d), (3 * d,), (d, d), (d,), *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return step_case(
        "training",
        "AdamW on transformer blocks",
        shapes * layers,
        f"{layers} of width {d}",
        dtype,
        [stepper(OURS, lambda params: gradkernels.FusedAdamW(params)), *torch_steppers(torch.optim.AdamW)],
        partial(adam.step, decoupled_weight_decay=True, weight_decay=0.01),
        ("exp_avg", "exp_avg_sq"),
        (7, 15),
    )


def build(shape: tuple[Any, ...], dtype: torch.dtype) -> Iterator[Case]:
    kind, *sizes = shape
    kinds = {"regression": (regression, 2), "mlp": (mlp, 1), "block": (block, 2)}
    case, count = kinds.get(kind, (None, 0))
    if case is None or len(sizes) != count or not all(isinstance(size, int) for size in sizes):
        text = ",".join(map(str, shape))
        raise ValueError(f"--shape {text}: expected regression,N,D or mlp,N or block,WIDTH,LAYERS")
    yield case(*sizes, dtype)


OP = Op(
    "training",
    ("kind", "size", "width"),
    build,
    """
    *regression,4,2 regression,5,3 *regression,1e6,64 *mlp,8192@cpu *mlp,65536@cuda *block,256,2@cpu block,512,12@cpu
    *block,1024,12@cuda block,4096,4@cuda
    """,
    dtypes={"cpu": (torch.float32,)},
)
