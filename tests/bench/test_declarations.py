"""The declarations of bench_<op>.py: every case is well formed, every implementation agrees with the reference."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from bench import __main__ as cli
from bench.throughput.case import OURS, Op
from bench.throughput.runner import Runner

from .fakes import CPU, TINY, Benchmark, Clock, doubling, wall


@pytest.mark.parametrize("name", cli.OPS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_declarations(name: str, device_type: str) -> None:
    (op,) = cli.declared([name])
    assert op.name == name
    for quick in (True, False):
        cases = list(op.cases(device_type, quick))
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert all(case.bytes > 0 and case.flops > 0 and case.op == name for case in cases)
        assert all(case.implementations[0].name == OURS for case in cases)
        assert any(case.compile for case in cases) or not quick
        for case in cases:  # as predictions make them
            assert case.launch or case.make(torch.device("meta"), torch.Generator())
    for sweep in op.sweep(device_type):
        assert sweep.axis in op.axes
        assert len(sweep.base) == len(op.axes)
        assert len(sweep.values) >= 4


def test_one_list_of_shapes_serves_every_run() -> None:
    op = Op("op", ("n",), lambda shape, dtype: (), "*8 2^4@cpu *1e3@cuda 64")
    assert op.declared("cpu", quick=True) == [(8,)]
    assert op.declared("mps", quick=False) == [(8,), (16,), (64,)]
    assert op.declared("cuda", quick=True) == [(8,), (1000,)]
    assert op.declared("cuda", quick=False) == [(8,), (1000,), (64,)]


@pytest.mark.parametrize("name", cli.OPS)
def test_every_implementation_agrees_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda target, **options: target)
    (op,) = cli.declared([name])
    runner = Runner(CPU, wall(Clock()), seconds=0.0, quick=False)
    for shape in TINY[name]:
        for dtype in op.dtypes["cpu"]:
            for case in op.build(shape, dtype):
                _, outcomes = runner.checked(case)
                for implementation, found in outcomes.items():
                    low = (
                        dtype == torch.bfloat16 and implementation == "fused"
                    )  # torch 2.13's own fault on the CPU
                    assert found["status"] in ("ok", "absent") or low, (case.name, implementation, found)


def test_large_products_and_lists_are_checked_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.bench_matmul.CHECKED_WHOLE", 1)
    monkeypatch.setattr("bench.throughput.optimizer.SAMPLED", 50)
    runner = Runner(CPU, wall(Clock()), seconds=0.0, quick=True)
    for name, shape, parts in (("matmul", (1, 130, 70, 9), {64 * 9, 64 * 70}), ("adam", (2, 100), {50})):
        (op,) = cli.declared([name])
        for case in op.build(shape, torch.float32):
            inputs, outcomes = runner.checked(case)
            assert outcomes[OURS]["status"] == "ok"
            call = case.implementations[0].prepare(*inputs)
            assert {result.numel() for result in case.pick(call())} <= parts


def test_rivals_are_called_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextmanager
    def use_gems() -> Iterator[None]:
        entered.append(True)
        yield

    gems, apex, optimizers = ModuleType("flag_gems"), ModuleType("apex"), ModuleType("apex.optimizers")
    gems.use_gems, gems.__spec__, apex.optimizers = use_gems, object(), optimizers
    optimizers.FusedSGD = torch.optim.SGD
    optimizers.FusedAdam = lambda params, adam_w_mode: torch.optim.Adam(params)
    for module in (gems, apex, optimizers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    runner = Runner(CPU, wall(Clock()), seconds=0.0, quick=True)
    for name, rival in (("mse", "FlagGems"), ("sgd", "apex"), ("adam", "apex")):
        (op,) = cli.declared([name])
        shape = (8,) if name == "mse" else (1, 8)
        case = next(iter(op.build(shape, torch.float32)))
        inputs, outcomes = runner.checked(case)
        assert outcomes[rival]["status"] == "ok"
        times = len(entered)
        next(each for each in case.implementations if each.name == rival).prepare(*inputs)()
        assert len(entered) == times  # a call that is timed registers no ops
    assert entered


def test_pytest_benchmark_runs_the_same_declarations() -> None:
    from bench import test_throughput as plugin

    clock, fixture = Clock(), Benchmark()
    right, wrong = doubling(clock), doubling(clock, factor=2.02)
    plugin.test_throughput(fixture, right, right.implementations[0])
    plugin.test_throughput(fixture, right, right.implementations[1])
    assert (fixture.calls, fixture.group) == (2, right.name)
    assert fixture.extra_info == {"bytes": right.bytes, "flops": right.flops}
    with pytest.raises(pytest.fail.Exception, match="WRONG: result 0"):
        plugin.test_throughput(fixture, wrong, wrong.implementations[0])
    absent = dataclasses.replace(right.implementations[1], name="elsewhere", absent="not installed")
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        plugin.test_throughput(fixture, right, absent)
    assert fixture.calls == 2
