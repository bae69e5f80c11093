"""From parameters to launches: sorting into buckets, measuring gradients, updating.

The optimizers use it directly; the operators that torch.compile captures use it on what they are given.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import implementation
from .buckets import UNGUARDED, Bucket, Guard
from .strides import EqualStrides, even, overlaps


class Entry(NamedTuple):
    """One parameter of a step, all tensors local to this rank.

    Attributes:
        group: index of its parameter group; ``position``: its own in the optimizer.
        state: the tensors that take part, by state key.
        seed: of stochastic rounding, or None.
        shards: the process groups over which it is sharded (DTensor).
    """

    group: int
    position: int
    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    seed: int | None
    shards: tuple[Any, ...] = ()


@dataclass
class Part:
    """A bucket, and where its entries come from.

    Attributes:
        slots: for each entry of the bucket its place in the list that was sorted.
        uneven: the entries whose tensors differ in strides, or whose parameter has holes.
        shards: the process groups over which the parameters are sharded.
    """

    bucket: Bucket
    slots: list[int]
    uneven: list[int]
    shards: tuple[Any, ...]


def sort_into_parts(entries: Iterable[Entry]) -> list[Part]:
    """One part per device, dtypes, state keys and shards, in the order of first appearance.

    Parameters of the same memory are updated one after the other, as torch does: in parts of their own.
    """
    parts: dict[tuple[Any, ...], Part] = {}
    met: dict[tuple[torch.device, int], int] = defaultdict(int)
    for slot, entry in enumerate(entries):
        param = entry.param
        dtypes = tuple((key, value.dtype) for key, value in entry.state.items())
        again = 0
        if param.numel() > 0:
            memory = (param.device, param.data_ptr())
            again = met[memory]
            met[memory] += 1
        identity = (param.device, param.dtype, entry.grad.dtype, dtypes, entry.seed, entry.shards, again)
        if identity not in parts:
            bucket = Bucket([], [], {key: [] for key in entry.state}, [], [], entry.seed)
            parts[identity] = Part(bucket, [], [], entry.shards)
        part = parts[identity]
        moving = [value for key, value in entry.state.items() if key != "step"]
        shape = param.shape
        if entry.grad.shape != shape or any(value.shape != shape for value in moving):
            _refuse_shapes(entry)
        if not even(param, [entry.grad, *moving]):
            if any(map(overlaps, (param, *moving))):
                raise RuntimeError(  # as torch
                    "unsupported operation: more than one element of the written-to tensor refers to a single "
                    "memory location. Please clone() the tensor before performing the operation."
                )
            part.uneven.append(len(part.slots))
        part.slots.append(slot)
        part.bucket.params.append(param)
        part.bucket.groups.append(entry.group)
        part.bucket.indices.append(entry.position)
        for key, value in entry.state.items():
            part.bucket.states[key].append(value)
    return list(parts.values())


def _refuse_shapes(entry: Entry) -> NoReturn:
    """Kernels walk through memory from end to end, and would go beyond that of the smaller tensor."""
    shapes = {"grad": entry.grad, **entry.state}
    shown = ", ".join(f"{key} {tuple(value.shape)}" for key, value in shapes.items() if key != "step")
    raise RuntimeError(f"parameter {entry.position} has shape {tuple(entry.param.shape)}, but {shown}")


def measure(
    parts: Sequence[Part], scale: Tensor | None, home: torch.device, extra: list[Tensor], norm_group: Any
) -> Tensor:
    """Rows of (sum of squares, count of non-finite), to be added: over all parts, devices and ranks.

    Args:
        parts: their buckets hold the gradients.
        scale: what the gradients are to be divided by, or None.
        home: the device of the result.
        extra: rows of gradients that no part has.
        norm_group: the process group whose other ranks have parameters of their own, or None.
    """
    devices = [part.bucket.params[0].device for part in parts]
    tables = {device: norm_table(devices.count(device), device) for device in dict.fromkeys(devices)}
    free = {device: iter(table.unbind()) for device, table in tables.items()}
    sharded: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for part, device in zip(parts, devices, strict=True):
        out = next(free[device])
        launcher = implementation("grad_norm", part.bucket.params[0]).grad_norm
        if part.uneven:
            with EqualStrides(part.bucket, part.uneven, write_grads=False):
                launcher(part.bucket, to_device(scale, device), out)
        else:
            launcher(part.bucket, to_device(scale, device), out)
        sharded[part.shards].append(out)
    if set(tables) == {home} and not extra and not any(sharded) and norm_group is None:
        return tables[home]

    total = torch.zeros_like(norm_table(1, home))
    for shards, rows in sharded.items():
        subtotal = torch.stack([row.to(home) for row in rows]).sum(0, keepdim=True)
        for group in shards:
            dist.all_reduce(subtotal, group=group)
        total += subtotal
    for row in extra:
        total += row.to(total)
    if norm_group is not None:
        dist.all_reduce(total, group=norm_group)
    return total


def update(operator: str, parts: Sequence[Part], options: Sequence[Any], guard: Guard) -> None:
    """One launch per part; ``guard`` holds for all, on whatever device its tensors are."""
    for part in parts:
        bucket = part.bucket
        local = guard if guard is UNGUARDED else _on(bucket.params[0].device, guard)
        launcher = getattr(implementation(operator, bucket.params[0]), f"{operator}_step")
        if part.uneven:
            with EqualStrides(bucket, part.uneven, write_grads=guard.grad_scale is not None):
                launcher(bucket, options, local)
        else:
            launcher(bucket, options, local)
        torch.autograd.graph.increment_version(bucket.params)
        if guard.skipped is not None:
            guard = guard._replace(skipped=None)  # the first part counts for all


def _on(device: torch.device, guard: Guard) -> Guard:
    return guard._replace(
        grad_scale=to_device(guard.grad_scale, device),
        found_inf=to_device(guard.found_inf, device),
        norms=to_device(guard.norms, device),
    )


def norm_table(rows: int, device: torch.device) -> Tensor:
    return torch.empty(
        (rows, 2), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
    )


def to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return tensor if tensor is None or tensor.device == device else tensor.to(device, non_blocking=True)
