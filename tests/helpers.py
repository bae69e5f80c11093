"""What the tests share: dtypes, awkward sizes, the tolerance policy as an assertion, processes, the example scripts."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels.checks import DTYPES as DTYPES
from gradkernels.checks import in_float64
from gradkernels.verify import tolerance
from gradkernels.verify.tolerance import DRAWS, compare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = (1, 3, 63, 65, 1000, 1023)
EVERY_BACKEND = pytest.mark.parametrize("backend", ["fallback", "triton", "reference"], indirect=True)
CONSTRAINTS = Path(__file__).parents[1] / "constraints" / "cpu.txt"
EXAMPLES = Path(__file__).parents[1] / "examples"


def is_pinned(package: str) -> bool:
    """Whether this version of a package is the one that the constraints name."""
    return f"{package}=={metadata.version(package)}" in CONSTRAINTS.read_text().split()


def example(name: str) -> ModuleType:
    """``examples/<name>.py`` as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)  # as a script finds the modules beside it
        spec.loader.exec_module(module)
    return module


def python(*arguments: object, **options: Any) -> str:
    """What a Python of its own prints with these arguments; it must end well."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_matches(
    ours: Tensor,
    theirs: Tensor,
    reference: np.ndarray,
    what: str = "result",
    scale: np.ndarray | None = None,
) -> None:
    """Assert that ``ours`` is within the tolerance policy (gradkernels.verify.tolerance)."""
    comparison = compare(ours, theirs, reference, scale)
    assert comparison.passed, f"{what}: {comparison}"


class Operators(TorchDispatchMode):
    """Lists the operators that torch is asked for, each as its name, its arguments and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, args, result))
        return result


class Draws:
    """Results by name, drawn several times and judged together (gradkernels.verify.tolerance says why)."""

    def __init__(self) -> None:
        self._drawn: dict[str, list[tuple[Tensor, Tensor, np.ndarray]]] = {}

    def add(self, name: str, ours: Tensor, theirs: Tensor, reference: Any) -> None:
        self._drawn.setdefault(name, []).append((ours.detach(), theirs.detach(), np.asarray(reference)))

    @property
    def enough(self) -> bool:
        """Whether each result has been drawn DRAWS times, or has so many numbers that one draw will do."""
        drawn = self._drawn.values()
        return bool(drawn) and all(len(draws) >= DRAWS or draws[0][0].numel() >= DRAWS for draws in drawn)

    def assert_match(self) -> None:
        """Assert that every name is within the tolerance policy."""
        assert self._drawn
        for name, draws in self._drawn.items():
            ours, theirs, reference = zip(*draws, strict=True)
            assert_matches(torch.stack(ours), torch.stack(theirs), np.stack(reference), name)


def finite_differences(
    function: Callable[[np.ndarray], float], at: np.ndarray, eps: float = 1e-6
) -> np.ndarray:
    """Centered differences; the step is torch.autograd.gradcheck's."""
    slope = np.empty(at.shape)
    for index in np.ndindex(at.shape):
        step = np.zeros(at.shape)
        step[index] = eps
        slope[index] = (function(at + step) - function(at - step)) / (2 * eps)
    return slope


def to_numpy(tensor: Tensor | None) -> np.ndarray | None:
    """The values as float64, exactly."""
    return None if tensor is None else in_float64(tensor).numpy()


def exactly(tensor: Tensor | None) -> np.ndarray | None:
    """The values for a reference of the ops to start from: longer than float64 where they are float64."""
    return None if tensor is None else tolerance.exactly(tensor)
