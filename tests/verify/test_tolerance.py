"""The tolerance policy itself: what it lets pass, and the faults that it catches, drawn once or several times.

The order in which torch adds up, and so its error, depends on the processor. Here every number is the same on each:
uniform draws are exact, and the products, the yardstick's too, are made of element by element operations, each
of which IEEE 754 rounds in one way.
"""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gradkernels.reference import matmul as reference
from gradkernels.verify.tolerance import DRAWS, Comparison, compare, exactly
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]


def judge(product: Product, *shape: int, dtype: torch.dtype = torch.float32, draws: int = 1) -> Comparison:
    """``product`` against ``pairwise``, of (M, K) by (K, N) matrices; long sums are of positive numbers, and grow."""
    m, k, n = shape
    results = []
    for _ in range(draws):
        input, other = (torch.rand(size, dtype=torch.float64) for size in ((m, k), (k, n)))
        if k <= 100:
            input, other = 2 * input - 1, 2 * other - 1
        input, other = input.to(dtype), other.to(dtype)
        results.append(
            (product(input, other), pairwise(input, other), reference.forward(*map(exactly, (input, other))))
        )
    ours, theirs, exact = zip(*results, strict=True)
    return compare(torch.stack(ours), torch.stack(theirs), np.stack(exact))


def terms(input: Tensor, other: Tensor) -> Tensor:
    """The products that a matrix product adds up, rounded, one after the other in the first dimension."""
    return input.mT.unsqueeze(-1) * other.unsqueeze(1)


def pairwise(input: Tensor, other: Tensor) -> Tensor:
    """A good product: float32 at least, the first half of the terms added to the second, and so on."""
    wide = torch.promote_types(input.dtype, torch.float32)
    left = terms(input.to(wide), other.to(wide))
    while len(left) > 1:
        half = len(left) // 2
        left = torch.cat([left[:half] + left[half : 2 * half], left[2 * half :]])
    return left[0].to(input.dtype)


def in_order(input: Tensor, other: Tensor) -> Tensor:
    """Term after term, each sum rounded: as good as a sum in one register can be."""
    return functools.reduce(torch.add, terms(input, other))


def last_term_dropped(input: Tensor, other: Tensor) -> Tensor:
    return pairwise(input[:, :-1], other[:-1])


def one_element_wrong(input: Tensor, other: Tensor) -> Tensor:
    result = pairwise(input, other)
    result.view(-1)[-1] *= 1.001
    return result


def slightly_scaled(input: Tensor, other: Tensor) -> Tensor:
    return pairwise(input, other) * (1 + 1e-6)


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
