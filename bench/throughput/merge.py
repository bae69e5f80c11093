"""Make one run of several: ``python -m bench merge FILE... --out DIR``.

Times differ from process to process by more than within one, since each has its memory elsewhere, and a whole run may
be slower than another. So each case has the times of one run, that of the median ratio to plain torch, and the rounds
of all runs, whose range is the noise.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report, results
from .console import Screen
from .machine import slug


def merged(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one document with the cases that all runs have; the scale study is the first one's.

    Raises:
        ValueError: the runs differ in machine, versions, commit or settings.
    """
    first, *others = documents
    for other in others:
        for key in ("machine", "settings"):
            before, after = ({**found.get(key, {}), "date": None} for found in (first, other))
            if differing := [name for name in before | after if before.get(name) != after.get(name)]:
                raise ValueError(f"the runs differ in {key}: {', '.join(differing)}")
    by_name = [{results.case_name(record): record for record in found["cases"]} for found in documents]
    everywhere = [name for name in by_name[0] if all(name in found for found in by_name)]
    limits = [found["limits"] for found in documents]
    matmul = {dtype: max(each["matmul"][dtype] for each in limits) for dtype in limits[0]["matmul"]}
    return first | {
        "runs": len(documents),
        "limits": {"copy": max(each["copy"] for each in limits), "matmul": matmul},
        "busy": list(dict.fromkeys(line for found in documents for line in found.get("busy", ()))),
        "cases": [_record([found[name] for found in by_name]) for name in everywhere],
    }


def _record(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of a case; one that was skipped, if any was."""
    if skipped := [record for record in records if "skipped" in record]:
        return skipped[0]
    (plain, *_) = (*results.baselines(records), "")
    by_ratio = sorted(records, key=lambda record: results.ratio(record, plain) or 0.0)
    median = by_ratio[len(records) // 2]
    rows = {
        name: _row(row, [record["contenders"][name] for record in records])
        for name, row in median["contenders"].items()
    }
    return median | {"contenders": rows}


def _row(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return an implementation's row with the rounds of all; one that is not right, if any is not."""
    if other := [each for each in rows if each["status"] != "ok"]:
        return other[0]
    timings = {key: row[key] for key in ("call", "device") if all(key in each for each in rows)}
    rounds = {key: [us for each in rows for us in each[key]["rounds_us"]] for key in timings}
    return row | {key: timing | {"rounds_us": rounds[key]} for key, timing in timings.items()}


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", required=True, metavar="DIR", help="{device} is the machine's name")
    arguments = parser.parse_args(argv)
    try:
        document = merged(results.load_or_exit(parser, *arguments.files))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    folder = Path(arguments.out.replace("{device}", slug(document["machine"])))
    Screen().document(document)
    results.write_json(document, folder / "bench.json")
    results.write_csv(document, folder / "bench.csv")
    report.draw(document, folder)
    return int(not results.all_right(document))
