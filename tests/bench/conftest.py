"""The benchmark's setting of malloc would stay for the rest of a test process."""

import pytest

from bench.throughput import memory


@pytest.fixture(autouse=True)
def glibc(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The calls of glibc, none of which is made."""
    called: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(memory, "_glibc", lambda name, *given: called.append((name, given)) or 1)
    return called
