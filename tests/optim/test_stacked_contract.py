"""``stacked=True``: what is refused, the guard, copies and checkpoints, schedulers, GradScaler.

Over 500 lines, since it follows the contract clause by clause.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD, backends
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import lr_scheduler

from ..helpers import EVERY_BACKEND
from .optimizers import (
    COPIES,
    NAMES,
    Feed,
    assert_equal_bits,
    copies,
    make_params,
    ours_for,
    parameters,
    set_gradients,
    set_values,
    step_by,
    step_by_ones,
    theirs_for,
    transposed,
)
from .stacks import B, SeparateRuns, advance, assert_same, make

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "Adam": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.1, "weight_decay": 0.1},
}
VECTOR = torch.linspace(0.1, 0.5, B)
TWO = ((B, 3), (B,))

both_backends = pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(n, b, marks=() if b == "fallback" or n == "AdamW" else pytest.mark.full)
        for b in ("fallback", "triton")
        for n in NAMES
    ],
    indirect=["backend"],
)


def stacks(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def snapshot(optimizer: Any) -> list[Tensor]:
    """Copies of all parameters and states."""
    return [
        tensor.detach().clone()
        for param in parameters(optimizer)
        for tensor in (param, *optimizer.state.get(param, {}).values())
    ]


def assert_equal(first: list[Tensor], second: list[Tensor], models: Any = slice(None)) -> None:
    """The same bits, of all models or of some."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one[models], other[models], rtol=0, atol=0, equal_nan=True)


# What is refused.


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (lambda: stacks((B, 2), ()), r"parameter 1 of group 0, shape \(\)"),
        (lambda: stacks((B, 2), (B + 1, 3)), r"parameter 1 of group 0, shape \(6, 3\)"),
        (lambda: stacks((B, 2), dtype=torch.complex64), r"complex.*parameter 0 of group 0, shape \(5, 2\)"),
        (lambda: [("weight", stacks((B, 2))[0]), ("bias", stacks((3,))[0])], r"'bias', shape \(3,\)"),
    ],
    ids=["0-d", "unequal", "complex", "named"],
)
def test_parameters_that_are_no_stack_are_refused(
    name: str, params: Callable[[], Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        ours_for(name)(params(), stacked=True)
    if expected.endswith(r"\(5, 2\)"):
        return
    first, added = params()
    ours = ours_for(name)([first], stacked=True)
    with pytest.raises(
        ValueError, match=expected.replace("parameter 1 of group 0", "parameter 0 of group 1")
    ):
        ours.add_param_group({"params": [added]})
    assert len(ours.param_groups) == 1
    step_by(ours, [torch.ones(B, 2)])


def test_rates_of_models_beside_one_momentum() -> None:
    """The rates of a group are checked together: nesterov asks for the momentum that all models share."""
    (param,) = stacks((B, 2))
    ours = FusedSGD([param], lr=VECTOR, momentum=0.9, nesterov=True, stacked=True)
    step_by(ours, [torch.ones(B, 2)])
    assert torch.allclose(param, 1 - 1.9 * VECTOR[:, None])


def test_differentiable_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"differentiable=True: parameter 0 of group 0, shape \(5, 2\)"):
        ours_for(name)(stacks((B, 2)), stacked=True, differentiable=True)


def test_sparse_gradients_are_refused_at_the_step(name: str) -> None:
    ours = ours_for(name)(stacks((B,), (B, 2)), stacked=True)
    ours.param_groups[0]["params"][1].grad = torch.ones(B, 2).to_sparse()
    with pytest.raises(ValueError, match=r"sparse gradients: parameter 1 of group 0, shape \(5, 2\)"):
        ours.step()


@pytest.mark.parametrize("kind", ["both", "parameter", "gradient"])
def test_dtensors_are_refused_at_the_step(name: str, kind: str, mesh: DeviceMesh) -> None:
    first, second = stacks((B,), (B, 2))
    grad = torch.ones(B, 2)
    if kind != "gradient":
        second = nn.Parameter(distribute_tensor(second.detach(), mesh, [Shard(0)]))
    ours = ours_for(name)([first, second], stacked=True)
    first.grad = torch.ones(B)
    second.grad = grad if kind == "parameter" else distribute_tensor(grad, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"serve DTensors: parameter 1 of group 0, shape \(5, 2\)"):
        ours.step()
    assert torch.equal(first, torch.ones(B)), "nothing has moved"


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (FusedSGD, {"lr": torch.tensor([0.1, -0.5, 1, 1, 1])}, "Invalid learning rate: -0.5"),
    (FusedSGD, {"momentum": torch.tensor([0.1, 0.5, 1, 1, -1.0])}, "Invalid momentum value: -1.0"),
    (FusedSGD, {"weight_decay": torch.tensor([-2.0, 0, 0, 0, 0])}, "Invalid weight_decay value: -2.0"),
    (
        FusedSGD,
        {"momentum": torch.tensor([0.5, 0.0, 1, 1, 1]), "nesterov": True},
        "Nesterov momentum requires",
    ),
    (FusedAdam, {"lr": torch.tensor([0.1, 0.5, 1, 1, math.nan])}, "Invalid learning rate: nan"),
    (
        FusedAdam,
        {"betas": (torch.tensor([0.0, 1.0, 0, 0, 0]), 0.9)},
        "Invalid beta parameter at index 0: 1.0",
    ),
    (
        FusedAdam,
        {"betas": (0.9, torch.tensor([0.5, -0.5, 0, 0, 0]))},
        "Invalid beta parameter at index 1: -0.5",
    ),
    (FusedAdamW, {"weight_decay": torch.tensor([0.0, 0, 0, 0, -1])}, "Invalid weight_decay value: -1.0"),
    (FusedAdam, {"lr": torch.ones(B + 1)}, r"lr has shape \(6,\); expected a number or \(5,\)"),
    (FusedAdam, {"betas": (torch.ones(2) / 2, 0.9)}, r"betas\[0\] has shape \(2,\)"),
    (FusedSGD, {"momentum": torch.ones(B, 1)}, r"momentum has shape \(5, 1\)"),
    (FusedSGD, {"lr_scale": torch.ones(B + 1)}, r"lr_scale has shape \(6,\)"),
]


@pytest.mark.parametrize(("cls", "options", "expected"), WRONG)
def test_options_are_checked_element_by_element(cls: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        cls(stacks((B, 2)), stacked=True, **options)
    if "lr_scale" in options:
        return
    ours = cls(stacks((B, 2)), lr=VECTOR, stacked=True)
    with pytest.raises(ValueError, match=expected):
        ours.add_param_group({"params": stacks((B, 3)), **options})
    assert len(ours.param_groups) == 1
    set_gradients(ours, [torch.ones(B, 2)])
    ours.param_groups[0]["lr"] = 0.1  # noted as one per model; of the refused group nothing is noted
    with pytest.raises(ValueError, match="lr had one value for each model"):
        ours.step()
    ours.param_groups[0]["lr"] = VECTOR
    ours.step()
    assert bool((parameters(ours)[0] != 1).all())


@pytest.mark.parametrize("option", ["lr", "weight_decay", "lr_scale", "active", "momentum", "betas"])
def test_options_on_another_device_are_refused(option: str) -> None:
    cls: Any = FusedSGD if option == "momentum" else FusedAdam
    elsewhere = torch.full((B,), 0.5, device="meta")
    value: Any = {"betas": (0.9, elsewhere), "active": elsewhere.bool()}.get(option, elsewhere)
    with pytest.raises(RuntimeError, match="is on meta, the parameters on cpu"):  # noqa: PT012
        if option == "active":
            cls(stacks((B, 2)), stacked=True).active = value
        else:
            cls(stacks((B, 2)), stacked=True, **{option: value})


def test_parameters_on_two_devices_are_refused(name: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"parameter 1 of group 0, shape \(5,\) is on meta, the first .* cpu"
    ):
        ours_for(name)([*stacks((B, 2)), nn.Parameter(torch.ones(B, device="meta"))], stacked=True)


def test_what_counts_models_needs_stacked(name: str) -> None:
    with pytest.raises(ValueError, match="lr_scale is for stacked=True"):
        ours_for(name)(stacks((B, 2)), lr_scale=torch.ones(B))
    ours = ours_for(name)(stacks((B, 2)))
    with pytest.raises(ValueError, match="active is for stacked=True"):
        ours.active = torch.ones(B, dtype=torch.bool)
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        ours_for(name)(stacks((B, 2)), lr=torch.ones(B))


def test_models_agree_on_a_norm_with_no_other_rank(name: str) -> None:
    with pytest.raises(ValueError, match="norm_group is not for stacked=True"):
        ours_for(name)(stacks((B, 2)), stacked=True, max_norm=1.0, norm_group=object())


def test_active_is_none_or_a_bool_for_each_model(name: str) -> None:
    ours = ours_for(name)(stacks((B, 2)), stacked=True)
    assert ours.active is None
    with pytest.raises(TypeError, match=r"bool tensor, found torch\.float32"):
        ours.active = torch.ones(B)
    with pytest.raises(TypeError, match="bool tensor, found list"):
        ours.active = [True] * B
    with pytest.raises(ValueError, match=r"active has shape \(3,\)"):
        ours.active = torch.ones(3, dtype=torch.bool)


def test_a_state_of_other_models_is_refused(name: str) -> None:
    saved = make(name, shapes=TWO, **OPTIONS[name])[0]
    step_by(saved, [torch.ones(shape) for shape in TWO])
    state = saved.state_dict()
    for values in state["state"].values():
        values["step"] = torch.ones(B + 2)
    other = ours_for(name)(stacks(*TWO), stacked=True, **OPTIONS[name])
    other.load_state_dict(state)
    set_gradients(other, [torch.ones(shape) for shape in TWO])
    with pytest.raises(RuntimeError, match=r"step of parameter 0 has shape \(7,\); expected shape \(5,\)"):
        other.step()


# The guard.


@both_backends
@pytest.mark.parametrize("options", [{"max_norm": 2.0}, {"on_nonfinite": "skip"}], ids=str)
def test_each_model_is_guarded_alone(name: str, options: dict[str, Any], device: torch.device) -> None:
    """A clip by each model's own norm; one model's non-finite gradient skips that model alone."""
    ours, runs, feed = make(name, device, shapes=TWO, shared=options, **OPTIONS[name])
    skipped = [0] * B
    for step in range(1, 11):
        gradients = [
            grad * torch.linspace(0.01, 2.0, B).reshape(B, *[1] * (grad.dim() - 1)) for grad in feed(step)
        ]
        bad = {step % B, (2 * step) % B} if "on_nonfinite" in options and step < 8 else set()
        active = [b != step % 3 for b in range(B)]
        for b in bad:
            gradients[b % 2][b] = (math.nan, math.inf, -math.inf)[step % 3]
            skipped[b] += active[b]
        set_gradients(ours, gradients)
        ours.active = torch.tensor(active, device=device)
        norms = runs.step(gradients, [active[b] and b not in bad for b in range(B)], options.get("max_norm"))
        before = snapshot(ours)
        ours.step()
        assert_same(ours, runs, f"at step {step}")
        if step > 1:
            assert_equal(before, snapshot(ours), [b for b in range(B) if not active[b] or b in bad])
        assert ours.grad_norm.shape == (B,)
        for b, norm in enumerate(ours.grad_norm.tolist()):
            if not active[b]:
                assert math.isnan(norm)
            elif b in bad:
                assert not math.isfinite(norm)
            else:
                assert norm == pytest.approx(norms[b], rel=1e-6)
        assert ours.steps_skipped.tolist() == skipped
        assert ours.steps_skipped.dtype == torch.int64


@both_backends
def test_ignored_non_finite_gradients_harm_their_own_model_alone(name: str, device: torch.device) -> None:
    ours, runs, feed = make(name, device, shapes=TWO, shared={"max_norm": 1.0}, **OPTIONS[name])
    gradients = feed(1)
    gradients[0][2, 1] = math.nan
    set_gradients(ours, gradients)
    runs.step(gradients, None, 1.0)
    ours.step()
    for index, param in enumerate(parameters(ours)):
        finite = param.detach().cpu().isfinite().reshape(B, -1).all(1)
        theirs = runs.values(index, "param")[0].isfinite().reshape(B, -1).all(1)
        assert finite.tolist() == theirs.tolist() == [True, True, False, True, True]


@both_backends
def test_raise_names_the_models_and_writes_nothing(name: str, device: torch.device) -> None:
    ours, _, feed = make(name, device, shapes=TWO, shared={"on_nonfinite": "raise"}, **OPTIONS[name])
    step_by(ours, feed(1))
    before = snapshot(ours)
    gradients = feed(2)
    gradients[1][1] = math.inf
    gradients[0][3, 1] = math.nan
    set_gradients(ours, gradients)
    with pytest.raises(FloatingPointError, match=r"models 1, 3\. Nothing was updated"):
        ours.step()
    assert_equal(before, snapshot(ours))
    ours.active = torch.tensor([True, False, True, False, True], device=device)
    ours.step()  # a model that is left out harms nobody
    assert not torch.equal(before[0], parameters(ours)[0])


def test_raise_names_the_first_models_only() -> None:
    ours = FusedAdam([nn.Parameter(torch.zeros(1000, 2))], stacked=True, on_nonfinite="raise")
    parameters(ours)[0].grad = torch.full((1000, 2), math.nan)
    with pytest.raises(FloatingPointError, match=r"models 0, 1, 2, 3, 4 and 995 more\."):
        ours.step()


@both_backends
@pytest.mark.parametrize("on_nonfinite", ["ignore", "skip"])
def test_grad_scaler_s_overflow_skips_all_active_models(
    name: str, on_nonfinite: str, device: torch.device
) -> None:
    shared = {"fused": True, "on_nonfinite": on_nonfinite}
    ours, runs, feed = make(name, device, shapes=TWO, shared=shared, **OPTIONS[name])
    active = [True, False, True, True, True]
    ours.active = torch.tensor(active, device=device)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0, growth_interval=3)
    for step in range(1, 8):
        gradients = feed(step)
        scaler.scale(torch.zeros((), device=device))
        scaled = [grad * scaler.get_scale() for grad in gradients]
        set_gradients(ours, scaled)
        if step in (1, 4):
            parameters(ours)[1].grad[3] = math.inf
        else:
            runs.step(gradients, active)
        given = [param.grad.clone() for param in parameters(ours)]
        scaler.step(ours)
        scaler.update()
        assert_same(ours, runs, f"at step {step}")
        for param, was, grad in zip(parameters(ours), given, gradients, strict=True):
            left = was.cpu() if step in (1, 4) else grad
            assert torch.equal(param.grad.cpu()[0], left[0])
            assert torch.equal(param.grad[1], was[1]), "the gradient of a model that is left out"
    assert ours.steps_skipped.tolist() == [2, 0, 2, 2, 2]


# Parameters of every kind.


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(name: str, dtype: torch.dtype, device: torch.device) -> None:
    options = {**OPTIONS[name], "lr": VECTOR / 10, **({} if name == "SGD" else {"eps": 1e-2})}
    ours, runs, feed = make(name, device, dtype, TWO, **options)
    for step in range(1, 11):
        advance(ours, runs, step, feed(step))


@pytest.mark.parametrize("first", [True, False], ids=["mask first", "no mask first"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masks_that_come_and_go_over_rates_of_16_bits(dtype: torch.dtype, first: bool) -> None:
    """What a step with a mask keeps for the next one, or one without, changes no bit."""
    start, rate = torch.randn(B, 33).to(dtype), torch.linspace(0.01, 0.1, B)
    gradients = [torch.randn(B, 33).to(dtype) for _ in range(4)]

    def run(anew: bool) -> Any:
        optimizer = ours_for("AdamW")([torch.nn.Parameter(start.clone())], lr=rate, stacked=True)
        for step, gradient in enumerate(gradients):
            optimizer.active = torch.arange(B) < 3 if (step % 2 == 0) is first else None
            if anew:
                optimizer.load_state_dict(optimizer.state_dict())  # forgets what the last step kept
            step_by(optimizer, [gradient])
        return optimizer

    assert_equal_bits(run(False), run(True))


def test_blocks_whose_models_go_apart_one_after_the_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of unequal steps has more temporaries; what a small block is first to need serves larger ones too."""
    monkeypatch.setattr(backends.module("fallback", "stacked"), "batch_size", lambda *_: 9)
    ours, runs, feed = make(name, shapes=TWO, **OPTIONS[name])  # of the first in blocks of 3 models and 2
    for step, left_out in enumerate((4, 4, 0, 4, None, None), 1):
        active = None if left_out is None else [b != left_out for b in range(B)]
        advance(ours, runs, step, feed(step), active)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["lr", "lr_scale"])
def test_rates_of_16_bit_models_are_rounded_once(dtype: torch.dtype, scaled: bool) -> None:
    """As where one rate serves all: neither the rate nor the move at rate 1, which float16 may not hold."""
    gradients = [torch.randn(B, 500).to(dtype) * 1e-3 for _ in range(2)]
    gradients[1][:, :200] = 0  # where in float16 the square of the first one is 0 too
    rates = torch.linspace(1e-6, 3e-6, B)

    def run(chosen: slice, **options: Any) -> Tensor:
        param = nn.Parameter(torch.zeros(B, 500, dtype=dtype)[chosen])
        optimizer = FusedAdam([param], eps=1e-12, stacked=True, **options)
        for gradient in gradients:
            param.grad = gradient[chosen].clone()
            optimizer.step()
        return param.detach().double()

    given = {"lr": 1.0, "lr_scale": rates} if scaled else {"lr": rates}
    alone = torch.cat([run(slice(b, b + 1), lr=rate) for b, rate in enumerate(rates.tolist())])
    assert alone.isfinite().all()
    gap, limits = (run(slice(None), **given) - alone).abs(), torch.finfo(dtype)
    assert (gap <= limits.eps * (alone.abs() + limits.tiny)).all()
    assert (gap > 0).double().mean() < 0.01  # ties, where the last bit of float32 decides


@EVERY_BACKEND
def test_betas_of_float64_keep_their_digits(device: torch.device) -> None:
    """1 - beta2 is rounded to float32, not beta2, of whose difference from 1 float32 has three digits fewer."""
    runs = []
    numbers = (0.9, 0.999)
    each = tuple(torch.full((B,), beta, dtype=torch.float64, device=device) for beta in numbers)
    for betas in (numbers, each):
        optimizer = FusedAdam(copies(stacks((B, 3)), device), lr=0.1, betas=betas, stacked=True)
        (param,) = parameters(optimizer)
        for step in range(3):
            optimizer.active = torch.arange(B, device=device) % 2 == 0 if step == 0 else None
            param.grad = torch.linspace(1, 2, 3, device=device).expand(B, 3) * (step + 1)
            optimizer.step()
        runs.append(snapshot(optimizer))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("eps", [1, np.float32(1)], ids=["int", "numpy"])
def test_eps_of_any_kind_of_number(eps: Any) -> None:
    runs = []
    for given in (1.0, eps):
        optimizer = FusedAdam(stacks((B, 3)), eps=given, max_norm=1.0, stacked=True)
        step_by_ones(optimizer)
        runs.append(snapshot(optimizer))
    assert_equal(*runs)


@EVERY_BACKEND
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_that_is_raised_from_zero(dampening: float, device: torch.device) -> None:
    """The first step of momentum is not dampened, however many steps went before it; a later one is."""
    momentum = torch.tensor([0.9, 0.0, 0.5, 0.0, 0.3])
    ours, runs, feed = make("SGD", device, lr=0.1, momentum=momentum, dampening=dampening)
    given = ours.param_groups[0]["momentum"]
    for step in range(1, 9):
        if step in (3, 5, 7):
            changed = {3: [0.9, 0.7, 0.5, 0, 0], 5: [0.9, 0, 0.5, 0.6, 0.3], 7: [0.9, 0.2, 0, 0.6, 0.3]}[step]
            given.copy_(torch.tensor(changed))
            runs.set(momentum=torch.tensor(changed))
        active = [step != 3 or b != 1 for b in range(B)] if step % 2 else None
        advance(ours, runs, step, feed(step), active)


@both_backends
def test_float16_after_unequal_steps(name: str, device: torch.device) -> None:
    """Where a gradient is 0, or its square is in float16, the update goes by the square in float32."""
    gradient = torch.tensor([0.0, 1e-3, 3e-3, 1.0], dtype=torch.float16).expand(B, 4)
    options = {} if name == "SGD" else {"eps": 1e-7}  # which float16 has
    stack = torch.ones(B, 4).half()
    runs = SeparateRuns(name, [stack], lr=1e-3, **options)
    ours = ours_for(name)([nn.Parameter(stack.clone().to(device))], lr=1e-3, stacked=True, **options)
    for step in range(1, 5):
        advance(ours, runs, step, [gradient], [True] * 3 + [False] * 2 if step == 1 else None)
        (param,) = parameters(ours)
        assert torch.equal(param[:, 0].cpu(), torch.ones(B).half())


@both_backends
def test_master_weights(name: str, device: torch.device) -> None:
    shared = {"master_weights": True, "max_norm": 3.0}
    ours, runs, feed = make(name, device, torch.bfloat16, TWO, shared, lr=VECTOR / 100)
    for step in range(1, 11):
        advance(ours, runs, step, feed(step), [b != step % B for b in range(B)], 3.0)


@both_backends
def test_stochastic_rounding_depends_on_each_model_s_step(name: str, device: torch.device) -> None:
    """A model that lags a step makes its updates with the random numbers that it would have had without the lag."""
    updates = []
    for late in (0, 1):
        param = nn.Parameter(torch.ones(2, 200, dtype=torch.bfloat16, device=device))
        ours = ours_for(name)([param], stacked=True, stochastic_rounding=True, lr=1e-3)
        found: list[Tensor] = []
        for step in range(3 + late):
            ours.active = torch.tensor([True, step >= late], device=device)
            step_by_ones(ours)
            found.append(param[1].detach().clone())
        assert ours.state[param]["step"].tolist() == [3 + late, 3]
        assert torch.equal(found[0], torch.ones_like(found[0])) == bool(late)
        updates.append(torch.stack(found[late:]))
    assert torch.equal(*updates)
    moved = [1 - value.float().mean().item() for value in updates[0]]
    assert moved == pytest.approx([0.001, 0.002, 0.003], rel=0.5)
    jumped = updates[0].diff(dim=0) != 0
    assert not torch.equal(jumped[0], jumped[1]), "each update draws anew"


@both_backends
def test_any_layout(name: str, device: torch.device) -> None:
    """Transposed stacks, stacks in channels_last, gradients of other strides, and holes."""
    shapes = ((B, 3, 4), (B, 2, 3, 3), (B, 6))
    ours, runs, feed = make(name, device, shapes=shapes, **{**OPTIONS[name], "lr": VECTOR})
    first, second, third = parameters(ours)
    first.data = first.data.transpose(0, 2).contiguous().transpose(0, 2)
    second.data = second.data.to(memory_format=torch.channels_last)
    third.data = torch.zeros(B, 12, device=device)[:, ::2].copy_(third.data)
    assert first.stride(0) == 1
    assert not third.is_contiguous()
    for step in range(1, 5):
        advance(ours, runs, step, feed(step), lay_out=transposed)


@both_backends
@pytest.mark.parametrize("count", [0, 1])
def test_no_model_and_one(name: str, count: int, device: torch.device) -> None:
    shared = {"max_norm": 1.0, "on_nonfinite": "skip"}
    params = [
        nn.Parameter(torch.ones(count, 3, device=device)),
        nn.Parameter(torch.ones(count, device=device)),
    ]
    ours = ours_for(name)(params, stacked=True, lr=torch.full((count,), 0.1, device=device), **shared)
    plain = ours_for(name)(copies([p[0] for p in params], device), lr=0.1, **shared) if count else None
    ours.lr_scale = torch.ones(count, device=device)
    for _ in range(3):
        for optimizer in (ours, plain):
            if optimizer is not None:
                step_by_ones(optimizer)
    assert ours.grad_norm.shape == ours.steps_skipped.shape == (count,)
    assert all(ours.state[p]["step"].shape == (count,) for p in params if p in ours.state)
    if plain is not None:
        for mine, other in zip(params, parameters(plain), strict=True):
            torch.testing.assert_close(mine[0], other)


def test_equal_options_of_one_model_only_steer_that_model(name: str) -> None:
    """Changing an option of one model changes the bits of no other."""
    runs = []
    for rate in (0.1, 0.3):
        lr = torch.full((B,), 0.1)
        lr[2] = rate
        ours = ours_for(name)(make_params(TWO), stacked=True, lr=lr, max_norm=1.0)
        torch.manual_seed(1)
        for _ in range(4):
            step_by(ours, [torch.randn(shape) for shape in TWO])
        runs.append(snapshot(ours))
        torch.manual_seed(0)
    assert_equal(*runs, [0, 1, 3, 4])
    assert not torch.equal(runs[0][0][2], runs[1][0][2])


# Copies and checkpoints.


@pytest.mark.parametrize("clone", COPIES)
def test_copies_go_on_as_the_original_does(name: str, clone: str) -> None:
    shared = {"on_nonfinite": "skip", "max_norm": 1.0, "lr_scale": VECTOR}
    ours, _, feed = make(name, shapes=TWO, shared=shared, **{**OPTIONS[name], "lr": VECTOR})
    ours.active = torch.tensor([True, False, True, True, False])
    set_gradients(ours, feed(1))
    parameters(ours)[0].grad[0, 0] = math.inf
    ours.step()
    other = COPIES[clone](ours)
    assert other.stacked is True
    assert torch.equal(other.active, ours.active)
    assert torch.equal(other.lr_scale, VECTOR)
    assert torch.equal(other.steps_skipped, ours.steps_skipped)
    gradients = feed(2)
    for each in (ours, other):
        set_gradients(each, gradients)
        each.active = torch.tensor([True, True, False, True, True])
        each.step()
        each.add_param_group({"params": stacks((B, 7))})
        with pytest.raises(ValueError, match="stacks 2 models"):
            each.add_param_group({"params": stacks((2, 7))})
    assert_equal(snapshot(ours), snapshot(other))


def test_a_state_dict_goes_round(name: str) -> None:
    options = {**OPTIONS[name], "lr": VECTOR}
    ours, runs, feed = make(name, shapes=TWO, **options)
    for step in range(1, 11):
        if step in (4, 7):
            other = ours_for(name)(copies(parameters(ours)), stacked=True)
            other.load_state_dict(copy.deepcopy(ours.state_dict()))
            ours = other
        advance(ours, runs, step, feed(step), [b >= step % 3 for b in range(B)])


@pytest.mark.parametrize("start", ["tensor", "float"])
def test_a_checkpoint_of_torch_loads_its_step_spread_over_the_models(name: str, start: str) -> None:
    ours, runs, feed = make(name, shapes=TWO, **OPTIONS[name])
    theirs = theirs_for(name)(copies(parameters(ours)), foreach=False, **OPTIONS[name])
    for step in (1, 2, 3):
        gradients = feed(step)
        step_by(theirs, gradients)
        runs.step(gradients)
    saved = copy.deepcopy(theirs.state_dict())
    if start == "float":
        for values in saved["state"].values():
            if "step" in values:
                values["step"] = float(values["step"])
    ours.load_state_dict(saved)
    set_values(ours, parameters(theirs))
    if name != "SGD":
        for param in parameters(ours):
            assert torch.equal(ours.state[param]["step"], torch.full((B,), 3.0))
    for step in range(4, 8):
        advance(ours, runs, step, feed(step), [b != step % B for b in range(B)])


def test_a_checkpoint_with_one_rate_replaces_one_per_model(name: str) -> None:
    """The loaded options are those of construction from then on."""
    theirs = theirs_for(name)(make_params(TWO), lr=0.25)
    ours = ours_for(name)(make_params(TWO), stacked=True, lr=VECTOR)
    ours.load_state_dict(theirs.state_dict())
    step_by(ours, [torch.ones(shape) for shape in TWO])
    assert ours.param_groups[0]["lr"] == 0.25


def test_a_stacked_checkpoint_is_refused_by_a_plain_optimizer() -> None:
    ours = FusedAdam(make_params(TWO), stacked=True)
    step_by(ours, [torch.ones(shape) for shape in TWO])
    plain = FusedAdam(copies(parameters(ours)))
    plain.load_state_dict(ours.state_dict())
    set_gradients(plain, [torch.ones(shape) for shape in TWO])
    with pytest.raises(RuntimeError, match=r"step of parameter 0 has shape \(5,\); expected no dimension"):
        plain.step()


# Groups and schedulers.


def test_groups_that_are_taken_out(name: str) -> None:
    first, second = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    rates = torch.tensor([0.1, 0.2])
    optimizer = ours_for(name)([{"params": [first]}, {"params": [second], "lr": rates}], stacked=True)
    del optimizer.param_groups[0]
    second.grad = torch.ones(2, 3)
    optimizer.step()
    assert bool((second != 1).all())
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match="overwritten"):
        optimizer.step()
    optimizer = ours_for(name)([second], stacked=True, max_norm=1.0)
    optimizer.param_groups.clear()
    optimizer.step()
    assert optimizer.steps_skipped.tolist() == [0, 0]


def test_a_first_group_without_parameters(name: str) -> None:
    """As that of the weights that decay may be."""
    rates = torch.tensor([0.1, 0.2])
    params = [nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    usual = ours_for(name)(params[:1], lr=rates, stacked=True, max_norm=1.0)
    other = ours_for(name)([{"params": []}, {"params": params[1:2]}], lr=rates, stacked=True, max_norm=1.0)
    later = ours_for(name)([{"params": []}], lr=rates, stacked=True, max_norm=1.0)
    later.step()
    assert not len(later.steps_skipped)
    later.add_param_group({"params": params[2:]})
    for optimizer in (usual, other, later):
        for param in parameters(optimizer):
            param.grad = torch.arange(6.0).view(2, 3)
        optimizer.step()
    assert torch.equal(params[0], params[1])
    assert torch.equal(params[0], params[2])
    with pytest.raises(ValueError, match="lr has shape"):
        ours_for(name)([{"params": []}, {"params": params}], lr=torch.ones(3), stacked=True)


def test_groups_have_their_own_rates(name: str) -> None:
    first, second = make_params(TWO)
    runs = [SeparateRuns(name, [first], lr=VECTOR), SeparateRuns(name, [second], lr=0.2, weight_decay=VECTOR)]
    ours = ours_for(name)(
        [*copies([first])], stacked=True, lr=VECTOR, weight_decay=0.01 if name == "AdamW" else 0
    )
    ours.add_param_group({"params": copies([second]), "lr": 0.2, "weight_decay": VECTOR})
    feed = Feed([first, second])
    for step in range(1, 6):
        gradients = feed(step)
        step_by(ours, gradients)
        for index, run in enumerate(runs):
            run.step([gradients[index]])
            own = type("Part", (), {"param_groups": [ours.param_groups[index]], "state": ours.state})()
            assert_same(own, run, f"at step {step}")


@pytest.mark.parametrize("kind", ["float", "tensor", "one cycle"])
def test_a_scheduler_drives_all_models_by_lr_scale(name: str, kind: str) -> None:
    lr = torch.tensor(0.1) if kind == "tensor" else 0.1
    ours, runs, feed = make(name, shapes=TWO, **{**OPTIONS[name], "lr": lr, "lr_scale": VECTOR})
    if kind == "one cycle":  # which drives momentum and beta1 too
        scheduler = lr_scheduler.OneCycleLR(ours, max_lr=0.2, total_steps=8)
    else:
        scheduler = lr_scheduler.CosineAnnealingLR(ours, 10)
    for step in range(1, 8):
        group = ours.param_groups[0]
        driven = {key: group[key] for key in ("momentum", "betas") if key in group}
        runs.set(lr=float(group["lr"]), lr_scale=VECTOR, **driven)
        advance(ours, runs, step, feed(step))
        scheduler.step()
    assert float(ours.param_groups[0]["lr"]) < 0.03


def test_options_are_read_at_each_step(name: str) -> None:
    """In place, and replaced."""
    lr = VECTOR.clone()
    ours, runs, feed = make(name, shapes=TWO, **{**OPTIONS[name], "lr": lr, "weight_decay": VECTOR})
    for step in range(1, 7):
        new = VECTOR * (1 + step) / 10
        if step < 4:
            ours.param_groups[0]["lr"].copy_(new)
        else:
            ours.param_groups[0].update(lr=new.clone(), weight_decay=new / 2)
        runs.set(lr=new, weight_decay=VECTOR if step < 4 else new / 2)
        advance(ours, runs, step, feed(step))


def test_a_rate_per_model_that_became_a_number_is_refused(name: str) -> None:
    ours = ours_for(name)(make_params(TWO), stacked=True, lr=VECTOR.clone())
    step_by(ours, [torch.ones(shape) for shape in TWO])
    before = snapshot(ours)
    ours.param_groups[0]["lr"] = 0.1
    with pytest.raises(ValueError, match="lr had one value for each model"):
        ours.step()
    ours.param_groups[0]["lr"] = VECTOR.clone()
    scheduler = lr_scheduler.OneCycleLR(ours, max_lr=0.1, total_steps=5, cycle_momentum=False)
    with pytest.raises(ValueError, match="lr_scale"):
        ours.step()
    del scheduler
    assert_equal(before, snapshot(ours))


def test_help_and_repr_show_stacked(name: str) -> None:
    assert "stacked: True" in repr(ours_for(name)(stacks((B, 2)), stacked=True))
