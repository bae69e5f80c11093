"""What only torch's CUDA build shows: its streams, pinned memory, graphs, AMP and a second device.

Over the stand-ins that ``cuda_build.py`` makes; no kernel runs.
"""

import os
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
    ("name", "options"),
    [
        ("FusedSGD", {"momentum": 0.9}),
        ("FusedAdamW", {"capturable": True}),
        ("FusedAdamW", {"capturable": True, "max_norm": 1.0, "on_nonfinite": "skip"}),
    ],
    ids=str,
)
def test_a_captured_step(worker: Worker, name: str, options: dict[str, Any]) -> None:
    """Nothing that a capture prohibits, and the kernels among what is captured."""
    captured = worker.call("capture_step", name, options)
    assert sum(event.startswith("launch") for event in captured) == (2 if "max_norm" in options else 1)
    assert not any(event.startswith("module") for event in captured)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_captured_op(worker: Worker, dtype: str) -> None:
    """After warmup no module is loaded during the capture."""
    captured = worker.call("capture_op", dtype)
    assert sum(event.startswith("launch") for event in captured) >= 2
    assert not any(event.startswith("module") for event in captured)


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
