"""The pytest plugin: ``pytest --triton-on-cpu`` runs a suite written for ``device="cuda"`` on a CPU, as it is.

Triton's kernels are interpreted, and each test runs inside the memory checker: one that leaves a memory fault fails.
The fixtures ``memory_check``, ``traffic`` and ``gradcheck`` are there with the option and without it.

Every pytest in an environment with gradkernels imports this module. It stands outside the package, whose import brings
torch, and takes from there what a run needs once it asks for it.
"""

import os
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gradkernels.verify.plugin import Watch

SECTION = "memory faults"
UNWATCHED = "unwatched"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gradkernels", "Triton kernels without a GPU")
    group.addoption(
        "--triton-on-cpu",
        action="store_true",
        help='interpret Triton\'s kernels, take "cuda" for this CPU, and watch the memory of every test',
    )
    group.addoption(
        "--every-configuration",
        action="store_true",
        help="with --triton-on-cpu, launch autotuned kernels in each of their configurations, not the first alone",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Come before the first conftest.py, which may import Triton."""
    if not early_config.known_args_namespace.triton_on_cpu:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from gradkernels.verify.device import cuda_on_cpu
    from gradkernels.verify.memory.interpreter import interpreted

    if "triton" in sys.modules and not interpreted():
        raise pytest.UsageError("--triton-on-cpu: triton was imported before, by another plugin")
    stack = ExitStack()
    stack.enter_context(cuda_on_cpu())
    early_config.add_cleanup(stack.close)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{UNWATCHED}: --triton-on-cpu does not watch the memory of this test")


_KEY = pytest.StashKey["Watch"]()


def _watch(item: Any) -> "Watch":
    from gradkernels.verify.plugin import Watch

    configuration = None if item.config.getoption("every_configuration") else 0
    return item.stash.setdefault(_KEY, Watch(configuration))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    if not item.config.getoption("triton_on_cpu") or item.get_closest_marker(UNWATCHED):
        return (yield)
    from gradkernels.verify.memory.report import MemoryFaultError, harmful

    __tracebackhide__ = True
    watch = _watch(item)
    watch.reports.clear()  # of a run before, where a plugin runs a test again
    watch.start()
    try:
        result = yield
    finally:
        watch.stop()
        report = watch.report
        report.faults = harmful(report)
        if not report:
            item.add_report_section("call", SECTION, "\n".join(map(str, report.faults)))
    if not report:
        raise MemoryFaultError(report)
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the faults of all tests."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    found = [
        (report.nodeid, text)
        for report in reports
        for title, text in getattr(report, "sections", ())
        if title == f"Captured {SECTION} call"
    ]
    if found:
        terminalreporter.section(SECTION)
        for name, text in dict.fromkeys(found):
            terminalreporter.line(name, bold=True)
            for line in text.splitlines():
                terminalreporter.line(f"  {line}")


@pytest.fixture
def memory_check(request: pytest.FixtureRequest) -> "Watch":
    """Return the memory check of this test: read what it saw, or call it to check a block by itself."""
    return _watch(request.node)


@pytest.fixture
def traffic(request: pytest.FixtureRequest) -> "Watch":
    """Return the bytes that this test's launches moved: ``traffic.loaded``, ``traffic.stored``, an entry per launch."""
    return _watch(request.node)


@pytest.fixture
def gradcheck() -> Callable[..., Any]:
    """Return ``gradkernels.verify.gradcheck``, which raises GradientError unless told otherwise."""
    from gradkernels.verify import gradcheck as check_gradient

    return partial(check_gradient, raise_exception=True)
