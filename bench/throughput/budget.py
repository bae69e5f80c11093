"""A run within so many seconds: what of it begins, and what is ended."""

import contextlib
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any


class SpentError(BaseException):
    """The time is over. Not an ``Exception``: what a contender raises becomes its row, and the run goes on."""


class Budget:
    """Admits the parts of a run.

    Args:
        seconds: no part begins after so many, nor one that would end a fifth later if it took as long as the longest
            so far; None sets no limit.
        begin: the value of ``time.monotonic()`` at which the run began.
    """

    def __init__(self, seconds: float | None, begin: float) -> None:
        self.seconds, self.begin = seconds, begin
        self.starts: list[float] = []

    def admits(self) -> bool:
        """Return whether there is time for a part, which then begins."""
        self.starts.append(time.monotonic() - self.begin)
        longest = max((b - a for a, b in pairwise(self.starts)), default=0.0)
        return self.seconds is None or (
            self.starts[-1] <= self.seconds and self.starts[-1] + longest <= 1.2 * self.seconds
        )

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """End the block quietly if a part of it still runs a fifth after the budget."""
        if self.seconds is None or not hasattr(signal, "setitimer"):
            yield
            return

        def end(*_: Any) -> None:
            raise SpentError

        before = signal.signal(signal.SIGALRM, end)
        left = 1.2 * self.seconds - (time.monotonic() - self.begin)
        signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), 5.0)  # again: a callback from C swallows one
        try:
            yield
        except SpentError:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
