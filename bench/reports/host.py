"""Measure what a call costs the host, beside torch's own: ``python -m bench host``.

CPU time of one thread, the best of several rounds, on tensors so small that arithmetic hardly counts; ours and
torch's in one process, round by round. Where there is no GPU the kernels are not launched: what is left is all
that stands between a call and its launch (which is 2 to 4 us more).
"""

import argparse
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

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


def jobs(device: str) -> Iterator[tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    """Yield (name, ours, torch's, arguments) of each op."""
    from gradkernels import linear, linear_mse_loss, matmul, mse_loss

    def linear_then_loss(x: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return functional.mse_loss(functional.linear(x, w, b), y)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    yield "mse_loss", mse_loss, functional.mse_loss, [random(64), random(64)]
    yield "matmul", matmul, torch.matmul, [random(16, 4), random(4, 4)]
    yield "linear", linear, functional.linear, [random(16, 4), random(4, 4), random(4)]
    tensors = [random(16, 4), random(4, 4), random(16, 4), random(4)]
    yield "linear_mse_loss", linear_mse_loss, linear_then_loss, tensors


def microseconds(ours: Call, theirs: Call, rounds: int) -> tuple[float, float]:
    """Return the CPU time of a call of each."""
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, call in enumerate((ours, theirs)):
            start = time.process_time_ns()
            for _ in range(CALLS):
                call()
            best[i] = min(best[i], time.process_time_ns() - start)
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

    print(f"{'ours / torch':27}{'forward':>25}{'forward + backward':>25}")
    with ExitStack() as stack:
        for op in () if gpu else ("matmul", "mse", "linear_mse"):
            module = importlib.import_module(f"gradkernels.triton.{op}")
            stack.enter_context(mock.patch.object(module, "launch", no_launch))
        for backend in ("fallback", "triton"):
            with use_backend(backend):
                for name, ours, theirs, tensors in jobs(device):
                    row = f"{name:17}{backend:10}"
                    for way in (forward, both):
                        mine, torchs = microseconds(way(ours, tensors), way(theirs, tensors), rounds)
                        row += f"{mine:7.1f} /{torchs:5.1f} us {mine / torchs:4.2f}x "
                    print(row, flush=True)
    return 0
