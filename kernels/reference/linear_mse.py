"""The squared error of a linear prediction and its gradients, in NumPy float64.

    prediction = input @ weight^T + bias
    loss       = mse(prediction, target, sample_weight)

Shapes: input ``(*, D)``; weight ``(K, D)``, bias ``(K,)``, target ``(*, K)``, or, for a single output,
weight ``(D,)``, bias of one element, target ``(*)``. sample_weight has target's shape, or ``(*)``: then it
weighs all outputs of a sample alike, and the mean divides by its sum over all elements of target.

A weight ``(B, K, D)`` is a batch of models: linear_mse_models.py.
"""

import numpy as np
from numpy.typing import ArrayLike

from . import matmul, mse
from .precision import Array


@np.errstate(all="ignore")
def forward(
    input: ArrayLike,
    weight: ArrayLike,
    target: ArrayLike,
    bias: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: str = "mean",
    offsets: ArrayLike | None = None,
) -> Array:
    """Return the (weighted) squared error of ``input @ weight^T + bias`` against ``target``.

    Shapes: target's for ``"none"``, otherwise ``()``.

    Raises:
        ValueError: the shapes do not fit together, or ``reduction`` is none of the three.

    Example:
        >>> forward([[2, 1]], [2, 2], [5])
        array(1.)
    """
    if np.ndim(weight) == 3:
        from . import linear_mse_models  # which builds on this module

        return linear_mse_models.forward(input, weight, target, bias, sample_weight, reduction, offsets)
    prediction = matmul.forward(input, np.transpose(weight), bias)
    return mse.forward(prediction, target, _per_element(sample_weight, weight, prediction), reduction)


@np.errstate(all="ignore")
def backward(
    grad_output: ArrayLike,
    input: ArrayLike,
    weight: ArrayLike,
    target: ArrayLike,
    bias: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: str = "mean",
    offsets: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Return the gradients of ``sum(grad_output * forward(...))``, by the chain rule through the prediction.

    With ``E = d loss / d prediction``, which for the plain mean is
    ``2 / (N K) * grad_output * (prediction - target)``:

        grad_input  = E @ weight
        grad_weight = E^T @ input
        grad_target = -E
        grad_bias   = E summed over the samples

    Shapes: grad_output has the loss's; each result has its argument's.

    Returns:
        ``(grad_input, grad_weight, grad_target, grad_bias, grad_sample_weight)``, None for what is absent.
    """
    if np.ndim(weight) == 3:
        from . import linear_mse_models

        return linear_mse_models.backward(
            grad_output, input, weight, target, bias, sample_weight, reduction, offsets
        )
    columns = np.transpose(weight)
    prediction = matmul.forward(input, columns, bias)
    per_element = _per_element(sample_weight, weight, prediction)
    error, grad_target, grad_per_element = mse.backward(
        grad_output, prediction, target, per_element, reduction
    )
    grad_input, grad_columns, grad_bias = matmul.backward(error, input, columns, bias)
    grad_sample_weight = None
    if sample_weight is not None and grad_per_element is not None:
        per_sample = np.ndim(sample_weight) < prediction.ndim
        grad_sample_weight = np.asarray(grad_per_element.sum(axis=-1)) if per_sample else grad_per_element
    return grad_input, grad_columns.T, grad_target, grad_bias, grad_sample_weight


def _per_element(sample_weight: ArrayLike | None, weight: ArrayLike, prediction: Array) -> ArrayLike | None:
    """Return one weight per element of the prediction, where there is one per sample."""
    if np.ndim(weight) < 2 or sample_weight is None or np.shape(sample_weight) != prediction.shape[:-1]:
        return sample_weight
    return np.broadcast_to(np.expand_dims(sample_weight, -1), prediction.shape)
