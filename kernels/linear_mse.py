"""Linear model and mean squared error in one op: ``linear_mse_loss`` and ``linear_mse_loss_and_grad``.

The predictions are never stored. When a gradient may be asked for, the operator ``linear_mse`` returns beside
the loss what one pass over the data gives away: the weighted errors E and the gradients of weight and bias.
These are outputs like any other, differentiable themselves, so a backward only scales them, and a second
derivative starts from them. Over 500 lines, since the public functions, their two operators and the second
derivatives of both are one derivation.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import acc_dtype
from .linear_mse_models import (
    autocast,
    beside_errors,
    beside_slopes,
    models_forward,
    models_loss,
    models_loss_and_grad,
    prepare,
    read_by_backward,
    slopes_dtype,
)
from .matmul import linear, linear_in_torch, product, scale_and_add, sum_to
from .mse import divisor, mse, mse_backward, mse_hvp, mse_in_torch, suits_torch
from .operator import Operator, in_places, uncast, use_torch_fast_path
from .repeat import repeatable
from .torch_private import torch_mse_loss

# Bytes of input or target up to which torch's own ops and autograd serve on the fallback: a second pass over what
# the last cache of a CPU holds costs less than the way through the registered operators (65,536 x 64: 0.87x).
SMALL = 1 << 25


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
    """``mse_loss(linear(input, weight, bias), target)`` without the predictions ever being stored.

        e[n, k] = sum_d input[n, d] * weight[k, d] + bias[k] - target[n, k]

        mean: sum(s e^2) / (N K), or sum(s e^2) / sum(s) where sample weights s are given;
        sum: sum(s e^2);  none: s e^2

    With one output (K = 1) the data are read once for the loss and every gradient. Differentiable to any order
    in all tensors, in reverse and forward mode. ``reduction="none"`` is the composition above: its result has
    as many elements as the predictions.

    Shapes:
        input ``(*, D)``; weight ``(K, D)`` or ``(D,)``; target ``(*, K)``, or ``(*)`` where weight is ``(D,)``;
        bias ``(K,)``, or one element; sample_weight ``(*)``, one per sample, or target's shape.
        Loss: ``()``, or target's shape for none.
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
        offsets: int32 or int64, on the same device, not decreasing, within 0 and R. A model without rows has the
            mean nan, the sum 0 and gradients 0, a row of no model loss and gradients 0. On a device bad offsets are
            clamped, not found out.
        reduction: ``"mean"`` (over all elements of target, of each model's), ``"sum"`` or ``"none"``.

    Returns:
        The loss in the tensors' dtype, accumulated in float32 (float64 for float64). Under autocast input, weight
        and bias are taken in the autocast dtype; target, predictions (but for none, as of ``linear``) and loss are
        float32.

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
    matrices, total = _weighting(_normal_form(input, weight, target, bias, sample_weight), reduction)
    dtype = checks.loss_dtype(target)
    if total is None:
        return _linear_mse(*matrices, reduction, [False] * 3, dtype)[0]
    return (_linear_mse(*matrices, "sum", [False] * 3, acc_dtype(input, target))[0] / total).to(dtype)


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
    """The loss and its gradients in one pass over the data, without autograd.

        E = s (input @ weight^T + bias - target),  c = 2 / (N K), or 2 / sum(s), for mean, 2 for sum
        grad_weight = c E^T @ input,  grad_bias = c sum_n E,  grad_input = c E @ weight,  grad_target = -c E

    Shapes:
        input ``(*, D)``; weight ``(K, D)`` or ``(D,)``; target ``(*, K)``, or ``(*)`` where weight is ``(D,)``;
        bias ``(K,)``, or one element. Loss ``()``, each gradient as its argument. sample_weight, offsets and a batch of
        models as for ``linear_mse_loss``: loss ``(B,)``, and the gradients of its sum.

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
            matrices, total = _weighting(matrices, reduction)
    output_mask = [want_input or want_target, want_weight, want_bias]
    dtype = checks.loss_dtype(target)
    if total is not None:
        reduction, dtype = "sum", acc_dtype(input, target)
    outputs = _linear_mse.without_autograd(*matrices, reduction, output_mask, dtype)
    loss, error, grad_weight, grad_bias = in_places(outputs, output_mask)
    if total is not None:
        loss = (loss / total).to(checks.loss_dtype(target))
        grad_weight, grad_bias = (None if g is None else g / total for g in (grad_weight, grad_bias))
    grad_input = grad_target = None
    if error is not None:
        with torch.no_grad():
            upstream = loss.new_ones(()) if total is None else 1 / total
            options = _slope(target.numel(), reduction), (want_input, want_target)
            grad_input, grad_target = _linear_mse_backward.masked(upstream, error, matrices[1], *options)
    grads = grad_input, grad_weight, grad_target, grad_bias
    d_input, d_weight, d_target, d_bias = map(_as, grads, arguments.values())
    return loss, (d_input, d_weight, d_target, d_bias)


def _of_models(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.dim() == 3


def _as(grad: Tensor | None, argument: Tensor | None) -> Tensor | None:
    """A gradient of the normal form in the dtype and shape of the argument it belongs to."""
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
    """Matrices: input (N, D), weight (K, D), target (N, K), sample_weight (N, K) or (N, 1); bias (K,)."""
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


def _weighting(matrices: tuple[Any, ...], reduction: str) -> tuple[tuple[Any, ...], Tensor | None]:
    """The matrices as the kernels take them, and what sums by their weights are divided by; None: by nothing."""
    input, weight, target, bias, samples = matrices
    total = None
    # The mean of nothing is nan however weighted, but its gradients are 0, as those of torch's products.
    if samples is not None and target.numel():
        samples, factor = beside_errors(samples, input)
        if reduction == "mean":
            total = divisor(samples, target, acc_dtype(input, target))
        elif factor is not None:
            total = factor.reshape(()).reciprocal()
    return (input, weight, target, bias, samples), total


def _slope(count: int, reduction: str) -> float:
    """2c, by which a sum over E becomes a gradient; ``count`` is the number of elements of target."""
    return 2.0 / max(1, count) if reduction == "mean" else 2.0


def _weighted_error(
    predictions: Tensor, target: Tensor, sample_weight: Tensor | None, batch_dims: int = 0
) -> Tensor:
    """``s (P - y)``: half the gradient of ``sum(s (P - y)^2)``, so that its derivatives are operators too."""
    half = target.new_full((), 0.5).expand(target.shape[:batch_dims])
    options = "sum", batch_dims, (True, False, False)
    return mse_backward.masked(half, predictions, target, sample_weight, *options)[0]


def _weighted(sample_weight: Tensor | None, values: Tensor) -> Tensor:
    """``s v``, as the weighted error of v against 0."""
    if sample_weight is None:
        return values
    return _weighted_error(values, values.new_zeros(()).expand_as(values), sample_weight)


class LinearMseFunction(torch.autograd.Function):
    """Derivatives of (loss, E, grad_weight, grad_bias), with P = X W^T + b and q = 2c:

        E = s (P - y);  loss = c sum(s (P - y)^2);  grad_weight = q E^T X;  grad_bias = q sum_n E

    The loss alone has a short backward, made of the other outputs. The general one, for second derivatives,
    takes cotangents (l, V, Z, u) of the four: with Q = V + q (X Z^T + u) for E and R = s Q + q l E for P,

        grad_X = R W + q E Z,  grad_W = R^T X,  grad_y = -R,  grad_b = sum_n R,  grad_s = (P - y) Q + c l (P - y)^2.

    Where neither X, y nor s needs a gradient, E is not known: l times grad_weight and grad_bias stand for its part.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reduction, ctx.output_mask, ctx.dtype = inputs
        _, *others = in_places(output, ctx.output_mask)
        ctx.save_for_backward(*read_by_backward(tensors, ctx.output_mask, ctx.needs_input_grad), *others)
        ctx.save_for_forward(*tensors, others[0])
        ctx.shape = tensors[2].shape
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
        saved = ctx.saved_tensors  # asked for once: a checkpoint gives them no second time
        *tensors, error, grad_weight, grad_bias = saved
        output_mask = ctx.needs_input_grad[:5]
        cotangents = tuple(in_places(cotangents, ctx.output_mask))
        d_loss, *others = cotangents
        q = _slope(math.prod(ctx.shape), ctx.reduction)
        if output_mask[4] or any(cotangent is not None for cotangent in others):
            return _general_backward(ctx, saved, cotangents, q, output_mask)
        assert d_loss is not None
        grad_input = grad_target = None
        if error is not None:
            grad_input, grad_target = _linear_mse_backward.masked(
                d_loss, error, tensors[1], q, (output_mask[0], output_mask[2])
            )
        return [
            grad_input,
            (d_loss * grad_weight).to(ctx.dtypes[1]) if output_mask[1] else None,
            grad_target,
            (d_loss * grad_bias).to(ctx.dtypes[3]) if output_mask[3] else None,
            None,
        ]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        d_input, d_weight, d_target, d_bias, d_sample_weight = tangents
        input, weight, target, bias, sample_weight, error = ctx.saved_tensors
        q = _slope(target.numel(), ctx.reduction)
        predictions = product(input, weight.mT, bias, dtype=ctx.dtype)
        d_predictions = d_bias if d_bias is None else d_bias.expand_as(target)
        if d_input is not None:
            d_predictions = product(d_input, weight.mT, d_predictions, dtype=ctx.dtype)
        if d_weight is not None:
            d_predictions = product(input, d_weight.mT, d_predictions, dtype=ctx.dtype)
        primals = predictions, target, sample_weight
        directions = None, d_predictions, d_target, d_sample_weight
        loss_only, error_only = (True, False, False, False), (False, True, False, False)
        d_loss = mse_hvp.masked(None, *primals, *directions, ctx.reduction, 0, loss_only)[0]
        d_outputs: list[Any] = [d_loss.to(ctx.dtype)]
        if any(ctx.output_mask):
            if error is None:
                error = _weighted_error(*primals)
            half = target.new_full((), 0.5)  # as in _weighted_error
            d_error = mse_hvp.masked(half, *primals, *directions, "sum", 0, error_only)[1]
            d_grad_weight = d_grad_bias = None
            acc = acc_dtype(input)
            if ctx.output_mask[1]:
                d_grad_weight = product(d_error.mT, input, dtype=acc)
                if d_input is not None:
                    d_grad_weight = product(error.mT, d_input, d_grad_weight, dtype=acc)
                d_grad_weight = q * d_grad_weight
            if ctx.output_mask[2]:
                d_grad_bias = q * sum_to(d_error, (target.shape[1],), acc)
            found = zip((d_error, d_grad_weight, d_grad_bias), ctx.output_mask, strict=True)
            d_outputs += [tangent for tangent, wanted in found if wanted]
        return tuple(d_outputs)


def _general_backward(
    ctx: Any,
    saved: tuple[Any, ...],
    cotangents: tuple[Tensor | None, ...],
    q: float,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """The formula of LinearMseFunction's docstring."""
    input, weight, target, bias, sample_weight, error, grad_weight, grad_bias = saved
    d_loss, d_error, d_grad_weight, d_grad_bias = cotangents
    input_dtype, weight_dtype, target_dtype, bias_dtype, _ = ctx.dtypes
    if error is None and output_mask[4]:
        predictions = product(input, weight.mT, bias, dtype=target.dtype)
        error = _weighted_error(predictions, target, sample_weight)
    wide = slopes_dtype(ctx.dtype)  # of Q and R
    Q = d_error
    if d_grad_bias is not None:
        bias_part = (q * d_grad_bias).to(wide).expand(ctx.shape)
        Q = bias_part if Q is None else scale_and_add(Q.new_ones(()), Q, bias_part, wide)
    if d_grad_weight is not None:
        left = beside_slopes(input)
        Q = product(left, (q * d_grad_weight).to(left.dtype).mT, Q, dtype=wide)
    R = None if Q is None else _weighted(sample_weight, Q)
    if d_loss is not None and error is not None:
        R = scale_and_add(q * d_loss.to(acc_dtype(d_loss)), error, R, wide)
    assert R is not None
    grad_input = grad_sample_weight = None
    if output_mask[0]:
        grad_input = product(R, beside_slopes(weight), dtype=input_dtype)
        if d_grad_weight is not None:
            left = beside_slopes(error)
            grad_input = product(left, (q * d_grad_weight).to(left.dtype), grad_input, dtype=input_dtype)
    if output_mask[4]:
        predictions = product(input, weight.mT, bias, dtype=error.dtype)
        if d_loss is not None:
            primals = 0.5 * q * d_loss, predictions, target, sample_weight
            grad_sample_weight = mse_backward.masked(*primals, "sum", 0, (False, False, True))[2]
        if Q is not None:
            residual = _weighted_error(predictions, target, None)
            part = sum_to(_weighted(residual, Q), sample_weight.shape)
            grad_sample_weight = scale_and_add(
                part.new_ones(()), part, grad_sample_weight, sample_weight.dtype
            )
    d_weight = product(R.mT, beside_slopes(input), dtype=weight_dtype) if output_mask[1] else None
    d_bias = sum_to(R, (R.shape[1],), bias_dtype) if output_mask[3] else None
    if d_loss is not None and error is None:  # what E would add to R is in the slopes of the loss
        d_weight = None if d_weight is None else d_weight + (d_loss * grad_weight).to(weight_dtype)
        d_bias = None if d_bias is None else d_bias + (d_loss * grad_bias).to(bias_dtype)
    return [
        grad_input,
        d_weight,
        scale_and_add(R.new_full((), -1), R, dtype=target_dtype) if output_mask[2] else None,
        d_bias,
        grad_sample_weight,
    ]


class LinearMseBackwardFunction(torch.autograd.Function):
    """Derivatives of ``grad_input = g q E W`` and ``grad_target = -g q E``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_output, error, weight, ctx.factor, ctx.output_mask = inputs
        ctx.save_for_backward(grad_output, error, weight)
        ctx.save_for_forward(grad_output, error, weight)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, error, weight = ctx.saved_tensors
        d_grad_input, d_grad_target = in_places(cotangents, ctx.output_mask)
        slope = ctx.factor * grad_output.to(acc_dtype(grad_output))
        d_grad = d_error = d_weight = projected = None
        if d_grad_input is not None:
            # (d_grad_input W^T) meets E both in grad_output's gradient and, scaled, in E's.
            projected = product(d_grad_input, weight.mT, dtype=error.dtype)
            if ctx.needs_input_grad[2]:
                d_weight = product(error.mT, d_grad_input, dtype=acc_dtype(weight))
                d_weight = (slope * d_weight).to(weight.dtype)
        if d_grad_target is not None:
            projected = scale_and_add(error.new_full((), -1), d_grad_target, projected)
        if projected is not None:
            if ctx.needs_input_grad[1]:
                d_error = scale_and_add(slope, projected)
            if ctx.needs_input_grad[0]:
                d_grad = (ctx.factor * _dot(projected, error)).to(grad_output.dtype)
        return d_grad, d_error, d_weight

    @staticmethod
    def jvp(
        ctx: Any, d_grad: Tensor | None, d_error: Tensor | None, d_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_output, error, weight = ctx.saved_tensors
        acc = acc_dtype(grad_output)
        slope = ctx.factor * grad_output.to(acc)
        tangent = None if d_grad is None else scale_and_add(ctx.factor * d_grad.to(acc), error)
        if d_error is not None:
            tangent = scale_and_add(slope, d_error, tangent)
        results = []
        if ctx.output_mask[0]:
            d_input = None if tangent is None else product(tangent, weight, dtype=weight.dtype)
            if d_weight is not None:
                left = beside_slopes(error)
                d_input = product(left, slope * d_weight.to(left.dtype), d_input, dtype=weight.dtype)
            results.append(d_input)
        if ctx.output_mask[1]:
            results.append(None if tangent is None else scale_and_add(tangent.new_full((), -1), tangent))
        return tuple(results)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return product(a.unsqueeze(-2), b.unsqueeze(-1), None, [0], acc_dtype(a)).reshape(())


def _launch(launcher: Any, *args: Any) -> list[Tensor]:
    *matrices, sample_weight, reduction, output_mask, dtype = args
    if sample_weight is not None:
        sample_weight = sample_weight.expand_as(matrices[2])
    return launcher(*matrices, sample_weight, reduction, output_mask, dtype)


def _fake(*args: Any) -> list[Tensor]:
    *tensors, _reduction, output_mask, dtype = args
    input, weight, target = tensors[:3]
    acc = acc_dtype(*tensors)
    others = ((target.shape, dtype), (weight.shape, acc), (target.shape[1:], acc))
    outputs = zip(others, output_mask, strict=True)
    return [
        input.new_empty((), dtype=dtype),
        *(input.new_empty(shape, dtype=dt) for (shape, dt), wanted in outputs if wanted),
    ]


def _backward_fake(
    _grad_output: Tensor, error: Tensor, weight: Tensor, _factor: float, output_mask: list[bool]
) -> list[Tensor]:
    shapes = ((weight, (error.shape[0], weight.shape[1])), (error, error.shape))
    outputs = zip(shapes, output_mask, strict=True)
    return [tensor.new_empty(shape) for (tensor, shape), wanted in outputs if wanted]


def _vmap(_: Operator, batch_size: int, in_dims: Sequence[int | None], *args: Any) -> list[Tensor]:
    """A batch of models."""
    *tensors, reduction, output_mask, dtype = args
    input, weight, target, bias, sample_weight = (
        tensor.movedim(dim, 0) if dim else tensor for tensor, dim in zip(tensors, in_dims[:5], strict=True)
    )
    weight = weight.expand(batch_size, *weight.shape[-2:])
    bias = None if bias is None else bias.expand(batch_size, bias.shape[-1])
    return models_forward(input, weight, target, bias, sample_weight, None, reduction, output_mask, dtype)


def _backward_vmap(_: Operator, batch_size: int, in_dims: Sequence[int | None], *args: Any) -> list[Tensor]:
    grad_output, error, weight, factor, output_mask = args
    if in_dims[0] is None:
        grad_output = grad_output.expand(batch_size)
    error = error if in_dims[1] is None else error.movedim(in_dims[1], 0)
    weight = weight if in_dims[2] is None else weight.movedim(in_dims[2], 0)
    slope = (factor * grad_output.to(acc_dtype(error))).reshape(-1, 1, 1, 1)
    scaled = product(error.unsqueeze(-1), slope, dtype=error.dtype).squeeze(-1)
    results = []
    if output_mask[0]:
        results.append(product(scaled, weight, dtype=weight.dtype))
    if output_mask[1]:
        results.append(scale_and_add(scaled.new_full((), -1), scaled))
    return results


_linear_mse = Operator(
    "linear_mse",
    "forward",
    fake=_fake,
    vmap=_vmap,
    derivative=LinearMseFunction,
    launch=_launch,
    prepare=prepare,
    autocast=autocast,
)
_linear_mse_backward = Operator(
    "linear_mse",
    "backward",
    fake=_backward_fake,
    vmap=_backward_vmap,
    derivative=LinearMseBackwardFunction,
    autocast=uncast,
)
