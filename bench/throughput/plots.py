"""Draw the pictures of a report from a run's JSON: roofline, speedup per workload, scale."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .case import OURS
from .results import SHORT, baselines, fitted, groups, rates, ratio, ratio_rounds

INK, FAINT, PAPER = "#1f2933", "#9aa5b1", "#ffffff"
COLOURS = ("#2f6fdb", "#e07b00", "#0c9b74", "#c43d7f", "#7654d4", "#8a6d3b")
DTYPE_MARKS = {"float32": "o", "bfloat16": "s", "float16": "^", "float64": "D"}
STYLE = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.8,
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "text.color": INK,
    "font.size": 10.5,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def _si(value: float, _: Any = None, unit: str = "") -> str:
    """Format 1500 as 1.5k, for the ticks of a logarithmic axis."""
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0.0, "")):
        if value >= limit:
            return f"{value / (limit or 1):g}" + (f" {letter}{unit}" if unit else letter)
    return f"{value:g}"


def _three(value: float, unit: str = "") -> str:
    """Format with three significant digits."""
    return _si(float(f"{value:.3g}"), unit=unit)


def _microseconds(value: float, _: Any = None) -> str:
    return f"{value:g} µs" if value < 1e3 else f"{value / 1e3:g} ms" if value < 1e6 else f"{value / 1e6:g} s"


def _bytes(value: float, _: Any = None) -> str:
    return _si(value, unit="B")


def _caption(figure: Figure, machine: dict[str, Any]) -> None:
    text = f"{machine['device']} · torch {machine['torch']} · {machine['date']} · commit {machine['commit']}"
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0, 0.035, 1, 0.965))
    figure.text(0.995, 0.008, text, ha="right", va="bottom", fontsize=8, color=FAINT)


def roofline(document: dict[str, Any]) -> Figure:
    """Draw every case under the machine's measured limits: ours filled, plain torch hollow, a line between.

    The first decade of intensity is free of cases: the label of the copy roof stands there.
    """
    limits, records = document["limits"], document["cases"]
    ops = list(dict.fromkeys(record["op"] for record in records))
    figure, axes = plt.subplots(figsize=(10, 6.4), layout="constrained")
    intensities: list[float] = []
    for record in records:
        speeds = [rates(record, limits, name) for name in (OURS, *baselines([record])[:1])]
        if speeds[0] is None:
            continue
        x = record["flops"] / record["bytes"]
        intensities.append(x)
        ys = [1e12 * speed.tflop_per_s for speed in speeds if speed]
        colour, mark = COLOURS[ops.index(record["op"]) % len(COLOURS)], DTYPE_MARKS[record["dtype"]]
        size = 14 + 9 * max(0.0, np.log10(record["bytes"]) - 3)
        axes.plot([x] * len(ys), ys, color=colour, linewidth=0.9, alpha=0.45, zorder=3)
        axes.scatter(x, ys[0], size, marker=mark, color=colour, edgecolor=PAPER, linewidth=0.6, zorder=5)
        for y in ys[1:]:
            axes.scatter(x, y, size, marker=mark, facecolor=PAPER, edgecolor=colour, linewidth=1.1, zorder=4)
    used = {record["dtype"] for record in records}
    roofs = sorted((rate, name) for name, rate in limits["matmul"].items() if name in used)
    ridge = max((rate / limits["copy"] for rate, _ in roofs), default=1.0)
    x = np.geomspace(min(intensities, default=1.0) / 20, max([*intensities, 12 * ridge]) * 2, 400)
    axes.set(xscale="log", yscale="log", xlim=(x[0], x[-1]))
    shift = -3
    for i, (rate, name) in enumerate(roofs):
        axes.plot(x, np.minimum(limits["copy"] * x, rate), color=INK, linewidth=1.6, zorder=2)
        shift = shift + 11 if i and rate < 1.3 * roofs[i - 1][0] else -3
        axes.annotate(
            f"{SHORT[name]} matmul {_three(rate, 'FLOP/s')}",
            (x[-1], rate),
            xytext=(5, shift),
            textcoords="offset points",
            fontsize=9,
        )
    start = x[0] * 1.3
    copy = axes.annotate(
        f"copy {_three(limits['copy'], 'B/s')}",
        (start, limits["copy"] * start),
        xytext=(-2, 6),
        textcoords="offset points",
        fontsize=9,
        rotation_mode="anchor",
    )
    axes.set_xlabel(
        "arithmetic intensity: FLOP per byte of minimum traffic\n"
        "above the copy roof: the data were still in a cache, or more is read than written\n"
        "far below it: small jobs, whose time is the cost of the call"
    )
    axes.set_ylabel("FLOP/s")
    axes.set_title("Roofline: how far from this machine's measured limits")
    axes.xaxis.set_major_formatter(FuncFormatter(_si))
    axes.yaxis.set_major_formatter(FuncFormatter(_si))
    keys = [_key(COLOURS[i % len(COLOURS)], "o", op) for i, op in enumerate(ops)]
    keys += [
        Line2D([], [], marker="o", linestyle="", color=FAINT, markerfacecolor=colour, label=label)
        for colour, label in ((FAINT, OURS), (PAPER, "plain torch"))
    ]
    keys += [_key(FAINT, DTYPE_MARKS[name], name) for name in DTYPE_MARKS if name in used]
    figure.legend(
        handles=keys, loc="outside right upper", fontsize=9, title="larger mark: more bytes", title_fontsize=8
    )
    _caption(figure, document["machine"])
    figure.canvas.draw()  # the layout decides the angle of the copy roof on the page
    ends = axes.transData.transform([(start, start), (2 * start, 2 * start)])
    copy.set_rotation(np.degrees(np.arctan2(*(ends[1] - ends[0])[::-1])))
    return figure


def _key(colour: str, mark: str, label: str) -> Line2D:
    return Line2D([], [], marker=mark, linestyle="", color=colour, markeredgecolor=PAPER, label=label)


def ratio_ticks(low: float, high: float, apart: float = 0.06) -> list[float]:
    """Choose round ratios between low and high: 1 first, then powers of 2, then the steps between them.

    On a logarithmic axis any two are at least ``apart`` of its length from each other, so labels do not collide.
    """
    powers = sorted((2.0**k for k in range(-8, 13)), key=lambda value: abs(np.log(value)))
    chosen: list[float] = []
    for value in (*powers, 1.5, 0.75, 3, 6, 12, 24, 1.25, 0.9, 1.1, 0.8, 1.05, 0.95, 1.02, 0.98):
        distances = [abs(np.log(value / other)) for other in chosen]
        if low <= value <= high and all(each >= apart * np.log(high / low) for each in distances):
            chosen.append(value)
    return sorted(chosen)


def ratios(document: dict[str, Any], op: str) -> Figure:
    """Draw the time of each baseline over ours: a row per workload, a panel per variant."""
    records = [record for record in document["cases"] if record["op"] == op]
    others = baselines(records)
    panels = [(variant, _ordered(found)) for (_, variant), found in groups(records).items()]
    heights = [len(found) + 0.4 for _, found in panels]
    figure, all_axes = plt.subplots(
        len(panels),
        1,
        figsize=(10, 1.3 + 0.75 * len(panels) + 0.3 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    drawn: list[float] = [0.9, 1.5]
    for axes, (variant, found) in zip(all_axes[:, 0], panels, strict=True):
        for row, record in enumerate(found):
            timed = [name for name in others if ratio(record, name) is not None]
            for i, name in enumerate(timed):
                x, (low, high) = ratio(record, name), _middle(record, name)
                axes.errorbar(
                    x, row + 0.17 * (i - (len(timed) - 1) / 2), xerr=[[max(x - low, 0)], [max(high - x, 0)]],
                    color=COLOURS[others.index(name) % len(COLOURS)], marker="o", markersize=6,
                    markeredgecolor=PAPER, elinewidth=1.2,
                )  # fmt: skip
                drawn += [x, low, high]
        labels = [f"{record['label']}  {SHORT[record['dtype']]}" for record in found]
        axes.set_yticks(range(len(found)), labels)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_title(variant)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        for row, record in enumerate(found):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color="#f4f6f8", zorder=-2)
            axes.annotate(
                _three(record["bytes"], "B"), (1.0, row), xytext=(8, 0), textcoords="offset points",
                xycoords=("axes fraction", "data"), va="center", fontsize=9, color="#52606d",
            )  # fmt: skip
    low, high = min(drawn) / 1.06, max(drawn) * 1.06
    ticks = ratio_ticks(low, high)
    for axes in all_axes[:, 0]:
        axes.set(xscale="log", xlim=(low, high))
        axes.axvspan(low, 1, color="#fdeceb", alpha=0.75, zorder=-1)
        axes.axvline(1, color=INK, linewidth=1.2, zorder=1)
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    all_axes[0, 0].annotate(
        "minimum\ntraffic", (1, 1), xytext=(8, 0), textcoords="offset points", xycoords="axes fraction",
        fontsize=8, color="#52606d",
    )  # fmt: skip
    all_axes[-1, 0].set_xlabel(
        f"speedup: baseline's time ÷ {OURS}' time, launch included\n"
        f"line: middle 60 % of the rounds; shaded: {OURS} is slower"
    )
    keys = [_key(colour, "o", f"over {name}") for name, colour in zip(others, COLOURS, strict=False)]
    figure.legend(handles=keys, loc="outside upper right", ncols=len(keys), fontsize=9, columnspacing=1.2)
    figure.suptitle(f"{op}: speedup", x=0.01, ha="left", weight="bold", fontsize=13)
    _caption(figure, document["machine"])
    return figure


def _ordered(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort the records of one panel by dtype, then by minimum traffic; drop those that were skipped."""
    timed = [record for record in records if "skipped" not in record]
    dtypes = list(DTYPE_MARKS)
    return sorted(timed, key=lambda record: (dtypes.index(record["dtype"]), record["bytes"]))


def _middle(record: dict[str, Any], baseline: str) -> tuple[float, float]:
    """Return the 20th and 80th percentile of the ratio over the rounds."""
    low, high = np.percentile(ratio_rounds(record, baseline), (20, 80))
    return float(low), float(high)


def scale(document: dict[str, Any]) -> Figure:
    """Draw the scale study: measured points, the fitted curve, and the knee where launch cost stops dominating."""
    sweeps = fitted(document)
    columns = min(3, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure, all_axes = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.5 * rows), layout="constrained", squeeze=False
    )
    for axes, sweep in zip(all_axes.flat, sweeps, strict=False):
        _sweep(axes, sweep)
    for axes in list(all_axes.flat)[len(sweeps) :]:
        axes.set_visible(False)
    keys = [_key(COLOURS[0], "o", OURS), _key(FAINT, "o", "plain torch")]
    keys.append(Line2D([], [], color=INK, linestyle=":", label="knee: twice the fixed cost"))
    figure.legend(handles=keys, loc="outside upper right", ncols=3, fontsize=9)
    figure.suptitle("Scale: time = fixed + c · size^p", x=0.01, ha="left", weight="bold", fontsize=13)
    _caption(figure, document["machine"])
    return figure


def _sweep(axes: Axes, sweep: dict[str, Any]) -> None:
    x = np.array([point["value"] for point in sweep["points"]], dtype=float)
    smooth = np.geomspace(x[0], x[-1], 200)
    for who, colour in (("torch", FAINT), ("ours", COLOURS[0])):
        y = np.array([point[f"{who}_us"] for point in sweep["points"]])
        found = sweep[who]
        if found["exponent"]:
            curve = found["fixed_us"] + found["c"] * smooth ** found["exponent"]
            axes.plot(smooth, curve, color=colour, linewidth=1.4)
        size = 26 if who == "ours" else 55  # equal times show as a ring
        axes.scatter(x, y, size, color=colour, edgecolor=PAPER, linewidth=0.6, zorder=3)
        if who == "ours" and found["knee"]:
            axes.axvline(found["knee"], color=INK, linestyle=":", linewidth=1.2)
            axes.annotate(
                f" {_three(found['knee'])}",
                (found["knee"], 0.02),
                xycoords=("data", "axes fraction"),
                fontsize=9,
            )
    others = ", ".join(f"{name} = {n:,}" for name, n in sweep["base"].items() if name != sweep["axis"])
    axes.set(xscale="log", yscale="log", xlabel=sweep["axis"] + (f"  ({others})" if others else ""))
    exponent = sweep["ours"]["exponent"]
    axes.set_title(
        f"{sweep['op']} over {sweep['axis']}" + (f"  (p = {exponent:g})" if exponent else ""), fontsize=11
    )
    for axis, form, values in (
        (axes.xaxis, _si, x),
        (
            axes.yaxis,
            _microseconds,
            [point[f"{who}_us"] for point in sweep["points"] for who in ("ours", "torch")],
        ),
    ):
        steps = (1.0, 2.0, 5.0) if max(values) < 100 * min(values) else (1.0,)
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(FuncFormatter(form))
        axis.set_minor_formatter(NullFormatter())
