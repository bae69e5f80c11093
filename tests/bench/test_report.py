"""What is printed and drawn: tables, pictures, the page, the remarks."""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as cli
from bench.throughput import machine, report, results, scale
from bench.throughput.console import Screen

from .fakes import Clock, document, doubling


def test_report_is_drawn_from_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    sweep = {"value": [10.0**k for k in range(1, 6)]}
    times = [5 + 0.01 * value for value in sweep["value"]]
    points = [
        {"value": value, "ours_us": time, "torch_us": 2 * time}
        for value, time in zip(sweep["value"], times, strict=True)
    ]
    fitted = scale.fit(sweep["value"], times)
    studied = {
        "op": "doubling", "variant": "forward", "dtype": "float32", "axis": "n", "base": {}, "stopped": "",
        "points": points, "ours": fitted, "torch": fitted,
    }  # fmt: skip
    cases = [doubling(clock, n=n) for n in (100, 1000)]
    wrong = doubling(clock, factor=3.0, n=50)
    results.write_json(document(*cases, wrong, clock=clock, scale=[studied]), tmp_path / "bench.json")
    assert cli.main(["report", str(tmp_path / "bench.json")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "WRONG" in page
    for name in ("roofline", "doubling", "scale"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_no_report_of_several_is_drawn_over_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, drawn = Clock(), []
    monkeypatch.setattr(report, "draw", lambda document, folder: bool(drawn.append(folder)) or True)
    for name in ("before", "after", "elsewhere/after"):
        results.write_json(document(doubling(clock), clock=clock), tmp_path / f"{name}.json")
    before, after, elsewhere = (
        str(tmp_path / f"{name}.json") for name in ("before", "after", "elsewhere/after")
    )
    assert cli.main(["report", before, elsewhere]) == 0
    assert cli.main(["report", before, after]) == 0
    assert cli.main(["report", before, after, "--out", str(tmp_path / "out")]) == 0
    device = tmp_path / "out" / "a-clock"
    assert drawn == [
        *(tmp_path, tmp_path / "elsewhere"),
        *(tmp_path / "before", tmp_path / "after"),
        *(device / "before", device / "after"),
    ]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", after, elsewhere, "--out", str(tmp_path / "out")])


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    """The results of a real run."""
    (path,) = Path(cli.__file__).parent.glob("results/amd-epyc-2-cores/bench.json")
    return results.load(path)


def texts(axes: Any) -> list[Any]:
    """The labels and notes of one pair of axes that show something."""
    ticks = [label for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()]
    return [text for text in (*ticks, *axes.texts) if text.get_text() and text.get_visible()]


@pytest.mark.parametrize("name", ["roofline", "training", "mse", "scale"])
def test_no_labels_of_a_picture_collide(committed: dict[str, Any], name: str) -> None:
    plots = pytest.importorskip("bench.throughput.plots")
    with plots.plt.rc_context(plots.STYLE):
        drawn = {"roofline": plots.roofline, "scale": plots.scale}.get(name)
        figure = drawn(committed) if drawn else plots.ratios(committed, name)
        figure.canvas.draw()
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        low, high = axes.get_window_extent().get_points()
        boxes = {
            text.get_text(): box
            for text in texts(axes)
            if ((box := text.get_window_extent()).x1 >= low[0] or box.y1 >= low[1]) and box.x0 <= 2 * high[0]
        }
        for (one, box), (other, beside) in itertools.combinations(boxes.items(), 2):
            assert not box.overlaps(beside), (axes.get_title(loc="left"), one, other)
    plots.plt.close(figure)


def test_the_roofs_labels_are_free_of_marks(committed: dict[str, Any]) -> None:
    plots = pytest.importorskip("bench.throughput.plots")
    figure = plots.roofline(committed)
    figure.canvas.draw()
    (axes,) = figure.axes
    marks = [axes.transData.transform(each.get_offsets())[0] for each in axes.collections]
    assert len(marks) > 100
    for text in axes.texts:
        box = text.get_window_extent()
        assert not any(box.contains(*mark) for mark in marks), text.get_text()
    assert "above the copy roof" in axes.get_xlabel()
    plots.plt.close(figure)


def test_speedups_have_a_row_for_each_workload(committed: dict[str, Any]) -> None:
    """Cases of equal bytes are rows of their own, with no line between them; each names its bytes."""
    plots = pytest.importorskip("bench.throughput.plots")
    figure = plots.ratios(committed, "adam")
    panel = figure.axes[0]
    labels = [label.get_text() for label in panel.get_yticklabels()]
    cases = [r for r in committed["cases"] if (r["op"], r["variant"]) == ("adam", "Adam")]
    assert sorted(labels) == sorted(f"{r['label']}  {results.SHORT[r['dtype']]}" for r in cases)
    assert [text.get_text() for text in panel.texts if text.get_text()[-1] == "B"] == [
        "56 B", "28 MB", "29.4 MB", "280 MB", "140 MB",
    ]  # fmt: skip
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    assert len(dots) == sum(
        results.ratio(r, name) is not None for r in cases for name in r["contenders"]
    ) - len(cases)
    assert all(len(line.get_xdata()) == 1 for line in dots)
    plots.plt.close(figure)


def test_ticks_of_a_small_range_are_readable() -> None:
    plots = pytest.importorskip("bench.throughput.plots")
    assert {0.9, 1, 1.1, 1.25, 1.5, 2} <= set(plots.ratio_ticks(0.85, 2.1))
    assert {1, 1.1, 1.25, 1.5} <= set(plots.ratio_ticks(0.95, 1.6))
    assert set(plots.ratio_ticks(0.5, 40)) >= {0.5, 1, 2, 4, 8, 16, 32}
    assert 1.1 not in plots.ratio_ticks(0.5, 40)  # its label would cover that of 1


def test_equal_times_are_a_tie(capsys: pytest.CaptureFixture) -> None:
    clock = Clock()
    found = document(doubling(clock, us=100.0, plain_us=99.7), clock=clock)
    assert results.ratio(found["cases"][0], "eager") == pytest.approx(0.997, abs=1e-3)
    (summary,) = results.summaries(found["cases"])
    assert not summary.losses
    Screen().document(found)
    assert "slower than" not in capsys.readouterr().out
    page = report.page(found, dict.fromkeys(("roofline", "doubling"), Path(__file__)))
    assert '<b class="">1.00</b>' in page
    assert '"bad"' not in page
    slower = document(doubling(clock, us=101.0, plain_us=99.7), clock=clock)
    assert results.summaries(slower["cases"])[0].losses


def test_a_busy_machine_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = document(clock=Clock())
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 4)

    def signs(load: float | None, copy: float) -> list[str]:
        return machine.signs_of_other_work(found["machine"], {"copy": copy}, load)

    assert not signs(0.9, 1e9)  # nothing is committed for this machine
    results.write_json(found, tmp_path / "a-clock" / "bench.json")
    assert not signs(0.9, 0.81e10)
    assert not signs(None, 1e10)
    assert signs(1.1, 1e10) == ["this machine is busy: load 1.1 on 4 cores before the run"]
    (slow,) = signs(0.0, 0.79e10)
    assert "it copies 7.9 GB/s, and 10.0 in a-clock/bench.json" in slow
    Screen().document(found | {"busy": [slow]})
    assert f"note: {slow}" in capsys.readouterr().out


def test_tables_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("bench.throughput.console.rich", None)
    clock = Clock()
    screen = Screen()
    with screen.progress(1) as advance:
        advance("one")
    screen.document(document(doubling(clock, us=200.0), clock=clock))
    shown = capsys.readouterr()
    assert "[1/1] one" in shown.err
    assert "slower than eager" in shown.out


def test_a_terminal_of_80_columns_shows_every_column(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("rich")
    clock = Clock()
    found = document(doubling(clock, us=200.0, n=10**6), clock=clock)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Screen().document(found)
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    row = next(line for line in shown.splitlines() if line.startswith("1000000"))
    assert [row.split()[i] for i in (0, 1, 7)] == ["1000000", "f32", "0.76"]
    assert "shape" in shown
    assert "0.76  doubling forward 1000000 float32" in shown
