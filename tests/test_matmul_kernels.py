"""The Triton matmul launcher itself: every shape, stride and dtype of its contract, against NumPy float64."""

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from gradkernels.triton.contraction import contract
from gradkernels.triton.matmul import matmul_forward

from .conftest import DEVICES
from .helpers import DTYPES, assert_matches, to_numpy

DEVICE = DEVICES["triton"]

# input, other, addend (or None), summed dimensions
CASES = {
    "square": ((16, 16), (16, 16), None, []),
    "odd": ((65, 63), (63, 130), None, []),
    "two tiles each way, bias": ((130, 70), (70, 131), (131,), []),
    "several steps": ((7, 300), (300, 9), (7, 9), []),
    "bias column": ((5, 6), (6, 7), (5, 1), []),
    "scalar addend": ((5, 6), (6, 7), (1, 1), []),
    "outer product": ((63, 1), (1, 65), None, []),
    "row by matrix": ((1, 65), (65, 130), (130,), []),
    "matrix by column": ((65, 63), (63, 1), (65, 1), []),
    "dot product": ((1, 5000), (5000, 1), (1, 1), []),
    "tall data, small result": ((3, 3000), (3000, 2), (2,), []),
    "tall and skinny": ((1023, 3), (3, 5), (5,), []),
    "one element": ((1, 1), (1, 1), (1,), []),
    "batch in both": ((6, 3, 5), (6, 5, 4), None, []),
    "batch only left": ((2, 3, 4, 5), (5, 7), (7,), []),
    "batch only right": ((4, 5), (2, 3, 5, 7), (7,), []),
    "batch broadcast": ((4, 1, 3, 5), (6, 5, 7), (4, 6, 1, 7), []),
    "one matrix, many columns": ((6, 5), (3, 4, 5, 1), (3, 4, 6, 1), []),
    "one matrix, many columns, sum": ((2, 1, 6, 5), (2, 3, 5, 1), (3, 6, 1), [0]),
    "one row, many matrices": ((1, 33), (4, 33, 6), (6,), []),
    "rows and columns in a batch": ((4, 1, 65), (4, 65, 1), None, []),
    "K = 3, large": ((130, 3), (3, 140), (140,), []),
    "K = 40, many tiny": ((9, 3, 40), (9, 40, 2), None, []),
    "six dimensions of batch": ((2, 1, 2, 1, 2, 1, 3, 4), (1, 2, 1, 2, 1, 2, 4, 5), (2, 1, 3, 5), []),
    "sum over the batch": ((9, 8, 3), (9, 3, 8), None, [0]),
    "sum, broadcast left": ((4, 1, 3, 5), (6, 5, 7), (6, 3, 7), [0]),
    "sum, broadcast right": ((4, 1, 3, 5), (6, 5, 7), (3, 7), [1]),
    "sum over two": ((2, 5, 3, 3, 5), (2, 5, 3, 5, 7), (1, 7), [0, 2]),
    "sum over a repeated operand": ((1, 3, 5), (1, 5, 7), None, [0]),
    "sum of many small": ((300, 2, 3), (300, 3, 2), (2,), [0]),
    "K = 0": ((3, 0), (0, 4), (4,), []),
    "K = 0, no addend": ((2, 3, 0), (0, 4), None, []),
    "M = 0": ((0, 3), (3, 4), (4,), []),
    "N = 0": ((2, 3), (3, 0), None, []),
    "empty batch": ((0, 2, 3), (3, 4), (4,), []),
    "sum over nothing": ((5, 0, 2, 3), (3, 4), (4,), [1]),
}


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def expected(input, other, addend, sum_dims, compute=lambda tensor: tensor):
    """The launcher's result by the library's own operators; ``compute`` picks the number type."""
    result = compute(input) @ compute(other)
    axes = tuple(sum_dims)
    result = result.sum(axis=axes, keepdims=True) if axes else result
    return result if addend is None else result + compute(addend)


def check(input, other, addend, sum_dims, dtype=None):
    dtype = dtype or input.dtype
    ours = matmul_forward(input, other, addend, sum_dims, dtype)
    assert ours.is_contiguous()
    theirs = expected(input, other, addend, sum_dims).to(dtype)
    assert_matches(ours, theirs, expected(input, other, addend, sum_dims, to_numpy))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_shapes(case, dtype):
    left, right, extra, sum_dims = CASES[case]
    addend = None if extra is None else random(*extra, dtype=dtype)
    check(random(*left, dtype=dtype), random(*right, dtype=dtype), addend, sum_dims)


LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "padded": lambda tensor: torch.nn.functional.pad(tensor, (0, 5))[..., :-5],
    "every other": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "misaligned": lambda tensor: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape),
    "permuted batch": lambda tensor: tensor.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "repeated": lambda tensor: tensor[:1, :, :1, :1].expand(tensor.shape),
}


@pytest.mark.parametrize("sum_dims", [[], [0], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
def test_strides(layouts, sum_dims):
    left, right = (LAYOUTS[layout] for layout in layouts)
    addend = LAYOUTS[layouts[0]](
        random(*(1 if dim in sum_dims else size for dim, size in enumerate((2, 3))), 16, 24)
    )
    check(left(random(2, 3, 16, 8)), right(random(2, 3, 8, 24)), addend, sum_dims)


def test_result_and_addend_of_other_dtypes():
    input, other = random(9, 33, dtype=torch.bfloat16), random(33, 17, dtype=torch.bfloat16)
    bias = random(17)
    ours = matmul_forward(input, other, bias, [], torch.float32)
    assert ours.dtype == torch.float32
    exact = expected(input, other, bias, [], to_numpy)
    assert np.abs(to_numpy(ours) - exact).max() < 1e-5  # no rounding to bfloat16 on the way
    doubled = matmul_forward(random(4, 5), random(5, 6), random(6, dtype=torch.float64), [], torch.float64)
    assert doubled.dtype == torch.float64


def test_split_sums_have_the_same_bits_in_every_run():
    input, other = random(2, 20000), random(20000, 3)
    first = check(input, other, None, [])
    assert torch.equal(first, matmul_forward(input, other, None, [], torch.float32))


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((4, 8), (2**30, 1)), ((4, 8), (1, 2**29)), ((3, 2, 4), (2**31, 2**30, 1))],
    ids=["rows", "columns", "batch"],
)
@pytest.mark.parametrize("which", ["input", "other", "addend"])
def test_offsets_past_32_bits(shape, stride, which):
    # Untouched memory is only reserved: no page of it exists until it is written.
    size = sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) + 1
    torch.use_deterministic_algorithms(False)  # which would fill all of it
    far = torch.empty(size, dtype=torch.float16).as_strided(shape, stride)
    far.copy_(random(*shape, dtype=torch.float16))
    *batch, rows, columns = shape
    operands = {
        "input": (far, random(*batch, columns, 5, dtype=torch.float16), None),
        "other": (random(*batch, 5, rows, dtype=torch.float16), far, None),
        "addend": (
            random(*batch, rows, 3, dtype=torch.float16),
            random(3, columns, dtype=torch.float16),
            far,
        ),
    }
    check(*operands[which], [])


def test_batch_dimensions_fold_away():
    """What a layer needs is one matrix product, however many dimensions its batch has."""
    weight = torch.empty(7, 5)
    input, grad = torch.empty(2, 3, 4, 5), torch.empty(2, 3, 4, 7)
    forward = contract(input, weight.t(), torch.empty(7), [])
    assert (forward.m.size, forward.n.size, forward.k.size, forward.batch) == (24, 7, 5, ())
    grad_weight = contract(grad.mT, input, None, [0, 1])
    assert (grad_weight.m.size, grad_weight.n.size, grad_weight.k.size) == (7, 5, 24)
    assert grad_weight.batch == grad_weight.sums == ()
    grad_bias = contract(torch.ones(1).expand(2, 3, 1, 4), grad, None, [0, 1])
    assert (grad_bias.k.size, grad_bias.sums) == (24, ())
    columns = contract(torch.empty(6, 5), torch.empty(8, 5, 1), None, [])
    assert columns.swapped
    assert (columns.m.size, columns.n.size, columns.batch) == (8, 6, ())
    row = contract(torch.empty(1, 5), torch.empty(5, 6), None, [])
    assert (row.swapped, row.m.size, row.n.size) == (True, 6, 1)


def test_normal_form_keeps_the_count():
    generator = np.random.default_rng(0)
    for _ in range(200):
        rank = int(generator.integers(0, 5))
        sizes = generator.integers(1, 4, rank)
        left = [
            int(size) if keep else 1 for size, keep in zip(sizes, generator.random(rank) < 0.7, strict=True)
        ]
        right = [
            int(size) if keep else 1 for size, keep in zip(sizes, generator.random(rank) < 0.7, strict=True)
        ]
        sum_dims = [dim for dim in range(rank) if generator.random() < 0.4]
        M, K, N = (int(size) for size in generator.integers(1, 4, 3))
        form = contract(torch.empty(*left, M, K), torch.empty(*right, K, N), None, sum_dims)
        batch = torch.broadcast_shapes(left, right)
        kept = math.prod(size for dim, size in enumerate(batch) if dim not in sum_dims)
        summed = math.prod(size for dim, size in enumerate(batch) if dim in sum_dims)
        assert form.batches * form.m.size * form.n.size == kept * M * N
        assert form.k.size * math.prod(dim.size for dim in form.sums) == summed * K
