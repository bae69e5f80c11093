"""Run cases: check first, then time; a result that is wrong gets no time."""

import contextlib
import dataclasses
import gc
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gradkernels.checks import in_float64
from gradkernels.verify.tolerance import compare
from torch import Tensor

from .case import OURS, Call, Case, Implementation, Results, dtype_name, poisoned
from .memory import free_bytes, settle, touch
from .session import LostError
from .timing import Sampler, WallTimer, in_turns, input_sets, summarise

LARGE = 1 << 26  # bytes
MOST_TOUCHED = 1 << 30  # bytes
PROGRAMS = 4  # that an implementation compiles for one case


def to_numpy(inputs: Any) -> Any:
    """Convert tensors, also in lists and tuples, to float64 arrays."""
    if isinstance(inputs, Tensor):
        return in_float64(inputs).numpy()
    return type(inputs)(map(to_numpy, inputs)) if isinstance(inputs, (list, tuple)) else inputs


class NoBaselineError(RuntimeError):
    """Plain torch has no result, so nothing can be compared with it."""


class Runner:
    """Checks and times cases on one device.

    Args:
        device: where the inputs live.
        timer: the clock; it decides how often a call is repeated and what can be told apart.
        seconds: of timing for each implementation of each case.
        quick: implementations that compile for seconds only run on the cases that ask for them.
        within: called with the name of each implementation before it runs, and "" before they run in turns.
    """

    def __init__(
        self,
        device: torch.device,
        timer: WallTimer,
        seconds: float,
        quick: bool,
        within: Callable[[str], Any] = lambda name: None,
    ) -> None:
        self.device, self.timer, self.seconds, self.quick = device, timer, seconds, quick
        self.within, self.running = within, ""

    def case(self, case: Case, lost: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Check the implementations of a case, time those that pass, return the record.

        Args:
            case: what is to be done.
            lost: why an implementation, by name, fails without being called; "" stands for all.
        """
        record, lost = head(case), lost or {}
        if "" in lost:
            return record | {"contenders": {OURS: failed(lost[""])}}
        tried = [
            replaced(each, lost[each.name]) if each.name in lost else each for each in case.implementations
        ]
        case = dataclasses.replace(case, implementations=tuple(tried))
        reference_bytes = 12 * case.bytes // case.dtype.itemsize  # float64, and its temporaries
        own_bytes = 2 * case.bytes + case.beside
        for place, needed in ((torch.device("cpu"), reference_bytes), (self.device, own_bytes)):
            if needed > free_bytes(place):
                return record | {"skipped": f"would need about {needed / 2**30:.0f} GiB on {place.type}"}
        if any(implementation.slow_start for implementation in case.implementations):
            torch._dynamo.reset()  # else the ninth shape of a function would run uncompiled, silently
            torch._dynamo.config.fail_on_recompile_limit_hit = True
        try:
            inputs, outcomes = self.checked(case)
            try:
                timed = self._time(case, inputs, outcomes)
            except (torch.OutOfMemoryError, NoBaselineError):
                if outcomes[case.implementations[0].name]["status"] not in ("wrong", "failed"):
                    raise
                timed = {}  # to be wrong is what there is to say
            rows = {each.name: outcomes[each.name] for each in case.implementations}
            return record | timed | {"contenders": rows}
        except torch.OutOfMemoryError:
            return record | {"skipped": "out of memory"}
        except NoBaselineError as error:
            return record | {"skipped": f"plain torch has no result: {error}"}
        finally:
            if case.bytes > LARGE:
                gc.collect()  # the next case needs the memory

    def inputs(self, case: Case, number: int) -> tuple[Any, ...]:
        """Draw the inputs of a case; the number is the seed."""
        generator = torch.Generator(self.device).manual_seed(number)
        return case.make(self.device, generator)

    def checked(self, case: Case) -> tuple[tuple[Any, ...], dict[str, dict[str, Any]]]:
        """Return the inputs and each implementation's ``status`` on them, with a ``note`` or the first call's time.

        Raises:
            NoBaselineError: plain torch's own result cannot be had.
        """
        try:
            inputs = self.inputs(case, 0)
        except TypeError as error:  # MPS has no float64
            raise NoBaselineError(str(error)) from error
        arrays = to_numpy(inputs)
        expected = case.reference(*arrays)
        of_another_job = {
            each.name: each.reference(*arrays)
            for each in case.implementations
            if each.reference is not None and not each.absent
        }
        del arrays
        outcomes: dict[str, dict[str, Any]] = {}
        baseline: list[Tensor] = []
        ours, plain, *others = case.implementations
        for implementation in (plain, ours, *others):
            outcome, results = self._first_results(case, implementation, inputs)
            if implementation.unit:
                outcome["unit"] = implementation.unit
            baseline = baseline or results
            if results and implementation.name in of_another_job:
                outcome |= verdict_on_another_job(results, of_another_job[implementation.name])
            elif results:
                outcome |= verdict(results, baseline, expected)
            outcomes[implementation.name] = outcome
        _need_baseline(outcomes[plain.name])
        return inputs, outcomes

    def _time(
        self, case: Case, inputs: tuple[Any, ...], outcomes: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Enter the timings of what is right into the outcomes; return the conditions.

        Raises:
            NoBaselineError: plain torch cannot be timed.
        """
        sets = input_sets(case.bytes, self.timer.cache_bytes)
        for implementation in case.implementations:
            if implementation.per_set and sets > PROGRAMS and outcomes[implementation.name]["status"] == "ok":
                note = f"would compile for each of {sets} sets of inputs"
                outcomes[implementation.name] = {"status": "left out", "note": note}
        running = [c for c in case.implementations if outcomes[c.name]["status"] == "ok"]
        rotated = [inputs, *(self.inputs(case, number) for number in range(1, sets))]
        # An implementation's own memory (an optimizer's copies and state) is at most about half of what its call moves.
        each = case.bytes * (1 + len(running) / 2) + case.beside
        together = sets * each < free_bytes(self.device)
        for turn in [running] if together else [[implementation] for implementation in running]:
            for implementation, timings in zip(turn, self._timed(case, turn, rotated), strict=True):
                outcomes[implementation.name] |= timings
        _need_baseline(outcomes[case.implementations[1].name])
        cold = sets > 1 or case.bytes >= 4 * self.timer.cache_bytes
        return {"cache": "cold" if cold else "warm", "in_turns": together}

    def _first_results(
        self, case: Case, implementation: Implementation, inputs: tuple[Any, ...]
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Return the seconds of the first call and the results to check, or the reason why there are none."""
        if implementation.absent:
            return {"status": "absent", "note": implementation.absent}, []
        if implementation.slow_start and self.quick and not case.compile:
            return {"status": "left out", "note": "compiles for seconds: not at this shape with --quick"}, []
        self._begin(implementation)
        try:
            with poisoned(implementation.name == OURS), quiet(), implementation.within():
                call = implementation.prepare(*inputs)
                results, seconds = self.timer.first_call(call)
                for _ in range(case.calls - 1):
                    results = call()
                picked = [result.detach().clone() for result in case.pick(results)]
                self.timer.synchronize()  # a fault shows here, not in the next implementation
                return {"first_call_s": seconds}, picked
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) and implementation in case.implementations[:2]:
                raise
            return self._failure(error), []

    def _timed(
        self, case: Case, turn: Sequence[Implementation], rotated: list[tuple[Any, ...]]
    ) -> list[dict[str, Any]]:
        with quiet():
            results: list[dict[str, Any]] = [{} for _ in turn]
            samplers: dict[str, list[tuple[int, Sampler, str]]] = {"call": [], "device": []}
            prepared: dict[int, list[Call]] = {}
            if self.device.type == "cpu":
                touch(min(2 * case.bytes, MOST_TOUCHED))
            for i, each in enumerate(turn):
                self._begin(each)
                try:  # other sets of inputs than the checked one, and graph capture
                    calls = [each.prepare(*one) for one in rotated]
                    made = [
                        self._sampler(each, make, calls)
                        for make in (self.timer.per_call, self.timer.on_device)
                    ]
                except Exception as error:
                    if isinstance(error, torch.OutOfMemoryError) and each in case.implementations[:2]:
                        raise
                    results[i] = self._failure(error)
                    continue
                prepared[i] = calls
                for taken, found in zip(samplers.values(), made, strict=True):
                    if found is not None:
                        taken.append((i, *found))
            self.within("")
            for key, taken in samplers.items():
                rounds = in_turns(
                    [sampler for _, sampler, _ in taken], self.seconds, self.timer.pause, self.timer.clock
                )
                for (i, _, method), samples in zip(taken, rounds, strict=True):
                    results[i][key] = summarise(samples, method)
            for i, calls in prepared.items() if self.device.type == "cpu" else ():
                with turn[i].within():
                    results[i]["page_faults"] = settle(calls)
        return results

    def _begin(self, implementation: Implementation) -> None:
        self.running = implementation.name
        self.within(self.running)

    def _failure(self, error: Exception) -> dict[str, Any]:
        """Return the row of what failed.

        Raises:
            LostError: it took the device along.
        """
        if reason := self.refusal():
            raise LostError(reason) from error
        return failed("out of memory" if isinstance(error, torch.OutOfMemoryError) else first_line(error))

    def refusal(self) -> str:
        """Return why the device serves no later call, as a CUDA context after an illegal access; "" if it does."""
        try:
            self.timer.synchronize()
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        return ""

    def _sampler(
        self,
        implementation: Implementation,
        make: Callable[[Sequence[Call]], tuple[Sampler, str] | None],
        calls: Sequence[Call],
    ) -> tuple[Sampler, str] | None:
        """Make a sampler of what an implementation takes, without what it takes to enter its surroundings."""
        with implementation.within():
            made = make(calls)
        if made is None:
            return None
        sampler, method = made

        def sample() -> float:
            self.running = implementation.name
            with implementation.within():
                return sampler()

        return sample, method


def _need_baseline(outcome: dict[str, Any]) -> None:
    """Raise NoBaselineError where plain torch's row has no right result."""
    if outcome["status"] != "ok":
        raise NoBaselineError(outcome["note"])


def head(case: Case) -> dict[str, Any]:
    """Return what a record says of the case itself."""
    same = {name: getattr(case, name) for name in ("op", "variant", "label", "sizes", "bytes", "flops")}
    return same | {"dtype": dtype_name(case.dtype)}


def replaced(implementation: Implementation, reason: str) -> Implementation:
    """Return an implementation that fails for a reason."""

    def prepare(*inputs: Any) -> Call:
        raise RuntimeError(reason)

    return dataclasses.replace(implementation, prepare=prepare)


def failed(note: str, status: str = "failed") -> dict[str, Any]:
    """Return the row of an implementation that fails or is wrong: it has no time, not even that of its first call."""
    return {"status": status, "note": note, "first_call_s": None}


def first_line(error: Exception) -> str:
    """Return an exception's type and the first line of its message."""
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0][:200]


def verdict(results: Results, baseline: Results, expected: Sequence[np.ndarray]) -> dict[str, Any]:
    """Compare results with the tolerance policy; ``baseline`` is plain torch's results."""
    if len(results) != len(expected):
        return failed(f"{len(results)} results instead of {len(expected)}", "wrong")
    found = [compare(*triple) for triple in zip(results, baseline, expected, strict=True)]
    wrong = [f"result {i}: {comparison}" for i, comparison in enumerate(found) if not comparison.passed]
    return failed("; ".join(wrong), "wrong") if wrong else {"status": "ok"}


def verdict_on_another_job(results: Results, expected: Sequence[np.ndarray]) -> dict[str, Any]:
    """Look whether somebody else's solution is one: right to half of its dtype's digits."""
    for i, (result, right) in enumerate(zip(results, expected, strict=True)):
        error = float(np.abs(to_numpy(result) - right).max(initial=0.0))
        largest = float(np.abs(right).max(initial=0.0))
        if not error <= torch.finfo(result.dtype).eps ** 0.5 * largest:
            return failed(f"result {i}: error {error:.2g}, the largest number is {largest:.2g}", "wrong")
    return {"status": "ok"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress torch's warnings about determinism and compilation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
