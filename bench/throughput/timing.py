"""Time a call: synchronised wall clock on CPU, MPS and XPU; events and graph replay on CUDA and ROCm.

Implementations are timed in turns, round after round, so that a machine that slows down slows them all. Every
round keeps its median: their range is the noise that ``compare`` takes into account.
"""

import gc
import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from .case import Call
from .memory import settle

ROUNDS = 7
MAX_SETS = 64  # sets of inputs to rotate; a job so small that they still fit into the cache is timed warm
MAX_FLUSHES = 512  # in a row: a device's queue holds about twice as many

Sampler = Callable[[], float]


def summarise(rounds: Sequence[Sequence[float]], method: str) -> dict[str, Any]:
    """Summarise samples in seconds, grouped by round: median and percentiles of all, the median of each round."""
    p20, median, p80 = np.percentile([1e6 * sample for samples in rounds for sample in samples], (20, 50, 80))
    return {
        "median_us": float(median),
        "p20_us": float(p20),
        "p80_us": float(p80),
        "rounds_us": [1e6 * float(np.median(samples)) for samples in rounds],
        "samples": sum(map(len, rounds)),
        "method": method,
    }


def in_turns(
    samplers: Sequence[Sampler],
    seconds: float,
    pause: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[list[float]]]:
    """Take samples per sampler and round, for about ``seconds`` on the clock for each sampler.

    Each round gives every sampler its turn of at least one sample, with a rest of ``pause`` seconds before it
    (a chip under steady load lowers its clock).
    """
    taken: list[list[list[float]]] = [[] for _ in samplers]
    for _ in range(ROUNDS):
        for sampler, rounds in zip(samplers, taken, strict=True):
            if pause:
                time.sleep(pause)
            samples: list[float] = []
            stop = clock() + seconds / ROUNDS
            while not samples or clock() < stop:
                samples.append(sampler())
            rounds.append(samples)
    return taken


def input_sets(job_bytes: int, cache_bytes: int) -> int:
    """Return how many sets of inputs to rotate, so that each call finds its own evicted from the cache."""
    sets = math.ceil(4 * cache_bytes / max(job_bytes, 1))
    return sets if sets <= MAX_SETS else 1


class WallTimer:
    """Measures wall-clock time, read after the device has finished.

    Args:
        device: CPU, MPS or XPU.
        clock: seconds; a test passes its own clock.
        least: a sample repeats short calls until it lasts so many seconds.
    """

    pause = 0.0

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter, least: float = 2e-4
    ) -> None:
        self.clock, self.least = clock, least
        self.cache_bytes = _cpu_cache_bytes()
        if device.type == "cpu":
            self.settle = settle
        self.synchronize = (lambda: None) if device.type == "cpu" else getattr(torch, device.type).synchronize

    def first_call(self, call: Call) -> tuple[Any, float]:
        """Return the results and seconds of a call that may compile."""
        self.synchronize()
        start = self.clock()
        results = call()
        self.synchronize()
        return results, self.clock() - start

    def settle(self, calls: Sequence[Call]) -> None:
        """Warm up: every set once."""
        self._repeated(calls, len(calls))

    def _repeated(self, calls: Sequence[Call], count: int) -> float:
        self.synchronize()
        start = self.clock()
        for i in range(count):
            calls[i % len(calls)]()
        self.synchronize()
        return (self.clock() - start) / count

    def per_call(self, calls: Sequence[Call]) -> tuple[Sampler, str]:
        """Return a sampler of what one call costs its caller in a loop, launch included."""
        self.settle(calls)
        count = math.ceil(self.least / max(self._repeated(calls, 1), 1e-9))
        if count > 1:
            count = math.ceil(self.least / max(self._repeated(calls, count), 1e-9))
        return lambda: self._repeated(calls, count), "wall clock"

    def on_device(self, calls: Sequence[Call]) -> tuple[Sampler, str] | None:
        """Return a sampler of the time without the launch; None where there are no CUDA events."""
        return None


class CudaTimer(WallTimer):
    """Measures with CUDA events; without the launch by graph replay, or else by events after a flush of the L2.

    Args:
        cuda: ``torch.cuda``; a test without a GPU passes a proxy.
    """

    pause = 0.005

    def __init__(self, device: torch.device, cuda: ModuleType | SimpleNamespace | Any = torch.cuda) -> None:
        self.clock, self.least = time.perf_counter, 2e-3
        self.cuda, self.synchronize = cuda, cuda.synchronize
        self.cache_bytes = cuda.get_device_properties(device).L2_cache_size
        # Beside an L2 of 4 MB an MI300 has 256 MB of Infinity Cache, which no property tells.
        if torch.version.hip:
            self.cache_bytes = max(self.cache_bytes, 1 << 28)
        self.flush = torch.empty(
            max(4 * self.cache_bytes, 1 << 28) if device.type == "cuda" else 1 << 10,
            dtype=torch.int8,
            device=device,
        )

    def _events(self, body: Callable[[], Any]) -> float:
        start, stop = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        body()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def _repeated(self, calls: Sequence[Call], count: int) -> float:
        def body() -> None:
            for i in range(count):
                calls[i % len(calls)]()

        self.cuda.synchronize()
        return self._events(body) / count

    def per_call(self, calls: Sequence[Call]) -> tuple[Sampler, str]:
        return super().per_call(calls)[0], "events, back to back"

    def on_device(self, calls: Sequence[Call]) -> tuple[Sampler, str]:
        count = max(len(calls), 8)
        try:
            graph = self._capture(calls, count)
        except Exception as error:  # anything that a capture forbids
            self.cuda.synchronize()
            return self._flushed(calls), f"events after an L2 flush ({type(error).__name__} in graph capture)"

        def replay() -> float:
            self.cuda.synchronize()
            return self._events(graph.replay) / count

        replay()
        return replay, "graph replay"

    def _capture(self, calls: Sequence[Call], count: int) -> Any:
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):
            for call in calls:
                call()
        self.cuda.current_stream().wait_stream(side)
        graph = self.cuda.CUDAGraph()
        gc.disable()  # a kernel object collected now would unload its module, which a capture forbids
        try:
            with warnings.catch_warnings(), self.cuda.graph(graph):
                for i in range(count):
                    calls[i % len(calls)]()
        finally:
            gc.enable()
        return graph

    def _flushed(self, calls: Sequence[Call]) -> Sampler:
        turns = itertools.cycle(calls)
        self.flush.zero_()
        flush = self._events(self.flush.zero_)
        self.cuda.synchronize()
        start = self.clock()
        calls[0]()
        launch = self.clock() - start
        # Flushes keep the device busy until the call is launched; else the events would be apart by the host's time.
        count = min(MAX_FLUSHES, math.ceil(2 * launch / max(flush, 1e-6)))

        def sample() -> float:
            for _ in range(count):
                self.flush.zero_()
            return self._events(next(turns))

        return sample


def timer_for(device: torch.device) -> WallTimer:
    return CudaTimer(device) if device.type == "cuda" else WallTimer(device)


def _cpu_cache_bytes() -> int:
    """Return the size of the last-level cache as Linux reports it; elsewhere 32 MiB is assumed."""
    units = {"K": 1 << 10, "M": 1 << 20}
    try:
        levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
        text = levels[-1].read_text().strip()
        return int(text[:-1]) * units[text[-1]]
    except (OSError, IndexError, KeyError, ValueError):
        return 32 << 20
