"""Linear model and mean squared error in one op: ``linear_mse_loss`` and ``linear_mse_loss_and_grad``.

The predictions are never stored. When a gradient may be asked for, the operator ``linear_mse`` returns beside
the loss what one pass over the data gives away: the weighted errors E and the gradients of weight and bias.
These are outputs like any other, differentiable themselves (linear_mse_operators.py), so a backward only scales them,
and a second derivative starts from them. Batches of models: linear_mse_models.py.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import acc_dtype
from .linear_mse_models import models_loss, models_loss_and_grad, weighting
from .linear_mse_operators import linear_mse, linear_mse_backward, slope
from .matmul import linear, linear_in_torch
from .mse import mse, mse_in_torch, suits_torch
from .operator import in_places, use_torch_fast_path
from .repeat import repeatable
from .torch_private import torch_mse_loss

# Bytes of input or target up to which torch's own ops and autograd serve on the fallback: a second pass over what
# the last cache of a CPU holds costs less than the way through the registered operators (twice the time of 4,096 x 64).
SMALL = 1 << 23


@repeatable
def linear_mse_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute ``mse_loss(linear(input, weight, bias), target)`` by kernels that do not store the predictions.

        e[n, k] = sum_d input[n, d] * weight[k, d] + bias[k] - target[n, k]

        mean: sum(s e^2) / (N K), or sum(s e^2) / sum(s) where sample weights s are given;
        sum: sum(s e^2);  none: s e^2

    With one output (K = 1) the kernels read the data once for the loss and every gradient. Differentiable to any order
    in all tensors, in reverse and forward mode. ``reduction="none"`` is the composition above: its result has
    as many elements as the predictions.

    Shapes:
        input ``(*, D)``; weight ``(K, D)`` or ``(D,)``; target ``(*, K)``, or ``(*)`` where weight is ``(D,)``;
        bias ``(K,)``, or one element where weight is ``(D,)``; sample_weight ``(*)``, one per sample, or target's
        shape. Loss: ``()``, or target's shape for none.
        B models: weight ``(B, K, D)``; input ``(B, N, D)``, or ``(N, D)`` shared by all; target ``(B, N, K)`` or
        ``(N, K)``; bias ``(B, K)``; sample_weight ``(B, N)`` wherever that fits, ``(B, N, K)``, ``(N,)`` or
        ``(N, K)``. Loss: ``(B,)``, each model's own, or ``(B, N, K)`` for none.
        Ragged rows: offsets ``(B + 1,)``; input ``(R, D)``; target ``(R, K)``; sample_weight ``(R,)`` or ``(R, K)``;
        model b has the rows ``offsets[b]:offsets[b + 1]``. Loss: ``(B,)``, or ``(R, K)`` for none.

    Args:
        input: float64, float32, float16 or bfloat16, any strides.
        weight: of the same dtype and device.
        target: of the same dtype and device.
        bias: of the same dtype and device.
        sample_weight: of the same dtype and device; the mean under weights whose sum is 0 is nan.
        offsets: int32 or int64, on the same device, not decreasing, within 0 and R. A model without rows has
            mean nan, sum 0 and gradients 0; a row of no model has loss and gradients 0. On a GPU bad offsets are
            clamped, not reported.
        reduction: ``"mean"`` (over all elements of target, of each model's), ``"sum"`` or ``"none"``.

    Returns:
        The loss in the tensors' dtype, accumulated in float32 (float64 for float64). Under autocast input, weight
        and bias are cast to the autocast dtype; target, predictions and loss are float32 (with ``"none"`` the
        predictions have the autocast dtype, as from ``linear``).

    Raises:
        ValueError: ``target``, ``bias``, ``sample_weight`` or ``offsets`` has the wrong shape, ``reduction`` is
            unknown, input and a batch of models do not fit, or on the CPU an offset decreases or is out of range.
        TypeError: dtypes differ or are not served.
        RuntimeError: devices differ, or input and weight do not fit.

    Example:
        >>> x, y = torch.randn(8, 3), torch.randn(8)
        >>> w = torch.zeros(3, requires_grad=True)
        >>> linear_mse_loss(x, w, y).backward()
    """
    op, arguments = "linear_mse_loss", {"input": input, "weight": weight, "target": target, "bias": bias}
    if offsets is not None or _of_models(weight):
        return models_loss(op, arguments, sample_weight, offsets, reduction)
    if (
        sample_weight is None
        and reduction in checks.REDUCTIONS
        and use_torch_fast_path(input, weight, target, optional=bias)
        and input.nbytes <= SMALL
        and target.nbytes <= SMALL
        and target.dtype != torch.float16  # see mse_loss
    ):
        checks.linear_shapes(op, input, weight, bias)
        predictions = linear_in_torch(input, weight, bias)
        if predictions.shape == target.shape:
            return torch_mse_loss(predictions, target, checks.REDUCTIONS.index(reduction))
    _check(op, {**arguments, "sample_weight": sample_weight}, reduction, checks.REDUCTIONS)
    if sample_weight is not None and sample_weight.shape != target.shape:
        sample_weight = sample_weight.unsqueeze(-1)  # the operators broadcast one weight per sample
    if (
        sample_weight is not None
        and use_torch_fast_path(input, weight, target, sample_weight, optional=bias)
        and input.nbytes <= SMALL
        and suits_torch(target)
    ):
        return mse_in_torch(linear_in_torch(input, weight, bias), target, sample_weight, reduction)
    if reduction == "none":
        return mse(linear(input, weight, bias), target, sample_weight, "none", 0, target.dtype)
    matrices, total, _ = weighting(_normal_form(input, weight, target, bias, sample_weight), reduction)
    dtype = checks.loss_dtype(target)
    if total is None:
        return linear_mse(*matrices, reduction, [False] * 3, dtype)[0]
    return (linear_mse(*matrices, "sum", [False] * 3, acc_dtype(input, target))[0] / total).to(dtype)


def linear_mse_loss_and_grad(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
    offsets: Tensor | None = None,
    reduction: str = "mean",
    wrt: Sequence[str] = ("weight", "bias"),
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]:
    """Return the loss and its gradients in one pass over the data, without autograd.

        E = s (input @ weight^T + bias - target),  c = 2 / (N K), or 2 / sum(s), for mean, 2 for sum
        grad_weight = c E^T @ input,  grad_bias = c sum_n E,  grad_input = c E @ weight,  grad_target = -c E

    Shapes:
        input ``(*, D)``; weight ``(K, D)`` or ``(D,)``; target ``(*, K)``, or ``(*)`` where weight is ``(D,)``;
        bias ``(K,)``, or one element where weight is ``(D,)``. Loss ``()``, each gradient as its argument.
        sample_weight, offsets and a batch of models as for ``linear_mse_loss``: loss ``(B,)``, and the gradients of
        its sum.

    Args:
        input: float64, float32, float16 or bfloat16, any strides.
        weight: of the same dtype and device.
        target: of the same dtype and device.
        bias: of the same dtype and device.
        sample_weight: of the same dtype and device; no gradient is taken for it.
        offsets: as for ``linear_mse_loss``.
        reduction: ``"mean"`` or ``"sum"``.
        wrt: which gradients are wanted: any of ``"input"``, ``"weight"``, ``"target"``, ``"bias"``.
            ``requires_grad`` plays no part.

    Returns:
        ``(loss, (grad_input, grad_weight, grad_target, grad_bias))`` with None for what is not in ``wrt`` or was
        not given.

    Raises:
        ValueError: as ``linear_mse_loss``, ``reduction`` is ``"none"``, or ``wrt`` has an unknown name.
        TypeError: dtypes differ or are not served.
        RuntimeError: devices differ, or input and weight do not fit.

    Example:
        >>> x, y, w = torch.randn(8, 3), torch.randn(8), torch.zeros(3)
        >>> loss, (_, grad_weight, _, _) = linear_mse_loss_and_grad(x, w, y)
        >>> w -= 0.1 * grad_weight
    """
    op = "linear_mse_loss_and_grad"
    arguments = {"input": input, "weight": weight, "target": target, "bias": bias}
    if offsets is not None or _of_models(weight):
        return models_loss_and_grad(op, arguments, sample_weight, offsets, reduction, wrt)
    _check(op, {**arguments, "sample_weight": sample_weight}, reduction, ("mean", "sum"))
    want_input, want_weight, want_target, want_bias = checks.output_mask(op, wrt, arguments)
    if sample_weight is not None and sample_weight.shape != target.shape:
        sample_weight = sample_weight.unsqueeze(-1)
    matrices, total = _normal_form(input, weight, target, bias, sample_weight), None
    if sample_weight is not None:
        with torch.no_grad():
            matrices, total, _ = weighting(matrices, reduction)
    output_mask = [want_input or want_target, want_weight, want_bias]
    dtype = checks.loss_dtype(target)
    if total is not None:
        reduction, dtype = "sum", acc_dtype(input, target)
    outputs = linear_mse.without_autograd(*matrices, reduction, output_mask, dtype)
    loss, error, grad_weight, grad_bias = in_places(outputs, output_mask)
    if total is not None:
        loss = (loss / total).to(checks.loss_dtype(target))
        grad_weight, grad_bias = (None if g is None else g / total for g in (grad_weight, grad_bias))
    grad_input = grad_target = None
    if error is not None:
        with torch.no_grad():
            upstream = loss.new_ones(()) if total is None else 1 / total
            options = slope(target.shape, reduction), (want_input, want_target)
            grad_input, grad_target = linear_mse_backward.masked(upstream, error, matrices[1], *options)
    grads = grad_input, grad_weight, grad_target, grad_bias
    d_input, d_weight, d_target, d_bias = map(_as, grads, arguments.values())
    return loss, (d_input, d_weight, d_target, d_bias)


def _of_models(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.dim() == 3


def _as(grad: Tensor | None, argument: Tensor | None) -> Tensor | None:
    """Return a gradient of the normal form in the dtype and shape of the argument it belongs to."""
    if grad is None or argument is None or (grad.dtype == argument.dtype and grad.shape == argument.shape):
        return grad
    return grad.to(argument.dtype).reshape(argument.shape)


def _check(op: str, arguments: Mapping[str, Any], reduction: str, allowed: tuple[str, ...]) -> None:
    checks.reduction(op, reduction, allowed)
    checks.tensors(op, arguments, ("bias", "sample_weight"))
    input, weight, target, bias, *_ = arguments.values()
    checks.linear_shapes(op, input, weight, bias)
    checks.shape(op, "target", target, input.shape[:-1] + weight.shape[:-1], input=input, weight=weight)
    sample_weight = arguments.get("sample_weight")
    if sample_weight is not None and sample_weight.shape != target.shape:
        checks.shape(op, "sample_weight", sample_weight, input.shape[:-1], target=target)


def _normal_form(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return matrices: input (N, D), weight (K, D), target (N, K), sample_weight (N, K) or (N, 1); bias (K,)."""
    if input.dim() == weight.dim() == 2:
        return input, weight, target, bias, sample_weight
    outputs, features = (weight.shape[0] if weight.dim() == 2 else 1), weight.shape[-1]
    rows = math.prod(input.shape[:-1])
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(rows, outputs if sample_weight.shape == target.shape else 1)
    return (
        input.reshape(rows, features),
        weight.reshape(outputs, features),
        target.reshape(rows, outputs),
        None if bias is None else bias.reshape(outputs),
        sample_weight,
    )
