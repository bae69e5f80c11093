"""What the checks hand back: objects that print as text, turn into JSON, and raise only when asked."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any


class GradientError(RuntimeError):
    """A gradient check failed and the caller asked for an exception; the message is the printed report."""


@dataclass(frozen=True)
class Diagnosis:
    """One recognised pattern.

    Attributes:
        name: the pattern, as in the table of ``gradkernels.verify.diagnosis``.
        text: what was seen, in a sentence, with the remedy where there is one.
    """

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass(frozen=True)
class InputReport:
    """The gradient with respect to one input.

    Attributes:
        name: the argument's or the parameter's name.
        shape, dtype: of the input.
        elements, checked: how many elements it has, and how many were differenced.
        passed: whether ``error <= tolerance`` and nothing else was found.
        error: max |analytic - numerical| over the checked elements.
        tolerance: what ``error`` may be at most.
        step: the difference step, relative to max(1, |x|).
        worst: index of the worst element; ``analytic`` and ``numerical`` are the two slopes there.
        diagnoses: the patterns recognised; some of them (no signal) can stand beside a pass.
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
        function: the name of what was checked.
        passed: whether every input passed and the function is one that can be checked.
        inputs: one ``InputReport`` per checked input.
        diagnoses: patterns that concern the function as a whole (non-deterministic, step too large, ...).
        tried: what was done, in plain words, one sentence each.
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
        """The names of all diagnoses, in order, each once."""
        found = [*self.diagnoses, *(diagnosis for report in self.inputs for diagnosis in report.diagnoses)]
        return tuple(dict.fromkeys(diagnosis.name for diagnosis in found))

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, lists, strings and numbers."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON; a number that is not finite becomes a string."""
        return to_json(self.to_dict())

    def raise_if_failed(self) -> None:
        """Raise GradientError with the printed report unless the check passed."""
        if not self.passed:
            raise GradientError(str(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def to_json(value: Any) -> str:
    """JSON that any parser reads: NaN and infinities as strings."""
    return json.dumps(_plain(value), indent=2, allow_nan=False)
