"""The launchers of kernels/triton/linear_mse.py: each plan by force, against the NumPy reference."""

import itertools
import math
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import linear_mse_loss, use_backend
from gradkernels.backends import implementation
from gradkernels.ops import torch_linear_mse_loss
from gradkernels.reference import linear_mse as reference
from torch import Tensor

from ..conftest import DEVICES, GPU
from ..helpers import DTYPES, assert_matches, exactly, python
from .test_mse_kernels import laid_out

pytest.importorskip("triton")

import triton
import triton.language as tl
from gradkernels.triton.linear_mse_fit import SGD_COLUMNS, _option_at

pytestmark = pytest.mark.gpu if GPU else []
DEVICE = torch.device(DEVICES["triton"])
LAYOUTS = ("contiguous", "transposed", "holes", "wide rows", "repeated column")


@pytest.fixture
def linear_mse():
    with use_backend("triton"):
        yield implementation("linear_mse", torch.empty(0, device=DEVICE))


class Case:
    """Random operands of one call, torch's results for them, and the reference's.

    Results go by the names loss, error, grad_weight, grad_bias, grad_input, grad_target; each is a triple of
    torch's, the reference's and the size of the terms that were added.
    """

    def __init__(self, rng: random.Random, N: int, D: int, K: int, dtype: torch.dtype, **fixed: Any) -> None:
        def layout() -> str:
            return rng.choice(LAYOUTS)

        def matrix(rows: int, columns: int, dtype: torch.dtype = dtype) -> Tensor:
            return laid_out((rows, columns), layout(), dtype, 0.25 if dtype == torch.float16 else 1.0)

        self.input, self.weight = matrix(N, D), matrix(K, D)
        self.target = matrix(N, K, fixed.get("target_dtype", dtype))
        self.bias = matrix(K, 2)[:, 1] if rng.random() < 0.6 else None
        # Not negative: torch's own sums would cancel, and its error with them.
        self.sample_weight = matrix(N, K).abs() if rng.random() < 0.6 else None
        if self.sample_weight is not None and rng.random() < 0.5:
            self.sample_weight = self.sample_weight[:, :1].expand(N, K)
        self.reduction = rng.choice(("mean", "sum"))
        if dtype == torch.float16:
            self.reduction = "mean"  # a sum leaves its range
        self.needs = [rng.random() < 0.7 for _ in range(3)]
        self.dtype = self.target.dtype
        self.c = 1 / (N * K) if self.reduction == "mean" else 1.0
        self.grad_output = torch.tensor(rng.uniform(-2, 2)).to(DEVICE, self.dtype)
        self.what = f"N {N} D {D} K {K} {dtype} {self.reduction} needs {self.needs} strides " + str(
            [t if t is None else t.stride() for t in self.tensors]
        )

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.input, self.weight, self.target, self.bias, self.sample_weight]

    def expected(self) -> dict[str, tuple[Tensor, np.ndarray, np.ndarray]]:
        x, w, y, b, s = arrays = [exactly(tensor) for tensor in self.tensors]
        N, K = y.shape
        s = np.ones((N, K)) if s is None else s
        b = np.zeros(K) if b is None else b
        # The launchers' mean divides by the number of elements: the reference's sum times c.
        loss = reference.forward(*arrays, reduction="sum") * self.c
        grads = reference.backward(self.c, *arrays, reduction="sum")
        error = s * (x @ w.T + b - y)
        g = exactly(self.grad_output)
        terms = s * (np.abs(x) @ np.abs(w).T + np.abs(b) + np.abs(y))
        # Each result for grad_output 1 but the last two, the size of its terms, and whether it stays wide.
        values = {
            "loss": (loss, loss),
            "error": (error, terms),
            "grad_weight": (grads[1], 2 * self.c * terms.T @ np.abs(x)),
            "grad_bias": (2 * self.c * error.sum(0), 2 * self.c * terms.sum(0)),
            "grad_input": (grads[0] * g, 2 * self.c * np.abs(g) * terms @ np.abs(w)),
            "grad_target": (grads[2] * g, 2 * self.c * np.abs(g) * terms),
        }
        theirs = self._torch(s)
        return {name: (theirs[name], value, scale) for name, (value, scale) in values.items()}

    def _torch(self, s: np.ndarray) -> dict[str, Tensor]:
        """torch's results, in the operands' dtypes."""
        leaves = [
            None if tensor is None else tensor.detach().clone().requires_grad_()
            for tensor in self.tensors[:4]
        ]
        x, w, y, b = leaves
        prediction = torch.nn.functional.linear(x, w, b)
        weights = torch.from_numpy(s.astype(np.float64)).to(DEVICE, self.dtype)
        error = (prediction.to(self.dtype) - y) * weights
        loss = error * (prediction.to(self.dtype) - y)
        loss = loss.mean() if self.reduction == "mean" else loss.sum()
        grads = torch.autograd.grad(loss, (x, w, y))
        scaled = [grad * self.grad_output.to(grad.dtype) for grad in grads]
        return {
            "loss": loss.detach(),
            "error": error.detach(),
            "grad_weight": grads[1],
            "grad_bias": (2 * self.c * error.detach().double().sum(0)).to(self.weight.dtype),
            "grad_input": scaled[0],
            "grad_target": scaled[2],
        }


def check(linear_mse: Any, case: Case) -> None:
    """The forward's results that the case needs, and both results of the backward from the reference's errors."""
    before = [None if tensor is None else tensor.clone() for tensor in case.tensors]
    results = linear_mse.linear_mse_forward(*case.tensors, case.reduction, case.needs, case.dtype)
    names = ["loss"]
    names += [
        name for name, need in zip(("error", "grad_weight", "grad_bias"), case.needs, strict=True) if need
    ]
    expected = case.expected()
    for name, mine in zip(names, results, strict=True):
        theirs, value, scale = expected[name]
        if name in (
            "grad_weight",
            "grad_bias",
        ):  # wide, so that a loss scale may follow; measured as delivered
            assert mine.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
            mine = mine.to(theirs.dtype)
        assert_matches(mine, theirs, value, f"{name}, {case.what}", np.maximum(scale, 1e-30))
    for tensor, copy in zip(case.tensors, before, strict=True):
        assert tensor is None or torch.equal(tensor, copy)

    error = expected["error"][0]
    saved = error.clone()
    grads = linear_mse.linear_mse_backward(case.grad_output, error, case.weight, 2 * case.c, [True, True])
    for name, mine in zip(("grad_input", "grad_target"), grads, strict=True):
        theirs, value, scale = expected[name]
        assert_matches(mine, theirs, value, f"{name}, {case.what}", np.maximum(scale, 1e-30))
    again = linear_mse.linear_mse_backward(case.grad_output, error, case.weight, 2 * case.c, [True, True])
    assert all(torch.equal(first, second) for first, second in zip(grads, again, strict=True))
    assert torch.equal(error, saved)


CHUNKS = [  # rows, chunk, chunks, N, D, K
    (4, 16, 1, 9, 16, 1),
    (4, 16, 3, 65, 41, 1),
    (1, 32, 2, 63, 64, 1),
    (2, 16, 5, 100, 65, 3),
    (8, 64, 1, 65, 63, 8),
    (16, 16, 1, 1000, 3, 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "chunk", "count", "N", "D", "K"), CHUNKS)
def test_chunks(linear_mse, monkeypatch, rows, chunk, count, N, D, K, dtype):
    """One read of X: full and partial chunks, several tiles for each program, a last tile in part."""
    config = linear_mse.config.LinearMseChunks(rows, chunk, count, 1, {})
    monkeypatch.setattr(linear_mse.config, "linear_mse_chunks", lambda *_: config)
    monkeypatch.setattr(linear_mse.config, "linear_mse_dot", lambda *_: None)
    check(linear_mse, Case(random.Random(f"{config} {N} {dtype}"), N, D, K, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "D", "K"), [(65, 63, 9), (200, 16, 16), (1000, 3, 1), (1, 65, 33)])
def test_dot(linear_mse, monkeypatch, N, D, K, dtype):
    """One read of X, in matrix instructions."""
    monkeypatch.setattr(linear_mse.config, "linear_mse_chunks", lambda *_: None)
    chosen = linear_mse.config.linear_mse_dot(K, D, dtype, linear_mse.config.Target("cuda", 90))
    assert isinstance(chosen, linear_mse.config.LinearMseDot)
    check(linear_mse, Case(random.Random(f"{N} {D} {K} {dtype}"), N, D, K, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "D", "K"), [(65, 63, 9), (130, 70, 65), (3, 1, 1), (1, 1000, 17), (200, 16, 3)]
)
def test_tiles(linear_mse, monkeypatch, N, D, K, dtype):
    """A product that ends in the errors."""
    monkeypatch.setattr(linear_mse.config, "linear_mse_chunks", lambda *_: None)
    monkeypatch.setattr(linear_mse.config, "linear_mse_dot", lambda *_: None)
    check(linear_mse, Case(random.Random(f"{N} {D} {K} {dtype}"), N, D, K, dtype))


@pytest.mark.parametrize(("N", "D", "K"), [(65, 41, 3), (33, 20, 70)])
def test_the_blocks_of_partial_sums_are_those_of_config(linear_mse, monkeypatch, N, D, K):
    """Kernel and grid count the same columns, whatever their number; several blocks each."""
    monkeypatch.setattr(linear_mse.config, "SUM_BLOCK", (16, 8))
    monkeypatch.setattr(linear_mse.config, "SUM_LOSS_BLOCK", 16)
    case = Case(random.Random(f"{N} {K}"), N, D, K, torch.float32)
    case.needs = [True] * 3
    check(linear_mse, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "wide rows", "wide aligned rows"])
def test_tiles_by_descriptors(linear_mse, monkeypatch, layout, dtype):
    """Whole tiles copied by the chip, beyond the edges too; rows that no descriptor fits go the other way."""
    fits = []

    def product(*arguments: Any) -> tuple[Any, bool]:
        fits.append(arguments[-2])
        return linear_mse.config.MatmulConfig(32, 32, 16, 4, 1), fits[-1]

    for plan in ("linear_mse_chunks", "linear_mse_dot"):
        monkeypatch.setattr(linear_mse.config, plan, lambda *_: None)
    monkeypatch.setattr(linear_mse.config, "linear_mse_product", product)
    monkeypatch.setattr(sys.modules[__name__], "LAYOUTS", (layout,))
    rng = random.Random(f"{layout} {dtype}")
    for N, D, K in ((65, 72, 40), (33, 16, 72)):
        check(linear_mse, Case(rng, N, D, K, dtype))
    check(linear_mse, Case(rng, 33, 17, 40, dtype))
    monkeypatch.setattr(sys.modules[__name__], "LAYOUTS", ("repeated row",))
    check(linear_mse, Case(rng, 33, 16, 40, dtype))
    assert not any(fits[-2:])
    assert any(fits) == (layout != "wide rows")
    assert not all(fits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_plan_of_the_shape(linear_mse, dtype):
    """What is chosen without force, at sizes of both sides of the choices."""
    rng = random.Random(str(dtype))
    for N, D, K in rng.sample([(1023, 3, 1), (33, 1000, 1), (5, 2049, 1), (63, 65, 5), (9, 1100, 2)], 3):
        check(linear_mse, Case(rng, N, D, K, dtype))


def test_target_of_another_dtype(linear_mse):
    """Under autocast the products are bfloat16, target, errors and loss float32."""
    rng = random.Random(0)
    for N, D, K in ((65, 63, 1), (33, 16, 9), (33, 40, 70)):
        check(linear_mse, Case(rng, N, D, K, torch.bfloat16, target_dtype=torch.float32))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("N", "D", "K"), [(0, 3, 2), (3, 0, 2), (3, 2, 0), (3, 0, 65), (0, 3, 70)])
def test_sizes_of_zero(linear_mse, N, D, K, reduction):
    x, w, y, b = (torch.randn(shape, device=DEVICE) for shape in ((N, D), (K, D), (N, K), (K,)))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, w, y, b)]
    loss = torch_linear_mse_loss(*leaves, reduction=reduction)
    grads = torch.autograd.grad(loss, leaves)
    mine = linear_mse.linear_mse_forward(x, w, y, b, None, reduction, [True] * 3, torch.float32)
    error = x @ w.t() + b - y
    for ours, theirs in zip(mine, (loss.detach(), error, grads[1], grads[3]), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    factor = 2 / max(1, N * K) if reduction == "mean" else 2.0
    one = torch.tensor(1.0, device=DEVICE)
    for ours, theirs in zip(
        linear_mse.linear_mse_backward(one, error, w, factor, [True] * 2), (grads[0], grads[2]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("K", [1, 9])
def test_a_tiny_factor_meets_the_sums(linear_mse, K):
    """In float16 neither factor nor the scaled errors exist; the gradient does, once the loss scale is there."""
    error, weight = (torch.full(shape, 100.0).to(DEVICE, torch.float16) for shape in ((5, K), (K, 33)))
    g = torch.tensor(2.0, device=DEVICE, dtype=torch.float16)
    grad = linear_mse.linear_mse_backward(g, error, weight, 1e-9, [True, False])[0]
    expected = K * 2e-5
    torch.testing.assert_close(grad.float(), torch.full((5, 33), expected), rtol=2**-8, atol=0)


def test_infinity_stays_in_its_row(linear_mse, monkeypatch):
    """Rows past the last are not those of the last: an infinity there is not multiplied by nothing."""
    x, w = torch.ones(5, 3, device=DEVICE), torch.ones(1, 3, device=DEVICE)
    x[-1, 0] = math.inf
    y = torch.zeros(5, 1, device=DEVICE)
    loss, grad = linear_mse.linear_mse_forward(
        x, w, y, None, None, "sum", [False, True, False], torch.float32
    )
    assert loss.item() == math.inf
    assert grad.tolist() == [[math.inf] * 3]


@pytest.mark.parametrize("target", [("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942")])
def test_the_choice_is_bounded(linear_mse, target):
    """Whatever the shape, a few sizes of tile: registers and memory are those of the compile report."""
    target = linear_mse.config.Target(*target)
    seen = set()
    for K in range(1, 70):
        for D in (1, 3, 16, 63, 100, 128, 768, 1000, 2048, 3072, 4096, 5000, 8192, 16384, 16385):
            for dtype in DTYPES:
                acc = torch.float64 if dtype == torch.float64 else torch.float32
                plan = linear_mse.config.linear_mse_chunks(K, D, dtype.itemsize, acc, target)
                if not isinstance(plan, str):
                    assert plan.CHUNK * plan.CHUNKS >= D > plan.CHUNK * (plan.CHUNKS - 1)
                    # At most 64 gradients in a lane; with as many weights, the compile report's 240 registers.
                    values = plan.ROWS * K * plan.CHUNK * plan.CHUNKS * acc.itemsize // 4
                    assert values <= 64 * 32 * plan.compiled["num_warps"]
                    seen.add(plan[:4])
                plan = linear_mse.config.linear_mse_dot(K, D, dtype, target)
                if not isinstance(plan, str):
                    assert plan.COLS >= D
                    assert plan.OUTPUTS >= K
                    assert plan.COLS * plan.OUTPUTS <= 8192
    assert len(seen) < 200
    for itemsize in (2, 4):
        found = [
            linear_mse.config.linear_mse_chunks(1, D, itemsize, torch.float32, target) for D in (16384, 16385)
        ]
        assert [isinstance(plan, str) for plan in found] == [False, True]


def test_programs_come_from_the_shape(linear_mse):
    """No question to the chip, and partial sums that cost little: 1/16 of X, or one program on each processor."""
    for N, D, K in itertools.product((1, 47, 48, 1000, 8192, 65536, 10**7), (512, 513), (1, 2, 8)):
        for itemsize, acc in ((2, torch.float32), (4, torch.float32), (8, torch.float64)):
            P = linear_mse.config.linear_mse_programs(N, D, K, itemsize, acc)
            assert 1 <= P <= (528 if K == 1 and D == 512 else 264)
            assert max(1, N // 48) >= P
            moved = 1 + P * K * (2 * acc.itemsize + itemsize) / (N * itemsize)
            if N >= 8192:
                assert moved <= (1.10 if K == 1 else 1.66)
                assert moved <= 1 + 1 / 16 or P <= 132


def test_float64_beside_16_bits_is_not_multiplied_by_tiles_of_16_bits(linear_mse):
    """As under autocast a float64 target beside bfloat16 rows: four times the bytes do not fit the shared memory."""
    input, weight = (torch.ones(rows, 512, dtype=torch.bfloat16, device=DEVICE) for rows in (64, 16))
    assert linear_mse.plan(input, weight, torch.float32).name == "dot"
    assert linear_mse.plan(input, weight, torch.float64).name == "tiles"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1e-7, 1e7])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one model", "models"])
def test_errors_times_weights_leave_float16(linear_mse, monkeypatch, batch, size, reduction):
    """Under float16 autocast matrix instructions multiply ``s e``, whatever the unit of the weights."""
    if not GPU:  # the interpreter multiplies float32
        for module in (linear_mse, implementation("linear_mse_models", torch.empty(0, device=DEVICE))):
            monkeypatch.setattr(module, "_multiplied", lambda operand, acc, target: operand)
    x, w, y = (torch.randn(*sizes, device=DEVICE) for sizes in ((33, 16), (*batch, 8, 16), (*batch, 33, 8)))
    s = torch.rand(33, device=DEVICE) + 1

    def gradient(unit: float) -> Tensor:
        given = w.clone().requires_grad_()
        with torch.autocast(DEVICE.type, torch.float16):
            loss = linear_mse_loss(x, given, y, sample_weight=unit * s, reduction=reduction)
        scale = 1 / unit if reduction == "sum" else 1  # as of torch.amp.GradScaler
        return torch.autograd.grad(scale * loss.sum(), given)[0]

    torch.testing.assert_close(gradient(size), gradient(1.0), rtol=4e-3, atol=4e-3)


@pytest.mark.skipif(GPU, reason="the interpreter's address space")
def test_offsets_beyond_32_bits():
    """Rows 2^30 elements apart, columns 2^26: an offset that wraps leaves the tensor. A process of its own, since that
    kills."""
    code = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from gradkernels.triton import linear_mse
for K, D, strides in ((1, 8, (2**30, 1)), (12, 8, (2**30, 1)), (12, 33, (1, 2**26))):
    apart = torch.empty(3 * 2**30 + 64, dtype=torch.float16).as_strided((4, D), strides)
    x, w, y = torch.randn(4, D).half(), torch.randn(K, D).half(), torch.randn(4, K).half()
    apart.copy_(x)
    for plan in (linear_mse.config.linear_mse_dot, lambda *_: None):
        linear_mse.config.linear_mse_dot = plan
        mine = linear_mse.linear_mse_forward(apart, w, y, None, None, "mean", [True] * 3, torch.float32)
        other = linear_mse.linear_mse_forward(x, w, y, None, None, "mean", [True] * 3, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(mine, other))
"""
    python("-c", code)


@triton.jit
def _option_at_kernel(out_ptr, model, stride, COLUMN: tl.constexpr):
    """out_ptr: (1,), where an option of ``linear_mse_fit`` stands."""
    tl.store(out_ptr, _option_at(COLUMN, model, stride))


def test_options_are_counted_in_64_bits():
    """The last of SGD's options of 2**30 models: no test can afford the table."""
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _option_at_kernel[(1,)](out, 7, 2**30, SGD_COLUMNS.value - 1)
    assert out.item() == (SGD_COLUMNS.value - 1) * 2**30 + 7
