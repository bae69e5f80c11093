"""One case of an op for the kernel check: the same call by gradkernels, by plain torch, and in NumPy float64."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import OPS, OPTIMIZERS, Call, Function, Optimizer, Training
from .gradient.function import drawing
from .tolerance import exactly

Results = dict[str, Tensor]
STEPS = 3  # of an optimizer or a training


def few_bits(values: Tensor) -> Tensor:
    """Return the nearest numbers of so few digits that a product has a few more than fit into a long sum.

    In float32 those are bfloat16's.
    """
    digits = max(3, (round(1 - math.log2(torch.finfo(values.dtype).eps)) - 8) // 2)
    mantissa, exponent = torch.frexp(values.double())
    return torch.ldexp((mantissa * 2**digits).round(), exponent - digits).to(values.dtype)


# What is made of normal random numbers. Of any but these a long sum may round to the same side throughout.
NUMBERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda values: values,
    "few bits": few_bits,
    "small integers": lambda values: (2 * values).round(),
    "one constant": lambda values: (
        values.reshape(-1)[:1].expand(values.numel()).reshape(values.shape).clone()
    ),
}


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype.

    Attributes:
        op, what, dtype: what is checked: at which sizes, or which call.
        ours, torch: give the results by name: values, gradients, states.
        reference: the same in float64.
        slopes: for the finite differences, a function and its inputs; None where there is no gradient.
    """

    op: str
    what: tuple[int, ...] | Call
    dtype: torch.dtype
    ours: Callable[[], Results]
    torch: Callable[[], Results]
    reference: Callable[[], dict[str, Any]]
    slopes: tuple[Callable[..., Tensor], list[Tensor]] | None = None


def build(
    op: str,
    what: tuple[int, ...] | Call,
    dtype: torch.dtype,
    device: str,
    draw: int = 0,
    numbers: str = "normal",
) -> Case:
    """Return the case of ``op`` at sizes or with a call, on random ``NUMBERS`` seeded by ``draw``.

    Raises:
        ValueError: the op is unknown, or takes another number of sizes.
    """
    record = OPS.get(op)
    shape = next(iter(what.shapes.values())) if isinstance(what, Call) else what
    drawn = drawing(len(shape) + sum(shape) + 100_003 * draw)

    def randn(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        values = drawn(partial(torch.randn, dtype=torch.float64), sizes)
        return NUMBERS[numbers](values.to(dtype)).to(device)

    if isinstance(record, Function):
        return _function(record, what, dtype, randn)
    if isinstance(record, Training):
        return _training(record, shape, dtype, randn)
    if isinstance(record, Optimizer):
        return _optimizer(record, shape, dtype, randn)
    raise ValueError(f"unknown op {op!r}; expected one of {', '.join(OPS)}")


def _arrays(*tensors: Tensor) -> list[Any]:
    return [exactly(tensor) for tensor in tensors]


def _function(
    op: Function, what: tuple[int, ...] | Call, dtype: torch.dtype, randn: Callable[..., Tensor]
) -> Case:
    call = what if isinstance(what, Call) else Call(op.problem(what))
    inputs = {name: randn(*sizes, dtype=call.dtypes.get(name, dtype)) for name, sizes in call.shapes.items()}
    if op.weighting in inputs:
        inputs[op.weighting].abs_().add_(0.5)
    common = reduce(torch.promote_types, (tensor.dtype for tensor in inputs.values()))
    loss = op.torch(**{name: tensor.to(common) for name, tensor in inputs.items()}, **call.options)
    grad = randn(*loss.shape, dtype=common)

    def runner(function: Callable[..., Tensor], cast: torch.dtype | None = None) -> Callable[[], Results]:
        def run() -> Results:
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
            given = {name: leaf if cast is None else leaf.to(cast) for name, leaf in leaves.items()}
            output = function(**given, **call.options)
            gradients = torch.autograd.grad(output, list(leaves.values()), grad)
            return _named(output.detach(), dict(zip(leaves, gradients, strict=True)))

        return run

    def in_float64() -> dict[str, Any]:
        upstream, *arrays = _arrays(grad, *inputs.values())
        given = {**dict(zip(inputs, arrays, strict=True)), **call.options}
        arguments = inspect.signature(op.function()).parameters
        gradients = dict(zip(arguments, op.reference.backward(upstream, **given), strict=False))
        return _named(op.reference.forward(**given), {name: gradients[name] for name in inputs})

    def of_tensors(*tensors: Tensor) -> Tensor:
        return op.function()(**dict(zip(inputs, tensors, strict=True)), **call.options)

    small = sum(tensor.numel() for tensor in inputs.values()) <= 64
    in_double = all(tensor.dtype == torch.float64 for tensor in inputs.values())
    slopes = (of_tensors, list(inputs.values())) if small and in_double else None
    return Case(op.name, what, dtype, runner(op.function()), runner(op.torch, common), in_float64, slopes)


def _named(output: Any, gradients: dict[str, Any]) -> dict[str, Any]:
    return {"output": output, **{f"grad_{name}": gradient for name, gradient in gradients.items()}}


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
