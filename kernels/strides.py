"""Kernels walk memory from end to end: what to do where an entry's tensors lie in memory differently."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .buckets import Bucket


class EqualStrides:
    """Inside the block all tensors of an entry have the same strides without holes: copies stand in for others.

    Args:
        bucket: whose lists are changed inside the block, and restored after it.
        uneven: the entries to look at.
        write_grads: whether the launch writes gradients, so that copies of them go back too.
    """

    def __init__(self, bucket: Bucket, uneven: list[int], write_grads: bool) -> None:
        self._bucket = bucket
        self._uneven = uneven
        self._write_grads = write_grads
        self._copies: list[tuple[list[Tensor], int, Tensor, Tensor]] = []

    def __enter__(self) -> None:
        bucket = self._bucket
        if self._uneven:
            bucket.memory.clear()  # the copies are new at each step
        lists = [bucket.grads, bucket.params, *(s for key, s in bucket.states.items() if key != "step")]
        for i in self._uneven:
            layout = dense_strides(bucket.params[i])
            for tensors in lists:
                original = tensors[i]
                if not strides_agree(original, layout):
                    tensors[i] = torch.empty_strided(
                        original.shape, layout, dtype=original.dtype, device=original.device
                    ).copy_(original)
                    self._copies.append((tensors, i, original, tensors[i]))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for tensors, i, original, copy in self._copies:
            tensors[i] = original
            if kind is None and (tensors is not self._bucket.grads or self._write_grads):
                repeated = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in original.stride())
                original[repeated].copy_(copy[repeated])


def dense_strides(param: Tensor) -> tuple[int, ...]:
    """The strides of ``param``; if it has holes or overlaps, those that torch gives a tensor like it."""
    return torch.empty_like(param, device="meta").stride()


def strides_agree(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether the tensor's memory holds its elements in the order of ``strides``, and not their negatives."""
    if tensor.is_neg():
        return False
    return tensor.numel() == 0 or all(
        mine == wanted
        for mine, wanted, size in zip(tensor.stride(), strides, tensor.shape, strict=True)
        if size > 1
    )


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor do."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def even(param: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether a parameter has no holes, the others its strides, and none torch's lazy negative bit."""
    if all(tensor.is_contiguous() and not tensor.is_neg() for tensor in (param, *others)):
        return True
    strides = dense_strides(param)
    return all(strides_agree(tensor, strides) for tensor in (param, *others))
