"""Layers whose forward Hugging Face's ``kernelize`` puts in place of a module's; they have no constructor or state."""

import torch
from torch import Tensor

from .matmul import linear
from .mse import mse_loss


class Linear(torch.nn.Module):
    """The forward of ``torch.nn.Linear`` as ``gradkernels.linear``."""

    can_torch_compile = True
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """Return the affine map of ``input``."""
        return linear(input, self.weight, self.bias)


class MSELoss(torch.nn.Module):
    """The forward of ``torch.nn.MSELoss`` as ``gradkernels.mse_loss``; shapes that differ are refused."""

    can_torch_compile = True
    reduction: str

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        return mse_loss(input, target, reduction=self.reduction)
