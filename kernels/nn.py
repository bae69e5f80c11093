"""``torch.nn`` twins of the ops: same constructor arguments, same parameter names."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .linear_mse import linear_mse_loss
from .matmul import linear
from .mse import mse_loss


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` whose forward is ``gradkernels.linear``.

    Shapes:
        input ``(*, in_features)``; weight ``(out_features, in_features)``; bias ``(out_features,)``; result
        ``(*, out_features)``.

    Example:
        >>> Linear(3, 2)(torch.randn(5, 3)).shape
        torch.Size([5, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        """The affine map of ``input``, as ``gradkernels.linear``."""
        return linear(input, self.weight, self.bias)


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
        """The loss of ``input`` against ``target``, as ``gradkernels.mse_loss``."""
        return mse_loss(input, target, reduction=self.reduction, dim=self.dim)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}" + ("" if self.dim is None else f", dim={self.dim!r}")


class LinearMSELoss(torch.nn.Linear):
    """A linear model that owns its weight and bias and returns its mean squared error.

    The parameters are the module's own, so DDP, FSDP and hooks see every use of them.

    Args:
        in_features: D.
        out_features: K.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shapes:
        input ``(*, in_features)``; target ``(*, out_features)``; loss ``()``, or target's shape for none.

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
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        checks.reduction("LinearMSELoss", reduction)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The loss of the predictions against ``target``, as ``gradkernels.linear_mse_loss``."""
        return linear_mse_loss(
            input, self.weight, target, self.bias, sample_weight=sample_weight, reduction=self.reduction
        )

    def predict(self, input: Tensor) -> Tensor:
        """The predictions ``(*, out_features)`` for ``input``, as ``gradkernels.linear``."""
        return linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction!r}"
