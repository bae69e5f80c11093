"""Which tile sizes, warps and precision a kernel is launched with: pure functions of problem and chip.

Nothing here looks at data, times anything or asks how many multiprocessors a chip has: the same problem on
the same architecture always takes the same path, and how a sum is split never depends on the chip.
"""

import functools
from typing import NamedTuple

import torch
import triton

# Programs that a launch should have before a long sum is left in one piece: two for each of an H100's 132
# multiprocessors. A constant, since a sum is split by its shape alone.
PROGRAMS = 264


class Target(NamedTuple):
    """What kernels are compiled for: ``cuda`` with compute capability (90) or ``hip`` with architecture."""

    backend: str
    arch: int | str


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target of a device; under Triton's interpreter, of any device, ``Target("interpreter", 0)``."""
    if not isinstance(triton.language.sum, triton.runtime.JITFunction):
        return Target("interpreter", 0)
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return Target("cuda", 10 * major + minor)
    if device.type == "cuda":
        return Target("hip", torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    return Target(device.type, 0)


def dot_precision(dtype: torch.dtype, target: Target, setting: str) -> str:
    """The ``input_precision`` of a dot product.

    Args:
        dtype: of the operands; only float32 has a choice.
        target: what the kernel is compiled for.
        setting: ``torch.backends.cuda.matmul.fp32_precision``; all but ``"tf32"`` ask for float32's own
            accuracy, which three tf32 products give on NVIDIA and six bfloat16 products on AMD.
    """
    if dtype != torch.float32 or target.backend not in ("cuda", "hip"):
        return "ieee"
    if setting == "tf32":
        return "tf32"
    return "tf32x3" if target.backend == "cuda" else "bf16x6"


class MatmulConfig(NamedTuple):
    """The tile of one program and how it is compiled."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def _block(size: int, largest: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), largest)


def matmul(dtype: torch.dtype, M: int, N: int, K: int, target: Target) -> MatmulConfig:
    """The tile for an (M, K) by (K, N) product of ``dtype`` operands."""
    if dtype == torch.float64:
        largest = 16 if target == ("cuda", 100) else 64  # triton 3.6's compiler fails at 64 for sm_100
        block_m, block_n, block_k = _block(M, largest), _block(N, largest), 16
    elif dtype == torch.float32:
        block_m, block_n, block_k = _block(M, 128), _block(N, 128), 32
    else:
        block_m, block_n, block_k = _block(M, 128), _block(N, 128), _block(K, 64)
    num_warps = 8 if block_m * block_n >= 128 * 128 else 4
    return MatmulConfig(block_m, block_n, block_k, num_warps, 2 if target.backend == "hip" else 3)


def splits(tiles: int, steps: int, least: int = 8) -> int:
    """Into how many pieces a sum of ``steps`` steps is split, with ``tiles`` tiles in the result.

    Args:
        tiles: programs there are without splitting.
        steps: steps along the sum of each.
        least: steps that a piece has at least.
    """
    return max(1, min(PROGRAMS // max(tiles, 1), steps // least))
