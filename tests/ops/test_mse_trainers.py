"""mse_loss as trainers write it: mixed dtypes, weights that broadcast, sums over ``dim``."""

import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial, reduce
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import backend_for, mse_loss, mse_loss_and_grad, repeat, use_backend
from gradkernels.fallback import mse as launchers
from gradkernels.nn import MSELoss
from gradkernels.ops import torch_mse_loss
from gradkernels.reference import mse as reference
from torch import Tensor
from torch.nn import functional

from ..cases import Case, judged, label, value_and_gradients
from ..helpers import DTYPES, Draws

NAMES = ("input", "target", "weight")
SHAPE = (3, 5, 4)
WEIGHTS = [None, (), (1,), (4,), (5, 1), (3, 1, 1), (1, 5, 1), (3, 1, 4), (3, 5, 4)]
DIMS = [None, (), 0, 1, -1, (0, 1), (1, 2), (2, 0), [-3, 1, 2]]


@pytest.fixture(params=["reference", "fallback", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation in force: here the NumPy one too."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the fallback small problems are torch's own; here they too go by the operators."""
    monkeypatch.setattr(sys.modules["gradkernels.mse"], "SMALL", -1)


def loss_of(weight: tuple[int, ...] | None, shape: Any = SHAPE, **options: Any) -> Case:
    shapes = dict(zip(NAMES, (shape, shape, weight), strict=True))
    return Case("mse_loss", {name: sizes for name, sizes in shapes.items() if sizes is not None}, options)


def operands(
    dtypes: tuple[torch.dtype, ...], weight: tuple[int, ...] | None, device: torch.device, shape: Any = SHAPE
) -> dict[str, Tensor]:
    case = loss_of(weight, shape)
    return dict(zip(case.shapes, case.arguments(dtypes, device), strict=True))


def as_written_today(case: Case) -> Callable[..., Tensor]:
    """In plain torch: everything cast to the result's dtype, at least to float32."""

    def theirs(*given: Tensor) -> Tensor:
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in given))
        wide = torch.promote_types(dtype, torch.float32)
        return case.theirs(*(tensor.to(wide) for tensor in given)).to(dtype)

    return theirs


def sampled(cells: list[tuple[Any, ...]], every: int) -> list[Any]:
    """Parameters ``(backend, *cell)``: all cells on the fallback, every so many on the others, the rest marked full."""
    return [
        pytest.param(
            backend, *cell, marks=() if backend == "fallback" or i % every == 0 else pytest.mark.full
        )
        for backend in ("fallback", "reference", "triton")
        for i, cell in enumerate(cells)
    ]


def check(dtypes: tuple[torch.dtype, ...], weight: Any, device: torch.device, **options: Any) -> None:
    """The loss and each gradient: their dtypes, shapes and values."""
    case, draws = loss_of(weight, **options), Draws()
    while not draws.enough:
        for name, *found in judged(case, case.arguments(dtypes, device), as_written_today(case)):
            ours, theirs, _ = found
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            if name != "grad_weight" or options["reduction"] == "sum" or not _cancels(weight, options["dim"]):
                draws.add(name, *found)
    draws.assert_match()


@pytest.mark.parametrize(
    ("backend", "weight", "dim", "reduction"),
    sampled(list(product(WEIGHTS, DIMS, ("mean", "sum"))), every=11),
    ids=str,
    indirect=["backend"],
)
def test_dims_and_weights(backend: str, device: torch.device, weight: Any, dim: Any, reduction: str) -> None:
    check((torch.float32,) * 3, weight, device, reduction=reduction, dim=dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=label)
@pytest.mark.parametrize("block", [1, 7, 30])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_fallback_in_blocks(
    monkeypatch: pytest.MonkeyPatch, reduction: str, block: int, dtype: torch.dtype
) -> None:
    """As large tensors: blocks that cut each of the dimensions, of memory in any order."""
    monkeypatch.setattr(launchers, "_BLOCK", block)
    monkeypatch.setattr(launchers, "_FEW", 0)
    for weight, dim, order in product(
        (None, (4,), (3, 1, 1), (3, 1, 4), SHAPE), (None, (1, 2), 0), ((0, 1, 2), (2, 0, 1))
    ):
        case = loss_of(weight, reduction=reduction, dim=dim)
        given = case.arguments((dtype, torch.float32, torch.float32))
        given[0] = given[0].permute(order).contiguous().permute([order.index(d) for d in range(3)])
        assert len(list(launchers._blocks(torch.float32, *given[:2]))) >= 60 // block
        with use_backend("fallback"):
            found = list(judged(case, given))
            named = dict(zip(case.shapes, given, strict=True))
            alone = mse_loss_and_grad(**named, reduction=reduction, wrt=NAMES) if dim is None else None
            beside = partial(mse_loss, weight=named.get("weight"), reduction=reduction, dim=dim)
            constant = value_and_gradients(beside)(*given[:2])
        results = [(result, exact) for _, result, _, exact in found]
        results += [(result, exact) for result, (_, exact) in zip(constant, results, strict=False)]
        for result, exact in results:
            rtol = 2**-7 if result.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(result.double(), torch.from_numpy(exact), rtol=rtol, atol=2e-5)
        if alone is not None:
            torch.testing.assert_close(alone[0], found[0][1], rtol=1e-5, atol=1e-6)


def _cancels(weight: tuple[int, ...] | None, dim: Any) -> bool:
    """Whether each mean has one weight, which divides out: its gradient is a difference of equal numbers."""
    sizes = (1,) * (3 - len(weight)) + tuple(weight) if weight is not None else SHAPE
    dims = dim if isinstance(dim, (tuple, list)) else range(3) if dim is None else (dim,)
    return all(sizes[d] == 1 for d in dims or range(3))


MIXED = [dtypes for dtypes in product(DTYPES, repeat=3) if len(set(dtypes)) > 1]


@pytest.mark.parametrize(
    ("backend", "dtypes"),
    sampled([(dtypes,) for dtypes in MIXED], every=7),
    ids=lambda value: value if isinstance(value, str) else " ".join(str(label(dtype)) for dtype in value),
    indirect=["backend"],
)
def test_each_dtype_beside_each(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    number = MIXED.index(dtypes)
    weight = [None, (4,), (3, 1, 1), SHAPE][number % 4]
    dim, reduction = [None, (1, 2), 0][number % 3], ("mean", "sum")[number // 3 % 2]
    check(dtypes, weight, device, reduction=reduction, dim=dim)


def test_sixteen_bits_against_float32_are_not_rounded(backend: str, device: torch.device) -> None:
    """As F.mse_loss(input.float(), target): neither the target nor the loss goes through 16 bits."""
    input = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, device=device)
    target = torch.tensor([1 + 2**-12, 2 - 2**-10], device=device)
    for dim in (None, 0):
        loss = mse_loss(input, target, dim=dim)
        assert (loss.dtype, loss.item()) == (torch.float32, (2**-24 + 2**-20) / 2)
    half = torch.full((2,), 300.0, dtype=torch.float16, device=device)
    assert mse_loss(half, half.new_zeros(2).bfloat16(), reduction="sum").item() == 180_000  # inf in float16


@pytest.mark.parametrize("dim", [None, 1], ids=str)
def test_a_float16_mean_of_many_is_not_lost_to_overflow(
    backend: str, device: torch.device, dim: int | None
) -> None:
    """The sum of any 2,048 of these squares is beyond float16."""
    input = torch.full((2, 1 << 15), 8.0, dtype=torch.float16, device=device)
    assert (mse_loss(input, torch.zeros_like(input), dim=dim) == 64).all()


@pytest.mark.parametrize("dim", [None, (1, 2)], ids=str)
def test_under_autocast_16_bits_count_as_float32(backend: str, device: torch.device, dim: Any) -> None:
    for dtypes in (
        (torch.bfloat16,) * 3,
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float64,) * 3,
    ):
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        given = operands(dtypes, (3, 1, 1), device)
        leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
        with torch.autocast(device.type, torch.bfloat16):
            loss = mse_loss(**leaves, dim=dim)
            alone, grads = mse_loss_and_grad(**leaves, wrt=NAMES)
        assert loss.dtype == alone.dtype == wide
        found = torch.autograd.grad(loss.sum(), list(leaves.values()))
        for grad, other, leaf in zip(found, grads, leaves.values(), strict=True):
            assert grad.dtype == other.dtype == leaf.dtype
        outside = {name: leaf.to(wide) for name, leaf in leaves.items()}
        torch.testing.assert_close(loss, mse_loss(**outside, dim=dim))
        torch.testing.assert_close(alone, mse_loss(**outside).detach())


@pytest.mark.parametrize(
    ("backend", "weight", "reduction"),
    sampled(list(product(WEIGHTS, ("mean", "sum"))), every=5),
    ids=str,
    indirect=["backend"],
)
def test_loss_and_grad(backend: str, device: torch.device, weight: Any, reduction: str) -> None:
    for dtypes in ((torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float16)):
        case, draws = loss_of(weight, reduction=reduction), Draws()
        while not draws.enough:
            tensors = case.arguments(dtypes, device)
            given = dict(zip(case.shapes, tensors, strict=True))
            loss, grads = mse_loss_and_grad(**given, reduction=reduction, wrt=NAMES)
            assert [grad is None for grad in grads] == [name not in given for name in NAMES]
            (_, _, *expected), *others = judged(case, tensors, as_written_today(case))
            assert loss.dtype == expected[0].dtype
            draws.add("loss", loss, *expected)
            for (name, _, torchs, exact), grad in zip(others, grads, strict=False):
                assert (grad.dtype, grad.shape) == (torchs.dtype, torchs.shape)
                if name != "grad_weight" or reduction == "sum" or not _cancels(weight, None):
                    draws.add(name, -grad, torchs, exact)  # which are of an upstream gradient of -1
        draws.assert_match()
    with pytest.raises(TypeError, match="dim"):
        mse_loss_and_grad(**given, dim=0)


def test_all_dimensions_are_none(backend: str, device: torch.device) -> None:
    """Bit by bit; so are the dimensions' order and sign."""
    given = operands((torch.float32,) * 3, (3, 1, 1), device)
    for reduction in ("mean", "sum"):
        for dim in ((0, 1, 2), (), [], (2, -3, 1)):
            assert torch.equal(
                mse_loss(**given, dim=dim, reduction=reduction), mse_loss(**given, reduction=reduction)
            )
        one = mse_loss(**given, dim=(1, 2), reduction=reduction)
        assert torch.equal(one, mse_loss(**given, dim=(-1, 1), reduction=reduction))
    scalar = torch.tensor(3.0, device=device)
    for dim in (0, -1, (), None):
        assert mse_loss(scalar, scalar - 2, dim=dim).item() == 4


def test_a_weight_per_sample_divides_out_of_a_mean_per_sample(backend: str, device: torch.device) -> None:
    """Hence it belongs outside."""
    given = operands((torch.float32,) * 3, (3, 1, 1), device)
    bare = mse_loss(given["input"], given["target"], dim=(1, 2))
    torch.testing.assert_close(mse_loss(**given, dim=(1, 2)), bare)
    outside = (bare * given["weight"].view(3)).mean()
    losses = functional.mse_loss(given["input"], given["target"], reduction="none") * given["weight"]
    torch.testing.assert_close(outside, losses.mean())


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0]], ids=str)
def test_a_zero_sum_of_weights_gives_nan(backend: str, device: torch.device, weights: list[float]) -> None:
    input, target = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device)
    weight = torch.tensor(weights, device=device)[:, None]
    for shape in ((2, 1), (2, 3)):
        assert mse_loss(input, target, weight=weight.expand(shape)).isnan()
        alone, (grad, _, _) = mse_loss_and_grad(input, target, weight=weight.expand(shape))
        assert alone.isnan()
        assert grad.isnan().all()
        assert mse_loss(input, target, weight=weight.expand(shape), dim=0).isnan().all()
        assert mse_loss(input, target, weight=weight.expand(shape), reduction="sum").isfinite()
    per_row = mse_loss(input, target, weight=torch.tensor([[0.0], [2.0]], device=device), dim=1)
    assert per_row.isnan().tolist() == [True, False]
    assert np.isnan(reference.forward(input.cpu(), target.cpu(), weight.cpu()))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("value", [None, 1.0, math.nan, math.inf])
def test_nothing_to_add(
    backend: str, device: torch.device, shape: tuple[int, int], value: float | None
) -> None:
    """Whatever its weight is."""
    for dim, reduction in product((None, 0, 1), ("mean", "sum")):
        given = operands((torch.float32,) * 3, None if value is None else (shape[0], 1), device, shape)
        if value is not None:
            given["weight"].fill_(value)
        leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
        loss = mse_loss(**leaves, dim=dim, reduction=reduction)
        expected = torch_mse_loss(**leaves, dim=dim, reduction=reduction)
        assert loss.shape == expected.shape
        assert torch.equal(loss.isnan(), expected.isnan())
        assert (loss.nan_to_num() == 0).all()
        gradients = list(torch.autograd.grad(loss.sum(), list(leaves.values())))
        if dim is None:
            alone, found = mse_loss_and_grad(**leaves, reduction=reduction, wrt=tuple(leaves))
            assert alone.isnan() == loss.isnan()
            gradients += [grad for grad in found if grad is not None]
        for leaf, grad in zip([*leaves.values()] * 2, gradients, strict=False):
            assert grad.shape == leaf.shape
            assert not grad.any()


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("backend", ["fallback", "triton"], indirect=True)  # the reference: 0 times infinity
def test_an_infinite_weight_twice_differentiated(backend: str, device: torch.device, dim: int | None) -> None:
    """What does not depend on it stays finite."""
    given = operands((torch.float32,) * 3, (2, 3), device, (2, 3))
    given["weight"][0, 0] = math.inf
    for reduction, of in product(("mean", "sum"), NAMES):
        cotangent = torch.randn(2, 3, device=device).to(given[of])
        found = []
        for function in (mse_loss, torch_mse_loss):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
            loss = function(**leaves, dim=dim, reduction=reduction).sum()
            (first,) = torch.autograd.grad(loss, leaves[of], create_graph=True)
            inputs = list(leaves.values())
            found.append(torch.autograd.grad(first, inputs, cotangent, materialize_grads=True))
        torch.testing.assert_close(*found, equal_nan=True)


def test_a_call_that_repeats_but_for_the_type_of_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    """True == 1 == 1.0, as keys of a dictionary too."""
    monkeypatch.setattr(repeat, "_any_replay", True)  # as after a replay on Triton's backend
    x, y = torch.randn(2, 3, 2).half()  # of which torch's own ops serve no sum
    x.requires_grad_()
    shortcuts: dict[Any, Any] = mse_loss.shortcuts  # type: ignore[attr-defined]
    shortcuts.clear()
    for _ in range(2):
        mse_loss(x, y, reduction="sum", dim=(0, 1))
    assert [bool(shortcut) for shortcut in shortcuts.values()] == [True]
    wrong: list[Any] = [(0, True), (0.0, 1), (False, 1)]
    for dim in wrong:
        with pytest.raises(TypeError, match="dim must be an int or a sequence of ints"):
            mse_loss(x, y, reduction="sum", dim=dim)
    shortcuts.clear()


def test_errors_of_dim() -> None:
    x = torch.randn(3, 2)
    errors: list[tuple[Any, type[Exception], str]] = [
        (2, IndexError, "Dimension out of range (expected to be in range of [-2, 1], but got 2)"),
        ((0, -3), IndexError, "Dimension out of range (expected to be in range of [-2, 1], but got -3)"),
        ((0, 0), RuntimeError, "dim 0 appears multiple times in the list of dims"),
        ((1, -1), RuntimeError, "dim 1 appears multiple times in the list of dims"),
        (1.0, TypeError, "dim must be an int or a sequence of ints, got 1.0"),
        ((0, "x"), TypeError, "dim must be an int or a sequence of ints, got (0, 'x')"),
        (True, TypeError, "dim must be an int or a sequence of ints, got True"),
    ]
    for dim, error, words in errors:
        with pytest.raises(error, match=re.escape(words)) as ours:
            mse_loss(x, x, dim=dim)
        assert "mse_loss" in str(ours.value)
        with pytest.raises(error):
            x.sum(dim=dim)
    for dim in (0, (), (0, 1)):
        for call in (lambda **o: mse_loss(x, x, **o), lambda **o: MSELoss(**o)):
            with pytest.raises(ValueError, match="reduction 'none'"):
                call(dim=dim, reduction="none")
    for dim in (np.int64(1), [np.int64(1)], torch.Size([1])):
        assert mse_loss(x, x, dim=dim).shape == (3,)


def test_shapes_of_input_and_target_stay_equal() -> None:
    """A weight broadcasts; a target never does, whatever the dim and the dtypes."""
    for options in ({}, {"dim": 0}, {"weight": torch.ones(3, 1)}):
        for shape in ((3,), (1, 3), (3, 3), ()):
            with pytest.raises(ValueError, match=re.escape(f"(3, 1) but target has shape {shape}")):
                mse_loss(torch.ones(3, 1), torch.ones(shape).double(), **options)


def test_the_module() -> None:
    x, y = torch.randn(2, 3, 4, dtype=torch.bfloat16), torch.randn(2, 3, 4)
    assert torch.equal(MSELoss(dim=(1, 2))(x, y), mse_loss(x, y, dim=(1, 2)))
    assert torch.equal(MSELoss("sum", dim=0)(x, y), mse_loss(x, y, dim=0, reduction="sum"))
    assert repr(MSELoss(dim=(1, 2))) == "MSELoss(reduction='mean', dim=(1, 2))"
    assert repr(MSELoss()) == "MSELoss(reduction='mean')"


@pytest.mark.parametrize(
    ("wanted", "dims"),
    [((3, 1, 1), (1, 2)), ((4,), 0), ((), None), ((1, 5, 1), (0, 2)), ((3, 5, 4), 1)],
    ids=str,
)
def test_nothing_is_written_and_any_strides_do(
    backend: str, device: torch.device, wanted: Any, dims: Any
) -> None:
    """Permuted, with gaps, expanded: as contiguous copies of them give, to rounding; the bits repeat."""
    given = operands((torch.bfloat16, torch.float32, torch.float32), wanted, device, (6, 5, 4))
    given["input"] = given["input"][::2].permute(0, 2, 1).contiguous().permute(0, 2, 1)
    given["target"] = given["target"].expand(6, 5, 4)[1::2]
    upstream = torch.randn(mse_loss(given["input"], given["target"], dim=dims).shape, device=device)
    before = {name: tensor.clone() for name, tensor in given.items()}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}

    def results(tensors: dict[str, Tensor]) -> list[Tensor]:
        loss = mse_loss(**tensors, dim=dims)
        return [loss, *torch.autograd.grad(loss, list(tensors.values()), upstream.to(loss))]

    first = results(leaves)
    plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in before.items()}
    straight = results({name: tensor.requires_grad_() for name, tensor in plain.items()})
    for one, again, other, name in zip(first, results(leaves), straight, ("loss", *NAMES), strict=True):
        assert torch.equal(one, again)
        tolerance = 2**-7 if one.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=name)
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name])


def test_a_compiled_call_gives_the_same_bits(backend: str, device: torch.device) -> None:
    """One graph, traced once for all sizes of the batch."""
    if backend == "reference":
        pytest.skip("dynamo has nothing to add to NumPy")

    def loss(p: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return (mse_loss(p, t, dim=(1, 2)) * w).mean() + mse_loss(p, t, weight=w[:, None, None])

    def step(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        result = function(*tensors)
        return (result, *torch.autograd.grad(result, (tensors[0], tensors[2])))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (3, 5):
        p = torch.randn(batch, 5, 4, device=device).bfloat16().requires_grad_()
        t, w = torch.randn(batch, 5, 4, device=device), torch.rand(batch, device=device).requires_grad_()
        for ours, eager in zip(step(compiled, p, t, w), step(loss, p, t, w), strict=True):
            assert torch.equal(ours, eager)


def test_transforms_with_mixed_dtypes(backend: str, device: torch.device) -> None:
    """Each kind of derivative has the dtypes and shapes that torch gives; test_transforms judges the values."""
    given = operands((torch.bfloat16, torch.float32, torch.float64), (4,), device)
    tensors = tuple(given.values())

    def loss(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return mse_loss(x, t, weight=w, dim=(0, 2))

    def theirs(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return torch_mse_loss(x.double(), t.double(), w, dim=(0, 2))

    for make in (
        lambda f: torch.func.jvp(f, tensors, tuple(map(torch.cos, tensors))),
        lambda f: torch.func.grad(lambda *x: f(*x).square().sum(), (0, 1, 2))(*tensors),
        lambda f: torch.func.vmap(f, (0, 0, None))(*(x.expand(2, *x.shape) for x in tensors[:2]), tensors[2]),
        lambda f: torch.func.jvp(
            torch.func.grad(lambda *x: f(*x).square().sum(), (0, 1, 2)),
            tensors,
            tuple(map(torch.cos, tensors)),
        )[1],
        lambda f: torch.func.hessian(lambda *x: f(*x).square().sum(), (1, 2))(*tensors),
    ):
        ours, expected = (torch.utils._pytree.tree_leaves(make(f)) for f in (loss, theirs))
        for mine, torchs in zip(ours, expected, strict=True):
            assert (mine.dtype, mine.shape) == (torchs.dtype, torchs.shape)
            largest = torchs.abs().max().clamp(min=1)
            assert (mine - torchs).abs().max() <= 4 * torch.finfo(mine.dtype).eps * largest * (
                1 if mine.dtype == torch.bfloat16 else 2**4
            )
    assert backend_for(tensors[0]) == backend


def test_the_weights_gradient_of_a_loss_that_float16_does_not_hold(
    backend: str, device: torch.device
) -> None:
    """The loss is inf; each weight's gradient, a small part of it, is not."""
    input, weight = (torch.linspace(first, 320, 300, device=device).half() for first in (300, 310))
    loss, (_, _, gradient) = mse_loss_and_grad(input, input * 0, weight=weight, wrt=("weight",))
    assert gradient is not None
    squares, total = input.double().square(), weight.double().sum()
    expected = (squares - (squares * weight.double()).sum() / total) / total
    assert loss.item() == math.inf
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=4e-3)


def test_a_broadcast_weights_gradient_whose_parts_float16_does_not_hold(
    backend: str, device: torch.device
) -> None:
    """Its two parts, of the sum and of what that is divided by, are some 90,000; their difference is not."""
    input, weight = (torch.linspace(*ends, device=device) for ends in ((590, 610, 20), (0.5, 1.5, 4)))
    input, weight = input.view(5, 4), weight.half().requires_grad_()
    (gradient,) = torch.autograd.grad(mse_loss(input, torch.zeros_like(input), weight=weight), weight)
    squares, wide = input.double().square().mean(0), weight.detach().double()
    expected = (squares - (squares * wide).sum() / wide.sum()) / wide.sum()
    torch.testing.assert_close(gradient.double(), expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float64,) * 3, *MIXED[::7]], ids=str)
@pytest.mark.parametrize("weight", [None, (4,), (3, 1, 1), SHAPE], ids=str)
def test_small_losses_by_torchs_own_ops(
    monkeypatch: pytest.MonkeyPatch, weight: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    """As the fallback has them; by the operators in all other tests here."""
    monkeypatch.setattr(sys.modules["gradkernels.mse"], "SMALL", 1 << 23)
    if (
        weight is not None or len(set(dtypes[:2])) > 1 or dtypes[0].itemsize > 2
    ):  # else operands of 16 bits alone
        for name in ("mse_forward", "mse_backward"):
            monkeypatch.delattr(launchers, name)
    for dim, reduction in product((None, 0, (0, 2)), ("mean", "sum")):
        with use_backend("fallback"):
            check(dtypes, weight, torch.device("cpu"), dim=dim, reduction=reduction)
