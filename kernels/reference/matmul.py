"""The matrix product and its gradients, in NumPy float64.

    output = input @ other + bias

Shapes, as in ``torch.matmul``: input ``(*A, M, K)`` or ``(K,)``, other ``(*B, K, N)`` or ``(K,)``; the batch
dimensions ``*A`` and ``*B`` broadcast, and a vector's missing dimension is missing from the output too. bias
is ``(N,)``, or one element where other is a vector.
"""

import numpy as np
from numpy.typing import ArrayLike

from .precision import Array, sum_to, wide


@np.errstate(all="ignore")
def forward(input: ArrayLike, other: ArrayLike, bias: ArrayLike | None = None) -> Array:
    """Return ``input @ other + bias``.

    Shapes: output ``(*batch, M, N)``, without ``M`` where input is a vector and without ``N`` where other is.

    Raises:
        ValueError: the shapes do not fit together.

    Example:
        >>> forward([[1, 2], [3, 4]], [[10], [100]], [5])
        array([[215.],
               [435.]])
    """
    input, other = wide(input), wide(other)
    output = np.matmul(input, other)
    if bias is not None:
        output = output + wide(bias).reshape(other.shape[1:][-1:])
    return np.asarray(output)


@np.errstate(all="ignore")
def backward(
    grad_output: ArrayLike, input: ArrayLike, other: ArrayLike, bias: ArrayLike | None = None
) -> tuple[Array, Array, Array | None]:
    """Return the gradients of ``sum(grad_output * forward(input, other, bias))``.

        grad_input = grad_output @ other^T        (summed over the batch dimensions that broadcast input)
        grad_other = input^T @ grad_output        (summed over those that broadcast other)
        grad_bias  = grad_output summed over all dimensions but the last

    Shapes: grad_output has the output's; each result has its argument's.

    Returns:
        ``(grad_input, grad_other, grad_bias)``, the last None where there is no bias.
    """
    input, other, grad = wide(input), wide(other), wide(grad_output)
    rows = input[np.newaxis, :] if input.ndim == 1 else input
    columns = other[:, np.newaxis] if other.ndim == 1 else other
    if other.ndim == 1:
        grad = np.expand_dims(grad, -1)
    if input.ndim == 1:
        grad = np.expand_dims(grad, -2)
    # From here on all three are matrices, or batches of them.
    grad_input = sum_to(grad @ np.swapaxes(columns, -1, -2), rows.shape).reshape(input.shape)
    grad_other = sum_to(np.swapaxes(rows, -1, -2) @ grad, columns.shape).reshape(other.shape)
    if bias is None:
        return grad_input, grad_other, None
    grad_bias = grad.sum(axis=tuple(range(grad.ndim - 1)))
    return grad_input, grad_other, grad_bias.reshape(np.shape(bias))
