"""Work that is too small to be shared among threads."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

# torch's elementwise operators share work among threads from this number of elements on (at::internal::GRAIN_SIZE);
# its fused optimizers share a tensor of 17. Where other processes keep the cores busy, each such region waits for a
# thread that is not running, some milliseconds: 300 fused Adam updates of 8,000 elements took 350 ms on two busy
# cores of a Xeon, 3 ms on one thread; on idle cores 2.6 ms either way.
GRAIN = 1 << 15


def is_small(tensor: Tensor) -> bool:
    """Return whether operators on this tensor are best left to one thread."""
    return tensor.is_cpu and tensor.numel() < GRAIN


class one_thread:  # noqa: N801  # a generator's context manager takes three times as long
    """The operators called within, by this thread, start no others.

    The number of threads is OpenMP's, which keeps one for each calling thread; ``torch.set_num_threads`` would
    change it for the whole process. Where torch has no OpenMP nothing changes.
    """

    def __init__(self, condition: bool = True) -> None:
        self.condition = condition

    def __enter__(self) -> None:
        # Asking also makes torch set the number of a thread that it has not seen, which it would do later.
        self.threads = torch.get_num_threads() if self.condition else 1
        if self.threads > 1:
            _set_threads(1)

    def __exit__(self, *raised: object) -> None:
        if self.threads > 1:
            _set_threads(self.threads)


def _find() -> Callable[[int], object]:
    """Find OpenMP's function in the library that torch itself is linked with."""
    try:
        return ctypes.PyDLL(torch._C.__file__).omp_set_num_threads
    except (OSError, AttributeError):
        return lambda threads: None


_set_threads = _find()
