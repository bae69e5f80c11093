"""A benchmark with planted faults, over the CPU: ``python tests/bench/planted.py FOLDER [options]``.

Each case has one of FAULTS: what happens in which implementation. The process without ``--under`` supervises.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from bench import __main__ as cli
from bench.throughput import machine, session, timing
from bench.throughput.case import OURS, Case, Op, Results, function

FOLDER, *ARGUMENTS = sys.argv[1:]
ILLEGAL = "CUDA error: an illegal memory access was encountered"
SPOILT: list[str] = []


def spoil() -> None:
    SPOILT.append(ILLEGAL)
    synchronize()


def synchronize() -> None:
    if SPOILT:
        raise RuntimeError(SPOILT[0])


FAULTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "none": ("", str),
    "ours crashes": (OURS, lambda: os.kill(os.getpid(), signal.SIGSEGV)),
    "rival is killed": ("rival", lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "rival hangs": ("rival", lambda: time.sleep(600)),
    "eager spoils": ("eager", spoil),
    "inputs spoil": ("inputs", lambda: SPOILT.append(ILLEGAL)),  # which the first implementation learns
    "no fault": ("", str),
}


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    fault = list(FAULTS)[shape[0] - 1]
    where, happens = FAULTS[fault]

    def run(name: str, values: torch.Tensor) -> Results:
        with Path(FOLDER, "calls").open("a") as file:
            print(fault, name, sep=": ", file=file)
        if name == where:
            happens()
        return [2 * values]

    def make(_: torch.device, generator: torch.Generator) -> tuple[torch.Tensor]:
        if where == "inputs":
            happens()
        return (torch.randn(8, generator=generator),)

    def job(name: str) -> Any:
        return function(name, lambda values: run(name, values))

    yield Case(
        "planted",
        fault,
        str(shape[0]),
        {"n": shape[0]},
        dtype,
        8,
        1,
        make,
        tuple(map(job, (OURS, "eager", "rival"))),
        lambda values: [2 * values],
    )


def timer_for(device: torch.device) -> timing.WallTimer:
    made = timing.WallTimer(device, least=1e-9)
    made.synchronize = synchronize
    return made


if __name__ == "__main__":
    session.PROGRAM = (__file__, FOLDER)
    session.GRACE = 15.0
    session.SHARE = 0.0
    if not any(each.startswith("--under") for each in ARGUMENTS):
        sys.exit(session.supervise(ARGUMENTS, time.monotonic(), 300.0))
    shapes = " ".join(str(n + 1) for n in range(len(FAULTS)))
    cli.declared = lambda names: [Op("planted", ("n",), build, shapes, {"cpu": (torch.float32,)})]
    timing.timer_for = timer_for
    timing.ROUNDS = 1
    machine.measure_rates = lambda *given: {"copy": 1e10, "matmul": {"float32": 1e11}}
    sys.exit(cli.main([*ARGUMENTS, "--device=cpu", "--seconds=1e-9", f"--json={FOLDER}/bench.json"]))
