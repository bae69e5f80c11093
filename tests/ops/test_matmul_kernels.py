"""The Triton matmul launcher itself: every shape, stride and dtype of its contract, against NumPy float64."""

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from gradkernels.fallback.matmul import matmul_forward as fallback
from gradkernels.triton import config
from gradkernels.triton import matmul as module
from gradkernels.triton.dims import contract
from gradkernels.triton.matmul import matmul_forward

from ..conftest import DEVICES
from ..helpers import DTYPES, assert_matches, exactly

DEVICE = DEVICES["triton"]

# input, other, bias (or None), summed dimensions
CASES = {
    "square": ((16, 16), (16, 16), None, []),
    "odd": ((65, 63), (63, 130), None, []),
    "two tiles each way, bias": ((130, 70), (70, 131), (131,), []),
    "several steps": ((7, 300), (300, 9), (7, 9), []),
    "bias column": ((5, 6), (6, 7), (5, 1), []),
    "scalar bias": ((5, 6), (6, 7), (1, 1), []),
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
    "batch only left, beside a batch in both": ((2, 3, 4, 5), (2, 1, 5, 7), None, []),
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
    "K = 0, no bias": ((2, 3, 0), (0, 4), None, []),
    "M = 0": ((0, 3), (3, 4), (4,), []),
    "N = 0": ((2, 3), (3, 0), None, []),
    "empty batch": ((0, 2, 3), (3, 4), (4,), []),
    "sum over nothing": ((5, 0, 2, 3), (3, 4), (4,), [1]),
}


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def expected(input, other, bias, sum_dims, compute=lambda tensor: tensor):
    """The launcher's result by the library's own operators; ``compute`` picks the number type."""
    result = compute(input) @ compute(other)
    axes = tuple(sum_dims)
    result = result.sum(axis=axes, keepdims=True) if axes else result
    return result if bias is None else result + compute(bias)


def check(input, other, bias, sum_dims, dtype=None):
    dtype = dtype or input.dtype
    ours = matmul_forward(input, other, bias, sum_dims, dtype)
    assert ours.is_contiguous()
    theirs = expected(input, other, bias, sum_dims).to(dtype)
    assert_matches(ours, theirs, expected(input, other, bias, sum_dims, exactly))
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_shapes(case, dtype):
    left, right, extra, sum_dims = CASES[case]
    bias = None if extra is None else random(*extra, dtype=dtype)
    check(random(*left, dtype=dtype), random(*right, dtype=dtype), bias, sum_dims)


@pytest.mark.parametrize("launcher", [matmul_forward, fallback], ids=["triton", "fallback"])
@pytest.mark.parametrize(
    ("left", "right", "dtype"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "case", ["K = 3, large", "one row, many matrices", "sum, broadcast left", "K = 40, many tiny"]
)
def test_operands_of_two_dtypes(case, left, right, dtype, launcher):
    """As the derivatives meet them; tensor cores multiply the narrower."""
    one, other, extra, sum_dims = CASES[case]
    x, y = random(*one, dtype=left), random(*other, dtype=right)
    bias = None if extra is None else random(*extra)
    wide = [tensor if tensor is None else tensor.double() for tensor in (x, y, bias)]
    theirs = expected(*wide, sum_dims).to(dtype)
    ours = launcher(x, y, bias, sum_dims, dtype)
    assert_matches(ours, theirs, expected(x, y, bias, sum_dims, exactly))


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
    bias = LAYOUTS[layouts[0]](
        random(*(1 if dim in sum_dims else size for dim, size in enumerate((2, 3))), 16, 24)
    )
    check(left(random(2, 3, 16, 8)), right(random(2, 3, 8, 24)), bias, sum_dims)


def test_result_and_bias_of_other_dtypes():
    input, other = random(9, 33, dtype=torch.bfloat16), random(33, 17, dtype=torch.bfloat16)
    bias = random(17)
    ours = matmul_forward(input, other, bias, [], torch.float32)
    assert ours.dtype == torch.float32
    exact = expected(input, other, bias, [], exactly)
    assert np.abs(exactly(ours) - exact).max() < 1e-5  # no rounding to bfloat16 on the way
    doubled = matmul_forward(random(4, 5), random(5, 6), random(6, dtype=torch.float64), [], torch.float64)
    assert doubled.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["", "rows in wider ones"])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_tensor_descriptors(transposed, wide, dtype, monkeypatch):
    """Several tiles for each program, ragged at every edge, with each kind of bias; NaN lies between wide rows."""
    monkeypatch.setattr(module, "_plans", {})
    plan = config.Plan("gemm_tma", config.MatmulConfig(32, 32, 16, 4, 1))
    monkeypatch.setattr(config, "matmul_plan", lambda *_: plan)

    def laid_out(rows, columns, swapped):
        shape = (columns, rows) if swapped else (rows, columns)
        matrix = random(*shape, dtype=dtype)
        if wide:
            matrix = torch.nn.functional.pad(matrix, (0, 8), value=math.nan)[:, : shape[1]]
        return matrix.mT if swapped else matrix

    left, right = laid_out(72, 40, transposed[0]), laid_out(40, 104, transposed[1])
    for extra in ((72, 1),) if wide else (None, (104,), (72, 1), (72, 104)):
        check(left, right, None if extra is None else random(*extra, dtype=dtype), [])


def test_what_no_descriptor_fits_takes_none(monkeypatch):
    """Rows that repeat or overlap; rows of the result that begin at any address, though the operands' are aligned."""
    seen = []
    real = config.matmul_plan
    monkeypatch.setattr(module, "_plans", {})
    monkeypatch.setattr(config, "matmul_plan", lambda *given: seen.append(given[4]) or real(*given))
    input, other = random(48, 64), random(64, 40)
    overlapping = random(64 + 47 * 32).as_strided((48, 64), (32, 1))
    for left in (input, input[:1].expand(48, 64), overlapping):
        check(left, other, None, [])
    check(input, other[:1].expand(64, 40), None, [])
    check(input, random(41, 64).mT, None, [])
    assert [operands.descriptors for operands in seen] == [True, False, False, False, False]
    assert all(operands.aligned for operands in seen)


@pytest.mark.parametrize("name", ["gemm", "outer"])
def test_every_plan_gives_the_same(name, monkeypatch):
    """What the choice of kernel would not take for these sizes: small tiles, many groups, several splits."""
    monkeypatch.setattr(module, "_plans", {})
    plan = config.Plan(name, config.MatmulConfig(16, 16, 1 if name == "outer" else 16, 4, 1))
    monkeypatch.setattr(config, "matmul_plan", lambda *_: plan)
    monkeypatch.setitem(config.MIN_STEPS_PER_SPLIT, name, 2)
    check(random(2, 150, 70), random(2, 70, 33), random(33), [])
    check(random(3, 20, 30), random(3, 30, 24), random(20, 1), [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("M", "K", "N"), [(5, 3, 4), (70, 40, 33), (65, 1, 70), (65, 300, 1), (2, 20000, 3)])
def test_a_scale_meets_the_sums(M, K, N, dtype):
    """Once, whichever kernel writes the result; a power of two, so that it rounds nothing."""
    input, other = random(M, K, dtype=dtype), random(K, N, dtype=dtype)
    output = torch.empty(M, N, dtype=dtype, device=DEVICE)
    module.write_scaled_product(input, other, output, 2**-5)
    assert torch.equal(output, matmul_forward(input, other, None, [], dtype) * 2**-5)


def test_a_scale_in_float64_is_not_rounded_to_float32():
    input = torch.ones(3, 3, dtype=torch.float64, device=DEVICE)
    output = torch.empty_like(input)
    module.write_scaled_product(input, input, output, 1 / 9)
    assert torch.equal(output, torch.full_like(input, 3.0) * (1 / 9))


def test_split_sums_have_the_same_bits_in_every_run():
    input, other = random(2, 20000), random(20000, 3)
    first = check(input, other, None, [])
    assert torch.equal(first, matmul_forward(input, other, None, [], torch.float32))


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((4, 8), (2**30, 1)), ((4, 8), (1, 2**29)), ((3, 2, 4), (2**31, 2**30, 1))],
    ids=["rows", "columns", "batch"],
)
@pytest.mark.parametrize("which", ["input", "other", "bias"])
@pytest.mark.parametrize("name", ["elementwise", "gemm", "outer"])
def test_offsets_past_32_bits(name, shape, stride, which, monkeypatch):
    monkeypatch.setattr(module, "_plans", {})
    blocks = {"elementwise": (16, 1, 8), "gemm": (16, 16, 16), "outer": (16, 16, 1)}
    plan = config.Plan(name, config.MatmulConfig(*blocks[name], 4, 1))
    monkeypatch.setattr(config, "matmul_plan", lambda *_: plan)
    # Untouched memory is only reserved: no page of it exists until it is written.
    size = sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) + 1
    torch.use_deterministic_algorithms(False)  # which would fill all of it
    far = torch.empty(size, dtype=torch.float16).as_strided(shape, stride)
    far.copy_(random(*shape, dtype=torch.float16))
    *batch, rows, columns = shape
    operands = {
        "input": (far, random(*batch, columns, 5, dtype=torch.float16), None),
        "other": (random(*batch, 5, rows, dtype=torch.float16), far, None),
        "bias": (
            random(*batch, rows, 3, dtype=torch.float16),
            random(3, columns, dtype=torch.float16),
            far,
        ),
    }
    check(*operands[which], [])


def test_plans_of_the_same_shapes_are_told_apart(monkeypatch):
    """By the summed dimensions, and by the addresses that wide loads need."""
    launches: list[dict] = []
    monkeypatch.setattr(module, "_plans", {})
    input, other = random(3, 64, 68), random(3, 68, 64)
    check(input, other, None, [])
    check(input, other, None, [0])
    monkeypatch.setattr(module, "launch", lambda *args, **options: launches.append(options))
    aside = LAYOUTS["misaligned"](input)
    assert aside.stride() == input.stride()
    matmul_forward(input, other, None, [], torch.float32)
    matmul_forward(aside, other, None, [], torch.float32)
    assert [launch["INPUT_VECTOR"] for launch in launches] == [4, 1]


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


def tf32(x):
    """As cvt.rna.tf32.f32: 10 bits of mantissa, ties away from zero."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def bf16(x):
    return torch.from_numpy(x).bfloat16().float().numpy()


def three_tf32(x, y):
    """What ``input_precision="tf32x3"`` compiles to: the corrections first, their NaN dropped, then the product."""
    with np.errstate(invalid="ignore", over="ignore"):
        x_big, y_big = tf32(x), tf32(y)
        x_small, y_small = tf32(x - x_big), tf32(y - y_big)
        correction = x_small @ y_big + x_big @ y_small
        return np.where(np.isnan(correction), np.float32(0), correction) + x_big @ y_big


def six_bf16(x, y):
    """Likewise ``"bf16x6"``: three bfloat16 pieces each, the six largest products, smallest first."""
    pieces = []
    for operand in (x, y):
        first = bf16(operand)
        second = bf16(operand - first)
        pieces.append((first, second, bf16(operand - first - second)))
    (x1, x2, x3), (y1, y2, y3) = pieces
    return (((x2 @ y2 + x1 @ y3) + x3 @ y1) + x1 @ y2) + x2 @ y1 + x1 @ y1


@pytest.mark.parametrize("split", [three_tf32, six_bf16])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_split_products_are_as_exact_as_float32(split, scale):
    """The interpreter ignores the precision of a dot product, so the split is followed in NumPy."""
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal(shape).astype(np.float32) for shape in ((64, 512), (512, 64)))
    x, y = x * np.float32(scale), y * np.logspace(-3, 3, 512, dtype=np.float32)[:, None]
    ours, plain = (torch.from_numpy(product) for product in (split(x, y), x @ y))
    assert_matches(ours, plain, x.astype(np.float64) @ y.astype(np.float64))


def test_a_single_tf32_product_is_not():
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal(shape).astype(np.float32) for shape in ((64, 512), (512, 64)))
    ours, plain = (torch.from_numpy(product) for product in (tf32(x) @ tf32(y), x @ y))
    with pytest.raises(AssertionError):
        assert_matches(ours, plain, x.astype(np.float64) @ y.astype(np.float64))


def test_three_tf32_products_keep_infinities_and_nan():
    x = np.array([[np.inf, 1], [np.nan, 1], [3e38, 1], [1e-30, 1]], np.float32)
    y = np.array([[0.1, 0.0, -2], [1.3, 1, 1]], np.float32)
    with np.errstate(all="ignore"):
        expected = x @ y
    np.testing.assert_allclose(three_tf32(x, y), expected, rtol=1e-6)
    # The limit of the method: within 2^-12 of float32's largest number, rounding to tf32 gives infinity.
    assert np.isinf(three_tf32(np.full((1, 1), np.finfo(np.float32).max), np.full((1, 1), np.float32(0.5))))


@pytest.mark.parametrize(
    ("dtype", "backend", "setting", "precision"),
    [
        (torch.float32, "cuda", "ieee", "tf32x3"),
        (torch.float32, "cuda", "none", "tf32x3"),
        (torch.float32, "cuda", "tf32", "tf32"),
        (torch.float32, "hip", "none", "bf16x6"),
        (torch.float32, "hip", "tf32", "tf32"),
        (torch.float32, "interpreter", "tf32", "ieee"),
        (torch.float64, "cuda", "tf32", "ieee"),
        (torch.bfloat16, "cuda", "tf32", "ieee"),
    ],
)
def test_precision_follows_torchs_setting(dtype, backend, setting, precision):
    assert config.dot_precision(dtype, config.Target(backend, 90), setting) == precision
