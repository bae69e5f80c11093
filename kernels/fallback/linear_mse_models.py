"""A batch of linear models and their squared errors in plain torch.

Products of batches of matrices. Ragged rows are cut into tiles of equally many rows, so that they are a batch too;
no tile has rows of two models, and the unused rows of a tile are 0. On a CPU rows beside models of one output, or of
one feature, stay where they lie: tiles of one row, which are elementwise products and sums of segments.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import acc_dtype
from .matmul import ROWS, matmul_forward, parts_of, rows_by_vectors

# Numbers of models that are copied beside their rows at a time: they stay in a core's cache.
CACHED = 1 << 18
# Rows of 16 bits and fewer numbers have slower products on a CPU than copies of them in float32, while these are small.
NARROW, SMALL = 64, 1 << 23
# Numbers of a row from which torch's own sum is the fastest.
REGISTER = 8


class Tiles(NamedTuple):
    """The rows of B models, copied into tiles.

    Attributes:
        model: of each tile.
        row: of each place in a tile ``(tiles, T)``; 0 where there is none.
        unused: the places where there is none: a mask (tiles * T,); on a CPU their numbers.
        start, length: of each model's rows ``(B,)``.
        offsets: ``(B + 1,)``: model b has the tiles offsets[b], ..., offsets[b + 1] - 1.
    """

    model: Tensor
    row: Tensor
    unused: Tensor
    start: Tensor
    length: Tensor
    offsets: Tensor

    def cut(self, rows: Tensor) -> Tensor:
        """Return ``(R, K)`` as ``(tiles, T, K)``, with 0 in unused places."""
        return self.cleared(rows.index_select(0, self.row.flatten()).unflatten(0, self.row.shape))

    def cleared(self, values: Tensor) -> Tensor:
        """Return ``(tiles, T, K)`` itself, with 0 in unused places."""
        _clear(values.flatten(0, 1), self.unused)
        return values

    def join(self, values: Tensor, rows: int) -> Tensor:
        """Return ``(tiles, T, K)`` as ``(R, K)``, with 0 in rows of no model."""
        each = torch.arange(rows, device=values.device)
        # The last model that starts here or before, as an empty one may start where the next does.
        last = torch.searchsorted(self.start, each, right=True) - 1
        owner = last.clamp(min=0)
        place = self.offsets[owner] * self.row.shape[1] + each - self.start[owner]
        place.clamp_(0, self.row.numel() - 1)
        values = values.flatten(0, 1).index_select(0, place)
        return _clear(values, _places((last < 0) | (each >= (self.start + self.length)[owner])))

    def predict(self, values: Tensor, models: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``(tiles, T, K)``: rows ``(tiles, T, D)`` times their models (B, K, D)."""
        return _products(values, models[self.model], dtype)

    def contract(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``(B, K, D)``: products of ``(tiles, T, K)`` and ``(tiles, T, D)``, summed over each model's rows."""
        return self._added(matmul_forward(left.mT, right, None, [], dtype).to(acc_dtype(left)))

    def sums(self, values: Tensor) -> Tensor:
        """Return ``(B, K)``: ``(tiles, T, K)`` summed over the rows of each model."""
        return self._added(values.sum(1))

    def _added(self, values: Tensor) -> Tensor:
        """Sum ``(tiles, ...)`` over the tiles of each model, in order."""
        if values.device.type != "mps":
            return _segments(values, self.offsets)
        return values.new_zeros((len(self.start), *values.shape[1:])).index_add_(0, self.model, values)


class Rows(NamedTuple):
    """The rows of B models where they lie, as n tiles of one row: for one output or one feature, on a CPU.

    What is made of them has the dtype of accumulation until it is a result.

    Attributes:
        model: of each row that has one.
        row: those rows; None, where they are all.
        length: of each model's rows ``(B,)``.
        edges: ``(B + 1,)``: model b has the rows edges[b], ..., edges[b + 1] - 1 among them.
        pieces: ``(pieces + 1,)`` edges of pieces of at most ROWS rows, and ``(B + 1,)`` edges of models among pieces;
            None where no model has more rows.
    """

    model: Tensor
    row: Tensor | None
    length: Tensor
    edges: Tensor
    pieces: tuple[Tensor, Tensor] | None

    def cut(self, rows: Tensor) -> Tensor:
        """Return ``(R, K)`` as ``(n, 1, K)``, without rows of no model."""
        return (rows if self.row is None else rows.index_select(0, self.row)).unsqueeze(1)

    def cleared(self, values: Tensor) -> Tensor:
        return values

    def join(self, values: Tensor, rows: int) -> Tensor:
        """Return ``(n, 1, K)`` as ``(R, K)``, with 0 in rows of no model."""
        values = values.squeeze(1)
        if self.row is None:
            return values
        return values.new_zeros(rows, values.shape[1]).index_copy_(0, self.row, values)

    def predict(self, values: Tensor, models: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``(n, 1, K)``: rows ``(n, 1, D)`` times their models (B, K, D), where K or D is 1."""
        models, values = models.flatten(1).to(acc_dtype(values, models)), values.squeeze(1)
        if values.shape[1] == 1:
            return models.index_select(0, self.model).mul_(values).unsqueeze(1).to(dtype)
        result = models.new_empty(len(values), 1)
        ones = models.new_ones(values.shape[1], 1)
        size = max(1, CACHED // values.shape[1])
        for each, owner, place in zip(
            values.split(size), self.model.split(size), result.split(size), strict=True
        ):
            products = models.index_select(0, owner).mul_(each)
            if len(ones) < REGISTER:
                torch.mm(products, ones, out=place)
            else:
                torch.sum(products, 1, keepdim=True, out=place)
        return result.unsqueeze(1).to(dtype)

    def contract(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``(B, K, D)``: products of ``(n, 1, K)`` and ``(n, 1, D)``, each model's rows added; K or D is 1."""
        acc = acc_dtype(left, right)
        left, right = left.to(acc), right.to(acc)
        wide, factor = (right, left) if left.shape[2] == 1 else (left, right)
        sums = torch.nn.functional.embedding_bag(
            torch.arange(len(wide), device=wide.device),
            wide.squeeze(1),
            self.edges if self.pieces is None else self.pieces[0],
            mode="sum",
            per_sample_weights=factor.flatten(),
            include_last_offset=True,
        )
        sums = sums if self.pieces is None else _segments(sums, self.pieces[1])
        return sums.view(-1, left.shape[2], right.shape[2]).to(dtype)

    def sums(self, values: Tensor) -> Tensor:
        """Return ``(B, K)``: ``(n, 1, K)`` summed over the rows of each model."""
        return _segments(values.squeeze(1).double(), self.edges).to(values.dtype)


def _places(mask: Tensor) -> Tensor:
    """Return where a mask holds, as ``_clear`` takes it: on a device, which would wait for their number, the mask."""
    return mask.nonzero().squeeze(1) if mask.is_cpu else mask


def _clear(values: Tensor, places: Tensor) -> Tensor:
    """Write 0 into some rows of ``values`` (n, K) and return it."""
    if places.dtype == torch.bool:
        return values.masked_fill_(places.unsqueeze(1), 0)
    return values.index_fill_(0, places, 0)  # a third of the time of a mask that is broadcast


def _segments(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum ``(n, ...)`` from each offset to the next, in order."""
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)


def layout_of(bounds: Tensor, rows: int, K: int, D: int) -> Rows | Tiles | None:
    """Return how the rows of models ``(K, D)`` are cut; None where no model has any."""
    models = len(bounds)
    start, end = (side.contiguous() for side in bounds.to(torch.int64).clamp(0, rows).unbind(1))
    length = (end - start).clamp_(min=0)
    if models == 0 or rows == 0 or (bounds.is_cpu and not length.any()):
        return None
    if bounds.is_cpu and min(K, D) == 1:
        edges = torch.nn.functional.pad(length.cumsum(0), (1, 0))
        model, row, pieces = torch.repeat_interleave(length), None, None
        if len(model) != rows:
            row = (start - edges[:-1]).index_select(0, model)
            row.add_(torch.arange(len(row), device=row.device))
        if length.max() > ROWS:
            _, first, offsets = _pieces(edges[:-1], length, ROWS, rows)
            pieces = torch.cat([first, edges[-1:]]), offsets
        return Rows(model, row, length, edges, pieces)
    # Half as many rows as a model has on average: then at most a third of all places is unused.
    T = min(ROWS, max(1, -(-rows // (2 * models))))
    model, first, offsets = _pieces(start, length, T, rows)
    row = first[:, None] + torch.arange(T, device=bounds.device)
    unused = row >= (start + length)[model][:, None]
    return Tiles(model, row.masked_fill_(unused, 0), _places(unused.flatten()), start, length, offsets)


def _pieces(start: Tensor, length: Tensor, size: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut models of ``length`` rows, which begin at ``start``, into pieces of at most ``size``.

    Returns:
        The model and the first row of each piece, and ``(B + 1,)`` the number of pieces before each model.
    """
    counts = (length + size - 1).div_(size, rounding_mode="floor")
    ends = counts.cumsum(0)
    offsets = torch.nn.functional.pad(ends, (1, 0))
    if start.is_cpu:
        model = torch.repeat_interleave(counts)
    else:  # The number of pieces is not waited for: no more can be there.
        pieces = torch.arange(rows // size + len(start), device=start.device)
        model = torch.searchsorted(ends, pieces, right=True).clamp_(max=len(start) - 1)
    first = start[model] + (torch.arange(len(model), device=start.device) - offsets[model]) * size
    return model, first, offsets


def _products(rows: Tensor, models: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(*, N, K)``: rows ``(N, D)`` or ``(B, N, D)`` times models ``(B, K, D)``."""
    if rows.dim() == 2:  # one product of all models
        return matmul_forward(models, rows.mT, None, [], dtype).mT
    same = rows.dtype == models.dtype == dtype
    if same and models.shape[1] == 1:
        return rows_by_vectors(rows, models)
    if same:
        return torch.bmm(rows, models.mT)
    return matmul_forward(rows, models.mT, None, [], dtype)


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
    """Return the losses, and what is needed of E, grad_weight, grad_bias; see kernels/triton/linear_mse_models.py."""
    acc = acc_dtype(input, weight, target, bias, sample_weight)
    K, D = weight.shape[1:]
    rows = len(input)
    count: Tensor | int = target.shape[-2] * K
    layout = None if bounds is None else layout_of(bounds, rows, K, D)
    if bounds is not None and layout is None:
        return _of_no_rows(weight, target, reduction, output_mask, dtype, acc)
    narrow = input.is_cpu and input.element_size() == 2 and D < NARROW and input.numel() <= SMALL
    # Dtypes differ under autocast, which leaves float64 as it is.
    if input.dtype != weight.dtype or (narrow and not isinstance(layout, Rows)):
        input, weight = input.to(acc), weight.to(acc)
    wide = torch.promote_types(input.dtype, dtype)
    # E^T X is divided by the number of rows afterwards: before that it may not fit float16, nor may E.
    operand = acc if input.dtype == torch.float16 else input.dtype
    if isinstance(layout, Rows):
        wide = operand = acc
    if layout is not None:
        count = layout.length * K
        input, target = layout.cut(input), layout.cut(target)
        sample_weight = None if sample_weight is None else layout.cut(sample_weight)
        bias = None if bias is None else bias[layout.model]
    residual = _products(input, weight, wide) if layout is None else layout.predict(input, weight, wide)
    if bias is not None:
        residual = residual.add_(bias.unsqueeze(1))
    residual = residual.to(acc).sub_(target)
    if layout is not None:  # a bias and, times 0, infinite weights
        residual = layout.cleared(residual)
    error = residual if sample_weight is None else residual * sample_weight
    squares = error * residual
    loss = squares.sum((1, 2)) if layout is None else layout.sums(squares).sum(1)
    grad_weight = None
    if output_mask[1]:
        left, right = error.to(operand), input.to(operand)
        if layout is not None:
            grad_weight = layout.contract(left, right, operand)
        else:
            product = torch.bmm if right.dim() == 3 else torch.matmul
            # Parts of 16 bits would be rounded to them before they are added.
            parts = [slice(None)] if operand.itemsize == 2 else parts_of(right.shape[-2])
            products = [product(left[:, rows].mT, right[..., rows, :]) for rows in parts]
            grad_weight = products[0] if len(products) == 1 else torch.stack(products).sum(0)
    grad_bias = None
    if output_mask[2]:
        grad_bias = error.sum(1) if layout is None else layout.sums(error)
    if layout is not None and output_mask[0]:
        error = layout.join(error, rows)
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
    """Multiply each row by its own model; see kernels/triton/linear_mse_models.py."""
    layout = layout_of(bounds, len(rows), *models.shape[1:])
    if layout is None:
        return rows.new_zeros((len(rows), models.shape[1]), dtype=dtype)
    return layout.join(layout.predict(layout.cut(rows), models, dtype), len(rows))


def linear_mse_models_outer(left: Tensor, right: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum products over each model's rows; see kernels/triton/linear_mse_models.py."""
    acc = acc_dtype(left, right)
    layout = layout_of(bounds, len(left), left.shape[1], right.shape[1])
    if layout is None:
        return left.new_zeros((len(bounds), left.shape[1], right.shape[1]), dtype=dtype)
    return layout.contract(layout.cut(left), layout.cut(right), acc).to(dtype)
