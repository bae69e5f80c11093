"""The pytest plugin runs a suite written for "cuda" as it is, and a memory fault fails its test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SUITE = """
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, MASK: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out = tl.load(x_ptr + offs, mask=offs < n) + tl.load(y_ptr + offs, mask=offs < n)
    if MASK:
        tl.store(out_ptr + offs, out, mask=offs < n)
    else:
        tl.store(out_ptr + offs, out)


def add(x, y, mask=True):
    assert x.is_cuda and x.device == y.device == torch.device("cuda:0")
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), 32),)](x, y, out, x.numel(), MASK=mask, BLOCK=32)
    return out


@pytest.fixture
def x():
    return torch.randn(100, device="cuda", generator=torch.Generator(device="cuda").manual_seed(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_right(x, traffic):
    torch.testing.assert_close(add(x, x), 2 * x)
    torch.cuda.synchronize()
    assert (traffic.loaded, traffic.stored, [entry.kernel for entry in traffic]) == (800, 400, ["add_kernel"])


def test_fault(x):
    torch.testing.assert_close(add(x, x, mask=False).cpu(), (2 * x).cpu())


@pytest.mark.unwatched
def test_unwatched(x):
    assert add(x, x).shape == x.to("cuda").shape


def test_block(x, memory_check):
    with memory_check(raise_exception=False) as report:
        add(x, x, mask=False)
    assert report.kinds == ("out-of-bounds store",)
    add(x, x)
    assert memory_check.launches == 1
    assert not memory_check.faults


def test_wrong_value(x):
    assert torch.equal(add(x, x), x)


def test_gradient(gradcheck):
    gradcheck(lambda x: x.square().sum(), torch.randn(3))
"""


RERUN = """
from _pytest.runner import runtestprotocol


def pytest_runtest_protocol(item, nextitem):
    if item.name == "test_right":
        runtestprotocol(item, log=False, nextitem=nextitem)
"""


def run(folder: Path, *arguments: str, autoload: bool = True) -> subprocess.CompletedProcess[str]:
    """Run pytest with the plugin in a folder."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and "PYTEST" not in k}
    environment["PYTHONPATH"] = str(ROOT)
    if not autoload:
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "pytest_gradkernels", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_suite_for_cuda_runs_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(RERUN)
    done = run(tmp_path, "--triton-on-cpu", "-rA")
    ends = {
        line.split("::")[1].split()[0]: line.split()[0]
        for line in done.stdout.splitlines()
        if "::" in line and line[0] in "PF"
    }
    right = ("test_right", "test_unwatched", "test_block", "test_gradient")
    wrong = ("test_fault", "test_wrong_value")
    assert ends == {**dict.fromkeys(right, "PASSED"), **dict.fromkeys(wrong, "FAILED")}, (
        done.stdout + done.stderr
    )
    section = done.stdout.partition("= memory faults =")[2]
    assert "test_suite.py::test_fault" in section
    assert "out-of-bounds store in add_kernel: program (3, 0, 0) stores to out_ptr" in section
    assert "tl.store(out_ptr + offs, out)" in section
    assert "test_wrong_value" not in section.partition("short test summary")[0]


def test_a_run_without_the_option_does_without_torch(tmp_path: Path) -> None:
    """Every pytest in the environment imports the plugin."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_light.py").write_text(
        "import sys\n\ndef test_light():\n    assert not {'torch', 'triton', 'numpy', 'gradkernels'} & {*sys.modules}\n"
    )
    done = run(tmp_path, autoload=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--triton-on-cpu" in run(tmp_path, "--help", autoload=False).stdout


def test_the_entry_point_is_registered_once_beside_dash_p() -> None:
    """pluggy skips an entry point whose name is taken, so it has the name that ``-p`` gives."""
    project = (ROOT / "pyproject.toml").read_text()
    module = "pytest_gradkernels"
    assert f'[project.entry-points.pytest11]\n{module} = "{module}"\n' in project
