"""The benchmark: nothing wrong gets a time, what is slower is reported, and every CUDA line has run once.

Time here is a clock that the implementations move on themselves, so that nothing depends on how busy the machine is.
The CUDA timer is rehearsed on a proxy of ``torch.cuda`` that stamps its events with that clock: this shows
that its lines run and what they compute, and nothing about a GPU.
"""

import csv
import dataclasses
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import use_backend

from bench import __main__ as cli
from bench.throughput import case as declaration
from bench.throughput import compare, machine, results, scale
from bench.throughput.case import OURS, Case, Implementation, Op, Sweep, function
from bench.throughput.console import Screen
from bench.throughput.runner import Runner
from bench.throughput.timing import ROUNDS, CudaTimer, WallTimer, input_sets, summarise

CPU = torch.device("cpu")
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


def unwritten(values: torch.Tensor) -> torch.Tensor:
    """Right as long as unwritten memory happens to hold numbers."""
    return 2 * values + 0 * torch.empty_like(values).nan_to_num(nan=float("inf"))


WRONG = {
    "one percent off": lambda values: values * 2.02,
    "NaN": lambda values: values * float("nan"),
    "unwritten memory read": unwritten,
    "another shape": lambda values: 2 * values[None],
    "another dtype": lambda values: 2 * values.double(),
}


@pytest.mark.unwatched  # the memory checker poisons too
@pytest.mark.parametrize("fault", WRONG)
def test_wrong_result_has_no_time(fault: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(False)  # the benchmark's own poison must do
    clock = Clock()
    found = document(doubling(clock, run=WRONG[fault]), clock=clock)
    ours = results.outcome(found["cases"][0])
    assert ours["status"] == "wrong"
    assert not {"call", "device"} & set(ours)
    assert ours["first_call_s"] is None
    assert not results.all_right(found)
    Screen().document(found)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("1000"))
    assert "WRONG" in row
    assert not any(character.isdigit() for character in row.replace("1000", "").replace("f32", ""))
    results.write_csv(found, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open(newline="") as file:
        line = next(csv.DictReader(file))
    assert line["status"] == "wrong"
    assert line["call_us"] == line["gb_per_s"] == line["first_call_s"] == line["ratio_to_gradkernels"] == ""


def test_right_result_has_its_time_and_its_conditions(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    clock = Clock()
    found = document(doubling(clock), doubling(clock, us=300.0, n=2000), clock=clock)
    record = found["cases"][0]
    ours = results.outcome(record)
    assert results.all_right(found)
    assert ours["call"]["median_us"] == pytest.approx(105, rel=1e-3)  # the launch is the caller's too
    assert ours["call"]["p20_us"] <= ours["call"]["median_us"] <= ours["call"]["p80_us"]
    assert len(ours["call"]["rounds_us"]) == ROUNDS
    assert ours["first_call_s"] == pytest.approx(105e-6, rel=1e-3)
    assert results.ratio(record, "eager") == pytest.approx(155 / 105, rel=1e-3)
    speed = results.rates(record, LIMITS)
    assert speed.gb_per_s == pytest.approx(8000 / 105e-6 / 1e9, rel=1e-3)
    assert speed.copy_share == pytest.approx(8000 / 105e-6 / 1e10, rel=1e-3)
    assert speed.matmul_share == pytest.approx(1000 / 105e-6 / 1e11, rel=1e-3)
    (summary,) = results.summaries(found["cases"])
    assert summary.geometric_mean == pytest.approx((155 / 105 * 155 / 305) ** 0.5, rel=1e-3)
    assert summary.worst_case == "doubling forward 2000 float32"
    assert [(loss.case, loss.clear) for loss in summary.losses] == [("doubling forward 2000 float32", True)]
    Screen().document(found)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "slower than eager" in shown
    results.write_json(found, tmp_path / "a" / "bench.json")
    assert results.load(tmp_path / "a" / "bench.json") == found


def test_failed_and_absent_implementations_are_named() -> None:
    clock = Clock()

    def broken(values: torch.Tensor) -> list[torch.Tensor]:
        raise RuntimeError("no such instruction")

    extra = (
        function("broken", broken),
        dataclasses.replace(function("elsewhere", broken), absent="not installed"),
        dataclasses.replace(function("slow", broken), slow_start=True),
    )
    found = document(doubling(clock, extra=extra), clock=clock)
    status = {name: each["status"] for name, each in found["cases"][0]["contenders"].items()}
    assert status == {
        OURS: "ok",
        "eager": "ok",
        "broken": "failed",
        "elsewhere": "absent",
        "slow": "left out",
    }
    said = " ".join(results.remarks(found))
    assert "broken FAILED: RuntimeError: no such instruction" in said
    assert "elsewhere is not installed" in said


def test_case_without_a_baseline_or_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    case = doubling(clock)

    def broken(values: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError("not on this device")

    def exhausted(values: torch.Tensor) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    for plain, word in ((broken, "not on this device"), (exhausted, "out of memory")):
        replaced = dataclasses.replace(
            case, implementations=(case.implementations[0], function("eager", plain))
        )
        found = document(replaced, clock=clock)
        assert word in found["cases"][0]["skipped"]
        assert word in results.remarks(found)[0]
    huge = dataclasses.replace(case, bytes=1 << 60)
    assert "GiB" in document(huge, clock=clock)["cases"][0]["skipped"]
    monkeypatch.setattr("bench.throughput.runner.free_bytes", lambda device: 3 * case.bytes)
    assert document(case, clock=clock)["cases"][0]["in_turns"] is False


# compare


def run_of(seed: int, us: float = 100.0, size: float = 0.04, busy: float = 1.0) -> dict[str, Any]:
    clock, found = Clock(), []
    for n in range(500, 520):
        found.append(doubling(clock, us * busy, 150.0 * busy, jitter=noise(seed + 1000 * n, size), n=n))
    return document(*found, clock=clock)


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {change.verdict for change in compare.compare_runs(before, after)}


def test_compare_reports_a_fifth_slower_and_not_the_same_twice(tmp_path: Path) -> None:
    before, again, slower = run_of(1), run_of(2), run_of(3, us=120.0)
    assert verdicts(before, again) == {"same"}
    assert verdicts(before, slower) == {"slower"}
    assert verdicts(slower, before) == {"faster"}
    for name, found in (("before", before), ("again", again), ("slower", slower)):
        results.write_json(found, tmp_path / name)
    assert cli.main(["compare", str(tmp_path / "before"), str(tmp_path / "again")]) == 0
    assert cli.main(["compare", str(tmp_path / "before"), str(tmp_path / "slower")]) == 1


def test_compare_takes_noise_and_a_busy_machine_into_account() -> None:
    noisy = [run_of(seed, size=0.5) for seed in (1, 2)]
    assert verdicts(*noisy) <= {"same", "noise"}
    assert verdicts(run_of(1), run_of(2, busy=1.5)) == {"noise"}


def test_compare_reports_what_became_wrong_and_what_is_gone() -> None:
    clock = Clock()
    right, wrong = (document(doubling(clock, factor=factor), clock=clock) for factor in (2.0, 2.1))
    changes = compare.compare_runs(right, wrong)
    assert [change.verdict for change in changes] == ["wrong"]
    assert compare.regressed(changes)
    other = document(doubling(clock, n=77), clock=clock)
    assert verdicts(right, other) == {"new", "gone"}


NOT_RESULTS = {
    "nothing": None,
    "a folder": "folder",
    "text": b"a shopping list",
    "no text": b"\xff\xfe\x00",
    "another JSON": b"[]",
    "another schema": b'{"schema": 99, "machine": {}, "limits": {}, "cases": []}',
    "half a result": b'{"schema": 1, "cases": []}',
}


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize("content", NOT_RESULTS)
def test_other_files_are_refused_in_one_line(
    command: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "other.json"
    if (given := NOT_RESULTS[content]) == "folder":
        path.mkdir()
    elif given is not None:
        path.write_bytes(given)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(path), *([str(path)] if command == "compare" else [])])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m bench {command}: error: ")
    assert str(path) in line


# timing


def test_summarise_and_input_sets() -> None:
    timing = summarise([[1.0, 2.0], [3.0, 4.0, 5.0]], "clock")
    assert (timing.median, timing.rounds, timing.samples) == (3.0, [1.5, 4.0], 5)
    assert input_sets(1 << 20, 1 << 20) == 4
    assert input_sets(1 << 30, 1 << 20) == 1  # one set is larger than the cache
    assert input_sets(8, 1 << 20) == 1  # too small to be evicted by any number of sets


def test_inputs_are_rotated_and_short_calls_repeated() -> None:
    clock, seen = Clock(), []
    calls = [lambda i=i: (seen.append(i), clock.work(1.0)) for i in range(3)]
    sampler, _ = wall(clock).per_call(calls)
    seen.clear()
    assert sampler() == pytest.approx(1e-6, rel=1e-2)
    assert len(seen) >= 150  # of a microsecond each: a sample lasts 200
    assert set(seen) == {0, 1, 2}


def test_cuda_timer_tells_the_launch_apart() -> None:
    clock = Clock()
    cuda = FakeCuda(clock)
    timer = CudaTimer(CPU, cuda)
    calls = [lambda: clock.work(20.0, launch_us=5.0)] * 3
    call, method = timer.per_call(calls)
    assert method.startswith("events")
    assert call() == pytest.approx(25e-6, rel=1e-2)
    free, method = timer.on_device(calls)
    assert method == "graph replay"
    assert free() == pytest.approx(20e-6, rel=1e-2)
    assert cuda.log.count("wait") == 2


def test_cuda_timer_flushes_where_a_graph_cannot_be_captured() -> None:
    clock, seen = Clock(), []
    timer = CudaTimer(CPU, FakeCuda(clock))

    def forbidden(i: int) -> None:
        if clock.capturing:
            clock.capturing = False
            raise RuntimeError("operation not permitted when stream is capturing")
        seen.append(i)
        clock.work(20.0)

    timer.flush.fill_(1)
    free, method = timer.on_device([lambda i=i: forbidden(i) for i in range(2)])
    assert "L2 flush" in method
    assert "RuntimeError" in method
    seen.clear()
    assert [free() for _ in range(4)] == [pytest.approx(20e-6, rel=1e-2)] * 4
    assert seen == [0, 1, 0, 1]
    assert not timer.flush.any()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line believes in a CUDA device, whose tensors stay on the CPU."""
    stand_in = CudaTimer(CPU, FakeCuda(RealClock(), cache_bytes=64))
    stand_in.least, stand_in.pause = 1e-5, 0.0
    monkeypatch.setattr("bench.throughput.timing.ROUNDS", 2)
    monkeypatch.setattr(cli, "pick_device", lambda name: CPU)
    monkeypatch.setattr("bench.throughput.timing.timer_for", lambda device: stand_in)
    rates = machine.measure_rates
    monkeypatch.setattr(machine, "measure_rates", lambda *given: rates(*given, full=False))


@pytest.mark.parametrize("backend", ["fallback", "triton"])
@pytest.mark.usefixtures("cuda")
def test_gpu_command_rehearsed(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(machine, "signs_of_other_work", lambda *given: ["a sign"])
    shapes = {
        "matmul": "2x5x7x3",
        "mse": "65",
        "linear_mse": "33x5x1",
        "sgd": "3x17",
        "adam": "3x17",
        "training": "regression,9,4",
    }
    for op in cli.declared(()):
        tiny = f"*{shapes[op.name]}"
        smaller = dataclasses.replace(op, shapes=tiny, dtypes={"cpu": (torch.float32,)}, sweeps={"cpu": ()})
        monkeypatch.setattr(f"bench.bench_{op.name}.OP", smaller)
    written = (
        ["--json", f"{tmp_path}/bench.json"] if backend == "triton" else ["--out", f"{tmp_path}/{{device}}"]
    )
    with use_backend(backend):
        assert cli.main(["--device", "cuda", "--quick", "--seconds", "1e-6", "--scale", *written]) == 0
    (file,) = tmp_path.rglob("bench.json")
    found = json.loads(file.read_text())
    if backend == "fallback":
        assert {path.name for path in file.parent.iterdir()} >= {"bench.csv", "report.html", "roofline.png"}
    assert {record["op"] for record in found["cases"]} == set(shapes)
    assert found["busy"] == ["a sign"]
    assert "warning: a sign" in capsys.readouterr().out
    for record in found["cases"]:
        for name, outcome in record["contenders"].items():
            assert outcome["status"] in ("ok", "absent", "left out"), (
                results.case_name(record),
                name,
                outcome,
            )
        assert {"call", "device"} <= set(results.outcome(record))


def test_header_of_a_cuda_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, total_memory=141 << 30, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(machine, "_said_by", lambda *command: "570.1\n570.1" if "smi" in command[0] else "")
    facts = machine.describe(torch.device("cuda"))
    assert (facts["device"], facts["capability"], facts["driver"]) == ("NVIDIA H200", "sm_90", "570.1")
    assert facts["commit"] == "unknown"
    assert machine.slug(facts) == "nvidia-h200"


# declarations


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
    for sweep in op.sweep(device_type):
        assert sweep.axis in op.axes
        assert len(sweep.base) == len(op.axes)
        assert len(sweep.values) >= 4


TINY = {
    "matmul": [(1, 3, 65, 1), (4, 2, 3, 5)],
    "mse": [(1,), (1000,)],
    "linear_mse": [(63, 3, 1), (10, 4, 3)],
    "sgd": [(3, 65)],
    "adam": [(3, 65)],
    "training": [("regression", 4, 2), ("mlp", 9), ("block", 4, 1)],
}


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
        shape = (8,) if name == "mse" else (2, 8)
        case = next(iter(op.build(shape, torch.float32)))
        assert runner.checked(case)[1][rival]["status"] == "ok"
    assert entered


class Benchmark:
    """pytest-benchmark's fixture, for one call."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.calls = None, {}, 0

    def __call__(self, run: Callable[[], None]) -> None:
        run()
        self.calls += 1


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


# scale


def test_fit_finds_exponent_and_knee() -> None:
    sizes = [4.0**k for k in range(12)]
    for exponent in (1.0, 2.0):
        found = scale.fit(sizes, [5 + 1e-3 * n**exponent for n in sizes])
        assert found["exponent"] == pytest.approx(exponent, abs=0.02)
        assert found["fixed_us"] == pytest.approx(5, rel=0.02)
        assert found["knee"] == pytest.approx((5 / 1e-3) ** (1 / exponent), rel=0.25)
    assert scale.fit(sizes, [7.0] * len(sizes)) == {
        "fixed_us": 7.0,
        "knee": None,
        "exponent": None,
        "c": None,
    }


def test_study_follows_an_axis_until_memory_or_patience_ends() -> None:
    clock = Clock()

    def build(shape: tuple[int, ...], dtype: torch.dtype) -> list[Case]:
        (n,) = shape
        case = doubling(clock, us=10 + 0.05 * n, plain_us=40 + 0.05 * n, n=n)
        return [dataclasses.replace(case, bytes=1 << 60) if n > 5000 else case]

    sweep = Sweep("n", (10, 200, 400, 1000, 2000, 5000, 10**4, 10**5), (1,))
    op = Op("doubling", ("n",), build, "", sweeps={"cpu": (sweep,)})
    runner = Runner(CPU, wall(clock), seconds=0.001, quick=True)
    (found,) = scale.study(op, runner, torch.float32)
    assert [point["value"] for point in found["points"]] == [10, 200, 400, 1000, 2000, 5000]
    assert "GiB" in found["stopped"]
    assert found["ours"]["exponent"] == pytest.approx(1, abs=0.05)
    assert found["ours"]["knee"] == pytest.approx(320, rel=0.1)
    assert found["torch"]["knee"] == pytest.approx(920, rel=0.1)


# command line and report


def test_command_line(capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["nonsense"], "unknown op 'nonsense'"),
        (["mse", "--shape", "3x4"], "expected n as numbers"),
        (["mse", "--dtype", "float31"], "float31"),
        (["--device", "xpu"], "has no xpu device"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert message in capsys.readouterr().err
    linear_mse, training = cli.declared(["linear_mse", "training"])
    assert linear_mse.shape("1e3x2^6x1") == (1000, 64, 1)
    assert training.shape("regression,4,2") == ("regression", 4, 2)


def test_a_budget_leaves_out_the_least_telling_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """A case takes a second: there is time for as many as the budget has seconds, and one more."""
    clock, tried = SimpleNamespace(now=100.0), []

    def skipped(self: Runner, case: Case) -> dict[str, Any]:
        clock.now += 1
        tried.append(case)
        head = {key: getattr(case, key) for key in ("op", "variant", "label", "sizes", "bytes", "flops")}
        return {**head, "dtype": declaration.dtype_name(case.dtype), "skipped": "for the test"}

    monkeypatch.setattr(Runner, "case", skipped)
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(machine, "measure_rates", lambda *arguments: LIMITS)
    planned = [case for op in cli.declared(["mse", "adam"]) for case in op.cases("cpu", quick=True)]
    command = ["mse", "adam", "--quick", "--scale", "--device", "cpu", "--json", str(tmp_path / "run")]
    variants = {(case.op, case.variant): case.sizes for case in planned}
    assert cli.main([*command, "--budget", str(len(variants) - 1)]) == 0
    assert {(case.op, case.variant): case.sizes for case in tried} == variants  # the last shape of each
    assert len(tried) == len(variants)
    kept = [results.case_name(record) for record in json.loads((tmp_path / "run").read_text())["cases"]]
    assert kept == [case.name for case in planned if case.name in kept]
    said = capsys.readouterr().out.splitlines()[-1]
    sweeps = sum(len(op.sweep("cpu")) for op in cli.declared(["mse", "adam"]))
    count = len(planned) - len(tried) + sweeps
    assert said.startswith(f"not timed: {count} of {len(planned) + sweeps}, the budget of ")
    assert all(case.name in said for case in planned if case.name not in kept)
    assert "mse over n" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_none_is_timed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--device", "cuda"])
    assert "no cuda device" in capsys.readouterr().err


def test_report_is_drawn_from_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    sweep = {"value": [10.0**k for k in range(1, 6)]}
    times = [5 + 0.01 * value for value in sweep["value"]]
    points = [
        {"value": value, "ours_us": time, "torch_us": 2 * time}
        for value, time in zip(sweep["value"], times, strict=True)
    ]
    fitted = scale.fit(sweep["value"], times)
    studied = {
        "op": "doubling", "variant": "forward", "dtype": "float32", "axis": "n", "base": {}, "stopped": "",
        "points": points, "ours": fitted, "torch": fitted,
    }  # fmt: skip
    cases = [doubling(clock, n=n) for n in (100, 1000)]
    wrong = doubling(clock, factor=3.0, n=50)
    results.write_json(document(*cases, wrong, clock=clock, scale=[studied]), tmp_path / "bench.json")
    assert cli.main(["report", str(tmp_path / "bench.json")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "WRONG" in page
    for name in ("roofline", "doubling", "scale"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    """The results of a real run."""
    (path,) = Path(cli.__file__).parent.glob("results/amd-epyc-2-cores/bench.json")
    return results.load(path)


def texts(axes: Any) -> list[Any]:
    """The labels and notes of one pair of axes that show something."""
    ticks = [label for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()]
    return [text for text in (*ticks, *axes.texts) if text.get_text() and text.get_visible()]


@pytest.mark.parametrize("name", ["roofline", "training", "mse", "scale"])
def test_no_labels_of_a_picture_collide(committed: dict[str, Any], name: str) -> None:
    plots = pytest.importorskip("bench.throughput.plots")
    with plots.plt.rc_context(plots.STYLE):
        drawn = {"roofline": plots.roofline, "scale": plots.scale}.get(name)
        figure = drawn(committed) if drawn else plots.ratios(committed, name)
        figure.canvas.draw()
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        low, high = axes.get_window_extent().get_points()
        boxes = {
            text.get_text(): box
            for text in texts(axes)
            if ((box := text.get_window_extent()).x1 >= low[0] or box.y1 >= low[1]) and box.x0 <= 2 * high[0]
        }
        for (one, box), (other, beside) in itertools.combinations(boxes.items(), 2):
            assert not box.overlaps(beside), (axes.get_title(loc="left"), one, other)
    plots.plt.close(figure)


def test_the_roofs_labels_are_free_of_marks(committed: dict[str, Any]) -> None:
    plots = pytest.importorskip("bench.throughput.plots")
    figure = plots.roofline(committed)
    figure.canvas.draw()
    (axes,) = figure.axes
    marks = [axes.transData.transform(each.get_offsets())[0] for each in axes.collections]
    assert len(marks) > 100
    for text in axes.texts:
        box = text.get_window_extent()
        assert not any(box.contains(*mark) for mark in marks), text.get_text()
    assert "above the copy roof" in axes.get_xlabel()
    plots.plt.close(figure)


def test_speedups_have_a_row_for_each_workload(committed: dict[str, Any]) -> None:
    """Cases of equal bytes are rows of their own, with no line between them; each names its bytes."""
    plots = pytest.importorskip("bench.throughput.plots")
    figure = plots.ratios(committed, "adam")
    panel = figure.axes[0]
    labels = [label.get_text() for label in panel.get_yticklabels()]
    cases = [r for r in committed["cases"] if (r["op"], r["variant"]) == ("adam", "Adam")]
    assert sorted(labels) == sorted(f"{r['label']}  {results.SHORT[r['dtype']]}" for r in cases)
    assert [text.get_text() for text in panel.texts if text.get_text()[-1] == "B"] == [
        "56 B", "28 MB", "29.4 MB", "280 MB", "140 MB",
    ]  # fmt: skip
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    assert len(dots) == sum(
        results.ratio(r, name) is not None for r in cases for name in r["contenders"]
    ) - len(cases)
    assert all(len(line.get_xdata()) == 1 for line in dots)
    plots.plt.close(figure)


def test_ticks_of_a_small_range_are_readable() -> None:
    plots = pytest.importorskip("bench.throughput.plots")
    assert {0.9, 1, 1.1, 1.25, 1.5, 2} <= set(plots.ratio_ticks(0.85, 2.1))
    assert {1, 1.1, 1.25, 1.5} <= set(plots.ratio_ticks(0.95, 1.6))
    assert set(plots.ratio_ticks(0.5, 40)) >= {0.5, 1, 2, 4, 8, 16, 32}
    assert 1.1 not in plots.ratio_ticks(0.5, 40)  # its label would cover that of 1


def test_equal_times_are_a_tie(capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    found = document(doubling(clock, us=100.0, plain_us=99.7), clock=clock)
    assert results.ratio(found["cases"][0], "eager") == pytest.approx(0.997, abs=1e-3)
    (summary,) = results.summaries(found["cases"])
    assert not summary.losses
    Screen().document(found)
    assert "slower than" not in capsys.readouterr().out
    report = pytest.importorskip("bench.throughput.report")
    page = report.page(found, dict.fromkeys(("roofline", "doubling"), Path(__file__)))
    assert '<b class="">1.00</b>' in page
    assert '"bad"' not in page
    slower = document(doubling(clock, us=101.0, plain_us=99.7), clock=clock)
    assert results.summaries(slower["cases"])[0].losses


def test_a_busy_machine_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = document(clock=Clock())
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 4)

    def signs(load: float | None, copy: float) -> list[str]:
        return machine.signs_of_other_work(found["machine"], {"copy": copy}, load)

    assert not signs(0.9, 1e9)  # nothing is committed for this machine
    results.write_json(found, tmp_path / "a-clock" / "bench.json")
    assert not signs(0.9, 0.81e10)
    assert not signs(None, 1e10)
    assert signs(1.1, 1e10) == ["this machine is busy: load 1.1 on 4 cores before the run"]
    (slow,) = signs(0.0, 0.79e10)
    assert "it copies 7.9 GB/s, and 10.0 in a-clock/bench.json" in slow
    Screen().document(found | {"busy": [slow]})
    assert f"note: {slow}" in capsys.readouterr().out


def test_tables_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("bench.throughput.console.rich", None)
    clock = Clock()
    screen = Screen()
    with screen.progress(1) as advance:
        advance("one")
    screen.document(document(doubling(clock, us=200.0), clock=clock))
    shown = capsys.readouterr()
    assert "[1/1] one" in shown.err
    assert "slower than eager" in shown.out


def test_a_terminal_of_80_columns_shows_every_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("rich")
    clock = Clock()
    found = document(doubling(clock, us=200.0, n=10**6), clock=clock)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Screen().document(found)
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    row = next(line for line in shown.splitlines() if line.startswith("1000000"))
    assert [row.split()[i] for i in (0, 1, 7)] == ["1000000", "f32", "0.76"]
    assert "shape" in shown
    assert "0.76  doubling forward 1000000 float32" in shown


def test_poison_is_lifted_again() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    with declaration.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before)
