"""A call that repeats: what it allocates and launches, noted once and then done again without the Python between.

A launcher works out shapes, grids and configs anew at each call, though they depend on no value: only on dtypes,
sizes, strides, alignments, options and the device, which make up the key of a call (``Operator``). The second call
of a key is recorded: a dispatch mode sees each of torch's operations, and ``launch`` reports each kernel. If these
were allocations, views and launches alone, a function is generated that allocates and launches the same; the third
call of the key runs it. Else the launcher goes on serving the key.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import torch_private as private
from ..repeat import keep
from . import launch as launching
from .launch import guard

# The alignment of memory that several temporary tensors share, as of torch's own allocator.
PAGE = 512

_aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_permuted.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)

_NEW = object()

# How the launcher in Python (``CompiledKernel.run``) calls the one in C if it needs no memory, in the versions of
# Triton where this has been tried.
_NVIDIA = "triton.backends.nvidia.driver"
_C_LAUNCHER = {
    "3.6": "{launch}({at}, {function}, {run}.launch_cooperative_grid, {run}.launch_pdl, None, None, {packed}, {hooks}, "
    "*values)",
    "3.9": "{launch}({at}, {function}, {run}.launch_cooperative_grid, {run}.launch_pdl, {packed}, {hooks}, None, None, "
    "{run}.arg_annotations, {run}.kernel_signature, values)",
}

Call = Callable[..., Any]


def run(replays: dict[Any, Any], key_of: Call, call: Call, args: tuple[Any, ...]) -> Any:
    """Run ``call(*args)``, for which there is no replay; the second call of a key is recorded.

    Args:
        replays: of an operator, by key. None: the key has been seen once; False: it cannot be replayed.
        key_of: gives the key of arguments.
        call: a launcher.
        args: of the operator.
    """
    if not launching.DIRECT or launching.recording() is not None:
        return call(*args)
    key = key_of(*args)
    known = replays.get(key, _NEW)
    if known is _NEW:
        keep(replays, key, None)
    if known is not None or key is None:
        return call(*args)
    # Each argument as a tensor object of its own: one that is passed twice here may be two at the next call.
    own = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    recorder = Recorder(own)
    with recorder, launching.recorded_by(recorder):
        results = call(*own)
    keep(replays, key, recorder.replay(results))
    return results


class Recorder(TorchDispatchMode):
    """What a call allocates and launches.

    Attributes:
        obstacle: why the call cannot be replayed, or None.
    """

    def __init__(self, args: Sequence[Any]) -> None:
        super().__init__()
        self.obstacle: str | None = None
        self._arguments = len(args)
        # By a tensor's identity: the tensor that owns its memory, under its name in the replay. ``_kept`` keeps the
        # identities from being used again.
        self._owners: dict[int, tuple[str, Tensor]] = {}
        self._kept: list[Tensor] = []
        self._new: dict[str, Tensor] = {}
        self._launches: list[tuple[Any, tuple[Any, ...], tuple[int, ...], tuple[Any, ...]]] = []
        self._device: torch.device | None = None
        for index, arg in enumerate(args):
            if isinstance(arg, Tensor):
                self._own(arg, f"a{index}", arg)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            name = f"n{len(self._new)}"
            self._new[name] = result
            self._own(result, name, result)
        elif func.is_view and id(args[0]) in self._owners and _is_view(result, args[0]):
            self._own(result, *self._owners[id(args[0])])
        elif func is not _aten.promote_types.default:
            self.obstacle = str(func)
        return result

    def launched(
        self, compiled: Any, constants: tuple[Any, ...], grid: tuple[int, ...], args: tuple[Any, ...],
        device: torch.device,
    ) -> None:  # fmt: skip
        """Note a launch of a compiled kernel."""
        self._launches.append((compiled, constants, grid, args))
        self._device = device

    def _own(self, tensor: Tensor, name: str, owner: Tensor) -> None:
        self._owners[id(tensor)] = name, owner
        self._kept.append(tensor)

    def replay(self, results: Any) -> Call | bool:
        """Return the call as a function of the same arguments, or False if there is an obstacle.

        ``results``: what the call returned, a tensor or a list of tensors.
        """
        if self.obstacle is None:
            try:
                return self._generated(results)
            except _NotReplayableError as error:
                self.obstacle = str(error)
        return False

    def _generated(self, results: Any) -> Call:
        device = self._device
        if device is None:
            raise _NotReplayableError("nothing was launched")
        scope: dict[str, Any] = {
            "empty_strided": partial(_empty_strided, device), "uint8": torch.uint8, "device": device,
            "Descriptor": TensorDescriptor, "runtime": knobs.runtime, "guard": guard,
            "current_device": driver.active.get_current_device, "current_stream": driver.active.get_current_stream,
        }  # fmt: skip
        if device.type == "cuda" and private.current_cuda_device:
            scope["empty_strided"] = private.empty_strided_cuda
            scope["current_device"] = private.current_cuda_device
        returned = self._returned(results)
        names = list(returned)
        body = _Body(self._owners, scope)
        launches = [body.launch(*launch) for launch in self._launches]
        allocations, offset = [], 0
        for name, tensor in self._new.items():
            if name in names or name in body.bases:
                scope[f"{name}_dtype"] = tensor.dtype
                like = returned.get(name, tensor)
                size, stride = tuple(like.shape), like.stride()
                allocations.append(f"{name} = empty_strided({size}, {stride}, {name}_dtype)")
                if name in body.pointers:
                    allocations.append(f"{name}_ptr = {name}.data_ptr()")
            elif name in body.pointers:
                allocations.append(f"{name}_ptr = shared_ptr + {offset}")
                offset += -(-tensor.untyped_storage().nbytes() // PAGE) * PAGE
        if offset:
            shared = f"shared = empty_strided(({offset},), (1,), uint8)"
            allocations[:0] = [shared, "shared_ptr = shared.data_ptr()"]
        args = ", ".join(f"a{index}" for index in range(self._arguments))
        given = [f"{name}_ptr = {name}.data_ptr()" for name in sorted(body.pointers) if name[0] == "a"]
        elsewhere = [
            f"if current_device() != {device.index}:",
            "    with guard(device):",
            f"        return replay({args})",
        ]
        lines = [
            *(elsewhere if device.index is not None else []),
            *allocations,
            *given,
            f"stream = current_stream({device.index})",
            "enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook",
            "if not (enter.calls or leave.calls):",
            "    enter = leave = None",  # an empty chain of hooks takes half a microsecond
            *launches,
            f"return [{', '.join(names)}]" if isinstance(results, list) else f"return {names[0]}",
        ]
        exec(f"def replay({args}):\n" + "".join(f"    {line}\n" for line in lines), scope)
        return scope["replay"]

    def _returned(self, results: Any) -> dict[str, Tensor]:
        """Return the results by name, each of them all of a new tensor."""
        returned = {}
        for result in results if isinstance(results, list) else [results]:
            name, owner = self._owners.get(id(result), ("", result))
            whole = (
                result.dtype == owner.dtype
                and result.numel() == owner.numel()
                and result.data_ptr() == owner.data_ptr()
            )
            if name not in self._new or name in returned or not whole:
                raise _NotReplayableError("a result is not a new tensor")
            returned[name] = result
        return returned


def _is_view(result: Any, tensor: Tensor) -> bool:
    """Return whether an operation that may give a view has given one.

    Below autograd and in inference mode a dispatch mode sees ``contiguous`` and ``reshape`` themselves, which may copy.
    """
    return isinstance(result, Tensor) and (
        result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    )


def _empty_strided(
    device: torch.device, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _asks_for_memory(run: Any) -> bool:
    """Return whether a launcher of NVIDIA's allocates memory for a kernel, or for a sanitizer."""
    return bool(run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False))


class _NotReplayableError(Exception):
    """A call that a generated function cannot repeat."""


class _Body:
    """The launches of a replay as source.

    Attributes:
        pointers: names of tensors whose addresses are used.
        bases: names of tensors that descriptors are made of.
    """

    def __init__(self, owners: dict[int, tuple[str, Tensor]], scope: dict[str, Any]) -> None:
        self.pointers: set[str] = set()
        self.bases: set[str] = set()
        self._owners = owners
        self._scope = scope

    def launch(
        self, compiled: Any, constants: tuple[Any, ...], grid: tuple[int, ...], args: tuple[Any, ...]
    ) -> str:
        values = self._expression((*args, *constants))
        programs = ", ".join(map(str, (*grid, 1, 1)[:3]))
        at = f"{programs}, stream"
        run = compiled.run
        function, packed, data = map(
            self._constant, (compiled.function, compiled.packed_metadata, compiled.launch_metadata)
        )
        hooks = f"enter and {data}(({programs}), stream, *values), enter, leave"
        form = _C_LAUNCHER.get(triton.__version__.rpartition(".")[0], "")
        if type(run).__module__ == _NVIDIA and form and not _asks_for_memory(run):
            called = form.format(
                launch=self._constant(run.launch), at=at, function=function, packed=packed, hooks=hooks,
                run=self._constant(run),
            )  # fmt: skip
        else:
            called = f"{self._constant(run)}({at}, {function}, {packed}, {hooks}, *values)"
        return f"values = {values}; {called}"

    def _expression(self, value: Any) -> str:
        """Return the source of a kernel's argument: of a tensor its address, which the driver need not look up."""
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        if isinstance(value, Tensor):
            name, offset = self._place(value)
            self.pointers.add(name)
            return f"{name}_ptr + {offset}" if offset else f"{name}_ptr"
        if isinstance(value, TensorDescriptor):
            name, offset = self._place(value.base)
            if offset:
                raise _NotReplayableError("a descriptor of a part of a tensor")
            self.bases.add(name)
            return f"Descriptor({name}, {value.shape}, {value.strides}, {value.block_shape})"
        if isinstance(value, tuple):
            return "(" + "".join(self._expression(item) + ", " for item in value) + ")"
        return self._constant(value)

    def _place(self, tensor: Tensor) -> tuple[str, int]:
        """Return the name of the tensor that owns the memory, and the bytes from its address to the tensor's begin."""
        if id(tensor) not in self._owners:
            raise _NotReplayableError("a kernel was given memory of unknown origin")
        name, owner = self._owners[id(tensor)]
        return name, tensor.data_ptr() - owner.data_ptr()

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._scope)}"
        self._scope[name] = value
        return name
