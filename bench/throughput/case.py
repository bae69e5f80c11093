"""The records that a ``bench_<op>.py`` file declares (Op, Case, Implementation), and helpers to write them."""

import contextlib
import dataclasses
import functools
import importlib.util
import re
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
class Implementation:
    """One way to compute what a case asks for.

    Attributes:
        name: the column in the report; ``OURS`` for the package.
        prepare: takes one set of inputs and gives the call to be timed, which returns the results to be
            checked. What must not be timed (copies of parameters, an optimizer's construction) happens in it.
        absent: the reason why it cannot run here; empty if it can.
        slow_start: it compiles for seconds; ``--quick`` runs it only where the case asks for it.
        per_set: each set of inputs has a program of its own, which compiles for seconds.
        unit: it does once another job than ours does in many calls, ``"steps"`` say: its column tells how many of them
            take as long, and it counts for no speedup.
        reference: of such a job's own results, as of a case's; a thousandth part or so may be lost to rounding.
        within: makes the context that its calls run in; to enter it is not timed.
    """

    name: str
    prepare: Callable[..., Call]
    absent: str = ""
    slow_start: bool = False
    per_set: bool = False
    unit: str = ""
    reference: Callable[..., Sequence[np.ndarray]] | None = None
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Case:
    """One row of the report.

    Attributes:
        op: the declaration it belongs to.
        variant: what of the op is timed, such as ``"forward"``.
        label: the shape, as printed.
        sizes: the shape, by axis name.
        dtype: of all floating-point inputs.
        bytes: the minimum traffic: every input read once, every result written once.
        flops: additions and multiplications, two to a fused pair.
        make: inputs on a device, from a seeded generator; never zeros.
        implementations: ours first, then the plain torch path that the tolerance policy measures against, then the
            others.
        reference: the expected results as NumPy float64 arrays, from the inputs as such arrays.
        pick: the part of the results that ``reference`` gives, where checking all of it would take minutes.
        beside: bytes that implementations hold beside the inputs.
        calls: how often the job is done before the results are checked (optimizers: several steps).
        compile: ``--quick`` times the implementations that compile for seconds on this case too.
        launch: launches ours on tensors without values and gives the bytes that each launch moves; None where ours on
            tensors of torch's meta device does.
        passes: how often a program goes through its bytes.
    """

    op: str
    variant: str
    label: str
    sizes: dict[str, int]
    dtype: torch.dtype
    bytes: int
    flops: int
    make: Callable[[torch.device, torch.Generator], tuple[Any, ...]]
    implementations: tuple[Implementation, ...]
    reference: Callable[..., Sequence[np.ndarray]]
    pick: Callable[[Results], Results] = field(default=lambda results: results)
    beside: int = 0
    calls: int = 1
    compile: bool = False
    launch: Callable[[], Iterable[int]] | None = None
    passes: int = 1

    @property
    def name(self) -> str:
        return f"{self.op} {self.variant} {self.label} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Sweep:
    """The values that one axis takes in the scale study while the other axes stay at ``base``."""

    axis: str
    values: tuple[int, ...]
    base: tuple[int, ...]


def powers(base: int, first: int, last: int) -> tuple[int, ...]:
    return tuple(base**k for k in range(first, last + 1))


def _size(text: str) -> Any:
    """Parse ``"1000"``, ``"1e3"`` or ``"10^3"``; a word stays a word."""
    found = re.fullmatch(r"(\d+)(?:([e^])(\d+))?", text)
    if found is None:
        return text
    number, sign, exponent = int(found[1]), found[2], int(found[3] or 0)
    return number * 10**exponent if sign == "e" else number**exponent if sign else number


@dataclass(frozen=True)
class Op:
    """The declaration of one op: all that its ``bench_<op>.py`` says.

    Attributes:
        name: as in ``kernels/<name>.py``.
        axes: the names of the sizes of a shape.
        build: gives the cases of one shape and dtype, one per variant.
        shapes: what a run times, each written as for ``--shape``. ``--quick`` takes those with a ``*`` before them;
            one that ends in ``@cuda`` or ``@cpu`` is for CUDA alone, or for all other device types.
        dtypes: the dtypes of a full run, per device type; ``--quick`` takes the first, and the others on the
            last shape only.
        sweeps: the scale study, per device type.
    """

    name: str
    axes: tuple[str, ...]
    build: Callable[[tuple[Any, ...], torch.dtype], Iterable[Case]]
    shapes: str
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(
        default_factory=lambda: {
            "cpu": (torch.float32, torch.float64, torch.bfloat16),
            "cuda": (torch.float32, torch.bfloat16, torch.float16),
        }
    )
    sweeps: dict[str, tuple[Sweep, ...]] = field(default_factory=lambda: {"cpu": ()})

    def shape(self, text: str) -> tuple[Any, ...]:
        """Parse ``"1000x64x1"`` or ``"mlp,8192"`` into the sizes of the axes.

        Raises:
            ValueError: the text has another number of sizes, or words for sizes.
        """
        sizes = tuple(map(_size, re.split(r"(?<=\d)[x*]|,", text)))
        named = self.axes[0] == "kind"  # the kind decides how many sizes follow
        if not named and (len(sizes) != len(self.axes) or any(isinstance(size, str) for size in sizes)):
            raise ValueError(f"--shape {text}: expected {'x'.join(self.axes)} as numbers")
        if 0 in sizes:
            raise ValueError(f"--shape {text}: there is nothing to time of a size of 0")
        return sizes

    def declared(self, device_type: str, quick: bool) -> list[tuple[Any, ...]]:
        """Return the shapes of a run."""
        here = "cuda" if device_type == "cuda" else "cpu"
        found = []
        for text in self.shapes.split():
            shape, _, where = text.removeprefix("*").partition("@")
            if where in ("", here) and (text.startswith("*") or not quick):
                found.append(self.shape(shape))
        return found

    def cases(self, device_type: str, quick: bool) -> Iterator[Case]:
        """Yield the cases of a run; a device type without an entry of its own takes the CPU's."""
        first, *others = self.dtypes.get(device_type, self.dtypes["cpu"])
        shapes = self.declared(device_type, quick)
        for shape in shapes:
            yield from self.build(shape, first)
        for dtype in others:
            for shape in shapes[-1:] if quick else shapes:
                yield from self.build(shape, dtype)

    def sweep(self, device_type: str) -> tuple[Sweep, ...]:
        return self.sweeps.get(device_type, self.sweeps["cpu"])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def draw_inputs(
    dtype: torch.dtype, draw: Callable[..., tuple[Any, ...]]
) -> Callable[[torch.device, torch.Generator], tuple[Any, ...]]:
    """Make a case's ``make`` from ``draw(randn)``; ``randn(*shape, grad=False)`` draws standard normal numbers."""

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        def randn(*shape: int, grad: bool = False) -> Tensor:
            values = torch.randn(shape, device=device, generator=generator, dtype=torch.float32)
            return values.to(dtype).requires_grad_(grad)

        return draw(randn)

    return make


def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Results:
    """Evaluate ``function`` at all inputs but the last, which is the upstream gradient."""
    with torch.no_grad():
        return [function(*inputs[:-1])]


def forward_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Results:
    """Return the value and the gradients of the inputs that require one; the last input is the upstream gradient."""
    *inputs, grad = inputs
    value = function(*inputs)
    return [
        value.detach(),
        *torch.autograd.grad(value, [each for each in inputs if each.requires_grad], grad),
    ]


def function(name: str, run: Callable[..., Results]) -> Implementation:
    """Make an implementation without state: ``run(*inputs)``."""
    return Implementation(name, lambda *inputs: functools.partial(run, *inputs))


def compiled(
    name: str,
    target: Callable[..., Any],
    run: Callable[..., Results] | None = None,
    options: dict[str, Any] | None = None,
) -> Implementation:
    """Make an implementation from ``torch.compile(target)``, compiled once per case for its exact shape.

    Args:
        run: ``run(compiled target, *inputs)`` gives the results; by default the compiled target does.
        options: Inductor's.
    """

    @functools.cache
    def program() -> Callable[..., Any]:
        return torch.compile(target, dynamic=False, options=options)

    def prepare(*inputs: Any) -> Call:
        return functools.partial(*([] if run is None else [run]), program(), *inputs)

    return Implementation(name, prepare, slow_start=True)


def flag_gems(run: Callable[..., Results]) -> Implementation:
    """Make an implementation of ``run`` with FlagGems' kernels in place of torch's."""
    if importlib.util.find_spec("flag_gems") is None:
        return Implementation("FlagGems", function("", run).prepare, absent="not installed")

    def within() -> contextlib.AbstractContextManager[Any]:
        import flag_gems

        return flag_gems.use_gems()  # to enter it registers some hundred ops

    return dataclasses.replace(function("FlagGems", run), within=within)


def through_autograd(
    run: Callable[..., Results], ours: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> tuple[Implementation, ...]:
    """Compare our function with plain torch's; ``run`` is ``forward`` or ``forward_backward``."""
    eager = functools.partial(run, plain)
    return (
        function(OURS, functools.partial(run, ours)),
        function("eager", eager),
        compiled("compile", plain, run),
        flag_gems(eager),
    )


def without_autograd(
    ours: Callable[..., Results], plain: Callable[..., Tensor], argnums: tuple[int, ...]
) -> tuple[Implementation, ...]:
    """Compare our loss and gradients in one call with eager autograd and compiled torch.func.grad_and_value."""

    def eager(*inputs: Tensor) -> Results:
        return forward_backward(plain, *inputs[:-1], torch.ones_like(inputs[-1]))

    def target(*inputs: Tensor) -> Results:
        gradients, value = torch.func.grad_and_value(plain, argnums)(*inputs)
        return value, *gradients

    def run(program: Callable[..., Results], *inputs: Tensor) -> Results:
        return program(*(each.detach() for each in inputs[:-1]))

    tuned = compiled("compile", target, run, {"coordinate_descent_tuning": True})
    return function(OURS, ours), function("eager", eager), tuned


@contextlib.contextmanager
def poisoned(active: bool = True) -> Iterator[None]:
    """Fill every tensor that torch.empty allocates with NaN, so that an unwritten element is found."""
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
