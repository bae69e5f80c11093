"""The report on a file: as a table, JSON, SARIF and annotations for GitHub."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from ..console import print_line, print_table
from . import verdict as v
from .verdict import Case

MEANINGS = {
    v.UNSAFE: "A kernel touches memory that it may not, leaves its output unwritten, or races.",
    v.MUTATED: "The forward or the backward writes into its inputs.",
    v.REUSED: "Other values at the same addresses give the old answer.",
    v.NONDETERMINISTIC: "Two calls with the same inputs differ.",
    v.NO_KERNEL: "No kernel did the work.",
    v.WRONG_VALUE: "The result is further from the reference in float64 than rounding explains.",
    v.WRONG_GRADIENT: "The backward gives another gradient than the reference.",
    v.NOT_JUDGED: "It could not be judged.",
}


def as_json(file: str, cases: Sequence[Case]) -> str:
    """Return the report as JSON."""
    keys = ("name", "verdict", "shape", "dtype", "message", "where")
    listed = [{key: getattr(case, key) for key in keys} for case in cases]
    return json.dumps({"file": file, "verdict": v.of_file(cases), "cases": listed}, indent=2)


def as_sarif(file: str, cases: Sequence[Case]) -> str:
    """Return the faults, and what was not judged, as SARIF 2.1.0."""
    results = [
        {
            "ruleId": _rule(case.verdict),
            "level": _level(case),
            "message": {"text": f"{case.name}: {case.verdict}: {case.message}"},
            "locations": [{"physicalLocation": _place(file, case)}],
        }
        for case in _reported(cases)
    ]
    rules = [{"id": _rule(verdict), "shortDescription": {"text": text}} for verdict, text in MEANINGS.items()]
    driver = {
        "name": "gradkernels",
        "informationUri": "https://github.com/gradkernels/gradkernels",
        "rules": rules,
    }
    driver.pop("informationUri")
    run = {"tool": {"driver": driver}, "results": results}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _level(case: Case) -> str:
    return "error" if case.verdict in v.FAULTS else "note" if case.refusal else "warning"


def _reported(cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if case.verdict != v.VERIFIED]


def _line(file: str, case: Case) -> tuple[str, int]:
    """Return the path and the line of a case; another file than the judged one keeps its bare name."""
    name, _, line = case.where.rpartition(":")
    if not line.isdigit():
        return file, 1
    return (file if name == Path(file).name else name), int(line)


def _place(file: str, case: Case) -> dict[str, Any]:
    path, line = _line(file, case)
    return {"artifactLocation": {"uri": Path(path).as_posix()}, "region": {"startLine": line}}


def annotate(file: str, cases: Sequence[Case], stream: TextIO = sys.stdout) -> None:
    """Write workflow commands, which GitHub shows at the lines concerned."""
    kinds = {"error": "error", "warning": "warning", "note": "notice"}
    for case in _reported(cases):
        path, line = _line(file, case)
        title = _escaped(f"{case.name}: {case.verdict}").replace(":", "%3A").replace(",", "%2C")
        print(
            f"::{kinds[_level(case)]} file={path},line={line},title={title}::{_escaped(case.message)}",
            file=stream,
        )


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def show(file: str, cases: Sequence[Case]) -> None:
    """Print a table of the cases, and the verdict on the file."""
    rows = [
        (
            case.name,
            "x".join(map(str, case.shape)),
            case.dtype,
            (
                case.verdict,
                "good" if case.verdict == v.VERIFIED else "bad" if case.verdict in v.FAULTS else "dim",
            ),
            case.where,
        )
        for case in cases
    ]
    print_table(("case", "shape", "dtype", "verdict", "where"), rows)
    seen: set[tuple[str, str]] = set()
    for case in _reported(cases):
        if (key := (case.verdict, case.message)) not in seen:
            seen.add(key)
            print_line(f"{case.name}: {case.verdict}: {case.message}")
    print_line(f"{file}: {v.of_file(cases)}", "good" if v.of_file(cases) == v.VERIFIED else "bad")
