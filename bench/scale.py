"""How time grows with one size while the others stay.

The model is ``time = fixed + c * size ** p``. ``fixed`` is what a call costs whatever its size (launch,
checks); the knee is the size at which the two parts are equal: beyond it the launch no longer dominates.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .case import Op, dtype_name
from .results import microseconds, outcome
from .runner import Runner

LONGEST_US = 5e5  # no further point once a call takes so long


def fit(sizes: Sequence[float], times_us: Sequence[float]) -> dict[str, float | None]:
    """The curve with the least relative error: its exponent, fixed part, growing part at the last size, knee.

    The exponent is searched; for each, ``fixed`` and ``c`` follow from least squares and are kept from being
    negative. The knee is None where the largest size does not reach it.
    """
    n, t = np.asarray(sizes, dtype=float), np.asarray(times_us, dtype=float)
    best = (np.inf, 1.0, 0.0, 0.0)
    for p in np.arange(0.3, 3.2, 0.01):
        terms = np.stack([np.ones_like(n), (n / n[-1]) ** p]) / t  # relative errors
        (fixed, slope), *_ = np.linalg.lstsq(terms.T, np.ones_like(t), rcond=None)
        if fixed < 0 or slope < 0:
            only = 0 if slope < 0 else 1
            scale = terms[only].sum() / (terms[only] ** 2).sum()
            fixed, slope = (scale, 0.0) if only == 0 else (0.0, scale)
        error = float(np.square(fixed * terms[0] + slope * terms[1] - 1).sum())
        if error < best[0]:
            best = (error, float(p), float(fixed), float(slope))
    error, exponent, fixed, slope = best
    knee = n[-1] * (fixed / slope) ** (1 / exponent) if slope > 0 else np.inf
    return {
        "exponent": round(exponent, 2),
        "fixed_us": fixed,
        "slope_us": slope,
        "knee": float(knee) if knee <= n[-1] else None,
        "relative_error": float(np.sqrt(error / len(n))),
    }


def study(
    op: Op, runner: Runner, dtype: torch.dtype, progress: Callable[[str], None] = lambda name: None
) -> Iterator[dict[str, Any]]:
    """The sweeps of an op, on its first variant: ours and plain torch."""
    for sweep in op.sweep(runner.device.type):
        position = op.axes.index(sweep.axis)
        points: list[dict[str, float]] = []
        stopped = ""
        progress(f"{op.name} over {sweep.axis}")
        for value in sweep.values:
            shape = (*sweep.base[:position], value, *sweep.base[position + 1 :])
            case = next(iter(op.build(shape, dtype)))
            record = runner.case(case, contenders=2)
            found = outcome(record)
            if found["status"] != "ok":
                stopped = f"{found['status']} at {sweep.axis} = {value}: {found['note']}"
                break
            ours, plain = (microseconds(outcome(record, each.name), "call") for each in case.contenders[:2])
            points.append({"value": value, "ours_us": ours, "torch_us": plain})
            if max(ours, plain) > LONGEST_US:
                break
        if len(points) < 4:
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
            "ours": fit(values, [point["ours_us"] for point in points]),
            "torch": fit(values, [point["torch_us"] for point in points]),
        }
