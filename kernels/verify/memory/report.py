"""The results of a memory check: faults, and the bytes that each launch moved."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..console import to_json


class MemoryFaultError(RuntimeError):
    """A kernel touched memory that it may not, or left some unwritten; ``report`` holds the details."""

    def __init__(self, report: "MemoryReport") -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class Fault:
    """A fault of one line of a kernel, with its first occurrence.

    Attributes:
        kind: ``"out-of-bounds load"``, ``"out-of-bounds store"``, ``"out-of-bounds atomic"``, the same with
            ``"misaligned"``, ``"read of unwritten memory"``, ``"race"`` or ``"unwritten output"``.
        kernel, tensor: the names of the kernel and of its argument.
        text: a sentence that says what happened.
        address: the first address concerned.
        offset: for an address out of bounds, its distance from the tensor, in words.
        program: the index of the program; None if no program is to blame.
        line: the file and line of the kernel, and the source there.
        cells: the number of elements in all.
    """

    kind: str
    kernel: str
    tensor: str
    text: str
    address: int
    offset: str
    program: tuple[int, int, int] | None
    line: str
    cells: int

    def __str__(self) -> str:
        where = f"\n    {self.line}" if self.line else ""
        return f"{self.kind} in {self.kernel}: {self.text}; {self.cells} in all{where}"


UNWRITTEN = "unwritten output"


@dataclass
class Traffic:
    """The traffic of one launch, counted at its load and store instructions, caches ignored.

    Attributes:
        kernel: the name of the kernel.
        programs: the number of programs.
        loaded, stored, atomics: bytes; an address that an instruction touches in several lanes counts once.
        reread: the part of ``loaded`` that this launch had loaded before.
    """

    kernel: str
    programs: int = 0
    loaded: int = 0
    stored: int = 0
    atomics: int = 0
    reread: int = 0


@dataclass
class MemoryReport:
    """The result of a memory check: true if there is no fault.

    Attributes:
        faults: one fault per line, tensor and kind.
        traffic: one entry per launch, in order.
        notes: what could not be checked, and the autotuned kernels.
        configurations: the largest number of configurations of an autotuned kernel.
    """

    faults: list[Fault] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    configurations: int = 1

    def __bool__(self) -> bool:
        return not self.faults

    @property
    def launches(self) -> int:
        return len(self.traffic)

    @property
    def loaded(self) -> int:
        """Return the bytes loaded, over all launches."""
        return sum(entry.loaded for entry in self.traffic)

    @property
    def stored(self) -> int:
        """Return the bytes stored, over all launches."""
        return sum(entry.stored for entry in self.traffic)

    @property
    def reread(self) -> int:
        """Return the bytes loaded again within a launch, over all launches."""
        return sum(entry.reread for entry in self.traffic)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of fault found, each once."""
        return tuple(dict.fromkeys(fault.kind for fault in self.faults))

    def __str__(self) -> str:
        head = (
            f"{len(self.faults) or 'no'} memory fault{'s' if len(self.faults) != 1 else ''} in {self.launches} "
            f"launches; {self.loaded:,} bytes loaded ({self.reread:,} of them again), {self.stored:,} stored"
        )
        return "\n".join(
            [head, *(f"  {item}" for item in self.faults), *(f"  note: {n}" for n in self.notes)]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dictionaries, lists, strings and numbers."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the report as JSON."""
        return to_json(self.to_dict())


def harmful(report: MemoryReport, unwritten: bool = False) -> list[Fault]:
    """Return the faults without those that may be meant.

    An element that no kernel wrote does no harm where nobody reads it: a buffer for partial sums that torch adds up to
    a limit. Where it is read it brings the mark, a NaN, into the result.

    Args:
        report: what was seen.
        unwritten: whether an unwritten element is known to be part of a result.
    """
    return [fault for fault in report.faults if unwritten or fault.kind != UNWRITTEN]
