"""Adam and AdamW, one step of one parameter, in NumPy float64.

Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015); Loshchilov and Hutter, "Decoupled Weight
Decay Regularization" (2019); for amsgrad, Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond"
(2018).

Conventions that differ between libraries, and what torch (hence this file) does:

- ``eps`` is added *outside* the root and *after* the bias correction: ``sqrt(v / (1 - beta2^t)) + eps``.
  Inside the root, or before the correction ("epsilon hat" in the first paper), it means something else.
- Adam's weight decay is coupled: added to the gradient, so the moments see it. AdamW's is decoupled: the
  parameter shrinks by ``1 - lr weight_decay`` *before* the step. (The second paper scales the decay by the
  schedule's factor alone, not by the learning rate.)
- amsgrad keeps the maximum of the *uncorrected* second moment and corrects its bias afterwards. (The third
  paper has no bias correction at all.)
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
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> tuple[np.ndarray, State]:
    """Make one step of Adam, or of AdamW: return the new parameter and the new state; nothing is written in place.

    With ``g`` the gradient, ``p`` the parameter, ``m`` and ``v`` the moments (zero before step ``t = 1``)::

        g = -g                                   if maximize
        p = p - lr weight_decay p                if decoupled_weight_decay
        g = g + weight_decay p                   otherwise
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        w = max(w, v)                            if amsgrad, else w = v
        p = p - lr (m / (1 - beta1^t)) / (sqrt(w / (1 - beta2^t)) + eps)

    Shapes:
        param, grad and every array of the state but ``step``: the same, any.

    Args:
        param: the parameter before the step.
        grad: the gradient of the loss with respect to it.
        state: what the previous step returned; None or empty before the first.
        lr: the learning rate of this step: a schedule passes another value each time.
        betas: how much of the first and of the second moment is kept.
        eps: added to the root, in the unit of the gradient.
        weight_decay: coupled, the strength of the penalty ``weight_decay / 2 * sum(p^2)``; decoupled, the
            share of the parameter that goes per unit of learning rate.
        amsgrad: divide by the largest second moment so far.
        maximize: climb instead of descend.
        decoupled_weight_decay: AdamW instead of Adam. (torch.optim.AdamW's default weight_decay is 1e-2.)

    Returns:
        ``(new_param, new_state)``; the state is ``{"step": t, "exp_avg": m, "exp_avg_sq": v}``, and with
        amsgrad also ``"max_exp_avg_sq": w``.

    Example:
        >>> param, state = 3.0, None
        >>> for lr in (0.1, 0.1, 0.05):
        ...     param, state = step(param, 2 * param, state, lr=lr)
    """
    p = np.asarray(param, dtype=np.float64)
    g = np.asarray(grad, dtype=np.float64)
    old = state or {}
    zeros = np.zeros_like(p)
    beta1, beta2 = betas
    t = old.get("step", np.asarray(0.0)) + 1

    if maximize:
        g = -g
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    m = beta1 * old.get("exp_avg", zeros) + (1 - beta1) * g
    v = beta2 * old.get("exp_avg_sq", zeros) + (1 - beta2) * g**2
    new_state = {"step": np.asarray(t), "exp_avg": np.asarray(m), "exp_avg_sq": np.asarray(v)}
    w = v
    if amsgrad:
        w = np.maximum(old.get("max_exp_avg_sq", zeros), v)
        new_state["max_exp_avg_sq"] = np.asarray(w)
    p = p - lr * (m / _correction(beta1, t)) / (np.sqrt(w / _correction(beta2, t)) + eps)
    return np.asarray(p), new_state


def _correction(beta: float, t: Any) -> Any:
    """Return ``1 - beta^t`` as ``(1 - beta) (1 + beta + ... + beta^(t-1))``: the difference would lose three digits."""
    return (1 - beta) * np.sum(beta ** np.arange(t))
