"""Batched matrix product with a bias: one tile of the result per program, partial sums where K is long.

Every derivative of a product is a product again, so this launcher also serves the gradients of matmul, linear
and bias: outer products, single rows and columns, and long sums into a small result. Four kernels:

- ``_matmul_forward_kernel``: the general one, with tensor cores, or as multiply and add for rows, columns and
  outer products, which have no use for them;
- ``_matmul_descriptor_kernel``: large, aligned, single matrices, where chips copy whole tiles (sm_90 and up);
- ``_matmul_small_kernel``: short sums into narrow results, many tiny matrices per program;
- ``_matmul_reduce_kernel``: adds the partial sums of a split, in order.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config
from .contraction import Contraction, Dimension, contract
from .launch import launch


@triton.jit
def _batch_offset(index, sizes, strides):
    """The offset of the ``index``-th element over the dimensions of ``sizes``, the first varying fastest."""
    offset = tl.zeros_like(index).to(tl.int64)
    for dim in tl.static_range(len(sizes)):
        offset += (index % sizes[dim]).to(tl.int64) * strides[dim]
        index = index // sizes[dim]
    return offset


@triton.jit
def _tile_of(tile, m_tiles, n_tiles, GROUP_M: tl.constexpr):
    """Row and column of the ``tile``-th tile: GROUP_M rows run side by side, sharing columns in the cache."""
    group = tile // (GROUP_M * n_tiles)
    rows = tl.minimum(m_tiles - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * n_tiles)
    return group * GROUP_M + within % rows, within // rows


@triton.jit
def _load_bias(
    bias_ptr,
    offs_m,
    offs_n,
    M,
    N,
    stride_am,
    stride_an,
    BIAS_ROW: tl.constexpr,
    BIAS_VECTOR: tl.constexpr,
):
    """A tile of the bias: (1, BLOCK_N) if BIAS_ROW, the same for every row of the result.

    BIAS_VECTOR: 0 if its columns are not contiguous, else how many of them are sure to be loaded together.
    """
    if BIAS_VECTOR == 0:
        bias_ptr += offs_n[None, :] * stride_an
    else:
        bias_ptr += offs_n[None, :]
        stride_am = stride_am // BIAS_VECTOR * BIAS_VECTOR
        N = N // BIAS_VECTOR * BIAS_VECTOR
    if BIAS_ROW:
        bias = tl.load(bias_ptr, mask=(offs_n < N)[None, :], other=0.0)
    else:
        mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        bias = tl.load(bias_ptr + offs_m[:, None] * stride_am, mask=mask, other=0.0)
    return bias


@triton.jit
def store_product(ptr, rows, cols, M, N, product):
    """Write what ``tl.dot`` gave to ``rows`` and ``cols`` of a contiguous (M, N) matrix.

    Rows go in pairs, a dimension of their own: else AMD's compiler stores each lane's part of the product as its
    instruction leaves it, 64 bits at a time.
    """
    product = tl.reshape(product, (rows.shape[0] // 2, 2, cols.shape[0]))
    rows = tl.reshape(rows, (rows.shape[0] // 2, 2))[:, :, None]
    cols = cols[None, None, :]
    tl.store(ptr + rows * N + cols, product.to(ptr.dtype.element_ty), mask=(rows < M) & (cols < N))


@triton.jit(
    do_not_specialize=[
        *("M", "N", "K", "stride_im", "stride_ik", "stride_ok", "stride_on", "stride_am", "stride_an"),
        *("batch_sizes", "batch_strides_input", "batch_strides_other", "batch_strides_bias"),
        *("sum_sizes", "sum_strides_input", "sum_strides_other"),
        *("m_tiles", "n_tiles", "k_steps", "batches", "steps", "steps_per_split"),
    ]
)
def _matmul_forward_kernel(
    input_ptr, other_ptr, bias_ptr, output_ptr,
    M, N, K, stride_im, stride_ik, stride_ok, stride_on, stride_am, stride_an,
    batch_sizes, batch_strides_input, batch_strides_other, batch_strides_bias,
    sum_sizes, sum_strides_input, sum_strides_other,
    m_tiles, n_tiles, k_steps, batches, steps, steps_per_split, scale,
    INPUT_CONTIGUOUS: tl.constexpr, INPUT_VECTOR: tl.constexpr,
    OTHER_CONTIGUOUS: tl.constexpr, OTHER_VECTOR: tl.constexpr, OUTPUT_VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_ROW: tl.constexpr, BIAS_VECTOR: tl.constexpr,
    MODE: tl.constexpr, PRECISION: tl.constexpr, DOUBLE: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of one matrix of the result, summed over one split of the steps along K.

    input_ptr: (*batch, *sum, M, K). other_ptr: (*batch, *sum, K, N).
    bias_ptr: (*batch, M, N), strides may be 0. output_ptr: (splits, *batch, M, N), contiguous.
    A step is BLOCK_K of K at one index of the summed dimensions; there are k_steps for each such index.
    INPUT_CONTIGUOUS, OTHER_CONTIGUOUS: which axis (0 or 1) of the matrix has stride 1; -1 for neither.
    INPUT_VECTOR, OTHER_VECTOR, OUTPUT_VECTOR: how many elements along that axis (of the output: along N) are
    sure to be loaded or stored together.
    MODE: "dot"; "outer", with BLOCK_K = 1; "column", with N = BLOCK_N = 1.
    DOUBLE: accumulate in float64, not float32. OPERAND: the type that is multiplied in
    MODE "dot"; the others multiply in the accumulator's.
    Bytes: the operands once per tile row and column (from cache where tiles share them), the result once.
    """
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    pid = tl.program_id(0)
    rest = pid // (m_tiles * n_tiles)
    batch = rest % batches
    split = rest // batches
    tile_m, tile_n = _tile_of(pid % (m_tiles * n_tiles), m_tiles, n_tiles, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    # What the launcher knows of contiguity and alignment, written so that the compiler sees it too.
    limit_m = M
    limit_n = N
    limit_ik = K
    limit_ok = K
    if INPUT_CONTIGUOUS == 0:
        stride_im = 1
        stride_ik = stride_ik // INPUT_VECTOR * INPUT_VECTOR
        limit_m = M // INPUT_VECTOR * INPUT_VECTOR
    if INPUT_CONTIGUOUS == 1:
        stride_ik = 1
        stride_im = stride_im // INPUT_VECTOR * INPUT_VECTOR
        limit_ik = K // INPUT_VECTOR * INPUT_VECTOR
    if OTHER_CONTIGUOUS == 0:
        stride_ok = 1
        stride_on = stride_on // OTHER_VECTOR * OTHER_VECTOR
        limit_ok = K // OTHER_VECTOR * OTHER_VECTOR
    if OTHER_CONTIGUOUS == 1:
        stride_on = 1
        stride_ok = stride_ok // OTHER_VECTOR * OTHER_VECTOR
        limit_n = N // OTHER_VECTOR * OTHER_VECTOR

    input_ptr += _batch_offset(batch, batch_sizes, batch_strides_input) // INPUT_VECTOR * INPUT_VECTOR
    other_ptr += _batch_offset(batch, batch_sizes, batch_strides_other) // OTHER_VECTOR * OTHER_VECTOR
    input_tile = input_ptr + offs_m[:, None] * stride_im + offs_k[None, :].to(tl.int64) * stride_ik
    mask_m = (offs_m < limit_m)[:, None]
    if MODE == "column":
        other_tile = other_ptr + offs_k[None, :].to(tl.int64) * stride_ok
        acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    else:
        other_tile = other_ptr + offs_k[:, None].to(tl.int64) * stride_ok + offs_n[None, :] * stride_on
        mask_n = (offs_n < limit_n)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)

    step_size = tl.full((), BLOCK_K, tl.int64)
    first = split * steps_per_split
    for step in tl.range(first, tl.minimum(first + steps_per_split, steps)):
        if len(sum_sizes) > 0:
            index = step // k_steps
            input_step = _batch_offset(index, sum_sizes, sum_strides_input) // INPUT_VECTOR * INPUT_VECTOR
            other_step = _batch_offset(index, sum_sizes, sum_strides_other) // OTHER_VECTOR * OTHER_VECTOR
            k = step % k_steps * step_size
            input_step += k * stride_ik
            other_step += k * stride_ok
        else:
            k = step * step_size
            input_step = k * stride_ik
            other_step = k * stride_ok
        x = tl.load(input_tile + input_step, mask=mask_m & (k + offs_k < limit_ik)[None, :], other=0.0)
        if MODE == "column":
            y = tl.load(other_tile + other_step, mask=(k + offs_k < limit_ok)[None, :], other=0.0)
            acc = tl.fma(x.to(ACC), tl.broadcast_to(y.to(ACC), (BLOCK_M, BLOCK_K)), acc)
        else:
            y = tl.load(other_tile + other_step, mask=mask_n & (k + offs_k < limit_ok)[:, None], other=0.0)
            if MODE == "outer":
                left = tl.broadcast_to(x.to(ACC), (BLOCK_M, BLOCK_N))
                acc = tl.fma(left, tl.broadcast_to(y.to(ACC), (BLOCK_M, BLOCK_N)), acc)
            else:
                acc = tl.dot(x.to(OPERAND), y.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    if MODE == "column":
        acc = tl.sum(acc, axis=1)[:, None]

    acc *= scale
    if HAS_BIAS:
        bias_ptr += _batch_offset(batch, batch_sizes, batch_strides_bias)
        acc += _load_bias(
            bias_ptr, offs_m, offs_n, M, N, stride_am, stride_an, BIAS_ROW, BIAS_VECTOR
        ).to(ACC)  # fmt: skip
    width = N // OUTPUT_VECTOR * OUTPUT_VECTOR
    output_ptr += (split.to(tl.int64) * batches + batch) * M * width
    if MODE == "dot":
        store_product(output_ptr, offs_m, offs_n, M, width, acc)
    else:
        at = output_ptr + offs_m[:, None] * width + offs_n[None, :]
        mask = (offs_m < M)[:, None] & (offs_n < width)[None, :]
        tl.store(at, acc.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N", "stride_am", "stride_an", "m_tiles", "n_tiles", "k_steps"])
def _matmul_descriptor_kernel(
    input_desc, other_desc, output_desc, bias_ptr,
    M, N, stride_am, stride_an, m_tiles, n_tiles, k_steps, scale,
    INPUT_TRANSPOSED: tl.constexpr, OTHER_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_ROW: tl.constexpr, BIAS_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The (BLOCK_M, BLOCK_N) tiles number pid, pid + programs, ... of one large matrix product.

    input_desc: (M, K), or (K, M) if INPUT_TRANSPOSED. other_desc: (K, N), or (N, K) if OTHER_TRANSPOSED.
    output_desc: (M, N). All three contiguous in their last dimension, rows 16-byte aligned.
    bias_ptr: (M, N), strides may be 0.
    The bits of a tile do not depend on which program computes it.
    Bytes: as _matmul_forward_kernel.
    """
    for tile in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        tile_m, tile_n = _tile_of(tile, m_tiles, n_tiles, GROUP_M)
        first_m = tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(k_steps):
            if INPUT_TRANSPOSED:
                x = input_desc.load([step * BLOCK_K, first_m]).T
            else:
                x = input_desc.load([first_m, step * BLOCK_K])
            if OTHER_TRANSPOSED:
                y = other_desc.load([first_n, step * BLOCK_K]).T
            else:
                y = other_desc.load([step * BLOCK_K, first_n])
            acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=tl.float32)
        # In two halves, so that the staging of the result takes half the shared memory.
        halves = tl.permute(tl.reshape(acc * scale, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        if HAS_BIAS:
            offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
            offs_n = first_n.to(tl.int64) + tl.arange(0, BLOCK_N // 2)
            left += _load_bias(
                bias_ptr, offs_m, offs_n, M, N, stride_am, stride_an, BIAS_ROW, BIAS_VECTOR
            ).to(tl.float32)  # fmt: skip
            offs_n += BLOCK_N // 2
            right += _load_bias(
                bias_ptr, offs_m, offs_n, M, N, stride_am, stride_an, BIAS_ROW, BIAS_VECTOR
            ).to(tl.float32)  # fmt: skip
        output_desc.store([first_m, first_n], left.to(output_desc.dtype))
        output_desc.store([first_m, first_n + BLOCK_N // 2], right.to(output_desc.dtype))


@triton.jit(
    do_not_specialize=[
        *(
            "size",
            "M",
            "N",
            "K",
            "stride_im",
            "stride_ik",
            "stride_ok",
            "stride_on",
            "stride_am",
            "stride_an",
        ),
        *("batch_sizes", "batch_strides_input", "batch_strides_other", "batch_strides_bias"),
    ]
)
def _matmul_small_kernel(
    input_ptr, other_ptr, bias_ptr, output_ptr,
    size, M, N, K, stride_im, stride_ik, stride_ok, stride_on, stride_am, stride_an,
    batch_sizes, batch_strides_input, batch_strides_other, batch_strides_bias, scale,
    HAS_BIAS: tl.constexpr, DOUBLE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of the result, over rows and matrices alike; K <= BLOCK_K.

    input_ptr: (*batch, M, K). other_ptr: (*batch, K, N). bias_ptr: (*batch, M, N), strides may be 0.
    output_ptr: (*batch, M, N), contiguous, of ``size`` elements. WIDE: that takes 64 bits to count.
    Bytes: operands and result once; what several elements of the result share comes from the cache.
    """
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    n = offs % N
    m = offs // N % M
    batch = offs // N // M
    m = m.to(tl.int64)
    n = n.to(tl.int64)
    input_row = input_ptr + _batch_offset(batch, batch_sizes, batch_strides_input) + m * stride_im
    other_column = other_ptr + _batch_offset(batch, batch_sizes, batch_strides_other) + n * stride_on
    acc = tl.zeros((BLOCK,), ACC)
    for k in tl.static_range(BLOCK_K):
        x = tl.load(input_row + stride_ik.to(tl.int64) * k, mask=offs < tl.where(k < K, size, 0), other=0.0)
        y = tl.load(
            other_column + stride_ok.to(tl.int64) * k, mask=offs < tl.where(k < K, size, 0), other=0.0
        )
        acc = tl.fma(x.to(ACC), y.to(ACC), acc)
    acc *= scale
    if HAS_BIAS:
        bias_ptr += _batch_offset(batch, batch_sizes, batch_strides_bias)
        acc += tl.load(bias_ptr + m * stride_am + n * stride_an, mask=mask, other=0.0).to(ACC)
    tl.store(output_ptr + offs, acc.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "splits",
        "size",
        "M",
        "N",
        "stride_am",
        "stride_an",
        "batch_sizes",
        "batch_strides_bias",
    ]
)
def _matmul_reduce_kernel(
    partial_ptr, bias_ptr, output_ptr,
    splits, size, M, N, stride_am, stride_an, batch_sizes, batch_strides_bias, scale,
    HAS_BIAS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of the result: the partial sums of all splits, always added in the same order.

    partial_ptr: (splits, *batch, M, N), contiguous. bias_ptr: (*batch, M, N), strides may be 0.
    output_ptr: (*batch, M, N), contiguous, of ``size`` elements, a multiple of VECTOR.
    Bytes: splits + 1 elements per element of the result.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_s = tl.arange(0, BLOCK_S)
    size = size // VECTOR * VECTOR
    mask = offs < size
    acc = tl.zeros((BLOCK_S, BLOCK), partial_ptr.dtype.element_ty)
    for first in tl.range(0, splits, BLOCK_S):
        rows = first + offs_s
        tile = partial_ptr + rows[:, None].to(tl.int64) * size + offs[None, :]
        acc += tl.load(tile, mask=(rows < splits)[:, None] & mask[None, :], other=0.0)
    total = tl.sum(acc, axis=0) * scale
    if HAS_BIAS:
        offsets = _batch_offset(offs // N // M, batch_sizes, batch_strides_bias)
        offsets += offs // N % M * stride_am + offs % N * stride_an
        total += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(total.dtype)
    tl.store(output_ptr + offs, total.to(output_ptr.dtype.element_ty), mask=mask)


_TYPES = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16
}  # fmt: skip

# Launches on (input, other, bias, output, scale), in the order of the normal form.
Run = Callable[[Tensor, Tensor, Tensor, Tensor, float], None]

_plans: dict[tuple[Any, ...], tuple[tuple[int, ...], bool, Run | None]] = {}
_PLANS = 4096  # kept at most; the shapes of a training loop are few


def matmul_forward(
    input: Tensor, other: Tensor, bias: Tensor | None, sum_dims: list[int], dtype: torch.dtype
) -> Tensor:
    """``(input @ other).sum(sum_dims, keepdim=True) + bias`` as a new contiguous tensor.

    Args:
        input: ``(*A, M, K)``, any strides.
        other: ``(*B, K, N)``, any strides; A and B broadcast to ``batch``. Of two float dtypes tensor cores
            multiply the narrower.
        bias: None, or a tensor that broadcasts to the result.
        sum_dims: dimensions of ``batch``, counted from 0, that are summed along with K.
        dtype: of the result.
    """
    shape, swapped, run = _planned(input, other, bias, sum_dims, dtype)
    output = torch.empty(shape, dtype=dtype, device=input.device)
    if run is not None:
        left, right = (other, input) if swapped else (input, other)
        run(left, right, output if bias is None else bias, output, 1.0)
    return output


def write_scaled_product(input: Tensor, other: Tensor, output: Tensor, scale: float) -> None:
    """``output = scale * input @ other`` for matrices; ``output`` is contiguous."""
    _, swapped, run = _planned(input, other, None, [], output.dtype)
    left, right = (other, input) if swapped else (input, other)
    if run is None:  # no elements
        return
    if output.dtype == torch.float64:  # Triton passes a Python float as float32
        run(left, right, output, output, 1.0)
        output.mul_(scale)
    else:
        run(left, right, output, output, scale)


def _planned(
    input: Tensor, other: Tensor, bias: Tensor | None, sum_dims: list[int], dtype: torch.dtype
) -> tuple[tuple[int, ...], bool, Run | None]:
    """As _plan, from the cache if it is there."""
    precision = torch.backends.cuda.matmul.fp32_precision if input.dtype == torch.float32 else "none"
    seen = [_seen(input), _seen(other), bias is not None and _seen(bias)]
    key = (*seen, *sum_dims, dtype, precision, input.device)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _PLANS:
            _plans.clear()
        found = _plans[key] = _plan(input, other, bias, sum_dims, dtype, precision)
    return found


def _seen(tensor: Tensor) -> tuple[Any, ...]:
    """What a plan depends on in a tensor."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0


def _plan(
    input: Tensor,
    other: Tensor,
    bias: Tensor | None,
    sum_dims: list[int],
    dtype: torch.dtype,
    precision: str,
) -> tuple[tuple[int, ...], bool, Run | None]:
    """The result's shape, whether the operands change places, and how the kernels are launched."""
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    kept = [1 if dim in sum_dims else size for dim, size in enumerate(batch)]
    shape = (*kept, input.shape[-2], other.shape[-1])
    if 0 in shape:
        return shape, False, None
    form = contract(input, other, bias, sum_dims)
    if form.swapped:
        input, other = other, input
    m, n, k = form.m, form.n, form.k
    target = config.target_of(input.device)
    double = torch.float64 in (input.dtype, other.dtype, None if bias is None else bias.dtype)
    # The interpreter multiplies the bits of bfloat16; float32 holds the same values.
    interpreted = target.backend == "interpreter"
    wide, narrow = sorted((input.dtype, other.dtype), key=lambda dtype: -dtype.itemsize)
    operand = torch.float64 if double else torch.float32 if interpreted else narrow

    rest = (*form.batch, *form.sums)
    input_axis, input_vector = _layout(input, (m, k), rest, 1)
    other_axis, other_vector = _layout(other, (k, n), rest, 2)
    bias_axis, bias_vector = (-1, 1) if bias is None else _layout(bias, (m, n), form.batch, 3)
    widest = 16 // dtype.itemsize
    output_vector = widest if n.size % widest == 0 else 1
    aligned = input_vector > 1 and other_vector > 1
    sums = math.prod(dim.size for dim in form.sums)
    descriptors = aligned and output_vector > 1 and wide == narrow
    descriptors = descriptors and _apart((m, k), input_axis, 1) and _apart((k, n), other_axis, 2)
    operands = config.Operands(aligned, descriptors, input_axis == 0)
    sizes = (m.size, n.size, k.size)
    staged = max(wide, operand, key=lambda dtype: dtype.itemsize)  # what has to fit in shared memory
    mode, tile = config.matmul_way(staged, sizes, form.batches, sums, operands, target)
    tile = config.tuned(config.name_of(input.device)).get(config.matmul_key(staged, sizes, mode), tile)

    options: dict[str, Any] = {
        "HAS_BIAS": bias is not None, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        **(config.registers(255 if double else 168, target) if mode == "outer" else {}),
    }  # fmt: skip
    if mode == "small":
        options |= {"DOUBLE": double, "BLOCK": tile.BLOCK_M, "BLOCK_K": tile.BLOCK_K}
        return shape, form.swapped, _small(form, options, input.device)
    options |= {
        "BIAS_ROW": bias is not None and m.bias == 0,
        "BIAS_VECTOR": bias_vector if bias_axis == 1 else 0,
        "PRECISION": config.dot_precision(operand, target, precision), "GROUP_M": 8,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K,
    }  # fmt: skip
    if mode == "descriptor":
        options |= {"INPUT_TRANSPOSED": input_axis == 0, "OTHER_TRANSPOSED": other_axis == 0}
        return shape, form.swapped, _descriptor(form, options, input.device)
    options |= {
        "INPUT_CONTIGUOUS": input_axis, "INPUT_VECTOR": input_vector,
        "OTHER_CONTIGUOUS": other_axis, "OTHER_VECTOR": other_vector, "OUTPUT_VECTOR": output_vector,
        "MODE": mode, "DOUBLE": double, "OPERAND": _TYPES[operand],
    }  # fmt: skip
    return shape, form.swapped, _general(form, options, input.device)


def _layout(
    tensor: Tensor, axes: tuple[Dimension, Dimension], rest: Iterable[Dimension], field: int
) -> tuple[int, int]:
    """Which matrix axis of a tensor has stride 1 (-1: neither), and how many elements surely load together.

    Args:
        tensor: the operand.
        axes: its two matrix dimensions.
        rest: the batch and summed dimensions.
        field: of a Dimension, that holds this operand's stride.
    """
    contiguous = [axis for axis in (0, 1) if axes[axis][field] == 1]
    if not contiguous:
        return -1, 1
    axis = max(contiguous, key=lambda axis: axes[axis].size)
    vector = 16 // tensor.element_size()
    across = axes[1 - axis]
    counts = [axes[axis].size, *(dim[field] for dim in (across, *rest) if dim.size > 1)]
    aligned = tensor.data_ptr() % 16 == 0 and all(count % vector == 0 for count in counts)
    return axis, vector if aligned else 1


def _apart(axes: tuple[Dimension, Dimension], axis: int, field: int) -> bool:
    """Whether rows neither repeat nor overlap, as the chip's copies need; see _layout."""
    return axes[1 - axis][field] >= axes[axis].size


def _fields(dims: tuple[Dimension, ...]) -> tuple[tuple[int, ...], ...]:
    """Sizes, strides in input, strides in other, strides in bias."""
    return tuple(tuple(dim[field] for dim in dims) for field in range(4))


def _small(form: Contraction, options: dict[str, Any], device: torch.device) -> Run:
    m, n, k = form.m, form.n, form.k
    size = form.batches * m.size * n.size
    grid = (triton.cdiv(size, options["BLOCK"]),)
    numbers = (
        m.size,
        n.size,
        k.size,
        m.input,
        k.input,
        k.other,
        n.other,
        m.bias,
        n.bias,
        *_fields(form.batch),
    )
    options = {**options, "WIDE": size > 2**30}

    def run(input: Tensor, other: Tensor, bias: Tensor, output: Tensor, scale: float) -> None:
        launch(
            _matmul_small_kernel,
            grid,
            input,
            other,
            bias,
            output,
            size,
            *numbers,
            scale,
            device=device,
            **options,
        )

    return run


def _descriptor(form: Contraction, options: dict[str, Any], device: torch.device) -> Run:
    m, n, k = form.m, form.n, form.k
    block_m, block_n, block_k = options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"]
    m_tiles, n_tiles, k_steps = (
        triton.cdiv(m.size, block_m),
        triton.cdiv(n.size, block_n),
        triton.cdiv(k.size, block_k),
    )
    grid = (min(m_tiles * n_tiles, config.multiprocessors(device)),)
    numbers = (m.size, n.size, m.bias, n.bias, m_tiles, n_tiles, k_steps)
    # Shape, strides and block of each; the contiguous dimension is the last.
    left = ([m.size, k.size], [m.input, 1], [block_m, block_k])
    if options["INPUT_TRANSPOSED"]:
        left = ([k.size, m.size], [k.input, 1], [block_k, block_m])
    right = ([k.size, n.size], [k.other, 1], [block_k, block_n])
    if options["OTHER_TRANSPOSED"]:
        right = ([n.size, k.size], [n.other, 1], [block_n, block_k])
    result = ([m.size, n.size], [n.size, 1], [block_m, block_n // 2])

    def run(input: Tensor, other: Tensor, bias: Tensor, output: Tensor, scale: float) -> None:
        launch(
            _matmul_descriptor_kernel, grid,
            TensorDescriptor(input, *left), TensorDescriptor(other, *right),
            TensorDescriptor(output, *result), bias, *numbers, scale, device=device, **options,
        )  # fmt: skip

    return run


def _general(form: Contraction, options: dict[str, Any], device: torch.device) -> Run:
    m, n, k, batches = form.m, form.n, form.k, form.batches
    size = batches * m.size * n.size
    m_tiles, n_tiles = triton.cdiv(m.size, options["BLOCK_M"]), triton.cdiv(n.size, options["BLOCK_N"])
    k_steps = triton.cdiv(k.size, options["BLOCK_K"])
    steps = k_steps * math.prod(dim.size for dim in form.sums)
    tiles = m_tiles * n_tiles * batches
    steps_per_split = triton.cdiv(steps, config.splits(tiles, steps, options["MODE"]))
    splits = triton.cdiv(steps, steps_per_split) if steps else 1
    sizes, *batch_strides = _fields(form.batch)
    numbers = (
        m.size, n.size, k.size, m.input, k.input, k.other, n.other, m.bias, n.bias,
        sizes, *batch_strides, *_fields(form.sums)[:3],
        m_tiles, n_tiles, k_steps, batches, steps, steps_per_split,
    )  # fmt: skip

    def whole(input: Tensor, other: Tensor, bias: Tensor, output: Tensor, scale: float) -> None:
        launch(
            _matmul_forward_kernel,
            (tiles,),
            input,
            other,
            bias,
            output,
            *numbers,
            scale,
            device=device,
            **options,
        )

    if splits == 1:
        return whole
    block = 16 if size <= 64 else 256
    reduce_grid = (triton.cdiv(size, block),)
    reduce_numbers = (splits, size, m.size, n.size, m.bias, n.bias, sizes, batch_strides[-1])
    accumulator = torch.float64 if options["DOUBLE"] else torch.float32
    widest = 16 // accumulator.itemsize
    partial_options = {
        **options, "HAS_BIAS": False, "BIAS_ROW": False, "BIAS_VECTOR": 0,
        "OUTPUT_VECTOR": widest if n.size % widest == 0 else 1,
    }  # fmt: skip
    reduce_options = {
        "HAS_BIAS": options["HAS_BIAS"], "VECTOR": widest if size % widest == 0 else 1,
        "BLOCK_S": 1024 // block, "BLOCK": block,
    }  # fmt: skip

    def split(input: Tensor, other: Tensor, bias: Tensor, output: Tensor, scale: float) -> None:
        partial = torch.empty((splits, size), dtype=accumulator, device=device)
        launch(
            _matmul_forward_kernel, (tiles * splits,), input, other, output, partial, *numbers, 1.0,
            device=device, **partial_options,
        )  # fmt: skip
        launch(
            _matmul_reduce_kernel, reduce_grid, partial, bias, output, *reduce_numbers, scale,
            device=device, **reduce_options,
        )  # fmt: skip

    return split
