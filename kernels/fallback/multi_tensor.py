"""What the optimizers' updates share in plain torch: the guard, batches that fit a cache, random rounding, the norm.

A bucket reaches torch's fused kernels as it is where they serve it, else in batches of chunks of its tensors. A batch's
gradients are unscaled and clipped in copies, its 16-bit tensors widened and rounded again, while they are in the cache:
none of this costs a pass through memory of its own.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flatten  # one call for thousands of tensors
from torch._utils import _unflatten_dense_tensors as unflatten

from ..checks import acc_dtype
from ..optim.bucket import MASK, UNGUARDED, Bucket, Guard, key_of, mix
from .threads import is_small, one_thread

# Bytes of a batch. On a device the cache is not the limit, but the launches are.
ON_HOST = 1 << 22
ON_DEVICE = 1 << 26

# Elements of a batch that is rounded at random: the numbers are made in several steps of int64.
RANDOM = 1 << 15

# Elements of a row whose norm torch computes. With 1 << 13 the norm of 1e6 bfloat16 numbers was off by 1.4 times 4 eps
# of float32.
ROW = 1 << 10

Chunk = tuple[int, int, int]  # which tensor of a list, first element, end

# Updates lists of parameters from gradients and states, all of one dtype; divides the gradients by the scale.
Kernel = Callable[[list[Tensor], list[Tensor], dict[str, list[Tensor]], Tensor | None], None]


# ---- the guard ----


class Decision(NamedTuple):
    """What a guard says: Python values on the CPU, 0-d tensors elsewhere, so that nothing waits for the device."""

    skip: bool | Tensor
    scale: Tensor | None
    clip: float | Tensor

    @property
    def clips(self) -> bool:
        return isinstance(self.clip, Tensor) or self.clip != 1.0


GO = Decision(False, None, 1.0)


def decide(guard: Guard) -> Decision:
    """Read the guard, and count the step if it is skipped."""
    if guard is UNGUARDED:
        return GO
    if guard.found_inf is None and guard.norms is None:
        return Decision(False, guard.grad_scale, 1.0)
    found = guard.norms if guard.found_inf is None else guard.found_inf
    assert found is not None
    return _decide_on_host(guard) if found.is_cpu else decide_by_tensors(guard)


def _decide_on_host(guard: Guard) -> Decision:
    skip = guard.found_inf is not None and guard.found_inf.item() != 0
    clip = 1.0
    if guard.norms is not None:
        squares, nonfinite = map(sum, zip(*guard.norms.tolist(), strict=True))
        skip = skip or (guard.skip_nonfinite and nonfinite != 0)
        if guard.max_norm is not None:
            ratio = guard.max_norm / (math.sqrt(squares) + 1e-6)
            clip = 1.0 if ratio > 1.0 else ratio  # NaN stays
    if skip and guard.skipped is not None:
        guard.skipped.add_(1)
    return Decision(skip, guard.grad_scale, clip)


def decide_by_tensors(guard: Guard) -> Decision:
    """Do what ``decide`` does and read no value: for devices, tensors without values, and differentiable steps."""
    skip: bool | Tensor = False
    scale = guard.grad_scale
    clip: float | Tensor = 1.0
    if guard.found_inf is not None:
        skip = guard.found_inf != 0
    if guard.norms is not None:
        squares, nonfinite = guard.norms.sum(0)
        if guard.skip_nonfinite:
            skip = (nonfinite != 0) | skip
        if guard.max_norm is not None:
            clip = (guard.max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    if isinstance(skip, Tensor):
        if guard.skipped is not None:
            guard.skipped.add_(skip)
        if scale is not None:
            scale = scale.where(~skip, 1.0)  # a skipped step leaves the gradients as they are
    return Decision(skip, scale, clip)


def raise_steps(steps: list[Tensor], skip: bool | Tensor) -> None:
    """Count an update of every parameter, unless ``skip``."""
    if not steps:
        return
    if isinstance(skip, Tensor):
        torch._foreach_add_(steps, (~skip).to(steps[0].dtype))
    else:
        # A tensor with alpha: a bare 1 would be wrapped into a tensor once per step on the CPU.
        torch._foreach_add_(steps, torch.ones((), dtype=steps[0].dtype, device=steps[0].device), alpha=1)


# ---- batches ----


def batch_size(device: torch.device, dtype: torch.dtype) -> int:
    """Return the elements of a batch of this dtype."""
    return (ON_HOST if device.type == "cpu" else ON_DEVICE) // dtype.itemsize


def chunks_of(tensors: list[Tensor], chunks: list[Chunk]) -> list[Tensor]:
    """Return the chunks as contiguous views, in memory order; the tensors have no holes."""
    return [
        tensor
        if (tensor := tensors[i]).numel() == end - start and tensor.is_contiguous()
        else tensor.as_strided((end - start,), (1,), tensor.storage_offset() + start)
        for i, start, end in chunks
    ]


def cut(tensors: list[Tensor], chosen: Iterable[int], most: int) -> Iterator[list[Chunk]]:
    """Yield batches of the chosen tensors, at most ``most`` elements each; long tensors are cut into chunks."""
    batch: list[Chunk] = []
    room = most
    for i in chosen:
        numel = tensors[i].numel()
        for start in range(0, numel, most):
            end = min(start + most, numel)
            if end - start > room:
                yield batch
                batch, room = [], most
            batch.append((i, start, end))
            room -= end - start
    if batch:
        yield batch


def by_group(bucket: Bucket) -> list[tuple[int, list[int]]]:
    """Return (group, indices of its entries), the small tensors of a group apart from its large ones."""
    found = bucket.memory.get("by_group")
    if found is None:
        sorted_out: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for i, (group, param) in enumerate(zip(bucket.groups, bucket.params, strict=True)):
            sorted_out[group, is_small(param)].append(i)
        found = bucket.memory["by_group"] = [(group, indices) for (group, _), indices in sorted_out.items()]
    return found


def run(bucket: Bucket, chosen: list[int], decision: Decision, kernel: Kernel, one_pass: bool = True) -> None:
    """Update the chosen entries by ``kernel``; small tensors on one thread.

    Args:
        bucket: its steps are already raised, save for those that are skipped on the device.
        chosen: entries as ``by_group`` gives them, or some of these.
        one_pass: True if ``kernel`` passes through memory once and divides by the scale itself.
    """
    with one_thread(is_small(bucket.params[chosen[0]])):
        _run(bucket, chosen, decision, kernel, one_pass)


def _run(bucket: Bucket, chosen: list[int], decision: Decision, kernel: Kernel, one_pass: bool) -> None:
    native = is_native(bucket)
    if native and one_pass and not decision.clips:
        states = bucket.states
        if len(chosen) < len(bucket.params):
            states = {key: picked(tensors, chosen) for key, tensors in states.items()}
        kernel(picked(bucket.params, chosen), picked(bucket.grads, chosen), states, decision.scale)
        return
    dtype = bucket.params[0].dtype if native else acc_dtype(bucket.params[0])
    divides = one_pass and dtype.itemsize == 2 and bucket.params[0].is_cpu
    for chunks in cut(bucket.params, chosen, _most(bucket, dtype)):
        _run_batch(bucket, chunks, dtype, decision, kernel, divides)


def is_native(bucket: Bucket) -> bool:
    """Return whether all tensors have one dtype and results are rounded to nearest."""
    found = bucket.memory.get("native")
    if found is None:
        dtype = bucket.params[0].dtype
        found = bucket.memory["native"] = (
            bucket.seed is None
            and bucket.grads[0].dtype == dtype
            and all(
                key == "step" or (tensors[0].dtype == dtype and key != "master_param")
                for key, tensors in bucket.states.items()
            )
        )
    return found


def _run_batch(
    bucket: Bucket, chunks: list[Chunk], dtype: torch.dtype, decision: Decision, kernel: Kernel, divides: bool
) -> None:
    """Update the chunks; ``divides``: the kernel clips, in float32, and writes what it has divided."""
    grads, scale = _Copies(bucket.grads, chunks, dtype), None
    if decision.scale is not None:
        grads.replace(torch.div, decision.scale)
        grads.write_back()
    if decision.clips and divides:
        device = bucket.params[0].device
        scale = 1 / torch.as_tensor(decision.clip, dtype=torch.float32, device=device)
    if decision.clips and grads.values is grads.narrow:
        grads.values = _clipped(bucket, tuple(chunks), grads.values, None if divides else decision.clip)
    elif decision.clips and not divides:
        grads.replace(torch.mul, decision.clip)
    params = _Copies(bucket.states.get("master_param", bucket.params), chunks, dtype)
    if "master_param" in bucket.states:
        _follow(params.values, chunks_of(bucket.params, chunks))
    states = {
        key: _Copies(tensors, chunks, dtype)
        for key, tensors in bucket.states.items()
        if key not in ("master_param", "step")
    }
    values = {key: copies.values for key, copies in states.items()}
    if "step" in bucket.states:
        values["step"] = [bucket.states["step"][i] for i, _, _ in chunks]
    kernel(params.values, grads.values, values, scale)

    if bucket.seed is not None:
        _round_at_random(bucket, bucket.seed, chunks, [params, *states.values()])
        return
    for copies in (params, *states.values()):
        copies.write_back()
    if "master_param" in bucket.states:
        torch._foreach_copy_(chunks_of(bucket.params, chunks), params.values)


def _follow(masters: list[Tensor], params: list[Tensor]) -> None:
    """Update the masters where a parameter was written since its master was rounded into it."""
    given = flatten(params)
    if given.is_cpu and torch.equal(flatten(masters).to(given.dtype), given):
        return
    for master, param in zip(masters, params, strict=True):
        master.copy_(torch.where(master.to(param.dtype) == param, master, param))


def _clipped(
    bucket: Bucket, which: tuple[Any, ...], grads: list[Tensor], clip: float | Tensor | None
) -> list[Tensor]:
    """Return copies of the gradients times ``clip``, if it is given; the originals stay unchanged.

    All batches share one scratch tensor, kept from step to step: fresh pages would cost more than the arithmetic.
    """
    known = bucket.memory.setdefault("clipped", {})
    found = known.get(which)
    if found is None:
        sizes = [grad.numel() for grad in grads]
        scratch = bucket.memory.get("scratch")
        if scratch is None or len(scratch) < sum(sizes):
            scratch = torch.empty(sum(sizes), dtype=grads[0].dtype, device=grads[0].device)
            bucket.memory["scratch"] = scratch
        flat = scratch[: sum(sizes)]
        copies = [
            part.as_strided(grad.size(), grad.stride())
            for part, grad in zip(flat.split(sizes), grads, strict=True)
        ]
        found = known[which] = flat, copies
    flat, copies = found
    if is_small(grads[0]):  # one call for all of them
        torch._foreach_copy_(copies, grads)
        if clip is not None:
            flat.mul_(clip)
    else:
        for grad, copy in zip(grads, copies, strict=True):
            copy.copy_(grad) if clip is None else torch.mul(grad, clip, out=copy)
    return copies


def _round_at_random(bucket: Bucket, seed: int, chunks: list[Chunk], written: list["_Copies"]) -> None:
    for place, (i, start, end) in enumerate(chunks):
        words = draws(start, end, seed, bucket.indices[i], bucket.states["step"][i] - 1)
        for copies, word in zip(written, words, strict=False):
            value, out = copies.values[place], copies.narrow[place]
            out.copy_(stochastic_bfloat16(value, word.view_as(value)))


class _Copies:
    """The chunks of one list of tensors in one dtype: copies if theirs differs, else views."""

    def __init__(self, tensors: list[Tensor], chunks: list[Chunk], dtype: torch.dtype) -> None:
        self.narrow = self.values = chunks_of(tensors, chunks)
        if self.narrow[0].dtype != dtype:
            self.replace(Tensor.to, dtype)

    def replace(self, operation: Callable[..., Tensor], *args: Any) -> None:
        """Replace each value by ``operation(value, *args)``, in one call for all."""
        self.values = list(unflatten(operation(flatten(self.values), *args), self.values))

    def write_back(self) -> None:
        """Round the values into the tensors that they were copied from."""
        if self.values is not self.narrow:
            torch._foreach_copy_(self.narrow, self.values)


def _most(bucket: Bucket, dtype: torch.dtype) -> int:
    """Return the elements of a batch whose copies have this dtype."""
    most = batch_size(bucket.params[0].device, dtype)
    if bucket.seed is not None:
        return min(most, RANDOM)
    # Only gradients are copied. 8 MB of them take 0.8 to 0.95 of the time that 4 MB do (Xeon, Adam, 10^7 elements).
    return 2 * most if is_native(bucket) else most


def picked(tensors: list[Tensor], chosen: list[int]) -> list[Tensor]:
    return tensors if len(chosen) == len(tensors) else [tensors[i] for i in chosen]


# ---- stochastic rounding, with the random numbers of the Triton kernels, bit for bit ----


def draws(start: int, end: int, seed: int, index: int, step: Tensor) -> list[Tensor]:
    """Return four 16-bit draws for each element of a tensor between two places in memory.

    Args:
        start, end: the elements' places in memory, counted from the tensor's first.
        seed, index: the optimizer's seed and the parameter's position in it.
        step: 0-d, the updates made before this one.
    """
    return draw_words(torch.arange(start, end, device=step.device), tensor_key(seed, index, step))


def tensor_key(seed: int, index: int, step: Tensor) -> Tensor:
    """Return what a tensor's random numbers of one step start from."""
    return mix(step.long() ^ key_of(seed, index))


def draw_words(place: Tensor, key: Tensor) -> list[Tensor]:
    """Return four 16-bit draws for each element: a hash of its place in memory and the key."""
    first = mix(mix((place & MASK) ^ key) ^ (place >> 32))
    second = mix(first ^ 0x9E3779B9)
    return [first & 0xFFFF, first >> 16, second & 0xFFFF, second >> 16]


def stochastic_bfloat16(value: Tensor, draw: Tensor) -> Tensor:
    """Round float32 up or down to bfloat16 with the odds of its distance to either; inf and NaN stay."""
    bits = (value.view(torch.int32) + draw.int()) & -0x10000
    return torch.where(value.isfinite(), bits.view(torch.float32), value).bfloat16()


# ---- the gradients' norm ----


def grad_norm(bucket: Bucket, grad_scale: Tensor | None, out: Tensor) -> None:
    """Write the sum of squares of the unscaled gradients and the number of tensors with non-finite ones.

    Args:
        bucket: its ``grads`` are read.
        grad_scale: 0-d float32, or None for 1.
        out: (2,), overwritten.
    """
    wide = acc_dtype(bucket.grads[0])
    most = batch_size(out.device, wide)
    norms: list[Tensor] = []

    def add(chunks: list[Chunk]) -> None:
        norms.extend(_norms(flatten(chunks_of(bucket.grads, chunks)).to(wide), out.dtype))

    small = [i for i, grad in enumerate(bucket.grads) if is_small(grad)]
    with one_thread():
        for chunks in cut(bucket.grads, small, most):  # joining them copies them
            add(chunks)
    for i, grad in enumerate(bucket.grads):
        if not is_small(grad):
            for chunks in cut(bucket.grads, [i], max(1, grad.numel()) if grad.dtype == wide else most):
                add(chunks)
    norm = norms[0] if len(norms) == 1 else torch.cat(norms) if norms else out.new_zeros(1)
    if grad_scale is not None:
        norm = norm / grad_scale
    square = torch.dot(norm, norm)
    out[0] = square
    if out.is_cpu and math.isfinite(square.item()):
        out[1] = 0
    else:  # a norm may overflow though every gradient is finite
        out[1] = sum(~grad.isfinite().all() for grad in bucket.grads)


def _norms(flat: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Return the norms of rows of ROW elements, and of the rest: of longer rows torch keeps too few running sums."""
    rows, rest = divmod(flat.numel(), ROW)
    if rows:
        yield torch.linalg.vector_norm(flat[: rows * ROW].view(rows, ROW), dim=1).to(dtype)
    if rest:
        yield torch.linalg.vector_norm(flat[rows * ROW :], dim=0, keepdim=True, dtype=dtype)
