"""A batch of B linear models and their squared errors: what ``linear_mse_loss`` does where weight is (B, K, D).

Rows come in three layouts::

    own      input (B, N, D)     each model has its own N rows
    shared   input (N, D)        all models have the same N rows
    ragged   input (R, D)        model b has the rows bounds[b, 0] <= r < bounds[b, 1]; bounds is None elsewhere

The operator ``linear_mse_models`` is ``linear_mse`` with a loss for each model. Its derivatives are products of rows
and models: products of batches of matrices, or, where rows are ragged, the operators ``linear_mse_models_product``
and ``linear_mse_models_outer``, each of which the other differentiates. Over 500 lines, since the three operators need
one another.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import acc_dtype
from .matmul import product, sum_to
from .mse import mse_in_torch, suits_torch
from .operator import (
    Operator,
    autocast_cast,
    autocast_dtype,
    in_places,
    needs_derivative,
    uncast,
    use_torch_fast_path,
)

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# Multiplications up to which torch's own ops and autograd serve on the fallback: with gradients a tie (two threads of a
# Xeon), and at a tenth of them half the time of the registered operators.
SMALL = 1 << 18


def models_loss(
    op: str, arguments: Mapping[str, Any], sample_weight: Any, offsets: Any, reduction: str
) -> Tensor:
    """``linear_mse_loss`` of a batch of models. ``arguments``: input, weight, target and bias by name."""
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
        return _losses(*operands).to(dtype)
    operands, total, empty = _weighting(operands, reduction)
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
    """``linear_mse_loss_and_grad`` of a batch of models: the gradients of the sum of their losses."""
    checks.reduction(op, reduction, ("mean", "sum"))
    operands = _normal_form(op, arguments, sample_weight, offsets)
    input, weight, target, _, _, bounds = operands
    want_input, want_weight, want_target, want_bias = checks.output_mask(op, wrt, arguments)
    output_mask = [want_input or want_target, want_weight, want_bias]
    dtype = checks.loss_dtype(target)
    acc = acc_dtype(input, target)
    with torch.no_grad():
        operands, total, empty = _weighting(operands, reduction)
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
            scale = _slopes(weight, target, bounds, reduction, acc)
            scale = scale if total is None else scale / total
            # Not products that autocast knows: float16 holds nothing of a scale of many rows.
            casting = checks.autocast_enabled(input)
            with torch.autocast(input.device.type, enabled=False) if casting else nullcontext():
                grad_input, grad_target = _row_gradients(
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
    """Checked: input, weight, target, bias, sample_weight, bounds.

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
    """Start and end of each model's rows, a view of ``offsets``; their values are looked at in the launcher."""
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


def check_bounds(bounds: Tensor, rows: int) -> None:
    """ValueError for a start or an end outside ``rows`` or before the one in front of it."""
    offsets = bounds.reshape(-1)
    if offsets.numel() and bool(
        ((offsets < 0) | (offsets > rows) | (offsets < offsets.cummax(0).values)).any()
    ):
        shown = [*bounds[:8, 0].tolist(), bounds[min(8, len(bounds)) - 1, 1].item()]
        more = ", ..." if len(bounds) > 8 else ""
        raise ValueError(
            f"linear_mse_loss: offsets must not decrease, nor leave [0, {rows}] for {rows} rows, got "
            f"[{', '.join(map(str, shown))}{more}]"
        )


def _predictions(
    input: Tensor, weight: Tensor, bias: Tensor | None, bounds: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(B, N, K)``, or ``(R, K)`` with 0 in rows of no model."""
    values = _rows_by_models(input, weight, bounds, dtype)
    return values if bias is None else values + _spread(bias.to(values.dtype), input, bounds)


def _rows_by_models(rows: Tensor, models: Tensor, bounds: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``rows[n] . models[b, k]`` for each row n of model b, and each k."""
    if bounds is None:
        return product(rows, models.mT, dtype=dtype)
    return _product(rows, models, bounds, dtype)


def _rows_by_rows(left: Tensor, right: Tensor, bounds: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(B, K, D)``: the sums of ``left[n, k] * right[n, d]`` over the rows n of each model."""
    if bounds is None:
        return product(left.mT, right, dtype=dtype)
    return _outer(left, right, bounds, dtype)


def _ones(rows: Tensor) -> Tensor:
    return rows.new_ones(()).expand(rows.shape[-2], 1)


def _spread(values: Tensor, rows: Tensor, bounds: Tensor | None) -> Tensor:
    """Values ``(B, K)`` of models, for each of their rows."""
    if bounds is None:
        return values.unsqueeze(1)
    return _product(_ones(rows).to(values.dtype), values.unsqueeze(-1), bounds, values.dtype)


def _sums(rows: Tensor, bounds: Tensor | None) -> Tensor:
    """``(B, K)``: the sums over the rows of each model."""
    return rows.sum(-2) if bounds is None else _outer(rows, _ones(rows), bounds, rows.dtype).squeeze(-1)


def _scaled(rows: Tensor, scale: Tensor, bounds: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Each row times its model's ``scale`` (B,)."""
    if bounds is None:
        return product(rows.unsqueeze(-1), scale.reshape(-1, 1, 1, 1), dtype=dtype).squeeze(-1)
    edges = bounds.to(torch.int64) * rows.shape[1]
    flat = _product(rows.reshape(-1, 1), scale.reshape(-1, 1, 1), edges, dtype)
    return flat.reshape(rows.shape)


def _to_shape(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (B, N, K) or (R, K), summed where ``like`` has none of the dimensions or one of size 1."""
    return sum_to(values, like.shape, like.dtype)


def _losses(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    samples: Tensor | None,
    bounds: Tensor | None,
) -> Tensor:
    """``s e^2`` of each element; 0 in rows of no model."""
    predictions = _predictions(input, weight, bias, bounds, acc_dtype(input, target))
    error = predictions.to(acc_dtype(input, target)) - target
    if bounds is not None:
        of_a_model = _spread(error.new_ones(()).expand(len(weight), 1), error, bounds) != 0
        error = error.where(of_a_model, 0)
        samples = None if samples is None else samples.where(of_a_model, 0)
    losses = error.square()
    return losses if samples is None else losses * samples


def _weighting(
    operands: tuple[Any, ...], reduction: str
) -> tuple[tuple[Any, ...], Tensor | None, Tensor | None]:
    """The operands as the kernels take them, what sums by their weights are divided by (None: by nothing), and
    which models have no rows."""
    input, weight, target, bias, samples, bounds = operands
    total = empty = None
    if samples is not None and target.numel():
        samples, factor = beside_errors(samples, input)
        if reduction == "mean":
            total, empty = _total_weights(samples, weight, bounds, acc_dtype(input, target))
        elif factor is not None:
            total = factor.reshape(-1).reciprocal()
    return (input, weight, target, bias, samples, bounds), total, empty


def _total_weights(
    samples: Tensor, weight: Tensor, bounds: Tensor | None, acc: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """``(B,)`` sums of weights over the elements of each model's target, and which models have no rows.

    A sum of 0 is nan, as the mean and its gradients are; no rows have the sum 1, by which a gradient of 0 may be
    divided.
    """
    each = weight.shape[1] if samples.shape[-1] == 1 else 1
    total = each * _sums(samples.to(acc), bounds).sum(-1)
    total = torch.where(total == 0, torch.nan, total)
    if bounds is None:
        return total.expand(len(weight)), None
    empty = _lengths(bounds, len(samples)) == 0
    return total.masked_fill(empty, 1), empty


def _slopes(
    weight: Tensor, target: Tensor, bounds: Tensor | None, reduction: str, acc: torch.dtype
) -> Tensor:
    """q = 2c, by which a sum over E becomes a gradient: ``()``, or ``(B,)`` for the mean over ragged rows."""
    two = weight.new_full((), 2.0, dtype=acc)
    if reduction == "sum":
        return two
    outputs = weight.shape[1]
    if bounds is None:
        return two / max(1, target.shape[-2] * outputs)
    return two / (_lengths(bounds, target.shape[0]) * outputs).clamp(min=1)


def _lengths(bounds: Tensor, rows: int) -> Tensor:
    """How many rows each model has, in 64 bits, as elements are counted by it."""
    start, end = bounds.to(torch.int64).clamp(0, rows).unbind(1)
    return (end - start).clamp(min=0)


def slopes_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of slopes beside values of ``dtype``: float16 might hold nothing of them."""
    return torch.float32 if dtype == torch.float16 else dtype


def beside_slopes(values: Tensor) -> Tensor:
    """``values`` as a factor of slopes: a product of two dtypes multiplies the narrower."""
    return values.to(slopes_dtype(values.dtype))


def beside_errors(samples: Tensor, input: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sample weights ``(*, N, .)`` as factors of errors that are multiplied in ``input``'s dtype or that of autocast,
    and what is missing in them, if anything: in float16 the largest is 1, lest products be inf or 0.

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


def _row_gradients(
    scale: Tensor,
    error: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bounds: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """As needed, ``scale E W`` and ``-scale E`` in the shapes of input and target; scale is (B,)."""
    grad_input = grad_target = None
    if output_mask[0] and bounds is None and error.dtype == torch.float16:
        # Which may have nothing left of a scaled weight; products of ragged rows multiply the wider dtype.
        grad_input = _back(_scaled(error, scale, bounds, error.dtype), weight, input, bounds)
    elif output_mask[0]:
        grad_input = _back(error, scale[:, None, None] * weight, input, bounds)
    if output_mask[1]:
        if target.dim() == error.dim():
            grad_target = _scaled(error, -scale, bounds, target.dtype)
        else:
            flat = product(-scale.unsqueeze(0), error.reshape(len(scale), target.numel()), dtype=target.dtype)
            grad_target = flat.reshape(target.shape)
    return grad_input, grad_target


def _back(error: Tensor, weight: Tensor, input: Tensor, bounds: Tensor | None) -> Tensor:
    """``error @ weight``, over all models where they share input."""
    if bounds is not None:
        return _product(error, weight.mT, bounds, input.dtype)
    if input.dim() == 3:
        return product(error, weight, dtype=input.dtype)
    return product(error, weight, None, [0], input.dtype).squeeze(0)


class LinearMseModelsFunction(torch.autograd.Function):
    """Derivatives of (loss, E, grad_weight, grad_bias), for each model as in LinearMseFunction.

    With P = X W^T + b and q = 2c, and cotangents (l, V, Z, u) of the four outputs,

        E = s (P - y);  loss = c sum(s (P - y)^2);  grad_weight = q E^T X;  grad_bias = q sum_n E
        Q = V + q (X Z^T + u) for E,  R = s Q + q l E for P,
        grad_X = R W + q E Z,  grad_W = R^T X,  grad_y = -R,  grad_b = sum_n R,
        grad_s = (P - y) Q + c l (P - y)^2,

    where q and l are the row's model's, and what models share is summed over them.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reduction, ctx.output_mask, ctx.dtype = inputs
        input, weight, target, bias, *_ = tensors
        _, *others = in_places(output, ctx.output_mask)
        kept = read_by_backward(tensors, ctx.output_mask, ctx.needs_input_grad)
        kept[0], kept[2] = input, target  # data, of which the shapes are asked for all along
        ctx.save_for_backward(*kept, *others)
        ctx.save_for_forward(*tensors, others[0])
        ctx.acc = acc_dtype(*tensors[:5])
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
        saved = ctx.saved_tensors  # asked for once: a checkpoint gives them no second time
        input, weight, target, _, _, bounds, error, grad_weight, grad_bias = saved
        needed = ctx.needs_input_grad[:5]
        d_loss, *others = cotangents = tuple(in_places(cotangents, ctx.output_mask))
        models = next(tensor for tensor in (weight, grad_weight, grad_bias) if tensor is not None)
        q = _slopes(models, target, bounds, ctx.reduction, ctx.acc)
        if needed[4] or any(cotangent is not None for cotangent in others):
            return [*_general_backward(ctx, saved, models, cotangents, q, needed), None]
        assert d_loss is not None
        d_loss = d_loss.to(ctx.acc)
        grad_input = grad_target = None
        if error is not None:
            wanted = needed[0], needed[2]
            grad_input, grad_target = _row_gradients(q * d_loss, error, input, weight, target, bounds, wanted)
        return [
            grad_input,
            (d_loss[:, None, None] * grad_weight).to(ctx.dtypes[0]) if needed[1] else None,
            grad_target,
            (d_loss[:, None] * grad_bias).to(ctx.dtypes[1]) if needed[3] else None,
            None,
            None,
        ]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, error = ctx.saved_tensors
        input, weight, target, _, samples, bounds = tensors
        d_input, d_weight, d_target, d_bias, d_samples, _ = tangents
        acc = acc_dtype(*tensors[:5])
        q = _slopes(weight, target, bounds, ctx.reduction, acc).unsqueeze(-1)
        residual = _residual(tensors, acc)
        error = residual if samples is None else samples * residual
        parts = []
        if d_input is not None:
            parts.append(_rows_by_models(d_input, weight, bounds, acc))
        if d_weight is not None:
            parts.append(_rows_by_models(input, d_weight, bounds, acc))
        if d_bias is not None:
            parts.append(_spread(d_bias.to(acc), input, bounds))
        if d_target is not None:
            parts.append(_of_models(-d_target.to(acc), weight, bounds))
        d_residual = sum(parts[1:], parts[0]) if parts else torch.zeros_like(residual)
        d_error = d_residual if samples is None else samples * d_residual
        d_losses = 2 * error * d_residual
        if d_samples is not None:
            d_error = d_error + d_samples * residual
            d_losses = d_losses + d_samples * residual.square()
        d_loss = (q / 2) * _sums(d_losses.expand_as(residual), bounds)
        outputs: list[Any] = [d_loss.sum(-1).to(ctx.dtype)]
        if ctx.output_mask[0]:
            outputs.append(d_error.expand_as(residual).to(ctx.dtype))
        if ctx.output_mask[1]:
            d_grad = _rows_by_rows(d_error.expand_as(residual), input, bounds, acc)
            if d_input is not None:
                d_grad = d_grad + _rows_by_rows(error, d_input, bounds, acc)
            outputs.append(q.unsqueeze(-1) * d_grad)
        if ctx.output_mask[2]:
            outputs.append(q * _sums(d_error.expand_as(residual), bounds))
        return tuple(outputs)


def _of_models(values: Tensor, weight: Tensor, bounds: Tensor | None) -> Tensor:
    """Values of rows; 0 in rows of no model."""
    if bounds is None:
        return values
    one = values.new_ones(()).expand(len(weight))
    return _scaled(values, one, bounds, values.dtype)


def _residual(tensors: Sequence[Any], acc: torch.dtype) -> Tensor:
    """``P - y``; 0 in rows of no model."""
    input, weight, target, bias, _, bounds = tensors
    predictions = _predictions(input, weight, bias, bounds, acc)
    return predictions - _of_models(target.to(acc), weight, bounds)


def _general_backward(
    ctx: Any,
    saved: tuple[Any, ...],
    models: Tensor,
    cotangents: tuple[Tensor | None, ...],
    q: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The formula of LinearMseModelsFunction's docstring, in the dtype of accumulation.

    ``models``: (B, K, *), whatever is known of that shape.
    """
    *tensors, error, grad_weight, grad_bias = saved
    input, weight, target, _, samples, bounds = tensors
    d_loss, d_error, d_grad_weight, d_grad_bias = cotangents
    acc = q.dtype
    q = q.unsqueeze(-1)
    residual = None
    if needed[4]:
        residual = _residual(tensors, acc)
        error = residual if samples is None else samples * residual  # a stored one is rounded
    error = None if error is None else error.to(acc)
    Q = None if d_error is None else _of_models(d_error.to(acc), models, bounds)
    if d_grad_bias is not None:
        part = _spread(q * d_grad_bias, input, bounds)
        Q = part if Q is None else Q + part
    if d_grad_weight is not None:
        d_grad_weight = q.unsqueeze(-1) * d_grad_weight
        part = _rows_by_models(beside_slopes(input), d_grad_weight, bounds, acc)
        Q = part if Q is None else Q + part
    R = Q if samples is None or Q is None else _of_models(samples * Q, models, bounds)
    share = None if d_loss is None else (q * d_loss.to(acc).unsqueeze(-1)).squeeze(-1)
    if share is not None and error is not None:
        part = _scaled(error, share, bounds, acc)
        R = part if R is None else R + part
    assert R is not None
    R = R.expand(*R.shape[:-2], input.shape[-2], R.shape[-1])
    grad_input = grad_samples = None
    if needed[0]:
        grad_input = _back(R, beside_slopes(weight), input, bounds)
        if d_grad_weight is not None:
            grad_input = grad_input + _back(error, d_grad_weight, input, bounds)
    if needed[4]:
        assert residual is not None
        parts = []
        if Q is not None:
            parts.append(residual * Q)
        if share is not None:
            parts.append(residual * _scaled(residual, share / 2, bounds, acc))
        grad_samples = _to_shape(sum(parts[1:], parts[0]), samples)
    weight_dtype, bias_dtype = ctx.dtypes
    d_weight = _rows_by_rows(R, beside_slopes(input), bounds, weight_dtype) if needed[1] else None
    d_bias = _sums(R, bounds).to(bias_dtype) if needed[3] else None
    if d_loss is not None and error is None:  # what E would add to R is in the slopes of the loss
        each = d_loss.to(acc)[:, None]
        d_weight = None if d_weight is None else d_weight + (each[..., None] * grad_weight).to(weight_dtype)
        d_bias = None if d_bias is None else d_bias + (each * grad_bias).to(bias_dtype)
    return [grad_input, d_weight, _to_shape(-R, target) if needed[2] else None, d_bias, grad_samples]


def _save_factors(ctx: Any, left: Tensor, right: Tensor, bounds: Tensor, dtype: torch.dtype) -> None:
    """Save each factor for the other one's gradient alone, as MatmulFunction does."""
    needs_left, needs_right = ctx.needs_input_grad[:2]
    ctx.save_for_backward(left if needs_right else None, right if needs_left else None, bounds)
    ctx.save_for_forward(left, right, bounds)
    ctx.dtype, ctx.dtypes = dtype, (left.dtype, right.dtype)


class ProductFunction(torch.autograd.Function):
    """Derivatives of ``rows[r] . models[b(r), k]``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_factors(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, models, bounds = ctx.saved_tensors
        return (
            _product(grad, models.mT, bounds, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None,
            _outer(grad, rows, bounds, ctx.dtypes[1]) if ctx.needs_input_grad[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, d_rows: Tensor | None, d_models: Tensor | None, _: None) -> Tensor | None:
        rows, models, bounds = ctx.saved_tensors
        parts = [] if d_rows is None else [_product(d_rows, models, bounds, ctx.dtype)]
        parts += [] if d_models is None else [_product(rows, d_models, bounds, ctx.dtype)]
        return sum(parts[1:], parts[0]) if parts else None


class OuterFunction(torch.autograd.Function):
    """Derivatives of the sums of ``left[r, k] * right[r, d]`` over each model's rows."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_factors(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, bounds = ctx.saved_tensors
        return (
            _product(right, grad, bounds, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None,
            _product(left, grad.mT, bounds, ctx.dtypes[1]) if ctx.needs_input_grad[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, d_left: Tensor | None, d_right: Tensor | None, _: None) -> Tensor | None:
        left, right, bounds = ctx.saved_tensors
        parts = [] if d_left is None else [_outer(d_left, right, bounds, ctx.dtype)]
        parts += [] if d_right is None else [_outer(left, d_right, bounds, ctx.dtype)]
        return sum(parts[1:], parts[0]) if parts else None


def prepare(*args: Any) -> tuple[tuple[Any, ...], list[int]]:
    """Ask the forward for what the backward of this call will need; of ``linear_mse`` too.

    The caller may be a level of torch.func to which the tensors that this level differentiates are constants:
    it gets the outputs that it asked for, no others.
    """
    *tensors, reduction, output_mask, dtype = args
    input, weight, target, bias = [t is not None and needs_derivative((t,)) for t in tensors[:4]]
    needed = (input or target, weight, bias)
    given = [asked or need for asked, need in zip(output_mask, needed, strict=True)]
    places = [0, *(sum(given[: i + 1]) for i, asked in enumerate(output_mask) if asked)]
    return (*tensors, reduction, given, dtype), places


def read_by_backward(
    tensors: Sequence[Tensor | None], output_mask: Sequence[bool], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The tensor arguments of a forward whose values its derivatives by the ``needed`` ones read; None for the others.

    The gradient of sample weights reads all.
    """
    input, weight, target, bias, *others = tensors
    everything = needed[4]
    return [
        input if everything or output_mask[1] else None,
        weight if everything or output_mask[0] else None,
        target if everything else None,
        bias if everything else None,
        *others,
    ]


def autocast(*args: Any) -> tuple[Any, ...]:
    """Input, weight and bias as a product's operands, the loss in float32; of ``linear_mse`` too."""
    input, weight, target, bias, sample_weight, *others, _ = args
    acc = acc_dtype(target, sample_weight)
    return *map(autocast_cast, (input, weight)), target, autocast_cast(bias), sample_weight, *others, acc


def _autocast_rows(*args: Any) -> tuple[Any, ...]:
    left, right, bounds, _ = args
    return (*(operands := tuple(map(autocast_cast, (left, right)))), bounds, operands[0].dtype)


def _launch(launcher: Any, *args: Any) -> list[Tensor]:
    """target and sample_weight are expanded to (B, N, K); bounds on the CPU are checked."""
    input, weight, target, bias, samples, bounds, *options = args
    shape = (len(weight), input.shape[-2], weight.shape[1]) if bounds is None else target.shape
    if bounds is not None and bounds.is_cpu:
        check_bounds(bounds, len(input))
    samples = None if samples is None else samples.expand(shape)
    target = target if target.shape == shape else target.expand(shape)
    return launcher(input, weight, target, bias, samples, bounds, *options)


def _launch_rows(launcher: Any, left: Tensor, right: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    if bounds.is_cpu:
        check_bounds(bounds, len(left))
    return launcher(left, right, bounds, dtype)


def _fake(*args: Any) -> list[Tensor]:
    input, weight, target, *tensors, _reduction, output_mask, dtype = args
    bounds = tensors.pop()
    acc = acc_dtype(input, weight, target, *tensors)
    B, K, D = weight.shape
    rows = (input.shape[0],) if bounds is not None else (B, input.shape[-2])
    others = (((*rows, K), dtype), ((B, K, D), acc), ((B, K), acc))
    outputs = zip(others, output_mask, strict=True)
    return [
        input.new_empty((B,), dtype=dtype),
        *(input.new_empty(shape, dtype=dt) for (shape, dt), wanted in outputs if wanted),
    ]


def _product_fake(rows: Tensor, models: Tensor, _: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty((rows.shape[0], models.shape[1]), dtype=dtype)


def _outer_fake(left: Tensor, right: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    return left.new_empty((bounds.shape[0], left.shape[1], right.shape[1]), dtype=dtype)


def _mapped(size: int, tensor: Tensor, dim: int | None) -> Tensor:
    """The mapped dimension first; a tensor without one is expanded, which copies nothing."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _folded(size: int, tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """``(size, B, ...)`` as ``(size * B, ...)``."""
    return None if tensor is None else _mapped(size, tensor, dim).flatten(0, 1)


def _folded_bounds(size: int, bounds: Tensor, dim: int | None, rows: int) -> Tensor:
    """Bounds of ``size`` times as many models, whose rows stand one behind another.

    What is out of range must not become the rows of another: on the CPU, where that is an error, it stays out.
    """
    bounds = _mapped(size, bounds, dim).to(torch.int64)
    firsts = torch.arange(size, device=bounds.device)[:, None, None] * rows
    inside = bounds.clamp(0, rows)
    folded = inside + firsts
    return (folded.where(inside == bounds, -1) if bounds.device.type == "cpu" else folded).flatten(0, 1)


def _vmap(operator: Operator, size: int, in_dims: Sequence[int | None], *args: Any) -> list[Tensor]:
    """A batch of batches of models is one of more models."""
    *tensors, bounds, reduction, output_mask, dtype = args
    if bounds is not None:
        rows = tensors[0].shape[-2] if in_dims[0] is None else tensors[0].movedim(in_dims[0], 0).shape[1]
        operands = [_folded(size, tensor, dim) for tensor, dim in zip(tensors, in_dims[:5], strict=True)]
        bounds = _folded_bounds(size, bounds, in_dims[5], rows)
    else:
        models = tensors[1].movedim(in_dims[1], 0).shape[1] if in_dims[1] is not None else len(tensors[1])
        operands = []
        for tensor, dim, own in zip(tensors, in_dims[:5], (3, 3, 3, 2, 3), strict=True):
            if tensor is not None:
                if tensor.dim() - (dim is not None) < own:  # shared by the models
                    if dim is None:
                        operands.append(tensor)
                        continue
                    tensor = tensor.movedim(dim, 0).unsqueeze(1)
                    tensor, dim = tensor.expand(size, models, *tensor.shape[2:]), 0
                tensor = _folded(size, tensor, dim)
            operands.append(tensor)
    outputs = operator(*operands, bounds, reduction, output_mask, dtype)
    return [output.unflatten(0, (size, output.shape[0] // size)) for output in outputs]


def _rows_vmap(operator: Operator, size: int, in_dims: Sequence[int | None], *args: Any) -> Tensor:
    left, right, bounds, dtype = args
    rows = left.shape[-2] if in_dims[0] is None else left.movedim(in_dims[0], 0).shape[1]
    folded = (_folded(size, tensor, dim) for tensor, dim in zip((left, right), in_dims[:2], strict=True))
    output = operator(*folded, _folded_bounds(size, bounds, in_dims[2], rows), dtype)
    return output.unflatten(0, (size, output.shape[0] // size))


models_forward = Operator(
    "linear_mse_models",
    "forward",
    fake=_fake,
    vmap=_vmap,
    derivative=LinearMseModelsFunction,
    launch=_launch,
    prepare=prepare,
    autocast=autocast,
)
# ``(R, K)``: ``rows`` (R, D) times each row's own of ``models`` (B, K, D), transposed; 0 in rows of no model.
_product = Operator(
    "linear_mse_models",
    "product",
    fake=_product_fake,
    vmap=_rows_vmap,
    derivative=ProductFunction,
    launch=_launch_rows,
    autocast=_autocast_rows,
)
# ``(B, K, D)``: ``left`` (R, K), transposed, times ``right`` (R, D) over each model's rows.
_outer = Operator(
    "linear_mse_models",
    "outer",
    fake=_outer_fake,
    vmap=_rows_vmap,
    derivative=OuterFunction,
    launch=_launch_rows,
    autocast=uncast,  # under autocast it adds up sample weights alone
)
