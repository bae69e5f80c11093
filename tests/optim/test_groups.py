"""Parameter groups: options of their own, options that change between steps, gradients that come and go."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .optimizers import (
    FULL_OPTIONS,
    SMALL,
    Feed,
    assert_same_run,
    copies,
    make_pair,
    make_params,
    on_both_backends,
    ours_for,
    parameters,
    theirs_for,
)


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


@on_both_backends
def test_a_parameter_that_takes_another_s_place(name: str, device: torch.device) -> None:
    """By hand in the group's list: its shape, gradient and state are those of the one before."""
    ours, theirs = make_pair(name, device, shapes=((65,), (7, 9)), lr=0.01)
    left = []

    def replace(optimizer: Optimizer, step: int) -> None:
        if step == 3:
            params = optimizer.param_groups[0]["params"]
            left.append((params[1], params[1].detach().clone()))
            params[1] = torch.nn.Parameter(params[1].detach().clone())

    assert_same_run(ours, theirs, after_step=replace)
    assert all(torch.equal(param, value) for param, value in left)


def test_a_parameter_that_goes_over_to_the_group_before(name: str) -> None:
    """All parameters stand in the same order as before."""
    params = make_params(SMALL)
    ours, theirs = (
        make([{"params": given[:1], "lr": 0.1}, {"params": given[1:], "lr": 0.001}], **others)
        for make, given, others in (
            (ours_for(name), copies(params), {}),
            (theirs_for(name), params, {"foreach": False}),
        )
    )

    def go_over(optimizer: Optimizer, step: int) -> None:
        if step == 2:
            first, second = optimizer.param_groups
            first["params"].append(second["params"].pop(0))

    assert_same_run(ours, theirs, steps=5, after_step=go_over)


def test_a_first_step_without_any_gradient_makes_no_state(name: str) -> None:
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
