"""An input whose gradient is wrong, and the experiments that a diagnosis may make with it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import in_float64
from .function import Function, is_real, slopes
from .mistakes import Mistake
from .report import Diagnosis
from .tape import NotRecordedError, Tape


@dataclass(frozen=True)
class Point:
    """The analytic and the numerical gradient of one input at one point.

    Attributes:
        values: all values of the function there, in their own dtypes.
        full: the analytic gradient.
        elements: the flat indices of the elements that were differenced.
        analytic, numerical: both gradients at these elements.
        cotangents: the upstream gradients.
    """

    values: list[Any]
    full: np.ndarray
    elements: np.ndarray
    analytic: np.ndarray
    numerical: np.ndarray
    cotangents: list[Tensor]


@dataclass
class Suspect:
    """An input whose gradient is wrong, and the means to look closer.

    Attributes:
        function: the function under test.
        position: the place of the input among the checked inputs.
        values: the point as the differences saw it.
        here: the same point in the inputs' own dtypes, as the analytic gradient saw it, with both gradients.
        step: the difference step.
        eps: that of the dtype which the function computes in.
        tolerance: that of the check, per element.
        slack: the relative error up to which two gradients count as equal.
        absent: whether the analytic gradient is None.
    """

    function: Function
    position: int
    values: list[Any]
    here: Point
    step: float
    eps: float
    tolerance: np.ndarray
    slack: float
    absent: bool

    @property
    def index(self) -> int:
        return self.function.checked[self.position]

    @property
    def name(self) -> str:
        return self.function.names[self.index]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.here.full.shape

    @property
    def failing(self) -> np.ndarray:
        return ~(np.abs(self.here.analytic - self.here.numerical) <= self.tolerance)

    def slopes(self, which: np.ndarray, step: float, one_sided: int = 0) -> np.ndarray:
        """Take the differences at some of the elements again, with another step."""
        weights, elements = weights_of(self.here.cotangents), self.here.elements[which]
        return slopes(self.function, self.values, self.index, elements, weights, step, one_sided)[0].sum(0)

    def equal(self, left: np.ndarray, right: np.ndarray) -> bool:
        """Return whether two gradients agree, relative to the larger of them, and are not just zero."""
        scale = max(np.abs(left).max(initial=0.0), np.abs(right).max(initial=0.0))
        return bool(scale > 0 and np.abs(left - right).max(initial=0.0) <= self.slack * scale)

    @cached_property
    def elsewhere(self) -> list[Point]:
        """Return two more points, every real input moved at random: a pattern that holds there is no accident."""
        if not self.function.can_move:
            return []
        generator = np.random.default_rng(1)
        points = []
        for _ in range(2):
            factors = [generator.uniform(0.6, 1.4, v.shape) if is_real(v) else None for v in self.here.values]
            moved = [
                v if f is None else v.detach() * torch.as_tensor(f).to(v)
                for v, f in zip(self.here.values, factors, strict=True)
            ]
            points += self._point(moved)
        return points

    @cached_property
    def one_row(self) -> list[Point]:
        """Return two points with a single row of the batch, if inputs share a leading dimension that can be cut."""
        batched = {
            i: len(v)
            for i, v in enumerate(self.here.values)
            if isinstance(v, Tensor) and v.ndim and i != self.index
        }
        sizes = list(batched.values())
        if not self.function.can_move or not sizes or max(sizes) < 2:
            return []
        rows = max(set(sizes), key=sizes.count)
        points = []
        for row in (0, rows - 1):
            cut = [v[row : row + 1] if batched.get(i) == rows else v for i, v in enumerate(self.here.values)]
            points += self._point(cut)
        return points

    def _wide(self, native: list[Any]) -> list[Any]:
        """Cast values to the dtypes that the differences are taken in."""
        return [v.to(w.dtype) if is_real(v) else v for v, w in zip(native, self.values, strict=True)]

    def _point(self, native: list[Any]) -> list[Point]:
        """Return both gradients at another point; nothing if the function cannot be evaluated there."""
        elements = self.here.elements[:32]
        try:
            outputs, cotangents = self.function.outputs(native), self.here.cotangents
            if any(o.shape != c.shape for o, c in zip(outputs, cotangents, strict=True)):
                cotangents = [torch.ones_like(o) for o in outputs]
            found = self.function.analytic(native, cotangents)[0][self.position]
            if found is None:
                return []
            full, wide = in_float64(found).numpy(), self._wide(native)
            numerical = slopes(self.function, wide, self.index, elements, weights_of(cotangents), self.step)[
                0
            ]
        except Exception:  # whatever a user's function raises at a point that it was not written for
            return []
        return [Point(native, full, elements, full.reshape(-1)[elements], numerical.sum(0), cotangents)]

    @cached_property
    def taped(self) -> list[tuple[Point, Tape, list[Any]]]:
        """Return the points, each with a tape of the function and the values that it was recorded at.

        The list is empty if the operators cannot be replayed, or if the gradient of the replay is not the slope.
        """
        found = []
        for point in [self.here, *self.elsewhere, *self.one_row]:
            values = self._wide(point.values)
            try:
                tape = Tape(self.function, values)
                gradient = tape.gradient(values, self.index, point.cotangents)[point.elements]
                right = self.equal(gradient, point.numerical)
            except Exception:  # it cannot be recorded or replayed there
                right = False
            if right:
                found.append((point, tape, values))
            elif point is self.here:
                return []
        return found

    def _explained_by(self, mistake: Mistake) -> bool:
        """Return whether ``mistake`` has the wrong gradient at every point where it can be tried."""
        for point, tape, values in self.taped:
            if len(tape.steps) != len(self.taped[0][1].steps):
                continue
            try:
                gradient = tape.gradient(values, self.index, point.cotangents, mistake.step, mistake.change)
            except NotRecordedError:
                if point is self.here:
                    return False
                continue
            if not self.equal(gradient[point.elements], point.analytic):
                return False
        return True

    def explanations(self, mistakes: Callable[[Tape, int], Iterator[Mistake]]) -> list[Diagnosis]:
        """Return the diagnoses of the mistakes that explain the gradient, in order."""
        tried = mistakes(self.taped[0][1], self.index) if self.taped else ()
        found = [Diagnosis(mistake.name, mistake.text) for mistake in tried if self._explained_by(mistake)]
        return list(dict.fromkeys(found))


def weights_of(cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Return the cotangents as float64 vectors."""
    return [in_float64(c).reshape(-1) for c in cotangents]
