"""The sum of each row in two halves, which meet in an atomic addition."""

import torch
import triton
import triton.language as tl


@triton.jit
def forward_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, half = tl.program_id(0), tl.program_id(1)
    cols = half * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + cols, mask=cols < n, other=0.0)
    tl.atomic_add(y_ptr + row, tl.sum(x, axis=0))


@triton.jit
def backward_kernel(grad_ptr, grad_x_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    tl.store(
        grad_x_ptr + row * n + cols, tl.load(grad_ptr + row) + tl.zeros((BLOCK,), tl.float32), mask=cols < n
    )


class RowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        ctx.shape = x.shape
        m, n = x.shape
        y = torch.zeros(m, device=x.device)
        forward_kernel[(m, 2)](x, y, n, BLOCK=triton.next_power_of_2(triton.cdiv(n, 2)))
        return y

    @staticmethod
    def backward(ctx, grad):
        m, n = ctx.shape
        grad_x = torch.empty(m, n, device=grad.device)
        backward_kernel[(m,)](grad.contiguous(), grad_x, n, BLOCK=triton.next_power_of_2(n))
        return grad_x


def check_RowSum():
    return RowSum.apply, (torch.randn(8, 30, device="cuda"),), lambda x: x.sum(1)
