"""Write pictures and one self-contained HTML page from results: ``python -m bench report FILE...``."""

import argparse
import base64
import html
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradkernels.verify.console import Cell, print_line

from .case import OURS
from .console import header, scale_table, table, times
from .machine import slug
from .results import fitted, groups, load_or_exit, remarks, summaries

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ --ink: #1f2933; --faint: #66727f; --line: #e3e8ed; --card: #f6f8fa; --good: #0b7a5c;
          --bad: #b42318; }}
  body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1080px;
         margin: 0 auto; padding: 2rem 1.2rem 4rem; }}
  h1 {{ font-size: 1.6rem; margin: 0 0 .3rem; }}
  h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }}
  h3 {{ font-size: 1rem; margin: 1.4rem 0 .3rem; }}
  p.machine {{ color: var(--faint); margin: .1rem 0; font-size: .9rem; }}
  .cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: .8rem;
           margin: 1.2rem 0; }}
  .card {{ background: var(--card); border-radius: 8px; padding: .7rem .9rem; }}
  .card b {{ font-size: 1.45rem; display: block; }}
  .card span {{ color: var(--faint); font-size: .85rem; }}
  .wide {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }}
  th, td {{ padding: .22rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
           white-space: nowrap; }}
  th {{ color: var(--faint); font-weight: 600; }}
  th:first-child, td:first-child {{ text-align: left; }}
  .good {{ color: var(--good); }}
  .bad {{ color: var(--bad); font-weight: 600; }}
  .dim {{ color: var(--faint); }}
  img {{ max-width: 100%; height: auto; }}
  ul {{ padding-left: 1.2rem; }} li {{ font-size: .9rem; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""
LEGEND = """
Every implementation's result is checked against NumPy float64 before it is timed; a wrong one has no time.
<b>us</b>: median of a call in a loop, launch included. <b>free us</b>: without the launch (graph replay, or
events after a cache flush). <b>GB/s</b>: minimum traffic (each input read once, each result written once)
over time, launch-free where that was measured. <b>cp%</b> and <b>mm%</b>: of this machine's copy and
matmul rate, measured at the start of the run; a job that fits the cache, or only reads, can pass 100. Other
columns: the baseline's time over gradkernels', launch included. <b>1st s</b>: the first call, compilation
included.
"""


def pictures(document: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Draw every picture of a run as PNG.

    Returns:
        ``{"roofline" | "<op>" | "scale": path}``.
    """
    import matplotlib.pyplot as plt
    from PIL import Image

    from . import plots

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"roofline": plots.roofline}
    for op in dict.fromkeys(record["op"] for record in document["cases"]):
        drawn[op] = lambda document, op=op: plots.ratios(document, op)
    if fitted(document):
        drawn["scale"] = plots.scale
    paths = {}
    with plt.rc_context(plots.STYLE):
        for name, draw in drawn.items():
            figure = draw(document)
            paths[name] = folder / f"{name}.png"
            drawing = io.BytesIO()
            figure.savefig(drawing)
            plt.close(figure)
            # A palette of 96 colours makes a file a third as long, and the page that holds them all.
            Image.open(drawing).convert("RGB").quantize(96).save(paths[name], optimize=True)
    return paths


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    out = io.StringIO()
    out.write('<div class="wide"><table><tr>')
    out.write("".join(f"<th>{html.escape(column)}</th>" for column in columns) + "</tr>\n")
    for row in rows:
        cells = [(cell, "") if isinstance(cell, str) else cell for cell in row]
        shown = (f'<td class="{style}">{html.escape(text)}</td>' for text, style in cells)
        out.write(f"<tr>{''.join(shown)}</tr>\n")
    out.write("</table></div>")
    return out.getvalue()


def page(document: dict[str, Any], paths: dict[str, Path]) -> str:
    """Return the whole report as one HTML file that needs no other."""
    machine, records, limits = document["machine"], document["cases"], document["limits"]
    body = [f'<p class="machine">{html.escape(line)}</p>' for line in header(machine, limits)]
    found = summaries(records)
    body.append('<div class="cards">')
    for s in found:
        (text, style), name = times(s.geometric_mean), html.escape(f"{s.op} against {s.baseline}")
        slower = f"worst {times(s.worst)[0]}, slower in {s.clear_losses} of {s.cases}"
        body.append(f'<div class="card"><b class="{style}">{text}</b>{name}<br><span>{slower}</span></div>')
    body.append("</div>")
    body.append(f'<p class="dim">{LEGEND}</p>')
    body.append(_image(paths["roofline"], "roofline"))
    for op in dict.fromkeys(record["op"] for record in records):
        body.append(
            f"<h2>{html.escape(op)}</h2>" + _image(paths[op], f"{op}: ratio to each baseline over size")
        )
        of_op = [record for record in records if record["op"] == op]
        for (_, variant), group in groups(of_op).items():
            body.append(f"<h3>{html.escape(variant)}</h3>" + _table(*table(group, limits)))
    if scale := fitted(document):
        body.append("<h2>Scale</h2>" + _image(paths["scale"], "time over size"))
        body.append(_table(*scale_table(scale)))
    body.append(f"<h2>Where {OURS} is slower</h2><ul>")
    for s in found:
        for loss in s.losses:
            text = html.escape(f"{loss.case}, against {s.baseline}{loss.remark}")
            body.append(f'<li><b class="bad">{times(loss.ratio)[0]}</b> {text}</li>')
    body.append("</ul><h2>Notes</h2><ul>")
    body += [f"<li>{html.escape(remark)}</li>" for remark in remarks(document)]
    body.append("</ul>")
    title = html.escape(f"{OURS} on {machine['device']}")
    return PAGE.format(title=title, body="\n".join(body))


def draw(document: dict[str, Any], folder: Path) -> bool:
    """Write the pictures and ``report.html`` into a folder, or print why not; return True if they were written."""
    if importlib.util.find_spec("matplotlib") is None:
        print_line(
            "no pictures: matplotlib is not installed; elsewhere, `python -m bench report FILE` draws them"
        )
        return False
    path = folder / "report.html"
    path.write_text(page(document, pictures(document, folder)))
    print_line(f"written: {path}")
    return True


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description="Pictures and an HTML page from results."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: beside each file; of several, a folder each"
    )
    arguments = parser.parse_args(argv)
    documents = load_or_exit(parser, *arguments.files)
    folders = [arguments.out or path.parent for path in arguments.files]
    if arguments.out and len(folders) > 1:
        folders = [arguments.out / slug(document["machine"]) for document in documents]
    if len(set(folders)) < len(folders):  # runs before and after something, in one folder or of one machine
        folders = [folder / path.stem for folder, path in zip(folders, arguments.files, strict=True)]
    if len(set(folders)) < len(folders):
        parser.error("files of one name would be drawn into one folder")
    return 1 - min([draw(*each) for each in zip(documents, folders, strict=True)])
