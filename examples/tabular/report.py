"""What a run came to: the closed form beside it, scores, the console's tables, and the picture."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from .preparing import Data
from .training import Training

Predictor = Callable[[np.ndarray], np.ndarray]
BLOCK = 1 << 16  # rows taken into float64 at a time
SHOWN = 20  # coefficients in the console; all are in the record
BARS = 12  # in the picture
POINTS = 1000  # in a scatter plot


def least_squares(data: Data) -> np.ndarray:
    """Return the weights (K, D) with the smallest squared error on the training rows, in closed form.

    Where several have it, as of columns that add up to another, the smallest of them.

    Features and targets have mean zero over these rows, so the best bias is zero too. A block of rows at a time
    is folded into the triangle R of [X Y] = Q R, which has the same solution.
    """
    width = data.train_x.shape[1]
    triangle = np.empty((0, width + data.train_y.shape[1]))
    for at in range(0, len(data.train_x), BLOCK):
        part = np.hstack([data.train_x[at : at + BLOCK], data.train_y[at : at + BLOCK]], dtype=float)
        triangle = np.linalg.qr(np.vstack([triangle, part]), mode="r")
    # Columns that depend on each other do so to float32's rounding, in a direction that says nothing.
    rounding = 4 * np.finfo(np.float32).eps
    solution, *_ = np.linalg.lstsq(triangle[:, :width], triangle[:, width:], rcond=rounding)
    return solution.T


def by_weights(weight: np.ndarray) -> Predictor:
    def predict(x: np.ndarray) -> np.ndarray:
        return np.vstack([x[at : at + BLOCK] @ weight.T for at in range(0, len(x), BLOCK)])

    return predict


def r2(prediction: np.ndarray, target: np.ndarray) -> float | None:
    """Return the share of the variance explained, averaged over the outputs; None where there is no variance."""
    spread = ((target - target.mean(axis=0)) ** 2).sum(axis=0)
    if (spread == 0).any():
        return None
    return float((1 - ((target - prediction) ** 2).sum(axis=0) / spread).mean())


def scores(data: Data, predict: Predictor) -> dict[str, float | None]:
    train, validation = predict(data.train_x), predict(data.validation_x)
    train_y, validation_y = data.train_y.astype(float), data.validation_y.astype(float)
    return {
        "train_loss": float(((train - train_y) ** 2).mean()),
        "validation_loss": float(((validation - validation_y) ** 2).mean()),
        "train_r2": r2(train, train_y),
        "validation_r2": r2(validation, validation_y),
    }


def print_results(results: dict[str, dict[str, float | None]], console: Console) -> None:
    table = Table("", "train loss", "val. loss", "train R2", "val. R2", "seconds")
    for name, row in results.items():
        table.add_row(name, *("undefined" if value is None else f"{value:.6f}" for value in row.values()))
    console.print(table)


def print_coefficients(
    data: Data,
    effects: np.ndarray,
    ours: tuple[np.ndarray, np.ndarray],
    best: tuple[np.ndarray, np.ndarray],
    console: Console,
) -> None:
    """Print, in the table's own units, what a target gains by one unit of a feature, or a category over its baseline.

    ``effects`` are the weights for standardised columns, by which the features are ordered.
    """
    features, targets = data.description["features"], data.description["targets"]
    for k, target in enumerate(targets):
        table = Table(f"{target} per unit of", "gradkernels", "closed form")
        table.add_row("intercept", *(f"{intercepts[k]:.6g}" for _, intercepts in (ours, best)))
        for j in np.argsort(-np.abs(effects[k]), kind="stable")[:SHOWN]:
            table.add_row(features[j], *(f"{coefficients[k, j]:.6g}" for coefficients, _ in (ours, best)))
        console.print(table)
        if len(features) > SHOWN:
            console.print(f"{len(features) - SHOWN} weaker ones are in record.json")


@pyplot.rc_context({"text.parse_math": False})  # a column's name may hold dollars
def plot(
    path: Path, title: str, data: Data, ours: Training, plain: Training, best: np.ndarray, loss: float
) -> None:
    """Plot the losses, the predictions against the truth, the residuals and the coefficients."""
    figure, ((losses, truth), (residuals, coefficients)) = pyplot.subplots(
        2, 2, figsize=(13, 9), layout="constrained"
    )
    figure.suptitle(title)
    plot_losses(losses, ours, plain, loss)
    plot_predictions(truth, residuals, data, ours)
    plot_coefficients(coefficients, data, ours.model.weight.detach().cpu().double().numpy(), best)
    figure.savefig(path, dpi=100, format="png")
    pyplot.close(figure)


def plot_losses(axes: Axes, ours: Training, plain: Training, best: float) -> None:
    epochs = [row["epoch"] for row in ours.history]
    for part, colour in (("train", "C0"), ("validation", "C1")):
        losses, plain_losses = ([row[f"{part}_loss"] for row in run.history] for run in (ours, plain))
        axes.plot(epochs, losses, color=colour, linewidth=2, label=f"{part}, gradkernels")
        axes.plot(
            epochs,
            plain_losses,
            color="black",
            linestyle=":",
            label="plain torch" if part == "validation" else None,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(best, color="C0", linestyle="--", linewidth=1, label="train, closed form")
    axes.set(xlabel="epoch", ylabel="mean squared error / variance of the target", title="loss")
    axes.legend()


def plot_predictions(truth: Axes, residuals: Axes, data: Data, ours: Training) -> None:
    """One target in its own units; several in units of each one's standard deviation, around its mean."""
    targets = data.description["targets"]
    scaling = data.description["scaling"]
    single = len(targets) == 1
    scale, mean = (scaling["target_scale"][0], scaling["target_mean"][0]) if single else (1.0, 0.0)
    unit = targets[0] if single else "standard deviations from the mean"
    for name, x, y, marker, alpha in (
        ("train", data.train_x, data.train_y, "o", 0.35),
        ("validation", data.validation_x, data.validation_y, "^", 0.7),
    ):
        rows = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS // len(targets))).astype(int))
        predicted, true = (ours.predict(x[rows]) * scale + mean, y[rows].astype(float) * scale + mean)
        for k, target in enumerate(targets):
            how = {
                "s": 14,
                "alpha": alpha,
                "marker": marker,
                "linewidths": 0,
                "color": f"C{2 * k + (name == 'validation')}",
                "label": name if single else f"{target}, {name}",
            }
            truth.scatter(true[:, k], predicted[:, k], **how)
            residuals.scatter(predicted[:, k], true[:, k] - predicted[:, k], **how)
    truth.axline((mean, mean), slope=1, color="black", linewidth=1)
    residuals.axhline(0, color="black", linewidth=1)
    truth.set(xlabel=f"true {unit}", ylabel=f"predicted {unit}", title="prediction against truth")
    residuals.set(xlabel=f"predicted {unit}", ylabel="true - predicted", title="residuals")
    if len(targets) <= 4:
        truth.legend()


def plot_coefficients(axes: Axes, data: Data, weight: np.ndarray, best: np.ndarray) -> None:
    """Plot the strongest, each by what one standard deviation of its feature does."""
    features, targets = data.description["features"], data.description["targets"]
    order = np.argsort(-np.abs(weight).max(axis=0), kind="stable")[:BARS][::-1]
    places = np.arange(len(order))
    height = 0.8 / len(targets)
    for k, target in enumerate(targets):
        at = places + (k - (len(targets) - 1) / 2) * height
        colour = f"C{2 * k}"
        axes.barh(
            at, weight[k, order], height, color=colour, label="gradkernels" if len(targets) == 1 else target
        )
        axes.plot(
            best[k, order], at, "k|", markersize=10, label="closed form" if k == len(targets) - 1 else None
        )
    names = [name if len(name) <= 22 else name[:21] + "…" for name in (features[j] for j in order)]
    axes.set_yticks(places, names)
    axes.axvline(0, color="black", linewidth=1)
    more = f", the {BARS} strongest of {len(features)}" if len(features) > BARS else ""
    axes.set(
        xlabel="standard deviations of the target per standard deviation of the feature",
        title=f"coefficients{more}",
    )
    if len(targets) <= 4:
        axes.legend()
