"""FusedSGD: the update rule against NumPy and torch, first steps, CUDA graphs."""

from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import FusedSGD
from gradkernels.fallback import sgd as fallback
from gradkernels.fallback.multi_tensor import decide_by_tensors
from gradkernels.optim.bucket import Bucket, Guard, SGDOptions
from gradkernels.reference import sgd as reference
from torch import Tensor
from torch.optim import SGD

from ..helpers import DTYPES, assert_matches, to_numpy
from .optimizers import Feed, assert_same_run, copies, make_pair, parameters
from .test_adam import OnDevice

RULES = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.3},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3, "maximize": True},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", RULES, ids=str)
def test_matches_torch_and_numpy(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    ours, theirs = make_pair("SGD", device, dtype, ((65,), (3, 5), (0, 2)), lr=0.1, **options)
    feed = Feed(parameters(theirs))

    def late(step: int) -> list[Tensor | None]:
        """The second parameter's first gradient comes a step later."""
        return [None if (step, i) == (1, 1) else grad for i, grad in enumerate(feed(step))]

    assert_same_run(ours, theirs, late, steps=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [*RULES, {"momentum": 0.99, "dampening": 0.07}], ids=str)
@pytest.mark.parametrize("backend", ["fallback"], indirect=True)
def test_16_bits_on_a_cpu_have_the_bits_of_torch_s_loop(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    """A number that one of torch's calls rounds to 16 bits and the other does not: 0.99^300 was halved."""
    start = [torch.randn(shape).to(dtype) for shape in ((300,), (3, 5), ())]
    mine, other = copies(start, device), copies(start, device)
    ours, theirs = FusedSGD(mine, lr=0.013, **options), SGD(other, lr=0.013, foreach=False, **options)
    for _ in range(30):
        for p, q in zip(mine, other, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(mine, other, strict=True):
        assert torch.equal(p, q)
        if "momentum" in options:
            assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_millionth_of_the_gradient(momentum: float, dtype: torch.dtype, device: torch.device) -> None:
    """The fallback divides the weight decay by the clip's factor: 0.3e6 is no float16, and costs float64 its digits."""
    options = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.3}
    start = [torch.randn(300, dtype=torch.float64).to(dtype)]
    (p,), (q,) = copies(start, device), copies(start)
    ours, theirs = FusedSGD([p], max_norm=0.01, **options), SGD([q], foreach=False, **options)
    value, state = to_numpy(start[0]), None
    for step in range(1, 5):
        q.grad = (400 * torch.randn(300, dtype=torch.float64)).to(dtype)
        p.grad = q.grad.to(device)
        grad = to_numpy(q.grad)
        clip = 0.01 / (np.linalg.norm(grad) + 1e-6)
        assert 2.0**-20 < clip < 2.0**-19
        value, state = reference.step(value, clip * grad, state, **options)
        ours.step()
        torch.nn.utils.clip_grad_norm_([q], 0.01, foreach=False)
        theirs.step()
        assert_matches(p, q, value, f"step {step}")


def test_a_first_step_that_was_skipped_is_still_to_come(device: torch.device) -> None:
    # Dampening is not applied to the first gradient, whichever step that is.
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = FusedSGD([p], lr=1.0, momentum=0.5, dampening=0.5, on_nonfinite="skip")
    p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert torch.equal(p, torch.ones_like(p))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, torch.zeros_like(p))  # buffer = 1
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, -1.0))  # buffer = 0.5 * 1 + 0.5 * 1


def test_a_loaded_buffer_has_had_its_first_step(device: torch.device) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=device))
    options: dict[str, Any] = {"lr": 1.0, "momentum": 0.5, "dampening": 0.5}
    saved = SGD([p], **options).state_dict()
    saved["state"] = {0: {"momentum_buffer": torch.full((3,), 4.0)}}
    optimizer = FusedSGD([p], **options)
    optimizer.load_state_dict(saved)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 1 - 2.5))


def replay(optimizer: FusedSGD, gradients: list[list[Tensor]], rates: list[float]) -> None:
    """Capture one step after a first one, then replay it with these gradients and learning rates."""
    params = optimizer.param_groups[0]["params"]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for grads, rate in zip(gradients, rates, strict=True):
        for p, grad in zip(params, grads, strict=True):
            p.grad.copy_(grad)
        optimizer.param_groups[0]["lr"].fill_(rate)
        graph.replay()


@pytest.mark.gpu
def test_a_captured_step_replays_with_live_rates() -> None:
    device = torch.device("cuda")
    start = [torch.randn(size) for size in (7, 5000)]
    params, eager = copies(start, device), copies(start, device)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(3)]
    rates = [0.1, 0.01, 0.5]
    options: dict[str, Any] = {"momentum": 0.9, "dampening": 0.1}
    decay = torch.tensor(0.1, device=device)
    optimizer = FusedSGD(
        params, lr=torch.tensor(0.1, device=device), weight_decay=decay, capturable=True, **options
    )
    plain = FusedSGD(eager, lr=0.1, weight_decay=0.1, **options)
    for p, q in zip(params, eager, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    plain.step()
    replay(optimizer, gradients, rates)
    for grads, rate in zip(gradients, rates, strict=True):
        plain.param_groups[0]["lr"] = torch.tensor(rate).item()
        for q, grad in zip(eager, grads, strict=True):
            q.grad = grad
        plain.step()
    for p, q in zip(params, eager, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.gpu
def test_stochastic_rounding_draws_anew_at_each_replay() -> None:
    p = torch.nn.Parameter(torch.ones(4096, device="cuda", dtype=torch.bfloat16))
    rate = torch.tensor(1e-3, device="cuda")
    optimizer = FusedSGD([p], lr=rate, capturable=True, stochastic_rounding=True)
    p.grad = torch.ones_like(p)
    replay(optimizer, [[torch.ones_like(p)]] * 100, [1e-3] * 100)
    # 101 steps of 1e-3, each far below the spacing of bfloat16 at 1.
    assert abs(p.detach().float().mean().item() - (1 - 0.101)) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES[2:], ids=str)
def test_first_steps_that_only_a_device_knows_of(
    rule: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Triton does not serve a device, nothing is decided on the host: the numbers are those of the CPU.

    With masters beside 16-bit parameters, overflow at the first step, a scale, a clip, and a written parameter.
    """
    options = [SGDOptions(**{"lr": 0.01, "momentum": 0, "dampening": 0, "weight_decay": 0.0, "nesterov": False,
                             "maximize": False, **rule})]  # fmt: skip
    start = [torch.randn(shape).to(dtype) for shape in ((65,), (3, 5))]
    buckets = []
    for device_step in (False, True):
        params = [value.clone() for value in start]
        steps = [torch.zeros(()) for _ in params]
        states = {
            "momentum_buffer": [torch.zeros(value.shape) for value in start],
            "step": [step.as_subclass(OnDevice) for step in steps] if device_step else steps,
            **({} if dtype == torch.float32 else {"master_param": [value.float() for value in start]}),
        }
        buckets.append(Bucket(params, [], states, [0, 0], [0, 1]))
    scale, norms = torch.tensor(4.0), torch.tensor([[9.0, 0.0]], dtype=torch.float64)
    for step in range(4):
        guard = Guard(scale, torch.tensor(float(step == 0)), norms, max_norm=1.0)
        grads = [torch.randn(value.shape).to(dtype) for value in start]
        for bucket, decided in zip(buckets, (fallback.decide, decide_by_tensors), strict=True):
            bucket.grads = [grad.clone() for grad in grads]
            bucket.params[0][step] = 0.5  # by hand, past the master
            with monkeypatch.context() as patch:
                patch.setattr(fallback, "decide", decided)
                fallback.sgd_step(bucket, options, guard)
        host, device = buckets
        assert (
            [int(s) for s in device.states["step"]] == [int(s) for s in host.states["step"]] == [step, step]
        )
        if step == 0:
            assert all(not bool(buffer.any()) for buffer in device.states["momentum_buffer"])
            assert torch.equal(device.params[1], start[1])
            continue
        for mine, other in ((device.params, host.params), (device.grads, host.grads)):
            torch.testing.assert_close(mine, other)
        for key in host.states.keys() - {"step"}:
            torch.testing.assert_close(device.states[key], host.states[key])


def test_the_fallback_on_a_device_waits_for_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the meta device have none to wait for."""
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *args, **kwargs: None)  # it has no meta kernel
    param, grad = (torch.empty(5, device="meta") for _ in range(2))
    guard = Guard(found_inf=torch.empty((), device="meta"))
    for momentum in (0.0, 0.9):
        states = {"momentum_buffer": [torch.empty(5, device="meta")]} if momentum else {}
        options = SGDOptions(0.1, momentum, 0.0, 0.0, False, False)
        fallback.sgd_step(Bucket([param], [grad], states, [0], [0]), [options], guard)


def test_the_fallback_on_a_device_keeps_no_temporaries() -> None:
    """They would take a multiple of the parameters' memory between the steps."""
    param, grad, buffer = (torch.empty(5, device="meta") for _ in range(3))
    states = {"momentum_buffer": [buffer], "step": [torch.empty((), device="meta")]}
    bucket = Bucket([param], [grad], states, [0], [0])
    fallback.sgd_step(bucket, [SGDOptions(0.1, 0.9, 0.5, 0.1, True, True)], Guard())
    assert bucket.memory == {}
