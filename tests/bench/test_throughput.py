"""The benchmark: nothing wrong gets a time, what is slower is reported, and every CUDA line has run once.

Time here is a clock that the implementations move on themselves, so that nothing depends on how busy the machine is.
The CUDA timer is rehearsed on a proxy of ``torch.cuda`` that stamps its events with that clock: this shows
that its lines run and what they compute, and nothing about a GPU.
"""

import contextlib
import csv
import dataclasses
import importlib
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import __main__ as cli
from bench import bench_linear_mse_models
from bench.throughput import budget, machine, results
from bench.throughput import case as declaration
from bench.throughput.case import OURS, Case, Implementation, function
from bench.throughput.console import Screen
from bench.throughput.runner import Runner, free_bytes, head
from bench.throughput.timing import ROUNDS

from .fakes import LIMITS, Clock, document, doubling


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


@pytest.mark.parametrize(
    ("name", "error"),
    [
        *((name, RuntimeError("recompile limit")) for name in (OURS, "eager", "rival")),
        ("rival", torch.OutOfMemoryError()),
    ],
    ids=repr,
)
def test_what_fails_on_a_later_set_of_inputs_is_a_row(name: str, error: Exception) -> None:
    clock = Clock()
    case = doubling(clock, extra=(function("rival", lambda values: (clock.work(10.0), [2 * values])[1]),))
    (checked,) = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))

    def job(values: torch.Tensor) -> list[torch.Tensor]:
        if not torch.equal(values, checked):
            raise error
        return [2 * values]

    jobs = tuple(function(name, job) if each.name == name else each for each in case.implementations)
    (record,) = document(dataclasses.replace(case, implementations=jobs), clock=clock)["cases"]
    if name == "eager":
        assert record["skipped"] == "plain torch has no result: RuntimeError: recompile limit"
    else:
        status = {each: row["status"] for each, row in record["contenders"].items()}
        assert status == {OURS: "ok", "eager": "ok", "rival": "ok"} | {name: "failed"}
        assert "call" not in record["contenders"][name]


@pytest.mark.parametrize("name", [OURS, "rival"])
def test_what_cannot_be_prepared_of_a_later_set_is_a_row(name: str) -> None:
    clock = Clock()
    case = doubling(clock, extra=(function("rival", lambda values: (clock.work(10.0), [2 * values])[1]),))
    (checked,) = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
    (chosen,) = (each for each in case.implementations if each.name == name)

    def prepare(values: torch.Tensor) -> Any:
        if not torch.equal(values, checked):
            raise RuntimeError("no second state")
        return chosen.prepare(values)

    made = dataclasses.replace(chosen, prepare=prepare)
    jobs = tuple(made if each is chosen else each for each in case.implementations)
    found = document(dataclasses.replace(case, implementations=jobs), clock=clock)
    rows = found["cases"][0]["contenders"]
    status = {each: row["status"] for each, row in rows.items()}
    assert status == {OURS: "ok", "eager": "ok", "rival": "ok"} | {name: "failed"}
    assert results.all_right(found) == (name != OURS)


@pytest.mark.parametrize("error", [RuntimeError("recompile limit"), torch.OutOfMemoryError()], ids=repr)
@pytest.mark.parametrize("wrong", [False, True])
def test_ours_failed_or_wrong_is_said_although_plain_torch_fails_later(
    wrong: bool, error: Exception, tmp_path: Path
) -> None:
    """A case without a baseline or memory is skipped, which is no fault of ours; one that hides a fault is not."""
    clock = Clock()
    case = doubling(clock, factor=3.0 if wrong else 2.0)
    (checked,) = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))

    def broken(values: torch.Tensor) -> list[torch.Tensor]:
        raise RuntimeError("no such instruction")

    def job(values: torch.Tensor) -> list[torch.Tensor]:
        if not torch.equal(values, checked):
            raise error
        return [2 * values]

    ours, _ = case.implementations
    jobs = (ours if wrong else function(OURS, broken), function("eager", job))
    found = document(dataclasses.replace(case, implementations=jobs), clock=clock)
    assert results.outcome(found["cases"][0])["status"] == ("wrong" if wrong else "failed")
    assert not any("call" in row for row in found["cases"][0]["contenders"].values())
    assert not results.all_right(found)
    Screen().document(found)
    pytest.importorskip("matplotlib")
    from bench.throughput import report

    report.write(found, tmp_path)


def test_ragged_rows_of_all_sets_are_padded_to_one_shape() -> None:
    *_, ragged = bench_linear_mse_models.build((20, 30, 4, 1), torch.float32)
    assert "ragged" in ragged.variant
    sets = [ragged.make(torch.device("cpu"), torch.Generator().manual_seed(seed)) for seed in range(3)]
    shapes = {tuple(part.shape for part in rows()) for *_, rows in sets}
    assert len(shapes) == 1
    assert not torch.equal(sets[0][0], sets[1][0])


def test_to_enter_what_a_rival_runs_in_is_not_timed() -> None:
    clock, inside = Clock(), []

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        clock.work(5000.0)
        inside.append(True)
        yield
        inside.pop()

    def double(values: torch.Tensor) -> list[torch.Tensor]:
        assert inside
        clock.work(100.0)
        return [values * 2]

    rival = dataclasses.replace(function("rival", double), within=within)
    found = document(doubling(clock, extra=(rival,)), clock=clock)["cases"][0]["contenders"]["rival"]
    assert found["call"]["p80_us"] == pytest.approx(100, rel=1e-3)
    assert found["first_call_s"] == pytest.approx(100e-6, rel=1e-3)
    assert not inside


@pytest.mark.parametrize("right", [True, False])
def test_another_job_is_counted_in_steps_and_for_no_speedup(
    right: bool, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    clock = Clock()

    def halve(values: torch.Tensor) -> list[torch.Tensor]:
        clock.work(1260)
        return [values * 0.5 * (1 if right else 1.01)]

    halved = dataclasses.replace(
        function("solve", halve), unit="steps", reference=lambda values: [values * 0.5]
    )
    found = document(doubling(clock, extra=(halved,)), clock=clock)
    assert results.all_right(found)
    assert results.baselines(found["cases"]) == ["eager"]
    assert [summary.baseline for summary in results.summaries(found["cases"])] == ["eager"]
    Screen().document(found)
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.strip().startswith("1000"))
    assert len(row) <= 80
    assert ("12.0 steps" in row) is right
    assert ("WRONG" in row) is not right
    assert ("solve does another job, once" in " ".join(shown.split())) is right
    results.write_csv(found, tmp_path / "bench.csv")
    with (tmp_path / "bench.csv").open(newline="") as file:
        line = list(csv.DictReader(file))[-1]
    assert line["contender"] == "solve"
    assert bool(line["call_us"]) is right
    assert line["gb_per_s"] == line["copy_share"] == ""


def test_free_memory_counts_what_only_caches_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr("bench.throughput.runner.MEMINFO", meminfo)
    cpu = torch.device("cpu")
    without = free_bytes(cpu)
    meminfo.write_text("MemTotal:  9 kB\nMemFree:       1 kB\nMemAvailable:       5 kB\n")
    assert free_bytes(cpu) == 5120 != without > 0


def test_free_memory_of_a_gpu_counts_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (("mem_get_info", (10, 99)), ("memory_reserved", 60), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert free_bytes(torch.device("cuda")) == 10 + 60 - 20


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
    found = document(
        dataclasses.replace(case, implementations=(*case.implementations, function("rival", exhausted))),
        clock=clock,
    )
    rows = found["cases"][0]["contenders"]
    assert [rows[name]["status"] for name in (OURS, "eager", "rival")] == ["ok", "ok", "failed"]

    def no_such_dtype(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        raise TypeError("this device has no float64")

    found = document(dataclasses.replace(case, make=no_such_dtype), clock=clock)
    assert "no float64" in found["cases"][0]["skipped"]
    huge = dataclasses.replace(case, bytes=1 << 60)
    assert "GiB" in document(huge, clock=clock)["cases"][0]["skipped"]
    padded = dataclasses.replace(case, beside=1 << 60)
    assert "GiB" in document(padded, clock=clock)["cases"][0]["skipped"]
    monkeypatch.setattr("bench.throughput.runner.free_bytes", lambda device: 3 * case.bytes)
    assert document(case, clock=clock)["cases"][0]["in_turns"] is False


def test_command_line(capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["nonsense"], "unknown op 'nonsense'"),
        (["mse", "--shape", "3x4"], "expected n as numbers"),
        (["mse", "--dtype", "float31"], "float31"),
        (["mse", "--dtype", "int64"], "--dtype int64"),
        (["adam", "--shape", "0x5"], "a size of 0"),
        (["training", "--shape", "perceptron,4"], "expected regression,N,D"),
        (["training", "--shape", "mlp,4,4"], "mlp,N"),
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
    clock, tried = SimpleNamespace(now=100.0, case=1.0), []

    def skipped(self: Runner, case: Case, lost: Any) -> dict[str, Any]:
        clock.now += clock.case
        tried.append(case)
        return head(case) | {"skipped": "for the test"}

    monkeypatch.setattr(Runner, "case", skipped)
    for module in (cli, budget):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
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
    tried.clear()
    clock.case = len(variants) / 2.5  # a third case would end more than a fifth after the budget
    assert cli.main([*command, "--budget", str(len(variants) - 1)]) == 0
    assert len(tried) == 2


def test_what_runs_on_after_the_budget_is_ended_and_has_no_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """The second case would go on for ever, in a contender's call."""
    calls = []

    def case(self: Runner, case: Case, lost: Any) -> dict[str, Any]:
        calls.append(case.name)
        while len(calls) == 2:
            with contextlib.suppress(Exception):  # as a contender's error becomes its row
                time.sleep(0.01)
        return head(case) | {"skipped": "for the test"}

    monkeypatch.setattr(Runner, "case", case)
    monkeypatch.setattr(machine, "measure_rates", lambda *arguments: LIMITS)
    before = signal.getsignal(signal.SIGALRM)
    command = ["mse", "--quick", "--device", "cpu", "--scale", "--json", str(tmp_path / "run")]
    assert cli.main([*command, "--budget", "1"]) == 0
    assert (signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM)) == ((0.0, 0.0), before)
    kept = json.loads((tmp_path / "run").read_text())
    assert [results.case_name(record) for record in kept["cases"]] == calls[:1]
    assert not kept["scale"]
    said = capsys.readouterr().out.splitlines()[-1]
    assert calls[0] not in said
    assert calls[1] in said


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit])
def test_what_was_measured_is_on_disk_whatever_ends_the_run(
    ends: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """An interrupted run also prints it, and what it has not tried; one that is killed has written the numbers."""
    clock, tried = Clock(), []
    (measured,) = document(doubling(clock), clock=clock)["cases"]

    def case(self: Runner, case: Case, lost: Any) -> dict[str, Any]:
        tried.append(case.name)
        if len(tried) > 1:
            raise ends
        return measured

    monkeypatch.setattr(Runner, "case", case)
    monkeypatch.setattr(machine, "measure_rates", lambda *arguments: LIMITS)
    command = ["mse", "--quick", "--device", "cpu", "--json", str(tmp_path / "run")]
    if ends is KeyboardInterrupt:
        assert cli.main(command) == 130
        said = capsys.readouterr().out
        assert "doubling: forward" in said
        last = said.splitlines()[-1]
        assert re.match(r"not timed: \d+ of \d+, it was interrupted: ", last)
        assert tried[0] not in last
        assert tried[1] in last
    else:
        with pytest.raises(SystemExit):
            cli.main(command)
    (kept,) = json.loads((tmp_path / "run").read_text())["cases"]
    assert kept["contenders"][OURS]["status"] == "ok"


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_header_says_the_precision_of_products(
    precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "measure_rates", lambda *arguments: LIMITS)
    monkeypatch.setattr(Runner, "case", lambda self, case, lost: head(case) | {"skipped": "for the test"})
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        assert cli.main(["mse", "--shape=8", "--device=cpu", f"--precision={precision}"]) == 0
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert f"float32 products: {precision}" in capsys.readouterr().out


def test_a_fault_of_the_benchmark_ends_its_case_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    planted = Runner.checked

    def checked(self: Runner, case: Case) -> Any:
        if case.variant == "forward":
            raise TypeError("no such argument")
        return planted(self, case)

    monkeypatch.setattr(Runner, "checked", checked)
    monkeypatch.setattr(machine, "measure_rates", lambda *arguments: LIMITS)
    command = ["mse", "--shape=8", "--device=cpu", "--seconds=1e-6", f"--json={tmp_path / 'run'}"]
    assert cli.main(command) == 1
    rows = {
        each["variant"]: results.outcome(each) for each in json.loads((tmp_path / "run").read_text())["cases"]
    }
    assert rows["forward"]["note"] == "TypeError: no such argument"
    assert rows["forward + backward"]["status"] == "ok"
    assert "Traceback" in capsys.readouterr().err


def test_a_budget_spent_before_the_first_case_ends_quietly() -> None:
    spent = budget.Budget(0.001, time.monotonic() - 1)
    assert not spent.admits()
    ended = time.monotonic()
    with spent.enforced():
        time.sleep(10)
    assert time.monotonic() - ended < 5


def test_the_device_asked_for_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and streams are the current device's: those of another would time nothing."""
    current = []
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    for name in (None, "cpu", "cuda", "cuda:1"):
        cli.pick_device(name)
    assert current == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_none_is_timed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--device", "cuda"])
    assert "no cuda device" in capsys.readouterr().err


def test_poison_is_lifted_again() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    with declaration.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(("n", "status"), [(1000, "left out"), (1 << 13, "ok")])
def test_what_compiles_for_each_set_of_inputs_runs_where_they_are_few(n: int, status: str) -> None:
    """9 sets of 8,000 bytes fill the clock's cache four times, or one."""
    clock, prepared = Clock(), []

    def prepare(values: torch.Tensor) -> Any:
        prepared.append(values)
        return lambda: (clock.work(10.0), [2 * values])[1]

    case = doubling(clock, n=n, extra=(Implementation("compile", prepare, per_set=True),))
    (record,) = document(case, clock=clock)["cases"]
    found = record["contenders"]["compile"]
    assert found["status"] == status
    assert len(prepared) == (1 if status == "left out" else 2)  # to be checked, then for each set


@pytest.mark.parametrize("option", ["--seconds", "--budget"])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([f"{option}={value}", "mse"])
    assert f"argument {option}: '{value}' is not a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--csv", "--plot", "--out"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_timed(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Runner, "case", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["mse", "--shape=8", "--device=cpu", f"{option}={tmp_path / 'file' / 'there'}"])
    assert str(tmp_path / "file") in capsys.readouterr().err
    if option in ("--json", "--csv"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["mse", "--shape=8", "--device=cpu", f"{option}={tmp_path}"])
        assert f"Is a directory: '{tmp_path}'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["aot", "traffic"])
def test_a_report_that_cannot_be_written_is_not_begun(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    report = importlib.import_module(f"bench.reports.{command}")
    for work in {"report", "jobs", "subprocess"} & vars(report).keys():
        monkeypatch.setattr(report, work, None)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "there.json", tmp_path):
        with pytest.raises(SystemExit, match="2"):
            cli.main([command, f"--json={place}"])
        assert re.search(f"error: --json: .*: '{tmp_path}", capsys.readouterr().err)
