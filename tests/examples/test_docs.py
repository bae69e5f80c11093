"""The documentation's programs run and print what they say, its API pages are complete, its links lead somewhere."""

import re
import runpy
import sys
from pathlib import Path

import gradkernels
import pytest
from gradkernels import layers, nn, verify

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
PROGRAMS = {
    f"{name}-{number}": program
    for name, text in PAGES.items()
    for number, program in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), 1)
}


@pytest.mark.unwatched
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block is a program of its own; a comment behind ``print`` begins with what is printed."""
    if "triton" in PROGRAMS[name]:
        pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    file = tmp_path / "program.py"  # Triton reads a kernel's source from its file
    file.write_text(PROGRAMS[name])
    runpy.run_path(str(file))
    printed = capsys.readouterr().out.splitlines()
    for said in re.findall(r"^print\(.*\)  # (.+)$", PROGRAMS[name], re.MULTILINE):
        assert any(said.startswith(line) for line in printed if line), f"{said!r} is not in {printed}"


def test_every_public_name_has_its_place() -> None:
    """On an API page, as a directive that mkdocstrings expands.

    A function that bears its module's name needs its full path: the module would stand there instead.
    """
    directives = re.findall(r"^::: gradkernels\.(\S+)$", "\n".join(PAGES.values()), re.MULTILINE)
    modules = {name for name in gradkernels.__all__ if f"gradkernels.{name}" in sys.modules}
    public = {f"{name}.{name}" if name in modules else name for name in gradkernels.__all__}
    public -= {"layers.layers", "nn.nn"}
    public |= {f"verify.{name}" for name in verify.__all__}
    public |= {
        f"{module.__name__.partition('.')[2]}.{name}"
        for module in (layers, nn)
        for name, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__
    }
    assert public <= set(directives), f"no page has {sorted(public - set(directives))}"
    assert len(directives) == len(set(directives))


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.rglob("*.md")), *sorted(DOCS.parent.glob("*.md"))], ids=lambda page: page.name
)
def test_links(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", prose):
        if "://" in target:
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{target}#{anchor}"
