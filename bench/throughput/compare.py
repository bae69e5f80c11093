"""Compare two runs case by case: ``python -m bench compare BEFORE.json AFTER.json``.

A case is slower when both hold for the time of ours *and* for its ratio to plain torch in the same run:

* the medians differ by more than the threshold (5 %), and
* every round after is slower than every round before.

The rounds of a run are spread over its whole duration of that case, with all implementations in turns, so their
range is the noise; and a busier or slower machine slows torch as well. With seven rounds each, two equal runs
satisfy either condition by chance once in 3432 cases.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gradkernels.verify.console import Cell, positive, print_line, print_table

from .case import OURS
from .results import baselines, case_name, load_or_exit, outcome

THRESHOLD = 0.05


@dataclass(frozen=True)
class Change:
    """One case in two runs.

    Attributes:
        name: of the case.
        verdict: ``slower``, ``faster``, ``same``, ``noise`` (beyond the threshold, but not beyond the noise
            or not against torch), ``wrong`` (was right), ``gone``, ``new``.
        before, after: microseconds.
        relative: how the ratio of our time to torch's changed; 1.2 is a fifth slower.
    """

    name: str
    verdict: str
    before: float | None = None
    after: float | None = None
    relative: float | None = None


Rounds = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]


def _rounds(record: dict[str, Any]) -> Rounds:
    """Return our time in each round, and its ratio to plain torch's, by what was measured.

    Launch-free times come first; those of calls without torch's, which stand for the ratio too, last.
    """
    ours = outcome(record)
    found: Rounds = {}
    for name in baselines([record])[:1]:
        plain = outcome(record, name)
        for key in ("device", "call"):
            if key in ours and key in plain:
                times, torchs = (np.array(each[key]["rounds_us"]) for each in (ours, plain))
                found[key, name] = times, times / torchs
    if "call" in ours:
        times = np.array(ours["call"]["rounds_us"])
        found["call", ""] = times, times
    return found


def _direction(before: np.ndarray, after: np.ndarray, threshold: float) -> int:
    """Return 1 if after is larger beyond threshold and noise, -1 if smaller, else 0."""
    change = np.median(after) / np.median(before)
    if change > 1 + threshold and after.min() > before.max():
        return 1
    if change < 1 / (1 + threshold) and after.max() < before.min():
        return -1
    return 0


def compare_case(before: dict[str, Any], after: dict[str, Any], threshold: float = THRESHOLD) -> Change:
    name = case_name(after)
    if outcome(before)["status"] == "ok" and outcome(after)["status"] in ("wrong", "failed"):
        return Change(name, "wrong")
    earlier, later = _rounds(before), _rounds(after)
    measured = next((each for each in earlier if each in later), None)
    if measured is None:
        return Change(name, "new" if later else "gone")
    old, new = earlier[measured], later[measured]
    times = [float(np.median(each[0])) for each in (old, new)]
    relative = float(np.median(new[1]) / np.median(old[1]))
    by_clock, by_ratio = (_direction(old[i], new[i], threshold) for i in (0, 1))
    if by_clock == by_ratio != 0:
        verdict = "slower" if by_clock > 0 else "faster"
    else:
        moved = abs(times[1] / times[0] - 1) > threshold or by_clock or by_ratio
        verdict = "noise" if moved else "same"
    return Change(name, verdict, *times, relative)


def compare_runs(
    before: dict[str, Any], after: dict[str, Any], threshold: float = THRESHOLD
) -> Sequence[Change]:
    """Compare every case of either run, in the order of the later one."""
    old = {case_name(record): record for record in before["cases"]}
    new = {case_name(record): record for record in after["cases"]}
    changes = [
        compare_case(old[name], record, threshold) if name in old else Change(name, "new")
        for name, record in new.items()
    ]
    return [*changes, *(Change(name, "gone") for name in old if name not in new)]


def regressed(changes: Sequence[Change]) -> bool:
    return any(change.verdict in ("slower", "wrong") for change in changes)


def rows(changes: Sequence[Change]) -> list[list[Cell]]:
    """Return the rows of the table; the cases that changed come first."""
    order = ("wrong", "slower", "faster", "gone", "new", "noise", "same")
    styles = {"wrong": "bad", "slower": "bad", "faster": "good", "noise": "dim", "same": "dim"}
    found = []
    for change in sorted(changes, key=lambda change: order.index(change.verdict)):
        style = styles.get(change.verdict, "")
        numbers = [f"{value:.4g}" if value is not None else "-" for value in (change.before, change.after)]
        clock = f"{change.after / change.before:.2f}x" if change.before and change.after else "-"
        relative = f"{change.relative:.2f}x" if change.relative else "-"
        verdict = change.verdict.upper() if style == "bad" else change.verdict
        found.append([change.name, *numbers, clock, relative, (verdict, style)])
    return found


COLUMNS = ("case", "before us", "after us", "clock", f"{OURS} / torch", "verdict")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=positive, default=THRESHOLD, help="smallest change that counts (0.05)"
    )
    arguments = parser.parse_args(argv)
    before, after = load_or_exit(parser, arguments.before, arguments.after)
    if before["machine"]["device"] != after["machine"]["device"]:
        print_line("the two runs are of different machines", "bad")
    changes = compare_runs(before, after, arguments.threshold)
    print_line()
    print_table(COLUMNS, rows(changes), f"{arguments.before} -> {arguments.after}", numbers=True)
    counts = Counter(change.verdict for change in changes)
    said = (f"{counts[word]} {word}" for word in ("wrong", "slower", "faster", "noise"))
    print_line(f"{', '.join(said)}, of {len(changes)} cases")
    return int(regressed(changes))
