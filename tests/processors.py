"""``make test-processors``: the tests that could rest on a processor's rounding, as other processors would run them.

torch and its libraries choose their routines by the instructions that the processor has and by the number of threads,
and the order in which a sum is added up, so its last bits, comes with the routine. Environment variables hold each
library to fewer instructions than are here. What the kernels compute under the interpreter comes from NumPy alone;
everything that has a fallback runs on it.

    python -m tests.processors [NAME...]     only the settings whose names contain one of these
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
LEVELS = {  # of instructions, by torch's names: the value of each variable
    "DEFAULT": ("default", "SSE4_2", "SSE41", "COMPATIBLE"),
    "AVX2": ("avx2", "AVX2", "AVX2", "AVX2"),
    "AVX512": ("avx512", "AVX512", "AVX512_CORE", "AVX512"),
}


def settings() -> dict[str, tuple[str, dict[str, str]]]:
    """By name: which tests run ("fallback" or "kernels"), and the environment.

    MKL_CBWR chooses among MKL's reproducible routines, which are others than those of any level: it stands alone.
    """
    here = torch.backends.cpu.get_cpu_capability()
    levels = list(LEVELS)[: list(LEVELS).index(here) + 1] if here in LEVELS else []
    one, two = ({"OMP_NUM_THREADS": n, "MKL_NUM_THREADS": n} for n in "12")
    found = {f"{here}, one thread": ("fallback", one), f"{here}, two threads": ("fallback", two)}
    for level in levels:
        *values, reproducible = LEVELS[level]
        if level != here:
            found[f"{level}, one thread"] = ("fallback", one | dict(zip(VARIABLES, values, strict=False)))
        found[f"MKL_CBWR={reproducible}"] = ("fallback", one | {"MKL_CBWR": reproducible})
    if levels:
        features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
        plain = {"NPY_DISABLE_CPU_FEATURES": " ".join(features), "OPENBLAS_CORETYPE": "Prescott"}
        found["NumPy without vectors"] = ("kernels", one | plain)
    return found


def tests(which: str) -> list[str]:
    """pytest's arguments."""
    if which == "kernels":
        return ["-k", "kernels or lessons or reference or tolerance"]
    only_triton = [
        path
        for path in HERE.rglob("test_*.py")
        if re.search(r'^(triton = )?pytest\.importorskip\("triton"\)', path.read_text(), re.MULTILINE)
    ]
    return ["-k", "not triton", *(f"--ignore={path}" for path in only_triton)]


def main(names: list[str]) -> int:
    failed = []
    for name, (which, environment) in settings().items():
        if names and not any(part in name for part in names):
            continue
        workers = max(1, (os.cpu_count() or 1) // int(environment["OMP_NUM_THREADS"]))
        command = [sys.executable, "-m", "pytest", "-m", "not full", "-n", str(workers), "-q", "--tb=short"]
        start = time.perf_counter()
        # Inductor's cache would give code for the instructions of another setting.
        with tempfile.TemporaryDirectory() as cache:
            result = subprocess.run(
                [*command, *tests(which), str(HERE)],
                cwd=HERE.parent,
                env=os.environ | environment | {"TORCHINDUCTOR_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
        if result.returncode:
            failed.append(name)
            print(result.stdout, result.stderr, sep="\n")
        last = result.stdout.strip().splitlines()[-1:] or ["nothing"]
        print(f"{name:36s} {last[0]} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "no test rests on any of these settings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
