"""FusedSGD: torch.optim.SGD in one launch over all parameters."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _device_dtype_check_for_fused
from torch.optim.sgd import sgd
from typing_extensions import Unpack  # of torch's own requirements; typing has it from Python 3.11 on

from .optim.bucket import SGDOptions
from .optim.plan import local_part
from .optim.step import FusedStep, SharedOptions

_SGD = torch.optim.SGD  # a user may put FusedSGD under that name


class FusedSGD(FusedStep, torch.optim.SGD):
    """torch.optim.SGD in one launch per device, set of dtypes and use of momentum, for any number of parameters.

    With ``g`` the gradient, ``p`` the parameter and ``b`` the momentum buffer::

        g = -g                               if maximize
        g = g + weight_decay p
        b = g                                at the parameter's first step
        b = momentum b + (1 - dampening) g   later
        g = g + momentum b                   if nesterov
        g = b                                otherwise
        p = p - lr g

    With ``momentum=0`` the lines with ``b`` are left out. It computes in float32 (float64 for float64) and rounds
    once, except for 16-bit parameters on a CPU, which torch's own loop updates, rounding after each operation.
    All else, state_dict included, is as in torch. Sparse gradients, complex parameters and
    ``differentiable=True`` go through torch's own loop.

    Args:
        params: float64, float32, float16 or bfloat16 parameters, or groups of them, as for torch.optim.SGD.
        lr: learning rate; a float32 0-d tensor on the parameters' device is read by the kernel, so that a
            captured graph or compiled step follows its changes. Likewise ``weight_decay``.
        momentum, dampening, weight_decay, nesterov, maximize, differentiable: as in torch.optim.SGD.
        foreach, fused: checked as in torch, but select no implementation; with ``fused=True`` GradScaler leaves
            overflow to the step, which then does not wait for the device, as in torch.
        capturable: whether a CUDA graph may capture the step.
        max_norm, on_nonfinite, master_weights, stochastic_rounding, seed, norm_group: as for FusedAdam; the count
            of updates that random rounding needs is kept in ``state["step"]``.
        stacked, lr_scale: as for FusedAdam; ``lr``, ``momentum`` and ``weight_decay`` may be tensors (B,). Beside a
            momentum buffer ``state["step"]`` counts each model's steps with momentum, since the first one is not
            dampened. A model whose momentum is 0 moves by its gradient and leaves buffer and step as they are. With
            ``stochastic_rounding`` its step still rises, since the random numbers depend on it: a momentum that is
            raised from 0 later is then dampened from its first step on.

    Raises:
        ValueError, RuntimeError: what torch.optim.SGD raises, in its words; ``max_norm`` below 0, an unknown
            ``on_nonfinite``, ``master_weights`` together with ``stochastic_rounding``, ``norm_group`` with ``stacked``.

    Example:
        >>> optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=1.0)
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()
    """

    _operator = "sgd"
    _torch_class = _SGD
    _state_keys = ("momentum_buffer", "step", "master_param")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **shared: Unpack[SharedOptions],
    ) -> None:
        rates = self._take_rates(shared, lr=lr, momentum=momentum, weight_decay=weight_decay)
        _SGD.__init__(
            self,
            params,
            dampening=dampening,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            **rates,
        )
        self.capturable = capturable
        self._set_options(**shared)

    def _capturable(self) -> bool:
        return self.capturable

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "capturable": self.capturable}

    def state_dict(self) -> dict[str, Any]:
        """Return torch's, without momentum buffers that no completed step has initialised.

        A loader would take them for initialised.
        """
        unset = [param for param, counts in self._counts.items() if not counts["step"].item()]
        for param in unset:
            del self._counts[param], self.state[param]["momentum_buffer"]
            if not self.state[param]:
                del self.state[param]
        return super().state_dict()

    def _kind(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return _has_momentum(group), group["dampening"] != 0, group["differentiable"], group["fused"]

    def _state_of(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        if group["fused"]:
            _device_dtype_check_for_fused(param)
        momentum = _has_momentum(group)
        stochastic = self.stochastic_rounding and param.dtype == torch.bfloat16
        if not momentum and not stochastic and not self._has_master(param):
            return {}  # nor an entry in self.state, as in torch
        state = self.state[param]
        first = momentum and state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        taking_part = self._with_master(param, state, ["momentum_buffer"] * momentum)
        if stochastic or (momentum and (self.stacked or group["dampening"] != 0)):
            # A loaded buffer is initialised; a new one becomes so at the first step that is not skipped.
            counts = state if stochastic or self.stacked else self._counts.setdefault(param, {})
            if first or "step" not in counts:
                counts["step"] = local_part(param).new_full(
                    (len(param),) if self.stacked else (), float(momentum and not first), dtype=torch.float32
                )
            taking_part["step"] = counts["step"]
        return taking_part

    def _options(self, group: dict[str, Any]) -> SGDOptions:
        return SGDOptions(
            group["lr"],
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            bool(group["nesterov"]),
            bool(group["maximize"]),
        )

    def _torch_update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        momentum = _has_momentum(group)
        buffers = [self.state[param].get("momentum_buffer") if momentum else None for param in params]
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=False,
            fused=False,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if momentum:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer


def _has_momentum(group: dict[str, Any]) -> bool:
    """Return whether the group keeps momentum buffers: with one momentum per model always, whatever the values."""
    momentum = group["momentum"]
    return (isinstance(momentum, Tensor) and momentum.dim() > 0) or bool(momentum != 0)
