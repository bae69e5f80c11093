"""What can be known about MPS without one: the fallback calls nothing that torch lacks there, and no float64."""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD
from gradkernels.fallback import linear_mse, linear_mse_models, matmul, mse
from gradkernels.reference import launchers
from gradkernels.verify import gradcheck
from gradkernels.verify.tolerance import exactly
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..helpers import Operators

N, D, K = 6, 4, 3
LISTS = Path(torch.__file__).parent / "testing" / "_internal" / "common_mps.py"  # its import needs expecttest


def _missing_on_mps() -> frozenset[str]:
    """The names in torch's own list of what is not implemented on MPS for any dtype."""
    tree = ast.parse(LISTS.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "").startswith(
            "UNIMPLEMENTED_XFAILLIST"
        ):
            assert isinstance(node.value, ast.Dict)
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(value, ast.Constant) and value.value is None:
                    assert isinstance(key, ast.Constant)
                    names.add(key.value.removeprefix("nn.functional.").replace(".", "_"))
    return frozenset(names)


@contextmanager
def _as_on_mps(float64: bool = False) -> Iterator[None]:
    with Operators() as asked:
        yield
    assert asked.calls, "nothing was called"
    missing = {name for name, _, _ in asked.calls} & _missing_on_mps()
    assert not missing, f"torch lacks {sorted(missing)} on MPS"
    leaves = tree_leaves([result for _, _, result in asked.calls])
    dtypes = {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
    assert float64 or torch.float64 not in dtypes, "MPS has no float64"


def _linear_mse(make: Callable[..., torch.Tensor]) -> None:
    x, w, y, b, s = make(N, D), make(K, D), make(N, K), make(K), make(N, 1).expand(N, K)
    for samples in (None, s):
        for reduction in ("mean", "sum"):
            linear_mse.linear_mse_forward(x, w, y, b, samples, reduction, [True] * 3, x.dtype)
    linear_mse.linear_mse_backward(make(), y, w, 0.5, [True, True])


def _matmul(make: Callable[..., torch.Tensor]) -> None:
    left, right = make(2, N, D), make(2, D, K)
    matmul.matmul_forward(left, right, None, [], left.dtype)
    matmul.matmul_forward(left, right[0], make(K), [], left.dtype)
    matmul.matmul_forward(left, right, make(1, N, K), [0], left.dtype)
    matmul.matmul_forward(left, right, make(K), [], torch.float32)


def _mse(make: Callable[..., torch.Tensor]) -> None:
    x, y, w = make(N, D), make(N, D), make(N, D)
    for weight in (None, w):
        for reduction, kept in (("mean", 0), ("sum", 1), ("none", 0)):
            grad = make(N, D) if reduction == "none" else make(N)[0] if kept == 0 else make(N)
            mse.mse_forward(x, y, weight, reduction, kept, x.dtype)
            mse.mse_backward(grad, x, y, weight, reduction, kept, [True, True, weight is not None])
            tangents = (grad, x, y, weight)
            mse.mse_hvp(
                grad, x, y, weight, *tangents, reduction, kept, [True, True, True, weight is not None]
            )
        total = None if weight is None else weight.sum()
        mse.mse_forward_backward(x, y, weight, total, "sum", [True, True, weight is not None], x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta takes the branches of a device that is not the CPU
@pytest.mark.parametrize("launchers", [_matmul, _mse, _linear_mse])
def test_the_fallback_calls_only_what_mps_has(
    launchers: Callable[..., None], device: str, dtype: torch.dtype
) -> None:
    def make(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    with _as_on_mps():
        launchers(make)


class _Mps(torch.Tensor):
    """A tensor of the CPU that says it lies on MPS."""

    is_cpu = False
    device = property(lambda self: torch.device("mps"))


class _MadeOnMps(TorchFunctionMode):
    """Makes on the CPU what is asked for on MPS."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if given.get("device") != torch.device("mps"):
            return func(*args, **given)
        return func(*args, **{**given, "device": "cpu"}).as_subclass(_Mps)


@pytest.mark.parametrize("sizes", [(2, 4), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("cuts", [None, (0, 4, 4, 9), (2, 3, 9, 11), (5, 5, 5, 5)], ids=str)
def test_batches_of_models_on_mps(cuts: tuple[int, ...] | None, sizes: tuple[int, int]) -> None:
    """Rows of their own or ragged ones: the values are those of the CPU, where other ways are taken."""
    outputs, inputs = sizes
    shape, bounds = ((3, 5), None) if cuts is None else ((12,), torch.tensor(cuts).unfold(0, 2, 1))
    x, y, s = (torch.randn(*shape, columns) for columns in (inputs, outputs, outputs))
    w, b = torch.randn(3, outputs, inputs), torch.randn(3, outputs)
    given = x, w, y, b, s, bounds
    there = [None if tensor is None else tensor.as_subclass(_Mps) for tensor in given]
    for reduction in ("mean", "sum"):
        options = reduction, [True] * 3, torch.float32
        with _as_on_mps(), _MadeOnMps():
            found = linear_mse_models.linear_mse_models_forward(*there, *options)
        plain = [tensor.as_subclass(torch.Tensor) for tensor in found]
        expected = linear_mse_models.linear_mse_models_forward(*given, *options)
        torch.testing.assert_close(plain, expected, equal_nan=True)


class _Copies(TorchDispatchMode):
    """Refuses what torch does not do from MPS: a copy into float64 of another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            assert given.get("dtype") != torch.float64 or given.get("device") is None
        return func(*args, **given)


def test_values_are_widened_on_the_cpu() -> None:
    x, y = torch.randn(2, 5)
    with _Copies():
        assert (exactly(x) == x.numpy()).all()
        loss, *_ = launchers.mse_forward_backward(x, y, None, None, "sum", [True, False, False], x.dtype)
    torch.testing.assert_close(loss, (x - y).square().sum())


class _OnMps(torch.Tensor):
    """A tensor of the CPU that refuses float64 until it is copied there."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        named = [arg for arg in (*args, *given.values()) if isinstance(arg, torch.dtype)]
        if func is torch.Tensor.double or torch.float64 in named:
            raise TypeError("no float64")
        result = super().__torch_function__(func, types, args, given)
        return result.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else result


@pytest.mark.parametrize(
    ("factor", "said"), [(None, "passed"), (2.0, "passed"), (1.0, "the 2 of the square")]
)
def test_gradcheck_without_float64(factor: float | None, said: str) -> None:
    x, y = (torch.randn(shape).as_subclass(_OnMps) for shape in ((8, 3), (8,)))
    w = torch.randn(3).as_subclass(_OnMps).requires_grad_()

    def by_hand(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return factor * x.T @ (x @ w - y) / len(y)

    report = gradcheck(
        lambda w, x, y: (x @ w - y).square().mean(), (w, x, y), gradient=None if factor is None else by_hand
    )
    assert bool(report) is (said == "passed")
    assert said in str(report)
    assert "does not run on float64 copies" in str(report)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (FusedSGD, {}),
        (FusedSGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (FusedAdam, {"amsgrad": True}),
        (FusedAdamW, {"maximize": True}),
        (FusedSGD, {"stacked": True, "lr_scale": torch.tensor([0.5, 2.0]), "momentum": 0.9}),
        (FusedAdamW, {"stacked": True, "lr_scale": torch.tensor([0.5, 2.0]), "amsgrad": True}),
    ],
)
def test_a_step_calls_only_what_mps_has(
    cls: type[torch.optim.Optimizer], options: dict[str, Any], clipped: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((2,), (2, 5))]
        guard = {"max_norm": 1.0, "on_nonfinite": "skip"} if clipped else {}
        optimizer = cls(params, lr=0.1, **options, **guard)
        # The sums of squares are in float64 on the CPU, and by the device's type in float32 on MPS.
        with _as_on_mps(float64=clipped):
            for _ in range(2):
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()


def test_the_check_sees_a_missing_operator_and_float64() -> None:
    with pytest.raises(AssertionError, match="ormqr"), _as_on_mps():
        torch.ormqr(torch.ones(2, 2), torch.ones(2), torch.ones(2, 2))
    with pytest.raises(AssertionError, match="float64"), _as_on_mps():
        torch.ones(2).double()
