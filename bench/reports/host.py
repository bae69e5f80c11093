"""Measure what a call costs the host, beside torch's own: ``python -m bench host``.

CPU time of one thread, the best of several rounds, on tensors so small that arithmetic hardly counts; ours and
torch's in one process, round by round. The backward runs on that thread too: to wake a device's own costs 20 to 100 us,
as the machine has it, whatever the op. Where there is no GPU the kernels are not launched: what is left is all
that stands between a call and its launch (which is 2 to 4 us more).

``--steps`` measures steps of the optimizers in place of calls, over so many tensors of 10 elements that keep their
gradients: ours on the backend that serves the device, beside torch's with ``fused=True``. On a CPU torch's arithmetic
is in it.
"""

import argparse
import gc
import importlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from gradkernels.verify.console import count
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


def step(optimizer: type[torch.optim.Optimizer], tensors: int, device: str, **options: Any) -> Call:
    """Make a step that is not the first."""
    params = [torch.nn.Parameter(torch.randn(10, device=device)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.randn_like(param)
    made = optimizer(params, lr=1e-3, **options)  # type: ignore[call-arg]
    for _ in range(3):
        made.step()
    return made.step


def microseconds(ours: Call, theirs: Call, rounds: int, calls: int | None = None) -> tuple[float, float]:
    """Return the CPU time of a call of each."""
    calls = CALLS if calls is None else calls
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, call in enumerate((ours, theirs)):
            start = time.process_time_ns()
            for _ in range(calls):
                call()
            best[i] = min(best[i], time.process_time_ns() - start)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a full queue would hold up the host
    return best[0] / calls / 1000, best[1] / calls / 1000


def ratio(mine: float, torchs: float) -> str:
    """Show two times and how many times torch's ours is."""
    return f"{mine:7.1f} /{torchs:5.1f} us {mine / torchs:4.2f}x "


def no_launch(*args: object, **options: object) -> None:
    """Replace the launch of a kernel."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench host", description=__doc__)
    parser.add_argument("--rounds", type=count, default=ROUNDS)
    parser.add_argument("--steps", type=count, nargs="+", metavar="TENSORS", default=[])
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    if options.steps:
        steps(options.steps, options.rounds, device)
    else:
        with torch.autograd.set_multithreading_enabled(False):
            calls_of_ops(options.rounds, device)
    return 0


def steps(sizes: Sequence[int], rounds: int, device: str) -> None:
    """Print the cost of steps."""
    from gradkernels import FusedAdam, FusedSGD

    for name, ours, theirs, options in (
        ("SGD", FusedSGD, torch.optim.SGD, {}),
        ("SGD, momentum", FusedSGD, torch.optim.SGD, {"momentum": 0.9}),
        ("Adam", FusedAdam, torch.optim.Adam, {}),
    ):
        for size in sizes:
            pair = step(ours, size, device, **options), step(theirs, size, device, fused=True, **options)
            gc.collect()
            gc.disable()  # as timeit does
            times = microseconds(*pair, rounds, max(1, CALLS // size))
            gc.enable()
            print(f"{name:17}{size:8}  {ratio(*times)}", flush=True)


def calls_of_ops(rounds: int, device: str) -> None:
    """Print the cost of the ops' calls."""
    from gradkernels import use_backend
    from gradkernels.ops import FUNCTIONS

    modules = [importlib.import_module(f"..bench_{name}", __package__) for name in FUNCTIONS]
    calls = [call for module in modules for call in getattr(module, "HOST_CALLS", ())]
    print(f"{'ours / torch':27}{'forward':>25}{'forward + backward':>25}")
    with ExitStack() as stack:
        for op in () if device == "cuda" else FUNCTIONS:
            module = importlib.import_module(f"gradkernels.triton.{op}")
            stack.enter_context(mock.patch.object(module, "launch", no_launch))
        for backend in ("fallback", "triton"):
            with use_backend(backend):
                for call in calls:
                    tensors = [torch.randn(shape, device=device) for shape in call.shapes]
                    row = f"{call.name:17}{backend:10}"
                    for way in (forward, both):
                        row += ratio(
                            *microseconds(way(call.ours, tensors), way(call.theirs, tensors), rounds)
                        )
                    print(row, flush=True)
