"""The whole training loop of a linear model in one call: ``linear_mse_fit``.

Two ways lead through it. The rounds in one launch (``linear_mse_fit_rounds`` of the backend), where nobody looks at a
round and a model fits a program; else the loop as anyone would write it, of this package's own ops.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends import capturing, implementation
from .checks import cyclic
from .linear_mse import _check as check_one
from .linear_mse import linear_mse_loss
from .linear_mse_models import _normal_form as check_models
from .linear_mse_rows import check_bounds
from .optim.bucket import Guard, Models, Update
from .optim.plan import Entry, Part, measure_gradients, partition, update_parameters
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
    offsets: Tensor | None = None,
) -> Tensor:
    """Train a linear model, or B of them, for ``steps`` rounds of gradient descent and return all losses.

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
            are read once per call: the rate does not change between rounds.
        steps: how many rounds.
        batch_size: rows of each round, 1 to N; all by default.
        sample_weight: of the same dtype and device.

    Returns:
        The mean loss of each round before its update, detached; nan or inf where it diverges.

    Raises:
        TypeError: ``optimizer`` is none of the three, ``steps`` or ``batch_size`` is not an integer, or dtypes differ.
        ValueError: the optimizer holds other tensors than weight and bias, ``steps`` is negative, ``batch_size`` is
            not within 1 and N, or a shape is wrong.
        RuntimeError: devices differ, input and weight do not fit, neither weight nor bias requires grad, or a CUDA
            graph is being captured and the optimizer is not ``capturable`` or has made no rounds before.
        FloatingPointError: as the optimizer raises with ``on_nonfinite="raise"``; the rounds before are done.

    Example:
        >>> x, y = torch.randn(100, 8), torch.randn(100, 1)
        >>> weight = torch.zeros(1, 8, requires_grad=True)
        >>> losses = linear_mse_fit(x, weight, y, optimizer=FusedAdam([weight], lr=0.1), steps=50)
    """
    op = "linear_mse_fit"
    given = {"input": input, "weight": weight, "target": target, "bias": bias}
    with torch.inference_mode(False):  # what is written, or saved for a backward, outlives the caller's block
        if offsets is None and not (isinstance(weight, Tensor) and weight.dim() == 3):
            rows = _rows_of_one(op, given, sample_weight)
        else:
            rows = _rows_of_models(op, given, sample_weight, offsets)
        ours = _check_optimizer(op, optimizer, [weight] if bias is None else [weight, bias])
        _check_count(op, "steps", steps, 0, None)
        if batch_size is not None:
            if offsets is not None:
                raise ValueError(
                    f"{op}: batch_size is {batch_size}, but ragged rows (offsets) have no common number"
                )
            _check_count(op, "batch_size", batch_size, 1, rows.total)
        shape = (steps,) if rows.dim == 0 else (steps, len(weight))
        losses = torch.empty(shape, dtype=checks.loss_dtype(target), device=target.device)
        fit = _Fit(rows, weight, bias, ours, batch_size, losses)
        if steps:
            if fit.is_watched() or not fit.launch():
                fit.loop()
            ours._rounds = ours._made()
    return losses


class _Rows(NamedTuple):
    """What the rounds read: detached, with the rows along ``dim``, which is 0 for one model and -2 for a batch.

    Attributes:
        sample_weight: of a batch: with a last dimension of K or 1.
    """

    input: Tensor
    target: Tensor
    sample_weight: Tensor | None
    offsets: Tensor | None
    dim: int

    @property
    def total(self) -> int:
        """Return N, or the rows of all models where there are offsets."""
        return self.input.shape[self.dim]

    def of_round(self, t: int, batch_size: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, target and weights."""
        tensors = self[:3]
        if batch_size is None:
            return tensors
        first = t * batch_size % self.total
        input, target, weight = (
            None if tensor is None else cyclic(tensor, first, batch_size, self.dim) for tensor in tensors
        )
        assert input is not None
        assert target is not None
        return input, target, weight


def _rows_of_one(op: str, given: dict[str, Any], sample_weight: Any) -> _Rows:
    """Check and return the rows of one model, whose leading dimensions are joined."""
    check_one(op, {**given, "sample_weight": sample_weight}, "mean", ("mean",))
    input, weight, target, _ = given.values()
    rows, outputs = math.prod(input.shape[:-1]), weight.shape[:-1]
    if sample_weight is not None:
        each = outputs if sample_weight.shape == target.shape else ()
        sample_weight = sample_weight.detach().reshape(rows, *each)
    input = input.detach().reshape(rows, input.shape[-1])
    return _Rows(input, target.detach().reshape(rows, *outputs), sample_weight, None, 0)


def _rows_of_models(op: str, given: dict[str, Any], sample_weight: Any, offsets: Any) -> _Rows:
    """Check and return the rows of a batch of models."""
    input, _, target, _, samples, bounds = check_models(op, given, sample_weight, offsets)
    if bounds is not None and bounds.is_cpu:
        check_bounds(bounds, len(input))
    samples = None if samples is None else samples.detach()
    return _Rows(input.detach(), target.detach(), samples, offsets, -2)


def _check_optimizer(op: str, optimizer: Any, params: list[Tensor]) -> FusedStep:
    """Return the optimizer; TypeError unless it is one of ours, ValueError unless it holds exactly ``params``."""
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
    """The arguments of one call, checked; ``losses`` is the result."""

    rows: _Rows
    weight: Tensor
    bias: Tensor | None
    optimizer: FusedStep
    batch_size: int | None
    losses: Tensor

    @property
    def params(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def is_watched(self) -> bool:
        """Return whether single rounds matter to somebody, or something besides plain autograd is active."""
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
            or any(tensor is not None and tensor.is_neg() for tensor in (*self.params, *self.rows[:3]))
            or any(param._backward_hooks or param._post_accumulate_grad_hooks for param in self.params)
            or (optimizer.stacked and self.rows.dim == 0)  # the rows of one model's weight are its models
            or needs_dispatcher()
        )

    def launch(self) -> bool:
        """Run all rounds by the backend's launcher; return False, with nothing done, if none takes these."""
        launcher = getattr(implementation("linear_mse_fit", self.weight), "linear_mse_fit_rounds", None)
        if launcher is None:
            return False
        rows = self.rows
        N, D = rows.input.shape[-2:]
        weight, *bias = self.stacked_params()
        B, K, _ = weight.shape
        if 0 in (B, N, K, D):
            return False
        if capturing():
            self.optimizer._refuse_capture_of_rounds()
        samples = rows.sample_weight
        if samples is not None:
            samples = samples.reshape(-1, N, samples.shape[-1] if samples.dim() > 1 else 1)
        with torch.no_grad():
            done: bool = launcher(
                rows.input.reshape(-1, N, D),
                weight,
                rows.target.reshape(-1, N, K),
                bias[0] if bias else None,
                samples,
                rows.offsets,
                self.batch_size or N,
                self.losses.view(-1, B),
                self.update(),
            )
        if done:
            torch.autograd.graph.increment_version(self.params)
            vars(self.optimizer)["_opt_called"] = True  # for torch's schedulers
        return done

    def stacked_params(self) -> list[Tensor]:
        """Return weight (B, K, D) and bias (B, K): one model is a batch of one."""
        weight = self.weight.detach()
        weight = weight if weight.dim() == 3 else weight.view(1, weight.shape[:-1].numel(), weight.shape[-1])
        return [weight] if self.bias is None else [weight, self.bias.detach().view(weight.shape[:2])]

    def update(self) -> Update:
        """Return what the launcher does with the gradients, by itself or by ``Update.stepper``."""
        optimizer, params = self.optimizer, self.params
        groups = [
            next(group for group in optimizer.param_groups if any(param is held for held in group["params"]))
            for param in params
        ]
        states = [
            {
                key: value if key == "step" else value.view(stacked.shape)
                for key, value in optimizer._state_of(group, param).items()
            }
            for group, param, stacked in zip(groups, params, self.stacked_params(), strict=True)
        ]
        guard = optimizer._guard_of_rounds(params[0].device)
        options = [optimizer._options(group) for group in groups]
        models = optimizer._models_of_step() if optimizer.stacked else None

        def stepper(
            params: list[Tensor], grads: list[Tensor], states: Sequence[dict[str, Tensor]]
        ) -> Callable[[], None]:
            entries = zip(params, grads, states, strict=True)
            count = None if models is None else models.B
            parts = partition([Entry(i, i, *entry, None) for i, entry in enumerate(entries)], count)
            for part in parts:
                part.bucket.grads = [grads[slot] for slot in part.slots]
            return partial(_step, optimizer._operator, parts, options, guard, models)

        return Update(optimizer._operator, options, states, guard, stepper, models)

    def loop(self) -> None:
        """Run the rounds one after the other, through autograd and ``step``."""
        trained = [param for param in self.params if param.requires_grad]
        offsets = self.rows.offsets
        with _gradients_aside(self.params), torch.enable_grad():
            for t in range(len(self.losses)):
                for param in trained:
                    param.grad = None
                input, target, sample_weight = self.rows.of_round(t, self.batch_size)
                if sample_weight is not None and self.rows.dim != 0:
                    # As large as a loss of each element: no other shape could be meant.
                    models = self.weight.shape[:1] if offsets is None else ()
                    sample_weight = sample_weight.expand(*models, input.shape[-2], self.weight.shape[1])
                loss = linear_mse_loss(
                    input, self.weight, target, self.bias, sample_weight=sample_weight, offsets=offsets
                )
                self.losses[t] = loss.detach()
                loss.sum().backward(inputs=trained)
                self.optimizer.step()


def _step(
    operator: str, parts: list[Part], options: Sequence[Any], guard: Guard, models: Models | None
) -> None:
    """Make one round of an optimizer: measure, guard, clip, update."""
    if guard.norms is not None:
        norms = measure_gradients(parts, None, guard.norms.device, models)
        guard.norms.copy_(norms.sum(0, keepdim=True))
    update_parameters(operator, parts, options, guard, models)


@contextmanager
def _gradients_aside(params: list[Tensor]) -> Iterator[None]:
    """Take the parameters' gradients away inside the block, and put them back afterwards."""
    given = [param.grad for param in params]
    try:
        for param in params:
            param.grad = None
        yield
    finally:
        for param, grad in zip(params, given, strict=True):
            param.grad = grad
