"""``stacked=True``: the steps of a batch of models equal those of torch.optim's class, run for each model alone."""

from typing import Any

import pytest
import torch
from gradkernels import FusedAdam
from gradkernels.verify.tolerance import compare

from .optimizers import NAMES, Feed
from .stacks import B, advance, assert_each_model_moved, make

STEPS = 11


def rates(low: float, high: float) -> torch.Tensor:
    """A different number for each model."""
    return torch.linspace(low, high, B)


SGD_CASES: dict[str, dict[str, Any]] = {
    "numbers": {"lr": 0.1},
    "rates": {"lr": rates(0.05, 0.2), "weight_decay": rates(0.0, 0.2)},
    "lr_scale": {"lr": 0.1, "lr_scale": rates(0.5, 2.0), "momentum": 0.9},
    "momenta": {"lr": 0.05, "momentum": torch.tensor([0.9, 0.0, 0.5, 0.99, 0.3]), "dampening": 0.5},
    "nesterov": {"lr": rates(0.02, 0.1), "momentum": rates(0.1, 0.9), "nesterov": True, "weight_decay": 0.1},
    "maximize": {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": rates(0.1, 0.2)},
    "0-d": {"lr": torch.tensor(0.05), "lr_scale": rates(1.0, 2.0), "momentum": 0.5, "dampening": 0.2},
}
ADAM_CASES: dict[str, dict[str, Any]] = {
    "numbers": {},
    "rates": {"lr": rates(0.01, 0.1), "weight_decay": rates(0.0, 0.2)},
    "lr_scale": {"lr": 0.1, "lr_scale": rates(0.5, 2.0), "amsgrad": True, "weight_decay": 0.1},
    "betas": {"lr": rates(0.01, 0.1), "betas": (rates(0.0, 0.95), rates(0.5, 0.999)), "maximize": True},
    "one beta": {"lr": 0.1, "betas": (rates(0.5, 0.9), 0.99), "eps": 0.1, "weight_decay": 0.1},
    "doubles": {"lr": rates(0.01, 0.1).double().expand(3, B)[1], "betas": (0.8, rates(0.9, 0.99).double())},
}
CASES = [
    (name, label, options)
    for name in NAMES
    for label, options in (SGD_CASES if name == "SGD" else ADAM_CASES).items()
]
ON_KERNELS = {
    ("SGD", "momenta"),
    ("SGD", "nesterov"),
    ("Adam", "betas"),
    ("AdamW", "rates"),
    ("Adam", "lr_scale"),
}
EVERYWHERE = [
    pytest.param(
        name,
        backend,
        options,
        id=f"{name}-{backend}-{label}",
        marks=() if backend == "fallback" or (name, label) in ON_KERNELS else pytest.mark.full,
    )
    for backend in ("fallback", "triton", "reference")
    for name, label, options in CASES
]


def run(ours: Any, runs: Any, feed: Feed) -> None:
    """Step both, with changing masks and a missing gradient, and compare after each."""
    for step in range(1, STEPS + 1):
        active = None if step % 4 == 1 else [(step + b) % 3 != 0 or b == 0 for b in range(B)]
        gradients = feed(step)
        if step in (1, 4):
            gradients[0] = None
        advance(ours, runs, step, gradients, active)
    assert_each_model_moved(runs)


@pytest.mark.parametrize(("name", "backend", "options"), EVERYWHERE, indirect=["backend"])
def test_equals_a_run_for_each_model(name: str, options: dict[str, Any], device: torch.device) -> None:
    run(*make(name, device, **options))


@pytest.mark.parametrize("backend", ["fallback", "triton"], indirect=True)
@pytest.mark.parametrize("least", [0, 200, 40_000], ids=["none", "beta1", "both"])
def test_steps_far_apart(least: int, device: torch.device) -> None:
    """Some models have made so many steps that beta1's bias is gone, or that of both betas, others may have not."""
    steps = [float(least + far) for far in (0, 1, 30, 1_000, 500_000)]
    values = [torch.randn(B, 6), torch.randn(B, 6), torch.randn(B, 6) / 10, torch.rand(B, 6) / 10]

    def stepped(
        cls: Any, dtype: torch.dtype, models: slice, step: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        param, grad, m, v = (value[models].to(device, dtype, copy=True) for value in values)
        param.requires_grad_()
        optimizer = cls([param], lr=0.1, **options)
        optimizer.state[param] = {"step": step.to(device), "exp_avg": m, "exp_avg_sq": v}
        param.grad = grad
        optimizer.step()
        return param.detach().cpu()

    ours = stepped(FusedAdam, torch.float32, slice(0, B), torch.tensor(steps), stacked=True)
    theirs, expected = (
        torch.cat(
            [
                stepped(torch.optim.Adam, dtype, slice(b, b + 1), torch.tensor(step), foreach=False)
                for b, step in enumerate(steps)
            ]
        )
        for dtype in (torch.float32, torch.float64)
    )
    for b, step in enumerate(steps):
        comparison = compare(ours[b], theirs[b], expected[b].numpy())
        assert comparison.passed, f"{step:.0f} steps: {comparison}"
