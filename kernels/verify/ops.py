"""The check of our own ops, on every backend, dtype and shape: against NumPy and finite differences."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..backends import backend_for, use_backend
from ..checks import DTYPES
from ..ops import OPS, Call, Function
from .cases import Case, build
from .console import progress, to_json
from .gradient import gradcheck
from .memory import memory_check
from .memory.report import MemoryFaultError
from .tolerance import DRAWS, compare

BACKENDS = ("triton", "fallback")


@dataclass(frozen=True)
class Verdict:
    """The verdict on one case.

    Attributes:
        op, backend, device, dtype, shape: the case.
        passed: whether every result is within the tolerance policy and the gradient check passed.
        worst: the largest ratio of an error to its budget among the results (<= 1 passes); nan if it did not run.
        detail: the name of the worst result, or what went wrong.
        call: the arguments of a call that sizes do not describe; empty otherwise.
    """

    op: str
    backend: str
    device: str
    dtype: str
    shape: tuple[int, ...]
    passed: bool
    worst: float
    detail: str
    call: str = ""


@dataclass(frozen=True)
class KernelReport:
    """The result of ``kernels``: true if every verdict is.

    Attributes:
        verdicts: one verdict per op, backend, dtype and shape or call.
        skipped: the backends and dtypes that did not run here, and why.
    """

    verdicts: tuple[Verdict, ...]
    skipped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table: one row per op, backend and dtype, with the worst of its cases."""
        rows: list[tuple[str, ...]] = []
        keys = dict.fromkeys((v.op, v.backend, v.device, v.dtype) for v in self.verdicts)
        for key in keys:
            group = [v for v in self.verdicts if (v.op, v.backend, v.device, v.dtype) == key]
            worst = max(group, key=lambda v: (not v.passed, v.worst))
            where = worst.call or "x".join(map(str, worst.shape))
            failed = sum(not v.passed for v in group)
            verdict = "ok" if not failed else f"FAILED ({failed} of {len(group)} cases)"
            detail = f"{where}: {worst.detail}" if where else worst.detail
            rows.append((*key, str(len(group)), f"{worst.worst:.3f}", detail, verdict))
        return rows

    def to_json(self) -> str:
        """Return the report as JSON."""
        return to_json({"passed": bool(self), **asdict(self)})


class Operators(TorchDispatchMode):
    """Leaves each call as it is; while any mode is active, an op on the fallback goes by our kernels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


HEADER = ("op", "backend", "device", "dtype", "cases", "error / budget", "worst", "verdict")


@torch.inference_mode(False)  # whatever block the caller is in
@torch.enable_grad()
def kernels(
    ops: Sequence[str] | None = None,
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    backends: Sequence[str] = BACKENDS,
    device: str | None = None,
) -> KernelReport:
    """Check the ops of this package against their NumPy references, on this machine.

    Every result (value, gradients under a random upstream gradient, optimizer state after 3 steps) has to be within
    the tolerance policy: ``error <= 2 * torch's error + 4 * eps * max |reference|``. Small float64 cases also pass the
    gradient check. Interpreted kernels run under the memory checker. On the fallback, which leaves small calls to
    torch's own ops, each case is computed by these and by our kernels.

    Args:
        ops: names of ``gradkernels.ops.OPS``: ``"matmul"``, ``"mse"``, ...; all by default.
        shapes: sizes instead of the built-in ones, for a single op: ``(N, D, K)`` for linear_mse, ``(B, N, D, K)`` for
            linear_mse_models and linear_mse_fit, ``([B,] M, K, N)`` for matmul, any for the others.
        dtypes: the dtypes; float64, float32, float16 and bfloat16 by default.
        backends: some of ``"triton"``, ``"fallback"``, ``"reference"``.
        device: ``"cuda"``, ``"mps"``, ``"cpu"``, ...; by default the accelerator if there is one, else the CPU.

    Returns:
        A ``KernelReport``: true if everything passed. ``rows()`` is the table, ``to_json()`` has every case.

    Raises:
        ValueError: an op is unknown, or a shape does not fit it.

    Example:
        >>> kernels(["linear_mse"], shapes=[(4096, 512, 1)], dtypes=[torch.bfloat16]).rows()
    """
    chosen = tuple(ops or OPS)
    if shapes is not None and len(chosen) != 1:
        raise ValueError("shapes: name the one op that they are for")
    device = device or _accelerator()
    wanted = tuple(dtypes or DTYPES)
    if device == "mps":
        wanted = tuple(dtype for dtype in wanted if dtype != torch.float64)
    verdicts: list[Verdict] = []
    skipped: list[str] = [] if len(wanted) == len(tuple(dtypes or DTYPES)) else ["float64: MPS has none"]
    # Every case is built before the first runs: a shape that does not fit is an error at once.
    cases = [
        build(op, shape, dtype, device)
        for op, dtype in itertools.product(chosen, wanted)
        for shape in shapes or _tried(op)
    ]
    for backend in backends:
        if backend == "triton" and (problem := _problem(device)) is not None:
            if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
                child = _in_child(chosen, shapes, wanted)
                verdicts += child.verdicts
                skipped += child.skipped
            else:
                skipped.append(f"triton: {problem}")
            continue
        for case in progress(cases, f"{backend} on {device}"):
            verdicts.append(_verdict(case, backend, device))
    return KernelReport(tuple(verdicts), tuple(skipped))


def _tried(op: str) -> tuple[tuple[int, ...] | Call, ...]:
    """Return the sizes and the calls of its record; where there is none, a case of no sizes, to be refused."""
    record = OPS.get(op)
    if record is None:
        return ((),)
    return (*record.samples, *(record.calls if isinstance(record, Function) else ()))


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"


def _problem(device: str) -> str | None:
    """Return why Triton does not serve this device; None if it does."""
    with use_backend("triton"):
        try:
            backend_for(torch.empty(0, device=device))
        except RuntimeError as error:
            return str(error).partition(": ")[2]
    return None


def _in_child(
    ops: Iterable[str], shapes: Sequence[tuple[int, ...]] | None, dtypes: Iterable[torch.dtype]
) -> KernelReport:
    """Run the triton cases in a process whose interpreter is on from the start."""
    command = [sys.executable, "-m", __name__.partition(".")[0], "verify", "--json", "--device", "cpu"]
    command += ["--backend", "triton", *(f"--op={op}" for op in ops)]
    command += [f"--dtype={_name(dtype)}" for dtype in dtypes]
    command += [f"--shape={'x'.join(map(str, shape))}" for shape in shapes or ()]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    try:
        data = json.loads(done.stdout)
    except json.JSONDecodeError:
        how = f"status {done.returncode}" if done.returncode >= 0 else f"signal {-done.returncode}"
        died = f"the child process with the interpreter ended by {how}, without a report"
        lost = itertools.product(ops, map(_name, dtypes))
        nan = float("nan")
        return KernelReport(tuple(Verdict(op, "triton", "cpu", d, (), False, nan, died) for op, d in lost))
    verdicts = [
        Verdict(**{**v, "shape": tuple(v["shape"]), "worst": float(v["worst"])}) for v in data["verdicts"]
    ]
    return KernelReport(tuple(verdicts), tuple(data["skipped"]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _verdict(case: Case, backend: str, device: str) -> Verdict:
    worst, detail, passed = float("nan"), "", True
    watched = memory_check() if backend == "triton" and device == "cpu" else nullcontext()
    try:
        # On the fallback small calls are torch's own ops: each case goes by these and by our kernels.
        for way in (nullcontext(), Operators()) if backend == "fallback" else (watched,):
            with use_backend(backend), way:
                draws, ours = [case], [case.ours()]
                # The tolerance policy asks for several draws of results with few elements.
                if min(value.numel() for value in ours[0].values()) < DRAWS:
                    draws += [build(case.op, case.what, case.dtype, device, draw) for draw in range(1, DRAWS)]
                    ours += [other.ours() for other in draws[1:]]
                # The mean of no elements is NaN, like torch's, and has no gradient to check.
                taken = case.slopes if "output" not in ours[0] or ours[0]["output"].isfinite().all() else None
                slopes = gradcheck(*taken) if taken is not None else None
            for name, error, within in _errors(draws, ours):
                passed = passed and within
                if not worst >= error:
                    worst, detail = error, name
            if slopes is not None and not slopes:
                passed, detail = False, str(slopes).replace("\n", " ")
            if not passed:
                break
    except MemoryFaultError as error:
        passed, detail = False, str(error.report.faults[0])
    except Exception as error:  # a kernel that cannot run is a verdict, not the end of the table
        passed, detail = False, f"{type(error).__name__}: {error}"
    named = _name(case.dtype)
    if isinstance(case.what, Call):
        shape = next(iter(case.what.shapes.values()))
        return Verdict(case.op, backend, device, named, shape, passed, worst, detail, str(case.what))
    return Verdict(case.op, backend, device, named, case.what, passed, worst, detail)


def _errors(draws: list[Case], ours: list[dict[str, Any]]) -> Iterator[tuple[str, float, bool]]:
    theirs, references = [case.torch() for case in draws], [case.reference() for case in draws]
    for name in references[0]:
        mine, torchs = (torch.stack([result[name] for result in results]) for results in (ours, theirs))
        comparison = compare(mine, torchs, np.stack([reference[name] for reference in references]))
        ratio = comparison.error / comparison.budget if comparison.budget else float(comparison.error > 0)
        yield name, ratio, comparison.passed
