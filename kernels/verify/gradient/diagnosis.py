"""The diagnosis of a wrong gradient.

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
strides of grad_output    taken for contiguous: the same numbers in transposed or padded memory give
                          another gradient
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
path overwritten          one path of a shared parameter written over another: equals the gradient
                          through some uses of the input, not through all
stale gradient            not cleared between two backwards: the second gives twice the first
no signal                 a detached path, a dead unit, an unused weight: exactly zero, the loss is not
wrong shape               a gradient of another shape than its input
unreduced gradient        of the broadcast shape: its sum over those dimensions is the slope
dtype noise               nothing, but a step too small for float32: larger steps agree
lost digits               rounding or underflow on the way: on float64 copies the gradient is right
difference step too large nothing, but a curved function: smaller steps agree, the error goes as step^2;
                          or one that is not finite a step away
non-differentiable        a kink (relu, abs, max) at or near the point: the slopes from left and right
                          differ, or agreement sets in suddenly as the step shrinks
non-deterministic         dropout, unseeded randomness, a state that changes: two calls differ
uphill                    the update's sign (with ``lr``): the loss rises after a step of any size
step too large            the learning rate (with ``lr``): the loss rises, after a smaller step it falls
non-finite                the function returns NaN or infinity, or the gradient is one
unknown                   anything else; what was looked for is listed
========================= ================================================================================
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...checks import in_float64
from .function import is_real
from .mistakes import SQUARE, constants, derivatives, paths
from .report import Diagnosis
from .suspect import Point, Suspect
from .tape import NotRecordedError

PATTERNS = (
    "sign flipped, a constant factor, a transpose, an input left out as a factor, one path of several, a "
    "wrong derivative of one operator, a gradient that is exactly zero, other steps, slopes from either side"
)
MAX_SHOWN = 4
MAX_TRIED = 64  # elements that are differenced again


def diagnose(suspect: Suspect) -> tuple[Diagnosis, ...]:
    """Return the patterns that explain why the gradient is wrong, the likeliest first."""
    for look in (_precision, _step, _zero):
        if (found := look(suspect)) is not None:
            return (found,)
    ratio = _ratio(suspect, [suspect.here, *suspect.elsewhere])
    explanations = suspect.explanations(derivatives)
    if ratio is not None and abs(ratio - 1) > suspect.slack:
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
    """Recognise a gradient that is right on float64 copies of the inputs."""
    here = suspect.here
    narrow = here.values[suspect.index].dtype
    if suspect.values[suspect.index].dtype == narrow or not suspect.function.can_move:
        return None
    try:
        cotangents = [cotangent.double() for cotangent in here.cotangents]
        wide = suspect.function.analytic(suspect.values, cotangents)[0][suspect.position]
    except Exception:  # it computes its gradient in the given dtype or not at all
        return None
    if wide is None:
        return None
    exact = in_float64(wide).numpy().reshape(-1)[here.elements]
    if not (np.abs(exact - here.numerical) <= suspect.tolerance).all():
        return None
    name = str(narrow).removeprefix("torch.")
    return Diagnosis(
        "lost digits",
        f"on float64 copies the gradient is right: in {name} rounding or underflow on the way costs it "
        f"{np.abs(here.analytic - exact).max():.1e}; accumulate in a wider dtype, or scale the loss",
    )


def _step(suspect: Suspect) -> Diagnosis | None:
    """Recognise a right gradient at a point or with a step for which the differences are wrong."""
    failing, step = np.flatnonzero(suspect.failing), suspect.step
    failing = failing[:: math.ceil(len(failing) / MAX_TRIED)]
    wanted, tolerance = suspect.here.analytic[failing], suspect.tolerance[failing]
    if not np.isfinite(suspect.here.numerical[suspect.failing]).any():
        return Diagnosis(
            "difference step too large",
            f"within {step:.1e} x max(1, |x|) of this point, where the differences are taken, the function is not "
            f"finite: they say nothing; take a smaller step, or another point",
        )

    def errors(steps: list[float]) -> np.ndarray:
        return np.array([np.abs(suspect.slopes(failing, size) - wanted) for size in steps])

    def agreeing(found: np.ndarray) -> np.ndarray:
        """Return, per step and element, whether the gradient agrees with the differences there and in the next step."""
        return np.asarray((found[:-1] <= tolerance) & (found[1:] <= tolerance))

    # Over a step of few roundings the function may look flat.
    smaller = [step, *(step / 4**k for k in range(1, 9) if step / 4**k >= 16 * suspect.eps)]
    found = errors(smaller)
    near = agreeing(found)
    if near.all(1).any():
        size = smaller[1 + int(near.all(1).argmax())]
        decay = found[1] / np.maximum(found[0], np.finfo(float).tiny)
        if ((decay > 1 / 64) & (decay < 1 / 8)).all():
            return Diagnosis(
                "difference step too large",
                f"the gradient is right: with step={size:.1e} the differences agree with it",
            )
        return Diagnosis(
            "non-differentiable",
            f"a kink lies within {step:.1e} of this point; closer than it, at step={size:.1e}, the "
            f"differences agree with the gradient",
        )
    if (near.any(0) | _kinked(suspect, failing)).all():
        return Diagnosis(
            "non-differentiable",
            "the slopes from the left and from the right differ, and the gradient is one of them or between: "
            "there is a kink at this point; check at another",
        )
    larger = [step * 10**k for k in range(1, 8) if step * 10**k <= 0.2]
    if len(larger) > 1 and (whole := agreeing(errors(larger)).all(1)).any():
        size = larger[1 + int(whole.argmax())]
        return Diagnosis(
            "dtype noise",
            f"the gradient is right as far as rounding lets one see: step={step:.1e} drowns in the "
            f"function's own rounding, at step={size:.1e} the differences agree; use step={size:.1e}, or "
            f"float64 inputs",
        )
    return None


def _kinked(suspect: Suspect, failing: np.ndarray) -> np.ndarray:
    """Return at which elements the slopes from both sides differ, however close, with the gradient between them."""
    left, right = (suspect.slopes(failing, suspect.step, side) for side in (-1, 1))
    close_left, close_right = (suspect.slopes(failing, suspect.step / 8, side) for side in (-1, 1))
    jump, close_jump = np.abs(right - left), np.abs(close_right - close_left)
    wanted, tolerance = suspect.here.analytic[failing], suspect.tolerance[failing]
    low, high = np.minimum(left, right), np.maximum(left, right)
    between = (wanted >= low - tolerance) & (wanted <= high + tolerance)
    return np.asarray((close_jump > 0.5 * jump) & (jump > tolerance) & between)


def _zero(suspect: Suspect) -> Diagnosis | None:
    """Recognise a gradient of exactly zero."""
    failing = suspect.failing
    if not (suspect.here.analytic[failing] == 0).all():
        return None
    if not suspect.here.full.any() and (added := _added_by(suspect)) is not None:
        return Diagnosis(
            "missing bias gradient",
            f"the gradient is {'None' if suspect.absent else 'zero'}, yet {added} adds {suspect.name} to every "
            f"row: its gradient is that of the sum, summed over the rows",
        )
    return Diagnosis(
        "no signal",
        f"{int(failing.sum())} of {len(failing)} checked entries are exactly zero, yet the loss changes with "
        f"them (a detach, an in-place write, a path the backward left out, or a value that autograd does not "
        f"see)",
    )


def _added_by(suspect: Suspect) -> str | None:
    """Return the operator that adds the input to something with more dimensions, if there is one."""
    for _, tape, _ in suspect.taped[:1]:
        for step in tape.steps:
            taken = tape.inputs[suspect.index] in step.slots() and step.rank > len(suspect.shape)
            if taken and step.name in ("add", "sub", "addmm"):
                return step.name
    return None


def _ratio(suspect: Suspect, points: list[Point]) -> float | None:
    """Return the number c with analytic = c * numerical at every one of the points, or None."""
    if not points:
        return None
    a = np.concatenate([point.analytic for point in points])
    n = np.concatenate([point.numerical for point in points])
    if not np.isfinite(a).all() or not np.isfinite(n).all() or not n.any():
        return None
    c = float(a @ n / (n @ n))
    return c if all(suspect.equal(point.analytic, c * point.numerical) for point in points) else None


def _sizes(suspect: Suspect) -> Iterator[tuple[int, str]]:
    for name, value in zip(suspect.function.names, suspect.here.values, strict=True):
        if isinstance(value, Tensor):
            yield from ((size, f"{name}.shape[{d}]") for d, size in enumerate(value.shape))
            yield value.numel(), f"{name}.numel()"
    for cotangent in suspect.here.cotangents:
        yield cotangent.numel(), "the number of outputs"


def _factor(suspect: Suspect, c: float) -> list[Diagnosis]:
    """Return what may put the factor ``c`` before the whole gradient, the likeliest first."""

    def near(value: float, other: float = c) -> bool:
        return abs(abs(other) - value) <= suspect.slack * value

    if c < 0 and near(1):
        return [Diagnosis("sign flipped", "the gradient is minus the slope: a step along it goes uphill")]
    sign = "minus " if c < 0 else ""
    replayed = [f"{c:.6g} times the slope: {found.text}" for found in suspect.explanations(constants)]
    square = any(text.endswith(SQUARE) for text in replayed)
    known = {
        2.0: "2 (a chain-rule factor twice, or a gradient that was not cleared)",
        0.5: "1/2 (a half too many)" if square else f"1/2 ({SQUARE}, or a half too many)",
    }
    common = [f"{sign}{text} times the slope" for value, text in known.items() if near(value)]
    sizes = [
        f"{sign}{text}"
        for size, name in _sizes(suspect)
        if size > 1 and not (size == 2 and common)
        for value, text in (
            (size, f"{size} = {name} times the slope: a sum where a mean belongs"),
            (1 / size, f"1/{size} of the slope ({size} = {name}): a mean where a sum belongs"),
            (2 * size, f"2 x {size} (= {name}) times the slope"),
            (2 / size, f"2/{size} of the slope ({size} = {name})"),
            (0.5 / size, f"1/(2 x {size}) of the slope ({size} = {name})"),
            (0.5 * size, f"{size}/2 times the slope ({size} = {name})"),
        )
        if near(value)
    ]
    rows = _ratio(suspect, suspect.one_row)
    everywhere = [f"{c:.6g} times the slope, everywhere" + (", on one row of the batch too" if rows else "")]
    if rows is not None and near(1, rows):  # the factor is a number of rows
        texts = sizes or replayed
    elif rows is not None and near(abs(c), rows):  # it is not
        texts = replayed + common + ([] if replayed or common else everywhere) + sizes
    else:
        texts = replayed + common + sizes
    unique = dict.fromkeys(texts or everywhere)
    return [Diagnosis("constant factor", f"the gradient is {text}") for text in unique]


def _transposed(suspect: Suspect) -> Diagnosis | None:
    """Recognise a transposed gradient, and a product with a transposed square input."""
    shape, here = suspect.shape, suspect.here
    if len(shape) < 2:
        return None
    if shape[-1] == shape[-2]:
        turned = np.swapaxes(here.full, -1, -2).reshape(-1)[here.elements]
        if suspect.equal(turned, here.numerical):
            return Diagnosis("transposed", "the gradient is right after transposing its last two dimensions")
    if len(shape) != 2 or len(here.elements) != here.full.size:
        return None
    a, n = here.full, here.numerical.reshape(shape)
    for name, operand in zip(suspect.function.names, here.values, strict=True):
        if name == suspect.name or not is_real(operand) or operand.ndim != 2 or len(set(operand.shape)) != 1:
            continue
        w = in_float64(operand).numpy()
        if np.linalg.cond(w) > 1e4 or suspect.equal(w, w.T):
            continue
        # The true slope is e w^T and the wrong gradient e w, or the two swapped; likewise from the left.
        for side, wrong, slope in (("right", a, n), ("left", a.T, n.T)):
            for m in (w, w.T):
                left, right = _over(wrong, m), _over(slope, m.T)
                if left is not None and right is not None and suspect.equal(left, right):
                    text = f"the operand {name} stands transposed on the {side} of the product"
                    return Diagnosis("transposed", text)
    return None


def _over(matrix: np.ndarray, divisor: np.ndarray) -> np.ndarray | None:
    """Return ``matrix`` times the inverse of ``divisor``, if their sizes fit."""
    return np.linalg.solve(divisor.T, matrix.T).T if matrix.shape[-1] == len(divisor) else None


def _feature(suspect: Suspect) -> Diagnosis | None:
    """Recognise an input that is missing as a factor, or that is there twice."""
    for where, points in (
        ("", [suspect.here, *suspect.elsewhere]),
        (" (seen on one row of the batch at a time)", suspect.one_row),
    ):
        for i, name in enumerate(suspect.function.names if points else ()):
            if all(_scaled(suspect, point, i, point.analytic, point.numerical) for point in points):
                text = f"the slope is the gradient times {name}: that factor was left out{where}"
                return Diagnosis("missing feature", text)
            if all(_scaled(suspect, point, i, point.numerical, point.analytic) for point in points):
                text = (
                    f"the gradient is the slope times {name}: that factor stands there once too often{where}"
                )
                return Diagnosis("missing feature", text)
    return None


def _scaled(suspect: Suspect, point: Point, i: int, left: np.ndarray, right: np.ndarray) -> bool:
    """Return whether left * input i = right, element by element, in one of the ways the input broadcasts."""
    value = point.values[i]
    if not is_real(value) or not value.numel():
        return False
    array = in_float64(value).numpy()
    for candidate in (array, array.T, array.reshape(-1)):
        if candidate.size == 1:
            candidate = candidate.reshape(())
        try:
            factor = np.broadcast_to(candidate, suspect.shape).reshape(-1)[point.elements]
        except ValueError:
            continue
        with np.errstate(invalid="ignore"):  # an infinite one explains nothing
            if not np.allclose(factor, 1) and suspect.equal(left * factor, right):
                return True
    return False


def _path(suspect: Suspect) -> Diagnosis | None:
    """Recognise a gradient that holds some of the paths from the input, and not the others."""
    if not suspect.taped:
        return None
    point, tape, values = suspect.taped[0]
    try:
        uses = tape.by_use(values, suspect.index, point.cotangents)
    except NotRecordedError:
        return None
    if not 2 <= len(uses) <= 8:
        return None
    for size in range(1, len(uses)):
        for kept in itertools.combinations(range(len(uses)), size):
            held = np.sum([uses[use][1][point.elements] for use in kept], axis=0)
            if suspect.equal(point.analytic, held):
                called = [name for name, _ in uses]
                called = [
                    name if called.count(name) == 1 else f"{name} (use {use})"
                    for use, name in enumerate(called, 1)
                ]
                names = ", ".join(called[use] for use in kept)
                lost = ", ".join(name for use, name in enumerate(called) if use not in kept)
                return Diagnosis(
                    "path overwritten",
                    f"the input is used {len(uses)} times, and the gradient holds what came through {names} but "
                    f"not through {lost}: the paths that meet must be added, not written over one another",
                )
    return None


def diagnose_update(
    loss: Callable[[Sequence[Any]], float], values: list[Any], gradients: dict[int, Tensor], lr: float
) -> Diagnosis | None:
    """Return why one step of gradient descent raises the loss; None if it does not.

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
                f"lr={lr:g} takes the loss from {before:.6g} up to {first:.6g}; lr={lr / 2**k:.3g} takes it down "
                f"to {smaller:.6g}",
            )
    return Diagnosis(
        "uphill", f"the update raises the loss from {before:.6g} at lr={lr:g} and at every smaller lr"
    )
