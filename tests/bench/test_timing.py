"""The timers, the rehearsal of the CUDA paths without a GPU, and the scale study."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gradkernels import use_backend

from bench import __main__ as cli
from bench.throughput import machine, results, scale
from bench.throughput.case import Call, Case, Op, Sweep
from bench.throughput.console import Screen
from bench.throughput.runner import Runner
from bench.throughput.timing import CudaTimer, Sampler, input_sets, summarise

from .fakes import CPU, TINY, Clock, FakeCuda, RealClock, document, doubling, wall


def test_summarise_and_input_sets() -> None:
    timing = summarise([[1.0, 2.0], [3.0, 4.0, 5.0]], "clock")
    assert (timing["median_us"], timing["rounds_us"], timing["samples"]) == (3e6, [1.5e6, 4e6], 5)
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


def test_the_last_cache_of_amd_is_reckoned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """No property tells its size; a gigabyte of inputs comes from memory."""
    monkeypatch.setattr(torch.version, "hip", None)
    assert CudaTimer(CPU, FakeCuda(Clock(), cache_bytes=4 << 20)).cache_bytes == 4 << 20
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert input_sets(1 << 26, CudaTimer(CPU, FakeCuda(Clock(), cache_bytes=4 << 20)).cache_bytes) == 16


class Queue(FakeCuda):
    """A device that works off what the host has launched; a flush takes it 60 us, and the host 1."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        super().__init__(lambda: max(self.host, self.device))

    def launch(self, host_us: float, device_us: float) -> None:
        self.host += 1e-6 * host_us
        self.device = max(self.host, self.device) + 1e-6 * device_us

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def CUDAGraph(self) -> None:  # noqa: N802
        raise RuntimeError("not capturable")


def test_after_a_flush_what_the_host_takes_is_not_timed() -> None:
    """A step over thousands of tensors keeps the host for milliseconds, and the device for microseconds."""
    cuda = Queue()
    timer = CudaTimer(CPU, cuda)
    timer.clock = lambda: cuda.host
    timer.flush = SimpleNamespace(zero_=lambda: cuda.launch(1.0, 60.0))
    for host in (10.0, 5000.0):
        free, _ = timer.on_device([lambda host=host: cuda.launch(host, 3.0)])
        assert free() == pytest.approx(3e-6, rel=1e-3)


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
    monkeypatch.setattr("bench.bench_linear_mse_fit.STEPS", 3)
    for op in cli.declared(()):
        tiny = "*" + ",".join(map(str, TINY[op.name][-1 if op.name == "linear_mse_models" else 0]))
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
    assert {record["op"] for record in found["cases"]} == set(TINY)
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


def test_the_limits_are_measured_beyond_the_cache() -> None:
    """Every call takes a second, so that a rate is the work of one call."""

    def per_call(calls: Sequence[Call]) -> tuple[Sampler, str]:
        (call,) = calls
        return lambda: float(call() is not None), ""

    for cache, copied in ((1 << 20, 1 << 29), (1 << 26, 1 << 30)):
        timer = SimpleNamespace(cache_bytes=cache, pause=0.0, clock=Clock(), per_call=per_call)
        rates = machine.measure_rates(torch.device("meta"), timer, seconds=0.0)
        assert rates["copy"] == copied
        assert rates["matmul"] == dict.fromkeys(("float32", "float64", "bfloat16"), 2.0 * 2048**3)


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
    found = scale.study(op, sweep, runner, torch.float32)
    assert [point["value"] for point in found["points"]] == [10, 200, 400, 1000, 2000, 5000]
    assert "GiB" in found["stopped"]
    assert found["ours"]["exponent"] == pytest.approx(1, abs=0.05)
    assert found["ours"]["knee"] == pytest.approx(320, rel=0.1)
    assert found["torch"]["knee"] == pytest.approx(920, rel=0.1)


@pytest.mark.parametrize("right", [0, 2])
def test_a_sweep_that_is_wrong_at_once_is_said_and_fails_the_run(
    right: int, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    clock = Clock()

    def build(shape: tuple[int, ...], dtype: torch.dtype) -> list[Case]:
        return [doubling(clock, n=shape[0], factor=2.0 if shape[0] < 10**right else 2.02)]

    sweep, op = Sweep("n", (1, 10, 100, 1000), (1,)), Op("doubling", ("n",), build, "")
    runner = Runner(CPU, wall(clock), seconds=0.001, quick=True)
    found = document(doubling(clock), clock=clock, scale=[scale.study(op, sweep, runner, torch.float32)])
    assert not results.all_right(found)
    Screen().document(found)
    said = capsys.readouterr().out
    assert f"wrong at n = {10**right}" in said
    assert "Scale" not in said
    pytest.importorskip("matplotlib")
    from bench.throughput import report

    assert report.draw(found, tmp_path)
    assert f"wrong at n = {10**right}" in (tmp_path / "report.html").read_text()
