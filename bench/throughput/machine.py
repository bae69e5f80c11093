"""Describe the machine of a run, and measure how fast it copies and multiplies when the run starts."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import gradkernels
import torch

from .case import dtype_name
from .results import load as load_results
from .timing import WallTimer, in_turns, summarise

RESULTS = Path(__file__).parents[1] / "results"


def _said_by(*command: str) -> str:
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Return the header of a report: device, driver, versions, commit, date; no host name, no path."""
    facts: dict[str, Any] = {"device_type": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "num_sms": properties.multi_processor_count,
            "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split(
                "\n"
            )[0]
            or "unknown",
            "runtime": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}",
        }
    elif device.type == "cpu":
        facts |= {"device": f"{_cpu_name()}, {os.cpu_count()} cores", "threads": torch.get_num_threads()}
    else:
        facts |= {"device": f"{device.type} on {_cpu_name()}"}
    commit = _said_by("git", "rev-parse", "--short=10", "HEAD")
    changed = commit and _said_by("git", "status", "--porcelain", "--untracked-files=no")
    return facts | {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "gradkernels": gradkernels.__version__,
        "commit": (commit + (" and changes" if changed else "")) or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "fp32_precision": torch.backends.cuda.matmul.fp32_precision,
    }


def slug(machine: dict[str, Any]) -> str:
    """Return the name of the machine's folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")


def load_average() -> float | None:
    """Return how many processes ran or waited for a core over the last minute; None if the system has no count."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def signs_of_other_work(machine: dict[str, Any], limits: dict[str, Any], load: float | None) -> list[str]:
    """Return what indicates that other processes slow this machine down, and so the times taken now.

    Args:
        machine, limits: of this run.
        load: the load average before the run.
    """
    found = []
    cores = os.cpu_count() or 1
    if load is not None and load > 0.25 * cores:
        found.append(f"this machine is busy: load {load:.1f} on {cores} cores before the run")
    path = RESULTS / slug(machine) / "bench.json"
    with contextlib.suppress(ValueError):
        committed = load_results(path)["limits"]["copy"]
        if limits["copy"] < 0.8 * committed:
            found.append(
                f"this machine is busy, or slower than it was: it copies {limits['copy'] / 1e9:.1f} GB/s, "
                f"and {committed / 1e9:.1f} in {path.parent.name}/{path.name}"
            )
    return found


def measure_rates(
    device: torch.device, timer: WallTimer, seconds: float, full: bool = True
) -> dict[str, Any]:
    """Measure the two limits: bytes copied a second (read + written) and FLOP/s of a product by dtype.

    Args:
        full: at the sizes that reach the limits; a rehearsal takes small ones.
    """

    def fastest(calls: list[Any], work: float) -> float:
        samplers = [timer.per_call([call])[0] for call in calls]
        return max(
            1e6 * work / summarise(rounds, "")["median_us"]
            for rounds in in_turns(samplers, seconds, timer.pause, timer.clock)
        )

    numel = max(8 * timer.cache_bytes, 1 << 28) // 4 if full else 1 << 10
    source = torch.randn(numel, device=device)
    copy = fastest([functools.partial(torch.empty_like(source).copy_, source)], 8 * numel)
    rates: dict[str, Any] = {"copy": copy, "matmul": {}}
    size = (8192 if device.type == "cuda" else 2048) if full else 32
    types = (
        (torch.float32, torch.bfloat16, torch.float16)
        if device.type == "cuda"
        else (torch.float32, torch.float64, torch.bfloat16)
    )
    for dtype in types:
        if dtype == torch.float64 and device.type == "mps":
            continue
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates["matmul"][dtype_name(dtype)] = fastest([functools.partial(torch.matmul, a, b)], 2.0 * size**3)
    return rates
