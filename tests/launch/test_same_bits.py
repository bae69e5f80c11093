"""The same bits on different chips, and right ones: how a sum is cut depends on shapes and dtypes, not on the SMs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import gradkernels
from gradkernels.triton import config
from gradkernels.triton import matmul as matmul_module
from gradkernels.triton.config import Target

from ..conftest import GPU
from ..helpers import assert_matches, to_numpy

pytestmark = pytest.mark.skipif(GPU, reason="plays several chips, under the interpreter")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def products(M: int, K: int, N: int) -> Callable[[], Any]:
    return lambda: gradkernels.matmul(randn(M, K), randn(K, N), randn(N))


def fused(N: int, D: int, K: int) -> Callable[[], Any]:
    wrt = ("input", "weight", "bias")
    return lambda: gradkernels.linear_mse_loss_and_grad(
        randn(N, D), randn(K, D), randn(N, K), randn(K), wrt=wrt
    )


def squared_error() -> Any:
    return gradkernels.mse_loss_and_grad(randn(300, 77), randn(77, 300).t())


def stepped(cls: type, **options: Any) -> Callable[[], Any]:
    def step() -> Any:
        params = [randn(*shape).requires_grad_() for shape in ((70, 70), (4100,), (3,))]
        optimizer = cls(params, **options)
        for _ in range(2):
            for param in params:
                param.grad = randn(*param.shape) * 3
            optimizer.step()
        return params, optimizer.grad_norm

    return step


# By multiply and add, on every chip in the same order.
PLAIN = {
    "elementwise": products(70, 5, 3),
    "gemv": products(90, 700, 1),
    "outer product": products(65, 3, 90),
    "squared error": squared_error,
    "fused, 1 output": fused(300, 65, 1),
    "fused, 3 outputs": fused(300, 40, 3),
    "sgd": stepped(gradkernels.FusedSGD, lr=0.1, momentum=0.9),
    "adam, clipped": stepped(gradkernels.FusedAdam, max_norm=1.0),
}
# By matrix instructions, whose own order, and the tiles that suit them, belong to an architecture.
PRODUCTS = {
    "large product": products(1100, 40, 1048),
    "long sum": products(20, 5000, 24),
    "fused, 40 outputs": fused(300, 64, 40),
}


def results(call: Callable[[], Any], target: Target, num_sms: int, monkeypatch: Any) -> list[Tensor]:
    monkeypatch.setattr(config, "target_of", lambda device: target)
    monkeypatch.setattr(config, "num_sms", lambda device: num_sms)
    monkeypatch.setattr(matmul_module, "_plans", {})
    return on("triton", call)


def on(backend: str, call: Callable[[], Any]) -> list[Tensor]:
    with gradkernels.use_backend(backend):
        found = torch.utils._pytree.tree_leaves(call())
    return [item.detach() for item in found if isinstance(item, Tensor)]


@pytest.mark.parametrize("name", [*PLAIN, *PRODUCTS])
def test_the_number_of_sms_changes_nothing(name, monkeypatch):
    call = {**PLAIN, **PRODUCTS}[name]
    first, second = (results(call, Target("cuda", 90), count, monkeypatch) for count in (3, 132))
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    chosen = {prepared.plan.name for prepared in matmul_module._plans.values()}
    assert ("gemm_tma" in chosen) == (name == "large product")
    for ours, theirs, exact in zip(first, on("fallback", call), on("reference", call), strict=True):
        assert_matches(ours, theirs, to_numpy(exact), name)


@pytest.mark.parametrize("name", PLAIN)
def test_nor_does_the_architecture_without_matrix_instructions(name, monkeypatch):
    ampere, hopper, blackwell = (
        results(PLAIN[name], Target("cuda", arch), count, monkeypatch)
        for arch, count in ((80, 108), (90, 132), (100, 148))
    )
    for other in (ampere, blackwell):
        assert all(torch.equal(a, b) for a, b in zip(hopper, other, strict=True))


def test_tuned_tiles_can_be_left_aside(monkeypatch, tmp_path):
    """They belong to a device by name; without them two devices of one architecture agree."""
    monkeypatch.setattr(config, "TUNED", tmp_path)
    (tmp_path / config.file_name("A GPU")).write_text(
        '{"matmul": {"float32 64 64 64 gemm": [32, 32, 16, 2, 1]}}'
    )
    config.tuned.cache_clear()
    assert config.tuned("A GPU")
    config.tuned.cache_clear()
    monkeypatch.setenv("GRADKERNELS_TUNED", "0")
    assert config.tuned("A GPU") == {}
    config.tuned.cache_clear()
