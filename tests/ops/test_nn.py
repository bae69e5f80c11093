"""The modules are torch.nn's twins: same parameters, same numbers, same state_dict."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from gradkernels import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from ..cases import REDUCTIONS


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_mse_loss(backend: str, device: torch.device, bias: bool, reduction: str) -> None:
    model = nn.LinearMSELoss(3, 2, bias, device, reduction=reduction)
    theirs = torch.nn.Linear(3, 2, bias, device)
    theirs.load_state_dict(model.state_dict())
    input, target = torch.randn(5, 3, device=device), torch.randn(5, 2, device=device)
    samples = torch.rand(5, device=device)
    torch.testing.assert_close(model.predict(input), theirs(input))
    for given, weight in ((None, None), (samples, samples.unsqueeze(1).expand(5, 2))):
        model.zero_grad()
        theirs.zero_grad()
        loss = model(input, target, given)
        expected = torch.nn.functional.mse_loss(theirs(input), target, weight=weight, reduction=reduction)
        torch.testing.assert_close(loss, expected)
        loss.sum().backward()
        expected.sum().backward()
        for mine, torchs in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, torchs.grad)


def test_parameters_are_the_modules_own() -> None:
    """Hooks on them see every use: what DDP and FSDP build on."""
    model = nn.LinearMSELoss(3, 1)
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]
    seen = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.shape))
    model(torch.randn(4, 3), torch.randn(4, 1)).backward()
    assert sorted(seen) == [(1,), (1, 3)]


def test_fsdp2_gathers_the_parameters_for_predict_where_it_is_told_to() -> None:
    model, input = nn.LinearMSELoss(3, 2), torch.randn(4, 3)
    expected = model.predict(input)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match="DTensor"):
            model.predict(input)
        register_fsdp_forward_method(model, "predict")
        assert torch.equal(model.predict(input), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "module", [nn.Linear(3, 2), nn.MSELoss("sum"), nn.LinearMSELoss(3, 2, reduction="sum")]
)
def test_copies_and_pickles(module: torch.nn.Module) -> None:
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        assert list(other.state_dict()) == list(module.state_dict())
        for name, value in module.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)


def test_repr() -> None:
    assert repr(nn.MSELoss("sum")) == "MSELoss(reduction='sum')"
    assert repr(nn.LinearMSELoss(3, 1)) == (
        "LinearMSELoss(in_features=3, out_features=1, bias=True, reduction='mean')"
    )


def test_errors() -> None:
    for module in (nn.MSELoss, lambda reduction: nn.LinearMSELoss(3, 1, reduction=reduction)):
        with pytest.raises(ValueError, match="'max' is not a valid value for reduction"):
            module(reduction="max")
    with pytest.raises(ValueError, match=r"input has shape \(5, 1\) but target has shape \(5,\)"):
        nn.MSELoss()(torch.randn(5, 1), torch.randn(5))
    with pytest.raises(ValueError, match=r"target has shape \(5,\), expected \(5, 1\)"):
        nn.LinearMSELoss(3, 1)(torch.randn(5, 3), torch.randn(5))


def test_dtype_and_device_arguments() -> None:
    model = nn.LinearMSELoss(3, 2, dtype=torch.float64, device="meta")
    assert model.weight.dtype == model.bias.dtype == torch.float64
    assert model.weight.is_meta


@pytest.mark.parametrize("bias", [False, True])
def test_a_batch_of_models(backend: str, device: torch.device, bias: bool) -> None:
    models = nn.LinearMSELoss(4, 2, bias, device, models=3)
    assert models.weight.shape == (3, 2, 4)
    bound = 0.5  # of torch.nn.Linear with 4 features
    for parameter in models.parameters():
        assert parameter.abs().max() <= bound
        assert parameter.unique().numel() == parameter.numel()
    one = [torch.nn.Linear(4, 2, bias, device) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(one)
    models.load_state_dict(stacked)
    layer = nn.Linear(4, 2, bias, device, models=3)
    layer.load_state_dict(stacked)
    for rows in ((3, 5), (5,)):
        x, y = torch.randn(*rows, 4, device=device), torch.randn(3, 5, 2, device=device)
        each = x if x.dim() == 3 else [x] * 3
        expected = torch.stack([model(part) for model, part in zip(one, each, strict=True)])
        torch.testing.assert_close(models.predict(x), expected)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(models(x, y), (expected - y).square().mean((1, 2)))
    cut = torch.tensor([0, 2, 2, 5], device=device)
    ragged = models(x, y[0], torch.ones(5, device=device), cut)
    assert ragged.isnan().tolist() == [False, True, False]
    assert repr(layer).endswith(f"bias={bias}, models=3)")
    with pytest.raises(ValueError, match=r"input has shape \(2, 5, 4\), .* \(3, 2, 4\)"):
        models.predict(torch.randn(2, 5, 4, device=device))
    for shape in ((4,), ()):
        with pytest.raises(ValueError, match="input has shape"):
            layer(torch.randn(shape, device=device))
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(x).dtype == one[0](x).dtype == torch.bfloat16
