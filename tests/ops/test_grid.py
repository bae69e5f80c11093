"""The house keeps its plan: the same launchers on every backend, __all__, and a wheel and an sdist with every file."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import gradkernels
import pytest
from gradkernels.ops import OPS

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"


def launchers(path: Path, op: str) -> dict[str, list[tuple[str, str | None]]]:
    """The public functions of a file by name, each as its arguments with their annotations."""
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return {
        function.name: [
            (argument.arg, ast.unparse(argument.annotation) if argument.annotation else None)
            for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        ]
        for function in functions
        if owner(function.name) == op and not function.decorator_list
    }


def owner(launcher: str) -> str | None:
    """The op that a launcher's name begins with: the longest, as linear_mse_fit's begin with linear_mse too."""
    return max((op for op in OPS if launcher.startswith(f"{op}_")), key=len, default=None)


@pytest.mark.parametrize("op", OPS)
def test_same_launchers_on_every_backend(op: str) -> None:
    """An operator's schema is read from the fallback's; what each backend is given is the same."""
    files = (f"triton/{op}.py", f"fallback/{op}.py", "reference/launchers.py")
    triton, fallback, reference = (launchers(KERNELS / file, op) for file in files)
    assert triton == fallback == reference
    assert fallback


def imports(path: Path, body: bool) -> set[str]:
    """The packages imported in a file; ``body``: at module level only."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if body else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or "").partition(".")[0])
    return names


def test_triton_is_imported_in_its_folder_only() -> None:
    for path in KERNELS.rglob("*.py"):
        if path.parent.name != "triton" and path.name != "canary.py":  # the memory checker's own kernel
            assert "triton" not in imports(path, body=True), path


def test_imports_of_our_own_are_relative() -> None:
    for path in KERNELS.rglob("*.py"):
        assert not {"gradkernels", "kernels"} & imports(path, body=False), path


def test_references_import_numpy_only() -> None:
    for path in set((KERNELS / "reference").glob("*.py")) - {KERNELS / "reference" / "launchers.py"}:
        foreign = imports(path, body=False) - set(sys.stdlib_module_names)
        assert {name for name in foreign if not name.startswith(".")} <= {"numpy"}, path


def test_all_names_what_is_there() -> None:
    assert sorted(gradkernels.__all__) == gradkernels.__all__
    for name in gradkernels.__all__:
        assert getattr(gradkernels, name) is not None
    tree = ast.parse((KERNELS / "__init__.py").read_text())
    exported = {
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert exported <= set(gradkernels.__all__)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="asks git for the files: an unpacked sdist has none")
def test_the_wheel_and_the_sdist_have_every_file(tmp_path: Path) -> None:
    """And the wheel nothing else: each file of kernels/ and bench/ under gradkernels/, and the pytest plugin."""
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in tracked:
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta as made; import sys; _, to = sys.argv; "  # uv brings no pip
    build += "made.build_wheel(to); made.build_sdist(to)"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        name.replace("kernels/", "gradkernels/", 1) if name.startswith("kernels/") else f"gradkernels/{name}"
        for name in tracked
        if name.startswith(("kernels/", "bench/")) and name.endswith((".py", "py.typed"))
    }
    assert packed == expected | {"pytest_gradkernels.py"}
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        unpacked = {name.partition("/")[2] for name in file.getnames()}
    of_git = {name for name in tracked if name.startswith((".git", ".pre-commit"))}
    assert set(tracked) - of_git <= unpacked
