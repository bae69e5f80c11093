"""Which plan, tile, warps and precision a kernel is launched with: pure functions of problem and target.

**The same bits on different GPUs.** Configs depend on shapes, strides, alignment, dtypes and architecture only, never
on data, timings or the number of SMs, so two GPUs of one architecture give the same bits. The exception is a file of
tiles that someone tuned for a device by name; ``GRADKERNELS_TUNED=0`` ignores it. Architectures differ in the tiles of
matrix instructions and in the order in which those add; what is summed by multiply and add alone (``elementwise``,
``gemv`` and ``outer`` products, the squared error, the fused loss of few outputs, the norm of gradients) is split
alike on all of NVIDIA's.

**Why a plan.** Each function that selects a plan also returns the reason for each plan it rejected;
``python -m gradkernels explain`` prints them.

Over 500 lines, since this is the one place for every constant of every op, with its reason.
"""

import functools
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

# Threads of a program that passes over elements once; each loads 16 bytes at a time.
THREADS = 128

# SMs of an H100. A constant: what decides how a sum is split may not depend on the device at hand.
SMS = 132

# Programs that fill a GPU. A long sum is split until a launch has so many.
FULL_GRID = 2 * SMS

# Tiles of 128 rows are used from so many of them on: with fewer, half of the SMs would idle.
LARGE_TILES = SMS // 2

# Elements of a program that writes simple results: 8 to 16 a thread, enough loads in flight to hide their latency.
BLOCK = 1024

# Tiles of 256 columns are used where there are so many: with fewer, SMs idle that narrower tiles would keep busy.
WIDE_TILES = SMS * 85 // 100

# Registers per thread that leave room for three, or four, programs of 128 threads on an NVIDIA SM (65536 registers).
THREE_PROGRAMS = 168
FOUR_PROGRAMS = 128
ALL_REGISTERS = 255

# One file of measured tiles for each device that someone has tuned.
TUNED = Path(__file__).with_name("tuned")


class Target(NamedTuple):
    """What kernels are compiled for: ``cuda`` with compute capability (90) or ``hip`` with architecture."""

    backend: str
    arch: int | str


@functools.cache
def target_of(device: torch.device) -> Target:
    """Return what Triton compiles for on a device; under its interpreter ``Target("interpreter", 0)``."""
    if not isinstance(triton.language.sum, triton.runtime.JITFunction):
        return Target("interpreter", 0)
    guard = nullcontext() if device.index is None else getattr(torch, device.type).device(device)
    with guard:
        target = triton.runtime.driver.active.get_current_target()
    return Target(target.backend, target.arch)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the device's SMs. It may only set how many programs share work whose result does not depend on it."""
    if not isinstance(triton.language.sum, triton.runtime.JITFunction):
        return 4
    driver = triton.runtime.driver.active
    index = driver.get_current_device() if device.index is None else device.index
    return driver.utils.get_device_properties(index)["multiprocessor_count"]


def warp_size(target: Target) -> int:
    """Return the threads per warp."""
    return 64 if str(target.arch).startswith("gfx9") else 32


def warps(target: Target) -> int:
    """Return the warps of a program of THREADS threads."""
    return THREADS // warp_size(target)


def has_tma(target: Target) -> bool:
    """Return whether the chip copies whole tiles, given a tensor descriptor, and has shared memory for large ones.

    From sm_120 on, as in GeForce cards, it has less than half of sm_90's, and multiplies as sm_80 does.
    """
    return target.backend == "cuda" and isinstance(target.arch, int) and 90 <= target.arch < 120


def registers(most: int, target: Target) -> dict[str, int]:
    """Return the compiler option that caps registers per thread (NVIDIA only).

    Without it, NVIDIA's assembler may spill registers to fit more programs on an SM.
    """
    return {"maxnreg": most} if target.backend == "cuda" else {}


def dot_precision(dtype: torch.dtype, target: Target, setting: str) -> str:
    """Return the ``input_precision`` of a dot product.

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


def _first(*conditions: tuple[bool, str]) -> str:
    """Return the sentence of the first condition that holds; empty if none does."""
    return next((sentence for holds, sentence in conditions if holds), "")


class Plan(NamedTuple):
    """How a call is computed.

    Attributes:
        name: a key of the op's table of plans, such as MATMUL_PLANS.
        tile: of a program, and how that is compiled; None where the plan has kernels of another op.
        refused: why plans that are preferred to this one do not serve, or are not preferred, by their names.
        registers: the cap per thread of a matrix product, if any.
    """

    name: str
    tile: Any
    refused: dict[str, str] = {}  # noqa: RUF012
    registers: int | None = None


# ---- matrix products ----


class MatmulConfig(NamedTuple):
    """The tile of one program and how it is compiled."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Operands(NamedTuple):
    """What the layout of a product's tensors allows.

    Attributes:
        aligned: both operands can be loaded 16 bytes at a time.
        descriptors: operands and result fit tensor descriptors too.
        columns: the left operand is contiguous along M, not K.
    """

    aligned: bool
    descriptors: bool
    columns: bool


# In order of preference.
MATMUL_PLANS = {
    "elementwise": "a thread computes one element of the result: its sum is too short for tiles",
    "gemv": "one column: matrix instructions have nothing to reuse",
    "outer": "K is shorter than a matrix instruction's: multiply and add reach the bandwidth of the result",
    "gemm_tma": "matrix instructions on large tiles that the chip copies whole (TMA), in persistent programs",
    "gemm": "matrix instructions on tiles loaded through pointers",
}

# Up to here an element's sum in one thread beats tiles, which would be mostly padding.
ELEMENTWISE_MAX_K = 32
ELEMENTWISE_MAX_AREA = 256  # K * min(M, N): what neighbouring threads share stays in the cache
ELEMENTWISE_BLOCK = 256

# Elements of the left operand that a program of a matrix-vector product loads per step: 32 a thread.
GEMV_BLOCK = 4096

# A matrix instruction multiplies at least 16 elements along K, most of them padding for a K this short.
OUTER_MAX_K = 4

# Rows of tiles that run side by side, so that they share columns of the right operand in the cache.
GROUP_M = 8

# Minimum K steps per split: enough to fill the pipeline of loads, and to make partial sums cheap beside operands.
MIN_STEPS_PER_SPLIT = {"gemm": 8, "gemv": 2, "outer": 8}

# Elements of a tile of partial sums in the second stage of a split product.
REDUCE_BLOCK = 1024


def matmul(dtype: torch.dtype, M: int, N: int, K: int, target: Target) -> MatmulConfig:
    """Return the tile for one product of an (M, K) by a (K, N) matrix by dot products of ``dtype``."""
    stages = 2 if target.backend == "hip" else 3  # tiles in flight that fit shared memory
    block_m, block_n = 16 if M <= 16 else 64, 16 if N <= 16 else 64
    if dtype == torch.float64:
        # Two elements per thread, so that they are loaded together.
        block_k = 16 * warp_size(target) // 32 if 16 in (block_m, block_n) else 16
        return MatmulConfig(block_m, block_n, block_k, 4, stages)
    block_k = 64 if dtype.itemsize == 2 else 32  # 128 bytes
    if min(M, N) > 64 and triton.cdiv(M, 128) * triton.cdiv(N, 128) >= LARGE_TILES:
        return MatmulConfig(128, _large_block_n(dtype, target), block_k, 8, stages)
    return MatmulConfig(block_m, block_n, block_k, 4, stages)


def _tma_block_n(M: int, N: int, itemsize: int) -> int:
    """Return the columns of a tile that the chip copies: 256 where that takes no longer than 128, by waves on SMS.

    A wide tile takes as long as two; side by side, two narrow ones read a tenth more.
    """
    narrow, wide = (triton.cdiv(M, 128) * triton.cdiv(N, block) for block in (128, 256))
    waves, wide_waves = triton.cdiv(narrow, SMS), 2 * triton.cdiv(wide, SMS)
    return 256 if itemsize == 2 and wide >= WIDE_TILES and 9 * wide_waves <= 10 * waves else 128


def _large_block_n(dtype: torch.dtype, target: Target) -> int:
    """Return the columns of a large tile: half where the parts of a split float32 operand are all in registers."""
    return 64 if target.backend == "cuda" and not has_tma(target) and dtype == torch.float32 else 128


def matmul_plan(
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    batches: int,
    sums: int,
    operands: Operands,
    target: Target,
) -> Plan:
    """Return how ``batches`` products of (M, K) by (K, N) matrices are computed.

    Args:
        dtype: the wider of the operands' dtypes and of that of the multiplication.
        sizes: M, N, K.
        batches: matrices in the result.
        sums: products summed into each of them.
        operands: their layout.
        target: what is compiled for.
    """
    M, N, K = sizes
    refused = {
        "elementwise": _first(
            (sums != 1, f"{sums} products are summed into each result"),
            (K > ELEMENTWISE_MAX_K, f"K = {K} is more than {ELEMENTWISE_MAX_K = }"),
            (
                K * min(M, N) > ELEMENTWISE_MAX_AREA,
                f"K * min(M, N) = {K * min(M, N)} is more than {ELEMENTWISE_MAX_AREA = }",
            ),
        )
    }
    if not refused["elementwise"]:
        tile = MatmulConfig(ELEMENTWISE_BLOCK, 1, triton.next_power_of_2(max(K, 1)), 4, 1)
        return Plan("elementwise", tile)
    double = dtype == torch.float64
    if N == 1:
        # Long in the direction in which the left operand is contiguous.
        block_m = 1 if M == 1 else 4 if M <= 4 or K > 512 else 16 if K > 64 else 64
        if operands.columns:
            block_m = 256 if M > 64 else 16
        # Left to itself, sm_100's compiler takes 64 registers and keeps the rest of a 16-bit tile in memory.
        most = None if double else FOUR_PROGRAMS
        return Plan("gemv", MatmulConfig(block_m, 1, GEMV_BLOCK // block_m, 4, 1), refused, most)
    refused["gemv"] = f"the result has {N} columns"
    refused["outer"] = _first(
        (sums != 1, f"{sums} products are summed into each result"),
        (K > OUTER_MAX_K, f"K = {K} is more than {OUTER_MAX_K = }"),
    )
    if not refused["outer"]:
        tile = MatmulConfig(64, 64 if double else 128, 1, 4, 1)
        del refused["outer"]
        return Plan("outer", tile, refused, ALL_REGISTERS if double else THREE_PROGRAMS)
    small = matmul(dtype, min(M, 64), min(N, 64), K, target)
    tiles = triton.cdiv(M, 128) * triton.cdiv(N, 128) * batches
    splits = max(1, sums * K // small.BLOCK_K // MIN_STEPS_PER_SPLIT["gemm"])
    refused["gemm_tma"] = _first(
        (double, "float64 has no tiles that the chip copies"),
        (not operands.aligned, "the operands cannot be loaded 16 bytes at a time"),
        (min(M, N) <= 64, f"min(M, N) = {min(M, N)} is at most 64"),
        (tiles < LARGE_TILES, f"{tiles} tiles of 128 by 128 are fewer than {LARGE_TILES = }"),
        (
            not has_tma(target),
            f"{target.backend} {target.arch} has no TMA, or too little shared memory for it",
        ),
        (not operands.descriptors, "a tensor does not fit a descriptor: dtypes differ, or rows overlap"),
        (batches != 1 or sums != 1, "it serves single matrices"),
    )
    if not refused["gemm_tma"]:
        block_n = _tma_block_n(M, N, dtype.itemsize)
        del refused["gemm_tma"]
        return Plan("gemm_tma", MatmulConfig(128, block_n, small.BLOCK_K, 8, 3), refused)
    if double:
        tile = small
    elif not operands.aligned:  # each element has an address of its own, in registers
        block = max(small.BLOCK_M, small.BLOCK_N)
        tile = small._replace(BLOCK_M=block, BLOCK_N=block, BLOCK_K=32 if dtype.itemsize == 2 else 16)
    elif min(M, N) <= 64 or tiles * splits < LARGE_TILES:
        longer = 2 if 16 in (small.BLOCK_M, small.BLOCK_N) else 1
        tile = small._replace(BLOCK_K=longer * small.BLOCK_K)
    else:
        tile = MatmulConfig(128, _large_block_n(dtype, target), small.BLOCK_K, 8, small.num_stages)
    return Plan("gemm", tile, refused)


def splits(tiles: int, steps: int, plan: str) -> int:
    """Return into how many parts a sum of ``steps`` steps is split, with ``tiles`` programs if it were not."""
    return max(1, min(FULL_GRID // max(tiles, 1), steps // MIN_STEPS_PER_SPLIT[plan]))


def matmul_reduce(size: int) -> tuple[int, int]:
    """Return the tile (splits, elements) in which the partial sums of ``size`` elements are added."""
    block = 16 if size <= 64 else 256
    return REDUCE_BLOCK // block, block


def matmul_key(dtype: torch.dtype, sizes: tuple[int, int, int], plan: str) -> str:
    """Return the name of a class of products in a tuned file: sizes count by the power of two above them."""
    return " ".join(
        [str(dtype).removeprefix("torch."), *(str(triton.next_power_of_2(size)) for size in sizes), plan]
    )


def file_name(device_name: str) -> str:
    """Return the file name of a device's tuned tiles."""
    return re.sub(r"\W+", "_", device_name) + ".json"


@functools.cache
def tuned(device_name: str) -> dict[str, MatmulConfig]:
    """Return the tiles that ``python -m bench tune`` found best on a device, by matmul_key; empty if none are shipped
    or ``GRADKERNELS_TUNED`` is 0."""
    path = TUNED / file_name(device_name)
    if os.environ.get("GRADKERNELS_TUNED") == "0" or not path.is_file():
        return {}
    return {key: MatmulConfig(*tile) for key, tile in json.loads(path.read_text())["matmul"].items()}


@functools.cache
def name_of(device: torch.device) -> str:
    """Return the device name; empty if the device type has no tuned tiles."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


# ---- the fused linear layer and squared error ----


class LinearMseChunks(NamedTuple):
    """How a row of X is held in registers: as CHUNKS chunks of CHUNK columns.

    Attributes:
        compiled: options of the compiler: ``num_warps`` and, on NVIDIA, ``maxnreg``.
    """

    ROWS: int
    CHUNK: int
    CHUNKS: int
    STAGES: int
    compiled: dict[str, int]


class LinearMseDot(NamedTuple):
    """How a tile of rows of X is multiplied twice."""

    ROWS: int
    COLS: int
    OUTPUTS: int
    STAGES: int
    num_warps: int


# In order of preference.
LINEAR_MSE_PLANS = {
    "chunks": "X is read once: a row stays in registers while its errors and its part of the gradient are computed",
    "dot": "X is read once, by tiles of rows, each used in two products by matrix instructions",
    "tiles": "X is read twice: a matrix product that ends in the errors, then E^T X as a second product",
}

# The most outputs that multiply and add serves.
CHUNKS_MAX_OUTPUTS = 8
# Float32 weights, and as many gradients, that a warp of 32 threads holds, 64 of each a thread. Within it a row is
# one warp's, so that its sum does not leave the warp.
CHUNKS_SHORT_ROW = 2048
# The same of a program of eight warps, which share the rows that are longer.
CHUNKS_LONG_ROW = 8 * CHUNKS_SHORT_ROW
# With half as many, two programs of eight warps run on an SM, with 128 registers a thread; four of four warps, where a
# row of one output's weights is half of CHUNKS_SHORT_ROW at most.
CHUNKS_HALF = CHUNKS_LONG_ROW // 2
# Bytes of a tile of rows up to which three of them in flight fit shared memory.
CHUNKS_STAGED_BYTES = 32768
# From so many outputs on, multiply and add of 16 bits is bound by instructions, matrix instructions are not.
DOT_MIN_OUTPUTS = 5
DOT_ROWS = 64
# D * K, both rounded up to powers of two: the products of a program that its registers hold.
DOT_MAX_AREA = 8192
# The tile (rows, columns) in which a program adds partial sums, and the rows in which it adds those of the loss.
SUM_BLOCK = (64, 32)
SUM_LOSS_BLOCK = 1024
# Elements of a tile of grad_X by multiply and add, and its most columns.
GRAD_INPUT_BLOCK = 2048
GRAD_INPUT_MAX_COLS = 1024
# Programs of a one-pass plan each read the weights and write partial sums. Those bytes are at most 1 / PARTIALS_PART
# of X's, or else a program has at least ROWS_PER_PROGRAM rows of X.
PARTIALS_PART = 16
# Columns of a row of which one output's errors and gradients take so few registers that four programs share an SM, each
# with bytes in flight of its own.
SHORT_ROW = 512
ROWS_PER_PROGRAM = 48


def linear_mse_plan(
    K: int, D: int, itemsize: int, acc: torch.dtype, operand: torch.dtype, target: Target
) -> Plan:
    """Return how the fused loss of K outputs of D inputs is computed: LinearMseChunks, LinearMseDot, or ``tiles``.

    Args:
        K, D: outputs and inputs.
        itemsize: bytes of an element of X.
        acc: dtype of the sums.
        operand: dtype that matrix instructions multiply.
        target: what is compiled for.
    """
    chunks = linear_mse_chunks(K, D, itemsize, acc, target)
    dot = linear_mse_dot(K, D, operand, target)
    if not isinstance(chunks, str) and not isinstance(dot, str):
        if K >= DOT_MIN_OUTPUTS:
            chunks = f"K = {K} is at least {DOT_MIN_OUTPUTS = }: multiply and add is bound by instructions"
        else:
            dot = f"K = {K} is less than {DOT_MIN_OUTPUTS = }: multiply and add keeps up with memory"
    found = {"chunks": chunks, "dot": dot, "tiles": "it reads X twice"}
    refused = {name: why for name, why in found.items() if isinstance(why, str)}
    for name in ("chunks", "dot"):
        if name not in refused:
            return Plan(name, found[name], refused)
    del refused["tiles"]
    return Plan("tiles", None, refused)


def _is_half_a_row(K: int, values: int) -> bool:
    """Return whether a row's weights, ``values`` words, leave a warp that holds the row half of its registers."""
    return K == 1 and values <= CHUNKS_SHORT_ROW // 2


@functools.cache
def linear_mse_chunks(
    K: int, D: int, itemsize: int, acc: torch.dtype, target: Target
) -> LinearMseChunks | str:
    """Return the ``chunks`` config for K outputs of D inputs of ``itemsize`` bytes, or why there is none.

    A chunk is 16 bytes per thread. Short rows are held by one warp, longer ones by eight.
    """
    if K > CHUNKS_MAX_OUTPUTS:
        return f"K = {K} is more than {CHUNKS_MAX_OUTPUTS = } outputs"
    words = acc.itemsize // 4
    size = triton.next_power_of_2(max(D, 16))
    # AMD's shared memory holds fewer tiles in flight than the asynchronous copies of NVIDIA would fill.
    most = 1 if target.backend == "hip" else 3
    width = warp_size(target) * 16 // itemsize

    def config_of(rows: int, chunk: int, num_warps: int) -> LinearMseChunks:
        chunks = triton.cdiv(max(D, 1), chunk)
        stages = most if rows * D * itemsize <= CHUNKS_STAGED_BYTES else min(most, 2)
        values = K * words * chunk * chunks
        half = _is_half_a_row(K, values) if num_warps == 4 else rows * values <= CHUNKS_HALF
        compiled = {"num_warps": num_warps, **registers(FOUR_PROGRAMS if half else ALL_REGISTERS, target)}
        return LinearMseChunks(rows, chunk, chunks, stages, compiled)

    chunk = min(width, size)
    values = K * words * chunk * triton.cdiv(max(D, 1), chunk)
    if values <= CHUNKS_SHORT_ROW:
        # More rows a tile, the shorter they are; 8 KiB of X at most, and one row for each warp at least.
        rows = min(2 * CHUNKS_SHORT_ROW // triton.next_power_of_2(values), 8192 // itemsize // chunk)
        return config_of(max(4, rows), chunk, 4)
    for rows in (1,) if K == 1 else (4, 2, 1):
        chunk = min(8 // rows * width, size)
        values = rows * K * words * chunk * triton.cdiv(D, chunk)
        if values <= CHUNKS_LONG_ROW:
            return config_of(rows, chunk, 8)
    return f"{values} values of weights do not fit registers, which hold {CHUNKS_LONG_ROW}"


@functools.cache
def linear_mse_dot(K: int, D: int, dtype: torch.dtype, target: Target) -> LinearMseDot | str:
    """Return the ``dot`` config for K outputs of D inputs of ``dtype``, or why there is none."""
    cols, outputs = (max(16, triton.next_power_of_2(size)) for size in (D, K))
    most = 16 if target.backend == "hip" else 64
    refused = _first(
        (dtype.itemsize != 2, "the operands have more than 16 bits"),
        (outputs > most, f"K = {K} is more than {most} outputs"),
        (
            cols * outputs > DOT_MAX_AREA,
            f"a product of {cols} by {outputs} does not fit registers ({DOT_MAX_AREA})",
        ),
    )
    if refused:
        return refused
    stages = 1 if target.backend == "hip" else 2
    return LinearMseDot(DOT_ROWS, cols, outputs, stages, 4 if cols * outputs <= DOT_MAX_AREA // 2 else 8)


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
    """Return the tile of an (M, K) by (K, N) product in the fused loss, and whether it uses descriptors.

    Args:
        operand: dtype that is multiplied.
        M, N, K: sizes.
        loads: the last step reads a tile as large as the result's, which takes the registers of a wider one.
        aligned: rows of operands and results begin at multiples of 16 bytes.
        descriptors: both operands fit tensor descriptors too.
        target: what is compiled for.
    """
    tile = matmul(operand, M, N, K, target)
    if tile.BLOCK_M == 128 and descriptors and has_tma(target):
        return tile if loads else tile._replace(BLOCK_N=_tma_block_n(M, N, operand.itemsize)), True
    # Narrower where registers are short: without alignment each element has an address of its own, and float32
    # operands are split into several.
    if not aligned or operand == torch.float32:
        tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, 64))
    return tile, False


def linear_mse_programs(N: int, D: int, K: int, itemsize: int, acc: torch.dtype) -> int:
    """Return the programs of a one-pass plan: from shape and dtype alone, so that every GPU adds in one order.

    At most two per SM, or four where the registers of a short row leave room for them; while X is small, so few
    that the partial sums (written and read) and the weights are less than 1 / PARTIALS_PART of X, but not fewer
    than one per SM with ROWS_PER_PROGRAM rows.
    """
    light = N * itemsize // (PARTIALS_PART * K * (2 * acc.itemsize + itemsize))
    most = 2 * FULL_GRID if K == 1 and D <= SHORT_ROW else FULL_GRID
    return max(1, min(most, max(light, min(SMS, N // ROWS_PER_PROGRAM))))


def linear_mse_grad_input(K: int, D: int) -> tuple[int, int] | None:
    """Return the tile (rows, columns) of grad_X by multiply and add; None from where matrix instructions serve."""
    if K > CHUNKS_MAX_OUTPUTS:
        return None
    cols = min(max(triton.next_power_of_2(D), 16), GRAD_INPUT_MAX_COLS)
    return GRAD_INPUT_BLOCK // cols, cols


# ---- a batch of linear models ----

# In order of preference.
LINEAR_MSE_MODELS_PLANS = {
    "chunks": "X is read once, a piece of a model's rows at a time, as by the plan of this name for one model",
    "shared": "all models have the same rows: X is read once, each tile of rows used in two products for many models",
    "tiles": "X is read twice: products that end in the errors, then E^T X as further products",
}

# Programs into which the rows of all models are cut, if there are enough: eight for each SM.
MODELS_PROGRAMS = 8 * SMS
# The tile (models, partial sums, columns) in which a program adds partial sums.
MODELS_SUM_BLOCK = (8, 16, 16)
# D times the outputs of a program that reads shared rows, both rounded up to powers of two: the 16-bit weights and
# gradients that its registers hold. float32 products are made of three. Beside them are a target and a sample weight
# of each row for each output: of so many outputs at most.
MODELS_SHARED_AREA = 2048
MODELS_SHARED_OUTPUTS = 64
# Float32 values of a tile of rows for each thread, at least: small models have few rows, and fewer warps a program.
MODELS_VALUES = 16


@functools.cache
def models_chunks(
    K: int, D: int, itemsize: int, acc: torch.dtype, rows: int, target: Target
) -> LinearMseChunks | str:
    """Return the ``chunks`` config for models of ``rows`` rows, K outputs and D inputs, or why there is none."""
    chosen = linear_mse_chunks(K, D, itemsize, acc, target)
    if isinstance(chosen, str):
        return chosen
    if chosen.compiled["num_warps"] > 4:
        return chosen
    ROWS = min(chosen.ROWS, triton.next_power_of_2(max(rows, 4)))
    values = K * chosen.CHUNK * chosen.CHUNKS * acc.itemsize // 4
    row = chosen.CHUNK * chosen.CHUNKS * itemsize
    work = min(ROWS * values // MODELS_VALUES, ROWS * row // 16)  # no thread loads less than 16 bytes of X
    busy = max(1, work // warp_size(target))
    num_warps = min(4, triton.next_power_of_2(busy + 1) // 2)  # at most so many, a power of 2
    most = THREE_PROGRAMS if _is_half_a_row(K, values) else ALL_REGISTERS
    compiled = {"num_warps": num_warps, **registers(most, target)}
    return chosen._replace(ROWS=ROWS, compiled=compiled)


def models_span(rows: int, step: int, K: int, itemsize: int, acc: torch.dtype) -> int:
    """Return the most rows of a piece: from the shape alone, so that every GPU adds in the same order.

    MODELS_PROGRAMS pieces, unless the partial sums (written and read) and the weights of so many were more than
    1 / PARTIALS_PART of the rows; a multiple of the ``step`` rows that are read at once.
    """
    least = PARTIALS_PART * K * (2 * acc.itemsize + itemsize) // itemsize
    return triton.cdiv(max(least, triton.cdiv(rows, MODELS_PROGRAMS)), step) * step


@functools.cache
def models_shared(outputs: int, D: int, operand: torch.dtype, target: Target) -> LinearMseDot | str:
    """Return the ``shared`` config for all models' outputs, of D inputs multiplied as ``operand``, or why not."""
    cols = max(16, triton.next_power_of_2(D))
    area = MODELS_SHARED_AREA * 2 // operand.itemsize
    if cols * 16 > area:
        return f"products of {cols} inputs do not fit registers ({area})"
    OUTPUTS = min(MODELS_SHARED_OUTPUTS, area // cols, max(16, triton.next_power_of_2(outputs)))
    stages = 1 if target.backend == "hip" else 2
    return LinearMseDot(32 if operand.itemsize > 2 else DOT_ROWS, cols, OUTPUTS, stages, 4)


def models_shared_span(rows: int, tiles: int, D: int, step: int, itemsize: int, acc: torch.dtype) -> int:
    """Return the rows of a program of ``shared``: FULL_GRID programs, unless partial sums were too many."""
    least = 2 * PARTIALS_PART * (D + 2) * acc.itemsize // itemsize
    return triton.cdiv(max(least, triton.cdiv(rows * tiles, FULL_GRID)), step) * step


def models_tile(operand: torch.dtype, M: int, N: int, K: int, loads: bool, target: Target) -> MatmulConfig:
    """Return the tile of one of many (M, K) by (K, N) products; ``loads`` as of linear_mse_product."""
    tile = matmul(operand, M, N, K, target)
    return tile._replace(BLOCK_N=min(tile.BLOCK_N, 64)) if loads or operand == torch.float32 else tile


# ---- squared error ----

# Elements of one tile of the squared error: 16 float32 a thread with four warps of 32 threads.
MSE_BLOCK = 2048
# The Hessian-vector product holds up to eight operands in registers at once.
MSE_HVP_BLOCK = 1024
# Programs of a reduction, at most.
MSE_PROGRAMS = 8 * SMS
# Columns of a tile each of which has a sum, 256 bytes of bfloat16; and its tiles at least, so that the partial sums,
# written and read, are a hundredth of what is added up.
MSE_KEPT_COLUMNS = 128
MSE_KEPT_TILES = 8
# The most programs that a grid's second dimension may have.
MAX_GRID_Y = 65535
# Elements of a tile of partial sums; with many sums, 32 neighbours of them are read together.
MSE_SUM_BLOCK = 1024


def mse_registers(acc: torch.dtype, target: Target) -> dict[str, int]:
    """Return the compiler's options for a tile of the squared error.

    Left to itself, the compiler gives a float64 tile 96 of sm_80's registers and keeps the rest of it in memory.
    """
    return registers(FOUR_PROGRAMS, target) if acc == torch.float64 else {}


class MseTile(NamedTuple):
    """The tile of a program of the squared error.

    Attributes:
        ROWS, COLS: its size.
        ALIGN: divides the columns and strides, so that 16 bytes are loaded at a time.
        FLAT: the operands are one row; the last n % 16 elements are left to one program.
        KEEP: what of a tile has sums of its own: ``"nothing"``, ``"rows"`` or ``"columns"``.
    """

    ROWS: int
    COLS: int
    ALIGN: int
    FLAT: bool
    KEEP: str

    @property
    def plan(self) -> str:
        """Return the tile's key of MSE_PLANS."""
        return "flat" if self.FLAT else "rows" if self.KEEP == "nothing" else f"{self.KEEP} kept"


MSE_PLANS = {
    "flat": "all operands are one row: tiles of 16 bytes a thread at a time, the last n % 16 elements apart",
    "rows": "operands of different strides: tiles of rows and columns",
    "rows kept": "sums shorter than a tile: one for each row of a tile",
    "columns kept": "sums over all but the fastest dimension: one for each column of a tile",
}


def mse_tile(
    batch: int, rows: int, n: int, align: int, block: int, sums: bool = False, columns_kept: bool = False
) -> MseTile:
    """Return the tile of ``block`` elements for ``batch`` times ``rows`` rows of ``n`` columns.

    ``sums``: each element of the batch has one, or each of its columns if ``columns_kept``.
    """
    if batch * rows == 1 and not (sums and columns_kept):
        return MseTile(1, block, 16, True, "nothing")
    cols = min(block, max(16, triton.next_power_of_2(n)))
    if sums and columns_kept:
        cols = min(cols, MSE_KEPT_COLUMNS)
        return MseTile(block // cols, cols, align, False, "columns")
    if sums and batch > 1 and rows * n < block:
        cols = triton.next_power_of_2(n)
        return MseTile(block // cols, cols, align, False, "rows")
    return MseTile(1 if sums and batch > 1 and rows == 1 else block // cols, cols, align, False, "nothing")


def mse_grid(tile: MseTile, batch: int, rows: int, n: int, elementwise: bool) -> tuple[int, int]:
    """Return programs (R, P), P for each sum or row of sums, from the shape alone: every GPU adds in the same order."""
    if tile.FLAT:
        return 1, min(-(-n // tile.COLS), MAX_GRID_Y if elementwise else MSE_PROGRAMS)
    col_tiles = triton.cdiv(n, tile.COLS)
    if tile.KEEP == "rows":  # a sum is shorter than a tile
        return triton.cdiv(batch, tile.ROWS), 1
    if tile.KEEP == "columns":
        programs, tiles = batch * col_tiles, triton.cdiv(rows, tile.ROWS * MSE_KEPT_TILES)
    else:
        programs, tiles = batch, triton.cdiv(rows, tile.ROWS) * col_tiles
    return programs, min(tiles, MAX_GRID_Y if elementwise else max(1, MSE_PROGRAMS // programs))


def mse_sum(sums: int) -> tuple[int, int]:
    """Return how many partial sums, and of how many sums, a program of the second stage adds at a time."""
    block = 1 if sums == 1 else 32
    return MSE_SUM_BLOCK // block, block


# ---- optimizers ----

# Elements of a tensor that one program updates, and the programs that add the squares of gradients: from the shapes
# alone, so that norms have the same bits on every device.
CHUNK = 4096
NORM_PROGRAMS = 1024  # a power of two
# A program begins with loads that wait for each other: its tensor, options, step. Of tensors that fill an H100's SMs
# twelve times over it updates so many chunks.
LARGE_CHUNKS = 4
LARGE_TENSOR = 12 * SMS * LARGE_CHUNKS * CHUNK

# Models that one program of a stacked step updates at most. Each has a dozen numbers in float64: with 512 models of one
# bfloat16 element, registers spilt.
STACKED_MODELS = 256

# Chunks of models' gradients that a program of the stacked norm adds up at least, and programs that share models.
STACKED_NORM_CHUNKS = 4
STACKED_NORM_PROGRAMS = 256

STEP_PLANS = {
    "chunks": "one launch for all tensors: a program updates CHUNK elements of one of them (LARGE_CHUNKS times as many "
    "of a large one), BLOCK at a time"
}


def step_span(numel: int) -> int:
    """Return the elements of a tensor that one program of a step updates."""
    return LARGE_CHUNKS * CHUNK if numel >= LARGE_TENSOR else CHUNK


def optimizer(itemsize: int, target: Target) -> dict[str, int]:
    """Return the block of a step and its compile options: 16 bytes per thread of the widest operand, of ``itemsize``.

    Three programs are to fit an NVIDIA SM; float32 leaves room for more without asking.
    """
    chosen = {"BLOCK": THREADS * 16 // itemsize, "num_warps": warps(target)}
    return chosen if itemsize == 4 else chosen | registers(THREE_PROGRAMS, target)


# ---- the training loop of linear models ----

# A program keeps a model's weights, gradient sums and moments in its registers: of so many padded weights at most.
FIT_WEIGHTS = 1024

# Bytes of a round's rows: an SM reads them from its caches in a few microseconds, launches take longer.
FIT_BYTES = 1 << 19

# Elements of a tile of rows, features and outputs for each thread, held twice: as products and as sums.
FIT_ELEMENTS = 16


LINEAR_MSE_FIT_PLANS = {
    "one launch": "a program goes through all rounds of a model, whose weights and moments stay in its registers",
    "loop": "each round is launched by itself, as the loss, its gradients and the step",
}


def linear_mse_fit(rows: int, K: int, D: int, dtype: torch.dtype, target: Target) -> Plan:
    """Return how a model of (K, D) weights is trained on so many rows a round; the kernel's options hold its tile."""
    block_k, block_d = triton.next_power_of_2(max(K, 1)), triton.next_power_of_2(max(D, 1))
    weights = block_k * block_d
    read = rows * (D + K) * dtype.itemsize
    refused = _first(
        (rows * K * D == 0, "there are no rows, outputs or features"),
        (weights > FIT_WEIGHTS, f"{weights} weights, padded to powers of two, are more than {FIT_WEIGHTS}"),
        (read > FIT_BYTES, f"a round reads {read} bytes, more than {FIT_BYTES}"),
    )
    if refused:
        return Plan("loop", None, {"one launch": refused})
    elements = FIT_ELEMENTS // (2 if dtype == torch.float64 else 1) * warp_size(target)
    wanted = triton.next_power_of_2(rows) * weights
    num_warps = min(8, max(1, triton.next_power_of_2(max(wanted // 4, weights)) // elements))
    tile_rows = max(1, min(triton.next_power_of_2(rows), elements * num_warps // weights))
    tile = {"ROWS": tile_rows, "BLOCK_K": block_k, "BLOCK_D": block_d, "num_warps": num_warps}
    return Plan("one launch", tile)
