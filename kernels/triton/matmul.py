"""Batched matrix product with an addend: one tile of the result per program, partial sums where K is long.

Every derivative of a product is a product again, so this launcher also serves gradients of matmul, linear and
bias: outer products, single rows and columns, and long reductions into a small result.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .contraction import Dimension, contract
from .launch import launch


@triton.jit
def _batch_offset(index, sizes, strides):
    """The offset of the ``index``-th element over the dimensions of ``sizes``, the first varying fastest."""
    offset = tl.full((), 0, tl.int64)
    for dim in tl.static_range(len(sizes)):
        offset += (index % sizes[dim]).to(tl.int64) * strides[dim]
        index = index // sizes[dim]
    return offset


@triton.jit(
    do_not_specialize=[
        *("M", "N", "K", "stride_im", "stride_ik", "stride_ok", "stride_on", "stride_am", "stride_an"),
        *("batch_sizes", "batch_strides_input", "batch_strides_other", "batch_strides_addend"),
        *("sum_sizes", "sum_strides_input", "sum_strides_other"),
        *("m_tiles", "n_tiles", "k_steps", "batches", "steps", "steps_per_split"),
    ]
)
def _matmul_forward_kernel(
    input_ptr, other_ptr, addend_ptr, output_ptr,
    M, N, K, stride_im, stride_ik, stride_ok, stride_on, stride_am, stride_an,
    batch_sizes, batch_strides_input, batch_strides_other, batch_strides_addend,
    sum_sizes, sum_strides_input, sum_strides_other,
    m_tiles, n_tiles, k_steps, batches, steps, steps_per_split,
    INPUT_CONTIGUOUS: tl.constexpr, INPUT_VECTOR: tl.constexpr,
    OTHER_CONTIGUOUS: tl.constexpr, OTHER_VECTOR: tl.constexpr,
    HAS_ADDEND: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of one matrix of the result, summed over one split of the steps along K.

    input_ptr: (*batch, *sum, M, K). other_ptr: (*batch, *sum, K, N).
    addend_ptr: (*batch, M, N), strides may be 0. output_ptr: (splits, *batch, M, N), contiguous.
    A step is BLOCK_K of K at one index of the summed dimensions; there are k_steps for each such index.
    INPUT_CONTIGUOUS, OTHER_CONTIGUOUS: which axis (0 or 1) of the matrix has stride 1; -1 for neither.
    INPUT_VECTOR, OTHER_VECTOR: how many elements along that axis are sure to be loaded together.
    Bytes: the operands once per tile row and column (from cache where tiles share them), the result once.
    """
    pid = tl.program_id(0)
    tile = pid % (m_tiles * n_tiles)
    rest = pid // (m_tiles * n_tiles)
    batch = rest % batches
    split = rest // batches
    # Tiles of GROUP_M rows run side by side, so that they share columns of other in the cache.
    group = tile // (GROUP_M * n_tiles)
    rows = tl.minimum(m_tiles - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + tile % (GROUP_M * n_tiles) % rows
    tile_n = tile % (GROUP_M * n_tiles) // rows
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

    input_offset = _batch_offset(batch, batch_sizes, batch_strides_input) // INPUT_VECTOR * INPUT_VECTOR
    other_offset = _batch_offset(batch, batch_sizes, batch_strides_other) // OTHER_VECTOR * OTHER_VECTOR
    input_tile = (
        input_ptr + input_offset + (offs_m[:, None] * stride_im + offs_k[None, :].to(tl.int64) * stride_ik)
    )
    other_tile = (
        other_ptr + other_offset + (offs_k[:, None].to(tl.int64) * stride_ok + offs_n[None, :] * stride_on)
    )
    mask_m = (offs_m < limit_m)[:, None]
    mask_n = (offs_n < limit_n)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    first = split * steps_per_split
    for step in tl.range(first, tl.minimum(first + steps_per_split, steps)):
        k = (step % k_steps).to(tl.int64) * BLOCK_K
        input_step = k * stride_ik
        other_step = k * stride_ok
        if len(sum_sizes) > 0:
            index = step // k_steps
            input_step += _batch_offset(index, sum_sizes, sum_strides_input) // INPUT_VECTOR * INPUT_VECTOR
            other_step += _batch_offset(index, sum_sizes, sum_strides_other) // OTHER_VECTOR * OTHER_VECTOR
        x = tl.load(input_tile + input_step, mask=mask_m & (k + offs_k < limit_ik)[None, :], other=0.0)
        y = tl.load(other_tile + other_step, mask=mask_n & (k + offs_k < limit_ok)[:, None], other=0.0)
        acc = tl.dot(x.to(OPERAND), y.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)

    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if HAS_ADDEND:
        addend_ptr += _batch_offset(batch, batch_sizes, batch_strides_addend)
        offsets = offs_m[:, None] * stride_am + offs_n[None, :] * stride_an
        acc += tl.load(addend_ptr + offsets, mask=mask, other=0.0).to(ACC)
    output_ptr += (split.to(tl.int64) * batches + batch) * M * N
    tl.store(
        output_ptr + (offs_m[:, None] * N + offs_n[None, :]), acc.to(output_ptr.dtype.element_ty), mask=mask
    )


@triton.jit(
    do_not_specialize=[
        *("splits", "size", "M", "N", "stride_am", "stride_an", "batch_sizes", "batch_strides_addend"),
    ]
)
def _matmul_reduce_kernel(
    partial_ptr, addend_ptr, output_ptr,
    splits, size, M, N, stride_am, stride_an, batch_sizes, batch_strides_addend,
    HAS_ADDEND: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of the result: the partial sums of all splits, added in the order of the splits.

    partial_ptr: (splits, *batch, M, N), contiguous. addend_ptr: (*batch, M, N), strides may be 0.
    output_ptr: (*batch, M, N), contiguous, of ``size`` elements.
    Bytes: splits + 1 elements per element of the result.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_s = tl.arange(0, BLOCK_S)
    mask = offs < size
    acc = tl.zeros((BLOCK_S, BLOCK), partial_ptr.dtype.element_ty)
    for s in tl.range(0, splits, BLOCK_S):
        rows = s + offs_s
        tile = partial_ptr + rows[:, None].to(tl.int64) * size + offs[None, :]
        acc += tl.load(tile, mask=(rows < splits)[:, None] & mask[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    if HAS_ADDEND:
        matrix = offs // (M.to(tl.int64) * N)
        offsets = _batch_offset(matrix, batch_sizes, batch_strides_addend)
        offsets += offs // N % M * stride_am + offs % N * stride_an
        total += tl.load(addend_ptr + offsets, mask=mask, other=0.0).to(total.dtype)
    tl.store(output_ptr + offs, total.to(output_ptr.dtype.element_ty), mask=mask)


_TRITON_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def _layout(
    tensor: Tensor, axes: tuple[Dimension, Dimension], rest: Iterable[Dimension], which: int
) -> tuple[int, int]:
    """Which matrix axis of an operand has stride 1 (-1: neither), and how many elements surely load together.

    Args:
        tensor: the operand.
        axes: its two matrix dimensions.
        rest: the batch and summed dimensions.
        which: the field of a Dimension that holds this operand's stride.
    """
    contiguous = [axis for axis in (0, 1) if axes[axis][which] == 1]
    if not contiguous:
        return -1, 1
    axis = max(contiguous, key=lambda axis: axes[axis].size)
    vector = 16 // tensor.element_size()
    counts = [axes[axis].size, axes[1 - axis][which], *(dim[which] for dim in rest)]
    aligned = tensor.data_ptr() % 16 == 0 and all(count % vector == 0 for count in counts)
    return axis, vector if aligned else 1


def matmul_forward(
    input: Tensor, other: Tensor, addend: Tensor | None, sum_dims: list[int], dtype: torch.dtype
) -> Tensor:
    """``(input @ other).sum(sum_dims, keepdim=True) + addend`` as a new contiguous tensor.

    Args:
        input: ``(*A, M, K)``, any strides.
        other: ``(*B, K, N)``, any strides; A and B broadcast to ``batch``.
        addend: None, or a tensor that broadcasts to the result.
        sum_dims: dimensions of ``batch``, counted from 0, that are summed along with K.
        dtype: of the result.
    """
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    kept = [1 if dim in sum_dims else size for dim, size in enumerate(batch)]
    device = input.device
    output = torch.empty((*kept, input.shape[-2], other.shape[-1]), dtype=dtype, device=device)
    if output.numel() == 0:
        return output
    form = contract(input, other, addend, sum_dims)
    if form.swapped:
        input, other = other, input
    m, n, k, batches = form.m, form.n, form.k, form.batches
    rest = (*form.batch, *form.sums)
    input_layout = _layout(input, (m, k), rest, 1)
    other_layout = _layout(other, (k, n), rest, 2)
    batch_sizes, batch_strides_input, batch_strides_other, batch_strides_addend = (
        tuple(dim[field] for dim in form.batch) for field in range(4)
    )
    sum_sizes, sum_strides_input, sum_strides_other = (
        tuple(dim[field] for dim in form.sums) for field in range(3)
    )

    target = config.target_of(device)
    double = torch.float64 in (input.dtype, addend.dtype if addend is not None else None)
    accumulator = torch.float64 if double else torch.float32
    # The interpreter multiplies the bits of bfloat16; float32 holds the same values.
    operand = accumulator if double or target.backend == "interpreter" else input.dtype
    tile = config.matmul(operand, m.size, n.size, k.size, target)
    m_tiles, n_tiles = triton.cdiv(m.size, tile.BLOCK_M), triton.cdiv(n.size, tile.BLOCK_N)
    k_steps = triton.cdiv(k.size, tile.BLOCK_K)
    steps = k_steps
    for size in sum_sizes:
        steps *= size
    steps_per_split = triton.cdiv(steps, config.splits(m_tiles * n_tiles * batches, steps))
    splits = triton.cdiv(steps, steps_per_split) if steps else 1

    split = splits > 1
    has_addend = addend is not None
    result = torch.empty((splits, output.numel()), dtype=accumulator, device=device) if split else output
    launch(
        _matmul_forward_kernel, (m_tiles * n_tiles * batches * splits,),
        input, other, addend if has_addend else output, result,
        m.size, n.size, k.size, m.input, k.input, k.other, n.other, m.addend, n.addend,
        batch_sizes, batch_strides_input, batch_strides_other, batch_strides_addend,
        sum_sizes, sum_strides_input, sum_strides_other,
        m_tiles, n_tiles, k_steps, batches, steps, steps_per_split,
        device=device, INPUT_CONTIGUOUS=input_layout[0], INPUT_VECTOR=input_layout[1],
        OTHER_CONTIGUOUS=other_layout[0], OTHER_VECTOR=other_layout[1],
        HAS_ADDEND=has_addend and not split, ACC=_TRITON_TYPES[accumulator], OPERAND=_TRITON_TYPES[operand],
        PRECISION=config.dot_precision(operand, target, torch.backends.cuda.matmul.fp32_precision),
        GROUP_M=8, **tile._asdict(),
    )  # fmt: skip
    if split:
        block = min(triton.next_power_of_2(output.numel()), 256)
        launch(
            _matmul_reduce_kernel, (triton.cdiv(output.numel(), block),),
            result, addend if has_addend else output, output, splits, output.numel(),
            m.size, n.size, m.addend, n.addend, batch_sizes, batch_strides_addend,
            device=device, HAS_ADDEND=has_addend, BLOCK_S=1024 // block, BLOCK=block,
        )  # fmt: skip
    return output
