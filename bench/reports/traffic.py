"""Count the bytes moved and the launches of every op, without a GPU: ``python -m bench traffic``.

Ours are counted at the load and store instructions of the interpreted kernels, caches ignored
(gradkernels.verify.memory_check); ``distinct`` leaves out what a launch loads again. Beside them stand the
minimum traffic (each input read once, each output written once) and what eager torch moves for the same job:
the inputs plus the outputs of each aten op, views left out. (What an op moves within itself is not seen: on
CUDA mse_loss writes the elementwise loss and reads it again, 7 elements per element with backward and not 5.)
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..throughput.case import dtype_name
from ..throughput.results import write_json


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
class Count:
    """The bytes that a job moved: ours (``distinct``: without repeated loads of a launch) and eager torch's."""

    job: Job
    launches: int
    moved: int
    distinct: int
    eager: int

    @property
    def ratio(self) -> float:
        return self.moved / self.job.minimum

    @property
    def passed(self) -> bool:
        """True if the count is within all limits of its job."""
        return (
            (self.job.limit is None or self.ratio <= self.job.limit)
            and self.distinct / self.job.minimum <= self.job.distinct_limit
            and self.launches <= self.job.launches
        )

    def record(self) -> dict[str, Any]:
        """Return the figures by name, for a JSON file."""
        job = {name: getattr(self.job, name) for name in ("name", "minimum", "limit", "distinct_limit")}
        counted = {
            name: getattr(self, name)
            for name in ("launches", "moved", "distinct", "eager", "ratio", "passed")
        }
        return job | {"launch_limit": self.job.launches} | counted


class EagerTraffic(TorchDispatchMode):
    """Counts what aten ops read and write: inputs plus outputs, each element of a tensor once."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.moved += sum(_bytes(item) for item in tree_leaves((args, kwargs, result)))
        return result


def _bytes(item: Any) -> int:
    if not isinstance(item, Tensor):
        return 0
    sizes = zip(item.shape, item.stride(), strict=True)
    elements = 1
    for size, stride in sizes:
        elements *= size if stride != 0 else min(size, 1)
    return elements * item.element_size()


def _backward(loss: Callable[..., Tensor], *inputs: Tensor, wrt: Sequence[int]) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_(i in wrt) for i, t in enumerate(inputs)]
    grad = torch.ones((), dtype=inputs[0].dtype)
    return lambda: torch.autograd.grad(loss(*leaves), [leaves[i] for i in wrt], grad)


def jobs() -> Iterator[Job]:
    """Yield the jobs of the report."""
    import gradkernels

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def plain(x: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return functional.mse_loss(functional.linear(x, w, b), y)

    # Few outputs read X once; with few rows for each SM the partial sums of many programs count: 3PK / N.
    # More outputs read it twice, and the target, and write and read the error.
    for n, d, k, dtype, twice, limit, distinct, launches in (
        (8192, 256, 1, torch.float32, False, 1.10, 1.10, 2),
        (8192, 256, 1, torch.bfloat16, False, 1.10, 1.10, 2),
        (2048, 64, 8, torch.float32, False, 1.45, 1.45, 2),
        (1024, 128, 128, torch.float32, True, None, 1.25, 4),
    ):
        inputs = [randn(*shape, dtype=dtype) for shape in ((n, d), (k, d), (n, k), (k,))]
        yield Job(
            f"linear_mse, loss and gradients of weight and bias, {n}x{d}x{k} {dtype_name(dtype)}",
            _backward(gradkernels.linear_mse_loss, *inputs, wrt=(1, 3)),
            _backward(plain, *inputs, wrt=(1, 3)),
            dtype.itemsize * (n * d + n * k + 2 * d * k + 2 * k + twice * (n * d + 2 * n * k)),
            *(limit, distinct, launches),
        )
    n = 1 << 17
    pair = randn(n), randn(n)
    eager = _backward(functional.mse_loss, *pair, wrt=(0,))
    ours = _backward(gradkernels.mse_loss, *pair, wrt=(0,))
    yield Job(f"mse, loss and backward through autograd, {n} float32", ours, eager, 4 * 5 * n, 1.01, 1.01, 3)
    ours = partial(gradkernels.mse_loss_and_grad, *pair)
    yield Job(f"mse_loss_and_grad, {n} float32", ours, eager, 4 * 3 * n, 1.01, 1.01, 2)
    for m, k, n, limit in ((4096, 16, 8, 1.20), (256, 256, 256, None)):
        pair = randn(m, k), randn(k, n)
        ours, eager = partial(gradkernels.matmul, *pair), partial(torch.matmul, *pair)
        minimum = 4 * (m * k + k * n + m * n)
        yield Job(f"matmul, {m}x{k} @ {k}x{n} float32", ours, eager, minimum, limit, 1.01, 1)
    yield from _optimizer_jobs(randn)


def _optimizer_jobs(randn: Callable[..., Tensor]) -> Iterator[Job]:
    import gradkernels

    shapes = [(1 << 16,), (300, 41), (1000,)] + [(64,)] * 20
    count = sum(torch.Size(shape).numel() for shape in shapes)
    table: list[tuple[str, type, type, dict[str, Any], int, int]] = [
        ("adam", gradkernels.FusedAdam, torch.optim.Adam, {}, 28, 1),
        ("adamw, clipped", gradkernels.FusedAdamW, torch.optim.AdamW, {"max_norm": 1.0}, 32, 2),
        ("sgd", gradkernels.FusedSGD, torch.optim.SGD, {"lr": 0.1}, 12, 1),
        ("sgd, momentum", gradkernels.FusedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 20, 1),
    ]
    for name, ours, theirs, options, per_element, launches in table:
        plain = {key: value for key, value in options.items() if key != "max_norm"}
        steps = []
        for cls, chosen in ((ours, options), (theirs, {**plain, "foreach": False})):
            params = [randn(*shape).requires_grad_() for shape in shapes]
            optimizer = cls(params, **chosen)
            for param in params:
                param.grad = randn(*param.shape)
            optimizer.step()  # the first step makes the state
            if cls is theirs and "max_norm" in options:
                steps.append(_clipped(params, options["max_norm"], optimizer))
            else:
                steps.append(optimizer.step)
        job = f"{name} step, {len(shapes)} tensors, {count} float32 parameters"
        yield Job(job, *steps, per_element * count, 1.02, 1.02, launches)


def _clipped(params: list[Tensor], max_norm: float, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=False)
        optimizer.step()

    return step


def count(job: Job) -> Count:
    """Run a job both ways and count."""
    import gradkernels
    from gradkernels.verify import memory_check

    with gradkernels.use_backend("triton"), memory_check() as report:
        job.ours()
    with EagerTraffic() as eager:
        job.eager()
    moved = report.loaded + report.stored
    return Count(job, report.launches, moved, moved - report.reread, eager.moved)


HEADER = ("job", "launches", "moved", "distinct", "minimum", "moved / minimum", "eager / ours", "limits")


def _row(c: Count) -> tuple[str, ...]:
    job = c.job
    limits = (
        f"{'-' if job.limit is None else job.limit} ({job.distinct_limit} distinct), {job.launches} launches"
    )
    numbers = (f"{value:,}" for value in (c.launches, c.moved, c.distinct, job.minimum))
    ratios = f"{c.ratio:.3f}", f"{c.eager / c.moved:.2f}"
    return job.name, *numbers, *ratios, limits if c.passed else f"OVER: {limits}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m bench traffic", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        parser.error("counting traffic needs the triton package (pip install triton)")
    if os.environ.get("TRITON_INTERPRET") != "1":  # it must be set before triton is first imported
        command = [sys.executable, "-m", __spec__.name, *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    from gradkernels.verify.console import print_table

    counts = [count(job) for job in jobs()]
    print_table(HEADER, [_row(c) for c in counts])
    if arguments.json is not None:
        write_json([c.record() for c in counts], arguments.json)
    return 0 if all(c.passed for c in counts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
