"""Whether a backward is linear in its upstream gradient: zero, each output's left out, each output's scaled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ...checks import in_float64
from .function import Function
from .report import Diagnosis

# Powers of two, so that nothing rounds. The second serves where the first overflows.
SCALES = (-2.0, -0.5)
IGNORED = "not multiplied by grad_output"


@dataclass(frozen=True)
class Upstream:
    """The gradients of the checked inputs under other upstream gradients than the check's own.

    Attributes:
        zero: under zero for every output.
        without: per output, under zero for this one.
        scaled: per scale and output, under this one's times the scale.
    """

    zero: list[Tensor | None]
    without: list[list[Tensor | None]]
    scaled: dict[float, list[list[Tensor | None]]]

    @staticmethod
    def of(function: Function, values: Sequence[Any], cotangents: Sequence[Tensor]) -> "Upstream":
        def pulled(scales: Sequence[float]) -> list[Tensor | None]:
            return function.pullback(values, [s * c for s, c in zip(scales, cotangents, strict=True)])

        count = len(cotangents)

        def one(scale: float) -> list[list[Tensor | None]]:
            return [pulled([scale if i == k else 1.0 for i in range(count)]) for k in range(count)]

        zero = pulled([0.0] * count)
        return Upstream(zero, [zero] if count == 1 else one(0.0), {scale: one(scale) for scale in SCALES})

    def fault(self, position: int, gradient: np.ndarray, allowed: float) -> Diagnosis | None:
        """How the gradient of a checked input depends on the upstream gradient, if not linearly.

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
