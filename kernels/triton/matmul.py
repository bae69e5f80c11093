"""Batched matrix product with a bias: one tile of the result per program, partial sums where K is long.

Every derivative of a product is a product again, so this launcher also serves the gradients of matmul, linear
and bias: outer products, single rows and columns, and long sums into a small result. The plans are those of
``config.MATMUL_PLANS``. Four kernels, over 500 lines, since they share the normal form of their arguments:

- ``_matmul_forward_kernel``: ``gemm``, and by multiply and add ``gemv`` and ``outer``;
- ``_matmul_tma_kernel``: ``gemm_tma``, large, aligned, single matrices (``config.has_tma``);
- ``_matmul_elementwise_kernel``: ``elementwise``, short sums into narrow results, many tiny matrices per program;
- ``_matmul_reduce_kernel``: adds the partial sums of a split, in order.

The kernels share these arguments. A product is in its normal form (dims.py):

    input_ptr   (*batch, *sums, M, K)     m, n, k      Dimension: size and strides in input, other and bias
    other_ptr   (*batch, *sums, K, N)     batch, sums  tuples of Dimension
    bias_ptr    (*batch, M, N), strides may be 0, or None
    output_ptr  (*batch, M, N), contiguous
    work        Work: how tiles and steps are counted
    scale       a factor of the sums, before the bias is added
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import config
from .dims import Contraction, Dimension, contract
from .launch import launch
from .shared import DTYPES, ordered_sum, store_product, tile_of

# The fields of a Dimension that hold the tensors' strides.
INPUT, OTHER, BIAS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


class Work(NamedTuple):
    """How a product is divided among programs.

    Attributes:
        m_tiles, n_tiles: tiles of a matrix of the result.
        k_steps: steps of BLOCK_K along K; ``steps`` are those of all indices of the summed dimensions.
        batches: matrices in the result.
        steps_per_split: steps of one program.
    """

    m_tiles: int
    n_tiles: int
    k_steps: int
    batches: int
    steps: int
    steps_per_split: int


@triton.jit
def _offset(index, dims, FIELD: tl.constexpr):
    """Return the offset of the ``index``-th element over ``dims``, of which the first varies fastest."""
    offset = tl.zeros_like(index).to(tl.int64)
    for dim in tl.static_range(len(dims)):
        offset += (index % dims[dim].size).to(tl.int64) * dims[dim][FIELD]
        index = index // dims[dim].size
    return offset


@triton.jit
def _load_bias(bias_ptr, offs_m, offs_n, m, n, BIAS_ROW: tl.constexpr, BIAS_VECTOR: tl.constexpr):
    """Load a tile of the bias: (1, BLOCK_N) if BIAS_ROW, the same for every row of the result.

    BIAS_VECTOR: 0 if its columns are not contiguous, else how many of them can be loaded together.
    """
    stride_m = m.bias
    N = n.size
    if BIAS_VECTOR == 0:
        bias_ptr += offs_n[None, :] * n.bias
    else:
        bias_ptr += offs_n[None, :]
        stride_m = stride_m // BIAS_VECTOR * BIAS_VECTOR
        N = N // BIAS_VECTOR * BIAS_VECTOR
    if BIAS_ROW:
        bias = tl.load(bias_ptr, mask=(offs_n < N)[None, :], other=0.0)
    else:
        mask = (offs_m < m.size)[:, None] & (offs_n < N)[None, :]
        bias = tl.load(bias_ptr + offs_m[:, None] * stride_m, mask=mask, other=0.0)
    return bias


@triton.jit(do_not_specialize=["m", "n", "k", "batch", "sums", "work"])
def _matmul_forward_kernel(
    input_ptr, other_ptr, bias_ptr, output_ptr, m, n, k, batch, sums, work, scale,
    INPUT_AXIS: tl.constexpr, INPUT_VECTOR: tl.constexpr, OTHER_AXIS: tl.constexpr, OTHER_VECTOR: tl.constexpr,
    OUTPUT_VECTOR: tl.constexpr, BIAS_ROW: tl.constexpr, BIAS_VECTOR: tl.constexpr,
    PLAN: tl.constexpr, PRECISION: tl.constexpr, DOUBLE: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes a (BLOCK_M, BLOCK_N) tile of one result's matrix, summed over one split of the K steps.

    output_ptr: (splits, *batch, M, N).
    INPUT_AXIS, OTHER_AXIS: which axis (0 or 1) of the matrix has stride 1; -1 for neither.
    INPUT_VECTOR, OTHER_VECTOR, OUTPUT_VECTOR: how many elements along that axis (of the output: along N) can be
    loaded or stored together.
    PLAN: "gemm"; "outer", with BLOCK_K = 1; "gemv", with N = BLOCK_N = 1.
    DOUBLE: accumulate in float64, not float32. OPERAND: the type that "gemm" multiplies; the others multiply in
    the accumulator's.
    Bytes: the operands once per tile row and column (from cache where tiles share them), the result once.
    """
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    pid = tl.program_id(0)
    tiles = work.m_tiles * work.n_tiles
    rest = pid // tiles
    matrix = rest % work.batches
    split = rest // work.batches
    tile_m, tile_n = tile_of(pid % tiles, work.m_tiles, work.n_tiles, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)

    # What the launcher knows of contiguity and alignment, written so that the compiler sees it too.
    limit_m = m.size
    limit_n = n.size
    limit_ik = k.size
    limit_ok = k.size
    stride_im = m.input
    stride_ik = k.input
    stride_ok = k.other
    stride_on = n.other
    if INPUT_AXIS == 0:
        stride_im = 1
        stride_ik = stride_ik // INPUT_VECTOR * INPUT_VECTOR
        limit_m = limit_m // INPUT_VECTOR * INPUT_VECTOR
    if INPUT_AXIS == 1:
        stride_ik = 1
        stride_im = stride_im // INPUT_VECTOR * INPUT_VECTOR
        limit_ik = limit_ik // INPUT_VECTOR * INPUT_VECTOR
    if OTHER_AXIS == 0:
        stride_ok = 1
        stride_on = stride_on // OTHER_VECTOR * OTHER_VECTOR
        limit_ok = limit_ok // OTHER_VECTOR * OTHER_VECTOR
    if OTHER_AXIS == 1:
        stride_on = 1
        stride_ok = stride_ok // OTHER_VECTOR * OTHER_VECTOR
        limit_n = limit_n // OTHER_VECTOR * OTHER_VECTOR

    input_ptr += _offset(matrix, batch, INPUT) // INPUT_VECTOR * INPUT_VECTOR
    other_ptr += _offset(matrix, batch, OTHER) // OTHER_VECTOR * OTHER_VECTOR
    input_tile = input_ptr + offs_m[:, None] * stride_im + offs_k[None, :].to(tl.int64) * stride_ik
    mask_m = (offs_m < limit_m)[:, None]
    if PLAN == "gemv":
        other_tile = other_ptr + offs_k[None, :].to(tl.int64) * stride_ok
        acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    else:
        other_tile = other_ptr + offs_k[:, None].to(tl.int64) * stride_ok + offs_n[None, :] * stride_on
        mask_n = (offs_n < limit_n)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)

    step_size = tl.full((), BLOCK_K, tl.int64)
    first = split * work.steps_per_split
    for step in tl.range(first, tl.minimum(first + work.steps_per_split, work.steps)):
        if len(sums) > 0:
            index = step // work.k_steps
            input_step = _offset(index, sums, INPUT) // INPUT_VECTOR * INPUT_VECTOR
            other_step = _offset(index, sums, OTHER) // OTHER_VECTOR * OTHER_VECTOR
            first_k = step % work.k_steps * step_size
            input_step += first_k * stride_ik
            other_step += first_k * stride_ok
        else:
            first_k = step * step_size
            input_step = first_k * stride_ik
            other_step = first_k * stride_ok
        x = tl.load(input_tile + input_step, mask=mask_m & (first_k + offs_k < limit_ik)[None, :], other=0.0)
        if PLAN == "gemv":
            y = tl.load(other_tile + other_step, mask=(first_k + offs_k < limit_ok)[None, :], other=0.0)
            acc = tl.fma(x.to(ACC), tl.broadcast_to(y.to(ACC), (BLOCK_M, BLOCK_K)), acc)
        else:
            y = tl.load(
                other_tile + other_step, mask=mask_n & (first_k + offs_k < limit_ok)[:, None], other=0.0
            )
            if PLAN == "outer":
                left = tl.broadcast_to(x.to(ACC), (BLOCK_M, BLOCK_N))
                acc = tl.fma(left, tl.broadcast_to(y.to(ACC), (BLOCK_M, BLOCK_N)), acc)
            else:
                acc = tl.dot(x.to(OPERAND), y.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
    if PLAN == "gemv":
        acc = tl.sum(acc, axis=1)[:, None]

    acc *= scale
    if bias_ptr is not None:
        bias_ptr += _offset(matrix, batch, BIAS)
        acc += _load_bias(bias_ptr, offs_m, offs_n, m, n, BIAS_ROW, BIAS_VECTOR).to(ACC)
    width = n.size // OUTPUT_VECTOR * OUTPUT_VECTOR
    output_ptr += (split.to(tl.int64) * work.batches + matrix) * m.size * width
    if PLAN == "gemm":
        store_product(output_ptr, offs_m, offs_n, m.size, width, acc)
    else:
        at = output_ptr + offs_m[:, None] * width + offs_n[None, :]
        mask = (offs_m < m.size)[:, None] & (offs_n < width)[None, :]
        tl.store(at, acc.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m", "n", "work"])
def _matmul_tma_kernel(
    input_desc, other_desc, output_desc, bias_ptr, m, n, work, scale,
    INPUT_TRANSPOSED: tl.constexpr, OTHER_TRANSPOSED: tl.constexpr,
    BIAS_ROW: tl.constexpr, BIAS_VECTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program pid computes the (BLOCK_M, BLOCK_N) tiles pid, pid + programs, ... of one large matrix product.

    input_desc: (M, K), or (K, M) if INPUT_TRANSPOSED. other_desc: (K, N), or (N, K) if OTHER_TRANSPOSED.
    output_desc: (M, N). All three contiguous in their last dimension, rows 16-byte aligned.
    The bits of a tile do not depend on which program computes it.
    Bytes: as _matmul_forward_kernel.
    """
    for tile in tl.range(tl.program_id(0), work.m_tiles * work.n_tiles, tl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, work.m_tiles, work.n_tiles, GROUP_M)
        first_m = tile_m * BLOCK_M
        first_n = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(work.k_steps):
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
        if bias_ptr is not None:
            offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
            offs_n = first_n.to(tl.int64) + tl.arange(0, BLOCK_N // 2)
            left += _load_bias(bias_ptr, offs_m, offs_n, m, n, BIAS_ROW, BIAS_VECTOR).to(tl.float32)
            offs_n += BLOCK_N // 2
            right += _load_bias(bias_ptr, offs_m, offs_n, m, n, BIAS_ROW, BIAS_VECTOR).to(tl.float32)
        output_desc.store([first_m, first_n], left.to(output_desc.dtype))
        output_desc.store([first_m, first_n + BLOCK_N // 2], right.to(output_desc.dtype))


@triton.jit(do_not_specialize=["size", "m", "n", "k", "batch"])
def _matmul_elementwise_kernel(
    input_ptr, other_ptr, bias_ptr, output_ptr, m, n, k, batch, size, scale,
    DOUBLE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK of the result's ``size`` elements, over rows and matrices alike; K <= BLOCK_K.

    WIDE: it takes 64 bits to count the elements.
    Bytes: operands and result once; what several elements of the result share comes from the cache.
    """
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    matrix = offs // n.size // m.size
    col = (offs % n.size).to(tl.int64)
    row = (offs // n.size % m.size).to(tl.int64)
    input_row = input_ptr + _offset(matrix, batch, INPUT) + row * m.input
    other_column = other_ptr + _offset(matrix, batch, OTHER) + col * n.other
    acc = tl.zeros((BLOCK,), ACC)
    for i in tl.static_range(BLOCK_K):
        inside = offs < tl.where(i < k.size, size, 0)
        x = tl.load(input_row + tl.cast(k.input, tl.int64) * i, mask=inside, other=0.0)
        y = tl.load(other_column + tl.cast(k.other, tl.int64) * i, mask=inside, other=0.0)
        acc = tl.fma(x.to(ACC), y.to(ACC), acc)
    acc *= scale
    if bias_ptr is not None:
        bias_ptr += _offset(matrix, batch, BIAS)
        acc += tl.load(bias_ptr + row * m.bias + col * n.bias, mask=mask, other=0.0).to(ACC)
    tl.store(output_ptr + offs, acc.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits", "size", "m", "n", "batch"])
def _matmul_reduce_kernel(
    partial_ptr, bias_ptr, output_ptr, splits, size, m, n, batch, scale,
    VECTOR: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds the partial sums of BLOCK of the result's ``size`` elements, always in the same order.

    partial_ptr: (splits, *batch, M, N), contiguous. VECTOR divides size.
    Bytes: splits + 1 elements per element of the result.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = size // VECTOR * VECTOR
    mask = offs < size
    total = ordered_sum(partial_ptr, splits, size, offs, mask, BLOCK_S, partial_ptr.dtype.element_ty) * scale
    if bias_ptr is not None:
        offsets = _offset(offs // n.size // m.size, batch, BIAS)
        offsets += offs // n.size % m.size * m.bias + offs % n.size * n.bias
        total += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(total.dtype)
    tl.store(output_ptr + offs, total.to(output_ptr.dtype.element_ty), mask=mask)


# Launches on (input, other, bias, output, scale), in the order of the normal form.
Run = Callable[[Tensor, Tensor, Tensor | None, Tensor, float], None]


class Prepared(NamedTuple):
    """What is known of a product before its tensors are.

    Attributes:
        shape: of the result.
        swapped: whether the operands change places.
        plan, run: None for a result without elements.
    """

    shape: tuple[int, ...]
    swapped: bool = False
    plan: config.Plan | None = None
    run: Run | None = None


_plans: dict[tuple[Any, ...], Prepared] = {}
_MAX_PLANS = 4096  # the shapes of a training loop are few


def matmul_forward(
    input: Tensor, other: Tensor, bias: Tensor | None, sum_dims: list[int], dtype: torch.dtype
) -> Tensor:
    """Return ``(input @ other).sum(sum_dims, keepdim=True) + bias`` as a new contiguous tensor.

    Args:
        input: ``(*A, M, K)``, any strides.
        other: ``(*B, K, N)``, any strides; A and B broadcast to ``batch``. Of two float dtypes matrix
            instructions multiply the narrower.
        bias: None, or a tensor that broadcasts to the result.
        sum_dims: dimensions of ``batch``, counted from 0, that are summed along with K.
        dtype: of the result.
    """
    prepared = prepare(input, other, bias, sum_dims, dtype)
    output = torch.empty(prepared.shape, dtype=dtype, device=input.device)
    if prepared.run is not None:
        left, right = (other, input) if prepared.swapped else (input, other)
        prepared.run(left, right, bias, output, 1.0)
    return output


def write_scaled_product(input: Tensor, other: Tensor, output: Tensor, scale: float) -> None:
    """Write ``output = scale * input @ other`` for matrices; ``output`` is contiguous."""
    _, swapped, _, run = prepare(input, other, None, [], output.dtype)
    left, right = (other, input) if swapped else (input, other)
    if run is None:  # no elements
        return
    if output.dtype == torch.float64:  # Triton passes a Python float as float32
        run(left, right, None, output, 1.0)
        output.mul_(scale)
    else:
        run(left, right, None, output, scale)


def prepare(
    input: Tensor, other: Tensor, bias: Tensor | None, sum_dims: list[int], dtype: torch.dtype
) -> Prepared:
    """Return the plan of matmul_forward's product, from a cache of plans."""
    precision = torch.backends.cuda.matmul.fp32_precision if input.dtype == torch.float32 else "none"
    seen = [_seen(input), _seen(other), bias is not None and _seen(bias)]
    key = (*seen, *sum_dims, dtype, precision, input.device)
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        found = _plans[key] = _prepare(input, other, bias, sum_dims, dtype, precision)
    return found


def _seen(tensor: Tensor) -> tuple[Any, ...]:
    """Return what a plan depends on of a tensor."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0


def _prepare(
    input: Tensor,
    other: Tensor,
    bias: Tensor | None,
    sum_dims: list[int],
    dtype: torch.dtype,
    precision: str,
) -> Prepared:
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    kept = [1 if dim in sum_dims else size for dim, size in enumerate(batch)]
    shape = (*kept, input.shape[-2], other.shape[-1])
    if 0 in shape:
        return Prepared(shape)
    form = contract(input, other, bias, sum_dims)
    if form.swapped:
        input, other = other, input
    m, n, k = form.m, form.n, form.k
    device = input.device
    target = config.target_of(device)
    double = torch.float64 in (input.dtype, other.dtype, None if bias is None else bias.dtype)
    # The interpreter multiplies the bits of bfloat16; float32 holds the same values.
    interpreted = target.backend == "interpreter"
    wide, narrow = sorted((input.dtype, other.dtype), key=lambda dtype: -dtype.itemsize)
    operand = torch.float64 if double else torch.float32 if interpreted else narrow

    rest = (*form.batch, *form.sums)
    input_axis, input_vector = _layout(input, (m, k), rest, INPUT.value)
    other_axis, other_vector = _layout(other, (k, n), rest, OTHER.value)
    bias_axis, bias_vector = (-1, 1) if bias is None else _layout(bias, (m, n), form.batch, BIAS.value)
    widest = 16 // dtype.itemsize
    output_vector = widest if n.size % widest == 0 else 1
    aligned = input_vector > 1 and other_vector > 1
    descriptors = aligned and output_vector > 1 and wide == narrow
    descriptors = descriptors and _apart((m, k), input_axis, INPUT.value)
    descriptors = descriptors and _apart((k, n), other_axis, OTHER.value)
    operands = config.Operands(aligned, descriptors, input_axis == 0)
    sizes = (m.size, n.size, k.size)
    sums = math.prod(dim.size for dim in form.sums)
    staged = max(wide, operand, key=lambda dtype: dtype.itemsize)  # what has to fit in shared memory
    plan = config.matmul_plan(staged, sizes, form.batches, sums, operands, target)
    tile = config.tuned(config.name_of(device)).get(config.matmul_key(staged, sizes, plan.name), plan.tile)

    options: dict[str, Any] = {
        "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        **({} if plan.registers is None else config.registers(plan.registers, target)),
    }  # fmt: skip
    if plan.name == "elementwise":
        options |= {"DOUBLE": double, "BLOCK": tile.BLOCK_M, "BLOCK_K": tile.BLOCK_K}
        return Prepared(shape, form.swapped, plan, _elementwise(form, options, device))
    options |= {
        "BIAS_ROW": bias is not None and m.bias == 0,
        "BIAS_VECTOR": bias_vector if bias_axis == 1 else 0,
        "PRECISION": config.dot_precision(operand, target, precision), "GROUP_M": config.GROUP_M,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K,
    }  # fmt: skip
    if plan.name == "gemm_tma":
        options |= {"INPUT_TRANSPOSED": input_axis == 0, "OTHER_TRANSPOSED": other_axis == 0}
        return Prepared(shape, form.swapped, plan, _gemm_tma(form, options, device))
    options |= {
        "INPUT_AXIS": input_axis, "INPUT_VECTOR": input_vector,
        "OTHER_AXIS": other_axis, "OTHER_VECTOR": other_vector, "OUTPUT_VECTOR": output_vector,
        "PLAN": plan.name, "DOUBLE": double, "OPERAND": DTYPES[operand],
    }  # fmt: skip
    return Prepared(shape, form.swapped, plan, _gemm(form, options, device))


def _layout(
    tensor: Tensor, axes: tuple[Dimension, Dimension], rest: Iterable[Dimension], field: int
) -> tuple[int, int]:
    """Return which matrix axis of a tensor has stride 1 (-1: neither), and how many elements can be loaded together.

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
    """Return whether rows neither repeat nor overlap, as tensor descriptors require; arguments as of _layout."""
    return axes[1 - axis][field] >= axes[axis].size


def _work(form: Contraction, options: dict[str, Any], plan: str | None) -> tuple[Work, int]:
    """Return the division of a product among programs, and into how many splits; one split without a plan."""
    m_tiles = triton.cdiv(form.m.size, options["BLOCK_M"])
    n_tiles = triton.cdiv(form.n.size, options["BLOCK_N"])
    k_steps = triton.cdiv(form.k.size, options["BLOCK_K"])
    steps = k_steps * math.prod(dim.size for dim in form.sums)
    splits = 1 if plan is None else config.splits(m_tiles * n_tiles * form.batches, steps, plan)
    per_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, per_split) if steps else 1
    return Work(m_tiles, n_tiles, k_steps, form.batches, steps, per_split), splits


def _runner(
    kernel: Any, programs: int, numbers: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> Run:
    """Return a function that launches a kernel with these numbers between its tensors and its scale."""
    grid = (programs,)

    def run(input: Tensor, other: Tensor, bias: Tensor | None, output: Tensor, scale: float) -> None:
        launch(kernel, grid, input, other, bias, output, *numbers, scale, device=device, **options)

    return run


def _elementwise(form: Contraction, options: dict[str, Any], device: torch.device) -> Run:
    size = form.batches * form.m.size * form.n.size
    numbers = (form.m, form.n, form.k, form.batch, size)
    options = {**options, "WIDE": size > 2**30}
    return _runner(_matmul_elementwise_kernel, triton.cdiv(size, options["BLOCK"]), numbers, options, device)


def _gemm_tma(form: Contraction, options: dict[str, Any], device: torch.device) -> Run:
    m, n, k = form.m, form.n, form.k
    block_m, block_n, block_k = options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"]
    work, _ = _work(form, options, None)
    grid = (min(work.m_tiles * work.n_tiles, config.num_sms(device)),)
    # Shape, strides and block of each; the contiguous dimension is the last.
    left = ([m.size, k.size], [m.input, 1], [block_m, block_k])
    if options["INPUT_TRANSPOSED"]:
        left = ([k.size, m.size], [k.input, 1], [block_k, block_m])
    right = ([k.size, n.size], [k.other, 1], [block_k, block_n])
    if options["OTHER_TRANSPOSED"]:
        right = ([n.size, k.size], [n.other, 1], [block_n, block_k])
    result = ([m.size, n.size], [n.size, 1], [block_m, block_n // 2])

    def run(input: Tensor, other: Tensor, bias: Tensor | None, output: Tensor, scale: float) -> None:
        launch(
            _matmul_tma_kernel, grid,
            TensorDescriptor(input, *left), TensorDescriptor(other, *right), TensorDescriptor(output, *result),
            bias, m, n, work, scale, device=device, **options,
        )  # fmt: skip

    return run


def _gemm(form: Contraction, options: dict[str, Any], device: torch.device) -> Run:
    m, n = form.m, form.n
    size = form.batches * m.size * n.size
    work, splits = _work(form, options, options["PLAN"])
    programs = work.m_tiles * work.n_tiles * form.batches * splits
    numbers = (m, n, form.k, form.batch, form.sums, work)
    if splits == 1:
        return _runner(_matmul_forward_kernel, programs, numbers, options, device)
    acc = torch.float64 if options["DOUBLE"] else torch.float32
    widest = 16 // acc.itemsize
    options = {
        **options, "BIAS_ROW": False, "BIAS_VECTOR": 0, "OUTPUT_VECTOR": widest if n.size % widest == 0 else 1
    }  # fmt: skip
    first_stage = _runner(_matmul_forward_kernel, programs, numbers, options, device)
    block_s, block = config.matmul_reduce(size)
    grid, vector = (triton.cdiv(size, block),), widest if size % widest == 0 else 1

    def split(input: Tensor, other: Tensor, bias: Tensor | None, output: Tensor, scale: float) -> None:
        partial = torch.empty((splits, size), dtype=acc, device=device)
        first_stage(input, other, None, partial, 1.0)
        launch(
            _matmul_reduce_kernel, grid, partial, bias, output, splits, size, m, n, form.batch, scale,
            device=device, VECTOR=vector, BLOCK_S=block_s, BLOCK=block,
        )  # fmt: skip

    return split
