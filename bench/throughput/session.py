"""What a run has measured so far, on disk after each part; on a GPU the run itself is a process that may be lost.

A kernel can end its process, hang it, or spoil its CUDA context, in which each later call fails. So ``supervise`` has a
child measure, ends it where a part takes too long, and starts another for what is left. The two share a folder:
``state`` is what has been measured, ``now`` the part and the implementation that run.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAM = ("-m", __package__.rpartition(".")[0])  # of the child
GRACE = 60.0  # seconds to print and write what was measured
SHARE = 0.25  # of the budget, that one part may take
SPOILT = 70  # a child's exit status when its CUDA context is of no more use


class LostError(BaseException):
    """The device serves this process no more. Not an ``Exception``: no later call can have a result."""


class Session:
    """The parts of a run by name, and what is known of them.

    Attributes:
        begin: the value of ``time.monotonic()`` at which the run began.
        head: of the document: machine, limits, settings.
        found: the record of each part that was measured.
        lost: by part, why each implementation of it ("": none in particular) is not called again.
    """

    def __init__(self, folder: Path | None = None, begin: float = 0.0) -> None:
        self.folder, self.begin = folder, begin
        self.head: dict[str, Any] = {}
        self.found: dict[str, Any] = {}
        self.lost: dict[str, dict[str, str]] = {}
        self.part = ""
        if folder is not None and (state := folder / "state").exists():
            self.__dict__ |= json.loads(state.read_text())

    def at(self, part: str, implementation: str = "", reason: str = "") -> None:
        """Note what runs from now on."""
        self.part = part
        self._put("now", [part, implementation, reason])

    def within(self, implementation: str) -> None:
        """Note which implementation of the part runs."""
        self.at(self.part, implementation)

    def save(self) -> None:
        """Keep what was found for another process."""
        self._put("state", {name: getattr(self, name) for name in ("begin", "head", "found", "lost")})

    def _put(self, name: str, value: Any) -> None:
        """Write a file of the folder, which is whole at any time."""
        if self.folder is not None:
            written = self.folder / "written"
            written.write_text(json.dumps(value))
            written.replace(self.folder / name)

    def leave(self, implementation: str, reason: str) -> None:
        """End the process, whose device is lost, with the reason why."""
        self.save()
        self.at(self.part, implementation, reason)
        sys.stdout.flush()
        os._exit(SPOILT)


def supervise(argv: Sequence[str], begin: float, budget: float | None) -> int:
    """Run the command in a child, and in another one for the rest where the first is lost; return the exit status.

    With a budget each part may take a share of it; without one as long as it likes.
    """
    longest = float("inf") if budget is None else max(SHARE * budget, GRACE)
    until = float("inf") if budget is None else begin + 1.2 * budget + 5
    interrupted = False

    def interrupt(number: int, _: Any) -> None:
        nonlocal interrupted, until
        interrupted, until = True, min(until, time.monotonic() + GRACE)
        if number == signal.SIGTERM:  # an interrupt from the keyboard has reached the child too
            child.send_signal(signal.SIGINT)

    def hangs() -> bool:
        """Wait until the child ends, or end it; return whether its part took too long."""
        written, since = 0, time.monotonic()
        while child.poll() is None:
            time.sleep(0.05)
            if (at := now.stat().st_mtime_ns) != written:
                written, since = at, time.monotonic()  # a clock that is set must end nothing
            hung = time.monotonic() - since > longest
            if hung or time.monotonic() > until:
                child.kill()
                child.wait()
                return hung
        return False

    with tempfile.TemporaryDirectory() as scratch:
        now = Path(scratch, "now")
        Session(now.parent, begin).save()
        while True:
            now.write_text('["", "", ""]')
            # What is printed must not wait in a buffer of a process that may be killed.
            child = subprocess.Popen(
                [sys.executable, *PROGRAM, *argv, f"--under={scratch}"],
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            handlers = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
            try:
                hung = hangs()
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            status, session = child.returncode, Session(now.parent)
            part, implementation, reason = json.loads(now.read_text())
            if not part and status >= 0:
                return status
            reason = reason or (
                f"hung for {longest:.0f} s" if hung else f"its process ended with status {status}"
            )
            print(f"lost: {part or 'the report'} {implementation}: {reason}", file=sys.stderr, flush=True)
            if interrupted or not part or not session.head:
                return 1  # what there is was written, or the machine's limits cannot be had
            if hung or time.monotonic() < until:
                lost = session.lost.setdefault(part, {})
                # One that was not called cannot be what failed: the inputs may be, which all of the part have.
                lost["" if implementation in lost else implementation] = reason
                session.save()
            until = max(until, time.monotonic() + GRACE)
