"""Calls of the code under judgement, and of its reference in float64."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..gradient.check import APART
from ..gradient.function import cast, drawing, is_real, leaves_in
from ..memory import memory_check
from ..memory.interpreter import interpreted
from ..memory.regions import CREATORS, METHODS, markable, unwritten
from ..memory.report import MemoryReport
from .load import NotJudgedError, seed_all

SAMPLES = 8  # of torch's error, at the inputs and close to them
LARGE = 1 << 16  # elements of all inputs; above it one sample has luck no more


class Subject:
    """A function of a flat list of values: its arguments, then the parameters that it shares with the reference.

    Args:
        fn: a callable or a module.
        parameters: the names of the parameters that are taken from the values.

    Attributes:
        seed: of the random numbers in each call; None leaves them as they come.
    """

    def __init__(self, fn: Callable[..., Any], parameters: Sequence[str] = ()) -> None:
        self.fn, self.parameters = fn, list(parameters)
        self.seed: int | None = None

    def __call__(self, *values: Any) -> Any:
        if self.seed is not None:
            seed_all(self.seed)
        arguments = values[: len(values) - len(self.parameters)]
        if not isinstance(self.fn, torch.nn.Module):
            return self.fn(*arguments)
        # Buffers are copied: what one call does to them is not there in the next.
        buffers = {name: buffer.clone() for name, buffer in self.fn.named_buffers()}
        shared = dict(zip(self.parameters, values[len(arguments) :], strict=True))
        return torch.func.functional_call(self.fn, {**shared, **buffers}, tuple(arguments))


@dataclass
class Outcome:
    """What a call did.

    Attributes:
        outputs: the tensors and numbers that it returned, copied.
        gradients: those of the differentiable values, where they were asked for and arrived.
        attached: whether an output requires a gradient.
        memory: what the memory checker saw.
        blank: per output, how many of its elements nothing has written.
        mutated: what the call wrote into, in words; empty if nothing.
        after: the tensors among the values, by place, as the forward left them; copied.
        live: the tensors that it returned, and numbers as tensors.
    """

    outputs: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor | None] = field(default_factory=dict)
    attached: bool = False
    memory: MemoryReport = field(default_factory=MemoryReport)
    blank: list[int] = field(default_factory=list)
    mutated: str = ""
    after: dict[int, Tensor] = field(default_factory=dict)
    live: list[Tensor] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """Return outputs and gradients."""
        return [*self.outputs, *(g for g in self.gradients.values() if g is not None)]


def leaves_of(
    values: Sequence[Any], wanted: Sequence[int], copied: torch.memory_format | None = None
) -> list[Any]:
    """Return the values, those at ``wanted`` as leaves that require a gradient.

    They have the same memory and strides, or with ``copied`` memory of their own in this format.
    """
    leaves = []
    for i, leaf in enumerate(values):
        if isinstance(leaf, Tensor):
            leaf = leaf.detach() if copied is None else leaf.detach().clone(memory_format=copied)
            leaf.requires_grad_(i in wanted)
        leaves.append(leaf)
    return leaves


def _upstream(output: Tensor, place: int, narrow: Tensor) -> Tensor:
    """Return the random upstream gradient of an output, rounded to the dtype of ``narrow``, in dense memory."""
    return drawing(APART + place)(torch.randn, output.shape).to(narrow.dtype).to(output)


def call(
    subject: Callable[..., Any],
    leaves: Sequence[Any],
    wanted: Sequence[int],
    narrow: Sequence[Tensor] | None = None,
    placed: Callable[[Tensor, int], Tensor] | None = None,
) -> Outcome:
    """Call the subject, and its backward for the values at ``wanted``; no exception is caught.

    What it writes into the values is taken back at the end.

    Args:
        subject: what is called.
        leaves: its arguments.
        wanted: which of them get gradients.
        narrow: the outputs of the same call in the inputs' own dtypes, to which upstream gradients are rounded.
        placed: copies the upstream gradient of an output, whose place it gets too, to where it shall lie in memory.
    """
    memory = {i: _bytes(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    before = {i: content.clone() for i, content in memory.items()}
    try:
        return _called(subject, leaves, wanted, narrow, placed, before)
    finally:
        for i, content in before.items():
            if not torch.equal(memory[i], content):
                memory[i].copy_(content)


def _called(
    subject: Callable[..., Any],
    leaves: Sequence[Any],
    wanted: Sequence[int],
    narrow: Sequence[Tensor] | None,
    placed: Callable[[Tensor, int], Tensor] | None,
    before: dict[int, Tensor],
) -> Outcome:
    outcome = Outcome()
    with torch.set_grad_enabled(bool(wanted)):
        result = subject(*leaves)
    wide = narrow is not None or all(leaf.dtype == torch.float64 for leaf in leaves if is_real(leaf))
    numbers = torch.float64 if wide else torch.get_default_dtype()
    outcome.live = _tensors(result, numbers)
    outcome.blank = [_blank(output) for output in outcome.live]
    outcome.outputs = [output.detach().clone() for output in outcome.live]
    outcome.mutated = _changed(before, leaves, "the forward")
    outcome.after = {i: leaves[i].detach().clone() for i in before}
    roots = [(i, o) for i, o in enumerate(outcome.live) if is_real(o) and o.requires_grad]
    outcome.attached = bool(roots)
    if not roots or not wanted:
        return outcome
    given = [_upstream(o, i, (narrow or outcome.live)[i]) for i, o in roots]
    if placed is not None:
        given = [placed(tensor, i) for tensor, (i, _) in zip(given, roots, strict=True)]
    kept = [tensor.clone() for tensor in given]
    grads = torch.autograd.grad([o for _, o in roots], [leaves[i] for i in wanted], given, allow_unused=True)
    outcome.blank += [_blank(g) for g in grads if g is not None]
    outcome.gradients = {
        i: None if g is None else g.detach().clone() for i, g in zip(wanted, grads, strict=True)
    }
    outcome.mutated = outcome.mutated or _changed(before, leaves, "the backward")
    if any(not same(one, other) for one, other in zip(given, kept, strict=True)):
        outcome.mutated = outcome.mutated or "the backward writes into grad_output"
    return outcome


def results(subject: Callable[..., Any], *values: Any) -> list[Tensor]:
    """Return what the subject returns as tensors, arrays and numbers too."""
    return _tensors(subject(*values), torch.get_default_dtype())


def _tensors(result: Any, numbers: torch.dtype) -> list[Tensor]:
    found = (_as_tensor(leaf, numbers) for leaf in leaves_in(result))
    return [tensor for tensor in found if tensor is not None]


def _as_tensor(leaf: Any, numbers: torch.dtype) -> Tensor | None:
    """Return a result as a tensor, a number that is no integer in the dtype ``numbers``; None if it is no number.

    Raises:
        NotJudgedError: it holds tensors or arrays where nobody looks.
    """
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, np.ndarray):
        return torch.from_numpy(leaf.copy()) if leaf.dtype.kind in "biufc" else None
    if isinstance(leaf, np.generic):
        return torch.from_numpy(np.array(leaf)) if leaf.dtype.kind in "biufc" else None
    if isinstance(leaf, int):
        return torch.tensor(int(leaf) if abs(leaf) < 2**63 else float(leaf))
    if isinstance(leaf, (float, complex)):
        return torch.tensor(leaf, dtype=numbers if isinstance(leaf, float) else None)
    if any(isinstance(inner, (Tensor, np.ndarray)) for inner in getattr(leaf, "__dict__", {}).values()):
        raise NotJudgedError(
            f"it returned a {type(leaf).__name__}, which holds tensors: the judge looks into tuples, lists, dicts, "
            f"dataclasses and namespaces alone"
        )
    return None


def watched(
    subject: Callable[..., Any],
    leaves: Sequence[Any],
    wanted: Sequence[int],
    configuration: int = 0,
    zeroed: bool = False,
    placed: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[Outcome, Exception | None]:
    """Call the subject under the memory checker; unwritten memory holds marks, or zeros.

    What it raises is returned, beside what the checker had seen by then.
    """
    outcome, failure = Outcome(), None
    checked: Any = nullcontext(MemoryReport())
    byte: int | None = 0 if zeroed else 0xFF  # on a GPU, where nothing is marked
    if interpreted():
        checked = memory_check(raise_exception=False, configuration=configuration)
        byte = 0 if zeroed else None
    with checked as report, filled(byte):
        try:
            outcome = call(subject, leaves, wanted, placed=placed)
        except Exception as error:
            failure = error
    outcome.memory = report
    return outcome, failure


@contextmanager
def filled(byte: int | None, number: int | None = None) -> Iterator[None]:
    """Fill what torch.empty and its variants return with this byte, or number; None fills what has no mark."""

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def create(*args: Any, **kwargs: Any) -> Any:
            tensor = original(*args, **kwargs)
            dense = type(tensor) is Tensor and tensor.layout == torch.strided
            if dense and number is not None:
                tensor.detach().fill_(number)
            elif dense and (byte is not None or not markable(tensor)):
                _bytes(tensor).fill_(0xA5 if byte is None else byte)
            return tensor

        return create

    with ExitStack() as stack:
        for owner, name in (*CREATORS, *((Tensor, method) for method in METHODS)):
            original, own = getattr(owner, name), name in vars(owner)
            setattr(owner, name, wrapped(original))
            stack.callback(setattr, owner, name, original) if own else stack.callback(delattr, owner, name)
        yield


def _blank(tensor: Tensor) -> int:
    return int(unwritten(tensor).sum()) if markable(tensor) else 0


def _bytes(tensor: Tensor) -> Tensor:
    empty = torch.tensor([], dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.detach().untyped_storage())


def _changed(before: dict[int, Tensor], values: Sequence[Any], culprit: str) -> str:
    for i, content in before.items():
        if not torch.equal(_bytes(values[i]), content):
            return f"{culprit} writes into input {i}"
    return ""


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bytes(one.contiguous().clone()), _bytes(other.contiguous().clone()))


def close(one: Tensor, other: Tensor) -> bool:
    """Return whether two results of the same call differ by no more than the order of a sum may do."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if same(one, other) or not is_real(one):
        return same(one, other)
    gap = (one.double() - other.double()).abs()
    finite = one.isfinite() & other.isfinite()
    if not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()):
        return False
    scale = float(one[finite].double().abs().max()) if finite.any() else 0.0
    return not finite.any() or float(gap[finite].max()) <= 64 * torch.finfo(one.dtype).eps * scale


@dataclass(frozen=True)
class Truth:
    """What the reference gives.

    Attributes:
        native: outputs and gradients in the dtypes of the inputs.
        exact: the same on float64 copies; ``native`` itself where that is impossible or the inputs are float64.
        close: gives ``native`` and ``exact`` at inputs close to the given ones, each number moved by one rounding.
        unit: what counts as 1 of the errors there.
    """

    native: Outcome
    exact: Outcome
    close: Callable[[], Sequence[tuple[Outcome, Outcome]]]
    unit: float = 1.0

    def error(self, part: str, place: int) -> float:
        """Return torch's largest error in one of its outputs or gradients at inputs close to the given ones.

        Where terms cancel, the error at one point is small by luck as often as not.
        """
        pairs = [[getattr(outcome, part)[place] for outcome in pair] for pair in self.close()]
        return self.unit * max((_error(native, exact) for native, exact in pairs), default=0.0)

    @property
    def finite(self) -> bool:
        """Return whether every number is."""
        results = [*self.native.tensors, *self.exact.tensors]
        return all(bool(t.isfinite().all()) for t in results if is_real(t))


class _Wider(TorchDispatchMode):
    """Inside the block what asks for float32 of a float64 tensor gets float64: ``x.float()``, ``x.sum(dtype=...)``.

    Args:
        empties: whether new memory does too, which random numbers may be drawn into: then they are others.
    """

    def __init__(self, empties: bool) -> None:
        super().__init__()
        self.empties = empties

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        given = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        drawn |= "empty" in func.name() and not self.empties
        wide = any(t.dtype == torch.float64 for t in given)
        if options.get("dtype") == torch.float32 and wide and not drawn:
            options["dtype"] = torch.float64
        return func(*args, **options)


class Reference:
    """The reference, and its copy in float64.

    Attributes:
        seed: of the random numbers in each call.
        draws: whether the last call drew any.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = self._double = subject
        self.seed, self.draws = 0, False
        self._empties = True
        if isinstance(subject.fn, torch.nn.Module):
            self._double = Subject(deepcopy(subject.fn).double(), subject.parameters)

    def wide(self, *values: Any) -> Any:
        """Call the copy, which computes in float64 what the reference computes in float32 whatever it is given."""
        with _Wider(self._empties):
            return self._double(*values)

    def __call__(self, values: Sequence[Any], wanted: Sequence[int], dense: bool = True) -> Truth:
        """Return the truth at dense copies of the values, or at themselves; raises what the reference raises."""
        native, exact = self._both(values, wanted, dense)
        double = all(v.dtype == torch.float64 for v in values if is_real(v))
        # There is nothing wider: torch's error is that in float32, where a rounding is so much larger.
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if double else 1.0

        @cache
        def close() -> Sequence[tuple[Outcome, Outcome]]:
            size = sum(v.numel() for v in values if isinstance(v, Tensor))
            if (exact is native and not double) or size > LARGE:
                return ()
            near = cast(values, torch.float32) if double else values
            try:
                return [self._both(_moved(near, draw), wanted) for draw in range(1, SAMPLES)]
            except Exception:
                if not double:  # else it may want what it was given
                    raise
            return ()

        return Truth(native, exact, close, unit)

    def _both(
        self, values: Sequence[Any], wanted: Sequence[int], dense: bool = True
    ) -> tuple[Outcome, Outcome]:
        """Return the results in the dtypes of the inputs and in float64, with the same random numbers."""
        leaves = partial(leaves_of, copied=torch.contiguous_format if dense else None)
        seed_all(self.seed)
        native = call(self.subject, leaves(values, wanted), wanted)
        following = _next_numbers()
        seed_all(self.seed)
        self.draws = following != _next_numbers()
        if not all(v.dtype == torch.float64 for v in values if is_real(v)):
            # It may hold tensors, or ask for dtypes, of its own.
            for self._empties in (True, False):
                with contextlib.suppress(Exception):
                    seed_all(self.seed)
                    wide = call(self.wide, leaves(cast(values, torch.float64), wanted), wanted, native.live)
                    alike = following == _next_numbers()  # else its random numbers are others
                    if self.draws:  # a GPU's may be others all the same
                        alike &= all(map(_near, native.outputs, wide.outputs))
                    if alike and all(o.dtype == torch.float64 for o in wide.outputs if is_real(o)):
                        return native, wide
        return native, native


def _next_numbers() -> tuple[float, ...]:
    """Draw a number from each of the generators that can be seeded."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return (*(float(torch.rand((), device=d)) for d in devices), float(np.random.rand()), random.random())


def _error(native: Tensor | None, exact: Tensor | None) -> float:
    """Return the largest difference of the two, where both are finite."""
    if native is None or exact is None or not is_real(native) or native.shape != exact.shape:
        return 0.0
    gaps = (native.double() - exact.double()).abs()
    gaps = gaps[gaps.isfinite()]
    return float(gaps.max()) if gaps.numel() else 0.0


def _near(native: Tensor, exact: Tensor) -> bool:
    """Return whether the two differ by less than half the digits of the first."""
    if not is_real(native) or not native.numel():
        return True
    return _error(native, exact) <= torch.finfo(native.dtype).eps ** 0.5 * float(native.abs().max())


def _moved(values: Sequence[Any], draw: int) -> list[Any]:
    """Move each number by one rounding, up or down."""
    drawn = drawing(draw)

    def moved(value: Any) -> Any:
        if not is_real(value):
            return value
        signs = drawn(torch.randint, 2, value.shape).to(value) * 2 - 1
        return value.detach() * (1 + signs * torch.finfo(value.dtype).eps)

    return [moved(value) for value in values]
