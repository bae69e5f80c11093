"""``python -m bench host``: every op on both backends, ours beside torch's."""

import pytest
import torch

pytest.importorskip("triton")

from gradkernels import mse_loss, use_backend

from bench import __main__ as cli
from bench.reports import host

from ..conftest import DEVICES


def test_every_op_on_both_backends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(host, "CALLS", 1)
    assert cli.main(["host", "--rounds", "1"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    ops = ("matmul", "linear", "mse_loss", "linear_mse_loss")  # in the order of the list
    assert rows == [[op, backend] for backend in ("fallback", "triton") for op in ops]
    with use_backend("triton"):  # kernels are launched again
        x = torch.ones(3, device=DEVICES["triton"])
        assert mse_loss(x, 2 * x).item() == 1


def test_steps_over_any_number_of_tensors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert cli.main(["host", "--rounds", "1", "--steps", "3", "1"]) == 0
    rows = [line.split("/")[0].split()[:-1] for line in capsys.readouterr().out.splitlines()]
    assert rows == [[*name, size] for name in (["SGD"], ["SGD,", "momentum"], ["Adam"]) for size in "31"]


def test_the_dearer_call_is_seen() -> None:
    def dear() -> None:
        sum(range(10000))

    cheap, costly = host.microseconds(lambda: None, dear, rounds=3)
    assert costly > 10 * cheap
