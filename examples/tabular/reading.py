"""A table as it comes: delimiter, decimal sign, encoding and kinds of columns found out, numbers in 8 bytes each."""

import codecs
import hashlib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import wrap_file

from .settings import InputError, Settings

DELIMITERS = {"tab": "\t", "\\t": "\t", "space": r"\s+"}
CELLS = 1 << 20  # parsed at a time
BOMS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # pandas skips that of UTF-8


@dataclass(frozen=True)
class Dialect:
    """How a file is written."""

    delimiter: str
    decimal: str
    encoding: str
    header: bool
    columns: list[str]
    na: list[str]

    def options(self) -> dict[str, object]:
        return {
            "sep": self.delimiter,
            "decimal": self.decimal,
            "encoding": self.encoding,
            "header": 0 if self.header else None,
            "names": self.columns,
            "na_values": self.na,
            "skipinitialspace": True,
            "low_memory": False,
        }


@contextmanager
def _refusing(path: Path, encoding: str) -> Iterator[None]:
    """Say in one line what pandas says about a file, for whoever made the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path} is empty") from error
    except UnicodeError as error:
        hint = "--encoding names another, such as cp1252, which Excel writes in Western Europe"
        raise InputError(f"{path} is not a text in {encoding}: {error}; {hint}") from error
    except LookupError as error:
        raise InputError(f"--encoding: {error}") from error
    except pd.errors.ParserError as error:
        message = str(error)
        if found := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", message):
            expected, line, seen = found.groups()
            message = f"line {line} has {seen} cells, not {expected}"
        elif found := re.search(r"EOF inside string starting at row (\d+)", message):
            message = f"a quotation mark in line {int(found[1]) + 1} is never closed"
        raise InputError(f"{path} is not a CSV file: {message}") from error


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with _refusing(path, ""), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_dialect(path: Path, settings: Settings) -> Dialect:
    """Find what the settings leave open in the first lines of the file."""
    with _refusing(path, ""), path.open("rb") as file:
        start = file.read(1 << 16)
    encoding = settings.encoding or next(
        (name for bom, name in BOMS.items() if start.startswith(bom)), "utf-8"
    )
    if b"\0" in start and not encoding.lower().startswith(("utf-16", "utf-32", "utf_16", "utf_32")):
        raise InputError(f"{path} is not a CSV file: it holds zero bytes")

    def first_lines(delimiter: str, lines: int = 100) -> pd.DataFrame:
        options = {"sep": delimiter, "encoding": encoding, "header": None, "nrows": lines, "dtype": str}
        return pd.read_csv(path, **options, keep_default_na=False, skipinitialspace=True)

    def fit(delimiter: str) -> tuple[int, int]:
        """Return the number of columns if no line has more cells than the first, else 0; the first line's cells."""
        cells = first_lines(delimiter, 1).shape[1]
        try:
            return first_lines(delimiter).shape[1] * (cells > 1), cells
        except pd.errors.ParserError:
            return 0, cells

    with _refusing(path, encoding):
        if settings.delimiter is not None:
            delimiter = DELIMITERS.get(settings.delimiter, settings.delimiter)
        else:
            delimiter = max((",", ";", "\t", "|"), key=fit)
            if fit(delimiter) == (0, 1) and fit(r"\s+")[0] and not first_lines(r"\s+").isna().any(axis=None):
                delimiter = r"\s+"
        lines = first_lines(delimiter)

    header = settings.header == "yes"
    columns = [str(number) for number in range(1, lines.shape[1] + 1)]
    if header:
        names = lines.iloc[0].fillna("").str.strip()
        columns = [name or f"column {number}" for name, number in zip(names, columns, strict=True)]
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        raise InputError(f"{path} has more than one column named {', '.join(map(repr, repeated))}")

    na = ["?", *(settings.na.split(",") if settings.na else ())]
    dialect = Dialect(delimiter, settings.decimal or ".", encoding, header, columns, na)
    if settings.decimal is None and delimiter != ",":
        comma = Dialect(delimiter, ",", encoding, header, columns, na)
        if len(_numeric(path, comma)) > len(_numeric(path, dialect)):
            return comma
    return dialect


def _numeric(path: Path, dialect: Dialect) -> list[str]:
    with _refusing(path, dialect.encoding):
        sample = pd.read_csv(path, nrows=1000, **dialect.options())
    return [name for name in sample if _is_number(sample[name])]


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def read_columns(
    path: Path, dialect: Dialect, wanted: list[str], as_text: Collection[str], console: Console
) -> pd.DataFrame:
    """Read the wanted columns: float64 where every cell is a number or missing, else the cells' texts as categories.

    The file is parsed in pieces of which the columns are kept apart: the whole is in memory once. A column that
    turns out to hold texts half way begins anew as texts ("007" must not have been 7 before).
    """
    text = {name for name in dialect.columns if name not in wanted or name in as_text}
    text |= set(dialect.columns) - set(_numeric(path, dialect))
    while True:
        parts, clash = _parts(path, dialect, wanted, text, console)
        if not clash:
            return pd.DataFrame({name: _joined(parts.pop(name)) for name in wanted}, copy=False)
        text |= clash


def _parts(
    path: Path, dialect: Dialect, wanted: list[str], text: set[str], console: Console
) -> tuple[dict[str, list], set[str]]:
    options = dialect.options() | {"dtype": dict.fromkeys(text, str)}
    rows = max(CELLS // len(dialect.columns), 1000)
    parts: dict[str, list] = {name: [] for name in wanted}
    with (
        _refusing(path, dialect.encoding),
        path.open("rb") as file,
        wrap_file(
            file,
            path.stat().st_size,
            description="reading",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bytes_read,
        pd.read_csv(bytes_read, chunksize=rows, **options) as chunks,
    ):
        for chunk in chunks:
            if clash := {name for name in wanted if name not in text and not _is_number(chunk[name])}:
                return parts, clash
            for name in wanted:
                column = chunk[name]
                if name in text:
                    cells = column.str.strip()
                    parts[name].append(pd.Categorical(cells.where(cells != "")))
                else:
                    parts[name].append(column.to_numpy(dtype=np.float64, copy=True))
    return parts, set()


def _joined(parts: list) -> np.ndarray | pd.Categorical:
    if not parts:
        return np.empty(0)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return pd.api.types.union_categoricals(parts, sort_categories=True)
