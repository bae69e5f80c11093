"""Which launches a step makes, and whether the last step's plan still fits.

A plan sorts the parameters that have a gradient into parts: one device, one dtype per role, one set of state tensors,
one launch each. It serves until something it rests on changes: the parameters, the gradients' dtypes and layouts, the
state tensors, an address. ``measure_gradients`` and ``update_parameters`` launch over the parts; the operators that
torch.compile captures (compiled.py) call them too.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import torch_private as private
from ..backends import capturing, implementation
from .bucket import UNGUARDED, Bucket, Guard, Models

_AS_IT_IS = nullcontext()
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


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
        copied: the entries for which a launch needs copies: their tensors differ in layout, or their parameter has
            holes.
        shards: the process groups over which the parameters are sharded.
    """

    bucket: Bucket
    slots: list[int]
    copied: list[int]
    shards: tuple[Any, ...]
    stacked: bool = False

    def dense(self, write_grads: bool) -> AbstractContextManager[None]:
        """Give the tensors of each entry one layout without holes inside the block."""
        return DenseCopies(self.bucket, self.copied, write_grads, self.stacked) if self.copied else _AS_IT_IS


class Plan:
    """The parts of a step, and what must be found unchanged for them to serve another one.

    Args:
        params: all parameters of the optimizer; ``grads``: theirs, or None.
        kinds: of each group how many parameters it has, and what in its options decides which tensors take part.
        entries: what launches update; ``delegated``: (group, parameter) for torch's own loop.
        state: the optimizer's.
        models: how many models the parameters stack; None for plain parameters.
    """

    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        kinds: list[Any],
        entries: list[Entry],
        delegated: list[tuple[int, Tensor]],
        state: dict[Tensor, Any],
        models: int | None = None,
    ) -> None:
        self.params, self.kinds, self.delegated = params, kinds, delegated
        self.missing = [grad is None for grad in grads]
        self.complete = True not in self.missing
        self.stepped = [entry.param for entry in entries]
        # The modes count too: memory that is made in inference mode is written there alone.
        self.alike = private.alike([*(entry.grad for entry in entries), *self.stepped])
        self.values = _values(state)
        # In the order in which they were made, as a rule: the processor waits less for neighbours in memory.
        self.tensors = [*self.stepped, *(value for entry in entries for value in entry.state.values())]
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        self.parts = partition(entries, models)
        wrapped = any(local_part(param) is not param for param in params)
        self.locals = _local_parts(params, self.values) if wrapped else []
        updated = (p for p, none in zip(params, self.missing, strict=True) if not none)
        self.dtensors = [param for param in updated if local_part(param) is not param]

    def fit(
        self, params: list[Tensor], grads: list[Tensor | None], kinds: list[Any], state: dict[Tensor, Any]
    ) -> list[Tensor] | None:
        """Return the local gradients in the plan's order, or None if the plan no longer fits."""
        if (
            self.delegated
            or kinds != self.kinds
            or not _same(params, self.params)
            or not (self.complete or [grad is None for grad in grads] == self.missing)
            or not _same(values := _values(state), self.values)
            # A DTensor that is moved keeps its identity, but has another tensor inside.
            or (self.locals and not _same(_local_parts(params, values), self.locals))
            or list(map(Tensor.data_ptr, self.tensors)) != self.addresses
        ):
            return None
        live: Any = grads if self.complete else [grad for grad in grads if grad is not None]
        if self.locals:
            owners = [param for param, none in zip(params, self.missing, strict=True) if not none]
            live = [local_gradient(grad, param) for grad, param in zip(live, owners, strict=True)]
        # Addresses do not say what the gradients are, nor that a ``.data`` is another view of its memory.
        return live if self.alike(*live, *self.stepped) else None


def partition(entries: Iterable[Entry], models: int | None = None) -> list[Part]:
    """Return one part per device, dtypes, state keys and shards, in the order of first appearance.

    Parameters of the same memory are updated one after the other, as torch does: in parts of their own. ``models``:
    how many the parameters stack, each with a step; None for plain parameters.
    """
    parts: dict[tuple[Any, ...], Part] = {}
    met: dict[tuple[torch.device, int], int] = defaultdict(int)
    for slot, entry in enumerate(entries):
        param = entry.param
        others = {"grad": entry.grad, **entry.state}
        kinds = tuple((key, value.dtype, value.device) for key, value in others.items())
        again = 0
        if param.numel() > 0:
            memory = (param.device, param.data_ptr())
            again = met[memory]
            met[memory] += 1
        identity = (param.device, param.dtype, kinds, entry.seed, entry.shards, again)
        if identity not in parts:
            if any(device != param.device for _, _, device in kinds):
                _refuse_devices(entry)
            bucket = Bucket([], [], {key: [] for key in entry.state}, [], [], entry.seed)
            parts[identity] = Part(bucket, [], [], entry.shards, models is not None)
        part = parts[identity]
        moving = [value for key, value in entry.state.items() if key != "step"]
        shape = param.shape
        if entry.grad.shape != shape or any(value.shape != shape for value in moving):
            _refuse_shapes(entry)
        if "step" in entry.state and entry.state["step"].shape != (() if models is None else (models,)):
            _refuse_step(entry, models)
        if not same_layout(param, [entry.grad, *moving], models is not None):
            if any(map(overlaps, (param, *moving))):
                raise RuntimeError(  # as torch
                    "unsupported operation: more than one element of the written-to tensor refers to a single "
                    "memory location. Please clone() the tensor before performing the operation."
                )
            part.copied.append(len(part.slots))
        part.slots.append(slot)
        part.bucket.params.append(param)
        part.bucket.groups.append(entry.group)
        part.bucket.indices.append(entry.position)
        for key, value in entry.state.items():
            part.bucket.states[key].append(value)
    return list(parts.values())


def _refuse_devices(entry: Entry) -> NoReturn:
    """Refuse tensors of several devices: kernels are given addresses, which do not say of which device they are."""
    tensors = {"grad": entry.grad, **entry.state}
    shown = ", ".join(f"{key} on {value.device}" for key, value in tensors.items())
    raise RuntimeError(f"parameter {entry.position} is on {entry.param.device}, but {shown}")


def _refuse_shapes(entry: Entry) -> NoReturn:
    """Refuse unequal shapes: kernels walk through memory from end to end, beyond that of the smaller tensor."""
    shapes = {"grad": entry.grad, **entry.state}
    shown = ", ".join(f"{key} {tuple(value.shape)}" for key, value in shapes.items() if key != "step")
    raise RuntimeError(f"parameter {entry.position} has shape {tuple(entry.param.shape)}, but {shown}")


def _refuse_step(entry: Entry, models: int | None) -> NoReturn:
    expected = "no dimension" if models is None else f"shape ({models},), one count for each model"
    found = tuple(entry.state["step"].shape)
    raise RuntimeError(f"the step of parameter {entry.position} has shape {found}; expected {expected}")


def measure_gradients(
    parts: Sequence[Part],
    scale: Tensor | None,
    home: torch.device,
    models: Models | None = None,
    extra: Sequence[tuple[tuple[Any, ...], Tensor]] = (),
    norm_group: Any = None,
) -> Tensor:
    """Return rows of (sum of squares, count of non-finite), to be added: over all parts, devices and ranks.

    Args:
        parts: their buckets hold the gradients.
        scale: what the gradients are to be divided by, or None.
        home: the device of the result.
        models: of stacked parameters, whose rows have numbers (B,); a model that is not active has nan and 0.
        extra: rows of gradients that no part has, each after the process groups over which its gradient is sharded.
        norm_group: the process group whose other ranks have parameters of their own, or None.
    """
    devices = [part.bucket.params[0].device for part in parts]
    tables = {device: norm_table(devices.count(device), device, models) for device in dict.fromkeys(devices)}
    free = {device: iter(table.unbind()) for device, table in tables.items()}
    sharded: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for part, device in zip(parts, devices, strict=True):
        out = next(free[device])
        module = implementation("multi_tensor" if models is None else "stacked", part.bucket.params[0])
        with part.dense(write_grads=False):
            if models is None:
                module.grad_norm(part.bucket, to_device(scale, device), out)
            else:
                module.stacked_grad_norm(part.bucket, to_device(scale, device), models, out)
        sharded[part.shards].append(out)
    if set(tables) == {home} and not extra and not any(sharded) and norm_group is None:
        return tables[home]

    for shards, row in extra:
        sharded[shards].append(row)
    total = torch.zeros_like(norm_table(1, home, models))
    for shards, rows in sharded.items():
        subtotal = torch.stack([row.to(total) for row in rows]).sum(0, keepdim=True)
        for group in shards:
            dist.all_reduce(subtotal, group=group)
        total += subtotal
    if norm_group is not None:
        dist.all_reduce(total, group=norm_group)
    return total


def update_parameters(
    operator: str, parts: Sequence[Part], options: Sequence[Any], guard: Guard, models: Models | None = None
) -> None:
    """Launch once per part; ``guard`` holds for all, on whatever device its tensors are."""
    for part in parts:
        bucket = part.bucket
        local = guard if guard is UNGUARDED else _on(bucket.params[0].device, guard)
        module = implementation(operator if models is None else "stacked", bucket.params[0])
        with part.dense(write_grads=guard.grad_scale is not None):
            if models is None:
                getattr(module, f"{operator}_step")(bucket, options, local)
            else:
                getattr(module, f"stacked_{operator}_step")(bucket, options, local, models)
        torch.autograd.graph.increment_version(bucket.params)
        if guard.skipped is not None:
            guard = guard._replace(skipped=None)  # the first part counts for all


def _on(device: torch.device, guard: Guard) -> Guard:
    return guard._replace(
        grad_scale=to_device(guard.grad_scale, device),
        found_inf=to_device(guard.found_inf, device),
        norms=to_device(guard.norms, device),
    )


def norm_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums of squares on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def norm_table(rows: int, device: torch.device, models: Models | None) -> Tensor:
    shape = (rows, 2) if models is None else (rows, 2, models.B)
    return torch.empty(shape, dtype=norm_dtype(device), device=device)


def to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the tensor on a device; on a CPU its values have arrived, since they are read there at once."""
    if tensor is None or tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu")


def _same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))


def _values(state: dict[Any, Any]) -> list[Any]:
    try:
        return list(chain.from_iterable(map(dict.values, state.values())))
    except TypeError:  # torch lets a user keep values of the whole optimizer there too
        return list(
            chain.from_iterable(entry.values() for entry in state.values() if isinstance(entry, dict))
        )


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this rank holds; any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def _local_parts(params: list[Tensor], values: list[Any]) -> list[Any]:
    return list(map(local_part, chain(params, values)))


def is_wrapper(tensor: Tensor) -> bool:
    """Return whether a subclass keeps values in other tensors (torchao's quantized weights), as torch's ops know."""
    return (
        type(tensor) not in _PLAIN_TYPES
        and is_traceable_wrapper_subclass(tensor)
        and not hasattr(tensor, "_local_tensor")
    )


def local_gradient(grad: Any, param: Any) -> Tensor:
    """Return the local part of a gradient, sharded as its parameter is."""
    if not hasattr(grad, "_local_tensor"):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    local = grad._local_tensor
    return local.wait() if hasattr(local, "wait") else local


def shards_of(param: Any) -> tuple[Any, ...]:
    """Return the process groups over which a DTensor is sharded: summing over them counts each element once."""
    if not hasattr(param, "_local_tensor"):
        return ()
    mesh = param.device_mesh
    return tuple(
        mesh.get_group(dim) for dim, place in enumerate(param.placements) if not place.is_replicate()
    )


class DenseCopies(AbstractContextManager[None]):
    """Inside the block all tensors of an entry have the same strides without holes: copies replace the others.

    Args:
        bucket: whose lists are changed inside the block, and restored after it.
        entries: the entries to look at.
        write_grads: whether the launch writes gradients, so that copies of them go back too.
        stacked: whether the elements of one model must stand together.
    """

    def __init__(self, bucket: Bucket, entries: list[int], write_grads: bool, stacked: bool = False) -> None:
        self._bucket = bucket
        self._entries = entries
        self._write_grads = write_grads
        self._stacked = stacked
        self._copies: list[tuple[list[Tensor], int, Tensor, Tensor]] = []

    def __enter__(self) -> None:
        bucket = self._bucket
        if capturing():  # a replay reads the memory of the host that tables were uploaded from
            bucket.captured.append(dict(bucket.memory))
        bucket.memory.clear()  # the copies are new at each step
        lists = [bucket.grads, bucket.params, *(s for key, s in bucket.states.items() if key != "step")]
        for i in self._entries:
            layout = dense_strides(bucket.params[i], self._stacked)
            for tensors in lists:
                original = tensors[i]
                if not has_layout(original, layout):
                    tensors[i] = torch.empty_strided(
                        original.shape, layout, dtype=original.dtype, device=original.device
                    ).copy_(original)
                    self._copies.append((tensors, i, original, tensors[i]))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for tensors, i, original, copy in self._copies:
            tensors[i] = original
            if kind is None and (tensors is not self._bucket.grads or self._write_grads):
                repeated = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in original.stride())
                original[repeated].copy_(copy[repeated])


def dense_strides(param: Tensor, stacked: bool = False) -> tuple[int, ...]:
    """Return the strides of ``param``; if it has holes or overlaps, those that torch gives a tensor like it.

    With ``stacked`` those of a contiguous one, unless the first dimension is the outermost in memory.
    """
    strides = torch.empty_like(param, device="meta").stride()
    if stacked and len(param) > 1 and strides[0] * len(param) != param.numel():
        return torch.empty(param.shape, device="meta").stride()
    return strides


def has_layout(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Return whether the tensor's memory holds its elements in the order of ``strides``, and not their negatives."""
    if tensor.is_neg():
        return False
    return tensor.numel() == 0 or all(
        mine == wanted
        for mine, wanted, size in zip(tensor.stride(), strides, tensor.shape, strict=True)
        if size > 1
    )


def overlaps(tensor: Tensor) -> bool:
    """Return whether elements share memory, as those of an expanded tensor do."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def same_layout(param: Tensor, others: Iterable[Tensor], stacked: bool = False) -> bool:
    """Return whether a parameter has no holes, the others its strides, and none torch's lazy negative bit."""
    if all(tensor.is_contiguous() and not tensor.is_neg() for tensor in (param, *others)):
        return True
    strides = dense_strides(param, stacked)
    return all(has_layout(tensor, strides) for tensor in (param, *others))
