"""On the Triton backend all full-size arithmetic is in our kernels, and vmap does not loop.

A dispatch mode sees every aten operator below autograd, inside our launchers too. Allowed are allocation, views,
arithmetic on small tensors (no more elements than a weight (K, D), far fewer than the data), and what is listed
in ``BETWEEN`` and ``INSIDE``.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from gradkernels import use_backend
from gradkernels.registration import OPERATORS

from .cases import Case
from .conftest import DEVICES

SAMPLES, FEATURES, OUTPUTS = 64, 8, 4
SMALL = FEATURES * OUTPUTS
# What autograd does between operators: it adds the gradients of two paths and sums what had been expanded.
BETWEEN = {"add", "sum", "clone"}
# The Hessian's kernel wants its operands dense: what is expanded, as the upstream gradient here, it copies.
INSIDE = {"contiguous", "clone"}
LAUNCH = {operator.overload: operator._launch for operator in OPERATORS}
CASES = [
    Case("matmul", {"input": (SAMPLES, FEATURES), "other": (FEATURES, OUTPUTS), "bias": (OUTPUTS,)}),
    Case("linear", {"input": (2, SAMPLES, FEATURES), "weight": (OUTPUTS, FEATURES), "bias": (OUTPUTS,)}),
    *(
        Case("mse_loss", dict.fromkeys(names, (SAMPLES, OUTPUTS)), {"reduction": reduction})
        for reduction in ("mean", "sum", "none")
        for names in (("input", "target"), ("input", "target", "weight"))
    ),
    *(
        Case("linear_mse_loss", shapes, {"reduction": reduction})
        for reduction in ("mean", "sum")
        for shapes in (
            {"input": (SAMPLES, FEATURES), "weight": (FEATURES,), "target": (SAMPLES,), "bias": (1,)},
            {
                "input": (SAMPLES, FEATURES),
                "weight": (OUTPUTS, FEATURES),
                "target": (SAMPLES, OUTPUTS),
                "bias": (OUTPUTS,),
                "sample_weight": (SAMPLES,),
            },
        )
    ),
]


class Traffic(TorchDispatchMode):
    """Lists the aten operators that read or write more than a small tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.allowed = BETWEEN

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LAUNCH:
            self.allowed = INSIDE
            try:
                with self:
                    return LAUNCH[func](*args)
            finally:
                self.allowed = BETWEEN
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in ((args, kwargs), result)
        )
        memory = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        view = not func._schema.is_mutable and all(
            tensor.untyped_storage().data_ptr() in memory for tensor in outputs
        )
        name = func._schema.name.removeprefix("aten::")
        if view or name in self.allowed or name.removeprefix("new_").startswith("empty"):
            return result
        # new_zeros and the like take of a tensor no more than its dtype and device.
        touched = outputs if func._schema.name.startswith("aten::new_") else [*inputs, *outputs]
        size = max((tensor.numel() for tensor in touched), default=0)
        if size > SMALL:
            self.seen.append(f"{func} on {size} elements")
        return result


def spread(like: Tensor) -> Tensor:
    """A full-size upstream gradient that is a view of one number."""
    return like.new_full((), 0.25).expand(like.shape)


def forward(function: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    function(*tensors)


def backward(function: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    result = function(*(tensor.requires_grad_() for tensor in tensors))
    torch.autograd.grad(result, tensors, spread(result))


def double_backward(function: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    result = function(*(tensor.requires_grad_() for tensor in tensors))
    (first,) = torch.autograd.grad(result, tensors[1], spread(result), create_graph=True)
    torch.autograd.grad(first, tensors[:1], spread(first))


def forward_mode(function: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    jvp(function, tuple(tensors), tuple(tensor.detach() for tensor in tensors))


def per_sample(function: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    input, *rest = tensors
    vmap(function, (0, *[None] * len(rest)))(input.expand(2, *input.shape), *rest)


WAYS = [
    forward,
    backward,
    double_backward,
    forward_mode,
    per_sample,
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched during the test; what the interpreter does in a launch is not looked at."""
    names: list[str] = []
    for op in ("matmul", "mse", "linear_mse"):
        module = importlib.import_module(f"gradkernels.triton.{op}")
        inner = module.launch

        def counted(kernel: Any, *args: Any, _inner: Any = inner, **options: Any) -> None:
            names.append(kernel.__name__)
            with _disable_current_modes():
                _inner(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", counted)
    return names


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_arithmetic_of_torch(case: Case, way: Callable[..., None], launches: list[str]) -> None:
    tensors = case.arguments(torch.float32, DEVICES["triton"])
    with use_backend("triton"), Traffic() as traffic:
        way(case.ours, tensors)
    assert not traffic.seen
    assert launches


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchs_own_is_seen(case: Case, way: Callable[..., None]) -> None:
    """The mode is not blind: each case, done by torch, is caught."""
    with Traffic() as traffic:
        way(case.theirs, case.arguments(torch.float32))
    assert traffic.seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_launches_do_not_grow_with_the_batch(case: Case, launches: list[str]) -> None:
    def total(*tensors: Tensor) -> Tensor:
        result = case.ours(*tensors)
        return result if result.dim() == 0 else result.sum()

    counts = {}
    for size in (2, 5):
        launches.clear()
        samples = zip(*(case.arguments(torch.float32, DEVICES["triton"]) for _ in range(size)), strict=True)
        stacked = [torch.stack(tensors) for tensors in samples]
        with use_backend("triton"):
            vmap(case.ours)(*stacked)
            vmap(grad(total, tuple(range(len(stacked)))))(*stacked)
        counts[size] = len(launches)
    assert counts[2] == counts[5] > 0
