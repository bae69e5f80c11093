"""The points at which a function is tried: the given inputs, and what is derived from them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..gradient.function import drawing, is_real
from ..gradient.upstream import LAYOUTS
from .subject import LARGE

LARGEST = 1 << 20  # elements of a derived input
REDUCED = 40
HUGE = {torch.float16: (2.0**6, 2.0**3)}
TINY = {torch.float16: 2.0**-6}


@dataclass(frozen=True)
class Point:
    """Inputs to try.

    Attributes:
        label: what distinguishes them; empty for the given ones.
        values: the inputs, the parameters after them.
        kind: "given", "shape", "empty", "layout", "upstream", "scale" or "zeros".
        placed: copies an upstream gradient, given its output's place, to where it shall lie; None leaves it dense.
    """

    label: str
    values: list[Any]
    kind: str
    placed: Callable[[Tensor, int], Tensor] | None = None


def smaller(values: Sequence[Any], arguments: int, reference: bool) -> Point | None:
    """Return a smaller point for the experiments that take many calls, if the given one is large."""
    if sum(v.numel() for v in values if isinstance(v, Tensor)) <= LARGE or _tied(
        values, arguments, reference
    ):
        return None
    sizes = {size for size in _sizes(values, arguments) if size > REDUCED}
    changed = resized(values, arguments, dict.fromkeys(sizes, REDUCED))
    return Point(f"sizes above {REDUCED} reduced to it", changed, "shape") if sizes else None


def _sizes(values: Sequence[Any], arguments: int) -> list[int]:
    """Return the sizes that can be changed: parameters keep theirs, and torch would broadcast an input of size 1."""
    fixed = {size for v in values[arguments:] for size in v.shape}
    sizes = (size for v in values[:arguments] if isinstance(v, Tensor) for size in v.shape)
    return list(dict.fromkeys(size for size in sizes if size > 1 and size not in fixed))


def _tied(values: Sequence[Any], arguments: int, reference: bool) -> bool:
    """Return whether what is no tensor among the inputs goes with the sizes, and would have to change with them."""
    others = [v for v in values[:arguments] if not isinstance(v, Tensor)]
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(others)):
        return True
    given = [v for v in values[:arguments] if isinstance(v, Tensor)]
    known = {size for v in given for size in v.shape if size > 1} | {v.numel() for v in given}
    fixed = {v for v in values[:arguments] if isinstance(v, int) and not isinstance(v, bool)}
    return bool(fixed & known) or bool(fixed and not reference)


def derived(values: Sequence[Any], arguments: int, reference: bool) -> Iterator[Point]:
    """Yield the points derived from given ones.

    Args:
        values: the inputs, the parameters after them.
        arguments: how many of them are inputs.
        reference: whether there is a reference, that tells a shape that makes no sense.
    """
    yield from _layouts(values, arguments)
    for layout, placed in LAYOUTS.items():
        yield Point(f"{layout} upstream gradients", list(values), "upstream", placed)
    yield from _scales(values, arguments)
    yield from _shapes(values, arguments, reference)


def _shapes(values: Sequence[Any], arguments: int, reference: bool) -> Iterator[Point]:
    """Yield other sizes; those that are equal in the given inputs are taken for one size, and change together."""
    sizes = _sizes(values, arguments)
    if _tied(values, arguments, reference):
        return
    around = {size: 2 ** math.ceil(math.log2(size)) for size in sizes}
    every: list[tuple[str, dict[int, int]]] = [
        ("sizes 1", dict.fromkeys(sizes, 1)),
        ("odd sizes", {size: min(size, 3) if size != 3 else 5 for size in sizes}),
        ("one less than a power of two", {size: max(1, p - 1) for size, p in around.items()}),
        ("one more than a power of two", {size: p + 1 for size, p in around.items()}),
    ]
    single = [(f"size {size} -> {new}", {size: new}) for size in sizes for new in (1, around[size] + 1)]
    zeros = [(f"size {size} -> 0", {size: 0}) for size in sizes] if reference else []
    seen = {_shape_of(values)}
    for label, mapping in (*every, *(single if len(sizes) > 1 else ()), *zeros):
        changed = resized(values, arguments, mapping)
        if (shapes := _shape_of(changed)) not in seen:
            seen.add(shapes)
            if all(v.numel() <= LARGEST for v in changed if isinstance(v, Tensor)):
                yield Point(label, changed, "empty" if 0 in mapping.values() else "shape")


def _shape_of(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(tuple(v.shape) for v in values if isinstance(v, Tensor))


def resized(values: Sequence[Any], arguments: int, mapping: dict[int, int]) -> list[Any]:
    """Return the values with other sizes; indices stay within the new ones.

    They are cut, or come over again, each time smaller: equal numbers would have no order, and no largest one.
    """

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        result = value.detach()
        for dim, size in enumerate(value.shape):
            if (new := mapping.get(size, size)) != size:
                places = torch.arange(new, device=value.device)
                result = result.index_select(dim, places % size)
                if new > size > 0 and is_real(value):
                    again = (1 + places // size).view([-1] + [1] * (value.ndim - dim - 1))
                    result = (result / again).to(value.dtype)
        if not value.is_floating_point() and value.dtype != torch.bool and value.numel():
            bounds = [new for old, new in mapping.items() if int(value.max()) < old and 0 < new < old]
            if bounds and int(value.min()) >= 0:
                result = result % min(bounds)
        return _like(result.contiguous(), value)

    return [resize(value) if i < arguments else value for i, value in enumerate(values)]


def reshaped(values: Sequence[Any], arguments: int, shape: tuple[int, ...]) -> list[Any]:
    """Return the values with the first tensor in this shape, and sizes equal to its own changed alike.

    Raises:
        ValueError: it has another number of dimensions, or one size would become two.
    """
    first = next((v for v in values[:arguments] if isinstance(v, Tensor)), None)
    if first is None or first.ndim != len(shape):
        has = (
            "no tensor is among the inputs"
            if first is None
            else f"the first input has shape {tuple(first.shape)}"
        )
        raise ValueError(f"--shape {'x'.join(map(str, shape))}: {has}")
    mapping = dict(zip(first.shape, shape, strict=True))
    if any(mapping[old] != new for old, new in zip(first.shape, shape, strict=True)):
        by_place = dict(enumerate(shape))
        if any(isinstance(v, Tensor) and v.shape != first.shape for v in values[:arguments]):
            raise ValueError(
                f"--shape {'x'.join(map(str, shape))}: equal sizes of {tuple(first.shape)} would differ"
            )
        result = list(values)
        for i, value in enumerate(values[:arguments]):
            if isinstance(value, Tensor):
                changed = value.detach()
                for dim, new in by_place.items():
                    changed = changed.index_select(
                        dim, torch.arange(new, device=value.device) % value.shape[dim]
                    )
                result[i] = _like(changed, value)
        return result
    return resized(values, arguments, mapping)


def _like(result: Tensor, value: Tensor) -> Tensor:
    return result.detach().requires_grad_(value.requires_grad)


def _layouts(values: Sequence[Any], arguments: int) -> Iterator[Point]:
    """Yield the same numbers elsewhere in memory; what lies around them is NaN."""

    def everywhere(change: Callable[[Tensor, int], Tensor]) -> list[Any]:
        return [
            _like(change(v.detach(), i), v) if isinstance(v, Tensor) and i < arguments else v
            for i, v in enumerate(values)
        ]

    tensors = [v for v in values[:arguments] if isinstance(v, Tensor) and v.numel() > 1]
    if tensors:
        yield Point("strided copies", everywhere(_spaced), "layout")
    if any(v.ndim > 1 and min(v.shape[-2:]) > 1 for v in tensors):
        yield Point("transposed copies", everywhere(_transposed), "layout")
    if tensors:
        yield Point("misaligned copies", everywhere(_shifted), "layout")


def _surroundings(value: Tensor, *shape: int) -> Tensor:
    filler = float("nan") if value.is_floating_point() else 1
    return torch.full(shape, filler, device=value.device).to(value.dtype)


def _spaced(value: Tensor, place: int) -> Tensor:
    """Copy into every second element of a longer tensor; a matrix into a corner of a larger one, several with gaps.

    Another input has other gaps: whoever reads it by the strides of the first meets NaN.
    """
    if value.ndim == 0:
        return value.clone()
    if value.ndim == 1:
        buffer = _surroundings(value, (2 + place) * len(value))[:: 2 + place]
    else:
        first, *inner = value.shape
        buffer = _surroundings(value, first, *(size + 3 + place for size in inner))
        for dim, size in enumerate(inner, 1):
            buffer = buffer.narrow(dim, 0, size)
    return buffer.copy_(value)


def _transposed(value: Tensor, place: int) -> Tensor:
    return value.mT.contiguous().mT if value.ndim > 1 else value.clone()


def _shifted(value: Tensor, place: int) -> Tensor:
    """One element after an aligned address."""
    return _surroundings(value, value.numel() + 1)[1:].view(value.shape).copy_(value)


def _scales(values: Sequence[Any], arguments: int) -> Iterator[Point]:
    """Yield other scales; of the large ones the largest counts at which the reference stays finite."""
    real = [v for v in values[:arguments] if is_real(v)]
    if not real:
        return

    def times(factor: float) -> list[Any]:
        return [
            _like(v.detach() * factor, v) if is_real(v) and i < arguments else v for i, v in enumerate(values)
        ]

    dtype = real[0].dtype
    yield Point("tiny values", times(TINY.get(dtype, 2.0**-10)), "scale")
    for factor in HUGE.get(dtype, (2.0**20, 2.0**10)):
        yield Point("huge values", times(factor), "scale")
    positive = {
        i for i, v in enumerate(values[:arguments]) if is_real(v) and (v > 0).any() and not (v < 0).any()
    }
    if positive:  # to which a rectifier would do nothing
        negative = [_like(-v.detach(), v) if i in positive else v for i, v in enumerate(values)]
        yield Point("negative values", negative, "scale")
    draw = drawing(3)
    zeros = [
        _like(v.detach().masked_fill(draw(torch.rand, v.shape).to(v.device) < 0.5, 0), v)
        if is_real(v) and i < arguments
        else v
        for i, v in enumerate(values)
    ]
    yield Point("zeros among the values", zeros, "zeros")


def off_zero(values: Sequence[Any], arguments: int, distance: float) -> list[Any]:
    """Return the values with random numbers, up to ``distance`` times their largest, in the place of zeros.

    A distance below 0 gives their opposites.
    """
    draw = drawing(5)  # not as zeros are drawn: these would all get one sign

    def moved(value: Any) -> Any:
        if not is_real(value) or not value.numel():
            return value
        drawn = (2 * draw(torch.rand, value.shape) - 1).to(value)
        return _like(torch.where(value == 0, drawn * distance * value.abs().max(), value.detach()), value)

    return [moved(value) if i < arguments else value for i, value in enumerate(values)]


def reshuffled(values: Sequence[Any], arguments: int, seed: int) -> list[Any]:
    """Return the values with the elements of each floating-point input in another order."""
    draw = drawing(seed)

    def shuffle(value: Any) -> Any:
        if not is_real(value):
            return value
        order = draw(torch.randperm, value.numel()).to(value.device)
        moved = value.detach().reshape(-1)[order].view(value.shape)
        # One element, or equal ones, have no other order.
        return _like(moved if not torch.equal(moved, value) else moved * 0.75, value)

    return [shuffle(v) if i < arguments else v for i, v in enumerate(values)]


def differentiable(values: Sequence[Any], arguments: int) -> list[int]:
    """Return the inputs that require a gradient, all real ones if none does, and the parameters."""
    real = [i for i, value in enumerate(values) if is_real(value)]
    marked = [i for i in real if i < arguments and values[i].requires_grad]
    return (marked or [i for i in real if i < arguments]) + [i for i in real if i >= arguments]


def is_mask(value: Tensor) -> bool:
    """Return whether there are 0, 1 and -inf alone; all equal they may be a weight or a bias at its start."""
    return len(value.unique()) > 1 and bool(((value == 0) | (value == 1) | value.isneginf()).all())
