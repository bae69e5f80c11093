"""A recording of the operators that a function runs, to be replayed with one derivative changed.

``Tape`` records every ATen operator, those inside an ``autograd.Function`` included, and replays them under autograd.
So the replay has the right gradient, whatever backward the function itself has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ...checks import in_float64
from .function import Function

DETACHES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
MAX_STEPS = 200


class NotRecordedError(Exception):
    """The function does what a tape cannot replay."""


@dataclass(frozen=True)
class Slot:
    """A slot stands for a tensor on the tape."""

    number: int


@dataclass(frozen=True)
class Step:
    """A step is one call of an operator.

    Attributes:
        func: the operator; an in-place one is recorded as its functional form.
        args, kwargs: its arguments, a ``Slot`` for each tensor that the tape computes.
        outputs: a slot for each tensor among its results.
        overwritten: for an operator that was in place, the slot that it wrote to.
        rank: the number of dimensions of its result.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Slot | None, ...]
    overwritten: Slot | None
    rank: int

    @property
    def name(self) -> str:
        """Return the operator's name without namespace and overload: ``mul``, ``_softmax``."""
        return str(self.func.name()).removeprefix("aten::").partition(".")[0]

    def slots(self) -> list[Slot]:
        """Return the slots among the arguments, in order."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Slot)]


# Maps the arguments of a changed step and its right results to the results that stand for them.
Change = Callable[[tuple[Any, ...], Any], Any]


class Tape(TorchDispatchMode):
    """A tape holds the operators that ``function`` runs at ``values``, from its inputs to its outputs.

    Raises:
        NotRecordedError: more than MAX_STEPS operators, or an in-place write seen through a view.
    """

    def __init__(self, function: Function, values: Sequence[Any]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._alive: list[Tensor] = []  # so that no other tensor takes an id or an address
        self._by_id: dict[int, Slot] = {}
        self._by_place: dict[tuple[Any, ...], Slot] = {}
        self._by_storage: dict[int, set[Slot]] = {}
        self._stale: set[Slot] = set()
        self.inputs = {i: self._new(value) for i, value in enumerate(values) if isinstance(value, Tensor)}
        with torch.no_grad(), self:
            outputs = function.outputs(values)
        self.outputs = [self._find(output) for output in outputs]

    def _new(self, tensor: Tensor) -> Slot:
        slot = Slot(len(self._alive))
        self._alive.append(tensor)
        self._by_id[id(tensor)] = slot
        self._by_place.setdefault(_place(tensor), slot)
        self._by_storage.setdefault(tensor.untyped_storage().data_ptr(), set()).add(slot)
        return slot

    def _find(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        slot = self._by_id.get(id(value))
        if slot is None and value.numel():
            slot = self._by_place.get(_place(value))
        if slot in self._stale:
            raise NotRecordedError("a view is used after its base was written")
        return value if slot is None else slot

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(self.steps) >= MAX_STEPS:
            raise NotRecordedError(f"more than {MAX_STEPS} operators")
        taken, options = tree_map(self._find, (tuple(args), dict(kwargs or {})))
        result = func(*args, **(kwargs or {}))
        overwritten = None
        if func._schema.is_mutable:
            overwritten = taken[0]
            functional = _functional(func)
            if functional is None or not isinstance(overwritten, Slot):
                raise NotRecordedError(f"{func} writes in place")
            func = functional
            storage = self._alive[overwritten.number].untyped_storage().data_ptr()
            self._stale |= self._by_storage[storage] - {overwritten}
            outputs: tuple[Slot | None, ...] = (overwritten,)
        else:
            outputs = tuple(
                self._new(leaf) if isinstance(leaf, Tensor) else None for leaf in tree_flatten(result)[0]
            )
        rank = result.ndim if isinstance(result, Tensor) else 0
        self.steps.append(Step(func, taken, options, outputs, overwritten, rank))
        return result

    def dependent(self, slot: Slot) -> set[Slot]:
        """Return ``slot`` and every slot that is computed from it."""
        found = {slot}
        for step in self.steps:
            if found.intersection(step.slots()):
                found.update(output for output in step.outputs if output is not None)
        return found

    def gradient(
        self,
        values: Sequence[Any],
        index: int,
        cotangents: Sequence[Tensor],
        changed: int = -1,
        change: Change | None = None,
    ) -> np.ndarray:
        """Return the gradient of input ``index`` in float64, flat, with one step changed.

        Args:
            values, cotangents: the point, and the upstream gradients of the outputs.
            changed: the number of the step that is changed.
            change: replaces the results of that step. None for a step that was in place: the backward then reads,
                for what earlier steps saved of the tensor that it wrote, the values after the write.

        Raises:
            NotRecordedError: the replay fails.
        """
        ((_, gradient),) = self._replay(values, index, cotangents, changed, change, False)
        return gradient

    def by_use(
        self, values: Sequence[Any], index: int, cotangents: Sequence[Tensor]
    ) -> list[tuple[str, np.ndarray]]:
        """Return the part of the gradient that comes through each use of input ``index``, with its operator."""
        return self._replay(values, index, cotangents, -1, None, True)

    def _replay(
        self,
        values: Sequence[Any],
        index: int,
        cotangents: Sequence[Tensor],
        changed: int,
        change: Change | None,
        split: bool,
    ) -> list[tuple[str, np.ndarray]]:
        """Run the steps under autograd, with one leaf for the input, or one for each use of it."""
        base = values[index].detach()
        leaves = [("", base.clone().requires_grad_())]
        memory: dict[Slot, Any] = {slot: values[i] for i, slot in self.inputs.items()}
        memory[self.inputs[index]] = leaves[0][1]
        written: list[tuple[Tensor, Tensor]] = []  # before and after

        def read(saved: Tensor) -> Tensor:
            return next((a for b, a in written if _place(b) == _place(saved)), saved)

        def run(number: int, step: Step) -> Any:
            def take(leaf: Any) -> Any:
                value = memory[leaf] if isinstance(leaf, Slot) else leaf
                if split and value is leaves[0][1] and step.func not in DETACHES:
                    leaves.append((step.name, base.clone().requires_grad_()))
                    return leaves[-1][1]
                return value

            args, kwargs = tree_map(take, (step.args, step.kwargs))
            result = args[0] if step.func in DETACHES else step.func(*args, **kwargs)
            if number == changed and change is not None:
                return change(args, result)
            if number == changed:
                written.append((args[0].detach(), result.detach()))
            return result

        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, read):
                for number, step in enumerate(self.steps):
                    results = tree_flatten(run(number, step))[0]
                    memory.update(
                        (slot, value)
                        for slot, value in zip(step.outputs, results, strict=True)
                        if slot is not None
                    )
                outputs = [memory[output] if isinstance(output, Slot) else output for output in self.outputs]
                pairs = [(o, c.to(o)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
                found: Sequence[Tensor | None] = [None] * len(leaves)
                if pairs:
                    graph, weights = zip(*pairs, strict=True)
                    found = torch.autograd.grad(graph, [v for _, v in leaves], weights, allow_unused=True)
        except Exception as error:
            raise NotRecordedError(str(error)) from error
        flat = [torch.zeros_like(base) if gradient is None else gradient for gradient in found]
        return [
            (name, in_float64(gradient).reshape(-1).numpy())
            for (name, _), gradient in list(zip(leaves, flat, strict=True))[int(split) :]
        ]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _functional(func: Any) -> Any:
    """Return the operator that computes what the in-place ``func`` writes; None if there is none."""
    packet, _, overload = str(func.name()).removeprefix("aten::").partition(".")
    if not packet.endswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, packet[:-1], None), overload or "default", None)
