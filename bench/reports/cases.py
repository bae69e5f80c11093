"""The vocabulary of the reports: what a ``bench_<op>.py`` declares for them, beside its ``OP``.

``AOT_CASES``: the calls that the compiler is shown. ``traffic_jobs()``: what the bytes are counted of. ``HOST_CALLS``:
of a function, the calls whose cost on the host is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[Any, torch.dtype], object]  # takes the module of the op and a dtype
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
device: torch.device | str = (
    "meta"  # of the tensors of ``AOT_CASES``; a test that launches sets one with memory
)
_generator = torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class AotCase:
    """One call of an op's own launchers, representative of a class of shapes.

    The tensors are without memory (torch's meta device); the optimizers, whose tables hold addresses, take small
    ones of the CPU. Nothing is launched.

    Attributes:
        op: the module under ``kernels/triton``.
        shapes: the class of shapes it stands for.
        call: makes the call, given the module and a dtype.
        loads, stores: whether the first kernel of the call has large operands and results whose shapes and
            addresses allow 128 bits at a time.
        dtypes: that it is compiled for.
    """

    op: str
    shapes: str
    call: Call
    loads: bool = True
    stores: bool = True
    dtypes: tuple[torch.dtype, ...] = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """Make a tensor without memory."""
    return torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class Job:
    """One computation whose traffic is counted.

    Attributes:
        name: op, shape and dtype.
        ours, eager: the same job by gradkernels and by plain torch.
        minimum: bytes that must move at least.
        limit: what ours may move at most, relative to ``minimum``; None where tiles are read from cache
            many times, and only the distinct bytes say something.
        distinct_limit: likewise for the distinct bytes.
        launches: how many ours may make at most.
    """

    name: str
    ours: Callable[[], Any]
    eager: Callable[[], Any]
    minimum: int
    limit: float | None
    distinct_limit: float
    launches: int


@dataclass(frozen=True)
class HostCall:
    """A call on tensors so small that arithmetic hardly counts.

    Attributes:
        name: of the public function.
        ours, theirs: the same by gradkernels and by torch.
        shapes: of the tensor arguments.
    """

    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw normal random numbers on the CPU, the same in each run."""
    return torch.randn(shape, generator=_generator).to(dtype)


def gradients(
    loss: Callable[..., Tensor], *inputs: Tensor, wrt: Sequence[int], dtype: torch.dtype | None = None
) -> Callable[[], Any]:
    """Return the gradients of a loss, of ``dtype`` if it is not of its first input's."""
    leaves = [t.detach().requires_grad_(i in wrt) for i, t in enumerate(inputs)]
    grad = torch.ones((), dtype=inputs[0].dtype if dtype is None else dtype)
    return lambda: torch.autograd.grad(loss(*leaves), [leaves[i] for i in wrt], grad)
