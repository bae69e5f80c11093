"""What Triton's interpreter lacks: libdevice, the dot of bfloat16, and float arguments that are float32."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch


def _named(name: str) -> Callable[..., torch.Tensor] | None:
    """Return torch's function of this name; names of the fast variants lose their affixes."""
    bare = name.removeprefix("fast_")
    if bare != name:
        bare = bare.removesuffix("f")
    return getattr(torch, bare, None) or getattr(torch.special, bare, None)


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


def dot(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the product of two tiles, for bfloat16 that of the values: the interpreter multiplies their bits."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def widened(tile: Any) -> Any:
        if tile.dtype != tl.bfloat16:
            return tile
        return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(builder, widened(a), widened(b), *rest)

    return create_dot
