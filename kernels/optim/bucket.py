"""The arguments of an optimizer's launcher: the tensors of one launch, the options of each group, the guard."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


class SGDOptions(NamedTuple):
    """The options of one parameter group of FusedSGD; tensors on a device are read there, by the kernel."""

    lr: float | Tensor
    momentum: float | Tensor  # a tensor (B,) with stacked=True alone
    dampening: float
    weight_decay: float | Tensor
    nesterov: bool
    maximize: bool


class AdamOptions(NamedTuple):
    """The options of one parameter group of FusedAdam or FusedAdamW."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float | Tensor
    decoupled: bool
    maximize: bool


@dataclass
class Bucket:
    """The tensors that one launch updates: one device, one dtype per role, one set of state keys.

    Attributes:
        params: the parameters; ``grads``: their gradients, of any floating-point dtype.
        states: by torch's state key (``momentum_buffer``; ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``;
            ``master_param``; ``step``) a list as long as ``params``; a missing key means that the update has
            no such tensor. ``step`` holds 0-d counts of the updates made; SGD keeps it only with
            dampening or stochastic rounding, and step 0 marks an uninitialised momentum buffer.
        groups: for each parameter the index of its options.
        indices: for each parameter its position in the optimizer; random numbers depend on it.
        seed: the seed of stochastic rounding, or None to round to nearest.
        memory: what a backend keeps from step to step for this bucket, such as its pointer tables.
        captured: what it kept in the course of a captured step, as long as that step's graph may be replayed.

    All tensors of one entry, ``step`` aside, have the same shape and strides, without holes or overlaps.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: dict[str, list[Tensor]]
    groups: list[int]
    indices: list[int]
    seed: int | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    captured: list[dict[str, Any]] = field(default_factory=list)


class Guard(NamedTuple):
    """Scaling, clipping and skipping: tensors from which the launch decides on the device.

    Attributes:
        grad_scale: 0-d float32; gradients are divided by it, and written back so.
        found_inf: 0-d float32; the step is skipped unless it is 0.
        norms: (n, 2) float64 (float32 on MPS): sums of squares of the unscaled gradients, and counts of
            non-finite ones; the rows are to be added.
        max_norm: gradients are multiplied by min(1, max_norm / (norm + 1e-6)) in the update; needs ``norms``.
        skip_nonfinite: whether a count above 0 skips the step; needs ``norms``.
        skipped: (1,) int64, raised by one if the step is skipped.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    norms: Tensor | None = None
    max_norm: float | None = None
    skip_nonfinite: bool = False
    skipped: Tensor | None = None


UNGUARDED = Guard()


class Models(NamedTuple):
    """The models of a stacked step; in it the options lr, weight_decay, momentum and beta may be (B,) tensors.

    In its Guard ``norms`` is (n, 2, B) and ``skipped`` (B,), and in its Bucket each state ``step`` is (B,).

    Attributes:
        B: the size of every parameter's first dimension.
        active: (B,) bool, the models that take part; None for all.
        lr_scale: (B,) factors of the learning rates, or None.
    """

    B: int
    active: Tensor | None = None
    lr_scale: Tensor | None = None


class Update(NamedTuple):
    """What the rounds of ``linear_mse_fit`` do with the gradients of weight and bias.

    Attributes:
        operator: ``"sgd"`` or ``"adam"``.
        options: of each parameter; ``states``: likewise its state tensors by torch's key, as in Bucket.
        guard: clipping and skipping; its ``norms`` are written.
        stepper: takes parameters, gradients and states, those of weight and bias or what a backend joined them to;
            gives what updates them in place, by the gradients that are there at the time.
        models: the batch that each option, state and guard is of; None where there is one of each.
    """

    operator: str
    options: Sequence[SGDOptions | AdamOptions]
    states: Sequence[dict[str, Tensor]]
    guard: Guard
    stepper: Callable[[list[Tensor], list[Tensor], Sequence[dict[str, Tensor]]], Callable[[], None]]
    models: Models | None = None

    def one_rule(self) -> bool:
        """Return whether weight and bias have the same options and step counts; values are looked at on a CPU alone."""
        options, state = self.options[0], self.states[0]
        for others, another in zip(self.options[1:], self.states[1:], strict=True):
            for a, b in zip(options, others, strict=True):
                if a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b):
                    return False
            if state.keys() != another.keys():
                return False
            if "step" in state and not (state["step"].is_cpu and torch.equal(state["step"], another["step"])):
                return False
        return True

    def table(self, device: torch.device) -> Tensor:
        """Return (parameters, options + 1, models or 1) float64 on the device: the options, then max_norm or -1."""
        max_norm = -1.0 if self.guard.max_norm is None else self.guard.max_norm
        shape = len(self.options), len(self.options[0]) + 1, 1 if self.models is None else self.models.B
        table = torch.zeros(shape, dtype=torch.float64, device=device)
        for row, options in zip(table, self.options, strict=True):
            for out, value in zip(row, (*options, max_norm), strict=True):
                if isinstance(value, Tensor):
                    out.copy_(value, non_blocking=True)
                elif value:
                    out.fill_(float(value))
        if self.models is not None and self.models.lr_scale is not None:
            table[:, 0] *= self.models.lr_scale
        return table


def mix(x: Any) -> Any:
    """Scatter 32-bit integers by a bijection: xor-shift, multiply, twice. For int, and int64 tensors."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def key_of(seed: int, index: int) -> int:
    """Return the 32 bits from which the random numbers of the parameter at ``index`` start."""
    return mix(mix((seed ^ mix(seed >> 32 & MASK)) & MASK) ^ (index & MASK))
