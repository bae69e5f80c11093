"""Tables and a progress line on the terminal: with rich where it is installed, in plain text where it is not."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """A table on standard output; plain text when it goes into a file."""
    cells = [list(row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _plain(header, cells, title)
        return
    if not sys.stdout.isatty():
        _plain(header, cells, title)
        return
    table = Table(title=title or None)
    for column in header:
        table.add_column(column)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _plain(header: Sequence[str], rows: list[list[str]], title: str) -> None:
    widths = [max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header))]
    if title:
        print(title)
    for row in [list(header), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def progress(items: Sequence[T], description: str) -> Iterator[T]:
    """The items, with a bar on standard error while it is a terminal."""
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
