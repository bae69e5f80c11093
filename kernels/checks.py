"""Checks of arguments, with exceptions of torch's types that name the argument and show what came; shared dtypes."""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
REDUCTIONS = ("none", "mean", "sum")  # in the order of torch's own numbers


def acc_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype that sums are accumulated in: float64 if one of the tensors is, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def in_float64(tensor: Tensor) -> Tensor:
    """Return the values on the CPU.

    They come there first: of a copy from MPS into float64 torch 2.14 writes nothing, and earlier versions raise.
    """
    return tensor.detach().cpu().double()


def empty_gradients(tensors: Sequence[Tensor | None], output_mask: Sequence[bool]) -> list[Tensor | None]:
    """Allocate the gradients that are wanted, in the layout of input, the first tensor, where they have its shape.

    Others broadcast to it: of nothing their gradient is a sum of nothing, which no program writes, so it is 0 here.
    """
    input = tensors[0]
    assert input is not None
    return [
        None
        if tensor is None or not wanted
        else torch.empty_like(tensor)
        if tensor.shape == input.shape
        else tensor.new_zeros(tensor.shape)
        if input.numel() == 0
        else tensor.new_empty(tensor.shape)
        for tensor, wanted in zip(tensors, output_mask, strict=True)
    ]


def loss_dtype(tensor: Tensor, *others: Tensor | None) -> torch.dtype:
    """Return the dtype of a loss of these tensors: what theirs promote to, or at least float32 under autocast."""
    if autocast_enabled(tensor):
        return acc_dtype(tensor, *others)
    dtype = tensor.dtype
    for other in others:
        if other is not None and other.dtype is not dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def autocast_enabled(tensor: Tensor) -> bool:
    """Return whether autocast is on for the tensor's device."""
    device_type = tensor.device.type
    return device_type in DEVICE_TYPES and torch.is_autocast_enabled(device_type)


def reduction(op: str, value: str, allowed: tuple[str, ...] = REDUCTIONS) -> None:
    """Raise ValueError unless ``value`` is one of the ``allowed`` reductions."""
    if value not in allowed:
        expected = ", ".join(map(repr, allowed))
        raise ValueError(f"{op}: {value!r} is not a valid value for reduction; expected one of {expected}")


def no_dim_for_none(op: str, dim: int | Sequence[int] | None, reduction: str) -> None:
    """Raise ValueError for a ``dim`` beside the reduction that sums nothing."""
    if dim is not None and reduction == "none":
        raise ValueError(f"{op}: reduction 'none' sums over no dimension, got dim={dim!r}")


def output_mask(op: str, wrt: Sequence[str], arguments: Mapping[str, Tensor | None]) -> list[bool]:
    """Return which of the ``arguments`` are named in ``wrt`` and given; ValueError for a name that is none of them."""
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in names:
        if name not in arguments:
            expected = ", ".join(map(repr, arguments))
            raise ValueError(f"{op}: wrt names {name!r}; expected any of {expected}")
    return [name in names and tensor is not None for name, tensor in arguments.items()]


def tensors(
    op: str, arguments: Mapping[str, Tensor | None], optional: tuple[str, ...], one_dtype: bool = True
) -> None:
    """Raise TypeError unless all are floating and of one dtype, RuntimeError unless all are dense and on one device.

    Only the ``optional`` ones may be None. Dtypes may differ without ``one_dtype``, and under autocast: the op casts,
    as torch's does.
    """
    first_name, first = "", None
    for name, tensor in arguments.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise RuntimeError(
                f"{op}: {name} has layout {tensor.layout}; only dense (strided) tensors are served"
            )
        if first is None:
            if tensor.dtype not in DTYPES:
                raise TypeError(_not_served(op, name, tensor))
            first_name, first, dtype, device = name, tensor, tensor.dtype, tensor.device
            continue
        if tensor.device != device:
            raise RuntimeError(
                f"{op}: {first_name} is on {device} but {name} is on {tensor.device}; all tensors must be on one device"
            )
        if tensor.dtype is not dtype:
            if tensor.dtype not in DTYPES:
                raise TypeError(_not_served(op, name, tensor))
            if one_dtype and not autocast_enabled(first):
                raise TypeError(
                    f"{op}: {first_name} has dtype {dtype} but {name} has dtype {tensor.dtype}; all must have one dtype"
                )


def _not_served(op: str, name: str, tensor: Tensor) -> str:
    return f"{op}: {name} has dtype {tensor.dtype}; float64, float32, float16 and bfloat16 are served"


def shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], **given: Tensor) -> None:
    """Raise ValueError unless ``tensor`` has the shape that is ``expected`` beside the ``given`` tensors."""
    if tensor.shape != expected:
        beside = " and ".join(f"{other} of shape {tuple(value.shape)}" for other, value in given.items())
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)} for {beside} "
            f"(nothing is broadcast)"
        )


def broadcasts(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    """Raise ValueError unless ``tensor`` broadcasts to input's shape."""
    shape, sizes = tensor.shape, input.shape
    if shape == sizes:
        return
    pairs = zip(reversed(shape), reversed(sizes), strict=False)
    if len(shape) > len(sizes) or any(size not in (1, expected) for size, expected in pairs):
        raise ValueError(
            f"{op}: {name} has shape {tuple(shape)}, which does not broadcast to input's shape {tuple(sizes)}"
        )


def dims(op: str, dim: int | Sequence[int], ndim: int) -> list[int]:
    """Return the dimensions that ``dim`` names, counted from the first, all if none; raise what torch.sum raises."""
    found: list[int] = []
    for value in dim if isinstance(dim, (tuple, list)) else (dim,):
        # dynamo's symbols are ints, and cannot be asked for an attribute
        if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")):
            raise TypeError(f"{op}: dim must be an int or a sequence of ints, got {dim!r}")
        index, most = operator.index(value), max(ndim, 1)
        if not -most <= index < most:
            raise IndexError(
                f"{op}: Dimension out of range (expected to be in range of [{-most}, {most - 1}], but got {index})"
            )
        if index % most in found:
            raise RuntimeError(f"{op}: dim {index % most} appears multiple times in the list of dims {dim!r}")
        found.append(index % most)
    return found or list(range(ndim))


def same_shape(op: str, input: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless the ``others`` have input's shape, or are None."""
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != input.shape:
            raise ValueError(
                f"{op}: input has shape {tuple(input.shape)} but {name} has shape {tuple(tensor.shape)}; "
                f"they must be equal (nothing is broadcast)"
            )


def linear_shapes(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise RuntimeError or ValueError unless the shapes are those of a linear map."""
    rows, matrix = input.shape, weight.shape
    if not rows or len(matrix) not in (1, 2) or rows[-1] != matrix[-1]:
        raise RuntimeError(
            f"{op}: input has shape {tuple(rows)} and weight {tuple(matrix)}; expected input (*, D) "
            f"and weight (K, D) or (D,)"
        )
    if bias is not None and bias.shape != matrix[:-1]:
        bias_shape(op, bias, matrix[0] if len(matrix) == 2 else 1, weight=weight)


def bias_shape(op: str, bias: Tensor, columns: int, **operand: Tensor) -> None:
    """Raise ValueError unless bias has the shape ``(columns,)``, or one element beside a 1-D operand."""
    if next(iter(operand.values())).dim() > 1 or bias.numel() != 1:
        shape(op, "bias", bias, (columns,), **operand)


def cyclic(tensor: Tensor, first: int, count: int, dim: int) -> Tensor:
    """Return ``count`` entries along ``dim`` from ``first`` on; the first entry follows the last."""
    before_end = min(count, tensor.shape[dim] - first)
    part = tensor.narrow(dim, first, before_end)
    return part if before_end == count else torch.cat([part, tensor.narrow(dim, 0, count - before_end)], dim)
