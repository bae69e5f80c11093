"""The third power in NumPy float64."""

from numpy.typing import ArrayLike

from .precision import Array, wide


def forward(input: ArrayLike) -> Array:
    """``input^3``."""
    return wide(input) ** 3


def backward(grad_output: ArrayLike, input: ArrayLike) -> tuple[Array]:
    """``3 g input^2``."""
    return (3 * wide(grad_output) * wide(input) ** 2,)
