"""Rows and the models that they belong to: products of the two, sums over a model's rows, values spread over them.

Rows come in three layouts::

    own      rows (B, N, D)     each model has its own N rows
    shared   rows (N, D)        all models have the same N rows
    ragged   rows (R, D)        model b has the rows bounds[b, 0] <= r < bounds[b, 1]; bounds is None elsewhere

All is made of products: of batches of matrices, or, where rows are ragged, of the operators
``linear_mse_models_product`` and ``linear_mse_models_outer``, each of which the other differentiates. Results of ragged
rows are 0 in rows of no model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .matmul import product
from .operator import Operator, autocast_cast, mapped, uncast


def check_bounds(bounds: Tensor, rows: int) -> None:
    """Raise ValueError for a start or an end outside ``rows`` or before the one in front of it."""
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


def lengths(bounds: Tensor, rows: int) -> Tensor:
    """Return how many rows each model has, in 64 bits, as elements are counted by it."""
    start, end = bounds.to(torch.int64).clamp(0, rows).unbind(1)
    return (end - start).clamp(min=0)


def rows_by_models(
    rows: Tensor, models: Tensor, bounds: Tensor | None, dtype: torch.dtype, addend: Tensor | None = None
) -> Tensor:
    """Return ``rows[n] . models[b, k] + addend[n, k]`` for each row n of model b, and each k."""
    if bounds is None:
        return product(rows, models.mT, addend, dtype=dtype)
    values = _product(rows, models, bounds, dtype)
    return values if addend is None else values + addend


def rows_by_rows(
    left: Tensor, right: Tensor, bounds: Tensor | None, dtype: torch.dtype, addend: Tensor | None = None
) -> Tensor:
    """Return ``(B, K, D)``: the sums of ``left[n, k] * right[n, d]`` over the rows n of each model, and the addend."""
    if bounds is None:
        return product(left.mT, right, addend, dtype=dtype)
    values = _outer(left, right, bounds, dtype)
    return values if addend is None else values + addend


def rows_back(
    rows: Tensor, models: Tensor, input: Any, bounds: Tensor | None, addend: Tensor | None = None
) -> Tensor:
    """Sum ``rows[n, k] * models[b, k]`` over k, and over all models where they share ``input`` (or its Like)."""
    if bounds is not None:
        return rows_by_models(rows, models.mT, bounds, input.dtype, addend)
    if len(input.shape) == 3:
        return product(rows, models, addend, dtype=input.dtype)
    return product(rows, models, addend, [0], input.dtype).squeeze(0)


def _ones(like: Tensor, rows: int) -> Tensor:
    return like.new_ones(()).expand(rows, 1)


def spread(values: Tensor, rows: int, bounds: Tensor | None) -> Tensor:
    """Spread values ``(B, K)`` of models over their rows: ``(B, 1, K)`` or ``(R, K)``."""
    if bounds is None:
        return values.unsqueeze(1)
    return _product(_ones(values, rows), values.unsqueeze(-1), bounds, values.dtype)


def row_sums(rows: Tensor, bounds: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``(B, K)``: the sums over the rows of each model."""
    ones = _ones(rows, rows.shape[-2])
    if bounds is None:
        return product(ones.mT, rows, dtype=dtype).squeeze(-2)
    return _outer(rows, ones, bounds, dtype).squeeze(-1)


def scaled(
    rows: Tensor, scale: Tensor, bounds: Tensor | None, dtype: torch.dtype, addend: Tensor | None = None
) -> Tensor:
    """Return each row times its model's ``scale`` (B,), and the addend."""
    if bounds is None:
        column = None if addend is None else addend.unsqueeze(-1)
        return product(rows.unsqueeze(-1), scale[:, None, None, None], column, dtype=dtype).squeeze(-1)
    edges = bounds.to(torch.int64) * rows.shape[1]
    flat = rows.reshape(rows.numel(), 1)  # -1 would be any size where vmap has none
    values = _product(flat, scale[:, None, None], edges, dtype).reshape(rows.shape)
    return values if addend is None else values + addend


def of_models(rows: Tensor, bounds: Tensor | None) -> Tensor:
    """Return the rows, with 0 in those of no model."""
    if bounds is None:
        return rows
    return scaled(rows, rows.new_ones(()).expand(len(bounds)), bounds, rows.dtype)


def _tangent(operator: Operator, ctx: Any, d_left: Tensor | None, d_right: Tensor | None) -> Tensor | None:
    left, right, bounds = ctx.saved_tensors
    parts = [] if d_left is None else [operator(d_left, right, bounds, ctx.dtype)]
    parts += [] if d_right is None else [operator(left, d_right, bounds, ctx.dtype)]
    return sum(parts[1:], parts[0]) if parts else None


class _FactorsFunction(torch.autograd.Function):
    """Saves each factor for the other one's gradient alone, as MatmulFunction does."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        left, right, bounds, ctx.dtype = inputs
        needs_left, needs_right = ctx.needs_input_grad[:2]
        ctx.save_for_backward(left if needs_right else None, right if needs_left else None, bounds)
        ctx.save_for_forward(left, right, bounds)
        ctx.dtypes = left.dtype, right.dtype


class ProductFunction(_FactorsFunction):
    """Derivatives of ``rows[r] . models[b(r), k]``."""

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
        return _tangent(_product, ctx, d_rows, d_models)


class OuterFunction(_FactorsFunction):
    """Derivatives of the sums of ``left[r, k] * right[r, d]`` over each model's rows."""

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
        return _tangent(_outer, ctx, d_left, d_right)


def _autocast_rows(*args: Any) -> tuple[Any, ...]:
    left, right, bounds, _ = args
    return (*(operands := tuple(map(autocast_cast, (left, right)))), bounds, operands[0].dtype)


def _launch_rows(launcher: Any, left: Tensor, right: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    if bounds.is_cpu:
        check_bounds(bounds, len(left))
    return launcher(left, right, bounds, dtype)


def _product_fake(rows: Tensor, models: Tensor, _: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty((rows.shape[0], models.shape[1]), dtype=dtype)


def _outer_fake(left: Tensor, right: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    return left.new_empty((bounds.shape[0], left.shape[1], right.shape[1]), dtype=dtype)


def folded(size: int, tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """Return ``(size, B, ...)`` as ``(size * B, ...)``."""
    return None if tensor is None else mapped(size, tensor, dim).flatten(0, 1)


def folded_bounds(size: int, bounds: Tensor, dim: int | None, rows: int) -> Tensor:
    """Return the bounds of ``size`` times as many models, whose rows stand one behind another.

    What is out of range must not become the rows of another: on the CPU, where that is an error, it stays out.
    """
    bounds = mapped(size, bounds, dim).to(torch.int64)
    firsts = torch.arange(size, device=bounds.device)[:, None, None] * rows
    inside = bounds.clamp(0, rows)
    moved = inside + firsts
    return (moved.where(inside == bounds, -1) if bounds.device.type == "cpu" else moved).flatten(0, 1)


def _rows_vmap(operator: Operator, size: int, in_dims: Sequence[int | None], *args: Any) -> Tensor:
    left, right, bounds, dtype = args
    rows = mapped(size, left, in_dims[0]).shape[1]
    operands = (folded(size, tensor, dim) for tensor, dim in zip((left, right), in_dims[:2], strict=True))
    output = operator(*operands, folded_bounds(size, bounds, in_dims[2], rows), dtype)
    each = rows if operator is _product else mapped(size, bounds, in_dims[2]).shape[1]
    return output.unflatten(0, (size, each))


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
