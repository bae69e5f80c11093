"""Every op over dtypes x layouts x masks of requires_grad x kinds of upstream gradient, and what must never happen.

A cell (case, dtype, mask) is drawn once for each pair of layouts, of the arguments and of the upstream gradient. By
default each layout is met once in a cell of a seeded sample: on the fallback of each case's dtypes and masks and of
each op's pairs of them, on Triton of each case and of each op's dtypes and masks. The whole product is marked full.
"""

import sys
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from gradkernels import backends, use_backend
from torch import Tensor

from ..cases import (
    CASES,
    LINEAR_MSE,
    MATMUL,
    MSE,
    Case,
    judged,
    label,
    on_both_backends,
    value_and_gradients,
)
from ..helpers import DTYPES, Draws, assert_matches, exactly

Layout = Callable[[Tensor], Tensor]


def offset(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "strided": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor,
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape) if tensor.dim() else tensor,
    "expanded columns": lambda tensor: tensor[..., :1].expand(tensor.shape) if tensor.dim() else tensor,
    "offset": offset,
}
WIDE = [case.resized({2: 5, 3: 33, 4: 70}, matrices_only=True) for case in CASES]


def following(layout: str) -> list[str]:
    """``layout`` and those after it, for one argument each: all the same would make many gradients cancel."""
    names = list(LAYOUTS)
    return names[names.index(layout) :] + names[: names.index(layout)]


Pairs = list[tuple[str, str]]  # the layouts of the first argument and of the upstream gradient
EVERY_PAIR: Pairs = list(product(LAYOUTS, LAYOUTS))
CELLS = [(case, dtype, mask) for case in WIDE for dtype in DTYPES for mask in case.masks()]


def each_layout_once(case: Case, dtype: torch.dtype, mask: tuple[bool, ...]) -> Pairs:
    """Pairs that differ from cell to cell."""
    names = list(LAYOUTS)
    first = (4 * case.masks().index(mask) + DTYPES.index(dtype)) % len(names)
    return list(zip(names, following(names[first]), strict=True))


def check(case: Case, dtype: torch.dtype, mask: tuple[bool, ...], device: torch.device, pairs: Pairs) -> None:
    draws = Draws()
    for layout, upstream in pairs:
        tensors = [
            LAYOUTS[own](tensor)
            for own, tensor in zip(following(layout), case.arguments(dtype, device), strict=False)
        ]
        results = []
        for function in (case.ours, case.theirs):
            leaves = [
                tensor.detach().requires_grad_(needed) for tensor, needed in zip(tensors, mask, strict=True)
            ]
            result = function(*leaves)
            if function == case.ours:
                grad_output = LAYOUTS[upstream](torch.randn(result.shape, dtype=torch.float64).to(result))
            needed = [leaf for leaf in leaves if leaf.requires_grad]
            results.append((result, torch.autograd.grad(result, needed, grad_output)))
        arrays = [exactly(tensor) for tensor in tensors]
        (ours, our_grads), (theirs, their_grads) = results
        draws.add("result", ours, theirs, case.forward(*arrays))
        grads = case.backward(exactly(grad_output), *arrays)
        expected = [(name, grad) for name, grad, needs in zip(case.shapes, grads, mask, strict=True) if needs]
        for (name, reference), mine, torchs in zip(expected, our_grads, their_grads, strict=True):
            draws.add(f"grad_{name}", mine, torchs, reference)
    draws.assert_match()


SAMPLED = on_both_backends(
    CELLS,
    triton=lambda case, dtype, mask: [str(case), (case.op, dtype), (case.op, mask)],
    fallback=lambda case, dtype, mask: [(str(case), dtype), (str(case), mask), (case.op, dtype, mask)],
)


@pytest.mark.parametrize(
    ("backend", "case", "dtype", "mask"),
    [cell for cell in SAMPLED if not cell.marks],
    ids=label,
    indirect=["backend"],
)
def test_values(
    backend: str, device: torch.device, case: Case, dtype: torch.dtype, mask: tuple[bool, ...]
) -> None:
    check(case, dtype, mask, device, each_layout_once(case, dtype, mask))


@pytest.mark.full
@pytest.mark.parametrize(("case", "dtype", "mask"), CELLS, ids=label)
def test_values_of_every_pair(
    backend: str, device: torch.device, case: Case, dtype: torch.dtype, mask: tuple[bool, ...]
) -> None:
    check(case, dtype, mask, device, EVERY_PAIR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("case", [MATMUL[1], *MSE, *LINEAR_MSE[3:6]], ids=label)
def test_inf_and_nan(backend: str, device: torch.device, case: Case, dtype: torch.dtype) -> None:
    for value in (float("inf"), float("-inf"), float("nan"), 1e30):
        tensors = case.arguments(dtype, device)
        tensors[0].view(-1)[0] = value
        tensors[1].view(-1)[-1] = value
        with np.errstate(all="ignore"):
            results = judged(case, tensors)
        for name, *found in results:
            assert_matches(*found, f"{value}, {name}")


def test_subnormals_are_kept(backend: str, device: torch.device) -> None:
    input = torch.tensor([1e-40, -3e-41, 1e-45], device=device, requires_grad=True)
    loss = MSE[1].ours(input, torch.zeros_like(input))
    (grad,) = torch.autograd.grad(loss, input)
    assert torch.equal(grad, 2 * input.detach())
    matmul = MATMUL[0].ours(input.detach().view(3, 1), torch.ones(1, 1, device=device))
    assert torch.equal(matmul.view(3), input.detach())


@pytest.mark.parametrize("far", [0, 1, 2])
@pytest.mark.parametrize(
    "case",
    [
        Case("matmul", {"input": (4, 3), "other": (3, 4), "bias": (4,)}),
        Case("mse_loss", {"input": (4, 3), "target": (4, 3), "weight": (4, 3)}, {"reduction": "sum"}),
        Case("linear_mse_loss", {"input": (4, 3), "weight": (3,), "target": (4,)}),
        Case("linear_mse_loss", {"input": (4, 3), "weight": (4, 3), "target": (4, 4)}),
    ],
    ids=label,
)
def test_offsets_past_32_bits(backend: str, device: torch.device, case: Case, far: int) -> None:
    tensors = case.arguments(torch.float16, device)
    # Untouched memory is only reserved: no page of it exists until it is written.
    torch.use_deterministic_algorithms(False)  # which would fill all of it
    near = tensors[far]
    buffer = torch.empty(3 * 2**30 + 64, dtype=torch.float16, device=device)
    stride = (2**30, 1) if near.dim() == 2 else (2**30,)
    tensors[far] = buffer.as_strided(near.shape, stride).copy_(near)
    for name, *found in judged(case, tensors):
        assert_matches(*found, name)


@pytest.mark.parametrize(
    ("backend", "case", "layout"),
    on_both_backends(
        product(CASES, ["contiguous", "transposed", "expanded"]),
        triton=lambda case, layout: [str(case), (case.op, layout, case.options.get("reduction"))],
    ),
    ids=label,
    indirect=["backend"],
)
def test_nothing_is_written_and_bits_repeat(
    backend: str, device: torch.device, case: Case, layout: str
) -> None:
    tensors = [LAYOUTS[layout](tensor) for tensor in case.arguments(torch.float32, device)]
    before = [tensor.clone() for tensor in tensors]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    result = case.ours(*leaves)
    upstream = torch.randn(result.shape, device=device)
    upstream_before, saved = upstream.clone(), result.detach().clone()
    first, second = (torch.autograd.grad(result, leaves, upstream, create_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    sum(grad.square().sum() for grad in first).backward()
    assert torch.equal(case.ours(*leaves), result)
    without = case.ours(*tensors)
    assert torch.equal(case.ours(*tensors), without)
    if backend == "triton":  # the fallback without a gradient: test_the_fallback_without_a_gradient
        assert torch.equal(without, result)
    assert torch.equal(result, saved)
    for now, then in zip([*tensors, upstream], [*before, upstream_before], strict=True):
        assert torch.equal(now, then)
        assert now._version == 0


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_fallback_without_a_gradient(case: Case, layout: str) -> None:
    """Without a gradient, and in inference mode, torch may fold and multiply otherwise: as exact, not the same bits."""
    draws = Draws()
    with use_backend("fallback"):
        while not draws.enough:
            tensors = [LAYOUTS[layout](tensor) for tensor in case.arguments(torch.float32)]
            reference = case.forward(*map(exactly, tensors))
            draws.add("without a gradient", case.ours(*tensors), case.theirs(*tensors), reference)
            with torch.inference_mode():
                draws.add("in inference mode", case.ours(*tensors), case.theirs(*tensors), reference)
    draws.assert_match()


def test_a_saved_tensor_changed_in_place_is_noticed(backend: str, device: torch.device) -> None:
    for case in (MATMUL[0], MSE[0], MSE[3], LINEAR_MSE[6]):
        for position in range(2):
            tensors = [tensor.requires_grad_() for tensor in case.arguments(torch.float32, device)]
            result = case.ours(*tensors)
            with torch.no_grad():
                tensors[position].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.backward(torch.ones_like(result))


@pytest.mark.parametrize("case", LINEAR_MSE[6:7] + LINEAR_MSE[9:10], ids=label)
def test_no_grad_runs_the_loss_alone(
    backend: str, device: torch.device, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = sys.modules["gradkernels.linear_mse"]
    launchers = backends.implementation("linear_mse", torch.empty(0, device=device))
    asked: list[list[bool]] = []
    launch = launchers.linear_mse_forward

    def recorded(*args: object) -> list[Tensor]:
        asked.append(list(args[6]))
        return launch(*args)

    monkeypatch.setattr(launchers, "linear_mse_forward", recorded)
    monkeypatch.setattr(public, "SMALL", -1)  # on the fallback small problems are torch's
    tensors = case.arguments(torch.float32, device)
    case.ours(*tensors)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with torch.no_grad():
        case.ours(*leaves)
    with torch.inference_mode():
        case.ours(*leaves)
    assert asked == [[False] * 3] * 3
    case.ours(leaves[0].detach(), leaves[1], *(leaf.detach() for leaf in leaves[2:]))
    assert asked[3] == [False, True, False]


def test_inference_mode(backend: str, device: torch.device) -> None:
    for case in (MATMUL[1], MSE[0], MSE[3], LINEAR_MSE[6]):
        tensors = case.arguments(torch.float32, device)
        expected = case.ours(*tensors)
        with torch.inference_mode():
            inside = [tensor.clone() for tensor in tensors]
            result = case.ours(*inside)
            assert result.is_inference()
        for found in (result, case.ours(*inside)):
            if backend == "triton":
                assert torch.equal(found, expected)
            else:  # how exact: test_the_fallback_without_a_gradient
                torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one() -> None:
    for case in (MATMUL[1], MSE[3], LINEAR_MSE[6]):
        tensors = case.arguments(torch.float32, "cuda:1")
        with torch.cuda.device(0):
            ours, theirs = (value_and_gradients(function)(*tensors) for function in (case.ours, case.theirs))
        torch.testing.assert_close(ours, theirs)
