"""What a benchmark is made of: the vocabulary of the ``bench_<op>.py`` files."""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

OURS = "gradkernels"

Results = Sequence[Tensor]
Call = Callable[[], Results]


@dataclass(frozen=True)
class Contender:
    """One way to do the job.

    Attributes:
        name: the column in the report; ``OURS`` for the package.
        prepare: takes one set of inputs and gives the call to be timed, which returns the results to be
            checked. What must not be timed (copies of parameters, an optimizer's construction) happens in it.
        absent: why it cannot run here; empty if it can.
        slow_start: it compiles for seconds; ``--quick`` runs it only where the case asks for it.
    """

    name: str
    prepare: Callable[..., Call]
    absent: str = ""
    slow_start: bool = False


@dataclass(frozen=True)
class Case:
    """One row of the report.

    Attributes:
        op: the declaration it belongs to.
        variant: what of the op is timed, such as ``"forward"``.
        label: the shape, as printed.
        sizes: the shape, by axis name.
        dtype: of all floating-point inputs.
        bytes: what the job must move at least: every input read once, every result written once.
        flops: additions and multiplications, two to a fused pair.
        make: inputs on a device, from a seeded generator; never zeros.
        contenders: ours first, then the plain torch path that the tolerance policy measures against, then the
            others.
        reference: the expected results as NumPy float64 arrays, from the inputs as such arrays.
        pick: the part of the results that ``reference`` gives, where checking all of it would take minutes.
        calls: how often the job is done before the results are checked (optimizers: several steps).
        compile: ``--quick`` times the contenders that compile for seconds on this case too.
    """

    op: str
    variant: str
    label: str
    sizes: dict[str, int]
    dtype: torch.dtype
    bytes: int
    flops: int
    make: Callable[[torch.device, torch.Generator], tuple[Any, ...]]
    contenders: tuple[Contender, ...]
    reference: Callable[..., Sequence[np.ndarray]]
    pick: Callable[[Results], Results] = field(default=lambda results: results)
    calls: int = 1
    compile: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant} {self.label} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Sweep:
    """How one axis grows while the others stay: the scale study."""

    axis: str
    values: tuple[int, ...]
    base: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """The declaration of one op: all that its ``bench_<op>.py`` says.

    Attributes:
        name: as in ``kernels/<name>.py``.
        axes: the names of the sizes of a shape.
        build: the cases of one shape and dtype, one per variant.
        shapes: what a full run times, per device type.
        quick: what ``--quick`` times, per device type.
        dtypes: the dtypes of a full run, per device type; ``--quick`` takes the first, and the others on the
            last shape only.
        sweeps: the scale study, per device type.
    """

    name: str
    axes: tuple[str, ...]
    build: Callable[[tuple[Any, ...], torch.dtype], Iterable[Case]]
    shapes: dict[str, tuple[tuple[Any, ...], ...]]
    quick: dict[str, tuple[tuple[Any, ...], ...]]
    dtypes: dict[str, tuple[torch.dtype, ...]]
    sweeps: dict[str, tuple[Sweep, ...]]

    def cases(self, device_type: str, quick: bool) -> Iterator[Case]:
        """The cases of a run; a device type without an entry of its own takes the CPU's."""

        def of(table: dict[str, Any]) -> Any:
            return table.get(device_type, table["cpu"])

        first, *others = of(self.dtypes)
        shapes = of(self.quick if quick else self.shapes)
        for shape in shapes:
            yield from self.build(shape, first)
        for dtype in others:
            for shape in shapes[-1:] if quick else shapes:
                yield from self.build(shape, dtype)

    def sweep(self, device_type: str) -> tuple[Sweep, ...]:
        return self.sweeps.get(device_type, self.sweeps["cpu"])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def randn(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    grad: bool = False,
) -> Tensor:
    """Standard normal numbers, rounded to dtype; a leaf that asks for its gradient if ``grad``."""
    values = torch.randn(tuple(shape), device=device, generator=generator, dtype=torch.float32)
    return values.to(dtype).requires_grad_(grad)


def function(name: str, run: Callable[..., Results]) -> Contender:
    """A contender without state: ``run(*inputs)``."""
    return Contender(name, lambda *inputs: functools.partial(run, *inputs))


def compiled(
    name: str,
    target: Callable[..., Any],
    run: Callable[..., Results] | None = None,
    options: dict[str, Any] | None = None,
) -> Contender:
    """A contender that goes through ``torch.compile(target)``, once per case and for its exact shape.

    Args:
        run: ``run(compiled target, *inputs)`` gives the results; by default the compiled target does.
        options: Inductor's.
    """

    @functools.cache
    def program() -> Callable[..., Any]:
        return torch.compile(target, dynamic=False, options=options)

    def prepare(*inputs: Any) -> Call:
        return (
            functools.partial(program(), *inputs)
            if run is None
            else functools.partial(run, program(), *inputs)
        )

    return Contender(name, prepare, slow_start=True)


def flag_gems(run: Callable[..., Results]) -> Contender:
    """``run`` with FlagGems' kernels in place of torch's."""
    if importlib.util.find_spec("flag_gems") is None:
        return Contender("FlagGems", function("", run).prepare, absent="not installed")

    def within(*inputs: Any) -> Results:
        import flag_gems

        with flag_gems.use_gems():
            return run(*inputs)

    return function("FlagGems", within)


@contextlib.contextmanager
def poisoned(active: bool = True) -> Iterator[None]:
    """NaN in every tensor that torch.empty hands out, so that an element left unwritten is seen."""
    if not active:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
