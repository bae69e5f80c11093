"""Where "cuda" is this CPU, an interpreted kernel answers as a compiled one to the code around Triton."""

import math

import pytest

triton = pytest.importorskip("triton")
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from gradkernels.verify.device import cuda_on_cpu  # noqa: E402
from gradkernels.verify.memory.interpreter import interpreted  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402
from triton.language.extra.cuda import libdevice as cuda_libdevice  # noqa: E402

pytestmark = [
    pytest.mark.unwatched,
    pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter (TRITON_INTERPRET=1)"),
]


@triton.jit(do_not_specialize=["n"])
def increment_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < n) + 1, mask=offs < n)


def test_a_kernel_is_a_jit_function_to_others_only() -> None:
    """Wrappers such as FlagGems' unwrap a kernel until they meet one; Triton and this package must know the truth."""
    truth = triton.runtime.JITFunction
    with cuda_on_cpu():
        from triton.runtime.jit import JITFunction

        assert isinstance(increment_kernel, (triton.JITFunction, JITFunction))
        assert not isinstance(7, JITFunction)
        assert interpreted()

        class Derived(JITFunction[int]): ...

        assert not isinstance(increment_kernel, Derived)
        assert [p.is_constexpr for p in increment_kernel.params] == [False, False, True]
        assert [p.do_not_specialize for p in increment_kernel.params] == [False, True, False]
        assert list(increment_kernel.signature.parameters) == ["x_ptr", "n", "BLOCK"]
        assert len(increment_kernel.cache_key) == 64
    assert triton.JITFunction is triton.runtime.JITFunction is truth
    assert not isinstance(increment_kernel, truth)
    assert not hasattr(increment_kernel, "params")


def test_a_launch_gives_a_kernel_to_launch_again() -> None:
    """With all arguments, or without those that are compiled in."""
    with cuda_on_cpu():
        x = torch.zeros(4, device="cuda")
        compiled = increment_kernel[(1,)](x, 4, BLOCK=4)
        compiled[(1, 1, 1)](x, 3)
        compiled[(1,)](x, 2, 4)
        warmed = increment_kernel.warmup(x, 4, BLOCK=4, grid=(1,))
        assert x.tolist() == [3, 3, 2, 1]  # a warmup launches nothing
        warmed[(1,)](x, 1)
        assert x.tolist() == [4, 3, 2, 1]


def test_a_device_as_a_context_and_the_accelerator() -> None:
    with cuda_on_cpu(), torch.device("cuda"):
        assert torch.zeros(2).add_(1).tolist() == [1, 1]
        assert torch.nn.Linear(2, 3).weight.is_cuda
        torch.accelerator.synchronize()
        assert torch.device("cuda", torch.accelerator.current_device_index()) == torch.zeros(1).device


@triton.jit
def libdevice_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, libdevice.round(x))
    tl.store(out_ptr + N + offs, libdevice.rint(x))
    tl.store(out_ptr + 2 * N + offs, libdevice.remainder(x, y))
    tl.store(out_ptr + 3 * N + offs, cuda_libdevice.div_rn(x, y))


def test_libdevice_rounds_as_c_does() -> None:
    numbers = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7.25, -7.25]
    divisors = [1.0, -1.0, 2.0, 1.0, 3.0, -2.0, 1.5, 4.0]
    out = torch.empty(4, 8)
    with cuda_on_cpu():
        libdevice_kernel[(1,)](torch.tensor(numbers), torch.tensor(divisors), out, N=8)
    assert out[0].tolist() == [-3, -2, -1, 1, 2, 3, 7, -7]
    assert out[1].tolist() == [round(x) for x in numbers]
    assert out[2].tolist() == [math.remainder(x, y) for x, y in zip(numbers, divisors, strict=True)]
    assert torch.equal(out[3], torch.tensor(numbers) / torch.tensor(divisors))
