"""Without a GPU the Triton kernels run under the interpreter; with one they run on it.

``backend`` and ``device`` parametrise a test over the implementations: the fallback on the CPU, and the Triton
kernels interpreted on the CPU or, marked ``gpu``, on the device that is there.
"""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
# tests.ttir has 0: there another interpreter stands in, with checks of its own.
INTERPRETED = (
    not GPU and os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton") is not None
)

from gradkernels import use_backend  # noqa: E402
from gradkernels.verify import memory_check  # noqa: E402
from gradkernels.verify.memory.interpreter import without_waste  # noqa: E402

if INTERPRETED:
    _faster = without_waste()  # every launch of the session, not only those that the checker watches
    _faster.__enter__()

DEVICES = {"fallback": "cpu", "reference": "cpu", "triton": "cuda" if GPU else "cpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        if GPU and callspec is not None and callspec.params.get("backend") == "triton":
            item.add_marker(pytest.mark.gpu)
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(params=["fallback", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation in force during the test."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the tensors of ``backend`` live."""
    return torch.device(DEVICES[backend])


@pytest.fixture(autouse=True)
def seeded_and_poisoned() -> Iterator[None]:
    """The same random numbers in every run, and NaN in every tensor that torch.empty hands out."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def memory_watched(request: pytest.FixtureRequest, seeded_and_poisoned: None) -> Iterator[None]:
    """Every interpreted kernel that a test launches runs under the memory checker."""
    unwatched = request.node.get_closest_marker("unwatched")
    if unwatched or not INTERPRETED:
        yield
        return
    with memory_check():
        yield
