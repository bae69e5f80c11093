"""Whether a backward serves any upstream gradient: zero, each output's left out or scaled, in any layout.

It has to be linear in them, and to read them by their own strides: ``y.sum()`` hands over one number with strides of 0.
"""

from collections.abc import Iterable, Sequence
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
GAP = 3  # elements between two rows


def _spread(value: Tensor, dims: Iterable[int], step: int, place: int) -> Tensor:
    """Return a copy with NaN around its elements.

    Args:
        value: a tensor of floating-point numbers.
        dims: its dimensions, the densest first.
        step: the stride of the densest.
        place: tensors of other places have other gaps.
    """
    strides, size = [0] * value.ndim, step
    for dim in dims:
        strides[dim], size = size, size * max(1, value.shape[dim]) + GAP + place
    return torch.full((size,), float("nan")).to(value).as_strided(value.shape, strides).copy_(value)


def transposed(value: Tensor, place: int) -> Tensor:
    """Return a copy whose first dimension is the densest, as in ``y.T``, with gaps between all elements."""
    return _spread(value, range(value.ndim), 2 + place, place)


def padded(value: Tensor, place: int) -> Tensor:
    """Return a copy whose rows are dense, with gaps between them, as a part of ``torch.cat`` has them."""
    return _spread(value, reversed(range(value.ndim)), 1, place)


LAYOUTS = {"transposed": transposed, "padded": padded}


@dataclass(frozen=True)
class Upstream:
    """The gradients of the checked inputs under other upstream gradients than the check's own.

    Attributes:
        zero: under zero for every output.
        without: per output, under zero for this one.
        scaled: per scale and output, under this one's times the scale.
        elsewhere: per one of LAYOUTS, under the same numbers in such memory; empty where none has several elements.
        refusals: what the function raised there instead.
    """

    zero: list[Tensor | None]
    without: list[list[Tensor | None]]
    scaled: dict[float, list[list[Tensor | None]]]
    elsewhere: dict[str, list[Tensor | None]]
    refusals: dict[str, Exception]

    @staticmethod
    def of(
        function: Function, values: Sequence[Any], cotangents: Sequence[Tensor], only: int | None = None
    ) -> "Upstream":
        """Take the gradients; with ``only``, the other outputs' upstream gradients are zero and stay so."""

        def pulled(scales: Sequence[float]) -> list[Tensor | None]:
            return function.pullback(values, [s * c for s, c in zip(scales, cotangents, strict=True)])

        count = len(cotangents)
        places = range(count) if only is None else [only]

        def one(scale: float) -> list[list[Tensor | None]]:
            return [pulled([scale if i == k else 1.0 for i in range(count)]) for k in places]

        zero = pulled([0.0] * count)
        without = [zero] if len(places) == 1 else one(0.0)
        scaled = {scale: one(scale) for scale in SCALES}
        elsewhere, refusals = {}, {}
        for layout, placed in LAYOUTS.items() if any(c.numel() > 1 for c in cotangents) else ():
            try:
                elsewhere[layout] = function.pullback(
                    values, [placed(c, k) for k, c in enumerate(cotangents)]
                )
            except Exception as error:
                refusals[layout] = error
        return Upstream(zero, without, scaled, elsewhere, refusals)

    @property
    def tried(self) -> str:
        """Say what was tried."""
        text = "upstream gradients of zero, and each output's times -2"
        for layout in LAYOUTS:
            if layout in self.elsewhere:
                text += f", in {layout} memory"
            elif layout in self.refusals:
                text += f", in {layout} memory (refused: {type(self.refusals[layout]).__name__})"
        return text

    def fault(self, position: int, gradient: np.ndarray, allowed: float, relative: float) -> Diagnosis | None:
        """Say how the gradient of a checked input depends on the upstream gradient, if not as it has to.

        Args:
            position: which of the checked inputs.
            gradient: its gradient under the check's own upstream gradient.
            allowed: error of a gradient that is nothing but rounding, in the elements that are differenced.
            relative: that error by the largest element, where sums are added in another order.
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
        for k, alone in enumerate(self.without):
            without = array(alone)
            base = gradient - without
            changes = {scale: array(found[k]) - without for scale, found in self.scaled.items()}
            finite = (scale for scale in SCALES if np.isfinite(changes[scale]).all())
            change = changes[scale := next(finite, SCALES[-1])]
            if not np.abs(change - scale * base).max() <= 4 * allowed:  # NaN too
                which = f" of output {k}" if len(self.without) > 1 else ""
                return _nonlinear(base, change, scale, which, 4 * allowed)
        near = 4 * (allowed + relative * np.abs(gradient).max())
        for layout, found in self.elsewhere.items():
            if not np.abs(array(found) - gradient).max() <= near:  # NaN too
                return Diagnosis(
                    STRIDES,
                    f"the same grad_output in {layout} memory gives another gradient: the backward takes it for "
                    f"contiguous; y.sum(), y.T and torch.cat hand over others, grad_output.contiguous() makes it so",
                )
        return None


def _nonlinear(base: np.ndarray, change: np.ndarray, scale: float, which: str, allowed: float) -> Diagnosis:
    """Name the fault of a gradient that is ``base`` for an upstream gradient and ``change`` for ``scale`` times it."""
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
