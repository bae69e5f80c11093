"""Imports inside kernels/ run one way, without a circle; a long file says why it is one, a docstring what is done."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"

# From the bottom: a file imports from its own layer and those above it in this list, wherever the import stands.
# backends.py finds the launchers by name, when a call needs them.
LAYERS = (
    ("checks.py", "torch_private.py", "optim/bucket.py", "optim/__init__.py"),
    ("backends.py",),
    ("repeat.py",),
    ("triton/", "fallback/", "reference/"),
    ("operator.py", "optim/plan.py", "optim/stacked.py", "optim/compiled.py", "optim/step.py"),
    ("matmul.py", "mse.py", "sgd.py", "adam.py"),
    ("linear_mse_rows.py", "linear_mse_operators.py"),
    ("linear_mse_models.py", "linear_mse.py"),
    ("linear_mse_fit.py",),
    ("layers.py", "nn.py", "ops.py"),
    ("explain.py", "warmup.py"),
    ("verify/",),
    ("__init__.py",),
    ("__main__.py",),
)


def layer(path: str) -> int:
    (found,) = (
        i
        for i, places in enumerate(LAYERS)
        for place in places
        if path == place or (place.endswith("/") and path.startswith(place))
    )
    return found


def imported(path: Path, nodes: list[ast.stmt] | Iterator[ast.AST]) -> Iterator[str]:
    """The files of kernels/ that a file imports."""
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            for target in (folder / f"{alias.name}.py", folder.with_suffix(".py"), folder / "__init__.py"):
                if target.is_file():
                    yield str(target.relative_to(KERNELS))
                    break
            else:
                raise AssertionError(f"{path} imports {alias.name} from nowhere")


FILES = {str(path.relative_to(KERNELS)): path for path in sorted(KERNELS.rglob("*.py"))}


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_from_its_layer_and_below(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    for target in imported(FILES[name], ast.walk(tree)):
        # A package's own __init__ is imported with any of its files.
        assert layer(target) <= layer(name), f"{name} imports {target}"


def test_no_circle() -> None:
    """Not even one that works by luck, because of the order in which its files come to be imported."""
    graph = {
        name: set(imported(path, ast.parse(path.read_text()).body)) - {name} for name, path in FILES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("folder", ["kernels", "bench", "tests", "examples"])
def test_a_file_of_over_500_lines_says_why(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text()
        if text.count("\n") > 500:
            head = ast.get_docstring(ast.parse(text)) or ""
            assert "over 500 lines, since" in " ".join(head.lower().split()), path


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_a_functions_docstring_begins_with_what_it_does(folder: str) -> None:
    noun = re.compile(
        r"(an?|the|its|all|each|what|which|whether|how|where|true|false|of|as|in|for)\b|\W", re.IGNORECASE
    )
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                assert not noun.match(text), f"{path}: {node.name}: {text}"
