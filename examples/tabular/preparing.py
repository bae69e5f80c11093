"""From the columns of a table to the matrices that training takes, and every reason not to."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from .reading import find_dialect, read_columns, sha256
from .settings import InputError, Settings, names_in

MOST_CATEGORIES = 200  # each is a column of the matrix
FEW_CATEGORIES = 10  # as many are a category however short the table is
DATES = ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "ISO8601")
NUMBERED = re.compile(r"(^|[ _.-])(id|index|idx|row|no|nr|key|column 1)$|[a-z](Id|ID)$", re.IGNORECASE)
BLOCK = 1 << 13  # rows prepared at a time


@dataclass(frozen=True)
class Data:
    """Standardised features (rows, D) and targets (rows, K) in float32, split into training and validation rows.

    ``description`` says all that it takes to prepare another table in the same way.
    """

    description: dict[str, object]
    train_x: np.ndarray
    train_y: np.ndarray
    validation_x: np.ndarray
    validation_y: np.ndarray


def load(settings: Settings, console: Console) -> Data:
    """Return the table that the settings name, prepared as they say."""
    if settings.data is None:
        name, frame, digest = "diabetes", *diabetes()
        columns, decimal, notes = list(frame), ".", []
        targets, features = choose(settings, columns, name, settings.target or "progression")
        frame = frame[[*targets, *features]]
        forced = names_in(settings.categories, columns, name) if settings.categories else []
        for column in set(forced) & set(frame):
            frame[column] = pd.Categorical(frame[column].map("{:g}".format))
    elif settings.target is None:
        raise InputError("--data needs --target COLUMN[,COLUMN]: the column or columns to predict")
    else:
        path = Path(settings.data)
        name, digest, dialect = path.name, sha256(path), find_dialect(path, settings)
        notes = headless(dialect.columns, settings)
        try:
            targets, features = choose(settings, dialect.columns, name, settings.target)
        except InputError as error:
            raise InputError("; ".join([str(error), *notes])) from error
        forced = names_in(settings.categories, dialect.columns, name) if settings.categories else []
        frame = read_columns(path, dialect, [*targets, *features], forced, console)
        decimal = dialect.decimal
        if (found := (dialect.delimiter, decimal, dialect.encoding)) != (",", ".", "utf-8"):
            notes.append("read with delimiter {!r}, decimal sign {!r}, encoding {}".format(*found))
    return Table(name, frame, targets, forced, settings, decimal, notes).prepare(digest)


def diabetes() -> tuple[pd.DataFrame, str]:
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)
    values = np.column_stack([table.data, table.target])
    frame = pd.DataFrame(values, columns=[*table.feature_names, "progression"])
    return frame, hashlib.sha256(values.tobytes()).hexdigest()


def choose(settings: Settings, columns: list[str], table: str, target: str) -> tuple[list[str], list[str]]:
    """Return the target and the feature columns."""
    targets = names_in(target, columns, table)
    if len(set(targets)) < len(targets):
        raise InputError(f"--target names a column twice: {target}")
    dropped = names_in(settings.drop, columns, table) if settings.drop else []
    features = names_in(settings.features, columns, table) if settings.features else columns
    for option, names in (("--drop", dropped), ("--features", features if settings.features else [])):
        if both := set(names) & set(targets):
            raise InputError(f"{option} names a target: {sorted(both)[0]}")
    features = [name for name in dict.fromkeys(features) if name not in (*targets, *dropped)]
    if not features:
        raise InputError(f"{table} has no column left to predict {target} from")
    return targets, features


def headless(columns: list[str], settings: Settings) -> list[str]:
    """Return a hint if the first line holds numbers where names are expected."""
    if settings.header == "no" or pd.to_numeric(pd.Series(columns), errors="coerce").isna().any():
        return []
    start = ", ".join(columns[:3])
    return [
        f"the first line holds numbers ({start}): if it is no header, --header no names the columns 1, 2, ..."
    ]


class Table:
    """The columns in use, checked one by one: what is wrong with a table is said by column, all at once."""

    def __init__(
        self,
        name: str,
        frame: pd.DataFrame,
        targets: list[str],
        forced: list[str],
        settings: Settings,
        decimal: str,
        notes: list[str],
    ) -> None:
        self.name, self.frame, self.targets, self.forced = name, frame, targets, forced
        self.settings, self.decimal, self.notes = settings, decimal, notes
        self.rows = len(frame)
        self.dates: dict[str, str] = {}
        self.problems: list[str] = []
        self.remedies: dict[str, None] = {}

    def prepare(self, digest: str) -> Data:
        if self.rows < 2:
            raise InputError(f"{self.name} has {self.rows} row(s) of values; at least 2 are needed")
        for column in list(self.frame):
            self.check(column)
        self.check_missing()
        if self.problems:
            more = f" (and {len(self.problems) - 5} columns more)" if len(self.problems) > 5 else ""
            remedies = "".join(f"; {remedy}" for remedy in self.remedies)
            raise InputError(f"{self.name}: {'; '.join(self.problems[:5])}{more}{remedies}")
        return self.split(digest)

    def refuse(self, column: str, what: str, *remedies: str) -> None:
        self.problems.append(f"column {column!r} {what}")
        self.remedies |= dict.fromkeys(remedies)

    def check(self, column: str) -> None:
        values = self.frame[column]
        if values.isna().all():
            self.refuse(column, f"has no value in any of {self.rows} rows", "--drop leaves a column out")
        elif isinstance(values.dtype, pd.CategoricalDtype):
            self.check_text(column, values.cat.remove_unused_categories())
        elif count := int((infinite := np.isinf(values.to_numpy())).sum()):
            where = f"{count} of {self.rows} rows, first in row {infinite.argmax() + 1}"
            self.refuse(column, f"holds infinite numbers in {where}")
        elif column not in self.targets:
            self.check_numbering(column, values.to_numpy())

    def check_numbering(self, column: str, values: np.ndarray) -> None:
        if self.rows <= FEW_CATEGORIES:
            return
        counts = (np.diff(values) == 1).all()
        if counts or (
            NUMBERED.search(column) and (values % 1 == 0).all() and len(np.unique(values)) == self.rows
        ):
            what = "counts the rows" if counts else "has another number in each row"
            self.notes.append(
                f"column {column!r} {what}; if it is an id, it says nothing about new rows: --drop {column!r}"
            )

    def check_text(self, column: str, values: pd.Series) -> None:
        """Find out whether a column of texts is numbers after all, a category, dates, or refused."""
        present = int(values.notna().sum())
        words = values.cat.categories
        if column in self.forced and column not in self.targets:
            self.frame[column] = values
            return
        # Each different text is looked at once, however many rows hold it.
        numbers = numbers_in(words, self.decimal)
        codes = values.cat.codes.to_numpy()
        texts = np.isin(codes, np.flatnonzero(np.isnan(numbers)))
        count = int(texts.sum())
        examples = ", ".join(repr(words[code]) for code in pd.unique(codes[texts])[:3])
        holds = f"holds text in {count} of {self.rows} rows: {examples}"
        if count == 0:
            self.frame[column] = np.append(numbers, np.nan)[codes]
        elif column in self.targets:
            self.refuse(column, f"{holds} (first in row {texts.argmax() + 1}); a target is a number")
        elif 2 * count <= present:
            self.refuse(
                column,
                f"{holds} (first in row {texts.argmax() + 1})",
                "--na WORD counts a word as missing",
                "--categories COLUMN encodes a column by its values",
            )
        elif formats := date_formats(words):
            self.check_dates(column, values, formats, examples)
        elif len(words) > max(FEW_CATEGORIES, min(MOST_CATEGORIES, self.rows // 2)):
            many = f"{len(words)} different ones"
            self.refuse(
                column,
                f"{holds}, {'each a different one, as ids are' if len(words) == present else many}",
                "--drop leaves a column out",
                "--categories encodes each of its values",
            )
        else:
            self.frame[column] = values

    def check_dates(self, column: str, values: pd.Series, formats: list[str], examples: str) -> None:
        if self.settings.dates == "refuse":
            self.refuse(
                column,
                f"holds dates ({examples})",
                "--dates expand replaces a date by its days, month and weekday",
                "--drop leaves a column out",
            )
        elif len(formats) > 1:
            self.refuse(column, f"holds dates that read as day/month or month/day ({examples})")
        elif taken := [part for part in date_parts(column) if part in self.frame]:
            self.refuse(column, f"holds dates, to be expanded to {taken[0]!r}, which is a column already")
        else:
            self.dates[column], self.frame[column] = formats[0], values

    def check_missing(self) -> None:
        missing = {name: count for name, count in self.frame.isna().sum().items() if 0 < count < self.rows}
        how = self.settings.missing
        if how == "error":
            for column, count in missing.items():
                first = int(self.frame[column].isna().to_numpy().argmax()) + 1
                self.refuse(
                    column,
                    f"has no value in {count} of {self.rows} rows, first in row {first}",
                    "--missing drop leaves such rows out, --missing mean fills them in",
                )
        elif missing and not self.problems:
            kept = (
                self.frame[list(self.frame) if how == "drop" else self.targets].notna().all(axis=1).to_numpy()
            )
            # Column by column: the table is never in memory twice.
            self.frame = pd.DataFrame(
                {name: chosen(self.frame.pop(name), kept) for name in list(self.frame)}, copy=False
            )
            if left_out := self.rows - len(self.frame):
                self.notes.append(f"left out {left_out} of {self.rows} rows for want of a value")
            self.rows = len(self.frame)
            filled = {name: count for name, count in self.frame.isna().sum().items() if count}
            if filled:
                counts = ", ".join(f"{name!r} ({count})" for name, count in filled.items())
                self.notes.append(f"filled missing values by the mean or the commonest category: {counts}")
            if self.rows < 2:
                self.problems.append(
                    f"{self.rows} row(s) are left with all values; --missing mean fills them in"
                )
            for column in (name for name, count in filled.items() if count == self.rows):
                self.refuse(
                    column,
                    f"has no value in any of the {self.rows} rows that are left",
                    "--drop leaves a column out",
                )

    def split(self, digest: str) -> Data:
        order = np.random.default_rng(self.settings.seed).permutation(self.rows)
        held_out = min(max(round(self.settings.validation * self.rows), 1), self.rows - 1)
        validation, train = np.sort(order[:held_out]), np.sort(order[held_out:])

        targets = self.frame[self.targets].to_numpy(dtype=float)
        if constant := [
            name for name, y in zip(self.targets, targets[train].T, strict=True) if np.ptp(y) == 0
        ]:
            raise InputError(
                f"target {constant[0]!r} is constant over the training rows: there is nothing to learn"
            )
        frame = expand_dates(self.frame, self.dates)
        encoders = [Encoder(name, frame.pop(name), train) for name in list(frame) if name not in self.targets]
        features = [feature for encoder in encoders for feature in encoder.features]
        if not features:
            raise InputError(f"{self.name} has no feature whose values differ")
        x_scaler, parts = StandardScaler(), []
        with np.errstate(over="ignore", invalid="ignore"):
            y_scaler = StandardScaler().fit(targets[train])
            for rows in blocks(train):
                x_scaler.partial_fit(np.hstack([encoder(rows) for encoder in encoders]))
            for part in (train, validation):
                x = np.empty((len(part), len(features)), dtype=np.float32)
                for at, rows in zip(range(0, len(part), BLOCK), blocks(part), strict=True):
                    x[at : at + BLOCK] = x_scaler.transform(
                        np.hstack([encoder(rows) for encoder in encoders])
                    )
                parts += [x, y_scaler.transform(targets[part]).astype(np.float32)]
        scales = np.append(x_scaler.scale_, y_scaler.scale_)
        if not (np.isfinite(scales).all() and all(np.isfinite(part).all() for part in parts)):
            raise InputError(f"{self.name} holds numbers that are too large to standardise")
        scaling = {
            "feature_mean": x_scaler.mean_,
            "feature_scale": x_scaler.scale_,
            "target_mean": y_scaler.mean_,
            "target_scale": y_scaler.scale_,
        }
        description = {
            "name": self.name,
            "sha256": digest,
            "features": [feature["name"] for feature in features],
            "targets": self.targets,
            "train_rows": len(train),
            "validation_rows": len(validation),
            "split_sha256": hashlib.sha256(validation.astype("<i8").tobytes()).hexdigest(),
            "scaling": {name: numbers.tolist() for name, numbers in scaling.items()},
            "encoding": features,
            "dates": self.dates,
            "notes": self.notes,
        }
        return Data(description, *parts)


def chosen(column: pd.Series, rows: np.ndarray) -> pd.Series:
    """Return these rows of a column; of a category, the words that they hold."""
    column = column[rows]
    return column.cat.remove_unused_categories() if isinstance(column.dtype, pd.CategoricalDtype) else column


class Encoder:
    """A feature column as one or more columns of numbers: missing values filled in, categories one-hot."""

    def __init__(self, column: str, values: pd.Series, train: np.ndarray) -> None:
        self.hot = None
        if isinstance(values.dtype, pd.CategoricalDtype):
            self.values = values.cat.codes.to_numpy()[:, None]
            # The training rows may lack it altogether: then the baseline, whose code is 0.
            fill = SimpleImputer(missing_values=-1, strategy="most_frequent", keep_empty_features=True)
            fill.fit(self.values[train])
            baseline, *words = map(str, values.cat.categories)
            codes = np.arange(1 + len(words))[:, None]
            # Validation rows may have words of their own, which training leaves at 0.
            seen = np.isin(codes[:, 0], fill.transform(self.values[train])).tolist()
            # The first category is the baseline that the others are compared with.
            self.hot = OneHotEncoder(drop="first", sparse_output=False, dtype=np.float32).fit(codes)
            common = {
                "column": column,
                "baseline": baseline,
                "fill": [baseline, *words][int(fill.statistics_[0])],
                "baseline_seen": seen[0],
            }
            self.features = [
                {"name": f"{column} = {word}", "category": word, "seen": found} | common
                for word, found in zip(words, seen[1:], strict=True)
            ]
        else:
            self.values = values.to_numpy(dtype=float)[:, None]
            fill = SimpleImputer(keep_empty_features=True).fit(self.values[train])
            self.features = [{"name": column, "column": column, "fill": float(fill.statistics_[0])}]
        self.fill = fill if values.isna().any() else None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        cells = self.values[rows] if self.fill is None else self.fill.transform(self.values[rows])
        return cells if self.hot is None else self.hot.transform(cells)


def blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[at : at + BLOCK] for at in range(0, len(rows), BLOCK))


def numbers_in(words: pd.Index, decimal: str) -> np.ndarray:
    """Return the finite numbers that the words write; NaN for other words."""
    texts = pd.Series(words, dtype=object)
    if decimal != ".":
        texts = texts.str.replace(".", "no number", regex=False).str.replace(decimal, ".", regex=False)
    numbers = pd.to_numeric(texts, errors="coerce").to_numpy(dtype=float)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def date_formats(words: pd.Index) -> list[str]:
    """Return the formats that all of the words have; two where the day and the month cannot be told apart."""
    sample = pd.Series(words, dtype=object)
    if not sample.str.fullmatch(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([T ].*)?").all():
        return []
    found = [form for form in DATES if not parse_dates(sample, form).isna().any()]
    return found[:2] if found[:1] == ["%m/%d/%Y"] else found[:1]


def parse_dates(words: pd.Series, form: str) -> pd.Series:
    return pd.to_datetime(words, format=form, errors="coerce", utc=True)


def date_parts(column: str) -> list[str]:
    """Return the columns that one of dates is expanded to."""
    return [f"{column} ({part})" for part in ("days", "month", "weekday")]


def expand_dates(frame: pd.DataFrame, dates: dict[str, str]) -> pd.DataFrame:
    """Put days since 1970, the month and the weekday in the place of each column of dates."""
    parts: dict[str, object] = {}
    for name in list(frame):
        column = frame.pop(name)
        if name not in dates:
            parts[name] = column
            continue
        # Each different date is parsed once; the code of a missing one, -1, takes the last.
        when = parse_dates(pd.Series([*column.cat.categories, None], dtype=object), dates[name])
        days = (when - pd.Timestamp("1970-01-01", tz="utc")) / pd.Timedelta(days=1)
        count, *named = date_parts(name)
        parts[count] = days.to_numpy()[column.cat.codes]
        for part, words in zip(named, (when.dt.strftime("%m"), when.dt.day_name()), strict=True):
            parts[part] = pd.Categorical(words.to_numpy(dtype=object)[column.cat.codes])
    return pd.DataFrame(parts, copy=False)
