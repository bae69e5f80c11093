"""silu(a) * b of two matrices."""

import torch
import triton
import triton.language as tl


@triton.jit
def forward_kernel(a_ptr, b_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs, mask=offs < n)
    b = tl.load(b_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, a * tl.sigmoid(a) * b, mask=offs < n)


@triton.jit
def backward_kernel(a_ptr, b_ptr, grad_ptr, grad_a_ptr, grad_b_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs, mask=offs < n)
    b = tl.load(b_ptr + offs, mask=offs < n)
    grad = tl.load(grad_ptr + offs, mask=offs < n)
    s = tl.sigmoid(a)
    tl.store(grad_a_ptr + offs, grad * b * (s + a * s * (1 - s)), mask=offs < n)
    tl.store(grad_b_ptr + offs, grad * a * s, mask=offs < n)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        y = torch.empty_like(a)
        forward_kernel[(triton.cdiv(a.numel(), 64),)](a, b, y, a.numel(), BLOCK=64)
        return y

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        grad, grad_a, grad_b = grad.contiguous(), torch.empty_like(a), torch.empty_like(b)
        backward_kernel[(triton.cdiv(a.numel(), 64),)](a, b, grad, grad_a, grad_b, a.numel(), BLOCK=64)
        return grad_a, grad_b


def check_SwiGLU():
    a, b = torch.randn(5, 24, device="cuda"), torch.randn(5, 24, device="cuda")
    return SwiGLU.apply, (a, b), lambda a, b: torch.nn.functional.silu(a) * b
