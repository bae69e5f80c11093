"""Predict what each case of the benchmark takes on an H200, without one: ``python -m bench aot --predict``.

Each case's own calls are made on tensors without memory, compiled for sm_90 and launched by nobody. Of each kernel are
known then the programs of its grid, the bytes of the tensors that it is given, and from its machine code the registers,
the shared memory and the loads of a program. By Little's law a launch of P programs, of which R are resident, moves

    R       = min(P, SMs x programs that fit an SM)
    rate    = min(R x bytes that a program has in flight / latency, copy rate)
    seconds = max(bytes / rate, ceil(P / (SMs x programs that fit an SM)) x latency)

and a case takes the sum over its launches, or its arithmetic if that takes longer. A program has in flight what its
widest loads ask for, each once: what a compiler keeps apart, and what waits for a branch, is counted too, and what a
launch takes to begin and to end is not. So the figures are lower bounds of the time. They were not measured.
"""

import argparse
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from gradkernels.ops import OPS

from ..throughput.case import Case
from .aot import Row, fill


class Gpu(NamedTuple):
    """What a prediction needs to know of a GPU.

    Attributes:
        target: what is compiled for. sms: multiprocessors.
        copy_rate, cache_rate: bytes per second from memory and from the second-level cache, of all SMs together.
        latency, cache_latency: seconds from a load to its value, under load.
        registers, shared, threads, programs: of an SM.
        reserved: bytes of shared memory that each program takes besides its own.
        vector_flops, matrix_flops: per second, by the bytes of an element.
    """

    target: str
    sms: int
    copy_rate: float
    cache_rate: float
    latency: float
    cache_latency: float
    registers: int
    shared: int
    threads: int
    programs: int
    reserved: int
    vector_flops: dict[int, float]
    matrix_flops: dict[int, float]


# SMs, memory and FLOPs: NVIDIA's data sheet of the H200 SXM (4.8 TB/s, of which a copy reaches 0.9; dense; three tf32
# products for one of float32). An SM: CUDA programming guide, compute capability 9.0. Latencies are assumed: at
# 1.755 GHz 1400 cycles of memory, where requests queue, and 260 of the cache. Cache: 40 GB/s an SM, as in the table of
# bounds of bench/README.md.
H200 = Gpu(
    "sm_90", 132, 4.3e12, 132 * 40e9, 0.8e-6, 0.15e-6, 65536, 228 << 10, 2048, 32, 1 << 10,
    {8: 34e12, 4: 67e12, 2: 67e12}, {8: 67e12, 4: 165e12, 2: 989e12},
)  # fmt: skip


_LIBRARY = torch.library.Library("gradkernels", "FRAGMENT")


@dataclass(frozen=True)
class Predicted:
    """One launch.

    Attributes:
        kernel: what it compiled to.
        programs: of its grid; resident: how many an SM holds.
        bytes: that it moves.
    """

    kernel: Row
    programs: int
    bytes: int

    def resident(self, gpu: Gpu) -> int:
        """Return how many programs fit an SM."""
        row = self.kernel
        # Registers are given to warps by 256, and each quarter of an SM has its own.
        of_warp = max(256, -(-row.registers * 32 // 256) * 256)
        return min(
            gpu.programs,
            gpu.threads // (32 * row.warps),
            4 * (gpu.registers // 4 // of_warp) // row.warps,
            gpu.shared // (row.shared + gpu.reserved),
        )

    def in_flight(self) -> int:
        """Return the bytes that a program has asked for at once: those of its widest loads, if there is room."""
        row = self.kernel
        if "tensor" in row.loads:  # copies of whole tiles, which fill its shared memory
            return row.shared
        bits = max(map(int, row.loads), default=0)
        room = row.registers * 32 * row.warps * 4 + row.shared
        return min(row.loads.get(str(bits), 0) * bits // 8 * 32 * row.warps, room)

    def waves(self, gpu: Gpu) -> int:
        return -(-self.programs // (gpu.sms * self.resident(gpu)))

    def at_once(self, gpu: Gpu) -> int:
        """Return the bytes that all resident programs have in flight."""
        return min(self.programs, gpu.sms * self.resident(gpu)) * self.in_flight()

    def seconds(self, gpu: Gpu, passes: int = 1) -> float:
        """Return what the launch takes; its programs read their bytes so often: from memory once, then the cache."""

        def once(latency: float, most: float) -> float:
            rate = min(self.at_once(gpu) / latency, most)
            return max(self.bytes / rate if rate else 0.0, self.waves(gpu) * latency)

        return once(gpu.latency, gpu.copy_rate) + (passes - 1) * once(gpu.cache_latency, gpu.cache_rate)

    def is_bound_by_latency(self, gpu: Gpu) -> bool:
        """Return whether a pass takes longer than its bytes do at the copy rate."""
        return self.seconds(gpu) > 1.001 * self.bytes / gpu.copy_rate


@dataclass(frozen=True)
class Prediction:
    """One case."""

    case: str
    minimum: int
    flops: int
    itemsize: int
    passes: int
    launches: list[Predicted]

    def arithmetic(self, gpu: Gpu) -> float:
        """Return the seconds of arithmetic."""
        matrix = any(launch.kernel.matrix for launch in self.launches)
        return self.flops / (gpu.matrix_flops if matrix else gpu.vector_flops)[self.itemsize]

    def memory(self, gpu: Gpu) -> float:
        """Return the seconds of loads and stores."""
        return sum(launch.seconds(gpu, self.passes) for launch in self.launches)

    def cells(self, gpu: Gpu) -> list[str]:
        """Return its row of the table; programs, waves and bytes in flight are those of the longest launch."""
        longest = max(self.launches, key=lambda launch: launch.seconds(gpu, self.passes))
        resident = longest.resident(gpu)
        on_each = min(resident, -(-longest.programs // gpu.sms))
        memory, arithmetic = self.memory(gpu), self.arithmetic(gpu)
        moved = sum(launch.bytes for launch in self.launches)
        bound = "latency" if longest.is_bound_by_latency(gpu) else "copy rate"
        return [
            self.case,
            str(len(self.launches)),
            f"{longest.kernel.registers}",
            f"{longest.programs} / {resident} / {longest.waves(gpu)}",
            f"{on_each * longest.in_flight() / 1024:.1f}",
            f"{moved / 1e6:.4g} / {self.minimum / 1e6:.4g}",
            f"{max(memory, arithmetic) * 1e6:.3g}",
            "arithmetic" if arithmetic > memory else bound,
        ]


HEADER = (
    "case", "launches", "registers", "programs / of an SM / waves", "KB in flight an SM", "MB moved / least",
    "*predicted* us", "bound by",
)  # fmt: skip


def prepare(gpu: Gpu) -> None:
    """Let Triton's kernels serve tensors without memory, for the rest of the process, and launch nothing."""
    import triton
    from gradkernels.operator import OPERATORS
    from gradkernels.triton.compile_only import null_driver

    driver = null_driver(gpu.target, [])
    driver.get_active_torch_device = lambda: torch.device("meta")
    triton.runtime.driver.set_active(driver)
    for op in OPS.values():
        op.function()  # its module registers its operators
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that another implementation was there
        for operator in OPERATORS:
            _LIBRARY.impl(operator.name, operator.launch, "Meta", allow_override=True)


def predict(case: Case) -> Prediction:
    """Return the launches of a case; ``prepare`` comes first."""
    from gradkernels import backends
    from gradkernels.explain import moved
    from gradkernels.triton.launch import recorded_by

    recorded: list[tuple[Row, int, int]] = []

    def launched(compiled: Any, _: Any, grid: tuple[int, ...], args: tuple[Any, ...], device: Any) -> None:
        meta = compiled.metadata
        row = Row(case.op, case.label, "", "", meta.name, shared=meta.shared, warps=meta.num_warps)
        fill(compiled, row)
        recorded.append((row, math.prod(grid), moved(args)))

    with recorded_by(SimpleNamespace(launched=launched)), backends.use_backend("triton"):
        if case.launch is None:
            case.implementations[0].prepare(*case.make(torch.device("meta"), torch.Generator()))()
            sizes = [size for *_, size in recorded]
        else:
            sizes = list(case.launch())
    launches = [Predicted(row, count, size) for (row, count, _), size in zip(recorded, sizes, strict=True)]
    return Prediction(case.name, case.bytes, case.flops, case.dtype.itemsize, case.passes, launches)


def _job(arguments: argparse.Namespace) -> list[Prediction]:
    from ..__main__ import cases_of, declared

    os.environ.pop("TRITON_INTERPRET", None)
    prepare(H200)
    return [predict(case) for case in cases_of(declared([arguments.op]), arguments, "cuda")]


def predictions(
    ops: Sequence[str], dtype: str, shapes: Sequence[str] = (), workers: int = 2
) -> Iterator[Prediction]:
    """Yield what is predicted for the cases of ``--quick`` on CUDA, or for those of these shapes."""
    chosen = {"dtype": [dtype], "shape": list(shapes), "quick": True}
    jobs = [argparse.Namespace(op=op, **chosen) for op in ops]
    with get_context("spawn").Pool(min(workers, len(jobs)), maxtasksperchild=1) as pool:
        for found in pool.imap(_job, jobs, chunksize=1):
            yield from found


def main(op: str, dtype: str, shapes: Sequence[str]) -> int:
    """Print the table, as Markdown."""
    head = f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}\n"  # not before what may be refused
    for prediction in predictions([op] if op else list(OPS), dtype or "float32", shapes):
        print(f"{head}| {' | '.join(prediction.cells(H200))} |", flush=True)
        head = ""
    return 0
