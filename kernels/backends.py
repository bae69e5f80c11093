"""Which implementation serves a call: ``triton``, ``fallback`` or ``reference``.

The choice is made inside the registered operator, at each call and from the tensor's device, never while a graph
is traced.
"""

import functools
import importlib
import importlib.util
import os
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch

NAMES = ("auto", "triton", "fallback", "reference")
# Where "auto" takes Triton if its active driver serves the device; ROCm devices are called cuda too. There are drivers
# for others (Apple's), on which our kernels have never run: those are for who asks for "triton".
AUTO_DEVICES = ("cuda", "xpu")


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: unknown backend {name!r}; expected one of {', '.join(map(repr, NAMES))}")
    return name


_initial = _checked(os.environ.get("GRADKERNELS_BACKEND") or "auto", "GRADKERNELS_BACKEND")
_open_blocks: ContextVar[tuple["use_backend", ...]] = ContextVar("gradkernels_backend", default=())


class use_backend:  # noqa: N801 (a context manager, named as a verb like torch.no_grad)
    """Choose the implementation for the calls inside a ``with`` block.

    Args:
        name: ``"auto"`` (Triton on CUDA, ROCm and XPU, else the fallback), ``"triton"``, ``"fallback"`` or
            ``"reference"``.

    An op's backward, double backward and jvp run under the choice of its forward, in any thread and after the
    block has ended. A graph captured by torch.compile chooses at each launch, also in its backward. The
    environment variable ``GRADKERNELS_BACKEND`` sets the initial choice and is read once, at import.

    Which bits repeat: the Triton kernels give the same ones for the same values, shapes, strides, dtypes and 16-byte
    alignment, with and without gradients, in every run and on every GPU of one architecture. The fallback gives them
    for equal calls (``requires_grad``, grad mode and number of threads included) on one machine: torch and its
    libraries choose their routines by all of these and by the processor, and results of different routines differ by
    rounding.

    Raises:
        ValueError: ``name`` is none of the four.

    Example:
        >>> with use_backend("fallback"):
        ...     loss = mse_loss(input, target)
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = _checked(name, "use_backend")

    def __enter__(self) -> None:
        _open_blocks.set((*_open_blocks.get(), self))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Blocks can close out of order: one opened in a generator closes when it is finalised, maybe in another thread.
        blocks = _open_blocks.get()
        for i in reversed(range(len(blocks))):
            if blocks[i] is self:
                _open_blocks.set(blocks[:i] + blocks[i + 1 :])
                break


def current() -> str:
    """Return the name in force, one of ``NAMES``."""
    blocks = _open_blocks.get()
    return blocks[-1]._name if blocks else _initial


@functools.cache
def _triton() -> Any:
    """Return the triton package, imported when a call first asks for it; None where it is not installed."""
    return None if importlib.util.find_spec("triton") is None else importlib.import_module("triton")


@functools.lru_cache(maxsize=1)
def _served_by(driver: Any) -> str:
    """Return the device type of a driver of Triton's. Asked once for each: the answer may initialise the device."""
    return driver.get_active_torch_device().type


def _triton_problem(device_type: str) -> str | None:
    """Return why Triton cannot serve tensors of this device type, None if it can: its active driver decides."""
    triton = _triton()
    if triton is None:
        return (
            "the triton package is not installed (pip install triton on Linux, triton-windows on Windows; "
            "torch's CUDA, ROCm and XPU wheels bring their own)"
        )
    on_cpu = device_type == "cpu"
    if on_cpu and not isinstance(triton.language.sum, triton.runtime.JITFunction):
        return None
    try:
        served = _served_by(triton.runtime.driver.active)
    except RuntimeError as error:  # none is active, or more than one
        reason = str(error)
    else:
        if served == device_type:
            return None
        reason = f"the active one serves {served}"
    if on_cpu:
        return (
            "on CPU tensors Triton runs only under its interpreter: set the environment variable "
            "TRITON_INTERPRET=1 before triton is first imported"
            + (" (it is set now, but was not then)" if os.environ.get("TRITON_INTERPRET") == "1" else "")
        )
    return f"no driver of Triton's serves {device_type}: {reason}"


def backend_for(tensor: torch.Tensor) -> str:
    """Return the backend that serves ``tensor`` now: ``"triton"``, ``"fallback"`` or ``"reference"``.

    Raises:
        RuntimeError: the chosen backend cannot serve the tensor's device; the message says why.
    """
    name = current()
    if name == "auto":
        if tensor.is_cpu:
            return "fallback"
        device_type = tensor.device.type
        return (
            "triton" if device_type in AUTO_DEVICES and _triton_problem(device_type) is None else "fallback"
        )
    if name == "triton" and (problem := _triton_problem(tensor.device.type)) is not None:
        raise RuntimeError(f"backend 'triton' cannot serve a tensor on {tensor.device}: {problem}")
    return name


@functools.cache
def module(backend: str, op: str) -> Any:
    """Return the module that holds the op's launchers for a backend."""
    name = ".reference.launchers" if backend == "reference" else f".{backend}.{op}"
    return importlib.import_module(name, __package__)


def capturing() -> bool:
    """Return whether what torch's current stream is given goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def implementation(op: str, tensor: torch.Tensor) -> Any:
    """Return the module whose launchers (``<op>_<direction>``) serve ``tensor``."""
    return module(backend_for(tensor), op)
