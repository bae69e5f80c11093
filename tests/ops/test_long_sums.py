"""Sums of 2^19 numbers, of kinds whose rounding may go to the same side throughout: as exact as torch's."""

import numpy as np
import pytest
import torch
from gradkernels import FusedSGD, use_backend
from gradkernels.ops import FUNCTIONS, TRAININGS, Call
from gradkernels.verify.cases import NUMBERS, build

from ..cases import label
from ..helpers import Draws, exactly

pytestmark = pytest.mark.unwatched  # what is tested here are values
LONG = 1 << 19
SPLIT = {"input": (2, LONG // 2), "target": (2, LONG // 2)}
# Sizes and calls each of which has such a sum in its value or a gradient.
PROBLEMS: dict[str, list[tuple[int, ...] | Call]] = {
    "matmul": [(2, LONG, 1), (LONG, 1, 2)],
    "mse": [
        (LONG,),
        Call({**SPLIT, "weight": (2, 1)}, options={"reduction": "sum"}),
        Call(SPLIT, options={"dim": 1}),
    ],
    "linear_mse": [(LONG, 2, 1)],
    "linear_mse_models": [(2, LONG, 1, 1)],
    "linear_mse_fit": [(1, LONG, 1, 1), (2, LONG // 4, 1, 1)],
}
# Every kind of number in float32; in the other dtypes, in the full run.
CELLS = [
    pytest.param(dtype, numbers, marks=() if dtype == torch.float32 else pytest.mark.full)
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    for numbers in list(NUMBERS)[1:]
]


def test_every_op_with_sums_is_here() -> None:
    assert PROBLEMS.keys() == {*FUNCTIONS, *TRAININGS}


@pytest.mark.parametrize(("dtype", "numbers"), CELLS, ids=label)
@pytest.mark.parametrize(
    ("op", "what"), [(op, what) for op, problems in PROBLEMS.items() for what in problems], ids=str
)
def test_ops(op: str, what: tuple[int, ...] | Call, dtype: torch.dtype, numbers: str) -> None:
    draws, draw = Draws(), 0
    while not draws.enough:
        case = build(op, what, dtype, "cpu", draw, numbers)
        with use_backend("fallback"):
            ours = case.ours()
        theirs, exact = case.torch(), case.reference()
        for name, value in ours.items():
            draws.add(name, value, theirs[name], exact[name])
        draw += 1
    draws.assert_match()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("numbers", list(NUMBERS)[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=label)
def test_norms(dtype: torch.dtype, numbers: str, stacked: bool) -> None:
    """Of all gradients, or of each model's."""
    draws = Draws()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        values = NUMBERS[numbers](torch.randn(2, LONG, generator=generator, dtype=dtype))
        param = torch.zeros(2, LONG, dtype=dtype, requires_grad=True)
        param.grad = values
        optimizer = FusedSGD([param], lr=0.1, max_norm=1.0, stacked=stacked)
        with use_backend("fallback"):
            optimizer.step()
        axes = 1 if stacked else None
        exact = np.sqrt((exactly(values) ** 2).sum(axis=axes))
        draws.add("grad_norm", optimizer.grad_norm, torch.linalg.vector_norm(values, dim=axes), exact)
    draws.assert_match()
