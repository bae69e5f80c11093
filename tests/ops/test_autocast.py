"""Autocast as torch does it: products in the autocast dtype, losses in float32; linear_mse_loss both."""

import pytest
import torch
from gradkernels import linear, linear_mse_loss, linear_mse_loss_and_grad, use_backend
from torch.utils.checkpoint import checkpoint

from ..cases import LINEAR, LINEAR_MSE, MATMUL, MSE, Case, judged, label
from ..helpers import assert_matches

PRODUCTS = [*MATMUL, *LINEAR]
CASES = [case.resized({3: 17, 4: 33}) for case in [*PRODUCTS, *MSE, *LINEAR_MSE]]


def dtype_under_autocast(case: Case, dtype: torch.dtype, lower: torch.dtype) -> torch.dtype:
    if dtype == torch.float64:
        return dtype
    return lower if case.op in ("matmul", "linear") else torch.float32


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=label)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_float32_arguments(backend: str, device: torch.device, case: Case, lower: torch.dtype) -> None:
    tensors = case.arguments(torch.float32, device)
    with torch.autocast(device.type, lower):
        found = list(judged(case, tensors))
    assert found[0][1].dtype == dtype_under_autocast(case, torch.float32, lower)
    # The budget is that of a result in the lower dtype: so are the operands.
    for name, mine, torchs, reference in found:
        assert mine.dtype == torchs.dtype
        assert_matches(mine.to(lower), torchs.to(lower), reference, name)


@pytest.mark.parametrize("case", [PRODUCTS[1], PRODUCTS[6], MSE[0], MSE[3], LINEAR_MSE[6]], ids=label)
def test_float64_and_mixed_arguments(backend: str, device: torch.device, case: Case) -> None:
    tensors = case.arguments(torch.float64, device)
    mixed = [
        tensor.to(dtype)
        for tensor, dtype in zip(
            tensors, (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16), strict=False
        )
    ]
    with torch.autocast(device.type, torch.bfloat16):
        assert case.ours(*tensors).dtype == torch.float64
        assert case.ours(*mixed).dtype == dtype_under_autocast(case, torch.float32, torch.bfloat16)
    narrow = [tensor.float() for tensor in tensors]
    expected = case.ours(*narrow)
    with torch.autocast(device.type, torch.bfloat16), torch.autocast(device.type, enabled=False):
        assert torch.equal(case.ours(*narrow), expected)
        if case.op == "mse_loss":  # mixes dtypes outside autocast too
            assert case.ours(*mixed).dtype == torch.float32
        else:
            with pytest.raises(TypeError, match="all must have one dtype"):
                case.ours(*mixed)


def test_the_target_is_not_rounded(backend: str, device: torch.device) -> None:
    """In bfloat16 the target would be 256 and the loss 0."""
    input, weight = torch.ones(1, 1, device=device), torch.full((1, 1), 256.0, device=device)
    target = torch.full((1, 1), 257.0, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert LINEAR_MSE[3].ours(input, weight, target).item() == 1


@pytest.mark.parametrize("case", [PRODUCTS[6], MSE[0], LINEAR_MSE[6]], ids=label)
def test_backward_outside_and_compiled(backend: str, device: torch.device, case: Case) -> None:
    """Backward runs as its forward did, whatever autocast is when it runs; compiled calls agree to the bit."""
    tensors = [tensor.requires_grad_() for tensor in case.arguments(torch.float32, device)]
    with torch.autocast(device.type, torch.bfloat16):
        inside = case.ours(*tensors)
        upstream = torch.ones_like(inside)
        expected = torch.autograd.grad(inside, tensors, upstream, retain_graph=True)
    outside = torch.autograd.grad(inside, tensors, upstream)
    assert all(torch.equal(one, other) for one, other in zip(expected, outside, strict=True))
    torch._dynamo.reset()
    with torch.autocast(device.type, torch.bfloat16):
        compiled = torch.compile(case.ours, backend="aot_eager", fullgraph=True)(*tensors)
        assert compiled.dtype == inside.dtype
        assert torch.equal(compiled, inside)


@pytest.mark.parametrize("models", ["one", "own rows", "ragged"])
def test_weights_that_float16_does_not_hold(backend: str, device: torch.device, models: str) -> None:
    """Neither they, nor their sum, nor the slope 2 / sum(s) are in float16: a mean does not change with their unit."""
    batch = () if models == "one" else (1,)
    input, target = torch.randn(8, 3, device=device), torch.randn(8, 2, device=device)
    weight, bias = torch.randn(*batch, 2, 3, device=device), torch.randn(*batch, 2, device=device)
    offsets = torch.tensor([0, 8], device=device) if models == "ragged" else None
    arguments, wrt = (input, weight, target, bias), ("input", "weight", "target", "bias")
    expected, gradients = linear_mse_loss_and_grad(*arguments, offsets=offsets, wrt=wrt)
    sample_weight = torch.full((8,), 1e8, device=device)

    def both() -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]:
        loss = linear_mse_loss(*arguments, sample_weight=sample_weight, offsets=offsets)
        return loss, *linear_mse_loss_and_grad(
            *arguments, sample_weight=sample_weight, offsets=offsets, wrt=wrt
        )

    torch._dynamo.reset()
    with torch.autocast(device.type, torch.float16):
        for run in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
            loss, other, mine = run()
            torch.testing.assert_close([loss, other], [expected] * 2, rtol=4e-3, atol=0)
            torch.testing.assert_close(mine, gradients, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("rows", ["own", "ragged"])
@pytest.mark.parametrize("wide", [0, 1], ids=["input", "weight"])
def test_models_of_float64_beside_float32(backend: str, device: torch.device, wide: int, rows: str) -> None:
    """As for one model: autocast leaves float64 as it is."""
    shapes = ((1, 5, 3), (1, 2, 3), (1, 5, 2))
    tensors = [torch.randint(-4, 5, shape, device=device).float() for shape in shapes]
    tensors[wide] = tensors[wide].double()
    input, weight, target = (tensor.requires_grad_() for tensor in tensors)
    offsets = torch.tensor([0, 5], device=device) if rows == "ragged" else None
    arguments = (input[0], weight, target[0]) if rows == "ragged" else (input, weight, target)
    with torch.autocast(device.type, torch.float16):
        found = linear_mse_loss(*arguments, offsets=offsets).sum()
        expected = linear_mse_loss(input[0], weight[0], target[0])
    assert torch.equal(found.float(), expected.float())
    for one, other in zip(
        *(torch.autograd.grad(loss, (input, weight, target)) for loss in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("inside", [False, True])
def test_a_forward_that_a_checkpoint_runs_in_a_backward(
    backend: str, device: torch.device, inside: bool
) -> None:
    """It is cast as the first time, though the backward around it casts nothing."""
    x, *weights = torch.randn(3, 4, 4, device=device).unbind()
    weights = [weight.requires_grad_() for weight in weights]

    def layers(x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = linear(x, weight)
        return x

    with torch.autocast(device.type, torch.bfloat16):
        expected = torch.autograd.grad(layers(x).float().sum(), weights)
        loss = checkpoint(layers, x, use_reentrant=False).float().sum()
        if inside:
            loss.backward()
    if not inside:
        with use_backend("reference"):  # another than that of the forward
            loss.backward()
    for weight, gradient in zip(weights, expected, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, gradient)


def test_tangents_are_float32(backend: str, device: torch.device) -> None:
    """As the loss is: inside torch.func too, which would cast the products that a derivative is made of."""
    input, weight, target = (
        torch.ones(4, 2, device=device),
        *torch.zeros(2, 4, 4, device=device).split([1, 1]),
    )
    weight, target = weight[0, :, :2], target[0]
    sample_weight = torch.ones(4, device=device)

    def loss(sample_weight: torch.Tensor) -> torch.Tensor:
        return linear_mse_loss(input, weight, target + 1, sample_weight=sample_weight, reduction="sum")

    with torch.autocast(device.type, torch.float16):
        value, tangent = torch.func.jvp(loss, (sample_weight,), (1e5 * sample_weight,))
    assert value.dtype == tangent.dtype == torch.float32
    assert tangent.item() == 1e5 * value.item() == 16e5
