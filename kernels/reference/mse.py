"""The squared error and its gradients, in NumPy float64.

With ``e = input - target``, ``w = weight`` (ones if there is none) broadcast to input's shape, and sums over ``dim``
(all dimensions by default), ``W`` the sum of ``w``:

    none:  loss_i = w_i e_i^2
    sum:   loss   = sum_i w_i e_i^2
    mean:  loss   = sum_i w_i e_i^2 / W;  NaN where W is 0

input and target have one shape: neither is broadcast. The mean of nothing is NaN, and non-finite numbers travel on
without a warning, as in torch.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .precision import Array, sum_to, wide

Dim = int | Sequence[int] | None


@np.errstate(all="ignore")
def forward(
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    dim: Dim = None,
) -> Array:
    """Return the (weighted) squared error.

    Shapes: input's for ``"none"``, otherwise input's without ``dim``.

    Raises:
        ValueError: the shapes differ, ``reduction`` is none of the three, or ``dim`` is given with ``"none"``, is out
            of range (an IndexError too) or names a dimension twice.

    Example:
        >>> forward([1, 2], [3, 2])
        array(2.)
    """
    error, weight, axes = _parts(input, target, weight, reduction, dim)
    loss = weight * error**2
    if reduction == "none":
        return np.asarray(loss)
    total = loss.sum(axis=axes)
    return np.asarray(total / _counts(weight, axes).squeeze(axes) if reduction == "mean" else total)


@np.errstate(all="ignore")
def backward(
    grad_output: ArrayLike,
    input: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    dim: Dim = None,
) -> tuple[Array, Array, Array | None]:
    """Return the gradients of ``sum(grad_output * forward(input, target, weight, reduction, dim))``.

    With ``g = grad_output`` and ``c`` = ``1 / W`` for the mean, otherwise 1:

        grad_input  =  2 c g w e
        grad_target = -2 c g w e
        grad_weight =    c g e^2, added up over what the weight was broadcast to
                                                  (mean: c g (e^2 - loss), as W depends on the weights)

    Shapes: grad_output has the loss's; each result has its operand's.

    Returns:
        ``(grad_input, grad_target, grad_weight)``, the last None where there is no weight.
    """
    given = None if weight is None else np.shape(weight)
    error, weight, axes = _parts(input, target, weight, reduction, dim)
    grad_loss, loss = wide(grad_output), np.zeros(())
    if reduction != "none":
        grad_loss = np.expand_dims(grad_loss, axes)
    if reduction == "mean":
        counts = _counts(weight, axes)
        grad_loss = grad_loss / counts
        loss = (weight * error**2).sum(axis=axes, keepdims=True) / counts
    grad_input = 2 * grad_loss * weight * error
    grad_weight = None if given is None else sum_to(grad_loss * (error**2 - loss), given)
    return np.asarray(grad_input), np.asarray(-grad_input), grad_weight


def _parts(
    input: ArrayLike, target: ArrayLike, weight: ArrayLike | None, reduction: str, dim: Dim
) -> tuple[Array, Array, tuple[int, ...]]:
    """Return the errors, the weights of each, and the axes that are added up."""
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if reduction == "none" and dim is not None:
        raise ValueError(f"reduction 'none' has no dim, got {dim}")
    input, target = wide(input), wide(target)
    if target.shape != input.shape:
        raise ValueError(f"target must have input's shape {input.shape}, got {target.shape}")
    weight = wide(1.0) if weight is None else wide(weight)
    try:
        weight = np.broadcast_to(weight, input.shape)
    except ValueError:
        raise ValueError(f"weight {weight.shape} does not broadcast to input's shape {input.shape}") from None
    given = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    if not input.ndim and given not in ((), (0,), (-1,)):  # torch takes a number for a vector here
        raise np.exceptions.AxisError(f"axis {dim} of a number")
    return input - target, weight, (given if input.ndim else ()) or tuple(range(input.ndim))


def _counts(weight: Array, axes: tuple[int, ...]) -> Array:
    """Return the weights' sums over ``axes``, which are kept with size 1; NaN where one is 0."""
    total = weight.sum(axis=axes, keepdims=True)
    return np.where(total == 0, np.nan, total)
