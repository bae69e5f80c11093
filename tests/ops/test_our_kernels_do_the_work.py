"""On the Triton backend all full-size arithmetic is in our kernels, and vmap does not loop.

A dispatch mode sees every aten operator below autograd, inside our launchers too. Allowed are allocation without
a fill, views, and arithmetic on small tensors: no more elements than a weight (K, D), or one for each of a batch,
while the data have more. Beside them torch's engine adds the gradients of a tensor that was used twice.

The kernels themselves do not run: what they compute is tested elsewhere.
"""

import importlib
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from gradkernels import linear_mse_loss, use_backend
from gradkernels.operator import OPERATORS
from gradkernels.ops import FUNCTIONS

from ..cases import Case, label
from ..conftest import DEVICES

SAMPLES, FEATURES, OUTPUTS = 64, 8, 4
SMALL = FEATURES * OUTPUTS
BATCH = 3
LAUNCH = {operator.overload: operator.launch for operator in OPERATORS}
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
    """Lists the aten operators that read or write more than a ``small`` tensor.

    Attributes:
        seen: what none of ours may do.
        sums: how often the engine added two gradients of one tensor.
    """

    def __init__(self, small: int) -> None:
        super().__init__()
        self.small = small
        self.seen: list[str] = []
        self.sums = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LAUNCH:
            with self:
                return LAUNCH[func](*args)
        result = func(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
            for tree in ((args, kwargs), result)
        )
        memory = {tensor.untyped_storage()._cdata for tensor in inputs}
        view = not func._schema.is_mutable and all(
            tensor.untyped_storage()._cdata in memory for tensor in outputs
        )
        name = func._schema.name.removeprefix("aten::")
        if view or name.removeprefix("new_").startswith("empty"):
            return result
        # new_zeros and the like take of a tensor no more than its dtype and device.
        touched = outputs if name.startswith("new_") else [*inputs, *outputs]
        size = max((tensor.numel() for tensor in touched), default=0)
        if size <= self.small:
            return result
        if name == "add" and in_the_engine() and inputs[0].shape == inputs[1].shape:
            self.sums += 1
        else:
            self.seen.append(f"{func} on {size} elements")
        return result


def in_the_engine() -> bool:
    """Whether autograd runs and none of our code was called by it."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("gradkernels"):
            return False
        frame = frame.f_back
    return torch._C._current_graph_task_id() >= 0


def spread(like: Tensor) -> Tensor:
    """A full-size upstream gradient that is a view of one number."""
    return like.new_full((), 0.25).expand(like.shape)


Function = Callable[..., Tensor]


def forward(function: Function, tensors: list[Tensor]) -> None:
    function(*tensors)


def backward(function: Function, tensors: list[Tensor]) -> None:
    result = function(*(tensor.requires_grad_() for tensor in tensors))
    torch.autograd.grad(result, tensors, spread(result))


def batched_backward(function: Function, tensors: list[Tensor]) -> None:
    result = function(*(tensor.requires_grad_() for tensor in tensors))
    torch.autograd.grad(result, tensors, spread(result).expand(BATCH, *result.shape), is_grads_batched=True)


def double_backward(function: Function, tensors: list[Tensor]) -> None:
    result = function(*(tensor.requires_grad_() for tensor in tensors))
    first = torch.autograd.grad(result, tensors, spread(result).requires_grad_(), create_graph=True)
    for gradient in first:
        if gradient.requires_grad:
            torch.autograd.grad(gradient, tensors, spread(gradient), retain_graph=True, allow_unused=True)


def forward_mode(function: Function, tensors: list[Tensor]) -> None:
    jvp(function, tuple(tensors), tuple(tensor.detach() for tensor in tensors))


def gradients(function: Function) -> Callable[..., tuple[Tensor, ...]]:
    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        result, pull = vjp(function, *tensors)
        return pull(spread(result))

    return run


def forward_over_reverse(function: Function, tensors: list[Tensor]) -> None:
    jvp(gradients(function), tuple(tensors), tuple(tensor.detach() for tensor in tensors))


def tangents(function: Function) -> Callable[..., Tensor]:
    return lambda *tensors: jvp(function, tensors, tensors)[1]


def mapped(function: Callable[..., Any], tensors: list[Tensor]) -> None:
    """Over all arguments, and over each alone."""
    vmap(function)(*(tensor.expand(BATCH, *tensor.shape) for tensor in tensors))
    for i, tensor in enumerate(tensors):
        dims = tuple(0 if j == i else None for j in range(len(tensors)))
        with _disable_current_modes():
            batch = torch.stack([tensor] * BATCH)
        vmap(function, dims)(*tensors[:i], batch, *tensors[i + 1 :])


def vmap_of_forward(function: Function, tensors: list[Tensor]) -> None:
    mapped(function, tensors)


def vmap_of_gradients(function: Function, tensors: list[Tensor]) -> None:
    mapped(gradients(function), tensors)


def vmap_of_forward_mode(function: Function, tensors: list[Tensor]) -> None:
    mapped(tangents(function), tensors)


FIRST = [
    forward,
    backward,
    batched_backward,
    forward_mode,
    vmap_of_forward,
    vmap_of_gradients,
    vmap_of_forward_mode,
]
WAYS = [*FIRST, double_backward, forward_over_reverse]
BATCHED = (batched_backward, vmap_of_forward, vmap_of_gradients, vmap_of_forward_mode)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that the test would have launched."""
    names: list[str] = []
    for op in FUNCTIONS:
        module = importlib.import_module(f"gradkernels.triton.{op}")
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **options: names.append(kernel.__name__))
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_arithmetic_of_torch(case: Case, way: Any, dtype: torch.dtype, launches: list[str]) -> None:
    tensors = case.arguments(dtype, DEVICES["triton"])
    with use_backend("triton"), Traffic(SMALL * BATCH if way in BATCHED else SMALL) as traffic:
        way(case.ours, tensors)
    assert not traffic.seen
    assert launches
    weighted_mean = "mean" in case.options.values() and {"weight", "sample_weight"} & {*list(case.shapes)[2:]}
    if way in FIRST and not weighted_mean:  # whose weights stand above and below the fraction bar
        assert traffic.sums == 0


def torch_has(case: Case, way: Any) -> bool:
    """torch has no forward derivative of its mse_loss_backward."""
    return way is not forward_over_reverse or case.op != "mse_loss" or "weight" in case.shapes


@pytest.mark.parametrize(
    ("case", "way"),
    [cell for cell in product(CASES, WAYS) if torch_has(*cell)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_torchs_own_is_seen(case: Case, way: Any) -> None:
    """The mode is not blind: each case, done by torch, is caught."""
    with Traffic(SMALL * BATCH if way in BATCHED else SMALL) as traffic:
        way(case.theirs, case.arguments(torch.float32))
    assert traffic.seen


@pytest.mark.parametrize(
    "function", [lambda f: f, gradients, tangents], ids=["forward", "gradients", "tangents"]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_launches_do_not_grow_with_the_batch(case: Case, function: Any, launches: list[str]) -> None:
    counts = {}
    for size in (2, 5):
        launches.clear()
        samples = zip(*(case.arguments(torch.float32, DEVICES["triton"]) for _ in range(size)), strict=True)
        with use_backend("triton"):
            vmap(function(case.ours))(*map(torch.stack, samples))
        counts[size] = len(launches)
    assert counts[2] == counts[5] > 0


@pytest.mark.parametrize("outputs", [1, 4, 70])
def test_no_number_of_a_float64_launch_is_rounded(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton passes a Python float as float32, which the interpreter does not do; 2 / 63 is none of those."""
    rounded: dict[torch.dtype, list[float]] = {torch.float32: [], torch.float64: []}

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        rounded[dtype] += [arg for arg in args if isinstance(arg, float) and arg != float(np.float32(arg))]

    for op in FUNCTIONS:
        monkeypatch.setattr(importlib.import_module(f"gradkernels.triton.{op}"), "launch", launch)
    shapes = ((63, FEATURES), (outputs, FEATURES), (63, outputs), (outputs,))
    for dtype in rounded:
        leaves = [torch.ones(s, dtype=dtype, device=DEVICES["triton"], requires_grad=True) for s in shapes]
        with use_backend("triton"):
            linear_mse_loss(*leaves).backward()
    assert rounded[torch.float32]
    assert not rounded[torch.float64]
