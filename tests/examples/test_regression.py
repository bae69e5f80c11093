"""examples/regression.py: the whole way on real data, Ctrl-C and back, and everything it must refuse."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from matplotlib import image
from sklearn.metrics import r2_score

from ..helpers import assert_matches

SCRIPT = Path(__file__).parents[2] / "examples" / "regression.py"
HOUSES = "area,rooms,age,price,rent\n" + "".join(
    f"{40 + 7 * i % 60},{1 + i % 5},{i * 13 % 37},{100 + 3 * (7 * i % 60) + i % 4},{9 - i % 5 + i * 13 % 37}\n"
    for i in range(40)
)


@pytest.fixture(scope="module")
def regression() -> ModuleType:
    spec = importlib.util.spec_from_file_location("regression_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def houses(tmp_path: Path) -> Path:
    path = tmp_path / "houses.csv"
    path.write_text(HOUSES)
    return path


def run(regression: ModuleType, *arguments: object) -> int:
    return regression.main([*map(str, arguments), "--device=cpu"])


def record(output: Path) -> dict:
    """What record.json says, without the seconds."""
    result = json.loads((output / "record.json").read_text())
    for row in result["results"].values():
        row.pop("seconds", None)
    return result


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_diabetes_with_the_defaults(
    regression: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(regression, "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    kept = record(tmp_path)
    r2 = {name: row["train_r2"] for name, row in kept["results"].items()}
    assert abs(r2["gradkernels"] - r2["closed form"]) < 1e-3
    assert r2["closed form"] == pytest.approx(0.5159, abs=5e-5)  # numpy.linalg.lstsq on these 354 rows
    assert len(kept["history"]) == kept["settings"]["epochs"]
    for row in kept["history"]:
        assert f"{row['epoch']:5}  {row['train_loss']:10.6f}  {row['validation_loss']:15.6f}" in printed
    assert all(f"{value:.6f}" in printed for value in r2.values())
    assert "gradient check passed: 11 slopes" in printed

    curve = image.imread(tmp_path / "loss.png")
    assert curve.shape[:2] == (675, 1050)
    assert len(np.unique(curve.reshape(-1, curve.shape[-1]), axis=0)) > 10


def test_losses_agree_with_the_plain_torch_loop(regression: ModuleType) -> None:
    class Exact(regression.PlainTorch):
        DTYPE = torch.float64

    for optimizer in ("adam", "adamw", "sgd"):
        # The norm is below most gradients': clipping decides every step.
        settings = regression.Settings(
            optimizer=optimizer, epochs=25, weight_decay=0.01, max_norm=0.3, device="cpu"
        )
        data = regression.load(settings)
        losses = []
        for contestant in (regression.Ours, regression.PlainTorch, Exact):
            training = contestant(settings, data)
            rows = [training.epoch() for _ in range(settings.epochs)]
            losses.append([[row["train_loss"], row["validation_loss"]] for row in rows])
        ours, plain, exact = losses
        assert_matches(torch.tensor(ours), torch.tensor(plain), np.array(exact), optimizer)


def test_an_epoch_takes_every_row_once_and_in_another_order(regression: ModuleType) -> None:
    settings = regression.Settings(batch_size=100, device="cpu")
    training = regression.Ours(settings, regression.load(settings))
    rows = torch.arange(354, dtype=torch.float32)
    training.train_x[:, 0] = rows
    seen: list[torch.Tensor] = []
    step = training.step
    training.step = lambda x, y: (seen.append(x[:, 0].clone()), step(x / 354, y))[1]
    for _ in range(2):
        training.epoch()
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert len(seen) == 8
    assert not torch.equal(first, second)
    for order in (first, second):
        assert not torch.equal(order, rows)
        assert torch.equal(order.sort().values, rows)


def test_r2_is_the_mean_over_the_outputs(regression: ModuleType) -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(50, 2)) * [1, 100]
    prediction = target + rng.normal(size=(50, 2)) * [0.1, 50]
    assert regression.r2(prediction, target) == pytest.approx(r2_score(target, prediction), rel=1e-12)


def test_checkpoint_and_record_describe_the_model(
    regression: ModuleType, tmp_path: Path, houses: Path
) -> None:
    output = tmp_path / "out"
    arguments = ("--data", houses, "--target", "price,rent", "--epochs", 30, "--output", output)
    assert run(regression, *arguments) == 0
    kept = record(output)
    assert kept["data"]["features"] == ["area", "rooms", "age"]
    assert kept["data"]["targets"] == ["price", "rent"]
    assert (kept["data"]["train_rows"], kept["data"]["validation_rows"]) == (32, 8)
    assert set(kept["versions"]) == {"python", "platform", "gradkernels", "torch", "triton", "numpy"}

    model = torch.load(output / kept["checkpoint"]["file"], weights_only=True)["training"]["model"]
    table = np.loadtxt(houses, delimiter=",", skiprows=1)
    scaling = {name: np.array(values) for name, values in kept["data"]["scaling"].items()}
    x = (table[:, :3] - scaling["feature_mean"]) / scaling["feature_scale"]
    y = (table[:, 3:] - scaling["target_mean"]) / scaling["target_scale"]
    losses = ((x @ model["weight"].double().numpy().T + model["bias"].double().numpy() - y) ** 2).mean(axis=1)
    results = kept["results"]["gradkernels"]
    assert losses.sum() / 40 == pytest.approx(
        0.8 * results["train_loss"] + 0.2 * results["validation_loss"], rel=1e-5
    )


def test_every_schedule_moves_the_rate(regression: ModuleType, tmp_path: Path, houses: Path) -> None:
    for schedule in ("cosine", "plateau", "none"):
        output = tmp_path / schedule
        arguments = ("--data", houses, "--target", "price", "--epochs", 40, "--schedule", schedule)
        assert run(regression, *arguments, "--output", output) == 0
        rates = [row["lr"] for row in record(output)["history"]]
        assert rates[0] == 0.1
        if schedule == "none":
            assert set(rates) == {0.1}
        if schedule == "cosine":
            assert rates == sorted(rates, reverse=True)
            assert rates[-1] < 0.01
        if schedule == "plateau":
            assert set(np.round(np.log10(rates), 9)) > {-1.0, -2.0}


def test_csv_dialect(regression: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "quoted.csv"
    path.write_bytes(
        b'\xef\xbb\xbf"size, m2", floor ,"price, EUR"\r\n1.5,2,"3"\r\n\r\n 2.5,1,4e0\r\n3,-2,5\r\n'
    )
    settings = regression.Settings(data=str(path), target="price, EUR", device="cpu")
    data = regression.load(settings)
    assert data.description["features"] == ["size, m2", "floor"]
    assert data.description["targets"] == ["price, EUR"]
    back = (
        data.train_y * data.description["scaling"]["target_scale"]
        + data.description["scaling"]["target_mean"]
    )
    assert {*back[:, 0]} < {3.0, 4.0, 5.0}


def test_constant_feature_and_single_validation_row(
    regression: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "few.csv"
    path.write_text("a,b,y\n1,0.1,2\n2,0.1,4\n3,0.1,7\n4,0.1,9\n")  # the deviation of 0.1 rounds to 1e-17
    arguments = ("--data", path, "--target", "y", "--epochs", 3, "--output", tmp_path / "out")
    assert run(regression, *arguments) == 0
    assert "undefined" in capsys.readouterr().out
    kept = record(tmp_path / "out")
    assert kept["results"]["closed form"]["validation_r2"] is None
    assert kept["data"]["scaling"]["feature_scale"][1] == 1.0


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_other_backends_give_the_same_losses(regression: ModuleType, tmp_path: Path, name: str) -> None:
    arguments = ("--epochs", 2, "--batch-size", 200)
    assert run(regression, *arguments, "--output", tmp_path / "fallback") == 0
    assert run(regression, *arguments, "--output", tmp_path / name, "--backend", name) == 0
    ours, theirs = (record(tmp_path / folder) for folder in (name, "fallback"))
    assert (ours["backend"], theirs["backend"]) == (name, "fallback")
    for one, two in zip(ours["history"], theirs["history"], strict=True):
        assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [("adam", "cosine"), ("sgd", "plateau"), ("adamw", "none")]
)
def test_interrupted_and_resumed_run_is_the_same_to_the_bit(
    regression: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    optimizer: str,
    schedule: str,
) -> None:
    arguments = ("--optimizer", optimizer, "--schedule", schedule, "--epochs", 12)
    assert run(regression, *arguments, "--output", tmp_path / "whole") == 0

    step, calls = regression.Ours.step, 0

    def interrupted(self: object, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls in (20, 33):  # in the fourth epoch, and again after resuming
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(regression.Ours, "step", interrupted)
    output = tmp_path / "parts"
    output.mkdir()
    (output / "record.json").write_text("an earlier run's, which the new checkpoint does not belong to")
    assert run(regression, *arguments, "--output", output) == 130
    assert "--resume" in capsys.readouterr().out
    assert not (output / "record.json").exists()
    assert run(regression, "--output", output, "--resume") == 130
    assert run(regression, "--output", output, "--resume") == 0
    assert record(output) == record(tmp_path / "whole")
    assert run(regression, "--output", output, "--resume") == 0, "a complete run resumes to itself"
    assert record(output) == record(tmp_path / "whole")


def test_sigint_keeps_a_checkpoint_that_resumes_to_the_same_bits(
    regression: ModuleType, tmp_path: Path
) -> None:
    arguments = ["--epochs", "160", "--device", "cpu"]
    output = tmp_path / "interrupted"
    command = [sys.executable, str(SCRIPT), *arguments, "--output", str(output)]
    # What is printed fills this pipe more than twice: the run waits for the signal, however late it comes.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pipesize=4096,
        # A shell's background jobs, and their children, ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        for line in process.stdout:
            if line.split()[:1] == ["3"]:
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopped; --resume continues from" in rest
    assert errors == ""
    done = len(torch.load(output / "checkpoint.pt", weights_only=True)["training"]["history"])
    assert 3 <= done < 160
    assert run(regression, "--output", output, "--resume") == 0
    assert run(regression, *arguments, "--output", tmp_path / "whole") == 0
    assert record(output) == record(tmp_path / "whole")


def test_a_record_reproduces_its_run(
    regression: ModuleType, tmp_path: Path, houses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, moved = tmp_path / "first", tmp_path / "elsewhere.csv"
    arguments = ("--data", houses, "--target", "rent", "--seed", 5, "--lr", 0.03, "--epochs", 4)
    assert run(regression, *arguments, "--optimizer", "sgd", "--output", first) == 0
    houses.rename(moved)
    again = ("--record", first / "record.json", "--data", moved, "--output", tmp_path / "second")
    assert run(regression, *again) == 0
    assert "reproduced: the weights are the record's" in capsys.readouterr().out
    one, two = record(first), record(tmp_path / "second")
    for kept in (one, two):
        kept["settings"].pop("data")
        kept["data"].pop("name")
    assert one == two

    forged = json.loads((first / "record.json").read_text())
    forged["checkpoint"]["id"] = "0" * 16
    forged["versions"]["torch"] = "1.0"
    (tmp_path / "forged.json").write_text(json.dumps(forged))
    again = ("--record", tmp_path / "forged.json", "--data", moved, "--output", tmp_path / "third")
    assert run(regression, *again) == 1
    assert "not reproduced" in (printed := capsys.readouterr().out)
    assert "versions that differ: torch" in printed


def test_divergence_stops_and_keeps_the_last_good_epoch(
    regression: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--optimizer", "sgd", "--lr", 1e5, "--max-norm", 1e30, "--output", tmp_path)
    assert run(regression, *arguments) == 1
    assert "failed: " in (printed := capsys.readouterr().out)
    assert "finite" in printed or "inf" in printed
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["training"]
    assert f"epoch {len(kept['history']) + 1} failed" in printed
    assert all(torch.isfinite(values).all() for values in kept["model"].values())
    assert not (tmp_path / "record.json").exists()


def test_a_loss_that_grew_is_named_and_fails(
    regression: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clipping keeps the numbers finite: the run ends, with its files, and says what became of the loss."""
    arguments = ("--optimizer", "sgd", "--epochs", 3, "--output", tmp_path)
    assert run(regression, *arguments, "--lr", 1.5) == 1
    loss = record(tmp_path)["results"]["gradkernels"]["train_loss"]
    assert loss > 2
    assert f"diverged: the train loss is {loss:.4g}, and 1 for the weights that training began with" in (
        printed := capsys.readouterr().out
    )
    assert "smaller --lr than 1.5" in printed
    again = ("--record", tmp_path / "record.json", "--output", tmp_path / "again")
    assert run(regression, *again) == 1
    assert "reproduced: " in capsys.readouterr().out


def test_plain_torchs_divergence_is_not_blamed_on_ours(
    regression: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def step(training: object, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_tensor(torch.inf), x.new_tensor(torch.inf)

    monkeypatch.setattr(regression.PlainTorch, "step", step)
    assert run(regression, "--epochs", 2, "--output", tmp_path) == 1
    assert "plain torch: epoch 1 failed: train loss inf" in (printed := capsys.readouterr().out), printed
    assert "checkpoint.pt is of epoch 2" in printed


@pytest.mark.parametrize("where", ["train_x", "train_y"])
def test_the_guard_stops_before_the_weights_are_touched(regression: ModuleType, where: str) -> None:
    settings = regression.Settings(batch_size=1000, device="cpu")
    training = regression.Ours(settings, regression.load(settings))
    getattr(training, where)[3] = torch.nan
    with pytest.raises(FloatingPointError, match="gradient"):
        training.epoch()
    assert all((parameter == 0).all() for parameter in training.model.parameters())


def test_a_write_that_breaks_off_leaves_the_old_file(regression: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_text("whole")

    def half(new: Path) -> None:
        new.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regression.replace(path, half)
    assert path.read_text() == "whole"
    regression.replace(path, lambda new: new.write_text("next"))
    assert path.read_text() == "next"
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_gradient_is_caught_before_the_first_step(
    regression: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = regression.linear_mse_loss

    def doubled(*tensors: torch.Tensor) -> torch.Tensor:
        loss = right(*tensors)
        return loss + (loss - loss.detach())

    monkeypatch.setattr(regression, "linear_mse_loss", doubled)
    assert run(regression, "--output", tmp_path / "out") == 1
    assert "FAILED" in capsys.readouterr().out
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


BAD_TABLES = {
    "word": ("a,y\n1,2\n3,four\n", r"line 3 has 'four', which is not a finite number, in column 'y'"),
    "missing": (
        "a,y\n1,2\n,4\n5,\n",
        r"line 3 has no value in column 'a'; line 4 has no value in column 'y'",
    ),
    "blank": ("a,y\n1,2\n  ,4\n", r"line 3 has no value in column 'a'"),
    "not finite": ("a,y\n1,2\nnan,4\n5,inf\n", r"line 3 has 'nan', .*; line 4 has 'inf', "),
    "underscore": ("a,y\n1,2\n1_0,4\n", r"line 3 has '1_0'"),
    "short row": ("a,b,y\n1,2,3\n4,5\n", r"line 3 has 2 cells, not 3"),
    "long row": ("a,y\n1,2\n4,5,6\n", r"line 3 has 3 cells, not 2"),
    "line after a quoted break": ('"a\nb",y\n1,2\n\nx,4\n', r"line 5 has 'x'"),
    "many": ("a,y\n" + "x,1\n" * 8, r"line 6 has 'x'.* \(and 3 more\)"),
    "no rows": ("a,y\n", r"has 0 row\(s\)"),
    "one row": ("a,y\n1,2\n", r"has 1 row\(s\) of numbers; at least 2 are needed"),
    "constant target": (
        "a,y\n1,0.1\n2,0.1\n3,0.1\n4,0.1\n",
        r"target 'y' is constant over the training rows",
    ),
    "constant in training": ("a,y\n1,5\n2,5\n", r"target 'y' is constant over the training rows"),
    "too large": ("a,y\n1e300,1\n-1e300,2\n1e308,3\n", r"too large to standardise"),
    "no such column": ("a,b\n1,2\n3,4\n", r"has no column 'y'; its columns are a, b"),
    "only the target": ("y\n1\n2\n", r"no column left to predict y from"),
    "column twice": ("a,a,y\n1,2,3\n4,5,6\n", r"more than one column named 'a'"),
    "empty": ("", r"is empty"),
    "open quote": ('a,y\n1,2\n"3,4\n', r"is not a CSV file in UTF-8"),
}


def assert_refused(
    regression: ModuleType,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    message: str,
    *arguments: object,
) -> None:
    """Exit status 2, one clear line, and nothing in ``folder`` written, changed or removed."""
    before = contents(folder)
    assert run(regression, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.err.endswith("\n")
    assert_found(message, printed.err)
    assert contents(folder) == before


def assert_found(pattern: str, text: str) -> None:
    assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """An output folder with the files of an earlier run."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("checkpoint.pt", "record.json", "loss.png"):
        (folder / name).write_text("the earlier run's")
    return folder


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_refused(
    regression: ModuleType, tmp_path: Path, earlier: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    text, message = BAD_TABLES[case]
    (tmp_path / "table.csv").write_text(text)
    arguments = ("--data", tmp_path / "table.csv", "--target", "y", "--output", earlier)
    assert_refused(regression, capsys, tmp_path, message, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere.csv", "--target", "y"), r"cannot read .*nowhere.csv: No such file"),
        (("--data", ".", "--target", "y"), r"cannot read .*: Is a directory"),
        (("--data", SCRIPT.parents[1] / "README.md"), r"--data needs --target"),
        (("--target", "glucose"), r"diabetes has no column 'glucose'; its columns are age, sex, bmi"),
        (("--target", "bmi,bmi"), r"names a column twice"),
        (("--epochs", 0), r"--epochs: 0 is not a number of 1 or more"),
        (("--epochs", 1.5), r"--epochs: 1.5 is not a number"),
        (("--batch-size", -3), r"--batch-size: -3 is not a number of 1 or more"),
        (("--lr", -1), r"--lr: -1 is not a number of 0 or more"),
        (("--lr", "nan"), r"--lr: nan is not a number"),
        (("--validation", 1), r"--validation: 1 is not a number between 0 and 1"),
        (("--optimizer", "lion"), r"--optimizer: invalid choice: 'lion'"),
        (("--depth", 3), r"unrecognized arguments: --depth"),
        (("--backend", "cuda"), r"--backend: invalid choice"),
        (("--resume", "--record", "x.json"), r"not allowed with"),
        (("--record", "nowhere.json"), r"cannot use nowhere.json: .*No such file"),
        (("--resume",), r"cannot use .*checkpoint.pt: "),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_options_are_refused(
    regression: ModuleType,
    tmp_path: Path,
    earlier: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple,
    message: str,
) -> None:
    assert_refused(regression, capsys, tmp_path, message, *arguments, "--output", earlier)


def test_a_bad_device_is_refused(
    regression: ModuleType, earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert regression.main(["--device", "abacus", "--output", str(earlier)]) == 2
    assert_found(r"^error: .*abacus.*\n$", capsys.readouterr().err)


def test_text_that_is_not_utf8_is_refused(
    regression: ModuleType, tmp_path: Path, earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.csv").write_bytes(b"a,y\n1,2\n\xff,3\n")
    arguments = ("--data", tmp_path / "table.csv", "--target", "y", "--output", earlier)
    assert_refused(regression, capsys, tmp_path, "not a CSV file in UTF-8", *arguments)


def test_an_unwritable_output_folder_is_refused(
    regression: ModuleType, tmp_path: Path, houses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (houses, houses / "below"):
        message = r"cannot write to .*houses.csv"
        assert_refused(regression, capsys, tmp_path, message, "--output", output)


def test_a_folder_that_allows_no_file_is_refused(
    regression: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")  # root, whom the tests may run as, is never refused

    monkeypatch.setattr(regression.tempfile, "TemporaryFile", denied)
    assert_refused(
        regression, capsys, tmp_path, "cannot write to .*: Permission denied", "--output", tmp_path
    )


def test_resume_and_record_refuse_what_would_change_the_numbers(
    regression: ModuleType, tmp_path: Path, houses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ("--data", houses, "--target", "price", "--epochs", 2, "--output", output)
    assert run(regression, *arguments) == 0
    capsys.readouterr()
    resume = ("--resume", "--output", output)
    again = ("--record", output / "record.json", "--output", tmp_path / "again")
    for words in (resume, again):
        message = r"was made with --lr 0.1, not 0.5"
        assert_refused(regression, capsys, tmp_path, message, *words, "--lr", 0.5)
    message = r"--record needs --output"
    assert_refused(regression, capsys, tmp_path, message, "--record", output / "record.json")

    (tmp_path / "bad.json").write_text((output / "record.json").read_text().replace('"adam"', '"lion"'))
    bad = ("--record", tmp_path / "bad.json", "--output", tmp_path / "again")
    assert_refused(regression, capsys, tmp_path, r"invalid choice: 'lion'", *bad)
    (tmp_path / "bad.json").write_text('{"settings": {}}')
    assert_refused(regression, capsys, tmp_path, r"cannot use .*: it holds no checkpoint", *bad)
    (tmp_path / "bad.json").write_text("[1, 2]")
    assert_refused(regression, capsys, tmp_path, r"cannot use .*bad.json", *bad)

    houses.write_text(HOUSES.replace("100", "101", 1))
    for words in (resume, again):
        assert_refused(regression, capsys, tmp_path, r"the data are not those that .* was made with", *words)
