"""Replays by their values: the kernels that they launch are interpreted.

tests/host holds their launches against those of the launchers; the interpreter has no replays of its own, so here each
kernel that it runs is handed to the recorder as a compiled one, which is then given addresses.
"""

import ctypes
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton")

import gradkernels.triton
from gradkernels import FusedAdam, linear_mse_loss_and_grad, use_backend
from gradkernels.triton import launch as launching
from gradkernels.triton import replay
from gradkernels.verify.memory.interpreter import interpreted

from ..cases import CASES, Case, each_kind_once
from ..host.calls import LAYOUTS, forget, lay_out

pytestmark = [
    pytest.mark.unwatched,  # the checker knows tensors, not addresses
    pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter (TRITON_INTERPRET=1)"),
]
Mode = Callable[[], AbstractContextManager[None]]
MODES: tuple[Mode, ...] = (torch.no_grad, torch.inference_mode, torch.enable_grad)
close = torch.testing.assert_close
launch = launching.launch


class Compiled:
    """An interpreted kernel in the place of a compiled one: ``run`` takes addresses for tensors.

    Attributes:
        runs: how many launches all of them have made.
    """

    runs = 0
    function = packed_metadata = launch_metadata = None

    def __init__(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._kernel, self._args, self._options = kernel, args, options

    @property
    def run(self) -> Callable[..., None]:
        return self._run

    def _run(self, x: int, y: int, z: int, *given: Any) -> None:
        Compiled.runs += 1
        values = given[-len(self._args) :]
        args = [at_address(arg, value) for arg, value in zip(self._args, values, strict=True)]
        launch(self._kernel, (x, y, z), *args, **self._options)


def at_address(like: Any, value: Any) -> Any:
    """A kernel's argument: where ``like`` is a tensor, its first element in the memory that begins at ``value``."""
    if isinstance(like, Tensor):
        memory = ctypes.c_char * like.element_size()
        return torch.frombuffer(memory.from_address(value), dtype=like.dtype) if value else like.new_empty(0)
    if isinstance(like, tuple):
        items = [at_address(*pair) for pair in zip(like, value, strict=True)]
        return type(like)(*items) if hasattr(like, "_fields") else tuple(items)
    return value


def recorded_launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``launch`` as it is where kernels are compiled: a recorder is told of it, and sees nothing of what runs it."""
    with _disable_current_modes():
        launch(kernel, grid, *args, **options)
    if 0 not in grid and (recorder := launching.recording()) is not None:
        recorder.launched(Compiled(kernel, args, options), (), grid, args, options["device"])


@pytest.fixture(autouse=True)
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls that repeat are replays, as on a GPU."""
    forget()
    active = SimpleNamespace(get_current_device=lambda: None, get_current_stream=lambda index: 0)
    monkeypatch.setattr(replay, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launching, "DIRECT", True)
    monkeypatch.setattr(Compiled, "runs", 0)
    for info in pkgutil.iter_modules(gradkernels.triton.__path__):
        module = importlib.import_module(f"gradkernels.triton.{info.name}")
        if getattr(module, "launch", None) is launch:
            monkeypatch.setattr(module, "launch", recorded_launch)
    with use_backend("triton"):
        yield
    forget()


def gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    upstream = torch.linspace(1, 2, result.numel(), dtype=result.dtype).view(result.shape)  # one number: 1
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_is_no_view(mode: Mode) -> None:
    """In inference mode a dispatch mode sees ``contiguous`` itself, a view by its schema."""
    transposed = torch.ones(2, 3).mT
    for tensor, copied in ((transposed, True), (transposed.mT, False)):
        recorder = replay.Recorder([tensor])
        with mode(), recorder:
            tensor.contiguous()
        assert (recorder.obstacle is not None) == copied


@pytest.mark.parametrize(
    ("case", "mode", "layout"),
    [
        pytest.param(
            *cell, marks=() if new else pytest.mark.full, id=f"{cell[0]} {cell[1].__name__} {cell[2]}"
        )
        for cell, new in each_kind_once(
            product(CASES, MODES, LAYOUTS), lambda case, mode, layout: [case, (case.op, mode, layout)]
        )
    ],
)
def test_a_repeated_call(case: Case, mode: Mode, layout: str) -> None:
    """Each call has its own tensors; what the second one copied is not where the third one's tensors lie."""
    for _ in range(4):
        tensors = [lay_out(tensor, layout) for tensor in case.arguments()]
        if mode is torch.enable_grad:
            close(gradients(case.ours, tensors), gradients(case.theirs, tensors))
        else:
            with mode():
                result = case.ours(*tensors)
            close(result.clone(), case.theirs(*tensors))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_loss_with_its_gradients(mode: Mode, layout: str) -> None:
    for _ in range(4):
        x, w, y = (lay_out(torch.randn(shape), layout) for shape in ((6, 5), (3, 5), (6, 3)))
        with mode():
            loss, (grad_input, grad_weight, grad_target, _) = linear_mse_loss_and_grad(
                x, w, y, wrt=("input", "weight", "target")
            )
        ours = [tensor.clone() for tensor in (loss, grad_input, grad_weight, grad_target)]
        close(ours, gradients(lambda x, w, y: F.mse_loss(x @ w.mT, y), [x, w, y]))


def test_steps() -> None:
    ours, theirs = ([torch.ones(33, 2).requires_grad_(), torch.ones(7).requires_grad_()] for _ in range(2))
    optimizers = FusedAdam(ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1)
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        close(ours, theirs)
    assert Compiled.runs == 3
