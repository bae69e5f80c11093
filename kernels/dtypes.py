"""Which dtype sums are accumulated in."""

import torch
from torch import Tensor


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32
