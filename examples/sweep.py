"""Train thousands of linear models on scikit-learn's diabetes table: each call of ``linear_mse_fit`` is a sweep.

    python examples/sweep.py                                1,000 models at a time; ten seconds on two cores
    python examples/sweep.py --models 200 --output runs/small
    python examples/sweep.py --device cpu                   although there is a GPU
    torchrun --nproc-per-node 4 examples/sweep.py           the models shared among four processes

1. Learning rates: for each optimizer 1,000 rates, all on the same rows. Gradient descent on a quadratic diverges
   where the rate exceeds 2 / L, with momentum 2 (1 + momentum) / L, with L the largest eigenvalue of the Hessian.
   The measured edge stands beside it.
2. Bootstrap: 1,000 resamples of the rows, as sample weights (how often each row was drawn). The intervals of the
   coefficients stand beside those of the closed form.
3. Groups: a model for each age group and sex, on rows that are ragged: no two groups have equally many.
4. Time: the same sweep of rates in other ways, with the passes over the data and the updates that each makes: a loop
   of our own ops over all models; torch's ops on a model at a time, each with a parameter group of its own;
   scikit-learn's SGDRegressor, which makes an update for each row. The last two train a twentieth of the models.

Features and target are standardised. Into the output folder go sweep.png, sweep.json, and sweep.npz with the final
loss of each rate and the coefficients of each resample and group.

The models are independent: processes exchange nothing but the results, in the end. These agree with those of one
process to rounding, since the CPU's products and elementwise loops round a model by how many are computed with it.

Over 500 lines, since an example is one file that can be copied.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gradkernels import FusedAdam, FusedSGD, linear_mse_fit, linear_mse_loss
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_diabetes
from sklearn.linear_model import SGDRegressor
from torch import Tensor

MOMENTUM = 0.9
CALLS = 10  # a fit is made in so many calls, for the progress bar
GROUP_FEATURES = ("bmi", "bp", "s5")


@dataclass
class Data:
    """The standardised table."""

    names: list[str]
    x: Tensor
    y: Tensor
    ages: np.ndarray
    sexes: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.x.double().numpy(force=True), self.y[:, 0].double().numpy(force=True)

    @property
    def smallest_loss(self) -> float:
        """Return the mean squared error of the closed form."""
        x, y = self.arrays
        return float(np.mean((x @ least_squares(x, y) - y) ** 2))

    @property
    def largest_curvature(self) -> float:
        """Return the largest eigenvalue of the Hessian of the mean squared error, in weights and bias."""
        rows = with_ones(self.arrays[0])
        return float(np.linalg.eigvalsh(2 / len(rows) * rows.T @ rows)[-1])


def with_ones(x: np.ndarray) -> np.ndarray:
    """Return the rows with a column of ones, for the intercept."""
    return np.column_stack([x, np.ones(len(x))])


def load() -> Data:
    table = load_diabetes(scaled=False)
    x, y = table.data.astype(np.float64), table.target.astype(np.float64)
    standard = [
        torch.as_tensor((v - v.mean(0)) / v.std(0), dtype=torch.float32) for v in (x, y.reshape(-1, 1))
    ]
    return Data(list(table.feature_names), *standard, x[:, 0], x[:, 1])


def parameters(models: int, features: int) -> list[Tensor]:
    return [torch.zeros(models, 1, features, requires_grad=True), torch.zeros(models, 1, requires_grad=True)]


@contextmanager
def processes() -> Iterator[int]:
    """Join the processes that torchrun has started, if it has; the rank of this one."""
    if "WORLD_SIZE" not in os.environ:
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def own_share(models: int) -> slice:
    """Return the models of this process, next to each other; none where there are more processes than models."""
    if not dist.is_initialized():
        return slice(0, models)
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank * models // world, (rank + 1) * models // world)


def gathered(values: Tensor, dim: int) -> Tensor:
    """Return the values of all models along ``dim``, from those of each process's share, on the CPU."""
    values = values.cpu()
    if not dist.is_initialized():
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return torch.cat(parts, dim)


@dataclass
class Trainer:
    """Fits with a progress bar."""

    progress: Progress

    def fit(
        self,
        what: str,
        models: int,
        make: Callable[[list[Tensor], slice], Any],
        x: Tensor,
        y: Tensor,
        steps: int,
        sample_weight: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return losses ``(steps, models)`` and coefficients ``(models, features)``; each process trains its share.

        ``make`` gives the optimizer of some models' parameters. A call of ``linear_mse_fit`` goes on from the
        parameters and the state that the one before left.
        """
        own = own_share(models)
        weight, bias = params = parameters(own.stop - own.start, x.shape[1])
        optimizer = make(params, own)
        if sample_weight is not None:
            sample_weight = sample_weight[own]
        if offsets is not None:
            offsets = offsets[own.start : own.stop + 1]
            rows = slice(int(offsets[0]), int(offsets[-1]))
            x, y, offsets = x[rows], y[rows], offsets - offsets[0]
        task = self.progress.add_task(f"{models} {what}", total=steps)
        losses = []
        for part in np.array_split(range(steps), CALLS):
            losses.append(
                linear_mse_fit(
                    x,
                    weight,
                    y,
                    bias,
                    optimizer=optimizer,
                    steps=len(part),
                    sample_weight=sample_weight,
                    offsets=offsets,
                )
            )
            self.progress.advance(task, len(part))
        return gathered(torch.cat(losses), 1), gathered(weight.detach()[:, 0], 0)


# 1. Learning rates


@dataclass
class Sweep:
    """Final losses by rate; ``edge``: the smallest rate that diverged, ``theory``: where it should be, if known."""

    name: str
    rates: Tensor
    initial: float
    final: Tensor
    theory: float | None

    @property
    def edge(self) -> float | None:
        diverged = ~(self.final <= self.initial)
        return self.rates[diverged].min().item() if diverged.any() else None


def sweep_rates(data: Data, trainer: Trainer, models: int, steps: int) -> list[Sweep]:
    L = data.largest_curvature
    rates = torch.logspace(-3, 1, models)
    ways: list[tuple[str, Callable[[list[Tensor], slice], Any], float | None]] = [
        ("SGD", lambda p, own: FusedSGD(p, lr=rates[own], stacked=True), 2 / L),
        (
            f"SGD, momentum {MOMENTUM}",
            lambda p, own: FusedSGD(p, lr=rates[own], momentum=MOMENTUM, stacked=True),
            2 * (1 + MOMENTUM) / L,
        ),
        ("Adam", lambda p, own: FusedAdam(p, lr=rates[own], stacked=True), None),
    ]
    found = []
    for name, make, theory in ways:
        losses, _ = trainer.fit(f"rates, {name}", models, make, data.x, data.y, steps)
        found.append(Sweep(name, rates.cpu(), losses[0, 0].item(), losses[-1], theory))
    return found


# 2. Bootstrap


@dataclass
class Bootstrap:
    """Coefficients ``(models, features)`` of all resamples: trained, and by the closed form."""

    trained: np.ndarray
    closed: np.ndarray

    def intervals(self) -> list[np.ndarray]:
        """Return 2.5 % and 97.5 % of both."""
        return [np.percentile(values, (2.5, 97.5), axis=0) for values in (self.trained, self.closed)]

    @property
    def difference(self) -> float:
        return float(np.abs(self.trained - self.closed).max())


def least_squares(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return coefficients without the intercept."""
    root = np.ones(len(x)) if weights is None else np.sqrt(weights)
    return np.linalg.lstsq(with_ones(x) * root[:, None], y * root, rcond=None)[0][:-1]


def bootstrap(data: Data, trainer: Trainer, models: int, steps: int) -> Bootstrap:
    N = len(data.x)
    draws = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), size=models)
    weights = torch.as_tensor(draws, dtype=data.x.dtype)

    def make(params: list[Tensor], own: slice) -> FusedSGD:
        return FusedSGD(params, lr=1 / data.largest_curvature, momentum=MOMENTUM)

    _, trained = trainer.fit("resamples", models, make, data.x, data.y, steps, sample_weight=weights)
    x, y = data.arrays
    closed = np.array([least_squares(x, y, draw) for draw in draws])
    return Bootstrap(trained.numpy(), closed)


# 3. Groups


@dataclass
class Group:
    name: str
    rows: int
    trained: np.ndarray
    closed: np.ndarray


def by_group(data: Data, trainer: Trainer, steps: int) -> list[Group]:
    """Train a model for each decade of age and sex."""
    decades = np.clip(data.ages // 10, 2, 6).astype(int)
    keys = decades * 2 + (data.sexes > 1)
    order = np.argsort(keys, kind="stable")
    _, counts = np.unique(keys, return_counts=True)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    columns = [data.names.index(name) for name in GROUP_FEATURES]
    x, y = data.x[order][:, columns].contiguous(), data.y[order]
    all_x, all_y = data.arrays

    def make(params: list[Tensor], own: slice) -> FusedAdam:
        return FusedAdam(params, lr=0.02, stacked=True)

    _, trained = trainer.fit("groups", len(counts), make, x, y, steps, offsets=torch.as_tensor(bounds))
    found = []
    for g, key in enumerate(np.unique(keys)):
        rows = order[bounds[g] : bounds[g + 1]]
        closed = least_squares(all_x[rows][:, columns], all_y[rows])
        name = f"{key // 2 * 10}s, sex {key % 2 + 1}"
        found.append(Group(name, int(counts[g]), trained[g].numpy(), closed))
    return found


# 4. Time


@dataclass
class Way:
    """One way to train models: passes over the data and updates of each model, seconds for all."""

    name: str
    models: int
    passes: int
    updates: int
    seconds: float = field(default=0.0)

    @property
    def us_per_pass(self) -> float:
        return self.seconds / self.models / self.passes * 1e6


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of a run, with those for which a GPU works on."""
    wait = torch.cuda.synchronize if torch.get_default_device().type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def ways_of_doing_it(data: Data, trainer: Trainer, models: int, steps: int) -> list[Way]:
    """Time SGD at rates that converge. scikit-learn's makes an update for each row: N of them in a pass."""
    rates = torch.logspace(-3, -1, models)
    N, D = data.x.shape
    one_by_one = max(1, models // 20)
    rounds = max(1, steps // 10)
    task = trainer.progress.add_task("other ways", total=4)

    def stacked() -> tuple[list[Tensor], Any]:
        params = parameters(models, D)
        return params, FusedSGD(params, lr=rates, stacked=True)

    def fit() -> None:
        (weight, bias), optimizer = stacked()
        linear_mse_fit(data.x, weight, data.y, bias, optimizer=optimizer, steps=steps)

    def loop_of_launches() -> None:
        (weight, bias), optimizer = stacked()
        for _ in range(rounds):
            optimizer.zero_grad()
            linear_mse_loss(data.x, weight, data.y, bias).sum().backward()
            optimizer.step()

    def torch_groups() -> None:
        each = [parameters(1, D) for _ in range(one_by_one)]
        groups = [{"params": params, "lr": rate.item()} for params, rate in zip(each, rates, strict=False)]
        optimizer = torch.optim.SGD(groups)
        for _ in range(rounds):
            optimizer.zero_grad()
            for weight, bias in each:
                torch.nn.functional.mse_loss(data.x @ weight[0].T + bias, data.y).backward()
            optimizer.step()

    def scikit() -> None:
        x, y = data.arrays
        for rate in rates[:one_by_one].tolist():
            SGDRegressor(
                penalty=None,
                learning_rate="constant",
                eta0=rate / N,
                max_iter=rounds,
                tol=None,
                shuffle=False,
            ).fit(x, y)

    found = [
        Way("linear_mse_fit", models, steps, steps),
        Way("loop of our ops", models, rounds, rounds),
        Way("loop of torch's ops", one_by_one, rounds, rounds),
        Way("SGDRegressor", one_by_one, rounds, rounds * N),
    ]
    for way, run in zip(found, (fit, loop_of_launches, torch_groups, scikit), strict=True):
        way.seconds = timed(run)
        trainer.progress.advance(task)
    return found


# The report


def print_report(
    console: Console,
    data: Data,
    sweeps: list[Sweep],
    resamples: Bootstrap,
    groups: list[Group],
    ways: list[Way],
) -> None:
    table = Table(
        title=f"Where {len(sweeps[0].rates)} learning rates diverge, L = {data.largest_curvature:.4f}"
    )
    for column in ("optimizer", "smallest rate that diverged", "theory", "best rate", "best loss"):
        table.add_column(column)
    for sweep in sweeps:
        best = sweep.final.nan_to_num(torch.inf).argmin()
        edge, theory = ("-" if value is None else f"{value:.4f}" for value in (sweep.edge, sweep.theory))
        table.add_row(sweep.name, edge, theory, f"{sweep.rates[best]:.4f}", f"{sweep.final[best]:.5f}")
    console.print(table)
    table = Table(
        title=f"95 % of {len(resamples.trained)} resamples; largest difference {resamples.difference:.1e}"
    )
    for column in ("coefficient", "trained", "closed form"):
        table.add_column(column)
    trained, closed = resamples.intervals()
    for i, name in enumerate(data.names):
        table.add_row(name, *(f"{low[i]:+.3f} to {high[i]:+.3f}" for low, high in (trained, closed)))
    console.print(table)
    table = Table(title="A model for each age group and sex: " + ", ".join(GROUP_FEATURES))
    for column in ("group", "rows", "trained", "closed form"):
        table.add_column(column)
    for group in groups:
        table.add_row(
            group.name,
            str(group.rows),
            *("  ".join(f"{v:+.3f}" for v in c) for c in (group.trained, group.closed)),
        )
    console.print(table)
    table = Table(title="Ways of doing it")
    for column in ("way", "models", "passes each", "updates each", "seconds", "us per model and pass"):
        table.add_column(column)
    for way in ways:
        table.add_row(
            way.name,
            f"{way.models:,}",
            f"{way.passes:,}",
            f"{way.updates:,}",
            f"{way.seconds:.3f}",
            f"{way.us_per_pass:.2f}",
        )
    console.print(table)


def plot(
    path: Path, data: Data, sweeps: list[Sweep], resamples: Bootstrap, groups: list[Group], ways: list[Way]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((rates, coefficients), (ages, times)) = pyplot.subplots(
        2, 2, figsize=(13, 9), layout="constrained"
    )
    best = data.smallest_loss
    for color, sweep in zip(("C0", "C1", "C2"), sweeps, strict=True):
        above = (sweep.final.double() - best).clamp(2e-7, 1e4).nan_to_num(1e4)  # below is float32's rounding
        rates.plot(sweep.rates, above, color=color, lw=2, label=sweep.name)
        if sweep.theory is not None:
            rates.axvline(
                sweep.theory, color=color, ls="--", lw=1, label=f"  theory's edge, {sweep.theory:.4f}"
            )
    rates.set(xscale="log", yscale="log", ylim=(1e-7, 1e2), xlabel="learning rate")
    rates.set(
        ylabel="loss above the smallest, at the end",
        title=f"{len(sweeps[0].rates)} learning rates for each optimizer",
    )
    rates.legend(frameon=False, fontsize=9, loc="upper left")

    places = np.arange(len(data.names))
    for shift, color, name, (low, high), values in zip(
        (-0.15, 0.15), ("C0", "0.5"), ("trained", "closed form"), resamples.intervals(),
        (resamples.trained, resamples.closed), strict=True,
    ):  # fmt: skip
        middle = np.median(values, axis=0)
        coefficients.errorbar(
            places + shift, middle, yerr=(middle - low, high - middle), fmt="o", ms=4, color=color, label=name
        )
    coefficients.axhline(0, color="0.8", lw=1, zorder=0)
    coefficients.set(xticks=places, xticklabels=data.names, ylabel="coefficient (standardised)")
    coefficients.set(title=f"95 % of {len(resamples.trained)} bootstrap resamples")
    coefficients.legend(frameon=False, loc="lower right")

    places = np.arange(len(groups))
    for i, name in enumerate(GROUP_FEATURES):
        ages.plot(places, [g.trained[i] for g in groups], "o", color=f"C{i}", label=name)
        ages.plot(places, [g.closed[i] for g in groups], "_", ms=16, color=f"C{i}")
    ages.axhline(0, color="0.8", lw=1, zorder=0)
    ages.set(xticks=places, ylabel="coefficient", title="A model for each group (dash: closed form)")
    ages.set_xticklabels([f"{g.name}\n{g.rows} rows" for g in groups], rotation=45, ha="right", fontsize=8)
    ages.legend(frameon=False)

    names = [way.name for way in ways][::-1]
    bars = times.barh(
        names,
        [way.us_per_pass for way in ways][::-1],
        color=["C0" if name == names[-1] else "0.7" for name in names],
    )
    times.bar_label(bars, fmt="%.2f", padding=3)
    times.set(xscale="log", xlabel="us for each model and pass over its rows", title="Ways of doing it")
    times.margins(x=0.15)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=int, default=1000, help="learning rates, and resamples (default: 1000)"
    )
    parser.add_argument("--steps", type=int, default=500, help="rounds of each fit (default: 500)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/sweep"), help="folder (default: runs/sweep)"
    )
    options = parser.parse_args(arguments)
    if options.models < 2 or options.steps < 1:
        parser.error("--models takes at least 2, --steps at least 1")
    try:
        device = torch.empty(0, device=options.device).device
    except (AssertionError, RuntimeError) as error:  # no such device
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    console = Console()
    with (
        torch.device(device),
        processes() as rank,
        Progress(console=console, transient=True, disable=rank > 0) as progress,
    ):
        data, trainer = load(), Trainer(progress)
        sweeps = sweep_rates(data, trainer, options.models, options.steps)
        resamples = bootstrap(data, trainer, options.models, options.steps)
        groups = by_group(data, trainer, 2 * options.steps)
        if rank > 0:
            return 0
        ways = ways_of_doing_it(data, trainer, options.models, options.steps)
    results = data, sweeps, resamples, groups, ways
    print_report(console, *results)
    options.output.mkdir(parents=True, exist_ok=True)
    plot(options.output / "sweep.png", *results)
    np.savez(
        options.output / "sweep.npz",
        rates=sweeps[0].rates.numpy(),
        losses=np.stack([sweep.final.numpy() for sweep in sweeps]),
        resamples=resamples.trained,
        groups=np.stack([group.trained for group in groups]),
    )
    record = {
        "largest_curvature": data.largest_curvature,
        "edges": {sweep.name: {"measured": sweep.edge, "theory": sweep.theory} for sweep in sweeps},
        "bootstrap_difference": resamples.difference,
        "groups_difference": float(max(np.abs(g.trained - g.closed).max() for g in groups)),
        "ways": {way.name: vars(way) | {"us_per_pass": way.us_per_pass} for way in ways},
    }
    (options.output / "sweep.json").write_text(json.dumps(record, indent=2) + "\n")
    written = (f"{options.output}/sweep.{end}" for end in ("png", "json", "npz"))
    console.print(f"written: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
