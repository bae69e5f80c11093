"""A CPU that answers to the name of "cuda": code written for a GPU runs under Triton's interpreter as it is.

Tensors that are asked for on "cuda" are made on the CPU, and call themselves "cuda" to whoever asks from outside torch,
Triton and this package. Questions about the device get the answers of one with compute capability 9.0.
"""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._device import DeviceContext, _device_constructors

from .interpreted import along_an_axis, arithmetic, converter, dot, functions

CUDA = torch.device("cuda", 0)
_Source = TypeVar("_Source")
# By name, and asked at import: torch keeps its first answer, and inside a memory check some of them are replaced.
_CONSTRUCTORS = tuple(
    name for name in dir(torch) if callable(made := getattr(torch, name)) and made in _device_constructors()
)
_NAMES = re.compile(r"cuda(:\d+)?")
_OWN = tuple(
    str(Path(found.origin).parent)
    for name in ("torch", "triton", __name__.partition(".")[0])
    if (found := importlib.util.find_spec(name)) is not None and found.origin
)
_getters = {name: torch._C.TensorBase.__dict__[name].__get__ for name in ("device", "is_cuda", "is_cpu")}


def _told_the_truth() -> bool:
    """Return whether the caller's caller is torch, Triton or this package."""
    return sys._getframe(2).f_code.co_filename.startswith(_OWN)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and _NAMES.fullmatch(device) is not None


def _placed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with "cuda" taken for the CPU among its arguments."""

    @wraps(original)
    def place(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and (_is_cuda(kwargs["device"]) or isinstance(kwargs["device"], int)):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return original(*(torch.device("cpu") if _is_cuda(arg) else arg for arg in args), **kwargs)

    return place


def _moved(original: Callable[..., Any]) -> Callable[..., Any]:
    """Call Tensor.to: to "cuda" without a copy, to the CPU with one, as from a GPU."""
    place = _placed(original)

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], int) and not isinstance(args[0], bool):
            args = ("cuda", *args[1:])
        target = kwargs.get("device", args[0] if args else None)
        result = place(self, *args, **kwargs)
        leaves = isinstance(target, (str, torch.device)) and torch.device(target).type == "cpu"
        return result.clone() if leaves and result is self and not _told_the_truth() else result

    return to


def _giving(told: Any) -> Callable[..., Any]:
    """Return a function that always gives the same. torch's compiler wants one of its own under each name."""
    return lambda *args, **kwargs: told


def _itself(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor


def _copied(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tensor if _told_the_truth() else tensor.clone()


def _seen(name: str, told: Any) -> property:
    get = _getters[name]

    def look(tensor: Tensor) -> Any:
        actual = get(tensor)
        on_cpu = actual.type == "cpu" if name == "device" else _getters["is_cpu"](tensor)
        return told if on_cpu and not _told_the_truth() else actual

    return property(look)


class _Context:
    """A context that does nothing: a stream, an event, a device that is made current."""

    cuda_stream = 0
    device = CUDA

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Context":
        return self

    def __exit__(self, *args: object) -> None:
        pass

    record = wait = synchronize = wait_stream = wait_event = record_event = _giving(None)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0


_PROPERTIES = {
    "name": "Triton's interpreter",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 8,
    "total_memory": 1 << 33,
    "shared_memory_per_multiprocessor": 233472,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "max_threads_per_multi_processor": 2048,
    "regs_per_multiprocessor": 65536,
    "warp_size": 32,
    "L2_cache_size": 1 << 25,
}


def _answers() -> dict[str, Any]:
    """Return what ``torch.cuda`` answers."""

    def answer(told: Any, original: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: original() if _told_the_truth() else told

    zero = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    nothing = (
        "synchronize",
        "empty_cache",
        "set_device",
        "reset_peak_memory_stats",
        "manual_seed_all",
        "init",
    )
    return {
        "is_available": answer(True, torch.cuda.is_available),
        "device_count": answer(1, torch.cuda.device_count),
        "current_device": _giving(0),
        "get_device_name": _giving(_PROPERTIES["name"]),
        "get_device_capability": _giving((9, 0)),
        "get_device_properties": lambda device=None: SimpleNamespace(**_PROPERTIES),
        "is_bf16_supported": _giving(True),
        "is_current_stream_capturing": _giving(False),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "mem_get_info": _giving((1 << 32, 1 << 33)),
        "current_stream": lambda device=None: _Context(),
        "default_stream": lambda device=None: _Context(),
        "stream": lambda stream=None: nullcontext(),
        **{name: type(name, (_Context,), {}) for name in ("Stream", "Event", "device", "device_of")},
        **{name: _giving(None) for name in nothing},
        **{name: _giving(0) for name in zero},
    }


def _once(function: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
    """Run what triton.testing.do_bench is given once, and time nothing."""
    function()
    quantiles = kwargs.get("quantiles")
    return [1.0] * len(quantiles) if quantiles else 1.0


class _Driver:
    """What Triton asks of its active driver while the kernels are interpreted."""

    binary_ext = "none"
    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "multiprocessor_count": 8,
            "max_shared_mem": 232448,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1000000,
            "mem_clock_rate": 1000000,
            "mem_bus_width": 1024,
        }
    )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Any]:
        return _once

    def get_empty_cache_for_benchmark(self) -> Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: Any) -> None: ...


class _Compiled:
    """What launching and ``kernel.warmup`` give while kernels are interpreted: a small kernel, to launch again.

    Args:
        kernel: an interpreted kernel.
        args, kwargs: what it was launched with; the constexprs among them are compiled in.
    """

    n_regs, n_spills, n_max_threads = 32, 0, 1024
    metadata = SimpleNamespace(shared=1024, num_warps=4)

    def __init__(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        self.kernel = kernel
        self.run_time = [p.name for p in kernel.params if not p.is_constexpr]
        self.constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr and p.name in given}

    def _init_handles(self) -> None: ...

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:
            """Launch with all arguments, or with those that are not compiled in."""
            if len(args) != len(self.run_time):
                return self.kernel[grid](*args)
            return self.kernel[grid](**dict(zip(self.run_time, args, strict=True)), **self.constants)

        return launch


def _asked(whom: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    return lambda kernel: getattr(whom(kernel), name)


def _compiled(put: Callable[[Any, str, Any], None]) -> None:
    """Give interpreted kernels what code around Triton asks of a compiled one."""
    import triton
    import triton.runtime.interpreter as interpreter

    original, function = triton.runtime.jit.JITFunction, interpreter.InterpretedFunction

    class Told(type):
        def __instancecheck__(cls, thing: Any) -> bool:
            if cls is not JITFunction:  # a class derived from it, as Gluon's
                return super().__instancecheck__(thing)
            return isinstance(thing, original) or (isinstance(thing, function) and not _told_the_truth())

    class JITFunction(original[_Source], metaclass=Told):  # type: ignore[misc,valid-type]
        pass

    for owner in (triton, triton.runtime, triton.runtime.jit):
        put(owner, "JITFunction", JITFunction)

    run = function.run

    def launched(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> _Compiled:
        run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        return _Compiled(kernel, args, kwargs)

    def warmed(kernel: Any, *args: Any, grid: Any = None, **kwargs: Any) -> _Compiled:
        return _Compiled(kernel, args, kwargs)

    @cache
    def jitted(kernel: Any) -> Any:
        """Return the kernel as the compiler would have it; nothing is compiled."""
        return original(kernel.fn, **kernel.kwargs)

    def key(kernel: Any) -> str:
        return hashlib.sha256(
            f"interpreted {kernel.fn.__qualname__} {jitted(kernel).src}".encode()
        ).hexdigest()

    put(function, "run", launched)
    put(function, "warmup", warmed)
    put(function, "cache_key", property(key))
    for name in ("params", "signature", "src"):
        put(function, name, property(_asked(jitted, name)))


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Let "cuda" be this CPU inside the block; Triton, where it is installed, has a driver that does nothing."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            if name in vars(owner):
                stack.callback(setattr, owner, name, vars(owner)[name])
            else:
                stack.callback(delattr, owner, name)
            setattr(owner, name, value)

        for name in _CONSTRUCTORS:
            put(torch, name, _placed(vars(torch)[name]))
        for name in ("empty_permuted", "rand_like", "randn_like", "randint_like", "empty_like", "zeros_like"):
            put(torch, name, _placed(getattr(torch, name)))
        for name in ("ones_like", "full_like", "set_default_device"):
            put(torch, name, _placed(getattr(torch, name)))
        for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided"):
            put(Tensor, name, _placed(getattr(Tensor, name)))
        put(DeviceContext, "__init__", _placed(DeviceContext.__init__))  # with torch.device("cuda")
        put(Tensor, "to", _moved(Tensor.to))
        put(Tensor, "cuda", _itself)
        put(Tensor, "pin_memory", _itself)
        put(Tensor, "cpu", _copied)
        put(Tensor, "record_stream", _giving(None))
        put(Tensor, "get_device", lambda tensor: 0)
        for name, told in {"device": CUDA, "is_cuda": True, "is_cpu": False}.items():
            put(Tensor, name, _seen(name, told))
        for name, answer in _answers().items():
            put(torch.cuda, name, answer)
        put(torch.accelerator, "is_available", lambda: not _told_the_truth())
        put(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
        for name, told in {"synchronize": None, "current_device_index": 0}.items():
            put(torch.accelerator, name, _giving(told))
        put(torch, "Generator", _generator(torch.Generator))
        put(torch, "compile", _uncompiled)
        _autocast(put)
        if importlib.util.find_spec("triton") is not None:
            import triton
            import triton.language.extra.cuda.libdevice
            import triton.language.extra.libdevice
            import triton.runtime.interpreter as interpreter

            put(triton.runtime.driver, "_active", _Driver())
            _compiled(put)
            put(interpreter, "_implicit_cvt", converter(interpreter._implicit_cvt))
            builder = interpreter.InterpreterBuilder
            put(builder, "create_dot", dot(builder.create_dot))
            for name, operands in {"binary_op": 2, "unary_op": 1}.items():
                put(builder, name, arithmetic(getattr(builder, name), operands))
            operations = interpreter.ReduceScanOpInterface
            put(operations, "apply", along_an_axis(operations.apply))
            extra = triton.language.extra
            for name, function in functions():
                for library in (extra.libdevice, extra.cuda.libdevice):  # kernels import either
                    put(library, name, function)
            for name in ("do_bench", "do_bench_cudagraph"):
                put(triton.testing, name, _once)
            put(triton.testing.Mark, "run", _giving(None))
        yield


def _generator(original: type) -> type:
    class Generator(original):
        def __new__(cls, device: Any = "cpu") -> Any:
            return original.__new__(cls, "cpu" if _is_cuda(device) else device)

    return Generator


def _uncompiled(model: Any = None, **options: Any) -> Any:
    """Return the function as it is: dynamo would trace Triton's interpreter, and Inductor start a C++ compiler."""
    return _itself if model is None else model


def _autocast(put: Callable[[Any, str, Any], None]) -> None:
    """Make autocast for "cuda" the CPU's, with the dtype that a GPU would have."""
    original = torch.amp.autocast_mode.autocast.__init__

    def init(self: Any, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        original(self, device_type, dtype, *args, **kwargs)

    put(torch.amp.autocast_mode.autocast, "__init__", init)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        function = getattr(torch, name)
        put(torch, name, lambda device="cpu", f=function: f("cpu" if device == "cuda" else device))
