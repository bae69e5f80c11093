"""The one state of the allocator: what is freed is used again, whatever was freed before."""

import dataclasses
import json
import platform
from pathlib import Path

import pytest
import torch

from bench.throughput import memory, results
from bench.throughput.memory import free_bytes

from ..helpers import python
from .fakes import Clock, document, doubling

SCRIPT = """
import json, torch
from bench.throughput import memory


def faults(megabytes):
    calls = [lambda: torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)] * 3
    memory.settle(calls)
    return memory.page_faults(calls)  # of the next ones


default = faults(40)
state = memory.recycle()
recycled = [faults(megabytes) for megabytes in (40, 8, 70, 40)]
memory.give_back()
given_back = memory.page_faults([lambda: torch.empty(40 << 20, dtype=torch.uint8).fill_(1)])
print(json.dumps([default, state, recycled, given_back]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc has its own ways")
def test_pages_are_used_again() -> None:
    default, state, recycled, given_back = json.loads(python("-c", SCRIPT, cwd=Path(__file__).parents[2]))
    pages = (40 << 20) // 4096
    assert default >= pages
    assert state == "recycled"
    assert max(recycled) <= memory.FEW
    assert given_back >= pages


def test_a_case_is_timed_with_memory_recycled_and_its_new_pages_are_said(
    glibc: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    case = dataclasses.replace(doubling(clock), bytes=1 << 28)
    monkeypatch.setattr("bench.throughput.memory.page_faults", lambda calls: 20000.0)
    found = document(case, clock=clock)
    assert found["cases"][0]["contenders"]["eager"]["page_faults"] == 20000
    said = "doubling forward 1000 float32: eager waits for 20000 new pages of memory in each call"
    assert said in results.remarks(found)
    assert ("malloc_trim", (0,)) in glibc  # before it is known how much is free
    monkeypatch.setattr("bench.throughput.memory.page_faults", lambda calls: 1.0)
    assert not results.remarks(document(dataclasses.replace(case, bytes=8), clock=clock))


def test_free_memory_counts_what_only_caches_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr("bench.throughput.memory.MEMINFO", meminfo)
    cpu = torch.device("cpu")
    without = free_bytes(cpu)
    meminfo.write_text("MemTotal:  9 kB\nMemFree:       1 kB\nMemAvailable:       5 kB\n")
    assert free_bytes(cpu) == 5120 != without > 0


def test_free_memory_of_a_gpu_counts_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (("mem_get_info", (10, 99)), ("memory_reserved", 60), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert free_bytes(torch.device("cuda")) == 10 + 60 - 20
