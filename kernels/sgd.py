"""FusedSGD: torch.optim.SGD in one launch over all parameters."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _device_dtype_check_for_fused
from torch.optim.sgd import sgd

from .buckets import SGDOptions
from .optimizer import FusedStep, _local


class FusedSGD(FusedStep, torch.optim.SGD):
    _operator = "sgd"
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
        max_norm: float | None = None,
        on_nonfinite: str = "ignore",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        norm_group: Any = None,
    ) -> None:
        torch.optim.SGD.__init__(
            self,
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self.capturable = capturable
        self._set_options(
            max_norm=max_norm,
            on_nonfinite=on_nonfinite,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            norm_group=norm_group,
        )

    def _capturable(self) -> bool:
        return self.capturable

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "capturable": self.capturable}

    def _kind(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return group["momentum"] != 0, group["dampening"] != 0, group["differentiable"], group["fused"]

    def _state_of(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        if group["fused"]:
            _device_dtype_check_for_fused(param)
        momentum = group["momentum"] != 0
        stochastic = self.stochastic_rounding and param.dtype == torch.bfloat16
        if not momentum and not stochastic and not self._has_master(param):
            return {}  # nor an entry in self.state, as in torch
        state = self.state[param]
        first = momentum and state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        taking_part = self._with_master(param, state, ["momentum_buffer"] * momentum)
        if stochastic or (momentum and group["dampening"] != 0):
            # A buffer from elsewhere has been set; one of our own is set by the first step not skipped.
            counts = state if stochastic else self._counts.setdefault(param, {})
            if "step" not in counts:
                counts["step"] = torch.full((), float(momentum and not first), device=_local(param).device)
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

    def _torch_step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        momentum = group["momentum"] != 0
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
