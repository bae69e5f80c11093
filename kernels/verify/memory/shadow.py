"""The shadow of memory: it records the last accesses of every cell and finds races between programs of a launch.

The interpreter runs programs one after another, a GPU in any order at once. So two programs of a launch race
when both touch a cell, at least one writes, they are not both atomic, and nothing orders them: a release by
the first (an atomic after its access) that the second acquires (an atomic on the same address before its own).
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

# One 64-bit word per cell and kind of access: launch | epoch | site | atomic | program + 1.
_PROGRAM, _SITE, _EPOCH = 24, 12, 10
_ATOMIC_AT = _PROGRAM
_SITE_AT = _ATOMIC_AT + 1
_EPOCH_AT = _SITE_AT + _SITE
_LAUNCH_AT = _EPOCH_AT + _EPOCH
LAUNCHES = 1 << (64 - _LAUNCH_AT - 1)
MAX_CELLS = 1 << 28


@dataclass(frozen=True)
class Access:
    """An access that a cell records."""

    program: int
    site: int
    written: bool


@dataclass
class Clock:
    """A vector clock: what the running program knows of the others, by the releases it has acquired.

    Attributes:
        launch: the number of the launch.
        program, programs: the running program, and the number of programs.
        epoch: the number of releases that the program has made.
        seen: per program, the number of its releases known here; None before the first acquire.
        released: per tensor and address, the clock that the last releases left there.
    """

    launch: int = 0
    program: int = -1
    programs: int = 1
    epoch: int = 0
    seen: np.ndarray | None = None
    released: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)

    def start_launch(self) -> None:
        self.launch += 1
        self.program = -1
        self.released.clear()

    def start_program(self, program: int, programs: int) -> None:
        self.program, self.programs, self.epoch, self.seen = program, programs, 0, None

    def synchronise(self, base: int, addresses: np.ndarray, order: tuple[str, str]) -> None:
        """Acquire what was released at the addresses of an atomic of the running program, then release."""
        semantics, scope = order
        if scope == "CTA" or semantics not in ("ACQUIRE", "RELEASE", "ACQUIRE_RELEASE"):
            return
        here = self.released.setdefault(base, {})
        # Many addresses at once count as one: a coarser order, so a race may be missed but none invented.
        keys = [int(address) for address in addresses] if addresses.size <= 16 else [0]
        if semantics != "RELEASE":
            for key in [*keys, 0] if keys != [0] else list(here):
                if key in here:
                    self.seen = here[key].copy() if self.seen is None else np.maximum(self.seen, here[key])
        if semantics != "ACQUIRE":
            known = np.zeros(self.programs, np.int64) if self.seen is None else self.seen.copy()
            known[self.program] = self.epoch + 1
            for key in keys:
                here[key] = np.maximum(here[key], known) if key in here else known
            self.epoch = min(self.epoch + 1, (1 << _EPOCH) - 1)

    def word(self, site: int, atomic: bool) -> np.int64:
        return np.int64(
            (self.launch << _LAUNCH_AT)
            | (self.epoch << _EPOCH_AT)
            | (min(site, (1 << _SITE) - 1) << _SITE_AT)
            | (int(atomic) << _ATOMIC_AT)
            | (self.program + 1)
        )

    def unordered(self, words: np.ndarray, atomic: bool) -> np.ndarray:
        """Return which recorded accesses race with one by the running program, if one of the two writes."""
        program = (words & ((1 << _PROGRAM) - 1)) - 1
        found = (words >> _LAUNCH_AT == self.launch) & (program != self.program)
        if not found.any():
            return found
        if atomic:
            found &= (words >> _ATOMIC_AT) & 1 == 0
        if self.seen is not None:
            epoch = (words >> _EPOCH_AT) & ((1 << _EPOCH) - 1)
            found &= self.seen[np.where(found, program, 0)] <= epoch
        return found


class Cells:
    """The shadow of one storage: per cell, the last write and the first unordered read of this launch."""

    def __init__(self, base: int, nbytes: int) -> None:
        self.base, self.nbytes = base, nbytes
        self.granule = 0
        self.writes = self.reads = np.empty(0, np.int64)

    def _cells(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """Return the cells of the addresses; allocate or refine the shadow as needed."""
        if not self.granule:
            self.granule = itemsize
            self.writes, self.reads = (np.zeros(-(-self.nbytes // itemsize), np.int64) for _ in range(2))
        if itemsize < self.granule:
            ratio = self.granule // itemsize
            self.granule = itemsize
            self.writes, self.reads = self.writes.repeat(ratio), self.reads.repeat(ratio)
        cells = (addresses - np.uint64(self.base)).astype(np.int64) // self.granule
        if itemsize > self.granule:
            cells = (cells[:, None] + np.arange(itemsize // self.granule)).reshape(-1)
        return cells

    def access(
        self, kind: str, addresses: np.ndarray, itemsize: int, site: int, clock: Clock
    ) -> tuple[int, int, Access] | None:
        """Record an access. Return its first race: how many cells race, an address, and the other access."""
        if self.nbytes // itemsize > MAX_CELLS:
            return None
        cells = self._cells(addresses, itemsize)
        atomic = kind == "atomic" or kind.startswith("atomic ")
        word = clock.word(site, atomic)
        race = None
        writes, reads = self.writes[cells], self.reads[cells]
        racing = clock.unordered(writes, atomic)
        if racing.any():
            race = self._race(cells, writes, racing, True)
        if kind not in ("load", "atomic load"):
            racing = clock.unordered(reads, atomic)
            if race is None and racing.any():
                race = self._race(cells, reads, racing, False)
            self.writes[cells] = word
        else:
            keep = clock.unordered(reads, False) & (atomic | ((reads >> _ATOMIC_AT) & 1 == 0))
            self.reads[cells] = np.where(keep, reads, word)
        return race

    def _race(
        self, cells: np.ndarray, words: np.ndarray, racing: np.ndarray, written: bool
    ) -> tuple[int, int, Access]:
        first = int(np.argmax(racing))
        address = self.base + int(cells[first]) * self.granule
        word = int(words[first])
        other = Access((word & ((1 << _PROGRAM) - 1)) - 1, (word >> _SITE_AT) & ((1 << _SITE) - 1), written)
        return int(racing.sum()), address, other

    def already_read(self, addresses: np.ndarray, itemsize: int, clock: Clock) -> int:
        """Return how many of the addresses a load of this launch has read before."""
        if self.nbytes // itemsize > MAX_CELLS or not self.granule:
            return 0
        cells = self._cells(addresses, itemsize)[:: max(1, itemsize // self.granule)]
        return int((self.reads[cells] >> _LAUNCH_AT == clock.launch).sum())

    def stored(self, tensor: Tensor) -> np.ndarray:
        """Return which elements of ``tensor``, a view of this storage, any launch has written."""
        itemsize = tensor.element_size()
        if not self.granule or itemsize < self.granule:
            return np.zeros(tuple(tensor.shape), bool)
        ratio = itemsize // self.granule
        written = self.writes[::ratio] != 0
        return np.lib.stride_tricks.as_strided(
            written[tensor.storage_offset() :],
            tensor.shape,
            [stride * written.itemsize for stride in tensor.stride()],
        ).copy()
