"""The training loop of one linear model, in NumPy float64: predict, loss, gradient, guard, clip, update.

A batch of models is this loop once for each of them, with its own rows and options.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import linear_mse
from .precision import Array

Step = Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]


@np.errstate(all="ignore")
def fit(
    input: ArrayLike,
    weight: ArrayLike,
    target: ArrayLike,
    bias: ArrayLike | None = None,
    sample_weight: ArrayLike | None = None,
    *,
    step: Step,
    steps: int,
    batch_size: int | None = None,
    max_norm: float | None = None,
    skip_nonfinite: bool = False,
    active: bool = True,
    **options: Any,
) -> tuple[Array, list[Array], list[dict[str, Array]]]:
    """Run ``steps`` rounds over the rows ``(t batch_size + i) % N`` for ``i < batch_size``, or over all rows.

    A round is::

        loss = mean of the squared errors, by sample_weight
        g = its gradient
        g = g min(1, max_norm / (norm of g + 1e-6))     if max_norm
        param = step(param, g)                          unless not active, or skip_nonfinite and g is not finite

    Shapes:
        input ``(N, D)``; weight ``(K, D)`` or ``(D,)``, target ``(N, K)`` or ``(N,)``, bias ``(K,)`` or one element;
        sample_weight ``(N,)`` or target's. Losses: ``(steps,)``.

    Args:
        input: the features; N may be 0, which gives nan losses and gradients 0.
        weight: the weights before the first round.
        target: what is to be predicted.
        bias: the bias before the first round.
        sample_weight: the mean divides by the sum of these over the round's elements.
        step: ``reference.sgd.step`` or ``reference.adam.step``.
        steps: how many rounds.
        batch_size: rows of a round, 1 to N.
        max_norm: clips the norm over weight and bias.
        skip_nonfinite: a round whose gradient is not finite updates nothing.
        active: whether the model is trained at all.
        options: of ``step``, such as ``lr``.

    Returns:
        ``(losses, [weight, bias], [state of the weight, of the bias])``; without bias lists of one. Each loss is
        that of the parameters before the round's update.

    Example:
        >>> fit([[2.0]], [3.0], [5.0], step=sgd.step, lr=0.1, steps=2)[0]
        array([1.  , 0.04])
    """
    x, y = np.asarray(input, dtype=np.float64), np.asarray(target, dtype=np.float64)
    s = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    params = [np.asarray(p, dtype=np.float64) for p in (weight, bias) if p is not None]
    states: list[dict[str, Array]] = [{} for _ in params]
    losses = np.empty(steps)
    count = len(x) if batch_size is None else batch_size
    for t in range(steps):
        rows = [(t * count + i) % len(x) for i in range(count)]
        batch = x[rows], params[0], y[rows], params[1] if bias is not None else None
        weights = None if s is None else s[rows]
        losses[t] = linear_mse.forward(*batch, weights)
        _, grad_weight, _, grad_bias, _ = linear_mse.backward(1.0, *batch, weights)
        grads = [grad for grad in (grad_weight, grad_bias) if grad is not None]
        finite = all(np.isfinite(grad).all() for grad in grads)
        if not active or (skip_nonfinite and not finite):
            continue
        if max_norm is not None:
            norm = np.sqrt(sum(np.sum(grad**2) for grad in grads))
            grads = [grad * np.minimum(1.0, max_norm / (norm + 1e-6)) for grad in grads]
        for i, grad in enumerate(grads):
            params[i], states[i] = step(params[i], grad, states[i], **options)
    return losses, params, states
