"""mkdocs hook: the committed benchmark runs become part of the site."""

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add each run's pictures under ``results/<device>/``."""
    for picture in sorted(RESULTS.glob("*/*.png")):
        name = picture.relative_to(RESULTS).as_posix()
        files.append(File.generated(config, f"results/{name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace ``{{ results }}`` by a section for each device: its machine, then its pictures."""
    if "{{ results }}" not in markdown:
        return markdown
    return markdown.replace("{{ results }}", "\n".join(_section(run) for run in sorted(RESULTS.glob("*/"))))


def _section(run: Path) -> str:
    data = json.loads((run / "bench.json").read_text())
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in data["machine"].items())
    pictures = "\n\n".join(
        f"![{picture.stem}](results/{run.name}/{picture.name})" for picture in sorted(run.glob("*.png"))
    )
    return f"## {data['machine']['device']}\n\n| what | value |\n|---|---|\n{rows}\n\n{pictures}\n"
