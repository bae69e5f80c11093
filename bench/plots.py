"""The pictures of a report, drawn from a run's JSON: roofline, ratios over size, scale."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from .case import OURS
from .results import SHORT, baselines, groups, rates, ratio, ratio_rounds

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
    """1500 as 1.5k: for the ticks of a logarithmic axis."""
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (0.0, "")):
        if value >= limit:
            return f"{value / (limit or 1):g}" + (f" {letter}{unit}" if unit else letter)
    return f"{value:g}"


def _three(value: float, unit: str = "") -> str:
    """With three significant digits."""
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
    """Every case under the machine's measured limits: ours filled, plain torch hollow, a line between."""
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
    x = np.geomspace(min(intensities, default=1.0) / 2, max([*intensities, 12 * ridge]) * 2, 400)
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
    start = x[0] * 1.2
    copy = axes.annotate(
        f"copy {_three(limits['copy'], 'B/s')}",
        (start, limits["copy"] * start),
        xytext=(-2, 7),
        textcoords="offset points",
        fontsize=9,
        rotation_mode="anchor",
    )
    axes.set_xlabel("arithmetic intensity (FLOP per compulsory byte)")
    axes.set_ylabel("FLOP/s")
    axes.set_title("Roofline: how far from what this machine can do")
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


def ratios(document: dict[str, Any], op: str) -> Figure:
    """The time of each baseline over ours, by the bytes of the job; a panel per variant."""
    records = [record for record in document["cases"] if record["op"] == op]
    others = baselines(records)
    panels = list(groups(records).items())
    figure, all_axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.6 + 4.4 * len(panels), 4.6),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    drawn: list[float] = [1.0]
    for axes, ((_, variant), found) in zip(all_axes[0], panels, strict=True):
        for name, colour in zip(others, COLOURS, strict=False):
            for dtype, mark in DTYPE_MARKS.items():
                points = sorted(
                    (record["bytes"], value, *_spread(record, name))
                    for record in found
                    if record["dtype"] == dtype and (value := ratio(record, name)) is not None
                )
                if not points:
                    continue
                x, y, low, high = np.array(points).T
                error = [np.maximum(y - low, 0).tolist(), np.maximum(high - y, 0).tolist()]
                axes.errorbar(
                    x, y, error, color=colour, marker=mark, markersize=6, markeredgecolor=PAPER,
                    linewidth=1.3, elinewidth=1, capsize=2, alpha=0.9,
                )  # fmt: skip
                drawn += [*y, *low, *high]
        axes.axhline(1, color=INK, linewidth=1.2)
        sizes = [record["bytes"] for record in found]
        axes.set(xscale="log", yscale="log", title=variant, xlabel="compulsory bytes of the job")
        axes.set_xlim(min(sizes) / 3, max(sizes) * 3)
        axes.xaxis.set_major_formatter(FuncFormatter(_bytes))
    top, bottom = max(drawn) * 1.4, min(min(drawn) / 1.4, 0.7)
    for axes in all_axes[0]:
        axes.set_ylim(bottom, top)
        axes.axhspan(bottom, 1, color="#fdeceb", zorder=0)
        steps = [2.0**k for k in range(-6, 13) if bottom <= 2.0**k <= top]
        axes.set_yticks(steps, [f"{step:g}x" for step in steps])
        axes.yaxis.set_minor_locator(NullLocator())
    all_axes[0][0].set_ylabel(f"baseline's time ÷ {OURS}'s")
    all_axes[0][0].annotate(
        f"{OURS} is slower here", (0.015, 0.02), xycoords="axes fraction", color="#b42318", fontsize=9
    )
    used = {record["dtype"] for record in records}
    keys = [_key(colour, "o", f"against {name}") for name, colour in zip(others, COLOURS, strict=False)]
    keys += [_key(FAINT, mark, name) for name, mark in DTYPE_MARKS.items() if name in used]
    figure.legend(handles=keys, loc="outside right upper", fontsize=9)
    figure.suptitle(
        f"{op}: how many times faster than each baseline", x=0.01, ha="left", weight="bold", fontsize=13
    )
    _caption(figure, document["machine"])
    return figure


def _spread(record: dict[str, Any], baseline: str) -> tuple[float, float]:
    """The 20th and 80th percentile of the ratio over the rounds."""
    low, high = np.percentile(ratio_rounds(record, baseline), (20, 80))
    return float(low), float(high)


def scale(document: dict[str, Any]) -> Figure:
    """The scale study: measured points, the fitted curve, and the knee where launch cost stops dominating."""
    sweeps: Sequence[dict[str, Any]] = document["scale"]
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
    figure.legend(handles=keys, loc="outside lower left", ncols=3, fontsize=9)
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
        axes.scatter(x, y, 26, color=colour, edgecolor=PAPER, linewidth=0.6, zorder=3)
        if who == "ours" and found["knee"]:
            axes.axvline(found["knee"], color=INK, linestyle=":", linewidth=1.2)
            axes.annotate(
                f" {_three(found['knee'])}",
                (found["knee"], 0.02),
                xycoords=("data", "axes fraction"),
                fontsize=9,
            )
    axes.set(xscale="log", yscale="log", xlabel=sweep["axis"])
    exponent = sweep["ours"]["exponent"]
    axes.set_title(
        f"{sweep['op']} over {sweep['axis']}" + (f"  (p = {exponent:g})" if exponent else ""), fontsize=11
    )
    axes.xaxis.set_major_formatter(FuncFormatter(_si))
    axes.yaxis.set_major_formatter(FuncFormatter(_microseconds))
