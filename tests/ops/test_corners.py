"""Corners of the ops that broke once: each test failed before its fix."""

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import permutations
from typing import Any

import gradkernels
import pytest
import torch
from gradkernels import (
    backend_for,
    backends,
    linear,
    linear_mse_loss,
    linear_mse_loss_and_grad,
    matmul,
    mse_loss,
    mse_loss_and_grad,
    use_backend,
)
from gradkernels.fallback import mse as mse_launchers
from gradkernels.ops import FUNCTIONS, torch_linear_mse_loss
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F  # noqa: N812

from ..cases import LINEAR, LINEAR_MSE, MATMUL, MSE, Case

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors are made where the backend's tensors live."""
    with request.getfixturevalue("device") if "backend" in request.fixturenames else nullcontext():
        yield


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def loss_at(function: Callable[..., Tensor], position: int, tensors: list[Tensor]) -> Callable[..., Tensor]:
    """``function`` of one tensor; the others are captured."""
    return lambda tensor: function(*tensors[:position], tensor, *tensors[position + 1 :])


@pytest.mark.parametrize(("inner", "outer"), list(permutations(range(4), 2)))
def test_torch_func_over_captured_tensors_that_need_gradients(backend: str, inner: int, outer: int) -> None:
    """What the outer level needs of the forward is not what the inner asked for. Equal shapes: no error helps."""
    tensors = [random(2, 2), random(2, 2), random(2, 2), random(2)]
    tensors[outer].requires_grad_()
    results = []
    for function in (linear_mse_loss, torch_linear_mse_loss):
        first = grad(loss_at(function, inner, tensors))(tensors[inner].detach())
        second = torch.autograd.grad((first**2).sum(), tensors[outer])[0]
        value, tangent = jvp(
            loss_at(function, inner, tensors), (tensors[inner],), (tensors[inner].detach().cos(),)
        )
        results.append((first, second, value, tangent, *torch.autograd.grad(tangent, tensors[outer])))
    close(*results)


def test_third_derivative_forward_over_forward_over_reverse(backend: str) -> None:
    """torch's own ops in a jvp, which runs with forward mode off, are for the outer levels to differentiate."""
    tensors = random(3, 2), random(2, 2), random(3, 2), random(2)
    positions = tuple(range(4))

    def third(f: Callable[..., Tensor]) -> Any:
        return jvp(jacfwd(jacrev(f, positions), positions), tensors, tuple(t.cos() for t in tensors))[1]

    close(third(linear_mse_loss), third(lambda x, w, y, b: (x @ w.mT + b - y).square().mean()))


@pytest.mark.parametrize("op", [linear, lambda x, w, b: matmul(x, w.mT, b)])
def test_a_bias_gradient_does_not_share_memory_with_the_upstream_gradient(
    backend: str, op: Callable[..., Tensor]
) -> None:
    """With one row no sum is needed, and ``.grad`` is added to in place."""
    bias, upstream = random(4).requires_grad_(), random(1, 4)
    before = upstream.clone()
    for _ in range(2):
        op(random(1, 3), random(4, 3), bias).backward(upstream)
    close(upstream, before, rtol=0, atol=0)
    close(bias.grad, 2 * before[0])


SERVED = "float64, float32, float16"
REFUSED: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "None": (lambda tensor: None, TypeError, "^{op}: {name} must be a torch.Tensor, got NoneType"),
    "list": (Tensor.tolist, TypeError, "^{op}: {name} must be a torch.Tensor, got list"),
    "device": (
        lambda tensor: tensor.to("meta"),
        RuntimeError,
        r"^{op}: ({name} is on meta but \w+ is on cpu|\w+ is on cpu but {name} is on meta)",
    ),
    "layout": (Tensor.to_sparse, RuntimeError, "^{op}: .*layout torch.sparse_coo"),
    "integers": (Tensor.long, TypeError, f"^{{op}}: {{name}} has dtype torch.int64; {SERVED}"),
    "booleans": (Tensor.bool, TypeError, f"^{{op}}: {{name}} has dtype torch.bool; {SERVED}"),
    "complex": (Tensor.cfloat, TypeError, f"^{{op}}: {{name}} has dtype torch.complex64; {SERVED}"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("op", [name for op in FUNCTIONS.values() for name in op.public])
def test_errors_of_each_argument(op: str, kind: str) -> None:
    case = {"matmul": MATMUL[1], "linear": LINEAR[0], "mse_loss": MSE[3], "linear_mse_loss": LINEAR_MSE[9]}[
        op.removesuffix("_and_grad")
    ]
    change, error, message = REFUSED[kind]
    given = dict(zip(case.shapes, case.arguments(torch.float32), strict=True))
    for name, tensor in given.items():
        if kind != "None" or (name not in ("bias", "sample_weight") and (name, op[:3]) != ("weight", "mse")):
            with pytest.raises(error, match=message.format(op=op, name=name)):
                getattr(gradkernels, op)(**given | {name: change(tensor)})


class Stop(torch.autograd.Function):
    """Passes a tensor on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("case", [MATMUL[1], LINEAR[0], MSE[3], LINEAR_MSE[9]], ids=lambda case: case.op)
def test_no_gradient_comes_back(backend: str, device: torch.device, case: Case) -> None:
    tensors = [tensor.requires_grad_() for tensor in case.arguments(torch.float32, device=device)]
    gradient = partial(torch.autograd.grad, inputs=tensors, allow_unused=True)
    nothing = (None,) * len(tensors)
    assert gradient(Stop.apply(case.ours(*tensors)).sum()) == nothing
    first = torch.autograd.grad(case.ours(*tensors).square().sum(), tensors, create_graph=True)
    assert gradient(torch.stack([Stop.apply(each).sum() for each in first]).sum()) == nothing


def test_no_samples_under_vmap(backend: str) -> None:
    """Where torch's own mse_loss divides by zero."""
    arguments = (random(4, 0, 3), random(4, 2, 3), random(4, 0, 2), random(4, 2))
    gradients = vmap(grad(linear_mse_loss, (0, 1, 2, 3)))(*arguments)
    close(gradients, tuple(map(torch.zeros_like, arguments)))


@pytest.mark.parametrize("shape", [(0, 1, 3), (2, 0, 1, 3), (0, 2, 3)])
def test_bias_gradient_of_an_empty_batch(backend: str, shape: tuple[int, ...]) -> None:
    weight, bias = random(4, 3), random(4).requires_grad_()
    linear(random(*shape), weight, bias).sum().backward()
    close(bias.grad, torch.zeros_like(bias))


def test_loss_and_grad_of_a_negative_view(backend: str) -> None:
    """Its memory holds the values with the opposite sign."""
    input, target = torch.randn(5, dtype=torch.complex64).conj().imag, torch.randn(5)
    assert input.is_neg()
    loss, (gradient, _, _) = mse_loss_and_grad(input, target)
    close(loss, F.mse_loss(input, target))
    close(gradient, 2 * (input - target) / 5)


@pytest.mark.parametrize("negative", [*range(4), "upstream"])
@pytest.mark.parametrize("op", [lambda x, w, y, b: linear(x, w, b), linear_mse_loss])
def test_negative_views_reach_no_kernel(backend: str, op: Callable[..., Tensor], negative: Any) -> None:
    """An operand, an upstream gradient and the direction of a second derivative whose memory has the other sign."""

    def lazily(tensor: Tensor) -> Tensor:
        return torch._neg_view(-tensor.detach()).requires_grad_(tensor.requires_grad)

    tensors = [random(3, 4), random(2, 4), random(3, 2), random(2)]
    upstream = torch.randn_like(op(*tensors))
    results = []
    for lazy in (False, True):
        given = [lazily(t.requires_grad_()) if lazy and negative == i else t for i, t in enumerate(tensors)]
        given = [t.requires_grad_() for t in given]
        output = op(*given)
        grads = torch.autograd.grad(
            output,
            given[:2],
            lazily(upstream) if lazy and negative == "upstream" else upstream,
            create_graph=True,
        )
        directions = [lazily(w) if lazy else w for w in given[:2]]
        results.append((output, *grads, *torch.autograd.grad(grads, given[:2], directions)))
    for plain, other in zip(*results, strict=True):
        close(other, plain)


def test_loss_and_grad_under_transforms(backend: str) -> None:
    x, y, w = random(4, 5), random(4, 5), random(4, 5)

    def both(x: Tensor, y: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loss, (gradient, _, _) = mse_loss_and_grad(x, y, weight=w, reduction="sum")
        assert gradient is not None
        return loss, gradient

    close(vmap(both)(x, y), ((x - y).square().sum(1), 2 * (x - y)))
    close(vmap(both, (-1, None, None), -1)(x, y[:, 0], w[:, 0])[1], 2 * w[:, :1] * (x - y[:, :1]))
    _, (d_loss, d_gradient) = jvp(both, (x, y), (w, torch.zeros_like(y)))
    close(d_loss, (2 * (x - y) * w).sum())
    close(d_gradient, 2 * w)
    assert both(x.to("meta"), y.to("meta"))[1].shape == x.shape


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tangent_of_a_weighted_float16_sum(backend: str, reduction: str) -> None:
    """The mean is in range where the sum of which it is made is not."""
    n = 300
    input, target, weight = (torch.full((n,), value, dtype=torch.float16) for value in (30.0, 0.0, 10.0))
    if reduction == "sum":
        weight /= n
    _, tangent = jvp(
        lambda x: mse_loss(x, target, weight=weight, reduction=reduction),
        (input,),
        (torch.ones_like(input),),
    )
    assert tangent.dtype == torch.float16
    close(tangent.item(), 60.0 if reduction == "mean" else 600.0, rtol=2e-3, atol=0)


def test_a_tangent_that_is_differentiated_has_the_dtype_of_its_loss(backend: str) -> None:
    x = torch.tensor([3.0, 1.0], dtype=torch.bfloat16, requires_grad=True)
    with dual_level():
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = mse_loss(make_dual(x, torch.ones_like(x)), torch.zeros_like(x))
        tangent = unpack_dual(loss).tangent
    assert tangent.dtype == loss.dtype == torch.float32
    close(tangent.item(), 4.0)
    (gradient,) = torch.autograd.grad(tangent, x)
    close(gradient, torch.ones_like(x))


def test_blocks_that_end_out_of_order() -> None:
    """A block in a generator ends with it, and leaves nothing behind."""

    def held() -> Iterator[None]:
        with use_backend("reference"):
            yield

    generator = held()
    next(generator)
    assert backends.current() == "reference"
    with use_backend("fallback"):
        generator.close()
        assert backends.current() == "fallback"
    assert backends.current() == "auto"


def test_one_block_in_two_threads() -> None:
    block, entered, entered_here = use_backend("reference"), threading.Event(), threading.Event()
    seen: list[str] = []

    def first() -> None:
        with block:
            entered.set()
            entered_here.wait(10)
            seen.append(backend_for(random(1)))
        seen.append(backend_for(random(1)))

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with block:
        entered_here.set()
        thread.join()
        seen.append(backend_for(random(1)))
    assert seen == ["reference", "fallback", "reference"]
    assert backend_for(random(1)) == "fallback"


@pytest.mark.parametrize("case", [*MATMUL, *LINEAR, *MSE, *LINEAR_MSE], ids=str)
def test_gradients_accumulate_beside_the_upstream_one(backend: str, device: torch.device, case: Case) -> None:
    """A ``.grad`` that is a view of the upstream gradient would be added to there too."""
    leaves = [tensor.requires_grad_() for tensor in case.arguments(device=device)]
    result = case.ours(*leaves)
    given = torch.randn_like(result)
    upstream = given.clone()
    result.backward(upstream, retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    result.backward(upstream)
    close(upstream, given)
    close([leaf.grad for leaf in leaves], [2 * grad for grad in once])


@pytest.mark.unwatched  # which stands in for torch.empty, and torch.device knows it no more
@pytest.mark.parametrize("name", ["fallback", "reference"])
def test_another_default_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mse_launchers, "_BLOCK", 4)  # three blocks, which share their scratch memory
    monkeypatch.setattr(mse_launchers, "_FEW", 1)
    x, y = random(11), random(11)
    with torch.device("meta"), use_backend(name):
        loss, (gradient, _, _) = mse_loss_and_grad(x, y)
    close(loss, F.mse_loss(x, y))
    close(gradient, 2 * (x - y) / 11)


@pytest.mark.unwatched
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", ["fallback", "reference"])
def test_ragged_rows_beside_another_default_device(name: str, outputs: int) -> None:
    """Their numbers, in rows of some models and of none, are numbers on the tensors' device."""
    x, y, w = random(9, 2), random(9, outputs), random(2, outputs, 2)
    offsets = torch.tensor([1, 5, 8])
    with torch.device("meta"), use_backend(name):
        losses, (_, slopes, _, _) = linear_mse_loss_and_grad(x, w, y, offsets=offsets)
    models = [
        linear_mse_loss_and_grad(x[start:stop], each, y[start:stop])
        for start, stop, each in zip((1, 5), (5, 8), w, strict=True)
    ]
    close(losses, torch.stack([loss for loss, _ in models]))
    close(slopes, torch.stack([slope for _, (_, slope, _, _) in models]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["fallback", "triton", "reference"], indirect=True)
def test_jit_trace_records_the_op(backend: str) -> None:
    """Not the values that it gave while it was traced."""
    weight = random(2, 3).requires_grad_()
    traced = torch.jit.trace(linear, (random(4, 3), weight))
    x = random(5, 3)
    close(traced(x, weight), F.linear(x, weight))
    close(*(torch.autograd.grad(f(x, weight).sum(), weight) for f in (traced, F.linear)))
