"""Train a linear model on a table of numbers with gradkernels, and hold the result against two others.

    python examples/regression.py                                     scikit-learn's diabetes table
    python examples/regression.py --data houses.csv --target price    a CSV file with a header line
    python examples/regression.py --resume                            continue after Ctrl-C, to the same bits
    python examples/regression.py --record runs/diabetes/record.json --output runs/again

One pass of ``linear_mse_loss`` gives the loss and the gradients without storing a prediction; the Fused
optimizer clips, guards against non-finite gradients and updates. The same loop in plain torch and the closed
form of least squares stand beside it at the end. Features and targets are standardised by the training rows,
so losses are in units of the target's variance.

Into the output folder go checkpoint.pt (after every epoch), loss.png and record.json. Exit status: 0 done,
1 training or reproduction failed or the loss grew, 2 bad input (nothing written), 130 stopped by Ctrl-C.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import ClassVar, NoReturn

import gradkernels
import matplotlib

matplotlib.use("agg")

import numpy as np
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD, linear_mse_loss
from gradkernels.verify import GradientReport, gradcheck
from matplotlib import pyplot
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from torch.optim import lr_scheduler

DIVERGED = 2.0  # a train loss above this, in variances of the target: the updates made the model worse


class InputError(Exception):
    """What the user gave cannot be used; the message is the one line that says why."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run, as the options of the command line name it."""

    data: str | None = None
    target: str | None = None
    validation: float = 0.2
    batch_size: int = 64
    epochs: int = 100
    optimizer: str = "adam"
    lr: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "cosine"
    max_norm: float = 5.0
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    backend: str = "auto"


# The training loop, and its two contestants


class Training:
    """A linear model with its optimizer and schedule, and what each epoch came to."""

    DTYPE: ClassVar = torch.float32
    LINEAR: ClassVar[type[torch.nn.Linear]]
    OPTIMIZERS: ClassVar[dict[str, type[torch.optim.Optimizer]]]

    def __init__(self, settings: Settings, data: "Data") -> None:
        self.settings = settings
        self.train_x, self.train_y, self.validation_x, self.validation_y = (
            torch.tensor(part, dtype=self.DTYPE, device=settings.device)
            for part in (data.train_x, data.train_y, data.validation_x, data.validation_y)
        )
        self.model = self.LINEAR(
            data.train_x.shape[1], data.train_y.shape[1], device=settings.device, dtype=self.DTYPE
        )
        for parameter in self.model.parameters():
            torch.nn.init.zeros_(parameter)
        options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
        if settings.optimizer == "sgd":
            options["momentum"] = settings.momentum
        self.optimizer = self.make_optimizer(options)
        self.schedule = None
        if settings.schedule == "cosine":
            self.schedule = lr_scheduler.CosineAnnealingLR(
                self.optimizer, settings.epochs, settings.lr / 1000
            )
        elif settings.schedule == "plateau":
            self.schedule = lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.1, patience=5)
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0

    def make_optimizer(self, options: dict[str, float]) -> torch.optim.Optimizer:
        raise NotImplementedError

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One update on a mini-batch. Returns the loss before it, and the gradient's norm before clipping."""
        raise NotImplementedError

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, x: np.ndarray) -> np.ndarray:
        x = torch.tensor(x, dtype=self.DTYPE, device=self.settings.device)
        return self.model(x).cpu().double().numpy()

    def epoch(self) -> dict[str, float]:
        """One pass over the training rows in mini-batches, then the validation loss and the schedule."""
        started = time.perf_counter()
        rate = self.optimizer.param_groups[0]["lr"]
        rows = len(self.train_x)
        # The order depends on the seed and the epoch alone: nothing of it has to be kept for --resume.
        order = np.random.default_rng([self.settings.seed, len(self.history)]).permutation(rows)
        total = torch.zeros((), dtype=self.DTYPE, device=self.settings.device)
        for batch in torch.from_numpy(order).to(self.settings.device).split(self.settings.batch_size):
            self.optimizer.zero_grad()
            loss, norm = self.step(self.train_x[batch], self.train_y[batch])
            total += loss.detach() * len(batch)
        with torch.no_grad():
            validation_loss = self.loss(self.validation_x, self.validation_y).item()
        train_loss = total.item() / rows
        if not math.isfinite(train_loss + validation_loss):
            raise FloatingPointError(f"train loss {train_loss}, validation loss {validation_loss}")
        if self.settings.schedule == "plateau":
            self.schedule.step(validation_loss)
        elif self.schedule is not None:
            self.schedule.step()
        self.seconds += time.perf_counter() - started
        self.history.append(
            {
                "epoch": len(self.history) + 1,
                "train_loss": train_loss,
                "validation_loss": validation_loss,
                "gradient_norm": norm.item(),
                "lr": rate,
            }
        )
        return self.history[-1]

    def state(self) -> dict[str, object]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.history, self.seconds = state["history"], state["seconds"]

    def identity(self) -> str:
        """A short hash of the weights' bits."""
        parts = [parameter.detach().cpu().numpy().tobytes() for parameter in self.model.parameters()]
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


class Ours(Training):
    """With gradkernels: the optimizer clips and guards inside its step."""

    LINEAR = gradkernels.nn.Linear
    OPTIMIZERS: ClassVar = {"adam": FusedAdam, "adamw": FusedAdamW, "sgd": FusedSGD}

    def make_optimizer(self, options: dict[str, float]) -> torch.optim.Optimizer:
        return self.OPTIMIZERS[self.settings.optimizer](
            self.model.parameters(), **options, max_norm=self.settings.max_norm, on_nonfinite="raise"
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return linear_mse_loss(x, self.model.weight, y, self.model.bias)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.loss(x, y)
        loss.backward()
        self.optimizer.step()
        return loss, self.optimizer.grad_norm


class PlainTorch(Training):
    """The same in plain torch."""

    LINEAR = torch.nn.Linear
    OPTIMIZERS: ClassVar = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}

    def make_optimizer(self, options: dict[str, float]) -> torch.optim.Optimizer:
        return self.OPTIMIZERS[self.settings.optimizer](self.model.parameters(), **options)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(self.model(x), y)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.loss(x, y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_norm)
        self.optimizer.step()
        return loss, norm


def check_gradients(training: Training) -> GradientReport:
    """Hold the loss's gradients, on a few rows and at random weights, against centered differences."""
    rng = np.random.default_rng(0)
    weight, bias = (
        torch.tensor(rng.normal(size=parameter.shape), dtype=parameter.dtype, device=parameter.device)
        for parameter in training.model.parameters()
    )
    inputs = (training.train_x[:32], weight.requires_grad_(), training.train_y[:32], bias.requires_grad_())
    return gradcheck(linear_mse_loss, inputs)


# The data


@dataclass(frozen=True)
class Data:
    """Standardised features (rows, D) and targets (rows, K), split into training and validation rows."""

    description: dict[str, object]
    train_x: np.ndarray
    train_y: np.ndarray
    validation_x: np.ndarray
    validation_y: np.ndarray


def read_csv(path: Path) -> tuple[list[str], np.ndarray, str]:
    """The column names, the numbers and the hash of a CSV file with a header line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if not header:
        raise InputError(f"{path} is empty")
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise InputError(f"{path} has more than one column named {', '.join(map(repr, repeated))}")
    values = np.empty((len(rows), len(header)))
    problems = []
    for i, (line, row) in enumerate(rows):
        if len(row) != len(header):
            problems.append(f"line {line} has {len(row)} cells, not {len(header)}")
            continue
        for j, cell in enumerate(row):
            try:
                values[i, j] = float(cell) if "_" not in cell else math.nan
            except ValueError:
                values[i, j] = math.nan
            if not math.isfinite(values[i, j]):
                what = f"has {cell!r}, which is not a finite number," if cell.strip() else "has no value"
                problems.append(f"line {line} {what} in column {header[j]!r}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise InputError(f"{path}: {'; '.join(problems[:5])}{more}")
    return header, values, hashlib.sha256(content).hexdigest()


def diabetes() -> tuple[list[str], np.ndarray, str]:
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)
    values = np.column_stack([table.data, table.target])
    return [*table.feature_names, "progression"], values, hashlib.sha256(values.tobytes()).hexdigest()


def load(settings: Settings) -> Data:
    if settings.data is None:
        name, target = "diabetes", settings.target or "progression"
        columns, values, sha256 = diabetes()
    elif settings.target is None:
        raise InputError("--data needs --target COLUMN[,COLUMN]: the column or columns to predict")
    else:
        name, target = Path(settings.data).name, settings.target
        columns, values, sha256 = read_csv(Path(settings.data))

    targets = [target] if target in columns else [part.strip() for part in target.split(",")]
    if unknown := [part for part in targets if part not in columns]:
        raise InputError(f"{name} has no column {unknown[0]!r}; its columns are {', '.join(columns)}")
    if len(set(targets)) < len(targets):
        raise InputError(f"--target names a column twice: {target}")
    features = [column for column in columns if column not in targets]
    if not features:
        raise InputError(f"{name} has no column left to predict {target} from")
    if len(values) < 2:
        raise InputError(f"{name} has {len(values)} row(s) of numbers; at least 2 are needed")

    order = np.random.default_rng(settings.seed).permutation(len(values))
    held_out = min(max(round(settings.validation * len(values)), 1), len(values) - 1)
    validation, train = np.sort(order[:held_out]), np.sort(order[held_out:])
    x = values[:, [columns.index(feature) for feature in features]]
    y = values[:, [columns.index(target) for target in targets]]
    with np.errstate(over="ignore", invalid="ignore"):
        # A constant column's deviation is zero, whatever the rounding of its mean says.
        x_scale, y_scale = (
            np.where(np.ptp(part[train], axis=0) == 0, 0.0, part[train].std(axis=0)) for part in (x, y)
        )
    if not np.isfinite([*x_scale, *y_scale]).all():
        raise InputError(f"{name} holds numbers that are too large to standardise")
    if constant := [target for target, scale in zip(targets, y_scale, strict=True) if scale == 0]:
        raise InputError(
            f"target {constant[0]!r} is constant over the training rows: there is nothing to learn"
        )
    x_scale[x_scale == 0] = 1.0
    scaling = {
        "feature_mean": x[train].mean(axis=0),
        "feature_scale": x_scale,
        "target_mean": y[train].mean(axis=0),
        "target_scale": y_scale,
    }
    x = (x - scaling["feature_mean"]) / x_scale
    y = (y - scaling["target_mean"]) / y_scale
    description = {
        "name": name,
        "sha256": sha256,
        "features": features,
        "targets": targets,
        "train_rows": len(train),
        "validation_rows": len(validation),
        "split_sha256": hashlib.sha256(validation.astype("<i8").tobytes()).hexdigest(),
        "scaling": {name: numbers.tolist() for name, numbers in scaling.items()},
    }
    return Data(description, x[train], y[train], x[validation], y[validation])


def least_squares(data: Data) -> Callable[[np.ndarray], np.ndarray]:
    """The predictor with the smallest squared error on the training rows, in closed form."""
    # Features and targets have mean zero over these rows, so the best bias is zero too.
    solution, *_ = np.linalg.lstsq(data.train_x, data.train_y, rcond=None)
    return lambda x: x @ solution


def r2(prediction: np.ndarray, target: np.ndarray) -> float | None:
    """The share of the variance explained, averaged over the outputs; None where there is no variance."""
    spread = ((target - target.mean(axis=0)) ** 2).sum(axis=0)
    if (spread == 0).any():
        return None
    return float((1 - ((target - prediction) ** 2).sum(axis=0) / spread).mean())


# What is printed and kept


def train(training: Training, console: Console, after_epoch: Callable[[], None]) -> None:
    """The remaining epochs, with a progress bar and a line for each."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    epochs = training.settings.epochs
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=epochs, completed=len(training.history))
        console.print("epoch  train loss  validation loss  gradient norm  learning rate", style="bold")
        while len(training.history) < epochs:
            row = training.epoch()
            after_epoch()
            progress.advance(task)
            console.print(
                f"{row['epoch']:5}  {row['train_loss']:10.6f}  {row['validation_loss']:15.6f}"
                f"  {row['gradient_norm']:13.6f}  {row['lr']:13.3e}",
            )


def scores(data: Data, predict: Callable[[np.ndarray], np.ndarray]) -> dict[str, float | None]:
    train, validation = predict(data.train_x), predict(data.validation_x)
    return {
        "train_loss": float(((train - data.train_y) ** 2).mean()),
        "validation_loss": float(((validation - data.validation_y) ** 2).mean()),
        "train_r2": r2(train, data.train_y),
        "validation_r2": r2(validation, data.validation_y),
    }


def print_results(results: dict[str, dict[str, float | None]], console: Console) -> None:
    table = Table("", "train loss", "val. loss", "train R2", "val. R2", "seconds")
    for name, row in results.items():
        table.add_row(name, *("undefined" if value is None else f"{value:.6f}" for value in row.values()))
    console.print(table)


def plot(path: Path, title: str, ours: Training, plain: Training, best: float) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
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
    axes.axhline(best, color="C0", linestyle="--", linewidth=1, label="train, closed form")
    axes.set(xlabel="epoch", ylabel="mean squared error / variance of the target", title=title)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and move it into place: whoever looks finds a whole one."""
    new = path.with_name(path.name + ".new")
    write(new)
    new.replace(path)


# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def checked(kind: type, valid: Callable[[float], bool], rule: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not valid(value):
            raise argparse.ArgumentTypeError(f"{text} is not a number {rule}")
        return value

    return parse


def parse(arguments: list[str] | None) -> tuple[dict[str, object], argparse.Namespace]:
    """The settings that were given on the command line, and the other options."""
    count = checked(int, lambda value: value >= 1, "of 1 or more")
    natural = checked(int, lambda value: value >= 0, "of 0 or more")
    rate = checked(float, lambda value: 0 <= value < math.inf, "of 0 or more")
    share = checked(float, lambda value: 0 < value < 1, "between 0 and 1")
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # An option that is not given is not in the result: its default is that of Settings.
    group = parser.add_argument_group("what decides the numbers", argument_default=argparse.SUPPRESS)
    for name, help, how in (
        ("data", "CSV file with a header line; scikit-learn's diabetes table", {"metavar": "FILE"}),
        ("target", "the columns to predict from all others", {"metavar": "COLUMN[,COLUMN]"}),
        ("validation", "share of the rows held out", {"type": share}),
        ("batch-size", "rows per step", {"type": count}),
        ("epochs", "passes over the training rows", {"type": count}),
        ("optimizer", "the update rule", {"choices": Ours.OPTIMIZERS}),
        ("lr", "learning rate", {"type": rate}),
        ("weight-decay", "of the optimizer", {"type": rate}),
        ("momentum", "of sgd", {"type": rate}),
        ("schedule", "of the learning rate", {"choices": ("cosine", "plateau", "none")}),
        ("max-norm", "clip the gradient to this norm", {"type": rate}),
        ("seed", "of the split and the mini-batches", {"type": natural}),
        ("device", "where to train", {}),
        ("backend", "which kernels", {"choices": ("auto", "triton", "fallback", "reference")}),
    ):
        default = getattr(Settings, name.replace("-", "_"))
        group.add_argument(f"--{name}", help=help if default is None else f"{help} ({default})", **how)
    parser.add_argument("--output", type=Path, metavar="DIR", help="(runs/NAME-OF-THE-DATA)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the output folder's checkpoint")
    again.add_argument("--record", type=Path, metavar="FILE", help="run again what this record.json says")
    options = parser.parse_args(arguments)
    given = {
        field.name: getattr(options, field.name) for field in fields(Settings) if hasattr(options, field.name)
    }
    return given, options


def reopen(
    path: Path, read: Callable[[Path], dict], needed: set[str], given: dict[str, object]
) -> tuple[Settings, dict]:
    """A checkpoint or a record, and its settings. The data may have moved; nothing else may differ."""
    try:
        kept = read(path)
        if missing := needed - set(kept):
            raise ValueError(f"it holds no {sorted(missing)[0]}")
        options = {f"--{name.replace('_', '-')}": value for name, value in kept["settings"].items()}
    except Exception as error:  # torch.load alone raises half a dozen types on a file that is none of its own
        raise InputError(f"cannot use {path}: {first_line(error)}") from error
    settings, _ = parse([f"{option}={value}" for option, value in options.items() if value is not None])
    for name, value in given.items():
        if name != "data" and value != settings.get(name):
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{path} was made with {option} {settings.get(name)}, not {value}")
    return Settings(**(settings | given)), kept


def read_checkpoint(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def read_record(path: Path) -> dict:
    return json.loads(path.read_text())


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def prepare(arguments: list[str] | None) -> tuple[Settings, Data, Path, dict, argparse.Namespace]:
    """Everything that can be refused is refused here, before anything is written."""
    given, options = parse(arguments)
    if "data" in given:
        given["data"] = str(Path(given["data"]).resolve())
    if options.record is not None and options.output is None:
        raise InputError("--record needs --output DIR: where the second run goes")
    output = options.output or Path("runs") / (Path(given["data"]).stem if "data" in given else "diabetes")
    if options.resume:
        origin = output / "checkpoint.pt"
        settings, kept = reopen(origin, read_checkpoint, {"settings", "data", "training"}, given)
    elif options.record is not None:
        origin = options.record
        settings, kept = reopen(origin, read_record, {"settings", "data", "versions", "checkpoint"}, given)
    else:
        settings, kept = Settings(**given), {}
    data = load(settings)
    if kept and kept["data"]["sha256"] != data.description["sha256"]:
        raise InputError(f"the data are not those that {origin} was made with")
    try:
        with gradkernels.use_backend(settings.backend):
            gradkernels.backend_for(torch.empty(0, device=settings.device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(first_line(error)) from error
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}") from error
    return settings, data, output, kept, options


def run(arguments: list[str] | None, console: Console) -> int:
    settings, data, output, kept, options = prepare(arguments)
    checkpoint_path = output / "checkpoint.pt"
    with gradkernels.use_backend(settings.backend):
        ours, plain = Ours(settings, data), PlainTorch(settings, data)
        console.print(
            f"{data.description['name']}: {ours.train_x.shape[1]} features, {ours.train_y.shape[1]} target(s), "
            f"{len(ours.train_x)} training and {len(ours.validation_x)} validation rows; "
            f"backend {gradkernels.backend_for(ours.train_x)} on {settings.device}"
        )
        report = check_gradients(ours)
        if not report:
            console.print(str(report))
            return 1
        console.print(f"gradient check passed: {sum(part.checked for part in report.inputs)} slopes")
        if options.resume:
            ours.load_state(kept["training"])

        for stale in (output / "loss.png", output / "record.json"):
            stale.unlink(missing_ok=True)  # they would describe another run than the checkpoint

        def save() -> None:
            checkpoint = {"settings": asdict(settings), "data": data.description, "training": ours.state()}
            replace(checkpoint_path, lambda path: torch.save(checkpoint, path))

        save()
        try:
            train(ours, console, after_epoch=save)
            while len(plain.history) < settings.epochs:
                plain.epoch()
        except KeyboardInterrupt:
            console.print(f"stopped; --resume continues from {checkpoint_path}")
            return 130
        except FloatingPointError as error:
            who, failed = ("", ours) if len(ours.history) < settings.epochs else ("plain torch: ", plain)
            console.print(
                f"{who}epoch {len(failed.history) + 1} failed: {error}; "
                f"{checkpoint_path} is of epoch {len(ours.history)}"
            )
            return 1
        results = {
            "gradkernels": scores(data, ours.predict) | {"seconds": ours.seconds},
            "plain torch": scores(data, plain.predict) | {"seconds": plain.seconds},
            "closed form": scores(data, least_squares(data)),
        }
        backend = gradkernels.backend_for(ours.train_x)

    difference = max(
        abs(one[part] - two[part])
        for one, two in zip(ours.history, plain.history, strict=True)
        for part in ("train_loss", "validation_loss")
    )
    print_results(results, console)
    console.print(f"largest difference between the losses of the two loops: {difference:.1e}")

    record = {
        "settings": asdict(settings),
        "data": data.description,
        "backend": backend,
        "versions": versions(),
        "checkpoint": {"file": checkpoint_path.name, "id": ours.identity()},
        "results": results,
        "largest_loss_difference": difference,
        "history": ours.history,
    }
    title = f"Linear regression on {data.description['name']}"
    replace(
        output / "loss.png", lambda path: plot(path, title, ours, plain, results["closed form"]["train_loss"])
    )
    replace(output / "record.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    console.print(f"checkpoint.pt, loss.png and record.json are in {output}")
    status = compare_with_record(kept, record, console) if options.record else 0
    # The weights begin at zero, whose loss is the variance of the target: 1 on the training rows.
    if (loss := results["gradkernels"]["train_loss"]) > DIVERGED:
        console.print(
            f"diverged: the train loss is {loss:.4g}, and 1 for the weights that training began with; "
            f"try a smaller --lr than {settings.lr:g}"
        )
        status = 1
    return status


def compare_with_record(old: dict, new: dict, console: Console) -> int:
    if new["checkpoint"]["id"] == old["checkpoint"]["id"]:
        console.print(f"reproduced: the weights are the record's, {new['checkpoint']['id']}")
        return 0
    changed = [name for name in new["versions"] if new["versions"][name] != old["versions"].get(name)]
    console.print(
        f"not reproduced: the weights are {new['checkpoint']['id']}, the record's {old['checkpoint']['id']}; "
        f"versions that differ: {', '.join(changed) or 'none'}",
    )
    return 1


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gradkernels": gradkernels.__version__,
    }
    for package in ("torch", "triton", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def main(arguments: list[str] | None = None) -> int:
    try:
        return run(arguments, Console(markup=False, highlight=False, emoji=False, soft_wrap=True))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
