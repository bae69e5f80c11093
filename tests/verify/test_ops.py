"""The kernel check and the command line: right kernels pass, planted faults are named, the status tells."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gradkernels
import gradkernels.triton.mse as launchers
import pytest
import torch
from gradkernels import __main__ as cli
from gradkernels import backends, verify
from gradkernels.fallback import mse as fallback
from gradkernels.ops import OPS
from gradkernels.verify import ops as checks
from gradkernels.verify.console import print_table, progress

from ..helpers import python

pytestmark = [
    pytest.mark.unwatched,
    pytest.mark.skipif(torch.cuda.is_available(), reason="plants faults in interpreted kernels"),
]
F32 = [torch.float32]


@pytest.mark.parametrize("op", OPS)
def test_every_op_passes_at_its_smallest_shape(op):
    report = verify.kernels([op], shapes=[OPS[op].samples[0]])
    assert report, report.rows()
    assert {(v.backend, v.dtype) for v in report.verdicts} == {
        (backend, str(dtype).removeprefix("torch."))
        for backend in ("triton", "fallback")
        for dtype in checks.DTYPES
    }


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_caller_s_block_does_not_matter(mode):
    """Gradients are made and checked under no_grad and in inference mode too."""
    with mode():
        assert verify.kernels(
            ["mse"], shapes=[(5,)], dtypes=[torch.float32], backends=("fallback",), device="cpu"
        )


def test_a_wrong_gradient_is_a_failed_verdict(monkeypatch):
    original = launchers.mse_backward
    monkeypatch.setattr(launchers, "mse_backward", lambda *a: [1.001 * grad for grad in original(*a)])
    report = verify.kernels(["mse"], shapes=[(65,)], dtypes=F32)
    assert [v.passed for v in report.verdicts] == [False, True]
    assert report.verdicts[0].backend == "triton"
    assert report.verdicts[0].worst > 1
    assert report.verdicts[0].detail.startswith("grad_")
    assert "FAILED (1 of 1 cases)" in report.rows()[0]


def by_the_full_count(total, input, reduction, batch_dims=0):
    return fallback_mean(total, input, reduction)


def with_the_target_as_the_input(grad_output, input, target, *others):
    return [
        grad.to(input.dtype).to(grad.dtype) for grad in fallback_backward(grad_output, input, target, *others)
    ]


def not_summed(grad_output, input, target, weight, *others):
    """The gradient of a weight is that of the first element which it was broadcast to."""
    if weight is None:
        return fallback_backward(grad_output, input, target, weight, *others)
    grads = fallback_backward(grad_output, input, target, weight.expand(input.shape), *others)
    first = tuple(slice(size) for size in weight.shape)
    return [*grads[:-1], grads[-1][first].clone()] if others[-1][2] else grads


fallback_mean, fallback_backward = fallback._mean, fallback.mse_backward


@pytest.mark.parametrize(
    ("name", "fault", "concerned"),
    [
        ("_mean", by_the_full_count, "dim="),
        ("mse_backward", with_the_target_as_the_input, "target (5, 3, 7) float32"),
        ("mse_backward", not_summed, "weight (30, 1)"),
    ],
)
def test_a_fault_of_calls_that_sizes_do_not_describe(monkeypatch, name, fault, concerned):
    given = {"dtypes": [torch.bfloat16], "backends": ["fallback"]}
    assert verify.kernels(["mse"], **given)
    monkeypatch.setattr(fallback, name, fault)
    report = verify.kernels(["mse"], **given)
    failed = [verdict.call for verdict in report.verdicts if not verdict.passed]
    assert any(concerned in call for call in failed), report.rows()
    assert "" not in failed
    assert "dim=" in report.rows()[0][6] or "target" in report.rows()[0][6]


def broken(*arguments):
    raise RuntimeError("out of registers")


@pytest.mark.parametrize(
    ("op", "module", "names"),
    [(name, backends.module("fallback", name), list(op.launchers())) for name, op in OPS.items()]
    + [
        ("mse", "gradkernels.mse", ["torch_mse_loss"]),
        ("linear_mse", "gradkernels.linear_mse", ["linear_in_torch"]),
    ],
)
def test_the_fallback_goes_by_its_kernels_and_by_torch_s_own_ops(op, module, names, monkeypatch):
    """Which alone serve small calls, were it not for the check."""
    for name in names:
        monkeypatch.setattr(sys.modules.get(module, module), name, broken)
    report = verify.kernels([op], shapes=[OPS[op].samples[-1]], dtypes=F32, backends=["fallback"])
    assert report.verdicts[0].detail == "RuntimeError: out of registers"


def test_nan_and_an_exception_are_failed_verdicts(monkeypatch):
    original = launchers.mse_backward
    monkeypatch.setattr(launchers, "mse_backward", lambda *a: [grad * float("nan") for grad in original(*a)])
    assert not verify.kernels(["mse"], shapes=[(3,)], dtypes=F32, backends=["triton"])

    monkeypatch.setattr(launchers, "mse_backward", broken)
    report = verify.kernels(["mse"], shapes=[(3,)], dtypes=F32, backends=["triton"])
    assert report.verdicts[0].detail == "RuntimeError: out of registers"


def test_a_memory_fault_is_a_failed_verdict(monkeypatch):
    original = launchers.mse_backward

    def half(grad_output, *arguments):
        found = original(grad_output, *arguments)
        launchers.launch(copy_half(), (1,), found[0], torch.empty_like(found[0]), device=found[0].device)
        return found

    monkeypatch.setattr(launchers, "mse_backward", half)
    report = verify.kernels(["mse"], shapes=[(64,)], dtypes=F32, backends=["triton"])
    assert report.verdicts[0].detail.startswith("unwritten output in copy_half_kernel")


def copy_half():
    from .test_memory import copy_half_kernel

    return copy_half_kernel


def test_slopes_are_checked_too(monkeypatch):
    """Value and gradient agree with torch's and the reference's, but the function's value is another."""
    called = []

    def gradcheck(fn, inputs):
        called.append(len(inputs))
        return verify.gradcheck(lambda x: x.square().sum(), inputs[0], gradient=lambda x: -2 * x)

    monkeypatch.setattr(checks, "gradcheck", gradcheck)
    report = verify.kernels(["matmul"], shapes=[(3, 5, 2)], dtypes=[torch.float64], backends=["fallback"])
    assert called == [3]
    assert "sign flipped" in report.verdicts[0].detail


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="name the one op"):
        verify.kernels(shapes=[(3,)])
    with pytest.raises(ValueError, match="linear_mse takes sizes N x D x K, got 3x4"):
        verify.kernels(["linear_mse"], shapes=[(3, 4)])
    with pytest.raises(ValueError, match="unknown op 'mean'"):
        verify.kernels(["mean"])
    assert not checks.KernelReport(())


def test_the_command_line(capsys, monkeypatch):
    arguments = ["verify", "--op", "linear_mse", "--shape", "64x8x1", "--dtype", "bfloat16"]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert "2 of 2 cases passed" in table
    assert "linear_mse  triton" in table
    assert cli.main([*arguments, "--json", "--backend", "fallback"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] is True
    assert data["verdicts"][0]["shape"] == [64, 8, 1]
    monkeypatch.setattr(launchers, "mse_forward", lambda *a: torch.tensor(7.0))
    assert cli.main(["verify", "--op=mse", "--shape=5", "--dtype=float32", "--backend=triton"]) == 1
    for wrong in (
        ["--op=mse", "--shape=axb"],
        ["--op=mse", "--shape=-3"],
        ["--op=mse", "--shape=99999999999999999999"],
        ["--op=mse", "--device=cude"],
        ["--shape=3x3"],
        ["--op=mse", "--dtype=int8"],
        ["--op=linear_mse", "--shape=3"],
        ["--op=mse", "--timeout=0"],
        ["--op=mse", "--timeout=soon"],
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["verify", *wrong])
        assert capsys.readouterr().err.startswith("usage: python -m gradkernels verify [-h]"), wrong


def test_without_the_interpreter_a_child_process_has_it():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = ["-m", "gradkernels", "verify", "--op=mse", "--shape=5", "--dtype=float32", "--json"]
    verdicts = json.loads(python(*command, env=environment))["verdicts"]
    assert {v["backend"] for v in verdicts} == {"triton", "fallback"}


@pytest.mark.parametrize(("status", "words"), [(7, "ended by status 7"), (-11, "ended by signal 11")])
def test_a_child_process_that_dies_fails_the_check(status, words, monkeypatch, capsys):
    """As without the interpreter: what the other backend found right does not make up for it."""
    died = subprocess.CompletedProcess([], status, stdout="Fatal Python error")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(checks, "_problem", lambda device: "no GPU")
    monkeypatch.setattr(checks.subprocess, "run", lambda *arguments, **options: died)
    assert cli.main(["verify", "--op=mse", "--shape=5", "--dtype=float32"]) == 1
    table = capsys.readouterr().out
    assert words in table
    assert "1 of 2 cases passed" in table
    report = verify.kernels(["mse", "sgd"], dtypes=F32, backends=["triton"])
    assert [(v.op, v.dtype, v.passed) for v in report.verdicts] == [
        ("mse", "float32", False),
        ("sgd", "float32", False),
    ]


@pytest.mark.parametrize(
    ("op", "shape"),
    [("linear_mse", (0, 0, 0)), ("linear_mse", (0, 3, 2)), ("linear_mse", (3, 0, 2)), ("mse", (0,)), ("mse", (0, 3)),
     ("matmul", (0, 0, 0)), ("matmul", (3, 0, 2)), ("sgd", (0,)), ("adam", (0,))],
)  # fmt: skip
def test_sizes_of_zero(op, shape, capsys):
    sizes = "x".join(map(str, shape))
    assert cli.main(["verify", f"--op={op}", f"--shape={sizes}"]) == 0, capsys.readouterr().out


def test_the_default_covers_every_op(monkeypatch):
    """Every op with a NumPy reference, and every public function and optimizer, by its launches."""
    first = {name: dataclasses.replace(op, samples=op.samples[:1]) for name, op in OPS.items()}
    monkeypatch.setattr(checks, "OPS", first)
    report = verify.kernels(dtypes=F32, backends=["fallback"])
    assert report, report.rows()
    folder = Path(gradkernels.reference.__file__).parent
    entry = re.compile(r"^def (forward|step|fit)\(", re.MULTILINE)
    ops = {file.stem for file in folder.glob("*.py") if entry.search(file.read_text())}
    assert {verdict.op for verdict in report.verdicts} == ops


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["torch"] == torch.__version__
    (cpu,) = [device for device in data["devices"] if device["device"] == "cpu"]
    assert cpu["auto"] == "fallback"
    assert cpu["backends"] == {"triton": "yes", "fallback": "yes", "reference": "yes"}
    assert data["ops"]["linear_mse_models"] == ["linear_mse_loss", "linear_mse_loss_and_grad"]
    assert all(data["ops"].values())
    assert cli.main(["info"]) == 0
    assert "serves by default" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"gradkernels {gradkernels.__version__}\n"


def test_tables_and_progress_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    print_table(("a", "b"), [("1", "22")], title="t")
    assert capsys.readouterr().out == "t\na  b\n1  22\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress([1, 2], "p")) == [1, 2]
    assert "p 2/2" in capsys.readouterr().err
