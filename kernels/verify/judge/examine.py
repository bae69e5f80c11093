"""The examination of one function: the given inputs first and in full, then the derived ones."""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..gradient.function import is_real
from ..memory.report import harmful
from ..tolerance import DRAWS
from . import trials
from . import verdict as v
from .load import NotJudgedError, Problem, Target
from .points import Point, derived, differentiable, is_mask, off_zero, reshaped, reshuffled, smaller
from .subject import Outcome, Reference, Subject, Truth, leaves_of, watched
from .verdict import Case, Finding

ELEMENTS = 24  # that are differenced per input
OTHERS = 1 << 20  # added to the seed of the values, so that what is drawn in a call is not them again
UNDIFFERENCED = "inputs or results are not finite, and without a reference nothing else judges the gradient"
DECISIVE = (v.NOT_JUDGED, v.UNSAFE, v.REUSED)  # what happens elsewhere says nothing new


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        shapes, dtypes: instead of the given ones.
        seed: of the values.
        forward_only: leave gradients alone.
        deadline: no new point is begun after it, in seconds of ``time.monotonic``.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    seed: int = 0
    forward_only: bool = False
    deadline: float = float("inf")


def examine(target: Target, options: Options, file: str) -> Iterator[Case]:
    """Yield a case for each point at which the target was tried."""
    for dtype in options.dtypes or (None,):
        for shape in options.shapes or (None,):
            yield from _Examination(target, options, file, shape, dtype).run()


class _Examination:
    """The examination of one target from one set of given inputs."""

    def __init__(
        self, target: Target, options: Options, file: str, shape: tuple[int, ...] | None, dtype: str | None
    ) -> None:
        self.target, self.options, self.file = target, options, file
        self.shape, self.dtype = shape, dtype
        self.seed = options.seed + OTHERS
        self.values: list[Any] = []
        self.configurations, self.count, self.stochastic, self.named = 1, 0, False, False
        self.dense: Outcome | None = None  # that of the values at which every experiment was made
        self.several = False  # whether there are gradients, and outputs of several elements

    def run(self) -> Iterator[Case]:
        """Yield the case of the given inputs, then those of the derived ones."""
        try:
            self._prepare()
        except BaseException as error:
            yield self._failed("the inputs", error)
            return
        base = Point("", self.values, "given")
        began = time.monotonic()
        small = smaller(self.values, self.arguments, self.reference is not None)
        given = self._judge(base, full=small is None)
        assert given is not None
        yield given
        if given.verdict in DECISIVE:
            return
        if small is not None:
            self.values = small.values
            began = time.monotonic()
            case = self._judge(small, full=True)
            if case is not None:
                yield case
            if case is None or case.refusal:  # it has to be the large ones
                self.values = base.values
                case = self._judge(base, full=True)
                assert case is not None
                yield case
            if case.verdict in DECISIVE:
                return
        each = time.monotonic() - began
        huge = False
        for point in derived(self.values, self.arguments, self.reference is not None):
            if time.monotonic() + each > self.options.deadline:
                yield self._case(point, v.NOT_JUDGED, "no time was left for it", refusal=True)
                continue
            if (huge and point.label.startswith("huge")) or (point.placed and not self.several):
                continue
            case = self._judge(point)
            if case is not None:
                huge = huge or point.label.startswith("huge")
                yield case

    def _prepare(self) -> None:
        problem = self._made(self.options.seed)
        self.problem = problem
        self.arguments = len(problem.inputs)
        shared = problem.shared_parameters()
        self.subject = Subject(problem.function, shared)
        self.reference = None
        if problem.reference is not None:
            self.reference = Reference(Subject(problem.reference, shared))
        self.values = self._values(problem, shared)
        self.wanted = [] if self.options.forward_only else differentiable(self.values, self.arguments)

    def _made(self, seed: int) -> Problem:
        problem = self.target.make(seed)
        if self.dtype is not None:
            dtype = getattr(torch, self.dtype)
            problem = Problem(
                _cast(problem.function, dtype),
                [
                    x.detach().to(dtype).requires_grad_(x.requires_grad) if is_real(x) else x
                    for x in problem.inputs
                ],
                _cast(problem.reference, dtype),
            )
        return problem

    def _values(self, problem: Problem, shared: Sequence[str]) -> list[Any]:
        values = list(problem.inputs)
        if shared:
            assert isinstance(problem.reference, torch.nn.Module)
            parameters = dict(problem.reference.named_parameters())
            values += [parameters[name].detach() for name in shared]
        if self.shape is None:
            return values
        try:
            return reshaped(values, len(problem.inputs), self.shape)
        except ValueError as error:  # the command line's mistake, not the file's
            raise NotJudgedError(str(error)) from None

    def _drawn(self, draw: int) -> list[Any]:
        """Return other values in the given shapes."""
        fresh = self._values(self._made(self.options.seed + draw), self.subject.parameters)
        moved = any(
            is_real(a) and (a.shape != b.shape or not torch.equal(a, b))
            for a, b in zip(fresh[: self.arguments], self.values[: self.arguments], strict=True)
        )
        alike = all(
            not isinstance(a, Tensor) or a.shape == b.shape for a, b in zip(fresh, self.values, strict=True)
        )
        return fresh if moved and alike else reshuffled(self.values, self.arguments, draw)

    def _judge(self, point: Point, full: bool = False) -> Case | None:
        """Judge one point, with every experiment or with some; None where it makes no sense for the reference."""
        truth = None
        given, self.seed = point.kind == "given", self.seed + 1  # other ones: some switch everything off
        if self.reference is not None:
            try:
                truth = self._truth(point.values)
                if given and not trials.agree(truth.native, self._truth(point.values).native):
                    raise NotJudgedError(
                        "two calls differ, though the random numbers of torch, NumPy and Python are seeded alike"
                    )
                self.stochastic = self.reference.draws
                self.subject.seed = self.seed if self.stochastic else None
            except Exception as error:
                return self._failed("the reference", error, point) if given else None
            if point.kind in ("scale", "zeros", "empty") and not truth.finite:
                return None
        try:
            findings = list(self._findings(point, truth, full))
        except _RefusedError as refused:
            findings = list(self._explained(refused.error, point, truth)) if given else []
            if not findings:
                return self._failed("", refused.error, point)
        return self._verdict(point, findings)

    def _explained(self, error: Exception, point: Point, truth: Truth | None) -> Iterator[Finding]:
        """Find the fault that autograd has refused: a leaf written in place, a gradient of another shape."""
        outcome, failure = watched(self.subject, leaves_of(point.values, ()), ())
        yield from trials.memory(outcome)
        if outcome.mutated and (truth is None or not truth.native.mutated):
            yield Finding(v.MUTATED, outcome.mutated)
        if failure is None and any(text in str(error) for text in trials.REFUSED):
            yield from trials.diagnosis(self.subject, self.reference, point.values, self.wanted, ELEMENTS)

    def _verdict(self, point: Point, findings: Sequence[Finding]) -> Case:
        worst = v.first(verdicts := [finding.verdict for finding in findings]) or next(iter(verdicts), None)
        if worst is None:
            return self._case(point, v.VERIFIED, "")
        chosen = [finding for finding in findings if finding.verdict == worst]
        texts = dict.fromkeys(finding.message for finding in chosen)
        home = self.target.backward if worst == v.WRONG_GRADIENT else self.target.where
        where = next((finding.where for finding in chosen if finding.where), home)
        return self._case(point, worst, "; ".join(texts), where)

    def _findings(self, point: Point, truth: Truth | None, full: bool) -> Iterator[Finding]:
        wanted = self.wanted
        if truth is not None:
            wanted = [i for i in wanted if truth.native.gradients.get(i) is not None]
        usual = self.count % self.configurations
        self.count += 1

        def once(
            configuration: int = usual,
            zeroed: bool = False,
            values: Any = point.values,
            wanted: Sequence[int] = wanted,
        ) -> Outcome:
            leaves = leaves_of(values, wanted)
            outcome, error = watched(self.subject, leaves, wanted, configuration, zeroed, point.placed)
            if error is not None:
                raise _FaultyError(outcome) if harmful(outcome.memory) else _RefusedError(error)
            return outcome

        try:
            first = once()
            yield from (unsafe := list(trials.memory(first)))
            if unsafe:
                return
            if not first.outputs:
                raise _RefusedError(TypeError("it returned no tensor"))
            self.several |= bool(first.gradients) and any(o.numel() > 1 for o in first.outputs if is_real(o))
            if first.mutated and (truth is None or not truth.native.mutated):
                yield Finding(v.MUTATED, first.mutated)
            if full:
                others = self._drawn(DRAWS)
                yield from (
                    old := list(trials.reuse(self.subject, point.values, others, wanted, self._right))
                )
                if old:  # its further calls would be answered from there
                    return
            yield from trials.repetition(first, once(zeroed=True), once)
            if full:
                yield from self._fully(point, first, truth, wanted, once)
                self.dense = first
            if truth is None:
                if point.kind == "layout" and self.dense is not None:
                    yield from trials.agreement(first, self.dense, "for the same numbers in dense memory")
                return
            if self.stochastic and point.kind == "layout":
                # Which number an element draws may depend on where it lies, as torch.rand_like does.
                truths = [truth]
                with contextlib.suppress(Exception):  # the reference need not take it there
                    truths.append(self._truth(point.values, dense=False))
                yield from min((list(self._compared(first, either)) for either in truths), key=len)
                return
            outcomes, truths = self._draws(point, first, truth, once)
            ties = point.kind == "zeros"
            count = sum(x.numel() for x in point.values if isinstance(x, Tensor))
            yield from trials.value(outcomes, truths, places=count if ties else 0)
            meant = bool(first.mutated and truth.native.mutated)
            if meant:
                yield from trials.writing(first, truth)
            yield from trials.arrival(first, truth)
            wrong = list(trials.gradient(outcomes, truths))
            if ties and wrong:
                kinks = self._kinks(point, truth, whole=len(outcomes) > 1)
                wrong = list(trials.gradient(outcomes, truths, kinks))
            fits = [o.shape for o in first.outputs] == [o.shape for o in truth.native.outputs]
            named = []
            # Differences need finite numbers, and a function that leaves its inputs alone.
            differenced = (
                truth.finite and not meant and all(bool(point.values[i].isfinite().all()) for i in wanted)
            )
            # Finite differences know nothing of upstream gradients, nor of random numbers.
            differenced &= point.placed is None and not self.stochastic
            if wanted and first.attached and fits and differenced and (full or (wrong and not self.named)):
                self.named = bool(wrong)
                named = self._diagnosis(point, wanted, ELEMENTS, lenient=not wrong)
            yield from named or wrong
        except _FaultyError as faulty:
            yield from trials.memory(faulty.outcome)

    def _compared(self, outcome: Outcome, truth: Truth) -> Iterator[Finding]:
        """Compare one outcome with what the reference gives."""
        yield from trials.value([outcome], [truth])
        yield from trials.arrival(outcome, truth)
        yield from trials.gradient([outcome], [truth])

    def _draws(
        self, point: Point, first: Outcome, truth: Truth, once: Callable[..., Outcome]
    ) -> tuple[list[Outcome], list[Truth]]:
        """Return the outcome, and those of other draws where results are few numbers, as the tolerance policy asks."""
        outcomes, truths = [first], [truth]
        if min((t.numel() for t in first.tensors if t.numel()), default=DRAWS) >= DRAWS or self.stochastic:
            return outcomes, truths
        for draw in range(1, DRAWS):
            own = point.values is self.values
            values = self._drawn(draw) if own else reshuffled(point.values, self.arguments, draw)
            truths.append(self._truth(values))
            outcomes.append(once(values=values))
        return outcomes, truths

    def _kinks(self, point: Point, truth: Truth, whole: bool) -> dict[int, Tensor]:
        """Return, per input, where the reference's gradients jump as zeros among the values become other numbers.

        Where one does, each zero of that input may: which of equal numbers gets the gradient is anyone's choice.

        Args:
            point, truth: where.
            whole: whether all of an input counts where one element jumps.
        """

        def gradients(distance: float) -> dict[int, Tensor | None]:
            return self._truth(off_zero(point.values, self.arguments, distance)).exact.gradients

        found = {}
        try:
            sides = [(gradients(side * 2.0**-10), gradients(side * 2.0**-14)) for side in (1, -1)]
        except Exception:  # it is not defined there
            sides = [({}, {})]
        for place, gradient in truth.exact.gradients.items():
            if gradient is not None:
                pairs = [(far.get(place), near.get(place)) for far, near in sides]
                at = torch.stack([trials.jumps(gradient, *pair) for pair in pairs]).any(0)
                if at.any():
                    at |= whole | (point.values[place] == 0)
                found[place] = at
        return found

    def _truth(self, values: Sequence[Any], dense: bool = True) -> Truth:
        assert self.reference is not None
        self.reference.seed = self.seed
        return self.reference(values, self.wanted, dense)

    def _fully(
        self,
        point: Point,
        first: Outcome,
        truth: Truth | None,
        wanted: list[int],
        once: Callable[..., Outcome],
    ) -> Iterator[Finding]:
        """Make the experiments that one point is enough for."""
        yield from self._idleness(point, first, wanted, once)
        if truth is not None and wanted:
            if others := [place for place in self.wanted if place not in wanted]:
                with contextlib.suppress(_RefusedError):  # nobody asks for these of the reference either
                    yield from trials.strays(once(wanted=others))
            for places in ((), *((place,) for place in wanted if len(wanted) > 1)):
                if time.monotonic() <= self.options.deadline:
                    yield from self._with_fewer_gradients(point, first, truth, once, places)
        self.configurations = first.memory.configurations
        for configuration in range(1, self.configurations):
            outcome = once(configuration)
            for finding in (
                *trials.memory(outcome),
                *(
                    trials.value([outcome], [truth])
                    if truth is not None
                    else trials.agreement(outcome, first, "in the first configuration")
                ),
                *(trials.gradient([outcome], [truth]) if truth is not None else ()),
            ):
                yield Finding(
                    finding.verdict, f"configuration {configuration}: {finding.message}", finding.where
                )
        marked = any(x.requires_grad for x in point.values if is_real(x))
        if truth is None and wanted and (first.attached or (marked and any(map(is_real, first.outputs)))):
            if not marked:
                # Nobody says that a mask has a gradient.
                wanted = [
                    i for i in wanted if first.gradients.get(i) is not None or not is_mask(point.values[i])
                ] or wanted
            if not all(
                t.isfinite().all() for t in (*first.outputs, *(point.values[i] for i in wanted)) if is_real(t)
            ):
                yield Finding(v.NOT_JUDGED, UNDIFFERENCED)
                return
            began = time.monotonic()
            once()
            each = time.monotonic() - began
            elements = max(2, min(ELEMENTS, int(4 / each / len(wanted))))
            yield from self._diagnosis(point, wanted, elements, lenient=True)

    def _idleness(
        self, point: Point, first: Outcome, wanted: list[int], once: Callable[..., Outcome]
    ) -> list[Finding]:
        """Find that the kernels do nothing, with several random numbers: some switch everything off."""
        found = list(trials.idleness(self.subject, point.values, wanted, first))
        if self.stochastic:
            for seed in range(self.seed + 1, self.seed + 4 * DRAWS):
                if found:
                    self.subject.seed = seed
                    found = list(trials.idleness(self.subject, point.values, wanted, once()))
            self.subject.seed = self.seed
        return found

    def _with_fewer_gradients(
        self,
        point: Point,
        first: Outcome,
        truth: Truth,
        once: Callable[..., Outcome],
        places: tuple[int, ...],
    ) -> Iterator[Finding]:
        """Judge what comes where the gradients of ``places`` alone are asked for: it may come by another way."""

        def chosen(outcome: Outcome) -> Outcome:
            return replace(outcome, gradients={place: outcome.gradients.get(place) for place in places})

        once = partial(once, wanted=places)
        asked = f"the gradient of input {places[0]} alone" if places else "no gradient"
        try:
            outcome = once()
        except _RefusedError as refused:
            if self._reference_serves(point.values, places):
                verdict = v.WRONG_GRADIENT if places else v.WRONG_VALUE
                message = f"with {asked}: {_described(refused.error)}"
                yield Finding(verdict, message, _raised_at(refused.error, self.file))
            return
        found = list(trials.memory(outcome))
        if outcome.mutated and not (first.mutated or truth.native.mutated):
            found.append(Finding(v.MUTATED, outcome.mutated))
        if not found and not trials.agree(outcome, chosen(first)):
            outcomes, truths = self._draws(point, outcome, truth, once)
            found += trials.value(outcomes, truths)
            found += trials.arrival(outcome, replace(truth, native=chosen(truth.native)))
            found += trials.gradient(outcomes, truths)
        for finding in found:
            yield replace(finding, message=f"with {asked}: {finding.message}")

    def _reference_serves(self, values: Sequence[Any], places: Sequence[int]) -> bool:
        """Return whether the reference raises nothing where these gradients alone are asked for."""
        assert self.reference is not None
        with contextlib.suppress(Exception):
            self.reference(values, places)
            return True
        return False

    def _diagnosis(self, point: Point, wanted: list[int], elements: int, lenient: bool) -> list[Finding]:
        try:
            return list(
                trials.diagnosis(self.subject, self.reference, point.values, wanted, elements, lenient)
            )
        except Exception as error:
            raise _RefusedError(error) from error

    def _right(self, outcome: Outcome, values: Sequence[Any]) -> bool:
        """Return whether an outcome is right at these values; without a reference nobody knows."""
        return self.reference is not None and not list(trials.value([outcome], [self._truth(values)]))

    def _failed(self, doing: str, error: BaseException, point: Point | None = None) -> Case:
        message = str(error).strip() if isinstance(error, NotJudgedError) else _described(error)
        refusal = point is not None and point.kind != "given"
        if not (refusal or isinstance(error, NotJudgedError)):
            traceback.print_exception(error)
        where = _raised_at(error, self.file)
        return self._case(point, v.NOT_JUDGED, f"{doing}: {message}" if doing else message, where, refusal)

    def _case(
        self, point: Point | None, verdict: str, message: str, where: str = "", refusal: bool = False
    ) -> Case:
        name = self.target.name + (f" [{point.label}]" if point is not None and point.label else "")
        values = [] if point is None else [x for x in point.values if isinstance(x, Tensor)]
        shape = tuple(values[0].shape) if values else ()
        dtype = next((str(x.dtype).removeprefix("torch.") for x in values if is_real(x)), "")
        return Case(name, verdict, shape, dtype, message, where, refusal)


class _RefusedError(Exception):
    """The code under judgement raised ``error``."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _FaultyError(Exception):
    """The code under judgement raised an exception after a memory fault."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


def _cast(function: Any, dtype: torch.dtype) -> Any:
    return function.to(dtype) if isinstance(function, torch.nn.Module) else function


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip() or type(error).__name__}"


def _raised_at(error: BaseException, file: str) -> str:
    """Return the last line of the file that the exception passed."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(file)
    ]
    return f"{Path(file).name}:{lines[-1]}" if lines else ""
