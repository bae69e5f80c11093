"""The verdicts of the judge, and how those of the cases make that of the file."""

from collections.abc import Sequence
from dataclasses import dataclass

VERIFIED, NOT_JUDGED = "verified", "not judged"
UNSAFE, MUTATED, REUSED = "unsafe memory", "mutated input", "reused result"
NONDETERMINISTIC, NO_KERNEL = "nondeterministic", "no kernel"
WRONG_VALUE, WRONG_GRADIENT = "wrong value", "wrong gradient"

# The verdict is the first that occurs, in this order.
FAULTS = (UNSAFE, MUTATED, REUSED, NONDETERMINISTIC, NO_KERNEL, WRONG_VALUE, WRONG_GRADIENT)


@dataclass(frozen=True)
class Case:
    """The verdict on one function at one point.

    Attributes:
        name: the function or class, and in brackets the point if it is not the given one.
        verdict: one of FAULTS, "verified" or "not judged".
        shape: the shape of the first tensor among the inputs.
        dtype: the dtype of the first floating-point tensor among them.
        message: what was found; empty if nothing was.
        where: file and line, ``kernel.py:17``; empty if no line is to blame.
        refusal: whether a verdict "not judged" concerns a derived point only, and leaves that of the file alone.
    """

    name: str
    verdict: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    message: str = ""
    where: str = ""
    refusal: bool = False


@dataclass(frozen=True)
class Finding:
    """A fault at one point, one of FAULTS, or "not judged": what was seen, and where."""

    verdict: str
    message: str
    where: str = ""


def first(verdicts: Sequence[str]) -> str | None:
    """Return the fault among the verdicts that comes first in the order of FAULTS; None if there is none."""
    return next((fault for fault in FAULTS if fault in verdicts), None)


def of_file(cases: Sequence[Case]) -> str:
    """Return the verdict on a file: a fault before anything else, and "verified" only if every function is."""
    if (fault := first([case.verdict for case in cases])) is not None:
        return fault
    counted = [case for case in cases if not case.refusal]
    judged = all(case.verdict == VERIFIED for case in counted)
    return VERIFIED if counted and judged else NOT_JUDGED


def exit_status(verdict: str) -> int:
    """Return 0 for "verified", 2 for "not judged", 1 for a fault."""
    return {VERIFIED: 0, NOT_JUDGED: 2}.get(verdict, 1)
