"""Checks of arguments, with exceptions of torch's types that name the argument and show what came; shared dtypes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
REDUCTIONS = ("none", "mean", "sum")  # in the order of torch's own numbers


def acc_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that sums are accumulated in: float64 if one of the tensors is, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a loss of ``tensor``: its own, or at least float32 under autocast."""
    return acc_dtype(tensor) if autocast_enabled(tensor) else tensor.dtype


def autocast_enabled(tensor: Tensor) -> bool:
    """True if autocast is on for the tensor's device."""
    device_type = tensor.device.type
    return device_type in DEVICE_TYPES and torch.is_autocast_enabled(device_type)


def reduction(op: str, value: str, allowed: tuple[str, ...] = REDUCTIONS) -> None:
    """ValueError unless ``value`` is one of the ``allowed`` reductions."""
    if value not in allowed:
        expected = ", ".join(map(repr, allowed))
        raise ValueError(f"{op}: {value!r} is not a valid value for reduction; expected one of {expected}")


def output_mask(op: str, wrt: Sequence[str], arguments: Mapping[str, Tensor | None]) -> list[bool]:
    """Which of the ``arguments`` are named in ``wrt`` and given; ValueError for a name that is none of them."""
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in names:
        if name not in arguments:
            expected = ", ".join(map(repr, arguments))
            raise ValueError(f"{op}: wrt names {name!r}; expected any of {expected}")
    return [name in names and tensor is not None for name, tensor in arguments.items()]


def tensors(op: str, arguments: Mapping[str, Tensor | None], optional: tuple[str, ...]) -> None:
    """TypeError unless all are floating tensors of one dtype, RuntimeError unless all are dense and on one device.

    Only the ``optional`` ones may be None. Under autocast dtypes may differ: the op casts, as torch's does.
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
            if not autocast_enabled(first):
                raise TypeError(
                    f"{op}: {first_name} has dtype {dtype} but {name} has dtype {tensor.dtype}; all must have one dtype"
                )


def _not_served(op: str, name: str, tensor: Tensor) -> str:
    return f"{op}: {name} has dtype {tensor.dtype}; float64, float32, float16 and bfloat16 are served"


def shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], **given: Tensor) -> None:
    """ValueError unless ``tensor`` has the shape that is ``expected`` beside the ``given`` tensors."""
    if tensor.shape != expected:
        beside = " and ".join(f"{other} of shape {tuple(value.shape)}" for other, value in given.items())
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)} for {beside} "
            f"(nothing is broadcast)"
        )


def same_shape(op: str, input: Tensor, **others: Tensor | None) -> None:
    """ValueError unless the ``others`` have input's shape, or are None."""
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != input.shape:
            raise ValueError(
                f"{op}: input has shape {tuple(input.shape)} but {name} has shape {tuple(tensor.shape)}; "
                f"they must be equal (nothing is broadcast)"
            )


def linear_shapes(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """RuntimeError or ValueError unless the shapes are those of a linear map."""
    rows, matrix = input.shape, weight.shape
    if not rows or len(matrix) not in (1, 2) or rows[-1] != matrix[-1]:
        raise RuntimeError(
            f"{op}: input has shape {tuple(rows)} and weight {tuple(matrix)}; expected input (*, D) "
            f"and weight (K, D) or (D,)"
        )
    if bias is not None and bias.shape != matrix[:-1]:
        bias_shape(op, bias, matrix[0] if len(matrix) == 2 else 1, weight=weight)


def bias_shape(op: str, bias: Tensor, columns: int, **operand: Tensor) -> None:
    """ValueError unless bias has the shape ``(columns,)``, or one element beside a 1-D operand."""
    if next(iter(operand.values())).dim() > 1 or bias.numel() != 1:
        shape(op, "bias", bias, (columns,), **operand)


def cyclic(tensor: Tensor, first: int, count: int, dim: int) -> Tensor:
    """``count`` entries along ``dim`` from ``first`` on; the first entry follows the last."""
    before_end = min(count, tensor.shape[dim] - first)
    part = tensor.narrow(dim, first, before_end)
    return part if before_end == count else torch.cat([part, tensor.narrow(dim, 0, count - before_end)], dim)
