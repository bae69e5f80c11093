"""``linear_mse_loss`` of a batch of B linear models: where weight is (B, K, D). See linear_mse_rows.py for the layouts.

The operator ``linear_mse_models`` is ``linear_mse`` with a loss for each model.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import acc_dtype
from .linear_mse_operators import models_forward, predicted, row_gradients, slopes
from .linear_mse_rows import lengths, of_models, row_sums
from .mse import divisor, mse, mse_in_torch, suits_torch
from .operator import autocast_dtype, in_places, use_torch_fast_path

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# Multiplications up to which torch's own ops and autograd serve on the fallback: with gradients a tie (two threads of a
# Xeon), and at a tenth of them half the time of the registered operators.
SMALL = 1 << 18


def models_loss(
    op: str, arguments: Mapping[str, Any], sample_weight: Any, offsets: Any, reduction: str
) -> Tensor:
    """Return ``linear_mse_loss`` of a batch of models. ``arguments``: input, weight, target and bias by name."""
    checks.reduction(op, reduction)
    operands = _normal_form(op, arguments, sample_weight, offsets)
    input, weight, target, bias, samples, bounds = operands
    tensors = [tensor for tensor in operands if tensor is not None]
    if (
        bounds is None
        and use_torch_fast_path(*tensors)
        and weight.numel() * input.shape[-2] <= SMALL
        and suits_torch(target)
    ):
        if bias is None or input.dim() == 2:
            predictions = torch.matmul(input, weight.mT)
            predictions = predictions if bias is None else predictions + bias.unsqueeze(1)
        else:
            predictions = torch.baddbmm(bias.unsqueeze(1), input, weight.mT)
        if samples is not None and samples.dim() == 2:
            samples = samples.unsqueeze(0)
        return mse_in_torch(predictions, target.expand_as(predictions), samples, reduction, 1)
    dtype = checks.loss_dtype(target)
    if reduction == "none":
        return _losses(operands).to(dtype)
    operands, total, empty = weighting(operands, reduction)
    if total is None:
        return models_forward(*operands, reduction, [False] * 3, dtype)[0]
    acc = acc_dtype(input, target)
    loss = models_forward(*operands, "sum", [False] * 3, acc)[0] / total
    return (loss if empty is None else loss.masked_fill(empty, torch.nan)).to(dtype)


def models_loss_and_grad(
    op: str,
    arguments: Mapping[str, Any],
    sample_weight: Any,
    offsets: Any,
    reduction: str,
    wrt: Sequence[str],
) -> tuple[Tensor, Grads]:
    """Return ``linear_mse_loss_and_grad`` of a batch of models: the gradients of the sum of their losses."""
    checks.reduction(op, reduction, ("mean", "sum"))
    operands = _normal_form(op, arguments, sample_weight, offsets)
    input, weight, target, _, _, bounds = operands
    want_input, want_weight, want_target, want_bias = checks.output_mask(op, wrt, arguments)
    output_mask = [want_input or want_target, want_weight, want_bias]
    dtype = checks.loss_dtype(target)
    acc = acc_dtype(input, target)
    with torch.no_grad():
        operands, total, empty = weighting(operands, reduction)
        reduction = reduction if total is None else "sum"
        outputs = models_forward.without_autograd(
            *operands, reduction, output_mask, dtype if total is None else acc
        )
        loss, error, grad_weight, grad_bias = in_places(outputs, output_mask)
        if total is not None:
            loss = loss / total
            loss = (loss if empty is None else loss.masked_fill(empty, torch.nan)).to(dtype)
            grad_weight = None if grad_weight is None else grad_weight.div_(total[:, None, None])
            grad_bias = None if grad_bias is None else grad_bias.div_(total[:, None])
        grad_input = grad_target = None
        if error is not None:
            scale = slopes(weight, acc, target.shape, bounds, reduction)
            scale = scale if total is None else scale / total
            # Not products that autocast knows: float16 holds nothing of a scale of many rows.
            casting = checks.autocast_enabled(input)
            with torch.autocast(input.device.type, enabled=False) if casting else nullcontext():
                grad_input, grad_target = row_gradients(
                    scale.to(acc).expand(len(weight)),
                    error,
                    input,
                    weight,
                    target,
                    bounds,
                    (want_input, want_target),
                )
    grads = zip((grad_input, grad_weight, grad_target, grad_bias), arguments.values(), strict=True)
    d_input, d_weight, d_target, d_bias = (
        None if grad is None else grad.to(argument.dtype) for grad, argument in grads
    )
    return loss, (d_input, d_weight, d_target, d_bias)


def _normal_form(op: str, arguments: Mapping[str, Any], sample_weight: Any, offsets: Any) -> tuple[Any, ...]:
    """Check and return input, weight, target, bias, sample_weight, bounds.

    sample_weight with a last dimension of K or 1: ``(B, N, .)`` or ``(N, .)``, for ragged rows ``(R, .)``.
    """
    checks.tensors(op, {**arguments, "sample_weight": sample_weight}, ("bias", "sample_weight"))
    input, weight, target, bias = arguments.values()
    if weight.dim() != 3:
        raise ValueError(
            f"{op}: offsets need a weight of shape (B, K, D), got weight of shape {tuple(weight.shape)}"
        )
    B, K, D = weight.shape
    bounds = None if offsets is None else _bounds(op, offsets, weight)
    rows = input.shape[:-1]
    own = input.dim() == 3 and bounds is None
    if (
        input.dim() not in ((2, 3) if bounds is None else (2,))
        or input.shape[-1] != D
        or (own and rows[0] != B)
    ):
        expected = f"({B}, N, {D}) or (N, {D})" if bounds is None else f"(R, {D})"
        raise ValueError(
            f"{op}: input has shape {tuple(input.shape)}, expected {expected} for weight of shape "
            f"{tuple(weight.shape)} (nothing is broadcast)"
        )
    N = rows[-1]
    if bias is not None:
        checks.shape(op, "bias", bias, (B, K), weight=weight)
    models = () if bounds is not None else (B,)
    given = {"input": input, "weight": weight}
    if target.shape != (N, K):
        checks.shape(op, "target", target, (*models, N, K), **given)
    if sample_weight is not None:
        if sample_weight.shape in ((*models, N), (N,)):
            sample_weight = sample_weight.unsqueeze(-1)
        elif sample_weight.shape != (N, K):
            checks.shape(op, "sample_weight", sample_weight, (*models, N, K), **given)
    return input, weight, target, bias, sample_weight, bounds


def _bounds(op: str, offsets: Any, weight: Tensor) -> Tensor:
    """Return start and end of each model's rows, a view of ``offsets``; the launcher looks at their values."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{op}: offsets must be a torch.Tensor, got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: offsets has dtype {offsets.dtype}; int32 and int64 are served")
    if offsets.device != weight.device:
        raise RuntimeError(
            f"{op}: weight is on {weight.device} but offsets is on {offsets.device}; all tensors must be on one device"
        )
    checks.shape(op, "offsets", offsets, (weight.shape[0] + 1,), weight=weight)
    return offsets.unfold(0, 2, 1) if len(weight) else offsets.new_empty((0, 2))


def _losses(tensors: Sequence[Any]) -> Tensor:
    """Return ``s e^2`` of each element; 0 in rows of no model."""
    input, _, target, _, samples, bounds = tensors
    acc = acc_dtype(input, target)
    losses = mse(*predicted(tensors, acc), "none", 0, acc)
    return losses if samples is None else of_models(losses, bounds)


def weighting(
    tensors: tuple[Any, ...], reduction: str
) -> tuple[tuple[Any, ...], Tensor | None, Tensor | None]:
    """Return the operands as the kernels take them, by what sums under their weights are divided (None: by nothing),
    and which models have no rows, if rows are ragged. It serves one model too.

    The mean of nothing is nan however weighted, but its gradients are 0, as those of torch's products.
    """
    input, weight, target, bias, samples, *ragged = tensors
    total = empty = None
    if samples is not None and target.numel():
        samples, factor = _beside_errors(samples, input)
        if reduction == "mean":
            total, empty = _total_weights(samples, weight, target, *ragged)
        elif factor is not None:
            total = factor.reshape(factor.shape[:-2]).reciprocal()
        if total is not None:
            total = total.expand(weight.shape[:-2])
    return (input, weight, target, bias, samples, *ragged), total, empty


def _total_weights(
    samples: Tensor, weight: Tensor, target: Tensor, bounds: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the sums of weights over the elements of each model's target, and which models have no rows.

    A sum of 0 is nan, as the mean and its gradients are; no rows have the sum 1, by which a gradient of 0 may be
    divided.
    """
    acc = acc_dtype(samples, target)
    if bounds is None:
        models = weight.dim() - 2
        samples, target = (t.unsqueeze(0) if t.dim() == models + 1 else t for t in (samples, target))
        return divisor(samples, target, acc, models), None
    each = weight.shape[1] if samples.shape[-1] == 1 else 1
    total = each * row_sums(samples, bounds, acc).sum(-1)
    empty = lengths(bounds, len(samples)) == 0
    return torch.where(total == 0, torch.nan, total).masked_fill(empty, 1), empty


def _beside_errors(samples: Tensor, input: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return sample weights ``(*, N, .)`` as factors of errors that are multiplied in ``input``'s dtype or that of
    autocast, and what is missing in them, if anything: in float16 the largest is 1, lest products be inf or 0.

    A loss is linear in them, so that no derivative sees by what they are divided. Ragged rows have one largest for all
    models: beside weights 10^6 times as large those of another lose digits.
    """
    operand = autocast_dtype(input) if checks.autocast_enabled(input) else input.dtype
    if operand != torch.float16:
        return samples, None
    wide = samples.to(acc_dtype(samples))
    most = wide.detach().abs().amax((-2, -1), keepdim=True)
    factor = torch.where((most > 0) & most.isfinite(), most, 1)
    return wide / factor, factor
