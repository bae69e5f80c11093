"""The trained model in the table's own units, and its predictions for another table."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from .preparing import expand_dates, numbers_in, parse_dates
from .reading import find_dialect, read_columns
from .settings import InputError, Settings

KIND = "gradkernels linear model 1"  # of the files that predict understands


def in_units(weight: np.ndarray, bias: np.ndarray, scaling: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients (K, D) and intercepts (K,) for features and targets that are not standardised."""
    mean, scale, target_mean, target_scale = (
        np.array(scaling[f"{part}_{what}"]) for part in ("feature", "target") for what in ("mean", "scale")
    )
    coefficients = weight * target_scale[:, None] / scale
    return coefficients, target_mean + target_scale * bias - coefficients @ mean


def save(
    path: Path, coefficients: np.ndarray, intercepts: np.ndarray, data: dict, settings: Settings
) -> None:
    """Save tensors, numbers and texts only: ``torch.load(path, weights_only=True)`` reads it."""
    kept = {name: data[name] for name in ("features", "targets", "encoding", "dates")}
    model = {
        "kind": KIND,
        "coefficients": torch.from_numpy(coefficients),
        "intercepts": torch.from_numpy(intercepts),
        "missing": settings.missing,
        "reading": settings.reading(),
    }
    torch.save(model | kept, path)


def load(path: Path) -> dict:
    try:
        model = torch.load(path, map_location="cpu", weights_only=True)
        if model["kind"] != KIND:
            raise ValueError(f"it holds a {model['kind']}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # torch.load alone raises half a dozen types on a file that is none of its own
        raise InputError(f"{path} is not a model.pt of this program") from error
    return model


def predict(model: dict, path: Path, console: Console) -> tuple[pd.DataFrame, list[str]]:
    """Return a prediction per row and target, in the targets' units, and what there is to say about them.

    A missing value is filled in as in training (``--missing mean``), or leaves its row without a prediction.
    A category that training did not see counts as the baseline.
    """
    dialect = find_dialect(path, Settings(**model["reading"]))
    encoding = model["encoding"]
    derived = {f"{name} ({part})": name for name in model["dates"] for part in ("days", "month", "weekday")}
    wanted = list(dict.fromkeys(derived.get(feature["column"], feature["column"]) for feature in encoding))
    if absent := [name for name in wanted if name not in dialect.columns]:
        columns = ", ".join(dialect.columns)
        raise InputError(f"{path.name} has no column {absent[0]!r}, which the model needs; it has {columns}")
    texts = {
        derived.get(feature["column"], feature["column"]) for feature in encoding if "category" in feature
    }
    frame = read_columns(path, dialect, wanted, texts | set(model["dates"]), console)
    problems, notes = [], []
    for name, form in model["dates"].items():
        words = pd.Series(frame[name].dropna().unique(), dtype=object)
        if (other := parse_dates(words, form).isna()).any():
            examples = ", ".join(map(repr, words[other][:3]))
            problems.append(f"column {name!r} holds no dates of the form {form}, as in training: {examples}")
    for name in wanted:
        if name in texts or name in model["dates"]:
            continue
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            words = frame[name].cat.categories
            numbers = numbers_in(words, dialect.decimal)
            if np.isnan(numbers).any():
                examples = ", ".join(map(repr, words[np.isnan(numbers)][:3]))
                problems.append(
                    f"column {name!r} holds text, where the model was trained on numbers: {examples}"
                )
            frame[name] = np.append(numbers, np.nan)[frame[name].cat.codes]
    if problems:
        raise InputError(f"{path.name}: {'; '.join(problems)}")
    frame = expand_dates(frame, model["dates"])

    result = np.tile(model["intercepts"].numpy(), (len(frame), 1))
    fill = model["missing"] == "mean"
    missing = np.zeros(len(frame), dtype=bool)
    for at, feature in enumerate(encoding):
        column = frame[feature["column"]]
        empty = column.isna().to_numpy()
        missing |= empty
        if "category" in feature:
            value = (column == feature["category"]).to_numpy(dtype=float)
            value[empty] = feature["fill"] == feature["category"]
        else:
            value = np.where(empty, feature["fill"], column.to_numpy())
        result += value[:, None] * model["coefficients"].numpy()[:, at]
    for name in dict.fromkeys(feature["column"] for feature in encoding if "category" in feature):
        own = [feature for feature in encoding if feature["column"] == name]
        baseline = own[0]["baseline"]
        known = {feature["category"] for feature in own if feature.get("seen", True)}
        known |= {baseline} if own[0].get("baseline_seen", True) else set()
        if unknown := sorted(set(frame[name].cat.remove_unused_categories().cat.categories) - known):
            seen = int(frame[name].isin(unknown).sum())
            notes.append(
                f"column {name!r} has {seen} values that training did not see "
                f"({', '.join(map(repr, unknown[:3]))}): taken as {baseline!r}, the baseline"
            )
    if missing.any():
        if not fill:
            result[missing] = np.nan
        what = "filled in as in training" if fill else "they have no prediction"
        notes.append(f"{missing.sum()} of {len(frame)} rows lack a value: {what}")
    return pd.DataFrame(result, columns=model["targets"]), notes
