"""Triton's own compiler and launcher over a stand-in for libcuda (``libcuda.c``). Nothing is executed.

For a process of its own, without Triton's interpreter. With torch's CPU build ``activate`` compiles the stand-in,
makes Triton's CUDA driver the active one over it, and lets CPU tensors go to the kernels; with its CUDA build,
which ``cuda_build.py`` sets up, all that is so already.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("libcuda.c")
LIBRARIES = Path(__file__).parents[2] / "build" / "libcuda"


def compiler() -> str | None:
    """The C compiler that Triton itself would take."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def build() -> Path:
    """The folder with the compiled stand-in; named by what it is compiled from."""
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    digest = hashlib.sha256(SOURCE.read_bytes() + str(include).encode()).hexdigest()[:16]
    folder = LIBRARIES / digest
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            options = ["-shared", "-fPIC", "-O1", "-pthread", f"-Wl,-soname,{library.name}", f"-I{include}"]
            subprocess.run([str(compiler()), *options, "-o", made, SOURCE], check=True)
            made.replace(library)  # at once, for workers that build it at the same time
    return folder


@dataclass(frozen=True)
class Launch:
    """One launch that the driver accepted; ``params`` are the values of the kernel's parameters, as bytes."""

    kernel: str
    function: int
    device: int
    stream: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    params: tuple[bytes, ...]


class StandIn:
    """The stand-in within this process, under torch's CPU build.

    Attributes:
        tensors: the device of tensors that the kernels serve.
        history: every line that ``events`` has returned.
    """

    tensors = torch.device("cpu")

    def __init__(self, library: str) -> None:
        log = Path(os.environ["GRADKERNELS_CUDA_LOG"])
        log.touch()
        self._log = log.open()
        self.history: list[str] = []
        # Triton's launcher opens the library by its soname, which then is loaded already.
        self.library = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        self._streams: dict[int, int] = {}

    def device_count(self) -> int:
        count = ctypes.c_int()
        self.library.cuDeviceGetCount(ctypes.byref(count))
        return count.value

    def current_device(self) -> int:
        device = ctypes.c_int()
        self.library.cuCtxGetDevice(ctypes.byref(device))
        return device.value

    def set_device(self, device: int) -> None:
        context = ctypes.c_void_p()
        if self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
            raise RuntimeError(f"no device {device}")
        self.library.cuCtxSetCurrent(context)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """torch.cuda.device."""
        before = self.current_device()
        self.set_device(device if isinstance(device, int) else device.index)
        try:
            yield
        finally:
            self.set_device(before)

    def stream(self, device: int | None = None) -> int:
        """The current stream of a device."""
        return self._streams.get(self.current_device() if device is None else device, 0)

    def use_new_stream(self, device: int) -> None:
        """Make a new stream the current one of a device."""
        stream = ctypes.c_void_p()
        with self.device(device):
            self.library.cuStreamCreate(ctypes.byref(stream), 0)
        self._streams[device] = int(stream.value or 0)

    def tensor_map(self, address: int, sizes: tuple[int, ...], stride: int, box: tuple[int, ...]) -> None:
        """Encode a map of float32 rows, innermost size first, for 128 bytes of swizzle.

        Raises:
            RuntimeError: the driver refuses it, and why.
        """
        storage = (ctypes.c_uint64 * 32)()
        aligned = (ctypes.addressof(storage) + 63) // 64 * 64
        float32, plain, swizzle, steps = 7, 0, 3, (ctypes.c_uint32 * 2)(1, 1)
        code = self.library.cuTensorMapEncodeTiled(
            ctypes.c_void_p(aligned), float32, 2, ctypes.c_void_p(address), (ctypes.c_uint64 * 2)(*sizes),
            (ctypes.c_uint64 * 1)(stride), (ctypes.c_uint32 * 2)(*box), steps, plain, swizzle, 0, 0,
        )  # fmt: skip
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError((text.value or b"").decode())

    def events(self) -> list[str]:
        """The lines recorded since the last call; ``history`` keeps them too."""
        lines = self._log.read().splitlines()
        self.history += lines
        return lines


def launches_in(events: list[str]) -> list[Launch]:
    """The launches among recorded lines."""
    found = []
    for line in events:
        word, _, rest = line.partition(" ")
        if word != "launch":
            continue
        fields = dict(field.split("=", 1) for field in rest.split(" "))
        numbers = {
            name: int(fields.pop(name)) for name in ("function", "device", "stream", "threads", "shared")
        }
        grid = tuple(map(int, fields["grid"].split(",")))
        params = tuple(bytes.fromhex(value) for value in fields["params"].split(","))
        found.append(Launch(fields["kernel"], grid=grid, params=params, **numbers))
    return found


class CudaBuild(StandIn):
    """The same under torch's CUDA build, which has devices and streams of its own."""

    tensors = torch.device("cuda", 0)
    device = torch.cuda.device  # type: ignore[assignment]

    def current_device(self) -> int:
        return torch.cuda.current_device()

    def set_device(self, device: int) -> None:
        torch.cuda.set_device(device)

    def stream(self, device: int | None = None) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    def use_new_stream(self, device: int) -> None:
        before = torch.cuda.current_device()
        torch.cuda.set_stream(torch.cuda.Stream(device))
        torch.cuda.set_device(before)


def activate() -> StandIn:
    """The stand-in, over which Triton's CUDA driver is the active one, and serves CPU tensors if it must."""
    if torch.cuda.is_available():
        return CudaBuild("libcuda.so.1")
    folder = build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    standin = StandIn(str(folder / "libcuda.so.1"))
    standin.set_device(0)
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_device_capability = lambda device=None: (9, 0)
    driver.get_current_device = standin.current_device
    driver.set_current_device = standin.set_device
    driver.get_current_stream = standin.stream
    driver.get_active_torch_device = lambda: torch.device("cpu")
    triton.runtime.driver.set_active(driver)
    torch.cuda.device = standin.device  # type: ignore[assignment,misc]
    return standin
