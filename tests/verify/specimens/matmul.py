"""A matrix product in tiles, autotuned; the backward is two more."""

import torch
import triton
import triton.language as tl


@triton.autotune(
    configs=[
        triton.Config({"TM": 16, "TN": 16, "TK": 16}, num_warps=4),
        triton.Config({"TM": 32, "TN": 16, "TK": 32}, num_warps=8),
    ],
    key=["m", "n", "k"],
)
@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, m, n, k, stride_am, stride_ak, stride_bk, stride_bn,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TM + tl.arange(0, TM)
    cols = tl.program_id(1) * TN + tl.arange(0, TN)
    acc = tl.zeros((TM, TN), tl.float32)
    for start in range(0, k, TK):
        inner = start + tl.arange(0, TK)
        a = tl.load(
            a_ptr + rows[:, None] * stride_am + inner[None, :] * stride_ak,
            mask=(rows[:, None] < m) & (inner[None, :] < k),
            other=0.0,
        )
        b = tl.load(
            b_ptr + inner[:, None] * stride_bk + cols[None, :] * stride_bn,
            mask=(inner[:, None] < k) & (cols[None, :] < n),
            other=0.0,
        )
        acc += tl.dot(a, b, input_precision="ieee")
    mask = (rows[:, None] < m) & (cols[None, :] < n)
    tl.store(c_ptr + rows[:, None] * n + cols[None, :], acc, mask=mask)


def product(a, b):
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, device=a.device, dtype=a.dtype)
    matmul_kernel[lambda o: (triton.cdiv(m, o["TM"]), triton.cdiv(n, o["TN"]))](
        a, b, c, m, n, k, a.stride(0), a.stride(1), b.stride(0), b.stride(1)
    )
    return c


class Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return product(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return product(grad, b.t()), product(a.t(), grad)


def check_Matmul():
    a, b = torch.randn(20, 18, device="cuda"), torch.randn(18, 12, device="cuda")
    return Matmul.apply, (a, b), torch.matmul
