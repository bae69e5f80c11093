"""A clock that moves on when told, a proxy of torch.cuda on it, and cases that take time of it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.throughput import results
from bench.throughput.case import OURS, Case, Implementation, function
from bench.throughput.runner import Runner
from bench.throughput.timing import WallTimer

CPU = torch.device("cpu")

TINY = {
    "matmul": [(1, 3, 65, 1), (4, 2, 3, 5)],
    "mse": [(1,), (1000,)],
    "linear_mse_models": [(3, 7, 3, 1), (2, 5, 4, 3)],
    "linear_mse": [(63, 3, 1), (10, 4, 3)],
    "linear_mse_fit": [(1, 7, 3, 1), (2, 5, 4, 2)],
    "sgd": [(3, 65), (5, 3)],
    "adam": [(3, 65), (5, 3)],
    "training": [("regression", 4, 2), ("mlp", 9), ("block", 4, 1)],
}
LIMITS = {"copy": 1e10, "matmul": {"float32": 1e11}}


class Clock:
    """Seconds that pass only when someone lets them; launches are free of charge while a graph is captured."""

    def __init__(self) -> None:
        self.now, self.capturing = 0.0, False

    def __call__(self) -> float:
        self.now += 1e-9  # reading it takes a moment, or loops until a time would never end
        return self.now

    def work(self, us: float, launch_us: float = 0.0) -> None:
        self.now += 1e-6 * (us + (0.0 if self.capturing else launch_us))


class RealClock(Clock):
    """The true time, and what was added to it."""

    def __call__(self) -> float:
        return time.perf_counter() + self.now


class FakeCuda:
    """What ``CudaTimer`` uses of ``torch.cuda``, on a Clock."""

    class OutOfMemoryError(RuntimeError):
        pass

    def __init__(self, clock: Clock, cache_bytes: int = 1 << 10) -> None:
        self.clock, self.cache_bytes, self.log = clock, cache_bytes, []

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=self.cache_bytes)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def Event(self, enable_timing: bool) -> SimpleNamespace:  # noqa: N802
        assert enable_timing
        event = SimpleNamespace(at=None, synchronize=self.synchronize)
        event.record = lambda: setattr(event, "at", self.clock())
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def Stream(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))

    current_stream = Stream

    def stream(self, stream: SimpleNamespace) -> Any:
        return nullcontext()

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        graph = SimpleNamespace(seconds=0.0)
        graph.replay = lambda: setattr(self.clock, "now", self.clock.now + graph.seconds)
        return graph

    @contextmanager
    def graph(self, graph: SimpleNamespace) -> Iterator[None]:
        self.clock.capturing, start = True, self.clock()
        yield
        self.clock.capturing, graph.seconds = False, self.clock() - start


def noise(seed: int, size: float) -> Callable[[], float]:
    """Factors around 1."""
    numbers = np.random.default_rng(seed)
    return lambda: float(1 + size * numbers.uniform(-1, 1))


def doubling(
    clock: Clock,
    us: float = 100.0,
    plain_us: float = 150.0,
    factor: float = 2.0,
    jitter: Callable[[], float] = lambda: 1.0,
    run: Callable[[torch.Tensor], torch.Tensor] | None = None,
    extra: tuple[Implementation, ...] = (),
    n: int = 1000,
) -> Case:
    """A case whose job is to double a tensor, in so many microseconds of the clock."""

    def job(factor: float, us: float) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        def call(values: torch.Tensor) -> list[torch.Tensor]:
            clock.work(us * jitter(), launch_us=5.0)
            return [values * factor]

        return call

    def planted(values: torch.Tensor) -> list[torch.Tensor]:
        clock.work(us)
        return [run(values)]

    return Case(
        "doubling",
        "forward",
        str(n),
        {"n": n},
        torch.float32,
        8 * n,
        n,
        lambda device, generator: (torch.randn(n, generator=generator),),
        (function(OURS, planted if run else job(factor, us)), function("eager", job(2.0, plain_us)), *extra),
        lambda values: [2 * values],
    )


def wall(clock: Clock) -> WallTimer:
    timer = WallTimer(CPU, clock)
    timer.cache_bytes = 1 << 14
    return timer


def document(*cases: Case, clock: Clock, **more: Any) -> dict[str, Any]:
    runner = Runner(CPU, wall(clock), seconds=0.003, quick=True)
    header = {"device": "a clock", "date": "today", "commit": "none", "fp32_precision": "none"}
    versions = dict.fromkeys(("torch", "triton", "numpy", "python", "gradkernels"), "1")
    return {
        "schema": results.SCHEMA,
        "machine": header | versions,
        "limits": LIMITS,
        "cases": [runner.case(case) for case in cases],
        **more,
    }


class Benchmark:
    """pytest-benchmark's fixture, for one call."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.calls = None, {}, 0

    def __call__(self, run: Callable[[], None]) -> None:
        run()
        self.calls += 1
