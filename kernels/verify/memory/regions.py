"""The addresses that a tensor owns, and the marks in memory that nothing has written yet."""

import ctypes
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...torch_private import functions_replaced, is_wrapped, unwrapped

# NaNs that no arithmetic produces, and an integer that hardly anything computes. One-byte types and 16-bit integers
# have no value to spare: memory of theirs counts as written.
MARKS = {
    torch.float64: 0x7FF5A5A5A5A5A5A5,
    torch.float32: 0x7FA5A5A5,
    torch.float16: 0x7DA5,
    torch.bfloat16: 0x7FA5,
    torch.int32: 0xA5A5A5A5,
    torch.int64: 0xA5A5A5A5A5A5A5A5,
    torch.uint32: 0xA5A5A5A5,
    torch.uint64: 0xA5A5A5A5A5A5A5A5,
}
# Of a workspace of bytes, which kernels reach through views and pointers of wider dtypes.
BYTES = {torch.uint8: 0xA5, torch.int8: 0xA5}
_ALL = MARKS | BYTES

MAX_MARKED = 1 << 28


def _words(address: int, count: int, itemsize: int) -> np.ndarray:
    """Return the memory at ``address`` as unsigned integers."""
    buffer = memoryview((ctypes.c_char * (count * itemsize)).from_address(address))
    return np.frombuffer(buffer, dtype=f"u{itemsize}")


def mark(tensor: Tensor) -> None:
    """Fill the whole storage of a CPU tensor with the mark of its dtype."""
    storage, itemsize = tensor.untyped_storage(), tensor.element_size()
    if storage.nbytes() >= itemsize:
        _words(storage.data_ptr(), storage.nbytes() // itemsize, itemsize)[:] = _ALL[tensor.dtype]


def mark_in(tensor: Tensor, itemsize: int) -> int | None:
    """Return what an access of ``itemsize`` bytes finds where the mark of ``tensor`` stands; None if it cannot tell."""
    own = tensor.element_size()
    if itemsize % own or (tensor.dtype in BYTES and itemsize < 4):
        return None
    return int.from_bytes(_ALL[tensor.dtype].to_bytes(own, "little") * (itemsize // own), "little")


def unwritten(tensor: Tensor) -> np.ndarray:
    """Return which elements of ``tensor`` still carry the mark."""
    itemsize = tensor.element_size()
    storage = tensor.untyped_storage()
    words = _words(storage.data_ptr(), storage.nbytes() // itemsize, itemsize)
    strides = [stride * itemsize for stride in tensor.stride()]
    view = np.lib.stride_tricks.as_strided(words[tensor.storage_offset() :], tensor.shape, strides)
    return np.asarray(view == MARKS[tensor.dtype])


def markable(tensor: Any, dtypes: Container[torch.dtype] = MARKS) -> bool:
    """Return whether ``tensor`` can be marked; marking more than MAX_MARKED bytes takes too long."""
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.dtype not in dtypes:
        return False
    if tensor.layout != torch.strided or is_wrapped(tensor):  # neither has a storage
        return False
    return 0 < tensor.untyped_storage().nbytes() <= MAX_MARKED


def _innermost(tensor: Any) -> Any:
    """Return the tensor inside the wrappers of torch.func."""
    while type(tensor) is Tensor and is_wrapped(tensor):
        tensor = unwrapped(tensor)
    return tensor


CREATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch, "empty_permuted"))
_data_ptr = torch._C.TensorBase.data_ptr
METHODS = {"new_empty": "empty", "new_empty_strided": "empty_strided"}


@contextmanager
def watched_tensors(created: Callable[[Tensor], None], asked: Callable[[Tensor], None]) -> Iterator[None]:
    """Mark what torch.empty and its variants return inside the block, and report it to ``created``.

    A CPU tensor whose ``data_ptr`` is called is reported to ``asked``: its address may go into a table.
    """

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def create(*args: Any, **kwargs: Any) -> Any:
            tensor = original(*args, **kwargs)
            if not torch.compiler.is_compiling() and markable(inner := _innermost(tensor), _ALL):
                mark(inner)
                created(inner)
            return tensor

        return create

    def method(name: str, function: str) -> Callable[..., Any]:
        create = wrapped(getattr(Tensor, name))

        def create_like(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                return create(self, *args, **kwargs)
            # The compiler cannot trace a method that was taken from its class; the function does the same.
            options = {"dtype": self.dtype, "device": self.device, **kwargs}
            return getattr(torch, function)(*args, **options)

        return create_like

    def data_ptr(tensor: Tensor) -> int:
        address = _data_ptr(tensor)
        if tensor.device.type == "cpu":
            asked(tensor)
        return address

    with functions_replaced(), ExitStack() as stack:
        for owner, name in CREATORS:
            original = getattr(owner, name)
            setattr(owner, name, wrapped(original))
            stack.callback(setattr, owner, name, original)
        # Inherited from torch._C.TensorBase, unless something else shadows it: shadowed, then put back.
        methods = {name: method(name, function) for name, function in METHODS.items()} | {
            "data_ptr": data_ptr
        }
        for name, replacement in methods.items():
            if name in vars(Tensor):
                stack.callback(setattr, Tensor, name, vars(Tensor)[name])
            else:
                stack.callback(delattr, Tensor, name)
            setattr(Tensor, name, replacement)
        yield


@dataclass(frozen=True)
class Region:
    """A region is the set of addresses that a strided view can reach.

    Attributes:
        name: the name of the tensor in a report.
        tensor: the view; it is kept alive, so that its memory is not allocated again.
        start, end: the first address, and the one after the last.
        levels: (stride in bytes, size) from the largest stride down, contiguous dimensions merged, the bytes of an
            element last; a dense view has one level.
        nested: whether the levels do not overlap, so that an address divides into indices.
    """

    name: str
    tensor: Tensor
    start: int
    end: int
    levels: tuple[tuple[int, int], ...]
    nested: bool

    @staticmethod
    def of(name: str, tensor: Tensor) -> "Region":
        itemsize = tensor.element_size()
        dims = sorted(
            ((stride * itemsize, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
             if size != 1 and stride != 0),
            reverse=True,
        )  # fmt: skip
        levels: list[tuple[int, int]] = []
        for stride, size in [*dims, (1, itemsize)]:
            if levels and levels[-1][0] == stride * size:
                stride, size = stride, size * levels.pop()[1]
            levels.append((stride, size))
        span, nested = 1, True
        for stride, size in reversed(levels):
            nested = nested and stride >= span
            span += stride * (size - 1)
        start = _data_ptr(tensor)
        end = start + (span if tensor.numel() else 0)
        return Region(name, tensor, start, end, tuple(levels), nested)

    def legal(self, addresses: np.ndarray, itemsize: int) -> np.ndarray | None:
        """Return which of the addresses may be touched, ``itemsize`` bytes each; None if all may."""
        low, high = int(addresses.min()), int(addresses.max())
        inside = self.start <= low and high + itemsize <= self.end
        if inside and len(self.levels) == 1:
            return None
        ok = (addresses >= self.start) & (addresses + np.uint64(itemsize) <= self.end)
        rest = np.where(ok, addresses - np.uint64(self.start), 0).astype(np.int64)
        if self.nested:
            for stride, size in self.levels[:-1]:
                index, rest = np.divmod(rest, stride)
                ok &= index < size
            ok &= rest + itemsize <= self.levels[-1][0] * self.levels[-1][1]
        else:
            ok &= self._reachable()[rest]
        return None if ok.all() else ok

    def _reachable(self) -> np.ndarray:
        """Return, for a view that overlaps itself, the byte offsets at which an element begins."""
        element = self.tensor.element_size()
        reached = np.zeros(self.end - self.start, bool)
        strides = [stride * element for stride in self.tensor.stride()]
        np.lib.stride_tricks.as_strided(reached, self.tensor.shape, strides)[...] = True
        return reached

    def describe(self, address: int) -> str:
        """Say where an illegal address lies, in elements of this tensor."""
        element = self.tensor.element_size()
        if address >= self.end:
            beyond = (address - self.end) // element
            return f"{beyond} elements past its end" if beyond else "right behind its last element"
        if address < self.start:
            return f"{-((address - self.start) // element)} elements before its start"
        offset = (address - self.start) // element
        if address + element > self.end:
            return "across its end"
        return f"in a gap of the view, {offset} elements from its start, which its strides do not reach"

    def __str__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        text = f"{self.name} ({dtype}, shape {tuple(self.tensor.shape)}"
        return text + (")" if self.tensor.is_contiguous() else f", strides {self.tensor.stride()})")
