"""The tolerance policy: how far from the NumPy reference a result may be.

    err(ours) <= 2 * err(torch, same dtype and flags) + 4 * eps(dtype) * max |reference|

Both errors are max norms against the reference. With a ``scale`` they are divided by it element by element, and
``max |reference|`` is 1: each element then counts on its own scale. Where torch's result is not finite, ours must equal
it: the same infinities, NaN where it has NaN. A NaN of ours anywhere else fails.

A max norm over one or a few numbers measures luck: torch's error is 0 where its roundings happened to cancel, and the
reference is close to 0 where the terms did. Such a result is drawn ``DRAWS`` times, with other random numbers in the
same shapes, layouts and flags, and all draws are compared as one result with that many times the elements: the formula
above, with each norm over all draws. The number of draws is fixed beforehand, every draw counts, and none is repeated.
A float32 sum of 33 random products, added in order, fails 270 times in 10,000 beside a pairwise sum when drawn once,
and 3 times when drawn four times; a result that is wrong in one draw stays as wrong as before.

The reference has to be more exact than the results that it judges. For results in float64 it is evaluated in
``np.longdouble`` (``exactly``), which is wider on x86: in float64 it would itself be rounded, and torch's error would
be 0 wherever both add in the same order.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import in_float64

DRAWS = 4


@dataclass(frozen=True)
class Comparison:
    """A comparison of one result with the reference and with torch's result.

    Attributes:
        error: max |ours - reference| over the elements where torch is finite.
        torch_error: max |torch - reference| over the same elements.
        budget: the largest ``error`` that passes.
        passed: whether the error is within the budget and non-finite elements agree.
        note: a further difference, for the message; empty if there is none.
    """

    error: float
    torch_error: float
    budget: float
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        verdict = "within" if self.passed else "OVER"
        text = (
            f"error {self.error:.3e}, torch's {self.torch_error:.3e}: {verdict} the budget {self.budget:.3e}"
        )
        return f"{text}; {self.note}" if self.note else text


def exactly(tensor: Tensor) -> np.ndarray:
    """Return the values as input for a reference: in float64, or wider if they are float64 themselves."""
    values = in_float64(tensor).numpy()
    return values.astype(np.longdouble) if tensor.dtype == torch.float64 else values


def compare(
    ours: Tensor,
    theirs: Tensor,
    reference: np.ndarray,
    scale: np.ndarray | None = None,
    *,
    sampled: float = 0.0,
) -> Comparison:
    """Compare ``ours`` with the ``reference``, with the error of torch's own result as the baseline.

    Args:
        ours: the result under test, in the dtype whose machine epsilon counts; several draws stacked.
        theirs: torch's result by its plain path, in the same dtype and under the same flags.
        reference: the NumPy result in float64 or wider, of the same shape.
        scale: the unit of each element's error, of the same shape. It is at least the dtype's smallest normal number,
            below which precision is absolute.
        sampled: torch's largest error in samples taken elsewhere; the larger one of both counts.
    """
    reference = np.asarray(reference)
    for name, tensor in (("torch's", theirs), ("reference's", reference)):
        if tuple(ours.shape) != tuple(tensor.shape):
            note = f"shape {tuple(ours.shape)}, {name} is {tuple(tensor.shape)}"
            return Comparison(float("nan"), float("nan"), 0.0, False, note)
    if ours.dtype != theirs.dtype:
        return Comparison(
            float("nan"), float("nan"), 0.0, False, f"dtype {ours.dtype}, torch's {theirs.dtype}"
        )
    mine, other = exactly(ours), exactly(theirs)
    if scale is not None:
        unit = np.maximum(scale, torch.finfo(ours.dtype).smallest_normal)
        mine, other, reference = mine / unit, other / unit, reference / unit
    finite = np.isfinite(other) & np.isfinite(reference)
    note = (
        "" if np.array_equal(mine[~finite], other[~finite], equal_nan=True) else "non-finite elements differ"
    )
    if not finite.any():
        return Comparison(0.0, 0.0, 0.0, not note, note)
    error = float(np.abs(mine[finite] - reference[finite]).max())
    torch_error = max(sampled, float(np.abs(other[finite] - reference[finite]).max()))
    size = 1.0 if scale is not None else float(np.abs(reference[finite]).max())
    budget = 2 * torch_error + 4 * torch.finfo(ours.dtype).eps * size
    return Comparison(error, torch_error, budget, error <= budget and not note, note)
