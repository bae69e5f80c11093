"""The child process: it judges one file and writes a line of JSON per case into a pipe.

``python -m gradkernels.verify.judge.child`` takes its orders as JSON on standard input.
"""

import builtins
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import resource
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..device import cuda_on_cpu
from . import verdict as v
from .examine import Options, _raised_at, examine
from .load import NotJudgedError, load, targets
from .verdict import Case

FORBIDDEN = ("os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "os.kill", "os.killpg")
# Refused on a CPU, but a file that catches the error is judged: libraries ask the system by a process and can do
# without the answer. On a device Triton's compiler starts its assembler this way.
SUBPROCESS = "subprocess.Popen"
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
MAX_THREADS = 64


_dumps, _write, _getpid, _exit = json.dumps, os.write, os.getpid, os._exit  # whatever becomes of those names
TRUSTED: tuple[Any, ...] = (
    builtins,
    math,
    json,
    os,
    np,
    np.linalg,
    torch,
    torch.Tensor,
    torch.autograd,
    torch.testing,
)
# torch's compiler puts a wrapper in its place when it is first imported; seed_all has torch's own.
WRAPPED_BY_TORCH = (torch, "manual_seed")


class _Report:
    """The pipe to the parent: each record bears the token, which whoever finds the pipe does not know.

    A process forked from this one has no say in it.
    """

    def __init__(self, pipe: int, token: str) -> None:
        self.pipe, self.token, self.process = pipe, token, _getpid()

    def send(self, **record: Any) -> None:
        if _getpid() == self.process:
            _write(self.pipe, _dumps({"token": self.token, **record}).encode() + b"\n")


class _Tools:
    """The functions that the judge measures with, as they were before the file was read."""

    def __init__(self) -> None:
        self.before = [self._names(owner) for owner in TRUSTED]

    @staticmethod
    def _names(owner: Any) -> dict[str, Any]:
        found = {name: inspect.getattr_static(owner, name, None) for name in dir(owner)}
        return {
            name: thing for name, thing in found.items() if callable(thing) or isinstance(thing, property)
        }

    def replaced(self) -> list[str]:
        """Return the names of those that are something else now."""
        return [
            f"{owner.__name__}.{name}"
            for owner, before in zip(TRUSTED, self.before, strict=True)
            for name, thing in before.items()
            if inspect.getattr_static(owner, name, None) is not thing and (owner, name) != WRAPPED_BY_TORCH
        ]


class _Guard:
    """An audit hook: the code under judgement starts no process and opens no connection."""

    def __init__(self, *, interpreted: bool) -> None:
        self.interpreted, self.active, self.threads = interpreted, False, 0
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "_thread.start_new_thread":
            self.threads += 1
            if self.threads <= MAX_THREADS:
                return
        elif event == SUBPROCESS:
            if not self.interpreted:
                return
        elif event not in FORBIDDEN and event not in NETWORK:
            return
        if event != SUBPROCESS:
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
    orders = json.loads(sys.stdin.read())
    report = _Report(orders.pop("pipe"), orders.pop("token"))
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
    guard = _Guard(interpreted=orders["interpreted"])
    sys.addaudithook(guard)
    with ExitStack() as stack:
        if orders["interpreted"]:
            stack.enter_context(cuda_on_cpu())
        elif importlib.util.find_spec("triton") is not None:
            import triton

            triton.knobs.runtime.interpret = False  # whatever the file sets in the environment
        tools = _Tools()
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
        if replaced := tools.replaced():
            said = f"it replaces what the judge measures with: {', '.join(replaced[:5])}"
            report.send(case=dataclasses.asdict(Case(path.stem, v.NOT_JUDGED, message=said)))
    guard.active = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    report.send(end=True, forbidden=guard.seen)
    _exit(0)  # what the file left for the end of the process is not judged, and has no say


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip(": ")


if __name__ == "__main__":
    main()
