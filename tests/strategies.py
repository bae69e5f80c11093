"""What hypothesis draws for the tests: sizes, memory layouts, numbers, and whole calls of the ops.

Seeded: a run repeats the last one. GRADKERNELS_FUZZ_EXAMPLES sets the number of examples of each test (``make fuzz``).
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradkernels.verify.cases import NUMBERS
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from .cases import REDUCTIONS, Case

Draw = Callable[..., Any]


def fuzz(examples: int) -> settings:
    """So many examples by default, the same in every run."""
    return settings(
        max_examples=int(os.environ.get("GRADKERNELS_FUZZ_EXAMPLES", examples)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


SIZES = st.one_of(st.integers(0, 4), st.integers(5, 70), st.sampled_from([63, 64, 65, 127, 128, 129, 200]))
NONZERO = SIZES.filter(bool)
LAYOUTS = st.sampled_from(["contiguous", "contiguous", "transposed", "every other", "offset", "expanded"])
SCALES = st.sampled_from([1.0, 1.0, 2**-10, 32.0, 0.0])


def tensors(
    draw: Draw,
    shape: tuple[int, ...] | list[int],
    dtype: torch.dtype,
    layouts: st.SearchStrategy[str] = LAYOUTS,
    positive: bool = False,
) -> Callable[[], Tensor]:
    """A source of tensors of one random layout, scale and kind of numbers, with other random values at each call.

    What lies between the elements is NaN.
    """
    shape, layout = tuple(shape), draw(layouts)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale, kind = draw(SCALES), NUMBERS[draw(st.sampled_from(list(NUMBERS)))]
    if dtype == torch.float16:  # sums of larger numbers overflow, where depends on the order of operations
        scale = min(scale, 1.0)

    def make() -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        made = kind(values.to(dtype)) * scale
        made = made.abs_() + 0.5 if positive else made
        if layout == "transposed" and made.ndim > 1:
            return made.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "every other" and made.ndim:
            wide = made.new_full((*shape[:-1], 2 * shape[-1]), float("nan"))
            wide[..., ::2] = made
            return wide[..., ::2]
        if layout == "offset":
            flat = made.new_full((made.numel() + 3,), float("nan"))
            flat[3:] = made.reshape(-1)
            return flat[3:].view(shape)
        if layout == "expanded" and made.ndim and shape[0] > 0:
            return made[:1].expand(shape)
        return made

    return make


def calls(draw: Draw, op: str) -> Case:
    """A call of ``op``: operands of one dimension, batches that broadcast, optional arguments, zero sizes."""
    return {"matmul": _matmul, "linear": _linear, "mse_loss": _mse, "linear_mse_loss": _linear_mse}[op](draw)


FEW = st.integers(0, 3)  # of the dimensions in front, of which each element costs a product


def _matmul(draw: Draw) -> Case:
    m, k, n = (draw(SIZES) for _ in range(3))
    batch = draw(st.lists(FEW, max_size=2))
    left, right = (
        [1 if draw(st.booleans()) else size for size in batch][draw(st.integers(0, len(batch))) :]
        for _ in range(2)
    )
    vectors = draw(st.sampled_from(["", "", "", "input", "other", "both"]))
    shapes = {
        "input": (k,) if vectors in ("input", "both") else (*left, m, k),
        "other": (k,) if vectors in ("other", "both") else (*right, k, n),
    }
    if draw(st.booleans()):
        shapes["bias"] = _bias(draw, shapes["other"][1:][-1:])
    return Case("matmul", shapes)


def _bias(draw: Draw, columns: tuple[int, ...]) -> tuple[int, ...]:
    """One element per column; for the one column of a vector also a bias of no dimension."""
    return columns or draw(st.sampled_from([(), (1,)]))


def _affine(draw: Draw) -> dict[str, tuple[int, ...]]:
    front = (*draw(st.lists(FEW, max_size=1)), *draw(st.lists(SIZES, max_size=1)))
    features = draw(SIZES)
    outputs = draw(st.one_of(st.just(()), st.tuples(st.sampled_from([1, 1, 2, 3, 8, 9, 33, 0]))))
    shapes = {"input": (*front, features), "weight": (*outputs, features)}
    if draw(st.booleans()):
        shapes["bias"] = _bias(draw, outputs)
    return shapes


def _linear(draw: Draw) -> Case:
    return Case("linear", _affine(draw))


def _mse(draw: Draw) -> Case:
    shape = (*draw(st.lists(FEW, max_size=1)), *draw(st.lists(SIZES, max_size=2)))
    names = ("input", "target", "weight")[: 3 if draw(st.booleans()) else 2]
    return Case("mse_loss", dict.fromkeys(names, shape), {"reduction": draw(st.sampled_from(REDUCTIONS))})


def _linear_mse(draw: Draw) -> Case:
    affine = _affine(draw)
    front, outputs = affine["input"][:-1], affine["weight"][:-1]
    shapes = {"input": affine["input"], "weight": affine["weight"], "target": (*front, *outputs)}
    shapes |= {"bias": affine["bias"]} if "bias" in affine else {}
    samples = draw(st.sampled_from([None, None, front, (*front, *outputs)]))
    shapes |= {} if samples is None else {"sample_weight": samples}
    return Case("linear_mse_loss", shapes, {"reduction": draw(st.sampled_from(REDUCTIONS))})
