"""What the tests of ``stacked=True`` share: one optimizer over a batch of models beside torch's, one per model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gradkernels.verify.tolerance import compare
from torch import Tensor

from ..helpers import to_numpy
from .optimizers import (
    Feed,
    Gradients,
    ReferenceRun,
    make_params,
    ours_for,
    parameters,
    set_gradients,
    theirs_for,
)

B = 5
SHAPES = ((B, 3), (B,), (B, 2, 4), (B, 0))


def of_model(options: dict[str, Any], b: int) -> dict[str, Any]:
    """The options of one model, as torch takes them."""

    def pick(value: Any) -> Any:
        return value[b].item() if isinstance(value, Tensor) and value.dim() > 0 else value

    own = {
        name: tuple(map(pick, value)) if name == "betas" else pick(value) for name, value in options.items()
    }
    factor = own.pop("lr_scale", None)
    if factor is not None:
        own["lr"] = own.get("lr", 1e-3) * factor
    return own


class SeparateRuns:
    """torch.optim's class and the NumPy steps, once for each model of the stacks.

    Args:
        name: of the class.
        stacks: the parameters' starting values.
        options: as for the stacked optimizer; tensors (B,) have one value per model.
    """

    def __init__(self, name: str, stacks: list[Any], **options: Any) -> None:
        self.name, self.count = name, len(stacks[0])
        self.optimizers = [
            theirs_for(name)(
                [torch.nn.Parameter(stack[b].detach().clone().cpu()) for stack in stacks],
                foreach=False,
                **of_model(options, b),
            )
            for b in range(self.count)
        ]
        self.references = [ReferenceRun(optimizer) for optimizer in self.optimizers]
        self.start = [to_numpy(stack).copy() for stack in stacks]

    def set(self, **options: Any) -> None:
        """Change options of each model's only group."""
        for b, optimizer in enumerate(self.optimizers):
            optimizer.param_groups[0].update(of_model(options, b))

    def step(
        self, gradients: Gradients, active: list[bool] | None = None, max_norm: float | None = None
    ) -> list[float]:
        """Step the active models, each clipped by its own norm; the norms are returned."""
        norms = []
        for b, (optimizer, reference) in enumerate(zip(self.optimizers, self.references, strict=True)):
            own = [None if grad is None else grad[b].detach().cpu() for grad in gradients]
            wide = [None if grad is None else grad.double() for grad in own]
            norm = float(np.sqrt(sum(float(grad.square().sum()) for grad in wide if grad is not None)))
            norms.append(norm)
            if active is not None and not active[b]:
                continue
            for param, grad in zip(parameters(optimizer), own, strict=True):
                param.grad = None if grad is None else grad.to(param.dtype).clone()
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters(optimizer), max_norm, foreach=False)
                factor = min(1.0, max_norm / (norm + 1e-6))
                wide = [None if grad is None else grad * factor for grad in wide]
            reference.step(wide)
            optimizer.step()
        return norms

    def values(self, index: int, key: str) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Of one parameter or state of all models: torch's, NumPy's, and the scale to measure them on."""
        theirs, expected, scales = [], [], []
        for optimizer, reference in zip(self.optimizers, self.references, strict=True):
            param = parameters(optimizer)[index]
            found = param if key == "param" else optimizer.state.get(param, {}).get(key)
            known = reference.values.get(param, {}).get(key)
            zeros = np.zeros(param.shape)
            theirs.append(torch.zeros_like(param) if found is None else found.detach())
            if found is None or known is None:
                known = to_numpy(param) if key == "param" else zeros
            expected.append(known)
            scales.append(reference.scales.get(param, {}).get(key, np.abs(known)))
        return torch.stack(theirs), np.stack(expected), np.stack(scales)

    def steps(self, index: int) -> list[float]:
        """How many steps each model has made with a parameter (Adam)."""
        return [
            float(optimizer.state.get(parameters(optimizer)[index], {}).get("step", 0.0))
            for optimizer in self.optimizers
        ]


def assert_same(ours: Any, runs: SeparateRuns, when: str = "") -> None:
    """Every parameter and state of every model within the policy, each element on its own scale."""
    for index, mine in enumerate(parameters(ours)):
        state = dict(ours.state.get(mine, {}))
        wide = state.pop("master_param", None)
        if wide is not None:
            assert torch.equal(mine, wide.to(mine.dtype)), f"parameter {index} {when}"
        step = state.pop("step", None)
        if step is not None:
            assert (step.shape, step.dtype, step.device) == ((runs.count,), torch.float32, mine.device)
            if runs.name != "SGD":
                assert step.tolist() == runs.steps(index), f"step of parameter {index} {when}"
        for key, result in {"param": mine if wide is None else wide, **state}.items():
            theirs, expected, scale = runs.values(index, key)
            comparison = compare(result, theirs.to(result.dtype), expected, scale)
            assert comparison.passed, f"{key} of parameter {index} {tuple(mine.shape)} {when}: {comparison}"


def advance(
    ours: Any,
    runs: SeparateRuns,
    step: int,
    gradients: Gradients,
    active: list[bool] | None = None,
    max_norm: float | None = None,
    lay_out: Callable[[Tensor], Tensor] = torch.clone,
) -> list[float]:
    """Step both with the same gradients, the models of ``active`` alone, and compare; the runs' norms are returned."""
    set_gradients(ours, gradients, lay_out)
    ours.active = None if active is None else torch.tensor(active, device=parameters(ours)[0].device)
    norms = runs.step(gradients, active, max_norm)
    ours.step()
    assert_same(ours, runs, f"at step {step}")
    return norms


def assert_each_model_moved(runs: SeparateRuns) -> None:
    """Assert that a step which does nothing for one model would have been noticed."""
    for b, optimizer in enumerate(runs.optimizers):
        for index, param in enumerate(parameters(optimizer)):
            scale = runs.references[b].scales.get(param, {}).get("param", 0.0)
            if param.numel():
                moved = np.abs(to_numpy(param) - runs.start[index][b])
                assert (moved > 1e-3 * scale).all(), f"parameter {index} of model {b} hardly moves"


def make(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    shared: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, SeparateRuns, Feed]:
    """A stacked optimizer, the runs that it must equal, and their gradients. ``shared`` goes to ours alone."""
    stacks = make_params(shapes, dtype)
    wide = [stack.detach().float() for stack in stacks] if (shared or {}).get("master_weights") else stacks
    runs = SeparateRuns(name, wide, **options)
    moved = {
        key: tuple(to_device(each, device) for each in value) if key == "betas" else to_device(value, device)
        for key, value in options.items()
    }
    params = [torch.nn.Parameter(stack.detach().clone().to(device)) for stack in stacks]
    return ours_for(name)(params, stacked=True, **moved, **(shared or {})), runs, Feed(stacks)


def to_device(value: Any, device: torch.device | str) -> Any:
    """A copy of a tensor there; anything else as it is."""
    return value.clone().to(device) if isinstance(value, Tensor) else value
