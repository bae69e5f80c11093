"""merge: several runs become one, whose noise is that between them; runs of different machines are refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as cli
from bench.throughput import merge, results

from .fakes import Clock, document, doubling


def run_of(us: float, plain_us: float = 150.0) -> dict[str, Any]:
    clock = Clock()
    return document(*(doubling(clock, us, plain_us, n=n) for n in (1000, 77)), clock=clock)


def test_a_case_is_that_of_the_median_ratio_and_has_the_rounds_of_all(tmp_path: Path) -> None:
    """The second run's machine took three times as long over everything; the third has the median of the times."""
    runs = [run_of(100.0), run_of(300.0, 450.0), run_of(200.0)]
    runs[1]["cases"].pop()
    for i, run in enumerate(runs):
        run["machine"]["date"] = str(i)
        run["busy"] = ["busy"] * i
        results.write_json(run, tmp_path / f"{i}.json")
    files = [str(tmp_path / f"{i}.json") for i in range(3)]
    assert cli.main(["merge", *files, "--out", f"{tmp_path}/{{device}}"]) == 0
    found = json.loads((tmp_path / "a-clock" / "bench.json").read_text())
    (record,) = found["cases"]  # the one that all have
    assert results.ratio(record, "eager") == pytest.approx(1.5, rel=0.1)
    rounds = results.ratio_rounds(record, "eager")
    assert len(rounds) == sum(len(results.ratio_rounds(run["cases"][0], "eager")) for run in runs)
    assert rounds.min() < 1 < rounds.max()
    assert found["busy"] == ["busy"]
    assert any("3 runs" in remark for remark in results.remarks(found))
    assert {path.name for path in (tmp_path / "a-clock").iterdir()} >= {"bench.csv", "bench.json"}


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_what_one_run_found_wrong_is_wrong(status: str) -> None:
    runs = [run_of(100.0) for _ in range(3)]
    runs[1]["cases"][0]["contenders"]["gradkernels"] = {
        "status": status,
        "note": "result 0",
        "first_call_s": None,
    }
    runs[2]["cases"][1] = {**without_rows(runs[2]["cases"][1]), "skipped": "out of memory"}
    whole = merge.merged(runs)
    assert results.outcome(whole["cases"][0])["status"] == status
    assert results.outcome(whole["cases"][1])["status"] == "skipped"
    assert not results.all_right(whole)


def without_rows(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "contenders"}


@pytest.mark.parametrize(
    ("key", "name"), [("machine", "commit"), ("machine", "torch"), ("settings", "seconds")]
)
def test_runs_of_different_things_are_refused(
    key: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = run_of(100.0)
    other = copy.deepcopy(run)
    other.setdefault(key, {})[name] = "another"
    paths = [str(tmp_path / each) for each in ("a.json", "b.json")]
    for found, path in zip((run, other), paths, strict=True):
        results.write_json(found, Path(path))
    with pytest.raises(SystemExit) as ended:
        cli.main(["merge", *paths, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "bench.json").exists()
