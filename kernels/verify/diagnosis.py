"""What is wrong with a gradient, by its signature.

========================= ================================================================================
diagnosis                 planted fault, and how it is recognised
========================= ================================================================================
sign flipped              a minus: analytic / numerical is -1, at several points
constant factor           a chain-rule factor missing, a sum for a mean: the ratio is one number at
                          several points, named if it is 2, 1/2, a size, or a constant of the function
not multiplied by         the gradient for an upstream gradient of zero is not zero, or does not grow with
grad_output               that of one output
not linear in grad_output its square, its absolute value, a branch on it: twice the upstream gradient does
                          not give twice the gradient
activation derivative     left out, or taken at the wrong place: equals the gradient of the recorded
                          operators with that one derivative changed (so do the next seven)
mask                      relu, clamp, dropout: the gradient goes through where the value did not
off-diagonal terms        softmax, layer norm: the sum in their derivative is missing
wrong axis                a sum of the backward runs over another dimension than the forward's
missing factor            the other operand of a product inside the function
detached path             a detach, or a term of the backward left out, where paths meet
mutated saved tensor      written in place after it was saved for the backward
missing bias gradient     nothing arrives at an input that is added to every row
mutated input             the function or its backward writes into the input
missing feature           a feature value left out: numerical / analytic equals an input, element by
                          element, or on one row of the batch
transposed                the gradient or an operand in it: equal after a transpose of the gradient, or of
                          a square input
path overwritten          one path of a shared parameter written over another: equals the slope through
                          some uses of the input, not through all
stale gradient            not cleared between two backwards: the second gives twice the first
no signal                 a detached path, a dead unit, an unused weight: exactly zero, the loss is not
wrong shape               a gradient of another shape than its input
unreduced gradient        of the broadcast shape: its sum over those dimensions is the slope
dtype noise               nothing, but a step too small for float32: larger steps agree; or rounding on
                          the way: on float64 copies the gradient is right
difference step too large nothing, but a curved function: smaller steps agree, the error goes as step^2
non-differentiable        a kink (relu, abs, max) at or near the point: the slopes from left and right
                          differ, or agreement sets in suddenly as the step shrinks
non-deterministic         dropout, unseeded randomness, a state that changes: two calls differ
uphill                    the update's sign (with ``lr``): the loss rises after a step of any size
step too large            the learning rate (with ``lr``): the loss rises, after a smaller step it falls
non-finite                the function returns NaN or infinity
unknown                   anything else; what was looked for is listed
========================= ================================================================================
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .function import Function, is_real, slopes
from .mistakes import Mistake, constants, derivatives, paths
from .report import Diagnosis
from .tape import NotRecordedError, Tape

PATTERNS = (
    "sign flipped, a constant factor, a transpose, an input left out as a factor, one path of several, a "
    "wrong derivative of one operator, a gradient that is exactly zero, other steps, slopes from either side"
)
MAX_SHOWN = 4


@dataclass(frozen=True)
class Point:
    """The analytic and the numerical slopes of one input at one place."""

    values: list[Any]
    full: np.ndarray
    analytic: np.ndarray
    numerical: np.ndarray
    elements: np.ndarray
    cotangents: list[Tensor]


@dataclass
class Suspect:
    """An input whose gradient disagrees, and the means to look closer.

    Attributes:
        function: what is checked.
        position: which of the checked inputs.
        values: where it was checked, as the differences saw it.
        native: the same in the inputs' own dtypes, as the analytic gradient saw it.
        gradient: its analytic gradient, in full.
        elements: the flat indices that were differenced.
        analytic, numerical: the slopes there.
        cotangents: what the outputs were weighted with.
        step, tolerance: of the check.
        slack: relative error at which two slopes count as equal.
        absent: whether the analytic gradient is None.
    """

    function: Function
    position: int
    values: list[Any]
    native: list[Any]
    gradient: np.ndarray
    elements: np.ndarray
    analytic: np.ndarray
    numerical: np.ndarray
    cotangents: list[Tensor]
    step: float
    tolerance: float
    slack: float
    absent: bool = False

    @property
    def index(self) -> int:
        return self.function.checked[self.position]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.native[self.index].shape)

    @property
    def failing(self) -> np.ndarray:
        return ~(np.abs(self.analytic - self.numerical) <= self.tolerance)

    def slopes(self, which: np.ndarray, step: float, one_sided: int = 0) -> np.ndarray:
        weight = weight_of(self.cotangents)
        return slopes(self.function, self.values, self.index, self.elements[which], weight, step, one_sided)[
            0
        ]

    def equal(self, left: np.ndarray, right: np.ndarray) -> bool:
        """Whether two sets of slopes agree, relative to the larger of them, and are not just zero."""
        scale = max(np.abs(left).max(initial=0.0), np.abs(right).max(initial=0.0))
        return bool(scale > 0 and np.abs(left - right).max(initial=0.0) <= self.slack * scale)

    @cached_property
    def here(self) -> Point:
        return Point(
            self.native, self.gradient, self.analytic, self.numerical, self.elements, self.cotangents
        )

    @cached_property
    def elsewhere(self) -> list[Point]:
        """Two more points, every real input moved at random: a pattern that holds there is no accident."""
        if not self.function.can_move:
            return []
        generator = np.random.default_rng(1)
        points = []
        for _ in range(2):
            factors = [generator.uniform(0.6, 1.4, v.shape) if is_real(v) else None for v in self.native]
            moved = [
                v if f is None else v.detach() * torch.as_tensor(f).to(v)
                for v, f in zip(self.native, factors, strict=True)
            ]
            points += self.point(moved, self.elements[:32])
        return points

    @cached_property
    def one_row(self) -> list[Point]:
        """The check on single rows of the batch, if inputs share a leading dimension that can be cut."""
        sizes = [
            len(v) for i, v in enumerate(self.native) if isinstance(v, Tensor) and v.ndim and i != self.index
        ]
        if not self.function.can_move or not sizes or max(sizes) < 2:
            return []
        rows = max(set(sizes), key=sizes.count)
        points = []
        for row in (0, rows - 1):
            cut = [
                v[row : row + 1]
                if isinstance(v, Tensor) and v.ndim and len(v) == rows and i != self.index
                else v
                for i, v in enumerate(self.native)
            ]
            points += self.point(cut, self.elements[:32])
        return points

    def point(self, native: list[Any], elements: np.ndarray) -> list[Point]:
        """The slopes elsewhere; nothing if the function does not go there."""
        double = [v.to(w.dtype) if is_real(v) else v for v, w in zip(native, self.values, strict=True)]
        try:
            outputs = self.function.outputs(native)
            same = [o.shape == c.shape for o, c in zip(outputs, self.cotangents, strict=True)]
            cotangents = self.cotangents if all(same) else [torch.ones_like(o) for o in outputs]
            found = self.function.analytic(native, cotangents)[0][self.position]
            if found is None:
                return []
            full = found.double().cpu().numpy()
            numerical, _ = slopes(
                self.function, double, self.index, elements, weight_of(cotangents), self.step
            )
        except Exception:  # whatever a user's function raises at a point that it was not written for
            return []
        return [Point(native, full, full.reshape(-1)[elements], numerical, elements, list(cotangents))]

    @cached_property
    def taped(self) -> list[tuple[Point, Tape, list[Any]]]:
        """The points with a tape of the function at each, and the values it was recorded at.

        Empty if the operators cannot be replayed, or if their own gradient is not the slope.
        """
        found = []
        for point in [self.here, *self.elsewhere, *self.one_row]:
            values = [
                v.to(w.dtype) if is_real(v) else v for v, w in zip(point.values, self.values, strict=True)
            ]
            try:
                tape = Tape(self.function, values)
                gradient = tape.gradient(values, self.index, point.cotangents)[point.elements]
            except Exception:  # it cannot be recorded or replayed there
                if point is self.here:
                    return []
                continue
            if point is self.here and not self.equal(gradient, point.numerical):
                return []
            found.append((point, tape, values))
        return found

    def explained_by(self, mistake: Mistake) -> bool:
        """Whether ``mistake`` gives the gradient at every point where it can be tried."""
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
        """The mistakes that explain the gradient, in order."""
        if not self.taped:
            return []
        tried = mistakes(self.taped[0][1], self.index)
        found = [Diagnosis(mistake.name, mistake.text) for mistake in tried if self.explained_by(mistake)]
        return list(dict.fromkeys(found))


def weight_of(cotangents: Sequence[Tensor]) -> Tensor:
    """The cotangents as one float64 vector."""
    return torch.cat([c.detach().double().reshape(-1) for c in cotangents])


def diagnose(suspect: Suspect) -> tuple[Diagnosis, ...]:
    """The patterns that explain why ``suspect`` disagrees, the likeliest first."""
    for look in (_precision, _step, _zero):
        if (found := look(suspect)) is not None:
            return (found,)
    ratio = _ratio(suspect)
    explanations = suspect.explanations(derivatives)
    if ratio is not None:
        explanations += _factor(suspect, ratio)
    explanations += [d for look in (_transposed, _feature, _path) if (d := look(suspect)) is not None]
    if not explanations:
        # Along a chain of operators each gives the same gradient: the one nearest to the input is named.
        by_name = {found.name: found for found in reversed(suspect.explanations(paths))}
        explanations = list(by_name.values())[::-1]
    if not explanations:
        text = f"the gradient is wrong in no way known here; looked for {PATTERNS}"
        return (Diagnosis("unknown", text),)
    return tuple(explanations[:MAX_SHOWN])


def _precision(suspect: Suspect) -> Diagnosis | None:
    """Whether the same gradient, computed on float64 copies, is right."""
    narrow = suspect.native[suspect.index].dtype
    if suspect.values[suspect.index].dtype == narrow or not suspect.function.can_move:
        return None
    try:
        cotangents = [cotangent.double() for cotangent in suspect.cotangents]
        wide = suspect.function.analytic(suspect.values, cotangents)[0][suspect.position]
    except Exception:  # it computes its gradient in the given dtype or not at all
        return None
    if wide is None:
        return None
    exact = wide.double().cpu().numpy().reshape(-1)[suspect.elements]
    if not (np.abs(exact - suspect.numerical) <= suspect.tolerance).all():
        return None
    name = str(narrow).removeprefix("torch.")
    return Diagnosis(
        "dtype noise",
        f"on float64 copies the gradient is right: in {name} rounding or underflow on the way costs it "
        f"{np.abs(suspect.analytic - exact).max():.1e}; accumulate in a wider dtype, or scale the loss",
    )


def _zero(suspect: Suspect) -> Diagnosis | None:
    failing = suspect.failing
    if not (suspect.analytic[failing] == 0).all():
        return None
    if not suspect.gradient.any() and (added := _added_by(suspect)) is not None:
        return Diagnosis(
            "missing bias gradient",
            f"the gradient is {'None' if suspect.absent else 'zero'}, yet {added} adds "
            f"{suspect.function.names[suspect.index]} to every row: its gradient is that of the sum, summed "
            f"over the rows",
        )
    return Diagnosis(
        "no signal",
        f"{int(failing.sum())} of {len(failing)} checked entries are exactly zero, yet the loss changes with "
        f"them (a detach, an in-place write, a path the backward left out, or a value that autograd does not "
        f"see)",
    )


def _added_by(suspect: Suspect) -> str | None:
    """The operator that adds the input to something with more dimensions, if one does."""
    for _, tape, _ in suspect.taped[:1]:
        for step in tape.uses(tape.inputs[suspect.index]):
            if step.name in ("add", "sub", "addmm") and step.rank > len(suspect.shape):
                return step.name
    return None


def _step(suspect: Suspect) -> Diagnosis | None:
    """Whether the gradient is right after all, and the differences are what fails."""
    failing = np.flatnonzero(suspect.failing)[:16]
    wanted = suspect.analytic[failing]

    def errors(step: float) -> np.ndarray:
        return np.asarray(np.abs(suspect.slopes(failing, step) - wanted))

    smaller = [errors(suspect.step / 4**k) for k in (0, 1, 2, 3, 4)]
    if (smaller[-1] <= suspect.tolerance).all() and (smaller[-2] <= suspect.tolerance).all():
        decay = smaller[1] / np.maximum(smaller[0], np.finfo(float).tiny)
        if ((decay > 1 / 64) & (decay < 1 / 8)).all():
            return Diagnosis(
                "difference step too large",
                f"the gradient is right: with step={suspect.step / 256:.1e} the differences agree with it",
            )
        return Diagnosis(
            "non-differentiable",
            f"a kink lies within {suspect.step:.1e} of this point; closer than it, at step="
            f"{suspect.step / 256:.1e}, the differences agree with the gradient",
        )
    if _kinked(suspect, failing):
        return Diagnosis(
            "non-differentiable",
            "the slopes from the left and from the right differ, and the gradient is one of them or between: "
            "there is a kink at this point; check at another",
        )
    agreed = 0
    for k in range(1, 8):
        step = suspect.step * 10**k
        if step > 0.2:
            break
        agreed = agreed + 1 if (errors(step) <= suspect.tolerance).all() else 0
        if agreed == 2:
            return Diagnosis(
                "dtype noise",
                f"the gradient is right as far as rounding lets one see: step={suspect.step:.1e} drowns "
                f"in the "
                f"function's own rounding, at step={step:.1e} the differences agree; use step={step:.1e}, or "
                "float64 inputs",
            )
    return None


def _kinked(suspect: Suspect, failing: np.ndarray) -> bool:
    left, right = (suspect.slopes(failing, suspect.step, side) for side in (-1, 1))
    close_left, close_right = (suspect.slopes(failing, suspect.step / 8, side) for side in (-1, 1))
    jump, close_jump = np.abs(right - left), np.abs(close_right - close_left)
    wanted = suspect.analytic[failing]
    low, high = np.minimum(left, right), np.maximum(left, right)
    between = (wanted >= low - suspect.tolerance) & (wanted <= high + suspect.tolerance)
    return bool(((close_jump > 0.5 * jump) & (jump > 8 * suspect.tolerance) & between).all())


def _ratio(suspect: Suspect, points: list[Point] | None = None) -> float | None:
    """The number c with analytic = c * numerical at every one of the points, or None."""
    points = [suspect.here, *suspect.elsewhere] if points is None else points
    if not points:
        return None
    a = np.concatenate([point.analytic for point in points])
    n = np.concatenate([point.numerical for point in points])
    if not np.isfinite(a).all() or not np.isfinite(n).all() or not n.any():
        return None
    c = float(a @ n / (n @ n))
    return c if all(suspect.equal(point.analytic, c * point.numerical) for point in points) else None


def _sizes(suspect: Suspect) -> Iterator[tuple[int, str]]:
    for name, value in zip(suspect.function.names, suspect.native, strict=True):
        if isinstance(value, Tensor):
            yield from ((size, f"{name}.shape[{d}]") for d, size in enumerate(value.shape))
            yield value.numel(), f"{name}.numel()"
    for cotangent in suspect.cotangents:
        yield cotangent.numel(), "the number of outputs"


def _factor(suspect: Suspect, c: float) -> list[Diagnosis]:
    """What may put the factor ``c`` before the whole gradient, the likeliest first."""

    def near(value: float, other: float = c) -> bool:
        return abs(abs(other) - value) <= suspect.slack * value

    if c < 0 and near(1):
        return [Diagnosis("sign flipped", "the gradient is minus the slope: a step along it goes uphill")]
    sign = "minus " if c < 0 else ""
    known = {
        2.0: "2 (a chain-rule factor twice, or a gradient that was not cleared)",
        0.5: "1/2 (the 2 of the square is missing, or a half too many)",
    }
    common = [f"{sign}{text} times the slope" for value, text in known.items() if near(value)]
    sizes = []
    for size, name in _sizes(suspect):
        if size > 1 and not (size == 2 and common):
            for value, text in (
                (size, f"{size} = {name} times the slope: a sum where a mean belongs"),
                (1 / size, f"1/{size} of the slope ({size} = {name}): a mean where a sum belongs"),
                (2 * size, f"2 x {size} (= {name}) times the slope"),
                (2 / size, f"2/{size} of the slope ({size} = {name})"),
                (0.5 / size, f"1/(2 x {size}) of the slope ({size} = {name})"),
                (0.5 * size, f"{size}/2 times the slope ({size} = {name})"),
            ):
                if near(value):
                    sizes.append(f"{sign}{text}")
    replayed = [f"{c:.6g} times the slope: {found.text}" for found in suspect.explanations(constants)]
    rows = _ratio(suspect, suspect.one_row)
    everywhere = [f"{c:.6g} times the slope, everywhere" + (", on one row of the batch too" if rows else "")]
    if rows is not None and near(1, rows):  # it comes from the number of rows
        texts = sizes or replayed or everywhere
    elif rows is not None and near(abs(c), rows):  # it does not
        texts = replayed + common + ([] if replayed or common else everywhere) + sizes
    else:
        texts = replayed + common + sizes
    unique = list(dict.fromkeys(texts or everywhere))
    return [Diagnosis("constant factor", f"the gradient is {text}") for text in unique]


def _transposed(suspect: Suspect) -> Diagnosis | None:
    shape = suspect.shape
    if len(shape) < 2:
        return None
    if shape[-1] == shape[-2]:
        turned = np.swapaxes(suspect.gradient, -1, -2).reshape(-1)[suspect.elements]
        if suspect.equal(turned, suspect.numerical):
            return Diagnosis("transposed", "the gradient is right after transposing its last two dimensions")
    if len(shape) != 2 or len(suspect.elements) != int(np.prod(shape)):
        return None
    a = suspect.gradient
    n = np.empty(a.size)
    n[suspect.elements] = suspect.numerical
    n = n.reshape(shape)
    for i, operand in enumerate(suspect.native):
        if i == suspect.index or not is_real(operand) or operand.ndim != 2 or len(set(operand.shape)) != 1:
            continue
        w = operand.detach().double().cpu().numpy()
        if np.linalg.cond(w) > 1e4 or suspect.equal(w, w.T):
            continue
        # true slope e w^T, wrong gradient e w (or the two swapped); likewise from the left
        for name, (left, right) in {
            "right": (_over(a, w), _over(n, w.T)),
            "right of": (_over(a, w.T), _over(n, w)),
            "left": (_over(a.T, w), _over(n.T, w.T)),
            "left of": (_over(a.T, w.T), _over(n.T, w)),
        }.items():
            if left is not None and right is not None and suspect.equal(left, right):
                side = name.partition(" ")[0]
                return Diagnosis(
                    "transposed",
                    f"the operand {suspect.function.names[i]} stands transposed on the {side} of the product",
                )
    return None


def _over(matrix: np.ndarray, divisor: np.ndarray) -> np.ndarray | None:
    """``matrix`` times the inverse of ``divisor``, if their sizes fit."""
    if matrix.shape[-1] != len(divisor):
        return None
    return np.linalg.solve(divisor.T, matrix.T).T


def _feature(suspect: Suspect) -> Diagnosis | None:
    for where, points in (
        ("", [suspect.here, *suspect.elsewhere]),
        (" (seen on one row of the batch at a time)", suspect.one_row),
    ):
        if not points:
            continue
        for i, name in enumerate(suspect.function.names):
            missing = all(_scaled(suspect, point, i, point.analytic, point.numerical) for point in points)
            if missing:
                return Diagnosis(
                    "missing feature",
                    f"the slope is the gradient times {name}: that factor was left out{where}",
                )
            if all(_scaled(suspect, point, i, point.numerical, point.analytic) for point in points):
                return Diagnosis(
                    "missing feature",
                    f"the gradient is the slope times {name}: that factor stands there once too often{where}",
                )
    return None


def _scaled(suspect: Suspect, point: Point, i: int, left: np.ndarray, right: np.ndarray) -> bool:
    """Whether left * input i = right, element by element, in one of the ways the input broadcasts."""
    value = point.values[i]
    if not is_real(value) or not value.numel():
        return False
    array = value.detach().double().cpu().numpy()
    shape = suspect.shape
    for candidate in (array, array.T, array.reshape(-1)):
        if candidate.size == 1:
            candidate = candidate.reshape(())
        try:
            spread = np.broadcast_to(candidate, shape)
        except ValueError:
            continue
        factor = spread.reshape(-1)[suspect.elements[: len(left)]]
        if not np.allclose(factor, 1) and suspect.equal(left * factor, right):
            return True
    return False


class _Uses(TorchDispatchMode):
    """Counts the operators that take ``tensor``, and hands ``replacement`` to one of them instead."""

    def __init__(self, tensor: Tensor, replacement: Tensor | None = None, use: int = -1) -> None:
        super().__init__()
        self.tensor, self.replacement, self.use = tensor, replacement, use
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return func(*args, **(kwargs or {}))

        def swap(value: Any) -> Any:
            if not isinstance(value, Tensor) or not self._is(value):
                return value
            self.operators.append(str(func.name()).removeprefix("aten::").partition(".")[0])
            return self.replacement if len(self.operators) - 1 == self.use else value

        return func(*tree_map(swap, args), **tree_map(swap, kwargs or {}))

    def _is(self, value: Tensor) -> bool:
        mine = self.tensor
        return value is mine or (
            value.numel() > 0
            and value.data_ptr() == mine.data_ptr()
            and value.shape == mine.shape
            and value.stride() == mine.stride()
        )


def _through(suspect: Suspect, use: int, elements: np.ndarray) -> np.ndarray:
    """The slopes when only one use of the input is moved."""
    base, weight = suspect.values[suspect.index], weight_of(suspect.cotangents)
    result = np.empty(len(elements))
    for k, element in enumerate(elements):
        where = tuple(int(c) for c in np.unravel_index(element, base.shape))
        h = suspect.step * max(1.0, abs(float(base[where])))
        ends = []
        for sign in (1, -1):
            moved = base.clone()
            moved[where] += sign * h
            with _Uses(base, moved, use):
                ends.append(suspect.function.flat(suspect.values))
        result[k] = float(weight @ (ends[0] - ends[1])) / (2 * h)
    return result


def _path(suspect: Suspect) -> Diagnosis | None:
    with _Uses(suspect.values[suspect.index]) as uses:
        suspect.function.flat(suspect.values)
    count = len(uses.operators)
    if not 2 <= count <= 8:
        return None
    elements = suspect.elements[:16]
    paths = [_through(suspect, use, elements) for use in range(count)]
    analytic = suspect.analytic[:16]
    for size in range(1, count):
        for kept in itertools.combinations(range(count), size):
            if suspect.equal(analytic, np.sum([paths[use] for use in kept], axis=0)):
                names = ", ".join(uses.operators[use] for use in kept)
                lost = ", ".join(uses.operators[use] for use in range(count) if use not in kept)
                return Diagnosis(
                    "path overwritten",
                    f"the input is used {count} times, and the gradient holds what came through {names} "
                    f"but not "
                    f"through {lost}: the paths that meet must be added, not written over one another",
                )
    return None


def diagnose_update(
    loss: Callable[[Sequence[Any]], float], values: list[Any], gradients: dict[int, Tensor], lr: float
) -> Diagnosis | None:
    """Why one step of gradient descent raises the loss, if it does.

    Args:
        loss: the scalar loss at a list of values.
        values: where the step starts.
        gradients: the analytic gradient by index into ``values``.
        lr: the learning rate.
    """

    def after(rate: float) -> float:
        moved = [v - rate * gradients[i].to(v) if i in gradients else v for i, v in enumerate(values)]
        return loss(moved)

    before, first = loss(values), after(lr)
    if first <= before:
        return None
    for k in range(1, 31):
        smaller = after(lr / 2**k)
        if smaller < before:
            return Diagnosis(
                "step too large",
                f"lr={lr:g} takes the loss from {before:.6g} up to {first:.6g}; lr={lr / 2**k:.3g} takes "
                f"it down "
                f"to {smaller:.6g}",
            )
    return Diagnosis(
        "uphill", f"the update raises the loss from {before:.6g} at lr={lr:g} and at every smaller lr"
    )
