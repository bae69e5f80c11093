"""What Triton's interpreter lacks: libdevice, bfloat16's arithmetic, float32 arguments, scalars of comparisons."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Return the nearest integers, halves away from zero; torch's go to the even neighbour."""
    whole = x.trunc()
    return whole + torch.copysign(((x - whole).abs() >= 0.5).to(x.dtype), x)


def _remainder(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return what is left of ``x`` beside the nearest multiple of ``y``, as C has it; torch's has the sign of ``y``."""
    y = y.abs()
    rest = torch.fmod(x, 2 * y).abs()
    nearer = torch.where(2 * (rest - y) >= y, rest - y - y, rest - y)
    rest = torch.where(2 * rest > y, nearer, rest)
    return torch.where(x.signbit(), -rest, rest)


# What torch calls otherwise, or calls by the same name and does otherwise.
_OTHERS: dict[str, Callable[..., torch.Tensor]] = {
    "round": _rounded,
    "rint": torch.round,
    "nearbyint": torch.round,
    "remainder": _remainder,
    "finitef": torch.isfinite,
    "isfinited": torch.isfinite,
}


def _named(name: str) -> Callable[..., torch.Tensor] | None:
    """Return torch's function of this name; names of the fast variants, and of rounding to nearest, lose affixes."""
    bare = name.removeprefix("fast_")
    if bare != name:
        bare = bare.removesuffix("f")
    bare = bare.removesuffix("_rn")
    return _OTHERS.get(name) or getattr(torch, bare, None) or getattr(torch.special, bare, None)


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield libdevice's functions that torch has too, for the interpreter."""
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def interpreted(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            shaped = [arg for arg in args if isinstance(arg, tl.tensor)]
            values = [torch.as_tensor(a.handle.data if isinstance(a, tl.tensor) else a) for a in args]
            result = function(*values).numpy()
            scalar = tl.int1 if result.dtype == np.bool_ else shaped[0].dtype
            handle = TensorHandle(
                result.astype(result.dtype if scalar is tl.int1 else values[0].numpy().dtype), scalar
            )
            block = shaped[0].type
            return tl.tensor(handle, block.with_element_ty(scalar) if block.is_block() else scalar)

        return call

    for name in vars(libdevice):
        function = _named(name)
        if callable(getattr(libdevice, name)) and callable(function) and not isinstance(function, type):
            yield name, interpreted(function)


def converter(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the conversion of a kernel's arguments, by which a Python float becomes a float32, as when compiled."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def convert(arg: Any) -> Any:
        if isinstance(arg, float):
            return tl.tensor(TensorHandle(np.array([arg], np.float32), tl.float32), tl.float32)
        return original(arg)

    return convert


def _widened(tile: Any) -> Any:
    """Return a tile of bfloat16, which the interpreter keeps as bits, in float32; any other as it is."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if tile.dtype.scalar != tl.bfloat16:
        return tile
    return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    """Return float32 values as the bits of bfloat16, rounded to nearest."""
    return np.asarray(torch.tensor(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16))


def _narrowed(tile: Any) -> Any:
    """Return a tile of float32 in bfloat16; any other, the result of a comparison, as it is."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(_bits(tile.data), tl.bfloat16) if tile.data.dtype == np.float32 else tile


def arithmetic(original: Callable[..., Any], operands: int) -> Callable[..., Any]:
    """Return an operation of the interpreter's builder that takes the values of bfloat16, not their bits.

    What compares gives int1; the interpreter calls it what was compared, and a scalar becomes a block of that.
    """
    import triton.language as tl

    def operate(builder: Any, *args: Any) -> Any:
        wide = [_widened(arg) for arg in args[:operands]]
        if all(one is other for one, other in zip(wide, args, strict=False)):
            result = original(builder, *args)
        else:
            result = _narrowed(original(builder, *wide, *args[operands:]))
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    return operate


def dot(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the product of two tiles, which accumulates in the third."""
    return lambda builder, a, b, *rest: original(builder, _widened(a), _widened(b), *rest)


def along_an_axis(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the interpreter's reductions and scans, of the values of bfloat16."""
    import triton.language as tl

    def typed(tile: Any, handle: Any) -> Any:
        block = tl.block_type(handle.dtype, tile.type.shape) if tile.type.is_block() else handle.dtype
        return tl.tensor(handle, block)

    def apply(operation: Any, tiles: Any) -> Any:
        if not isinstance(tiles, tuple):
            return apply(operation, (tiles,))[0]
        wide = [_widened(tile.handle) for tile in tiles]
        taken = [w is not tile.handle for w, tile in zip(wide, tiles, strict=True)]
        if not any(taken):
            return original(operation, tiles)
        results = original(operation, tuple(map(typed, tiles, wide)))
        return tuple(
            typed(result, _narrowed(result.handle)) if narrow else result
            for result, narrow in zip(results, taken, strict=True)
        )

    return apply
