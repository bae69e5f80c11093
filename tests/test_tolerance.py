"""The tolerance policy itself: what it lets pass, and the faults that it catches, drawn once or several times."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from gradkernels.reference import matmul as reference
from gradkernels.verify.tolerance import DRAWS, Comparison, compare, exactly
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]


def judge(product: Product, *shape: int, dtype: torch.dtype = torch.float32, draws: int = 1) -> Comparison:
    """``product`` against torch's, on (M, K) by (K, N) matrices; long sums are of positive numbers, and grow."""
    m, k, n = shape
    results = []
    for _ in range(draws):
        input, other = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        if k > 100:
            input, other = input.abs(), other.abs()
        results.append(
            (product(input, other), input @ other, reference.forward(*map(exactly, (input, other))))
        )
    ours, theirs, exact = zip(*results, strict=True)
    return compare(torch.stack(ours), torch.stack(theirs), np.stack(exact))


def in_order(input: Tensor, other: Tensor) -> Tensor:
    """Term after term: as exact as a sum in one register can be."""
    total = input.new_zeros(input.shape[0], other.shape[1])
    for k in range(input.shape[1]):
        total = torch.addcmul(total, input[:, k : k + 1], other[k])
    return total


def last_term_dropped(input: Tensor, other: Tensor) -> Tensor:
    return input[:, :-1] @ other[:-1]


def one_element_wrong(input: Tensor, other: Tensor) -> Tensor:
    result = input @ other
    result.view(-1)[-1] *= 1.001
    return result


def slightly_scaled(input: Tensor, other: Tensor) -> Tensor:
    return (input @ other) * (1 + 1e-6)


def accumulated_in_bfloat16(input: Tensor, other: Tensor) -> Tensor:
    return in_order(input.bfloat16(), other.bfloat16()).to(input.dtype)


@pytest.mark.parametrize("draws", [1, DRAWS])
@pytest.mark.parametrize(
    ("fault", "shape", "dtype"),
    [
        (last_term_dropped, (1, 33, 1), torch.float64),
        (last_term_dropped, (1, 33, 1), torch.float32),
        (last_term_dropped, (5, 33, 3), torch.bfloat16),
        (one_element_wrong, (5, 33, 3), torch.float32),
        (slightly_scaled, (5, 33, 3), torch.float32),
        (slightly_scaled, (1, 1, 1), torch.float32),
        (accumulated_in_bfloat16, (5, 500, 3), torch.float32),
        (accumulated_in_bfloat16, (5, 500, 3), torch.bfloat16),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_faults_are_caught(fault: Product, shape: tuple[int, ...], dtype: torch.dtype, draws: int) -> None:
    """In ten experiments at most one slips through: where its numbers happen to be next to nothing."""
    caught = sum(not judge(fault, *shape, dtype=dtype, draws=draws).passed for _ in range(10))
    assert caught >= 9


def test_draws_tell_luck_from_error() -> None:
    """A sum in plain order, as good as torch's: refused now and then for its luck, hardly ever over all draws."""
    refused = [
        sum(not judge(in_order, 1, 33, 1, draws=draws).passed for _ in range(400)) for draws in (1, DRAWS)
    ]
    assert refused[0] > 0
    assert refused[1] == 0


@pytest.mark.skipif(
    np.finfo(np.longdouble).eps == np.finfo(np.float64).eps, reason="longdouble is no wider than float64 here"
)
def test_the_reference_is_better_than_float64() -> None:
    input, other = torch.randn(9, 70, dtype=torch.float64), torch.randn(70, 9, dtype=torch.float64)
    found = reference.forward(exactly(input), exactly(other))
    assert found.dtype == np.longdouble
    assert np.abs(found - (input @ other).numpy()).max() > 0
    assert judge(in_order, 9, 70, 9, dtype=torch.float64).torch_error > 0


def test_what_is_not_finite_must_be_equal() -> None:
    exact = np.zeros(3)
    theirs = torch.tensor([float("inf"), float("nan"), 0.0])
    assert compare(theirs.clone(), theirs, exact).passed
    for wrong in (
        [float("-inf"), float("nan"), 0.0],
        [float("inf"), 0.0, 0.0],
        [float("inf"), float("nan")] * 2,
    ):
        assert not compare(torch.tensor(wrong[:3]), theirs, exact).passed
    assert not compare(torch.tensor([0.0, float("nan"), 0.0]), torch.zeros(3), exact).passed
    assert not compare(theirs.double(), theirs, exact).passed
    assert not compare(theirs[:2], theirs, exact).passed
