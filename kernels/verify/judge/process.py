"""The child process under its limits, and what its end says. This is no sandbox: it stops accidents, not malice."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import verdict as v
from .verdict import Case

MEMORY = 8 << 30
THREADS = 2
STARTUP = 120.0
PACKAGE = __name__.partition(".")[0]


def judge(
    path: Path,
    name: str | None = None,
    *,
    timeout: float = 120.0,
    shapes: Sequence[tuple[int, ...]] = (),
    dtypes: Sequence[str] = (),
    seed: int = 0,
    forward_only: bool = False,
    interpreted: bool = True,
) -> list[Case]:
    """Judge a file in a child process, and return its cases; however the process ends, there is at least one."""
    reader, writer = os.pipe()
    token = secrets.token_hex()
    orders = {
        "pipe": writer,
        "token": token,
        "file": str(path.resolve()),
        "name": name,
        "timeout": timeout,
        "shapes": shapes,
        "dtypes": dtypes,
        "seed": seed,
        "forward_only": forward_only,
        "interpreted": interpreted,
        "memory": MEMORY,
        "threads": THREADS,
    }
    command = [sys.executable, "-m", f"{PACKAGE}.verify.judge.child"]
    child = subprocess.Popen(
        command,
        env=_environment(interpreted),
        stdin=subprocess.PIPE,
        stdout=2,  # where the file's own prints go
        pass_fds=[writer],
        start_new_session=True,
    )
    os.close(writer)
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:  # it ended before it read
        child.stdin.write(json.dumps(orders).encode())
    lines: list[bytes] = []
    started = threading.Event()
    listener = threading.Thread(target=_listen, args=(reader, lines, started), daemon=True)
    listener.start()
    try:
        # The time that torch takes to load is not the file's.
        started.wait(STARTUP)
        child.wait(timeout)
        ended = f"the process ended by {_how(child.returncode)}, without a report" if child.returncode else ""
    except subprocess.TimeoutExpired:
        ended = f"it did not end within {timeout:g} s"
    left = _end(child)
    listener.join(5)
    cases, current, complete = _read(lines, path.stem, token)
    if complete is None or ended:
        message = ended or "the process ended by exit status 0, without a whole report"
        return [*cases, Case(current, v.NOT_JUDGED, message=message)]
    if complete:
        message = f"it tried what code under judgement may not: {', '.join(dict.fromkeys(complete))}"
        return [*cases, Case(current, v.NOT_JUDGED, message=message)]
    if left:
        return [*cases, Case(current, v.NOT_JUDGED, message="it left processes behind")]
    return cases or [Case(current, v.NOT_JUDGED, message="there was nothing to judge")]


def _environment(interpreted: bool) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(THREADS))
    environment = {**os.environ, **threads}
    if not interpreted:
        environment.pop("TRITON_INTERPRET", None)
        return environment
    return {
        **environment,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GRADKERNELS_BACKEND": "triton",
    }


def _listen(pipe: int, lines: list[bytes], started: threading.Event) -> None:
    """Collect the lines of the report; the first says that the process has started."""
    with os.fdopen(pipe, "rb") as stream:
        for line in stream:
            started.set()
            lines.append(line)
    started.set()


def _end(child: subprocess.Popen[Any]) -> bool:
    """Kill what is left of the child's session; return whether other processes were."""
    alone = child.poll() is not None
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        child.wait()
    return alone


def _how(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _read(lines: Sequence[bytes], stem: str, token: str) -> tuple[list[Case], str, list[str] | None]:
    """Return the cases, the name that was judged last, and what was forbidden; None if the report is not whole.

    A line that the judge did not write, or that something broke, takes the end from the report.
    """
    cases: list[Case] = []
    current, complete, whole = stem, None, True
    for line in lines:
        try:
            record = json.loads(line)
            if record["token"] != token or complete is not None:
                raise ValueError("not a record of the judge")
            if "case" in record:
                cases.append(Case(**{**record["case"], "shape": tuple(record["case"]["shape"])}))
        except (ValueError, TypeError, KeyError):
            whole = False
            continue
        current = record.get("current", current)
        if "end" in record:
            complete = record["forbidden"]
    return cases, current, complete if whole else None
