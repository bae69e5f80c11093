"""torch's own optimizer database: configurations, error inputs, scheduler stacks, on ours as on torch's."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradkernels import use_backend
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

from ..helpers import DTYPES
from .optimizers import NAMES, assert_same_run, failure, make_pair, make_params, ours_for, theirs_for

DATABASE: dict[str, OptimizerInfo] = {info.name: info for info in optim_db if info.name in NAMES}


def configurations(by_default: Callable[[int, torch.dtype], bool]) -> list[Any]:
    """Every configuration with every dtype; what is not ``by_default`` is left to the full run."""
    return [
        pytest.param(
            name,
            index,
            dtype,
            id=f"{name}-{config.desc.replace(' ', '_')}-{str(dtype)[6:]}",
            marks=() if by_default(index, dtype) else pytest.mark.full,
        )
        for name, info in DATABASE.items()
        for dtype in DTYPES
        for index, config in enumerate(info.optim_inputs_func("cpu", dtype))
    ]


def options_of(name: str, index: int, dtype: torch.dtype) -> dict[str, Any]:
    return copy.deepcopy(DATABASE[name].optim_inputs_func("cpu", dtype)[index].kwargs)


@pytest.mark.parametrize(("name", "index", "dtype"), configurations(lambda index, dtype: True))
def test_configurations_on_the_fallback(name: str, index: int, dtype: torch.dtype) -> None:
    with use_backend("fallback"):
        assert_same_run(*make_pair(name, dtype=dtype, **options_of(name, index, dtype)))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("name", "index", "dtype"), configurations(lambda index, dtype: DTYPES[index % len(DTYPES)] is dtype)
)
def test_configurations_on_the_kernels(
    name: str, index: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_same_run(*make_pair(name, device, dtype, **options_of(name, index, dtype)))


@pytest.mark.parametrize("name", NAMES)
def test_error_inputs_of_the_database(name: str) -> None:
    inputs = DATABASE[name].optim_error_inputs_func("cpu", torch.float32)
    assert len(inputs) >= 7
    for case in inputs:
        given = case.optimizer_error_input
        params = make_params(((2, 3),)) if given.params is None else given.params
        expected = failure(lambda: theirs_for(name)(params, **given.kwargs))  # noqa: B023 (called at once)
        assert expected[0] is case.error_type, given.desc
        assert failure(lambda: ours_for(name)(params, **given.kwargs)) == expected, given.desc  # noqa: B023


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"weight_decay": -0.1},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"eps": -1.0},
        {"betas": (0.9, 1.0)},
        {"betas": (torch.ones(2), torch.ones(2))},
        {"momentum": 0.9, "betas": (0.9, 0.9)},
        {"foo": 1},
    ],
    ids=str,
)
def test_other_errors_of_the_constructor(name: str, options: dict[str, Any]) -> None:
    """An unknown argument too: the message names the constructor that the user called."""
    params = make_params(((2, 3),))
    ours, (error, text) = (
        failure(lambda cls=cls: cls(params, **options)) for cls in (ours_for(name), theirs_for(name))
    )
    assert ours == (error, text.replace(f"{name}.", f"Fused{name}."))


SCHEDULERS: dict[str, list[Callable[[Optimizer], Any]]] = {
    "LambdaLR": [lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))],
    "MultiplicativeLR": [lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.95)],
    "StepLR": [lambda opt: lr_scheduler.StepLR(opt, step_size=3, gamma=0.5)],
    "MultiStepLR": [lambda opt: lr_scheduler.MultiStepLR(opt, milestones=[2, 5], gamma=0.5)],
    "ConstantLR": [lambda opt: lr_scheduler.ConstantLR(opt, factor=0.4, total_iters=4)],
    "LinearLR": [lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, end_factor=0.8, total_iters=4)],
    "ExponentialLR": [lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.9)],
    "PolynomialLR": [lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=20, power=0.9)],
    "CosineAnnealingLR": [lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=10, eta_min=1e-4)],
    "CosineAnnealingWarmRestarts": [lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=5)],
    "CyclicLR": [lambda opt: lr_scheduler.CyclicLR(opt, base_lr=1e-3, max_lr=4e-3, step_size_up=4)],
    "OneCycleLR": [lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=20)],
    "ReduceLROnPlateau": [lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1)],
    "SWALR": [lambda opt: SWALR(opt, swa_lr=5e-4, anneal_epochs=5)],
    "SequentialLR": [
        lambda opt: lr_scheduler.SequentialLR(
            opt,
            [lr_scheduler.LinearLR(opt, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(opt, T_max=10)],
            milestones=[4],
        )
    ],
    "ChainedScheduler": [
        lambda opt: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(opt, 0.5, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)]
        )
    ],
}
STACKS = [
    *((name, label, stack, {}) for name in NAMES for label, stack in SCHEDULERS.items()),
    *(
        (name, f"database{index}", stack, {})
        for name, info in DATABASE.items()
        for index, stack in enumerate(info.scheduler_inputs)
    ),
    *((name, "tensor_lr", SCHEDULERS["CosineAnnealingLR"], {"lr": torch.tensor(4e-3)}) for name in NAMES),
]


def test_every_scheduler_of_torch_is_here() -> None:
    ours = {*SCHEDULERS, "LRScheduler", "_LRScheduler"}
    theirs = {
        label
        for label, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler)
    }
    assert theirs <= ours, theirs - ours


@pytest.mark.parametrize(
    ("name", "label", "stack", "options"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in STACKS]
)
def test_schedulers(name: str, label: str, stack: list[Any], options: dict[str, Any]) -> None:
    """On the fallback: a scheduler writes the param groups, which every backend reads alike."""
    options = copy.deepcopy(options)
    if name == "SGD":
        options["momentum"] = 0.9  # CyclicLR and OneCycleLR cycle it, as they cycle Adam's beta1
    pair = make_pair(name, **options)
    schedulers = {optimizer: [make(optimizer) for make in stack] for optimizer in pair}

    def advance(optimizer: Optimizer, step: int) -> None:
        for scheduler in schedulers[optimizer]:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(1.0)  # never better: the rate falls
            else:
                scheduler.step()

    before = float(pair[0].param_groups[0]["lr"])
    with use_backend("fallback"):
        assert_same_run(*pair, after_step=advance)
    assert float(pair[0].param_groups[0]["lr"]) != before
