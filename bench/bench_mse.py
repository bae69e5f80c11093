"""mse_loss on n elements.

bytes   forward: 2 n read. Forward + backward through autograd: 2 n read, then 2 n read and n written.
        Loss and gradient in one pass: 2 n read, n written. (times the size of an element)
FLOPs   a subtraction, a multiplication and an addition per element; the gradient costs two more.
"""

from collections.abc import Iterator
from functools import partial

import gradkernels
import numpy as np
import torch
from gradkernels.reference import mse as reference
from torch import Tensor
from torch.nn import functional

from .throughput.case import (
    Case,
    Op,
    Results,
    Sweep,
    draw_inputs,
    forward,
    forward_backward,
    powers,
    through_autograd,
    without_autograd,
)


def _explicit(input: Tensor, target: Tensor, _: Tensor) -> Results:
    loss, (grad, _, _) = gradkernels.mse_loss_and_grad(input, target)
    return [loss, grad]


def _expected(input: np.ndarray, target: np.ndarray, grad: np.ndarray) -> list[np.ndarray]:
    return [reference.forward(input, target), reference.backward(grad, input, target)[0]]


def build(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
    (n,) = shape
    size = n * dtype.itemsize
    ours, plain = gradkernels.mse_loss, functional.mse_loss
    case = partial(
        Case,
        op="mse",
        label=str(n),
        sizes={"n": n},
        dtype=dtype,
        make=draw_inputs(dtype, lambda randn: (randn(n, grad=True), randn(n), randn())),
        compile=n == 1 << 20,
    )
    yield case(
        variant="forward",
        bytes=2 * size,
        flops=3 * n,
        implementations=through_autograd(forward, ours, plain),
        reference=lambda *inputs: _expected(*inputs)[:1],
    )
    yield case(
        variant="forward + backward",
        bytes=5 * size,
        flops=5 * n,
        implementations=through_autograd(forward_backward, ours, plain),
        reference=_expected,
    )
    yield case(
        variant="loss and gradient",
        bytes=3 * size,
        flops=5 * n,
        implementations=without_autograd(_explicit, plain, (0,)),
        reference=lambda input, target, _: _expected(input, target, np.ones(())),
    )


OP = Op(
    "mse",
    ("n",),
    build,
    """
    *8 64@cpu 16@cuda 256@cuda 512@cpu 4096 *2^14 2^15@cpu 2^16@cuda 2^18 *2^20 2^22 *2^23@cpu 2^24 2^26
    *2^27@cuda 2^28@cuda 2^30@cuda
    """,
    dtypes={
        "cpu": (torch.float32, torch.float64, torch.bfloat16),
        "cuda": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    },
    sweeps={"cpu": (Sweep("n", powers(4, 1, 12), (1,)),), "cuda": (Sweep("n", powers(4, 1, 15), (1,)),)},
)
