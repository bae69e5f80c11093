"""What the compiler makes of every kernel, without a GPU: ``python -m bench.aot``.

Each specimen calls an op's own launchers on tensors without memory (torch's meta device), under a driver that
compiles for the wanted chip and launches nothing. What was compiled is then disassembled: registers, spills,
shared memory, the widths of global loads and stores, the matrix instructions.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Backend, architecture, lanes of a warp, and the shared memory in bytes that one program may have.
TARGETS = {
    "sm_80": ("cuda", 80, 32, 166912),
    "sm_90": ("cuda", 90, 32, 232448),
    "sm_100": ("cuda", 100, 32, 232448),
    "gfx942": ("hip", "gfx942", 64, 65536),
}
MATRIX = re.compile(r"HGMMA|QGMMA|HMMA|DMMA|UTC\w*MMA|v_mfma\w*")
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Specimen:
    """One representative call of an op's launchers.

    Attributes:
        op: the module under ``kernels/triton``.
        shapes: the class of shapes it stands for.
        call: makes the call, given the module and a dtype.
        dtypes: that it is compiled for.
        wide: whether shapes and addresses allow 128-bit loads and stores throughout.
    """

    op: str
    shapes: str
    call: Callable[[Any, torch.dtype], object]
    dtypes: tuple[torch.dtype, ...] = (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)
    wide: bool = True

    def __str__(self) -> str:
        return f"{self.op}: {self.shapes}"


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory, at an aligned address."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _matmul(
    left: tuple[int, ...],
    right: tuple[int, ...],
    addend: tuple[int, ...] | None = None,
    sum_dims: Sequence[int] = (),
    transposed: tuple[bool, bool] = (False, False),
) -> Callable[[Any, torch.dtype], object]:
    def call(module: Any, dtype: torch.dtype) -> object:
        operands = []
        for shape, swap in zip((left, right), transposed, strict=True):
            operands.append(
                meta(*shape[:-2], *shape[:-3:-1], dtype=dtype).mT if swap else meta(*shape, dtype=dtype)
            )
        extra = None if addend is None else meta(*addend, dtype=dtype)
        return module.matmul_forward(*operands, extra, list(sum_dims), dtype)

    return call


SPECIMENS = (
    Specimen("matmul", "large", _matmul((4096, 4096), (4096, 4096))),
    Specimen("matmul", "large, bias", _matmul((4096, 1024), (1024, 4096), (4096,))),
    Specimen(
        "matmul",
        "linear: transposed right",
        _matmul((4096, 1024), (1024, 4096), (4096,), transposed=(False, True)),
    ),
    Specimen(
        "matmul",
        "gradient of weight: transposed left",
        _matmul((1024, 65536), (65536, 512), transposed=(True, False)),
    ),
    Specimen("matmul", "odd sizes", _matmul((1001, 333), (333, 777), (777,)), wide=False),
    Specimen("matmul", "many of 512 by 64 by 512", _matmul((64, 512, 64), (64, 64, 512))),
    Specimen("matmul", "sum over the batch", _matmul((8, 1, 512, 64), (8, 4, 64, 512), sum_dims=[0])),
    Specimen(
        "matmul", "tall data, small result", _matmul((16, 1 << 20), (1 << 20, 8), transposed=(True, False))
    ),
    Specimen("matmul", "matrix by column", _matmul((4096, 4096), (4096, 1))),
    Specimen("matmul", "row by matrix", _matmul((1, 4096), (4096, 4096))),
    Specimen("matmul", "dot product", _matmul((1, 1 << 20), (1 << 20, 1))),
    Specimen("matmul", "outer product", _matmul((4096, 1), (1, 4096))),
    Specimen("matmul", "tall and skinny", _matmul((1 << 20, 8), (8, 4), (4,)), wide=False),
    Specimen("matmul", "many of 8 by 8 by 8", _matmul((1 << 16, 8, 8), (1 << 16, 8, 8)), wide=False),
)


@dataclass
class Row:
    """One compiled kernel.

    Attributes:
        registers: per thread. spills: bytes of stack or loads and stores of it, per thread.
        shared: bytes of shared memory per program.
        loads, stores: how many instructions access global memory, by bits each.
        matrix: how many matrix instructions there are, by name.
    """

    op: str
    shapes: str
    dtype: str
    target: str
    kernel: str
    wide: bool = False
    registers: int = 0
    spills: int = 0
    shared: int = 0
    warps: int = 0
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    matrix: dict[str, int] = field(default_factory=dict)
    error: str = ""


def null_driver(target: str, launched: list[str]) -> Any:
    """A Triton driver that compiles for ``target`` and, instead of launching, appends the kernel's hash."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    backend, arch, lanes, shared = TARGETS[target]

    class Utils:
        def load_binary(self, *_: Any) -> tuple[int, ...]:
            return 1, 1, 32, 0, 1024

        def unload_module(self, _: Any) -> None: ...

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": shared, "multiprocessor_count": 132, "warpSize": lanes}

    class NullDriver(DriverBase):
        utils = Utils()

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget(backend, arch, lanes)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing runs here")

        def get_current_device(self) -> int:
            return list(TARGETS).index(target)

        def get_current_stream(self, _: int | None) -> int:
            return 0

        def launcher_cls(self, _: Any, metadata: Any) -> Callable[..., None]:
            return lambda *args: launched.append(metadata.hash)

    return NullDriver()


def _nvidia(compiled: Any, row: Row) -> None:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [tools / "cuobjdump", option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    row.registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    row.spills = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
    loads, stores, matrix = Counter[str](), Counter[str](), Counter[str]()
    for name in re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", code):
        base, *suffixes = name.split(".")
        # Without a width in its name an access is of 32 bits; U8, S16 and the like are narrower.
        width = next(
            (bits for bits in ("128", "64", "U16", "S16", "U8", "S8") if bits in suffixes), "32"
        ).strip("US")
        if base in ("LDG", "LDGSTS"):
            loads[width] += 1
        elif base == "STG":
            stores[width] += 1
        elif base.startswith("UTMALDG"):
            loads["tensor"] += 1
        elif base.startswith("UTMASTG"):
            stores["tensor"] += 1
        elif base in ("LDL", "STL"):
            row.spills += 1
        elif MATRIX.fullmatch(base):
            matrix[base] += 1
    row.loads, row.stores, row.matrix = dict(loads), dict(stores), dict(matrix)


def _amd(compiled: Any, row: Row) -> None:
    code = compiled.asm["amdgcn"]
    row.registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])  # type: ignore[index]
    row.spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1])  # type: ignore[index]
    bits = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32", "ushort": "16", "short": "16"}
    accesses: dict[str, Counter[str]] = {"load": Counter(), "store": Counter()}
    for kind, suffix in re.findall(r"(?:global|buffer|flat)_(load|store)_(\w+)", code):
        accesses[kind][bits.get(suffix, "16" if "16" in suffix else "8" if "byte" in suffix else suffix)] += 1
    row.loads, row.stores = dict(accesses["load"]), dict(accesses["store"])
    row.matrix = dict(Counter(MATRIX.findall(code)))


def _begin(target: str) -> list[str]:
    """Make ``target`` what this process compiles for; the list that launches will be noted in."""
    import triton
    from gradkernels.triton import config, launch

    launched: list[str] = []
    triton.runtime.driver.set_active(null_driver(target, launched))
    launch._compiled.clear()
    config.target_of.cache_clear()
    return launched


def inspect(target: str, which: Sequence[tuple[int, str]]) -> list[Row]:
    """Compile and disassemble specimens (number, dtype) for one target, in this process."""
    from importlib import import_module

    from gradkernels.triton import launch

    launched = _begin(target)
    rows = []
    for number, dtype in which:
        specimen = SPECIMENS[number]
        head = (specimen.op, specimen.shapes, dtype, target)
        launched.clear()
        try:
            specimen.call(import_module(f"gradkernels.triton.{specimen.op}"), getattr(torch, dtype))
        except Exception as error:  # a compiler's failure is a row of the report
            rows.append(Row(*head, kernel="", error=f"{type(error).__name__}: {error}"[:300]))
            continue
        kernels = {compiled.hash: compiled for compiled, _ in launch._compiled.values()}
        for compiled in (kernels[key] for key in dict.fromkeys(launched)):
            metadata = compiled.metadata
            row = Row(*head, metadata.name, specimen.wide, shared=metadata.shared, warps=metadata.num_warps)
            (_nvidia if metadata.target.backend == "cuda" else _amd)(compiled, row)
            rows.append(row)
    return rows


def _compiled_not_interpreted() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def report(targets: Iterable[str], specimens: Iterable[tuple[int, str]], workers: int = 2) -> Iterator[Row]:
    """The rows of all specimens (number, dtype) on all targets, in order, from a pool of processes."""
    which = list(specimens)
    jobs = [
        (target, which[start::workers]) for target in targets for start in range(min(workers, len(which)))
    ]
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_compiled_not_interpreted)
    with pool:
        for rows in pool.map(inspect, *zip(*jobs, strict=True)):
            yield from rows


def every_specimen(op: str = "", dtype: str = "") -> list[tuple[int, str]]:
    """(number, dtype) of the specimens of an op and a dtype; empty strings stand for all."""
    return [
        (number, name)
        for number, specimen in enumerate(SPECIMENS)
        for name in (str(each).removeprefix("torch.") for each in specimen.dtypes)
        if op in ("", specimen.op) and dtype in ("", name)
    ]


def _line(row: Row) -> str:
    head = f"{row.target:7s} {row.op + ': ' + row.shapes:44s} {row.dtype:9s}"
    if row.error:
        return f"{head} FAILED {row.error}"

    def counts(numbers: dict[str, int]) -> str:
        return " ".join(f"{name}x{count}" for name, count in sorted(numbers.items())) or "-"

    return (
        f"{head} {row.kernel:32s} {row.warps:2d} warps {row.registers:3d} registers {row.spills:3d} spilt "
        f"{row.shared:6d} B shared "
        f"| loads {counts(row.loads)} | stores {counts(row.stores)} | {counts(row.matrix)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=__doc__)
    parser.add_argument("--op", default="", help="only this op")
    parser.add_argument("--dtype", default="", help="only this dtype, such as bfloat16")
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; default: all")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args(arguments)
    rows = []
    for row in report(options.target or TARGETS, every_specimen(options.op, options.dtype)):
        print(_line(row), flush=True)
        rows.append(row)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 1 if any(row.error or row.spills for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
