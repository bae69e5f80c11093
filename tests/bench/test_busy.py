"""``python -m bench --busy``: spinning processes come and go, and stalls that a median hides are seen."""

import os
import time

import pytest

from bench import __main__ as cli
from bench.throughput import busy
from bench.throughput.busy import Found


def test_a_stall_shows_in_the_total_alone() -> None:
    ours, torchs = [1.0] * 99 + [400.0], [1.0] * 50
    found = Found(ours, torchs, torchs)
    assert found.ratios() == {"median": 1.0, "total": 100 / 499, "median_self": 1.0, "total_self": 1.0}
    assert found.slower()
    assert not Found(torchs + torchs, torchs, torchs).slower()


def test_what_torch_varies_against_itself_is_allowed() -> None:
    assert Found([1.2] * 4, [1.0] * 2, [1.0] * 2).slower()
    assert not Found([1.2] * 4, [0.9] * 2, [1.1] * 2).slower()


def test_turns_are_taken_call_by_call() -> None:
    made = []
    found = busy.interleaved(lambda: made.append("ours"), lambda: made.append("torch"), seconds=0.0, rounds=3)
    assert made == ["ours", "torch"] * 7  # the first two are not timed
    assert [len(taken) for taken in found] == [6, 3, 3]


def test_spinning_processes_use_a_core_and_end() -> None:
    with busy.spinning(1) as spinners:
        (spinner,) = spinners
        time.sleep(0.3)
        assert spinner.poll() is None
    assert spinner.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.kill(spinner.pid, 0)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "cores", lambda: 1)
    monkeypatch.setattr(busy, "FLOOR", 0.0)
    assert cli.main(["--busy", "mse", "--shape", "8", "--seconds", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert "1 spinning processes" in shown
    assert all(
        f"mse {variant} 8" in shown for variant in ("forward", "forward + backward", "loss and gradient")
    )
    monkeypatch.setattr(busy, "FLOOR", 1e9)
    assert cli.main(["--busy", "mse", "--shape", "8", "--seconds", "0.01"]) == 1
    with pytest.raises(SystemExit):
        cli.main(["--busy", "mse", "--device", "cuda"])
