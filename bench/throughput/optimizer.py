"""What the optimizers' declarations share: lists of parameters, ten steps to check, one step to time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .case import Call, Case, Contender, Op, Sweep, compiled, randn

SAMPLED = 1 << 24  # elements; of more, every so-manieth is checked
MAX_NORM = 1.0

Build = Callable[[list[Tensor]], torch.optim.Optimizer]
Reference = Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]


def _copies(params: Sequence[Tensor], grads: Sequence[Tensor], clip: bool) -> list[Tensor]:
    """A contender's own parameters, with the common gradients; copies where torch's clipping writes them."""
    copies = [param.clone().requires_grad_() for param in params]
    for copy, grad in zip(copies, grads, strict=True):
        copy.grad = grad.clone() if clip else grad
    return copies


def stepper(name: str, build: Build, clip: bool = False, absent: str = "") -> Contender:
    """A contender whose call is one ``step``, after torch's clipping if ``clip``; it gives the optimizer."""

    def prepare(params: list[Tensor], grads: list[Tensor]) -> Call:
        copies = _copies(params, grads, clip)
        optimizer = build(copies)

        def call() -> Any:
            if clip:
                torch.nn.utils.clip_grad_norm_(copies, MAX_NORM)
            optimizer.step()
            return optimizer

        return call

    return Contender(name, prepare, absent)


def torch_steppers(build: Callable[..., torch.optim.Optimizer], clip: bool = False) -> list[Contender]:
    """torch's three implementations of a step, the plain loop first."""
    ways = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return [stepper(name, partial(build, **way), clip) for name, way in ways.items()]


def compiled_stepper(build: Build, shape: tuple[int, ...]) -> list[Contender]:
    """``torch.compile`` of the step, for one large tensor.

    Each optimizer compiles a program of its own: over many tensors, or over several sets of inputs, that
    takes minutes.
    """
    if shape[0] > 1 or shape[1] < 10**7:
        return []

    def prepare(params: list[Tensor], grads: list[Tensor]) -> Call:
        optimizer = build(_copies(params, grads, False))
        step = compiled("", optimizer.step).prepare()

        def call() -> Any:
            step()
            return optimizer

        return call

    return [Contender("compile", prepare, slow_start=True)]


def apex(name: str, **options: Any) -> Contender:
    """apex's optimizer of that name, where apex is installed."""
    try:
        from apex import optimizers
    except ImportError:
        return stepper("apex", torch.optim.SGD, absent="not installed")
    return stepper("apex", lambda params: getattr(optimizers, name)(params, **options))


def step_case(
    op: str,
    variant: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    contenders: tuple[Contender, ...],
    reference: Reference,
    states: tuple[str, ...],
    elements: int,
    operations: int,
    clip: bool = False,
    tensors: Sequence[tuple[int, ...]] | None = None,
    label: str | None = None,
) -> Case:
    """A step over ``shape = (how many tensors, elements of each)``, or over ``tensors`` of these shapes.

    Args:
        reference: one step in NumPy: ``(param, grad, state) -> (param, state)``.
        states: the names of the state tensors to check beside the parameters.
        elements: moved per parameter.
        operations: per parameter.
    """
    shapes = list(tensors) if tensors is not None else [shape[1:]] * shape[0]
    total = sum(int(np.prod(each)) for each in shapes)
    stride = -(-total // SAMPLED)
    steps = 1 if clip else 10

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        return tuple([randn(each, dtype, device, generator) for each in shapes] for _ in range(2))

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([value.detach().reshape(-1)[::stride] for value in values])

    def pick(optimizer: Any) -> list[Tensor]:
        params = optimizer.param_groups[0]["params"]
        return [
            joined(params),
            *(joined([optimizer.state[param][name] for param in params]) for name in states),
        ]

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
        op,
        variant,
        label or f"{shape[0]} x {shape[1]}",
        {"tensors": len(shapes), "numel": total},
        dtype,
        elements * total * dtype.itemsize,
        operations * total,
        make,
        contenders,
        expected,
        pick,
        calls=steps,
        compile=shape == (1, 10**7),
    )


def declare(name: str, build: Callable[[tuple[int, ...], torch.dtype], Iterator[Case]]) -> Op:
    """The declaration of an optimizer: how many tensors of how many elements."""
    return Op(
        name=name,
        axes=("tensors", "numel"),
        build=build,
        shapes={
            "cpu": ((1, 2), (1, 1 << 12), (1, 1 << 20), (1, 10**7), (10, 10**5), (300, 1000), (3000, 1000)),
            "cuda": ((1, 2), (1, 1 << 20), (1, 10**8), (1, 10**9), (300, 10**5), (3000, 1000), (5000, 100)),
        },
        quick={
            "cpu": ((1, 2), (1000, 1000), (1, 1 << 20), (1, 10**7)),
            "cuda": ((1, 2), (5000, 100), (1, 1 << 20), (1, 10**7), (1, 10**8)),
        },
        dtypes={
            "cpu": (torch.float32, torch.bfloat16),
            "cuda": (torch.float32, torch.bfloat16, torch.float16),
        },
        sweeps={
            "cpu": (
                Sweep("numel", tuple(10**k for k in range(3, 9)), (1, 1)),
                Sweep("tensors", tuple(10**k for k in range(5)), (1, 100)),
            ),
            "cuda": (
                Sweep("numel", tuple(10**k for k in range(3, 10)), (1, 1)),
                Sweep("tensors", tuple(10**k for k in range(5)), (1, 100)),
            ),
        },
    )
