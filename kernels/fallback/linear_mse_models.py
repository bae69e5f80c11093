"""A batch of linear models and their squared errors in plain torch.

Products of batches of matrices. Ragged rows are cut into tiles of equally many rows, so that they are a batch too;
no tile has rows of two models, and the unused rows of a tile are 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import acc_dtype
from .matmul import matmul_forward, parts_of


class Tiles(NamedTuple):
    """How the rows of B models are cut.

    Attributes:
        model: of each tile.
        row: of each place in a tile ``(tiles, T)``; 0 where there is none.
        unused: the places where there is none ``(tiles, T, 1)``.
        start, end: of each model's rows ``(B,)``.
        offsets: ``(B + 1,)``: model b has the tiles offsets[b], ..., offsets[b + 1] - 1.
    """

    model: Tensor
    row: Tensor
    unused: Tensor
    start: Tensor
    end: Tensor
    offsets: Tensor

    def cut(self, rows: Tensor) -> Tensor:
        """``(R, K)`` as ``(tiles, T, K)``."""
        values = rows.index_select(0, self.row.flatten()).unflatten(0, self.row.shape)
        return values.masked_fill_(self.unused, 0)

    def join(self, tiles: Tensor, rows: int) -> Tensor:
        """``(tiles, T, K)`` as ``(R, K)``, with 0 in rows of no model."""
        each = torch.arange(rows, device=tiles.device)
        # The last model that starts here or before, as an empty one may start where the next does.
        last = torch.searchsorted(self.start, each, right=True) - 1
        owner = last.clamp(min=0)
        place = self.offsets[owner] * self.row.shape[1] + each - self.start[owner]
        place.clamp_(0, self.row.numel() - 1)
        values = tiles.flatten(0, 1).index_select(0, place)
        return values.masked_fill_(((last < 0) | (each >= self.end[owner])).unsqueeze(-1), 0)

    def sums(self, tiles: Tensor) -> Tensor:
        """``(tiles, ...)`` summed over the tiles of each model, in order."""
        if tiles.device.type != "mps":
            return torch.segment_reduce(tiles, "sum", offsets=self.offsets, unsafe=True, initial=0)
        result = tiles.new_zeros((len(self.offsets) - 1, *tiles.shape[1:]))
        return result.index_add_(0, self.model, tiles)


def tiles_of(bounds: Tensor, rows: int) -> Tiles:
    """Tiles of half as many rows as a model has on average: then at most a third of all places is unused."""
    models = len(bounds)
    T = max(1, -(-rows // max(1, 2 * models)))
    bounds = bounds.to(torch.int64).clamp(0, rows)
    start, end = (side.contiguous() for side in bounds.unbind(1))
    ends = ((end - start).clamp(min=0) + T - 1).div(T, rounding_mode="floor").cumsum(0)
    offsets = torch.nn.functional.pad(ends, (1, 0))
    # On a device the number of tiles is not waited for: no more can be there.
    count = max(1, int(offsets[-1])) if bounds.is_cpu else rows // T + models
    tile = torch.arange(count, device=bounds.device)
    model = torch.searchsorted(ends, tile, right=True).clamp_(max=models - 1)
    first = start[model] + (tile - offsets[model]) * T
    row = first[:, None] + torch.arange(T, device=bounds.device)
    unused = row >= end[model][:, None]
    return Tiles(model, row.masked_fill_(unused, 0), unused.unsqueeze(-1), start, end, offsets)


def linear_mse_models_forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    sample_weight: Tensor | None,
    bounds: Tensor | None,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The losses, and what is needed of E, grad_weight and grad_bias; see kernels/triton/linear_mse_models.py."""
    acc = acc_dtype(input, weight, target, bias, sample_weight)
    B, K, _ = weight.shape
    if input.dtype != weight.dtype:  # under autocast, which leaves float64 as it is
        input, weight = input.to(acc), weight.to(acc)
    tiles = None
    if bounds is None:
        count: Tensor | int = target.shape[1] * K
    else:
        rows = len(input)
        start, end = bounds.to(torch.int64).clamp(0, rows).unbind(1)
        count = (end - start).clamp_(min=0) * K
        if rows == 0 or B == 0:
            return _of_no_rows(weight, target, reduction, output_mask, dtype, acc)
        tiles = tiles_of(bounds, rows)
        input, target = tiles.cut(input), tiles.cut(target)
        sample_weight = None if sample_weight is None else tiles.cut(sample_weight)
        weight = weight[tiles.model]
        bias = None if bias is None else bias[tiles.model]
    wide = torch.promote_types(input.dtype, dtype)
    if input.dim() == 2:  # one product of all weights
        residual = matmul_forward(weight, input.mT, None, [], wide).mT
    elif input.dtype == wide and K == 1:  # torch takes 0.6 to 0.9 of the other product's time
        residual = torch.bmm(weight, input.mT).view(*input.shape[:2], 1)
    elif input.dtype == wide:
        residual = torch.bmm(input, weight.mT)
    else:
        residual = matmul_forward(input, weight.mT, None, [], wide)
    if bias is not None:
        residual = residual.add_(bias.unsqueeze(1))
    residual = residual.to(acc).sub_(target)
    if tiles is not None:  # a bias and, times 0, infinite weights
        residual.masked_fill_(tiles.unused, 0)
    error = residual if sample_weight is None else residual * sample_weight
    loss = (error * residual).sum((1, 2))
    grad_weight = None
    if output_mask[1]:
        # E^T X is divided by the number of rows afterwards: before that it may not fit float16, nor may E.
        operand = acc if input.dtype == torch.float16 else input.dtype
        left, right = error.to(operand).mT, input.to(operand)
        product = torch.bmm if right.dim() == 3 else torch.matmul
        # Parts of 16 bits would be rounded to them before they are added.
        parts = [slice(None)] if operand.itemsize == 2 else parts_of(right.shape[-2])
        products = [product(left[..., rows], right[..., rows, :]) for rows in parts]
        grad_weight = products[0] if len(products) == 1 else torch.stack(products).sum(0)
    grad_bias = error.sum(1) if output_mask[2] else None
    if tiles is not None:
        loss = tiles.sums(loss)
        grad_weight = None if grad_weight is None else tiles.sums(grad_weight.to(acc))
        grad_bias = None if grad_bias is None else tiles.sums(grad_bias)
        error = tiles.join(error, rows) if output_mask[0] else error
    factor: Tensor | float = 2.0
    if reduction == "mean":
        loss = loss.div_(count)
        factor = 2.0 / max(1, count) if isinstance(count, int) else (2 / count.clamp(min=1).to(acc))[:, None]
    results = [loss.to(dtype)]
    if output_mask[0]:
        results.append(error.to(dtype).contiguous())
    if grad_weight is not None:
        scale = factor if isinstance(factor, float) else factor[:, None]
        results.append(grad_weight.to(acc).mul_(scale))
    if grad_bias is not None:
        results.append(grad_bias.mul_(factor))
    return results


def _of_no_rows(
    weight: Tensor,
    target: Tensor,
    reduction: str,
    output_mask: list[bool],
    dtype: torch.dtype,
    acc: torch.dtype,
) -> list[Tensor]:
    loss = weight.new_full(weight.shape[:1], math.nan if reduction == "mean" else 0.0, dtype=dtype)
    shapes = (target.shape, dtype), (weight.shape, acc), (weight.shape[:2], acc)
    wanted = (shape for shape, needed in zip(shapes, output_mask, strict=True) if needed)
    return [loss, *(weight.new_zeros(shape, dtype=kind) for shape, kind in wanted)]


def linear_mse_models_product(rows: Tensor, models: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row times its own model; see kernels/triton/linear_mse_models.py."""
    if len(rows) == 0 or len(bounds) == 0:
        return rows.new_zeros((len(rows), models.shape[1]), dtype=dtype)
    tiles = tiles_of(bounds, len(rows))
    products = matmul_forward(tiles.cut(rows), models[tiles.model].mT, None, [], dtype)
    return tiles.join(products, len(rows))


def linear_mse_models_outer(left: Tensor, right: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of products over each model's rows; see kernels/triton/linear_mse_models.py."""
    acc = acc_dtype(left, right)
    if len(left) == 0 or len(bounds) == 0:
        return left.new_zeros((len(bounds), left.shape[1], right.shape[1]), dtype=dtype)
    tiles = tiles_of(bounds, len(left))
    return tiles.sums(matmul_forward(tiles.cut(left).mT, tiles.cut(right), None, [], acc)).to(dtype)
