"""Stochastic rounding to bfloat16 in plain torch, bit for bit the random numbers of the Triton kernels."""

import torch
from torch import Tensor

from ..optim.bucket import MASK, key_of, mix


def draws(start: int, end: int, seed: int, index: int, step: Tensor) -> list[Tensor]:
    """Four 16-bit draws for each element: a hash of seed, tensor, step and place in memory.

    Args:
        start, end: the elements' places in memory, counted from the tensor's first.
        seed, index: the optimizer's seed and the parameter's position in it.
        step: 0-d, the updates made before this one.
    """
    key = mix(step.long() ^ key_of(seed, index))
    place = torch.arange(start, end, device=step.device)
    first = mix(mix((place & MASK) ^ key) ^ (place >> 32))
    second = mix(first ^ 0x9E3779B9)
    return [first & 0xFFFF, first >> 16, second & 0xFFFF, second >> 16]


def stochastic_bfloat16(value: Tensor, draw: Tensor) -> Tensor:
    """float32 rounded up or down to bfloat16 with the odds of its distance to either; inf and NaN stay."""
    bits = (value.view(torch.int32) + draw.int()) & -0x10000
    return torch.where(value.isfinite(), bits.view(torch.float32), value).bfloat16()
