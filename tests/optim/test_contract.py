"""What torch's optimizers promise besides numbers: checkpoints, copies, hooks.

Everything runs on the fallback but where tensors' values depend on the way they are updated. Over 500 lines, since it
is a list of promises.
"""

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from gradkernels import use_backend
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .optimizers import (
    COPIES,
    FULL_OPTIONS,
    NAMES,
    SMALL,
    STEPS,
    Feed,
    ReferenceRun,
    assert_close,
    assert_equal_bits,
    assert_same_bits,
    assert_same_run,
    assert_same_state,
    cases_on_both_backends,
    copies,
    failure,
    make_pair,
    make_params,
    on_both_backends,
    ours_for,
    parameters,
    run,
    set_gradients,
    set_values,
    settings,
    some_gradients,
    step_by,
    theirs_for,
    through_a_file,
    values_of,
)

# Checkpoints.


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


@pytest.mark.parametrize("low", ["", "master_weights", "stochastic_rounding"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(name: str, low: str) -> None:
    dtype, options = (torch.bfloat16, {low: True}) if low else (torch.float32, {})
    ours, _ = make_pair(name, dtype=dtype, shapes=SMALL, shared=options, **FULL_OPTIONS[name])
    gradients = some_gradients(ours, STEPS)
    run(ours, gradients[:5])
    resumed = ours_for(name)(copies(parameters(ours)), **options)
    resumed.load_state_dict(through_a_file(ours.state_dict()))
    run(ours, gradients[5:])
    run(resumed, gradients[5:])
    assert_equal_bits(ours, resumed)


def test_loading_into_a_running_optimizer_goes_back(name: str) -> None:
    """State tensors are replaced under a plan that is already warm."""
    ours, _ = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    gradients = some_gradients(ours, STEPS)
    run(ours, gradients[:3])
    values, state = values_of(ours), copy.deepcopy(ours.state_dict())
    run(ours, gradients[3:])
    first = values_of(ours)
    ours.load_state_dict(state)
    set_values(ours, values)
    run(ours, gradients[3:])
    assert_same_bits(values_of(ours), first)


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


@on_both_backends
def test_a_step_that_is_a_tensor_of_integers_loads(name: str, device: torch.device) -> None:
    """As other tools write it, and torch's loop takes it; the kernels read torch's own dtype."""
    params = copies(make_params(SMALL), device)
    ours = ours_for(name)(params, **FULL_OPTIONS[name])
    run(ours, some_gradients(ours, 2))
    saved = copy.deepcopy(ours.state_dict())
    again = [ours_for(name)(copies(params, device), **FULL_OPTIONS[name]) for _ in range(2)]
    again[0].load_state_dict(copy.deepcopy(saved))
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].long()
    again[1].load_state_dict(saved)
    gradients = some_gradients(ours, 2)
    for optimizer in again:
        run(optimizer, gradients)
    assert_equal_bits(*again)


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
        before = values_of(optimizer)
        state = copy.deepcopy(optimizer.state_dict())
        for key, value in state["state"][0].items():
            state["state"][0][key] = value[:3] if isinstance(value, Tensor) and value.ndim else value
        optimizer.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"65"):
            run(optimizer, some_gradients(optimizer, 1))
        if optimizer is ours:  # torch has applied the weight decay by then
            assert_same_bits(values_of(ours), before)


def test_refuses_state_on_another_device_than_its_parameter(name: str) -> None:
    """A model that was moved after a step leaves its state behind: a kernel would read an address of elsewhere."""
    ours = ours_for(name)(make_params(SMALL), **FULL_OPTIONS[name])
    run(ours, some_gradients(ours, 1))
    param = parameters(ours)[0]
    key = "momentum_buffer" if name == "SGD" else "exp_avg_sq"
    ours.state[param][key] = ours.state[param][key].to("meta")
    before = [p.detach().clone() for p in parameters(ours)]
    with pytest.raises(RuntimeError, match=r"parameter 0 is on cpu, but .* on meta"):
        ours.step()
    assert_same_bits(values_of(ours), before)


def test_a_step_that_was_made_on_the_cpu_follows_its_parameter() -> None:
    """Torch's own lies there, whatever the parameter's device: a hook that makes the state goes by torch."""
    param = torch.nn.Parameter(torch.empty(5, device="meta"))
    param.grad = torch.empty(5, device="meta")
    ours = ours_for("Adam")([param])
    ours.state[param].update(
        step=torch.tensor(0.0), exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param)
    )
    ours.step()
    assert ours.state[param]["step"].device == param.device


def test_state_of_the_whole_optimizer_may_lie_beside_that_of_parameters(name: str) -> None:
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    ours.state["epoch"] = 3  # type: ignore[index]
    assert_same_run(ours, theirs)
    assert ours.state_dict()["state"]["epoch"] == 3


def test_refuses_a_checkpoint_of_other_groups_as_torch_does(name: str) -> None:
    ours, theirs = make_pair(name, shapes=SMALL)
    state = ours.state_dict()
    state["param_groups"][0]["params"] = [0]
    refusals = [
        failure(lambda each=each: each.load_state_dict(copy.deepcopy(state))) for each in (ours, theirs)
    ]
    assert refusals[0] == refusals[1]
    assert refusals[0][0] is ValueError


# Copies.


@pytest.mark.parametrize("clone", COPIES)
@pytest.mark.parametrize("warm", [0, 3])
def test_copies_go_on_alone_with_everything(name: str, clone: str, warm: int) -> None:
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
    twin = COPIES[clone](ours)
    assert twin.max_norm == 2.0
    assert twin.on_nonfinite == "skip"
    assert twin.seed == 5
    untouched = values_of(twin)
    run(ours, gradients[warm:])
    assert_same_bits(values_of(twin), untouched)
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


@pytest.mark.unwatched  # as tests/ops/test_corners.py says
@pytest.mark.parametrize(
    ("backend", "dtype", "options"),
    [
        ("fallback", torch.bfloat16, {"max_norm": 0.3}),
        ("fallback", torch.float32, {"stacked": True}),
        ("reference", torch.float32, {"stacked": True, "max_norm": 0.3}),
    ],
    ids=str,
)
def test_another_default_device_and_dtype(
    name: str, backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    usual = ours_for(name)(make_params(((5, 3), (5,)), dtype), **FULL_OPTIONS[name], **options)
    other = copy.deepcopy(usual)
    gradients = some_gradients(usual, 3)
    before = torch.get_default_dtype()
    with use_backend(backend):
        run(usual, gradients)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                run(other, gradients)
        finally:
            torch.set_default_dtype(before)
    for one, two in zip(parameters(usual), parameters(other), strict=True):
        assert torch.equal(one, two)
        assert two.device.type == "cpu"


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
    set_values(ours, parameters(theirs))
    for step, each in enumerate(some_gradients(theirs, 4)):
        for optimizer in (ours, theirs):
            set_gradients(optimizer, each)
            for state in theirs.state.values():
                for key in state.keys() - {"step"}:
                    state[key].copy_(state[key].bfloat16())
            optimizer.step()
        if step == 0:
            handle.remove()
        assert_close(ours, theirs)
        for state in ours.state.values():
            for key, value in state.items():
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

    before = values_of(ours)
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
    ours = ours_for(name)(copies(make_params(((7, 3), (65,))), device), **FULL_OPTIONS[name], **options)
    plain = copy.deepcopy(ours)
    for step, each in enumerate(some_gradients(ours, 6)):
        run(plain, [each])
        with torch.inference_mode(step not in (2, 3)):
            run(ours, [each])
    assert_equal_bits(ours, plain)
    if options:
        assert torch.equal(ours.grad_norm, plain.grad_norm)


@pytest.mark.parametrize("own_step", [None, "plain", "wrapped"])
def test_hooks_run_once_each(name: str, own_step: str | None) -> None:
    """Also after a plain torch optimizer exists, and in a subclass with its own step."""
    theirs_for(name)(make_params(SMALL))  # torch wraps `step` per class: super().step() would run hooks twice
    cls = ours_for(name)

    class Own(cls):  # type: ignore[misc,valid-type]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

        if own_step == "wrapped":  # torch then takes it for a step that runs the hooks by itself
            step = functools.wraps(cls.step)(step)

    ours = (Own if own_step else cls)(make_params(SMALL), lr=1.0)
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
            step_by(optimizer, each)
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


def test_it_is_a_torch_optimizer(name: str) -> None:
    ours = ours_for(name)(make_params(SMALL))
    assert isinstance(ours, theirs_for(name))
    theirs = theirs_for(name)(make_params(SMALL))
    assert ours.defaults == theirs.defaults
    assert list(ours.defaults) == list(theirs.defaults)
