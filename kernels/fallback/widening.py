"""16-bit and mixed buckets through torch's fused float32 kernels, a cache full of elements at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..buckets import Bucket

# What fits a core's second-level cache in float32 for four operands.
ELEMENTS = 1 << 15

Piece = tuple[int, int, int]  # an entry of the bucket, first element, end


def pieces_of(bucket: Bucket, chosen: list[int]) -> Iterator[list[Piece]]:
    """The chosen entries in batches of at most ELEMENTS elements; long ones are cut."""
    batch: list[Piece] = []
    room = ELEMENTS
    for i in chosen:
        numel = bucket.params[i].numel()
        for start in range(0, numel, ELEMENTS):
            end = min(start + ELEMENTS, numel)
            if end - start > room:
                yield batch
                batch, room = [], ELEMENTS
            batch.append((i, start, end))
            room -= end - start
    if batch:
        yield batch


class Widened:
    """The pieces of one list of tensors in a wide dtype: copies where it is narrower, else the elements themselves."""

    def __init__(self, tensors: list[Tensor], pieces: list[Piece], dtype: torch.dtype) -> None:
        # Without holes, so memory can be walked in its own order.
        self._narrow = [tensors[i].as_strided((end - start,), (1,), tensors[i].storage_offset() + start)
                        for i, start, end in pieces]  # fmt: skip
        self.values = [tensor.to(dtype) for tensor in self._narrow]

    def write_back(self) -> None:
        """Round the values into the tensors they come from."""
        if self.values and self.values[0] is not self._narrow[0]:
            torch._foreach_copy_(self._narrow, self.values)
