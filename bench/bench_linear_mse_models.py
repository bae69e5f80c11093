"""linear_mse_loss of B models in one call: K outputs from D features of N rows of their own, shared, or ragged.

bytes   X once (B N D; shared N D), target once (B N K), weights read and their gradients written (2 B K D), losses
        written (B), times the size of an element; the count is the same for all, so that GB/s compares.
FLOPs   2 B N K D for the predictions, as many for the weights' gradients, 5 B N K for the errors.

``bmm`` is what one writes by hand: a batched product, the errors, their squares, a batched product for the gradients.
Ragged rows are padded for it, and for vmap, before the clock starts: rows of zeros with the target 0 change neither
loss nor gradient. ``lstsq`` solves for the weights, at once.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradkernels
import numpy as np
import torch
from gradkernels.reference import linear_mse_models as reference
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn import functional

from .reports.cases import AotCase, Call, Job, meta, randn
from .throughput.case import Case, Implementation, Op, Results, Sweep, compiled, dtype_name, function, powers

LOOPED = 1000  # models; a loop over more is not timed
CHECKED = 1000  # models; of more, so many are held against the reference

# (B, N, D) or (N, D); (B, N, K); how many targets of each model are no padding.
Rows = tuple[Tensor, Tensor, Tensor | None]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Callable[[], Rows]]


def _padded(input: Tensor, target: Tensor, offsets: Tensor) -> Rows:
    lengths = offsets.diff()
    places = torch.arange(int(lengths.max()), device=offsets.device)
    unused = places >= lengths[:, None]
    places = (places + offsets[:-1, None]).masked_fill_(unused, 0)
    x, y = (rows[places].masked_fill_(unused.unsqueeze(-1), 0) for rows in (input, target))
    return x, y, lengths * target.shape[1]


def _ours(input: Tensor, weight: Tensor, target: Tensor, offsets: Tensor | None, *_: Any) -> Results:
    loss, (_, grad, _, _) = gradkernels.linear_mse_loss_and_grad(input, weight, target, offsets=offsets)
    return [loss, grad]


def _bmm(weight: Tensor, x: Tensor, y: Tensor, count: Tensor | None) -> Results:
    error = torch.matmul(x, weight.mT) - y
    grad = torch.matmul(error.mT, x)
    if count is None:
        return [error.square().mean((1, 2)), grad * (2 / y[0].numel())]
    return _means(error.square().sum((1, 2)), grad, count)


def _means(losses: Tensor, grads: Tensor, count: Tensor) -> Results:
    slope = 2 / count.clamp(min=1)
    return [(losses / count).to(losses.dtype), (grads * slope[:, None, None]).to(grads.dtype)]


def _one(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(functional.linear(x, weight), y)


def _half_of_one(weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    loss = functional.mse_loss(functional.linear(x, weight), y, reduction="sum")
    return loss / 2, loss


def _vmap(weight: Tensor, x: Tensor, y: Tensor, count: Tensor | None) -> Results:
    in_dims = (0, 0 if x.dim() == 3 else None, 0)
    if count is None:
        grads, losses = vmap(grad_and_value(_one), in_dims)(weight, x, y)
        return [losses, grads]
    grads, (_, losses) = vmap(grad_and_value(_half_of_one, has_aux=True), in_dims)(weight, x, y)
    return _means(losses, grads, count)


def _loop(input: Tensor, weight: Tensor, target: Tensor, offsets: Tensor | None, *_: Any) -> Results:
    if offsets is not None:
        lengths = offsets.diff().tolist()
        rows = zip(input.split(lengths), target.split(lengths), strict=True)
    else:
        rows = zip(input if input.dim() == 3 else [input] * len(weight), target, strict=True)
    models = [model.detach().requires_grad_() for model in weight]
    losses = torch.stack([_one(model, x, y) for model, (x, y) in zip(models, rows, strict=True)])
    return [losses.detach(), torch.stack(torch.autograd.grad(losses.sum(), models))]


def _lstsq(weight: Tensor, x: Tensor, y: Tensor, count: Tensor | None) -> Results:
    if x.dim() == 2:  # one matrix, whose right-hand sides are all models' targets
        columns = y.movedim(0, 1).flatten(1)
        solution = torch.linalg.lstsq(x, columns, driver="gels").solution
        return [solution.unflatten(1, weight.shape[:2]).movedim(0, -1)]
    # "gels" is the quicker; it takes no model that has fewer rows than weights.
    driver = "gels" if count is None else "gelsy"
    return [torch.linalg.lstsq(x, y, driver=driver).solution.mT]


def _of_rows(run: Callable[..., Results], _: Tensor, weight: Tensor, *others: Any) -> Results:
    return run(weight, *others[-1]())


def _some(of: Any) -> Any:
    """Return the first of each group of models: those that are held against the reference."""
    return of[:: -(-len(of) // CHECKED)]


def _some_models(
    input: np.ndarray, weight: np.ndarray, target: np.ndarray, offsets: np.ndarray | None, _: Any
) -> dict[str, Any]:
    """Return the operands of these models."""
    if offsets is None:
        return {
            "input": _some(input) if input.ndim == 3 else input,
            "weight": _some(weight),
            "target": _some(target),
        }
    bounds = _some(np.lib.stride_tricks.sliding_window_view(offsets.astype(np.int64), 2))
    rows = np.concatenate([np.arange(start, end) for start, end in bounds])
    cuts = np.concatenate([[0], np.cumsum(bounds[:, 1] - bounds[:, 0])])
    return {"input": input[rows], "weight": _some(weight), "target": target[rows], "offsets": cuts}


def _expected(*inputs: Any) -> list[np.ndarray]:
    operands = _some_models(*inputs)
    ones = np.ones(len(operands["weight"]))
    return [reference.forward(**operands), reference.backward(ones, **operands)[1]]


def _solutions(*inputs: Any) -> list[np.ndarray]:
    operands = _some_models(*inputs)
    x, y = operands["input"], operands["target"]
    if "offsets" in operands:
        cuts = operands["offsets"][1:-1]
        rows: Any = zip(np.split(x, cuts), np.split(y, cuts), strict=True)
    else:
        rows = zip(x if x.ndim == 3 else [x] * len(y), y, strict=True)
    return [np.stack([np.linalg.lstsq(x, y, rcond=None)[0].T for x, y in rows])]


def _make(
    layout: str, b: int, n: int, d: int, k: int, dtype: torch.dtype
) -> Callable[[torch.device, torch.Generator], Inputs]:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        weight = draw(b, k, d)
        if layout == "ragged":
            # From no rows at all to twice as many as on average. All sets of inputs have the same lengths: the padded
            # shapes are compiled once.
            lengths = torch.Generator().manual_seed(0)
            cuts = torch.rand(b, generator=lengths, dtype=torch.float64).cumsum(0)
            offsets = functional.pad((cuts * (b * n / cuts[-1])).round().long(), (1, 0)).to(device)
            x, y = draw(b * n, d), draw(b * n, k)
            return x, weight, y, offsets, functools.cache(partial(_padded, x, y, offsets))
        x, y = draw(*((b, n, d) if layout == "own" else (n, d))), draw(b, n, k)
        return x, weight, y, None, lambda: (x, y, None)

    return make


def _implementations(layout: str, b: int, dtype: torch.dtype) -> Iterator[Implementation]:
    yield function("gradkernels", _ours)
    yield function("bmm", partial(_of_rows, _bmm))
    yield function("vmap", partial(_of_rows, _vmap))
    yield compiled("compile", _bmm, _of_rows)
    too_many = "" if b <= LOOPED else f"not timed over more than {LOOPED} models"
    yield Implementation("loop", function("", _loop).prepare, absent=too_many)
    absent = "" if dtype.itemsize > 2 else "not for 16 bits"
    if layout == "ragged" and torch.cuda.is_available():
        absent = absent or "not timed on ragged rows: a GPU has no gelsy"
    yield Implementation(
        "lstsq",
        function("", partial(_of_rows, _lstsq)).prepare,
        absent=absent,
        unit="steps",
        reference=_solutions,
    )


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    b, n, d, k = shape
    for layout in ("own", "shared", "ragged"):
        rows = (1 if layout == "shared" else b) * n * d + b * n * k
        yield Case(
            op="linear_mse_models",
            variant=f"loss and gradients, {layout}",
            label=f"{b} x {n} x {d}" + (f" -> {k}" if k > 1 else ""),
            sizes={"B": b, "N": n, "D": d, "K": k},
            dtype=dtype,
            bytes=(rows + 2 * b * k * d + b) * dtype.itemsize,
            flops=4 * b * n * k * d + 5 * b * n * k,
            make=_make(layout, b, n, d, k, dtype),
            implementations=tuple(_implementations(layout, b, dtype)),
            reference=_expected,
            pick=lambda results: [_some(result) for result in results],
            beside=2 * rows * dtype.itemsize if layout == "ragged" else 0,
            compile=b == 1000,
        )


OP = Op(
    "linear_mse_models",
    ("B", "N", "D", "K"),
    build,
    """
    10x1e5x8x1@cpu *10x1e5x8x1@cuda 100x10000x8x1 *1000x100x8x1 10000x100x8x1 1e5x100x8x1 1e6x100x8x1@cpu
    *1e6x100x8x1@cuda
    1000x1000x64x1@cuda *1000x1000x32x4@cuda 100x1000x256x16
    """,
    sweeps={
        "cpu": (Sweep("B", powers(4, 1, 6), (1, 100, 8, 1)),),
        "cuda": (Sweep("B", powers(4, 1, 10), (1, 100, 8, 1)),),
    },
)


def _launch(layout: str, B: int, N: int, D: int, K: int) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        rows = (B, N) if layout == "own" else (N,)
        input, weight = meta(*rows, D, dtype=dtype), meta(B, K, D, dtype=dtype)
        target = meta(*((N,) if layout == "ragged" else (B, N)), K, dtype=dtype)
        bias = meta(B, K, dtype=dtype)
        bounds = meta(B + 1, dtype=torch.int64).unfold(0, 2, 1) if layout == "ragged" else None
        output_mask = [False, True, True]
        return module.linear_mse_models_forward(
            input, weight, target, bias, None, bounds, "mean", output_mask, dtype
        )

    return call


def _launch_product(R: int, B: int, K: int, D: int) -> Call:
    def call(module: Any, dtype: torch.dtype) -> object:
        bounds = meta(B + 1, dtype=torch.int64).unfold(0, 2, 1)
        return module.linear_mse_models_product(
            meta(R, D, dtype=dtype), meta(B, K, D, dtype=dtype), bounds, dtype
        )

    return call


AOT_CASES = tuple(
    AotCase("linear_mse_models", shapes, call, stores=False)
    for shapes, call in (
        ("1,000 models of 100 x 8", _launch("own", 1000, 100, 8, 1)),
        ("10 models of 100,000 x 64", _launch("own", 10, 100_000, 64, 1)),
        ("10 models of 1,000 x 2048", _launch("own", 10, 1000, 2048, 1)),
        ("10 models of 1,000 x 1024", _launch("own", 10, 1000, 1024, 1)),
        ("4 outputs of 256, ragged", _launch("ragged", 1000, 1 << 18, 256, 4)),
        ("1,000 models of shared rows", _launch("shared", 1000, 1 << 14, 64, 1)),
        ("32 outputs of 128, ragged", _launch("ragged", 100, 1 << 18, 128, 32)),
        ("ragged product", _launch_product(1 << 18, 100, 64, 64)),
    )
)


def traffic_jobs() -> Iterator[Job]:
    """Yield the losses with the gradients of weights: rows are read once, however many models there are.

    Where the models share them, a program reads them for 64 models at once; each reads the weights.
    """
    b, n, d = 20, 512, 8
    weight, target = randn(b, 1, d), randn(b * n, 1)
    bounds = torch.sort(torch.randint(0, b * n + 1, (b + 1,), generator=torch.Generator().manual_seed(0)))[0]
    bounds[0], bounds[-1] = 0, b * n
    for layout, rows, y, offsets, launches in (
        ("own", randn(b, n, d), target.view(b, n, 1), None, 2),
        ("ragged", randn(b * n, d), target, bounds, 2),
        ("shared", randn(n, d), target.view(b, n, 1), None, 2),
    ):
        own = rows if layout == "shared" else rows.view(b, n, d)
        yield Job(
            f"linear_mse_models, losses and gradients of weights, {layout}, {b}x{n}x{d} {dtype_name(y.dtype)}",
            partial(_ours, rows, weight, y, offsets),
            partial(_bmm, weight, own, y.view(b, n, 1), None),
            4 * (rows.numel() + b * n + 2 * b * d + b),
            1.10,
            1.10,
            launches,
        )
