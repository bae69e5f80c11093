"""How a bucket reaches torch's fused kernels: as it is where they serve it, else in batches that fit a cache.

A batch's gradients are unscaled and clipped in copies, its 16-bit tensors widened and rounded again, while they
lie in the cache: none of this costs a pass through memory of its own.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import acc_dtype
from ..optim.bucket import Bucket
from .grad_norm import Decision
from .pieces import Piece, batch_size, cut, flatten, pieces_of, unflatten
from .rounding import draws, stochastic_bfloat16
from .threads import is_small, one_thread

RANDOM = 1 << 15  # elements: random numbers are made in several steps of int64

# Updates lists of parameters by gradients and states, all of one dtype; divides the gradients by the scale.
Kernel = Callable[[list[Tensor], list[Tensor], dict[str, list[Tensor]], Tensor | None], None]


def by_group(bucket: Bucket) -> list[tuple[int, list[int]]]:
    """The indices of each group's entries, those of small tensors apart from the others."""
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
        one_pass: whether ``kernel`` goes through memory once, and divides by the scale.
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
    for pieces in cut(bucket.params, chosen, _most(bucket, dtype)):
        _run_batch(bucket, pieces, dtype, decision, kernel)


def is_native(bucket: Bucket) -> bool:
    """Whether all is of one dtype and rounded to nearest."""
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
    bucket: Bucket, pieces: list[Piece], dtype: torch.dtype, decision: Decision, kernel: Kernel
) -> None:
    grads = _Copies(bucket.grads, pieces, dtype)
    if decision.scale is not None:
        grads.replace(torch.div, decision.scale)
        grads.write_back()
    if decision.clips and grads.values is grads.narrow:
        grads.values = _clipped(bucket, tuple(pieces), grads.values, decision)
    elif decision.clips:
        grads.replace(torch.mul, decision.clip)
    params = _Copies(bucket.states.get("master_param", bucket.params), pieces, dtype)
    if "master_param" in bucket.states:
        _follow(params.values, pieces_of(bucket.params, pieces))
    states = {
        key: _Copies(tensors, pieces, dtype)
        for key, tensors in bucket.states.items()
        if key not in ("master_param", "step")
    }
    values = {key: copies.values for key, copies in states.items()}
    if "step" in bucket.states:
        values["step"] = [bucket.states["step"][i] for i, _, _ in pieces]
    kernel(params.values, grads.values, values, None)

    if bucket.seed is not None:
        _round_at_random(bucket, bucket.seed, pieces, [params, *states.values()])
        return
    for copies in (params, *states.values()):
        copies.write_back()
    if "master_param" in bucket.states:
        torch._foreach_copy_(pieces_of(bucket.params, pieces), params.values)


def _follow(masters: list[Tensor], params: list[Tensor]) -> None:
    """Take over what was written to the parameters since the masters were rounded into them."""
    given = flatten(params)
    if given.is_cpu and torch.equal(flatten(masters).to(given.dtype), given):
        return
    for master, param in zip(masters, params, strict=True):
        master.copy_(torch.where(master.to(param.dtype) == param, master, param))


def _clipped(bucket: Bucket, which: tuple[Any, ...], grads: list[Tensor], decision: Decision) -> list[Tensor]:
    """Copies of the gradients, clipped: the caller's stay as they are.

    All batches share memory that lasts from step to step: fresh pages would cost more than the arithmetic.
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
        flat.mul_(decision.clip)
    else:
        for grad, copy in zip(grads, copies, strict=True):
            torch.mul(grad, decision.clip, out=copy)
    return copies


def _round_at_random(bucket: Bucket, seed: int, pieces: list[Piece], written: list["_Copies"]) -> None:
    for place, (i, start, end) in enumerate(pieces):
        words = draws(start, end, seed, bucket.indices[i], bucket.states["step"][i] - 1)
        for copies, word in zip(written, words, strict=False):
            value, out = copies.values[place], copies.narrow[place]
            out.copy_(stochastic_bfloat16(value, word.view_as(value)))


class _Copies:
    """The pieces of one list of tensors in one dtype: copies where theirs is another, else the elements themselves."""

    def __init__(self, tensors: list[Tensor], pieces: list[Piece], dtype: torch.dtype) -> None:
        self.narrow = self.values = pieces_of(tensors, pieces)
        if self.narrow[0].dtype != dtype:
            self.replace(Tensor.to, dtype)

    def replace(self, operation: Callable[..., Tensor], *args: Any) -> None:
        """Put ``operation(value, *args)`` in the place of each value, in one call for all."""
        self.values = list(unflatten(operation(flatten(self.values), *args), self.values))

    def write_back(self) -> None:
        """Round the values into the tensors they come from."""
        if self.values is not self.narrow:
            torch._foreach_copy_(self.narrow, self.values)


def _most(bucket: Bucket, dtype: torch.dtype) -> int:
    """Elements in a batch whose copies are of this dtype."""
    most = batch_size(bucket.params[0].device, dtype)
    if bucket.seed is not None:
        return min(most, RANDOM)
    # Only gradients are copied. 8 MB of them take 0.8 to 0.95 of the time that 4 MB do (Xeon, Adam, 10^7 elements).
    return 2 * most if is_native(bucket) else most


def picked(tensors: list[Tensor], chosen: list[int]) -> list[Tensor]:
    return tensors if len(chosen) == len(tensors) else [tensors[i] for i in chosen]
