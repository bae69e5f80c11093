"""Low precision done well: master weights, stochastic rounding, gradients of another dtype."""

import copy
from typing import Any

import pytest
import torch
from gradkernels import use_backend
from torch.optim import Optimizer

from ..helpers import assert_matches
from .optimizers import (
    FULL_OPTIONS,
    SCALE,
    SMALL,
    Feed,
    ReferenceRun,
    amp_step,
    assert_same_run,
    clipped,
    copies,
    make_pair,
    make_params,
    on_both_backends,
    ours_for,
    pair_over,
    parameters,
    set_gradients,
    spread,
    step_by,
    step_by_ones,
    theirs_for,
)


def pair_with_float32(
    low: list[torch.nn.Parameter], name: str, device: torch.device, shared: dict[str, Any], **options: Any
) -> tuple[Any, Any]:
    """Ours on copies of 16-bit parameters, with masters, and torch's on the same values in float32."""
    shared = {"params": copies(low, device), "master_weights": True, **shared}
    wide = [torch.nn.Parameter(param.detach().float()) for param in low]
    return pair_over(wide, name, shared=shared, **options)


def stalled(optimizer_class: Any, device: torch.device, steps: int = 30, **options: Any) -> Any:
    """1000 weights of 1.0 in bfloat16, each step worth -0.001: a quarter of the way to the next."""
    param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device))
    optimizer = optimizer_class([param], lr=0.001, **options)
    for _ in range(steps):
        step_by_ones(optimizer)
    return optimizer


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_master_weights_train_where_plain_bfloat16_stalls(name: str, device: torch.device) -> None:
    for optimizer_class in (theirs_for(name), ours_for(name)):
        (plain,) = parameters(stalled(optimizer_class, device))
        assert bool((plain == 1.0).all()), "the stall itself"
    optimizer = stalled(ours_for(name), device, master_weights=True)
    (param,) = parameters(optimizer)
    master = optimizer.state[param]["master_param"]
    assert float((master - 0.97).abs().max()) < 30 * torch.finfo(torch.float32).eps
    assert torch.equal(param, master.bfloat16())


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_stochastic_rounding_trains_where_plain_bfloat16_stalls(name: str, device: torch.device) -> None:
    """On average each step counts in full: mean and spread of 1000 weights, to six of their standard errors.

    Between neighbours at the distance d, here 2^-8, a step of 0.001 has the variance 0.001 (d - 0.001). The
    variances of the steps add up only if each step draws anew.
    """
    optimizer = stalled(ours_for(name), device, stochastic_rounding=True)
    (param,) = parameters(optimizer)
    assert param.dtype == torch.bfloat16
    deviation = (30 * 0.001 * (2**-8 - 0.001)) ** 0.5
    values = param.detach().double()
    assert abs(float(values.mean()) - 0.97) < 6 * deviation / 1000**0.5
    assert abs(float(values.std()) - deviation) < 6 * deviation / 2000**0.5
    again = parameters(stalled(ours_for(name), device, stochastic_rounding=True))[0]
    other = parameters(stalled(ours_for(name), device, stochastic_rounding=True, seed=1))[0]
    assert torch.equal(param, again)
    assert not torch.equal(param, other)
    # Independent draws: neighbours, and halves of the tensor, agree no more often than chance has it.
    spread = (values - values.mean()) / values.std()
    for shift in (1, 2, 32, 500):
        correlation = float((spread * spread.roll(shift)).mean())
        assert abs(correlation) < 6 / 1000**0.5, f"distance {shift}"


def test_scale_and_clip_reach_stochastic_rounding(device: torch.device) -> None:
    """Unscaled, each step is 2^-8, which leaves nothing to chance; clipped to nothing, there is no step."""
    for max_norm, move in ((None, 2.0**-8), (0.0, 0.0)):
        param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device))
        optimizer = ours_for("SGD")([param], lr=2.0**-8, stochastic_rounding=True, max_norm=max_norm)
        for step in range(1, 4):
            param.grad = torch.full_like(param, SCALE)
            amp_step(optimizer, SCALE, False)
            assert bool((param == 1 - step * move).all())
            assert bool((param.grad == 1).all())


def test_momentum_switched_on_in_mid_run_under_stochastic_rounding(device: torch.device) -> None:
    """The buffer starts with the whole gradient then too, whatever the dampening and the steps made before."""
    param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device))
    optimizer = ours_for("SGD")([param], lr=2.0**-8, stochastic_rounding=True)
    for step in range(1, 3):
        step_by_ones(optimizer)
        optimizer.param_groups[0].update(momentum=0.5, dampening=0.5)
        assert bool((param == 1 - step * 2.0**-8).all())
    assert bool((optimizer.state[param]["momentum_buffer"] == 1).all())


def test_every_seed_draws_its_own_numbers(device: torch.device) -> None:
    """All 64 bits of a seed count, and its sign."""
    seeds = (0, 1, 2**32, 2**32 + 1, 2**40, 2**63, -1, 2**32 - 1)
    results = []
    for seed in (*seeds, 2**40):
        param = torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16, device=device))
        optimizer = ours_for("SGD")([param], lr=2.0**-10, stochastic_rounding=True, seed=seed)
        step_by_ones(optimizer)
        results.append(tuple(param.tolist()))
    assert len(set(results)) == len(seeds)
    assert results[-1] == results[seeds.index(2**40)]


def test_stochastic_rounding_keeps_infinities(device: torch.device) -> None:
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device=device))
    optimizer = ours_for("SGD")([param], lr=1.0, stochastic_rounding=True)
    param.grad = torch.tensor(
        [float("inf"), float("-inf"), float("nan"), 0.0], dtype=torch.bfloat16, device=device
    )
    optimizer.step()
    expected = torch.tensor([float("-inf"), float("inf"), float("nan"), 1.0], dtype=torch.bfloat16)
    torch.testing.assert_close(param.detach().cpu(), expected, rtol=0, atol=0, equal_nan=True)


SHAPES = {"alone": ((1023,), (33, 31)), "stacked": ((11, 93), (11, 31, 3))}
DRAWING: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 2.0**-10}),
    "momentum": ("SGD", {"lr": 2.0**-10, "momentum": 0.5}),
    "amsgrad": ("Adam", {"betas": (0.5, 0.5), "amsgrad": True}),
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("update", DRAWING)
def test_both_backends_draw_the_same_numbers(update: str, shapes: str) -> None:
    """With powers of two nothing but the draw decides, so the bits must agree; of Adam those of its averages."""
    name, options = DRAWING[update]
    unequal = ("step", "param") if name == "Adam" else ("step",)
    results = []
    gradients = 2.0 ** -torch.randint(0, 4, (6, 1023)).float()
    for backend in ("fallback", "triton"):
        params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in SHAPES[shapes]]
        with use_backend(backend):
            optimizer = ours_for(name)(
                params, stacked=shapes == "stacked", stochastic_rounding=True, seed=3, **options
            )
            for grad in gradients:
                for param in params:
                    param.grad = grad.view(param.shape).bfloat16()
                optimizer.step()
        states = [{"param": p.detach()} | optimizer.state[p] for p in params]
        first, second = (
            torch.stack([value.flatten() for key, value in state.items() if key not in unequal])
            for state in states
        )
        assert not (first == second).all(1).any(), "two tensors must not share their draws"
        results.append(torch.cat([first, second]))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_both_backends
def test_master_weights_are_the_float32_run(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Master and moments are those of a float32 model under the same (16-bit) gradients; float32 has none."""
    low = make_params(SMALL, dtype)
    wide = copies(make_params(((5,),)), device)
    shared = {"params": [*copies(low, device), *wide]}
    ours, theirs = pair_with_float32(low, name, device, shared, **FULL_OPTIONS[name])
    feed, reference = Feed(low), ReferenceRun(theirs)
    for step in range(1, 11):
        gradients = feed(step)
        step_by(ours, [*gradients, torch.ones(5)])
        step_by(theirs, [grad.float() for grad in gradients])
        reference.step(gradients)
        for mine, other in zip(parameters(ours), parameters(theirs), strict=False):
            state = dict(ours.state[mine])
            master = state.pop("master_param")
            assert torch.equal(mine, master.to(dtype))
            assert state.keys() == theirs.state[other].keys()
            state.pop("step", None)
            for key, value in {"param": master, **state}.items():
                expected = theirs.state[other][key] if key != "param" else other.detach()
                scale = reference.scales[other][key]
                assert_matches(value, expected, reference.values[other][key], f"{key} at step {step}", scale)
    assert "master_param" not in ours.state[parameters(ours)[-1]]


def check_scaled_and_clipped(
    name: str, params: list[torch.nn.Parameter], max_norm: float, device: torch.device, **options: Any
) -> None:
    """Ours by scaled gradients, clipping inside the step; torch's, in float32, and the reference by clipped ones."""
    ours, theirs = pair_with_float32(params, name, device, {"max_norm": max_norm}, **options)
    feed, reference = Feed(params), ReferenceRun(theirs)
    for step in range(1, 7):
        gradients = feed(step)
        set_gradients(ours, [grad * SCALE for grad in gradients])
        amp_step(ours, SCALE, False)
        set_gradients(theirs, [grad.float() for grad in gradients])
        torch.nn.utils.clip_grad_norm_(parameters(theirs), max_norm, foreach=False)
        theirs.step()
        reference.step(clipped(gradients, max_norm)[0])
        for mine, other, grad in zip(parameters(ours), parameters(theirs), gradients, strict=True):
            assert ("master_param" in ours.state[mine]) == (mine.dtype != torch.float32)
            master = ours.state[mine].get("master_param", mine)
            assert torch.equal(mine, master.to(mine.dtype))
            assert mine.grad is not None
            assert torch.equal(mine.grad.cpu(), grad), "the unscaled gradient is left behind, unclipped"
            scale = reference.scales[other]["param"]
            assert_matches(master, other, reference.values[other]["param"], f"step {step}", scale)


@on_both_backends
def test_master_weights_under_clipping_and_amp(name: str, device: torch.device) -> None:
    """The scale and the clip reach masters as they reach parameters."""
    options = {**FULL_OPTIONS[name], **({"lr": 0.1} if name == "SGD" else {})}
    check_scaled_and_clipped(name, make_params(SMALL, torch.bfloat16), 2.0, device, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_both_backends
def test_what_is_written_to_a_parameter_with_a_master_stays(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """By ``load_state_dict``, in place, or past the version counter; elements not written keep their masters."""
    low = make_params(((4096 + 65,), (7, 9), ()), dtype)
    ours, theirs = pair_with_float32(low, name, device, {"max_norm": 1e9}, **FULL_OPTIONS[name])
    feed = Feed(low)
    for step in range(1, 7):
        gradients = feed(step)
        step_by(ours, gradients)
        step_by(theirs, [grad.float() for grad in gradients])
        for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
            master = ours.state[mine]["master_param"]
            torch.testing.assert_close(master.cpu(), other.detach())
            assert torch.equal(mine, master.to(dtype))
            value = spread(mine.shape, 0.03, dtype)
            written = (torch.rand(mine.shape) < 0.3) & (value != mine.detach().cpu())
            new = torch.where(written, value, mine.detach().cpu()).to(device)
            with torch.no_grad():
                other[written] = value[written].float()
                if step % 2:
                    mine.copy_(new)
                else:
                    mine.data = new


def test_post_hooks_of_loading_see_masters_and_moments_as_they_are(name: str) -> None:
    """And what a hook writes there stays: loading is over by then, as in torch."""
    low = make_params(((65,),), torch.bfloat16)
    ours = ours_for(name)(low, **FULL_OPTIONS[name], master_weights=True)
    step_by(ours, [torch.randn(65).bfloat16()])
    saved = copy.deepcopy(ours.state_dict())
    expected = saved["state"][0]

    def look(optimizer: Optimizer) -> None:
        state = optimizer.state[parameters(optimizer)[0]]
        for key, value in expected.items():
            assert value.dtype == torch.float32
            assert state[key].dtype == value.dtype, key
            assert torch.equal(state[key], value), key
        state["master_param"] = state["master_param"] + 1

    again = ours_for(name)(copies(low), **FULL_OPTIONS[name], master_weights=True)
    again.register_load_state_dict_post_hook(look)
    again.load_state_dict(saved)
    assert torch.equal(again.state[parameters(again)[0]]["master_param"], expected["master_param"] + 1)


def test_master_weights_and_torch_checkpoints(name: str) -> None:
    """Torch's has no masters: they are made from the parameters. Ours loads there, extra key and all."""
    gradients = [torch.randn(65).bfloat16()]
    theirs = theirs_for(name)(make_params(((65,),), torch.bfloat16), **FULL_OPTIONS[name], foreach=False)
    step_by(theirs, gradients)
    ours = ours_for(name)(copies(parameters(theirs)), **FULL_OPTIONS[name], master_weights=True)
    ours.load_state_dict(theirs.state_dict())
    step_by(ours, gradients)
    state = ours.state[parameters(ours)[0]]
    assert state["master_param"].dtype == torch.float32
    assert torch.equal(state["master_param"].bfloat16(), parameters(ours)[0])
    theirs.load_state_dict(ours.state_dict())
    step_by(theirs, gradients)


def test_masters_and_a_checkpoint_that_says_none() -> None:
    """Older versions of torch keep ``momentum_buffer: None`` where SGD has no momentum."""
    ours = ours_for("SGD")(make_params(((65,),), torch.bfloat16), lr=0.1, momentum=0.9, master_weights=True)
    ours.load_state_dict({**ours.state_dict(), "state": {0: {"momentum_buffer": None}}})
    gradients = [torch.randn(65).bfloat16()]
    step_by(ours, gradients)
    assert torch.equal(ours.state[parameters(ours)[0]]["momentum_buffer"], gradients[0].float())


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float16)],
    ids=str,
)
@on_both_backends
def test_gradients_of_another_dtype(
    name: str, dtype: torch.dtype, grad_dtype: torch.dtype, device: torch.device
) -> None:
    """``Parameter.grad_dtype``: no gradient is rounded to the parameter's dtype on the way."""
    ours, theirs = make_pair(name, device, dtype, SMALL, **FULL_OPTIONS[name])
    for param in parameters(ours):
        param.grad_dtype = grad_dtype
    feed = Feed([torch.empty(shape, dtype=grad_dtype) for shape in SMALL])
    assert_same_run(ours, theirs, feed)
    assert all(param.grad.dtype == grad_dtype for param in parameters(ours))
