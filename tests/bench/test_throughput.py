"""The benchmark: nothing wrong gets a time, what is slower is reported, and every CUDA line has run once.

Time here is a clock that the implementations move on themselves, so that nothing depends on how busy the machine is.
The CUDA timer is rehearsed on a proxy of ``torch.cuda`` that stamps its events with that clock: this shows
that its lines run and what they compute, and nothing about a GPU.
"""

import contextlib
import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_linear_mse_models
from bench.throughput import case as declaration
from bench.throughput import results
from bench.throughput.case import OURS, Case, Implementation, function
from bench.throughput.console import Screen
from bench.throughput.timing import ROUNDS

from .fakes import CPU, LIMITS, Clock, document, doubling


def raising(error: Exception) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    def job(values: torch.Tensor) -> list[torch.Tensor]:
        raise error

    return job


BROKEN = raising(RuntimeError("no such instruction"))


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
    extra = (
        function("broken", BROKEN),
        replace(function("elsewhere", BROKEN), absent="not installed"),
        replace(function("slow", BROKEN), slow_start=True),
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


def failing_later(case: Case, name: str, error: Exception, place: str = "call") -> Case:
    """The case with an implementation that serves the inputs that are checked, and no later set of them."""
    (checked,) = case.make(CPU, torch.Generator().manual_seed(0))
    (chosen,) = (each for each in case.implementations if each.name == name)

    def fail() -> Any:
        raise error

    def prepare(values: torch.Tensor) -> Any:
        if torch.equal(values, checked):
            return chosen.prepare(values)
        return fail() if place == "prepare" else fail

    jobs = [replace(each, prepare=prepare) if each is chosen else each for each in case.implementations]
    return replace(case, implementations=tuple(jobs))


@pytest.mark.parametrize("place", ["call", "prepare"])
@pytest.mark.parametrize("error", [RuntimeError("recompile limit"), torch.OutOfMemoryError()], ids=repr)
@pytest.mark.parametrize("name", [OURS, "eager", "rival"])
def test_what_fails_on_a_later_set_of_inputs_is_a_row(name: str, error: Exception, place: str) -> None:
    clock = Clock()
    case = doubling(clock, extra=(function("rival", lambda values: (clock.work(10.0), [2 * values])[1]),))
    found = document(failing_later(case, name, error, place), clock=clock)
    (record,) = found["cases"]
    if isinstance(error, torch.OutOfMemoryError) and name != "rival":
        assert record["skipped"] == "out of memory"
    elif name == "eager":
        assert record["skipped"] == "plain torch has no result: RuntimeError: recompile limit"
    else:
        status = {each: row["status"] for each, row in record["contenders"].items()}
        assert status == {OURS: "ok", "eager": "ok", "rival": "ok"} | {name: "failed"}
        assert "call" not in record["contenders"][name]
        assert results.all_right(found) == (name != OURS)


@pytest.mark.parametrize("error", [RuntimeError("recompile limit"), torch.OutOfMemoryError()], ids=repr)
@pytest.mark.parametrize("wrong", [False, True])
def test_ours_failed_or_wrong_is_said_although_plain_torch_fails_later(
    wrong: bool, error: Exception, tmp_path: Path
) -> None:
    """A case without a baseline or memory is skipped, which is no fault of ours; one that hides a fault is not."""
    clock = Clock()
    case = doubling(clock, factor=3.0 if wrong else 2.0)
    ours, plain = case.implementations
    case = replace(case, implementations=(ours if wrong else function(OURS, BROKEN), plain))
    found = document(failing_later(case, "eager", error), clock=clock)
    assert results.outcome(found["cases"][0])["status"] == ("wrong" if wrong else "failed")
    assert not any("call" in row for row in found["cases"][0]["contenders"].values())
    assert not results.all_right(found)
    Screen().document(found)
    pytest.importorskip("matplotlib")
    from bench.throughput import report

    assert report.draw(found, tmp_path)


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

    rival = replace(function("rival", double), within=within)
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

    halved = replace(function("solve", halve), unit="steps", reference=lambda values: [values * 0.5])
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


def test_case_without_a_baseline_or_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    case = doubling(clock)
    exhausted = raising(torch.OutOfMemoryError("out of memory"))
    for plain, word in ((BROKEN, "no such instruction"), (exhausted, "out of memory")):
        replaced = replace(case, implementations=(case.implementations[0], function("eager", plain)))
        found = document(replaced, clock=clock)
        assert word in found["cases"][0]["skipped"]
        assert word in results.remarks(found)[0]
    found = document(
        replace(case, implementations=(*case.implementations, function("rival", exhausted))),
        clock=clock,
    )
    rows = found["cases"][0]["contenders"]
    assert [rows[name]["status"] for name in (OURS, "eager", "rival")] == ["ok", "ok", "failed"]

    def no_such_dtype(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        raise TypeError("this device has no float64")

    found = document(replace(case, make=no_such_dtype), clock=clock)
    assert "no float64" in found["cases"][0]["skipped"]
    huge = replace(case, bytes=1 << 60)
    assert "GiB" in document(huge, clock=clock)["cases"][0]["skipped"]
    padded = replace(case, beside=1 << 60)
    assert "GiB" in document(padded, clock=clock)["cases"][0]["skipped"]
    monkeypatch.setattr("bench.throughput.runner.free_bytes", lambda device: 3 * case.bytes)
    assert document(case, clock=clock)["cases"][0]["in_turns"] is False


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
