"""The fallback's batches, made so small that every tensor is cut: the numbers are those of uncut tensors."""

import pytest
import torch
from gradkernels.fallback import multi_tensor

from . import test_clipping, test_low_precision
from .optimizers import Feed, assert_same_run, make_params, pair_over, parameters

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "ON_HOST", 80)
    monkeypatch.setattr(multi_tensor, "RANDOM", 7)


def test_clipped(name: str) -> None:
    test_clipping.test_max_norm_over_mixed_dtypes_and_missing_gradients(name, CPU)


@pytest.mark.parametrize("master", [False, True], ids=["float32", "masters"])
def test_transposed_clipped_and_scaled(name: str, master: bool) -> None:
    """Copies of gradients stand beside parameters and masters that are walked in the order of their memory."""
    params = make_params(((9, 7), (4, 3), (65,)), torch.bfloat16 if master else torch.float32)
    transposed = [torch.nn.Parameter(param.detach().t()) for param in params]
    options = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    test_low_precision.check_scaled_and_clipped(name, transposed, 0.5, CPU, **options)


@pytest.mark.parametrize("update", test_low_precision.DRAWING)
def test_random_rounding(update: str) -> None:
    test_low_precision.test_both_backends_draw_the_same_numbers(update, "alone")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_in_any_order_of_memory(name: str, dtype: torch.dtype) -> None:
    """Parameters and states transposed, gradients not; an unneeded clip changes nothing."""
    options = {"lr": 0.004, "weight_decay": 0.1, **({"momentum": 0.9} if name == "SGD" else {"eps": 0.01})}
    params = [
        torch.nn.Parameter(param.detach().t()) for param in make_params(((9, 7), (30, 2), (4, 3)), dtype)
    ]
    ours, theirs = pair_over(params, name, shared={"max_norm": 1e6}, **options)
    assert not parameters(ours)[0].is_contiguous()
    assert_same_run(ours, theirs, Feed(params))


def test_chunks_cover_every_element_once() -> None:
    tensors = [torch.arange(float(n)) for n in (0, 3, 25, 1, 7, 10)]
    found = [chunk for batch in multi_tensor.cut(tensors, [5, 0, 1, 2, 3], 10) for chunk in batch]
    assert found == [(5, 0, 10), (1, 0, 3), (2, 0, 10), (2, 10, 20), (2, 20, 25), (3, 0, 1)]
    for batch in multi_tensor.cut(tensors, range(6), 10):
        assert sum(end - start for _, start, end in batch) <= 10
        for chunk, (i, start, end) in zip(multi_tensor.chunks_of(tensors, batch), batch, strict=True):
            assert chunk.tolist() == list(map(float, range(start, end))), i
