"""The mean of the squares of the differences: partial sums, then one program adds them."""

import torch
import triton
import triton.language as tl


@triton.jit
def partial_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    y = tl.load(y_ptr + offs, mask=offs < n, other=0.0)
    d = x - y
    tl.store(out_ptr + pid, tl.sum(d * d, axis=0))


@triton.jit
def total_kernel(part_ptr, out_ptr, parts, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    part = tl.load(part_ptr + offs, mask=offs < parts, other=0.0)
    tl.store(out_ptr, tl.sum(part, axis=0) / n)


@triton.jit
def backward_kernel(x_ptr, y_ptr, grad_ptr, grad_x_ptr, grad_y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    y = tl.load(y_ptr + offs, mask=offs < n)
    d = 2 * (x - y) / n * tl.load(grad_ptr)
    tl.store(grad_x_ptr + offs, d, mask=offs < n)
    tl.store(grad_y_ptr + offs, -d, mask=offs < n)


class MSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        x, y = x.contiguous(), y.contiguous()
        ctx.save_for_backward(x, y)
        n = x.numel()
        parts = triton.cdiv(n, 64)
        part, out = torch.empty(parts, device=x.device), torch.empty((), device=x.device)
        partial_kernel[(parts,)](x, y, part, n, BLOCK=64)
        total_kernel[(1,)](part, out, parts, n, BLOCK=triton.next_power_of_2(max(parts, 1)))
        return out

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        grad_x, grad_y = torch.empty_like(x), torch.empty_like(y)
        n = x.numel()
        backward_kernel[(triton.cdiv(n, 64),)](x, y, grad, grad_x, grad_y, n, BLOCK=64)
        return grad_x, grad_y


class Model(torch.nn.Module):
    def forward(self, predictions, targets):
        return torch.mean((predictions - targets) ** 2)


class ModelNew(torch.nn.Module):
    def forward(self, predictions, targets):
        return MSE.apply(predictions, targets)


def get_inputs():
    scale = torch.rand(())
    return [torch.rand(16, 25) * scale, torch.rand(16, 25)]


def get_init_inputs():
    return []
