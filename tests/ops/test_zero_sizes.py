"""Zero-size dimensions: torch's values and torch's gradients, whichever arguments need them."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from gradkernels import linear, linear_mse_loss, linear_mse_loss_and_grad, mse_loss_and_grad, use_backend
from gradkernels.ops import torch_linear_mse_loss
from torch import Tensor
from torch.func import jacfwd

from ..cases import REDUCTIONS, Case, value_and_gradients
from ..conftest import DEVICES

Shape = tuple[int, ...]


def mse_cases() -> Iterator[Case]:
    for shape, weight in product([(0,), (0, 3), (3, 0), (0, 0), (2, 0, 3)], (False, True)):
        names = ("input", "target", "weight") if weight else ("input", "target")
        for reduction in REDUCTIONS:
            yield Case("mse_loss", dict.fromkeys(names, shape), {"reduction": reduction})


def sizes(*choices: tuple[int, ...]) -> list[Shape]:
    return [chosen for chosen in product(*choices) if 0 in chosen]


def leading(n: int) -> list[Shape]:
    return [(n,), (2, n), (n, 2)]


def linear_mse_cases() -> Iterator[Case]:
    for n, d, k in sizes((0, 2), (0, 3), (0, 1, 2)):
        for lead, bias, samples in product(leading(n), (False, True), ("none", "one each", "all")):
            target = (*lead, k)
            shapes: dict[str, Shape] = {"input": (*lead, d), "weight": (k, d), "target": target}
            if bias:
                shapes["bias"] = (k,)
            if samples != "none":
                shapes["sample_weight"] = lead if samples == "one each" else target
            for reduction in REDUCTIONS:
                yield Case("linear_mse_loss", shapes, {"reduction": reduction})
                if k == 1 and samples != "all":
                    flat = shapes | {"weight": (d,), "target": lead}
                    yield Case("linear_mse_loss", flat, {"reduction": reduction})


def product_cases() -> Iterator[Case]:
    for (n, d, k), bias in product(sizes((0, 2), (0, 3), (0, 2)), (False, True)):
        extra: dict[str, Shape] = {"bias": (k,)} if bias else {}
        for lead in (*leading(n), ()):
            yield Case("linear", {"input": (*lead, d), "weight": (k, d), **extra})
            yield Case("linear", {"input": (*lead, d), "weight": (d,), **({"bias": (1,)} if bias else {})})
        for left, right in (
            ((n, d), (d, k)),
            ((n, 2, d), (n, d, k)),
            ((1, 2, d), (n, d, k)),
            ((n, 2, d), (1, d, k)),
            ((3, 1, 2, d), (n, d, k)),
            ((d,), (n, d, k)),
        ):
            yield Case("matmul", {"input": left, "other": right, **extra})


CASES = {"mse_loss": mse_cases, "linear_mse_loss": linear_mse_cases, "products": product_cases}


def some_masks(case: Case) -> list[tuple[bool, ...]]:
    """All arguments need gradients, or one, or all but one."""
    some = (1, len(case.shapes) - 1, len(case.shapes))
    return [mask for mask in case.masks() if sum(mask) in some]


def same(ours: list[Tensor], theirs: list[Tensor], what: str) -> None:
    torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda message: f"{what}: {message}")


@pytest.mark.parametrize("name", CASES)
def test_as_torch(backend: str, device: torch.device, name: str) -> None:
    cases = list(CASES[name]())
    for case in cases if backend == "fallback" else cases[::5]:  # interpreted kernels take their time
        tensors = case.arguments(device=device)
        for mask in some_masks(case):
            ours, theirs = (value_and_gradients(f, mask)(*tensors) for f in (case.ours, case.theirs))
            same(ours, theirs, f"{case} {mask}")


@pytest.mark.parametrize("backend", ["fallback", "triton", "reference"])
def test_loss_and_grad(backend: str) -> None:
    for case in [*mse_cases(), *linear_mse_cases()]:
        if case.options["reduction"] == "none" or "sample_weight" in case.shapes:
            continue
        call = {"mse_loss": mse_loss_and_grad, "linear_mse_loss": linear_mse_loss_and_grad}[case.op]
        tensors = case.arguments(device=DEVICES[backend])
        with use_backend(backend):
            loss, grads = call(
                **dict(zip(case.shapes, tensors, strict=True)), **case.options, wrt=tuple(case.shapes)
            )
        leaves = [tensor.requires_grad_() for tensor in tensors]
        expected = case.theirs(*leaves)
        theirs = torch.autograd.grad(expected, leaves)
        same([loss, *(g for g in grads if g is not None)], [expected.detach(), *theirs], str(case))


def test_jacobians_of_no_outputs(backend: str, device: torch.device) -> None:
    """By a vmap over nothing, where a size of -1 could be any."""
    x, weight, bias = (torch.randn(shape, device=device) for shape in ((5, 1), (0, 1), (0,)))
    assert jacfwd(linear, 2)(x, weight, bias).shape == (5, 0, 0)


@pytest.mark.parametrize("layout", ["one", "own", "shared", "ragged"])
def test_a_root_of_the_mean_of_no_rows(backend: str, device: torch.device, layout: str) -> None:
    """Its cotangent is nan, and a sum over no rows is still 0; a model with rows has its own gradient."""
    models = () if layout == "one" else (3,)
    rows = {"own": (3, 0), "ragged": (4,)}.get(layout, (0,))
    x, w, y, b = (
        torch.randn(shape, device=device, requires_grad=True)
        for shape in ((*rows, 5), (*models, 2, 5), (*rows, 2), (*models, 2))
    )
    offsets = torch.tensor([0, 0, 4, 4], device=device) if layout == "ragged" else None
    loss = linear_mse_loss(x, w, y, b, offsets=offsets)
    gradients = torch.autograd.grad(loss.sqrt().sum(), (x, w, y, b), create_graph=True)
    second = torch.autograd.grad(
        sum(gradient.sum() for gradient in gradients), (w, b), materialize_grads=True
    )
    if layout != "ragged":
        expected = second_expected = [torch.zeros_like(w), torch.zeros_like(b)]
    else:
        plain = torch_linear_mse_loss(x, w[1], y, b[1])
        firsts = torch.autograd.grad(plain.sqrt(), (x, w, y, b), create_graph=True)
        seconds = torch.autograd.grad(sum(gradient.sum() for gradient in firsts), (w, b))
        expected, second_expected = [firsts[1], firsts[3]], [*seconds]
    same([gradients[1], gradients[3]], expected, layout)
    same([*second], second_expected, f"{layout} again")
