"""How every kernel is launched: on the tensors' device, through a cache of compiled kernels.

Triton's own ``kernel[grid](...)`` binds and inspects each argument anew: 5 to 13 us of Python. Here
the types of a call's arguments select a small generated function that computes only what a compilation
depends on; what it returns finds the compiled kernel, which is then run as Triton would run it.

The cache holds each compiled kernel for good: unloading one is not allowed while a CUDA graph is captured.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends import capturing

# For whoever hooks Triton's own launches: every kernel is launched by kernel[grid].
PLAIN = os.environ.get("GRADKERNELS_PLAIN_LAUNCH") == "1"
# Whether ``launch`` hands compiled kernels to the driver itself; neither so nor under Triton's interpreter.
DIRECT = not PLAIN and isinstance(triton.language.sum, JITFunction)

_keys: dict[tuple[Any, ...], Callable[..., tuple[Any, ...]]] = {}
_numbers = itertools.count()
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_recorders: dict[int, Any] = {}  # by thread


@contextmanager
def recorded_by(recorder: Any) -> Iterator[None]:
    """Report this thread's launches inside to a ``replay.Recorder``."""
    thread = threading.get_ident()
    _recorders[thread] = recorder
    try:
        yield
    finally:
        del _recorders[thread]


def recording() -> Any:
    """Return the recorder of this thread's launches, or None."""
    return _recorders.get(threading.get_ident()) if _recorders else None


def guard(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which ``device`` is the current one."""
    module = torch.get_device_module(device)
    return module.device(device) if hasattr(module, "device") else nullcontext()  # MPS has but one


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any) -> None:
    """Launch ``kernel[grid](*args, **options)`` on ``device`` and torch's current stream there.

    Args:
        kernel: a ``@triton.jit`` function whose constexpr parameters come last.
        grid: up to three program counts; nothing is launched if one of them is 0.
        args: run-time arguments in the kernel's order. A record (a NamedTuple) counts as its fields; the integers
            of a plain tuple, of any length, are not specialised.
        device: where the tensors live; it need not be the current device.
        options: constexpr arguments by name, ``num_warps``, ``num_stages``.
    """
    if 0 in grid:
        return
    if not isinstance(kernel, JITFunction):  # Triton's interpreter, which brings NumPy
        import numpy as np

        with np.errstate(all="ignore"):  # NumPy would warn where a GPU returns inf or NaN
            kernel[grid](*args, **options)
        return
    if device.index is None or device.index == driver.active.get_current_device():
        _launch(kernel, grid, args, device, options)
    else:
        with guard(device):
            _launch(kernel, grid, args, device, options)


def _launch(
    kernel: JITFunction,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    device: torch.device,
    options: dict[str, Any],
) -> None:
    if PLAIN:
        kernel[grid](*args, enable_fp_fusion=True, **options)
        return
    # By identity, since the hash of a kernel is computed from its source.
    types = (id(kernel), *_types(args))
    key_of = _keys.get(types)
    if key_of is None:
        key_of = _keys[types] = _key_function(kernel, args)
    key = (device.index, *key_of(*args), *options, *options.values())
    found = _compiled.get(key)
    if found is None:
        if capturing():
            raise RuntimeError(
                f"a CUDA graph is being captured, and {kernel.__name__} is not loaded for arguments like these: a "
                "capture cannot load it. Make the same call once before the capture, on tensors of the same dtypes, "
                "shapes, strides and alignment (gradkernels.warmup does so on contiguous, aligned ones)"
            )
        found = _compiled[key] = _compile(kernel, args, options)
    compiled, constants = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device.index)
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    metadata = compiled.launch_metadata((x, y, z), stream, *args, *constants) if enter.calls else None
    run = compiled.run  # loads the module, before which `function` is None
    loaded = (compiled.function, compiled.packed_metadata)
    run(x, y, z, stream, *loaded, metadata, enter, leave, *args, *constants)
    if _recorders and (recorder := recording()) is not None:
        recorder.launched(compiled, constants, grid, args, device)


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up; ``triton.cdiv``, made for constexpr too, takes a microsecond."""
    return -(-a // b)


def _width(value: int) -> int:
    """Return 0 for a 32-bit integer, 1 for a 64-bit one, 2 for one that needs the sign bit too."""
    return 0 if -(2**31) <= value < 2**31 else 1 if value < 2**63 else 2


def _widths(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([_widths(value) if isinstance(value, tuple) else _width(value) for value in values])


def _key_function(kernel: JITFunction, args: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    """Return what a compilation depends on in arguments of these types, as a function of the arguments.

    First a number for the kernel and the types: a call without a bias and one without a weight give terms that
    look the same. Then, as Triton has it: a tensor's dtype and whether its address is a multiple of 16, on AMD
    whether 31 bits count its bytes too (offsets have 32 bits there); whether an integer is 1, is a multiple of
    16, fits 32 bits; the block of a descriptor. Parameters under ``do_not_specialize`` count by type alone, the
    fields of their records too.
    """
    short_offsets = driver.active.get_current_target().backend == "hip"
    terms = [str(next(_numbers))]
    integers: list[str] = []

    def visit(param: Any, value: Any, name: str) -> None:
        """Add the terms of an argument, or of a field of a record, that the function calls ``name``."""
        if isinstance(value, Tensor):
            terms.append(f"{name}.dtype")
            if not param.do_not_specialize and not param.do_not_specialize_on_alignment:
                terms.append(f"{name}.data_ptr() % 16 == 0")
            if short_offsets and not param.do_not_specialize:
                terms.append(f"{name}.untyped_storage().nbytes() < 2**31")
        elif isinstance(value, int) and not isinstance(value, bool):
            if not param.do_not_specialize:
                terms.append(f"{name} == 1")
                terms.append(f"{name} % 16 == 0")
            integers.append(name)
        elif isinstance(value, TensorDescriptor):
            terms.append(f"{name}.base.dtype, *{name}.block_shape")
        elif _is_record(value):
            for i, item in enumerate(value):
                visit(param, item, f"{name}[{i}]")
        elif isinstance(value, tuple):
            terms.append(f"{name} and widths({name})")
        elif value is not None and not isinstance(value, (bool, float)):
            raise TypeError(f"{kernel.__name__}: parameter {param.name} is a {type(value).__name__}")

    for index, (param, value) in enumerate(zip(kernel.params, args, strict=False)):
        if param.is_constexpr:
            raise TypeError(f"{kernel.__name__}: constexpr parameter {param.name} was passed by position")
        visit(param, value, f"a{index}")
    if integers:  # one comparison serves all as long as none is wide
        listed = ", ".join(integers)
        terms.append(f"0 <= {' | '.join(integers)} <= 2147483647 or widths(({listed},))")
    names = ", ".join(f"a{index}" for index in range(len(args)))
    # The kernel is in the scope to be kept alive: the cache knows it by its identity.
    scope = {"widths": _widths, "kernel": kernel}
    return eval(f"lambda {names}: ({''.join(term + ', ' for term in terms)})", scope)


def _types(values: tuple[Any, ...]) -> list[Any]:
    """Return the types of arguments; of a record, those of its fields too, of which one may be None."""
    return [(type(value), *_types(value)) if _is_record(value) else type(value) for value in values]


def _is_record(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _representative(value: Any, specialise: bool) -> Any:
    """Return a value to compile for: an integer that is not to be specialised becomes another of its width.

    Triton specialises integers that are 1 or multiples of 16, and ``do_not_specialize`` does not reach into
    tuples.
    """
    if isinstance(value, tuple):
        record = _is_record(value)
        items = [_representative(item, specialise and record) for item in value]
        return type(value)(*items) if record else tuple(items)
    if specialise or type(value) is not int:
        return value
    return (3, 2**32 + 1, 2**64 - 1)[_width(value)]


def _compile(
    kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, tuple[Any, ...]]:
    """Return the kernel compiled for arguments like these, and its constexpr values in the kernel's order."""
    args = tuple(
        _representative(value, not param.do_not_specialize) if isinstance(value, tuple) else value
        for param, value in zip(kernel.params, args, strict=False)
    )
    compiled = kernel.warmup(*args, grid=(1,), enable_fp_fusion=True, **options)
    constants = tuple(options.get(param.name, param.default) for param in kernel.params[len(args) :])
    return compiled, constants
