"""The same declarations under pytest-benchmark: ``pytest bench/ --benchmark-only``.

A call counts until the device has finished it. Its JSON, ``--benchmark-compare`` and ``--benchmark-histogram``
then work as usual. A result that is wrong fails, and has no time.
"""

import dataclasses
import functools
import itertools
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

from .__main__ import declared, pick_device
from .throughput import memory
from .throughput.case import Case, Implementation
from .throughput.runner import Runner, quiet
from .throughput.timing import input_sets, timer_for

DEVICE = pick_device(None)
CASES = [case for op in declared(()) for case in op.cases(DEVICE.type, quick=True)]


@functools.cache
def _runner() -> Runner:
    if DEVICE.type == "cpu":
        memory.recycle()
    return Runner(DEVICE, timer_for(DEVICE), seconds=0.0, quick=True)


@pytest.mark.benchmark(min_rounds=5, max_time=0.2, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        pytest.param(case, implementation, id=f"{case.name} {implementation.name}")
        for case in CASES
        for implementation in case.implementations
        if not implementation.slow_start
    ],
)
def test_throughput(benchmark: Any, case: Case, implementation: Implementation) -> None:
    runner, plain = _runner(), case.implementations[1]
    inputs, outcomes = runner.checked(dataclasses.replace(case, implementations=(implementation, plain)))
    found = outcomes[implementation.name]
    if found["status"] == "absent":
        pytest.skip(f"{implementation.name} is {found['note']}")
    if found["status"] != "ok":
        pytest.fail(f"{found['status'].upper()}: {found['note']}")
    rotated = [inputs]
    for number in range(1, input_sets(case.bytes, runner.timer.cache_bytes)):
        rotated.append(runner.inputs(case, number))
    with quiet(), implementation.within():
        calls = itertools.cycle([implementation.prepare(*one) for one in rotated])

        def synchronised() -> None:
            next(calls)()
            runner.timer.synchronize()

        benchmark.group = case.name
        benchmark.extra_info |= {"bytes": case.bytes, "flops": case.flops}
        benchmark(synchronised)
