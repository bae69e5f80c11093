"""A gradient check that says what is wrong: centered differences, then the known patterns."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checks import in_float64
from .diagnosis import diagnose, diagnose_update
from .function import (
    Function,
    Gradient,
    MutationError,
    Narrowed,
    ShapeError,
    cast,
    drawing,
    epsilon,
    is_real,
    is_rough,
    moving,
    rounds_within,
    slopes,
)
from .report import Diagnosis, GradientReport, InputReport
from .suspect import Point, Suspect, weights_of
from .upstream import Upstream

APART = 1 << 30  # added to the seed: the inputs are often the first numbers of a small one


@torch.inference_mode(False)  # whatever block the caller is in
@torch.enable_grad()
def gradcheck(
    fn: Callable[..., Any],
    inputs: Any,
    *,
    gradient: Gradient | None = None,
    names: Sequence[str] | None = None,
    step: float | None = None,
    tolerance: float | None = None,
    lr: float | None = None,
    max_elements: int = 256,
    seed: int = 0,
    raise_exception: bool = False,
) -> GradientReport:
    """Compare a gradient with centered differences, and name the fault if they disagree.

    For each checked element ``x_i`` the check takes the slope ``(f(x + h e_i) - f(x - h e_i)) / 2h`` in float64, on
    float64 copies of the inputs where ``fn`` accepts them, and compares it with the analytic gradient, which is
    computed in the inputs' own dtypes; where they differ, the slope is extrapolated from this step, if it is the
    default, and half of it. An output that is no scalar is weighted with seeded random numbers.
    The gradient passes if ``max |analytic - numerical| <= tolerance * max |slope| + rounding``, where ``rounding`` is
    what the dtype's ``eps`` does to the function's value and, through its curvature, to the gradient. The gradient of
    autograd has to be linear in the upstream gradient as well: the check takes it for zero, with the upstream
    gradient of each output scaled and left out, and with the same ones in transposed and padded memory.
    Each of several outputs is checked by itself too.

    Args:
        fn: a torch function or a module, whose parameters are checked as well. It returns a real tensor or tuples,
            lists and dicts of them. An output that requires no gradient is left out, beside others that do.
        inputs: its positional arguments, one tensor or a sequence. Those with ``requires_grad`` are checked; if none
            has it, every floating-point tensor is. Tensors that are not checked still serve the diagnosis: a feature
            that ``fn`` only captures cannot be named.
        gradient: a hand-written gradient to check instead of autograd's: a callable of the same inputs that returns
            one gradient per checked input (tensors, NumPy arrays or numbers), or those gradients. ``fn`` must then
            return a scalar.
        names: the names of the inputs in the report; by default those in the signature of ``fn``.
        step: the difference step relative to ``max(1, |x|)``; by default ``eps ** (1/3)`` of the dtype that ``fn``
            computes in, the narrowest whose roundings its values show (6e-6 for float64).
        tolerance: the relative error allowed; by default the square root of the gradient's ``eps``, at least 1e-6.
        lr: a learning rate; the check then tries one step of gradient descent too (scalar ``fn``).
        max_elements: the number of elements differenced per input, chosen at random (seeded) where there are more.
        seed: the seed of the random weights and of that choice.
        raise_exception: whether to raise instead of returning a report that failed.

    Returns:
        A ``GradientReport``: true if the check passed; ``print`` it, or take ``to_json()``. The table in
        ``gradkernels.verify.gradient.diagnosis`` lists the patterns that it recognises.

    Raises:
        GradientError: the check failed and ``raise_exception`` is set.
        ValueError, TypeError: there is nothing to check, or the arguments do not fit together.

    Example:
        >>> w = torch.tensor([1.3, 1.1], dtype=torch.float64, requires_grad=True)
        >>> report = gradcheck(lambda w, x, y: (x @ w - y).square().mean(), (w, x, y))
        >>> print(report)
    """
    if isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
        inputs = (inputs,)
    function = Function(fn, inputs, gradient, names)
    report = _Check(function, step, tolerance, lr, max_elements, seed).run()
    if raise_exception:
        report.raise_if_failed()
    return report


class _Check:
    """A run of ``gradcheck`` holds the state that its stages share."""

    def __init__(
        self,
        function: Function,
        step: float | None,
        tolerance: float | None,
        lr: float | None,
        max_elements: int,
        seed: int,
    ) -> None:
        self.function, self.lr, self.max_elements, self.seed = function, lr, max_elements, seed
        self.only: int | None = None  # the output that counts; None for all
        self.tolerance, self.given_step = tolerance, step
        self.upstream: Upstream | None = None
        self.found: dict[Any, tuple[np.ndarray, np.ndarray]] = {}  # by ``_slopes``
        self.tried: list[str] = []
        self.native = cast(function.values, None)
        self.untouched = [self.native[i].clone() for i in function.checked]

    def _widened(self) -> tuple[list[Any], torch.dtype]:
        """Return the values to difference at, and the dtype that the function computes in there."""
        native = {value.dtype for value in self.native if is_real(value)}
        if native != {torch.float64}:
            narrow = ", ".join(sorted(_name(dtype) for dtype in native if dtype != torch.float64))
            try:
                double = cast(self.native, torch.float64)
                dtypes = self._computed_in(double)
            except Exception as error:  # a kernel or a closure that wants the given dtype
                self.tried.append(
                    f"{narrow} inputs: the function does not run on float64 copies ({type(error).__name__}), so the "
                    f"differences carry {narrow} noise; float64 inputs would see more"
                )
            else:
                lowest = max(dtypes, key=epsilon)
                self.tried.append(
                    f"{narrow} inputs: the differences were taken on float64 copies"
                    + ("" if lowest == torch.float64 else f", but the function computes in {_name(lowest)}")
                )
                return double, lowest
        dtypes = self._computed_in(self.native) | {self.native[i].dtype for i in self.function.checked}
        return list(self.native), max(dtypes, key=epsilon)

    def _computed_in(self, values: list[Any]) -> set[torch.dtype]:
        """Return the dtypes of the outputs, and those whose roundings are to be seen in them.

        What the function narrows on the way may be a mask or a number for the log; a kernel may narrow unseen.
        """
        narrowed = Narrowed()
        try:
            with narrowed:
                outputs = self.function.outputs(values)
        except Exception:  # it may not run where somebody looks on
            outputs = self.function.outputs(values)
        found = {output.dtype for k, output in enumerate(outputs) if self.only in (None, k)}
        self.returned = max(map(epsilon, found))
        known = max(epsilon(values[i].dtype) for i in self.function.checked)
        for dtype in sorted(narrowed.dtypes | {torch.float32}, key=epsilon):
            noise = max(16 * known, 2**-16 * epsilon(dtype))
            with contextlib.suppress(Exception):  # nor so far from the point
                if epsilon(dtype) > known and is_rough(self.function, values, self.weight, dtype, noise):
                    found.add(dtype)
                    known = epsilon(dtype)
        return found

    def run(self) -> GradientReport:
        function = self.function
        with torch.no_grad():
            outputs = function.outputs(self.native)
        if (mutated := self._mutated("the function")) is not None:
            return self._report([], [mutated])
        if len(outputs) > 1 and function.gradient is None:
            function.leave_out_detached(self.native)
            if function.attached is not None and not all(function.attached):
                places = ", ".join(str(k) for k, attached in enumerate(function.attached) if not attached)
                self.tried.append(f"without the outputs that require no gradient: {places}")
                outputs = list(compress(outputs, function.attached))
        self.scalar = len(outputs) == 1 and outputs[0].numel() == 1
        if not self.scalar and (function.gradient is not None or self.lr is not None):
            raise ValueError(
                f"gradient= and lr= need a scalar function; {function.name} returned shapes "
                f"{[tuple(output.shape) for output in outputs]}"
            )
        draw = drawing(self.seed + APART)
        self.cotangents = [
            torch.ones_like(o) if self.scalar else draw(torch.randn, o.shape).to(o) for o in outputs
        ]
        self.weights = weights_of(self.cotangents)
        tried, cotangents = self.tried[:], self.cotangents
        report = self._checked()
        if not report or len(outputs) == 1:
            return report
        for self.only in range(len(outputs)):  # a large or a coarse one hides the others' errors
            self.cotangents = [c if k == self.only else 0 * c for k, c in enumerate(cotangents)]
            self.tried = [*tried, f"output {self.only} by itself"]
            if not (alone := self._checked()):
                return alone
        return replace(report, tried=(*report.tried, "each output by itself"))

    def _checked(self) -> GradientReport:
        """Check all outputs, or ``only`` one."""
        function, self.weight = self.function, torch.cat(weights_of(self.cotangents))
        self.values, self.dtype = self._widened()
        self.best_step = epsilon(self.dtype) ** (1 / 3)
        self.step = self.best_step if self.given_step is None else self.given_step
        self.tried.append(
            f"centered differences in {_name(self.dtype)}, step {self.step:.1e} x max(1, |x|), "
            f"{'torch autograd' if function.gradient is None else 'the given gradient'} as the analytic side"
        )
        if (random := self._unrepeatable()) is not None:
            return self._report([], [random])
        results = function.flat(self.values)
        self.level = float((self.weight * results)[moving(function, self.values)].norm())
        if not results.isfinite().all():
            return self._report(
                [], [Diagnosis("non-finite", "the function returns NaN or infinity at this point")]
            )
        self.within = rounds_within(function, self.native, self.values, self.weight)
        try:
            rounds = function.analytic(self.native, self.cotangents)
            mutated = self._mutated("the backward")
            if mutated is None and function.gradient is None:
                self.upstream = Upstream.of(function, self.native, self.cotangents, self.only)
                self.tried.append(self.upstream.tried)
                mutated = self._mutated("the backward")
            if mutated is not None:
                return self._report([], [mutated])
        except ShapeError as error:
            return self._report([], [self._misshapen(error)])
        except MutationError as error:
            return self._report([], [Diagnosis(error.name, error.text)])
        reports = [self._input(position, rounds) for position in range(len(function.checked))]
        found = []
        if self.lr is not None:
            gradients = {i: g for i, g in zip(function.checked, rounds[0], strict=True) if g is not None}
            found = [diagnose_update(lambda v: float(function.flat(v)), self.values, gradients, self.lr)]
            self.tried.append(f"one step of gradient descent, lr {self.lr:g}")
        return self._report(reports, [diagnosis for diagnosis in found if diagnosis is not None])

    def _report(self, reports: list[InputReport], found: list[Diagnosis]) -> GradientReport:
        passed = not found and all(report.passed for report in reports)
        return GradientReport(self.function.name, passed, tuple(reports), tuple(found), tuple(self.tried))

    def _mutated(self, culprit: str) -> Diagnosis | None:
        """Recognise a checked input that has changed since the start."""
        for i, before in zip(self.function.checked, self.untouched, strict=True):
            if not np.array_equal(_array(before), _array(self.native[i]), equal_nan=True):
                return Diagnosis(
                    "mutated input",
                    f"{culprit} writes into {self.function.names[i]}, whose gradient is checked: the inputs and "
                    f"what is saved for the backward have to stay as they are",
                )
        return None

    def _misshapen(self, error: ShapeError) -> Diagnosis:
        """Say what is wrong with a gradient of another shape than its input."""
        got, wanted = error.got, error.wanted
        extra = len(got) - len(wanted)
        if error.gradient is not None and extra >= 0:
            dims = [d for d in range(len(got)) if d < extra or wanted[d - extra] != got[d]]
            kept = tuple(1 if d in dims else got[d] for d in range(len(got)))[extra:]
            if dims and kept == wanted:
                index = self.function.checked[error.position]
                summed = _array(error.gradient.sum(dims, keepdim=True)).reshape(-1)
                elements = np.arange(len(summed))[: self.max_elements]
                slope, _ = self._slopes(index, elements, self.step)
                scale = max(np.abs(slope).max(initial=0.0), np.abs(summed).max(initial=0.0))
                right = np.abs(summed[elements] - slope).max(initial=0.0) <= 1e-3 * scale
                which = f"dimension {dims[0]}" if len(dims) == 1 else f"dimensions {dims}"
                return Diagnosis(
                    "unreduced gradient",
                    f"{error}; sum over {which}, which the input is broadcast along"
                    + (": the sum is the slope" if right else ""),
                )
        if len(got) > 1 and got == wanted[::-1]:
            return Diagnosis("wrong shape", f"{error}; it looks transposed")
        for name, value in zip(self.function.names, self.native, strict=True):
            turned = isinstance(value, Tensor) and sorted(value.shape) == sorted(got + wanted)
            if turned and len(got) == len(wanted) == 1:
                where = f"{got[0]} is {name}.shape[{tuple(value.shape).index(got[0])}]"
                return Diagnosis("wrong shape", f"{error}; {where}: reduced over the wrong axis")
        return Diagnosis("wrong shape", str(error))

    def _unrepeatable(self) -> Diagnosis | None:
        """Recognise a function whose second call gives another value."""
        first, second = (self.function.flat(self.values) for _ in range(2))
        self.tried.append("two calls with the same inputs")
        if torch.equal(first, second) or (first.isnan().any() and torch.equal(first.isnan(), second.isnan())):
            return None
        gap = float((first - second).abs().max())
        bits = max(4 * self.returned, min(64 * epsilon(self.dtype), 1e-4))
        if gap <= bits * float(first.abs().max()):
            self.tried.append(f"the two calls differ by {gap:.1e}, in the last bits only")
            return None
        return Diagnosis(
            "non-deterministic",
            f"two calls with the same inputs differ by {gap:.3g}: no difference means anything then; switch dropout "
            f"off (module.eval()), seed inside the function, or reset the state it keeps",
        )

    def _input(self, position: int, rounds: list[list[Tensor | None]]) -> InputReport:
        index = self.function.checked[position]
        value = self.native[index]
        first = rounds[0][position]
        count = value.numel()
        gradient = np.zeros(tuple(value.shape)) if first is None else in_float64(first).numpy()
        elements = np.arange(count)
        if count > self.max_elements:
            chosen = np.random.default_rng(self.seed).choice(count, self.max_elements, replace=False)
            elements = np.sort(chosen)
        if not count:
            none = gradient.reshape(-1)
            return self._entry(index, elements, none, none, none, True, ())
        analytic = gradient.reshape(-1)[elements]
        numerical, bends = self._slopes(index, elements, self.step)
        slopes_found = np.abs([analytic, numerical])
        scale = float(slopes_found[np.isfinite(slopes_found)].max(initial=0.0))
        narrow = torch.finfo(max(value.dtype, self.dtype, key=epsilon))
        eps = narrow.eps
        relative = max(1e-6, math.sqrt(eps)) if self.tolerance is None else self.tolerance
        sizes = np.abs(_array(value).reshape(-1)[elements])
        far = np.maximum(1.0, sizes)  # that the step is relative to
        rounding = 4 * torch.finfo(self.dtype).eps * self.level / (self.best_step * far)
        rounding += 16 * eps * narrow.smallest_normal  # subnormal numbers are this far apart
        ends = self.step * far * epsilon(self.dtype) / eps  # of a difference, which are rounded too
        if self.within > 1:
            sizes = np.maximum(sizes, np.fmin(far, 4 * self.within * float(sizes.max())))  # nan: 0 times inf
        sizes = np.maximum(sizes, ends)
        rounding += (
            4 * eps * self._curvature(index, elements, bends, sizes, 0.1 * relative * scale / (4 * eps))
        )
        allowed = relative * scale + rounding
        errors = np.abs(analytic - numerical)
        failing = np.flatnonzero(np.isfinite(errors) & (errors > allowed))
        if self.given_step is None and len(failing):
            closer, _ = self._slopes(index, elements[failing], 0.5 * self.step)
            extrapolated = (4 * closer - numerical[failing]) / 3  # the error of second order cancels
            right = np.abs(analytic[failing] - extrapolated) <= allowed[failing]
            numerical[failing[right]] = extrapolated[right]
            errors = np.abs(analytic - numerical)
        finite = bool(np.isfinite(gradient).all())
        passed = finite and bool((np.isfinite(errors) & (errors <= allowed)).all())
        stale = _stale(rounds, position, relative)
        upstream = None
        if self.upstream is not None:
            upstream = self.upstream.fault(position, gradient, float(allowed.max()), relative)
        found = [fault for fault in (stale, upstream) if fault is not None]
        if not finite:
            worst = np.unravel_index(int(np.argmin(np.isfinite(gradient))), gradient.shape)
            text = f"the gradient is {gradient[worst]} at {[int(c) for c in worst]}, the function is finite"
            found.append(Diagnosis("non-finite", text))
        elif not passed:
            suspect = Suspect(
                self.function,
                position,
                self.values,
                Point(self.native, gradient, elements, analytic, numerical, self.cotangents),
                self.step,
                epsilon(self.dtype),
                allowed,
                slack=max(1e-3, 4 * relative),
                absent=first is None,
            )
            known = diagnose(suspect)
            found += [d for d in known if d.name != "unknown"] if found else known
        elif self.scalar and self.level > 0 and (analytic == 0).any():
            found.append(_silent(analytic, elements, tuple(value.shape), self.level))
        elif rounding.max() > 0.05 * scale:
            self.tried.append(
                f"{self.function.names[index]}: rounding in {_name(self.dtype)} hides slopes below "
                f"{rounding.max():.1e}"
            )
        passed = passed and stale is None and upstream is None
        return self._entry(index, elements, analytic, numerical, allowed, passed, tuple(found))

    def _slopes(self, index: int, elements: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the slopes of the outputs that count and the size of their second differences.

        Those of every output are taken at once, and kept for the outputs by themselves.
        """
        key = (index, elements.tobytes(), step)
        if key not in self.found:
            self.found[key] = slopes(self.function, self.values, index, elements, self.weights, step)
        first, second = self.found[key]
        rows = slice(None) if self.only is None else [self.only]
        return first[rows].sum(0), np.abs(second[rows].sum(0))

    def _curvature(
        self, index: int, elements: np.ndarray, bends: np.ndarray, sizes: np.ndarray, least: float
    ) -> float:
        """Return how far a gradient moves per rounding of an element of the same input, one of ``sizes``.

        Only second differences are known, and the mixed one of two elements is at most the root of the product of
        theirs. Those of kinks, which double with half the step, do not count.
        """
        bends = np.nan_to_num(bends, nan=0.0, posinf=0.0)  # the differences say so themselves
        smooth: dict[int, bool] = {}

        def largest(roots: np.ndarray) -> float:
            for k in map(int, np.argsort(roots)[::-1]):
                if not roots[k] > math.sqrt(least):  # it does not matter
                    return float(roots[k])
                if k not in smooth:
                    _, (closer,) = self._slopes(index, elements[[k]], 0.5 * self.step)
                    smooth[k] = bends[k] / 2 <= closer <= 1.5 * bends[k]
                if smooth[k]:
                    return float(roots[k])
            return 0.0

        roots = np.sqrt(bends)
        with np.errstate(invalid="ignore"):  # of an infinite element nothing is known
            return largest(roots) * largest(roots * sizes)

    def _entry(
        self,
        index: int,
        elements: np.ndarray,
        analytic: np.ndarray,
        numerical: np.ndarray,
        allowed: np.ndarray,
        passed: bool,
        found: tuple[Diagnosis, ...],
    ) -> InputReport:
        value = self.native[index]
        errors = np.abs(analytic - numerical)
        worst = int(np.argmax(np.nan_to_num(errors - allowed, nan=np.inf))) if len(errors) else -1
        place = np.unravel_index(elements[worst], value.shape) if len(errors) else ()
        return InputReport(
            name=self.function.names[index],
            shape=tuple(value.shape),
            dtype=_name(value.dtype),
            elements=value.numel(),
            checked=len(elements),
            passed=passed,
            error=float(errors[worst]) if len(errors) else 0.0,
            tolerance=float(allowed[worst]) if len(errors) else 0.0,
            step=self.step,
            worst=tuple(int(c) for c in place),
            analytic=float(analytic[worst]) if len(errors) else 0.0,
            numerical=float(numerical[worst]) if len(errors) else 0.0,
            diagnoses=found,
        )


def _array(tensor: Tensor) -> np.ndarray:
    return np.asarray(in_float64(tensor).numpy())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stale(rounds: list[list[Tensor | None]], position: int, relative: float) -> Diagnosis | None:
    """Recognise a later backward that gives another gradient than the first."""
    first = rounds[0][position]
    if first is None or not first.isfinite().all():
        return None
    one = in_float64(first)
    scale = float(one.abs().max()) if one.numel() else 0.0
    for later in (r[position] for r in rounds[1:]):
        two = torch.zeros_like(one) if later is None else in_float64(later)
        gap = float((two - one).abs().max()) if one.numel() else 0.0
        if gap <= relative * scale:
            continue
        if float((two - 2 * one).abs().max()) <= relative * scale:
            return Diagnosis(
                "stale gradient",
                "the second backward gives twice the first: a gradient is added to what the last one left; clear "
                "it (zero_grad), and never write into saved tensors",
            )
        return Diagnosis(
            "stale gradient",
            f"the second backward differs from the first by {gap:.3g}: it sees what the first left",
        )
    return None


def _silent(analytic: np.ndarray, elements: np.ndarray, shape: tuple[int, ...], level: float) -> Diagnosis:
    silent = elements[analytic == 0]
    shown = [str([int(c) for c in np.unravel_index(element, shape)]) for element in silent[:4]]
    more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
    return Diagnosis(
        "no signal",
        f"{', '.join(shown)}{more}: the slope is exactly zero while the loss is {level:.4g}, so these entries learn "
        f"nothing here (a dead unit, a feature that is always zero, an unused weight)",
    )
