"""Lists of tensors cut into batches that fit a cache, and batches joined to one tensor."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten  # one call for thousands of tensors
from torch._utils import _unflatten_dense_tensors as unflatten

__all__ = ["Piece", "batch_size", "cut", "flatten", "pieces_of", "unflatten"]

# Bytes of a batch. On a device the cache is not the limit, but the launches are.
ON_HOST = 1 << 22
ON_DEVICE = 1 << 26

Piece = tuple[int, int, int]  # which tensor of a list, first element, end


def batch_size(device: torch.device, dtype: torch.dtype) -> int:
    """Elements in a batch of this dtype."""
    return (ON_HOST if device.type == "cpu" else ON_DEVICE) // dtype.itemsize


def pieces_of(tensors: list[Tensor], pieces: list[Piece]) -> list[Tensor]:
    """The pieces' elements, contiguous, in the order of the memory of tensors without holes."""
    return [
        tensor
        if (tensor := tensors[i]).numel() == end - start and tensor.is_contiguous()
        else tensor.as_strided((end - start,), (1,), tensor.storage_offset() + start)
        for i, start, end in pieces
    ]


def cut(tensors: list[Tensor], chosen: Iterable[int], most: int) -> Iterator[list[Piece]]:
    """The chosen tensors in batches of at most so many elements; long ones are cut."""
    batch: list[Piece] = []
    room = most
    for i in chosen:
        numel = tensors[i].numel()
        for start in range(0, numel, most):
            end = min(start + most, numel)
            if end - start > room:
                yield batch
                batch, room = [], most
            batch.append((i, start, end))
            room -= end - start
    if batch:
        yield batch
