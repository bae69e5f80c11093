"""The child process: it judges one file and writes a line of JSON per case into a pipe.

``python -m gradkernels.verify.judge.child`` takes its orders as JSON in its only argument.
"""

import dataclasses
import json
import os
import resource
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..device import cuda_on_cpu
from . import verdict as v
from .examine import Options, _raised_at, examine
from .load import NotJudgedError, load, targets
from .verdict import Case

FORBIDDEN = ("os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "os.kill", "os.killpg")
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
MAX_THREADS = 64


class _Report:
    """The pipe to the parent. A process forked from this one has no say in it."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.process = pipe, os.getpid()

    def send(self, **record: Any) -> None:
        if os.getpid() == self.process:
            os.write(self.pipe, json.dumps(record).encode() + b"\n")


class _Guard:
    """An audit hook: the code under judgement starts no process and opens no connection."""

    def __init__(self) -> None:
        self.active, self.threads = False, 0
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "_thread.start_new_thread":
            self.threads += 1
            if self.threads <= MAX_THREADS:
                return
        elif event not in FORBIDDEN and event not in NETWORK:
            return
        self.seen.append(event)
        raise PermissionError(f"{event} is not allowed to code under judgement")


def limit(seconds: float, nbytes: int) -> None:
    """Limit processor time and memory, and write no core file."""
    cpu = int(seconds) * (os.cpu_count() or 1) + 10
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_DATA, nbytes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def main() -> None:
    """Judge the file; every way that this can end without a report is a verdict "not judged" of the parent."""
    orders = json.loads(sys.argv[1])
    report = _Report(orders["pipe"])
    os.dup2(2, 1)  # what the file prints is not the answer
    report.send(started=True)
    began = time.monotonic()
    path = Path(orders["file"])
    if orders["interpreted"]:
        limit(orders["timeout"], orders["memory"])
    torch.set_num_threads(orders["threads"])
    options = Options(
        shapes=tuple(map(tuple, orders["shapes"])),
        dtypes=tuple(orders["dtypes"]),
        seed=orders["seed"],
        forward_only=orders["forward_only"],
        deadline=began + 0.6 * orders["timeout"],
    )
    guard = _Guard()
    sys.addaudithook(guard)
    with ExitStack() as stack:
        if orders["interpreted"]:
            stack.enter_context(cuda_on_cpu())
        guard.active = True
        try:
            found = targets(load(path), orders["name"])
        except BaseException as error:  # SystemExit too
            said = str(error) if isinstance(error, NotJudgedError) else _said(error)
            report.send(
                case=dataclasses.asdict(
                    Case(path.stem, v.NOT_JUDGED, message=said, where=_raised_at(error, str(path)))
                )
            )
            found = []
        for target in found:
            report.send(current=target.name)
            try:
                for case in examine(target, options, str(path)):
                    report.send(case=dataclasses.asdict(case))
            except BaseException as error:  # an error of the judge, or SystemExit
                traceback.print_exc()
                said = f"the judge failed: {_said(error)}"
                report.send(case=dataclasses.asdict(Case(target.name, v.NOT_JUDGED, message=said)))
    guard.active = False
    report.send(end=True, forbidden=guard.seen)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip(": ")


if __name__ == "__main__":
    main()
