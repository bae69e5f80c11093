"""Which tile sizes, warps and precision a kernel is launched with: pure functions of problem and chip.

**The same bits on different GPUs.** Nothing here looks at data or times anything, and into how many pieces a sum
is split comes from shapes and dtypes alone. So two GPUs of one architecture, however many multiprocessors they
have, give the same bits, with nothing to set but ``GRADKERNELS_TUNED=0`` where a file of tiles that someone tuned
for one of them by name would else take precedence. Architectures differ in the tiles of matrix instructions and
in how those add; what is summed by multiply and add alone (``small``, ``column`` and ``outer`` products, the
squared error, the fused loss of few outputs, the norm of gradients) is cut alike on all of NVIDIA's.
"""

import functools
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import triton

# Of a program that passes over elements once; each loads 16 bytes at a time.
LANES = 128

# Programs that a launch should have before a long sum is left in one piece: two for each of an H100's 132
# multiprocessors. A constant, since a sum is split by its shape alone.
PROGRAMS = 264


# One file of measured tiles for each device that someone has tuned.
TUNED = Path(__file__).with_name("tuned")


class Target(NamedTuple):
    """What kernels are compiled for: ``cuda`` with compute capability (90) or ``hip`` with architecture."""

    backend: str
    arch: int | str


@functools.cache
def target_of(device: torch.device) -> Target:
    """What Triton compiles for on a device; under its interpreter ``Target("interpreter", 0)``."""
    if not isinstance(triton.language.sum, triton.runtime.JITFunction):
        return Target("interpreter", 0)
    guard = nullcontext() if device.index is None else getattr(torch, device.type).device(device)
    with guard:
        target = triton.runtime.driver.active.get_current_target()
    return Target(target.backend, target.arch)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many there are. It may only set how many programs share work whose result does not depend on it."""
    if not isinstance(triton.language.sum, triton.runtime.JITFunction):
        return 4
    driver = triton.runtime.driver.active
    index = driver.get_current_device() if device.index is None else device.index
    return driver.utils.get_device_properties(index)["multiprocessor_count"]


def lanes(target: Target) -> int:
    """How many of them make a warp."""
    return 64 if str(target.arch).startswith("gfx9") else 32


def warps(target: Target) -> int:
    """How many of them are LANES lanes."""
    return LANES // lanes(target)


def has_descriptors(target: Target) -> bool:
    """Whether whole tiles are copied by the chip."""
    return target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 90


def registers(most: int, target: Target) -> dict[str, int]:
    """The option that lets each lane have ``most`` of them, where there is one.

    NVIDIA's assembler otherwise aims at more programs on a multiprocessor, and may spill to make room for them.
    """
    return {"maxnreg": most} if target.backend == "cuda" else {}


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


def matmul(dtype: torch.dtype, M: int, N: int, K: int, target: Target) -> MatmulConfig:
    """The tile for one product of an (M, K) by a (K, N) matrix by dot products of ``dtype``."""
    stages = 2 if target.backend == "hip" else 3
    block_m, block_n = 16 if M <= 16 else 64, 16 if N <= 16 else 64
    if dtype == torch.float64:
        if target == ("cuda", 100):  # where triton 3.6 fails to compile more
            block_m = block_n = 16
        # Two elements for each lane, so that they are loaded together.
        block_k = 16 * lanes(target) // 32 if 16 in (block_m, block_n) else 16
        return MatmulConfig(block_m, block_n, block_k, 4, stages)
    block_k = 64 if dtype.itemsize == 2 else 32
    if min(M, N) > 64 and triton.cdiv(M, 128) * triton.cdiv(N, 128) >= PROGRAMS // 4:
        return MatmulConfig(128, _wide(dtype, target), block_k, 8, stages)
    return MatmulConfig(block_m, block_n, block_k, 4, stages)


def _wide(dtype: torch.dtype, target: Target) -> int:
    """Columns of a large tile: half where the pieces of a split float32 operand are all held in registers."""
    ampere = target.backend == "cuda" and isinstance(target.arch, int) and target.arch < 90
    return 64 if ampere and dtype == torch.float32 else 128


def matmul_key(dtype: torch.dtype, sizes: tuple[int, int, int], mode: str) -> str:
    """The name of a class of products in a tuned file: sizes count by the power of two above them."""
    return " ".join(
        [str(dtype).removeprefix("torch."), *(str(triton.next_power_of_2(size)) for size in sizes), mode]
    )


def file_name(device_name: str) -> str:
    """Of the tiles tuned for a device."""
    return re.sub(r"\W+", "_", device_name) + ".json"


@functools.cache
def tuned(device_name: str) -> dict[str, MatmulConfig]:
    """The tiles that ``python -m bench tune`` found best on a device, by matmul_key; empty if none are shipped
    or ``GRADKERNELS_TUNED`` is 0."""
    path = TUNED / file_name(device_name)
    if os.environ.get("GRADKERNELS_TUNED") == "0" or not path.is_file():
        return {}
    return {key: MatmulConfig(*tile) for key, tile in json.loads(path.read_text())["matmul"].items()}


@functools.cache
def name_of(device: torch.device) -> str:
    """What the device is called; empty where nothing is tuned for."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


class Operands(NamedTuple):
    """What the tensors of a product allow.

    Attributes:
        aligned: both operands can be loaded 16 bytes at a time.
        descriptors: operands and result fit tensor descriptors too.
        columns: the left operand is contiguous along M, not K.
    """

    aligned: bool
    descriptors: bool
    columns: bool


class MatmulWay(NamedTuple):
    """How a product is computed.

    Attributes:
        mode: "small", "column", "outer", "dot" or "descriptor": see kernels/triton/matmul.py.
    """

    mode: str
    tile: MatmulConfig


def matmul_way(
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    batches: int,
    sums: int,
    operands: Operands,
    target: Target,
) -> MatmulWay:
    """How ``batches`` products of (M, K) by (K, N) matrices are computed.

    Args:
        dtype: that is multiplied.
        sizes: M, N, K.
        batches: matrices in the result.
        sums: products summed into each of them.
        operands: their layout.
        target: what is compiled for.
    """
    M, N, K = sizes
    if sums == 1 and K <= 32 and K * min(M, N) <= 256:
        return MatmulWay("small", MatmulConfig(256, 1, triton.next_power_of_2(max(K, 1)), 4, 1))
    if N == 1:
        # 4096 elements of the left operand a step, long in the direction in which it is contiguous.
        block_m = 1 if M == 1 else 4 if M <= 4 or K > 512 else 16 if K > 64 else 64
        if operands.columns:
            block_m = 256 if M > 64 else 16
        return MatmulWay("column", MatmulConfig(block_m, 1, 4096 // block_m, 4, 1))
    if sums == 1 and K <= 4:
        return MatmulWay("outer", MatmulConfig(64, 64 if dtype == torch.float64 else 128, 1, 4, 1))
    small = matmul(dtype, min(M, 64), min(N, 64), K, target)
    if dtype == torch.float64:
        return MatmulWay("dot", small)
    if not operands.aligned:
        block = max(small.BLOCK_M, small.BLOCK_N)
        block_k = 32 if dtype.itemsize == 2 else 16
        return MatmulWay("dot", small._replace(BLOCK_M=block, BLOCK_N=block, BLOCK_K=block_k))
    tiles = triton.cdiv(M, 128) * triton.cdiv(N, 128) * batches
    pieces = max(1, sums * K // small.BLOCK_K // LEAST_STEPS["dot"])
    if min(M, N) <= 64 or tiles * pieces < PROGRAMS // 4:
        longer = 2 if 16 in (small.BLOCK_M, small.BLOCK_N) else 1
        return MatmulWay("dot", small._replace(BLOCK_K=longer * small.BLOCK_K))
    if has_descriptors(target) and operands.descriptors and batches == sums == 1 and tiles >= PROGRAMS // 4:
        block_n = 256 if dtype.itemsize == 2 else 128
        return MatmulWay("descriptor", MatmulConfig(128, block_n, small.BLOCK_K, 8, 3))
    block_n = _wide(dtype, target)
    return MatmulWay("dot", MatmulConfig(128, block_n, small.BLOCK_K, 8, small.num_stages))


# How many steps along a sum a piece of it has at least.
LEAST_STEPS = {"dot": 8, "column": 2, "outer": 8}


def splits(tiles: int, steps: int, mode: str) -> int:
    """Into how many pieces a sum of ``steps`` steps is split, with ``tiles`` programs if it were not."""
    return max(1, min(PROGRAMS // max(tiles, 1), steps // LEAST_STEPS[mode]))


class LinearMseChunks(NamedTuple):
    """How a row of X is held in registers.

    Attributes:
        compiled: options of the compiler: ``num_warps`` and, on NVIDIA, ``maxnreg``.
    """

    ROWS: int
    CHUNK: int
    CHUNKS: int
    STAGES: int
    compiled: dict[str, int]


@functools.cache
def linear_mse_chunks(
    K: int, D: int, itemsize: int, acc: torch.dtype, target: Target
) -> LinearMseChunks | None:
    """The ``chunks`` config for K outputs of D inputs of ``itemsize`` bytes; None where registers do not suffice.

    A chunk is 16 bytes for each lane. Short rows lie in one warp, so that a row is added up without leaving it;
    longer ones in eight. A lane holds the gradients and the weights of its columns: 64 float32 each at most.
    """
    if K > 8:
        return None
    wide = acc.itemsize // 4
    size = triton.next_power_of_2(max(D, 16))
    # AMD's local memory holds fewer tiles in flight than the asynchronous copies of NVIDIA would fill.
    most = 1 if target.backend == "hip" else 3
    width = lanes(target) * 16 // itemsize

    def config_of(rows: int, chunk: int, num_warps: int) -> LinearMseChunks:
        chunks = triton.cdiv(max(D, 1), chunk)
        stages = most if rows * D * itemsize <= 32768 else min(most, 2)
        # Two programs run on a multiprocessor (linear_mse_programs), one where half its registers do not suffice.
        halves = num_warps == 8 and rows * K * wide * chunk * chunks <= 8192
        compiled = {"num_warps": num_warps, **registers(128 if halves else 255, target)}
        return LinearMseChunks(rows, chunk, chunks, stages, compiled)

    chunk = min(width, size)
    values = K * wide * chunk * triton.cdiv(max(D, 1), chunk)
    if values <= 2048:
        rows = min(4096 // triton.next_power_of_2(values), 8192 // itemsize // chunk)
        return config_of(max(4, rows), chunk, 4)
    for rows in (1,) if K == 1 else (4, 2, 1):
        chunk = min(8 // rows * width, size)
        if rows * K * wide * chunk * triton.cdiv(D, chunk) <= 16384:
            return config_of(rows, chunk, 8)
    return None


class LinearMseDot(NamedTuple):
    """How a tile of rows of X is multiplied twice."""

    ROWS: int
    COLS: int
    OUTPUTS: int
    STAGES: int
    num_warps: int


@functools.cache
def linear_mse_dot(K: int, D: int, dtype: torch.dtype, target: Target) -> LinearMseDot | None:
    """The ``dot`` config for K outputs of D inputs of ``dtype``; None where the chip does not hold both products."""
    cols, outputs = (max(16, triton.next_power_of_2(size)) for size in (D, K))
    if dtype.itemsize != 2 or outputs > (16 if target.backend == "hip" else 64) or cols * outputs > 8192:
        return None
    return LinearMseDot(
        64, cols, outputs, 1 if target.backend == "hip" else 2, 4 if cols * outputs <= 4096 else 8
    )


def linear_mse_product(
    operand: torch.dtype,
    M: int,
    N: int,
    K: int,
    loads: bool,
    aligned: bool,
    descriptors: bool,
    target: Target,
) -> tuple[MatmulConfig, bool]:
    """The tile of an (M, K) by (K, N) product in the fused loss, and whether it uses descriptors.

    Args:
        operand: dtype that is multiplied.
        M, N, K: sizes.
        loads: the last step reads a tile as large as the result's, which takes the registers of a wider one.
        aligned: rows of operands and results begin at multiples of 16 bytes.
        descriptors: both operands fit tensor descriptors too.
        target: what is compiled for.
    """
    tile = matmul(operand, M, N, K, target)
    if tile.BLOCK_M == 128 and descriptors and has_descriptors(target):
        wide = operand.itemsize == 2 and N > 128 and not loads
        return tile._replace(BLOCK_N=256 if wide else tile.BLOCK_N), True
    # Narrower where registers are short: without alignment each element has an address of its own, and float32
    # operands are split into several.
    if not aligned or operand == torch.float32:
        tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, 64))
    return tile, False


def linear_mse_programs(N: int, K: int, itemsize: int, acc: torch.dtype) -> int:
    """Programs of a one-pass plan: from shape and dtype alone, so that every GPU adds in the same order.

    At most two for each of 132 multiprocessors; while X is small, so few that the partial sums (written and read)
    and the weights are less than 1/16 of X, but not fewer than one for each multiprocessor and 48 rows.
    """
    light = N * itemsize // (16 * K * (2 * acc.itemsize + itemsize))
    return max(1, min(264, max(light, min(132, N // 48))))


def optimizer(itemsize: int, target: Target) -> dict[str, int]:
    """The block of a step and how it is compiled: 16 bytes a lane of the widest operand, of ``itemsize`` bytes.

    Three programs of NVIDIA's are to fit a multiprocessor; float32 leaves room for more without asking.
    """
    chosen = {"BLOCK": LANES * 16 // itemsize, "num_warps": warps(target)}
    return chosen if itemsize == 4 else chosen | registers(168, target)
