"""use_backend, GRADKERNELS_BACKEND, backend_for: what is chosen when, and errors that say why."""

import os
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace
from typing import Any

import gradkernels
import pytest
import torch
from gradkernels import backend_for, backends, linear_mse_loss, matmul, mse_loss, use_backend


def run(script: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run ``script`` in a fresh Python without our variables, but for those given."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "GRADKERNELS_BACKEND")
    }
    variables = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def output(script: str, **environment: str | None) -> str:
    child = run(script, **environment)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def test_a_call_on_a_device_that_triton_does_not_serve_loads_none() -> None:
    script = """
        import sys
        sys.modules["triton"] = None  # any import of it fails
        import torch, gradkernels
        x = torch.randn(3, 3, requires_grad=True)
        gradkernels.linear_mse_loss(x, x, gradkernels.matmul(x, x)).backward()
        print(gradkernels.mse_loss(x, x).item())
    """
    assert output(script) == "0.0"


def test_auto_takes_the_fallback_on_the_cpu() -> None:
    x = torch.randn(3)
    assert backend_for(x) == "fallback"
    with use_backend("auto"):
        assert backend_for(x) == "fallback"


def test_the_innermost_block_counts() -> None:
    x = torch.randn(3)
    with use_backend("reference"):
        assert backend_for(x) == "reference"
        block = use_backend("fallback")
        with block, block:  # the same object twice
            assert backend_for(x) == "fallback"
        assert backend_for(x) == "reference"
        with pytest.raises(KeyError), use_backend("fallback"):
            raise KeyError
        assert backend_for(x) == "reference"
    assert backend_for(x) == "fallback"


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match=r"use_backend: unknown backend 'cuda'; expected one of 'auto', 'triton'"
    ):
        use_backend("cuda")
    child = run("import gradkernels", GRADKERNELS_BACKEND="cuda")
    assert child.returncode != 0
    assert "GRADKERNELS_BACKEND: unknown backend 'cuda'" in child.stderr


def test_the_environment_variable_is_read_once() -> None:
    script = """
        import os, torch, gradkernels
        os.environ["GRADKERNELS_BACKEND"] = "fallback"
        print(gradkernels.backend_for(torch.randn(3)))
    """
    assert output(script, GRADKERNELS_BACKEND="reference") == "reference"
    assert output(script, GRADKERNELS_BACKEND="") == "fallback"


def test_triton_refused_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3)
    script = """
        import os, torch, gradkernels
        {before}
        with gradkernels.use_backend("triton"):
            try:
                gradkernels.mse_loss(torch.randn(3), torch.randn(3))
            except RuntimeError as error:
                print(error)
    """
    never = output(script.format(before=""))
    assert "backend 'triton' cannot serve a tensor on cpu" in never
    assert "set the environment variable TRITON_INTERPRET=1 before triton is first imported" in never
    assert "was not then" not in never
    late = output(script.format(before="import triton; os.environ['TRITON_INTERPRET'] = '1'"))
    assert "it is set now, but was not then" in late
    with use_backend("triton"), pytest.raises(RuntimeError, match="no driver of Triton's serves meta: "):
        backend_for(x.to("meta"))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    backends._triton.cache_clear()
    try:
        with (
            use_backend("triton"),
            pytest.raises(RuntimeError, match=r"not installed .*triton-windows on Windows"),
        ):
            backend_for(x)
    finally:
        backends._triton.cache_clear()


class Driver:
    """Of Triton's drivers what tells which device they serve."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def get_active_torch_device(self) -> torch.device:
        return self.device


@pytest.mark.parametrize("device", ["cuda", "xpu", "mps", "privateuseone"])
def test_the_active_driver_decides(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a list of devices; by default only those are Triton's on which its kernels are known to run."""
    config = pytest.importorskip("triton").runtime.driver
    there = SimpleNamespace(is_cpu=False, device=torch.device(device))  # torch itself may lack the device
    by_default = "triton" if device in ("cuda", "xpu") else "fallback"

    monkeypatch.setattr(config, "_active", Driver(device))
    assert backend_for(there) == by_default
    with use_backend("triton"):
        assert backend_for(there) == "triton"

    monkeypatch.setattr(config, "_active", Driver("cuda:1" if device != "cuda" else "mps"))
    assert backend_for(there) == "fallback"
    other = "cuda" if device != "cuda" else "mps"
    message = f"cannot serve a tensor on {device}: no driver of Triton's serves {device}: the active one serves {other}"
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        backend_for(there)


def test_no_active_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: object) -> None:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    config = pytest.importorskip("triton").runtime.driver
    monkeypatch.setattr(type(config), "active", property(none))
    there = SimpleNamespace(is_cpu=False, device=torch.device("cuda"))
    assert backend_for(there) == "fallback"
    with use_backend("triton"), pytest.raises(RuntimeError, match="serves cuda: 0 active drivers"):
        backend_for(there)


def test_a_driver_for_the_cpu_needs_no_interpreter() -> None:
    script = """
        import torch, triton
        from gradkernels import backend_for, use_backend
        from gradkernels.triton.compile_only import null_driver
        triton.runtime.driver.set_active(null_driver("sm_90", []))
        x = torch.empty(3)
        print(backend_for(x))
        with use_backend("triton"):
            print(backend_for(x))
    """
    assert output(script).split() == ["fallback", "triton"]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which backends' modules were asked for during the test."""
    names: list[str] = []
    module = backends.module

    def recorded(backend: str, op: str) -> object:
        names.append(backend)
        return module(backend, op)

    monkeypatch.setattr(backends, "module", recorded)
    return names


def in_a_thread(work: object) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_derivatives_run_where_the_forward_ran(served: list[str]) -> None:
    """After the block, in another thread, and where another backend is in force."""
    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    with use_backend("triton"):
        losses = [
            mse_loss(x, torch.zeros_like(x)),
            matmul(x, matmul(w.mT, matmul(w, x.mT))).sum(),
            linear_mse_loss(x, w, torch.zeros(5, 2)),
        ]
    assert set(served) == {"triton"}
    for loss in losses:
        served.clear()
        with use_backend("reference"):
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
        assert set(served) == {"triton"}
        served.clear()
        in_a_thread(first.square().sum().backward)
        assert set(served) == {"triton"}
        assert x.grad is not None
        x.grad = None


def test_a_new_thread_starts_with_the_initial_choice() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        in_a_thread(lambda: seen.append(backend_for(torch.randn(3))))
    assert seen == ["fallback"]


def test_vjp_runs_where_the_forward_ran(served: list[str]) -> None:
    with use_backend("triton"):
        result, vjp = torch.func.vjp(lambda x: mse_loss(x, torch.zeros_like(x)), torch.randn(3))
    served.clear()
    vjp(torch.ones_like(result))
    assert set(served) == {"triton"}


@pytest.mark.parametrize("op", [mse_loss, gradkernels.mse_loss_and_grad])
def test_the_choice_is_not_baked_into_a_graph(op: Any, served: list[str]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    x = torch.randn(3)
    for name in ("fallback", "triton", "reference", "fallback"):
        with use_backend(name):
            served.clear()
            compiled(x, torch.zeros_like(x))
            assert set(served) == {name}
