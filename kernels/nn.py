"""``torch.nn`` twins of the ops: same constructor arguments, same parameter names."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .linear_mse import linear_mse_loss
from .matmul import linear, matmul
from .mse import mse_loss


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` whose forward is ``gradkernels.linear``, or a batch of such models.

    Args:
        in_features: D.
        out_features: K.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.
        models: how many independent models; None for one without a dimension of its own.

    Shapes:
        input ``(*, in_features)``; weight ``(out_features, in_features)``; bias ``(out_features,)``; result
        ``(*, out_features)``. With ``models``: input ``(models, N, in_features)``, or ``(N, in_features)`` for all;
        weight ``(models, out_features, in_features)``; bias ``(models, out_features)``; result
        ``(models, N, out_features)``.

    Raises:
        ValueError: with ``models``, input has the wrong shape.

    Example:
        >>> Linear(3, 2)(torch.randn(5, 3)).shape
        torch.Size([5, 2])
        >>> Linear(3, 2, models=1000)(torch.randn(5, 3)).shape
        torch.Size([1000, 5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        models: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.models = models
        if models is None:
            return
        for name, parameter in list(self.named_parameters()):
            self.register_parameter(name, torch.nn.Parameter(parameter.new_empty((models, *parameter.shape))))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each model as ``torch.nn.Linear`` initialises one."""
        if self.weight.dim() == 2:
            super().reset_parameters()
            return
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """Return the affine map of ``input``, as ``gradkernels.linear``."""
        if self.models is None:
            return linear(input, self.weight, self.bias)
        batch, features = input.shape[:-2], input.shape[-1:]
        if input.dim() < 2 or batch not in ((), (self.models,)) or features != (self.in_features,):
            raise ValueError(
                f"{type(self).__name__}: input has shape {tuple(input.shape)}, expected (N, D) or (B, N, D) for weight "
                f"of shape {tuple(self.weight.shape)}"
            )
        predictions = matmul(input, self.weight.mT)
        if self.bias is None:
            return predictions
        return predictions + self.bias.to(predictions.dtype).unsqueeze(1)  # under autocast too

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.models is None else f", models={self.models}")


class MSELoss(torch.nn.Module):
    """``torch.nn.MSELoss`` whose forward is ``gradkernels.mse_loss``; shapes that differ are refused.

    Args:
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        dim: the dimensions to average or sum over; None for all.

    Raises:
        ValueError: ``reduction`` is none of the three, or ``"none"`` with a ``dim``.

    Example:
        >>> MSELoss()(torch.tensor([6.0]), torch.tensor([5.0]))
        tensor(1.)
    """

    def __init__(self, reduction: str = "mean", *, dim: int | Sequence[int] | None = None) -> None:
        super().__init__()
        checks.reduction("MSELoss", reduction)
        checks.no_dim_for_none("MSELoss", dim, reduction)
        self.reduction = reduction
        self.dim = dim

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of ``input`` against ``target``, as ``gradkernels.mse_loss``."""
        return mse_loss(input, target, reduction=self.reduction, dim=self.dim)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}" + ("" if self.dim is None else f", dim={self.dim!r}")


class LinearMSELoss(Linear):
    """A linear model that owns its weight and bias and returns its mean squared error, or a batch of such models.

    The parameters are the module's own, so DDP, FSDP and hooks see their use in a call. ``predict`` does not go
    through the module's ``__call__``: under FSDP2 ``register_fsdp_forward_method(model, "predict")`` lets it gather
    them.

    Args:
        in_features: D.
        out_features: K.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        models: how many independent models; None for one without a dimension of its own.

    Shapes:
        input ``(*, in_features)``; target ``(*, out_features)``; loss ``()``, or target's shape for none. With
        ``models`` as ``gradkernels.linear_mse_loss`` of a batch of models: loss ``(models,)``.

    Raises:
        ValueError: ``reduction`` is none of the three.

    Example:
        >>> model = LinearMSELoss(3, 1)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> model(x, y).backward()
        >>> model.predict(x).shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reduction: str = "mean",
        models: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, models=models)
        checks.reduction("LinearMSELoss", reduction)
        self.reduction = reduction

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the predictions against ``target``, as ``gradkernels.linear_mse_loss``."""
        return linear_mse_loss(
            input,
            self.weight,
            target,
            self.bias,
            sample_weight=sample_weight,
            offsets=offsets,
            reduction=self.reduction,
        )

    def predict(self, input: Tensor) -> Tensor:
        """Return the predictions ``(*, out_features)`` for ``input``, as ``gradkernels.linear``."""
        return super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction!r}"
