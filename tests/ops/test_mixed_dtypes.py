"""linear, linear_mse_loss and its explicit form on operands of different floating dtypes."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from gradkernels import linear, linear_mse_loss, linear_mse_loss_and_grad, use_backend
from gradkernels.nn import Linear
from torch import Tensor

from ..cases import label
from ..conftest import DEVICES
from ..helpers import Draws, exactly

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Of input, weight, target, bias, sample_weight.
MIXES = [
    (BF16, F32, F32, F32, F32),  # a head on frozen features
    (BF16, BF16, F32, BF16, F32),
    (F32, BF16, BF16, F32, F16),
    (F16, BF16, F16, F16, F16),
]
# Shapes likewise; each plan of the Triton kernels, and the batch of models.
SHAPES: dict[str, tuple[tuple[int, ...] | None, ...]] = {
    "one output": ((33, 5), (5,), (33,), (1,), (33,)),
    "few outputs": ((33, 5), (3, 5), (33, 3), (3,), (33,)),
    "many outputs": ((17, 6), (40, 6), (17, 40), (40,), None),
    "own rows": ((2, 9, 5), (2, 3, 5), (2, 9, 3), (2, 3), (2, 9)),
    "shared rows": ((9, 5), (4, 7, 5), (9, 7), (4, 7), (9,)),
    "ragged rows": ((9, 5), (2, 3, 5), (9, 3), (2, 3), (9,)),
}
NAMES = ("input", "weight", "target", "bias", "sample_weight")
CUTS = (0, 4, 9)  # between the models of ragged rows


@pytest.fixture(params=["reference", "fallback", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation in force: here the NumPy one too."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    return torch.device(DEVICES[backend])


def operands(form: str, dtypes: tuple[torch.dtype, ...], device: torch.device) -> dict[str, Tensor]:
    given = {}
    for name, shape, dtype in zip(NAMES, SHAPES[form], dtypes, strict=True):
        if shape is not None:
            tensor = torch.randn(shape)
            tensor = tensor.abs() + 0.5 if name == "sample_weight" else tensor
            given[name] = tensor.to(device, dtype)
    return given


def options(form: str, device: torch.device) -> dict[str, Tensor]:
    return {"offsets": torch.tensor(CUTS, device=device)} if form == "ragged rows" else {}


def in_torch(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor,
    sample_weight: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """The weighted mean in torch's ops that have forward derivatives of their backward."""
    if offsets is not None:
        assert sample_weight is not None
        rows = [slice(start, end) for start, end in pairwise(CUTS)]
        parts = [(input[r], weight[b], target[r], bias[b], sample_weight[r]) for b, r in enumerate(rows)]
        return torch.stack([in_torch(*part) for part in parts])
    products = input @ (weight if weight.dim() == 1 else weight.mT)
    squares = (products + (bias.unsqueeze(1) if bias.dim() == 2 else bias) - target).square()
    models = () if weight.dim() < 3 else (1, 2)
    if sample_weight is None:
        return squares.mean(models)
    samples = sample_weight if weight.dim() == 1 else sample_weight.unsqueeze(-1)
    samples = samples.expand_as(squares)
    return (samples * squares).sum(models) / samples.sum(models)


def promoted(given: dict[str, Tensor]) -> torch.dtype:
    dtype = given["input"].dtype
    for tensor in given.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def widened(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in given.items()}


def derivatives(function: Callable[..., Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The result; its gradients; their derivative along a direction, in reverse and forward mode; and the tangent."""
    names, tensors = list(given), tuple(given.values())
    generator = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:  # bfloat16 holds it, so that no dtype rounds it
        return torch.randn(like.shape, generator=generator).bfloat16().to(like)

    def of(*values: Tensor) -> Tensor:
        return function(**dict(zip(names, values, strict=True)))

    found = {"result": of(*tensors)}
    upstream, directions = drawn(found["result"]), tuple(map(drawn, tensors))
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)
    grads = torch.autograd.grad(of(*leaves), leaves, upstream, create_graph=True)
    found |= dict(zip(names, grads, strict=True))
    slope = sum((grad * way).sum() for grad, way in zip(grads, directions, strict=True))
    seconds = torch.autograd.grad(slope, leaves, materialize_grads=True)
    found |= {f"second of {name}": second for name, second in zip(names, seconds, strict=True)}

    def gradients(*values: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(of, *values)[1](upstream)

    found["tangent"] = torch.func.jvp(of, tensors, directions)[1]
    tangents = torch.func.jvp(gradients, tensors, directions)[1]
    found |= {f"tangent of {name}": tangent for name, tangent in zip(names, tangents, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def assert_as_in_torch(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], draw: Callable[[], dict[str, Tensor]]
) -> None:
    """torch's side casts every operand to the result's dtype, at least to float32."""
    draws = Draws()
    while not draws.enough:
        given = draw()
        wide = torch.promote_types(promoted(given), F32)
        mine, plain, exact = (
            derivatives(function, values)
            for function, values in (
                (ours, given),
                (theirs, widened(given, wide)),
                (theirs, widened(given, F64)),
            )
        )
        for name, result in mine.items():
            place = name.rpartition(" ")[2]
            assert result.dtype is (given[place].dtype if place in given else promoted(given)), name
            draws.add(name, result, plain[name].to(result), exactly(exact[name]))
    draws.assert_match()


def forms_and_mixes() -> list[Any]:
    """Each form with one mix, few of them on Triton and the reference; the rest marked full."""
    return [
        pytest.param(
            backend, form, mix, marks=() if (i + j) % 4 == 0 and i % every == 0 else pytest.mark.full
        )
        for backend, every in (("fallback", 1), ("triton", 4), ("reference", 3))
        for i, form in enumerate(SHAPES)
        for j, mix in enumerate(MIXES)
    ]


@pytest.mark.parametrize(("backend", "form", "dtypes"), forms_and_mixes(), indirect=["backend"], ids=label)
def test_linear_mse_loss(
    backend: str, device: torch.device, form: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    given = options(form, device)
    assert_as_in_torch(
        lambda **tensors: linear_mse_loss(**tensors, **given),
        lambda **tensors: in_torch(**tensors, **given),
        lambda: operands(form, dtypes, device),
    )


@pytest.mark.parametrize(
    "backend", ["fallback", pytest.param("triton", marks=pytest.mark.full)], indirect=True
)
@pytest.mark.parametrize("form", SHAPES)
def test_the_explicit_form(backend: str, device: torch.device, form: str) -> None:
    """The same bits as the loss and its backward, but for gradients, which are rounded once here."""
    for dtypes in MIXES if backend == "fallback" else MIXES[:1]:
        given = operands(form, dtypes, device)
        leaves = {name: tensor.clone().requires_grad_(name in NAMES[:4]) for name, tensor in given.items()}
        expected = linear_mse_loss(**leaves, **options(form, device))
        expected.sum().backward()
        loss, (*grads,) = linear_mse_loss_and_grad(**given, **options(form, device), wrt=NAMES[:4])
        assert loss.dtype is promoted(given)
        torch.testing.assert_close(loss, expected.detach())
        for name, grad in zip(("input", "weight", "target", "bias"), grads, strict=True):
            assert grad is not None
            assert grad.dtype is given[name].dtype
            torch.testing.assert_close(grad, leaves[name].grad)


@pytest.mark.parametrize("form", ["one output", "shared rows"])
@pytest.mark.parametrize("place", range(5), ids=NAMES)
def test_float64_stands_beside_no_other(form: str, place: int) -> None:
    dtypes = tuple(F64 if i == place else F32 for i in range(5))
    given = operands(form, dtypes, torch.device("cpu"))
    said = "input has dtype torch.float.. but .* has dtype torch.float..; only float32, float16, bfloat16 may"
    for op in (linear_mse_loss, linear_mse_loss_and_grad):
        with pytest.raises(TypeError, match=f"{op.__name__}: {said}"):
            op(**given)
    if form == "one output" and place in (0, 1, 3):
        with pytest.raises(TypeError, match=f"linear: {said}"):
            linear(given["input"], given["weight"], given["bias"])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions(backend: str, device: torch.device, reduction: str) -> None:
    """The sum takes the way of the mean; none stores the predictions, as wide as the result."""
    for form in ("few outputs", "own rows"):
        given = operands(form, MIXES[1], device)
        loss = linear_mse_loss(**given, reduction=reduction)
        exact = linear_mse_loss(**widened(given, F64), reduction=reduction)
        assert loss.dtype is F32
        torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "shape", "dtypes"),
    [
        pytest.param(
            backend, shape, dtypes, marks=() if backend != "triton" or shape[0] == "f" else pytest.mark.full
        )
        for backend in ("fallback", "triton", "reference")
        for shape in ("few outputs", "many outputs", "one output")
        for dtypes in MIXES[:3:2]
    ],
    indirect=["backend"],
    ids=label,
)
def test_linear(backend: str, device: torch.device, shape: str, dtypes: tuple[torch.dtype, ...]) -> None:
    names = ("input", "weight", "bias")

    def draw() -> dict[str, Tensor]:
        given = operands(shape, dtypes, device)
        return {name: given[name] for name in names}

    def plain(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return input @ (weight if weight.dim() == 1 else weight.mT) + bias

    assert_as_in_torch(linear, plain, draw)


def test_no_operand_is_rounded_to_the_narrower_dtype(backend: str, device: torch.device) -> None:
    """1 + 2^-10 is 1 in bfloat16, and so is its product with a feature then."""
    x = torch.ones(4, 1, dtype=BF16, device=device)
    w = torch.full((1, 1), 1 + 2.0**-10, device=device, requires_grad=True)
    y = torch.full((4, 1), 2.0**-10, device=device)
    assert linear(x, w).tolist() == [[1 + 2.0**-10]] * 4
    loss = linear_mse_loss(x, w, y)
    loss.backward()
    assert loss.item() == 1
    assert linear_mse_loss(x, w, y - 2.0**-10, reduction="sum").item() == pytest.approx(
        4 * (1 + 2.0**-10) ** 2
    )
    assert w.grad is not None
    assert w.grad.item() == 2


def test_transforms(backend: str, device: torch.device) -> None:
    """vmap, and a graph; the module takes features of another dtype."""
    given = operands("few outputs", MIXES[0], device)
    x, w, y, b, s = given.values()
    batch = torch.stack([w, -w, 2 * w])
    losses = torch.func.vmap(lambda w: linear_mse_loss(x, w, y, b, sample_weight=s))(batch)
    assert losses.dtype is F32
    torch.testing.assert_close(
        losses, torch.stack([linear_mse_loss(x, w, y, b, sample_weight=s) for w in batch])
    )
    products = torch.func.vmap(lambda x: linear(x, w, b))(x)
    torch.testing.assert_close(products, linear(x, w, b))
    layer = Linear(5, 3, device=device)
    assert layer(x).dtype is F32
    if backend == "fallback":
        compiled = torch.compile(linear_mse_loss, backend="aot_eager", fullgraph=True)
        w.requires_grad_()
        (grad,) = torch.autograd.grad(compiled(x, w, y, b), w)
        torch.testing.assert_close(grad, torch.autograd.grad(linear_mse_loss(x, w, y, b), w)[0])
