"""The function under a gradient check: a flat list of values goes in, outputs, gradients and slopes come out."""

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from itertools import compress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ...checks import in_float64

_SHAPE = re.compile(r"\[([\d, ]*)\]")  # in torch's message
Gradient = Callable[..., Any] | Sequence[Any]


def is_real(value: Any) -> bool:
    """Return whether ``value`` is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def cast(values: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    """Return the values detached, with every floating-point tensor in ``dtype`` (None keeps its own)."""
    return [value.detach().to(dtype or value.dtype) if is_real(value) else value for value in values]


def epsilon(dtype: torch.dtype) -> float:
    """Return the distance from 1 to the next number, by which dtypes are ordered."""
    return torch.finfo(dtype).eps


class Narrowed(TorchFunctionMode):
    """Inside the block ``dtypes`` collects what functions give that are handed a wider floating-point dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        widest = min(
            (epsilon(leaf.dtype) for leaf in tree_leaves((args, kwargs)) if is_real(leaf)), default=1.0
        )
        self.dtypes |= {
            leaf.dtype for leaf in tree_leaves(result) if is_real(leaf) and epsilon(leaf.dtype) > widest
        }
        return result


class ShapeError(Exception):
    """An analytic gradient has the shape ``got``, its input the shape ``wanted``.

    ``position`` is the place among the checked inputs and ``gradient`` the gradient, where they are known.
    """

    def __init__(
        self,
        message: str,
        got: Sequence[int],
        wanted: Sequence[int],
        position: int = -1,
        gradient: Tensor | None = None,
    ) -> None:
        super().__init__(message)
        self.got, self.wanted = tuple(got), tuple(wanted)
        self.position, self.gradient = position, gradient


class MutationError(Exception):
    """The function writes into a tensor that its gradient depends on; ``name`` and ``text`` are the diagnosis."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name, self.text = name, text


class Function:
    """A function of a flat list of values: the arguments of ``fn`` and, for a module, its parameters after them.

    Args:
        fn: a torch function or a module.
        inputs: its positional arguments.
        gradient: None for autograd; a callable of the same arguments that returns one gradient per checked
            input; or those gradients themselves.
        names: the names of ``inputs``; None takes them from the signature.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Any],
        gradient: Gradient | None,
        names: Sequence[str] | None,
    ) -> None:
        self.fn, self.gradient = fn, gradient
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self.arguments = len(inputs)
        self.parameters: list[str] = []
        self.values = [_own(value) for value in inputs]
        self.attached: list[bool] | None = None  # which outputs count; None for all
        self.names = list(names) if names is not None else _argument_names(fn, len(inputs))
        if len(self.names) != len(inputs):
            raise ValueError(f"names: expected {len(inputs)} names, one per input, got {len(self.names)}")
        if isinstance(fn, torch.nn.Module):
            self.parameters = [name for name, _ in fn.named_parameters()]
            self.names += self.parameters
            self.values += [parameter for _, parameter in fn.named_parameters()]
        real = [i for i, value in enumerate(self.values) if is_real(value)]
        wanted = [i for i in real if self.values[i].requires_grad]
        arguments = [i for i in wanted if i < self.arguments] or [i for i in real if i < self.arguments]
        self.checked = arguments + [i for i in wanted if i >= self.arguments]
        if not self.checked:
            raise ValueError("inputs: none is a floating-point tensor, so there is no gradient to check")

    @property
    def can_move(self) -> bool:
        """Return whether the analytic gradient is known at other points than the given one."""
        return self.gradient is None or callable(self.gradient)

    def outputs(self, values: Sequence[Any]) -> list[Tensor]:
        """Return the floating-point outputs at ``values``."""
        arguments = values[: self.arguments]
        if isinstance(self.fn, torch.nn.Module):
            state = dict(zip(self.parameters, values[self.arguments :], strict=True))
            dtype = next((value.dtype for value in values if is_real(value)), None)
            for name, buffer in self.fn.named_buffers():
                state[name] = buffer.detach().to(dtype if buffer.is_floating_point() else None, copy=True)
            result = torch.func.functional_call(self.fn, state, tuple(arguments))
        else:
            result = self.fn(*arguments)
        outputs = [output for output in leaves_in(result) if is_real(output)]
        if not outputs:
            raise TypeError(f"{self.name} must return real tensors, got {type(result).__name__}")
        return outputs if self.attached is None else list(compress(outputs, self.attached))

    def leaves(self, values: Sequence[Any]) -> list[Any]:
        """Return the values, the checked ones as leaves that require a gradient."""
        return [v.detach().requires_grad_() if i in self.checked else v for i, v in enumerate(values)]

    def leave_out_detached(self, values: Sequence[Any]) -> None:
        """Leave out, from here on, the outputs that no gradient comes back from, unless those are all there are."""
        with torch.enable_grad():
            attached = [output.requires_grad for output in self.outputs(self.leaves(values))]
        if any(attached):
            self.attached = attached

    def flat(self, values: Sequence[Any]) -> Tensor:
        """Return all outputs at ``values`` in one float64 vector, without a graph."""
        with torch.no_grad():
            return torch.cat([in_float64(output).reshape(-1) for output in self.outputs(values)])

    def analytic(self, values: Sequence[Any], cotangents: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """Return the gradients of the checked inputs, up to three times: twice on one graph, once on another."""
        if self.gradient is not None:
            given = self.gradient
            return [self._given(given(*values) if callable(given) else given, values) for _ in range(2)]
        graph = self._graph(values, cotangents)
        rounds = [self._autograd(*graph, retain=True)]
        # A function need not allow a second backward.
        with contextlib.suppress(RuntimeError):
            rounds.append(self._autograd(*graph, retain=False))
        return [*rounds, self.pullback(values, cotangents)]

    def pullback(self, values: Sequence[Any], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Return autograd's gradients of the checked inputs for the upstream gradients ``cotangents``."""
        return self._autograd(*self._graph(values, cotangents), retain=False)

    def _graph(
        self, values: Sequence[Any], cotangents: Sequence[Tensor]
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Any]]:
        """Return the outputs that require a gradient, each with its cotangent, and the leaves."""
        leaves = self.leaves(values)
        with torch.enable_grad():
            outputs = self.outputs(leaves)
        return [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad], leaves

    def _autograd(
        self, pairs: list[tuple[Tensor, Tensor]], leaves: list[Any], retain: bool
    ) -> list[Tensor | None]:
        if not pairs:
            return [None] * len(self.checked)
        outputs, cotangents = zip(*pairs, strict=True)
        inputs = [leaves[i] for i in self.checked]
        try:
            found = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=retain, allow_unused=True)
        except RuntimeError as error:
            if "invalid gradient" in str(error) and "shape" in str(error):
                shapes = [
                    [int(size) for size in re.findall(r"\d+", text)] for text in _SHAPE.findall(str(error))
                ]
                raise ShapeError(str(error), *(shapes if len(shapes) == 2 else [(), ()])) from error
            if retain and "modified by an inplace operation" in str(error):
                raise MutationError(
                    "mutated saved tensor",
                    "the forward writes in place into a tensor that it has saved for the backward: autograd "
                    "refuses to read it",
                ) from error
            raise
        return [None if g is None else g.detach().to_dense().clone() for g in found]

    def _given(self, gradients: Any, values: Sequence[Any]) -> list[Tensor | None]:
        if isinstance(gradients, (Tensor, np.ndarray, float, int)):
            gradients = [gradients]
        gradients = list(gradients)
        if len(gradients) != len(self.checked):
            raise ValueError(
                f"gradient: expected {len(self.checked)} gradients, one per checked input "
                f"({', '.join(self.names[i] for i in self.checked)}), got {len(gradients)}"
            )
        result: list[Tensor | None] = []
        for position, (i, gradient) in enumerate(zip(self.checked, gradients, strict=True)):
            if gradient is None:
                result.append(None)
                continue
            tensor = torch.as_tensor(gradient).detach().to(values[i].device).clone()
            if tensor.shape != values[i].shape:
                got, wanted = tuple(tensor.shape), tuple(values[i].shape)
                message = f"the gradient of {self.names[i]} has shape {got}, the input {wanted}"
                raise ShapeError(message, got, wanted, position, tensor)
            result.append(tensor)
        return result


def leaves_in(result: Any) -> list[Any]:
    """Return what is in tuples, lists, dicts, dataclasses, namespaces; a pytree takes derived classes whole."""
    found = []
    for leaf in tree_leaves(result):
        inner: Any = leaf if isinstance(leaf, (list, tuple)) else None
        if isinstance(leaf, dict):
            inner = leaf.values()
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            inner = (getattr(leaf, field.name) for field in fields(leaf) if hasattr(leaf, field.name))
        elif isinstance(leaf, SimpleNamespace):
            inner = vars(leaf).values()
        found += [leaf] if inner is None else leaves_in(list(inner))
    return found


def _own(value: Any) -> Any:
    """Return a copy of a tensor of inference mode, which cannot require a gradient outside of it."""
    if isinstance(value, Tensor) and value.is_inference():
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value


def _argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    target = fn.forward if isinstance(fn, torch.nn.Module) else fn
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds][:count]
    return names + [f"input[{i}]" for i in range(len(names), count)]


def slopes(
    function: Function,
    values: Sequence[Any],
    index: int,
    elements: np.ndarray,
    weights: Sequence[Tensor],
    step: float,
    one_sided: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and second differences of ``weight . output`` for some elements of one input.

    Args:
        function, values: the function and the point.
        index: the value that is moved.
        elements: flat indices into it.
        weights: a float64 vector for each output.
        step: the difference step, relative to max(1, |x|).
        one_sided: 0 for centered differences, +1 or -1 for a forward or backward one.

    Returns:
        Two arrays of a row per output.
    """
    base = values[index]
    sizes = [len(weight) for weight in weights]
    result, bends = np.empty((2, len(weights), len(elements)))
    centre_output = function.flat(values)
    moved = list(values)
    for k, element in enumerate(elements):
        where = tuple(int(c) for c in np.unravel_index(element, base.shape))
        centre = float(base[where])
        h = step * max(1.0, abs(centre))
        ends = []
        for sign in (1, -1):
            moved[index] = base.clone()
            if one_sided in (0, sign):
                moved[index][where] = centre + sign * h
            ends.append((float(moved[index][where]), function.flat(moved)))
        (high, above), (low, below) = ends
        for found, change, over in (
            (result, above - below, high - low or float("nan")),
            (bends, (above - centre_output) + (below - centre_output), h),
        ):
            for row, weight, part in zip(found, weights, change.split_with_sizes(sizes), strict=True):
                row[k] = float(weight @ part) / over
        bends[:, k] /= h
    return result, bends


def moving(function: Function, values: Sequence[Any]) -> Tensor:
    """Return which elements of the outputs depend on the checked inputs; all if it cannot be told.

    What a mask has set stays as it is where they change, and its rounding tells nothing of theirs.
    """
    here = function.flat(values)
    result = torch.zeros_like(here, dtype=torch.bool)
    for factor in (-1, 0.5):
        with contextlib.suppress(Exception):  # it may not run there
            result |= here != function.flat(
                [factor * v if i in function.checked else v for i, v in enumerate(values)]
            )
    return result if result.any() else ~result


def rounds_within(function: Function, native: Sequence[Any], values: Sequence[Any], weight: Tensor) -> float:
    """Return how many times as large as its inputs the numbers are that a function rounds; 1 if they are no larger.

    By ``(x + 1).var()`` of small ones they are: in the inputs' dtypes the outputs lose so many times what roundings of
    the checked inputs cost them.

    Args:
        function: the function.
        native: the point in the inputs' own dtypes.
        values: the same in those that the differences are taken in.
        weight: a float64 vector over all outputs.
    """
    here, draw = function.flat(values), drawing(0)
    moved = list(values)
    for i in function.checked:
        moved[i] = values[i] * (1 + epsilon(native[i].dtype) * _signed(values[i], draw))
    with contextlib.suppress(Exception):  # it may not run there
        own, lost = (float((weight * (function.flat(other) - here)).norm()) for other in (moved, native))
        ratio = lost / own if own else math.inf if lost else 1.0
        return ratio if ratio > 4 else 1.0
    return 1.0


def drawing(seed: int) -> Callable[..., Tensor]:
    """Return ``draw(torch.rand, *sizes)``: from a seed, on the CPU whatever the default device is."""
    generator = torch.Generator().manual_seed(seed)
    return lambda kind, *args: kind(*args, generator=generator, device="cpu")


def _signed(like: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Return random numbers of either sign, between 1/2 and 1 in size."""
    drawn = draw(torch.rand, like.shape) * 2 - 1
    return (drawn + drawn.sign()).to(like) / 2


def is_rough(
    function: Function, values: Sequence[Any], weight: Tensor, dtype: torch.dtype, noise: float
) -> bool:
    """Return whether ``weight . outputs`` jumps where the checked inputs move by roundings of ``dtype``.

    Over so short a way a cubic polynomial fits a smooth function, up to ``noise`` relative to its size and slope.
    """
    draw, step = drawing(0), epsilon(dtype)

    def unit(value: Tensor) -> Tensor:
        return _signed(value, draw) * value.abs().clamp(min=1)

    units = {i: unit(values[i]) for i in function.checked}
    places = torch.arange(8.0, device="cpu") + draw(torch.rand, 8)
    found = []
    for place in places.tolist():
        close = [v + place * step * units[i] if i in units else v for i, v in enumerate(values)]
        found.append(function.flat(close))
    outputs = torch.stack(found)
    moved = (outputs != outputs[0]).any(0)
    results = outputs[:, moved] @ weight[moved]
    basis, _ = torch.linalg.qr(torch.vander(places.double(), N=4))
    rest = results - basis @ (basis.T @ results)
    size = results.abs().max() + (results.max() - results.min()) / step
    return bool(rest.abs().max() > noise * size)
