"""One launch over any number of tensors: addresses in a table, one program per chunk of one tensor.

``launch_step`` launches an optimizer's kernel over a bucket, ``grad_norm`` the kernel that adds the squares of its
gradients; the device functions at the end are shared by the optimizers' kernels.

Three tables are kept on the device. ``chunks`` (C, 2) int32 says which tensor and which of its chunks a program
serves; the norm, whose chunks all have one size, has a table of its own beside a large tensor. ``rows`` (N, 12) int64
describes the tensors, by the column numbers below.
``options`` (groups, 2, COLUMNS) float64 has the options of each parameter group, and below each an address: if it
is not 0, the kernel reads the option there (float32), so that a learning rate in a device tensor stays live.

A table is uploaded only when it has changed, before the launch that reads it, from pinned memory and without a wait.
Over 500 lines, since the host writes the tables' columns and the kernels read them.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from struct import pack
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import capturing
from ..optim.bucket import UNGUARDED, Bucket, Guard, key_of
from . import config, replay
from .launch import guard, launch
from .shared import DTYPES

CHUNK = tl.constexpr(config.CHUNK)
THREADS = tl.constexpr(config.THREADS)

PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
MASTER = tl.constexpr(2)
STEP = tl.constexpr(3)
STATES = tl.constexpr(4)  # and the two columns after it
NUMEL = tl.constexpr(7)
GROUP = tl.constexpr(8)
KEY = tl.constexpr(9)
ALIGNED = tl.constexpr(10)
CHUNKS = tl.constexpr(11)  # of CHUNK elements that a program of the step updates
WIDTH = tl.constexpr(12)

_NUMBERS = frozenset((bool, float, int))

# Triton's interpreter truncates where the hardware rounds float32 to bfloat16.
INTERPRETED = tl.constexpr(not isinstance(tl.sum, triton.runtime.JITFunction))


class StepTables(NamedTuple):
    """The tables as the kernel of a step receives them.

    Attributes:
        chunks, rows, options: see the head of this file.
        arrivals: int32 counters, zeros between launches: one for each tensor, of stacks one for each tile of models.
    """

    chunks: Tensor
    rows: Tensor
    arrivals: Tensor
    options: Tensor


class GuardTensors(NamedTuple):
    """The tensors of optim.bucket.Guard as the kernel of a step receives them; of stacks the last two have B models.

    Attributes:
        grad_scale, found_inf: 0-d float32 or None.
        norms: (NORMS, 2) or (NORMS, 2, B) float64, or None.
        skipped: (1,) or (B,) int64, or None.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None
    norms: Tensor | None
    skipped: Tensor | None

    @classmethod
    def of(cls, guard: Guard) -> "GuardTensors":
        return cls(guard.grad_scale, guard.found_inf, guard.norms, guard.skipped)


class Table:
    """An array on the host and its copy on the device, which ``Tables.upload`` brings up to date.

    Attributes:
        array: set ``stale`` after a change.
        memory, start, stop: the piece of device memory that has the copy, and the copy's bytes in it.
    """

    def __init__(self, array: np.ndarray, tables: "Tables") -> None:
        self.array = array
        self.stale = True
        self.memory: Tensor | None = None
        self.start = self.stop = 0
        self._tables = tables
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """Return the copy, up to date in the order of the current stream."""
        if self.stale:
            self._tables.upload()
        assert self._tensor is not None
        return self._tensor

    @tensor.setter
    def tensor(self, tensor: Tensor) -> None:
        self._tensor, self.stale = tensor, False


class Tables:
    """The tables of one bucket, kept in its memory from step to step."""

    def __init__(self, bucket: Bucket) -> None:
        self.device = bucket.params[0].device
        states = [bucket.states[key] for key in bucket.states if key not in ("step", "master_param")]
        columns = {
            PARAM.value: bucket.params,
            MASTER.value: bucket.states.get("master_param"),
            STEP.value: bucket.states.get("step"),
            **{STATES.value + i: tensors for i, tensors in enumerate(states)},
        }
        rows = np.zeros((len(bucket.params), WIDTH.value), dtype=np.int64)
        for column, tensors in columns.items():
            if tensors is not None:
                rows[:, column] = _addresses(tensors)
        rows[:, NUMEL.value] = [param.numel() for param in bucket.params]
        rows[:, GROUP.value] = bucket.groups
        if bucket.seed is not None:
            rows[:, KEY.value] = [key_of(bucket.seed, index) for index in bucket.indices]
        operands = [column for column in columns if column != STEP.value]
        self._addresses = np.bitwise_or.reduce(rows[:, operands], axis=1)
        self._grads: list[int] = []
        counts, counters = self._divide(bucket, rows)
        self.programs = int(counts.sum())
        self.rows = Table(rows, self)
        self.chunks = self._listed(counts)
        self._norm_chunks: Table | None = None
        self._arrivals = Table(np.zeros(counters, dtype=np.int32), self)
        self._options: Table | None = None
        self._numbers: tuple[int, bytes] | None = None
        self._sources: list[Tensor] = []
        self._pinned: list[Tensor] = []

    @property
    def arrivals(self) -> Tensor:
        """Return the counts of programs that have read a step; the last one of them puts its count back to 0."""
        return self._arrivals.tensor

    @property
    def norm_chunks(self) -> Table:
        """Return the chunks of the norm: each of CHUNK elements, in the order in which they are added."""
        if self._norm_chunks is None:
            rows = self.rows.array
            small = (rows[:, CHUNKS.value] == 1).all()
            self._norm_chunks = (
                self.chunks if small else self._listed(_pieces(rows[:, NUMEL.value], CHUNK.value))
            )
        return self._norm_chunks

    def _listed(self, counts: np.ndarray) -> Table:
        """Return the table of so many chunks of each tensor."""
        owner = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return Table(np.stack([owner, place], axis=1).astype(np.int32), self)

    def _divide(self, bucket: Bucket, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """Return how many programs serve each tensor, and how many counters they need."""
        spans = np.array([config.step_span(param.numel()) for param in bucket.params])
        rows[:, CHUNKS.value] = spans // CHUNK.value
        return _pieces(rows[:, NUMEL.value], spans), len(rows) + 1  # the last counter is for the norm

    def refresh(self, grads: list[Tensor]) -> None:
        """Enter the gradients' addresses, if they have changed."""
        given = list(map(Tensor.data_ptr, grads))
        if given == self._grads:
            return
        addresses = np.array(given, np.int64)
        if not addresses[self.rows.array[:, NUMEL.value] != 0].all():
            raise RuntimeError("a gradient has no memory (a ZeroTensor has none): clone() it")
        self._grads = given
        self.rows.array[:, GRAD.value] = addresses
        self.rows.array[:, ALIGNED.value] = ((self._addresses | addresses) & 15) == 0
        self.rows.stale = True

    def upload(self) -> None:
        """Bring the device's copies up to date, in the order of the current stream: by one copy, as a rule.

        Its source is pinned memory of its own, which torch does not use again before the copy is done; so nothing
        waits. A graph that is being captured reads that memory at each replay: then it is kept.
        """
        # Those that may change again are neighbours.
        norm_chunks = None if self._norm_chunks is self.chunks else self._norm_chunks
        tables = (self._arrivals, self.chunks, norm_chunks, self.rows, self._options)
        stale = [table for table in tables if table is not None and table.stale]
        if self.device.type == "cpu":
            for table in stale:  # both are one
                table.tensor = torch.from_numpy(table.array)
            return
        new = [table for table in stale if table.memory is None]
        size = 0
        for table in new:
            table.start, table.stop = size, size + table.array.nbytes
            size = -(-table.stop // 16) * 16
        if new:
            piece = torch.empty(size, dtype=torch.uint8, device=self.device)
            for table in new:
                table.memory = piece
        for memory in {id(table.memory): table.memory for table in stale}.values():
            assert memory is not None
            parts = [table for table in stale if table.memory is memory]
            start, stop = parts[0].start, parts[-1].stop
            source = torch.empty(stop - start, dtype=torch.uint8, device="cpu", pin_memory=True)
            for table in parts:
                array = torch.from_numpy(table.array)
                part = slice(table.start - start, table.stop - start)
                source[part].view(array.dtype).view(array.shape).copy_(array)
                table.tensor = memory[table.start : table.stop].view(array.dtype).view(array.shape)
            with guard(self.device):
                memory[start:stop].copy_(source, non_blocking=True)
                if capturing():
                    self._pinned.append(source)

    def options(self, groups: Sequence[tuple[Any, ...]], max_norm: float | None) -> Tensor:
        """Return (groups, 2, options + 1): numbers, max_norm last or -1; as float64 bits the addresses to read."""
        limit = -1.0 if max_norm is None else max_norm
        values = [limit, *chain.from_iterable(groups)]
        numbers = None
        if _NUMBERS.issuperset(map(type, values)):  # by their bits: 0.0 and -0.0 are equal
            numbers = len(groups), pack(f"{len(values)}d", *values)
            if numbers == self._numbers:
                assert self._options is not None
                return self._options.tensor
        self._numbers = numbers
        table = np.zeros((len(groups), 2, len(groups[0]) + 1))
        addresses = table.view(np.int64)
        table[:, 0, -1] = limit
        sources = []
        for row, group in enumerate(groups):
            for column, value in enumerate(group):
                if isinstance(value, Tensor) and not value.is_cpu:
                    sources.append(value.detach().to(self.device, torch.float32).resolve_neg())
                    addresses[row, 1, column] = sources[-1].data_ptr()
                else:
                    table[row, 0, column] = float(value)
        return self._upload_options(table, sources)

    def _upload_options(self, table: np.ndarray, sources: list[Tensor]) -> Tensor:
        """Return the device's table of options; ``sources`` are kept, since the table has their addresses."""
        self._sources = sources
        if self._options is None or self._options.array.shape != table.shape:
            self._options = Table(table, self)
        elif self._options.array.tobytes() != table.tobytes():
            self._options.array[...] = table
            self._options.stale = True
        return self._options.tensor


def tables_of(bucket: Bucket) -> Tables:
    """Return the bucket's tables, with the addresses of its present gradients."""
    tables = bucket.memory.get("tables")
    if tables is None:
        tables = bucket.memory["tables"] = Tables(bucket)
    tables.refresh(bucket.grads)
    return tables


def dtype_of(tensors: list[Tensor] | None) -> Any:
    """Return Triton's name for the tensors' dtype, None where there are none: a constexpr of the kernels."""
    return DTYPES[tensors[0].dtype] if tensors else None


def step_constants(bucket: Bucket, guard: Guard) -> dict[str, Any]:
    """Return the constexpr parameters that all optimizers' kernels have."""
    return {
        "DTYPE_P": dtype_of(bucket.params),
        "DTYPE_G": dtype_of(bucket.grads),
        "DTYPE_STEP": dtype_of(bucket.states.get("step")),
        "HAS_MASTER": "master_param" in bucket.states,
        "STOCHASTIC": bucket.seed is not None,
        "NORMS": 0 if guard.norms is None else len(guard.norms),
        "SKIP": guard.skip_nonfinite,
        "ACC": tl.float64 if bucket.params[0].dtype == torch.float64 else tl.float32,
    }


def launch_step(
    kernel: Any, bucket: Bucket, options: Sequence[tuple[Any, ...]], guard: Guard, **dtypes: Any
) -> None:
    """Launch an optimizer's kernel over a bucket: one program for each chunk of each parameter.

    Args:
        kernel: it has the parameters that are filled in here.
        bucket: the tensors.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
        dtypes: further constexpr parameters of the kernel.
    """
    tables = tables_of(bucket)
    option_table = tables.options(options, guard.max_norm)  # first, so that all tables go up together

    def launch_anew(*tensors: Any) -> list[Tensor]:
        device = bucket.params[0].device
        keys = [key for key in bucket.states if key != "step"]
        operands = [bucket.params, bucket.grads, *(bucket.states[key] for key in keys)]
        widest = max(tensors[0].element_size() for tensors in operands)
        launch(
            kernel, (tables.programs,), StepTables(*tensors[:4]), GuardTensors(*tensors[4:]),
            device=device, **step_constants(bucket, guard), **dtypes,
            **config.optimizer(widest, config.target_of(device)),
        )  # fmt: skip
        return []

    guarded = GuardTensors.of(guard)
    key = "step" if guard is UNGUARDED else ("step", guard.skip_nonfinite, *map(_seen, guarded))
    constant = tables.chunks.tensor, tables.rows.tensor, tables.arrivals, option_table
    repeat(bucket, key, launch_anew, *constant, *guarded)


def repeat(bucket: Bucket, key: Any, call: Callable[..., list[Tensor]], *tensors: Tensor | None) -> None:
    """Run ``call(*tensors)``, a launch over a bucket; the third one of a key repeats the second: see replay.py.

    Args:
        bucket: whose dtypes and number of chunks stay as they are.
        key: all else that the launch goes by, except addresses.
        call: returns an empty list.
        tensors: what the kernel is given; those that ``key`` does not speak of are tables, whose layout stays.
    """
    replays = bucket.memory.setdefault("replays", {})
    replayed = replays.get(key)
    if replayed:
        replayed(*tensors)
    else:
        replay.run(replays, lambda *_: key, call, tensors)


def _seen(tensor: Tensor | None) -> Any:
    """Return what a launch goes by of a tensor of the guard."""
    return tensor if tensor is None else (tensor.dtype, tensor.shape, tensor.data_ptr() % 16 == 0)


def _pieces(sizes: np.ndarray, span: Any) -> np.ndarray:
    """Return how many programs of ``span`` elements; one of a tensor without elements, whose step it raises."""
    return np.maximum(-(-sizes // span), 1)


def _addresses(tensors: list[Tensor]) -> np.ndarray:
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def option_columns(options: Any, *names: str) -> list[tl.constexpr]:
    """Return the columns of these options in the table that ``Tables.options`` makes, and how many it has."""
    columns = [*options._fields, "max_norm"]
    return [tl.constexpr(columns.index(name)) for name in names] + [tl.constexpr(len(columns))]


def grad_norm(bucket: Bucket, grad_scale: Tensor | None, out: Tensor) -> None:
    """Write the sum of squares of the unscaled gradients, and how many programs saw a non-finite one.

    Args:
        bucket: its ``grads`` are read.
        grad_scale: 0-d float32, or None for 1.
        out: (2,) float64, overwritten.
    """
    tables = tables_of(bucket)
    partials = bucket.memory.get("partials")
    if partials is None:
        partials = bucket.memory["partials"] = torch.empty(
            config.NORM_PROGRAMS, 2, dtype=out.dtype, device=out.device
        )
    chunks = len(tables.norm_chunks.array)

    def launch_anew(
        norm_chunks: Tensor, rows: Tensor, arrivals: Tensor, *tensors: Tensor | None
    ) -> list[Tensor]:
        launch(
            _grad_norm_kernel, (min(chunks, config.NORM_PROGRAMS),), norm_chunks, rows,
            arrivals[len(bucket.params) :], *tensors, chunks,
            device=out.device, DTYPE_G=dtype_of(bucket.grads),
            ACC=tl.float64 if bucket.grads[0].dtype == torch.float64 else tl.float32, PROGRAMS=config.NORM_PROGRAMS,
            BLOCK=config.BLOCK, num_warps=config.warps(config.target_of(out.device)),
        )  # fmt: skip
        return []

    key = "norm", _seen(grad_scale), _seen(out)
    constant = tables.norm_chunks.tensor, tables.rows.tensor, tables.arrivals
    repeat(bucket, key, launch_anew, *constant, grad_scale, partials, out)


@triton.jit(do_not_specialize=["chunks"])
def _grad_norm_kernel(
    chunks_ptr, rows_ptr, arrivals_ptr, grad_scale_ptr, partials_ptr, out_ptr, chunks,
    DTYPE_G: tl.constexpr, ACC: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program sums the squares of every PROGRAMS-th chunk; the last one to finish adds up all sums in order.

    chunks_ptr: (C, 2) int32; rows_ptr: (N, WIDTH) int64: see the head of this file. chunks: C.
    arrivals_ptr: (1,) int32, 0 between launches. grad_scale_ptr: 0-d float32 or None.
    partials_ptr: (PROGRAMS, 2) float64, overwritten; out_ptr: (2,) float64.

    Bytes: each gradient read once.
    """
    pid = tl.program_id(0)
    inverse = tl.full((), 1.0, ACC)
    if grad_scale_ptr is not None:
        inverse = 1.0 / tl.load(grad_scale_ptr).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    bad = tl.zeros((BLOCK,), tl.int32)
    c = pid
    while c < chunks:
        _, row, place, numel = chunk_of(chunks_ptr, rows_ptr, c)
        start = place * CHUNK
        # Whole and aligned: else each element is loaded by itself, in the order that the sum has always had.
        if (tl.load(row + ALIGNED) != 0) & (start + CHUNK <= numel):
            g_ptr = pointer_at(row, GRAD, DTYPE_G, True)
            for i in range(0, CHUNK, BLOCK):
                g = tl.load(g_ptr + (start + i + tl.arange(0, BLOCK))).to(ACC) * inverse
                total = tl.fma(g, g, total)
                bad = bad | (tl.abs(g) < float("inf")).to(tl.int32) ^ 1
        else:
            g_ptr = pointer_at(row, GRAD, DTYPE_G, False)
            end = tl.minimum(start + CHUNK, numel)
            while start < end:
                offs = start + tl.arange(0, BLOCK)
                g = tl.load(g_ptr + offs, mask=offs < end, other=0.0).to(ACC) * inverse
                total = tl.fma(g, g, total)
                bad = bad | (tl.abs(g) < float("inf")).to(tl.int32) ^ 1
                start += BLOCK
        c += tl.num_programs(0)
    tl.store(partials_ptr + 2 * pid, tl.sum(total.to(tl.float64), 0))
    tl.store(partials_ptr + 2 * pid + 1, tl.max(bad, 0).to(tl.float64))
    tl.debug_barrier()  # this program's sums are written before it counts as arrived
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        tl.store(arrivals_ptr, 0)
        rows = tl.arange(0, PROGRAMS)
        mask = rows < tl.num_programs(0)
        squares = tl.load(partials_ptr + 2 * rows, mask=mask, other=0.0, cache_modifier=".cg")
        nonfinite = tl.load(partials_ptr + 2 * rows + 1, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(out_ptr, tl.sum(squares, 0))
        tl.store(out_ptr + 1, tl.sum(nonfinite, 0))


@triton.jit
def chunk_of(chunks_ptr, rows_ptr, c):
    """Return the c-th chunk's tensor's number and row, its place among the tensor's, and the tensor's elements."""
    t = tl.load(chunks_ptr + 2 * c).to(tl.int64)
    place = tl.load(chunks_ptr + 2 * c + 1).to(tl.int64)
    row = rows_ptr + t * WIDTH
    return t, row, place, tl.load(row + NUMEL)


@triton.jit
def wide_until(row, numel, BLOCK: tl.constexpr):
    """Return how many of a tensor's elements are updated 16 bytes a thread at a time; the others follow one by one.

    None unless each operand is aligned to 16 bytes. A tensor within one block has no others: a second pass over a few
    elements would take as long as the first.
    """
    VECTOR: tl.constexpr = BLOCK // THREADS
    vectors = numel // VECTOR * VECTOR
    wide = (tl.load(row + ALIGNED) != 0) & ((vectors == numel) | (numel > BLOCK))
    return tl.where(wide, vectors, 0)


@triton.jit
def pointer_at(row, column: tl.constexpr, DTYPE: tl.constexpr, ALIGNED16: tl.constexpr):
    """Return the tensor whose address stands in a row."""
    pointer = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if ALIGNED16:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_option(options_ptr, group, column: tl.constexpr, COLUMNS: tl.constexpr):
    """Load one number of a group in float64, from the table or from the address that stands beside it."""
    at = options_ptr + group * 2 * COLUMNS + column
    source = tl.load((at + COLUMNS).to(tl.pointer_type(tl.int64), bitcast=True))
    live = tl.load(source.to(tl.pointer_type(tl.float32)), mask=source != 0, other=0.0)
    return tl.where(source != 0, live.to(tl.float64), tl.load(at))


@triton.jit
def load_guard(guard, max_norm, NORMS: tl.constexpr, SKIP: tl.constexpr):
    """Return (skip, inverse_scale, clip): whether the step is skipped, and in float64 the factors of gradients.

    guard: GuardTensors; program 0 raises ``skipped``.
    """
    skip = tl.full((), 0, tl.int1)
    inverse_scale = tl.full((), 1.0, tl.float64)
    clip = tl.full((), 1.0, tl.float64)
    if guard.grad_scale is not None:
        inverse_scale = 1.0 / tl.load(guard.grad_scale).to(tl.float64)
    if guard.found_inf is not None:
        skip = tl.load(guard.found_inf) != 0
    if guard.norms is not None:
        squares = tl.full((), 0.0, tl.float64)
        nonfinite = tl.full((), 0.0, tl.float64)
        for row in tl.static_range(NORMS):
            squares += tl.load(guard.norms + 2 * row)
            nonfinite += tl.load(guard.norms + 2 * row + 1)
        clip = clip_factor(max_norm, squares)
        if SKIP:
            skip = skip | (nonfinite != 0)
    if guard.skipped is not None:
        counts = (tl.program_id(0) == 0) & skip
        tl.store(guard.skipped, tl.load(guard.skipped, mask=counts) + 1, mask=counts)
    return skip, inverse_scale, clip


@triton.jit
def clip_factor(max_norm, squares):
    """Return min(1, max_norm / (norm + 1e-6)), given the norm's square in float64; 1 if max_norm is negative."""
    clip = max_norm / (tl.sqrt(squares) + 1e-6)
    clip = tl.where(clip > 1.0, 1.0, clip)  # NaN stays NaN, as torch's clamp leaves it
    return tl.where(max_norm < 0, 1.0, clip)


@triton.jit
def begin_chunk(
    tables, guard,
    MAXIMIZE: tl.constexpr, MAX_NORM: tl.constexpr, COLUMNS: tl.constexpr, NORMS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Compute what every update kernel needs first, of the chunk that this program updates.

    Returns (t, row): as ``chunk_of``; the first element, that after the last, and how many the tensor has; the index of
    its parameter group; (skip, inverse_scale): as ``load_guard``; and the two factors of the unscaled gradient, -1
    under maximize and the clipping.
    """
    t, row, place, numel = chunk_of(tables.chunks, tables.rows, tl.program_id(0))
    span = tl.load(row + CHUNKS) * CHUNK
    start = place * span
    group = tl.load(row + GROUP)
    max_norm = load_option(tables.options, group, MAX_NORM, COLUMNS)
    skip, inverse_scale, clip = load_guard(guard, max_norm, NORMS, SKIP)
    sign = tl.where(load_option(tables.options, group, MAXIMIZE, COLUMNS) != 0, -1.0, 1.0)
    return t, row, start, tl.minimum(start + span, numel), numel, group, skip, inverse_scale, sign, clip


@triton.jit
def take_step(row, arrivals_ptr, numel, skip, DTYPE_STEP: tl.constexpr):
    """Return a tensor's step, and raise it by one when all of its programs have read it: the last to arrive does it.

    arrivals_ptr: 0-d int32, 0 before and after.
    """
    step_ptr = tl.load(row + STEP).to(tl.pointer_type(DTYPE_STEP))
    step = tl.load(step_ptr)
    tl.debug_barrier()  # every thread has read the step before this program counts as arrived
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel")
    if arrived == tl.maximum(tl.cdiv(numel, tl.load(row + CHUNKS) * CHUNK), 1) - 1:
        tl.store(arrivals_ptr, 0)
        if not skip:
            tl.store(step_ptr, step + 1)
    return step


@triton.jit
def load_param(p_at, master_at, mask, ACC: tl.constexpr):
    """Load the parameter's elements, from the master copy unless that is None or the parameter was written since."""
    p = tl.load(p_at, mask=mask)
    if master_at is not None:
        master = tl.load(master_at, mask=mask)
        unwritten = round_to(master, 0, p.dtype, False).to(ACC) == p.to(ACC)
        return tl.where(unwritten, master, p.to(ACC))
    return p.to(ACC)


@triton.jit
def load_grad(g_at, mask, factors, UNSCALE: tl.constexpr, ACC: tl.constexpr):
    """Load the gradient times the second factor; if UNSCALE times the first before, and write it back so."""
    g = tl.load(g_at, mask=mask).to(ACC)
    if UNSCALE:
        g = g * factors[0]
        tl.store(g_at, g.to(g_at.dtype.element_ty), mask=mask)
    return g * factors[1]


@triton.jit
def store_param(p_at, master_at, mask, p, draw, STOCHASTIC: tl.constexpr):
    """Write the parameter's elements, and the master copy unless that is None."""
    if master_at is not None:
        tl.store(master_at, p, mask=mask)
    tl.store(p_at, round_to(p, draw, p_at.dtype.element_ty, STOCHASTIC), mask=mask)


@triton.jit
def key_at(row, step):
    """Return what a tensor's random numbers of one step start from."""
    return mix(tl.load(row + KEY).to(tl.uint32) ^ step.to(tl.int64).to(tl.uint32))


@triton.jit
def mix(x):
    """Scatter uint32 by a bijection; the same as in optim/bucket.py."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def draw_words(key, offs):
    """Draw two words of 32 random bits for each element; key: uint32, offs: int64 places in memory."""
    first = mix(mix(offs.to(tl.uint32) ^ key) ^ (offs >> 32).to(tl.uint32))
    return first, mix(first ^ 0x9E3779B9)


@triton.jit
def round_to(value, draw, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Round ``value`` to DTYPE, to nearest even; if STOCHASTIC, to bfloat16 up or down by 16 random bits of draw."""
    if STOCHASTIC or (INTERPRETED and DTYPE == tl.bfloat16):  # noqa: SIM300
        bits = value.to(tl.uint32, bitcast=True)
        if not STOCHASTIC:
            draw = 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(
            tl.abs(value) < float("inf"), bits + draw, bits | ((bits & 0x7FFFFF) != 0).to(tl.uint32) << 22
        )
        return (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)
