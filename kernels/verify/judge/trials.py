"""The experiments of the judge: each looks for one kind of fault at one point."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..gradient import gradcheck
from ..gradient.function import is_real, leaves_in
from ..gradient.report import GradientReport
from ..memory import memory_check
from ..memory.interpreter import Observer, interpreted, watch
from ..memory.report import harmful
from ..tolerance import compare
from . import verdict as v
from .subject import (
    Outcome,
    Reference,
    Subject,
    Truth,
    call,
    close,
    filled,
    leaves_of,
    results,
    same,
    watched,
)
from .verdict import Finding

REFUSED = (
    "invalid gradient at index",
    "modified by an inplace operation",
)  # autograd's words for a wrong backward
HARMLESS = {
    "dtype noise",
    "difference step too large",
    "non-differentiable",
}  # of the differences, not the gradient


def memory(outcome: Outcome) -> Iterator[Finding]:
    """Yield what the memory checker saw, and results that nothing has written."""
    for fault in harmful(outcome.memory, any(outcome.blank)):
        line = fault.line.partition(": ")[0]
        yield Finding(v.UNSAFE, f"{fault.kind} in {fault.kernel}: {fault.text}", line)
    if any(outcome.blank) and not outcome.memory.faults:
        place = next(i for i, count in enumerate(outcome.blank) if count)
        outputs = len(outcome.outputs)
        name = f"output {place}" if place < outputs else f"the gradient number {place - outputs}"
        yield Finding(v.UNSAFE, f"nothing has written {outcome.blank[place]} elements of {name}")


def repetition(first: Outcome, second: Outcome, again: Callable[[], Outcome]) -> Iterator[Finding]:
    """Compare a call in poisoned memory with one in zeroed memory; ``again`` repeats the first."""
    if agree(first, second):
        return
    if agree(first, third := again()):
        yield Finding(
            v.UNSAFE, "the result depends on what unwritten memory holds: with zeros there it differs"
        )
        return
    gaps = [_gap(a, b) for a, b in zip(first.tensors, third.tensors, strict=False)]
    yield Finding(
        v.NONDETERMINISTIC, f"two calls with the same inputs differ by up to {max(gaps, default=0.0):.3g}"
    )


def agree(one: Outcome, other: Outcome) -> bool:
    """Return whether two outcomes differ by no more than rounding."""
    pairs = zip(one.tensors, other.tensors, strict=False)
    return len(one.tensors) == len(other.tensors) and all(close(a, b) for a, b in pairs)


def _gap(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or not one.numel():
        return float("nan")
    return float((one.double() - other.double()).abs().max())


def value(outcomes: Sequence[Outcome], truths: Sequence[Truth], places: int = 0) -> Iterator[Finding]:
    """Compare the outputs of one or several draws with the reference's.

    Integers below ``places`` are left alone: where inputs are equal, their order is anyone's.
    """
    ours, theirs = len(outcomes[0].outputs), len(truths[0].native.outputs)
    if ours != theirs:
        yield Finding(v.WRONG_VALUE, f"{ours} results came back, from the reference {theirs}")
        return
    for place in range(ours):
        pair = outcomes[0].outputs[place], truths[0].native.outputs[place]
        alike = pair[0].shape == pair[1].shape and pair[0].dtype == pair[1].dtype
        if alike and all(_are_places(result, places) for result in pair):
            continue
        text = _judged(
            [o.outputs[place] for o in outcomes],
            [t.exact.outputs[place] for t in truths],
            [t.native.outputs[place] for t in truths],
            max(t.error("outputs", place) for t in truths),
        )
        if text:
            yield Finding(v.WRONG_VALUE, text if ours == 1 else f"output {place}: {text}")


def _are_places(result: Tensor, count: int) -> bool:
    """Return whether a result may be places among ``count`` elements."""
    return result.dtype in (torch.int32, torch.int64) and bool(((result >= 0) & (result < count)).all())


def writing(outcome: Outcome, truth: Truth) -> Iterator[Finding]:
    """Compare what a candidate that writes into its inputs, as the reference does, leaves in them."""
    for place, left in outcome.after.items():
        native, exact = (o.after[place] for o in (truth.native, truth.exact))
        text = _judged([left], [exact], [native], truth.error("after", place))
        if text:
            yield Finding(v.WRONG_VALUE, f"input {place} afterwards: {text}")


def _judged(ours: Sequence[Tensor], exact: Sequence[Tensor], theirs: Sequence[Tensor], sampled: float) -> str:
    """Say how ``ours`` leaves the tolerance policy; empty if it does not. ``sampled`` is torch's error close by."""
    for mine, other in zip(ours, theirs, strict=True):
        if mine.shape != other.shape:
            return f"shape {tuple(mine.shape)}, the reference's is {tuple(other.shape)}"
        if mine.dtype != other.dtype:
            return f"dtype {_name(mine.dtype)}, the reference's is {_name(other.dtype)}"
    stacked = [torch.stack([t.detach().cpu() for t in group]) for group in (ours, theirs, exact)]
    if stacked[0].is_complex():
        stacked = [torch.view_as_real(t) for t in stacked]
    mine, other, truth = stacked
    if not is_real(mine):
        return "" if torch.equal(mine, other) else f"{int((mine != other).sum())} elements differ"
    found = compare(mine, other, truth.double().numpy(), sampled=sampled)
    if found.passed:
        return ""
    errors = (mine.double() - truth.double()).abs()[0].nan_to_num(nan=float("inf"))
    where = ""
    if errors.numel():
        worst = np.unravel_index(int(errors.argmax()), tuple(errors.shape))
        where = f"at {[int(i) for i in worst]} {float(mine[0][worst]):.6g} for {float(truth[0][worst]):.6g}; "
    return f"{where}{found}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def arrival(outcome: Outcome, truth: Truth) -> Iterator[Finding]:
    """Find the inputs that the reference has a gradient for, and the candidate none."""
    for place, gradient in truth.native.gradients.items():
        if gradient is not None and gradient.any() and outcome.gradients.get(place) is None:
            yield Finding(v.WRONG_GRADIENT, f"no gradient reaches input {place}")


def strays(outcome: Outcome) -> Iterator[Finding]:
    """Find gradients of the candidate's for inputs that the reference has none for."""
    for place, gradient in outcome.gradients.items():
        if gradient is not None and gradient.any():
            yield Finding(v.WRONG_GRADIENT, f"a gradient reaches input {place}, the reference gives none")


def gradient(
    outcomes: Sequence[Outcome], truths: Sequence[Truth], kinks: dict[int, Tensor] | None = None
) -> Iterator[Finding]:
    """Compare the gradients of one or several draws with those of the reference's autograd.

    At the elements of ``kinks`` any of its slopes is right, NaN is not.
    """
    for place, first in outcomes[0].gradients.items():
        native = [t.native.gradients.get(place) for t in truths]
        exact = [t.exact.gradients.get(place) for t in truths]
        ours = [o.gradients.get(place) for o in outcomes]
        if first is None or any(t is None for t in (*ours, *native, *exact)):
            continue
        if kinks is not None and all(mine.shape == kinks[place].shape for mine in ours):  # type: ignore[union-attr]
            ours = [
                torch.where(kinks[place] & mine.isfinite(), other.to(mine.dtype), mine)  # type: ignore[arg-type,union-attr]
                for mine, other in zip(ours, native, strict=True)
            ]
        sampled = max(t.error("gradients", place) for t in truths)
        text = _judged(ours, exact, native, sampled)  # type: ignore[arg-type]
        if text:
            yield Finding(v.WRONG_GRADIENT, f"input {place}: {text}")


def jumps(here: Tensor, far: Tensor | None, near: Tensor | None) -> Tensor:
    """Return at which elements a gradient is not the limit of those at a distance and at a 16th of it."""
    if far is None or near is None or torch.finfo(here.dtype).bits < 32:
        return torch.ones_like(here, dtype=torch.bool)
    rounding = 64 * torch.finfo(here.dtype).eps * here.abs().max() if here.numel() else 0.0
    return ~((near - here).abs() <= (far - here).abs() / 4 + rounding)


def agreement(outcome: Outcome, first: Outcome, elsewhere: str) -> Iterator[Finding]:
    """Compare two outcomes that have to be the same where there is no reference."""
    if not agree(replace(outcome, gradients={}), replace(first, gradients={})):
        yield Finding(v.WRONG_VALUE, f"the result is another than {elsewhere}")
    elif not agree(outcome, first):
        yield Finding(v.WRONG_GRADIENT, f"the gradient is another than {elsewhere}")


def diagnosis(
    subject: Subject,
    reference: Reference | None,
    values: Sequence[Any],
    wanted: Sequence[int],
    elements: int,
    lenient: bool = False,
) -> Iterator[Finding]:
    """Check the backward by finite differences and by other upstream gradients, and name its fault.

    The differences are taken of the reference, where there is one: it takes float64, and costs little.

    Args:
        subject, reference, values: what is checked, and where.
        wanted: the places of the inputs that get gradients.
        elements: how many of each are differenced.
        lenient: whether differences that fail are no fault, as at a kink: nothing else has found one.
    """
    names = [f"input {i}" for i in range(len(values))]
    function: Callable[..., Any] = partial(results, subject)
    if reference is not None:
        function = _grafted(subject, reference, values, wanted)
    inputs = [
        value.detach().clone().requires_grad_(i in wanted) if isinstance(value, Tensor) else value
        for i, value in enumerate(values)
    ]
    with memory_check(raise_exception=False, configuration=0) if interpreted() else nullcontext():
        report = gradcheck(function, inputs, names=names, max_elements=elements)
    if not report and (text := _named(report, lenient)):
        yield Finding(v.WRONG_GRADIENT, text)


def _named(report: GradientReport, lenient: bool) -> str:
    texts = [str(diagnosis) for diagnosis in report.diagnoses]
    for entry in report.inputs:
        if entry.passed or (lenient and entry.diagnoses and {d.name for d in entry.diagnoses} <= HARMLESS):
            continue
        texts += [f"{entry.name}: {' | or '.join(map(str, entry.diagnoses))}"]
    return "; ".join(texts)


def _grafted(
    subject: Subject, reference: Reference, values: Sequence[Any], wanted: Sequence[int]
) -> Callable[..., Any]:
    """Return the reference with the backward of the subject, and without outputs that it gives no gradient to."""
    leaves = leaves_of(values, wanted, torch.preserve_format)
    with torch.enable_grad():
        attached = [o.requires_grad for o in leaves_in(reference.subject(*leaves)) if is_real(o)]

    def outputs_of(result: Any) -> list[Tensor]:
        return list(compress([o for o in leaves_in(result) if is_real(o)], attached))

    class Grafted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Any) -> Any:
            ctx.values = values
            wide = any(is_real(value) and value.dtype == torch.float64 for value in values)
            result = (reference.wide if wide else reference.subject)(*values)
            outputs = outputs_of(result)
            return outputs[0].clone() if len(outputs) == 1 else tuple(o.clone() for o in outputs)

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> Any:
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            leaves = leaves_of(ctx.values, wanted, torch.preserve_format)
            with torch.enable_grad():
                result = subject(*leaves)
            outputs = outputs_of(result)
            pairs = [(o, u.to(o)) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in pairs], [leaves[i] for i in wanted], [u for _, u in pairs], allow_unused=True
            )
            by_place = dict(zip(wanted, found, strict=True))
            return tuple(by_place.get(i) for i in range(len(leaves)))

    return Grafted.apply


def reuse(
    subject: Subject,
    values: Sequence[Any],
    others: Sequence[Any],
    wanted: Sequence[int],
    right: Callable[[Outcome, Sequence[Any]], bool],
) -> Iterator[Finding]:
    """Refill the same storage with other values: the old answer, or one that overwrites it, is a fault.

    Args:
        subject: what is called.
        values: the inputs of the first call.
        others: other values in the same shapes.
        wanted: the places of the inputs that get gradients.
        right: whether an outcome is right at some values, as far as can be told.
    """
    # Numbers and lists stay as they are, as in the storage that is refilled.
    others = [
        other if isinstance(other, Tensor) else value for value, other in zip(values, others, strict=True)
    ]
    for places in ([], wanted) if wanted else ([],):  # an old result has no graph left to go back through
        if found := list(_reuse(subject, values, others, places, right)):
            yield from found
            return


def _reuse(
    subject: Subject,
    values: Sequence[Any],
    others: Sequence[Any],
    wanted: Sequence[int],
    right: Callable[[Outcome, Sequence[Any]], bool],
) -> Iterator[Finding]:
    leaves = leaves_of(values, wanted, torch.preserve_format)
    first, failed = watched(subject, leaves, wanted)
    if failed is not None:
        return
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(leaf, Tensor):
            # Not a change to autograd, nor to a cache that looks at versions.
            leaf.data.copy_(other)
    second, failed = watched(subject, leaves, wanted)
    if failed is not None:
        return
    if any(not same(live.detach(), kept) for live, kept in zip(first.live, first.outputs, strict=True)):
        inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, Tensor)}
        if not any(live.untyped_storage().data_ptr() in inputs for live in first.live):
            yield Finding(v.REUSED, "the second call writes into what the first one returned")
            return
    fresh, failed = watched(subject, leaves_of(others, wanted, torch.preserve_format), wanted)
    for kind, old, new, true in (
        ("result", first.outputs, second.outputs, fresh.outputs),
        ("gradient", [*first.gradients.values()], [*second.gradients.values()], [*fresh.gradients.values()]),
    ):
        pairs = list(zip(old, new, true, strict=False))
        stale = [a is not None and b is not None and a.numel() and same(a, b) for a, b, _ in pairs]
        differs = [c is not None and b is not None and not close(b, c) for _, b, c in pairs]
        if any(s and d for s, d in zip(stale, differs, strict=True)):
            yield Finding(
                v.REUSED, f"the same storage with other values gives the old {kind}: it is cached by address"
            )
            return
    if all(map(same, first.outputs, second.outputs)) and right(first, values) and not right(second, others):
        yield Finding(v.REUSED, "other values in the same shape give the old result")


class _Idle(Observer):
    """An observer under which kernels run and write nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def access(
        self, kind: str, order: tuple[str, str], pointers: np.ndarray, mask: np.ndarray, itemsize: int
    ) -> np.ndarray:
        self.limit -= 1
        if self.limit < 0:  # it waits for what is not written
            raise RuntimeError("a kernel waits for another")
        return mask if kind == "load" else np.zeros_like(mask)


def idleness(
    subject: Subject, values: Sequence[Any], wanted: Sequence[int], seen: Outcome
) -> Iterator[Finding]:
    """Take away what the kernels write: a result that stays the same is not theirs."""
    if not interpreted():
        return
    if not seen.memory.launches:
        yield Finding(v.NO_KERNEL, "no kernel was launched: torch did the work")
        return
    if not any(t.numel() for t in seen.outputs):
        return
    try:
        # Memory that was free may still hold the results; as an index a small number leads nowhere far.
        with watch(_Idle(100_000), 0), filled(None, number=3):
            idle = call(subject, leaves_of(values, wanted), wanted)
    except Exception:  # it cannot do without what they write
        return
    if agree(seen, idle) and all(close(left, idle.after[place]) for place, left in seen.after.items()):
        yield Finding(v.NO_KERNEL, "the result does not depend on what the kernels write: torch did the work")
