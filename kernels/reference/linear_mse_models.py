"""The squared errors of a batch of linear models, in NumPy float64: each model by itself.

    loss[b] = linear_mse(input of b, weight[b], target of b, bias[b], sample_weight of b)

Shapes: weight ``(B, K, D)``, bias ``(B, K)``; input ``(B, N, D)`` or ``(N, D)``, target ``(B, N, K)`` or ``(N, K)``,
sample_weight ``(B, N)``, ``(B, N, K)``, ``(N,)`` or ``(N, K)``, taken in this order. With offsets ``(B + 1,)``: input
``(R, D)``, target ``(R, K)``, sample_weight ``(R,)`` or ``(R, K)``, and model b has rows offsets[b]:offsets[b + 1].
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import linear_mse
from .precision import Array, wide


def forward(
    input: ArrayLike,
    weight: ArrayLike,
    target: ArrayLike,
    bias: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    reduction: str = "mean",
    offsets: ArrayLike | None = None,
) -> Array:
    """Return the losses ``(B,)``; for ``"none"`` ``(B, N, K)``, or ``(R, K)`` with 0 in rows of no model.

    Raises:
        ValueError: the shapes do not fit together, or ``reduction`` is none of the three.

    Example:
        >>> forward([[2, 1]], [[[2, 2]], [[1, 2]]], [[5]])
        array([1., 1.])
    """
    arrays = _arrays(input, weight, target, bias, sample_weight)
    B, K, _ = arrays[1].shape
    losses = []
    for places in _places(arrays, offsets):
        x, w, y, b, s = _of(arrays, places)
        losses.append(linear_mse.forward(x, w, y, b, s, reduction))
    if reduction != "none":
        return np.array(losses, dtype=arrays[0].dtype).reshape(B)
    if offsets is None:
        return np.array(losses, dtype=arrays[0].dtype).reshape(B, arrays[0].shape[-2], K)
    result = np.zeros_like(arrays[2])
    for (places, *_), loss in zip(_places(arrays, offsets), losses, strict=True):
        result[places] = loss
    return result


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
    """Return the gradients of ``sum(grad_output * forward(...))``; what models share has the sum of theirs.

    Returns:
        ``(grad_input, grad_weight, grad_target, grad_bias, grad_sample_weight)``, None for what is absent.
    """
    arrays = _arrays(input, weight, target, bias, sample_weight)
    grads = [None if array is None else np.zeros_like(array) for array in arrays]
    upstream = wide(grad_output)
    for model, places in enumerate(_places(arrays, offsets)):
        of_rows = reduction == "none" and offsets is not None
        given = upstream[places[0] if of_rows else model]
        x, w, y, b, s = _of(arrays, places)
        found = linear_mse.backward(given, x, w, y, b, s, reduction)
        if found[2].shape[0] == 0:
            continue  # the mean of nothing is nan, and changes with nothing
        for grad, place, part in zip(grads, places, found, strict=True):
            if grad is not None:
                grad[place] += part
    grad_input, grad_weight, grad_target, grad_bias, grad_sample_weight = grads
    assert grad_input is not None
    assert grad_weight is not None
    assert grad_target is not None
    return grad_input, grad_weight, grad_target, grad_bias, grad_sample_weight


def _arrays(*values: ArrayLike | None) -> list[Any]:
    return [None if value is None else wide(value) for value in values]


def _of(arrays: list[Any], places: list[Any]) -> list[Any]:
    return [None if array is None else array[place] for array, place in zip(arrays, places, strict=True)]


def _places(arrays: list[Any], offsets: ArrayLike | None) -> list[list[Any]]:
    """Return where each model's part of each array is: of input, weight, target, bias and sample_weight."""
    input, weight, target, _, samples = arrays
    B, K, _ = weight.shape
    if offsets is not None:
        starts = np.asarray(offsets)
        if starts.shape != (B + 1,):
            raise ValueError(f"offsets must have shape {(B + 1,)}, got {starts.shape}")
        rows = [slice(starts[b], starts[b + 1]) for b in range(B)]
        return [[rows[b], b, rows[b], b, rows[b]] for b in range(B)]
    N = input.shape[-2]
    if (input.ndim == 3 and len(input) != B) or target.shape not in ((B, N, K), (N, K)):
        raise ValueError(f"input {input.shape}, weight {weight.shape} and target {target.shape} do not fit")
    of_models = samples is not None and (samples.shape == (B, N) or samples.ndim == 3)
    every = slice(None)
    return [
        [
            b if input.ndim == 3 else every,
            b,
            b if target.ndim == 3 else every,
            b,
            b if of_models else every,
        ]
        for b in range(B)
    ]
