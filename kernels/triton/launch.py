"""How every kernel is launched: on the tensors' device, with fused multiply-add allowed."""

from contextlib import nullcontext
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any) -> None:
    """Launch ``kernel[grid](*args, **options)`` on ``device`` and torch's current stream there.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: up to three program counts; nothing is launched if one of them is 0.
        args: run-time arguments in the kernel's order.
        device: where the tensors live; it need not be the current device.
        options: constexpr arguments by name, ``num_warps``, ``num_stages``.
    """
    if 0 in grid:
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        kernel[grid](*args, enable_fp_fusion=True, **options)
