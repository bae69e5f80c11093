"""Numbers on the command line; tables, lines, progress and JSON on the terminal, with rich where it is installed."""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


Cell = str | tuple[str, str]  # a text, or a text and one of STYLES
STYLES = {"": "", "good": "green", "bad": "bold red", "dim": "dim", "bold": "bold"}


def print_line(text: str = "", style: str = "") -> None:
    """Print a line on standard output, in one of STYLES on a terminal."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print(text)
        return
    if sys.stdout.isatty():
        Console().print(Text(text, STYLES[style]), soft_wrap=True)
    else:
        print(text)


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[Cell]], title: str = "", numbers: bool = False
) -> None:
    """Print a table on standard output; in plain text when it goes into a file.

    Args:
        numbers: align all columns but the first to the right.
    """
    styled = [[(cell, "") if isinstance(cell, str) else cell for cell in row] for row in rows]
    cells = [[text for text, _ in row] for row in styled]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _plain(header, cells, title, numbers)
        return
    if not sys.stdout.isatty():
        _plain(header, cells, title, numbers)
        return
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, column in enumerate(header):
        table.add_column(column, justify="right" if numbers and i else "left", no_wrap=numbers and i > 0)
    for row in styled:
        table.add_row(*(Text(text, STYLES[style]) for text, style in row))
    Console().print(table)


def _plain(header: Sequence[str], rows: list[list[str]], title: str, numbers: bool) -> None:
    widths = [max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header))]
    if title:
        print(title)
    for row in [list(header), *rows]:
        first, *others = map(str.ljust, row, widths)
        if numbers:
            others = list(map(str.rjust, row[1:], widths[1:]))
        print("  ".join([first, *others]).rstrip())


def progress(items: Sequence[T], description: str) -> Iterator[T]:
    """Yield the items, with a bar on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        for i, item in enumerate(items):
            print(f"\r{description} {i + 1}/{len(items)}", end="", file=sys.stderr, flush=True)
            yield item
        print(file=sys.stderr)
        return
    yield from track(items, description=description, console=Console(stderr=True), transient=True)


def count(text: str) -> int:
    """Parse a whole number of 1 or more: a ``type`` for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def positive(text: str) -> float:
    """Parse a finite number above 0: a ``type`` for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def to_json(value: Any) -> str:
    """Return JSON that any parser reads: NaN and infinities are strings."""
    return json.dumps(_jsonable(value), indent=2, allow_nan=False)
