"""Which dtype sums are accumulated in."""

import torch
from torch import Tensor


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
