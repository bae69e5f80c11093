"""Checks of arguments: exceptions of torch's types that name the argument and show what came."""

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
REDUCTIONS = ("none", "mean", "sum")  # in the order of torch's own numbers


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    device_type = tensor.device.type
    return device_type in DEVICE_TYPES and torch.is_autocast_enabled(device_type)


def reduction(op: str, value: str, allowed: tuple[str, ...] = REDUCTIONS) -> None:
    """ValueError unless ``value`` is one of the ``allowed`` reductions."""
    if value not in allowed:
        expected = ", ".join(map(repr, allowed))
        raise ValueError(f"{op}: {value!r} is not a valid value for reduction; expected one of {expected}")


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
