"""DDP, FSDP2, ZeroRedundancyOptimizer and sharded checkpoints: gloo processes started by torchrun on this machine.

One launch per world size serves all its tests: starting the processes takes longer than what they do.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")
CASES = {
    2: (
        "ddp-SGD",
        "fsdp-AdamW",
        "fsdp-SGD",
        "hsdp-SGD",
        "placements-SGD",
        "placements-AdamW",
        "zero-AdamW",
        "guard_raises-AdamW",
        "checkpoint-AdamW",
        "checkpoint-SGD",
    ),
    4: ("ddp-AdamW", "fsdp-AdamW", "hsdp-SGD", "zero-SGD", "checkpoint-AdamW"),
}

Report = Callable[[int, str], str]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Run every case of a world size at the first call; then say what went wrong on any rank, or nothing."""
    folders: dict[int, tuple[Path, str]] = {}

    def launch(world: int) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*command, str(WORKER), str(folder), *CASES[world]],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return folder, result.stdout[-3000:]

    def read(world: int, case: str) -> str:
        if world not in folders:
            folders[world] = launch(world)
        folder, output = folders[world]
        texts = []
        for rank in range(world):
            path = folder / f"{case}.{rank}"
            text = path.read_text() if path.exists() else f"did not finish; the launch ended with:\n{output}"
            texts += [f"rank {rank}: {text}"] if text else []
        return "\n".join(texts)

    return read


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(world, case, marks=pytest.mark.full if world > 2 else ())
        for world, cases in CASES.items()
        for case in cases
    ],
)
def test_same_losses_as_one_process(world: int, case: str, report: Report) -> None:
    problem = report(world, case)
    assert not problem, problem
