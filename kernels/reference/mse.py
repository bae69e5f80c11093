"""The squared error and its gradients, in NumPy float64.

With ``e = input - target``, ``w = weight`` (ones if there is none) and ``W`` the sum of ``w``:

    none:  loss_i = w_i e_i^2
    sum:   loss   = sum_i w_i e_i^2
    mean:  loss   = sum_i w_i e_i^2 / W

input, target and weight have one shape: nothing is broadcast. The mean of nothing is NaN, and non-finite
numbers travel on without a warning, as in torch.
"""

import numpy as np
from numpy.typing import ArrayLike

from .precision import Array, wide


@np.errstate(all="ignore")
def forward(
    input: ArrayLike, target: ArrayLike, weight: ArrayLike | None = None, reduction: str = "mean"
) -> Array:
    """The (weighted) squared error.

    Shapes: input's for ``"none"``, otherwise ``()``.

    Raises:
        ValueError: the shapes differ, or ``reduction`` is none of the three.

    Example:
        >>> forward([1, 2], [3, 2])
        array(2.)
    """
    error, weight, share = _parts(input, target, weight, reduction)
    loss = weight * error**2
    return np.asarray(loss if reduction == "none" else loss.sum() * share)


@np.errstate(all="ignore")
def backward(
    grad_output: ArrayLike,
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
) -> tuple[Array, Array, Array | None]:
    """The gradients of ``sum(grad_output * forward(input, target, weight, reduction))``.

    With ``g = grad_output`` and ``c`` = ``1 / W`` for the mean, otherwise 1:

        grad_input  =  2 c g w e
        grad_target = -2 c g w e
        grad_weight =    c g e^2                  (mean: c g (e^2 - loss), as W depends on the weights)

    Shapes: grad_output has the loss's; each result has input's.

    Returns:
        ``(grad_input, grad_target, grad_weight)``, the last None where there is no weight.
    """
    weighted = weight is not None
    error, weight, share = _parts(input, target, weight, reduction)
    grad_loss = share * wide(grad_output)
    grad_input = 2 * grad_loss * weight * error
    grad_weight = None
    if weighted:
        loss = forward(input, target, weight) if reduction == "mean" else 0.0
        grad_weight = np.asarray(grad_loss * (error**2 - loss))
    return np.asarray(grad_input), np.asarray(-grad_input), grad_weight


def _parts(
    input: ArrayLike, target: ArrayLike, weight: ArrayLike | None, reduction: str
) -> tuple[Array, Array, float]:
    """The errors, the weights, and what one weighted squared error counts in the loss."""
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    input, target = wide(input), wide(target)
    weight = np.ones_like(input) if weight is None else wide(weight)
    for name, array in (("target", target), ("weight", weight)):
        if array.shape != input.shape:
            raise ValueError(f"{name} must have input's shape {input.shape}, got {array.shape}")
    return input - target, weight, 1.0 / weight.sum() if reduction == "mean" else 1.0
