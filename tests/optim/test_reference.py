"""The NumPy optimizers, held against torch.optim in float64, finite differences and hand calculation."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels.reference import adam, sgd

from ..helpers import assert_matches, finite_differences

STEPS = 12

SGD_OPTIONS = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    for momentum, dampening, nesterov, weight_decay, maximize in itertools.product(
        (0.0, 0.9), (0.0, 0.5), (False, True), (0.0, 0.1), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]
ADAM_OPTIONS = [
    {"betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize}
    for betas, eps, weight_decay, amsgrad, maximize in itertools.product(
        ((0.9, 0.999), (0.5, 0.6)), (1e-8, 0.1), (0.0, 0.1), (False, True), (False, True)
    )
]
CASES = [
    *((sgd.step, {}, torch.optim.SGD, options) for options in SGD_OPTIONS),
    *((adam.step, {}, torch.optim.Adam, options) for options in ADAM_OPTIONS),
    *((adam.step, {"decoupled_weight_decay": True}, torch.optim.AdamW, options) for options in ADAM_OPTIONS),
]


def case_id(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(f"{name}={setting}" for name, setting in value.items()) or "default"
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("step", "extra", "theirs", "options"), CASES, ids=case_id)
def test_equals_torch_in_float64_parameter_and_state_under_a_schedule(
    step: Any, extra: dict[str, Any], theirs: Any, options: dict[str, Any]
) -> None:
    param = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    optimizer = theirs([param], **options, foreach=False)
    ours, state = param.detach().numpy().copy(), None
    for index in range(STEPS):
        lr = 0.1 / (1 + index)
        # Gradients that shrink: the largest second moment then differs from the last one.
        param.grad = torch.randn_like(param) * (3.0 if index == 2 else 0.5)
        optimizer.param_groups[0]["lr"] = lr
        ours, state = step(ours, param.grad.numpy(), state, lr=lr, **options, **extra)
        optimizer.step()
        expected = {"param": param, **optimizer.state[param]}
        assert expected.keys() == {"param", *state}
        for name, value in {"param": ours, **state}.items():
            assert_matches(
                expected[name].double(), torch.as_tensor(value), value, f"{name} at step {index + 1}"
            )


def test_arguments_are_never_written() -> None:
    for step, options in ((sgd.step, {"momentum": 0.9, "weight_decay": 0.1}), (adam.step, {"amsgrad": True})):
        param, grad = np.array([1.0, 2.0]), np.array([0.5, -1.0])
        _, state = step(param, grad, None, maximize=True, **options)
        before = {name: value.copy() for name, value in state.items()}
        new_param, new_state = step(param, grad, state, maximize=True, **options)
        for name, value in before.items():
            np.testing.assert_array_equal(state[name], value)
            assert not np.shares_memory(new_state[name], state[name])
        np.testing.assert_array_equal(param, [1.0, 2.0])
        np.testing.assert_array_equal(grad, [0.5, -1.0])
        assert not np.shares_memory(new_param, param)
        assert not any(np.shares_memory(value, grad) for value in new_state.values())


@pytest.mark.parametrize("step", [sgd.step, adam.step], ids=["sgd", "adam"])
@pytest.mark.parametrize("maximize", [False, True])
def test_coupled_weight_decay_is_the_gradient_of_the_penalty(step: Any, maximize: bool) -> None:
    """One step on f with weight decay is one on (+-f + decay/2 p^2), its gradient taken by differences."""
    decay, param = 0.3, np.array([0.7, -1.2, 2.0])

    def loss(p: np.ndarray) -> float:
        return float(np.sum(p**3 - np.sin(p)))

    def penalised(p: np.ndarray) -> float:
        return (-loss(p) if maximize else loss(p)) + decay / 2 * float(np.sum(p**2))

    options = {"lr": 0.1, "eps": 0.5} if step is adam.step else {"lr": 0.1}  # eps 0.5: the size of g counts
    ours, _ = step(param, 3 * param**2 - np.cos(param), weight_decay=decay, maximize=maximize, **options)
    numeric, _ = step(param, finite_differences(penalised, param, eps=1e-5), **options)
    np.testing.assert_allclose(ours, numeric, rtol=0, atol=1e-9)  # a centred difference: about 1e-10


def test_sgd_momentum_by_hand() -> None:
    """momentum 1/2, dampening 1/4, lr 1, gradient 1: buffers 1, 1/2 + 3/4, 5/8 + 3/4; all exact in binary."""
    param, state = np.array(0.0), None
    for buffer, moved in ((1.0, -1.0), (1.25, -2.25), (1.375, -3.625)):
        param, state = sgd.step(param, 1.0, state, lr=1.0, momentum=0.5, dampening=0.25)
        assert (float(state["momentum_buffer"]), float(param)) == (buffer, moved)


def test_sgd_without_momentum_leaves_the_state_alone() -> None:
    state = {"momentum_buffer": np.array(2.0)}
    _, new_state = sgd.step(1.0, 1.0, state)
    assert new_state == state
    assert sgd.step(1.0, 1.0)[1] == {}


def test_adam_by_hand() -> None:
    """beta1 1/2, beta2 3/4, lr 1, eps 1, gradients 2 then -2 from p = 0.

    Step 1: m = 1, v = 1; corrected 2 and 4; p = -2 / (2 + 1).
    Step 2: m = 1/2 - 1 = -1/2, v = 3/4 + 1 = 7/4; corrected -2/3 and 4; p = -2/3 + (2/3) / (2 + 1).
    """
    options = {"lr": 1.0, "betas": (0.5, 0.75), "eps": 1.0}
    param, state = adam.step(0.0, 2.0, None, **options)
    assert (float(state["step"]), float(state["exp_avg"]), float(state["exp_avg_sq"])) == (1, 1, 1)
    assert float(param) == pytest.approx(-2 / 3, abs=1e-15)
    param, state = adam.step(param, -2.0, state, **options)
    assert (float(state["step"]), float(state["exp_avg"]), float(state["exp_avg_sq"])) == (2, -0.5, 1.75)
    assert float(param) == pytest.approx(-2 / 3 + 2 / 9, abs=1e-15)
