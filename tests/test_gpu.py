"""``make test-gpu`` itself, without a GPU: what it collects, in which order, within which time, and what it says."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from . import gpu

MISSING = ("expecttest", "hypothesis", "matplotlib", "sklearn")


def test_nothing_that_may_be_missing_stops_the_collection(tmp_path: Path) -> None:
    """The whole suite is collected; FIRST finds what it names."""
    refuse = f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))"
    (tmp_path / "without.py").write_text(refuse)
    without = ("without", "no:cacheprovider", "no:hypothesispytest", "no:xdist", "no:benchmark")
    plugins = [option for name in without for option in ("-p", name)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *plugins]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    environment["PYTEST_ADDOPTS"] = ""  # of the run around this one: a -v there would take the list's form
    found = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr
    tests = re.findall(r"^(tests/\S+::\w+)", found.stdout, re.MULTILINE)
    assert len(set(tests)) > 400
    for pattern in gpu.FIRST:
        assert any(re.search(pattern, test) for test in tests), pattern


def test_the_most_telling_come_first() -> None:
    def item(nodeid: str, full: bool = False) -> SimpleNamespace:
        return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: full or None)

    names = ["test_x.py::test_scaler", "test_mse.py::test_sizes", "test_x.py::test_other"]
    items = [item(f"tests/{name}[{i}]") for name in names for i in range(3)]
    items.append(item("tests/test_mse.py::test_sizes[all]", full=True))
    found = [one.nodeid for one in gpu.in_order(items)]
    assert [re.sub(r"\W+\w+\W$", "", test)[6:] for test in found] == [
        *(["test_mse.py::test_sizes"] * 3),
        *(["test_x.py::test_scaler"] * 3),
        *(["test_x.py::test_other"] * 3),
        "test_mse.py::test_sizes",
    ]
    assert found[-1].endswith("[all]")
    assert found == [one.nodeid for one in gpu.in_order(items[::-1])]
    several = gpu.in_order(item(f"tests/a.py::{name}[{i}]") for name in ("one", "two") for i in range(2))
    assert [one.nodeid[12:15] for one in several[:2]] in (["one", "two"], ["two", "one"])


SUITE = """
import os, time
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("i", range(5))
def test_passes(i):
    with open(os.environ["RAN"], "a") as file:
        file.write(f"{i}\\n")

def test_fails():
    assert 2 + 2 == 5

def test_skips():
    pytest.skip("for the test")

def test_dies():
    os.abort()

def test_hangs():
    time.sleep(600)
"""


def test_each_test_runs_once_whatever_others_do(tmp_path: Path) -> None:
    """Beside a test that fails, one that ends its process, one that hangs and a file that cannot be collected."""
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "test_some.py").write_text(SUITE)
    command = [sys.executable, "-m", "tests.gpu", "--seconds", "600", "--test-seconds", "4", "--workers", "2"]
    found = subprocess.run(
        [*command, f"--folder={tmp_path / 'work'}", str(tmp_path)],
        cwd=gpu.ROOT,
        env={**os.environ, "RAN": str(tmp_path / "ran")},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert sorted((tmp_path / "ran").read_text().split()) == list("01234"), found.stdout
    failed = re.findall(r"^FAILED (?:\S+::|\S*/)?(\S+)", found.stdout, re.MULTILINE)
    assert sorted(failed) == ["test_broken.py", "test_dies", "test_fails", "test_hangs"], found.stdout
    assert "assert (2 + 2) == 5" in found.stdout
    assert "ended with status -6" in found.stdout
    assert re.findall(r"^failed: .*test_fails: assert \(2 \+ 2\) == 5$", found.stdout, re.MULTILINE)
    last = found.stdout.splitlines()[-1]
    assert re.fullmatch(r"5 passed, 4 failed, 1 skipped in \d+ s; no test was left out", last)


def test_a_worker_starts_nothing_after_its_time_and_nothing_twice(tmp_path: Path) -> None:
    def worker(until: float) -> gpu._Worker:
        made = gpu._Worker(SimpleNamespace(claims=tmp_path, events=tmp_path / "events", until=until))
        made.numbers = {"one": 0, "two": 1}
        return made

    one, two = (SimpleNamespace(nodeid=name) for name in ("one", "two"))
    first, second, late = worker(math.inf), worker(math.inf), worker(0.0)
    assert late.pytest_runtest_protocol(one) is True
    assert first.pytest_runtest_protocol(one) is None
    assert second.pytest_runtest_protocol(one) is True
    assert second.pytest_runtest_protocol(two) is None
    assert [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()] == [
        {"start": "one"},
        {"start": "two"},
    ]


def test_a_spoilt_context_fails_the_test_and_ends_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    ended: list[int] = []
    monkeypatch.setattr(gpu.os, "_exit", ended.append)
    worker = gpu._Worker(SimpleNamespace(claims=tmp_path, events=tmp_path / "events", until=0.0))
    passed = SimpleNamespace(when="teardown", failed=False, skipped=False, nodeid="a", longreprtext="")
    worker.pytest_runtest_logreport(passed)
    assert ended == [gpu.SPOILT]
    said = json.loads((tmp_path / "events").read_text())
    assert (said["end"], said["outcome"]) == ("a", "failed")
    assert "an illegal memory access" in said["text"]


def test_the_last_line_says_what_was_left_out_and_why() -> None:
    tests = ["a.py::test_a[1]", "a.py::test_a[2]", "a.py::test_b", "a.py::test_c"]
    outcomes = {"a.py::test_c": "failed"}
    text = "    assert x\nE   assert 4 == 5\nE    +  where 4 = x()\na.py:3: AssertionError"
    failed, names, last = gpu.summary(tests, outcomes, {"a.py::test_c": text}, 421.0, "no time")
    assert failed == "failed: a.py::test_c: assert 4 == 5"
    assert names == "not run: test_a x 2, test_b x 1"
    assert last == "0 passed, 1 failed, 0 skipped in 421 s; 3 tests not run: no time"
    many = {f"a.py::test_a[{i}]": "its process ended" for i in range(50)}
    assert gpu.summary([], {}, many, 1.0, "")[gpu.SHOWN - 1 : -1] == [
        "failed: a.py::test_a[39]: its process ended",
        "failed: 10 more, as above",
    ]


def test_the_last_words_of_a_worker_are_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends between a look at what it has said and the look whether it runs."""
    made = SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda *arguments, **options: made)
    worker = gpu._Process(0, tmp_path, math.inf, [])
    events = tmp_path / "0.events"
    events.write_text('{"start": "a"}\n')
    assert [*worker.events(100.0)] == [{"start": "a"}]
    events.write_text('{"start": "a"}\n{"end": "a", "outcome": "passed"}\n')
    made.poll = lambda: 0
    assert not worker.over()
    assert [*worker.events(100.0)] == [{"end": "a", "outcome": "passed"}]
    assert worker.over()
    worker.log.close()
    worker.said.close()


def test_a_run_that_is_ended_ends_its_workers(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SUITE)
    command = [sys.executable, "-m", "tests.gpu", "--workers", "1", f"--folder={tmp_path / 'work'}"]
    run = subprocess.Popen(
        [*command, str(tmp_path), "-k", "hangs or passes"],
        cwd=gpu.ROOT,
        env={**os.environ, "RAN": str(tmp_path / "ran")},
        stdout=subprocess.PIPE,
        text=True,
    )
    events = tmp_path / "work" / "0.events"
    while not (events.exists() and "::test_hangs" in events.read_text().partition("start")[2]):
        assert run.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # until it is read
    run.terminate()
    said, _ = run.communicate(timeout=60)
    assert said.splitlines()[-1].endswith("not run: it was interrupted")
    left = subprocess.run(["ps", "-ef"], capture_output=True, text=True).stdout
    assert str(tmp_path / "work") not in left
