"""Mean squared error: ``mse_loss`` and ``mse_loss_and_grad``.

With e = input - target and g the gradient of the loss, all of its derivatives are those of one cubic form,

    C(g, w, e) = c * sum(g * w * e^2):

the backward is C's gradient, and the tangent of the loss, the tangent of the backward and the double backward
are all C's Hessian times a vector. Hence three registered operators: ``mse``, ``mse_backward``, ``mse_hvp``; a
fourth, ``mse_forward_backward``, does the work of the first two in one pass.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import acc_dtype
from .fallback.mse import hessian_vector_product
from .operator import Operator, in_places, mapped, use_torch_fast_path
from .repeat import repeatable
from .torch_private import torch_mse_loss

# Bytes up to which torch's own ops and autograd serve on the fallback. The operators registered here go through the
# data less often, and take some 50 us more; at 2^20 numbers (two threads of a Xeon) that is a tie.
SMALL = 1 << 23


def suits_torch(target: Tensor, dtype: torch.dtype | None = None, *, per_sample: bool = False) -> bool:
    """Return whether ``mse_in_torch`` suits predictions and a target like this, in ``dtype`` or their own.

    That is: small ones, not of 16 bits. Of these torch would round each square, and overflow float16 with that of 300;
    the operators add up in float32. Losses ``per_sample``, without weights, are a tie at a quarter of the size.
    """
    size = (target.dtype if dtype is None else dtype).itemsize
    return size > 2 and 2 * size * target.numel() <= (SMALL >> 2 if per_sample else SMALL)


@repeatable
def mse_loss(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dim: int | Sequence[int] | None = None,
) -> Tensor:
    """Compute the squared error of ``input`` against ``target``, averaged, summed or per element.

        l_i = w_i * (input_i - target_i)^2

        mean: sum(l) / n, or sum(l) / sum(w) where weights are given;  sum: sum(l);  none: l

    The sums run over ``dim``. A mean divides by the sum of the weights, so a weight per sample cancels in a mean per
    sample: multiply the result by it, ``(mse_loss(p, t, dim=(1, 2, 3)) * w).mean()``.

    Differentiable to any order in all three tensors, in reverse and forward mode.

    Shapes:
        input, target: one shape ``(*)``; neither is broadcast. weight: any that broadcasts to it, ``(B, 1, 1, 1)``
        or ``()``; it is not expanded in memory, and its gradient has its own shape. Loss: ``()``, or input's
        dimensions without ``dim``, or ``(*)`` for none.

    Args:
        input: predictions; float64, float32, float16 or bfloat16, any strides.
        target: of any of these dtypes, on the same device.
        weight: of any of these dtypes, on the same device.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        dim: the dimensions to average or sum over; None or ``()`` for all.

    Returns:
        The loss, accumulated in float32 (float64 where an operand is), in the dtype that all operands promote to;
        under autocast float16 and bfloat16 count as float32. Each gradient has its own operand's dtype. The mean of
        no elements is nan, their sum 0; the mean under weights whose sum is 0 is nan.

    Raises:
        ValueError: the shapes of input and target differ, weight does not broadcast to theirs, ``reduction`` is not
            one of the three, or ``dim`` is given with ``"none"``.
        IndexError: ``dim`` is out of range.
        TypeError: a dtype that is not served, or a ``dim`` that is not an integer.
        RuntimeError: devices differ, or ``dim`` names a dimension twice.

    Example:
        >>> mse_loss(torch.tensor([6.0]), torch.tensor([5.0]))
        tensor(1.)
    """
    if (
        weight is None
        and reduction in checks.REDUCTIONS
        and use_torch_fast_path(input, target)
        and input.shape == target.shape
    ):
        if dim is None:
            # torch squares float16 in float16, where 300 is too much.
            if reduction == "none" or (
                input.nbytes + target.nbytes <= SMALL and input.dtype != torch.float16
            ):
                return torch_mse_loss(input, target, checks.REDUCTIONS.index(reduction))
        elif reduction != "none" and suits_torch(target, per_sample=True):
            return mse_in_torch(input, target, None, reduction, *_dims_kept(dim, input.dim()))
    _check("mse_loss", input, target, weight, reduction, checks.REDUCTIONS)
    checks.no_dim_for_none("mse_loss", dim, reduction)
    dtype = checks.loss_dtype(input, target, weight)
    weight = _of_rank(weight, input)
    kept, order = (0, None) if dim is None else _dims_kept(dim, input.dim())
    if suits_torch(target, dtype, per_sample=weight is None and kept > 0) and use_torch_fast_path(
        input, target, optional=weight, one_dtype=False
    ):
        wide = None if weight is None else weight.to(dtype)
        return mse_in_torch(input.to(dtype), target.to(dtype), wide, reduction, kept, order)
    if order is not None:
        input, target = input.permute(order), target.permute(order)
        weight = None if weight is None else weight.permute(order)
    # The mean of nothing is nan, however weighted.
    if weight is None or reduction != "mean" or not input.numel():
        return mse(input, target, weight, reduction, kept, dtype)
    acc = acc_dtype(input, target, weight)
    if weight.shape != input.shape:
        wide, mean = _with_mean(weight, acc, kept)
        return mse(input, target, (wide / mean).to(acc), "mean", kept, dtype)
    return (mse(input, target, weight, "sum", kept, acc) / divisor(weight, target, acc, kept)).to(dtype)


def mse_loss_and_grad(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    wrt: Sequence[str] = ("input",),
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Return the loss and its gradients in one pass over the data, without autograd.

        loss as ``mse_loss``;  grad_input = 2 c w e,  grad_target = -grad_input,
        grad_weight = c e^2  (mean: c (e^2 - loss)),  with e = input - target and c = 1, 1/n or 1/sum(w)

    Moves 3 elements per element: reads input and target, writes grad_input. A weighted mean first reads the weights
    once for their sum.

    Shapes:
        input, target and their gradients: one shape ``(*)``. weight: any that broadcasts to it; its gradient, the
        sum over what it was broadcast to, has its shape. Loss ``()``.

    Args:
        input: predictions; float64, float32, float16 or bfloat16, any strides.
        target: of any of these dtypes, on the same device.
        weight: of any of these dtypes, on the same device.
        reduction: ``"mean"`` or ``"sum"``.
        wrt: which gradients are wanted: any of ``"input"``, ``"target"``, ``"weight"``. ``requires_grad`` plays
            no part.

    Returns:
        ``(loss, (grad_input, grad_target, grad_weight))`` with None for what is not in ``wrt`` or was not given;
        dtypes as of ``mse_loss``. With weights of full shape whose sum has no finite reciprocal (below 3e-39) the
        gradients are inf.

    Raises:
        ValueError: the shapes of input and target differ, weight does not broadcast to theirs, ``reduction`` is
            ``"none"`` or unknown, or ``wrt`` has an unknown name.
        TypeError: a dtype that is not served.
        RuntimeError: devices differ.

    Example:
        >>> loss, (grad, _, _) = mse_loss_and_grad(torch.tensor([6.0]), torch.tensor([5.0]))
        >>> loss, grad
        (tensor(1.), tensor([2.]))
    """
    op = "mse_loss_and_grad"
    _check(op, input, target, weight, reduction, ("mean", "sum"))
    output_mask = checks.output_mask(op, wrt, {"input": input, "target": target, "weight": weight})
    dtype = checks.loss_dtype(input, target, weight)
    ranked = _of_rank(weight, input)
    if ranked is not None and reduction == "mean" and input.numel():
        with torch.no_grad():
            loss, gradients = _weighted_mean_and_grad(input, target, ranked, output_mask, dtype)
    else:
        outputs = mse_forward_backward.without_autograd(
            input, target, ranked, None, reduction, output_mask, dtype
        )
        loss, *gradients = in_places(outputs, output_mask)
    grad_input, grad_target, grad_weight = gradients
    if grad_weight is not None and weight is not None:
        grad_weight = grad_weight.view(weight.shape)
    return loss, (grad_input, grad_target, grad_weight)


def _weighted_mean_and_grad(
    input: Tensor, target: Tensor, weight: Tensor, output_mask: list[bool], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    acc = acc_dtype(input, target, weight)
    if weight.shape == input.shape:
        weight_sum = divisor(weight, target, acc)
        outputs = mse_forward_backward(input, target, weight, weight_sum, "sum", output_mask, acc)
        loss, *gradients = in_places(outputs, output_mask)
        if gradients[2] is not None:
            gradients[2] = gradients[2].sub_(loss / weight_sum)
        return loss.to(dtype), gradients
    wide, mean = _with_mean(weight, acc)
    scaled = wide / mean
    outputs = mse_forward_backward(input, target, scaled.to(acc), None, "mean", output_mask, dtype)
    loss, *gradients = in_places(outputs, output_mask)
    if gradients[2] is not None:
        slope = gradients[2].to(mean.dtype)
        slope = (slope - (slope * scaled).sum() / weight.numel()) / mean
        gradients[2] = slope.to(weight.dtype)
    return loss, gradients


def _with_mean(weight: Tensor, acc: torch.dtype, batch_dims: int = 0) -> tuple[Tensor, Tensor]:
    """Return weights and their mean over all but the first ``batch_dims`` dimensions, which is nan where it is 0.

    Both in float64 where the device has it, and of one conversion: a weight's gradient is a small difference of large
    sums, which float16 may not hold.
    """
    wide = weight.to(torch.float64 if weight.device.type in ("cpu", "cuda") else acc)
    mean = wide.mean(tuple(range(batch_dims, weight.dim())), keepdim=True)
    return wide, torch.where(mean == 0, math.nan, mean)


def mse_in_torch(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    batch_dims: int = 0,
    order: Sequence[int] | None = None,
) -> Tensor:
    """Compute the loss by torch's own ops: more passes than ``mse`` makes, each a tenth of an operator's call.

    weight has as many dimensions as input, and broadcasts to it; the first ``batch_dims`` survive a reduction, of
    ``order`` if that is given: input itself is not permuted, lest its gradient lie as the permuted one.
    """
    if weight is None and not batch_dims:
        return torch_mse_loss(input, target, checks.REDUCTIONS.index(reduction))
    losses = torch_mse_loss(input, target, checks.REDUCTIONS.index("none"))
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses
    dims = tuple(range(batch_dims, input.dim()) if order is None else order[batch_dims:])
    if weight is None and reduction == "mean":
        return losses.mean(dims)
    total = losses.sum(dims)
    if weight is None or reduction == "sum":
        return total
    if order is not None:
        weight, target = weight.permute(*order), target.permute(*order)
    return total / divisor(weight, target, total.dtype, batch_dims)


def divisor(weight: Tensor, target: Tensor, dtype: torch.dtype, batch_dims: int = 0) -> Tensor:
    """Return what a weighted mean divides by: ``sum(w)`` over target's elements, nan where that is 0.

    Where torch's own ops do not serve it is the loss of errors that are all 1: differentiable like any other loss.
    weight has target's shape but for dimensions of size 1; of the first ``batch_dims`` these are left so.
    """
    if use_torch_fast_path(weight):
        total = weight.sum(tuple(range(batch_dims, weight.dim())), dtype=dtype)
    else:
        ones, zeros = (weight.new_full((), value, dtype=dtype).expand(weight.shape) for value in (1, 0))
        total = mse(ones, zeros, weight, "sum", batch_dims, dtype)
    repeats = _repeats(weight, target, batch_dims)
    if repeats == 0:  # a sum of nothing, without gradient: 0 times the nan that reaches it would be nan
        return torch.full_like(total, math.nan)
    total = total if repeats == 1 else total * repeats
    return torch.where(total == 0, math.nan, total)


def _repeats(weight: Tensor, target: Tensor, batch_dims: int = 0) -> int:
    """Return how many elements share a weight along the dimensions after the first ``batch_dims``."""
    repeats = 1
    for own, size in zip(weight.shape[batch_dims:], target.shape[batch_dims:], strict=True):
        if own != size:
            repeats *= size
    return repeats


def _dims_kept(dim: int | Sequence[int], ndim: int) -> tuple[int, list[int] | None]:
    """Return how many dimensions a loss over ``dim`` keeps, and the order with these first; None where it is theirs."""
    summed = checks.dims("mse_loss", dim, ndim)
    kept = [d for d in range(ndim) if d not in summed]
    order = kept + sorted(summed)
    return len(kept), order if kept and order != list(range(ndim)) else None


def _of_rank(weight: Tensor | None, input: Tensor) -> Tensor | None:
    """Return ``weight`` with as many dimensions as input, the new ones first and of size 1."""
    if weight is None or weight.dim() == input.dim():
        return weight
    return weight[(None,) * (input.dim() - weight.dim())]


def _check(
    op: str, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, allowed: tuple[str, ...]
) -> None:
    checks.reduction(op, reduction, allowed)
    arguments = {"input": input, "target": target, "weight": weight}
    checks.tensors(op, arguments, ("weight",), one_dtype=False)
    checks.same_shape(op, input, target=target)
    if weight is not None:
        checks.broadcasts(op, "weight", weight, input)


class MseFunction(torch.autograd.Function):
    """Derivatives of the loss."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reduction, ctx.batch_dims, ctx.dtype = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> list[Tensor | None]:
        options = ctx.reduction, ctx.batch_dims, ctx.needs_input_grad[:3]
        return mse_backward.masked(grad, *ctx.saved_tensors, *options)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        input, target, weight = ctx.saved_tensors
        shape = input.shape if ctx.reduction == "none" else input.shape[: ctx.batch_dims]
        # The tangent has grad_output's dtype and does not depend on its values.
        grad = None if ctx.dtype == input.dtype else input.new_zeros((), dtype=ctx.dtype).expand(shape)
        options = ctx.reduction, ctx.batch_dims, (True, False, False, False)
        return mse_hvp.masked(grad, input, target, weight, None, *tangents, *options)[0]


class MseBackwardFunction(torch.autograd.Function):
    """Derivatives of the gradients: C's Hessian times the cotangents, or times the tangents."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.reduction, ctx.batch_dims, ctx.output_mask = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> list[Tensor | None]:
        directions = None, *in_places(cotangents, ctx.output_mask)
        options = ctx.reduction, ctx.batch_dims, ctx.needs_input_grad[:4]
        return mse_hvp.masked(*ctx.saved_tensors, *directions, *options)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        options = ctx.reduction, ctx.batch_dims, [False, *ctx.output_mask]
        return tuple(mse_hvp(*ctx.saved_tensors, *tangents, *options))


def _hvp_formula(*args: Any) -> list[Tensor]:
    """Compute ``mse_hvp`` by torch's own ops, which torch differentiates: third derivatives and beyond."""
    *tensors, reduction, batch_dims, output_mask = args
    grad_output, input, target, weight = primals = tensors[:4]
    d_loss, *gradients = hessian_vector_product(primals, tensors[4:], reduction, batch_dims, output_mask)
    results = [] if d_loss is None else [d_loss.to((input if grad_output is None else grad_output).dtype)]
    pairs = zip(gradients, (input, target, weight), strict=True)
    return results + [
        value.sum_to_size(like.shape).to(like.dtype)
        for value, like in pairs
        if value is not None and like is not None
    ]


def _forward_backward_formula(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weight_sum: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
    batch_dims: int = 0,
) -> list[Tensor]:
    """Compute ``mse_forward_backward`` in two passes, by operators that have derivatives and batch dimensions."""
    tensors = input, target, weight
    acc = acc_dtype(*tensors)
    share = input.new_ones((), dtype=acc) if weight_sum is None else weight_sum.to(acc).reciprocal()
    loss = mse(*tensors, reduction, batch_dims, acc) * share
    upstream = share.expand(input.shape[:batch_dims])
    return [loss.to(dtype), *mse_backward(upstream, *tensors, reduction, batch_dims, output_mask)]


def _empty_loss(input: Tensor, reduction: str, batch_dims: int, dtype: torch.dtype) -> Tensor:
    if reduction == "none":
        return torch.empty_like(input, dtype=dtype)
    return input.new_empty(input.shape[:batch_dims], dtype=dtype)


def _empty_gradients(tensors: Sequence[Tensor | None], output_mask: list[bool]) -> list[Tensor]:
    input = tensors[0]
    assert input is not None
    return [
        torch.empty_like(tensor) if tensor.shape == input.shape else tensor.new_empty(tensor.shape)
        for tensor, wanted in zip(tensors, output_mask, strict=True)
        if wanted and tensor is not None
    ]


def _fake(input: Tensor, _target: Tensor, _weight: Tensor | None, *options: Any) -> Tensor:
    return _empty_loss(input, *options)


def _backward_fake(_grad_output: Tensor, *args: Any) -> list[Tensor]:
    return _empty_gradients(args[:3], args[-1])


def _hvp_fake(grad_output: Tensor | None, *args: Any) -> list[Tensor]:
    *tensors, reduction, batch_dims, output_mask = args
    dtype = (tensors[0] if grad_output is None else grad_output).dtype
    losses = [_empty_loss(tensors[0], reduction, batch_dims, dtype)] if output_mask[0] else []
    return losses + _empty_gradients(tensors[:3], output_mask[1:])


def _forward_backward_fake(*args: Any) -> list[Tensor]:
    *tensors, reduction, output_mask, dtype = args
    return [_empty_loss(tensors[0], reduction, 0, dtype), *_empty_gradients(tensors[:3], output_mask)]


def _vmap(operator: Operator, batch_size: int, in_dims: Sequence[int | None], *args: Any) -> Any:
    *tensors, reduction, batch_dims, last = args
    return operator(*map(partial(mapped, batch_size), tensors, in_dims), reduction, batch_dims + 1, last)


def _forward_backward_vmap(
    operator: Operator, batch_size: int, in_dims: Sequence[int | None], *args: Any
) -> list[Tensor]:
    *tensors, reduction, output_mask, dtype = args
    input, target, weight, weight_sum = map(partial(mapped, batch_size), tensors, in_dims)
    options = reduction, output_mask, dtype, 1
    return _forward_backward_formula(input, target, weight, weight_sum, *options)


def _autocast(*args: Any) -> tuple[Any, ...]:
    """Cast nothing but the loss, to float32: the kernels convert each element as they load it."""
    return *args[:-1], acc_dtype(*args[:3])


# ``mse(input, target, weight, reduction, batch_dims, dtype)``: the first ``batch_dims`` dimensions survive a reduction.
# A ``weight`` with dimensions of size 1 is broadcast over input's, and its gradient is the sum over them.
mse = Operator(
    "mse",
    "forward",
    fake=_fake,
    vmap=_vmap,
    derivative=MseFunction,
    autocast=_autocast,
)
# Its gradients for (input, target, weight), as ``output_mask`` says.
mse_backward = Operator(
    "mse",
    "backward",
    fake=_backward_fake,
    vmap=_vmap,
    derivative=MseBackwardFunction,
)
# The Hessian of C at (grad_output, input, target, weight) times the next four, likewise.
mse_hvp = Operator("mse", "hvp", fake=_hvp_fake, vmap=_vmap, derivative=_hvp_formula)
# The loss and its gradients for an upstream gradient of one; both divided by ``weight_sum``, if there is one.
mse_forward_backward = Operator(
    "mse",
    "forward_backward",
    fake=_forward_backward_fake,
    vmap=_forward_backward_vmap,
    derivative=_forward_backward_formula,
)
