"""Whether a backward serves any upstream gradient: zero, each output's left out or scaled, strided ones.

It has to be linear in them, and to read them by their own strides: ``y.sum()`` hands over one number with strides of 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import in_float64
from .function import Function
from .report import Diagnosis

# Powers of two, so that nothing rounds. The second serves where the first overflows.
SCALES = (-2.0, -0.5)
IGNORED = "not multiplied by grad_output"
STRIDES = "strides of grad_output"
GAP = 3  # elements after each row of a strided tensor


def strided(value: Tensor, place: int = 0) -> Tensor:
    """Return a copy with gaps in every dimension, of NaN, so that no two strides are those of a dense tensor.

    Args:
        value: a tensor of floating-point numbers.
        place: tensors of other places get other gaps.
    """
    if not value.ndim:
        return value.clone()
    *outer, last = value.shape
    step, gap = 2 + place, GAP + place
    memory = torch.full([*(size + gap for size in outer), step * last], float("nan")).to(value)
    memory = memory[..., ::step]
    for dim, size in enumerate(outer):
        memory = memory.narrow(dim, 0, size)
    return memory.copy_(value)


@dataclass(frozen=True)
class Upstream:
    """The gradients of the checked inputs under other upstream gradients than the check's own.

    Attributes:
        zero: under zero for every output.
        without: per output, under zero for this one.
        scaled: per scale and output, under this one's times the scale.
        strided: under the same numbers in other memory; empty where none has several elements.
        refusal: what the function raised there, in which case there is nothing to compare.
    """

    zero: list[Tensor | None]
    without: list[list[Tensor | None]]
    scaled: dict[float, list[list[Tensor | None]]]
    strided: list[Tensor | None]
    refusal: Exception | None

    @staticmethod
    def of(function: Function, values: Sequence[Any], cotangents: Sequence[Tensor]) -> "Upstream":
        def pulled(scales: Sequence[float]) -> list[Tensor | None]:
            return function.pullback(values, [s * c for s, c in zip(scales, cotangents, strict=True)])

        count = len(cotangents)

        def one(scale: float) -> list[list[Tensor | None]]:
            return [pulled([scale if i == k else 1.0 for i in range(count)]) for k in range(count)]

        zero = pulled([0.0] * count)
        without = [zero] if count == 1 else one(0.0)
        scaled = {scale: one(scale) for scale in SCALES}
        elsewhere: list[Tensor | None] = []
        refusal = None
        if any(cotangent.numel() > 1 for cotangent in cotangents):
            try:
                elsewhere = function.pullback(
                    values, [strided(c, place) for place, c in enumerate(cotangents)]
                )
            except Exception as error:
                refusal = error
        return Upstream(zero, without, scaled, elsewhere, refusal)

    def fault(self, position: int, gradient: np.ndarray, allowed: float) -> Diagnosis | None:
        """How the gradient of a checked input depends on the upstream gradient, if not as it has to.

        Args:
            position: which of the checked inputs.
            gradient: its gradient under the check's own upstream gradient.
            allowed: error of a gradient that is nothing but rounding.
        """
        if not gradient.size or not np.isfinite(gradient).all():
            return None

        def array(found: list[Tensor | None]) -> np.ndarray:
            tensor = found[position]
            return np.zeros_like(gradient) if tensor is None else in_float64(tensor).numpy()

        zero = array(self.zero)
        if zero.any():  # NaN too
            worst = np.unravel_index(int(np.argmax(np.abs(zero))), zero.shape)
            ignored = [k for k, found in enumerate(self.without) if np.array_equal(array(found), gradient)]
            which = f" of output {', '.join(map(str, ignored))}" if ignored and len(self.without) > 1 else ""
            return Diagnosis(
                IGNORED,
                f"for an upstream gradient of zero the backward gives {zero[worst]:.4g} at "
                f"{[int(c) for c in worst]}, not 0: the gradient is not multiplied by grad_output{which}",
            )
        if not np.isfinite(allowed):  # the differences failed, and say so
            return None
        for k, found in enumerate(self.without):
            without = array(found)
            base = gradient - without
            for scale, scaled in self.scaled.items():
                change = array(scaled[k]) - without
                if np.abs(change - scale * base).max() <= 4 * allowed:
                    break
            else:
                which = f" of output {k}" if len(self.without) > 1 else ""
                return _nonlinear(base, change, scale, which, 4 * allowed)
        if self.strided and not np.abs(array(self.strided) - gradient).max() <= 4 * allowed:
            return Diagnosis(
                STRIDES,
                "the same grad_output in strided memory gives another gradient: the backward reads it by other strides "
                "than its own; y.sum() and y.T hand over such memory, grad_output.contiguous() makes it dense",
            )
        return None


def _nonlinear(base: np.ndarray, change: np.ndarray, scale: float, which: str, allowed: float) -> Diagnosis:
    """The fault of a gradient that is ``base`` for an upstream gradient and ``change`` for ``scale`` times it."""
    power = min((0, 1, 2), key=lambda power: np.abs(change - abs(scale) ** power * base).max())
    if np.abs(change - abs(scale) ** power * base).max() > allowed:
        text = f"{scale:g} times grad_output{which} does not give {scale:g} times the gradient"
    elif power == 0:
        text = f"{scale:g} times grad_output{which} gives the same gradient: it is not multiplied by it"
        return Diagnosis(IGNORED, text)
    else:
        words = "its absolute value" if power == 1 else "its square"
        text = f"not grad_output{which} enters the gradient, but {words}"
    return Diagnosis("not linear in grad_output", text)
