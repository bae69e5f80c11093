"""The fallback's products by blocks of rows: whole numbers, of which every sum is exact whatever its order."""

import pytest
import torch
from gradkernels import linear
from gradkernels.fallback import matmul
from gradkernels.fallback.matmul import MANY, MANY_FOR_ONE, ROWS, WIDE, matmul_forward, rows_by_vectors
from torch import Tensor

from ..cases import label
from ..helpers import DTYPES, Operators

pytestmark = pytest.mark.unwatched  # of a launch there is nothing to watch
LENGTHS = (2 * ROWS - 1, 2 * ROWS, 2 * ROWS + 1, 3 * ROWS + 7)
EVERY_LAYOUT = pytest.mark.parametrize(
    "layout", ["contiguous", "transposed", "wide rows", "holes", "repeated row"]
)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few numbers too."""
    monkeypatch.setattr(matmul, "MANY", 0)
    monkeypatch.setattr(matmul, "MANY_FOR_ONE", 0)


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


@pytest.mark.usefixtures("any_size")
@EVERY_LAYOUT
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


@pytest.mark.usefixtures("any_size")
@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_sums_over_many_rows(dtype: torch.dtype, layout: str) -> None:
    for length in LENGTHS:
        for columns in (0, 1, 3, 63, 64, 65):
            matrix = whole_numbers((length, columns), layout, dtype)
            for outputs in (0, 1, 2, 65):
                few = whole_numbers((length, outputs), "contiguous", dtype)
                check(few.mT, matrix, None)
                check(matrix.mT, few, None)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("shape", [(3, ROWS), (2, 3, ROWS // 2 + 1), (2 * ROWS + 1, 1)], ids=str)
def test_rows_of_many_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for layout in ("contiguous", "transposed", "wide rows"):
        for inner in (3, 64):
            input = whole_numbers((*shape, inner), layout, dtype)
            check(input, whole_numbers((inner, 1), "contiguous", dtype), torch.full((1,), 0.5).to(dtype))
            batch = whole_numbers((*shape[:-1], inner, 1), "contiguous", dtype)
            check(input, batch, None)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=label)
def test_a_bias_is_added_before_16_bits_are_rounded(dtype: torch.dtype) -> None:
    """Many rows have the bits of few."""
    input, other, bias = (torch.randn(shape).to(dtype) for shape in ((LENGTHS[-1], 8), (8, 1), (1,)))
    parts = [matmul_forward(part, other, bias, [], dtype) for part in input.split(1000)]
    assert torch.equal(matmul_forward(input, other, bias, [], dtype), torch.cat(parts))


def products(asked: Operators) -> list[tuple[str, tuple[int, ...]]]:
    """Each product that torch was asked for, with its first factor's shape."""
    names = ("mm", "bmm", "_embedding_bag_forward_only")
    return [(name, tuple(args[0].shape)) for name, args, _ in asked.calls if name in names]


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "transposed", "expected"),
    [
        (2 * ROWS, MANY // ROWS, 1, False, [("bmm", (2, ROWS, MANY // ROWS)), ("mm", (0, MANY // ROWS))]),
        # With the columns as left factor a product took up to 17 times as long.
        (2 * ROWS, MANY // ROWS, 1, True, [("bmm", (2, 1, MANY // ROWS)), ("mm", (0, MANY // ROWS))]),
        (2 * ROWS, WIDE - 1, 1, False, [("mm", (2 * ROWS, WIDE - 1))]),
        # Where rows are contiguous, torch's product has all threads: blocks took up to 4 times as long.
        (WIDE, MANY_FOR_ONE // WIDE, 1, False, [("mm", (WIDE, MANY_FOR_ONE // WIDE))]),
        (2, MANY, 1, False, [("mm", (2, MANY))]),
        (2, MANY, 1, True, [("mm", (2, MANY))]),
        (2, MANY_FOR_ONE, 1, True, [("bmm", (MANY_FOR_ONE // ROWS, 1, ROWS))]),
        (
            WIDE,
            MANY_FOR_ONE // WIDE,
            1,
            True,
            [("_embedding_bag_forward_only", (MANY_FOR_ONE // WIDE, WIDE))],
        ),
        (1, MANY_FOR_ONE, 1, False, [("bmm", (MANY_FOR_ONE // ROWS, 1, ROWS))]),
        (2, MANY, 2, True, [("bmm", (MANY // ROWS, 2, ROWS))]),
        (2 * ROWS, 1, 1, False, []),
    ],
)
def test_which_products_go_by_blocks(
    rows: int, inner: int, columns: int, transposed: bool, expected: list[tuple[str, tuple[int, ...]]]
) -> None:
    """What takes longer by blocks than as a whole goes as a whole."""
    input = torch.zeros(inner, rows).mT if transposed else torch.zeros(rows, inner)
    with Operators() as asked:
        matmul_forward(input, torch.zeros(inner, columns), None, [], torch.float32)
    assert products(asked) == expected


def test_a_bias_gets_a_sum() -> None:
    """A product with ones, as which its gradient comes, took twenty times as long."""
    ones, grad = torch.ones(()).expand(1, MANY), torch.randint(-2, 3, (MANY, 1)).float()
    with Operators() as asked:
        result = matmul_forward(ones, grad, None, [], torch.float32)
        twice = matmul_forward(2 * ones[:, :1].expand(1, MANY), grad, None, [], torch.float32)
    assert len(products(asked)) == 1  # of the twos
    assert torch.equal(result, grad.sum(0, keepdim=True))
    assert torch.equal(twice, 2 * result)


@pytest.mark.parametrize(
    ("strides", "left"),
    [
        ((WIDE * 5, WIDE, 1), (3, 5, WIDE)),
        ((WIDE * 10, WIDE + 3, 1), (3, 5, WIDE)),
        # Up to 17 and 1.8 times as long with the rows as left factor.
        ((WIDE * 5, 1, 5), (3, 1, WIDE)),
        ((WIDE, 3 * WIDE, 1), (3, 1, WIDE)),
    ],
)
def test_which_factor_is_left(strides: tuple[int, ...], left: tuple[int, ...]) -> None:
    rows = torch.randint(-2, 3, (30 * WIDE,)).float().as_strided((3, 5, WIDE), strides)
    vectors = torch.randint(-2, 3, (3, 1, WIDE)).float()
    with Operators() as asked:
        result = rows_by_vectors(rows, vectors)
    assert products(asked) == [("bmm", left)]
    assert torch.equal(result, (rows * vectors).sum(2, keepdim=True))


def test_the_gradient_of_one_outputs_weight_has_its_strides() -> None:
    """Of (1, D) both could be 1; DistributedDataParallel warns of any but the parameter's."""
    weight = torch.randn(1, WIDE, requires_grad=True)
    linear(torch.randn(2 * MANY_FOR_ONE // WIDE, WIDE), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.stride() == weight.stride() == (WIDE, 1)
