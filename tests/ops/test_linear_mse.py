"""linear_mse_loss and linear_mse_loss_and_grad: shapes, sizes, dtypes, weights, errors."""

import sys
from itertools import product

import pytest
import torch
from gradkernels import linear_mse_loss, linear_mse_loss_and_grad
from gradkernels.checks import acc_dtype
from gradkernels.reference import linear_mse as reference

from ..cases import LINEAR_MSE_SHAPES, REDUCTIONS, Case, check, label, on_both_backends
from ..helpers import DTYPES, EVERY_BACKEND, SIZES, assert_matches, exactly
from .test_mse import check_loss_and_grad

WANTED = ("input", "weight", "target", "bias")


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the fallback small problems are torch's own; here they too take the fused way."""
    monkeypatch.setattr(sys.modules["gradkernels.linear_mse"], "SMALL", -1)


@EVERY_BACKEND
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shapes", LINEAR_MSE_SHAPES, ids=lambda shapes: str(shapes[:2]))
def test_shapes(
    backend: str, device: torch.device, shapes: tuple[tuple[int, ...], ...], reduction: str
) -> None:
    input, weight, target, samples = shapes
    given = {"input": input, "weight": weight, "target": target}
    bias = {"bias": weight[:-1] or (1,)}
    for more in ({}, bias, *({**bias, "sample_weight": shape} for shape in samples)):
        if reduction == "mean" and more.get("sample_weight") == ():
            continue  # the gradient of one weight in a mean is a difference of equal numbers
        check(Case("linear_mse_loss", given | more, {"reduction": reduction}), torch.float32, device)


@pytest.mark.parametrize(
    ("backend", "size", "dtype"),
    on_both_backends(product(SIZES, DTYPES), triton=lambda size, dtype: [size, dtype]),
    ids=label,
    indirect=["backend"],
)
def test_sizes(backend: str, device: torch.device, size: int, dtype: torch.dtype) -> None:
    for samples, features, outputs in ((size, 33, 1), (5, size, 2), (3, 2, size)):
        shapes = {
            "input": (samples, features),
            "weight": (outputs, features),
            "target": (samples, outputs),
            "bias": (outputs,),
        }
        check(Case("linear_mse_loss", shapes), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("outputs", [(), (1,), (4,)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_grad(
    backend: str, device: torch.device, reduction: str, outputs: tuple[int, ...], dtype: torch.dtype
) -> None:
    shapes = {"input": (33, 7), "weight": (*outputs, 7), "target": (33, *outputs), "bias": outputs or (1,)}
    some = slice(None) if backend == "fallback" else slice(DTYPES.index(dtype), None, 4)
    for samples in ({}, {"sample_weight": (33,) if reduction == "mean" else (33, *outputs)}):
        case = Case("linear_mse_loss", shapes | samples, {"reduction": reduction})
        check_loss_and_grad(case, WANTED, dtype, device, some)


def test_no_gradient_for_a_bias_that_was_not_given(backend: str, device: torch.device) -> None:
    x, w, y = (torch.randn(shape, device=device) for shape in ((5, 3), (3,), (5,)))
    _, (grad_input, grad_weight, grad_target, grad_bias) = linear_mse_loss_and_grad(x, w, y)
    assert (grad_input, grad_target, grad_bias) == (None, None, None)
    assert grad_weight.shape == w.shape


def test_a_loss_scale_beyond_float16_reaches_the_gradients(backend: str, device: torch.device) -> None:
    """Gradients are scaled in float32 before they are rounded to float16, where unscaled ones would be 0."""
    x = torch.full((64, 4), 2.0**-12, dtype=torch.float16, device=device)
    w = torch.zeros(4, dtype=torch.float16, device=device, requires_grad=True)
    y = torch.full((64,), 2.0**-14, dtype=torch.float16, device=device)
    (grad,) = torch.autograd.grad(linear_mse_loss(x, w, y), w, torch.tensor(2.0**15, device=device).half())
    assert torch.equal(grad, torch.full_like(grad, -(2.0**-10)))


def test_errors_beyond_float16_under_autocast(backend: str, device: torch.device) -> None:
    x, y = torch.ones(64, 2, device=device), torch.full((64,), 2.0**18, device=device)
    w = torch.zeros(2, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.float16):
        loss = linear_mse_loss(x, w, y)
    (grad,) = torch.autograd.grad(loss, w, torch.tensor(2.0**-8, device=device))
    assert torch.equal(grad, torch.full_like(grad, -(2.0**11)))


def test_a_sum_beyond_float16_reaches_the_second_derivative_of_a_mean(
    backend: str, device: torch.device
) -> None:
    n = 4096
    x, y = (torch.full(shape, 6.0, dtype=torch.float16, device=device) for shape in ((n, 1), (n,)))
    x.requires_grad_()
    upstream = torch.ones((), dtype=torch.float16, device=device, requires_grad=True)
    loss = linear_mse_loss(x, torch.ones_like(x[0]) / 2, y)
    (grad,) = torch.autograd.grad(loss, x, upstream, create_graph=True)
    (second,) = torch.autograd.grad(grad, upstream, torch.full_like(x, 16.0))
    assert second.item() == -48.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=label)
def test_long_sums_are_kept_wide(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(4097, 1, dtype=dtype, device=device)
    w = torch.zeros(1, dtype=dtype, device=device, requires_grad=True)
    y = torch.ones(4097, dtype=dtype, device=device)
    y[0] = 64
    loss = linear_mse_loss(x, w, y, reduction="sum")
    assert loss.item() == 8192
    (grad,) = torch.autograd.grad(loss, w)
    assert grad.item() == torch.tensor(-2.0 * (64 + 4096)).to(dtype).item()


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0]], ids=str)
@pytest.mark.parametrize("outputs", [(), (3,)], ids=str)
def test_a_zero_sum_of_sample_weights_gives_nan(
    backend: str, device: torch.device, outputs: tuple[int, ...], weights: list[float]
) -> None:
    shapes = {"input": (2, 4), "weight": (*outputs, 4), "target": (2, *outputs), "bias": outputs or (1,)}
    given = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    per_sample = torch.tensor(weights, device=device)
    for samples in (per_sample, *([per_sample[:, None].expand(2, *outputs)] if outputs else [])):
        leaves = [tensor.clone().requires_grad_() for tensor in (*given.values(), samples)]
        loss = linear_mse_loss(*leaves[:4], sample_weight=leaves[4])
        alone, grads = linear_mse_loss_and_grad(**given, sample_weight=samples, wrt=WANTED)
        arrays = [exactly(tensor) for tensor in leaves]
        exact = (reference.forward(*arrays), *reference.backward(1.0, *arrays))
        for found in (loss, alone, *torch.autograd.grad(loss, leaves), *grads, *map(torch.tensor, exact)):
            assert found.isnan().all()
        assert linear_mse_loss(**given, sample_weight=samples, reduction="sum").isfinite()


@pytest.mark.parametrize("op", [linear_mse_loss, linear_mse_loss_and_grad])
def test_errors(op: type) -> None:
    name = op.__name__
    x, w, y, b = (torch.randn(shape) for shape in ((5, 3), (2, 3), (5, 2), (2,)))
    with pytest.raises(RuntimeError, match=rf"{name}: input has shape \(5, 3\) and weight \(2, 4\)"):
        op(x, torch.randn(2, 4), y)
    with pytest.raises(ValueError, match=rf"{name}: target has shape \(5,\), expected \(5, 2\)"):
        op(x, w, torch.randn(5))
    with pytest.raises(ValueError, match=rf"{name}: target has shape \(5, 1\), expected \(5,\)"):
        op(x, w[0], torch.randn(5, 1))
    with pytest.raises(ValueError, match=rf"{name}: bias has shape \(3,\), expected \(2,\)"):
        op(x, w, y, torch.randn(3))
    with pytest.raises(ValueError, match=f"{name}: 'max' is not a valid value for reduction"):
        op(x, w, y, b, reduction="max")
    with pytest.raises(
        TypeError, match=f"{name}: input has dtype torch.float32 but target has dtype torch.float64"
    ):
        op(x, w, y.double())


def test_errors_of_one_op() -> None:
    x, w, y = (torch.randn(shape) for shape in ((5, 3), (2, 3), (5, 2)))
    for shape in ((2,), (5, 1), (1,)):
        with pytest.raises(ValueError, match=r"linear_mse_loss: sample_weight has shape .* expected \(5,\)"):
            linear_mse_loss(x, w, y, sample_weight=torch.randn(shape))
    with pytest.raises(ValueError, match="'none' is not a valid value for reduction"):
        linear_mse_loss_and_grad(x, w, y, reduction="none")
    with pytest.raises(
        ValueError, match="wrt names 'x'; expected any of 'input', 'weight', 'target', 'bias'"
    ):
        linear_mse_loss_and_grad(x, w, y, wrt="x")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fallbacks_launcher(outputs: int, weighted: bool, dtype: torch.dtype) -> None:
    """All four results against the reference; torch's way, which multiplies in the dtype, is the yardstick."""
    from gradkernels.fallback import linear_mse as launchers

    x, w, y, b = (
        torch.randn(shape).to(dtype) for shape in ((100, 5), (outputs, 5), (100, outputs), (outputs,))
    )
    s = torch.rand(100, 1).to(dtype).expand(100, outputs) if weighted else None
    wide = acc_dtype(x)
    loss, error, grad_weight, grad_bias = launchers.linear_mse_forward(x, w, y, b, s, "sum", [True] * 3, wide)
    weights = 1 if s is None else s
    predictions = torch.nn.functional.linear(x, w, b)
    residual = (predictions - y).to(wide)
    values = (exactly(tensor) for tensor in (x, w, y, b, s))
    arrays = dict(zip(("input", "weight", "target", "bias", "sample_weight"), values, strict=True))
    _, grad_w, grad_y, grad_b, _ = reference.backward(1.0, **arrays, reduction="sum")
    assert_matches(loss, (weights * residual**2).sum(), reference.forward(**arrays, reduction="sum"), "loss")
    assert_matches(error, weights * residual, -grad_y / 2, "errors")
    product = (weights * residual).to(dtype).mT @ x
    assert_matches(grad_weight, 2 * product.to(wide), grad_w, "grad_weight")
    assert_matches(grad_bias, 2 * (weights * residual).sum(0), grad_b, "grad_bias")
