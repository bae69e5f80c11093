"""The launchers of kernels/triton/mse.py: every layout, dtype and branch, against the NumPy reference."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gradkernels import use_backend
from gradkernels.backends import implementation
from gradkernels.reference import mse as reference
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from gradkernels.triton.mse import _tile, _tiles

from ..conftest import DEVICES, GPU
from ..helpers import DTYPES, assert_matches, exactly

pytestmark = pytest.mark.gpu if GPU else []
DEVICE = torch.device(DEVICES["triton"])
LAYOUTS = ("contiguous", "transposed", "holes", "wide rows", "repeated column", "repeated row", "one value")
REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture
def mse():
    with use_backend("triton"):
        yield implementation("mse", torch.empty(0, device=DEVICE))


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random numbers of a shape, in memory as the layout says; what lies between them is NaN."""

    def randn(shape: Sequence[int]) -> Tensor:
        return scale * torch.randn(tuple(shape))

    ndim = len(shape)
    if layout == "transposed":
        tensor = randn(shape[::-1]).to(DEVICE, dtype).permute(tuple(reversed(range(ndim))))
    elif layout == "holes":
        gaps = torch.full([2 * size + 1 for size in shape], math.nan).to(DEVICE, dtype)
        tensor = gaps[(slice(1, None, 2),) * ndim].copy_(randn(shape))
    elif layout in ("wide rows", "wide aligned rows"):
        more = 3 if layout == "wide rows" else 8
        wide = torch.full((*shape[:-1], *(size + more for size in shape[-1:])), math.nan).to(DEVICE, dtype)
        tensor = wide[..., : shape[-1]].copy_(randn(shape)) if ndim else wide.fill_(0.5)
    else:
        keep = {
            "contiguous": [True] * ndim,
            "repeated column": [True] * (ndim - 1) + [False] * bool(ndim),
            "repeated row": [False] * (ndim - 1) + [True] * bool(ndim),
            "one value": [False] * ndim,
        }[layout]
        sizes = [size if kept else min(size, 1) for size, kept in zip(shape, keep, strict=True)]
        tensor = randn(sizes).to(DEVICE, dtype).expand(shape)
    assert tensor.shape == shape
    return tensor


def torch_loss(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, kept: int) -> Tensor:
    """The launcher's loss in plain torch: the weighted mean divides by the number of elements."""
    loss = torch.nn.functional.mse_loss(input, target, reduction="none")
    if weight is not None:
        loss = loss * weight
    dims = list(range(kept, loss.dim()))
    if reduction == "none" or not dims:
        return loss
    return loss.mean(dims) if reduction == "mean" else loss.sum(dims)


def check(
    mse, tensors: list[Tensor | None], reduction: str, kept: int, grad_output: Tensor, what: str
) -> None:
    """Loss and every gradient, and that nothing was written to."""
    shape = tensors[0].shape
    dtype = tensors[0].dtype
    before = [None if tensor is None else tensor.clone() for tensor in (*tensors, grad_output)]
    needs = [tensor is not None for tensor in tensors]
    loss = mse.mse_forward(*tensors, reduction, kept, dtype)
    grads = mse.mse_backward(grad_output, *tensors, reduction, kept, needs)

    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]
    theirs = torch_loss(*leaves, reduction, kept)
    their_grads = torch.autograd.grad(theirs, [leaf for leaf in leaves if leaf is not None], grad_output)

    arrays = [exactly(tensor) for tensor in tensors]
    axes = tuple(range(kept, len(shape)))
    c = 1 / math.prod(shape[kept:]) if reduction == "mean" else 1.0
    losses = reference.forward(*arrays, reduction="none")
    # A sum of terms of both signs is measured by their size.
    expected, scale = (
        (losses, np.abs(losses))
        if reduction == "none"
        else (losses.sum(axes) * c, np.abs(losses).sum(axes) * c)
    )
    g = exactly(grad_output)
    if reduction != "none":
        g = np.broadcast_to(g.reshape(g.shape + (1,) * len(axes)), shape)
    expected_grads = reference.backward(c * g, *arrays, reduction="none")

    assert_matches(loss, theirs.detach(), expected, f"{what}: loss", scale)
    wanted = [tensor for tensor in tensors if tensor is not None]
    for mine, their, grad, tensor in zip(grads, their_grads, expected_grads, wanted, strict=False):
        assert mine.stride() == torch.empty_like(tensor).stride()
        assert_matches(mine, their, grad, f"{what}: gradient")
    assert len(grads) == sum(needs)
    if reduction != "none" and kept == 0:
        one_pass = mse.mse_forward_backward(*tensors, None, reduction, needs, dtype)
        assert_matches(one_pass[0], theirs.detach(), expected, f"{what}: loss of one pass", scale)
        for mine, grad in zip(
            one_pass[1:], reference.backward(np.full(shape, c), *arrays, reduction="none"), strict=False
        ):
            theirs_too = torch.from_numpy(np.asarray(grad, np.float64)).to(DEVICE, dtype)
            assert_matches(mine, theirs_too, grad, f"{what}: gradient of one pass")
        half = torch.full((), 0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32).to(
            DEVICE
        )
        for divided, plain in zip(
            mse.mse_forward_backward(*tensors, half, reduction, needs, dtype), one_pass, strict=True
        ):
            torch.testing.assert_close(divided, 2 * plain, msg=f"{what}: divided by a sum of weights")
    for tensor, copy in zip((*tensors, grad_output), before, strict=True):
        assert tensor is None or torch.equal(tensor, copy)


SHAPES = [((), 0), ((1,), 0), ((3,), 0), ((65,), 0), ((5000,), 0), ((7, 65), 0), ((3, 1000), 0), ((33, 8), 0)]
SHAPES += [((3, 4, 5), 0), ((2, 1, 3, 4), 0), ((1023, 3), 0), ((7, 65), 1), ((3, 4, 5), 1), ((2, 2100), 1)]
SHAPES += [((4, 3, 5), 2), ((63,), 1), ((1, 9), 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients(mse, layout, dtype):
    rng = random.Random(f"{layout} {dtype}")
    for shape, kept in rng.sample(SHAPES, 4):
        reduction = rng.choice(REDUCTIONS)
        others = [layout, rng.choice(LAYOUTS), rng.choice(("none", *LAYOUTS))]
        rng.shuffle(others)
        if "none" in others:
            others.sort(key=lambda name: name == "none")
        tensors = [None if name == "none" else laid_out(shape, name, dtype) for name in others]
        grad_shape = shape if reduction == "none" else shape[:kept]
        grad_output = laid_out(grad_shape, rng.choice(LAYOUTS), dtype)
        check(mse, tensors, reduction, kept, grad_output, f"{shape} kept {kept} {others} {reduction}")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 65, 463])
def test_every_tile_and_program_counts(mse, monkeypatch, size, reduction):
    """Tiles of 64 and three programs: several tiles for each program, a last tile in part, a tail."""
    monkeypatch.setattr(mse.config, "MSE_BLOCK", 64)
    monkeypatch.setattr(mse.config, "MSE_HVP_BLOCK", 64)
    monkeypatch.setattr(mse.config, "MSE_PROGRAMS", 3)
    for shape, layout, kept in (
        ((size,), "contiguous", 0),
        ((3, size), "wide rows", 0),
        ((2, size), "holes", 1),
    ):
        tensors = [laid_out(shape, layout, torch.float32) for _ in range(3)]
        grad_output = torch.randn(shape if reduction == "none" else shape[:kept]).to(DEVICE)
        check(mse, tensors, reduction, kept, grad_output, f"{shape} {layout}")
        check_hvp(mse, tensors, reduction, kept, [True] * 8, f"{shape} {layout}")


# Sizes in memory, the dimensions' order, how many of them are kept, the plan of the sums.
KEPT = [
    ((10, 18), (1, 0), 1, "columns kept"),
    ((2, 6, 5), (0, 2, 1), 2, "columns kept"),
    ((2, 3, 4, 5), (3, 1, 0, 2), 2, "columns kept"),  # kept dimensions in another order than in memory
    ((3, 16), (0, 1), 2, "columns kept"),  # nothing is summed
    ((20, 3), (0, 1), 1, "rows kept"),
    ((2, 3, 2, 4), (1, 0, 2, 3), 1, "rows kept"),
    ((2, 3, 5, 8), (1, 0, 2, 3), 1, "rows"),
    ((2, 130), (0, 1), 1, "rows"),
    ((1, 70), (0, 1), 1, "flat"),
]


@pytest.mark.parametrize(
    ("sizes", "order", "kept", "plan"),
    [pytest.param(*case, marks=pytest.mark.full if i in (1, 5, 7) else ()) for i, case in enumerate(KEPT)],
    ids=str,
)
def test_kept_dimensions(mse, monkeypatch, sizes, order, kept, plan):
    """Sums over any dimensions, and of a weight that is broadcast; several tiles and programs for each sum."""
    monkeypatch.setattr(mse.config, "MSE_BLOCK", 64)
    monkeypatch.setattr(mse.config, "MSE_HVP_BLOCK", 64)
    monkeypatch.setattr(mse.config, "MSE_PROGRAMS", 12)
    monkeypatch.setattr(mse.config, "MSE_KEPT_COLUMNS", 16)
    monkeypatch.setattr(mse.config, "MSE_KEPT_TILES", 1)

    def draw(shape, order, dtype=torch.float32):
        return torch.randn(shape).to(DEVICE, dtype).permute(order)

    x, t = draw(sizes, order), draw(sizes, order)
    found = mse.plan(mse.coalesce_dims(range(kept), x, t), mse.config.MSE_BLOCK, sums=True)
    assert found.plan == plan
    g = torch.randn(x.shape[:kept], device=DEVICE)
    check(mse, [x, t, None], "mean", kept, g, "no weight")
    per_sum = (*x.shape[:kept], *(1 for _ in x.shape[kept:]))
    per_term = (*(1 for _ in x.shape[:kept]), *x.shape[kept:])
    check(mse, [x, t, torch.randn(per_sum, device=DEVICE)], "sum", kept, g, "weight per sum")
    tensors = [x, t, torch.randn(per_term, device=DEVICE)]
    check(mse, tensors, "mean", 0, g.sum(), "weight per term, one sum")
    check_hvp(mse, tensors, "sum", kept, [True] * 8, "weight per term")


def test_every_plan_of_the_sums_is_shown_above(mse):
    assert {plan for *_, plan in KEPT} == set(mse.config.MSE_PLANS)


def check_hvp(mse, tensors, reduction: str, kept: int, given: list[bool], what: str) -> None:
    """The Hessian-vector product against torch's derivative of torch's derivative, in float64.

    ``given``: which of grad_output, weight, and the directions of grad_output, input, target and weight there are
    (the first two of the eight are input and target, always there).
    """
    shape, dtype = tensors[0].shape, tensors[0].dtype
    grad_shape = shape if reduction == "none" else shape[:kept]
    g, dg = (torch.randn(grad_shape).to(DEVICE, dtype) for _ in range(2))
    weight = tensors[2] if given[3] else None
    shapes = (shape, shape, shape if weight is None else weight.shape)
    directions = [torch.randn(sizes).to(DEVICE, dtype) for sizes in shapes]
    point = [g if given[2] else None, *tensors[:2], weight]
    direction = [dg if given[4] else None]
    direction += [d if have else None for d, have in zip(directions, given[5:], strict=True)]
    if weight is None:
        direction[3] = None
    needs = [True, True, True, weight is not None]
    ours = mse.mse_hvp(*point, *direction, reduction, kept, needs)

    def second(to: torch.dtype) -> list[Tensor]:
        # No grad_output is a grad_output of 0, no direction is a direction of 0.
        at = [torch.zeros(grad_shape) if p is None else p.detach().cpu() for p in point[:1]] + [
            None if p is None else p.detach().cpu() for p in point[1:]
        ]
        at = [None if p is None else p.to(to, copy=True).requires_grad_() for p in at]
        scalar = (torch_loss(*at[1:], reduction, kept) * at[0]).sum()
        leaves = [p for p in at if p is not None]
        first = torch.autograd.grad(scalar, leaves, create_graph=True)
        along = [
            torch.zeros_like(f) if d is None else d.cpu().to(to)
            for f, d in zip(first, direction, strict=False)
        ]
        slope = sum((f * d).sum() for f, d in zip(first, along, strict=True))
        return [r.detach() for r in torch.autograd.grad(slope, leaves)]

    magnitude = 1.0 if reduction == "none" else 8.0 * math.prod(shape[kept:])
    if reduction == "mean":
        magnitude = 8.0
    results = zip(ours, second(dtype), second(torch.float64), strict=True)
    for number, (mine, theirs, expected) in enumerate(results):
        # A sum of terms of both signs is measured by their size.
        floor = magnitude if number == 0 else 0.0
        scale = np.maximum(np.abs(expected.numpy()).max(initial=1e-30), floor) * np.ones(expected.shape)
        assert_matches(mine, theirs.to(mine.dtype), expected.numpy(), f"{what}: result {number}", scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hessian_vector_product(mse, reduction, dtype):
    rng = random.Random(f"{reduction} {dtype}")
    for shape, kept in rng.sample(SHAPES, 6):
        tensors = [laid_out(shape, rng.choice(LAYOUTS), dtype) for _ in range(3)]
        given = [True, True, *(rng.random() < 0.7 for _ in range(6))]
        check_hvp(mse, tensors, reduction, kept, given, f"{shape} kept {kept} {given} {reduction}")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "kept"), [((0,), 0), ((3, 0), 1), ((0, 3), 1), ((2, 0, 3), 0)])
def test_nothing_to_add(mse, shape, kept, reduction):
    """torch's answers: the mean of nothing is NaN, its sum 0; its gradients are empty."""
    x, t, w = (torch.randn(shape, device=DEVICE) for _ in range(3))
    expected = torch_loss(x, t, w, reduction, kept)
    g = torch.randn(expected.shape, device=DEVICE)
    loss = mse.mse_forward(x, t, w, reduction, kept, torch.float32)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
    hvp = mse.mse_hvp(g, x, t, w, g, x, t, w, reduction, kept, [True] * 4)
    torch.testing.assert_close(hvp[0], expected, rtol=0, atol=0, equal_nan=True)
    for grads in (mse.mse_backward(g, x, t, w, reduction, kept, [True] * 3), hvp[1:]):
        assert [tuple(grad.shape) for grad in grads] == [shape] * 3


def test_only_what_is_needed(mse):
    """Each subset of gradients, alone, equals its part of all of them."""
    tensors = [torch.randn(5, 7, device=DEVICE) for _ in range(3)]
    g = torch.tensor(-0.75, device=DEVICE)
    every = mse.mse_backward(g, *tensors, "mean", 0, [True] * 3)
    at_once = mse.mse_forward_backward(*tensors, None, "mean", [True] * 3, torch.float32)
    for mask in range(8):
        needs = [bool(mask >> bit & 1) for bit in range(3)]
        wanted = [grad for grad, need in zip(every, needs, strict=True) if need]
        for mine, grad in zip(mse.mse_backward(g, *tensors, "mean", 0, needs), wanted, strict=True):
            assert torch.equal(mine, grad)
        wanted = [at_once[0], *(grad for grad, need in zip(at_once[1:], needs, strict=True) if need)]
        one_pass = mse.mse_forward_backward(*tensors, None, "mean", needs, torch.float32)
        for mine, grad in zip(one_pass, wanted, strict=True):
            assert torch.equal(mine, grad)


@pytest.mark.parametrize("weight", ["column", "full"])
def test_infinity_stays_in_its_row(mse, weight):
    """Lanes past the end of a row, and rows past the last, add nothing, whatever the weight is."""
    x, t = torch.randn(5, 9, device=DEVICE), torch.randn(5, 9, device=DEVICE)
    w = torch.ones(5, 1 if weight == "column" else 9, device=DEVICE)
    w[-1] = math.inf
    w = w.expand(5, 9)
    assert mse.mse_forward(x, t, w, "sum", 0, torch.float32).item() == math.inf
    per_row = mse.mse_forward(x, t, w, "sum", 1, torch.float32)
    assert torch.isfinite(per_row[:-1]).all()
    assert per_row[-1].item() == math.inf


@triton.jit
def _columns_of_a_tile_kernel(out_ptr, tile, n, COLS: tl.constexpr):
    """out_ptr: (2, COLS), the columns of a tile of one flat row, and whether they lie inside it."""
    _, cols, mask = _tile(tile * 0, tile, 1, 1, n, 1, COLS, 16, True, "nothing")
    out = out_ptr + tl.arange(0, COLS)[None, :]
    tl.store(out, cols)
    tl.store(out + COLS, mask.to(tl.int64))


def test_columns_are_counted_in_64_bits():
    """The last tile of a row of 2**32 + 40 elements: no test can afford the whole, and its first tiles show nothing."""
    n, COLS = 2**32 + 40, 64
    out = torch.zeros(2, COLS, dtype=torch.int64, device=DEVICE)
    _columns_of_a_tile_kernel[(1,)](out, n // COLS, n, COLS)
    columns = torch.arange(2**32, 2**32 + COLS)
    assert torch.equal(out[0].cpu(), columns)
    assert torch.equal(out[1].cpu().bool(), columns < n // 16 * 16)


@triton.jit
def _tiles_kernel(out_ptr, n, COLS: tl.constexpr):
    """out_ptr: (1,), the tiles of one flat row."""
    tl.store(out_ptr, _tiles(1, n, 1, COLS, "nothing"))


def test_tiles_of_almost_2_to_31_elements():
    """A row that 32 bits count, and do not when its last tile is full."""
    out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _tiles_kernel[(1,)](out, 2**31 - 5, 2048)
    assert out.item() == 2**20


@triton.jit
def _rows_of_a_tile_kernel(out_ptr, tile, rows, ROWS: tl.constexpr):
    """out_ptr: (2, ROWS), the rows of a tile of two columns, and whether they are there."""
    row, cols, mask = _tile(tile * 0, tile, 1, rows, 2, ROWS, 16, 1, False, "nothing")
    out = out_ptr + tl.arange(0, ROWS)[:, None] + cols * 0
    tl.store(out, row + cols * 0)
    tl.store(out + ROWS, mask.to(tl.int64), mask=(cols < 2) & (row * 0 == 0))


def test_rows_are_counted_in_64_bits():
    """The last tile of 2**31 + 40 rows that are not one: elementwise gradients have a program for each tile."""
    rows, ROWS = 2**31 + 40, 64
    out = torch.zeros(2, ROWS, dtype=torch.int64, device=DEVICE)
    _rows_of_a_tile_kernel[(1,)](out, rows // ROWS, rows, ROWS)
    expected = torch.arange(2**31, 2**31 + ROWS)
    assert torch.equal(out[0].cpu(), expected.clamp(max=rows - 1))
    assert torch.equal(out[1].cpu().bool(), expected < rows)
