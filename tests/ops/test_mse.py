"""mse_loss and mse_loss_and_grad: sizes, dtypes, weights, errors. Derivatives and layouts have files of their own."""

import re
import sys
from itertools import product

import gradkernels
import numpy as np
import pytest
import torch
from gradkernels import linear_mse_loss, mse_loss, mse_loss_and_grad, use_backend
from gradkernels.fallback import mse as launchers
from gradkernels.reference import mse as reference
from torch.nn import functional

from ..cases import REDUCTIONS, Case, check, label
from ..helpers import DTYPES, SIZES, Draws, assert_matches, exactly

NAMES = ("input", "target", "weight")


def check_loss_and_grad(
    case: Case, names: tuple[str, ...], dtype: torch.dtype, device: torch.device, some: slice
) -> None:
    """What ``<op>_and_grad`` gives for ``some`` of the choices among ``names``, the arguments with a gradient."""
    call = getattr(gradkernels, f"{case.op}_and_grad")
    given = dict(zip(case.shapes, case.arguments(dtype, device), strict=True))
    leaves = [tensor.clone().requires_grad_() for tensor in given.values()]
    theirs = case.theirs(*leaves)
    their_grads = dict(zip(given, torch.autograd.grad(theirs, leaves), strict=True))
    arrays = [exactly(tensor) for tensor in given.values()]
    exact = dict(zip(given, case.backward(np.ones(()), *arrays), strict=True))
    for mask in list(product((False, True), repeat=len(names)))[some]:
        wrt = tuple(name for name, wanted in zip(names, mask, strict=True) if wanted)
        loss, grads = call(**given, **case.options, wrt=wrt)
        assert_matches(loss, theirs.detach(), case.forward(*arrays), "loss")
        assert not loss.requires_grad
        for name, grad in zip(names, grads, strict=True):
            if name in wrt and name in given:
                assert_matches(grad, their_grads[name], exact[name], f"grad_{name}")
            else:
                assert grad is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(backend: str, device: torch.device, size: int, reduction: str, weighted: bool) -> None:
    names = NAMES if weighted else NAMES[:2]
    # Where there is one weight, its gradient in a mean is a difference of equal numbers: nothing to measure by.
    shapes = [(3, size)] if weighted and size == 1 else [(size,), (3, size)]
    for shape in shapes:
        case = Case("mse_loss", dict.fromkeys(names, shape), {"reduction": reduction})
        check(case, torch.float32, device)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 4), (2, 1, 3, 2), (2, 1, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_ranks(backend: str, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for reduction in REDUCTIONS if backend == "fallback" else REDUCTIONS[len(shape) % 3 :][:1]:
        check(Case("mse_loss", {"input": shape, "target": shape}, {"reduction": reduction}), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_grad(
    backend: str, device: torch.device, reduction: str, weighted: bool, dtype: torch.dtype
) -> None:
    case = Case(
        "mse_loss", dict.fromkeys(NAMES if weighted else NAMES[:2], (33, 7)), {"reduction": reduction}
    )
    every = 1 if backend == "fallback" else 2
    check_loss_and_grad(case, NAMES, dtype, device, slice(DTYPES.index(dtype) % every, None, every))


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_fallback_in_blocks(
    monkeypatch: pytest.MonkeyPatch, reduction: str, weighted: bool, dtype: torch.dtype
) -> None:
    """As large tensors: five blocks, the last in part."""
    monkeypatch.setattr(sys.modules["gradkernels.mse"], "SMALL", -1)
    monkeypatch.setattr(launchers, "_BLOCK", 50)
    monkeypatch.setattr(launchers, "_FEW", 1)
    x = torch.empty(33, 7, dtype=dtype)
    assert len(list(launchers._blocks(x.dtype, x, x))) == 5
    assert len(list(launchers._blocks(x.dtype, x.mT, x.mT))) == 5  # of seven rows each
    test_loss_and_grad("fallback", x.device, reduction, weighted, dtype)
    names = NAMES if weighted else NAMES[:2]
    check(Case("mse_loss", dict.fromkeys(names, x.shape), {"reduction": reduction}), dtype, x.device)


@pytest.mark.parametrize("weight", [None, (), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
def test_loss_and_grad_of_one_element_in_two_dimensions(
    backend: str, device: torch.device, dtype: torch.dtype, weight: tuple[int, ...] | None
) -> None:
    input, target = (torch.full((1, 1), value, dtype=dtype, device=device) for value in (4.0, 1.0))
    weights = None if weight is None else torch.full(weight, 2.0, dtype=dtype, device=device)
    loss, (gradient, _, _) = mse_loss_and_grad(input, target, weight=weights)
    assert loss == 9
    assert gradient.tolist() == [[6.0]]


def test_loss_and_grad_pays_no_heed_to_requires_grad(backend: str, device: torch.device) -> None:
    input = torch.randn(5, device=device, requires_grad=True)
    loss, (grad_input, grad_target, _) = mse_loss_and_grad(input, torch.zeros_like(input), wrt="target")
    assert grad_input is None
    assert not loss.requires_grad
    torch.testing.assert_close(grad_target, -0.4 * input.detach())
    with torch.no_grad():
        assert mse_loss_and_grad(input, torch.zeros_like(input))[1][0] is not None


def test_a_weighted_float16_mean_is_not_lost_to_overflow(backend: str, device: torch.device) -> None:
    """sum(w e^2) is beyond float16; the mean is not."""
    ones = torch.ones(100_000, dtype=torch.float16, device=device)
    given = {"input": 2 * ones, "target": ones, "weight": ones}
    assert mse_loss(**given).item() == 1
    loss, (grad, _, _) = mse_loss_and_grad(**given)
    assert loss.item() == 1
    assert grad[0].item() == torch.tensor(2e-5).half().item()


@pytest.mark.parametrize("n", [100, 100_000])
def test_float16_is_added_up_in_float32(backend: str, device: torch.device, n: int) -> None:
    """300^2 does not fit, and 2 / n is rounded to 2^-24; torch's own loss takes both in float16."""
    input = torch.zeros(n, 1, dtype=torch.float16, device=device)
    input[0] = 300
    target = torch.zeros_like(input)
    one = torch.ones(1, 1, dtype=torch.float16, device=device, requires_grad=True)
    weights = torch.ones_like(input)
    for call in (
        mse_loss,
        lambda input, target: mse_loss(input, target, weight=weights),
        lambda input, target: linear_mse_loss(input, one, target),
        lambda input, target: linear_mse_loss(input, one, target, sample_weight=weights),
        lambda input, target: linear_mse_loss(input[None], one[None], target[None])[0],
    ):
        x = input.clone().requires_grad_()
        loss = call(x, target)
        loss.backward(loss.new_tensor(1024.0))
        torch.testing.assert_close(loss, loss.new_tensor(90_000 / n))
        assert x.grad is not None
        torch.testing.assert_close(x.grad[0], input.new_tensor([600 * 1024 / n]), rtol=2**-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=label)
def test_long_sums_are_kept_wide(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """A bfloat16 accumulator stops counting at 256, a float16 one at 2048."""
    input = torch.ones(4097, dtype=dtype, device=device)
    input[0] = 64  # 64^2 + 4096 ones
    assert mse_loss(input, torch.zeros_like(input), reduction="sum").item() == 8192


@pytest.mark.parametrize("op", [mse_loss, mse_loss_and_grad])
def test_errors(op: type) -> None:
    name, x = op.__name__, torch.randn(3, 1)
    with pytest.raises(ValueError, match=rf"{name}: input has shape \(3, 1\) but target has shape \(3,\)"):
        op(x, torch.randn(3))
    with pytest.raises(ValueError, match=r"target has shape \(1, 1\)"):
        op(x, torch.randn(1, 1))
    for shape in ((2,), (2, 1), (3, 2), (1, 3, 1)):
        match = re.escape(
            f"{name}: weight has shape {shape}, which does not broadcast to input's shape (3, 1)"
        )
        with pytest.raises(ValueError, match=match):
            op(x, x, weight=torch.ones(shape))
    with pytest.raises(ValueError, match=f"{name}: 'max' is not a valid value for reduction"):
        op(x, x, reduction="max")
    with pytest.raises(TypeError, match="positional"):
        op(x, x, x)


def test_errors_of_loss_and_grad() -> None:
    x = torch.randn(3)
    with pytest.raises(ValueError, match="mse_loss_and_grad: 'none' is not a valid value for reduction"):
        mse_loss_and_grad(x, x, reduction="none")
    with pytest.raises(ValueError, match="wrt names 'bias'; expected any of 'input', 'target', 'weight'"):
        mse_loss_and_grad(x, x, wrt=("input", "bias"))


@pytest.mark.parametrize("spread", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_squares_of_few_bits(dtype: torch.dtype, spread: int) -> None:
    """bfloat16 values in float32, float32 values in float64: where sums of squares round to the same side."""
    narrow = torch.bfloat16 if dtype is torch.float32 else torch.float32
    draws = Draws()
    while not draws.enough:
        x = (torch.rand(launchers._MANY) * spread + torch.rand(()) + 0.5).to(narrow).to(dtype)
        y = torch.zeros_like(x)
        exact = reference.forward(exactly(x), exactly(y))
        ours = launchers.mse_forward(x, y, None, "mean", 0, dtype)
        draws.add("loss", ours, functional.mse_loss(x, y), exact)
    draws.assert_match()


def test_gradients_of_a_loss_over_dims_lie_as_the_operands(backend: str, device: torch.device) -> None:
    x, y = torch.randn(2, 3, 4, 5, device=device, requires_grad=True).unbind()
    for dim in (0, (0, 2), (0, 1)):
        for weight in (None, torch.rand(3, 1, 5, device=device)):
            for grad in torch.autograd.grad(mse_loss(x, y, weight=weight, dim=dim).sum(), (x, y)):
                assert grad.is_contiguous()


def test_a_weighted_loss_of_more_than_a_million_numbers_takes_the_fused_way() -> None:
    """Which is the faster one there."""
    x, w, weights = torch.ones(1 << 20, 1), torch.ones(2, 1, requires_grad=True), torch.ones(1 << 20)
    with use_backend("fallback"):
        nodes = [
            linear_mse_loss(x, w[:outputs], x.expand(-1, outputs), sample_weight=weights).grad_fn
            for outputs in (1, 2)
        ]
    summed = [node.next_functions[0][0] for node in nodes if node is not None]
    assert ["LinearMse" in node.name() for node in summed if node is not None] == [False, True]


def test_a_weighted_mean_of_one_number(backend: str, device: torch.device) -> None:
    input, target, weight = torch.tensor([3.0, 1.0, 2.0], device=device)
    for dim in (None, 0, -1):
        assert mse_loss(input, target, weight=weight, dim=dim).item() == 4
