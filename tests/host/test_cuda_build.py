"""What only torch's CUDA build shows: its streams, pinned memory, graphs, AMP and a second device.

Over the stand-ins that ``cuda_build.py`` makes; no kernel runs.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "GRADKERNELS_CUDA_LOG" not in os.environ,
    reason="needs torch's CUDA build over the stand-ins: make test-host",
)

from .worker import Worker  # noqa: E402


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    made = Worker(tmp_path_factory.mktemp("standin") / "log")
    yield made
    made.close()


def test_each_step_reads_its_own_table(worker: Worker) -> None:
    """Copies wait in their stream: a pinned buffer that is rewritten too early reaches the wrong step."""
    assert len(worker.call("tables_in_flight")) == 5


@pytest.mark.parametrize(
    ("name", "options", "work"),
    [
        ("FusedSGD", {"momentum": 0.9, "capturable": True}, {"copy": 1, "launch": 1}),
        ("FusedAdamW", {"capturable": True}, {"copy": 1, "launch": 1}),
        (
            "FusedAdamW",
            {"capturable": True, "max_norm": 1.0, "on_nonfinite": "skip"},
            {"copy": 2, "launch": 2},  # the norm is launched before the options are known
        ),
    ],
    ids=str,
)
def test_a_captured_step(worker: Worker, name: str, options: dict[str, Any], work: dict[str, int]) -> None:
    """What every replay repeats: the upload of the tables by one copy, and the kernels."""
    captured = worker.call("capture_step", name, options)
    assert Counter(event.split(" ")[0] for event in captured) == work
    assert all("from=pinned to=device" in event for event in captured if event.startswith("copy"))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("FusedSGD", {"momentum": 0.9}, "capturable is False"),
        ("FusedAdamW", {}, "capturable is False"),
        ("FusedAdamW", {"capturable": True, "on_nonfinite": "raise"}, "must read the gradients on the host"),
    ],
    ids=str,
)
def test_a_step_that_no_graph_may_capture(
    worker: Worker, name: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AssertionError, match=f"RuntimeError: Attempting CUDA graph capture .* {reason}"):
        worker.call("refused_capture", name, options)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("device", "its device is synchronised"),
        ("stream", "its stream is synchronised"),
        ("query", "its stream is queried"),
        ("other stream", "a stream is synchronised"),
        ("event", "an event is waited for"),
        ("event query", "an event is queried"),
        ("isolation", "wait for work outside of the capture"),
        ("memory", "memory is allocated"),
        ("pinned", "memory is pinned"),
        ("pageable", "pageable memory is copied"),
    ],
)
def test_what_a_capture_prohibits(worker: Worker, what: str, reason: str) -> None:
    """The stand-in refuses it as a driver does, and the capture with it."""
    refused = worker.call("prohibited", what)
    assert len(refused) == 2
    assert refused[0].startswith(reason)
    assert refused[1] == "the capture has ended by an error"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_captured_op(worker: Worker, dtype: str) -> None:
    """After warmup no module is loaded during the capture."""
    captured = worker.call("capture_op", dtype)
    assert sum(event.startswith("launch") for event in captured) >= 2


def test_a_captured_op_that_is_not_loaded(worker: Worker) -> None:
    """Misaligned, which warmup does not load: refused before anything is compiled, loaded or launched."""
    with pytest.raises(
        AssertionError, match="RuntimeError: a CUDA graph is being captured, and _mse_forward"
    ):
        worker.call("refused_op")


def test_grad_scaler(worker: Worker) -> None:
    """One launch for the norm and one for the step, and no wait for the device."""
    events = worker.call("scaler_step")
    assert sum(event.startswith("launch") for event in events) == 2
    assert not any(event.startswith("synchronize") for event in events)


def test_the_host_does_not_wait(worker: Worker) -> None:
    assert worker.call("waits") == []


def test_a_side_stream(worker: Worker) -> None:
    """Backward launches on the stream of its forward."""
    assert worker.call("side_stream")


def test_two_devices(worker: Worker) -> None:
    """Each launch on the device of its tensors; one norm over both devices."""
    devices = worker.call("two_devices")
    assert set(devices) == {0, 1}
