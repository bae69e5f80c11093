"""The third power of each element: an op for test_toy_op.py to add, as small as an op can be."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .operator import Operator


def cube(input: Tensor) -> Tensor:
    """``input^3``, elementwise."""
    checks.tensors("cube", {"input": input}, ())
    return _cube(input)


class CubeFunction(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
        return (_cube_backward(grad, *ctx.saved_tensors),)

    @staticmethod
    def jvp(ctx: Any, d_input: Tensor) -> Tensor:
        return _cube_backward(d_input, *ctx.saved_tensors)


def _backward_formula(grad_output: Tensor, input: Tensor) -> Tensor:
    return 3 * grad_output * input**2


def _vmap(operator: Operator, batch_size: int, in_dims: Sequence[int | None], *args: Tensor) -> Tensor:
    return operator(
        *(
            arg.expand(batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            for arg, dim in zip(args, in_dims, strict=True)
        )
    )


_cube = Operator("cube", "forward", fake=torch.empty_like, vmap=_vmap, derivative=CubeFunction)
_cube_backward = Operator(
    "cube", "backward", fake=lambda _, x: torch.empty_like(x), vmap=_vmap, derivative=_backward_formula
)
