"""FusedAdam and FusedAdamW: torch.optim.Adam and AdamW in one launch over all parameters."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import (
    ParamsT,
    _device_dtype_check_for_fused,
    _get_capturable_supported_devices,
    _get_scalar_dtype,
)

from .buckets import AdamOptions
from .optimizer import FusedStep


class FusedAdam(FusedStep, torch.optim.Adam):
    _operator = "adam"
    _state_keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "master_param")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        on_nonfinite: str = "ignore",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        norm_group: Any = None,
    ) -> None:
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._set_options(
            max_norm=max_norm,
            on_nonfinite=on_nonfinite,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            norm_group=norm_group,
        )

    def _kind(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return bool(group["amsgrad"]), group["differentiable"], group["fused"], group["capturable"]

    def _state_of(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            if group["fused"]:
                _device_dtype_check_for_fused(param)
            state["step"] = torch.zeros((), dtype=_get_scalar_dtype(group["fused"]), device=param.device)
            keys = (
                ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
            )
            for key in keys:
                state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
        supported = _get_capturable_supported_devices()
        if group["capturable"] and not group["fused"] and param.device.type not in supported:
            raise AssertionError(
                f"If capturable=True, params and state_steps must be on supported devices: {supported}."
            )
        moments = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])
        return self._with_master(param, state, moments) | {"step": state["step"]}

    def _options(self, group: dict[str, Any]) -> AdamOptions:
        beta1, beta2 = group["betas"]
        return AdamOptions(
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            bool(group["decoupled_weight_decay"]),
            bool(group["maximize"]),
        )

    def _needs_torch(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> bool:
        if grad.is_sparse:
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        return super()._needs_torch(group, param, grad)

    def _torch_step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        states = [self._state_of(group, param) for param in params]
        for state in states:
            if group["differentiable"] and state["step"].requires_grad:
                raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
        beta1, beta2 = group["betas"]
        adam(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            foreach=False,
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=False,
            has_complex=any(param.is_complex() for param in params),
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


class FusedAdamW(FusedAdam, torch.optim.AdamW):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        on_nonfinite: str = "ignore",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        norm_group: Any = None,
    ) -> None:
        torch.optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_options(
            max_norm=max_norm,
            on_nonfinite=on_nonfinite,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            norm_group=norm_group,
        )
