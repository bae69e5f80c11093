"""Compile for a chip that is not there: a Triton driver that launches nothing, and what a compiled kernel uses."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim.bucket import UNGUARDED, AdamOptions, Guard, Models, SGDOptions, Update


class Chip(NamedTuple):
    """A chip to compile for: backend, architecture, threads per warp, bytes of shared memory of one program."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 166912),
    "sm_90": Chip("cuda", 90, 32, 232448),
    "sm_100": Chip("cuda", 100, 32, 232448),
    "gfx942": Chip("hip", "gfx942", 64, 65536),
}


def null_driver(target: str, launched: list[str]) -> Any:
    """Return a Triton driver that compiles for ``target`` and, instead of launching, appends the kernel's hash."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    chip = CHIPS[target]

    class Utils:
        def load_binary(self, *_: Any) -> tuple[int, ...]:
            return 1, 1, 32, 0, 1024

        def unload_module(self, _: Any) -> None: ...

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": chip.shared, "multiprocessor_count": 132, "warpSize": chip.warp_size}

    class NullDriver(DriverBase):
        utils = Utils()

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget(chip.backend, chip.arch, chip.warp_size)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing runs here")

        def get_current_device(self) -> int:
            return list(CHIPS).index(target)

        def get_current_stream(self, _: int | None) -> int:
            return 0

        def launcher_cls(self, _: Any, metadata: Any) -> Callable[..., None]:
            return lambda *args: launched.append(metadata.hash)

    return NullDriver()


def disassembly(compiled: Any, option: str) -> str:
    """Return what ``cuobjdump`` says of a kernel compiled for NVIDIA."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def usage(compiled: Any) -> tuple[int, int]:
    """Return registers per thread of a compiled kernel, and spills: bytes of stack on NVIDIA, registers on AMD."""
    if compiled.metadata.target.backend == "cuda":
        text = disassembly(compiled, "--dump-resource-usage")
        patterns = (r"REG:(\d+)", r"STACK:(\d+)")
    else:
        text = compiled.asm["amdgcn"]
        patterns = (r"\.vgpr_count:\s*(\d+)", r"\.vgpr_spill_count:\s*(\d+)")
    registers, spills = (int(found[1]) for pattern in patterns if (found := re.search(pattern, text)))
    return registers, spills


def update_of(
    operator: str, params: Sequence[Tensor], guarded: bool = False, amsgrad: bool = False
) -> Update:
    """Return what ``linear_mse_fit`` would hand to its launcher, for stacked parameters without values.

    SGD has momentum. ``guarded``: clipping, a guard, and models that are not active.
    """
    options: SGDOptions | AdamOptions
    if operator == "sgd":
        options, keys = SGDOptions(0.1, 0.9, 0.0, 0.0, False, False), ["momentum_buffer"]
    else:
        options, keys = AdamOptions(0.1, 0.9, 0.999, 1e-8, 0.0, False, False), ["exp_avg", "exp_avg_sq"]
        keys += ["max_exp_avg_sq"] * amsgrad
    states = [{key: torch.empty_like(param) for key in keys} for param in params]
    B, device = len(params[0]), params[0].device
    for state in states:
        state["step"] = torch.empty(B, device=device)
    guard, active = UNGUARDED, None
    if guarded:
        norms = torch.empty(1, 2, B, dtype=torch.float64, device=device)
        skipped = torch.empty(B, dtype=torch.int64, device=device)
        guard = Guard(norms=norms, max_norm=1.0, skip_nonfinite=True, skipped=skipped)
        active = torch.empty(B, dtype=torch.bool, device=device)
    return Update(
        operator, [options] * len(params), states, guard, lambda *_: lambda: None, Models(B, active)
    )
