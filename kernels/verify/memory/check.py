"""The memory checker: it watches every access of a Triton kernel, without a GPU, under Triton's interpreter."""

import linecache
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, UntypedStorage

from .interpreter import ADDRESS, TAG_SHIFT, Observer, check_canary, current_program, source_site, watch
from .regions import BYTES, MARKS, Region, mark, mark_in, markable, unwritten, watched_tensors
from .report import UNWRITTEN, Fault, MemoryFaultError, MemoryReport, Traffic
from .shadow import LAUNCHES, Access, Cells, Clock


@contextmanager
def memory_check(
    tensors: Mapping[str, Tensor] | Iterable[Tensor] = (),
    *,
    outputs: Mapping[str, Tensor] | Iterable[Tensor] = (),
    configuration: int | None = None,
    raise_exception: bool = True,
) -> Iterator[MemoryReport]:
    """Watch every access of the interpreted Triton kernels launched inside the block.

    The checker finds these faults and names their tensor, program and source line:

    - loads, stores and atomics outside the memory that a tensor argument's view can reach, gaps between its strides
      included. They are kept from happening, so that the process survives them;
    - loads of unwritten memory, and atomics that read it. The checker fills ``outputs``, and what ``torch.empty``,
      ``empty_like``, ``empty_strided``, ``empty_permuted``, ``new_empty`` and ``new_empty_strided`` return inside the
      block, with a mark (a NaN that no arithmetic gives); where the mark still stands, nothing was written. One-byte
      types and 16-bit integers have no value to spare: they are not tracked, but for loads of 4 bytes and more from
      a tensor of bytes;
    - races: two programs of a launch touch one address, one of them writes, not both atomically, and no
      acquire/release atomic orders them; or two lanes of one store write different numbers to it;
    - accesses at an address that is no multiple of their size, through a pointer cast to a wider dtype;
    - elements without a writer, of ``outputs`` and of tensors made inside the block that kernels stored to and never
      loaded from (what is loaded again is scratch, of which the loads are checked).

    The argument that a pointer was computed from tells its tensor. The checker looks up addresses that a kernel loads
    from memory (a table of pointers) among ``tensors``, those whose ``data_ptr()`` was called inside the block, and the
    launch's arguments. It launches an autotuned kernel in each of its configurations; the tensors are put back in
    between, and results and traffic are those of the first configuration. As on a GPU, ``reset_to_zero`` is for the
    first launch with a key.

    Args:
        tensors: the tensors that kernels reach through tables of pointers, by name or in a sequence.
        outputs: tensors made before the block that the kernels have to write in full; overwritten on entry.
        configuration: launch an autotuned kernel in this one of its configurations only, counted in a circle.
        raise_exception: whether to raise at the end of the block if there were faults.

    Returns:
        The ``MemoryReport``, filled while the block runs; ``report.traffic`` has the bytes moved.

    Raises:
        RuntimeError: Triton's kernels are not interpreted in this process, or a check is active already.
        InterpreterChangedError: the checker does not know this version of Triton's interpreter.
        MemoryFaultError: there were faults.

    Example:
        >>> with memory_check():
        ...     kernel[(4,)](x, y, n, BLOCK=256)
    """
    check_canary()
    report = MemoryReport()
    checker = _Checker(report, dict(_named(tensors, "tensors")))
    for name, tensor in _named(outputs, "outputs"):
        if not markable(tensor):
            raise TypeError(
                f"{name}: unwritten elements can be told in non-empty CPU tensors of "
                f"{', '.join(str(d).removeprefix('torch.') for d in MARKS)} only, got {tensor.dtype} on "
                f"{tensor.device}, shape {tuple(tensor.shape)}"
            )
        mark(tensor)
        checker.created(tensor, name)
    with watch(checker, configuration), watched_tensors(checker.created, checker.register):
        yield report
        checker.finish()
    if report.faults and raise_exception:
        raise MemoryFaultError(report)


def _named(tensors: Mapping[str, Tensor] | Iterable[Tensor], kind: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tensors, Mapping):
        yield from tensors.items()
    else:
        yield from ((f"{kind}[{i}]", tensor) for i, tensor in enumerate(tensors))


class _Checker(Observer):
    """The checker observes launches and accesses for ``memory_check``."""

    def __init__(self, report: MemoryReport, registered: dict[str, Tensor]) -> None:
        self.report = report
        self.kept: list[Any] = []
        self.registered: dict[tuple[Any, ...], Region] = {}
        for name, tensor in registered.items():
            self.register(tensor, name)
        self.arguments: list[Region] = []
        self.table: tuple[list[Region], np.ndarray] | None = None  # all regions by address, and their starts
        self.shadows: dict[int, Cells] = {}
        self.clock = Clock()
        self.empties: dict[int, tuple[Tensor, str]] = {}
        self.read: set[int] = set()
        self.stored: dict[int, tuple[str, str]] = {}  # storage -> kernel and argument that stored to it
        self.sites: dict[tuple[str, int], int] = {}
        self.found: dict[tuple[str, str, str, str], int] = {}
        self.known = list(self.report.faults), dict(self.found)  # before the launch that is under way
        # Of the access that is under way: what may find a mark, and lanes that store to one address.
        self.pending: list[tuple[Region, np.ndarray, np.ndarray, int]] = []
        self.doubled: list[tuple[Region, np.ndarray, np.ndarray]] = []
        self.kernel, self.site, self.line = "", 0, ""
        self.index: tuple[int, int, int] | None = None
        self.before: dict[int, tuple[UntypedStorage, UntypedStorage]] | None = None  # of a trial: contents

    def created(self, tensor: Tensor, name: str = "") -> None:
        """Note a tensor that nothing has written yet; its storage is held, so that no other takes its address."""
        self.kept.append(tensor.untyped_storage())
        self.empties[tensor.untyped_storage().data_ptr()] = (tensor.detach(), name)

    def register(self, tensor: Tensor, name: str = "") -> None:
        """Note a tensor whose address may stand in a table of pointers."""
        region = Region.of(name or "a tensor whose data_ptr() was called", tensor.detach())
        key = (region.start, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in self.registered:
            self.registered[key] = region
            self.table = None
            self.kept.append(tensor.untyped_storage())

    def launch(self, kernel: str, arguments: list[tuple[str, Tensor]]) -> None:
        if self.clock.launch + 1 >= LAUNCHES:
            self.shadows.clear()
            self.clock.launch = 0
        self.clock.start_launch()
        self.index = None
        self.kernel = kernel
        self.arguments = [Region.of(name, tensor) for name, tensor in arguments]
        for region in (*self.arguments, *self.registered.values()):
            self._keep(region.tensor)
        self.table = None
        self.kept += [tensor.untyped_storage() for _, tensor in arguments]
        self.report.traffic.append(Traffic(kernel.partition(" ")[0]))
        self.known = list(self.report.faults), dict(self.found)

    def launched(self) -> None:
        self.arguments = []

    def dropped(self) -> None:
        self.report.traffic.pop()
        self.report.faults[:], self.found = self.known

    def autotuned(self, kernel: str, configurations: int) -> None:
        self.report.configurations = max(self.report.configurations, configurations)

    @contextmanager
    def trial(self, kernel: str, configurations: int) -> Iterator[None]:
        """Keep the faults of the launches inside the block, and put everything else back at its end."""
        note = (
            f"{kernel} is autotuned: each of its {configurations} configurations was checked by itself; results "
            f"and traffic are those of the first"
        )
        if note not in self.report.notes:
            self.report.notes.append(note)
        shadows, read, stored = deepcopy(self.shadows), set(self.read), dict(self.stored)
        launches = len(self.report.traffic)
        self.before = {}
        try:
            yield
        finally:
            for storage, content in self.before.values():
                storage.copy_(content)
            self.before = None
            self.shadows, self.read, self.stored = shadows, read, stored
            del self.report.traffic[launches:]

    def _keep(self, tensor: Tensor) -> None:
        """Save what a tensor holds before the first launch of a trial."""
        storage = tensor.untyped_storage()
        if self.before is not None and storage.data_ptr() not in self.before:
            self.before[storage.data_ptr()] = storage, storage.clone()

    def access(
        self, kind: str, order: tuple[str, str], pointers: np.ndarray, mask: np.ndarray, itemsize: int
    ) -> np.ndarray:
        self.pending.clear()
        self.doubled.clear()
        active = np.flatnonzero(mask)
        if not active.size:
            return mask
        self._enter_program()
        self.site = self._site()
        tagged = pointers.reshape(-1)[active]
        tags = (tagged >> TAG_SHIFT).astype(np.int64)
        addresses = tagged & ADDRESS
        allowed = mask
        for region, lanes in self._owners(tags, addresses):
            chosen = addresses if lanes is None else addresses[lanes]
            lane = active if lanes is None else active[lanes]
            legal = None if region is None else region.legal(chosen, itemsize)
            if region is None or legal is not None:
                bad = np.ones(len(chosen), bool) if legal is None else ~legal
                allowed = allowed.copy()
                allowed.reshape(-1)[lane[bad]] = False
                self._out_of_bounds(kind, region, chosen[bad])
                chosen, lane = chosen[~bad], lane[~bad]
            if region is not None and chosen.size:
                self._legal(kind, order, region, chosen, lane, itemsize)
        return allowed

    def _enter_program(self) -> None:
        index, grid = current_program()
        if index != self.index:
            self.index = index
            self.clock.start_program((index[0] * grid[1] + index[1]) * grid[2] + index[2], int(np.prod(grid)))
            self.report.traffic[-1].programs = self.clock.programs

    def _site(self) -> int:
        site = source_site()
        if site not in self.sites:
            self.sites[site] = len(self.sites)
        return self.sites[site]

    def _line(self, site: int) -> str:
        file, line = list(self.sites)[site]
        return f"{Path(file).name}:{line}: {linecache.getline(file, line).strip()}"

    def _owners(
        self, tags: np.ndarray, addresses: np.ndarray
    ) -> Iterator[tuple[Region | None, np.ndarray | None]]:
        """Yield the regions that the addresses belong to, each with its lanes (None for all)."""
        first = int(tags[0])
        if (tags == first).all():
            groups: list[tuple[int, np.ndarray | None]] = [(first, None)]
        else:
            groups = [(int(tag), np.flatnonzero(tags == tag)) for tag in np.unique(tags)]
        for tag, lanes in groups:
            if 0 < tag <= len(self.arguments):
                yield self.arguments[tag - 1], lanes
            else:
                yield from self._looked_up(addresses, lanes)

    def _looked_up(
        self, addresses: np.ndarray, lanes: np.ndarray | None
    ) -> Iterator[tuple[Region | None, np.ndarray | None]]:
        """Yield the regions of addresses that came out of memory.

        An address just past the end of a registered tensor counts as a fault of that tensor.
        """
        if self.table is None:
            known = sorted([*self.registered.values(), *self.arguments], key=lambda r: (r.start, r.end))
            self.table = known, np.array([region.start for region in known], dtype=np.uint64)
        known, starts = self.table
        chosen = addresses if lanes is None else addresses[lanes]
        place = np.searchsorted(starts, chosen, side="right") - 1
        for number in np.unique(place):
            which = np.flatnonzero(place == number)
            low, high = int(chosen[which].min()), int(chosen[which].max())
            region: Region | None = known[int(number)] if number >= 0 else None
            if region is not None and high >= region.end:
                around = [r for r in known[: int(number)] if high < r.end]
                argument = any(region is other for other in self.arguments)
                reach = 0 if argument else max(region.end - region.start, 4096)
                region = around[-1] if around else region if low < region.end + reach else None
            yield region, which if lanes is None else lanes[which]

    def _legal(
        self,
        kind: str,
        order: tuple[str, str],
        region: Region,
        addresses: np.ndarray,
        lanes: np.ndarray,
        itemsize: int,
    ) -> None:
        storage = region.tensor.untyped_storage()
        base = storage.data_ptr()
        if base not in self.shadows:
            self.shadows[base] = Cells(base, storage.nbytes())
            self.kept.append(storage)
        shadow, entry = self.shadows[base], self.report.traffic[-1]
        distinct = addresses
        if addresses.size > 1 and not (addresses[1:] > addresses[:-1]).all():
            distinct = np.unique(addresses)
            if kind == "store" and distinct.size < addresses.size:
                self.doubled.append((region, addresses, lanes))
        if itemsize > 1 and (odd := addresses & np.uint64(itemsize - 1)).any():
            self._misaligned(kind, region, addresses[odd > 0], itemsize)
        moved = int(distinct.size) * itemsize
        reads, stores = kind in ("load", "atomic load"), kind in ("store", "atomic store")
        if reads:
            entry.loaded += moved
            entry.reread += shadow.already_read(distinct, itemsize, self.clock) * itemsize
        elif stores:
            entry.stored += moved
        else:
            entry.atomics += moved
        if not stores:
            self.read.add(base)
            if base in self.empties and (found := mark_in(self.empties[base][0], itemsize)) is not None:
                self.pending.append((region, addresses, lanes, found))
        if not reads:
            self.stored[base] = (self.kernel, region.name)
        if kind.startswith("atomic"):
            self.clock.synchronise(base, distinct, order)
        race = shadow.access(kind, distinct, itemsize, self.site, self.clock)
        if race is not None:
            self._race(kind, region, *race)

    def loaded(self, values: np.ndarray) -> None:
        for region, addresses, lanes, found in self.pending:
            raw = _words(values, lanes) == found
            if raw.any():
                address = int(addresses[int(np.argmax(raw))])
                self._fault(
                    "read of unwritten memory",
                    region.name,
                    f"program {self.index} reads {region}, {_elements(region, address)} elements from its start, "
                    f"where nothing has been written since torch.empty",
                    address,
                    int(raw.sum()),
                )
        self.pending.clear()

    def storing(self, values: np.ndarray) -> None:
        for region, addresses, lanes in self.doubled:
            order = np.argsort(addresses, kind="stable")
            addresses, words = addresses[order], _words(values, lanes)[order]
            differ = (addresses[1:] == addresses[:-1]) & (words[1:] != words[:-1])
            if differ.any():
                address = int(addresses[int(np.argmax(differ))])
                text = (
                    f"two lanes of program {self.index} store different numbers to {region}, "
                    f"{_elements(region, address)} elements from its start, and nothing says which one stays"
                )
                self._fault("race", region.name, text, address, int(differ.sum()))
        self.doubled.clear()

    def _misaligned(self, kind: str, region: Region, addresses: np.ndarray, itemsize: int) -> None:
        first = int(addresses[0])
        text = (
            f"program {self.index} {_verb(kind)} {region} at address {first:#x}, no multiple of the {itemsize} bytes "
            f"that it takes at once: a GPU refuses that"
        )
        self._fault(f"misaligned {kind.split()[0]}", region.name, text, first, addresses.size)

    def _out_of_bounds(self, kind: str, region: Region | None, addresses: np.ndarray) -> None:
        first = int(addresses[0])
        if region is None:
            name, offset = "?", "in no known tensor"
            text = (
                f"program {self.index} {_verb(kind)} {first:#x}, which belongs to no tensor known here; if it came "
                f"from a table of pointers, pass its tensor in memory_check(tensors=...)"
            )
        else:
            name, offset = region.name, region.describe(first)
            text = f"program {self.index} {_verb(kind)} {region}, {offset} (address {first:#x})"
        self._fault(f"out-of-bounds {kind.split()[0]}", name, text, first, addresses.size, offset)

    def _race(self, kind: str, region: Region, cells: int, address: int, other: Access) -> None:
        grid = current_program()[1]
        x, rest = divmod(other.program, grid[1] * grid[2])
        theirs = (x, *divmod(rest, grid[2]))
        did = "wrote" if other.written else "read"
        text = (
            f"program {self.index} {_verb(kind)} {region}, {_elements(region, address)} elements from its start, "
            f"which program {theirs} {did} in the same launch at {self._line(other.site)}, and nothing orders the two"
        )
        self._fault("race", region.name, text, address, cells)

    def _fault(
        self, kind: str, tensor: str, text: str, address: int, cells: int, offset: str = "", line: bool = True
    ) -> None:
        where = self._line(self.site) if line else ""
        key = (kind, self.kernel, tensor, where)
        if key in self.found:
            place = self.found[key]
            old = self.report.faults[place]
            self.report.faults[place] = replace(old, cells=old.cells + cells)
            return
        self.found[key] = len(self.report.faults)
        program = self.index if line else None
        self.report.faults.append(
            Fault(kind, self.kernel, tensor, text, address, offset, program, where, cells)
        )

    def finish(self) -> None:
        """Find, at the end of the block, the elements that nothing has written."""
        for base, (tensor, given) in self.empties.items():
            kernel, argument = self.stored.get(base, ("", ""))
            if tensor.dtype in BYTES or (not given and (not kernel or base in self.read)):
                continue
            left = unwritten(tensor)
            if left.any() and base in self.shadows:
                left &= ~self.shadows[base].stored(tensor)
            if not left.any():
                continue
            first = tuple(int(c) for c in np.argwhere(left)[0])
            self.kernel = kernel or "no kernel"
            self._fault(
                UNWRITTEN,
                argument or given,
                f"of {argument or given} (shape {tuple(tensor.shape)}) nothing has written {int(left.sum())} of "
                f"{left.size} elements, the first at {list(first)}: a mask that cuts too much, or too few programs",
                tensor.data_ptr()
                + tensor.element_size() * sum(i * s for i, s in zip(first, tensor.stride(), strict=True)),
                int(left.sum()),
                line=False,
            )
        if large := [c for c in self.shadows.values() if c.granule == 0 and c.nbytes > LARGE]:
            self.report.notes.append(f"{len(large)} tensors were too large to be watched for races")


LARGE = 1 << 28


def _words(values: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """Return the bits of some of the values as integers."""
    return np.ascontiguousarray(values).reshape(-1)[lanes].view(f"u{values.dtype.itemsize}")


def _elements(region: Region, address: int) -> int:
    return (address - region.start) // region.tensor.element_size()


def _verb(kind: str) -> str:
    return {"load": "loads", "store": "stores to"}.get(kind, "touches atomically")
