"""Print a run: header, progress, tables."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gradkernels.verify.console import Cell, print_line, print_table

from .case import OURS
from .results import (
    SHORT,
    fitted,
    groups,
    is_tie,
    microseconds,
    others,
    outcome,
    rates,
    ratio,
    remarks,
    summaries,
)

try:
    import rich.console
    import rich.markup
    import rich.progress
except ImportError:
    rich = None  # type: ignore[assignment]


def number(value: float | None) -> str:
    """Format with three significant digits and at most three decimals."""
    if value is None:
        return "-"
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"


def times(value: float) -> tuple[str, str]:
    """Format a speedup; a tie is neither good nor bad."""
    style = "" if is_tie(value) else "good" if value > 1 else "bad"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}", style


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def header(machine: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    """Describe the machine, its versions and its limits, a line each."""
    gpu = [f"{key} {machine[key]}" for key in ("capability", "driver", "runtime") if key in machine]
    threads = [f"{machine['threads']} threads"] if "threads" in machine else []
    memory = [f"memory: {machine['memory']}"] if "memory" in machine else []
    versions = [f"{key} {machine[key]}" for key in ("torch", "triton", "numpy", "python", "gradkernels")]
    matmul = ", ".join(f"{SHORT[name]} {number(rate / 1e12)}" for name, rate in limits["matmul"].items())
    return [
        " · ".join([machine["device"], *gpu, *threads, *memory]),
        " · ".join(versions),
        f"commit {machine['commit']} · {machine['date']} · float32 products: {machine['fp32_precision']}",
        f"measured limits: copy {number(limits['copy'] / 1e9)} GB/s · matmul {matmul} TFLOP/s",
    ]


def table(records: Sequence[dict[str, Any]], limits: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Return the columns and rows of one variant of an op."""
    rivals = others(records)
    free = any("device" in outcome(record) for record in records)
    columns = ["shape", "dtype", "us", "GB/s", "TF/s", "cp%", "mm%", *rivals, "1st s"]
    if free:
        columns[3:3] = ["free us"]
    unmeasured: dict[str, Cell] = {"left out": ("·", "dim"), "none": ("-", "dim"), "absent": ("-", "dim")}
    rows: list[list[Cell]] = []
    for record in records:
        ours = outcome(record)
        row: list[Cell] = [record["label"], (SHORT[record["dtype"]], "dim")]
        speed = rates(record, limits)
        if speed is None:
            rows.append([*row, (ours["status"].upper(), "bad"), *[("-", "dim")] * (len(columns) - 3)])
            continue
        row.append(number(microseconds(ours, "call")))
        if free:
            row.append(number(microseconds(ours, "device")))
        row += [number(speed.gb_per_s), number(speed.tflop_per_s)]
        row += [percent(speed.copy_share), percent(speed.matmul_share)]
        for name, unit in rivals.items():
            value, status = ratio(record, name), outcome(record, name)["status"]
            if value is None:
                row.append(unmeasured.get(status, (status.upper(), "bad")))
            else:
                row.append(f"{number(value)} {unit}" if unit else times(value))
        rows.append([*row, (number(ours["first_call_s"]), "dim")])
    return columns, rows


class Screen:
    """The terminal, or the file that standard output goes to."""

    line = staticmethod(print_line)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        print_line()
        print_table(columns, rows, title, numbers=True)

    @contextlib.contextmanager
    def progress(self, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
        """Yield a function that takes the name of the next step and advances a bar or prints a line on stderr."""
        if not (rich and sys.stderr.isatty()):
            numbers = iter(range(done + 1, total + 1))
            yield lambda name: print(f"[{next(numbers)}/{total}] {name}", file=sys.stderr, flush=True)
            return
        columns = (
            rich.progress.BarColumn(24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.description}"),
        )
        console = rich.console.Console(stderr=True)
        with rich.progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total, completed=done - 1)
            yield lambda name: bar.update(task, advance=1, description=rich.markup.escape(name))

    def document(self, document: dict[str, Any]) -> None:
        """Print all tables of a run, its summary and its remarks."""
        records = document["cases"]
        for (op, variant), found in groups(records).items():
            self.table(f"{op}: {variant}", *table(found, document["limits"]))
        found = summaries(records)
        rows = [
            [s.op, s.baseline, times(s.geometric_mean), times(s.worst), f"{s.clear_losses} of {s.cases}"]
            for s in found
        ]
        self.table(
            f"speedup over each baseline, launch included (above 1: {OURS} is faster)",
            ("op", "baseline", "geo. mean", "worst", "slower"),
            rows,
        )
        for s in found:
            if s.losses:
                self.line(f"{s.op}: slower than {s.baseline}", "bold")
            for loss in s.losses:
                self.line(f"  {times(loss.ratio)[0]}  {loss.case}{loss.remark}", "" if loss.remark else "bad")
        if scale := fitted(document):
            self.table("Scale: time = fixed + c size^p", *scale_table(scale))
        for remark in remarks(document):
            self.line(f"note: {remark}", "dim")


def scale_table(scale: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Return the table of the scale study: fixed cost, knee and exponent, ours and then torch's."""
    columns = ["sweep", "axis", "to", "fixed us", "knee", "p", "torch's", "knee", "p"]
    rows: list[list[Cell]] = []
    for sweep in scale:
        row: list[Cell] = [f"{sweep['op']}: {sweep['variant']}", sweep["axis"]]
        row.append(f"{sweep['points'][-1]['value']:.2g}")
        for fit in (sweep["ours"], sweep["torch"]):
            knee = f"{fit['knee']:.2g}" if fit["knee"] else "beyond"
            row += [number(fit["fixed_us"]), knee, number(fit["exponent"])]
        rows.append(row)
    return columns, rows
