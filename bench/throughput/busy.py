"""``python -m bench --busy``: the CPU while every core has something else to do, as beside a data loader.

Ours and plain torch take turns, call by call, and every other call of torch's is held against the rest: how far
torch is from itself is what the machine adds. The total time counts stalls (a thread that waits for another which
is not running), which a median hides.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .case import Call, Case, Results
from .console import Cell, Screen, number, times

FLOOR = 0.9
COLUMNS = ("case", "ours us", "torch us", "median", "total", "torch/torch", "total")
# Ends by itself when its parent does.
SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**5))"


class Found(NamedTuple):
    """Seconds of each call: ours, and torch's, every other one apart."""

    ours: list[float]
    first: list[float]
    second: list[float]

    def ratios(self) -> dict[str, float]:
        """Return how many times faster than torch in the median and in total; the same of torch against itself."""
        torchs = self.first + self.second
        return {
            "median": _median(torchs) / _median(self.ours),
            "total": sum(torchs) / sum(self.ours),
            "median_self": _median(self.first) / _median(self.second),
            "total_self": sum(self.first) / sum(self.second),
        }

    def slower(self) -> bool:
        """Return whether ours is below FLOOR in the median or in total, beyond what torch varies against itself."""
        found = self.ratios()
        return any(
            found[kind] < FLOOR * min(found[f"{kind}_self"], 1 / found[f"{kind}_self"])
            for kind in ("median", "total")
        )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


@contextlib.contextmanager
def spinning(processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep so many processes busy inside the block."""
    spinners = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(processes)]
    try:
        yield spinners
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def interleaved(ours: Call, plain: Call, seconds: float, rounds: int = 5) -> Found:
    """Time ours and torch's in turns, for about so long and at least so many rounds of two calls each."""
    found = Found([], [], [])
    turns = ((ours, found.ours), (plain, found.first), (ours, found.ours), (plain, found.second))
    ours()
    plain()
    stop = time.perf_counter() + seconds
    while len(found.first) < rounds or time.perf_counter() < stop:
        for call, taken in turns:
            start = time.perf_counter()
            result: Results | None = call()
            taken.append(time.perf_counter() - start)
            del result  # freeing it is no part of the next call
    return found


def run(cases: Sequence[Case], seconds: float, screen: Screen) -> int:
    """Time and print all cases with one spinning process per core; gives 1 if a case of ours is slower than torch's."""
    rows: list[list[Cell]] = []
    slower = False
    with spinning(cores()), screen.progress(len(cases)) as advance:
        for case in cases:
            advance(case.name)
            inputs = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
            found = interleaved(*(each.prepare(*inputs) for each in case.implementations[:2]), seconds)
            ratios = found.ratios()
            rows.append(
                [
                    (case.name, "bad" if found.slower() else ""),
                    *(number(1e6 * _median(taken)) for taken in (found.ours, found.first + found.second)),
                    *(times(ratios[key]) for key in ("median", "total")),
                    *((f"{ratios[key]:.2f}", "dim") for key in ("median_self", "total_self")),
                ]
            )
            slower = slower or found.slower()
    screen.table(f"{cores()} spinning processes, {torch.get_num_threads()} threads", COLUMNS, rows)
    return int(slower)
