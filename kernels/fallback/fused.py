"""torch's fused SGD and Adam, by the records that hold an optimizer's options."""

import torch
from torch import Tensor

from ..optim.bucket import AdamOptions, SGDOptions


def sgd(
    options: SGDOptions,
    params: list[Tensor],
    grads: list[Tensor],
    states: dict[str, list[Tensor]],
    scale: Tensor | None = None,
    skip: bool | Tensor | None = None,
) -> None:
    """Update ``params`` and ``states`` in place; on the CPU not of 16 bits, whole blocks of which it leaves as they are
    up to torch 2.13 (pytorch#191763).

    Args:
        options: the rate may be a tensor on the parameters' device.
        params: what is updated.
        grads: divided by ``scale`` in place.
        states: ``momentum_buffer``, or none. A fresh one is 0.
        scale: 0-d, or None for 1.
        skip: a tensor that says whether nothing is to be done.
    """
    torch._fused_sgd_(
        params,
        grads,
        states.get("momentum_buffer", []),
        weight_decay=float(options.weight_decay),
        momentum=float(options.momentum),
        lr=_rate(options.lr),
        dampening=options.dampening,
        nesterov=options.nesterov,
        maximize=options.maximize,
        is_first_step=False,
        grad_scale=scale,
        found_inf=skip.float() if isinstance(skip, Tensor) else None,
    )


def adam(
    options: AdamOptions,
    params: list[Tensor],
    grads: list[Tensor],
    states: dict[str, list[Tensor]],
    scale: Tensor | None = None,
    skip: bool | Tensor | None = None,
) -> None:
    """Update like ``sgd``; the states are ``exp_avg``, ``exp_avg_sq``, ``step``, which counts this update, and perhaps
    ``max_exp_avg_sq``."""
    update = torch._fused_adamw_ if options.decoupled else torch._fused_adam_
    update(
        params,
        grads,
        states["exp_avg"],
        states["exp_avg_sq"],
        states.get("max_exp_avg_sq", []),
        states["step"],
        amsgrad="max_exp_avg_sq" in states,
        lr=_rate(options.lr),
        beta1=float(options.beta1),
        beta2=float(options.beta2),
        weight_decay=float(options.weight_decay),
        eps=options.eps,
        maximize=options.maximize,
        grad_scale=scale,
        found_inf=skip.float() if isinstance(skip, Tensor) else None,
    )


def _rate(lr: float | Tensor) -> float | Tensor:
    return lr if isinstance(lr, Tensor) and not lr.is_cpu else float(lr)
