"""Measure how time grows with one size while the others stay.

The model is ``time = fixed + c * size ** p``. ``fixed`` is what a call costs whatever its size (launch,
checks): the least time measured. The knee is the size at which a call takes twice that: beyond it the launch no
longer dominates. The exponent ``p`` is the slope of ``time - fixed`` beyond the knee, in logarithms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .case import Op, Sweep, dtype_name
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


def name_of(op: Op, sweep: Sweep) -> str:
    return f"{op.name} over {sweep.axis}"


def study(
    op: Op, sweep: Sweep, runner: Runner, dtype: torch.dtype, lost: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return a sweep of an op's first variant, ours and plain torch; of fewer points than ``LEAST`` there is no fit.

    ``lost`` says why it is not measured.
    """
    position = op.axes.index(sweep.axis)
    points: list[dict[str, float]] = []
    stopped = "; ".join(f"failed: {reason}" for reason in (lost or {}).values())
    for value in () if stopped else sweep.values:
        shape = (*sweep.base[:position], value, *sweep.base[position + 1 :])
        case = next(iter(op.build(shape, dtype)))
        record = runner.case(replace(case, implementations=case.implementations[:2]))
        found = outcome(record)
        if found["status"] != "ok":
            stopped = f"{found['status']} at {sweep.axis} = {value}: {found['note']}"
            break
        ours, plain = (microseconds(outcome(record, each.name), "call") for each in case.implementations[:2])
        points.append({"value": value, "ours_us": ours, "torch_us": plain})
        if max(ours, plain) > LONGEST_US:
            break
    values = [point["value"] for point in points]
    fits = {
        who: fit(values, [point[f"{who}_us"] for point in points]) if len(points) >= LEAST else None
        for who in ("ours", "torch")
    }
    return {
        "op": op.name,
        "variant": next(iter(op.build(sweep.base, dtype))).variant,
        "dtype": dtype_name(dtype),
        "axis": sweep.axis,
        "base": dict(zip(op.axes, sweep.base, strict=True)),
        "points": points,
        "stopped": stopped,
        **fits,
    }
