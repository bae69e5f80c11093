"""The results of a gradient check: they print as text, convert to JSON, and raise only when asked."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..console import to_json


class GradientError(RuntimeError):
    """A gradient check failed and the caller asked for an exception; the message is the printed report."""


@dataclass(frozen=True)
class Diagnosis:
    """A diagnosis names one pattern.

    Attributes:
        name: the pattern, as in the table of ``gradkernels.verify.gradient.diagnosis``.
        text: a sentence that says what was seen, with the remedy where there is one.
    """

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass(frozen=True)
class InputReport:
    """The report on the gradient of one input.

    Attributes:
        name: the name of the argument or the parameter.
        shape, dtype: the input's shape and dtype.
        elements, checked: the number of its elements, and of those that were differenced.
        passed: whether ``error <= tolerance`` and no other fault was found.
        error: max |analytic - numerical| over the checked elements.
        tolerance: the largest ``error`` that passes.
        step: the difference step, relative to max(1, |x|).
        worst: the index of the worst element; ``analytic`` and ``numerical`` are the two slopes there.
        diagnoses: the patterns recognised, the likeliest first; some (no signal) can accompany a pass.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    checked: int
    passed: bool
    error: float
    tolerance: float
    step: float
    worst: tuple[int, ...]
    analytic: float
    numerical: float
    diagnoses: tuple[Diagnosis, ...] = ()

    def __str__(self) -> str:
        where = f"[{', '.join(map(str, self.worst))}]" if self.worst else "value"
        lines = [
            f"  {'ok  ' if self.passed else 'FAIL'} {self.name} {self.shape} {self.dtype}, "
            f"{self.checked} of {self.elements} elements; worst {where}: analytic {self.analytic:.9g}, "
            f"numerical {self.numerical:.9g} (error {self.error:.2e}, tolerance {self.tolerance:.2e})"
        ]
        return "\n".join([*lines, *(f"       {diagnosis}" for diagnosis in self.diagnoses)])


@dataclass(frozen=True)
class GradientReport:
    """The result of ``gradcheck``: true if it passed, printable, and JSON by ``to_json``.

    Attributes:
        function: the name of the function.
        passed: whether every input passed and the function is one that can be checked.
        inputs: one ``InputReport`` per checked input.
        diagnoses: the patterns that concern the function as a whole (non-deterministic, step too large, ...).
        tried: a sentence on each thing that the check did.
    """

    function: str
    passed: bool
    inputs: tuple[InputReport, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    tried: tuple[str, ...] = field(default=())

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        lines = [f"gradient of {self.function}: {'passed' if self.passed else 'FAILED'}"]
        lines += [f"  {diagnosis}" for diagnosis in self.diagnoses]
        lines += [str(report) for report in self.inputs]
        lines += [f"  tried: {sentence}" for sentence in self.tried]
        return "\n".join(lines)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all diagnoses, in order, each once."""
        found = [*self.diagnoses, *(diagnosis for report in self.inputs for diagnosis in report.diagnoses)]
        return tuple(dict.fromkeys(diagnosis.name for diagnosis in found))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dictionaries, lists, strings and numbers."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the report as JSON; a number that is not finite becomes a string."""
        return to_json(self.to_dict())

    def raise_if_failed(self) -> None:
        """Raise GradientError with the printed report unless the check passed."""
        if not self.passed:
            raise GradientError(str(self))
