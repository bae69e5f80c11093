"""Layer norm over the last dimension; the gradients of weight and bias are summed in a second kernel."""

import torch
import triton
import triton.language as tl


@triton.jit
def forward_kernel(x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    x = tl.load(x_ptr + row * n + cols, mask=mask, other=0.0)
    mean = tl.sum(x, axis=0) / n
    d = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(d * d, axis=0) / n + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    w = tl.load(w_ptr + cols, mask=mask)
    b = tl.load(b_ptr + cols, mask=mask)
    tl.store(y_ptr + row * n + cols, d * rstd * w + b, mask=mask)


@triton.jit
def backward_x_kernel(x_ptr, w_ptr, grad_ptr, mean_ptr, rstd_ptr, grad_x_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    x = tl.load(x_ptr + row * n + cols, mask=mask, other=0.0)
    w = tl.load(w_ptr + cols, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + row * n + cols, mask=mask, other=0.0)
    rstd = tl.load(rstd_ptr + row)
    hat = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
    wg = w * grad
    c1 = tl.sum(hat * wg, axis=0) / n
    c2 = tl.sum(wg, axis=0) / n
    tl.store(grad_x_ptr + row * n + cols, (wg - hat * c1 - c2) * rstd, mask=mask)


@triton.jit
def backward_w_kernel(x_ptr, grad_ptr, mean_ptr, rstd_ptr, grad_w_ptr, grad_b_ptr, m, n, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    sum_w = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    for row in range(m):
        x = tl.load(x_ptr + row * n + cols, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + row * n + cols, mask=mask, other=0.0)
        sum_w += grad * (x - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row)
        sum_b += grad
    tl.store(grad_w_ptr + cols, sum_w, mask=mask)
    tl.store(grad_b_ptr + cols, sum_b, mask=mask)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        m, n = x.shape
        y = torch.empty_like(x)
        mean, rstd = torch.empty(m, device=x.device), torch.empty(m, device=x.device)
        block = triton.next_power_of_2(n)
        forward_kernel[(m,)](x, weight, bias, y, mean, rstd, n, 1e-5, BLOCK=block)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        m, n = x.shape
        grad = grad.contiguous()
        grad_x, grad_w, grad_b = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        backward_x_kernel[(m,)](x, weight, grad, mean, rstd, grad_x, n, BLOCK=triton.next_power_of_2(n))
        backward_w_kernel[(triton.cdiv(n, 16),)](x, grad, mean, rstd, grad_w, grad_b, m, n, BLOCK=16)
        return grad_x, grad_w, grad_b


def check_LayerNorm():
    x = torch.randn(6, 20, device="cuda", requires_grad=True)
    weight = torch.randn(20, device="cuda", requires_grad=True)
    bias = torch.randn(20, device="cuda", requires_grad=True)

    def reference(x, weight, bias):
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias)

    return LayerNorm.apply, (x, weight, bias), reference
