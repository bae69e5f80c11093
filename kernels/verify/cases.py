"""One case of an op for the kernel check: the same call by gradkernels, by plain torch, and in NumPy float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import OPS, OPTIMIZERS, Function, Optimizer, Training
from .tolerance import exactly

Results = dict[str, Tensor]
STEPS = 3  # of an optimizer or a training


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


def build(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, draw: int = 0) -> Case:
    """The case of ``op`` at ``shape``, on random numbers seeded by ``draw``.

    Raises:
        ValueError: the op is unknown, or takes another number of sizes.
    """
    record = OPS.get(op)
    generator = torch.Generator().manual_seed(len(shape) + sum(shape) + 100_003 * draw)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype).to(device)

    if isinstance(record, Function):
        return _function(record, shape, dtype, randn)
    if isinstance(record, Training):
        return _training(record, shape, dtype, randn)
    if isinstance(record, Optimizer):
        return _optimizer(record, shape, dtype, randn)
    raise ValueError(f"unknown op {op!r}; expected one of {', '.join(OPS)}")


def _arrays(*tensors: Tensor) -> list[Any]:
    return [exactly(tensor) for tensor in tensors]


def _named(output: Any, inputs: dict[str, Tensor], gradients: Any) -> dict[str, Any]:
    """The references of losses give gradients for arguments that are not there, too: they come last."""
    return {"output": output, **{f"grad_{name}": grad for name, grad in zip(inputs, gradients, strict=False)}}


def _function(op: Function, shape: tuple[int, ...], dtype: torch.dtype, randn: Callable[..., Tensor]) -> Case:
    inputs = {name: randn(*sizes) for name, sizes in op.problem(shape).items()}
    grad = randn(*op.torch(*inputs.values()).shape)

    def runner(function: Callable[..., Tensor]) -> Callable[[], Results]:
        def run() -> Results:
            leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
            output = function(*leaves)
            return _named(output.detach(), inputs, torch.autograd.grad(output, leaves, grad))

        return run

    def in_float64() -> dict[str, Any]:
        upstream, *arrays = _arrays(grad, *inputs.values())
        return _named(op.reference.forward(*arrays), inputs, op.reference.backward(upstream, *arrays))

    small = sum(tensor.numel() for tensor in inputs.values()) <= 64
    slopes = (op.function(), list(inputs.values())) if small and dtype == torch.float64 else None
    return Case(op.name, shape, dtype, runner(op.function()), runner(op.torch), in_float64, slopes)


def _optimizer(
    op: Optimizer, shape: tuple[int, ...], dtype: torch.dtype, randn: Callable[..., Tensor]
) -> Case:
    param, grads = randn(*shape), [randn(*shape) for _ in range(STEPS)]
    options = op.options(dtype)

    def runner(make: Callable[..., Any], **others: Any) -> Callable[[], Results]:
        def run() -> Results:
            leaf = param.clone().requires_grad_()
            optimizer = make([leaf], **options, **others)
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
            value, state = op.reference.step(value, gradient, state, **options)
        return {"param": value, **{key: array for key, array in state.items() if key != "step"}}

    return Case(op.name, shape, dtype, runner(op.function()), runner(op.torch, foreach=False), in_float64)


def _training(op: Training, shape: tuple[int, ...], dtype: torch.dtype, randn: Callable[..., Tensor]) -> Case:
    inputs = {name: randn(*sizes) for name, sizes in op.problem(shape).items()}

    def runner(function: Callable[..., Tensor], own: bool) -> Callable[[], Results]:
        def run() -> Results:
            results = {}
            for name in op.optimizers:
                record = OPTIMIZERS[name]
                given = {key: value.clone() for key, value in inputs.items()}
                params = [given[key].requires_grad_() for key in op.trained]
                make = (
                    partial(record.function(), stacked=True) if own else partial(record.torch, foreach=False)
                )
                optimizer = make(params, **record.options(dtype))
                results[f"{name} losses"] = function(**given, optimizer=optimizer, steps=STEPS)
                results |= {f"{name} {key}": given[key].detach() for key in op.trained}
            return results

        return run

    def in_float64() -> dict[str, Any]:
        arrays = dict(zip(inputs, _arrays(*inputs.values()), strict=True))
        results = {}
        for name in op.optimizers:
            record = OPTIMIZERS[name]
            models = [
                op.reference.fit(
                    **{key: array[b] for key, array in arrays.items()},
                    **{"step": record.reference.step, "steps": STEPS, **record.options(dtype)},
                )
                for b in range(shape[0])
            ]
            results[f"{name} losses"] = np.stack([losses for losses, _, _ in models], 1)
            for place, key in enumerate(op.trained):
                results[f"{name} {key}"] = np.stack([params[place] for _, params, _ in models])
        return results

    return Case(op.name, shape, dtype, runner(op.function(), True), runner(op.torch, False), in_float64)
