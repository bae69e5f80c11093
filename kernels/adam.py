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
from typing_extensions import Unpack  # of torch's own requirements; typing has it from Python 3.11 on

from .optim.bucket import AdamOptions
from .optim.plan import is_wrapper, local_part
from .optim.step import FusedStep, SharedOptions

_Adam = torch.optim.Adam  # a user may put FusedAdam under that name


class FusedAdam(FusedStep, torch.optim.Adam):
    """torch.optim.Adam in one launch per device, set of dtypes and ``amsgrad``, for any number of parameters.

    With ``g`` the gradient, ``p`` the parameter, ``m`` and ``v`` the moments (zero before step ``t = 1``)::

        g = -g                                   if maximize
        p = p - lr weight_decay p                if decoupled_weight_decay
        g = g + weight_decay p                   otherwise
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        w = max(w, v)                            if amsgrad, else w = v
        p = p - lr (m / (1 - beta1^t)) / (sqrt(w / (1 - beta2^t)) + eps)

    It computes in float32 (float64 for float64) and rounds once. ``state["step"]`` lies on the parameter's device;
    all else, state_dict included, is as in torch. Sparse gradients are refused as there; complex parameters
    and ``differentiable=True`` go through torch's own loop.

    Args:
        params: float64, float32, float16 or bfloat16 parameters, or groups of them, as for torch.optim.Adam.
        lr: learning rate; a float32 0-d tensor on the parameters' device is read by the kernel, so that a
            captured graph or compiled step follows its changes. Likewise ``betas`` and ``weight_decay``.
        betas, eps, weight_decay, amsgrad, maximize, capturable, differentiable: as in torch.optim.Adam.
        foreach, fused: checked as in torch, but select no implementation; with ``fused=True`` GradScaler leaves
            overflow to the step, which then does not wait for the device, as in torch.
        decoupled_weight_decay: AdamW's weight decay.
        max_norm: clip gradients to this global norm inside the step, as ``clip_grad_norm_`` before it would;
            ``p.grad`` stays unclipped.
        on_nonfinite: ``"ignore"``; ``"skip"``: a step with a non-finite gradient changes nothing and is counted
            in ``steps_skipped``; ``"raise"``: it raises, and each step waits for the device. Where GradScaler
            found the overflow, the step is skipped, as with torch's optimizers.
        master_weights: keep a float32 copy of every bfloat16 and float16 parameter in ``state["master_param"]``,
            and the moments in float32.
            Training continues from elements of such a parameter that are overwritten, by hand or by loading a model.
        stochastic_rounding: round bfloat16 parameters and their state up or down at random, so that small
            updates of parameters and moments are not lost.
        seed: of the random numbers, which depend only on it, the parameter's position and its count of updates.
        norm_group: process group over which ``max_norm`` and ``on_nonfinite`` apply where each rank holds parameters
            of its own (ZeroRedundancyOptimizer). DTensors have their mesh and need none.
        stacked: the parameters stack B models along their first dimension, as torch.func.stack_module_state does, and
            every model is trained as if it had an optimizer of its own. ``lr``, ``weight_decay`` and each of
            ``betas`` may then be a tensor (B,) on the parameters' device, read there at each step: the rule above
            holds for each model b with ``lr[b]`` and so on. ``state["step"]``, clipping by ``max_norm``,
            ``on_nonfinite``, ``grad_norm`` and ``steps_skipped`` are per model, (B,). ``optimizer.active``, a bool
            tensor (B,) or None, leaves models out of a step: their parameters, state, step and counts stay, and
            their ``grad_norm`` is nan. With B rows of one tensor this is a row-selective Adam.
        lr_scale: with ``stacked``, factors (B,) of the rates, read at each step: the effective rate is
            ``lr lr_scale[b]``, so that torch's schedulers, which serve one number, drive all models.

    Shapes:
        parameters: any; with ``stacked`` ``(B, *)``, B the same in all, 0 included.

    Raises:
        ValueError, RuntimeError: what torch.optim.Adam raises, in its words; ``max_norm`` below 0, an unknown
            ``on_nonfinite``, ``master_weights`` together with ``stochastic_rounding``, ``norm_group`` with ``stacked``.
        ValueError: with ``stacked``, for 0-d or complex parameters, unequal B, ``differentiable=True``, an option that
            is neither a number nor (B,); at the step for sparse gradients, DTensors, and an option that was (B,) and
            has been overwritten with a number, as OneCycleLR does.
        RuntimeError: with ``stacked``, for parameters or options on another device than the first parameter.

    Example:
        >>> optimizer = FusedAdam(model.parameters(), lr=1e-3, max_norm=1.0, on_nonfinite="skip")
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

        A thousand rates at once:

        >>> optimizer = FusedAdam([weight], lr=torch.logspace(-5, 0, 1000), stacked=True)  # weight: (1000, K, D)
        >>> linear_mse_loss(input, weight, target).sum().backward()
        >>> optimizer.step()
    """

    _operator = "adam"
    _torch_class = _Adam
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
        **shared: Unpack[SharedOptions],
    ) -> None:
        rates = self._take_rates(shared, lr=lr, betas=betas, weight_decay=weight_decay)
        _Adam.__init__(
            self,
            params,
            eps=eps,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            **rates,
        )
        self._set_options(**shared)

    def _kind(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return bool(group["amsgrad"]), group["differentiable"], group["fused"], group["capturable"]

    def _state_of(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        moments = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])
        if not state:
            if group["fused"]:
                _device_dtype_check_for_fused(param)
            if self.stacked:
                state["step"] = param.new_zeros(len(param), dtype=torch.float32)
            else:
                local = local_part(param)
                dtype = _get_scalar_dtype(group["fused"])
                if is_wrapper(local):  # whose own new_zeros would make one more of its kind
                    state["step"] = torch.zeros((), dtype=dtype, device=local.device)
                else:
                    state["step"] = local.new_zeros((), dtype=dtype)
            for key in moments:
                state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if state["step"].device != param.device:  # a hook may make it on the CPU, as torch does
            state["step"] = state["step"].to(param.device)
        supported = _get_capturable_supported_devices()
        if group["capturable"] and not group["fused"] and param.device.type not in supported:
            raise AssertionError(
                f"If capturable=True, params and state_steps must be on supported devices: {supported}."
            )
        return {"step": state["step"], **self._with_master(param, state, moments)}

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

    def _torch_update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
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
    """torch.optim.AdamW in one launch per device, set of dtypes and ``amsgrad``, for any number of parameters.

    FusedAdam's rule with decoupled weight decay, which shrinks the parameters by ``lr weight_decay`` before the
    step instead of joining the gradient.

    Args:
        params: as for FusedAdam, and so are all others; ``weight_decay`` is 1e-2 unless given.

    Raises:
        ValueError, RuntimeError: as FusedAdam.

    Example:
        >>> optimizer = FusedAdamW(model.parameters(), lr=3e-4, weight_decay=0.1, master_weights=True)
    """

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
        **shared: Unpack[SharedOptions],
    ) -> None:
        super().__init__(
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
            decoupled_weight_decay=True,
            **shared,
        )
