"""What memory a case may take, and one state of a CPU's allocator for all implementations: memory is recycled.

By default glibc gives a block of 32 MB or more back to the system when it is freed, and a smaller one (from 128 KB) or
not, by the sizes that were freed before. The next such block is then mapped and cleared page by page, which takes
several times as long as a job that only reads it: the time of an implementation would be that of its temporaries'
pages, and depend on the cases before it. So all blocks come from the heap, which keeps its pages.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from .case import Call

MEMINFO = Path("/proc/meminfo")
PASSES = 8  # to settle
FEW = 16  # pages in each call
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def recycle() -> str:
    """Let glibc keep what is freed, for the rest of the process; return what state memory is in."""
    if not _glibc("mallopt", M_MMAP_MAX, 0) or not _glibc("mallopt", M_TRIM_THRESHOLD, -1):
        return "the system's default"
    return "recycled"


def give_back() -> None:
    """Give the pages of freed blocks back to the system."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> int:
    """Call a function of glibc's; 0 where there is none."""
    try:
        return getattr(ctypes.CDLL(None), name)(*arguments)
    except (AttributeError, TypeError):  # another libc; Windows
        return 0


def touch(size: int) -> None:
    """Put so many bytes, whose pages are there, into the heap: what small blocks split is then no new page's."""
    torch.empty(size, dtype=torch.uint8).fill_(1)


def settle(calls: Sequence[Call]) -> float | None:
    """Make all calls until they take no new pages; return how many a call still takes.

    What glibc keeps aside for small blocks splits a few large ones.
    """
    for _ in range(PASSES):
        found = page_faults(calls)
        if found is None or found <= FEW:
            break
    return found


def page_faults(calls: Sequence[Call]) -> float | None:
    """Return how many pages a call has the system map; None where the system does not count."""
    try:
        import resource
    except ImportError:
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for call in calls:
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / len(calls)


def free_bytes(device: torch.device) -> int:
    """Return the memory that a case may take."""
    if device.type == "cuda":
        # What torch's allocator keeps of tensors that are gone, it gives again.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    give_back()
    with contextlib.suppress(OSError):  # memory that only caches files is not free, but to be had
        if available := re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text()):
            return int(available[1]) << 10
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 << 30
