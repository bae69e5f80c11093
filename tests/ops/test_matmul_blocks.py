"""The fallback's products by blocks of rows: whole numbers, of which every sum is exact whatever its order."""

import pytest
import torch
from gradkernels.fallback.matmul import ROWS, matmul_forward
from torch import Tensor

from ..cases import label
from ..helpers import DTYPES

pytestmark = pytest.mark.unwatched  # of a launch there is nothing to watch
LENGTHS = (2 * ROWS - 1, 2 * ROWS, 2 * ROWS + 1, 3 * ROWS + 7)


def whole_numbers(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """A matrix, or a batch of them, in memory as the layout says; what lies between is NaN."""
    values = torch.randint(-1, 2, shape).to(dtype)
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "wide rows":
        return torch.nn.functional.pad(values, (1, 2), value=float("nan"))[..., 1:-2]
    if layout == "holes":
        return torch.stack([values, torch.full_like(values, float("nan"))], -1)[..., 0]
    if layout == "repeated row":
        return values[..., :1, :].expand(shape)
    return values


def check(input: Tensor, other: Tensor, bias: Tensor | None) -> None:
    result = matmul_forward(input, other, bias, [], input.dtype)
    exact = input.double() @ other.double() + (0 if bias is None else bias.double())
    assert torch.equal(result, exact.to(input.dtype))
    assert result.is_contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "wide rows", "holes", "repeated row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_rows_by_a_column_or_two(dtype: torch.dtype, layout: str) -> None:
    for rows in LENGTHS:
        for inner in (0, 1, 3, 63, 64, 65):
            input = whole_numbers((rows, inner), layout, dtype)
            for columns in (1, 2):
                other, bias = (
                    whole_numbers((inner, columns), "contiguous", dtype),
                    torch.full((columns,), 0.5),
                )
                for add in (None, bias.to(dtype), whole_numbers((rows, columns), layout, dtype)):
                    check(input, other, add)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "wide rows", "holes", "repeated row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_sums_over_many_rows(dtype: torch.dtype, layout: str) -> None:
    for length in LENGTHS:
        for columns in (0, 1, 3, 63, 64, 65):
            matrix = whole_numbers((length, columns), layout, dtype)
            for outputs in (0, 1, 2, 65):
                few = whole_numbers((length, outputs), "contiguous", dtype)
                check(few.mT, matrix, None)
                check(matrix.mT, few, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("shape", [(3, ROWS), (2, 3, ROWS // 2 + 1), (2 * ROWS + 1, 1)], ids=str)
def test_rows_of_many_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for layout in ("contiguous", "transposed", "wide rows"):
        for inner in (3, 64):
            input = whole_numbers((*shape, inner), layout, dtype)
            check(input, whole_numbers((inner, 1), "contiguous", dtype), torch.full((1,), 0.5).to(dtype))
            batch = whole_numbers((*shape[:-1], inner, 1), "contiguous", dtype)
            check(input, batch, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=label)
def test_a_bias_is_added_before_16_bits_are_rounded(dtype: torch.dtype) -> None:
    """Many rows have the bits of few."""
    input, other, bias = (torch.randn(shape).to(dtype) for shape in ((LENGTHS[-1], 8), (8, 1), (1,)))
    parts = [matmul_forward(part, other, bias, [], dtype) for part in input.split(1000)]
    assert torch.equal(matmul_forward(input, other, bias, [], dtype), torch.cat(parts))
