"""The ops as small problems: what ours, torch's composition and the NumPy reference make of the same arguments."""

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels.ops import FUNCTIONS
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .helpers import Draws, exactly, to_numpy

REDUCTIONS = ("mean", "sum", "none")
# The differentiable functions by name: their op, what torch does, their tensor arguments (in the order in which the
# references return gradients).
OPS = {
    name: op for op in FUNCTIONS.values() for name, public in op.public.items() if public.torch is not None
}
OURS = {name: op.function(name) for name, op in OPS.items()}
TORCH: dict[str, Callable[..., Tensor]] = {name: op.public[name].torch for name, op in OPS.items()}
ARGUMENTS = {
    name: tuple(
        argument
        for argument in inspect.signature(op.function(name)).parameters
        if argument not in ("dim", "offsets", "reduction")
    )
    for name, op in OPS.items()
}


@dataclass(frozen=True, eq=False)
class Case:
    """A call of an op: the arguments' shapes by name, and what is not a tensor."""

    op: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = " ".join(f"{name[0]}{'x'.join(map(str, shape))}" for name, shape in self.shapes.items())
        return " ".join([self.op, shapes, *map(str, self.options.values())])

    def ours(self, *tensors: Tensor) -> Tensor:
        return OURS[self.op](**self._by_name(tensors), **self.options)

    def theirs(self, *tensors: Tensor) -> Tensor:
        return TORCH[self.op](**self._by_name(tensors), **self.options)

    def forward(self, *arrays: np.ndarray) -> np.ndarray:
        """The reference's result."""
        given = self._by_name(arrays)
        if self.op == "linear":
            given["other"] = given.pop("weight").T
        return OPS[self.op].reference.forward(**given, **self.options)

    def backward(self, grad_output: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
        """The reference's gradients, one for each argument that was given."""
        given = self._by_name(arrays)
        if self.op == "linear":
            given["other"] = given.pop("weight").T
        grads = OPS[self.op].reference.backward(grad_output, **given, **self.options)
        named = dict(zip(ARGUMENTS[self.op], grads, strict=True))
        if self.op == "linear":
            named["weight"] = named["weight"].T
        return [named[name] for name in self.shapes]

    def arguments(
        self,
        dtype: torch.dtype | Sequence[torch.dtype] = torch.float64,
        device: torch.device | str = "cpu",
    ) -> list[Tensor]:
        """Normal random tensors, of one dtype or one each; the weights, by whose sum a mean divides, are positive."""
        dtypes = [dtype] * len(self.shapes) if isinstance(dtype, torch.dtype) else dtype
        tensors = []
        for (name, shape), own in zip(self.shapes.items(), dtypes, strict=False):
            tensor = torch.randn(shape, dtype=torch.float64)
            tensors.append((tensor.abs() + 0.5 if name == OPS[self.op].weighting else tensor).to(device, own))
        return tensors

    def masks(self) -> list[tuple[bool, ...]]:
        """Every choice of arguments that require grad, but for none of them."""
        return [mask for mask in product((False, True), repeat=len(self.shapes)) if any(mask)]

    def resized(self, sizes: dict[int, int], matrices_only: bool = False) -> "Case":
        """The same call with each dimension's size, or the last two's, replaced as ``sizes`` says."""
        shapes = {}
        for name, shape in self.shapes.items():
            kept = max(0, len(shape) - 2) if matrices_only else 0
            shapes[name] = (*shape[:kept], *(sizes.get(size, size) for size in shape[kept:]))
        return Case(self.op, shapes, self.options)

    def _by_name(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.shapes, values, strict=True))


def _matmul(input: tuple[int, ...], other: tuple[int, ...], *bias: tuple[int, ...]) -> Case:
    return Case("matmul", dict(zip(ARGUMENTS["matmul"], (input, other, *bias), strict=False)))


def _linear(input: tuple[int, ...], weight: tuple[int, ...], *bias: tuple[int, ...]) -> Case:
    return Case("linear", dict(zip(ARGUMENTS["linear"], (input, weight, *bias), strict=False)))


def _losses(op: str, **shapes: tuple[int, ...]) -> list[Case]:
    return [Case(op, shapes, {"reduction": reduction}) for reduction in REDUCTIONS]


MATMUL = [
    _matmul((3, 3), (3, 3)),
    _matmul((3, 4), (4, 2), (2,)),
    _matmul((2, 1, 2, 3), (3, 3, 2), (2,)),
    _matmul((2, 2, 3), (3,), (1,)),
    _matmul((3,), (2, 3, 2)),
    _matmul((3,), (3,), (1,)),
]
LINEAR = [_linear((2, 2, 3), (2, 3), (2,)), _linear((3, 2), (2,), (1,)), _linear((3,), (2, 3))]
MSE = [
    *_losses("mse_loss", input=(3, 2), target=(3, 2)),
    *_losses("mse_loss", input=(2, 2), target=(2, 2), weight=(2, 2)),
    *_losses("mse_loss", input=(2, 3, 2), target=(2, 3, 2), weight=(3, 1)),
    Case("mse_loss", {"input": (2, 3, 2), "target": (2, 3, 2)}, {"dim": (1, 2)}),
    Case("mse_loss", {"input": (3, 2), "target": (3, 2)}, {"reduction": "sum", "dim": 0}),
    Case(
        "mse_loss",
        {"input": (2, 3, 2), "target": (2, 3, 2), "weight": (2, 1, 2)},
        {"reduction": "mean", "dim": (0, -1)},
    ),
]
LINEAR_MSE = [
    *_losses("linear_mse_loss", input=(4, 2), weight=(2,), target=(4,), bias=(1,)),
    *_losses("linear_mse_loss", input=(3, 2), weight=(2, 2), target=(3, 2)),
    *_losses("linear_mse_loss", input=(3, 2), weight=(2, 2), target=(3, 2), bias=(2,)),
    *_losses("linear_mse_loss", input=(2, 2), weight=(2, 2), target=(2, 2), bias=(2,), sample_weight=(2,)),
    *_losses("linear_mse_loss", input=(2, 2, 2), weight=(1, 2), target=(2, 2, 1), sample_weight=(2, 2, 1)),
]
MATMUL_SHAPES = [  # input, other
    ((5,), (5,)),
    ((1,), (1,)),
    ((3, 5), (5,)),
    ((5,), (5, 4)),
    ((3, 5), (5, 4)),
    ((1, 5), (5, 1)),
    ((5, 1), (1, 4)),
    ((2, 3, 5), (5,)),
    ((5,), (2, 5, 4)),
    ((2, 3, 5), (5, 4)),
    ((3, 5), (2, 5, 4)),
    ((2, 3, 5), (2, 5, 4)),
    ((2, 1, 3, 5), (7, 5, 4)),
    ((7, 1, 3, 5), (1, 2, 5, 4)),
    ((1, 3, 5), (6, 5, 4)),
    ((2, 1, 2, 1, 3, 2), (1, 2, 1, 2, 2, 3)),
]
LINEAR_MSE_SHAPES = [  # input, weight, target, shapes that sample_weight may have
    ((5, 3), (3,), (5,), [(5,)]),
    ((5, 3), (1, 3), (5, 1), [(5,), (5, 1)]),
    ((5, 3), (4, 3), (5, 4), [(5,), (5, 4)]),
    ((2, 5, 3), (4, 3), (2, 5, 4), [(2, 5), (2, 5, 4)]),
    ((2, 2, 3), (2, 3), (2, 2, 2), [(2, 2), (2, 2, 2)]),
    ((2, 5, 3), (3,), (2, 5), [(2, 5)]),
    ((3,), (3,), (), [()]),
    ((3,), (2, 3), (2,), [(), (2,)]),
]
CASES = [*MATMUL, *LINEAR, *MSE, *LINEAR_MSE]


def label(value: Any) -> str | None:
    """A readable test id for cases, masks and dtypes."""
    if isinstance(value, tuple) and value and all(isinstance(item, bool) for item in value):
        return "".join("g" if item else "-" for item in value)
    return str(value).removeprefix("torch.") if isinstance(value, (Case, torch.dtype)) else None


def assert_same_results(
    ours: Callable[..., Any], theirs: Callable[..., Any], tensors: Sequence[Tensor], what: str = "result"
) -> None:
    """Hold ours against torch's, both in float32, by the tolerance policy.

    The reference is torch's in float64: for what NumPy has no counterpart of, and gradcheck has judged. Where a
    result has few numbers, it is drawn again with the elements of each tensor in another order.
    """
    draws = Draws()
    while not draws.enough:
        narrow = [tensor.float() for tensor in tensors]
        exact = [tensor.double() for tensor in narrow]
        # A ZeroTensor, torch's derivative of a constant, has no storage until it is copied.
        results = [
            [leaf.clone() for leaf in tree_leaves(f(*x)) if leaf is not None]
            for f, x in ((ours, narrow), (theirs, narrow), (theirs, exact))
        ]
        for number, (mine, torchs, reference) in enumerate(zip(*results, strict=True)):
            draws.add(f"{what} {number}", mine, torchs, to_numpy(reference))
        tensors = [tensor.flatten()[torch.randperm(tensor.numel())].view(tensor.shape) for tensor in tensors]
    draws.assert_match()


def upstream_of(result: Tensor) -> Tensor:
    """An upstream gradient that is neither ones nor constant."""
    return torch.linspace(-1, 2, result.numel()).to(result).view(result.shape)


def value_and_gradients(
    function: Callable[..., Tensor], mask: Sequence[bool] | None = None
) -> Callable[..., list[Tensor]]:
    """``function``'s result and its gradients for the upstream gradient of ``upstream_of``."""

    def run(*tensors: Tensor) -> list[Tensor]:
        needed = [True] * len(tensors) if mask is None else mask
        leaves = [
            tensor.detach().requires_grad_(needs) for tensor, needs in zip(tensors, needed, strict=True)
        ]
        result = function(*leaves)
        result.backward(upstream_of(result))
        return [result.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return run


def judged(
    case: Case, tensors: Sequence[Tensor], theirs: Callable[..., Tensor] | None = None
) -> Iterator[tuple[str, Tensor, Tensor, np.ndarray]]:
    """The result and each argument's gradient by name: ours, torch's, and the reference's."""
    ours, torchs = (
        value_and_gradients(function)(*tensors) for function in (case.ours, theirs or case.theirs)
    )
    arrays = [exactly(tensor) for tensor in tensors]
    references = [case.forward(*arrays), *case.backward(exactly(upstream_of(ours[0])), *arrays)]
    return zip(("result", *(f"grad_{name}" for name in case.shapes)), ours, torchs, references, strict=True)


def check(
    case: Case, dtype: torch.dtype | Sequence[torch.dtype], device: torch.device, **options: Any
) -> None:
    """Hold result and gradients by the tolerance policy, in as many draws as it asks for."""
    draws = Draws()
    while not draws.enough:
        for found in judged(case, case.arguments(dtype, device), **options):
            draws.add(*found)
    draws.assert_match()


def each_kind_once(cells: Iterable[Any], kinds: Callable[..., Iterable[Any]]) -> list[tuple[Any, bool]]:
    """The cells in a seeded random order, and whether each belongs to the sample.

    The sample has each of the kinds that ``kinds(*cell)`` names at least once.
    """
    cells = list(cells)
    seen: set[Any] = set()
    found = []
    for cell in random.Random(0).sample(cells, len(cells)):
        new = set(kinds(*cell)) - seen
        seen |= new
        found.append((cell, bool(new)))
    return found


def on_both_backends(
    cells: Iterable[tuple[Any, ...]],
    triton: Callable[..., Iterable[Any]],
    fallback: Callable[..., Iterable[Any]] = lambda *cell: [cell],
) -> list[pytest.param]:
    """Parameters ``(backend, *cell)``: by default a seeded sample of the cells for each backend, the rest marked full.

    A sample has each of the kinds that ``triton(*cell)`` or ``fallback(*cell)`` names at least once; without
    ``fallback`` that is all cells.
    """
    cells = list(cells)
    return [
        pytest.param(backend, *cell, marks=() if sampled else pytest.mark.full)
        for backend, kinds in (("fallback", fallback), ("triton", triton))
        for cell, sampled in each_kind_once(cells, kinds)
    ]
