"""``python -m bench``: its options, its budget, what is on disk and what is said however it ends."""

import contextlib
import importlib
import json
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import __main__ as cli
from bench.throughput import budget, machine, report, results
from bench.throughput.case import OURS, Case
from bench.throughput.runner import Runner, head

from .fakes import LIMITS, Clock, document, doubling


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this machine take half a minute."""
    monkeypatch.setattr(machine, "measure_rates", lambda *given: LIMITS)


REFUSED = {
    "nonsense": "unknown op 'nonsense'",
    "mse --shape 3x4": "expected n as numbers",
    "mse --dtype float31": "float31",
    "mse --dtype int64": "--dtype int64",
    "adam --shape 0x5": "a size of 0",
    "training --shape perceptron,4": "expected regression,N,D",
    "training --shape mlp,4,4": "mlp,N",
    "--device xpu": "has no xpu device",
    "aot --op linear": "'linear'",
    "aot --dtype float8": "'float8'",
    "aot --predict --op dot": "unknown op 'dot'",
    "aot --predict --shape 10": "--shape goes with --predict and --op",
    **{
        f"{command} {option}={value}": f"argument {option}: '{value}' is not a {number}"
        for command, options, values, number in (
            ("mse", ("--seconds", "--budget"), ("-1", "0", "nan", "inf", "soon"), "number above 0"),
            ("compare before after", ("--threshold",), ("-3", "nan", "0"), "number above 0"),
            ("host", ("--rounds", "--steps"), ("0", "-1", "1.5"), "whole number of 1 or more"),
        )
        for option in options
        for value in values
    },
}
if not torch.cuda.is_available():
    REFUSED["--device cuda"] = "no cuda device"


@pytest.mark.parametrize("command", REFUSED)
def test_bad_usage(command: str, capsys: pytest.CaptureFixture) -> None:
    if command.startswith("aot"):
        pytest.importorskip("triton")
    with pytest.raises(SystemExit, match="2"):
        cli.main(command.split())
    said = capsys.readouterr()
    assert REFUSED[command] in said.err
    assert "|---" not in said.out  # the head of a table


def test_shapes_as_they_are_written() -> None:
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
    monkeypatch.setattr(report, "draw", None)  # nor is the report needed for it
    command = ["mse", "--quick", "--device=cpu", f"--json={tmp_path / 'run'}", f"--out={tmp_path}"]
    if ends is KeyboardInterrupt:
        assert cli.main(command) == 130
        said, errors = capsys.readouterr()
        assert "'NoneType' object is not callable" in errors
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
def test_the_header_says_the_precision_of_products_and_the_state_of_memory(
    precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Runner, "case", lambda self, case, lost: head(case) | {"skipped": "for the test"})
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        assert cli.main(["mse", "--shape=8", "--device=cpu", f"--precision={precision}"]) == 0
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    said = capsys.readouterr().out
    assert f"float32 products: {precision}" in said
    assert "memory: recycled" in said


def test_a_fault_of_the_benchmark_ends_its_case_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    planted = Runner.checked

    def checked(self: Runner, case: Case) -> Any:
        if case.variant == "forward":
            raise TypeError("no such argument")
        return planted(self, case)

    monkeypatch.setattr(Runner, "checked", checked)
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


@pytest.mark.parametrize("option", ["--json", "--out"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_timed(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Runner, "case", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["mse", "--shape=8", "--device=cpu", f"{option}={tmp_path / 'file' / 'there'}"])
    assert str(tmp_path / "file") in capsys.readouterr().err
    if option == "--json":
        with pytest.raises(SystemExit, match="2"):
            cli.main(["mse", "--shape=8", "--device=cpu", f"{option}={tmp_path}"])
        assert f"Is a directory: '{tmp_path}'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["aot", "traffic"])
def test_a_report_that_cannot_be_written_is_not_begun(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    report = importlib.import_module(f"bench.reports.{command}")
    for work in {"report", "jobs"} & vars(report).keys():
        monkeypatch.setattr(report, work, None)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "there.json", tmp_path):
        with pytest.raises(SystemExit, match="2"):
            cli.main([command, f"--json={place}"])
        assert re.search(f"error: argument --json: .*: '{tmp_path}", capsys.readouterr().err)
