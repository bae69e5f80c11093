"""Mistakes that are common in a hand-written backward, tried one by one on a tape of the function.

Each mistake changes the derivative of one recorded operator and keeps its value. A mistake explains a wrong gradient
if the changed tape has that gradient, at the point of the check and at others.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tape import DETACHES, Change, Slot, Step, Tape


@dataclass(frozen=True)
class Mistake:
    """One operator with a wrong derivative.

    Attributes:
        name, text: name and text of the diagnosis.
        step: number of the operator on the tape.
        change: gives the operator's results with the wrong derivative; None for a tensor that is written after it
            was saved.
    """

    name: str
    text: str
    step: int
    change: Change | None


Candidate = tuple[str, str, Change | None]

# The derivative of an elementwise operator y = f(z), as one writes it.
DERIVATIVES = {
    "abs": "sign(z)", "cos": "-sin(z)", "elu": "elu'(z)", "erf": "2 / sqrt(pi) exp(-z^2)", "exp": "exp(z)",
    "expm1": "exp(z)", "gelu": "gelu'(z)", "hardsigmoid": "hardsigmoid'(z)", "hardswish": "hardswish'(z)",
    "log": "1 / z", "log1p": "1 / (1 + z)", "log_sigmoid_forward": "sigmoid(-z)", "mish": "mish'(z)",
    "reciprocal": "-1 / z^2", "rsqrt": "-1/2 z^(-3/2)", "sigmoid": "y (1 - y), y = sigmoid(z)",
    "silu": "silu'(z)", "sin": "cos(z)", "softplus": "sigmoid(z)", "sqrt": "1 / (2 sqrt(z))",
    "tanh": "1 - tanh(z)^2",
}  # fmt: skip
MASKS = {
    "clamp": "min < z < max", "clamp_max": "z < max", "clamp_min": "z > min", "hardtanh": "-1 < z < 1",
    "leaky_relu": "z > 0", "relu": "z > 0", "threshold": "z > threshold",
}  # fmt: skip
# A derivative that is written in terms of the output y, and is given the input z instead.
OF_THE_OUTPUT: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "exp": ("z", lambda z: z),
    "sigmoid": ("z (1 - z)", lambda z: z * (1 - z)),
    "sqrt": ("1 / (2 z)", lambda z: 0.5 / z),
    "tanh": ("1 - z^2", lambda z: 1 - z * z),
}
REDUCTIONS = ("sum", "mean", "amax", "amin", "logsumexp", "var", "prod", "cumsum", "linalg_vector_norm")
MAX_DIMS = 4
SQUARE = "the 2 of the square is missing"


def constants(tape: Tape, index: int) -> Iterator[Mistake]:
    """Yield the mistakes that lose a constant factor."""
    return _on_the_way(tape, index, _constants)


def derivatives(tape: Tape, index: int) -> Iterator[Mistake]:
    """Yield the mistakes in the derivative of an operator: activations, masks, Jacobians, axes, saved values."""
    inputs = set(tape.inputs.values())

    def candidates(step: Step, reached: set[Slot]) -> Iterator[Candidate]:
        if step.func in DETACHES:
            text = "a detach() stops the gradient, and the function changes through what it detaches"
            yield "detached path", text, lambda args, right: right.detach()
        if step.overwritten is not None:
            text = f"the backward reads a tensor that {step.name}_ has written in place since it was saved"
            yield (
                "mutated saved tensor",
                f"{text}: the derivative is taken of the value after the write",
                None,
            )
        yield from _activations(step)
        yield from _softmax(step)
        yield from _axes(step)
        yield from _products(step, reached, inputs)

    return _on_the_way(tape, index, candidates)


def paths(tape: Tape, index: int) -> Iterator[Mistake]:
    """Yield the mistakes that lose one of several paths that meet inside the function, or flip its sign."""
    start = tape.inputs[index]

    def candidates(step: Step, reached: set[Slot]) -> Iterator[Candidate]:
        for k, argument in enumerate(step.args):
            inside = isinstance(argument, Slot) and argument in reached and argument != start
            if inside and step.func not in DETACHES:
                path = f"the path through {step.name} (operand {k + 1})"
                lost = f"{path} is left out: a term of the backward is missing, or detached"
                yield "detached path", lost, _scaled_path(step, k, 0.0)
                yield "sign flipped", f"{path} has the wrong sign", _scaled_path(step, k, -1.0)

    return _on_the_way(tape, index, candidates)


def _on_the_way(
    tape: Tape, index: int, candidates: Callable[[Step, set[Slot]], Iterator[Candidate]]
) -> Iterator[Mistake]:
    """Yield the mistakes of every step that takes what was computed from the input."""
    reached = tape.dependent(tape.inputs[index])
    for number, step in enumerate(tape.steps):
        if reached.intersection(step.slots()):
            for name, text, change in candidates(step, reached):
                yield Mistake(name, text, number, change)


def _derived(value: Tensor, like: Tensor) -> Tensor:
    """Give ``value`` the derivative of ``like``."""
    return like + (value - like).detach()


def _constant(value: Any) -> float | None:
    """Return a scalar operand that a backward may lose; None for a tensor, 0 and 1."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
        value = value.item()
    usable = isinstance(value, (int, float)) and math.isfinite(value) and abs(value) not in (0, 1)
    return float(value) if usable else None


def _constants(step: Step, reached: set[Slot]) -> Iterator[Candidate]:
    factor = _constant(step.args[1]) if len(step.args) > 1 else None
    if step.name == "pow" and factor is not None:
        words = SQUARE if factor == 2 else f"the exponent {factor:g} is missing"
        yield "constant factor", words, lambda args, right: _derived(right, right / factor)
    elif step.name == "mul" and factor is not None:
        words = f"the factor {factor:g} of mul is missing"
        yield "constant factor", words, lambda args, right: _derived(right, right / factor)
    elif step.name == "div" and factor is not None:
        words = f"the division by {factor:g} is missing"
        yield "constant factor", words, lambda args, right: _derived(right, right * factor)
    elif step.name in ("mean", "sum"):

        def change(args: tuple[Any, ...], right: Tensor) -> Tensor:
            count = args[0].numel() / max(1, right.numel())
            return _derived(right, right * count if step.name == "mean" else right / count)

        words = "a sum where a mean belongs" if step.name == "mean" else "a mean where a sum belongs"
        yield "constant factor", words, change


def _activations(step: Step) -> Iterator[Candidate]:
    name = step.name
    kind = name.removesuffix("_forward")
    exponent = _constant(step.args[1]) if name == "pow" else None
    if exponent is not None:
        what = f"the derivative of the power, {exponent:g} z^{exponent - 1:g},"
    elif name in DERIVATIVES:
        what = f"the derivative of {kind}, {DERIVATIVES[name]},"
    elif name in MASKS:
        what = f"the mask {MASKS[name]} of {kind}"
    else:
        return
    pattern = "mask" if name in MASKS else "activation derivative"

    def derivative(factor: Callable[[tuple[Any, ...], Tensor], Tensor]) -> Change:
        """Make ``factor``, of the arguments and the output, the derivative."""

        def change(args: tuple[Any, ...], result: Any) -> Any:
            right, *rest = result if isinstance(result, tuple) else (result,)
            wrong = _derived(right, args[0] * factor(args, right).detach())
            return (wrong, *rest) if rest else wrong

        return change

    def at_the_output(args: tuple[Any, ...], y: Tensor) -> Tensor:
        leaf = y.detach().requires_grad_()
        again = step.func(leaf, *args[1:])
        return torch.autograd.grad((again[0] if isinstance(again, tuple) else again).sum(), leaf)[0]

    yield pattern, f"{what} is missing", derivative(lambda args, y: torch.ones_like(y))
    if name in OF_THE_OUTPUT:
        formula, of = OF_THE_OUTPUT[name]
        text = f"{formula} stands for {what[4:].rstrip(',')}: the formula for the output y, applied to the input z"
        yield pattern, text, derivative(lambda args, y: of(args[0]))
    if name == "sigmoid":
        yield pattern, f"{what} lacks 1 - y", derivative(lambda args, y: y)
        yield pattern, f"{what} lacks y", derivative(lambda args, y: 1 - y)
    if name not in MASKS:
        yield pattern, f"{what} is taken at the output, not at the input z", derivative(at_the_output)


def _softmax(step: Step) -> Iterator[Candidate]:
    """Yield the mistakes in the Jacobians of softmax and layer norm, which are not diagonal."""
    if step.name == "native_layer_norm":

        def constant_statistics(args: tuple[Any, ...], result: Any) -> Any:
            x, _, weight, bias, _ = args
            right, mean, rstd = result
            like = (x - mean.detach()) * rstd.detach()
            like = like if weight is None else like * weight
            return _derived(right, like if bias is None else like + bias), mean, rstd

        text = "the derivative of layer_norm lacks the terms through the mean and the variance"
        yield "off-diagonal terms", text, constant_statistics
    if step.name not in ("_softmax", "_log_softmax"):
        return
    log, kind = step.name == "_log_softmax", step.name.removeprefix("_")

    def summed_over(dim: int | None) -> Change:
        """Sum over ``dim`` in the derivative, or leave the sum out for None."""

        def change(args: tuple[Any, ...], right: Tensor) -> Tensor:
            s = (right.exp() if log else right).detach()
            centred = args[0] if dim is None else args[0] - (s * args[0]).sum(dim, keepdim=True)
            return _derived(right, centred if log else s * centred)

        return change

    def diagonal(args: tuple[Any, ...], right: Tensor) -> Tensor:
        s = (right.exp() if log else right).detach()
        return _derived(right, args[0] * (1 - s) * (1 if log else s))

    text = f"only the diagonal of the Jacobian of {kind} is there, {'1 - s' if log else 's (1 - s)'}"
    yield "off-diagonal terms", text, diagonal
    text = f"the term {'s sum(g)' if log else 's sum(s g)'} of the derivative of {kind} is missing"
    yield "off-diagonal terms", text, summed_over(None)
    if not log:
        text = "the derivative of softmax is missing"
        yield "activation derivative", text, lambda args, right: _derived(right, args[0])
    for dim in range(MAX_DIMS):
        text = f"the sum in the derivative of {kind} runs over dimension {dim}, not over dimension {step.args[1]}"
        yield "wrong axis", text, summed_over(dim)


def _axes(step: Step) -> Iterator[Candidate]:
    """Yield the mistakes in the dimension of a reduction, of the forward or of the backward."""
    place = 2 if step.name == "linalg_vector_norm" else 1
    dims = step.args[place] if step.name in REDUCTIONS and len(step.args) > place else None
    dim = dims[0] if isinstance(dims, (list, tuple)) and len(dims) == 1 else dims
    if isinstance(dim, int):

        def along(other: int) -> Change:
            def change(args: tuple[Any, ...], right: Tensor) -> Tensor:
                _require(other < args[0].ndim)
                like = step.func(*args[:place], other if dims is dim else [other], *args[place + 1 :])
                return _derived(right, like.reshape(right.shape))

            return change

        for other in range(MAX_DIMS):
            text = f"the gradient of {step.name} over dimension {dim} is spread over dimension {other}"
            yield "wrong axis", text, along(other)
    if step.name not in ("add", "sub", "mul", "div", "addmm"):
        return
    for k in range(2):

        def turned(args: tuple[Any, ...], right: Tensor, k: int = k) -> Tensor:
            small = args[k]
            _require(small.ndim == 1 and right.ndim == 2 and set(right.shape) == set(small.shape))
            return _split(step, args, k, step.func(*_detached(args, k, small[:, None])))

        text = f"what {step.name} broadcasts over dimension 0 (operand {k + 1}) is reduced over dimension 1"
        yield "wrong axis", text, turned


def _products(step: Step, reached: set[Slot], inputs: set[Slot]) -> Iterator[Candidate]:
    """Yield the mistakes that lose a factor of an elementwise product or transpose one of a matrix product."""
    first = 1 if step.name == "addmm" else 0
    for k in (first, first + 1):
        argument, j = step.args[k] if k < len(step.args) else None, 2 * first + 1 - k
        if not isinstance(argument, Slot) or argument not in reached:
            continue
        if step.name == "mul" and isinstance(step.args[j], (Slot, Tensor)) and step.args[j] not in inputs:

            def alone(args: tuple[Any, ...], right: Tensor, k: int = k) -> Tensor:
                return _split(step, args, k, args[k].expand_as(right))

            def unmasked(args: tuple[Any, ...], right: Tensor, k: int = k, j: int = j) -> Tensor:
                mask = args[j]
                _require(not mask.all() and ((mask == 0) | (mask == mask.max())).all())
                return _split(step, args, k, args[k].expand_as(right))

            yield "mask", "the mask that mul applies is missing", unmasked
            yield (
                "missing factor",
                f"the other operand of mul (operand {j + 1}) is missing as a factor",
                alone,
            )
        if step.name in ("mm", "addmm", "bmm", "mv"):

            def transposed(args: tuple[Any, ...], right: Tensor, k: int = k, j: int = j) -> Tensor:
                swapped = [arg.mT if i == j else arg for i, arg in enumerate(args)]
                return _split(step, args, k, step.func(*_detached(swapped, k, args[k])))

            text = f"an operand of {step.name} (operand {j + 1}) stands transposed in its derivative"
            yield "transposed", text, transposed


def _require(condition: Any) -> None:
    """Refuse a mistake that cannot be made with these operands."""
    if not condition:
        raise ValueError("the operands do not allow this mistake")


def _detached(args: Any, k: int, kept: Any) -> list[Any]:
    """Detach every operand, and put ``kept`` in place of operand ``k``."""
    detached = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    return [*detached[:k], kept, *detached[k + 1 :]]


def _split(step: Step, args: tuple[Any, ...], k: int, path: Tensor) -> Tensor:
    """Run the step with the derivative of ``path`` for operand ``k``, and its own for the others."""
    rest = [arg.detach() if i == k else arg for i, arg in enumerate(args)]
    return step.func(*rest) + path - path.detach()


def _scaled_path(step: Step, k: int, scale: float) -> Change:
    """Multiply the gradient through operand ``k`` by ``scale``."""

    def change(args: tuple[Any, ...], right: Any) -> Any:
        kept = scale * args[k] + (1 - scale) * args[k].detach()
        return step.func(*args[:k], kept, *args[k + 1 :])

    return change
