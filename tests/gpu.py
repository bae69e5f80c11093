"""``make test-gpu``: the tests marked ``gpu``, most telling first, in several processes, within a budget of seconds.

    python -m tests.gpu [--seconds S] [--workers N] [pytest's arguments]

Each worker is a pytest of its own with this module as its plugin. All have the same list in the same order, and each
runs what no other has claimed. A kernel that ends its process, hangs it or spoils its CUDA context fails its own test
only: the worker is started again. Needs nothing but pytest. The last line says what was left out, and why.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "test-gpu"
SECONDS = 420.0  # of a whole run; what runs then has a fourteenth of it to end
TEST_SECONDS = 100.0  # of one test, its compilations included
MEMORY = 16 << 30  # bytes of the GPU for each worker: the largest tests take half of it
SHOWN = 40  # failures that the end names once more
SPOILT = 70  # a worker's exit status when its CUDA context is of no more use

FIRST = (  # what even a short run has to try, in this order
    r"::test_(matmul|linear|sizes|sizes_and_dtypes|loss_and_grad|the_rounds|options_of_each_model)$",  # each op
    r"::test_(matches_torch_and_numpy|equals_a_run_for_each_model)$",  # and optimizer by the references
    r"test_\w+_kernels\.py::",  # each kernel
    r"captur|replay|one_launch|waits_for",  # graphs, launches, no waiting
    r"scaler|skip|max_norm|autocast",  # mixed precision
)


def in_order(items: Iterable[Any]) -> list[Any]:
    """FIRST, the rest, what is marked full; within each a first case of every test, then a second, and so on."""
    shuffled = sorted(items, key=lambda item: item.nodeid)
    random.Random(0).shuffle(shuffled)
    taken: Counter[str] = Counter()
    ranks = {}
    for item in shuffled:
        name = item.nodeid.partition("[")[0]
        rank = next((i for i, pattern in enumerate(FIRST) if re.search(pattern, name)), len(FIRST))
        ranks[item.nodeid] = (item.get_closest_marker("full") is not None, rank, taken[name])
        taken[name] += 1
    return sorted(shuffled, key=lambda item: ranks[item.nodeid])


# The plugin of a worker.


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "a worker of python -m tests.gpu")
    group.addoption("--claims", type=Path, help="the folder of a file for each test that is taken")
    group.addoption("--events", type=Path, help="the file that the worker reports to")
    group.addoption("--until", type=float, help="time.time() after which no test starts")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Worker(config.option))


class _Worker:
    def __init__(self, options: argparse.Namespace) -> None:
        self.claims, self.events, self.until = options.claims, options.events, options.until
        self.numbers: dict[str, int] = {}

    def say(self, **event: Any) -> None:
        with self.events.open("a") as file:
            print(json.dumps(event), file=file)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = in_order(items)
        self.numbers = {item.nodeid: number for number, item in enumerate(items)}
        self.say(tests=list(self.numbers))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.say(end=f"{report.nodeid} (its collection)", outcome="failed", text=report.longreprtext)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if time.time() > self.until:
            return True
        try:
            (self.claims / str(self.numbers[item.nodeid])).touch(exist_ok=False)
        except FileExistsError:
            return True
        self.say(start=item.nodeid)
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        last = report.when == "teardown"
        spoilt = (last or report.failed) and self.spoilt()
        if report.failed or spoilt:
            self.say(end=report.nodeid, outcome="failed", text=f"{report.longreprtext}\n{spoilt}".strip())
        elif report.skipped and not hasattr(report, "wasxfail"):
            self.say(end=report.nodeid, outcome="skipped", text=report.longrepr[2])
        elif last:
            self.say(end=report.nodeid, outcome="passed", text="")
        if spoilt:
            os._exit(SPOILT)

    def spoilt(self) -> str:
        """What an earlier kernel did to the CUDA context, if anything. Leaves its memory to the other workers."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return ""
        try:
            torch.cuda.synchronize()
            if torch.cuda.memory_reserved() > MEMORY // 8:
                torch.cuda.empty_cache()
        except RuntimeError as error:
            return f"the CUDA context is lost: {str(error).partition(chr(10))[0]}"
        return ""


# The command.


class _Process:
    """One worker as the command sees it."""

    def __init__(self, number: int, folder: Path, until: float, command: list[str]) -> None:
        events = folder / f"{number}.events"
        events.touch()
        self.command = [*command, f"--claims={folder / 'claims'}", f"--events={events}", f"--until={until}"]
        self.until, self.log, self.said = until, (folder / f"{number}.log").open("a"), events.open()
        self.rest = ""  # of a line that is not yet complete
        self.start()

    def start(self) -> None:
        self.test, self.since, self.died = "", time.time(), False
        self.status: int | None = None
        self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT)

    def stop(self) -> int:
        self.process.kill()
        return self.process.wait()

    def events(self, seconds: float) -> Iterator[dict[str, Any]]:
        """What it has said since the last call; at its end, or that of a test's ``seconds``, what it cannot say."""
        self.status = self.process.poll()  # before its last words are read
        *lines, self.rest = (self.rest + self.said.read()).split("\n")
        for event in map(json.loads, lines):
            if "start" in event:
                self.test, self.since = event["start"], time.time()
            elif event.get("end") == self.test and event["outcome"] != "skipped":
                self.test = ""
            yield event
        taken = time.time() - self.since
        if self.status is None and self.test and taken > seconds:
            self.status = self.stop()
        if self.status is not None and not self.died and (self.test or self.status == SPOILT):
            self.died = True
            if self.test:
                text = f"its process ended with status {self.status} after {taken:.0f} s; see {self.log.name}"
                yield {"end": self.test, "outcome": "failed", "text": text}

    def over(self) -> bool:
        """Whether the last ``events`` were its last, at the end of the list or of the time."""
        if self.status is None:
            return False
        if not self.died or time.time() > self.until:
            return True
        self.start()
        return False


def _workers() -> int:
    """Half the cores, as far as the GPU has memory for them."""
    import torch

    if not torch.cuda.is_available():
        return 1
    fitting = torch.cuda.get_device_properties(0).total_memory // MEMORY
    return max(1, min((os.cpu_count() or 2) // 2, fitting))


def _first_error(text: str) -> str:
    """The first line that pytest marks as the error's, or else the last."""
    lines = text.splitlines()
    return next((line[2:].strip() for line in lines if re.match(r"E\s", line)), lines[-1] if lines else "")


def summary(
    tests: Iterable[str], outcomes: dict[str, str], failures: dict[str, str], spent: float, why: str
) -> list[str]:
    """A line of each failure, and in the last line what was left out and why."""
    left = [test for test in tests if test not in outcomes]
    names = Counter(test.partition("[")[0].rpartition("::")[2] for test in left)
    lines = [f"failed: {test}: {_first_error(text)[:200]}" for test, text in failures.items()]
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"failed: {len(lines) - SHOWN} more, as above"]
    if left:
        lines.append("not run: " + ", ".join(f"{name} x {count}" for name, count in names.most_common()))
    found = Counter(outcomes.values())
    last = (
        f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped in {spent:.0f} s; "
    )
    if left:
        return [*lines, f"{last}{len(left)} tests not run: {why}"]
    return [*lines, f"{last}no test was left out"]


def main(argv: list[str]) -> int:
    begin = time.time()
    made = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--seconds", type=float, default=SECONDS, help=f"of the whole run ({SECONDS:.0f})")
    made.add_argument(
        "--test-seconds", type=float, default=TEST_SECONDS, help=f"of one test ({TEST_SECONDS:.0f})"
    )
    made.add_argument("--workers", type=int, help="processes (half the cores, as far as the GPU has memory)")
    made.add_argument("--folder", type=Path, default=FOLDER, help="of the workers' logs")
    options, arguments = made.parse_known_args(argv)
    folder, budget = options.folder.resolve(), options.seconds
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "claims").mkdir(parents=True)
    count = options.workers or _workers()
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu", "-p", "no:cacheprovider", "-m", "gpu", "-q"]
    # A warning of the versions at hand is no fault of a kernel; a file that cannot be collected is one file.
    command += ["-Wdefault", "--continue-on-collection-errors"]
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    workers = [_Process(i, folder, begin + budget, [*command, *arguments]) for i in range(count)]
    running, shown = list(workers), begin
    tests: list[str] = []
    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}
    why = ""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the workers end with this process
    try:
        while running and time.time() < begin + budget + budget / 14:
            time.sleep(0.2)
            for event in (event for worker in running for event in worker.events(options.test_seconds)):
                tests = event.get("tests", tests)
                if "end" in event and outcomes.get(event["end"], "passed") == "passed":
                    outcomes[event["end"]] = event["outcome"]
                    if event["outcome"] == "failed":
                        failures[event["end"]] = event["text"]
                        print(f"FAILED {event['end']}\n{event['text'][-4000:]}\n", flush=True)
            running = [worker for worker in running if not worker.over()]
            if time.time() - shown > 15:
                shown = time.time()
                print(f"{shown - begin:4.0f} s: {len(outcomes)} of {len(tests)} tests", flush=True)
    except KeyboardInterrupt:
        why = "it was interrupted"
    finally:
        for worker in workers:
            worker.stop()
    if not tests:
        print((folder / "0.log").read_text()[-4000:])
    spent = time.time() - begin
    why = why or (f"the budget of {budget:.0f} s was spent" if spent >= budget else "the workers ended early")
    print(*summary(tests, outcomes, failures, spent, why), sep="\n")
    return 0 if "passed" in outcomes.values() and "failed" not in outcomes.values() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
