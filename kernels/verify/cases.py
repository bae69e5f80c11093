"""One case of an op for the kernel check: the same call by gradkernels, by plain torch, and in NumPy float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .tolerance import exactly

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype.

    Attributes:
        op, shape, dtype: what is checked.
        ours, torch: give the results by name: values, gradients, states.
        reference: the same in float64.
        slopes: for the finite differences, a function and its inputs; None where there is no gradient.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ours: Callable[[], Results]
    torch: Callable[[], Results]
    reference: Callable[[], dict[str, Any]]
    slopes: tuple[Callable[..., Tensor], list[Tensor]] | None = None


# Shape classes of each op: one element, odd sizes, a long row or column, more than one block.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "matmul": [(1, 1, 1), (3, 5, 2), (65, 33, 17), (1, 300, 1), (2, 33, 65, 9)],
    "mse": [(1,), (1023,), (65, 63), (5000,)],
    "linear_mse": [(1, 1, 1), (4, 2, 1), (100, 65, 1), (65, 33, 3), (40, 20, 33)],
    "sgd": [(1,), (1023,), (65, 63)],
    "adam": [(1,), (1023,), (65, 63)],
}
AXES = {"matmul": "[B x] M x K x N", "linear_mse": "N x D x K"}


def build(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, draw: int = 0) -> Case:
    """The case of ``op`` at ``shape``, on random numbers seeded by ``draw``.

    Raises:
        ValueError: the op is unknown, or takes another number of sizes.
    """
    if op not in SHAPES:
        raise ValueError(f"unknown op {op!r}; expected one of {', '.join(SHAPES)}")
    wanted = {"matmul": (3, 4), "linear_mse": (3,)}.get(op)
    if wanted is not None and len(shape) not in wanted:
        raise ValueError(f"{op} takes sizes {AXES[op]}, got {'x'.join(map(str, shape))}")
    generator = torch.Generator().manual_seed(len(shape) + sum(shape) + 100_003 * draw)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype).to(device)

    return {"matmul": _matmul, "mse": _mse, "linear_mse": _linear_mse, "sgd": _sgd, "adam": _adam}[op](
        op, shape, dtype, randn
    )


def _arrays(*tensors: Tensor) -> list[Any]:
    return [exactly(tensor) for tensor in tensors]


def _differentiated(
    fn: Callable[..., Tensor], inputs: dict[str, Tensor], grad: Tensor
) -> Callable[[], Results]:
    def run() -> Results:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
        output = fn(*leaves)
        gradients = torch.autograd.grad(output, leaves, grad)
        names = [f"grad_{name}" for name in inputs]
        return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}

    return run


def _differentiable(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    grad: Tensor,
    reference: Callable[[], dict[str, Any]],
) -> Case:
    small = sum(tensor.numel() for tensor in inputs.values()) <= 64
    slopes = (ours, list(inputs.values())) if small and dtype == torch.float64 else None
    return Case(
        op,
        shape,
        dtype,
        _differentiated(ours, inputs, grad),
        _differentiated(theirs, inputs, grad),
        reference,
        slopes,
    )


def _matmul(op: str, shape: tuple[int, ...], dtype: torch.dtype, randn: Callable[..., Tensor]) -> Case:
    from ..matmul import matmul
    from ..reference import matmul as reference

    *batch, m, k, n = shape
    inputs = {"input": randn(*batch, m, k), "other": randn(*batch, k, n), "bias": randn(n)}
    grad = randn(*batch, m, n)

    def in_float64() -> dict[str, Any]:
        g, *arrays = _arrays(grad, *inputs.values())
        gradients = reference.backward(g, *arrays)
        return {
            "output": reference.forward(*arrays),
            **{f"grad_{name}": value for name, value in zip(inputs, gradients, strict=True)},
        }

    return _differentiable(
        op, shape, dtype, matmul, lambda a, b, c: torch.matmul(a, b) + c, inputs, grad, in_float64
    )


def _mse(op: str, shape: tuple[int, ...], dtype: torch.dtype, randn: Callable[..., Tensor]) -> Case:
    from ..mse import mse_loss
    from ..reference import mse as reference

    inputs = {"input": randn(*shape), "target": randn(*shape)}
    grad = randn()

    def in_float64() -> dict[str, Any]:
        g, *arrays = _arrays(grad, *inputs.values())
        gradients = reference.backward(g, *arrays)
        return {
            "output": reference.forward(*arrays),
            "grad_input": gradients[0],
            "grad_target": gradients[1],
        }

    return _differentiable(op, shape, dtype, mse_loss, functional.mse_loss, inputs, grad, in_float64)


def _linear_mse(op: str, shape: tuple[int, ...], dtype: torch.dtype, randn: Callable[..., Tensor]) -> Case:
    from ..linear_mse import linear_mse_loss
    from ..reference import linear_mse as reference

    n, d, k = shape
    inputs = {"input": randn(n, d), "weight": randn(k, d), "target": randn(n, k), "bias": randn(k)}
    grad = randn()

    def in_float64() -> dict[str, Any]:
        g, *arrays = _arrays(grad, *inputs.values())
        gradients = reference.backward(g, *arrays)
        return {
            "output": reference.forward(*arrays),
            **{f"grad_{name}": value for name, value in zip(inputs, gradients, strict=False)},
        }

    def plain(x: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return functional.mse_loss(functional.linear(x, w, b), y)

    return _differentiable(op, shape, dtype, linear_mse_loss, plain, inputs, grad, in_float64)


STEPS = 3


def _optimizer(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    randn: Callable[..., Tensor],
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    step: Callable[..., Any],
    options: dict[str, Any],
) -> Case:
    param, grads = randn(*shape), [randn(*shape) for _ in range(STEPS)]

    def runner(make: Callable[..., Any]) -> Callable[[], Results]:
        def run() -> Results:
            leaf = param.clone().requires_grad_()
            optimizer = make([leaf], **options)
            for grad in grads:
                leaf.grad = grad.clone()
                optimizer.step()
            state = {key: value for key, value in optimizer.state[leaf].items() if key != "step"}
            return {"param": leaf.detach(), **state}

        return run

    def in_float64() -> dict[str, Any]:
        value, *gradients = _arrays(param, *grads)
        state: Any = None
        for gradient in gradients:
            value, state = step(value, gradient, state, **options)
        return {"param": value, **{key: array for key, array in state.items() if key != "step"}}

    return Case(op, shape, dtype, runner(ours), runner(theirs), in_float64)


def _sgd(op: str, shape: tuple[int, ...], dtype: torch.dtype, randn: Callable[..., Tensor]) -> Case:
    from ..reference import sgd as reference
    from ..sgd import FusedSGD

    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}

    def plain(params: list[Tensor], **kwargs: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, foreach=False, **kwargs)

    return _optimizer(op, shape, dtype, randn, FusedSGD, plain, reference.step, options)


def _adam(op: str, shape: tuple[int, ...], dtype: torch.dtype, randn: Callable[..., Tensor]) -> Case:
    from ..adam import FusedAdam
    from ..reference import adam as reference

    # In float16 torch's own eps of 1e-8 is 0, and its second moments underflow: its result is then not finite.
    eps = 1e-3 if dtype == torch.float16 else 1e-8
    options = {"lr": 0.1, "weight_decay": 0.01, "amsgrad": True, "eps": eps}

    def plain(params: list[Tensor], **kwargs: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, foreach=False, **kwargs)

    return _optimizer(op, shape, dtype, randn, FusedAdam, plain, reference.step, options)
