"""compare: what is slower is reported, noise is not, and other files are refused."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as cli
from bench.throughput import compare, results

from .fakes import Clock, document, doubling, noise


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


def test_compare_takes_times_of_one_kind() -> None:
    """The launch-free ones, if both runs have them of both; the calls of ours alone, if one has none of torch's."""
    calls = run_of(1)
    free, alone = (copy.deepcopy(run_of(seed)) for seed in (2, 3))
    for record in free["cases"]:
        for timings in record["contenders"].values():
            timings["device"] = {"median_us": 10.0, "rounds_us": [10.0] * 7}
    for record in alone["cases"]:
        record["contenders"]["eager"] = {"status": "failed", "note": "out of memory"}
    for before, after in itertools.permutations((calls, free, alone), 2):
        changes = compare.compare_runs(before, after)
        assert {change.verdict for change in changes} == {"same"}
        assert all(0.9 < change.relative < 1.1 for change in changes)
    for change in compare.compare_runs(free, free):
        assert (change.before, change.after, change.relative) == (10.0, 10.0, 1.0)


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


@pytest.mark.parametrize("command", ["report", "compare", "merge"])
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
        cli.main(
            [
                command,
                str(path),
                *{"compare": [str(path)], "merge": ["--out", str(tmp_path)]}.get(command, []),
            ]
        )
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m bench {command}: error: ")
    assert str(path) in line
