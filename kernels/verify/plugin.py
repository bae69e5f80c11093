"""The memory check around a test, for the pytest plugin ``pytest_gradkernels``."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from .memory.check import memory_check as check_memory
from .memory.report import MemoryReport, Traffic


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
        """Return what was seen so far."""
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
