"""The operators of ``linear_mse_loss``, of one model and of B, and their derivatives: one derivation for all.

``linear_mse``, one model with kernels of its own, has the derivatives of a batch of one; but a first one is the
operator ``linear_mse_backward``. They are made of products (linear_mse_rows.py) and, where they are elementwise, of
``mse``'s operators: on Triton torch computes nothing of the size of the data, ragged rows aside. Over 500 lines, since
the operators' derivatives are made of each other.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import acc_dtype
from .linear_mse_rows import (
    check_bounds,
    folded,
    folded_bounds,
    lengths,
    of_models,
    row_sums,
    rows_back,
    rows_by_models,
    rows_by_rows,
    scaled,
    spread,
)
from .matmul import product, scale_and_add, sum_to
from .mse import mse_backward, mse_hvp
from .operator import Operator, autocast_cast, in_places, mapped, needs_derivative, uncast

Grads = list[Tensor | None]


class Like(NamedTuple):
    """What a gradient goes by of its tensor, whose values it does not need."""

    shape: Sequence[int]
    dtype: torch.dtype


def slopes(
    like: Tensor, dtype: torch.dtype, target: Sequence[int], bounds: Tensor | None, reduction: str
) -> Tensor:
    """Return q = 2c, by which a sum over E becomes a gradient: ``()``, or ``(B,)`` for the mean over ragged rows.

    ``like``: any tensor of the device. ``target``: its shape.
    """
    two = torch.full((), 2.0, dtype=dtype, device=like.device)
    if reduction == "sum":
        return two
    rows, outputs = target[-2:]
    if bounds is None:
        return two / max(1, rows * outputs)
    return two / (lengths(bounds, rows) * outputs).clamp(min=1)


def beside_slopes(values: Tensor) -> Tensor:
    """Return ``values`` as a factor of slopes: a product of two dtypes multiplies the narrower, and float16 might hold
    nothing of slopes."""
    return values.float() if values.dtype == torch.float16 else values


def predicted(tensors: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``P = X W^T + b`` in ``dtype``, y and s as ``mse``'s operators take them; 0 in rows of no model."""
    input, weight, target, bias, samples, bounds = tensors
    addend = None if bias is None else spread(bias.to(dtype), input.shape[-2], bounds)
    predictions = rows_by_models(input, weight, bounds, dtype, addend)
    return predictions, of_models(target, bounds).expand_as(predictions), _ranked(samples, predictions)


def _ranked(samples: Tensor | None, rows: Tensor) -> Tensor | None:
    """Return weights, or their tangents, with as many dimensions as what they weigh."""
    return samples if samples is None or samples.dim() == rows.dim() else samples.unsqueeze(0)


def _weighted_error(predictions: Tensor, target: Tensor, samples: Tensor | None) -> Tensor:
    """Return ``s (P - y)``: half the gradient of ``sum(s (P - y)^2)``, so that its derivatives are operators too."""
    half = predictions.new_full((), 0.5)
    return mse_backward.masked(half, predictions, target, samples, "sum", 0, (True, False, False))[0]


def _weighted(samples: Tensor | None, rows: Tensor, bounds: Tensor | None) -> Tensor:
    """Return ``s v``, as the weighted error of v against 0."""
    if samples is None:
        return rows
    values = _weighted_error(rows, rows.new_zeros(()).expand_as(rows), _ranked(samples, rows))
    return of_models(values, bounds)


def row_gradients(
    scale: Tensor,
    error: Tensor,
    input: Any,
    weight: Tensor,
    target: Any,
    bounds: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return, as needed, ``scale E W`` and ``-scale E`` in the shapes of input and target, or their Like."""
    grad_input = grad_target = None
    if output_mask[0] and bounds is None and error.dtype == torch.float16:
        # Which may have nothing left of a scaled weight; products of ragged rows multiply the wider dtype.
        grad_input = rows_back(scaled(error, scale, bounds, error.dtype), weight, input, bounds)
    elif output_mask[0]:
        grad_input = rows_back(error, scale[:, None, None] * weight, input, bounds)
    if output_mask[1]:
        if len(target.shape) == error.dim():
            grad_target = scaled(error, -scale, bounds, target.dtype)
        else:
            flat = product(
                -scale.unsqueeze(0), error.reshape(len(scale), math.prod(target.shape)), dtype=target.dtype
            )
            grad_target = flat.reshape(target.shape)
    return grad_input, grad_target


class LinearMseModelsFunction(torch.autograd.Function):
    """Derivatives of (loss, E, grad_weight, grad_bias) of each model, with P = X W^T + b and q = 2c:

        E = s (P - y);  loss = c sum(s (P - y)^2);  grad_weight = q E^T X;  grad_bias = q sum_n E

    The loss alone has a short backward, made of the other outputs. The general one, for second derivatives, takes
    cotangents (l, V, Z, u) of the four: with Q = V + q (X Z^T + u) for E and R = s Q + q l E for P,

        grad_X = R W + q E Z,  grad_W = R^T X,  grad_y = -R,  grad_b = sum_n R,  grad_s = (P - y) Q + c l (P - y)^2,

    where q and l are the row's model's, and what models share is summed over them. Where neither X, y nor s needs a
    gradient, E is not known: l times grad_weight and grad_bias stand for its part.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reduction, ctx.output_mask, ctx.dtype = inputs
        _, *others = in_places(output, ctx.output_mask)
        ctx.save_for_backward(*_read_by_backward(tensors, ctx.output_mask, ctx.needs_input_grad), *others)
        ctx.save_for_forward(*tensors)
        ctx.shapes = tensors[0].shape, tensors[2].shape
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:5]]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Grads:
        # Asked for once: a checkpoint gives them no second time.
        *tensors, error, grad_weight, grad_bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[:5]
        d_loss, *others = given = _cotangents(ctx, cotangents, tensors[5])
        if _is_general(needed, others):
            outputs = error, grad_weight, grad_bias
            return [*_general_backward(ctx, tensors, outputs, given, _acc_of(ctx)), None]
        assert d_loss is not None
        d_loss = d_loss.to(_acc_of(ctx))
        grad_input = grad_target = None
        if error is not None:
            _, weight, _, _, _, bounds = tensors
            input, target = map(Like, ctx.shapes, ctx.dtypes[:3:2])
            q = slopes(d_loss, d_loss.dtype, target.shape, bounds, ctx.reduction)
            wanted = needed[0], needed[2]
            grad_input, grad_target = row_gradients(q * d_loss, error, input, weight, target, bounds, wanted)
        return [
            grad_input,
            (d_loss[:, None, None] * grad_weight).to(ctx.dtypes[1]) if needed[1] else None,
            grad_target,
            (d_loss[:, None] * grad_bias).to(ctx.dtypes[3]) if needed[3] else None,
            None,
            None,
        ]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(_tangents(ctx, ctx.saved_tensors, tangents, _acc_of(ctx)))


class LinearMseFunction(LinearMseModelsFunction):
    """Derivatives of one model: all but the short backward are those of a batch of one."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Grads:
        *tensors, error, grad_weight, grad_bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[:5]
        d_loss, *others = given = _cotangents(ctx, cotangents)
        if _is_general(needed, others):
            tensors, outputs, given = map(_batch_of_one, (tensors, (error, grad_weight, grad_bias), given))
            wide = torch.float32 if ctx.dtype == torch.float16 else ctx.dtype
            grads = _general_backward(ctx, [*tensors, None], outputs, given, wide, batch=(1,))
            return [None if grad is None else grad.squeeze(0) for grad in grads]
        assert d_loss is not None
        grad_input = grad_target = None
        if error is not None:
            options = slope(ctx.shapes[1], ctx.reduction), (needed[0], needed[2])
            grad_input, grad_target = linear_mse_backward.masked(d_loss, error, tensors[1], *options)
        return [
            grad_input,
            (d_loss * grad_weight).to(ctx.dtypes[1]) if needed[1] else None,
            grad_target,
            (d_loss * grad_bias).to(ctx.dtypes[3]) if needed[3] else None,
            None,
        ]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, directions = ([*_batch_of_one(given), None] for given in (ctx.saved_tensors, tangents))
        return tuple(tangent.squeeze(0) for tangent in _tangents(ctx, tensors, directions, ctx.dtype))


def _cotangents(ctx: Any, cotangents: Sequence[Any], bounds: Tensor | None = None) -> Grads:
    """Return the cotangents in their places; that of a loss of no rows is 0: nan, which the mean is, times 0 is nan."""
    d_loss, *others = in_places(cotangents, ctx.output_mask)
    if d_loss is not None and bounds is not None:
        d_loss = d_loss.masked_fill(bounds[:, 0] >= bounds[:, 1], 0)
    elif d_loss is not None and not all(ctx.shapes[1]):
        d_loss = torch.zeros_like(d_loss)
    return [d_loss, *others]


def _acc_of(ctx: Any) -> torch.dtype:
    """Return what acc_dtype gives of the operands."""
    return torch.float64 if torch.float64 in ctx.dtypes else torch.float32


def _is_general(needed: Sequence[bool], others: Sequence[Tensor | None]) -> bool:
    """Return whether more than the loss has a cotangent, or sample weights need a gradient."""
    return needed[4] or any(cotangent is not None for cotangent in others)


def _batch_of_one(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.unsqueeze(0) for tensor in tensors]


def slope(shape: Sequence[int], reduction: str) -> float:
    """Return q = 2c of one model, as a number; ``shape``: of target."""
    return 2.0 / max(1, math.prod(shape)) if reduction == "mean" else 2.0


def _general_backward(
    ctx: Any,
    tensors: Sequence[Any],
    outputs: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    wide: torch.dtype,
    batch: tuple[int, ...] = (),
) -> Grads:
    """Compute the formula of LinearMseModelsFunction's docstring, with Q and R in ``wide``.

    ``batch``: what the tensors have before the shapes that they had in the forward.
    """
    input, weight, _, _, samples, bounds = tensors
    error, grad_weight, grad_bias = outputs
    d_loss, d_error, d_grad_weight, d_grad_bias = cotangents
    like_input, like_target = (
        Like((*batch, *shape), dtype) for shape, dtype in zip(ctx.shapes, ctx.dtypes[:3:2], strict=True)
    )
    _, weight_dtype, _, bias_dtype, _ = ctx.dtypes
    needed, acc, rows = ctx.needs_input_grad[:5], _acc_of(ctx), like_input.shape[-2]
    given = next(cotangent for cotangent in cotangents if cotangent is not None)
    q = slopes(given, acc, like_target.shape, bounds, ctx.reduction).unsqueeze(-1)
    if needed[4]:
        data = predicted(tensors, acc)
        error = _weighted_error(*data)  # a stored one is rounded
    Q = None if d_error is None else of_models(d_error, bounds)
    if d_grad_bias is not None:
        part = spread((q * d_grad_bias).to(wide), rows, bounds)
        Q = _every_row(part, rows) if Q is None else _plus(Q, part, wide)
    if d_grad_weight is not None:
        d_grad_weight = (q.unsqueeze(-1) * d_grad_weight).to(wide)
        Q = rows_by_models(beside_slopes(input), d_grad_weight, bounds, wide, Q)
    R = None if Q is None else _weighted(samples, Q, bounds)
    share = None if d_loss is None else (q * d_loss.to(acc).unsqueeze(-1)).squeeze(-1)
    if share is not None and error is not None:
        R = scaled(error, share, bounds, wide, R)
    assert R is not None
    grad_input = grad_samples = None
    if needed[0]:
        grad_input = rows_back(R, beside_slopes(weight), like_input, bounds)
        if d_grad_weight is not None and error is not None:
            grad_input = rows_back(beside_slopes(error), d_grad_weight, like_input, bounds, grad_input)
    if needed[4]:
        predictions, target, weights = data
        if share is not None:
            upstream, options = share / 2, ("sum", 1)
            if bounds is not None:
                upstream, options = (
                    spread(upstream.unsqueeze(-1), rows, bounds).expand_as(target),
                    ("none", 0),
                )
            wanted = False, False, True
            grad_samples = mse_backward.masked(upstream, predictions, target, weights, *options, wanted)[2]
            grad_samples = grad_samples.reshape(samples.shape)
        if Q is not None:
            part = _weighted(Q, _weighted_error(predictions, target, None), bounds)
            part = sum_to(part, samples.shape)
            grad_samples = _plus(part, grad_samples, samples.dtype)
    d_weight = d_bias = grad_target = None
    if needed[1]:
        d_weight = rows_by_rows(R, beside_slopes(input), bounds, weight_dtype)
    if needed[2]:
        dtype = like_target.dtype if batch else wide  # of batches torch rounds
        grad_target = scale_and_add(R.new_full((), -1), sum_to(R, like_target.shape), dtype=dtype)
        grad_target = grad_target.to(like_target.dtype)
    if needed[3]:
        d_bias = row_sums(R, bounds, bias_dtype)
    if d_loss is not None and error is None:  # what E would add to R is in the slopes of the loss
        each = d_loss.to(acc)[:, None]
        d_weight = None if d_weight is None else d_weight + (each[..., None] * grad_weight).to(d_weight.dtype)
        d_bias = None if d_bias is None else d_bias + (each * grad_bias).to(d_bias.dtype)
    return [grad_input, d_weight, grad_target, d_bias, grad_samples]


def _every_row(values: Tensor, rows: int) -> Tensor:
    """Return what ``spread`` gives of models, with all their rows."""
    return values if values.shape[-2] == rows else values.expand(*values.shape[:-2], rows, values.shape[-1])


def _plus(values: Tensor, addend: Tensor | None, dtype: torch.dtype) -> Tensor:
    return scale_and_add(values.new_ones(()), values, addend, dtype)


def _tangents(
    ctx: Any, tensors: Sequence[Any], tangents: Sequence[Tensor | None], wide: torch.dtype
) -> list[Tensor]:
    """Return the outputs' tangents, with P in ``wide``."""
    input, weight, target, _, _, bounds = tensors
    d_input, d_weight, d_target, d_bias, d_samples, _ = tangents
    rows = input.shape[-2]
    predictions, *_ = data = predicted(tensors, wide)
    d_predictions = None if d_bias is None else spread(d_bias.to(wide), rows, bounds)
    if d_input is not None:
        d_predictions = rows_by_models(d_input, weight, bounds, wide, d_predictions)
    if d_weight is not None:
        d_predictions = rows_by_models(input, d_weight, bounds, wide, d_predictions)
    if d_predictions is not None:
        d_predictions = _every_row(d_predictions, rows)
    if d_target is not None:
        d_target = of_models(d_target, bounds).expand_as(predictions)
    along = *data, None, d_predictions, d_target, _ranked(d_samples, predictions)
    loss_only, error_only = (True, False, False, False), (False, True, False, False)
    q = slopes(predictions, _acc_of(ctx), target.shape, bounds, ctx.reduction).unsqueeze(-1)
    if bounds is None:
        d_loss = mse_hvp.masked(None, *along, ctx.reduction, 1, loss_only)[0]
    else:
        losses = mse_hvp.masked(None, *along, "none", 0, loss_only)[0]
        d_loss = (q / 2 * row_sums(losses, bounds, _acc_of(ctx))).sum(-1)
    d_outputs = [d_loss.to(ctx.dtype)]
    if not any(ctx.output_mask):
        return d_outputs
    half = predictions.new_full((), 0.5)  # as in _weighted_error
    d_error = of_models(mse_hvp.masked(half, *along, "sum", 0, error_only)[1], bounds)
    if ctx.output_mask[0]:
        d_outputs.append(d_error.to(ctx.dtype))
    if ctx.output_mask[1]:
        d_grad = rows_by_rows(d_error, input, bounds, _acc_of(ctx))
        if d_input is not None:
            d_grad = rows_by_rows(_weighted_error(*data), d_input, bounds, _acc_of(ctx), d_grad)
        d_outputs.append(q.unsqueeze(-1) * d_grad)
    if ctx.output_mask[2]:
        d_outputs.append(q * row_sums(d_error, bounds, _acc_of(ctx)))
    return d_outputs


def _backward_formula(
    grad_output: Tensor, error: Tensor, weight: Tensor, factor: float, output_mask: Sequence[bool]
) -> list[Tensor]:
    """Compute ``linear_mse_backward`` by products, which have derivatives; of batches where ``grad_output`` is (B,)."""
    acc = acc_dtype(grad_output, error, weight)
    scale = (factor * grad_output.to(acc))[..., None, None, None]
    results = []
    if output_mask[0]:
        sums = product(error, weight, dtype=acc)
        results.append(product(sums.unsqueeze(-1), scale, dtype=weight.dtype).squeeze(-1))
    if output_mask[1]:
        results.append(product(error.unsqueeze(-1), -scale, dtype=error.dtype).squeeze(-1))
    return results


def _prepare(*args: Any) -> tuple[tuple[Any, ...], list[int]]:
    """Ask the forward for what the backward of this call will need.

    The caller may be a level of torch.func to which the tensors that this level differentiates are constants:
    it gets the outputs that it asked for, no others.
    """
    *tensors, reduction, output_mask, dtype = args
    input, weight, target, bias = [t is not None and needs_derivative((t,)) for t in tensors[:4]]
    needed = (input or target, weight, bias)
    given = [asked or need for asked, need in zip(output_mask, needed, strict=True)]
    places = [0, *(sum(given[: i + 1]) for i, asked in enumerate(output_mask) if asked)]
    return (*tensors, reduction, given, dtype), places


def _read_by_backward(
    tensors: Sequence[Tensor | None], output_mask: Sequence[bool], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the tensor arguments whose values the derivatives by the ``needed`` ones read; None for the others.

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


def _autocast(*args: Any) -> tuple[Any, ...]:
    """Cast input, weight and bias as a product's operands; the loss is in float32."""
    input, weight, target, bias, sample_weight, *others, _ = args
    acc = acc_dtype(target, sample_weight)
    return *map(autocast_cast, (input, weight)), target, autocast_cast(bias), sample_weight, *others, acc


def _shape(input: Tensor, weight: Tensor, bounds: Tensor | None) -> tuple[int, ...]:
    """Return the shape of errors."""
    *models, outputs, _ = weight.shape
    return (*(models if bounds is None else ()), input.shape[-2], outputs)


def _launch(launcher: Any, *args: Any) -> list[Tensor]:
    """Expand target and sample_weight to the errors' shape, check bounds on the CPU, launch."""
    input, weight, target, bias, samples, *bounds, reduction, output_mask, dtype = args
    shape = _shape(input, weight, *bounds) if bounds else target.shape
    if bounds and bounds[0] is not None and bounds[0].is_cpu:
        check_bounds(bounds[0], len(input))
    samples = None if samples is None else samples.expand(shape)
    target = target if target.shape == shape else target.expand(shape)
    return launcher(input, weight, target, bias, samples, *bounds, reduction, output_mask, dtype)


def _fake(*args: Any) -> list[Tensor]:
    *tensors, _reduction, output_mask, dtype = args
    input, weight = tensors[:2]
    acc = acc_dtype(*tensors[:5])
    rows = _shape(input, weight, tensors[5] if len(tensors) > 5 else None)
    others = zip(((rows, dtype), (weight.shape, acc), (weight.shape[:-1], acc)), output_mask, strict=True)
    return [
        input.new_empty(weight.shape[:-2], dtype=dtype),
        *(input.new_empty(shape, dtype=dt) for (shape, dt), wanted in others if wanted),
    ]


def _backward_fake(
    _grad_output: Tensor, error: Tensor, weight: Tensor, _factor: float, output_mask: list[bool]
) -> list[Tensor]:
    shapes = ((weight, (error.shape[0], weight.shape[1])), (error, error.shape))
    outputs = zip(shapes, output_mask, strict=True)
    return [tensor.new_empty(shape) for (tensor, shape), wanted in outputs if wanted]


def _models_vmap(operator: Operator, size: int, in_dims: Sequence[int | None], *args: Any) -> list[Tensor]:
    """Join a batch of batches of models into one of more models."""
    *tensors, bounds, reduction, output_mask, dtype = args
    rows = models = mapped(size, tensors[1], in_dims[1]).shape[1]
    if bounds is not None:
        rows = mapped(size, tensors[0], in_dims[0]).shape[1]
        operands = [folded(size, tensor, dim) for tensor, dim in zip(tensors, in_dims[:5], strict=True)]
        bounds = folded_bounds(size, bounds, in_dims[5], rows)
    else:
        operands = []
        for tensor, dim, own in zip(tensors, in_dims[:5], (3, 3, 3, 2, 3), strict=True):
            if tensor is not None:
                if tensor.dim() - (dim is not None) < own:  # shared by the models
                    if dim is None:
                        operands.append(tensor)
                        continue
                    tensor = tensor.movedim(dim, 0).unsqueeze(1)
                    tensor, dim = tensor.expand(size, models, *tensor.shape[2:]), 0
                tensor = folded(size, tensor, dim)
            operands.append(tensor)
    outputs = operator(*operands, bounds, reduction, output_mask, dtype)
    each = [models, *(n for n, wanted in zip((rows, models, models), output_mask, strict=True) if wanted)]
    return [output.unflatten(0, (size, n)) for output, n in zip(outputs, each, strict=True)]


def _vmap(_: Operator, batch_size: int, in_dims: Sequence[int | None], *args: Any) -> list[Tensor]:
    """Call the operator of a batch of models."""
    *tensors, reduction, output_mask, dtype = args
    input, weight, target, bias, sample_weight = (
        tensor.movedim(dim, 0) if dim else tensor for tensor, dim in zip(tensors, in_dims[:5], strict=True)
    )
    weight = weight.expand(batch_size, *weight.shape[-2:])
    bias = None if bias is None else bias.expand(batch_size, bias.shape[-1])
    return models_forward(input, weight, target, bias, sample_weight, None, reduction, output_mask, dtype)


def _backward_vmap(_: Operator, size: int, in_dims: Sequence[int | None], *args: Any) -> list[Tensor]:
    *tensors, factor, output_mask = args
    grad_output, error, weight = (
        tensor if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims[:3], strict=True)
    )
    return _backward_formula(grad_output.expand(size), error, weight, factor, output_mask)


linear_mse = Operator(
    "linear_mse",
    "forward",
    fake=_fake,
    vmap=_vmap,
    derivative=LinearMseFunction,
    launch=_launch,
    prepare=_prepare,
    autocast=_autocast,
)
# ``g factor E W`` and ``-g factor E``, as ``output_mask`` says.
linear_mse_backward = Operator(
    "linear_mse",
    "backward",
    fake=_backward_fake,
    vmap=_backward_vmap,
    derivative=_backward_formula,
    autocast=uncast,
)
models_forward = Operator(
    "linear_mse_models",
    "forward",
    fake=_fake,
    vmap=_models_vmap,
    derivative=LinearMseModelsFunction,
    launch=_launch,
    prepare=_prepare,
    autocast=_autocast,
)
