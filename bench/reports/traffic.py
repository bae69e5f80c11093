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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from gradkernels.ops import OPS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..throughput.results import claimed, write_json
from .cases import Job


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
        """Return whether the count is within all limits of its job."""
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


def jobs() -> Iterator[Job]:
    """Yield the jobs of the report."""
    for name in OPS:
        yield from import_module(f"..bench_{name}", __package__).traffic_jobs()


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
    parser.add_argument("--json", type=claimed, metavar="FILE", help="write the figures here as well")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        parser.error("counting traffic needs the triton package (pip install triton)")
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from gradkernels.verify.console import print_table

    counts = [count(job) for job in jobs()]
    print_table(HEADER, [_row(c) for c in counts])
    if arguments.json is not None:
        write_json([c.record() for c in counts], arguments.json)
    return 0 if all(c.passed for c in counts) else 1
