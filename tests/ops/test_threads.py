"""Small work on the CPU stays on the thread that called: a process that does nothing else never starts a second one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gradkernels.fallback.linear_mse import linear_mse_forward
from gradkernels.fallback.mse import mse_backward, mse_forward, mse_forward_backward
from gradkernels.fallback.threads import one_thread
from torch import Tensor

from ..helpers import Operators, python

TASKS = Path("/proc/self/task")  # one entry per thread of the process
SETUP = """
import os
import torch
from gradkernels import FusedAdamW, FusedSGD, linear_mse_loss, mse_loss
torch.set_num_threads(4)
def threads():
    return len(os.listdir("/proc/self/task"))
def step(optimizer, sizes=(1000,) * 60 + ((1 << 15) - 1,), dtype=torch.float32, **options):
    params = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    made = optimizer(params, lr=0.1, **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape).to(dtype)
        made.step()
before = threads()
"""
CLIPPED = "max_norm=1e-3, on_nonfinite='skip'"
SMALL = {
    "adam": "step(FusedAdamW)",
    "adam clipped": f"step(FusedAdamW, {CLIPPED})",
    "adam with masters": f"step(FusedAdamW, dtype=torch.bfloat16, master_weights=True, {CLIPPED})",
    "adam rounded at random": "step(FusedAdamW, sizes=(1000,) * 20, dtype=torch.bfloat16, stochastic_rounding=True)",
    "sgd": f"step(FusedSGD, {CLIPPED})",
    "sgd with momentum": f"step(FusedSGD, momentum=0.9, weight_decay=0.1, {CLIPPED})",
    "sgd with nesterov's": f"step(FusedSGD, momentum=0.9, nesterov=True, {CLIPPED})",
    "sgd in 16 bits": f"step(FusedSGD, momentum=0.9, dtype=torch.bfloat16, {CLIPPED})",
    "losses": """
weight, bias = torch.randn(1, 10, requires_grad=True), torch.zeros(1, requires_grad=True)
linear_mse_loss(torch.randn(354, 10), weight, torch.randn(354, 1), bias).backward()
mse_loss(torch.randn(10000, requires_grad=True), torch.randn(10000)).backward()
""",
}
LARGE = {"adam, large": "step(FusedAdamW, sizes=(1 << 15,))"}  # those that torch is given


@pytest.mark.skipif(not TASKS.is_dir(), reason="threads are counted in Linux's /proc")
def test_small_work_starts_no_threads_and_large_work_three() -> None:
    """In a process of its own, in this order."""
    code = "\n".join(f"{work}\nprint({name!r}, threads() - before)" for name, work in (SMALL | LARGE).items())
    printed = python("-c", SETUP + code).splitlines()
    assert printed == [*(f"{name} 0" for name in SMALL), *(f"{name} 3" for name in LARGE)]


def test_the_number_of_threads_is_this_threads_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 3
        with one_thread(condition=False):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def operators(call: Callable[[], object]) -> int:
    """How many of torch's operators are asked for: each may start threads, and wait for them."""
    with Operators() as asked:
        call()
    return len(asked.calls)


def test_a_loss_takes_no_more_operators_over_more_rows() -> None:
    def linear_mse(rows: int) -> Callable[[], object]:
        tensors = torch.randn(rows, 64), torch.randn(1, 64), torch.randn(rows, 1), torch.randn(1)
        return lambda: linear_mse_forward(*tensors, None, "mean", [False, True, True], torch.float32)

    def squares(numel: int) -> Callable[[], object]:
        tensors = torch.randn(numel), torch.randn(numel)
        return lambda: mse_forward_backward(*tensors, None, None, "mean", [True, False, False], torch.float32)

    def per_sample(numel: int, weight: Tensor | None, *output_mask: bool) -> Callable[[], object]:
        input, target, grad = torch.randn(64, numel // 64), torch.randn(64, numel // 64), torch.randn(64)
        if not any(output_mask):
            return lambda: mse_forward(input, target, weight, "mean", 1, torch.float32)
        return lambda: mse_backward(grad, input, target, weight, "mean", 1, [*output_mask, False])

    assert operators(linear_mse(300_000)) == operators(linear_mse(100_000))
    assert operators(squares(1 << 23)) == operators(squares(1 << 20))
    for options in (
        (None, False, False),
        (None, True, False),
        (None, False, True),
        (torch.rand(64, 1), True, True),
    ):
        assert operators(per_sample(1 << 23, *options)) == operators(per_sample(1 << 20, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [1 << 19, (1 << 21) + 1, (1 << 22) - 1])
def test_many_squares_are_exact_and_finite_only_where_all_are(numel: int, dtype: torch.dtype) -> None:
    input, target = (torch.randn(numel, dtype=dtype) for _ in range(2))
    exact = (input.double() - target.double()).square()
    for reduction, expected in (("mean", exact.mean()), ("sum", exact.sum())):
        loss = mse_forward(input, target, None, reduction, 0, dtype)
        assert abs(loss.double() - expected) <= 4 * torch.finfo(dtype).eps * expected
        assert torch.equal(loss, mse_forward(input, target, None, reduction, 0, dtype))
    for samples in (4, 3):  # of whole rows or not
        shape = (samples, numel // samples)
        x, y, squares = (tensor[: shape[0] * shape[1]].view(shape) for tensor in (input, target, exact))
        for reduction, expected in (("mean", squares.mean(1)), ("sum", squares.sum(1))):
            losses = mse_forward(x, y, None, reduction, 1, dtype)
            assert ((losses.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * expected).all()
    for place in (0, numel // 2, -1):
        bad = input.clone()
        bad[place] = float("nan")
        assert mse_forward(bad, target, None, "mean", 0, dtype).isnan()
        bad[place] = float("inf")
        assert mse_forward(bad, target, None, "mean", 0, dtype) == float("inf")
