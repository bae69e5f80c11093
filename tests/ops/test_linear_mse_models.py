"""linear_mse_loss and linear_mse_loss_and_grad of a batch of models: layouts, sizes, offsets, weights, errors.

Over 500 lines, since each clause is tested of own, shared and ragged rows alike.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import backends, linear_mse_loss, linear_mse_loss_and_grad, use_backend
from gradkernels import linear_mse_models as module
from gradkernels import linear_mse_rows as algebra
from gradkernels.linear_mse_operators import slopes
from gradkernels.ops import torch_linear_mse_loss
from gradkernels.reference import linear_mse as reference
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from ..cases import REDUCTIONS, label, on_both_backends, value_and_gradients
from ..conftest import DEVICES
from ..helpers import DTYPES, assert_matches, exactly, to_numpy

B, N, D, K = 3, 5, 4, 2
WANTED = ("input", "weight", "target", "bias")
Shape = tuple[int, ...]


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the fallback small problems are torch's own; here they too go by the operators."""
    for one in (sys.modules[linear_mse_loss.__module__], module):
        monkeypatch.setattr(one, "SMALL", -1)


@dataclass(frozen=True)
class Layout:
    """Shapes of the arguments; ``cuts`` are offsets."""

    input: Shape
    target: Shape
    samples: tuple[Shape, ...]
    weight: Shape = (B, K, D)
    cuts: tuple[int, ...] | None = None

    def __str__(self) -> str:
        kind = "ragged" if self.cuts else "shared" if len(self.input) == 2 else "own"
        return f"{kind} {self.input} {self.weight} {self.target}".replace(" ", "")

    def draw(
        self, dtype: torch.dtype, device: Any, bias: bool = True, samples: Shape | None = None
    ) -> dict[str, Tensor | None]:
        def randn(shape: Shape) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(device, dtype)

        return {
            "input": randn(self.input),
            "weight": randn(self.weight),
            "target": randn(self.target),
            "bias": randn(self.weight[:-1]) if bias else None,
            "sample_weight": None if samples is None else randn(samples).abs() + 0.5,
        }

    def offsets(self, device: Any, dtype: torch.dtype = torch.int64) -> Tensor | None:
        return None if self.cuts is None else torch.tensor(self.cuts, dtype=dtype, device=device)


EACH = ((B, N), (B, N, K), (N,), (N, K))
LAYOUTS = [
    Layout((B, N, D), (B, N, K), EACH),
    Layout((B, N, D), (N, K), EACH),
    Layout((N, D), (B, N, K), EACH),
    Layout((N, D), (N, K), EACH),
    Layout((B, N, D), (B, N, 1), ((B, N), (N, 1)), weight=(B, 1, D)),
    Layout((9, D), (9, K), ((9,), (9, K)), cuts=(0, 4, 4, 9)),
    Layout((12, D), (12, 1), ((12,), (12, 1)), weight=(B, 1, D), cuts=(2, 4, 9, 11)),
]
# No model of one row: in a mean the gradient of one weight is a difference of equal numbers.
LARGER = [
    Layout((3, 140, 9), (3, 140, 1), ((3, 140),), weight=(3, 1, 9)),
    Layout((2, 70, 20), (2, 70, 17), ((2, 70),), weight=(2, 17, 20)),
    Layout((400, 9), (5, 400, 1), ((5, 400),), weight=(5, 1, 9)),
    Layout((33, 20), (2, 33, 17), ((33, 17),), weight=(2, 17, 20)),
    Layout((33, 70), (2, 33, 17), ((33, 17),), weight=(2, 17, 70)),
    Layout((300, 9), (300, 1), ((300,),), weight=(4, 1, 9), cuts=(3, 130, 130, 134, 298)),
    Layout((90, 20), (90, 17), ((90,),), weight=(3, 17, 20), cuts=(0, 70, 72, 90)),
]


def theirs(layout: Layout, given: dict[str, Tensor | None], reduction: str) -> Tensor:
    """Plain torch; ragged rows by a loop over the models."""
    if layout.cuts is None:
        return torch_linear_mse_loss(**given, reduction=reduction)
    losses = []
    for b, (start, end) in enumerate(zip(layout.cuts, layout.cuts[1:], strict=False)):
        part = {
            name: None if tensor is None else tensor[b] if name in ("weight", "bias") else tensor[start:end]
            for name, tensor in given.items()
        }
        if start == end and reduction == "mean":
            losses.append(given["weight"].new_full((), torch.nan))
        else:
            losses.append(torch_linear_mse_loss(**part, reduction=reduction))
    if reduction != "none":
        return torch.stack(losses)
    first, last = (
        given["target"].new_zeros((n, layout.weight[1]))
        for n in (layout.cuts[0], layout.target[0] - layout.cuts[-1])
    )
    return torch.cat([first, *losses, last])


def compare(layout: Layout, drawn: dict[str, Tensor | None], reduction: str, offsets: Tensor | None) -> None:
    """Loss and gradients of both functions against plain torch and the reference."""
    given = {name: tensor for name, tensor in drawn.items() if tensor is not None}
    leaves, copies = ({name: t.clone().requires_grad_() for name, t in given.items()} for _ in range(2))
    loss = linear_mse_loss(**leaves, offsets=offsets, reduction=reduction)
    other = theirs(layout, copies, reduction)
    arrays = {name: exactly(tensor) for name, tensor in given.items()}
    cuts = None if offsets is None else to_numpy(offsets).astype(int)
    value = reference.forward(**arrays, reduction=reduction, offsets=cuts)

    def check(upstream: Tensor, found: dict[str, Tensor], what: str) -> None:
        torchs = torch.autograd.grad(other, list(copies.values()), upstream, retain_graph=True)
        grads = reference.backward(exactly(upstream), **arrays, reduction=reduction, offsets=cuts)
        exact = dict(zip((*WANTED, "sample_weight"), grads, strict=True))
        for name, their in zip(copies, torchs, strict=True):
            if name in found:
                assert found[name].dtype == given[name].dtype
                assert_matches(found[name], their, exact[name], f"grad_{name}{what}")

    assert_matches(loss.detach(), other.detach(), value, "loss")
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).to(loss).view(loss.shape)
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
    check(upstream, dict(zip(leaves, grads, strict=True)), "")
    if reduction == "none":
        return
    loss, grads = linear_mse_loss_and_grad(**given, offsets=offsets, reduction=reduction, wrt=WANTED)
    assert_matches(loss, other.detach(), value, "loss at once")
    at_once = {name: grad for name, grad in zip(WANTED, grads, strict=True) if grad is not None}
    assert at_once.keys() == given.keys() - {"sample_weight"}
    check(torch.ones_like(other), at_once, " at once")


@pytest.mark.parametrize(
    ("backend", "layout", "reduction"),
    on_both_backends(product(LAYOUTS, REDUCTIONS), triton=lambda layout, reduction: [layout, reduction]),
    ids=str,
    indirect=["backend"],
)
def test_layouts(backend: str, device: torch.device, layout: Layout, reduction: str) -> None:
    shapes = [None, *layout.samples]
    for samples in shapes if backend == "fallback" else shapes[:: len(shapes) - 1]:
        given = layout.draw(torch.float32, device, bias=samples is None, samples=samples)
        compare(layout, given, reduction, layout.offsets(device))


@pytest.mark.parametrize(
    "layout",
    [
        Layout((B, 1, D), (B, 1, 1), (), weight=(B, 1, D)),
        Layout((1, D), (1, 1), (), weight=(B, 1, D)),
        Layout((3, D), (3, 1), (), weight=(B, 1, D), cuts=(0, 1, 2, 3)),
    ],
    ids=str,
)
def test_models_of_one_error(backend: str, device: torch.device, layout: Layout) -> None:
    for reduction in REDUCTIONS:
        compare(layout, layout.draw(torch.float32, device), reduction, layout.offsets(device))


@pytest.mark.parametrize("layout", LAYOUTS[:5], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_small_batches_by_torchs_own_ops(
    monkeypatch: pytest.MonkeyPatch, reduction: str, layout: Layout
) -> None:
    """As the fallback has them; by the operators in all other tests here."""
    monkeypatch.setattr(module, "SMALL", 1 << 18)
    with use_backend("fallback"):
        test_layouts("fallback", torch.device("cpu"), layout, reduction)


@pytest.mark.parametrize(
    ("backend", "layout", "dtype"),
    on_both_backends(product(LARGER, DTYPES), triton=lambda layout, dtype: [layout, dtype]),
    ids=lambda value: label(value) or str(value),
    indirect=["backend"],
)
def test_sizes_and_dtypes(backend: str, device: torch.device, layout: Layout, dtype: torch.dtype) -> None:
    cut = layout.offsets(device, torch.int32)
    for samples in (None, layout.samples[0]):
        compare(layout, layout.draw(dtype, device, samples=samples), "mean", cut)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reference_backend(layout: Layout) -> None:
    with use_backend("reference"):
        for samples in (None, layout.samples[0]):
            given = layout.draw(torch.float64, "cpu", samples=samples)
            compare(layout, given, "mean", layout.offsets("cpu"))


def test_a_weight_per_row_before_one_per_output() -> None:
    """(B, N) wherever that fits, so where N = K and B = N too."""
    x, w, y, s = torch.randn(2, 2, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 2), torch.rand(2, 2)
    per_row = linear_mse_loss(x, w, y, sample_weight=s.unsqueeze(-1).expand(2, 2, 2).contiguous())
    assert torch.equal(linear_mse_loss(x, w, y, sample_weight=s), per_row)


def leaves_of(
    layout: Layout, reduction: str, samples: Shape | None, plain: bool = False
) -> tuple[Any, list[Tensor]]:
    """The loss as a function of the tensors that are there; a model without rows has a constant mean, nan.

    ``plain``: in plain torch.
    """
    given = layout.draw(torch.float64, "cpu", samples=samples)
    names = [name for name, tensor in given.items() if tensor is not None]
    offsets = layout.offsets("cpu")

    def function(*tensors: Tensor) -> Tensor:
        present = dict(zip(names, tensors, strict=True))
        if plain:
            loss = theirs(layout, dict.fromkeys(given) | present, reduction)
        else:
            loss = linear_mse_loss(**present, offsets=offsets, reduction=reduction)
        return loss.nan_to_num(0.0) if layout.cuts is not None else loss

    return function, [given[name].requires_grad_() for name in names]


SMALL = [
    (Layout((2, 3, 2), (2, 3, 2), (), weight=(2, 2, 2)), (2, 3)),
    (Layout((3, 2), (2, 3, 2), (), weight=(2, 2, 2)), (3, 2)),
    (Layout((3, 2), (3, 2), (), weight=(2, 2, 2)), None),
    (Layout((5, 2), (5, 1), (), weight=(3, 1, 2), cuts=(1, 3, 3, 4)), (5,)),
    (Layout((3, 2), (3, 2), (), weight=(2, 2, 2), cuts=(0, 2, 3)), None),
]


@pytest.mark.parametrize(
    "reduction", ["mean", *(pytest.param(name, marks=pytest.mark.full) for name in ("sum", "none"))]
)
@pytest.mark.parametrize(("layout", "samples"), SMALL, ids=str)
def test_derivatives(layout: Layout, samples: Shape | None, reduction: str) -> None:
    function, leaves = leaves_of(layout, reduction, samples)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True)


ON_BOTH_BACKENDS = [
    *(("fallback", *case) for case in SMALL[:4]),
    ("triton", *SMALL[0]),
    *(pytest.param("triton", *case, marks=pytest.mark.full) for case in SMALL[1:4]),
]


@pytest.mark.parametrize(("backend", "layout", "samples"), ON_BOTH_BACKENDS, ids=str, indirect=["backend"])
def test_second_derivatives_beside_those_of_the_loss(
    backend: str, device: torch.device, layout: Layout, samples: Shape | None
) -> None:
    """By all arguments, of a function of the loss that is not linear: each output of the operator has a cotangent."""
    if device.type != "cpu":
        pytest.skip("runs under the interpreter")
    results = []
    for plain in (False, True):
        torch.manual_seed(0)
        function, leaves = leaves_of(layout, "mean", samples, plain)
        directions = [leaf.detach().cos() for leaf in leaves]
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        value = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        tangent = jvp(function, tuple(leaves), tuple(directions))[1]
        results.append([*torch.autograd.grad(value, leaves), tangent])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("backend", "layout", "samples"),
    ON_BOTH_BACKENDS,
    ids=str,
    indirect=["backend"],
)
def test_vmap(backend: str, layout: Layout, samples: Shape | None) -> None:
    """Over all arguments, and over each alone: values and gradients."""
    if DEVICES[backend] != "cpu":
        pytest.skip("runs under the interpreter")
    function, leaves = leaves_of(layout, "mean", samples)
    tensors = [leaf.detach() for leaf in leaves]
    all_dims = [
        (0,) * len(tensors),
        *(tuple(0 if i == j else None for i in range(len(tensors))) for j in range(len(tensors))),
    ]
    argnums = tuple(range(len(tensors)))
    scalar = grad(lambda *args: function(*args).square().sum(), argnums)
    for dims in all_dims if backend == "fallback" else all_dims[:2]:
        mapped = [
            t if dim is None else torch.stack([t, t.cos()]) for t, dim in zip(tensors, dims, strict=True)
        ]
        each = [[t if dim is None else t[i] for t, dim in zip(mapped, dims, strict=True)] for i in range(2)]
        torch.testing.assert_close(vmap(function, dims)(*mapped), torch.stack([function(*e) for e in each]))
        wanted = [torch.stack(parts) for parts in zip(*(scalar(*e) for e in each), strict=True)]
        torch.testing.assert_close(list(vmap(scalar, dims)(*mapped)), wanted)


def test_vmap_over_offsets(backend: str, device: torch.device) -> None:
    layout = LAYOUTS[5]
    given = layout.draw(torch.float32, device)
    cuts = torch.tensor([[0, 4, 4, 9], [1, 1, 8, 8]], device=device)

    def loss(offsets: Tensor) -> Tensor:
        return linear_mse_loss(**given, offsets=offsets, reduction="sum")

    torch.testing.assert_close(vmap(loss)(cuts), torch.stack([loss(cut) for cut in cuts]))
    if device.type == "cpu":
        with pytest.raises(ValueError, match="must not decrease, nor leave"):
            vmap(loss)(cuts + 1)


def test_vmap_of_one_model_is_a_batch_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradkernels.fallback import linear_mse_models as launchers

    calls = []
    launcher = launchers.linear_mse_models_forward
    monkeypatch.setattr(
        launchers, "linear_mse_models_forward", lambda *args: calls.append(args[1].shape) or launcher(*args)
    )
    x, w, y = torch.randn(6, 5, 3), torch.randn(6, 1, 3), torch.randn(6, 5, 1)
    vmap(grad(linear_mse_loss, 1))(x, w, y)
    vmap(grad(linear_mse_loss, 1), (None, 0, None))(x[0], w, y[0])
    assert calls == [w.shape, w.shape]


@pytest.mark.parametrize("layout", LARGER, ids=str)
def test_a_non_finite_row_touches_no_other_model(backend: str, device: torch.device, layout: Layout) -> None:
    cut = layout.offsets(device)
    clean = layout.draw(torch.float32, device)
    model = layout.weight[0] // 2
    for name, value in (
        ("input", torch.nan),
        ("target", torch.inf),
        ("weight", torch.nan),
        ("bias", torch.inf),
    ):
        if name == "input" and layout.cuts is None and len(layout.input) == 2:
            continue
        given = {key: None if t is None else t.clone() for key, t in clean.items()}
        given[name][layout.cuts[model] if layout.cuts and name in ("input", "target") else model] = value
        before = linear_mse_loss_and_grad(**clean, offsets=cut)
        after = linear_mse_loss_and_grad(**given, offsets=cut)
        keep = [b for b in range(layout.weight[0]) if b != model]
        pairs = ((before[0], after[0]), (before[1][1], after[1][1]), (before[1][3], after[1][3]))
        for old, new in pairs:
            torch.testing.assert_close(old[keep], new[keep], equal_nan=True, rtol=0, atol=0)
            assert not new[model].isfinite().all()


def test_models_without_rows(backend: str, device: torch.device) -> None:
    layout = Layout((6, D), (6, K), (), cuts=(1, 1, 4, 4))
    for samples in (None, (6,)):
        given = layout.draw(torch.float32, device, samples=samples)
        for reduction, empty in (("mean", torch.nan), ("sum", 0.0)):
            leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in given.items()}
            loss = linear_mse_loss(**leaves, offsets=layout.offsets(device), reduction=reduction)
            expected = torch.tensor([empty, 1, empty], device=device)
            assert torch.equal(loss.detach().isnan(), expected.isnan())
            loss.sum().backward()
            for b in (0, 2):
                assert not leaves["weight"].grad[b].any()
                assert not leaves["bias"].grad[b].any()
            for name in ("input", "target", *(["sample_weight"] if samples else [])):
                assert not leaves[name].grad[[0, 4, 5]].any()
                assert leaves[name].grad[1:4].any()
            _, grads = linear_mse_loss_and_grad(
                **given, offsets=layout.offsets(device), reduction=reduction, wrt=WANTED
            )
            for mine, name in zip(grads, WANTED, strict=True):
                torch.testing.assert_close(mine, leaves[name].grad)


@pytest.mark.parametrize(
    "layout",
    [
        Layout((B, 4, D), (B, 4, K), ((B, 4), (B, 4, K), (4,))),
        Layout((4, D), (4, K), ((B, 4), (4, K))),
        Layout((9, D), (9, K), ((9,), (9, K)), cuts=(0, 4, 4, 8)),
    ],
    ids=str,
)
def test_a_zero_sum_of_sample_weights_gives_nan(backend: str, device: torch.device, layout: Layout) -> None:
    """To the models that have such weights, and to what they share."""
    cut = layout.offsets(device)
    for shape in layout.samples:
        given = layout.draw(torch.float32, device, samples=shape)
        samples = given["sample_weight"]
        first = samples[0] if shape[0] == B else samples
        first[:4] = torch.tensor([1.0, -1.0, 2.0, -2.0], device=device).view(4, *[1] * (first.dim() - 1))
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        loss = linear_mse_loss(**leaves, offsets=cut)
        alone, at_once = linear_mse_loss_and_grad(**given, offsets=cut, wrt=WANTED)
        grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
        arrays = {name: exactly(tensor) for name, tensor in given.items()}
        losses = reference.forward(**arrays, offsets=layout.cuts)
        exact = reference.backward(np.ones(B), **arrays, offsets=layout.cuts)
        pairs = (
            (loss, losses),
            (alone, losses),
            *zip(grads, exact, strict=True),
            *zip(at_once, exact[:4], strict=True),
        )
        for found, wanted in pairs:
            wanted = torch.tensor(wanted, dtype=torch.float32, device=device)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert loss[0].isnan()
        assert grads[1][0].isnan().all()
        assert loss[2].isnan() == (shape[0] == 4)


def test_non_finite_rows_of_no_model(backend: str, device: torch.device) -> None:
    x, w, y, s = (torch.randn(shape, device=device) for shape in ((6, 2), (2, 1, 2), (6, 1), (6,)))
    for tensor in (x, y, s):
        tensor[0] = tensor[5] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in (x, w, y, s)]
    cut = torch.tensor([1, 3, 5], device=device)
    for reduction in REDUCTIONS:
        loss = linear_mse_loss(*leaves[:3], sample_weight=s, offsets=cut, reduction=reduction)
        assert loss.isfinite().all()
        for found in torch.autograd.grad(loss.sum(), leaves):
            assert found.isfinite().all()


@pytest.mark.parametrize(
    "shape", [(0, 300, 2, 1), (0, 300, 2, 9), (2, 0, 3, 1), (2, 3, 0, 1), (2, 3, 2, 0)], ids=str
)
def test_zero_sizes(backend: str, device: torch.device, shape: Shape) -> None:
    b, n, d, k = shape
    layouts = (
        Layout((b, n, d), (b, n, k), (), weight=(b, k, d)),
        Layout((n, d), (n, k), (), weight=(b, k, d)),
        Layout((n, d), (n, k), (), weight=(b, k, d), cuts=(0,) * b + (n,)),
    )
    for layout in layouts:
        for reduction in REDUCTIONS:
            given = layout.draw(torch.float32, device)
            leaves = {name: None if t is None else t.requires_grad_() for name, t in given.items()}
            loss = linear_mse_loss(**leaves, offsets=layout.offsets(device), reduction=reduction)
            assert loss.shape == (
                (b,)
                if reduction != "none"
                else layout.target
                if len(layout.target) == 3 or layout.cuts
                else (b, n, k)
            )
            loss.nansum().backward()
            for leaf in leaves.values():
                assert leaf is None or leaf.grad.isfinite().all()


def test_ragged_rows_of_infinite_weights(backend: str, device: torch.device) -> None:
    """Loss and gradient are infinite, not nan: what fills up a tile of rows has no part in them."""
    x, y, w = torch.ones(3, 1), torch.zeros(3, 1), torch.full((1, 1, 1), torch.inf)
    cut = torch.tensor([0, 3], device=device)
    loss, grads = linear_mse_loss_and_grad(*(t.to(device) for t in (x, w, y)), offsets=cut)
    assert loss.item() == grads[1].item() == torch.inf


@pytest.mark.parametrize(("K", "D"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_long_models_of_ragged_rows(K: int, D: int) -> None:
    """The fallback makes long sums of short ones: equal numbers, whose rounding goes to the same side throughout."""
    long = 1 << 18
    layout = Layout((long + 5, D), (long + 5, K), (), weight=(3, K, D), cuts=(1, long, long, long + 4))
    found = []
    for dtype in (torch.float32, torch.float64):
        drawn = {
            name: torch.full_like(tensor, 0.1, dtype=torch.float32).to(dtype)
            for name, tensor in layout.draw(dtype, "cpu").items()
            if tensor is not None
        }
        with use_backend("fallback"):
            loss, grads = linear_mse_loss_and_grad(
                **drawn, offsets=layout.offsets("cpu"), reduction="sum", wrt=WANTED
            )
        found.append([loss, *grads])
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=300 * torch.finfo(torch.float32).eps, atol=0)


def test_strides(backend: str, device: torch.device) -> None:
    layout = LARGER[0]
    given = layout.draw(torch.float32, device)
    views = {
        "input": given["input"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "weight": given["weight"].repeat_interleave(2, 2)[..., ::2],
        "target": given["target"].mT.contiguous().mT,
        "bias": given["bias"].t().contiguous().t(),
    }
    for wrt in (("weight", "bias"), WANTED):
        expected, found = (
            linear_mse_loss_and_grad(**tensors, wrt=wrt)
            for tensors in (given | {"sample_weight": None}, views)
        )
        torch.testing.assert_close(found[0], expected[0])
        for mine, other in zip(found[1], expected[1], strict=True):
            assert (mine is None) is (other is None)
            assert mine is None or torch.allclose(mine, other, atol=1e-5)


@pytest.mark.parametrize("op", [linear_mse_loss, linear_mse_loss_and_grad])
def test_errors(op: Any) -> None:
    name = op.__name__
    x, w, y = torch.randn(B, N, D), torch.randn(B, K, D), torch.randn(B, N, K)
    rows, cut = (x.reshape(-1, D), y.reshape(-1, K)), torch.tensor([0, 4, 4, 15])
    shown = {
        r"input has shape \(2, 5, 4\), expected \(3, N, 4\) or \(N, 4\) .* \(3, 2, 4\)": (x[:2], w, y),
        r"input has shape \(3, 5, 3\).* \(3, 2, 4\)": (x[..., :3], w, y),
        r"input has shape \(4,\).* \(3, 2, 4\)": (x[0, 0], w, y),
        r"target has shape \(3, 5, 1\), expected \(3, 5, 2\)": (x, w, y[..., :1]),
        r"target has shape \(2, 5, 2\), expected \(3, 5, 2\)": (x, w, y[:2]),
        r"bias has shape \(2,\), expected \(3, 2\)": (x, w, y, torch.randn(K)),
    }
    for message, arguments in shown.items():
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            op(*arguments)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(3,\), expected \(3, 5, 2\)"):
        op(x, w, y, sample_weight=torch.rand(3))
    with pytest.raises(ValueError, match=r"offsets has shape \(3,\), expected \(4,\)"):
        op(rows[0], w, rows[1], offsets=cut[:3])
    with pytest.raises(ValueError, match=r"offsets need a weight of shape \(B, K, D\), got .* \(2, 4\)"):
        op(rows[0], w[0], rows[1], offsets=cut)
    with pytest.raises(ValueError, match=r"input has shape \(3, 5, 4\), expected \(R, 4\)"):
        op(x, w, rows[1], offsets=cut)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(5,\), expected \(15, 2\)"):
        op(rows[0], w, rows[1], sample_weight=torch.rand(5), offsets=cut)
    with pytest.raises(TypeError, match=r"offsets has dtype torch.float32; int32 and int64 are served"):
        op(rows[0], w, rows[1], offsets=cut.float())
    with pytest.raises(TypeError, match=r"offsets must be a torch.Tensor, got list"):
        op(rows[0], w, rows[1], offsets=[0, 4, 4, 15])
    with pytest.raises(RuntimeError, match="weight is on cpu but offsets is on meta"):
        op(rows[0], w, rows[1], offsets=cut.to("meta"))
    with pytest.raises(TypeError, match=r"input has dtype torch\.float32 but target has dtype torch.float64"):
        op(x, w, y.double())
    with pytest.raises(ValueError, match="'max' is not a valid value for reduction"):
        op(x, w, y, reduction="max")


@pytest.mark.parametrize("name", ["fallback", "triton", "reference"])
@pytest.mark.parametrize("cut", [[0, 4, 3, 9], [-1, 4, 4, 9], [0, 4, 4, 10]], ids=str)
def test_offsets_that_do_not_fit_are_an_error_on_the_cpu(name: str, cut: list[int]) -> None:
    if name == "triton":
        pytest.importorskip("triton")
        if DEVICES["triton"] != "cpu":
            pytest.skip("runs under the interpreter")
    given = LAYOUTS[5].draw(torch.float32, "cpu")
    with use_backend(name), pytest.raises(ValueError, match=r"offsets must not decrease, nor leave \[0, 9\]"):
        linear_mse_loss(**given, offsets=torch.tensor(cut))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where nobody waits for the values of offsets."""
    for operators in ("linear_mse_rows", "linear_mse_operators"):
        monkeypatch.setattr(f"gradkernels.{operators}.check_bounds", lambda *_: None)


@pytest.mark.parametrize(
    "layout", [LAYOUTS[5], *(pytest.param(large, marks=pytest.mark.full) for large in LARGER[4:])], ids=str
)
@pytest.mark.parametrize("shift", [-3, pytest.param(3, marks=pytest.mark.full), 2**31 - 2], ids=str)
def test_kernels_clamp_offsets(unchecked: None, layout: Layout, shift: int) -> None:
    """As many rows as there are; the memory checker watches."""
    pytest.importorskip("triton")
    given = layout.draw(torch.float32, DEVICES["triton"], samples=layout.samples[0])
    rows = layout.input[0]
    cut = torch.tensor(layout.cuts, dtype=torch.int64, device=DEVICES["triton"]) + shift
    for backend in ("triton", "fallback") if DEVICES["triton"] == "cpu" else ("triton",):
        with use_backend(backend):
            for reduction in REDUCTIONS:
                loss = linear_mse_loss(**given, offsets=cut, reduction=reduction)
                expected = linear_mse_loss(**given, offsets=cut.clamp(0, rows), reduction=reduction)
                torch.testing.assert_close(loss, expected, equal_nan=True)
            bad, good = (
                linear_mse_loss_and_grad(**given, offsets=o, wrt=WANTED)[1] for o in (cut, cut.clamp(0, rows))
            )
            torch.testing.assert_close(bad, good, equal_nan=True)
            linear_mse_loss_and_grad(
                **given, offsets=cut.flip(0), wrt=WANTED
            )  # decreasing: any values, in bounds


def test_inputs_are_not_written(backend: str, device: torch.device) -> None:
    for layout in (LAYOUTS[0], LAYOUTS[5]):
        given = layout.draw(torch.float32, device, samples=layout.samples[0])
        cut = layout.offsets(device)
        before = {name: tensor.clone() for name, tensor in given.items()}
        leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
        loss = linear_mse_loss(**leaves, offsets=cut)
        first = torch.autograd.grad(loss.nansum(), list(leaves.values()), retain_graph=True)
        second = torch.autograd.grad(loss.nansum(), list(leaves.values()))
        assert all(map(torch.equal, first, second))
        assert all(torch.equal(before[name], tensor) for name, tensor in leaves.items())


def test_autocast(backend: str, device: torch.device) -> None:
    for layout in (LARGER[0], LARGER[4])[: 1 if backend == "triton" else 2]:
        given = layout.draw(torch.float32, device)
        leaves = {name: None if t is None else t.requires_grad_() for name, t in given.items()}
        cut = layout.offsets(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = linear_mse_loss(**leaves, offsets=cut)
            at_once = linear_mse_loss_and_grad(**given, offsets=cut)[0]
        assert loss.dtype == at_once.dtype == torch.float32
        low = {name: None if t is None else t.detach().bfloat16() for name, t in given.items()}
        expected = linear_mse_loss(**low, offsets=cut)
        torch.testing.assert_close(loss.detach(), expected.float(), rtol=2e-2, atol=2e-2, equal_nan=True)
        torch.testing.assert_close(loss.detach(), at_once, equal_nan=True)
        loss.nansum().backward()
        assert leaves["weight"].grad.dtype == torch.float32


@pytest.mark.parametrize(("models", "outputs"), [((2,), (1,)), ((), (1,)), ((), ())], ids=str)
def test_a_sum_beyond_float16_reaches_the_gradient_of_a_mean(
    backend: str, device: torch.device, models: Shape, outputs: Shape
) -> None:
    n = 4096
    shapes = (*models, n, 2), (*models, *outputs, 2), (*models, n, *outputs)
    x, w, y = (torch.full(shape, 6.0, dtype=torch.float16, device=device) for shape in shapes)
    w.zero_()
    _, (_, grad_weight, _, _) = linear_mse_loss_and_grad(x, w, y)
    assert torch.equal(grad_weight, torch.full_like(w, -72.0))


@pytest.fixture
def matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as a GPU makes them, but for ragged rows: where K is not short, in the narrower of two dtypes."""
    made = backends.module("fallback", "matmul").matmul_forward

    def multiply(left: Tensor, right: Tensor, *rest: Any) -> Tensor:
        if left.shape[-1] > 4:
            dtype = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
            left, right = left.to(dtype), right.to(dtype)
        return made(left, right, *rest)

    monkeypatch.setattr(backends.module("fallback", "matmul"), "matmul_forward", multiply)


def assert_right_in_float16(derivatives: Callable[..., Sequence[Tensor]], *drawn: Tensor) -> None:
    """Derivatives at these numbers rounded to float16: in it and in float64."""
    results = [derivatives(*(t.half().to(dtype) for t in drawn)) for dtype in (torch.float16, torch.float64)]
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).abs().max() <= 2**-9 * expected.abs().max()


@pytest.mark.parametrize("kind", ["own", "shared", "ragged"])
def test_slopes_below_float16_reach_the_gradient_of_input(matrix_instructions: None, kind: str) -> None:
    """2 / (N K) times a weight is a few times the least float16; times errors first, as in torch, it is not."""
    n, k, d = 4096, 8, 5
    x = torch.randn(n, d) if kind == "shared" else torch.randn(2, n, d)
    w, y = 0.01 * torch.randn(2, k, d), 300 * torch.randn(2, n, k)
    offsets = None
    if kind == "ragged":
        offsets = torch.tensor([0, n, 2 * n])
        x, y = x.flatten(0, 1), y.flatten(0, 1)

    def of_input(*given: Tensor) -> tuple[Tensor, ...]:
        return linear_mse_loss_and_grad(*given, offsets=offsets, wrt=("input",))[1][:1]

    assert_right_in_float16(of_input, x, w, y)


@pytest.mark.parametrize("models", [None, 2])
def test_slopes_below_float16_reach_second_derivatives(matrix_instructions: None, models: int | None) -> None:
    n, k, d = 4096, 8, 5
    own = () if models is None else (models,)
    x, y = torch.randn(*own, n, d), 30 * torch.randn(*own, n, k)
    w, z = 0.1 * torch.randn(*own, k, d), 0.01 * torch.randn(*own, k, d)

    def second(x: Tensor, w: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        leaves = x.requires_grad_(), w.requires_grad_()
        upstream = torch.full(own, 3.0, dtype=x.dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(linear_mse_loss(x, w, y), w, upstream, create_graph=True)
        return torch.autograd.grad(grad, leaves, z)

    assert_right_in_float16(second, x, w, y, z)


@pytest.mark.parametrize("models", [None, 2])
@pytest.mark.parametrize("of", ["weight", "bias"])
def test_slopes_below_float16_are_summed_over_rows(
    matrix_instructions: None, models: int | None, of: str
) -> None:
    """A row's part of the second derivatives of weight and bias is a few times the least float16; their sum is not."""
    n, k, d = 4096, 8, 5
    own = () if models is None else (models,)
    x, y = 1 + torch.rand(*own, n, d), torch.randn(*own, n, k)
    w, b = 0.1 * torch.randn(*own, k, d), torch.randn(*own, k)
    direction = torch.full_like(w if of == "weight" else b, 0.01)

    def second(x: Tensor, w: Tensor, y: Tensor, b: Tensor, direction: Tensor) -> tuple[Tensor, ...]:
        leaves = w.requires_grad_(), b.requires_grad_()
        loss = linear_mse_loss(x, w, y, b).sum()
        (grad,) = torch.autograd.grad(loss, leaves[of == "bias"], create_graph=True)
        return torch.autograd.grad(grad, leaves, direction)

    assert_right_in_float16(second, x, w, y, b, direction)


def test_slopes_below_float16_reach_tangents_of_gradients() -> None:
    n, k, d = 4096, 8, 5
    drawn = torch.randn(n, d), 0.1 * torch.randn(k, d), 30 * torch.randn(n, k), 0.01 * torch.randn(k, d)

    def tangents(x: Tensor, w: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return jvp(lambda w: grad(linear_mse_loss)(x, w, y), (w,), (z,))[1:]

    assert_right_in_float16(tangents, *drawn)


@pytest.mark.parametrize("layout", ["one", "shared", "ragged"])
def test_derivatives_of_no_elements(layout: str) -> None:
    """vmap has no sizes there, over which torch.func takes derivatives of derivatives."""
    weight = torch.randn((K, D) if layout == "one" else (B, K, D))
    cut = torch.zeros(B + 1, dtype=torch.int64) if layout == "ragged" else None
    samples = torch.ones(0, K)

    def loss(x: Tensor, reduction: str, samples: Tensor | None) -> Tensor:
        target = x.new_zeros(0, K)
        return linear_mse_loss(
            x, weight, target, sample_weight=samples, offsets=cut, reduction=reduction
        ).sum()

    for outer, inner in ((jacfwd, jacfwd), (jacfwd, jacrev), (jacrev, jacrev)):  # torch refuses the fourth
        for reduction, weights in product(REDUCTIONS, (None, samples)):
            found = outer(inner(loss))(torch.zeros(0, D), reduction, weights)
            assert found.shape == (0, D, 0, D)


def test_second_derivatives_of_a_row_of_no_model_are_zero() -> None:
    """Whatever its weight is."""
    x, w, y, samples = torch.randn(6, 2), torch.randn(2, 3, 2), torch.randn(6, 3), torch.ones(6)
    samples[5] = torch.inf
    leaves = [tensor.requires_grad_() for tensor in (x, w, y)]
    loss = linear_mse_loss(*leaves, sample_weight=samples, offsets=torch.tensor([0, 2, 5]))
    grads = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
    assert all(grad.isfinite().all() and grad.count_nonzero() for grad in second)
    assert not second[0][5].any()
    assert not second[2][5].any()


def test_rows_are_scaled_and_added_up_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """tf32, where it is asked for, is for products of matrices: not for a sum of weights, or a number times errors."""
    pytest.importorskip("triton")
    kernels, precisions = backends.module("triton", "linear_mse_models"), []
    monkeypatch.setattr(kernels.config, "target_of", lambda _: kernels.config.Target("cuda", 90))
    monkeypatch.setattr(kernels, "launch", lambda *_, **options: precisions.append(options.get("PRECISION")))
    bounds = torch.tensor([[0, 4], [4, 9]])
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for columns in (1, 2):
            rows = torch.randn(9, columns)
            kernels.linear_mse_models_product(rows, torch.randn(2, 3, columns), bounds, torch.float32)
            kernels.linear_mse_models_outer(torch.randn(9, 3), rows, bounds, torch.float32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert list(filter(None, precisions)) == ["tf32x3", "tf32x3", "tf32", "tf32"]


def test_elements_of_ragged_rows_are_counted_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """int32 offsets say which rows, of which there are fewer than elements."""
    rows, columns = 2**20, 2**12
    bounds = torch.tensor([[0, rows - 1], [rows - 1, rows]], dtype=torch.int32)
    seen = []
    monkeypatch.setattr(algebra, "_product", lambda flat, scale, edges, dtype: seen.append(edges) or flat)
    algebra.scaled(torch.empty(rows, columns, device="meta"), torch.ones(2), bounds, torch.float32)
    assert seen[0].tolist() == [[0, (rows - 1) * columns], [(rows - 1) * columns, rows * columns]]
    found = slopes(torch.empty(()), torch.float32, (rows, columns), bounds, "mean")
    assert found.tolist() == pytest.approx([2 / ((rows - 1) * columns), 2 / columns])


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[5]], ids=str)
def test_compiled(layout: Layout) -> None:
    given = layout.draw(torch.float32, "cpu", samples=layout.samples[0])
    names = list(given)
    cut = layout.offsets("cpu")

    def forward(*tensors: Tensor) -> Tensor:
        return linear_mse_loss(**dict(zip(names, tensors, strict=True)), offsets=cut)

    found, expected = (
        value_and_gradients(function)(*given.values())
        for function in (torch.compile(forward, backend="aot_eager", fullgraph=True), forward)
    )
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_bfloat16_gradients_that_cancel_over_many_rows(backend: str, device: torch.device) -> None:
    """Parts of the sum are not rounded to bfloat16 before they are added."""
    x = torch.full((1, 8192, 1), 1.5, dtype=torch.bfloat16, device=device)
    target = torch.ones_like(x)
    target[:, 4096:] = -1
    target[:, 0] += 2
    weight = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear_mse_loss(x, weight, target).sum(), weight)
    assert gradient.item() == -2 * 2 * 1.5 / 8192


def test_bfloat16_errors_are_not_rounded_beside_a_gradient_of_the_sample_weights(
    backend: str, device: torch.device
) -> None:
    """One rounding, of each gradient itself, where each is one product: 2^-9, twice that for good measure.

    Triton's kernels round slopes once more before products, but not those that are target's gradient.
    """
    layout = Layout((8, 1, 4), (8, 1, K), (), (8, K, 4))
    places = range(4) if backend == "fallback" else (2,)
    for _ in range(25):
        drawn = layout.draw(torch.bfloat16, device, bias=False, samples=(8, 1))
        values = [value for value in drawn.values() if value is not None]

        def gradients(function: Any, dtype: torch.dtype, values: list[Tensor] = values) -> Any:
            leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
            loss = function(*leaves[:3], sample_weight=leaves[3], reduction="sum").sum()
            return torch.autograd.grad(loss, leaves)

        found = gradients(linear_mse_loss, torch.bfloat16)
        exact = gradients(torch_linear_mse_loss, torch.float64)
        for place in places:
            error = found[place].double() - exact[place]
            assert error.abs().max() <= 2 * 2**-9 * exact[place].abs().max()
