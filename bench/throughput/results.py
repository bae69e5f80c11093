"""Compute rates, shares of the limits, ratios and losses from a run; read and write its files."""

import argparse
import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .case import OURS
from .memory import FEW

SCHEMA = 1
TIED = 0.005  # two times whose ratio is printed as 1.00 are a tie
PAGE = 4096  # bytes
SHORT = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def case_name(record: dict[str, Any]) -> str:
    return f"{record['op']} {record['variant']} {record['label']} {record['dtype']}"


def outcome(record: dict[str, Any], implementation: str = OURS) -> dict[str, Any]:
    """Return the record of one implementation: its ``status``, and its timings where that is ok."""
    if "skipped" in record:
        return {"status": "skipped", "note": record["skipped"]}
    return record["contenders"].get(
        implementation, {"status": "none", "note": "not among this op's implementations"}
    )


def microseconds(found: dict[str, Any], key: str) -> float | None:
    """Return the median of ``call`` (launch included) or ``device`` (launch-free); None if it was not measured."""
    timing = found.get(key)
    return timing["median_us"] if timing else None


def best_microseconds(found: dict[str, Any]) -> float | None:
    """Return the time that rates are computed from: launch-free if that was measured, else the whole call."""
    return microseconds(found, "device") or microseconds(found, "call")


@dataclass(frozen=True)
class Rates:
    """The rates of one implementation in one case; shares are of the machine's measured limits, None if unknown."""

    gb_per_s: float
    tflop_per_s: float
    copy_share: float
    matmul_share: float | None


def rates(record: dict[str, Any], limits: dict[str, Any], implementation: str = OURS) -> Rates | None:
    found = outcome(record, implementation)
    us = best_microseconds(found)
    if us is None or "unit" in found:
        return None
    moved, done = record["bytes"] / us * 1e6, record["flops"] / us * 1e6
    matmul = limits["matmul"].get(record["dtype"])
    return Rates(moved / 1e9, done / 1e12, moved / limits["copy"], done / matmul if matmul else None)


def ratio(record: dict[str, Any], baseline: str, key: str = "call") -> float | None:
    """Return the baseline's time over ours: above 1 ours is faster."""
    ours, theirs = (microseconds(outcome(record, name), key) for name in (OURS, baseline))
    return theirs / ours if ours and theirs else None


def is_tie(ratio: float) -> bool:
    """Return whether the ratio is 1.00 to the two decimals that are printed."""
    return abs(ratio - 1) < TIED


def others(records: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Return the unit ("" if its job is ours) of each other implementation that ran, in the order of declaration."""
    return {
        name: found.get("unit", "")
        for record in records
        for name, found in record.get("contenders", {}).items()
        if name != OURS and found["status"] in ("ok", "wrong", "failed")
    }


def baselines(records: Iterable[dict[str, Any]]) -> list[str]:
    """Return the names of the other implementations of the same job that ran at least once."""
    return [name for name, unit in others(records).items() if not unit]


def groups(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Group the records by op and variant."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault((record["op"], record["variant"]), []).append(record)
    return found


@dataclass(frozen=True)
class Loss:
    """A case in which a baseline is faster, by more than a tie; ``clear`` if it was in every round."""

    case: str
    ratio: float
    clear: bool

    @property
    def remark(self) -> str:
        return "" if self.clear else " (within the noise)"


@dataclass(frozen=True)
class Summary:
    """The speedups of one op over one baseline, launch included."""

    op: str
    baseline: str
    geometric_mean: float
    worst: float
    worst_case: str
    losses: list[Loss]
    cases: int

    @property
    def clear_losses(self) -> int:
        return sum(loss.clear for loss in self.losses)


def ratio_rounds(record: dict[str, Any], baseline: str, key: str = "call") -> np.ndarray:
    """Return the ratio in each round: its range is the noise."""
    ours, theirs = (np.array(outcome(record, name)[key]["rounds_us"]) for name in (OURS, baseline))
    return theirs / ours


def summaries(records: Sequence[dict[str, Any]]) -> list[Summary]:
    found = []
    for op in dict.fromkeys(record["op"] for record in records):
        of_op = [record for record in records if record["op"] == op]
        for baseline in baselines(of_op):
            timed = [
                Loss(case_name(record), value, bool(ratio_rounds(record, baseline).max() < 1))
                for record in of_op
                if (value := ratio(record, baseline)) is not None
            ]
            timed.sort(key=lambda each: each.ratio)
            if timed:
                mean = float(np.exp(np.mean(np.log([each.ratio for each in timed]))))
                losses = [each for each in timed if each.ratio < 1 and not is_tie(each.ratio)]
                found.append(Summary(op, baseline, mean, timed[0].ratio, timed[0].case, losses, len(timed)))
    return found


def remarks(document: dict[str, Any]) -> list[str]:
    """List what the numbers do not show: wrong, failed, absent and skipped results, and a busy machine."""
    records = document["cases"]
    found: dict[str, None] = dict.fromkeys(document.get("busy", ()))
    if runs := document.get("runs"):
        found[
            f"a time is the median of {runs} runs, each a process of its own; the rounds are those of all"
        ] = None
    for record in records:
        if "skipped" in record:
            found[f"{case_name(record)}: skipped, {record['skipped']}"] = None
        for name, result in record.get("contenders", {}).items():
            if "unit" in result and result["status"] == "ok":
                found[
                    f"{record['op']}: {name} does another job, once: its column tells how many {result['unit']} of "
                    f"{OURS} take as long; a run of more takes longer than it"
                ] = None
            if (pages := result.get("page_faults") or 0) * PAGE > 0.1 * record["bytes"] and pages > FEW:
                found[
                    f"{case_name(record)}: {name} waits for {pages:.0f} new pages of memory in each call"
                ] = None
            if result["status"] in ("wrong", "failed"):
                found[f"{case_name(record)}: {name} {result['status'].upper()}: {result['note']}"] = None
            elif result["status"] == "absent":
                found[f"{record['op']}: {name} is {result['note']}"] = None
            elif result["status"] == "left out":
                found[f"{record['op']}: {name} was timed on some shapes only (·): it {result['note']}"] = None
    for sweep in document.get("scale", ()):
        if sweep["stopped"]:
            found[f"scale of {sweep['op']} {sweep['variant']}: {sweep['stopped']}"] = None
    return list(found)


def fitted(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sweeps of the scale study that have points enough to be shown."""
    return [sweep for sweep in document.get("scale", ()) if sweep["ours"]]


def all_right(document: dict[str, Any]) -> bool:
    """Return True if every result of ours that was checked is right."""
    stops = [sweep["stopped"] for sweep in document.get("scale", ())]
    return all(outcome(record)["status"] in ("ok", "skipped") for record in document["cases"]) and not any(
        stop.startswith(("wrong", "failed")) for stop in stops
    )


def load(path: Path) -> dict[str, Any]:
    """Read a file that ``write_json`` wrote.

    Raises:
        ValueError: it cannot be read, is something else, or of another schema.
    """
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:  # neither text nor JSON
        document = None
    if not (
        isinstance(document, dict)
        and document.get("schema") == SCHEMA
        and {"machine", "limits", "cases"} <= document.keys()
    ):
        raise ValueError(f"{path}: not a result of python -m bench --json (schema {SCHEMA})")
    return document


def load_or_exit(parser: argparse.ArgumentParser, *paths: Path) -> list[dict[str, Any]]:
    """Read such files; end the program with one line and status 2 if one is something else."""
    try:
        return [load(path) for path in paths]
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def claimed(path: str | Path) -> Path:
    """Make a file that is to be written later, and its folder, if they are not there: a ``type`` for argparse."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # raises where it is a folder, or may not be written
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def write_json(document: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


CSV_COLUMNS = (
    *("op", "variant", "label", "dtype", "bytes", "flops", "cache", "contender", "status", "first_call_s"),
    *("call_us", "call_p20_us", "call_p80_us", "device_us", "device_p20_us", "device_p80_us", "gb_per_s"),
    *("tflop_per_s", "copy_share", "matmul_share", "ratio_to_gradkernels", "page_faults"),
    *("device", "date", "commit"),
)


def write_csv(document: dict[str, Any], path: Path) -> None:
    """Write one line per case and implementation; each has its machine, date and commit."""
    machine = {key: document["machine"][key] for key in ("device", "date", "commit")}
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
        lines.writeheader()
        for record in document["cases"]:
            for name in record.get("contenders", {OURS: {}}):
                found, speed = outcome(record, name), rates(record, document["limits"], name)
                line = record | machine | found | (vars(speed) if speed else {})
                for key in ("call", "device"):
                    timing = found.get(key) or {}
                    line |= {f"{key}_{name}": timing.get(name) for name in ("p20_us", "p80_us")}
                    line[f"{key}_us"] = timing.get("median_us")
                line["device"] = machine["device"]
                lines.writerow(line | {"contender": name, "ratio_to_gradkernels": ratio(record, name)})
