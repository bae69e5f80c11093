"""The pytest plugin: ``pytest --triton-on-cpu`` runs a suite written for ``device="cuda"`` on a CPU, as it is.

Triton's kernels are interpreted, and each test runs inside the memory checker: one that leaves a memory fault fails.
The fixtures ``memory_check``, ``traffic`` and ``gradcheck`` are there with the option and without it.
"""

import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from . import gradcheck as check_gradient
from .device import cuda_on_cpu
from .memory.check import memory_check as check_memory
from .memory.interpreter import interpreted
from .memory.report import MemoryFaultError, MemoryReport, Traffic, harmful

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
    if "triton" in sys.modules and not interpreted():
        raise pytest.UsageError("--triton-on-cpu: triton was imported before, by another plugin")
    stack = ExitStack()
    stack.enter_context(cuda_on_cpu())
    early_config.add_cleanup(stack.close)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{UNWATCHED}: --triton-on-cpu does not watch the memory of this test")


class Watch:
    """The memory check of a test: its report as far as it has got, or a check of its own for a block.

    Example:
        >>> def test_add(memory_check):
        ...     add(x, y)
        ...     assert memory_check.loaded == x.nbytes + y.nbytes
        >>> def test_fault(memory_check):
        ...     with pytest.raises(MemoryFaultError), memory_check():
        ...         wrong(x)
    """

    def __init__(self, configuration: int | None) -> None:
        self.configuration = configuration
        self.reports: list[MemoryReport] = []
        self.stack: ExitStack | None = None

    def start(self) -> None:
        """Watch from here on."""
        self.stack = ExitStack()
        check = check_memory(configuration=self.configuration, raise_exception=False)
        self.reports.append(self.stack.enter_context(check))

    def stop(self) -> None:
        """Watch no longer."""
        if self.stack is not None:
            stack, self.stack = self.stack, None
            stack.close()

    @contextmanager
    def __call__(
        self,
        tensors: Mapping[str, Tensor] | Iterable[Tensor] = (),
        *,
        outputs: Mapping[str, Tensor] | Iterable[Tensor] = (),
        configuration: int | None = None,
        raise_exception: bool = True,
    ) -> Iterator[MemoryReport]:
        """Check a block by itself, as ``verify.memory_check`` does; its faults are not the test's."""
        watching = self.stack is not None
        self.stop()
        try:
            with check_memory(
                tensors, outputs=outputs, configuration=configuration, raise_exception=raise_exception
            ) as report:
                yield report
        finally:
            if watching:
                self.start()

    @property
    def report(self) -> MemoryReport:
        """What was seen so far."""
        if not self.reports:
            raise RuntimeError(
                "nobody watches this test: run pytest with --triton-on-cpu, or watch a block (with memory_check():)"
            )
        whole = MemoryReport()
        for part in self.reports:
            whole.faults += part.faults
            whole.traffic += part.traffic
            whole.notes += part.notes
            whole.configurations = max(whole.configurations, part.configurations)
        return whole

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.report, name)

    def __bool__(self) -> bool:
        return bool(self.report)

    def __iter__(self) -> Iterator[Traffic]:
        return iter(self.report.traffic)

    def __len__(self) -> int:
        return self.report.launches


_KEY = pytest.StashKey[Watch]()


def _watch(item: Any) -> Watch:
    configuration = None if item.config.getoption("every_configuration") else 0
    return item.stash.setdefault(_KEY, Watch(configuration))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    if not item.config.getoption("triton_on_cpu") or item.get_closest_marker(UNWATCHED):
        return (yield)
    __tracebackhide__ = True
    watch = _watch(item)
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
def memory_check(request: pytest.FixtureRequest) -> Watch:
    """The memory check of this test: read what it saw, or call it to check a block by itself."""
    return _watch(request.node)


@pytest.fixture
def traffic(request: pytest.FixtureRequest) -> Watch:
    """The bytes that this test's launches moved: ``traffic.loaded``, ``traffic.stored``, an entry per launch."""
    return _watch(request.node)


@pytest.fixture
def gradcheck() -> Callable[..., Any]:
    """``gradkernels.verify.gradcheck``, which raises GradientError unless told otherwise."""
    return partial(check_gradient, raise_exception=True)
