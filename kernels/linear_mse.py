"""Linear model and mean squared error in one op: ``linear_mse_loss`` and ``linear_mse_loss_and_grad``.

The predictions are never stored. When a gradient may be asked for, the operator ``linear_mse`` returns beside
the loss what one pass over the data gives away: the weighted errors E and the gradients of weight and bias.
These are outputs like any other, differentiable themselves, so a backward only scales them, and a second
derivative starts from them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .dtypes import accumulator
from .matmul import check_linear, linear, linear_in_torch, product, scale_and_add, sum_to
from .mse import (
    SMALL,
    in_places,
    loss_dtype,
    mse,
    mse_backward,
    mse_hvp,
    total_weight,
    wanted_gradients,
)
from .registration import (
    Operator,
    autocast_cast,
    needs_derivative,
    served_by_torch,
    torch_mse_loss,
)


def linear_mse_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    sample_weight: Tensor | None = None,
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

    Args:
        input: float64, float32, float16 or bfloat16, any strides.
        weight: of the same dtype and device.
        target: of the same dtype and device.
        bias: of the same dtype and device.
        sample_weight: of the same dtype and device.
        reduction: ``"mean"`` (over all elements of target), ``"sum"`` or ``"none"``.

    Returns:
        The loss in the tensors' dtype, accumulated in float32 (float64 for float64). Under autocast input, weight
        and bias are taken in the autocast dtype; target, predictions and loss are float32.

    Raises:
        ValueError: ``target``, ``bias`` or ``sample_weight`` has the wrong shape, or ``reduction`` is unknown.
        TypeError: dtypes differ or are not served.
        RuntimeError: devices differ, or input and weight do not fit.

    Example:
        >>> x, y = torch.randn(8, 3), torch.randn(8)
        >>> w = torch.zeros(3, requires_grad=True)
        >>> linear_mse_loss(x, w, y).backward()
    """
    op = "linear_mse_loss"
    if (
        sample_weight is None
        and reduction in checks.REDUCTIONS
        and served_by_torch(input, weight, target, optional=bias)
        and input.nbytes <= SMALL
        and target.nbytes <= SMALL
    ):
        check_linear(op, input, weight, bias)
        predictions = linear_in_torch(input, weight, bias)
        if predictions.shape == target.shape:
            return torch_mse_loss(predictions, target, checks.REDUCTIONS.index(reduction))
    _check(op, input, weight, target, bias, checks.REDUCTIONS, reduction, sample_weight)
    samples = sample_weight
    if samples is not None and samples.shape != target.shape:
        samples = samples.unsqueeze(-1)  # the operators spread one weight per sample over the outputs
    if reduction == "none":
        return mse(linear(input, weight, bias), target, samples, "none")
    matrices = _normal_form(input, weight, target, bias, samples)
    dtype = loss_dtype(target)
    # The mean of nothing is nan however weighted, but its gradients are 0, as those of torch's products.
    if samples is None or reduction == "sum" or target.numel() == 0:
        return _linear_mse(*matrices, reduction, [False] * 3, dtype)[0]
    wide = accumulator(input, target)
    total = _linear_mse(*matrices, "sum", [False] * 3, wide)[0]
    return (total / total_weight(samples, target, wide)).to(dtype)


def linear_mse_loss_and_grad(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    wrt: Sequence[str] = ("weight", "bias"),
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]:
    """The loss and its gradients in one pass over the data, without autograd.

        E = input @ weight^T + bias - target,  c = 2 / (N K) for mean, 2 for sum
        grad_weight = c E^T @ input,  grad_bias = c sum_n E,  grad_input = c E @ weight,  grad_target = -c E

    Shapes:
        input ``(*, D)``; weight ``(K, D)`` or ``(D,)``; target ``(*, K)``, or ``(*)`` where weight is ``(D,)``;
        bias ``(K,)``, or one element. Loss ``()``, each gradient as its argument.

    Args:
        input: float64, float32, float16 or bfloat16, any strides.
        weight: of the same dtype and device.
        target: of the same dtype and device.
        bias: of the same dtype and device.
        reduction: ``"mean"`` or ``"sum"``.
        wrt: which gradients are wanted: any of ``"input"``, ``"weight"``, ``"target"``, ``"bias"``.
            ``requires_grad`` plays no part.

    Returns:
        ``(loss, (grad_input, grad_weight, grad_target, grad_bias))`` with None for what is not in ``wrt`` or was
        not given.

    Raises:
        ValueError: ``target`` or ``bias`` has the wrong shape, ``reduction`` is ``"none"`` or unknown, or ``wrt``
            has an unknown name.
        TypeError: dtypes differ or are not served.
        RuntimeError: devices differ, or input and weight do not fit.

    Example:
        >>> x, y, w = torch.randn(8, 3), torch.randn(8), torch.zeros(3)
        >>> loss, (_, grad_weight, _, _) = linear_mse_loss_and_grad(x, w, y)
        >>> w -= 0.1 * grad_weight
    """
    op = "linear_mse_loss_and_grad"
    _check(op, input, weight, target, bias, ("mean", "sum"), reduction)
    arguments = {"input": input, "weight": weight, "target": target, "bias": bias}
    want_input, want_weight, want_target, want_bias = wanted_gradients(op, wrt, arguments)
    x, w, y, b, _ = _normal_form(input, weight, target, bias, None)
    output_mask = [want_input or want_target, want_weight, want_bias]
    args = (x, w, y, b, None, reduction, output_mask, loss_dtype(target))
    loss, error, grad_weight, grad_bias = _outputs(_linear_mse.without_autograd(*args), output_mask)
    grad_input = grad_target = None
    if error is not None:
        with torch.no_grad():
            grad_input, grad_target = _backward(
                loss.new_ones(()), error, w, _slope(y, reduction), (want_input, want_target)
            )
    return loss, (
        _as(grad_input, input),
        _as(grad_weight, weight),
        _as(grad_target, target),
        _as(grad_bias, bias),
    )


def _as(grad: Tensor | None, argument: Tensor | None) -> Tensor | None:
    """A gradient of the normal form in the dtype and shape of the argument it belongs to."""
    if grad is None or argument is None or (grad.dtype == argument.dtype and grad.shape == argument.shape):
        return grad
    return grad.to(argument.dtype).reshape(argument.shape)


def _check(
    op: str,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    reductions: tuple[str, ...],
    reduction: str,
    sample_weight: Tensor | None = None,
) -> None:
    checks.reduction(op, reduction, reductions)
    tensors = {
        "input": input,
        "weight": weight,
        "target": target,
        "bias": bias,
        "sample_weight": sample_weight,
    }
    checks.tensors(op, tensors, ("bias", "sample_weight"))
    check_linear(op, input, weight, bias)
    checks.shape(op, "target", target, input.shape[:-1] + weight.shape[:-1], input=input, weight=weight)
    if sample_weight is not None and sample_weight.shape != target.shape:
        checks.shape(op, "sample_weight", sample_weight, input.shape[:-1], target=target)


def _normal_form(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, samples: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Matrices: input (N, D), weight (K, D), target (N, K), samples (N, K) or (N, 1); bias (K,)."""
    if input.dim() == weight.dim() == 2:
        return input, weight, target, bias, samples
    outputs, features = (weight.shape[0] if weight.dim() == 2 else 1), weight.shape[-1]
    rows = math.prod(input.shape[:-1])
    return (
        input.reshape(rows, features),
        weight.reshape(outputs, features),
        target.reshape(rows, outputs),
        None if bias is None else bias.reshape(outputs),
        None if samples is None else samples.reshape(rows, outputs if samples.shape == target.shape else 1),
    )


def _slope(target: Tensor, reduction: str) -> float:
    """2c: what a sum over E must be multiplied by to become a gradient."""
    return 2.0 / max(1, target.numel()) if reduction == "mean" else 2.0


def _outputs(results: Sequence[Tensor | None], output_mask: Sequence[bool]) -> list[Any]:
    """(loss, E, grad_weight, grad_bias) with None for what was not asked for."""
    return in_places(results, (True, *output_mask))


def _backward(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, output_mask: Sequence[bool]
) -> list[Tensor | None]:
    if not any(output_mask):
        return [None, None]
    return in_places(_linear_mse_backward(grad_output, error, weight, factor, list(output_mask)), output_mask)


def _times(samples: Tensor | None, values: Tensor) -> Tensor:
    """``samples * values`` elementwise: half the gradient of ``sum(samples * values^2)``."""
    if samples is None:
        return values
    half = values.new_full((), 0.5)
    (result, _, _) = mse_backward(
        half, values, values.new_zeros(()).expand_as(values), samples, "sum", 0, (True, False, False)
    )
    assert result is not None
    return result


class LinearMseFunction(torch.autograd.Function):
    """Derivatives of (loss, E, grad_weight, grad_bias), with P = X W^T + b and q = 2c:

        E = s (P - y);  loss = c sum(s (P - y)^2);  grad_weight = q E^T X;  grad_bias = q sum_n E

    The loss alone has a short backward, made of the other outputs. The general one, for second derivatives,
    takes cotangents (l, V, Z, u) of the four: with Q = V + q (X Z^T + u) for E and R = s Q + q l E for P,

        grad_X = R W + q E Z,  grad_W = R^T X,  grad_y = -R,  grad_b = sum_n R,  grad_s = (P - y) Q + c l (P - y)^2.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reduction, ctx.output_mask, ctx.dtype = inputs
        _, error, grad_weight, grad_bias = _outputs(output, ctx.output_mask)
        ctx.save_for_backward(*tensors, error, grad_weight, grad_bias)
        ctx.save_for_forward(*tensors, error)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, target, bias, samples, error, grad_weight, grad_bias = ctx.saved_tensors
        output_mask = ctx.needs_input_grad[:5]
        d_loss, d_error, d_grad_weight, d_grad_bias = _outputs(cotangents, ctx.output_mask)
        q = _slope(target, ctx.reduction)
        if output_mask[4] or any(d is not None for d in (d_error, d_grad_weight, d_grad_bias)):
            tensors = (input, weight, target, bias, samples, error)
            grads = _general_backward(tensors, (d_loss, d_error, d_grad_weight, d_grad_bias), q, output_mask)
        else:
            assert d_loss is not None
            grad_input, grad_target = (
                _backward(d_loss, error, weight, q, (output_mask[0], output_mask[2]))
                if error is not None
                else (None, None)
            )
            grads = [
                grad_input,
                (d_loss * grad_weight).to(weight.dtype) if output_mask[1] else None,
                grad_target,
                (d_loss * grad_bias).to(bias.dtype) if output_mask[3] else None,
                None,
            ]
        return (*grads, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, target, bias, samples, error = ctx.saved_tensors
        d_input, d_weight, d_target, d_bias, d_samples = tangents[:5]
        q = _slope(target, ctx.reduction)
        predictions = product(input, weight.mT, bias, dtype=ctx.dtype)
        d_predictions = d_bias if d_bias is None else d_bias.expand_as(target)
        if d_input is not None:
            d_predictions = product(d_input, weight.mT, d_predictions, dtype=ctx.dtype)
        if d_weight is not None:
            d_predictions = product(input, d_weight.mT, d_predictions, dtype=ctx.dtype)
        directions = (None, d_predictions, d_target, d_samples)
        results = mse_hvp(
            (None, predictions, target, samples), directions, ctx.reduction, 0, (True, False, False, False)
        )
        d_outputs: list[Any] = [results[0].to(ctx.dtype)]
        if any(ctx.output_mask):
            # E = s (P - y) is half the gradient of sum(s (P - y)^2), and its tangent half that gradient's.
            half = target.new_full((), 0.5)
            error = _error(input, weight, target, bias, samples, error, predictions)
            d_error = mse_hvp(
                (half, predictions, target, samples), directions, "sum", 0, (False, True, False, False)
            )[1]
            d_grad_weight = d_grad_bias = None
            wide = accumulator(input)
            if ctx.output_mask[1]:
                d_grad_weight = product(d_error.mT, input, dtype=wide)
                if d_input is not None:
                    d_grad_weight = product(error.mT, d_input, d_grad_weight, dtype=wide)
                d_grad_weight = q * d_grad_weight
            if ctx.output_mask[2]:
                d_grad_bias = q * sum_to(d_error, (target.shape[1],), wide)
            d_outputs += [
                d
                for d, need in zip((d_error, d_grad_weight, d_grad_bias), ctx.output_mask, strict=True)
                if need
            ]
        return tuple(d_outputs)


def _error(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    samples: Tensor | None,
    error: Tensor | None,
    predictions: Tensor | None = None,
) -> Tensor:
    """E, recomputed if it was not saved: half the gradient of ``sum(s (P - y)^2)``."""
    if error is not None:
        return error
    if predictions is None:
        predictions = product(input, weight.mT, bias, dtype=target.dtype)
    half = target.new_full((), 0.5)
    result = mse_backward(half, predictions, target, samples, "sum", 0, (True, False, False))[0]
    assert result is not None
    return result


def _general_backward(
    tensors: tuple[Any, ...], cotangents: tuple[Tensor | None, ...], q: float, output_mask: Sequence[bool]
) -> list[Tensor | None]:
    """The formula of LinearMseFunction's docstring."""
    input, weight, target, bias, samples, saved_error = tensors
    d_loss, d_error, d_grad_weight, d_grad_bias = cotangents
    error = _error(input, weight, target, bias, samples, saved_error)
    Q = d_error
    if d_grad_bias is not None:
        bias_part = (q * d_grad_bias).to(error.dtype).expand_as(error)
        Q = bias_part if Q is None else scale_and_add(error.new_ones(()), Q, bias_part)
    if d_grad_weight is not None:
        Q = product(input, (q * d_grad_weight).to(input.dtype).mT, Q, dtype=error.dtype)
    R = None if Q is None else _times(samples, Q)
    if d_loss is not None:
        R = scale_and_add(q * d_loss, error, R)
    assert R is not None
    grad_input = grad_samples = None
    if output_mask[0]:
        grad_input = product(R, weight, dtype=input.dtype)
        if d_grad_weight is not None:
            slope = (q * d_grad_weight).to(weight.dtype)
            grad_input = product(error, slope, grad_input, dtype=input.dtype)
    if output_mask[4]:
        predictions = product(input, weight.mT, bias, dtype=error.dtype)
        if d_loss is not None:
            half_q = 0.5 * q * d_loss
            grad_samples = mse_backward(half_q, predictions, target, samples, "sum", 0, (False, False, True))[
                2
            ]
        if Q is not None:
            half = target.new_full((), 0.5)
            residual = mse_backward(half, predictions, target, None, "sum", 0, (True, False, False))[0]
            assert residual is not None
            part = sum_to(_times(Q, residual), samples.shape)
            grad_samples = scale_and_add(part.new_ones(()), part, grad_samples, samples.dtype)
    return [
        grad_input,
        product(R.mT, input, dtype=weight.dtype) if output_mask[1] else None,
        scale_and_add(R.new_full((), -1), R, dtype=target.dtype) if output_mask[2] else None,
        sum_to(R, (R.shape[1],), bias.dtype) if output_mask[3] else None,
        grad_samples,
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
        slope = ctx.factor * grad_output
        d_grad = d_error = d_weight = None
        if d_grad_input is not None:
            # (d_grad_input W^T) meets E both in grad_output's gradient and, scaled, in E's.
            projected = product(d_grad_input, weight.mT, dtype=error.dtype)
            if ctx.needs_input_grad[2]:
                d_weight = product(error.mT, d_grad_input, dtype=accumulator(weight))
                d_weight = (slope * d_weight).to(weight.dtype)
        else:
            projected = None
        if d_grad_target is not None:
            minus = error.new_full((), -1)
            projected = scale_and_add(minus, d_grad_target, projected)
        if projected is not None:
            if ctx.needs_input_grad[1]:
                d_error = scale_and_add(slope, projected)
            if ctx.needs_input_grad[0]:
                d_grad = (ctx.factor * _dot(projected, error)).to(grad_output.dtype)
        return d_grad, d_error, d_weight, None, None

    @staticmethod
    def jvp(
        ctx: Any, d_grad: Tensor | None, d_error: Tensor | None, d_weight: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        grad_output, error, weight = ctx.saved_tensors
        slope = ctx.factor * grad_output
        tangent = None if d_grad is None else scale_and_add(ctx.factor * d_grad, error)
        if d_error is not None:
            tangent = scale_and_add(slope, d_error, tangent)
        results = []
        if ctx.output_mask[0]:
            d_input = None if tangent is None else product(tangent, weight, dtype=weight.dtype)
            if d_weight is not None:
                d_input = product(error, (slope * d_weight).to(weight.dtype), d_input, dtype=weight.dtype)
            results.append(d_input)
        if ctx.output_mask[1]:
            results.append(None if tangent is None else scale_and_add(tangent.new_full((), -1), tangent))
        return tuple(results)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return product(a.unsqueeze(-2), b.unsqueeze(-1), None, [0], accumulator(a)).reshape(())


def _prepare(*args: Any) -> tuple[tuple[Any, ...], list[int]]:
    """Ask the forward for what the backward of this call will need.

    The caller may be a level of torch.func to which the tensors that this level differentiates are constants:
    it gets the outputs that it asked for, no others.
    """
    input, weight, target, bias, samples, reduction, output_mask, dtype = args

    def may_need(tensor: Tensor | None) -> bool:
        return tensor is not None and needs_derivative((tensor,))

    given = [
        output_mask[0] or may_need(input) or may_need(target),
        output_mask[1] or may_need(weight),
        output_mask[2] or may_need(bias),
    ]
    asked = [0, *(sum(given[: i + 1]) for i, need in enumerate(output_mask) if need)]
    return (input, weight, target, bias, samples, reduction, given, dtype), asked


def _launch(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, samples: Tensor | None, *args: Any
) -> list[Tensor]:
    spread = None if samples is None else samples.expand_as(target)
    launchers = backends.implementation("linear_mse", input)
    return launchers.linear_mse_forward(input, weight, target, bias, spread, *args)


def _launch_backward(grad_output: Tensor, error: Tensor, *args: Any) -> list[Tensor]:
    return backends.implementation("linear_mse", error).linear_mse_backward(grad_output, error, *args)


def _fake(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    samples: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    wide = accumulator(input, weight, target, bias, samples)
    shapes = ((target.shape, dtype), (weight.shape, wide), (target.shape[1:], wide))
    rest = [
        input.new_empty(shape, dtype=dt)
        for (shape, dt), need in zip(shapes, output_mask, strict=True)
        if need
    ]
    return [input.new_empty((), dtype=dtype), *rest]


def _fake_backward(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, output_mask: list[bool]
) -> list[Tensor]:
    grad_input = weight.new_empty((error.shape[0], weight.shape[1]))
    return [
        result
        for result, need in zip((grad_input, error.new_empty(error.shape)), output_mask, strict=True)
        if need
    ]


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
    """The composition on batched matrices: one product and one loss for the whole batch."""
    *tensors, reduction, output_mask, dtype = args
    input, weight, target, bias, samples = (
        tensor if tensor is None or dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims[:5], strict=True)
    )
    if bias is not None and bias.dim() == 2:
        bias = bias.unsqueeze(1)
        if input.dim() == weight.dim() == 2:  # a bias adds no dimensions to a product
            input = input.expand(info.batch_size, *input.shape)
    predictions = product(input, weight.mT, bias, dtype=dtype)
    shape = (info.batch_size, *predictions.shape[-2:])
    predictions, target = predictions.expand(shape), target.expand(shape)
    results = [mse(predictions, target, samples, reduction, 1, dtype)]
    if any(output_mask):
        # As in _error: half the gradient of sum(s (P - y)^2).
        half = target.new_full((), 0.5).expand(info.batch_size)
        error = mse_backward(half, predictions, target, samples, "sum", 1, (True, False, False))[0]
        assert error is not None
        q = 2.0 / max(1, math.prod(shape[1:])) if reduction == "mean" else 2.0
        wide = accumulator(input)
        if output_mask[0]:
            results.append(error)
        if output_mask[1]:
            results.append(q * product(error.mT, input, dtype=wide))
        if output_mask[2]:
            results.append(q * sum_to(error, (info.batch_size, 1, shape[2]), wide).squeeze(1))
    return results, [0] * len(results)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
    grad_output, error, weight, factor, output_mask = args
    if in_dims[0] is None:
        grad_output = grad_output.expand(info.batch_size)
    error = error if in_dims[1] is None else error.movedim(in_dims[1], 0)
    weight = weight if in_dims[2] is None else weight.movedim(in_dims[2], 0)
    slope = (factor * grad_output.to(accumulator(error))).reshape(-1, 1, 1, 1)
    scaled = product(error.unsqueeze(-1), slope, dtype=error.dtype).squeeze(-1)
    results = []
    if output_mask[0]:
        results.append(product(scaled, weight, dtype=weight.dtype))
    if output_mask[1]:
        results.append(scale_and_add(scaled.new_full((), -1), scaled))
    return results, [0] * len(results)


def _autocast(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    samples: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    x, w, b = (autocast_cast(tensor) for tensor in (input, weight, bias))
    return x, w, target, b, samples, reduction, output_mask, accumulator(target, samples)


_linear_mse = Operator(
    "linear_mse(Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? samples, str reduction, "
    "bool[] output_mask, ScalarType dtype) -> Tensor[]",
    launch=_launch,
    fake=_fake,
    vmap=_vmap,
    derivative=LinearMseFunction,
    prepare=_prepare,
    autocast=_autocast,
)
_linear_mse_backward = Operator(
    "linear_mse_backward(Tensor grad_output, Tensor error, Tensor weight, float factor, bool[] output_mask) "
    "-> Tensor[]",
    launch=_launch_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
    derivative=LinearMseBackwardFunction,
)
