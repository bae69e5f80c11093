"""Compile every kernel for several GPUs, on a machine without one, and disassemble it: ``python -m bench aot``.

Each case calls an op's own launchers under a driver that compiles for the wanted chip and launches nothing.
What was compiled is then disassembled: registers, spills, shared memory, the widths of global loads and stores,
the matrix instructions.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch
from gradkernels.ops import OPS
from gradkernels.triton.compile_only import CHIPS, disassembly, null_driver, usage

from ..throughput.case import dtype_name
from ..throughput.results import claimed, write_json
from .cases import AotCase

AOT_CASES: tuple[AotCase, ...] = tuple(
    case for name in OPS for case in import_module(f"..bench_{name}", __package__).AOT_CASES
)
MATRIX = re.compile(r"HGMMA|QGMMA|HMMA|DMMA|UTC\w*MMA|v_mfma\w*")


@dataclass
class Row:
    """One compiled kernel.

    Attributes:
        registers: per thread. spills: bytes of stack or loads and stores of it, per thread.
        shared: bytes of shared memory per program.
        wide_loads, wide_stores: whether shapes and addresses allow 128 bits at a time.
        loads, stores: how many instructions access global memory, by bits each; "tensor" copies whole tiles.
        matrix: how many matrix instructions there are, by name.
    """

    op: str
    shapes: str
    dtype: str
    target: str
    kernel: str
    wide_loads: bool = False
    wide_stores: bool = False
    registers: int = 0
    spills: int = 0
    shared: int = 0
    warps: int = 0
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    matrix: dict[str, int] = field(default_factory=dict)
    error: str = ""


def _nvidia(compiled: Any, row: Row) -> None:
    row.registers, row.spills = usage(compiled)
    code = disassembly(compiled, "--dump-sass")
    loads, stores, matrix = Counter[str](), Counter[str](), Counter[str]()
    for name in re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)", code):
        base, *suffixes = name.split(".")
        # An access without a width in its name has 32 bits; U8, S16 and the like are narrower.
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
    row.registers, row.spills = usage(compiled)
    bits = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32", "ushort": "16", "short": "16"}
    accesses: dict[str, Counter[str]] = {"load": Counter(), "store": Counter()}
    for kind, suffix in re.findall(r"(?:global|buffer|flat)_(load|store)_(\w+)", code):
        accesses[kind][bits.get(suffix, "16" if "16" in suffix else "8" if "byte" in suffix else suffix)] += 1
    row.loads, row.stores = dict(accesses["load"]), dict(accesses["store"])
    row.matrix = dict(Counter(MATRIX.findall(code)))


def fill(compiled: Any, row: Row) -> None:
    """Enter what a kernel compiled to."""
    (_nvidia if compiled.metadata.target.backend == "cuda" else _amd)(compiled, row)


def inspect(target: str, which: Sequence[tuple[int, str]]) -> list[Row]:
    """Compile and disassemble cases (number, dtype) for one target, the only one of this process."""
    import triton
    from gradkernels.triton import launch

    launched: list[str] = []
    triton.runtime.driver.set_active(null_driver(target, launched))
    rows = []
    for number, dtype in which:
        case = AOT_CASES[number]
        head = (case.op, case.shapes, dtype, target)
        launched.clear()
        try:
            case.call(import_module(f"gradkernels.triton.{case.op}"), getattr(torch, dtype))
        except Exception as error:  # a compiler's failure is a row of the report
            rows.append(Row(*head, kernel="", error=f"{type(error).__name__}: {str(error)[-400:]}"))
            continue
        kernels = {compiled.hash: compiled for compiled, _ in launch._compiled.values()}
        for place, compiled in enumerate(kernels[key] for key in dict.fromkeys(launched)):
            metadata = compiled.metadata
            wide = (case.loads and place == 0, case.stores and place == 0)
            row = Row(*head, metadata.name, *wide, shared=metadata.shared, warps=metadata.num_warps)
            fill(compiled, row)
            rows.append(row)
    return rows


def _job(job: tuple[str, list[tuple[int, str]]]) -> list[Row]:
    os.environ.pop("TRITON_INTERPRET", None)
    return inspect(*job)


def report(targets: Sequence[str], cases: Iterable[tuple[int, str]], workers: int = 2) -> Iterator[Row]:
    """Yield the rows of all cases (number, dtype) on all targets.

    Each target has a process of its own: plans are cached, and must not be taken for another chip.
    """
    which = list(cases)
    if not which:
        return
    parts = min(workers, len(which)) if len(targets) < workers else 1
    jobs = [(target, which[start::parts]) for target in targets for start in range(parts)]
    with get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        for rows in pool.imap(_job, jobs, chunksize=1):
            yield from rows


def every_case(op: str = "", dtype: str = "") -> list[tuple[int, str]]:
    """Return (number, dtype) of the cases of an op and a dtype; an empty string means all."""
    return [
        (number, name)
        for number, case in enumerate(AOT_CASES)
        for name in map(dtype_name, case.dtypes)
        if op in ("", case.op) and dtype in ("", name)
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
    parser.add_argument("--target", action="append", choices=CHIPS, help="may be repeated; default: all")
    parser.add_argument("--json", type=claimed, metavar="FILE", help="write the rows here too")
    parser.add_argument(
        "--predict",
        action="store_true",
        help="instead: what the cases of `python -m bench --quick` would take on an H200, by Little's law",
    )
    parser.add_argument(
        "--shape", action="append", metavar="AxB", help="with --predict and --op: the sizes of the op's axes"
    )
    options = parser.parse_args(arguments)
    if options.shape and not (options.predict and options.op):
        parser.error("--shape goes with --predict and --op")
    if options.predict:
        from . import predict

        try:
            return predict.main(options.op, options.dtype, options.shape or ())
        except ValueError as error:  # an op, a dtype or a shape that there is not
            parser.error(str(error))
    cases = every_case(options.op, options.dtype)
    if not cases:
        ops = ", ".join(dict.fromkeys(case.op for case in AOT_CASES))
        parser.error(f"no case of --op {options.op!r} --dtype {options.dtype!r}; the ops are {ops}")
    rows = []
    for row in report(options.target or list(CHIPS), cases):
        print(_line(row), flush=True)
        rows.append(row)
    if options.json:
        write_json([asdict(row) for row in rows], options.json)
    return 1 if any(row.error or row.spills for row in rows) else 0
