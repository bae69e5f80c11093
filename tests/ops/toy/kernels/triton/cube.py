"""The third power: kernels and launchers. Bytes: the input read, the result written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch

BLOCK = 1024


@triton.jit
def _cube_forward_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, DOUBLE: tl.constexpr):
    """A block of y = x^3. x_ptr, y_ptr: (n,), contiguous."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n).to(tl.float64 if DOUBLE else tl.float32)
    tl.store(y_ptr + offs, x * x * x, mask=offs < n)


@triton.jit
def _cube_backward_kernel(grad_ptr, x_ptr, y_ptr, n, BLOCK: tl.constexpr, DOUBLE: tl.constexpr):
    """A block of y = 3 g x^2. grad_ptr, x_ptr, y_ptr: (n,), contiguous."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n).to(tl.float64 if DOUBLE else tl.float32)
    grad = tl.load(grad_ptr + offs, mask=offs < n).to(x.dtype)
    tl.store(y_ptr + offs, 3 * grad * x * x, mask=offs < n)


def _launch(kernel: object, *tensors: Tensor) -> Tensor:
    contiguous = [tensor.contiguous() for tensor in tensors]
    result = torch.empty_like(contiguous[-1])
    n = result.numel()
    options = {"BLOCK": BLOCK, "DOUBLE": result.dtype == torch.float64}
    if n:
        launch(kernel, (cdiv(n, BLOCK),), *contiguous, result, n, device=result.device, **options)
    return result


def cube_forward(input: Tensor) -> Tensor:
    """``input^3``."""
    return _launch(_cube_forward_kernel, input)


def cube_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    """``3 g input^2``."""
    return _launch(_cube_backward_kernel, grad_output, input)
