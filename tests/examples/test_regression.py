"""examples/regression.py: the whole way on real data, Ctrl-C and back, and everything it must refuse.

Over 500 lines, since half of it is tables and what each is refused with.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from matplotlib import image
from rich.console import Console
from sklearn.metrics import r2_score

from ..helpers import EXAMPLES, assert_matches, example

regression = example("regression")
HOUSES = "area,rooms,age,price,rent\n" + "".join(
    f"{40 + 7 * i % 60},{1 + i % 5},{i * 13 % 37},{100 + 3 * (7 * i % 60) + i % 4},{9 - i % 5 + i * 13 % 37}\n"
    for i in range(40)
)


@pytest.fixture
def picture() -> None:
    """Asked for by the tests that draw the picture."""


@pytest.fixture(autouse=True)
def picture_left_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere an empty file stands for it: drawing takes longer than a short training."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr(regression, "plot", lambda path, *rest: path.touch())


@pytest.fixture
def houses(tmp_path: Path) -> Path:
    path = tmp_path / "houses.csv"
    path.write_text(HOUSES)
    return path


def run(*arguments: object) -> int:
    return regression.main(["--device=cpu", *map(str, arguments)])


def predict(*files: Path) -> int:
    return regression.main(["predict", *map(str, files)])


def load(**settings: object) -> tuple[object, object]:
    """Settings, and the data that they name."""
    settings = regression.Settings(**settings, device="cpu")
    return settings, regression.load(settings, Console(quiet=True))


def record(output: Path) -> dict:
    """What record.json says, without the seconds."""
    result = json.loads((output / "record.json").read_text())
    for row in result["results"].values():
        row.pop("seconds", None)
    return result


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_diabetes_with_the_defaults(
    tmp_path: Path, picture: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output", tmp_path) == 0
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

    assert_four_panels(tmp_path / "loss.png")


@pytest.mark.usefixtures("picture")
def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    """What stands between two would be one, and this is none that can be drawn."""
    table = write_table(tmp_path / "t.csv", HOUSES.replace("area", "area_$_and_tax_$").splitlines())
    assert run("--data", table, "--target", "price", "--epochs=1", "--output", tmp_path / "o") == 0
    assert (tmp_path / "o" / "model.pt").exists()


def assert_four_panels(path: Path) -> None:
    picture = image.imread(path)[..., :3]
    assert picture.shape[:2] == (900, 1300)
    for panel in (half for row in np.split(picture[100:], 2) for half in np.split(row, 2, axis=1)):
        assert (np.ptp(panel, axis=-1) > 0.3).sum() > 100, "something besides black lines is drawn"


def test_losses_agree_with_the_plain_torch_loop() -> None:
    class Exact(regression.PlainTorch):
        DTYPE = torch.float64

    for optimizer in ("adam", "adamw", "sgd"):
        # The norm is below most gradients': clipping decides every step.
        options = {"optimizer": optimizer, "epochs": 25, "weight_decay": 0.01, "max_norm": 0.3}
        settings, data = load(**options)
        losses = []
        for contestant in (regression.Ours, regression.PlainTorch, Exact):
            training = contestant(settings, data)
            rows = [training.epoch() for _ in range(settings.epochs)]
            losses.append([[row["train_loss"], row["validation_loss"]] for row in rows])
        ours, plain, exact = losses
        assert_matches(torch.tensor(ours), torch.tensor(plain), np.array(exact), optimizer)


def test_an_epoch_takes_every_row_once_and_in_another_order() -> None:
    training = regression.Ours(*load(batch_size=100))
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


def test_least_squares_in_blocks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = load()
    expected, *_ = np.linalg.lstsq(data.train_x.astype(float), data.train_y.astype(float), rcond=None)
    monkeypatch.setattr(sys.modules["tabular.report"], "BLOCK", 100)
    np.testing.assert_allclose(regression.least_squares(data), expected.T, rtol=1e-9)


def test_closed_form_of_columns_that_add_up_to_another(houses: Path) -> None:
    """rent is 10 - rooms + age, but for the rounding of standardised columns, which says nothing about prices."""
    _, data = load(data=str(houses), target="price")
    x, y = data.train_x.astype(float), data.train_y.astype(float)
    smallest = np.linalg.lstsq(x, y, rcond=1e-5)[0].T
    np.testing.assert_allclose(regression.least_squares(data), smallest, atol=1e-6)


def test_an_epochs_loss_is_the_mean_over_its_rows() -> None:
    """The last mini-batch of 54 rows counts as 54 rows."""
    training = regression.Ours(*load(batch_size=100, lr=0.0))
    assert training.epoch()["train_loss"] == pytest.approx(1, rel=1e-6)  # of zero weights: the variance


def test_r2_is_the_mean_over_the_outputs() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(50, 2)) * [1, 100]
    prediction = target + rng.normal(size=(50, 2)) * [0.1, 50]
    r2 = sys.modules["tabular.report"].r2
    assert r2(prediction, target) == pytest.approx(r2_score(target, prediction), rel=1e-12)


def test_checkpoint_and_record_describe_the_model(tmp_path: Path, houses: Path, picture: None) -> None:
    output = tmp_path / "out"
    arguments = ("--data", houses, "--target", "price,rent", "--epochs", 30, "--output", output)
    assert run(*arguments) == 0
    kept = record(output)
    assert_four_panels(output / "loss.png")
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


def test_every_schedule_moves_the_rate(tmp_path: Path, houses: Path) -> None:
    for schedule in ("cosine", "plateau", "none"):
        output = tmp_path / schedule
        arguments = ("--data", houses, "--target", "price", "--epochs", 40, "--schedule", schedule)
        assert run(*arguments, "--output", output) == 0
        rates = [row["lr"] for row in record(output)["history"]]
        assert rates[0] == 0.1
        if schedule == "none":
            assert set(rates) == {0.1}
        if schedule == "cosine":
            assert rates == sorted(rates, reverse=True)
            assert rates[-1] < 0.01
        if schedule == "plateau":
            assert set(np.round(np.log10(rates), 9)) > {-1.0, -2.0}


def test_csv_dialect(tmp_path: Path) -> None:
    path = tmp_path / "quoted.csv"
    path.write_bytes(
        b'\xef\xbb\xbf"size, m2", floor ,"price, EUR"\r\n1.5,2,"3"\r\n\r\n 2.5,1,4e0\r\n3,-2,5\r\n'
    )
    _, data = load(data=str(path), target="price, EUR")
    assert data.description["features"] == ["size, m2", "floor"]
    assert data.description["targets"] == ["price, EUR"]
    back = (
        data.train_y * data.description["scaling"]["target_scale"]
        + data.description["scaling"]["target_mean"]
    )
    assert {*back[:, 0]} < {3.0, 4.0, 5.0}


def town_table(rows: int = 60) -> list[tuple]:
    """Date, town, area, whether there is a garden, price: an exact linear function with a step for one town."""
    table = []
    for i in range(rows):
        town, area, garden = ("Bern", "Oslo", "Zürich")[i % 3], 40 + 7 * i % 60 + 0.5, i % 2 == 0
        price = 100 + 3 * area + 40 * (town == "Oslo") - 25 * (town == "Zürich") + 10 * garden
        table.append((f"2021-{1 + i % 12:02}-{1 + i % 28:02}", town, area, garden, price))
    return table


def write_table(path: Path, lines: list[str], encoding: str = "utf-8") -> Path:
    path.write_bytes("".join(line + "\n" for line in lines).encode(encoding))
    return path


def data_of(folder: Path, lines: list[str], **settings: object) -> Any:
    """The data of a table with these lines."""
    return load(data=str(write_table(folder / "table.csv", lines)), **settings)[1]


def german(cells: tuple) -> str:
    return ";".join(str(cell).replace(".", ",") for cell in cells)


PLAIN = [",".join(map(str, cells[1:])) for cells in town_table()]
HEADER = "town,area,garden,price"
HOLES = ["Bern,,True,300", ",70.5,False,401", "Oslo,60.5,True,"]
TOWN = ["town = Oslo", "town = Zürich", "area", "garden = True"]


class Kind(NamedTuple):
    """A table as it comes: its lines and their encoding, the options, the features in the end."""

    lines: list[str]
    options: tuple[Any, ...] = ()
    features: list[str] = TOWN
    encoding: str = "utf-8"


EXPANDED = [
    "sold (days)",
    *(f"sold (month) = {month:02}" for month in range(2, 13)),
    *(f"sold (weekday) = {day}day" for day in ("Mon", "Satur", "Sun", "Thurs", "Tues", "Wednes")),
]
CODES = [f"0{i % 3},{line.split(',')[1]},{line.split(',')[3]}" for i, line in enumerate(PLAIN)]
KINDS = {
    "plain": Kind([HEADER, *PLAIN]),
    "Excel in Germany": Kind(
        ["town;area;garden;price", *(german(cells[1:]) for cells in town_table())],
        ("--encoding", "cp1252"),
        encoding="cp1252",
    ),
    "tabs in UTF-16": Kind([line.replace(",", "\t") for line in (HEADER, *PLAIN)], encoding="utf-16"),
    "bars, with a byte order mark": Kind(
        [line.replace(",", "|") for line in (HEADER, *PLAIN)], encoding="utf-8-sig"
    ),
    "spaces": Kind([line.replace(",", "   ") for line in (HEADER, *PLAIN)]),
    "a delimiter of one's own": Kind(
        [line.replace(",", "#") for line in (HEADER, *PLAIN)], ("--delimiter", "#")
    ),
    "quoted": Kind([", ".join(f'"{cell}"' for cell in line.split(",")) for line in (HEADER, *PLAIN)]),
    "rows with holes left out": Kind([HEADER, *PLAIN, *HOLES], ("--missing", "drop")),
    "holes filled in": Kind([HEADER, *PLAIN, *HOLES], ("--missing", "mean")),
    "a word of one's own for a hole": Kind(
        [HEADER, *PLAIN, *HOLES, "Oslo,unknown,True,1"], ("--missing", "drop", "--na", "unknown,none")
    ),
    "without a header": Kind(
        PLAIN, ("--header", "no", "--target", 4), ["1 = Oslo", "1 = Zürich", "2", "3 = True"]
    ),
    "an index and an id to leave out": Kind(
        [f",name,{HEADER}", *(f"{i},name{i},{line}" for i, line in enumerate(PLAIN))],
        ("--drop", "column 1,name"),
    ),
    "some of the features": Kind(
        [HEADER, *PLAIN], ("--features", "area,town"), ["area", "town = Oslo", "town = Zürich"]
    ),
    "dates": Kind(
        [f"sold,{HEADER}", *(",".join(map(str, cells)) for cells in town_table())],
        ("--dates", "expand", "--features", "sold,area"),
        [*EXPANDED, "area"],
    ),
    "numbers that are categories": Kind(
        ["code,area,price", *CODES], ("--categories", "code"), ["code = 01", "code = 02", "area"]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_as_it_comes(tmp_path: Path, kind: str) -> None:
    lines, options, features, encoding = KINDS[kind]
    path = write_table(tmp_path / "towns.csv", lines, encoding)
    given, _ = regression.parse(["--data", str(path), "--target", "price", *map(str, options)])
    _, data = load(**given)
    assert data.description["features"] == features
    assert len(data.train_x) + len(data.validation_x) == 60 + 2 * (kind == "holes filled in")
    if features[1:] != TOWN[1:] and kind != "without a header":
        return
    if kind != "holes filled in":  # the same function of the same numbers
        coefficients, _ = regression.model.in_units(
            regression.least_squares(data), np.zeros(1), data.description["scaling"]
        )
        np.testing.assert_allclose(coefficients, [[40, -25, 3, 10]], rtol=1e-4)


def test_a_decimal_comma_is_seen_in_the_data_only(tmp_path: Path) -> None:
    """Quoted thousands of a file with commas between its cells are no decimal commas: refused, never divided."""
    lines = ["a,y", '"1,234",1', '"2,345",2', '"3,456",4']
    with pytest.raises(regression.InputError, match="column 'a' holds text in 3 of 3 rows: '1,234'"):
        data_of(tmp_path, lines, target="a")
    data = data_of(tmp_path, lines, target="a", decimal=",")
    assert data.description["scaling"]["target_mean"][0] < 4


def test_a_column_that_turns_out_to_be_text_keeps_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces of a long file agree: what began as numbers begins anew as words, and "007" stays "007"."""
    monkeypatch.setattr(sys.modules["tabular.reading"], "CELLS", 1)  # pieces of 1,000 rows
    lines = [f"{'007' if i < 1500 else 'abc'},{i % 7},{i % 5}" for i in range(4000)]
    data = data_of(tmp_path, ["agent,a,y", *lines], target="y")
    assert data.description["features"] == ["agent = abc", "a"]
    assert data.description["encoding"][0]["baseline"] == "007"
    assert data.description["scaling"]["feature_mean"][0] == pytest.approx(0.625, abs=0.02)


def test_dates_are_read_one_way_only(tmp_path: Path) -> None:
    options = {"target": "y", "dates": "expand", "validation": 0.1}
    with pytest.raises(regression.InputError, match=r"'d' holds dates that read as day/month or month/day"):
        data_of(tmp_path, ["d,y", "03/04/2020,1", "05/06/2020,2", "05/07/2020,3"], **options)
    lines = ["d,d (days),y", *(f"13/04/202{i},{i},{i}" for i in range(4))]
    with pytest.raises(regression.InputError, match=r"to be expanded to 'd \(days\)', which is a column"):
        data_of(tmp_path, lines, **options)
    for dates, form in (("13/04/2020", "%d/%m/%Y"), ("04/13/2020", "%m/%d/%Y"), ("13.04.2020", "%d.%m.%Y")):
        other = dates.replace("13", "12")
        data = data_of(tmp_path, ["d,y", f"{dates},1", f"{other},2", f"{other},3"], **options)
        assert data.description["dates"] == {"d": form}
        days = data.description["scaling"]["feature_mean"][0]
        assert 18364 <= days <= 18365, "12 and 13 April"
        assert data.description["features"][0] == "d (days)"


def test_dates_beyond_what_nanoseconds_count(tmp_path: Path) -> None:
    """9999-12-31 stands for "open" in many a table."""
    pytest.importorskip("pandas", "3")  # earlier ones know no such date
    lines = ["until,y", "9999-12-31,1", "9999-12-30,2", "9999-12-30,3"]
    data = data_of(tmp_path, lines, target="y", dates="expand", validation=0.1)
    assert 2932895 <= data.description["scaling"]["feature_mean"][0] <= 2932896


def test_ids_are_hinted_at(tmp_path: Path) -> None:
    lines = [f"{i + 1},{i * 7 % 20},{i * i % 17},{i * i % 17 + 0.5}" for i in range(20)]
    lines = ["customer,orderId,a,y", *lines]
    data = data_of(tmp_path, lines, target="y")
    hint = "if it is an id, it says nothing about new rows: --drop"
    assert data.description["notes"] == [
        f"column 'customer' counts the rows; {hint} 'customer'",
        f"column 'orderId' has another number in each row; {hint} 'orderId'",
    ]
    data = data_of(tmp_path, lines, target="y", drop="customer,orderId")
    assert data.description["notes"] == []


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_pickled_code_runs(tmp_path: Path, houses: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in (
        ("checkpoint.pt", ["--resume", "--output", str(tmp_path)]),
        ("model.pt", ["predict", str(tmp_path / "model.pt"), str(houses)]),
    ):
        torch.save({"settings": Trap(tmp_path / "sprung")}, tmp_path / name)
        assert regression.main(command) == 2
        assert_found(rf"^error: .*{name}", capsys.readouterr().err)
        assert not (tmp_path / "sprung").exists()
        torch.load(tmp_path / name, weights_only=False)
        assert (tmp_path / "sprung").exists(), "the trap works"
        (tmp_path / "sprung").unlink()


def test_preparing_is_what_scikit_learn_makes_of_the_whole_table(tmp_path: Path) -> None:
    from pandas import read_csv
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    lines = [HEADER, *PLAIN, *PLAIN[1::3], *HOLES[:2]]  # Oslo is commonest
    data = data_of(tmp_path, lines, target="price", missing="mean", validation=0.25)
    frame = read_csv(tmp_path / "table.csv")
    order = np.random.default_rng(0).permutation(len(frame))
    validation, train = np.sort(order[: len(data.validation_x)]), np.sort(order[len(data.validation_x) :])
    words = make_pipeline(
        SimpleImputer(strategy="most_frequent"), OneHotEncoder(drop="first", sparse_output=False)
    )
    numbers = SimpleImputer()
    whole = make_pipeline(
        make_column_transformer(
            (words, ["town"]), (numbers, ["area"]), (OneHotEncoder(drop="first"), ["garden"])
        ),
        StandardScaler(),
    )
    expected = whole.fit(frame.iloc[train]).transform(frame)
    np.testing.assert_allclose(data.train_x, expected[train], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(data.validation_x, expected[validation], rtol=1e-6, atol=1e-6)


def holed(word: dict[int, str], without_price: int | None = None) -> list[str]:
    """Twelve rows, some of which have a word; one may lack the price."""
    rows = (f"{2 * i},{word.get(i, '')},{'' if i == without_price else i * i % 7}" for i in range(12))
    return ["area,word,price", *rows]


def test_words_that_no_training_row_has(tmp_path: Path) -> None:
    """Every training row is then filled in with the baseline."""
    first, second = np.random.default_rng(0).permutation(12)[:2]  # the two rows held out
    data = data_of(tmp_path, holed({first: "red", second: "blue"}), target="price", missing="mean")
    assert data.description["features"] == ["area", "word = red"]
    assert not data.train_x[:, 1].any()
    assert sorted(data.validation_x[:, 1]) == [0, 1]


@pytest.mark.parametrize("held_out", ["red", "blue"])
def test_predict_says_that_training_did_not_see_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: str
) -> None:
    """Though the validation rows have it, be it the baseline."""
    validation = np.random.default_rng(0).permutation(12)[:2]
    lines = holed({i: held_out if i in validation else "green" for i in range(12)})
    table, output = write_table(tmp_path / "table.csv", lines), tmp_path / "out"
    assert run("--data", table, "--target", "price", "--epochs", 3, "--output", output, "--quiet") == 0
    assert predict(output / "model.pt", table) == 0
    baseline = min(held_out, "green")
    said = f"column 'word' has 2 values that training did not see ('{held_out}'): taken as '{baseline}', the baseline"
    assert said in capsys.readouterr().err


def test_a_row_left_out_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither its words, the first of which would be the baseline, nor what is said of its holes."""
    words = {i: "ab"[i % 2] for i in range(12)} | {5: "A"}
    for missing in ("drop", "mean"):
        data = data_of(tmp_path, holed(words, 5), target="price", missing=missing)
        assert data.description["features"] == ["area", "word = b"]
        assert data.description["notes"] == ["left out 1 of 12 rows for want of a value"]
    with pytest.raises(regression.InputError, match=r"'word' has no value in any of the 11 rows that"):
        data_of(tmp_path, holed({5: "A"}, 5), target="price", missing="mean")


def test_predict_gives_the_predictions_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table(
        tmp_path / "towns.csv", [f"sold,{HEADER}", *(",".join(map(str, c)) for c in town_table())]
    )
    output = tmp_path / "out"
    options = ("--dates", "expand", "--missing", "mean", "--epochs", 30, "--output", output, "--quiet")
    assert run("--data", path, "--target", "price", *options) == 0
    assert capsys.readouterr() == ("", ""), "--quiet"
    assert predict(output / "model.pt", path) == 0
    printed, notes = capsys.readouterr()
    assert notes == ""
    header, *values = printed.splitlines()
    assert header == "price"
    truth = np.array([cells[-1] for cells in town_table()])
    losses = (np.array(values, dtype=float) - truth) ** 2
    kept = record(output)
    mean = (
        0.8 * kept["results"]["gradkernels"]["train_loss"]
        + 0.2 * kept["results"]["gradkernels"]["validation_loss"]
    )
    assert losses.mean() / kept["data"]["scaling"]["target_scale"][0] ** 2 == pytest.approx(mean, rel=1e-4)

    # A row by hand from the record's coefficients; holes filled in; an unknown town taken as the baseline.
    new = write_table(
        tmp_path / "new.csv",
        ["garden;area;town;sold", "True;60,5;Oslo;2021-02-03", "True;60,5;Rome;2021-02-03", ";;;2021-02-03"],
    )
    assert predict(output / "model.pt", new) == 0
    printed, notes = capsys.readouterr()
    oslo, rome, hole = map(float, printed.splitlines()[1:])
    terms = kept["coefficients"]["price"]
    days = (np.datetime64("2021-02-03") - np.datetime64("1970-01-01")).astype(float)
    by_hand = (
        terms["intercept"] + terms["sold (days)"] * days + terms["sold (month) = 02"] + terms["garden = True"]
    )
    by_hand += terms["sold (weekday) = Wednesday"] + terms["area"] * 60.5
    assert oslo == pytest.approx(by_hand + terms["town = Oslo"])
    assert rome == pytest.approx(by_hand)
    fills = {feature["column"]: feature["fill"] for feature in kept["data"]["encoding"]}
    filled = (
        rome + terms["area"] * (fills["area"] - 60.5) - terms["garden = True"] * (fills["garden"] != "True")
    )
    assert hole == pytest.approx(filled + terms.get(f"town = {fills['town']}", 0.0))
    assert (
        "column 'town' has 1 values that training did not see ('Rome'): taken as 'Bern', the baseline"
        in notes
    )
    assert "1 of 3 rows lack a value: filled in as in training" in notes


def test_predict_refuses_what_does_not_fit(
    tmp_path: Path, houses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ("--data", houses, "--target", "price", "--epochs", 1, "--output", output, "--quiet")
    assert run(*arguments) == 0
    model = output / "model.pt"
    without = write_table(tmp_path / "without.csv", ["rooms,age,rent", "1,2,3"])
    words = write_table(tmp_path / "words.csv", ["area,rooms,age,rent", "one,2,3,4", "5,6,7,8"])
    hole = write_table(tmp_path / "hole.csv", ["area,rooms,age,rent", ",2,3,4", "5,6,7,8"])
    for files, message in (
        (
            (model, without),
            "without.csv has no column 'area', which the model needs; it has rooms, age, rent",
        ),
        ((model, words), "column 'area' holds text, where the model was trained on numbers: 'one'"),
        ((output / "checkpoint.pt", hole), "checkpoint.pt is not a model.pt of this program"),
        ((houses, hole), "houses.csv is not a model.pt of this program"),
        ((tmp_path / "nowhere.pt", hole), "cannot read .*nowhere.pt: No such file"),
        ((model,), "the following arguments are required: data"),
    ):
        assert predict(*files) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert_found(f"^error: .*{message}", printed.err)
    assert predict(model, hole) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1] in ("", '""')
    assert "1 of 2 rows lack a value: they have no prediction" in printed.err


def test_predict_refuses_dates_of_another_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is read as missing would be filled in. All of these are Fridays in March: days are all that there is."""
    lines = [f"2024-03-{1 + 7 * (i % 4):02d},{i % 4 + i / 50}" for i in range(20)]
    table = write_table(tmp_path / "table.csv", ["when,y", *lines])
    how = ("--dates=expand", "--missing=mean", "--epochs=1", "--output", tmp_path / "out", "--quiet")
    assert run("--data", table, "--target", "y", *how) == 0
    for cells, said in (
        (
            ["2024-03-08", "08/03/2024"],
            "^error: .*column 'when' holds no dates of the form %Y-%m-%d.*'08/03/2024'",
        ),
        (["20240308"], "^error: .*no dates of the form"),
        (["NA"], "1 of 1 rows lack a value: filled in"),
        (["2024-03-08"], ""),
    ):
        new = write_table(tmp_path / "new.csv", ["when", *cells])
        assert predict(tmp_path / "out" / "model.pt", new) == (2 if "error" in said else 0)
        assert_found(said, capsys.readouterr().err)


@pytest.mark.parametrize("schedule", ["cosine", "plateau", "none"])
def test_a_complete_run_goes_on_for_longer(tmp_path: Path, houses: Path, schedule: str) -> None:
    arguments = ("--data", houses, "--target", "price", "--schedule", schedule, "--quiet", "--output")
    output, whole = tmp_path / "out", tmp_path / "whole"
    assert run(*arguments, output, "--epochs", 5) == 0
    assert run("--resume", "--epochs", 8, "--quiet", "--output", output) == 0
    assert run("--resume", "--epochs", 10, "--quiet", "--output", output) == 0
    if schedule == "cosine":
        rates = [row["lr"] for row in record(output)["history"]]
        assert [rates[0], rates[5], rates[8]] == [0.1] * 3, "the cosine begins anew"
        assert record(output)["settings"]["restarts"] == "5,8"
        assert run(*arguments, whole, "--epochs", 10, "--restarts", "5,8") == 0
    else:
        assert run(*arguments, whole, "--epochs", 10) == 0
    assert record(output) == record(whole)
    again = ("--record", output / "record.json", "--quiet", "--output", tmp_path / "again")
    assert run(*again) == 0


def test_constant_feature_and_single_validation_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "few.csv"
    path.write_text("a,b,y\n1,0.1,2\n2,0.1,4\n3,0.1,7\n4,0.1,9\n")  # the deviation of 0.1 rounds to 1e-17
    arguments = ("--data", path, "--target", "y", "--epochs", 3, "--output", tmp_path / "out")
    assert run(*arguments) == 0
    assert "undefined" in capsys.readouterr().out
    kept = record(tmp_path / "out")
    assert kept["results"]["closed form"]["validation_r2"] is None
    assert kept["data"]["scaling"]["feature_scale"][1] == 1.0


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_other_backends_give_the_same_losses(tmp_path: Path, name: str) -> None:
    arguments = ("--epochs", 2, "--batch-size", 200)
    assert run(*arguments, "--output", tmp_path / "fallback") == 0
    assert run(*arguments, "--output", tmp_path / name, "--backend", name) == 0
    ours, theirs = (record(tmp_path / folder) for folder in (name, "fallback"))
    assert (ours["backend"], theirs["backend"]) == (name, "fallback")
    for one, two in zip(ours["history"], theirs["history"], strict=True):
        assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [("adam", "cosine"), ("sgd", "plateau"), ("adamw", "none")]
)
def test_interrupted_and_resumed_run_is_the_same_to_the_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    optimizer: str,
    schedule: str,
) -> None:
    arguments = ("--optimizer", optimizer, "--schedule", schedule, "--epochs", 12)
    assert run(*arguments, "--output", tmp_path / "whole") == 0

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
    assert run(*arguments, "--output", output) == 130
    assert "--resume" in capsys.readouterr().out
    assert not (output / "record.json").exists()
    assert run("--output", output, "--resume") == 130
    assert run("--output", output, "--resume") == 0
    assert record(output) == record(tmp_path / "whole")
    assert run("--output", output, "--resume") == 0, "a complete run resumes to itself"
    assert record(output) == record(tmp_path / "whole")


def test_sigint_keeps_a_checkpoint_that_resumes_to_the_same_bits(tmp_path: Path) -> None:
    arguments = ["--epochs", "160", "--device", "cpu"]
    output = tmp_path / "interrupted"
    command = [sys.executable, str(EXAMPLES / "regression.py"), *arguments, "--output", str(output)]
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
    assert run("--output", output, "--resume") == 0
    assert run(*arguments, "--output", tmp_path / "whole") == 0
    assert record(output) == record(tmp_path / "whole")


def test_a_record_reproduces_its_run(
    tmp_path: Path, houses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, moved = tmp_path / "first", tmp_path / "elsewhere.csv"
    arguments = ("--data", houses, "--target", "rent", "--seed", 5, "--lr", 0.03, "--epochs", 4)
    assert run(*arguments, "--optimizer", "sgd", "--output", first) == 0
    houses.rename(moved)
    again = ("--record", first / "record.json", "--data", moved, "--output", tmp_path / "second")
    assert run(*again) == 0
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
    assert run(*again) == 1
    assert "not reproduced" in (printed := capsys.readouterr().out)
    assert "versions that differ: torch" in printed


def test_divergence_stops_and_keeps_the_last_good_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--optimizer", "sgd", "--lr", 1e5, "--max-norm", 1e30, "--output", tmp_path)
    assert run(*arguments) == 1
    assert "failed: " in (printed := capsys.readouterr().out)
    assert "finite" in printed or "inf" in printed
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["training"]
    assert f"epoch {len(kept['history']) + 1} failed" in printed
    assert all(torch.isfinite(values).all() for values in kept["model"].values())
    assert not (tmp_path / "record.json").exists()


def test_a_loss_that_grew_is_named_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clipping keeps the numbers finite: the run ends, with its files, and says what became of the loss."""
    arguments = ("--optimizer", "sgd", "--epochs", 3, "--output", tmp_path)
    assert run(*arguments, "--lr", 1.5) == 1
    loss = record(tmp_path)["results"]["gradkernels"]["train_loss"]
    assert loss > 2
    assert f"diverged: the train loss is {loss:.4g}, and 1 for the weights that training began with" in (
        printed := capsys.readouterr().out
    )
    assert "smaller --lr than 1.5" in printed
    again = ("--record", tmp_path / "record.json", "--output", tmp_path / "again")
    assert run(*again) == 1
    assert "reproduced: " in capsys.readouterr().out


def test_plain_torchs_divergence_is_not_blamed_on_ours(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def step(training: object, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_tensor(torch.inf), x.new_tensor(torch.inf)

    monkeypatch.setattr(regression.PlainTorch, "step", step)
    assert run("--epochs", 2, "--output", tmp_path) == 1
    assert "plain torch: epoch 1 failed: train loss inf" in (printed := capsys.readouterr().out), printed
    assert "checkpoint.pt is of epoch 2" in printed


@pytest.mark.parametrize("where", ["train_x", "train_y"])
def test_the_guard_stops_before_the_weights_are_touched(where: str) -> None:
    training = regression.Ours(*load(batch_size=1000))
    getattr(training, where)[3] = torch.nan
    with pytest.raises(FloatingPointError, match="gradient"):
        training.epoch()
    assert all((parameter == 0).all() for parameter in training.model.parameters())


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = sys.modules["tabular.training"]
    right = training.linear_mse_loss_and_grad

    def doubled(*tensors: torch.Tensor) -> tuple:
        loss, (_, weight, _, bias) = right(*tensors)
        return loss, (None, 2 * weight, None, 2 * bias)

    monkeypatch.setattr(training, "linear_mse_loss_and_grad", doubled)
    assert run("--output", tmp_path / "out") == 1
    assert "FAILED" in capsys.readouterr().out
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


BAD_TABLES = {
    "word": ("a,y\n1,2\n3,four\n", r"column 'y' holds text in 1 of 2 rows: 'four' \(first in row 2\)"),
    "missing": (
        "a,y\n1,2\n,4\n5,\n",
        r"column 'y' has no value in 1 of 3 rows, first in row 3; "
        r"column 'a' has no value in 1 of 3 rows, first in row 2; --missing drop",
    ),
    "blank": ("a,y\n1,2\n  ,4\n", r"column 'a' has no value in 1 of 2 rows, first in row 2"),
    "not finite": (
        "a,y\n1,2\nnan,4\n5,inf\n",
        r"column 'y' holds infinite numbers in 1 of 3 rows, first in row 3; column 'a' has no value in 1 of 3",
    ),
    "underscore": (
        "a,y\n1,2\n1_0,4\n",
        r"column 'a' holds text in 1 of 2 rows: '1_0' \(first in row 2\); --na",
    ),
    "short row": ("a,b,y\n1,2,3\n4,5\n", r"column 'y' has no value in 1 of 2 rows, first in row 2"),
    "long row": ("a,y\n1,2\n4,5,6\n", r"line 3 has 3 cells, not 2"),
    "every row long": ("a,y\n1,2,3\n4,5,6\n", r"line 2 has 3 cells, not 2"),
    "late long row": ("a,y\n" + "1,2\n" * 300 + "4,5,6\n", r"line 302 has 3 cells, not 2"),
    "row after a quoted break": (
        '"a\nb",y\n1,2\n\nx,4\n',
        r"holds text in 1 of 2 rows: 'x' \(first in row 2\)",
    ),
    "one text": ("a,y\n" + "x,1\nx,2\n" * 4, r"no feature whose values differ"),
    "ids": (
        "name,y\n" + "".join(f"name{i},{i}\n" for i in range(30)),
        r"column 'name' holds text in 30 of 30 rows: 'name0', 'name1', 'name2', each a different one, as ids are",
    ),
    "many texts": (
        "city,y\n" + "".join(f"city{i // 2 % 300},{i}\n" for i in range(900)),
        r"column 'city' holds text in 900 of 900 rows: .*, 300 different ones; --drop",
    ),
    "dates": (
        "d,y\n2020-01-02,1\n2021-03-04,2\n",
        r"column 'd' holds dates \('2020-01-02', .*--dates expand",
    ),
    "six columns": (
        "a,b,c,d,e,f,y\n1,1,1,1,1,1,1\nx,x,x,x,x,x,2\n",
        r"column 'a' .*column 'e' holds text in 1 of 2 rows: 'x' \(first in row 2\) \(and 1 columns more\); --na",
    ),
    "no value at all": ("a,b,y\n1,,1\n2,,2\n", r"column 'b' has no value in any of 2 rows; --drop"),
    "no header": (
        "1,2\n3,4\n",
        r"has no column 'y'; its columns are 1, 2; the first line holds numbers .*--header no",
    ),
    "no rows": ("a,y\n", r"has 0 row\(s\)"),
    "one row": ("a,y\n1,2\n", r"has 1 row\(s\) of values; at least 2 are needed"),
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
    "open quote": ('a,y\n1,2\n"3,4\n', r"is not a CSV file: a quotation mark in line 3 is never closed"),
    "zero bytes": ("PK\0\0,y\n1,2\n", r"is not a CSV file: it holds zero bytes"),
    "not UTF-8": ("a,y\n1,2\nÿ,3\n", r"is not a text in utf-8: .*--encoding"),
}


def assert_refused(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    message: str,
    *arguments: object,
) -> None:
    """Exit status 2, one clear line, and nothing in ``folder`` written, changed or removed."""
    before = contents(folder)
    assert run(*arguments) == 2
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
    tmp_path: Path, earlier: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    text, message = BAD_TABLES[case]
    (tmp_path / "table.csv").write_text(text, encoding="latin-1")
    arguments = ("--data", tmp_path / "table.csv", "--target", "y", "--output", earlier)
    assert_refused(capsys, tmp_path, message, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere.csv", "--target", "y"), r"cannot read .*nowhere.csv: No such file"),
        (("--data", ".", "--target", "y"), r"cannot read .*: Is a directory"),
        (("--data", EXAMPLES.parent / "README.md"), r"--data needs --target"),
        (("--target", "glucose"), r"diabetes has no column 'glucose'; its columns are age, sex, bmi"),
        (("--target", "bmi,bmi"), r"names a column twice"),
        (("--drop", "glucose"), r"diabetes has no column 'glucose'"),
        (("--drop", "progression"), r"--drop names a target: progression"),
        (("--features", "bmi,progression"), r"--features names a target: progression"),
        (("--features", "bmi", "--drop", "bmi"), r"no column left to predict progression from"),
        (("--delimiter", "||"), r"'\|\|' is not one character, tab or space"),
        (("--missing", "guess"), r"--missing: invalid choice: 'guess'"),
        (("--restarts", "5,x"), r"--restarts: x is not a number of 1 or more"),
        (("--epochs", 0), r"--epochs: 0 is not a number of 1 or more"),
        (("--epochs", 1.5), r"--epochs: 1.5 is not a number"),
        (("--batch-size", -3), r"--batch-size: -3 is not a number of 1 or more"),
        (("--lr", -1), r"--lr: -1 is not a number of 0 or more"),
        (("--lr", "nan"), r"--lr: nan is not a number"),
        (("--validation", 1), r"--validation: 1 is not a number between 0 and 1"),
        (("--optimizer", "lion"), r"--optimizer: invalid choice: 'lion'"),
        (("--depth", 3), r"unrecognized arguments: --depth"),
        (("--backend", "cuda"), r"--backend: invalid choice"),
        (("--device", "abacus"), r"--backend auto --device abacus: "),
        (("--resume", "--record", "x.json"), r"not allowed with"),
        (("--record", "nowhere.json"), r"cannot use nowhere.json: .*No such file"),
        (("--resume",), r"cannot use .*checkpoint.pt: "),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_options_are_refused(
    tmp_path: Path,
    earlier: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple,
    message: str,
) -> None:
    assert_refused(capsys, tmp_path, message, *arguments, "--output", earlier)


def test_an_unwritable_output_folder_is_refused(
    tmp_path: Path, houses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (houses, houses / "below"):
        message = r"cannot write to .*houses.csv"
        assert_refused(capsys, tmp_path, message, "--output", output)


def test_a_folder_that_allows_no_file_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")  # root, whom the tests may run as, is never refused

    monkeypatch.setattr(regression.tempfile, "TemporaryFile", denied)
    assert_refused(capsys, tmp_path, "cannot write to .*: Permission denied", "--output", tmp_path)


def test_resume_and_record_refuse_what_would_change_the_numbers(
    tmp_path: Path, houses: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ("--data", houses, "--target", "price", "--epochs", 2, "--output", output)
    assert run(*arguments) == 0
    capsys.readouterr()
    resume = ("--resume", "--output", output)
    again = ("--record", output / "record.json", "--output", tmp_path / "again")
    for words in (resume, again):
        message = r"was made with --lr 0.1, not 0.5"
        assert_refused(capsys, tmp_path, message, *words, "--lr", 0.5)
    message = r"--record needs --output"
    assert_refused(capsys, tmp_path, message, "--record", output / "record.json")

    (tmp_path / "bad.json").write_text((output / "record.json").read_text().replace('"adam"', '"lion"'))
    bad = ("--record", tmp_path / "bad.json", "--output", tmp_path / "again")
    assert_refused(capsys, tmp_path, r"invalid choice: 'lion'", *bad)
    (tmp_path / "bad.json").write_text('{"settings": {}}')
    assert_refused(capsys, tmp_path, r"cannot use .*: it holds no checkpoint", *bad)
    (tmp_path / "bad.json").write_text("[1, 2]")
    assert_refused(capsys, tmp_path, r"cannot use .*bad.json", *bad)

    houses.write_text(HOUSES.replace("100", "101", 1))
    for words in (resume, again):
        assert_refused(capsys, tmp_path, r"the data are not those that .* was made with", *words)
