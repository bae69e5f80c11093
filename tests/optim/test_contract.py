"""What torch's optimizers promise besides numbers: checkpoints, hooks, copies, groups, layouts, rare types.

Backends matter only where tensors are laid out; everything else runs on the fallback.
"""

import copy
import functools
import inspect
import io
import itertools
import pickle
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, get_type_hints

import pytest
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD, backend_for
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.two_tensor import TwoTensor

from .optimizers import (
    NAMES,
    STEPS,
    Feed,
    ReferenceRun,
    assert_same_run,
    assert_same_state,
    cases_on_both_backends,
    copies,
    make_pair,
    make_params,
    on_both_backends,
    ours_for,
    parameters,
    set_gradients,
    settings,
    spread,
    theirs_for,
)

FULL_OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.004, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "Adam": {"lr": 0.004, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.004, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True},
}
SMALL = ((65,), (7, 9), ())


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def run(optimizer: Optimizer, gradients: list[list[Tensor]]) -> None:
    for each in gradients:
        set_gradients(optimizer, each)
        optimizer.step()


def some_gradients(optimizer: Optimizer, steps: int) -> list[list[Tensor]]:
    feed = Feed(parameters(optimizer))
    return [feed(step) for step in range(1, steps + 1)]


def assert_equal_bits(first: Optimizer, second: Optimizer) -> None:
    """Parameters and state tensors, bit for bit."""
    for one, other in zip(parameters(first), parameters(second), strict=True):
        assert torch.equal(one, other)
        assert first.state[one].keys() == second.state[other].keys()
        for key, value in first.state[one].items():
            assert torch.equal(value, second.state[other][key]), key


# Checkpoints.


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_dict_is_torch_s(name: str) -> None:
    ours, theirs = make_pair(name, **FULL_OPTIONS[name])

    def shape_of(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape_of(item) for key, item in value.items() if key != "foreach"}
        if isinstance(value, list):
            return [shape_of(item) for item in value]
        return (
            (value.dtype, value.shape, value.device, value.stride()) if isinstance(value, Tensor) else value
        )

    assert shape_of(ours.state_dict()) == shape_of(theirs.state_dict())
    for optimizer in (ours, theirs):
        run(optimizer, some_gradients(optimizer, 2))
    assert shape_of(ours.state_dict()) == shape_of(theirs.state_dict())


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        (name, changed)
        for name in NAMES
        for changed in ({}, {"fused": True}, {"foreach": True}, {"capturable": True})
        if not (name == "SGD" and "capturable" in changed)  # torch's has none
    ],
    ids=str,
)
def test_checkpoints_move_both_ways_in_mid_run(name: str, changed: dict[str, Any]) -> None:
    """torch's checkpoint continues here and ours there; loaded flags such as ``fused`` change nothing."""
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    assert_same_run(ours, theirs, steps=6)
    for group in theirs.param_groups:
        group.update(changed)
    next_ours = ours_for(name)(copies(parameters(theirs)), lr=9.0)
    next_ours.load_state_dict(through_a_file(theirs.state_dict()))
    next_theirs = theirs_for(name)(copies(parameters(ours)), lr=9.0, foreach=False)
    next_theirs.load_state_dict(through_a_file(ours.state_dict()))
    for group in next_theirs.param_groups:
        group.update(foreach=False)
    after = next_ours.param_groups[0]
    assert {key: after[key] for key in changed} == changed
    # Each goes on from the other's numbers, so each has its own run to compare with.
    twin_theirs = theirs_for(name)(copies(parameters(theirs)), foreach=False, **FULL_OPTIONS[name])
    for group in theirs.param_groups:
        group.update(dict.fromkeys(changed, False))
    twin_theirs.load_state_dict(theirs.state_dict())
    for group in next_ours.param_groups:
        group.update(dict.fromkeys(changed, False))
    assert_same_run(next_ours, twin_theirs, steps=8)
    twin_ours = ours_for(name)(copies(parameters(ours)))
    twin_ours.load_state_dict(ours.state_dict())
    assert_same_run(twin_ours, next_theirs, steps=8)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(name: str) -> None:
    ours, _ = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    gradients = some_gradients(ours, STEPS)
    run(ours, gradients[:5])
    resumed = ours_for(name)(copies(parameters(ours)))
    resumed.load_state_dict(through_a_file(ours.state_dict()))
    run(ours, gradients[5:])
    run(resumed, gradients[5:])
    assert_equal_bits(ours, resumed)


def test_loading_into_a_running_optimizer_goes_back(name: str) -> None:
    """State tensors are replaced under a plan that is already warm."""
    ours, _ = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    gradients = some_gradients(ours, STEPS)
    run(ours, gradients[:3])
    values, state = (
        [param.detach().clone() for param in ours.param_groups[0]["params"]],
        copy.deepcopy(ours.state_dict()),
    )
    run(ours, gradients[3:])
    first = [param.detach().clone() for param in parameters(ours)]
    ours.load_state_dict(state)
    with torch.no_grad():
        for param, value in zip(parameters(ours), values, strict=True):
            param.copy_(value)
    run(ours, gradients[3:])
    assert all(torch.equal(param, value) for param, value in zip(parameters(ours), first, strict=True))


@pytest.mark.parametrize("step_type", [float, int, torch.tensor])
def test_old_checkpoints_load(name: str, step_type: Any) -> None:
    """Before torch 1.12 ``step`` was a number, and the groups lacked most of today's keys."""
    ours, theirs = make_pair(
        name, shapes=SMALL, **{"lr": 0.004, "momentum": 0.9} if name == "SGD" else {"lr": 0.004}
    )
    assert_same_run(ours, theirs, steps=4)
    old = theirs.state_dict()
    for group in old["param_groups"]:
        for key in (
            "maximize",
            "foreach",
            "capturable",
            "differentiable",
            "fused",
            "decoupled_weight_decay",
            "nesterov",
        ):
            group.pop(key, None)
        if name != "SGD":
            del group["amsgrad"]
    for state in old["state"].values():
        if "step" in state:
            state["step"] = step_type(float(state["step"]))
    ours_again = ours_for(name)(copies(parameters(theirs)), lr=9.0)
    theirs_again = theirs_for(name)(copies(parameters(theirs)), lr=9.0, foreach=False)
    ours_again.load_state_dict(copy.deepcopy(old))
    theirs_again.load_state_dict(copy.deepcopy(old))
    for group in theirs_again.param_groups:
        group["foreach"] = False
    assert settings(ours_again) == settings(theirs_again)
    assert_same_run(ours_again, theirs_again, steps=8)


def test_loading_casts_state_to_the_parameter_but_step_stays(name: str) -> None:
    """As torch: moments follow a bfloat16 model; ``step`` is never below float32."""
    _ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    run(theirs, some_gradients(theirs, 3))
    low = ours_for(name)([torch.nn.Parameter(param.detach().bfloat16()) for param in parameters(theirs)])
    low.load_state_dict(theirs.state_dict())
    for state in low.state.values():
        for key, value in state.items():
            assert value.dtype == (torch.float32 if key == "step" else torch.bfloat16)
    run(low, some_gradients(low, 2))


def test_refuses_state_of_another_shape_as_torch_does(name: str) -> None:
    """Kernels, torch's fused ones among them, would write beyond the smaller tensor."""
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    for optimizer in (ours, theirs):
        run(optimizer, some_gradients(optimizer, 1))
        before = [param.detach().clone() for param in parameters(optimizer)]
        state = copy.deepcopy(optimizer.state_dict())
        for key, value in state["state"][0].items():
            state["state"][0][key] = value[:3] if isinstance(value, Tensor) and value.ndim else value
        optimizer.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"65"):
            run(optimizer, some_gradients(optimizer, 1))
        if optimizer is ours:  # torch has applied the weight decay by then
            assert all(torch.equal(p, b) for p, b in zip(parameters(ours), before, strict=True))


def test_state_of_the_whole_optimizer_may_lie_beside_that_of_parameters(name: str) -> None:
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    ours.state["epoch"] = 3  # type: ignore[index]
    assert_same_run(ours, theirs)
    assert ours.state_dict()["state"]["epoch"] == 3


def test_refuses_a_checkpoint_of_other_groups_as_torch_does(name: str) -> None:
    ours, theirs = make_pair(name, shapes=SMALL)
    state = ours.state_dict()
    state["param_groups"][0]["params"] = [0]
    texts = []
    for optimizer in (ours, theirs):
        with pytest.raises(ValueError) as caught:
            optimizer.load_state_dict(copy.deepcopy(state))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


# Copies.


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("warm", [0, 3])
def test_copies_go_on_alone_with_everything(name: str, clone: Callable[[Any], Any], warm: int) -> None:
    ours = ours_for(name)(
        make_params(SMALL),
        **FULL_OPTIONS[name],
        max_norm=2.0,
        on_nonfinite="skip",
        seed=5,
        stochastic_rounding=False,
    )
    gradients = some_gradients(ours, STEPS)
    run(ours, gradients[:warm])
    twin = clone(ours)
    assert twin.max_norm == 2.0
    assert twin.on_nonfinite == "skip"
    assert twin.seed == 5
    untouched = [param.detach().clone() for param in parameters(twin)]
    run(ours, gradients[warm:])
    assert all(torch.equal(param, value) for param, value in zip(parameters(twin), untouched, strict=True))
    run(twin, gradients[warm:])
    assert_equal_bits(ours, twin)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_step_has_the_dtype_that_torch_gives_it(name: str, default: torch.dtype, fused: bool | None) -> None:
    """The default dtype where that is wider than float32, whatever the parameter's; float32 with ``fused``."""
    steps = []
    for cls in (ours_for(name), theirs_for(name)):
        optimizer = cls(make_params(((5,),)), fused=fused)
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            run(optimizer, [[torch.ones(5, dtype=torch.float32)]] * 3)
        finally:
            torch.set_default_dtype(before)
        steps.append(optimizer.state[parameters(optimizer)[0]]["step"])
    assert steps[0] == steps[1] == 3
    assert steps[0].dtype == steps[1].dtype


@cases_on_both_backends("amsgrad", [(False,), (True,)], lambda amsgrad: amsgrad)
def test_moments_that_a_hook_makes_in_another_dtype(name: str, amsgrad: bool, device: torch.device) -> None:
    """They keep it: bfloat16 beside float32 parameters, say, to save memory. SGD's buffer likewise."""
    options = {"lr": 0.004, **({"momentum": 0.9} if name == "SGD" else {"amsgrad": amsgrad})}
    ours, theirs = make_pair(name, device, shapes=SMALL, **options)
    run(theirs, some_gradients(theirs, 1))
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))

    def narrow(optimizer: Optimizer, *_: Any) -> None:
        for state in optimizer.state.values():
            state.update({key: value.bfloat16() for key, value in state.items() if key != "step"})

    handle = ours.register_step_pre_hook(narrow)
    with torch.no_grad():
        for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
            mine.copy_(other)
    for step, each in enumerate(some_gradients(theirs, 4)):
        for optimizer in (ours, theirs):
            set_gradients(optimizer, each)
            for state in theirs.state.values():
                for key in state.keys() - {"step"}:
                    state[key].copy_(state[key].bfloat16())
            optimizer.step()
        if step == 0:
            handle.remove()
        for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
            torch.testing.assert_close(mine.cpu(), other)
            for key, value in ours.state[mine].items():
                assert value.dtype == (torch.float32 if key == "step" else torch.bfloat16), key


# Calls around the step.


def test_a_closure_is_called_once_with_gradients_enabled(name: str) -> None:
    ours = ours_for(name)(make_params(SMALL))
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        ours.zero_grad()
        loss = sum(param.square().sum() for param in parameters(ours))
        loss.backward()
        return loss.detach()

    before = [param.detach().clone() for param in parameters(ours)]
    with torch.no_grad():
        loss = ours.step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True]
    assert float(loss) == pytest.approx(float(sum(value.square().sum() for value in before)), rel=1e-6)
    assert not any(torch.equal(param, value) for param, value in zip(parameters(ours), before, strict=True))
    assert ours.step() is None


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5, "on_nonfinite": "skip"}], ids=str)
@on_both_backends
def test_steps_inside_inference_mode_and_outside(
    name: str, options: dict[str, Any], device: torch.device
) -> None:
    """What a first step inside makes, later ones outside write: torch's own state refuses that."""
    ours, plain = (
        ours_for(name)(copies(make_params(((7, 3), (65,))), device), **FULL_OPTIONS[name], **options)
        for _ in range(2)
    )
    for param, other in zip(parameters(ours), parameters(plain), strict=True):
        other.data.copy_(param.detach())
    for step, each in enumerate(some_gradients(ours, 6)):
        run(plain, [each])
        with torch.inference_mode(step not in (2, 3)):
            run(ours, [each])
    assert_equal_bits(ours, plain)
    if options:
        assert torch.equal(ours.grad_norm, plain.grad_norm)


def test_hooks_run_once_each_even_after_a_plain_torch_optimizer_exists(name: str) -> None:
    theirs_for(name)(make_params(SMALL))  # torch wraps `step` per class: super().step() would run hooks twice
    ours = ours_for(name)(make_params(SMALL), lr=1.0)
    log: list[str] = []
    handles = [
        ours.register_step_pre_hook(lambda optimizer, args, kwargs: log.append("pre")),
        ours.register_step_post_hook(lambda optimizer, args, kwargs: log.append("post")),
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: log.append("global pre")),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: log.append("global post")),
    ]
    try:
        run(ours, some_gradients(ours, 1))
    finally:
        for handle in handles:
            handle.remove()
    assert log == ["global pre", "pre", "post", "global post"]


def test_hooks_get_the_arguments_of_the_call(name: str) -> None:
    """Torch hands hooks what the caller wrote, and a pre hook may bring a closure where there was none."""

    def closure() -> Tensor:
        return torch.tensor(1.0)

    for optimizer in make_pair(name, shapes=SMALL):
        seen: list[Any] = []

        def hook(_: Any, args: Any, kwargs: Any, seen: list[Any] = seen) -> Any:
            seen.append((args[1:], kwargs))
            return args[:1], {"closure": lambda: torch.tensor(2.0)}

        optimizer.register_step_pre_hook(hook)
        assert optimizer.step() == 2
        for given in (None, closure):
            assert optimizer.step(given) == 2
            assert optimizer.step(closure=given) == 2
        by_name = [((), {"closure": given}) for given in (None, closure)]
        assert seen == [((), {}), ((None,), {}), by_name[0], ((closure,), {}), by_name[1]]
    assert list(inspect.signature(ours_for(name).step).parameters) == ["self", "closure"]


@pytest.mark.parametrize("wraps", [False, True])
def test_a_subclass_with_its_own_step_runs_hooks_once(name: str, wraps: bool) -> None:
    cls = ours_for(name)

    class Own(cls):  # type: ignore[misc,valid-type]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

        if wraps:  # torch then takes it for a step that runs the hooks by itself
            step = functools.wraps(cls.step)(step)

    ours = Own(make_params(SMALL))
    log: list[str] = []
    ours.register_step_pre_hook(lambda optimizer, args, kwargs: log.append("pre"))
    ours.register_step_post_hook(lambda optimizer, args, kwargs: log.append("post"))
    run(ours, some_gradients(ours, 1))
    assert log == ["pre", "post"]


def test_the_profiler_sees_the_step(name: str) -> None:
    """A step without hooks and profiler leaves torch's wrapper out, which costs more than a small step."""
    ours, _ = make_pair(name, shapes=SMALL)
    set_gradients(ours, Feed(parameters(ours))(1))
    with torch.autograd.profiler.profile() as profile:
        ours.step()
    ours.step()
    labels = [
        event.count for event in profile.key_averages() if event.key == f"Optimizer.step#Fused{name}.step"
    ]
    assert labels == [1]


def test_a_pre_hook_that_changes_gradients_and_rates_is_heard(name: str) -> None:
    ours, theirs = make_pair(name, shapes=SMALL, lr=0.004)

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(hook)
    gradients = some_gradients(theirs, STEPS)
    reference = ReferenceRun(theirs)
    for each in gradients:
        for optimizer in (ours, theirs):
            set_gradients(optimizer, each)
            optimizer.step()
        for group in theirs.param_groups:
            assert group["lr"] == ours.param_groups[0]["lr"]
        reference.step(each)  # the hook ran before the step: the groups say what the step used
        assert_same_state(ours, theirs, reference)


def test_state_dict_hooks_run(name: str) -> None:
    ours = ours_for(name)(make_params(SMALL))
    log: list[str] = []
    ours.register_state_dict_pre_hook(lambda optimizer: log.append("save pre"))
    ours.register_state_dict_post_hook(lambda optimizer, state: log.append("save post"))
    ours.register_load_state_dict_pre_hook(lambda optimizer, state: log.append("load pre"))
    ours.register_load_state_dict_post_hook(lambda optimizer: log.append("load post"))
    ours.load_state_dict(ours.state_dict())
    assert log == ["save pre", "save post", "load pre", "load post"]


def test_zero_grad(name: str) -> None:
    ours = ours_for(name)(make_params(SMALL))
    set_gradients(ours, some_gradients(ours, 1)[0])
    ours.zero_grad(set_to_none=False)
    assert all(int(param.grad.count_nonzero()) == 0 for param in parameters(ours))
    ours.zero_grad()
    assert all(param.grad is None for param in parameters(ours))


def test_it_is_a_torch_optimizer(name: str) -> None:
    ours = ours_for(name)(make_params(SMALL))
    assert isinstance(ours, theirs_for(name))
    theirs = theirs_for(name)(make_params(SMALL))
    assert ours.defaults == theirs.defaults
    assert list(ours.defaults) == list(theirs.defaults)


# Groups.


@on_both_backends
def test_groups_with_their_own_options_and_dtypes(name: str, device: torch.device) -> None:
    """Four dtypes in one group, and a second group with other options: as many buckets as there are kinds."""
    params = [*make_params(((65,), ()), torch.float32), *make_params(((65,),), torch.bfloat16)]
    params += [*make_params(((7, 9),), torch.float64), *make_params(((63,),), torch.float16)]
    others = make_params(((33,), (5, 3)), torch.float32)
    second = {"lr": 0.002, "weight_decay": 0.3, "maximize": True}
    eps = {} if name == "SGD" else {"eps": 0.1}
    ours = ours_for(name)(
        [{"params": copies(params, device)}, {"params": copies(others, device), **second}],
        **FULL_OPTIONS[name],
        **eps,
    )
    theirs = theirs_for(name)(
        [{"params": params}, {"params": others, **second}], **FULL_OPTIONS[name], **eps, foreach=False
    )
    assert_same_run(ours, theirs, steps=10)


def test_add_param_group_in_mid_run(name: str) -> None:
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    reference = assert_same_run(ours, theirs, steps=4)
    late = make_params(((33,),))
    ours.add_param_group({"params": copies(late), "lr": 0.01})
    theirs.add_param_group({"params": late, "lr": 0.01})
    assert_same_run(ours, theirs, steps=8, reference=reference)


def test_named_parameters(name: str) -> None:
    params = dict(zip("abc", make_params(SMALL), strict=True))
    ours = ours_for(name)(zip("abc", copies(params.values()), strict=True), **FULL_OPTIONS[name])
    theirs = theirs_for(name)(params.items(), **FULL_OPTIONS[name], foreach=False)
    assert ours.param_groups[0]["param_names"] == ["a", "b", "c"]
    assert_same_run(ours, theirs)
    assert ours.state_dict()["param_groups"][0]["param_names"] == ["a", "b", "c"]


@on_both_backends
def test_a_parameter_whose_gradients_come_and_go(name: str, device: torch.device) -> None:
    """A late first gradient, gaps, a step without any: each parameter has its own first step and count."""
    ours, theirs = make_pair(name, device, shapes=((65,), (7, 9), (33,), ()), **FULL_OPTIONS[name])
    feed = Feed(parameters(theirs))
    absent = {1: (1, 2, 3), 2: (2, 3), 3: (2,), 5: (0, 3), 6: (0, 1, 2, 3), 7: (1,), 9: (2,)}

    def gappy(step: int) -> list[Tensor | None]:
        return [None if i in absent.get(step, ()) else grad for i, grad in enumerate(feed(step))]

    reference = assert_same_run(ours, theirs, gappy)
    if name != "SGD":
        assert [int(reference.values[param]["step"]) for param in parameters(theirs)] == [10, 9, 7, 8]


def test_parameters_without_gradients_have_no_state(name: str) -> None:
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    for optimizer in (ours, theirs):
        grads: list[Tensor | None] = [torch.ones(65), None, None]
        set_gradients(optimizer, grads)
        optimizer.step()
        assert [param in optimizer.state for param in parameters(optimizer)] == [True, False, False]
    plain = ours_for(name)(make_params(SMALL))
    plain.step()  # nothing to do is not an error
    assert len(plain.state) == 0


def test_options_changed_by_hand_between_steps(name: str) -> None:
    """Every option is read at each step, whatever was planned before."""
    ours, theirs = make_pair(name, shapes=SMALL, lr=0.004)
    changes: dict[int, dict[str, Any]] = {
        2: {"weight_decay": 0.2},
        4: {"lr": 0.001, "maximize": True},
        6: {"momentum": 0.5, "dampening": 0.25} if name == "SGD" else {"betas": (0.5, 0.7)},
        8: {"dampening": 0.0, "nesterov": True} if name == "SGD" else {"eps": 0.01},
        10: {"weight_decay": 0.0, "maximize": False},
        11: {"momentum": 0.0, "nesterov": False} if name == "SGD" else {},
    }

    def change(optimizer: Optimizer, step: int) -> None:
        optimizer.param_groups[0].update(changes.get(step, {}))

    assert_same_run(ours, theirs, after_step=change)


@on_both_backends
def test_options_given_as_tensors_are_read_at_each_step(name: str, device: torch.device) -> None:
    """Every option that torch's class takes as a 0-d tensor, rewritten in place as a scheduler does."""
    params = make_params(SMALL)
    optimizers = []
    for cls, given in ((ours_for(name), copies(params, device)), (theirs_for(name), params)):
        lr, decay, beta1, beta2 = torch.tensor([0.004, 0.1, 0.8, 0.9], dtype=torch.float64).unbind()
        others = {"weight_decay": decay} if name == "SGD" else {"betas": (beta1, beta2)}
        optimizers.append((cls(given, lr=lr, foreach=False, **others), (lr, decay, beta1, beta2)))
    (ours, mine), (theirs, other) = optimizers

    def change(optimizer: Optimizer, step: int) -> None:
        for tensor in mine if optimizer is ours else other:
            tensor.mul_(0.97)

    assert_same_run(ours, theirs, after_step=change)


# Layouts.


@cases_on_both_backends("dims", [(1,), (2,)], lambda dims: dims == 1)
def test_a_rate_of_one_element_may_have_dimensions(name: str, dims: int, device: torch.device) -> None:
    rate = torch.full([1] * dims, 2.0**-8)
    ours, theirs = make_pair(name, device, shapes=SMALL, **{**FULL_OPTIONS[name], "lr": rate})
    assert_same_run(ours, theirs)
    assert ours.param_groups[0]["lr"].shape == rate.shape


def transposed(grad: Tensor) -> Tensor:
    return grad.transpose(0, -1).contiguous().transpose(0, -1) if grad.ndim > 1 else grad.clone()


def every_other(grad: Tensor) -> Tensor:
    """The same values with a NaN between any two: a kernel that walks raw memory picks them up."""
    wide = torch.full((*grad.shape, 2), float("nan"), dtype=grad.dtype, device=grad.device)
    wide[..., 0] = grad
    return wide[..., 0]


def misaligned(grad: Tensor) -> Tensor:
    flat = torch.full((grad.numel() + 3,), float("nan"), dtype=grad.dtype, device=grad.device)
    view = flat[1 : 1 + grad.numel()].view(grad.shape)
    return view.copy_(grad)


def as_before(grad: Tensor) -> Tensor:
    return grad.clone()


LAYOUTS = {function.__name__: function for function in (transposed, every_other, misaligned)}
LAID_OUT = ((33, 5), (4, 3, 2, 5), (65,), ())


@cases_on_both_backends(
    "layout of",
    itertools.product(LAYOUTS, ("gradient", "parameter", "both")),
    lambda layout, of: of == "both" or (layout, of) == ("transposed", "gradient"),
)
def test_any_strides(name: str, layout: str, of: str, device: torch.device) -> None:
    """torch's fused=True walks raw memory here and goes silently wrong (pytorch#110758)."""
    params = make_params(LAID_OUT)
    ours_params = copies(params, device)
    if of != "gradient":
        ours_params = [torch.nn.Parameter(LAYOUTS[layout](param.detach())) for param in ours_params]
    ours = ours_for(name)(ours_params, **FULL_OPTIONS[name])
    theirs = theirs_for(name)(params, **FULL_OPTIONS[name], foreach=False)
    assert_same_run(ours, theirs, lay_out=LAYOUTS[layout] if of != "parameter" else as_before)


@on_both_backends
def test_channels_last_against_contiguous(name: str, device: torch.device) -> None:
    params = make_params(((4, 3, 5, 5), (2, 3, 4, 4)))
    ours_params = [
        torch.nn.Parameter(param.detach().clone().to(memory_format=torch.channels_last).to(device))
        for param in params
    ]
    ours = ours_for(name)(ours_params, **FULL_OPTIONS[name])
    theirs = theirs_for(name)(params, **FULL_OPTIONS[name], foreach=False)
    assert_same_run(ours, theirs)
    assert all(param.is_contiguous(memory_format=torch.channels_last) for param in parameters(ours))
    if name != "SGD":  # whose buffer is a clone of the first gradient
        for param in parameters(ours):
            for key, value in ours.state[param].items():
                assert key == "step" or value.stride() == param.stride()


@on_both_backends
def test_expanded_gradients(name: str, device: torch.device) -> None:
    """One stored value for all: what ``param.sum().backward()`` gives."""
    ours, theirs = make_pair(name, device, shapes=((33, 5), (65,), ()), **FULL_OPTIONS[name])
    sizes = [spread((), 4.0, torch.float32) for _ in parameters(theirs)]

    def constant(step: int) -> list[Tensor | None]:
        return [size.expand(param.shape) * 1.0 for size, param in zip(sizes, parameters(theirs), strict=True)]

    assert_same_run(ours, theirs, constant, lay_out=lambda grad: grad.flatten()[0].clone().expand(grad.shape))


@on_both_backends
def test_gradients_with_the_negative_bit(name: str, device: torch.device) -> None:
    """Autograd hands out 0-d and one-element ones where conjugates are; memory has them with the other sign."""
    ours, theirs = make_pair(name, device, shapes=((), (1,), (7, 9), (65,)), **FULL_OPTIONS[name])
    for param in parameters(ours)[:2]:
        value = torch.complex(torch.ones_like(param), param)
        (value.conj() * (1 + 2j)).imag.sum().backward()
        assert param.grad.is_neg()

    # The address stays: only the bit tells one step from the next.
    buffers = [torch.empty_like(param) for param in parameters(ours)]
    reference = ReferenceRun(theirs)
    for step, grads in enumerate(some_gradients(theirs, STEPS), start=1):
        set_gradients(theirs, grads)
        for param, buffer, grad in zip(parameters(ours), buffers, grads, strict=True):
            param.grad = buffer.copy_(grad) if step % 2 else torch._neg_view(buffer.copy_(-grad))
        reference.step(grads)
        theirs.step()
        ours.step()
        assert_same_state(ours, theirs, reference, f"at step {step}")


@on_both_backends
def test_all_else_with_the_negative_bit(name: str, device: torch.device) -> None:
    """A parameter that is the imaginary part of a conjugate, its state, the scale, the learning rate."""

    def negative(tensor: Tensor) -> Tensor:
        return torch._neg_view(-tensor.detach())

    theirs = theirs_for(name)(make_params(((65,), ())), foreach=False, **FULL_OPTIONS[name])
    lr = negative(torch.tensor(theirs.param_groups[0]["lr"], device=device))
    params = [negative(param.to(device)).requires_grad_() for param in parameters(theirs)]
    ours = ours_for(name)(params, **{**FULL_OPTIONS[name], "lr": lr})
    for step, grads in enumerate(some_gradients(theirs, 4)):
        set_gradients(theirs, grads)
        set_gradients(ours, [4 * grad for grad in grads])
        ours.grad_scale = negative(torch.tensor(4.0, device=device))
        ours.found_inf = negative(torch.tensor(float(step == 2), device=device))
        if step == 3:
            ours.load_state_dict(ours.state_dict())
            for state in ours.state.values():
                state.update({key: negative(value) for key, value in state.items() if key != "step"})
        ours.step()
        if step != 2:
            theirs.step()
    for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(mine.cpu(), other)


@on_both_backends
def test_expanded_parameters_are_refused_as_torch_does(name: str, device: torch.device) -> None:
    """One number for many elements, of a parameter or of a state: which of them is to be written?"""
    for optimizer in make_pair(name, device, shapes=((4,), (65,)), **FULL_OPTIONS[name]):
        wide = parameters(optimizer)[0].detach()[:1].expand(4).requires_grad_()
        optimizer.add_param_group({"params": [wide]})
        before = [param.detach().clone() for param in parameters(optimizer)]
        for param in parameters(optimizer):
            param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            optimizer.step()
        if optimizer.__class__ is ours_for(name):
            assert all(torch.equal(p, value) for p, value in zip(parameters(optimizer), before, strict=True))

    ours, _ = make_pair(name, device, shapes=((4,),), **FULL_OPTIONS[name])
    run(ours, some_gradients(ours, 1))
    state = ours.state[parameters(ours)[0]]
    state.update({key: value[:1].expand(4) for key, value in state.items() if key != "step"})
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        run(ours, some_gradients(ours, 1))


@on_both_backends
def test_a_parameter_given_twice_steps_twice_as_torch_s(name: str, device: torch.device) -> None:
    """One launch over both would let its programs race."""
    options = {**FULL_OPTIONS[name], **({"momentum": 0, "dampening": 0} if name == "SGD" else {})}
    # (torch's SGD makes as many first buffers as there are mentions, and keeps the last.)
    ours, theirs = make_pair(name, device, shapes=((65,), (7, 9)), **options)
    for optimizer in (ours, theirs):
        group = optimizer.param_groups[0]
        group["params"] = [group["params"][i] for i in (0, 1, 0, 0)]
    alias = torch.nn.Parameter(parameters(ours)[1].data)  # another object, the same memory
    ours.add_param_group({"params": [alias]})
    theirs.add_param_group({"params": [torch.nn.Parameter(parameters(theirs)[1].data)]})
    for grads in some_gradients(theirs, 5):
        for optimizer in (ours, theirs):
            for param, grad in zip(parameters(optimizer), grads, strict=True):
                param.grad = grad.to(param.device, copy=True)
            optimizer.step()
        for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
            torch.testing.assert_close(mine.cpu(), other)


@on_both_backends
def test_gradients_without_memory_are_refused(name: str, device: torch.device) -> None:
    """Forward mode makes zeros that no memory holds: refused, save by torch's own addition, which serves them."""
    ours, _ = make_pair(name, device, shapes=SMALL)
    before = [param.detach().clone() for param in parameters(ours)]
    for param in parameters(ours):
        param.grad = torch._efficientzerotensor(param.shape, device=device)
    served = name == "SGD" and backend_for(before[0]) == "fallback"
    with nullcontext() if served else pytest.raises(RuntimeError, match=r"clone\(\)"):
        ours.step()
    assert all(torch.equal(param, value) for param, value in zip(parameters(ours), before, strict=True))


@on_both_backends
def test_the_same_address_with_other_strides(name: str, device: torch.device) -> None:
    """An allocator hands freed memory out again: a plan must know the gradient's strides, not its address."""
    ours, theirs = make_pair(name, device, shapes=((16, 16),), **FULL_OPTIONS[name])
    buffer = torch.empty(16, 16, device=device)
    param = parameters(ours)[0]
    reference = ReferenceRun(theirs)
    for step, grads in enumerate(some_gradients(theirs, STEPS), start=1):
        set_gradients(theirs, grads)
        view = buffer if step % 3 else buffer.t()
        param.grad = view.copy_(grads[0])
        reference.step(grads)
        theirs.step()
        ours.step()
        assert_same_state(ours, theirs, reference, f"at step {step}")


@on_both_backends
def test_parameters_moved_to_other_memory_between_steps(name: str, device: torch.device) -> None:
    """``param.data = ...`` keeps the object and changes what it points to."""
    ours, theirs = make_pair(name, device, shapes=((65,), (7, 9)), **FULL_OPTIONS[name])
    kept = []

    def move(optimizer: Optimizer, step: int) -> None:
        if optimizer is ours and step % 2:
            for param in parameters(ours):
                kept.append(param.data)  # so that the old address is not handed out again
                param.data = param.data.clone()

    assert_same_run(ours, theirs, after_step=move)


@on_both_backends
def test_a_parameter_that_becomes_another_view_of_its_memory(name: str, device: torch.device) -> None:
    """``param.data = param.data.t()`` and ``param.data = param.data[:5]``: the address stays."""
    for change in (Tensor.t, lambda data: data[:5]):
        if change is not Tensor.t and name != "SGD":
            continue  # the state would keep the old shape
        ours, theirs = make_pair(name, device, shapes=((16, 16),), lr=0.01)
        for step in range(6):
            if step == 3:
                for optimizer in (ours, theirs):
                    optimizer.zero_grad()
                    parameters(optimizer)[0].data = change(parameters(optimizer)[0].data)
            shape = parameters(theirs)[0].shape
            grad = spread(shape, 4.0, torch.float32)
            # Contiguous before and after: only the parameter tells that something has changed.
            set_gradients(ours, [grad])
            set_gradients(theirs, [grad])
            ours.step()
            theirs.step()
            torch.testing.assert_close(parameters(ours)[0].cpu(), parameters(theirs)[0])


@on_both_backends
def test_a_parameter_that_is_a_view_leaves_its_neighbours_alone(name: str, device: torch.device) -> None:
    """Views of one flat buffer at odd offsets: FSDP's shards."""
    params = make_params(((5,), (64,), (1,), (130,)))
    sizes = [param.numel() for param in params]
    flat = torch.full((sum(sizes) + 2 * len(sizes) + 1,), 7.0, device=device)
    views, mask, start = [], torch.ones(len(flat), dtype=torch.bool), 1
    for param in params:
        view = flat[start : start + param.numel()]
        view.copy_(param.detach())
        mask[start : start + param.numel()] = False
        views.append(view.requires_grad_())
        start += param.numel() + 2
    ours = ours_for(name)(views, **FULL_OPTIONS[name])
    theirs = theirs_for(name)(params, **FULL_OPTIONS[name], foreach=False)
    assert_same_run(ours, theirs, lay_out=misaligned)
    assert bool((flat.cpu()[mask] == 7.0).all())


@cases_on_both_backends("dtype", [(torch.float32,), (torch.bfloat16,)], lambda dtype: dtype is torch.float32)
def test_large_tensors(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """More than one program per tensor, whole ones and a rest, aligned and not; each tensor counts one step."""
    shapes = ((4096 * 2 + 33,), (4096,), (64, 65))
    params = make_params(shapes, dtype)
    ours_params = copies(params, device)
    ours_params[2] = torch.nn.Parameter(misaligned(ours_params[2].detach()))
    options = {**FULL_OPTIONS[name], "lr": 0.02}
    ours = ours_for(name)(ours_params, **options, max_norm=1e9)
    theirs = theirs_for(name)(params, **options, foreach=False)
    norms = []

    def look(optimizer: Optimizer, step: int) -> None:
        if optimizer is ours:
            norms.append(
                (float(ours.grad_norm), sum(float(p.grad.double().square().sum()) for p in params) ** 0.5)
            )

    assert_same_run(ours, theirs, steps=3, after_step=look)
    for norm, expected in norms:
        assert norm == pytest.approx(expected, rel=1e-6)


@on_both_backends
def test_only_zero_size_tensors(name: str, device: torch.device) -> None:
    ours = ours_for(name)([torch.nn.Parameter(torch.empty(0, 3, device=device))], **FULL_OPTIONS[name])
    run(ours, [[torch.empty(0, 3)]] * 2)
    if name != "SGD":
        assert ours.state[parameters(ours)[0]]["step"].item() == 2


@on_both_backends
def test_the_version_counter_moves(name: str, device: torch.device) -> None:
    """Backward through a graph recorded before the step must refuse: torch's fused=True lets it pass."""
    ours = ours_for(name)(copies(make_params(((65,),)), device))
    (param,) = parameters(ours)
    loss = (param * param).sum()
    before = param._version
    run(ours, some_gradients(ours, 1))
    assert param._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unaltered_parameters_keep_their_version(name: str) -> None:
    ours = ours_for(name)(make_params(((65,), (7, 9))))
    before = parameters(ours)[1]._version
    set_gradients(ours, [torch.ones(65), None])
    ours.step()
    assert parameters(ours)[1]._version == before


@on_both_backends
def test_bits_are_the_same_from_run_to_run_and_do_not_depend_on_company(
    name: str, device: torch.device
) -> None:
    """A parameter moves alike alone and among others, in whatever order."""
    params = make_params(((1023,), (7, 9), (65,)))
    gradients = some_gradients(theirs_for(name)(params), 4)
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (0, 1, 2)):
        chosen = copies([params[i] for i in order], device)
        run(ours_for(name)(chosen, **FULL_OPTIONS[name]), [[each[i] for i in order] for each in gradients])
        results.append(dict(zip(order, chosen, strict=True)))
    alone = copies(params[:1], device)
    run(ours_for(name)(alone, **FULL_OPTIONS[name]), [each[:1] for each in gradients])
    for index in range(3):
        assert torch.equal(results[0][index], results[1][index])
        assert torch.equal(results[0][index], results[2][index])
    assert torch.equal(results[0][0], alone[0])


# What goes through torch's own loop.


def test_sparse_gradients(name: str) -> None:
    ours, theirs = make_pair(name, shapes=((20, 3), (7,)), lr=0.01)
    dense = [grads[0] * (torch.arange(20) % 4 == 0).unsqueeze(1) for grads in some_gradients(theirs, 10)]
    plain = [torch.ones(7) * step for step in range(10)]
    if name != "SGD":
        texts = []
        for optimizer in (ours, theirs):
            set_gradients(optimizer, [dense[0].to_sparse(), plain[0]])
            before = [param.detach().clone() for param in parameters(optimizer)]
            with pytest.raises(RuntimeError) as caught:
                optimizer.step()
            texts.append(str(caught.value))
            assert all(torch.equal(p, b) for p, b in zip(parameters(optimizer), before, strict=True))
        assert texts[0] == texts[1]
        return
    for grad, other in zip(dense, plain, strict=True):
        for optimizer in (ours, theirs):
            set_gradients(optimizer, [grad.to_sparse(), other])
            optimizer.step()
    for one, other in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(one, other)


def complex_params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.complex(spread((9,), 0.03), spread((9,), 0.03))), *make_params(((65,),))]


def test_complex_parameters(name: str) -> None:
    params = complex_params()
    ours = ours_for(name)(copies(params), **FULL_OPTIONS[name])
    theirs = theirs_for(name)(params, **FULL_OPTIONS[name], foreach=False)
    for _ in range(10):
        grads = [torch.complex(spread((9,), 4.0), spread((9,), 4.0)), spread((65,), 4.0, torch.float32)]
        for optimizer in (ours, theirs):
            set_gradients(optimizer, grads)
            optimizer.step()
    assert torch.equal(parameters(ours)[0], parameters(theirs)[0])  # torch's own loop: the same bits
    torch.testing.assert_close(parameters(ours)[1], parameters(theirs)[1])
    for key, value in theirs.state[parameters(theirs)[0]].items():
        assert torch.equal(ours.state[parameters(ours)[0]][key], value), key


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_clipped(name: str, dtype: torch.dtype) -> None:
    start = torch.complex(spread((9,), 0.03), spread((9,), 0.03)).to(dtype)
    ours = ours_for(name)([start.clone().requires_grad_()], lr=0.01, max_norm=0.5)
    theirs = theirs_for(name)([start.clone().requires_grad_()], lr=0.01, foreach=False)
    for _ in range(10):
        grad = torch.complex(spread((9,), 4.0), spread((9,), 4.0)).to(dtype)
        for optimizer in (ours, theirs):
            parameters(optimizer)[0].grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(parameters(theirs), 0.5, foreach=False)
        ours.step()
        theirs.step()
        assert torch.equal(parameters(ours)[0].grad, grad)
    torch.testing.assert_close(
        parameters(ours)[0], parameters(theirs)[0], rtol=1e-5 if dtype == torch.complex64 else 1e-13, atol=0
    )


def test_differentiable(name: str) -> None:
    """The steps themselves are differentiated: by the gradient and by every rate that may be a tensor."""
    results = []
    grad = spread((5,), 4.0).requires_grad_()
    start = spread((5,), 0.03)
    for cls in (ours_for(name), theirs_for(name)):
        lr, decay, *betas = (
            torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.01, 0.3, 0.8, 0.9)
        )
        options = {} if name == "SGD" else {"betas": tuple(betas)}
        leaf = start.clone().requires_grad_().clone()
        optimizer = cls([start.clone()], lr=lr, weight_decay=decay, differentiable=True, **options)
        optimizer.param_groups[0]["params"] = [leaf]
        for each in (grad, grad.square() - 1):
            leaf.grad = each.clone()
            optimizer.step()
        rates = [lr, decay, *options.get("betas", ())]
        results.append(torch.autograd.grad((leaf * torch.arange(5.0)).sum(), [grad, *rates]))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
        assert int(mine.count_nonzero()) > 0


def test_differentiable_through_the_clip(name: str) -> None:
    """The factor depends on the gradients too."""
    start = spread((5,), 0.03)
    options = {} if name == "SGD" else {"eps": 1.0}  # else the size of the gradients hardly counts

    def updated(grad: Tensor) -> Tensor:
        optimizer = ours_for(name)([start.clone()], lr=1.0, differentiable=True, max_norm=0.5, **options)
        leaf = parameters(optimizer)[0].requires_grad_().clone()
        optimizer.param_groups[0]["params"] = [leaf]
        leaf.grad = grad
        optimizer.step()
        return leaf

    assert torch.autograd.gradcheck(updated, spread((5,), 4.0).requires_grad_())


def test_clipped_complex_without_values() -> None:
    """As torch's loop, which serves them: clip and update ask for no value."""
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
        param.grad = torch.ones_like(param)
        optimizer = ours_for("SGD")([param], lr=0.1, momentum=0.9, max_norm=0.5)
        optimizer.step()
        assert isinstance(optimizer.state[param]["momentum_buffer"], FakeTensor)


GUARDS: list[dict[str, Any]] = [
    {},
    {"max_norm": 0.5},
    {"on_nonfinite": "skip"},
    {"max_norm": 0.5, "on_nonfinite": "raise"},
    {"master_weights": True},
    {"stochastic_rounding": True},
]


@pytest.mark.parametrize("options", GUARDS, ids=str)
@pytest.mark.parametrize("kind", ["fake", "fake outside its mode", "meta"])
def test_tensors_without_values(name: str, kind: str, options: dict[str, Any]) -> None:
    """What tools that estimate memory run: state of the right shapes and dtypes, and no value wanted anywhere."""
    mode = FakeTensorMode()
    device = "meta" if kind == "meta" else "cpu"
    with nullcontext() if kind == "meta" else mode:
        shapes = {torch.bfloat16: (3, 4), torch.float32: (5,)}
        params = [
            torch.nn.Parameter(torch.randn(s, dtype=dtype, device=device)) for dtype, s in shapes.items()
        ]
    with mode if kind == "fake" else nullcontext():
        ours = ours_for(name)(params, **FULL_OPTIONS[name], **options)
        for _ in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            ours.step()
        assert (ours.grad_norm is None) == (not options.keys() & {"max_norm", "on_nonfinite"})
        assert ours.grad_norm is None or type(ours.grad_norm) is type(torch.empty_like(params[0]))
    real = ours_for(name)(
        [torch.nn.Parameter(torch.zeros(p.shape, dtype=p.dtype)) for p in params],
        **FULL_OPTIONS[name],
        **options,
    )
    for param in parameters(real):
        param.grad = torch.ones_like(param)
    real.step()
    for param, other in zip(params, parameters(real), strict=True):
        state, expected = ours.state[param], real.state[other]
        assert state.keys() == expected.keys()
        for key, value in state.items():
            assert isinstance(value, FakeTensor) == (kind != "meta"), key
            assert (value.shape, value.dtype) == (expected[key].shape, expected[key].dtype), key
            assert value.device == param.device


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
@pytest.mark.parametrize("options", GUARDS, ids=str)
def test_make_fx_traces_the_step(name: str, options: dict[str, Any], tracing_mode: str) -> None:
    """The graph does what the step does, by the same operators that torch.compile captures."""
    start = make_params(((3, 4), (5,)), torch.bfloat16)
    grads = [torch.randn_like(param) for param in start]
    ours, plain = (ours_for(name)(copies(start), **FULL_OPTIONS[name], **options) for _ in range(2))
    for optimizer in (ours, plain):
        run(optimizer, [grads])  # the state is there before the graph, which takes it for constant tensors
    before = [param.detach().clone() for param in parameters(ours)]

    def step(x: Tensor) -> Tensor:
        ours.step()
        return x + 1

    graph = make_fx(step, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(torch.zeros(()))
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("optimizer_step" in target for target in targets) == 1, targets
    if tracing_mode == "fake":
        assert all(torch.equal(p, b) for p, b in zip(parameters(ours), before, strict=True))
    else:
        plain.step()
    graph(torch.zeros(()))
    plain.step()
    assert_equal_bits(ours, plain)
    ours.step()  # nothing of the trace is left behind
    plain.step()
    assert_equal_bits(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_a_subclass_keeps_in_other_tensors(name: str, dtype: torch.dtype) -> None:
    """Quantized training weights, for one: only torch's own operations know how to write them. They have no master."""
    start = [spread((5, 3), 0.03, dtype), spread((7,), 0.03, torch.float32)]
    options = {**FULL_OPTIONS[name], "lr": 0.01}

    def params() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(TwoTensor(start[0].clone(), 2 * start[0])), *copies(start[1:])]

    theirs = theirs_for(name)(params(), foreach=False, **options)
    ours = ours_for(name)(params(), max_norm=0.7, master_weights=True, **options)
    for grads in some_gradients(theirs, 5):
        set_gradients(theirs, grads)
        set_gradients(ours, grads)
        torch.nn.utils.clip_grad_norm_(parameters(theirs), 0.7, foreach=False)
        ours.step()
        theirs.step()
    double, plain = parameters(ours)
    other_double, other_plain = parameters(theirs)
    for mine, other in ((double.a, other_double.a), (double.b, other_double.b), (plain, other_plain)):
        torch.testing.assert_close(mine, other)
    assert not torch.equal(double.b, 2 * start[0])
    state, expected = ours.state[double], theirs.state[other_double]
    assert {key: type(value) for key, value in state.items()} == {
        key: type(value) for key, value in expected.items()
    }


def test_gradients_that_a_subclass_keeps_in_other_tensors(name: str) -> None:
    """Beside ordinary parameters: torch's own operations again, whatever the subclass makes of them."""
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    for each in some_gradients(theirs, 3):
        for optimizer in (ours, theirs):
            for param, grad in zip(parameters(optimizer), each, strict=True):
                param.grad = TwoTensor(grad.clone(), 3 * grad)
            optimizer.step()
    for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("what", ["complex", "sparse", "integer"])
def test_fused_true_refuses_what_torch_s_refuses(name: str, what: str) -> None:
    texts = []
    for cls in (ours_for(name), theirs_for(name)):
        if what == "complex":
            params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))]
            grads = [torch.ones(3, dtype=torch.complex64)]
        elif what == "integer":
            params = [torch.ones(3, dtype=torch.int64)]
            grads = [torch.ones(3, dtype=torch.int64)]
        else:
            params, grads = make_params(((5, 3),)), [torch.ones(5, 3).to_sparse()]
        optimizer = cls(params, lr=1, fused=True)  # construction passes, as torch's does
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        with pytest.raises(RuntimeError) as caught:
            optimizer.step()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_fused_true_refuses_parameters_on_the_meta_device(name: str) -> None:
    texts = []
    for cls in (ours_for(name), theirs_for(name)):
        optimizer = cls(torch.nn.Linear(2, 3, device="meta").parameters(), lr=0.1, fused=True)
        for param in parameters(optimizer):
            param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match="requires all the params to be floating point") as caught:
            optimizer.step()
        assert not any(optimizer.state.values()), "a refused step leaves no state behind"
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_a_group_that_is_listed_twice_is_saved_twice(name: str) -> None:
    states = []
    for optimizer in make_pair(name, shapes=SMALL):
        run(optimizer, some_gradients(optimizer, 1))
        optimizer.param_groups.extend(optimizer.param_groups)
        states.append(optimizer.state_dict())
        assert states[-1]["param_groups"][0] == states[-1]["param_groups"][1]
    assert states[0]["state"].keys() == states[1]["state"].keys()


@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}], ids=str
)
def test_foreach_and_fused_select_nothing(name: str, flags: dict[str, bool]) -> None:
    results = []
    gradients = None
    for given in ({}, flags):
        torch.manual_seed(1)
        ours = ours_for(name)(make_params(SMALL), **FULL_OPTIONS[name], **given)
        gradients = gradients or some_gradients(ours, 4)
        run(ours, gradients)
        results.append(ours)
        for key, value in given.items():
            assert ours.param_groups[0][key] is value
    assert_equal_bits(*results)


# Our own options.


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_norm": -1.0}, "max_norm"),
        ({"max_norm": float("nan")}, "max_norm"),
        ({"on_nonfinite": "explode"}, "explode"),
    ],
    ids=str,
)
def test_our_options_are_checked(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ours_for(name)(make_params(SMALL), **options)


def test_our_options_are_keyword_only_and_stay_out_of_the_groups(name: str) -> None:
    ours = ours_for(name)(make_params(SMALL), max_norm=1.0, on_nonfinite="skip")
    theirs = theirs_for(name)(make_params(SMALL))
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
    assert ours.defaults.keys() == theirs.defaults.keys()
    with pytest.raises(TypeError):
        ours_for(name)(make_params(SMALL), *([0.1] * 8))


def test_annotations_can_be_read(name: str) -> None:
    """As command lines that are built from signatures do."""
    assert "shared" in get_type_hints(ours_for(name).__init__)


def test_the_signature_begins_as_torch_s(name: str) -> None:
    mine = list(inspect.signature(ours_for(name)).parameters.values())
    other = list(inspect.signature(theirs_for(name)).parameters.values())
    known = {parameter.name: parameter for parameter in mine}
    for parameter in other:
        assert known[parameter.name].default == parameter.default, parameter.name
        assert known[parameter.name].kind == parameter.kind, parameter.name
    positional = [p.name for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [p.name for p in other if p.kind is p.POSITIONAL_OR_KEYWORD]


def test_under_torch_s_own_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.optim.AdamW = FusedAdamW``: the way to bring it into a training script that cannot be changed."""
    expected = theirs_for(name)(make_params(SMALL), lr=0.01).defaults
    drop_ins = {each: ours_for(each) for each in NAMES}
    for each, cls in drop_ins.items():
        monkeypatch.setattr(torch.optim, each, cls)
    ours = getattr(torch.optim, name)(make_params(SMALL), lr=0.01)
    assert type(ours) is drop_ins[name]
    assert ours.defaults == expected
    run(copy.deepcopy(ours), some_gradients(ours, 2))


def test_repr_shows_our_options_after_torch_s(name: str) -> None:
    shown = repr(ours_for(name)(make_params(SMALL), max_norm=1.5, on_nonfinite="skip"))
    assert shown.startswith(repr(theirs_for(name)(make_params(SMALL)))[:-1].replace(name, f"Fused{name}"))
    assert "    max_norm: 1.5\n    on_nonfinite: skip\n" in shown
    assert shown.endswith("\n)")


def test_no_gradient_is_kept_alive_by_the_optimizer(name: str) -> None:
    ours = ours_for(name)(make_params(SMALL), max_norm=1.0)
    run(ours, some_gradients(ours, 2))
    watched = [weakref.ref(param.grad) for param in parameters(ours)]
    ours.zero_grad()
    assert [ref() for ref in watched] == [None] * len(watched)


@pytest.mark.parametrize("ours", [FusedSGD, FusedAdam, FusedAdamW])
def test_help_shows_every_argument(ours: type[torch.optim.Optimizer]) -> None:
    """The shared options stand in one place, and in each class's signature; a subclass has its own."""

    class Mine(ours):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, speed: float) -> None:
            super().__init__(params, lr=speed)

    shown = inspect.signature(ours).parameters
    assert list(shown)[:2] == ["params", "lr"]
    assert shown["max_norm"].default is None
    assert {"on_nonfinite", "master_weights", "stochastic_rounding", "seed", "norm_group"} <= set(shown)
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in shown.values())
    assert list(inspect.signature(Mine).parameters) == ["params", "speed"]


def test_an_unknown_argument_is_refused_as_python_does(name: str) -> None:
    """The message names the constructor that the user called, as for torch's class."""
    said = []
    for cls in (theirs_for(name), ours_for(name)):
        with pytest.raises(TypeError) as raised:
            cls(make_params(SMALL), foo=1)
        said.append(str(raised.value))
    assert said[1] == said[0].replace(name, f"Fused{name}")


def test_a_copy_shares_the_process_group_and_a_pickle_names_public_classes_alone(name: str) -> None:
    class Group:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("a process group cannot be copied")

    group = Group()
    ours = ours_for(name)(make_params(SMALL), norm_group=group)
    again = copy.deepcopy([ours, ours])
    assert again[0] is again[1] is not ours
    assert again[0].norm_group is group
    ours.norm_group = None
    found = set(re.findall(rb"gradkernels[\w.]*", pickle.dumps(ours, protocol=2)))
    assert found == {type(ours).__module__.encode()}
