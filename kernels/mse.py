"""Mean squared error: ``mse_loss`` and ``mse_loss_and_grad``.

With e = input - target and g the gradient of the loss, all of its derivatives are those of one cubic form,

    C(g, w, e) = c * sum(g * w * e^2):

the backward is C's gradient, and the tangent of the loss, the tangent of the backward and the double backward
are all C's Hessian times a vector. Hence three registered operators: ``mse``, ``mse_backward``, ``mse_hvp``; a
fourth, ``mse_forward_backward``, does the work of the first two in one pass.
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import backends, checks
from .dtypes import accumulator
from .matmul import sum_to
from .registration import Operator, served_by_torch, torch_mse_loss

# What the last cache of a CPU holds: a second pass over so many bytes costs nothing, nor does what torch stores
# between two of its ops.
SMALL = 1 << 25


def mse_loss(
    input: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Squared error of ``input`` against ``target``, averaged, summed or per element.

        l_i = w_i * (input_i - target_i)^2

        mean: sum(l) / n, or sum(l) / sum(w) where weights are given;  sum: sum(l);  none: l

    Differentiable to any order in all three tensors, in reverse and forward mode.

    Shapes:
        input, target, weight: one shape ``(*)``; nothing is broadcast. Loss: ``()``, or ``(*)`` for none.

    Args:
        input: predictions; float64, float32, float16 or bfloat16, any strides.
        target: of the same dtype and device.
        weight: of the same dtype and device.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in the inputs' dtype (float32 under autocast), accumulated in float32 (float64 for float64).
        The mean of no elements is nan, their sum 0.

    Raises:
        ValueError: shapes differ, or ``reduction`` is not one of the three.
        TypeError: dtypes differ or are not served.
        RuntimeError: devices differ.

    Example:
        >>> mse_loss(torch.tensor([6.0]), torch.tensor([5.0]))
        tensor(1.)
    """
    if (
        weight is None
        and reduction in checks.REDUCTIONS
        and served_by_torch(input, target)
        and input.shape == target.shape
        and (input.nbytes + target.nbytes <= SMALL or reduction == "none")
    ):
        return torch_mse_loss(input, target, checks.REDUCTIONS.index(reduction))
    _check("mse_loss", input, target, weight, reduction, checks.REDUCTIONS)
    if weight is None or reduction != "mean":
        return mse(input, target, weight, reduction)
    total, weights = _weighted_sums(input, target, weight)
    return (total / weights).to(loss_dtype(input))


def mse_loss_and_grad(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    wrt: Sequence[str] = ("input",),
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The loss and its gradients in one pass over the data, without autograd.

        loss as ``mse_loss``;  grad_input = 2 c w e,  grad_target = -grad_input,
        grad_weight = c e^2  (mean: c (e^2 - loss)),  with e = input - target and c = 1, 1/n or 1/sum(w)

    Moves 3 elements per element without weights: reads input and target, writes grad_input.

    Shapes:
        input, target, weight and each gradient: one shape ``(*)``; loss ``()``.

    Args:
        input: predictions; float64, float32, float16 or bfloat16, any strides.
        target: of the same dtype and device.
        weight: of the same dtype and device.
        reduction: ``"mean"`` or ``"sum"``.
        wrt: which gradients are wanted: any of ``"input"``, ``"target"``, ``"weight"``. ``requires_grad`` plays
            no part.

    Returns:
        ``(loss, (grad_input, grad_target, grad_weight))`` with None for what is not in ``wrt`` or was not given.

    Raises:
        ValueError: shapes differ, ``reduction`` is ``"none"`` or unknown, or ``wrt`` has an unknown name.
        TypeError: dtypes differ or are not served.
        RuntimeError: devices differ.

    Example:
        >>> loss, (grad, _, _) = mse_loss_and_grad(torch.tensor([6.0]), torch.tensor([5.0]))
        >>> loss, grad
        (tensor(1.), tensor([2.]))
    """
    _check("mse_loss_and_grad", input, target, weight, reduction, ("mean", "sum"))
    wanted = wanted_gradients("mse_loss_and_grad", wrt, {"input": input, "target": target, "weight": weight})
    dtype = loss_dtype(input)
    if weight is not None and reduction == "mean":
        with torch.no_grad():
            return _weighted_mean_and_grad(input, target, weight, wanted, dtype)
    args = (input, target, weight, reduction, wanted, dtype)
    loss, *grads = _mse_forward_backward.without_autograd(*args)
    grad_input, grad_target, grad_weight = in_places(grads, wanted)
    return loss, (grad_input, grad_target, grad_weight)


def _weighted_mean_and_grad(
    input: Tensor, target: Tensor, weight: Tensor, wanted: list[bool], dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    total, weights = _weighted_sums(input, target, weight)
    loss = total / weights
    grad_input, grad_target, grad_weight = mse_backward(1 / weights, input, target, weight, "sum", 0, wanted)
    if grad_weight is not None:
        grad_weight -= loss / weights
    return loss.to(dtype), (grad_input, grad_target, grad_weight)


def _weighted_sums(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(w e^2)`` and ``sum(w)`` in float32 at least: in float16 they would overflow where their ratio does not."""
    wide = accumulator(input, target, weight)
    return mse(input, target, weight, "sum", dtype=wide), total_weight(weight, target, wide)


def total_weight(weight: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum(w)`` over target's elements, as the loss of errors that are all 1: differentiable like any other loss."""
    one, zero = weight.new_ones(()), weight.new_zeros(())
    return mse(one.expand(target.shape), zero.expand(target.shape), weight, "sum", dtype=dtype)


def wanted_gradients(op: str, wrt: Sequence[str], arguments: dict[str, Tensor | None]) -> list[bool]:
    """Which of the ``arguments`` are named in ``wrt`` and given; ValueError for a name that is none of them."""
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in names:
        if name not in arguments:
            expected = ", ".join(map(repr, arguments))
            raise ValueError(f"{op}: wrt names {name!r}; expected any of {expected}")
    return [name in names and tensor is not None for name, tensor in arguments.items()]


def _check(
    op: str, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, allowed: tuple[str, ...]
) -> None:
    checks.reduction(op, reduction, allowed)
    checks.tensors(op, {"input": input, "target": target, "weight": weight}, ("weight",))
    shape = input.shape
    if target.shape != shape:
        _shapes_differ(op, input, "target", target)
    if weight is not None and weight.shape != shape:
        _shapes_differ(op, input, "weight", weight)


def _shapes_differ(op: str, input: Tensor, name: str, tensor: Tensor) -> NoReturn:
    raise ValueError(
        f"{op}: input has shape {tuple(input.shape)} but {name} has shape {tuple(tensor.shape)}; "
        f"they must be equal (nothing is broadcast)"
    )


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a loss of ``tensor``: its own, or at least float32 under autocast."""
    return accumulator(tensor) if checks.autocast_enabled(tensor) else tensor.dtype


def in_places(results: Sequence[Any], output_mask: Sequence[bool]) -> list[Any]:
    """``results``, of which there are as many as ``output_mask`` says yes, with None in the other places."""
    given = iter(results)
    return [next(given) if need else None for need in output_mask]


def mse(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    batch_dims: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The registered operator: no checks, no weighted mean; leading ``batch_dims`` dimensions survive a reduction.

    A ``weight`` with dimensions of size 1 is spread over input's, and its gradient is the sum over them.
    """
    return _mse(input, target, weight, reduction, batch_dims, input.dtype if dtype is None else dtype)


def mse_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    batch_dims: int,
    output_mask: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of ``mse`` for input, target and weight; None where ``output_mask`` says no."""
    results = _mse_backward(grad_output, input, target, weight, reduction, batch_dims, list(output_mask))
    return in_places(results, output_mask)


def mse_hvp(
    primals: tuple[Tensor | None, Tensor, Tensor, Tensor | None],
    tangents: Sequence[Tensor | None],
    reduction: str,
    batch_dims: int,
    output_mask: Sequence[bool],
) -> list[Any]:
    """The Hessian of C at ``primals`` times ``tangents``, both (grad_output, input, target, weight)."""
    if not any(output_mask):
        return [None] * 4
    return in_places(_mse_hvp(*primals, *tangents, reduction, batch_dims, list(output_mask)), output_mask)


class MseFunction(torch.autograd.Function):
    """Derivatives of the loss."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reduction, ctx.batch_dims, ctx.dtype = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight = ctx.saved_tensors
        output_mask = ctx.needs_input_grad[:3]
        grads = mse_backward(grad, input, target, weight, ctx.reduction, ctx.batch_dims, output_mask)
        return (*grads, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        input, target, weight = ctx.saved_tensors
        shape = input.shape if ctx.reduction == "none" else input.shape[: ctx.batch_dims]
        # The tangent has grad_output's dtype and does not depend on its values.
        grad = None if ctx.dtype == input.dtype else input.new_zeros((), dtype=ctx.dtype).expand(shape)
        primals, directions = (grad, input, target, weight), (None, *tangents[:3])
        return mse_hvp(primals, directions, ctx.reduction, ctx.batch_dims, (True, False, False, False))[0]


class MseBackwardFunction(torch.autograd.Function):
    """Derivatives of the gradients: C's Hessian times the cotangents, or times the tangents."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.reduction, ctx.batch_dims, ctx.output_mask = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        directions = [None, *in_places(cotangents, ctx.output_mask)]
        output_mask = ctx.needs_input_grad[:4]
        return (
            *mse_hvp(ctx.saved_tensors, directions, ctx.reduction, ctx.batch_dims, output_mask),
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        results = mse_hvp(
            ctx.saved_tensors, tangents[:4], ctx.reduction, ctx.batch_dims, (False, *ctx.output_mask)
        )
        return tuple(result for result, need in zip(results[1:], ctx.output_mask, strict=True) if need)


def _hvp_formula(
    grad_output: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    d_grad: Tensor | None,
    d_input: Tensor | None,
    d_target: Tensor | None,
    d_weight: Tensor | None,
    reduction: str,
    batch_dims: int,
    output_mask: list[bool],
) -> list[Tensor]:
    """``mse_hvp`` in torch's own ops, which torch differentiates: third derivatives and beyond."""
    scale = _scale(input, reduction, batch_dims)
    wide = accumulator(grad_output, input, target, weight, d_grad, d_input, d_target, d_weight)
    zero = input.new_zeros((), dtype=wide)

    def widened(tensor: Tensor | None) -> Tensor:
        return zero if tensor is None else tensor.to(wide)

    def spread(grad: Tensor | None) -> Tensor:
        if grad is None or reduction == "none":
            return widened(grad)
        return widened(grad).reshape((*grad.shape, *(1,) * (input.dim() - batch_dims)))

    error = widened(input) - widened(target)
    d_error = widened(d_input) - widened(d_target)
    w = zero + 1 if weight is None else widened(weight)
    dw = widened(d_weight)
    g, dg = spread(grad_output), spread(d_grad)
    results = []
    if output_mask[0]:
        tangent = scale * (dw * error**2 + 2 * w * error * d_error)
        if reduction != "none" and batch_dims < input.dim():
            tangent = tangent.sum(list(range(batch_dims, input.dim())))
        results.append(tangent.to((input if grad_output is None else grad_output).dtype))
    if output_mask[1] or output_mask[2]:
        out = 2 * scale * (dg * w * error + g * dw * error + g * w * d_error)
        if output_mask[1]:
            results.append(out.to(input.dtype))
        if output_mask[2]:
            results.append((-out).to(target.dtype))
    if output_mask[3] and weight is not None:
        out = (scale * (dg * error**2 + 2 * g * error * d_error)).sum_to_size(weight.shape)
        results.append(out.to(weight.dtype))
    return results


def _forward_backward_formula(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
    batch_dims: int = 0,
) -> list[Tensor]:
    """``mse_forward_backward`` in two passes: the operators that have derivatives, and can keep dimensions."""
    one = input.new_ones((), dtype=dtype).expand(input.shape[:batch_dims])
    loss = mse(input, target, weight, reduction, batch_dims, dtype)
    return [loss, *_mse_backward(one, input, target, weight, reduction, batch_dims, output_mask)]


def _scale(input: Tensor, reduction: str, batch_dims: int) -> float:
    return 1.0 / math.prod(input.shape[batch_dims:]) if reduction == "mean" and input.numel() else 1.0


def _loss_fake(input: Tensor, reduction: str, batch_dims: int, dtype: torch.dtype) -> Tensor:
    if reduction == "none":
        return torch.empty_like(input, dtype=dtype)
    return input.new_empty(input.shape[:batch_dims], dtype=dtype)


def _mse_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, batch_dims: int, dtype: torch.dtype
) -> Tensor:
    return _loss_fake(input, reduction, batch_dims, dtype)


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    batch_dims: int,
    output_mask: list[bool],
) -> list[Tensor]:
    tensors = zip((input, target, weight), output_mask, strict=True)
    return [
        torch.empty_like(tensor) if tensor.shape == input.shape else tensor.new_empty(tensor.shape)
        for tensor, need in tensors
        if need and tensor is not None
    ]


def _forward_backward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    return [
        _loss_fake(input, reduction, 0, dtype),
        *_backward_fake(input, input, target, weight, reduction, 0, output_mask),
    ]


def _hvp_fake(
    grad_output: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    d_grad: Tensor | None,
    d_input: Tensor | None,
    d_target: Tensor | None,
    d_weight: Tensor | None,
    reduction: str,
    batch_dims: int,
    output_mask: list[bool],
) -> list[Tensor]:
    dtype = input.dtype if grad_output is None else grad_output.dtype
    results = [_loss_fake(input, reduction, batch_dims, dtype)] if output_mask[0] else []
    return results + _backward_fake(input, input, target, weight, reduction, batch_dims, output_mask[1:])


def _launch_forward(input: Tensor, target: Tensor, weight: Tensor | None, *args: Any) -> Tensor:
    launchers = backends.implementation("mse", input)
    return launchers.mse_forward(input, target, _spread(weight, input), *args)


def _launch_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, *args: Any
) -> list[Tensor]:
    launchers = backends.implementation("mse", input)
    return _gathered(
        launchers.mse_backward(grad_output, input, target, _spread(weight, input), *args), weight, args[-1]
    )


def _launch_hvp(
    grad_output: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    d_grad: Tensor | None,
    d_input: Tensor | None,
    d_target: Tensor | None,
    d_weight: Tensor | None,
    *args: Any,
) -> list[Tensor]:
    launchers = backends.implementation("mse", input)
    primals = (grad_output, input, target, _spread(weight, input))
    results = launchers.mse_hvp(*primals, d_grad, d_input, d_target, _spread(d_weight, input), *args)
    return _gathered(results, weight, args[-1])


def _launch_forward_backward(input: Tensor, *args: Any) -> list[Tensor]:
    return backends.implementation("mse", input).mse_forward_backward(input, *args)


def _spread(weight: Tensor | None, input: Tensor) -> Tensor | None:
    return weight if weight is None or weight.shape == input.shape else weight.expand_as(input)


def _gathered(results: list[Tensor], weight: Tensor | None, output_mask: Sequence[bool]) -> list[Tensor]:
    """The launcher's results, of which the last, the weight's, is summed to the weight's shape."""
    if output_mask[-1] and weight is not None and weight.shape != results[-1].shape:
        results[-1] = sum_to(torch.atleast_2d(results[-1]), weight.shape)
    return results


def _mapped_first(
    info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The mapped dimension of each tensor first; a tensor without one is expanded, which copies nothing."""
    return [
        tensor
        if tensor is None
        else tensor.expand(info.batch_size, *tensor.shape)
        if dim is None
        else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=True)
    ]


def _mse_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    *tensors, reduction, batch_dims, dtype = args
    return _mse(*_mapped_first(info, in_dims[:3], tensors), reduction, batch_dims + 1, dtype), 0


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
    *tensors, reduction, batch_dims, output_mask = args
    results = _mse_backward(
        *_mapped_first(info, in_dims[:4], tensors), reduction, batch_dims + 1, output_mask
    )
    return results, [0] * len(results)


def _hvp_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
    *tensors, reduction, batch_dims, output_mask = args
    results = _mse_hvp(*_mapped_first(info, in_dims[:8], tensors), reduction, batch_dims + 1, output_mask)
    return results, [0] * len(results)


def _forward_backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
    *tensors, reduction, output_mask, dtype = args
    input, target, weight = _mapped_first(info, in_dims[:3], tensors)
    assert input is not None
    assert target is not None
    results = _forward_backward_formula(input, target, weight, reduction, output_mask, dtype, batch_dims=1)
    return results, [0] * len(results)


def _autocast(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, batch_dims: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """As it is, but with the loss in float32: the kernels convert each element as they load it."""
    return input, target, weight, reduction, batch_dims, accumulator(input, target, weight)


_mse = Operator(
    "mse(Tensor input, Tensor target, Tensor? weight, str reduction, int batch_dims, ScalarType dtype) -> Tensor",
    launch=_launch_forward,
    fake=_mse_fake,
    vmap=_mse_vmap,
    derivative=MseFunction,
    autocast=_autocast,
)
_mse_backward = Operator(
    "mse_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, str reduction, int batch_dims, "
    "bool[] output_mask) -> Tensor[]",
    launch=_launch_backward,
    fake=_backward_fake,
    vmap=_backward_vmap,
    derivative=MseBackwardFunction,
)
_mse_hvp = Operator(
    "mse_hvp(Tensor? grad_output, Tensor input, Tensor target, Tensor? weight, Tensor? d_grad, Tensor? d_input, "
    "Tensor? d_target, Tensor? d_weight, str reduction, int batch_dims, bool[] output_mask) -> Tensor[]",
    launch=_launch_hvp,
    fake=_hvp_fake,
    vmap=_hvp_vmap,
    derivative=_hvp_formula,
)
_mse_forward_backward = Operator(
    "mse_forward_backward(Tensor input, Tensor target, Tensor? weight, str reduction, bool[] output_mask, "
    "ScalarType dtype) -> Tensor[]",
    launch=_launch_forward_backward,
    fake=_forward_backward_fake,
    vmap=_forward_backward_vmap,
    derivative=_forward_backward_formula,
)
