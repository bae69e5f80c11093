"""The cases of the optimizers: lists of parameters, ten steps to check, one step to time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reports.optimizer import launch_step
from .case import OURS, Call, Case, Implementation, Op, Sweep, compiled, draw_inputs, powers

SAMPLED = 1 << 24  # elements; of a longer list evenly spaced ones are checked
MAX_NORM = 1.0
SHORT = 64  # numbers; a list of shorter tensors is a batch of models
MODELS = 2000  # of more, an optimizer or a group for each takes minutes

Build = Callable[[list[Tensor]], torch.optim.Optimizer]
Reference = Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]


def _copies(params: Sequence[Tensor], grads: Sequence[Tensor], clip: bool) -> list[Tensor]:
    """Copy the parameters for one implementation; gradients are shared unless torch's clipping writes them."""
    copies = [param.clone().requires_grad_() for param in params]
    for copy, grad in zip(copies, grads, strict=True):
        copy.grad = grad.clone() if clip else grad
    return copies


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return those of all groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def stepper(name: str, build: Build, clip: bool = False, absent: str = "") -> Implementation:
    """Make an implementation whose call is one ``step``, after torch's clipping if ``clip``."""

    def prepare(params: list[Tensor], grads: list[Tensor]) -> Call:
        copies = _copies(params, grads, clip)
        optimizer = build(copies)

        def call() -> Any:
            if clip:
                torch.nn.utils.clip_grad_norm_(copies, MAX_NORM)
            optimizer.step()
            return [optimizer]

        return call

    return Implementation(name, prepare, absent)


def torch_steppers(build: Callable[..., torch.optim.Optimizer], clip: bool = False) -> list[Implementation]:
    """Make torch's three implementations of a step, the plain loop first."""
    ways = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return [stepper(name, partial(build, **way), clip) for name, way in ways.items()]


def compiled_stepper(build: Build, shape: tuple[int, ...]) -> list[Implementation]:
    """Make an implementation that compiles the step, if the case is one large tensor: over many it takes minutes."""
    if shape[0] > 1 or shape[1] < 10**7:
        return []

    def prepare(params: list[Tensor], grads: list[Tensor]) -> Call:
        optimizer = build(_copies(params, grads, False))
        step = compiled("", optimizer.step).prepare()

        def call() -> Any:
            step()
            return [optimizer]

        return call

    return [Implementation("compile", prepare, slow_start=True, per_set=True)]


def apex(name: str, **options: Any) -> Implementation:
    """Make an implementation of apex's optimizer of that name; absent where apex is not installed."""
    try:
        from apex import optimizers
    except ImportError:
        return stepper("apex", torch.optim.SGD, absent="not installed")
    return stepper("apex", lambda params: getattr(optimizers, name)(params, **options))


def step_case(
    op: str,
    variant: str,
    tensors: Sequence[tuple[int, ...]],
    label: str,
    dtype: torch.dtype,
    implementations: Sequence[Implementation],
    reference: Reference,
    states: tuple[str, ...],
    per_parameter: tuple[int, int],
    clip: bool = False,
) -> Case:
    """Make the case of one step over parameters of the shapes ``tensors``.

    Args:
        reference: one step in NumPy: ``(param, grad, state) -> (param, state)``.
        states: the names of the state tensors to check beside the parameters.
        per_parameter: elements moved and operations done for each parameter.
    """
    total = sum(map(math.prod, tensors))
    stride = -(-total // SAMPLED)
    steps = 1 if clip else 10

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([value.detach().reshape(-1)[::stride] for value in values])

    def pick(optimizers: Any) -> list[Tensor]:
        found = [
            (param, *(optimizer.state[param][name] for name in states))
            for optimizer in optimizers
            for param in parameters(optimizer)
        ]
        return [joined(values) for values in zip(*found, strict=True)]

    def expected(params: list[np.ndarray], grads: list[np.ndarray]) -> list[np.ndarray]:
        param, grad = (
            np.concatenate([each.reshape(-1)[::stride] for each in part]) for part in (params, grads)
        )
        if clip:
            norm = np.sqrt(sum(float(np.square(each).sum()) for each in grads))
            grad = grad * min(1.0, MAX_NORM / (norm + 1e-6))
        state: dict[str, np.ndarray] = {}
        for _ in range(steps):
            param, state = reference(param, grad, state)
        return [param, *(state[name] for name in states)]

    return Case(
        op=op,
        variant=variant,
        label=label,
        sizes={"tensors": len(tensors), "numel": total},
        dtype=dtype,
        bytes=per_parameter[0] * total * dtype.itemsize,
        flops=per_parameter[1] * total,
        make=draw_inputs(dtype, lambda randn: tuple([randn(*each) for each in tensors] for _ in range(2))),
        implementations=tuple(implementations),
        reference=expected,
        pick=pick,
        calls=steps,
        compile=list(tensors) == [(10**7,)],
        launch=partial(launch_step, op, states, tensors, dtype, clip),
    )


def is_stack(shape: tuple[int, ...]) -> bool:
    """Return whether a shape stands for a batch of short models and not for a list of tensors."""
    return shape[0] > 1 and shape[1] < SHORT


def stacked_case(
    op: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    ours: Callable[..., torch.optim.Optimizer],
    theirs: Callable[..., torch.optim.Optimizer],
    reference: Reference,
    states: tuple[str, ...],
    per_parameter: tuple[int, int],
    **options: Any,
) -> Case:
    """Make the case of one step over a batch of models, each by a rate of its own, beside what torch offers.

    All rates are equal, so that torch's one rate for the whole stack must give the same numbers.

    Args:
        shape: models and numbers of each.
        ours, theirs: the classes.
        reference, states, per_parameter: as for ``step_case``; beside them of each model the step and the rate move.
        options: of both and of the reference; ``lr`` among them.
    """
    models, numel = shape

    def stacked(stack: Tensor) -> list[torch.optim.Optimizer]:
        rates = torch.full(shape[:1], options["lr"], device=stack.device)
        return [ours([stack.clone().requires_grad_()], stacked=True, **{**options, "lr": rates})]

    def at_one_rate(stack: Tensor, **way: bool) -> list[torch.optim.Optimizer]:
        return [theirs([stack.clone().requires_grad_()], **options, **way)]

    def groups(stack: Tensor) -> list[torch.optim.Optimizer]:
        return [
            theirs([{"params": [row.clone().requires_grad_()]} for row in stack], foreach=True, **options)
        ]

    def loop(stack: Tensor) -> list[torch.optim.Optimizer]:
        return [theirs([row.clone().requires_grad_()], foreach=False, **options) for row in stack]

    def implementation(
        name: str, make: Callable[[Tensor], list[torch.optim.Optimizer]], absent: str = ""
    ) -> Implementation:
        def prepare(stacks: list[Tensor], grads: list[Tensor]) -> Call:
            optimizers = make(stacks[0])
            params = [param for optimizer in optimizers for param in parameters(optimizer)]
            for param, grad in zip(params, grads if len(params) == 1 else grads[0], strict=True):
                param.grad = grad

            def call() -> Any:
                for optimizer in optimizers:
                    optimizer.step()
                return optimizers

            return call

        return Implementation(name, prepare, absent)

    too_many = f"over {MODELS} models" if models > MODELS else ""
    implementations = (
        implementation(OURS, stacked),
        implementation("one rate, loop", partial(at_one_rate, foreach=False)),
        implementation("one rate, fused", partial(at_one_rate, fused=True)),
        implementation("group per model", groups, too_many),
        implementation("optimizer per model", loop, too_many),
    )
    step, label = partial(reference, **options), f"{models} models x {numel}"
    case = step_case(op, "stacked", [shape], label, dtype, implementations, step, states, per_parameter)
    return replace(
        case,
        sizes={"tensors": models, "numel": models * numel},
        bytes=case.bytes + 12 * models,
        launch=partial(launch_step, op, states, [shape], dtype, stacked=True),
    )


def declare(name: str, build: Callable[[tuple[int, ...], torch.dtype], Iterator[Case]]) -> Op:
    """Declare an optimizer; its axes are the number of tensors and the elements of each."""
    return Op(
        name,
        ("tensors", "numel"),
        build,
        """
        *1x2 1x4096@cpu *1000x1000@cpu 10x1e5@cpu 300x1000@cpu 300x1e5@cuda 3000x1000 *5000x100@cuda
        *1000x8 *1e6x3 1e7x3@cuda
        *1x2^20 *1x1e7 *1x1e8@cuda 1x1e9@cuda
        """,
        dtypes={
            "cpu": (torch.float32, torch.bfloat16),
            "cuda": (torch.float32, torch.bfloat16, torch.float16),
        },
        sweeps={
            device: (
                Sweep("numel", powers(10, 3, last), (1, 1)),
                Sweep("tensors", powers(10, 0, 4), (1, 100)),
            )
            for device, last in (("cpu", 8), ("cuda", 9))
        },
    )
