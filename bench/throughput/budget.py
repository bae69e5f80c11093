"""A run within so many seconds: what of it begins, what is ended, what is left out."""

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any


class SpentError(BaseException):
    """The time is over. Not an ``Exception``: what a contender raises becomes its row, and the run goes on."""


class Budget:
    """Admits the parts of a run by their names.

    Args:
        seconds: no part begins after so many, nor one that would end a fifth later if it took as long as the longest
            so far; None sets no limit.
        begin: the value of ``time.monotonic()`` at which the run began.
        advance: called with the name of each part that begins.
    """

    def __init__(self, seconds: float | None, begin: float, advance: Callable[[str], Any]) -> None:
        self.seconds, self.begin, self.advance = seconds, begin, advance
        self.begun: list[str] = []
        self.starts: list[float] = []

    def admits(self, name: str) -> bool:
        """Return whether there is time for a part, which then has begun."""
        self.starts.append(time.monotonic() - self.begin)
        if self.seconds is not None:
            longest = max((b - a for a, b in pairwise(self.starts)), default=0.0)
            if self.starts[-1] > self.seconds or self.starts[-1] + longest > 1.2 * self.seconds:
                return False
        self.begun.append(name)
        self.advance(name)
        return True

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """End the block quietly if a part of it still runs a fifth after the budget: that part has not begun."""
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
            del self.begun[-1:]  # none, if the budget was spent before the first began
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def left_out(self, planned: Sequence[str]) -> list[str]:
        """Return the parts that were planned and have no result."""
        return list((Counter(planned) - Counter(self.begun)).elements())
