"""``python -m bench`` over the stand-ins: every part is timed as if its results were right, and as briefly as possible.

    python -m tests.host.rehearsal OP... --device cuda --quick --scale --out DIR

No kernel runs, so the times mean nothing. What would take more than MEMORY is skipped, as on a small GPU.
"""

import dataclasses
import sys
from typing import Any

import torch

from bench import __main__ as cli
from bench.throughput import runner, session, timing
from bench.throughput.case import Case

MEMORY = 4 << 30  # bytes; the stand-in's is this machine's


class Runner(runner.Runner):
    def case(self, case: Case, lost: Any = None) -> dict[str, Any]:
        tried = tuple(
            dataclasses.replace(
                each,
                reference=None,
                absent=each.absent or ("too large to compile here" if each.per_set else ""),
            )
            for each in case.implementations
        )
        unchecked = dataclasses.replace(case, reference=lambda *arrays: (), implementations=tried, calls=1)
        try:
            return super().case(unchecked, lost)
        finally:
            if not self.refusal():
                torch.cuda.empty_cache()


def main() -> int:
    session.PROGRAM = ("-m", "tests.host.rehearsal")
    runner.to_numpy = lambda inputs: ()
    runner.verdict = lambda *given: {"status": "ok"}
    runner.free_bytes = lambda device: MEMORY if device.type == "cuda" else 1 << 50
    runner.Runner = Runner
    timing.ROUNDS, timing.CudaTimer.pause = 1, 0.0
    return cli.main([*sys.argv[1:], "--seconds=1e-6"])


if __name__ == "__main__":
    sys.exit(main())
