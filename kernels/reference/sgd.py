"""Stochastic gradient descent, one step of one parameter, in NumPy float64.

Conventions that differ between libraries, and what torch (hence this file) does:

- The first momentum buffer *is* the first gradient: dampening begins at the second step. Elsewhere the buffer
  starts at zero, which scales the first step by ``1 - dampening``.
- The learning rate multiplies the buffer when the parameter moves: ``b = mu b + g; p -= lr b``. Sutskever et
  al., "On the importance of initialization and momentum in deep learning" (2013), keep it inside the buffer
  (``b = mu b - lr g; p += b``). The two agree until the learning rate changes.
- Weight decay is coupled: it is added to the gradient, so momentum averages it too.
- ``maximize`` flips the gradient before weight decay is added: the weights still shrink.
"""

from typing import Any

import numpy as np

State = dict[str, np.ndarray]


def step(
    param: Any,
    grad: Any,
    state: State | None = None,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[np.ndarray, State]:
    """Make one step of SGD: return the new parameter and the new state; nothing is written in place.

    With ``g`` the gradient, ``p`` the parameter and ``b`` the momentum buffer::

        g = -g                               if maximize
        g = g + weight_decay p
        b = g                                if there is no buffer yet
        b = momentum b + (1 - dampening) g   otherwise
        g = g + momentum b                   if nesterov
        g = b                                otherwise
        p = p - lr g

    With ``momentum=0`` the three lines with ``b`` are skipped and the state stays as it was.

    Shapes:
        param, grad and every array of the state: the same, any.

    Args:
        param: the parameter before the step.
        grad: the gradient of the loss with respect to it.
        state: what the previous step returned; None or empty before the first.
        lr: the learning rate of this step: a schedule passes another value each time.
        momentum: how much of the buffer is kept.
        dampening: how much of the gradient is kept out of the buffer, from the second step on.
        weight_decay: the strength of the penalty ``weight_decay / 2 * sum(p^2)``.
        nesterov: look one step of momentum ahead.
        maximize: climb instead of descend.

    Returns:
        ``(new_param, new_state)``; the state is ``{"momentum_buffer": b}`` once momentum was used, until then
        empty.

    Example:
        >>> param, state = 3.0, None
        >>> for lr in (0.1, 0.1, 0.05):
        ...     param, state = step(param, 2 * param, state, lr=lr, momentum=0.9)
    """
    p = np.asarray(param, dtype=np.float64)
    g = np.asarray(grad, dtype=np.float64)
    new_state = dict(state or {})

    if maximize:
        g = -g
    g = g + weight_decay * p
    if momentum != 0:
        if "momentum_buffer" in new_state:
            b = momentum * new_state["momentum_buffer"] + (1 - dampening) * g
        else:
            b = g
        new_state["momentum_buffer"] = np.array(b)
        g = g + momentum * b if nesterov else b
    return np.asarray(p - lr * g), new_state
