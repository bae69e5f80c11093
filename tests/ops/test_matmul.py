"""matmul and linear: shapes, sizes, dtypes and errors. Derivatives and layouts have files of their own."""

from itertools import product

import pytest
import torch
from gradkernels import linear, matmul
from torch import Tensor
from torch.nn import functional

from ..cases import MATMUL_SHAPES, Case, check, label, on_both_backends
from ..helpers import DTYPES, EVERY_BACKEND, SIZES


@EVERY_BACKEND
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shapes", [*MATMUL_SHAPES, ((63, 65), (65, 63))], ids=str)
def test_matmul(
    backend: str, device: torch.device, shapes: tuple[tuple[int, ...], ...], with_bias: bool
) -> None:
    input, other = shapes
    bias = {"bias": (other[-1] if len(other) > 1 else 1,)} if with_bias else {}
    check(Case("matmul", {"input": input, "other": other, **bias}), torch.float32, device)


@pytest.mark.parametrize(
    ("backend", "size", "dtype"),
    on_both_backends(product(SIZES, DTYPES), triton=lambda size, dtype: [size, dtype]),
    ids=label,
    indirect=["backend"],
)
def test_linear(backend: str, device: torch.device, size: int, dtype: torch.dtype) -> None:
    check(Case("linear", {"input": (3, size), "weight": (5, size), "bias": (5,)}), dtype, device)
    check(Case("linear", {"input": (size, 2), "weight": (3, 2)}), dtype, device)
    check(Case("linear", {"input": (size,), "weight": (size,), "bias": (1,)}), dtype, device)


def test_a_bias_of_no_dimension_serves_one_column(backend: str, device: torch.device) -> None:
    input, vector, bias = (torch.randn(shape, device=device) for shape in ((3, 5), (5,), ()))
    expected = input @ vector + bias
    torch.testing.assert_close(matmul(input, vector, bias), expected)
    torch.testing.assert_close(linear(input, vector, bias), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=label)
def test_long_sums_are_kept_wide(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """A sum that a 16-bit accumulator would lose: 4096 ones after one large number."""
    ones = torch.ones(1, 4097, dtype=dtype, device=device)
    ones[0, 0] = 4096
    assert matmul(ones, torch.ones_like(ones).mT).item() == 8192
    assert linear(ones, torch.ones_like(ones)).item() == 8192


def test_float16_products_beyond_its_range_are_inf(backend: str, device: torch.device) -> None:
    big = torch.full((1, 2), 300.0, dtype=torch.float16, device=device)
    assert matmul(big, big.mT).item() == float("inf")


ERRORS = [  # op, argument shapes, exception, what the message shows
    (matmul, [(), (3,)], RuntimeError, r"matmul: both arguments.*input \(\), other \(3,\)"),
    (matmul, [(2, 3), (4, 5)], RuntimeError, r"matmul: input.*\(2, 3\).*other \(4, 5\).*3 and 4"),
    (matmul, [(3,), ()], RuntimeError, r"matmul: both arguments.*input \(3,\), other \(\)"),
    (matmul, [(3,), (4,)], RuntimeError, r"\(3,\).*\(4,\)"),
    (matmul, [(3,), (4, 3)], RuntimeError, r"\(3,\).*\(4, 3\)"),
    (matmul, [(2, 3, 4), (3, 4, 5)], RuntimeError, r"2.*3|broadcast"),
    (matmul, [(2, 3), (3, 4), (3,)], ValueError, r"matmul: bias has shape \(3,\), expected \(4,\)"),
    (matmul, [(2, 3), (3, 4), (1,)], ValueError, r"matmul: bias has shape \(1,\), expected \(4,\)"),
    (matmul, [(2, 3), (3, 4), (2, 4)], ValueError, r"matmul: bias has shape \(2, 4\), expected \(4,\)"),
    (matmul, [(2, 3), (3,), (2,)], ValueError, r"matmul: bias has shape \(2,\), expected \(1,\)"),
    (linear, [(), (3,)], RuntimeError, r"linear: input has shape \(\)"),
    (linear, [(2, 3), (5, 4)], RuntimeError, r"linear: input.*\(2, 3\).*weight \(5, 4\)"),
    (linear, [(3,), (5, 4)], RuntimeError, r"linear: input.*\(3,\).*weight \(5, 4\)"),
    (linear, [(2, 3), (1, 5, 3)], RuntimeError, r"weight \(1, 5, 3\)"),
    (linear, [(2, 3), (5, 3), (3,)], ValueError, r"linear: bias has shape \(3,\), expected \(5,\)"),
    (linear, [(2, 3), (3,), (3,)], ValueError, r"linear: bias has shape \(3,\), expected \(1,\)"),
]


@pytest.mark.parametrize(("op", "shapes", "error", "message"), ERRORS)
def test_shape_errors(
    backend: str, device: torch.device, op: type, shapes: list[tuple[int, ...]], error: type, message: str
) -> None:
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    with pytest.raises(error, match=message):
        op(*tensors)
    if error is RuntimeError:  # of torch's functions, which have no bias or another
        with pytest.raises(error):
            {matmul: torch.matmul, linear: functional.linear}[op](*tensors)


@pytest.mark.parametrize("op", [matmul, linear])
def test_dtype_errors(op: type) -> None:
    square = torch.randn(3, 3)
    with pytest.raises(TypeError, match=f"{op.__name__}: input has dtype torch.float32 but .* torch.float64"):
        op(square, square.double())
    with pytest.raises(TypeError, match=r"bias has dtype torch.float16"):
        op(square, square, torch.randn(3).half())


def test_float32_precision_is_torchs(backend: str, device: torch.device) -> None:
    """ "ieee" means exact to float32, whatever torch's older setters did before."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        check(Case("matmul", {"input": (65, 300), "other": (300, 33)}), torch.float32, device)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (2, 6, 5)], ids=str)
def test_the_gradient_of_a_weight_lies_as_the_weight_does(
    backend: str, device: torch.device, shape: tuple[int, ...], create_graph: bool
) -> None:
    """Or else autograd copies it at each backward."""
    x, weight = torch.ones(shape, device=device), torch.ones(3, 5, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x, weight).sum(), weight, create_graph=create_graph)
    assert grad.is_contiguous()


def test_results_are_new_tensors(backend: str, device: torch.device) -> None:
    """A product with a 1 x 1 identity is a copy, not a view of its operand."""
    input = torch.randn(3, 1, device=device)
    for result in (
        matmul(input, torch.ones(1, 1, device=device)),
        linear(input, torch.ones(1, 1, device=device)),
    ):
        assert isinstance(result, Tensor)
        assert torch.equal(result, input)
        assert result.untyped_storage().data_ptr() != input.untyped_storage().data_ptr()
