"""Measure what a call costs the host, beside torch's own: ``python -m bench host``.

CPU time of one thread, the best of several rounds, on tensors so small that arithmetic hardly counts; ours and
torch's in one process, round by round. Where there is no GPU the kernels are not launched: what is left is all
that stands between a call and its launch (which is 2 to 4 us more).
"""

import argparse
import importlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor

Call = Callable[[], object]

ROUNDS = 25
CALLS = 300


def forward(function: Callable[..., Tensor], tensors: list[Tensor]) -> Call:
    """Make the call alone; nothing requires a gradient."""
    return lambda: function(*tensors)


def both(function: Callable[..., Tensor], tensors: list[Tensor]) -> Call:
    """Make the call and its backward; ``.grad`` is None again after it."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    upstream = torch.ones_like(function(*tensors))

    def call() -> None:
        function(*leaves).backward(upstream)
        for leaf in leaves:
            leaf.grad = None

    return call


def microseconds(ours: Call, theirs: Call, rounds: int) -> tuple[float, float]:
    """Return the CPU time of a call of each."""
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, call in enumerate((ours, theirs)):
            start = time.process_time_ns()
            for _ in range(CALLS):
                call()
            best[i] = min(best[i], time.process_time_ns() - start)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a full queue would hold up the host
    return best[0] / CALLS / 1000, best[1] / CALLS / 1000


def no_launch(*args: object, **options: object) -> None:
    """Replace the launch of a kernel."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args(argv).rounds
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from gradkernels import use_backend
    from gradkernels.ops import FUNCTIONS

    modules = [importlib.import_module(f"..bench_{name}", __package__) for name in FUNCTIONS]
    calls = [call for module in modules for call in module.HOST_CALLS]
    print(f"{'ours / torch':27}{'forward':>25}{'forward + backward':>25}")
    with ExitStack() as stack:
        for op in () if gpu else FUNCTIONS:
            module = importlib.import_module(f"gradkernels.triton.{op}")
            stack.enter_context(mock.patch.object(module, "launch", no_launch))
        for backend in ("fallback", "triton"):
            with use_backend(backend):
                for call in calls:
                    tensors = [torch.randn(shape, device=device) for shape in call.shapes]
                    row = f"{call.name:17}{backend:10}"
                    for way in (forward, both):
                        mine, torchs = microseconds(
                            way(call.ours, tensors), way(call.theirs, tensors), rounds
                        )
                        row += f"{mine:7.1f} /{torchs:5.1f} us {mine / torchs:4.2f}x "
                    print(row, flush=True)
    return 0
