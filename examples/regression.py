"""Train a linear model on a table with gradkernels, and hold the result against two others.

    python examples/regression.py                                     scikit-learn's diabetes table
    python examples/regression.py --data houses.csv --target price    a CSV file, of any delimiter
    python examples/regression.py --resume                            continue after Ctrl-C, to the same bits
    python examples/regression.py --resume --epochs 200               train a complete run on
    python examples/regression.py --record runs/diabetes/record.json --output runs/again
    python examples/regression.py predict runs/houses/model.pt new.csv > predictions.csv

One pass of ``linear_mse_loss_and_grad`` gives the loss and the gradients without storing a prediction; the Fused
optimizer clips, guards against non-finite gradients and updates. The same loop in plain torch and the closed
form of least squares stand beside it at the end. Texts become categories, features and targets are standardised
by the training rows, so losses are in units of the target's variance; coefficients are in the table's units.

Into the output folder go checkpoint.pt (after every epoch), model.pt, loss.png and record.json. Exit status:
0 done, 1 training or reproduction failed or the loss grew, 2 bad input (nothing written), 130 stopped by Ctrl-C.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import gradkernels
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tabular import model
from tabular.preparing import Data, load
from tabular.reading import DELIMITERS
from tabular.report import by_weights, least_squares, plot, print_coefficients, print_results, scores
from tabular.settings import InputError, Settings
from tabular.training import Ours, PlainTorch, Training, check_gradients

DIVERGED = 2.0  # a train loss above this, in variances of the target: the updates made the model worse


def train(training: Training, console: Console, after_epoch: Callable[[], None]) -> None:
    """Run the remaining epochs, with a progress bar and a line for each."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    epochs = training.settings.epochs
    with Progress(*columns, console=console, transient=True, disable=console.quiet) as progress:
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


def parse(arguments: list[str]) -> tuple[dict[str, object], argparse.Namespace]:
    """Return the settings that were given on the command line, and the other options."""
    count = checked(int, lambda value: value >= 1, "of 1 or more")
    natural = checked(int, lambda value: value >= 0, "of 0 or more")
    rate = checked(float, lambda value: 0 <= value < math.inf, "of 0 or more")
    share = checked(float, lambda value: 0 < value < 1, "between 0 and 1")
    columns = {"metavar": "COLUMN[,COLUMN]"}

    def delimiter(text: str) -> str:
        if text not in DELIMITERS and len(text) != 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not one character, tab or space")
        return text

    def epochs(text: str) -> str:
        for part in text.split(","):
            count(part)
        return text

    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # An option that is not given is not in the result: its default is that of Settings.
    group = parser.add_argument_group("what decides the numbers", argument_default=argparse.SUPPRESS)
    for name, help, how in (
        ("data", "CSV file; scikit-learn's diabetes table", {"metavar": "FILE"}),
        ("target", "the columns to predict", columns),
        ("features", "the columns to predict from; all others", columns),
        ("drop", "columns to leave out", columns),
        ("categories", "columns to encode by value, numbers too", columns),
        ("missing", "what to do about missing values", {"choices": ("error", "drop", "mean")}),
        ("dates", "refuse columns of dates, or expand them", {"choices": ("refuse", "expand")}),
        ("delimiter", "between cells, or tab or space; found out", {"type": delimiter}),
        ("decimal", "decimal sign; found out", {"choices": (".", ",")}),
        ("encoding", "of the file, such as cp1252; UTF-8, or what a byte order mark says", {}),
        ("header", "whether the first line names the columns", {"choices": ("yes", "no")}),
        ("na", "words for a missing value, beside the usual ones", {"metavar": "WORD[,WORD]"}),
        ("validation", "share of the rows held out", {"type": share}),
        ("batch-size", "rows per step; 64, or the 256th part of the rows if more", {"type": count}),
        ("epochs", "passes over the training rows", {"type": count}),
        (
            "restarts",
            "epochs after which the cosine begins anew",
            {"type": epochs, "metavar": "EPOCH[,EPOCH]"},
        ),
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
    parser.add_argument("--quiet", action="store_true", help="print only what went wrong")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the output folder's checkpoint")
    again.add_argument("--record", type=Path, metavar="FILE", help="run again what this record.json says")
    options = parser.parse_args(arguments)
    given = {
        field.name: getattr(options, field.name) for field in fields(Settings) if hasattr(options, field.name)
    }
    return given, options


def reopen(
    path: Path, read: Callable[[Path], dict], needed: set[str], given: dict[str, object], longer: bool = False
) -> tuple[Settings, dict]:
    """Read a checkpoint or a record, and its settings.

    The data may have moved, and a run may go on for longer; no other setting may differ.
    """
    try:
        kept = read(path)
        if missing := needed - set(kept):
            raise ValueError(f"it holds no {sorted(missing)[0]}")
        options = {f"--{name.replace('_', '-')}": value for name, value in kept["settings"].items()}
    except Exception as error:  # torch.load alone raises half a dozen types on a file that is none of its own
        raise InputError(f"cannot use {path}: {first_line(error)}") from error
    settings, _ = parse([f"{option}={value}" for option, value in options.items() if value is not None])
    if longer and given.get("epochs", 0) > settings["epochs"]:
        if settings.get("schedule", Settings.schedule) == "cosine":
            # The cosine has come down to its end, or will: it begins anew for the epochs that are added.
            ends = [settings["restarts"]] if "restarts" in settings else []
            given["restarts"] = settings["restarts"] = ",".join([*ends, str(settings["epochs"])])
        settings["epochs"] = given["epochs"]
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


def prepare(
    given: dict[str, object], options: argparse.Namespace, console: Console
) -> tuple[Settings, Data, Path, dict]:
    """Refuse whatever can be refused before anything is written; return what the training needs."""
    if "data" in given:
        given["data"] = str(Path(given["data"]).resolve())
    if options.record is not None and options.output is None:
        raise InputError("--record needs --output DIR: where the second run goes")
    output = options.output or Path("runs") / (Path(given["data"]).stem if "data" in given else "diabetes")
    if options.resume:
        origin = output / "checkpoint.pt"
        settings, kept = reopen(origin, read_checkpoint, {"settings", "data", "training"}, given, longer=True)
    elif options.record is not None:
        origin = options.record
        settings, kept = reopen(origin, read_record, {"settings", "data", "versions", "checkpoint"}, given)
    else:
        settings, kept = Settings(**given), {}
    data = load(settings, console)
    if kept and kept["data"]["sha256"] != data.description["sha256"]:
        raise InputError(f"the data are not those that {origin} was made with")
    try:
        with gradkernels.use_backend(settings.backend):
            gradkernels.backend_for(torch.empty(0, device=settings.device))
    except (AssertionError, RuntimeError) as error:  # no such device, or a backend that does not serve it
        raise InputError(
            f"--backend {settings.backend} --device {settings.device}: {first_line(error)}"
        ) from error
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror}") from error
    return settings, data, output, kept


def plain_console(**options: object) -> Console:
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True, **options)


def run(arguments: list[str]) -> int:
    given, options = parse(arguments)
    console = plain_console(quiet=options.quiet)
    settings, data, output, kept = prepare(given, options, console)
    checkpoint_path = output / "checkpoint.pt"
    with gradkernels.use_backend(settings.backend):
        ours, plain = Ours(settings, data), PlainTorch(settings, data)
        console.print(
            f"{data.description['name']}: {ours.train_x.shape[1]} features, {ours.train_y.shape[1]} target(s), "
            f"{len(ours.train_x)} training and {len(ours.validation_x)} validation rows; "
            f"backend {gradkernels.backend_for(ours.train_x)} on {settings.device}"
        )
        for note in data.description["notes"]:
            console.print(f"note: {note}")
        report = check_gradients(ours)
        if not report:
            print(report)
            return 1
        console.print(f"gradient check passed: {sum(part.checked for part in report.inputs)} slopes")
        if options.resume:
            ours.load_state(kept["training"])

        for stale in (output / "loss.png", output / "record.json", output / "model.pt"):
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
            print(f"stopped; --resume continues from {checkpoint_path}")
            return 130
        except FloatingPointError as error:
            who, failed = ("", ours) if len(ours.history) < settings.epochs else ("plain torch: ", plain)
            print(
                f"{who}epoch {len(failed.history) + 1} failed: {error}; "
                f"{checkpoint_path} is of epoch {len(ours.history)}"
            )
            return 1
        best = least_squares(data)
        results = {
            "gradkernels": scores(data, ours.predict) | {"seconds": ours.seconds},
            "plain torch": scores(data, plain.predict) | {"seconds": plain.seconds},
            "closed form": scores(data, by_weights(best)),
        }
        backend = gradkernels.backend_for(ours.train_x)

    difference = max(
        abs(one[part] - two[part])
        for one, two in zip(ours.history, plain.history, strict=True)
        for part in ("train_loss", "validation_loss")
    )
    print_results(results, console)
    console.print(f"largest difference between the losses of the two loops: {difference:.1e}")

    weight, bias = (parameter.detach().cpu().double().numpy() for parameter in ours.model.parameters())
    scaling, targets = data.description["scaling"], data.description["targets"]
    coefficients, intercepts = model.in_units(weight, bias, scaling)
    best_coefficients, best_intercepts = model.in_units(best, np.zeros(len(targets)), scaling)
    print_coefficients(
        data, weight, (coefficients, intercepts), (best_coefficients, best_intercepts), console
    )

    record = {
        "settings": asdict(settings),
        "data": data.description,
        "backend": backend,
        "versions": versions(),
        "checkpoint": {"file": checkpoint_path.name, "id": ours.identity()},
        "batch_size": ours.batch_size,
        "coefficients": {
            target: {"intercept": intercept} | dict(zip(data.description["features"], row, strict=True))
            for target, intercept, row in zip(
                targets, intercepts.tolist(), coefficients.tolist(), strict=True
            )
        },
        "results": results,
        "largest_loss_difference": difference,
        "history": ours.history,
    }
    title = f"Linear regression on {data.description['name']}"
    loss = results["closed form"]["train_loss"]
    replace(output / "loss.png", lambda path: plot(path, title, data, ours, plain, best, loss))
    replace(
        output / "model.pt",
        lambda path: model.save(path, coefficients, intercepts, data.description, settings),
    )
    replace(output / "record.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    console.print(f"checkpoint.pt, model.pt, loss.png and record.json are in {output}")
    status = compare_with_record(kept, record, console) if options.record else 0
    # The weights begin at zero, whose loss is the variance of the target: 1 on the training rows.
    if (loss := results["gradkernels"]["train_loss"]) > DIVERGED:
        print(
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
    print(
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


def predict(arguments: list[str]) -> int:
    """Print predictions for another table on stdout; what there is to say about them goes to stderr."""
    parser = Parser(prog="regression.py predict", description=predict.__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path, help="a run's model.pt")
    parser.add_argument("data", type=Path, help="a table with the columns that the model was trained on")
    options = parser.parse_args(arguments)
    predictions, notes = model.predict(model.load(options.model), options.data, plain_console(stderr=True))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    predictions.to_csv(sys.stdout, index=False)
    return 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return predict(arguments[1:]) if arguments[:1] == ["predict"] else run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
