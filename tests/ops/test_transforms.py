"""torch.func on every op: vmap over any dimensions, first to third derivatives, and their mixtures.

Judged in float32 by the tolerance policy; the reference is torch's composition under the same transform in
float64 (that our float64 derivatives are right is gradcheck's to say).
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

from ..cases import CASES, Case, assert_same_results, label, on_both_backends, upstream_of
from ..helpers import assert_matches, to_numpy

Function = Callable[..., Tensor]


def scalar(function: Function) -> Function:
    """A weighted sum of the results."""

    def total(*tensors: Tensor) -> Tensor:
        result = function(*tensors)
        return (result * upstream_of(result)).sum()

    return total


def pulled_back(result: Tensor, pullback: Callable[[Tensor], Any]) -> Any:
    return pullback(upstream_of(result))


def directions(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.flip(0).cos() if tensor.dim() else tensor.cos() for tensor in tensors)


TRANSFORMS: dict[str, Callable[[Function, tuple[int, ...]], Callable[..., Any]]] = {
    "grad": lambda f, all_: grad(scalar(f), all_),
    "grad_and_value": lambda f, all_: grad_and_value(scalar(f), all_),
    "vjp": lambda f, _: lambda *x: pulled_back(*vjp(f, *x)),
    "jvp": lambda f, _: lambda *x: jvp(f, x, directions(x)),
    "jvp of grad": lambda f, all_: lambda *x: jvp(grad(scalar(f), all_), x, directions(x)),
    "grad of jvp": lambda f, all_: grad(lambda *x: jvp(scalar(f), x, directions(x))[1], all_),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev of jacrev": lambda f, all_: jacrev(jacrev(scalar(f), all_), all_),
    "jacrev of jacfwd": lambda f, all_: jacrev(jacfwd(scalar(f), all_), all_),
    "jacfwd of jacfwd": lambda f, all_: jacfwd(jacfwd(scalar(f), all_), all_),
    "jacrev of hessian": lambda f, all_: jacrev(hessian(scalar(f), all_), all_),
    "jacfwd of hessian": lambda f, all_: jacfwd(hessian(scalar(f), all_), all_),
}


@pytest.mark.parametrize(
    ("backend", "case", "transform"),
    on_both_backends(
        product(CASES, TRANSFORMS),
        triton=lambda case, transform: [(case.op, transform), (case.op, case.options.get("reduction"))],
        fallback=lambda case, transform: [str(case), (case.op, transform)],
    ),
    ids=label,
    indirect=["backend"],
)
def test_transforms(backend: str, device: torch.device, case: Case, transform: str) -> None:
    all_ = tuple(range(len(case.shapes)))
    ours, theirs = (TRANSFORMS[transform](f, all_) for f in (case.ours, case.theirs))
    assert_same_results(ours, theirs, case.arguments(device=device))


def mapped_dimensions(case: Case) -> Iterator[tuple[int | None, ...]]:
    """Each argument alone along each dimension, and all along mixed dimensions."""
    names = list(case.shapes)
    for position, name in enumerate(names):
        for dim in range(len(case.shapes[name]) + 1):
            yield tuple(dim if other == position else None for other in range(len(names)))
    yield tuple(0 for _ in names)
    yield tuple(-1 - position % 2 * len(case.shapes[name]) for position, name in enumerate(names))


def batched(case: Case, in_dims: tuple[int | None, ...], size: int, device: torch.device) -> list[Tensor]:
    samples = zip(*(case.arguments(torch.float32, device) for _ in range(size)), strict=True)
    return [
        tensors[0] if dim is None else torch.stack(tensors, dim)
        for dim, tensors in zip(in_dims, samples, strict=True)
    ]


@pytest.mark.parametrize(
    ("backend", "case", "in_dims"),
    on_both_backends(
        [(case, in_dims) for case in CASES for in_dims in mapped_dimensions(case)],
        triton=lambda case, in_dims: [
            (case.op, case.options.get("reduction")),
            *((case.op, name, dim) for name, dim in zip(case.shapes, in_dims, strict=True)),
        ],
        fallback=lambda case, in_dims: [
            str(case),
            *((case.op, name, dim) for name, dim in zip(case.shapes, in_dims, strict=True)),
        ],
    ),
    ids=lambda value: label(value) or str(value),
    indirect=["backend"],
)
def test_vmap(backend: str, device: torch.device, case: Case, in_dims: tuple[int | None, ...]) -> None:
    tensors = batched(case, in_dims, 3, device)
    per_sample = [
        [
            tensor if dim is None else tensor.select(dim, index)
            for tensor, dim in zip(tensors, in_dims, strict=True)
        ]
        for index in range(3)
    ]
    result = vmap(case.ours, in_dims)(*tensors)
    reference = np.stack([case.forward(*map(to_numpy, sample)) for sample in per_sample])
    assert_matches(result, torch.stack([case.theirs(*sample) for sample in per_sample]), reference)

    argnums = tuple(range(len(tensors)))
    grads = vmap(grad(scalar(case.ours), argnums), in_dims)(*tensors)
    exact = [
        [grad(scalar(case.theirs), argnums)(*(x.to(dtype) for x in sample)) for sample in per_sample]
        for dtype in (torch.float32, torch.float64)
    ]
    for name, ours, theirs, reference in zip(
        case.shapes, grads, *(zip(*samples, strict=True) for samples in exact), strict=True
    ):
        assert_matches(ours, torch.stack(theirs), to_numpy(torch.stack(reference)), f"grad_{name}")


def test_vmap_of_vmap(backend: str, device: torch.device) -> None:
    case = CASES[-1]
    inner, outer = (0, None, 1, None), (None, 2, None, 0)
    tensors = batched(case, inner, 3, device)
    tensors = [
        tensor if dim is None else torch.stack([tensor, tensor.cos()], dim)
        for tensor, dim in zip(tensors, outer, strict=True)
    ]
    ours, theirs = (vmap(vmap(f, inner), outer) for f in (case.ours, case.theirs))
    assert_same_results(ours, theirs, tensors)
    ours, theirs = (vmap(vmap(grad(scalar(f), (0, 1)), inner), outer) for f in (case.ours, case.theirs))
    assert_same_results(ours, theirs, tensors)


def test_the_backward_operator_over_weights_alone(backend: str, device: torch.device) -> None:
    """The gradient of the target does not depend on them, and is one for each all the same."""
    grad_output, error, weights = (torch.randn(size, device=device) for size in ((), (5, 2), (3, 2, 4)))

    def gradients(weight: Tensor) -> list[Tensor]:
        return torch.ops.gradkernels.linear_mse_backward(grad_output, error, weight, 0.1, [True, True])

    found = vmap(gradients)(weights)
    expected = [torch.stack(each) for each in zip(*map(gradients, weights), strict=True)]
    torch.testing.assert_close(found, expected)
