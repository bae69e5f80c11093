"""The whole training loop of a linear model in one call: ``linear_mse_fit``.

Two ways lead through it. The rounds in one launch (``linear_mse_fit_rounds`` of the backend), where nobody looks at a
round and a model fits a program; else the loop as anyone would write it, of this package's own ops.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import checks
from .backends import implementation
from .checks import cyclic
from .linear_mse import _check as check_linear_mse
from .linear_mse import linear_mse_loss
from .optim.bucket import Update
from .optim.step import FusedStep
from .torch_private import needs_dispatcher

_PLAIN = (Tensor, torch.nn.Parameter)


def linear_mse_fit(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Train a linear model, or B of them, for ``steps`` rounds of gradient descent; the losses of all rounds.

    In each round ``t``, on the rows ``(t batch_size + i) % N`` for ``i < batch_size``, or on all::

        optimizer.zero_grad()
        losses[t] = linear_mse_loss(input, weight, target, bias, sample_weight=sample_weight)
        losses[t].sum().backward()
        optimizer.step()

    Parameters and the optimizer's state end as these rounds would leave them. ``.grad`` stays as it was.

    Shapes:
        As for ``linear_mse_loss``. Losses: ``(steps,)``, or ``(steps, B)`` for B models.

    Args:
        input: float64, float32, float16 or bfloat16, any strides.
        weight: of the same dtype and device; trained.
        target: of the same dtype and device.
        bias: of the same dtype and device; trained.
        optimizer: FusedSGD, FusedAdam or FusedAdamW over exactly weight and bias, in one or two groups. Its options
            are read once: rates stay what they are throughout.
        steps: how many rounds.
        batch_size: rows of each round, 1 to N; all by default.
        sample_weight: of the same dtype and device.

    Returns:
        The mean loss of each round before its update, detached; nan or inf where it diverges.

    Raises:
        TypeError: ``optimizer`` is none of the three, ``steps`` or ``batch_size`` is not an integer, or dtypes differ.
        ValueError: the optimizer holds other tensors than weight and bias, ``steps`` is negative, ``batch_size`` is
            not within 1 and N, or a shape is wrong.
        RuntimeError: devices differ, input and weight do not fit, or neither weight nor bias requires grad.
        FloatingPointError: as the optimizer raises with ``on_nonfinite="raise"``; the rounds before are done.

    Example:
        >>> x, y = torch.randn(100, 8), torch.randn(100, 1)
        >>> weight = torch.zeros(1, 8, requires_grad=True)
        >>> losses = linear_mse_fit(x, weight, y, optimizer=FusedAdam([weight], lr=0.1), steps=50)
    """
    op = "linear_mse_fit"
    given = {"input": input, "weight": weight, "target": target, "bias": bias, "sample_weight": sample_weight}
    check_linear_mse(op, given, "mean", ("mean",))
    ours = _check_optimizer(op, optimizer, [weight] if bias is None else [weight, bias])
    _check_count(op, "steps", steps, 0, None)
    rows = math.prod(input.shape[:-1])
    if batch_size is not None:
        _check_count(op, "batch_size", batch_size, 1, rows)
    with torch.inference_mode(False):  # what is written outlives the caller's block
        outputs = weight.shape[:-1]
        if sample_weight is not None:
            each = () if sample_weight.shape != target.shape else outputs
            sample_weight = sample_weight.detach().reshape(rows, *each)
        losses = torch.empty((steps,), dtype=checks.loss_dtype(target), device=target.device)
        fit = _Fit(
            input.detach().reshape(rows, input.shape[-1]),
            weight,
            target.detach().reshape(rows, *outputs),
            bias,
            sample_weight,
            ours,
            batch_size,
            rows,
            losses,
        )
        if steps and (fit.is_watched() or not fit.launch()):
            fit.loop()
    return losses


def _check_optimizer(op: str, optimizer: Any, params: list[Tensor]) -> FusedStep:
    """The optimizer: TypeError unless it is one of ours, ValueError unless it holds exactly ``params``."""
    if not isinstance(optimizer, FusedStep):
        raise TypeError(
            f"{op}: optimizer must be a FusedSGD, FusedAdam or FusedAdamW, got {type(optimizer).__name__}"
        )
    held = [param for group in optimizer.param_groups for param in group["params"]]
    if sorted(map(id, held)) != sorted(map(id, params)):
        names = " and ".join(("weight", "bias")[: len(params)])
        shapes = ", ".join(str(tuple(param.shape)) for param in held)
        raise ValueError(
            f"{op}: optimizer must hold exactly the given {names}; it holds {len(held)} tensors, of shapes {shapes}"
        )
    if not any(param.requires_grad for param in params):
        raise RuntimeError(f"{op}: neither weight nor bias requires grad: there is nothing to train")
    return optimizer


def _check_count(op: str, name: str, value: Any, least: int, most: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least} to the number of rows, {most}"
        raise ValueError(f"{op}: {name} is {value}, expected {expected}")


@dataclass(frozen=True)
class _Fit:
    """The arguments of one call, checked; ``rows`` is N, ``losses`` the result."""

    input: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    sample_weight: Tensor | None
    optimizer: FusedStep
    batch_size: int | None
    rows: int
    losses: Tensor

    @property
    def params(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def is_watched(self) -> bool:
        """Whether single rounds matter to somebody, or something besides plain autograd is active."""
        optimizer, own_step = self.optimizer, vars(self.optimizer).get("step")
        return (
            optimizer.on_nonfinite == "raise"
            or optimizer.norm_group is not None
            or optimizer._has_step_hooks()
            or inspect.unwrap(type(optimizer).step) is not FusedStep.step
            or (own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"))
            or any(group["differentiable"] for group in optimizer.param_groups)
            or any(optimizer._has_master(p) or optimizer._seed_of(p) is not None for p in self.params)
            or any(type(param) not in _PLAIN or not param.requires_grad for param in self.params)
            or any(param._backward_hooks or param._post_accumulate_grad_hooks for param in self.params)
            or needs_dispatcher()
        )

    def launch(self) -> bool:
        """All rounds by the backend's launcher; False, with nothing done, if it has none that takes these."""
        launcher = getattr(implementation("linear_mse_fit", self.weight), "linear_mse_fit_rounds", None)
        if launcher is None or self.rows == 0:
            return False
        # One model is a batch of one.
        input, target, s = self.input, self.target, self.sample_weight
        N, D = self.rows, self.input.shape[-1]
        weight = self.weight if self.weight.dim() == 3 else self.weight.view(1, -1, D)
        B, K, _ = weight.shape
        with _gradients_aside(self.params), torch.no_grad():
            done: bool = launcher(
                input.reshape(-1, N, D),
                weight,
                target.reshape(-1, N, K),
                None if self.bias is None else self.bias.view(B, K),
                None if s is None else s.reshape(-1, N, s.numel() // N),
                self.batch_size or N,
                self.losses.view(-1, B),
                self.update(),
            )
        if done:
            torch.autograd.graph.increment_version(self.params)
            vars(self.optimizer)["_opt_called"] = True  # for torch's schedulers
        return done

    def update(self) -> Update:
        """What the launcher does with the gradients, by itself or by ``Update.step``."""
        optimizer, params = self.optimizer, self.params

        def step(grads: list[Tensor]) -> None:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.view_as(param)
            optimizer._step()

        groups = [
            next(group for group in optimizer.param_groups if any(param is held for held in group["params"]))
            for param in params
        ]
        states = [optimizer._state_of(group, param) for group, param in zip(groups, params, strict=True)]
        guard = optimizer._guard_of_rounds(params[0].device)
        options = [optimizer._options(group) for group in groups]
        return Update(optimizer._operator, options, states, guard, step)

    def loop(self) -> None:
        """The rounds one after the other, through autograd and ``step``."""
        trained = [param for param in self.params if param.requires_grad]
        with _gradients_aside(self.params), torch.enable_grad():
            for t in range(len(self.losses)):
                for param in trained:
                    param.grad = None
                input, target, sample_weight = self.batch(t)
                loss = linear_mse_loss(input, self.weight, target, self.bias, sample_weight=sample_weight)
                self.losses[t] = loss.detach()
                loss.sum().backward(inputs=trained)
                self.optimizer.step()

    def batch(self, t: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, target and weights of the rows of round ``t``."""
        input, target, weight = self.input, self.target, self.sample_weight
        if self.batch_size is None:
            return input, target, weight
        first = t * self.batch_size % self.rows
        return (
            cyclic(input, first, self.batch_size, 0),
            cyclic(target, first, self.batch_size, 0),
            None if weight is None else cyclic(weight, first, self.batch_size, 0),
        )


@contextmanager
def _gradients_aside(params: list[Tensor]) -> Iterator[None]:
    """Inside the block the parameters have no gradients; afterwards those of before."""
    given = [param.grad for param in params]
    try:
        for param in params:
            param.grad = None
        yield
    finally:
        for param, grad in zip(params, given, strict=True):
            param.grad = grad
