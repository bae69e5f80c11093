"""What a forward keeps for its backward: of its arguments no more than torch's own ops keep."""

import weakref
from collections.abc import Callable
from itertools import product

import pytest
import torch
from gradkernels import linear, linear_mse_loss, use_backend
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..cases import Case, label

CASES = [
    Case("matmul", {"input": (5, 3), "other": (3, 4), "bias": (4,)}),
    Case("matmul", {"input": (2, 5, 3), "other": (3, 4)}),
    Case("linear", {"input": (2, 5, 3), "weight": (4, 3), "bias": (4,)}),
    Case("linear", {"input": (5, 3), "weight": (3,)}),
    Case("mse_loss", {"input": (5, 3), "target": (5, 3)}),
    Case("linear_mse_loss", {"input": (5, 3), "weight": (2, 3), "target": (5, 2), "bias": (2,)}),
    Case(
        "linear_mse_loss",
        {"input": (5, 3), "weight": (2, 3), "target": (5, 2), "bias": (2,), "sample_weight": (5,)},
    ),
    Case("linear_mse_loss", {"input": (2, 5, 3), "weight": (2, 4, 3), "target": (2, 5, 4), "bias": (2, 4)}),
    Case(
        "linear_mse_loss",
        {"input": (5, 3), "weight": (2, 4, 3), "target": (5, 4), "bias": (2, 4), "sample_weight": (2, 5)},
    ),
]


def saved(function: Callable[..., Tensor], tensors: list[Tensor]) -> set[int]:
    """The places of the arguments whose memory is kept."""
    kept = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*tensors)
    return {i for i, tensor in enumerate(tensors) if tensor.untyped_storage().data_ptr() in kept}


def ragged(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    """Models with rows of their own, as ragged ones."""
    B, N, _ = input.shape
    offsets = N * torch.arange(B + 1)
    return linear_mse_loss(input.flatten(0, 1), weight, target.flatten(0, 1), bias, offsets=offsets)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_no_argument_is_kept_that_torch_lets_go_of(case: Case) -> None:
    names = list(case.shapes)
    tensors = case.arguments()
    differentiable = [name for name in names if name != "sample_weight"]
    for mask in product((False, True), repeat=len(differentiable)):
        for tensor, needed in zip(tensors, mask, strict=False):
            tensor.requires_grad_(needed)
        allowed = saved(case.theirs, tensors)
        if case.op == "linear_mse_loss" and mask[2]:
            allowed.add(1)  # the weight is an argument of the operator that gives target's gradient
        with use_backend("reference"):
            assert saved(case.ours, tensors) <= allowed, (mask, names)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_backward_asks_for_each_tensor_once(case: Case) -> None:
    """A checkpoint refuses a second time; hooks that fetch it from elsewhere would do so twice."""
    unpacked = []

    def unpack(tensor: Tensor) -> Tensor:
        assert not any(tensor is other for other in unpacked)
        unpacked.append(tensor)
        return tensor

    with use_backend("reference"), saved_tensors_hooks(Tensor.detach, unpack):
        case.ours(*(tensor.requires_grad_() for tensor in case.arguments())).sum().backward()
    assert unpacked


def test_a_frozen_weight_lets_go_of_the_input() -> None:
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    hidden = x * 2
    alive = weakref.ref(hidden)
    with use_backend("reference"):
        result = linear(hidden, weight)
        del hidden
        assert alive() is None
        result.sum().backward()
    torch.testing.assert_close(x.grad, 2 * weight.sum(0).expand(5, 3))


@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("mask", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("case", CASES[-4:], ids=label)
def test_second_derivatives_of_constant_data(case: Case, mask: tuple[bool, bool], loss: bool) -> None:
    """By weight and bias alone, where the errors are not kept: of a penalty, and of one that is added to the loss."""
    tensors = case.arguments()
    leaves = [tensor.requires_grad_() for tensor, needed in zip(tensors[1:4:2], mask, strict=True) if needed]
    functions = [case.theirs, case.ours]
    if tensors[0].dim() == 3:
        functions.append(ragged)
    found = []
    for function in functions:
        with use_backend("reference"):
            value = function(*tensors).square().sum()
            first = torch.autograd.grad(value, leaves, create_graph=True)
            penalty = sum(grad.square().sum() for grad in first)
            second = torch.autograd.grad(3 * value * loss + penalty, leaves, create_graph=True)
            third = torch.autograd.grad(sum(grad.square().sum() for grad in second), leaves)
        found.append([*first, *second, *third])
    for derivatives in found[1:]:
        torch.testing.assert_close(derivatives, found[0])


def test_a_weight_may_be_written_where_no_gradient_needs_it() -> None:
    x, y, weight = torch.randn(5, 3), torch.randn(5, 2), torch.randn(2, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.nn.functional.mse_loss(x @ weight.T, y), weight)
    with use_backend("reference"):
        loss = linear_mse_loss(x, weight, y)
        with torch.no_grad():
            weight.zero_()
        loss.backward()
    torch.testing.assert_close(weight.grad, expected)
