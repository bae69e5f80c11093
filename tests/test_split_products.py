"""float32 products of float32's own accuracy by narrower matrix instructions: what the splits can and cannot do.

Triton's interpreter multiplies in float32 whatever the precision asked for, so the splits are emulated in NumPy:
``tf32x3`` (NVIDIA) makes two pieces of 11 significant bits of each operand and leaves out the product of the small
ones; ``bf16x6`` (AMD) three of 8 bits, and leaves out the three smallest products. That the compiler makes those
products is asserted in test_aot.py.
"""

import numpy as np
import pytest

# Significant bits of a piece, pieces, and the products of (left piece, right piece) that are added.
SPLITS = {
    "tf32x3": (11, 2, ((0, 1), (1, 0), (0, 0))),
    "bf16x6": (8, 3, ((1, 1), (0, 2), (2, 0), (0, 1), (1, 0), (0, 0))),
}


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """To the nearest float32 of so many significant bits, ties away from zero; too large becomes infinity."""
    cut = 24 - bits
    words = x.view(np.uint32) + np.uint32(1 << (cut - 1))
    return (words >> cut << cut).astype(np.uint32).view(np.float32)


def pieces(x: np.ndarray, bits: int, count: int) -> list[np.ndarray]:
    result = []
    for _ in range(count):
        result.append(rounded(x, bits))
        x = x - result[-1]
    return result


def added(total: np.ndarray, a: np.ndarray, b: np.ndarray, step: int) -> np.ndarray:
    """``total + a @ b`` in float32, rounded after every ``step`` of the sum, as an instruction of that length does."""
    for k in range(0, a.shape[1], step):
        exact = a[:, k : k + step].astype(np.float64) @ b[k : k + step].astype(np.float64)
        total = (total + exact).astype(np.float32)
    return total


def product(a: np.ndarray, b: np.ndarray, split: str) -> np.ndarray:
    """``a @ b`` as Triton adds it: for each block of 32, the small products first."""
    bits, count, terms = SPLITS[split]
    left, right = pieces(a, bits, count), pieces(b, bits, count)
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(0, a.shape[1], 32):
        block = np.zeros_like(total)
        for i, j in terms:
            block = added(block, left[i][:, k : k + 32], right[j][k : k + 32], 8)
        total = total + block
    return total


def random(K: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(K)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((24, K), (K, 24)))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("K", [16, 300, 4096])
def test_the_error_is_at_most_twice_float32s(split, K):
    """That of float32's multiply and add, one after the other; one product of rounded operands has more."""
    a, b = random(K)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    zero = np.zeros_like(exact, np.float32)
    bits = SPLITS[split][0]

    def error(result: np.ndarray) -> float:
        return np.abs(result - exact).max()

    assert error(product(a, b, split)) <= 2 * error(added(zero, a, b, 1))
    assert error(added(zero, rounded(a, bits), rounded(b, bits), 8)) > 2 * error(added(zero, a, b, 1))


@pytest.mark.parametrize(("split", "most"), [("tf32x3", 3 * 2**-22), ("bf16x6", 4 * 2**-24)])
def test_the_error_of_one_product(split, most):
    """What the pieces lose, and the products left out: for short sums (K <= 4) matmul does without the split."""
    a, b = random(1)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert (np.abs(product(a, b, split) - exact) / np.abs(exact)).max() <= most


@pytest.mark.parametrize(("split", "most"), [("tf32x3", 2**-11), ("bf16x6", 2**-8)])
def test_overflow_begins_just_below_float32s(split, most):
    """Where an operand rounds to infinity: within a part ``most`` of float32's largest number, as documented."""
    largest = np.finfo(np.float32).max
    one = np.ones((1, 1), np.float32)
    with np.errstate(all="ignore"):
        assert not np.isfinite(product(one * largest, one, split)).any()
    below = np.float32(largest * (1 - most))
    np.testing.assert_allclose(product(one * below, one, split), below, rtol=1e-6)
