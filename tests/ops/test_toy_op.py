"""An op is its files and one record: a toy op, added to a copy of the sources, is in every list.

The folder toy/ has its files in the places that its name gives, and its record. Nothing else is edited.
"""

import os
import shutil
from pathlib import Path

import pytest

from ..helpers import python

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy"
DERIVATIVES = """
import torch
from gradkernels import use_backend, verify
from gradkernels.ops import FUNCTIONS
from torch.autograd import gradgradcheck
cube, x = FUNCTIONS["cube"].function(), torch.randn(3, 2, dtype=torch.float64)
with use_backend("triton"):
    assert verify.gradcheck(cube, (x,))
    assert not verify.gradcheck(lambda x: cube(x).sum(), (x,), gradient=lambda x: 2 * x**2)
    assert gradgradcheck(cube, x.requires_grad_())
print([operator.name for operator in FUNCTIONS["cube"].operators])
"""
BENCHMARK = """
import sys
from bench import __main__ as cli
from bench.throughput import machine
rates = machine.measure_rates
machine.measure_rates = lambda *given: rates(*given, full=False)  # the machine's own limits take half a minute
sys.exit(cli.main(["cube", "--quick", "--seconds", "1e-6", "--device", "cpu"]))
"""
OTHER_LISTS = """
import runpy, sys
import gradkernels
from bench.reports import traffic

def command(module, *arguments):
    print("--", flush=True)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code

command("gradkernels", "info")
command("bench", "host", "--rounds", "1")
print("--")
print([job.name for job in traffic.jobs()])
gradkernels.warmup("cube", [(4,)], device="cpu")
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with the toy op in it."""
    root = tmp_path_factory.mktemp("house")
    for source, name in (("kernels", "gradkernels"), ("bench", "bench")):
        shutil.copytree(ROOT / source, root / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        folder = TOY / source
        if folder.is_dir():
            shutil.copytree(folder, root / name, dirs_exist_ok=True)
    ops = root / "gradkernels" / "ops.py"
    before, end, after = ops.read_text().rpartition("\n)\nOPS:")
    assert end
    ops.write_text(f"{before}\n{(TOY / 'record.txt').read_text().rstrip()}{end}{after}")
    return root


def run(house: Path, *arguments: str, interpret: bool = True) -> str:
    environment = {**os.environ, "PYTHONPATH": str(house)}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return python(*arguments, cwd=house, env=environment)


def test_it_is_verified(house: Path) -> None:
    printed = run(house, "-m", "gradkernels", "verify", "--op", "cube", "--dtype", "float32")
    assert [line.split()[:4] for line in printed.splitlines()[1:3]] == [
        ["cube", backend, "cpu", "float32"] for backend in ("triton", "fallback")
    ]
    assert "6 of 6 cases passed" in printed


def test_a_wrong_launcher_is_found(house: Path, tmp_path: Path) -> None:
    wrong = shutil.copytree(house, tmp_path / "wrong")
    file = wrong / "gradkernels" / "fallback" / "cube.py"
    file.write_text(file.read_text().replace("3 * grad_output", "2 * grad_output"))
    with pytest.raises(AssertionError, match="FAILED"):
        run(wrong, "-m", "gradkernels", "verify", "--op", "cube", "--dtype", "float32")


def test_its_derivatives_are_checked(house: Path) -> None:
    assert "['cube', 'cube_backward']" in run(house, "-c", DERIVATIVES)


def test_it_is_benchmarked(house: Path) -> None:
    assert "cube" in run(house, "-c", BENCHMARK)


def test_it_is_compiled_ahead_of_time(house: Path) -> None:
    printed = run(house, "-m", "bench", "aot", "--op", "cube", "--target", "sm_90", interpret=False)
    assert "_cube_forward_kernel" in printed
    assert "FAILED" not in printed


def test_the_other_lists_have_it(house: Path) -> None:
    _, info, host, traffic = run(house, "-c", OTHER_LISTS).split("--\n")
    assert "cube" in info
    assert "cube" in host
    assert "cube, 4096 float32" in traffic
