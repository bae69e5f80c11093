"""warmup: what it launches, and where it does nothing; that a call then loads nothing: tests/host."""

from contextlib import nullcontext

import gradkernels
import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("op", "shapes"),
    [("matmul", [(2**40, 8), (8, 2**40)]), ("mse", [(2**50,), (2**50,)]), ("adam", [(2**50,)])],
)
def test_elsewhere_there_is_nothing_to_do(op, shapes):
    """No machine has the memory for these, nor the time."""
    with gradkernels.use_backend("fallback"):
        gradkernels.warmup(op, shapes, torch.float32, "cpu")


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_it_launches_what_the_calls_launch(monkeypatch, mode):
    """Without gradients and with their backward; under the interpreter there is nothing to compile, but all runs."""
    from gradkernels.triton import mse

    launched: list[str] = []
    real = mse.launch

    def launch(kernel, *args, **options):
        launched.append(kernel.__name__)
        real(kernel, *args, **options)

    monkeypatch.setattr(mse, "launch", launch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with gradkernels.use_backend("triton"):
        with mode():
            gradkernels.warmup("mse", [(5000,), (5000,)], torch.float64, device)
        ahead = list(launched)
        input, target = (torch.ones(5000, dtype=torch.float64, device=device) for _ in range(2))
        gradkernels.mse_loss(input, target)
        gradkernels.mse_loss(input.requires_grad_(), target).backward()
    assert ahead == launched[len(ahead) :]
    assert {"_mse_forward_kernel", "_mse_backward_kernel"} <= set(ahead)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lu", [(2, 3)]), "unknown op 'lu'; expected one of 'matmul', 'mse', 'linear_mse_models', "),
        (("matmul", [(2, 3)]), r"matmul takes 2 or 3 shapes, got 1: \[\(2, 3\)\]"),
        (("mse", [(2, 3)]), "mse takes 2 shapes, got 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        gradkernels.warmup(*arguments, torch.float32, "cpu")
