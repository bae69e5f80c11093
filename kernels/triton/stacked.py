"""SGD and Adam over a batch of models in one launch: every model by options, a step, a clip and a guard of its own.

A stack is a matrix in memory, a row per model. A program updates a tile of MODELS rows: their options, steps and bias
corrections are vectors, computed once per model; their elements are updated by the same rules as plain parameters.
A model of many elements has several programs, each with CHUNK columns, so that one kernel serves 1e7 models of three
numbers as well as one model of 1e6.

The tables are those of multi_tensor.py, save that ``options`` (groups, 3, COLUMNS) has below each address the stride
of the models' values, doubled, plus 1 if they are float64; a number that all models share has the stride 0.

Over 500 lines, since the two steps and the norm share the tile of models, its loads and its guard.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..optim.bucket import AdamOptions, Bucket, Guard, Models, SGDOptions
from . import config
from .adam import adam_scalars, update_adam
from .launch import cdiv, launch
from .multi_tensor import (
    CHUNK,
    GRAD,
    GROUP,
    NUMEL,
    STEP,
    WIDTH,
    GuardTensors,
    StepTables,
    Tables,
    chunk_of,
    clip_factor,
    dtype_of,
    key_at,
    option_columns,
    pointer_at,
    step_constants,
)
from .sgd import update_sgd

ALIGNED = tl.constexpr(10)
COUNTER = tl.constexpr(11)  # the first of the tensor's counters, one per tile of models

SGD_LR, SGD_MOMENTUM, SGD_DAMPENING, SGD_DECAY, SGD_NESTEROV, SGD_MAXIMIZE, _, _ = option_columns(
    SGDOptions, "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "max_norm"
)
ADAM_LR, BETA1, BETA2, EPS, ADAM_DECAY, DECOUPLED, ADAM_MAXIMIZE, _, _ = option_columns(
    AdamOptions, "lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "maximize", "max_norm"
)
# After the options of both stand max_norm and the rates' factors.
SGD_COLUMNS = tl.constexpr(len(SGDOptions._fields) + 2)
ADAM_COLUMNS = tl.constexpr(len(AdamOptions._fields) + 2)


class StackedTables(Tables):
    """The tables of a bucket of stacks."""

    def __init__(self, bucket: Bucket, models: int, block: int) -> None:
        widths = [param.numel() // max(1, models) for param in bucket.params]
        # A tile has as many columns as the longest row asks for: of that tensor at least half of the lanes work.
        self.columns = min(block, triton.next_power_of_2(max(1, *widths)))
        self.tile = min(block // self.columns, config.STACKED_MODELS)
        self.tiles = cdiv(models, self.tile)
        self._models = models
        super().__init__(bucket)
        states = [bucket.states[key] for key in bucket.states if key != "step"]
        operands = [bucket.params, bucket.grads, *states]
        sizes = [tensors[0].element_size() for tensors in operands]
        # Rows are read in vectors if each starts at a multiple of 16 bytes, in every operand.
        self._addresses = self._addresses | np.bitwise_or.reduce([np.array(widths) * size for size in sizes])
        self.vector = 16 // min(sizes)
        self.pieces = sum(max(1, cdiv(width, CHUNK.value)) for width in widths)

    def _divide(self, bucket: Bucket, rows: np.ndarray) -> tuple[np.ndarray, int]:
        rows[:, NUMEL.value] //= max(1, self._models)
        pieces = np.maximum(-(-rows[:, NUMEL.value] // CHUNK.value), 1)
        counters = np.where(pieces > 1, self.tiles, 0)
        rows[:, COUNTER.value] = np.cumsum(counters) - counters
        return pieces * self.tiles, int(counters.sum()) + 1

    def option_values(
        self, groups: Sequence[tuple[Any, ...]], max_norm: float | None, lr_scale: Tensor | None
    ) -> Tensor:
        """Return (groups, 3, options + 2): numbers; addresses to read instead; twice strides, plus 1 for float64."""
        table = np.zeros((len(groups), 3, len(groups[0]) + 2))
        integers = table.view(np.int64)
        sources = []
        for row, group in enumerate(groups):
            values = (*group, -1.0 if max_norm is None else max_norm, 1.0 if lr_scale is None else lr_scale)
            for column, value in enumerate(values):
                if isinstance(value, Tensor) and (value.dim() > 0 or not value.is_cpu):
                    source = value.detach().resolve_neg()
                    if source.dtype not in (torch.float32, torch.float64) or source.device != self.device:
                        source = source.to(self.device, torch.float32)
                    sources.append(source)
                    stride = source.stride(0) if source.dim() else 0
                    integers[row, 1, column] = source.data_ptr()
                    integers[row, 2, column] = 2 * stride + (source.dtype == torch.float64)
                else:
                    table[row, 0, column] = float(value)
        return self._upload_options(table, sources)


def stacked_grad_norm(bucket: Bucket, grad_scale: Tensor | None, models: Models, out: Tensor) -> None:
    """Write each model's sum of squares of the unscaled gradients, and how many programs saw a non-finite one of it.

    Args:
        bucket: its ``grads`` are read.
        grad_scale: 0-d float32, or None for 1.
        models: how many, and which are active; the others get nan and 0.
        out: (2, B), overwritten.
    """
    tables = _tables_of(bucket, models)
    splits = min(config.STACKED_NORM_PROGRAMS, cdiv(tables.pieces, config.STACKED_NORM_CHUNKS))
    partials, arrivals = out, tables.arrivals
    if splits > 1:
        known = bucket.memory.get("norm_partials")
        if known is None:
            partials = torch.empty((splits, *out.shape), dtype=out.dtype, device=out.device)
            arrivals = torch.zeros(tables.tiles, dtype=torch.int32, device=out.device)
            known = bucket.memory["norm_partials"] = partials, arrivals
        partials, arrivals = known
    launch(
        _stacked_norm_kernel, (tables.tiles, splits), tables.rows.tensor, arrivals, *_active(models), grad_scale,
        partials, out, models.B, len(bucket.params),
        device=out.device, DTYPE_G=dtype_of(bucket.grads),
        ACC=tl.float64 if bucket.grads[0].dtype == torch.float64 else tl.float32, SPLITS=splits, MODELS=tables.tile,
        COLUMNS=tables.columns, VECTOR=tables.vector, **bucket.memory["compiled"],
    )  # fmt: skip


def stacked_sgd_step(bucket: Bucket, options: Sequence[SGDOptions], guard: Guard, models: Models) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states, all optional: ``momentum_buffer``, ``step``, ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
        models: how many, which are active, and the factors of their rates.
    """
    momentum = dtype_of(bucket.states.get("momentum_buffer"))
    _launch_step(_stacked_sgd_kernel, bucket, options, guard, models, DTYPE_M=momentum)


def stacked_adam_step(bucket: Bucket, options: Sequence[AdamOptions], guard: Guard, models: Models) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states ``exp_avg``, ``exp_avg_sq``, ``step``, perhaps ``max_exp_avg_sq`` and ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
        models: how many, which are active, and the factors of their rates.
    """
    _launch_step(
        _stacked_adam_kernel,
        bucket,
        options,
        guard,
        models,
        DTYPE_M=dtype_of(bucket.states["exp_avg"]),
        DTYPE_V=dtype_of(bucket.states["exp_avg_sq"]),
        DTYPE_W=dtype_of(bucket.states.get("max_exp_avg_sq")),
    )


def _tables_of(bucket: Bucket, models: Models) -> StackedTables:
    """Return the bucket's tables, with the addresses of its present gradients."""
    tables = bucket.memory.get("tables")
    if tables is None:
        operands = [bucket.params, bucket.grads, *(bucket.states[k] for k in bucket.states if k != "step")]
        widest = max(tensors[0].element_size() for tensors in operands)
        compiled = config.optimizer(widest, config.target_of(bucket.params[0].device))
        tables = bucket.memory["tables"] = StackedTables(bucket, models.B, compiled.pop("BLOCK"))
        bucket.memory["compiled"] = compiled
    tables.refresh(bucket.grads)
    return tables


def _active(models: Models) -> tuple[Tensor | None, int]:
    if models.active is None:
        return None, 0
    return models.active.view(torch.uint8), models.active.stride(0)


def _launch_step(
    kernel: Any,
    bucket: Bucket,
    options: Sequence[tuple[Any, ...]],
    guard: Guard,
    models: Models,
    **dtypes: Any,
) -> None:
    tables = _tables_of(bucket, models)
    launch(
        kernel,
        (tables.programs,),
        StepTables(
            tables.chunks.tensor,
            tables.rows.tensor,
            tables.arrivals,
            tables.option_values(options, guard.max_norm, models.lr_scale),
        ),
        GuardTensors.of(guard),
        *_active(models),
        models.B,
        device=bucket.params[0].device,
        **step_constants(bucket, guard),
        **dtypes,
        MODELS=tables.tile,
        COLUMNS=tables.columns,
        VECTOR=tables.vector,
        **bucket.memory["compiled"],
    )


@triton.jit
def in_vectors(n, VECTOR: tl.constexpr):
    """Return ``n``, a multiple of VECTOR, in a form that shows it: Triton 3.6 loses hints on what is returned."""
    return n // VECTOR * VECTOR


@triton.jit(do_not_specialize=["B", "active_stride"])
def _stacked_adam_kernel(
    tables, guard, active_ptr, active_stride, B,
    DTYPE_P: tl.constexpr, DTYPE_G: tl.constexpr, DTYPE_STEP: tl.constexpr, DTYPE_M: tl.constexpr,
    DTYPE_V: tl.constexpr, DTYPE_W: tl.constexpr, HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
    NORMS: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr, MODELS: tl.constexpr, COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """One program updates MODELS models' part of one tensor: at most CHUNK elements of each.

    tables, guard: StepTables and GuardTensors; active_ptr: (B,) uint8 or None.

    Bytes per element: as for plain parameters; per model the step read and written, and its options read.
    """
    row, models, inside, tile, first, n, pieces, options_ptr, go, inverse_scale, factor, lr, decay = begin_models(
        tables, guard, active_ptr, active_stride, B, ADAM_LR, ADAM_DECAY, ADAM_MAXIMIZE, ADAM_COLUMNS, MODELS, NORMS,
        SKIP,
    )  # fmt: skip
    UNSCALE: tl.constexpr = guard.grad_scale is not None
    beta1 = load_value(options_ptr, BETA1, ADAM_COLUMNS, models, inside)
    beta2 = load_value(options_ptr, BETA2, ADAM_COLUMNS, models, inside)
    eps = tl.broadcast_to(tl.load(options_ptr + EPS), models.shape)
    decoupled = tl.load(options_ptr + DECOUPLED) != 0
    step = take_steps(row, tables.arrivals, tile, pieces, models, inside, go, DTYPE_STEP)

    t_new = step.to(tl.int64) + 1
    correction1 = corrections(1.0 - beta1, t_new)
    correction2 = corrections(1.0 - beta2, t_new)
    scalars = as_columns(adam_scalars(lr, beta1, beta2, eps, decay, decoupled, correction1, correction2, ACC))
    factors = inverse_scale.to(ACC), factor.to(ACC)[:, None]
    key = key_at(row, step)[:, None] if STOCHASTIC else 0
    if tl.load(row + ALIGNED) != 0:
        _update_adam(row, models, go, first, in_vectors(n, VECTOR), scalars, factors, key, UNSCALE, True, DTYPE_P,
                     DTYPE_G, DTYPE_M, DTYPE_V, DTYPE_W, HAS_MASTER, STOCHASTIC, ACC, COLUMNS)  # fmt: skip
    else:
        _update_adam(row, models, go, first, n, scalars, factors, key, UNSCALE, False, DTYPE_P,
                     DTYPE_G, DTYPE_M, DTYPE_V, DTYPE_W, HAS_MASTER, STOCHASTIC, ACC, COLUMNS)  # fmt: skip


@triton.jit
def _update_adam(
    row, models, go, first, n, scalars, factors, key, UNSCALE: tl.constexpr, ALIGNED16: tl.constexpr,
    DTYPE_P: tl.constexpr, DTYPE_G: tl.constexpr, DTYPE_M: tl.constexpr, DTYPE_V: tl.constexpr,
    DTYPE_W: tl.constexpr, HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update the columns from ``first`` on, at most CHUNK of the ``n``, of the models that ``go``."""
    for start in range(first, tl.minimum(first + CHUNK, n), COLUMNS):
        offs, mask = places_of(models, go, start, n, COLUMNS)
        update_adam(row, offs, mask, scalars, factors, key, UNSCALE, ALIGNED16, DTYPE_P, DTYPE_G, DTYPE_M, DTYPE_V,
                    DTYPE_W, HAS_MASTER, STOCHASTIC, ACC)  # fmt: skip


@triton.jit(do_not_specialize=["B", "active_stride"])
def _stacked_sgd_kernel(
    tables, guard, active_ptr, active_stride, B,
    DTYPE_P: tl.constexpr, DTYPE_G: tl.constexpr, DTYPE_STEP: tl.constexpr, DTYPE_M: tl.constexpr,
    HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, NORMS: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr,
    MODELS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program updates MODELS models' part of one tensor, as ``_stacked_adam_kernel`` does, by SGD's rule."""
    row, models, inside, tile, first, n, pieces, options_ptr, go, inverse_scale, factor, lr, decay = begin_models(
        tables, guard, active_ptr, active_stride, B, SGD_LR, SGD_DECAY, SGD_MAXIMIZE, SGD_COLUMNS, MODELS, NORMS, SKIP,
    )  # fmt: skip
    UNSCALE: tl.constexpr = guard.grad_scale is not None
    momentum = load_value(options_ptr, SGD_MOMENTUM, SGD_COLUMNS, models, inside)
    dampening = tl.load(options_ptr + SGD_DAMPENING)
    nesterov = tl.load(options_ptr + SGD_NESTEROV) != 0
    fresh = tl.zeros((MODELS, 1), tl.int1)
    key = 0
    if DTYPE_STEP is not None:
        # A step without momentum leaves the first one with it to come; random numbers go by all steps.
        counted = go if STOCHASTIC else go & (momentum != 0)
        step = take_steps(row, tables.arrivals, tile, pieces, models, inside, counted, DTYPE_STEP)
        fresh = (step == 0)[:, None]
        if STOCHASTIC:
            key = key_at(row, step)[:, None]

    lr, momentum, decay = as_columns((lr.to(ACC), momentum.to(ACC), decay.to(ACC)))
    scalars = lr, momentum, (1.0 - dampening).to(ACC), decay, nesterov
    factors = inverse_scale.to(ACC), factor.to(ACC)[:, None]
    if tl.load(row + ALIGNED) != 0:
        _update_sgd(row, models, go, first, in_vectors(n, VECTOR), scalars, factors, fresh, key, UNSCALE, True,
                    DTYPE_P, DTYPE_G, DTYPE_M, HAS_MASTER, STOCHASTIC, ACC, COLUMNS)  # fmt: skip
    else:
        _update_sgd(row, models, go, first, n, scalars, factors, fresh, key, UNSCALE, False, DTYPE_P,
                    DTYPE_G, DTYPE_M, HAS_MASTER, STOCHASTIC, ACC, COLUMNS)  # fmt: skip


@triton.jit
def _update_sgd(
    row, models, go, first, n, scalars, factors, fresh, key, UNSCALE: tl.constexpr, ALIGNED16: tl.constexpr,
    DTYPE_P: tl.constexpr, DTYPE_G: tl.constexpr, DTYPE_M: tl.constexpr, HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update the columns from ``first`` on, at most CHUNK of the ``n``, of the models that ``go``."""
    for start in range(first, tl.minimum(first + CHUNK, n), COLUMNS):
        offs, mask = places_of(models, go, start, n, COLUMNS)
        kept = mask & (scalars[1] != 0)  # a model without momentum leaves its buffer as it is
        update_sgd(row, offs, mask, kept, scalars, factors, fresh, key, UNSCALE, ALIGNED16, DTYPE_P, DTYPE_G, DTYPE_M,
                   HAS_MASTER, STOCHASTIC, ACC)  # fmt: skip


@triton.jit(do_not_specialize=["B", "active_stride", "tensors"])
def _stacked_norm_kernel(
    rows_ptr, arrivals_ptr, active_ptr, active_stride, grad_scale_ptr, partials_ptr, out_ptr, B, tensors,
    DTYPE_G: tl.constexpr, ACC: tl.constexpr, SPLITS: tl.constexpr, MODELS: tl.constexpr, COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """One program sums the squares of MODELS models: of every SPLITS-th piece of CHUNK columns, over all tensors.

    The last program of a tile of models adds up the SPLITS sums in order.

    rows_ptr: (tensors, WIDTH) int64. arrivals_ptr: (tiles,) int32, zeros between launches.
    active_ptr: (B,) uint8 or None; grad_scale_ptr: 0-d float32 or None.
    partials_ptr: (SPLITS, 2, B) float64, overwritten; out_ptr: (2, B) float64, the same memory if SPLITS is 1.

    Bytes: each gradient read once.
    """
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    models, inside = models_of(tile, B, MODELS)
    go = inside
    if active_ptr is not None:
        go = go & (tl.load(active_ptr + models * active_stride, mask=inside, other=0) != 0)
    inverse = tl.full((), 1.0, ACC)
    if grad_scale_ptr is not None:
        inverse = 1.0 / tl.load(grad_scale_ptr).to(ACC)
    total = tl.zeros((MODELS, COLUMNS), ACC)
    bad = tl.zeros((MODELS, COLUMNS), tl.int32)
    zero = tl.full((), 0, tl.int64)
    before = 0  # pieces of the tensors before this one
    for t in range(tensors):
        row = rows_ptr + t * WIDTH
        n = tl.load(row + NUMEL)
        pieces = tl.maximum(tl.cdiv(n, CHUNK), 1).to(tl.int32)
        aligned = tl.load(row + ALIGNED) != 0
        for piece in range((split + SPLITS - before % SPLITS) % SPLITS, pieces, SPLITS):
            first = (zero + piece) * CHUNK
            if aligned:
                total, bad = _add_squares(row, models, go, first, in_vectors(n, VECTOR), inverse, total, bad,
                                          True, DTYPE_G, ACC, COLUMNS)  # fmt: skip
            else:
                total, bad = _add_squares(row, models, go, first, n, inverse, total, bad,
                                          False, DTYPE_G, ACC, COLUMNS)  # fmt: skip
        before += pieces
    squares = tl.sum(total.to(tl.float64), 1)
    nonfinite = tl.max(bad, 1).to(tl.float64)
    at = partials_ptr + split.to(tl.int64) * 2 * B + models
    if SPLITS == 1:
        squares = tl.where(go, squares, float("nan"))
    tl.store(at, squares, mask=inside)
    tl.store(at + B, nonfinite, mask=inside)
    if SPLITS > 1:
        tl.debug_barrier()  # this program's sums are written before it counts as arrived
        arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            tl.store(arrivals_ptr + tile, 0)
            squares = tl.zeros((MODELS,), tl.float64)
            nonfinite = tl.zeros((MODELS,), tl.float64)
            for i in range(SPLITS):
                at = partials_ptr + i * 2 * B.to(tl.int64) + models
                squares += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
                nonfinite += tl.load(at + B, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + models, tl.where(go, squares, float("nan")), mask=inside)
            tl.store(out_ptr + B + models, nonfinite, mask=inside)


@triton.jit
def _add_squares(
    row, models, go, first, n, inverse, total, bad, ALIGNED16: tl.constexpr, DTYPE_G: tl.constexpr,
    ACC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the squares of the columns from ``first`` on, at most CHUNK of the ``n``, and note what is not finite."""
    g_ptr = pointer_at(row, GRAD, DTYPE_G, ALIGNED16)
    for start in range(first, tl.minimum(first + CHUNK, n), COLUMNS):
        offs, mask = places_of(models, go, start, n, COLUMNS)
        g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(ACC) * inverse
        total = tl.fma(g, g, total)
        bad = bad | (tl.abs(g) < float("inf")).to(tl.int32) ^ 1
    return total, bad


@triton.jit
def begin_models(
    tables, guard, active_ptr, active_stride, B, LR: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr,
    COLUMNS: tl.constexpr, MODELS: tl.constexpr, NORMS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Compute what both updates need first, of the part of a tensor that this program updates.

    Returns (row,): as ``chunk_of``; (models, inside): as ``models_of``; the number of their tile; the first column; the
    elements of a model; how many programs share the tile; where the group's options begin; (go, inverse_scale): as
    ``load_guards``; and for each model, in float64, the factor of the unscaled gradient, the rate and the decay.
    """
    t, row, place, n = chunk_of(tables.chunks, tables.rows, tl.program_id(0).to(tl.int64))
    pieces = tl.maximum(tl.cdiv(n, CHUNK), 1)
    tile = place // pieces
    models, inside = models_of(tile, B, MODELS)
    options_ptr = tables.options + tl.load(row + GROUP) * 3 * COLUMNS
    max_norm = tl.load(options_ptr + (COLUMNS - 2))
    counted = tl.where((t == 0) & (place % pieces == 0), B, 0)
    go, inverse_scale, clip = load_guards(
        guard, max_norm, active_ptr, active_stride, B, models, inside, counted, NORMS, SKIP
    )
    lr = load_value(options_ptr, LR, COLUMNS, models, inside)
    lr = lr * load_value(options_ptr, COLUMNS - 1, COLUMNS, models, inside)
    decay = load_value(options_ptr, DECAY, COLUMNS, models, inside)
    factor = tl.where(tl.load(options_ptr + MAXIMIZE) != 0, -1.0, 1.0) * clip
    first = place % pieces * CHUNK
    return row, models, inside, tile, first, n, pieces, options_ptr, go, inverse_scale, factor, lr, decay


@triton.jit
def models_of(tile, B, MODELS: tl.constexpr):
    """Return the models of a tile (int64), and which of them exist."""
    models = tile * MODELS + tl.arange(0, MODELS)
    return models, models < B


@triton.jit
def places_of(models, go, start, n, COLUMNS: tl.constexpr):
    """Return the elements' places in columns ``start``, ... of a tile of models, and which exist and ``go``."""
    cols = start + tl.arange(0, COLUMNS)
    return models[:, None] * n + cols[None, :], go[:, None] & (cols < n)[None, :]


@triton.jit
def as_columns(values):
    """Return each of these values per model as a column beside the models' elements."""
    columns = ()
    for i in tl.static_range(len(values)):
        columns = columns + (values[i][:, None],)
    return columns


@triton.jit
def load_value(options_ptr, column: tl.constexpr, COLUMNS: tl.constexpr, models, inside):
    """Load an option of the models in float64: the number in the table, or what stands at the address below it."""
    at = options_ptr + column
    none = tl.zeros_like(models)  # a mask is made of blocks
    source = none + tl.load((at + COLUMNS).to(tl.pointer_type(tl.int64), bitcast=True))
    form = none + tl.load((at + 2 * COLUMNS).to(tl.pointer_type(tl.int64), bitcast=True))
    places = models * (form >> 1)
    given = inside & (source != 0)
    wide = (form & 1) != 0
    single = tl.load(source.to(tl.pointer_type(tl.float32)) + places, mask=given & (wide == 0), other=0.0)
    double = tl.load(source.to(tl.pointer_type(tl.float64)) + places, mask=given & wide, other=0.0)
    return tl.where(source != 0, single.to(tl.float64) + double, tl.load(at))


@triton.jit
def load_guards(
    guard, max_norm, active_ptr, active_stride, B, models, inside, counted, NORMS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Return (go, inverse_scale, clip): which models make the step, and in float64 the factors of gradients.

    counted: this program counts the skipped steps of models below this number.
    """
    go = inside
    if active_ptr is not None:
        go = go & (tl.load(active_ptr + models * active_stride, mask=inside, other=0) != 0)
    skip = models < 0
    inverse_scale = tl.full((), 1.0, tl.float64)
    clip = tl.full(models.shape, 1.0, tl.float64)
    if guard.grad_scale is not None:
        inverse_scale = 1.0 / tl.load(guard.grad_scale).to(tl.float64)
    if guard.found_inf is not None:
        skip = go & (tl.load(guard.found_inf + 0 * models) != 0)
    if guard.norms is not None:
        squares = tl.zeros(models.shape, tl.float64)
        nonfinite = tl.zeros(models.shape, tl.float64)
        for part in tl.static_range(NORMS):
            at = guard.norms + 2 * part * B.to(tl.int64) + models
            squares += tl.load(at, mask=go, other=0.0)
            if SKIP:
                nonfinite += tl.load(at + B, mask=go, other=0.0)
        clip = clip_factor(max_norm, squares)
        if SKIP:
            skip = skip | (nonfinite != 0)
    if guard.skipped is not None:
        mine = skip & (models < counted)
        tl.store(guard.skipped + models, tl.load(guard.skipped + models, mask=mine, other=0) + 1, mask=mine)
    return go & (skip == 0), inverse_scale, clip


@triton.jit
def take_steps(row, arrivals_ptr, tile, pieces, models, inside, go, DTYPE_STEP: tl.constexpr):
    """Return the models' steps of a tensor; those that ``go`` rise by one when all programs of the tile have read them.

    arrivals_ptr: the counters; those of the tensor begin at COUNTER, if a tile has several programs.
    """
    steps_ptr = tl.load(row + STEP).to(tl.pointer_type(DTYPE_STEP)) + models
    steps = tl.load(steps_ptr, mask=inside, other=0.0)
    tl.debug_barrier()  # every thread has read its steps before this program writes, or counts as arrived
    last = pieces == 1
    if pieces > 1:
        counter = arrivals_ptr + tl.load(row + COUNTER) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == pieces - 1:
            tl.store(counter, 0)
            last = True
    if last:
        tl.store(steps_ptr, steps + 1, mask=go)
    return steps


@triton.jit
def corrections(one_less, exponents):
    """Return 1 - (1 - one_less)^exponent of each model by squaring, for whole exponents >= 0: nothing cancels."""
    result = tl.zeros(one_less.shape, tl.float64)
    most = tl.max(exponents, 0)
    while most > 0:
        result = tl.where(exponents & 1 != 0, result + one_less * (1.0 - result), result)
        one_less = one_less * (2.0 - one_less)
        exponents = exponents >> 1
        most = most >> 1
    return result
