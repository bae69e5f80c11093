"""The third power in plain torch."""

from torch import Tensor

from ..checks import acc_dtype


def cube_forward(input: Tensor) -> Tensor:
    """``input^3``."""
    return (input.to(acc_dtype(input)) ** 3).to(input.dtype)


def cube_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    """``3 g input^2``."""
    return (3 * grad_output * input.to(acc_dtype(input)) ** 2).to(input.dtype)
