"""Measure how time grows with one size while the others stay.

The model is ``time = fixed + c * size ** p``. ``fixed`` is what a call costs whatever its size (launch,
checks): the least time measured. The knee is the size at which a call takes twice that: beyond it the launch no
longer dominates. The exponent ``p`` is the slope of ``time - fixed`` beyond the knee, in logarithms.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .case import Op, dtype_name
from .results import microseconds, outcome
from .runner import Runner

LONGEST_US = 5e5  # no further point once a call takes so long
LEAST = 4  # points of a sweep that is drawn


def fit(sizes: Sequence[float], times_us: Sequence[float]) -> dict[str, float | None]:
    """Fit fixed cost, knee and exponent; knee and exponent are None if too few sizes lie beyond the knee.

    ``c`` is in microseconds, and ``relative_error`` the largest of the fit beyond the knee.
    """
    n, t = np.asarray(sizes, dtype=float), np.asarray(times_us, dtype=float)
    fixed = float(t.min())
    found: dict[str, float | None] = {"fixed_us": fixed, "knee": None, "exponent": None, "c": None}
    dominated = np.flatnonzero(t <= 2 * fixed)[-1]
    if dominated > len(n) - 4:  # a slope takes three sizes
        return found
    beyond = slice(dominated + 1, None)
    knee = np.interp(
        np.log(2 * fixed), np.log(t[dominated : dominated + 2]), np.log(n[dominated : dominated + 2])
    )
    exponent, intercept = np.polyfit(np.log(n[beyond]), np.log(t[beyond] - fixed), 1)
    model = fixed + np.exp(intercept) * n[beyond] ** exponent
    return {
        "fixed_us": fixed,
        "knee": float(np.exp(knee)),
        "exponent": round(float(exponent), 2),
        "c": float(np.exp(intercept)),
        "relative_error": float(np.abs(model / t[beyond] - 1).max()),
    }


def study(
    op: Op, runner: Runner, dtype: torch.dtype, next_is: Callable[[str], bool] = lambda name: True
) -> Iterator[dict[str, Any]]:
    """Yield the sweeps of an op that ``next_is`` admits by name, on its first variant: ours and plain torch.

    One that stopped before so many points as ``LEAST`` has no fit.
    """
    for sweep in op.sweep(runner.device.type):
        position = op.axes.index(sweep.axis)
        points: list[dict[str, float]] = []
        stopped = ""
        if not next_is(f"{op.name} over {sweep.axis}"):
            continue
        for value in sweep.values:
            shape = (*sweep.base[:position], value, *sweep.base[position + 1 :])
            case = next(iter(op.build(shape, dtype)))
            record = runner.case(case, implementations=2)
            found = outcome(record)
            if found["status"] != "ok":
                stopped = f"{found['status']} at {sweep.axis} = {value}: {found['note']}"
                break
            ours, plain = (
                microseconds(outcome(record, each.name), "call") for each in case.implementations[:2]
            )
            points.append({"value": value, "ours_us": ours, "torch_us": plain})
            if max(ours, plain) > LONGEST_US:
                break
        enough = len(points) >= LEAST
        if not (enough or stopped):
            continue
        values = [point["value"] for point in points]
        yield {
            "op": op.name,
            "variant": case.variant,
            "dtype": dtype_name(dtype),
            "axis": sweep.axis,
            "base": dict(zip(op.axes, sweep.base, strict=True)),
            "points": points,
            "stopped": stopped,
            **{
                who: fit(values, [point[f"{who}_us"] for point in points]) if enough else None
                for who in ("ours", "torch")
            },
        }
