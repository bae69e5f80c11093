"""Mistakes that are made in a backward by hand, tried one after another on a tape of the function.

Each changes the derivative of one recorded operator and leaves its value alone. Where the gradient of the
changed tape is the gradient under suspicion, here and at other points, the mistake explains it.
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
        name, text: of the diagnosis.
        step: number of the operator on the tape.
        change: its results with the wrong derivative; None for a tensor that was written after it was saved.
    """

    name: str
    text: str
    step: int
    change: Change | None


def derived(value: Tensor, like: Tensor) -> Tensor:
    """``value``, with the derivative of ``like``."""
    return like + (value - like).detach()


# Derivatives as they are written by hand: of the input z or of the output y.
DERIVATIVES = {
    "tanh": "1 - tanh(z)^2",
    "sigmoid": "y (1 - y), y = sigmoid(z)",
    "exp": "exp(z)",
    "log": "1 / z",
    "sqrt": "1 / (2 sqrt(z))",
    "rsqrt": "-1/2 z^(-3/2)",
    "reciprocal": "-1 / z^2",
    "sin": "cos(z)",
    "cos": "-sin(z)",
    "erf": "2 / sqrt(pi) exp(-z^2)",
    "gelu": "gelu'(z)",
    "silu": "silu'(z)",
    "mish": "mish'(z)",
    "softplus": "sigmoid(z)",
    "elu": "elu'(z)",
    "log1p": "1 / (1 + z)",
    "expm1": "exp(z)",
    "abs": "sign(z)",
    "hardswish": "hardswish'(z)",
    "hardsigmoid": "hardsigmoid'(z)",
    "log_sigmoid_forward": "sigmoid(-z)",
}
MASKS = {
    "relu": "z > 0",
    "leaky_relu": "z > 0",
    "clamp": "min < z < max",
    "clamp_min": "z > min",
    "clamp_max": "z < max",
    "hardtanh": "-1 < z < 1",
    "threshold": "z > threshold",
}
# The derivative in terms of the output, and the same formula fed with the input.
OF_THE_OUTPUT: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "tanh": ("1 - z^2", lambda z: 1 - z * z),
    "sigmoid": ("z (1 - z)", lambda z: z * (1 - z)),
    "exp": ("z", lambda z: z),
    "sqrt": ("1 / (2 z)", lambda z: 0.5 / z),
}


def constants(tape: Tape, index: int) -> Iterator[Mistake]:
    """Mistakes that put one factor before the whole gradient or before one path."""
    reached = tape.dependent(tape.inputs[index])
    for number, step in enumerate(tape.steps):
        if not reached.intersection(step.slots()):
            continue
        first, second = [*step.args, None, None][:2]
        if step.name == "pow" and (exponent := _number(second)) is not None:
            words = "the 2 of the square" if exponent == 2 else f"the exponent {exponent:g}"
            yield _scaled("constant factor", f"{words} is missing", number, 1 / exponent)
        elif step.name in ("mul", "div") and (factor := _number(second)) is not None:
            words = f"the factor {factor:g} of mul" if step.name == "mul" else f"the division by {factor:g}"
            scale = 1 / factor if step.name == "mul" else factor
            yield _scaled("constant factor", f"{words} is missing", number, scale)
        elif step.name in ("mean", "sum") and isinstance(first, Slot):
            yield from _averages(tape, number, step)


def derivatives(tape: Tape, index: int) -> Iterator[Mistake]:
    """Mistakes in the derivative of an operator itself: activations, masks, Jacobians, axes, saved values."""
    reached = tape.dependent(tape.inputs[index])
    for number, step in enumerate(tape.steps):
        if not reached.intersection(step.slots()):
            continue
        if step.func in DETACHES:
            yield Mistake(
                "detached path",
                "a detach() stops the gradient, and the function changes through what it detaches",
                number,
                lambda step, args, right: right.detach(),
            )
        if step.overwritten is not None:
            yield Mistake(
                "mutated saved tensor",
                f"the backward reads a tensor that {step.name}_ has written in place since it was saved: the "
                f"derivative is taken of the value after the write",
                number,
                None,
            )
        yield from _activations(number, step)
        yield from _normalisers(number, step)
        yield from _axes(number, step)
        yield from _products(number, step, reached, set(tape.inputs.values()))


def paths(tape: Tape, index: int) -> Iterator[Mistake]:
    """One path left out, or its sign turned, where several meet inside the function."""
    start = tape.inputs[index]
    reached = tape.dependent(start)
    for number, step in enumerate(tape.steps):
        for k, argument in enumerate(step.args):
            if not isinstance(argument, Slot) or argument not in reached or argument == start:
                continue
            place = f"{step.name} (operand {k + 1})"
            yield _path(
                "detached path",
                f"the path through {place} is left out: a term of the backward is missing, or detached",
                number,
                k,
                0.0,
            )
            yield _path("sign flipped", f"the path through {place} has the wrong sign", number, k, -1.0)


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
        value = value.item()
    usable = isinstance(value, (int, float)) and math.isfinite(value) and abs(value) not in (0, 1)
    return float(value) if usable else None


def _scaled(name: str, text: str, number: int, scale: float) -> Mistake:
    return Mistake(name, text, number, lambda step, args, right: derived(right, scale * right))


def _averages(tape: Tape, number: int, step: Step) -> Iterator[Mistake]:
    def change(step: Step, args: tuple[Any, ...], right: Tensor) -> Tensor:
        count = args[0].numel() / max(1, right.numel())
        return derived(right, right * count if step.name == "mean" else right / count)

    yield Mistake(
        "constant factor",
        "a sum where a mean belongs" if step.name == "mean" else "a mean where a sum belongs",
        number,
        change,
    )


def _activations(number: int, step: Step) -> Iterator[Mistake]:
    name = step.name
    if name == "pow" and isinstance(step.args[1], (int, float)):
        exponent = step.args[1]
        formula, kind = f"{exponent:g} z" + (f"^{exponent - 1:g}" if exponent != 2 else ""), "power"
    elif name in DERIVATIVES:
        formula, kind = DERIVATIVES[name], name.removesuffix("_forward")
    elif name in MASKS:
        formula, kind = MASKS[name], name
    else:
        return
    pattern = "mask" if name in MASKS else "activation derivative"
    what = f"the mask {formula} of {kind}" if name in MASKS else f"the derivative of {kind}, {formula},"

    def elementwise(slope: Callable[[Step, tuple[Any, ...], Tensor], Tensor]) -> Change:
        def change(step: Step, args: tuple[Any, ...], result: Any) -> Any:
            right = result[0] if isinstance(result, tuple) else result
            wrong = derived(right, args[0] * slope(step, args, right.detach()).detach())
            return (wrong, *result[1:]) if isinstance(result, tuple) else wrong

        return change

    def of_the_output(step: Step, args: tuple[Any, ...], right: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = right.detach().requires_grad_()
            again = step.func(leaf, *args[1:])
            again = again[0] if isinstance(again, tuple) else again
        return torch.autograd.grad(again.sum(), leaf)[0]

    yield Mistake(pattern, f"{what} is missing", number, elementwise(lambda s, a, y: torch.ones_like(y)))
    if name in OF_THE_OUTPUT:
        wrong, formula_of = OF_THE_OUTPUT[name]
        yield Mistake(
            pattern,
            f"{wrong} stands for {what.removeprefix('the ').rstrip(',')}: the formula for the output y, fed with "
            f"the input z",
            number,
            elementwise(lambda step, args, right: formula_of(args[0].detach())),
        )
    if name == "sigmoid":
        yield Mistake(pattern, f"{what} lacks 1 - y", number, elementwise(lambda step, args, right: right))
        yield Mistake(pattern, f"{what} lacks y", number, elementwise(lambda step, args, right: 1 - right))
    if name not in MASKS:
        yield Mistake(
            pattern, f"{what} is taken at the output, not at the input z", number, elementwise(of_the_output)
        )


def _normalisers(number: int, step: Step) -> Iterator[Mistake]:
    """Softmax and layer norm, whose Jacobians are not diagonal."""
    if step.name in ("_softmax", "_log_softmax"):
        log = step.name == "_log_softmax"
        kind = step.name.removeprefix("_")

        def softmax(args: tuple[Any, ...], right: Tensor) -> Tensor:
            return (right.exp() if log else right).detach()

        def over(dim: int | None) -> Change:
            """The Jacobian with its sums over ``dim``; without them for None."""

            def change(step: Step, args: tuple[Any, ...], right: Tensor) -> Tensor:
                z, s = args[0], softmax(args, right)
                shifted = z if dim is None else z - (s * z).sum(dim, keepdim=True)
                return derived(right, shifted if log else s * shifted)

            return change

        def diagonal(step: Step, args: tuple[Any, ...], right: Tensor) -> Tensor:
            s = softmax(args, right)
            return derived(right, args[0] * (1 - s) if log else args[0] * s * (1 - s))

        yield Mistake(
            "off-diagonal terms",
            f"only the diagonal of the Jacobian of {kind} is there, " + ("1 - p" if log else "s (1 - s)"),
            number,
            diagonal,
        )
        term = "p sum(g)" if log else "s sum(s g)"
        yield Mistake(
            "off-diagonal terms",
            f"the term {term} of the derivative of {kind} is missing",
            number,
            over(None),
        )
        if not log:
            yield Mistake(
                "activation derivative",
                "the derivative of softmax is missing",
                number,
                lambda step, args, right: derived(right, args[0]),
            )
        for dim in _other_dims(step, step.args[1]):
            yield Mistake(
                "wrong axis",
                f"the sum in the derivative of {kind} runs over dimension {dim}, not over dimension "
                f"{step.args[1]}",
                number,
                over(dim),
            )
    elif step.name == "native_layer_norm":

        def constant_statistics(step: Step, args: tuple[Any, ...], result: Any) -> Any:
            x, _, weight, bias, _ = args
            right, mean, rstd = result
            like = (x - mean.detach()) * rstd.detach()
            like = like if weight is None else like * weight
            return derived(right, like if bias is None else like + bias), mean, rstd

        yield Mistake(
            "off-diagonal terms",
            "the derivative of layer_norm lacks the terms through the mean and the variance",
            number,
            constant_statistics,
        )


def _other_dims(step: Step, dim: int) -> list[int]:
    """All dimensions that softmax may be taken over but ``dim``, at most four."""
    return [other for other in range(4) if other != dim]


REDUCTIONS = ("sum", "mean", "amax", "amin", "logsumexp", "var", "prod", "cumsum", "linalg_vector_norm")


def _axes(number: int, step: Step) -> Iterator[Mistake]:
    """A reduction over another dimension, and a broadcast operand reduced over another one."""
    if step.name in REDUCTIONS and len(step.args) > 1:
        place = 2 if step.name == "linalg_vector_norm" else 1
        dims = step.args[place] if len(step.args) > place else None
        dims = [dims] if isinstance(dims, int) else dims
        if isinstance(dims, (list, tuple)) and len(dims) == 1:

            def along(other: int) -> Change:
                def change(step: Step, args: tuple[Any, ...], right: Tensor) -> Tensor:
                    rank = args[0].ndim
                    if other >= rank or other == dims[0] % rank:
                        raise ValueError(f"dimension {other}")
                    named = other if isinstance(step.args[place], int) else [other]
                    like = step.func(*args[:place], named, *args[place + 1 :])
                    return derived(right, like.reshape(right.shape))

                return change

            for other in range(4):
                yield Mistake(
                    "wrong axis",
                    f"the gradient of {step.name} over dimension {dims[0]} is spread over dimension {other}",
                    number,
                    along(other),
                )
    for k, argument in enumerate(step.args[:2]):
        if step.name in ("add", "sub", "mul", "div", "addmm") and isinstance(argument, Slot):

            def turned(step: Step, args: tuple[Any, ...], right: Tensor, k: int = k) -> Tensor:
                small = args[k]
                if small.ndim != 1 or right.ndim != 2 or set(right.shape) != set(small.shape):
                    raise ValueError("not broadcast, or not square")
                others = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
                rest = [*args[:k], small.detach(), *args[k + 1 :]]
                others[k] = small[:, None]
                path = step.func(*others)
                return step.func(*rest) + path - path.detach()

            yield Mistake(
                "wrong axis",
                f"what {step.name} broadcasts over dimension 0 (operand {k + 1}) is reduced over dimension 1",
                number,
                turned,
            )


def _products(number: int, step: Step, reached: set[Slot], inputs: set[Slot]) -> Iterator[Mistake]:
    """A factor left out of an elementwise product, a transposed operand of a matrix product."""
    operands = list(enumerate(step.args))[:3]
    if step.name == "mul":
        for k, argument in operands[:2]:
            if not isinstance(argument, Slot):
                continue
            other = step.args[1 - k]
            if argument in reached and isinstance(other, (Slot, Tensor)) and other not in inputs:

                def alone(step: Step, args: tuple[Any, ...], right: Tensor, k: int = k) -> Tensor:
                    rest = [arg.detach() if i == k else arg for i, arg in enumerate(args)]
                    path = args[k].expand_as(right)
                    return step.func(*rest) + path - path.detach()

                def masks(step: Step, args: tuple[Any, ...], right: Tensor, k: int = k) -> Tensor:
                    other = args[1 - k]
                    if other.all() or not ((other == 0) | (other == other.max())).all():
                        raise ValueError("no mask")
                    return alone(step, args, right, k)

                yield Mistake("mask", "the mask that mul applies is missing", number, masks)
                yield Mistake(
                    "missing factor",
                    f"the other operand of mul is missing as a factor (operand {2 - k})",
                    number,
                    alone,
                )
    if step.name in ("mm", "addmm", "bmm", "mv"):
        matrices = operands[1:] if step.name == "addmm" else operands[:2]
        for (k, argument), (j, _) in (matrices, matrices[::-1]):
            if argument in reached:

                def transposed(
                    step: Step, args: tuple[Any, ...], right: Tensor, k: int = k, j: int = j
                ) -> Tensor:
                    rest = [arg.detach() if i == k else arg for i, arg in enumerate(args)]
                    swapped = [arg.mT if i == j else arg.detach() for i, arg in enumerate(args)]
                    swapped[j] = swapped[j].detach()
                    swapped[k] = args[k]
                    path = step.func(*swapped)
                    return step.func(*rest) + path - path.detach()

                yield Mistake(
                    "transposed",
                    f"an operand of {step.name} (operand {j + 1}) stands transposed in its derivative",
                    number,
                    transposed,
                )


def _path(name: str, text: str, number: int, k: int, scale: float) -> Mistake:
    def change(step: Step, args: tuple[Any, ...], right: Any) -> Any:
        argument = args[k]
        if not isinstance(argument, Tensor):
            raise ValueError("no tensor")
        kept = scale * argument + (1 - scale) * argument.detach()
        return step.func(*args[:k], kept, *args[k + 1 :])

    return Mistake(name, text, number, change)
