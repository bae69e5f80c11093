"""Random shapes, strides, dtypes and values: every case under the memory checker, against the tolerance policy.

Seeded: a run repeats the last one. GRADKERNELS_FUZZ_EXAMPLES sets the number of cases per op (``make fuzz``).
"""

import os

import pytest
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD, linear_mse_loss, matmul, mse_loss, use_backend
from gradkernels.reference import adam, linear_mse, mse, sgd
from gradkernels.reference import matmul as matmul_reference
from gradkernels.verify import memory_check
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from .helpers import DTYPES, assert_matches, to_numpy

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.unwatched,
    pytest.mark.skipif(
        isinstance(triton.language.sum, triton.runtime.JITFunction),
        reason="needs Triton's interpreter (TRITON_INTERPRET=1)",
    ),
]
fuzz = settings(
    max_examples=int(os.environ.get("GRADKERNELS_FUZZ_EXAMPLES", "25")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
SIZES = st.one_of(st.integers(0, 4), st.integers(5, 70), st.sampled_from([63, 64, 65, 127, 128, 129, 200]))
NONZERO = SIZES.filter(bool)
LAYOUTS = st.sampled_from(["contiguous", "contiguous", "transposed", "every other", "offset", "expanded"])
SCALES = st.sampled_from([1.0, 1.0, 1e-3, 30.0, 0.0])


def tensor(draw, shape, dtype, layouts=LAYOUTS):
    """Random values of random size, laid out in memory in a random way."""
    shape, layout = tuple(shape), draw(layouts)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(SCALES)
    if dtype == torch.float16:  # sums of larger numbers overflow, where depends on the order of operations
        scale = min(scale, 1.0)
    made = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(scale).to(dtype)
    if layout == "transposed" and made.ndim > 1:
        return made.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every other" and made.ndim:
        wide = made.new_full((*shape[:-1], 2 * shape[-1]), float("nan"))
        wide[..., ::2] = made
        return wide[..., ::2]
    if layout == "offset":
        flat = made.new_full((made.numel() + 3,), float("nan"))
        flat[3:] = made.reshape(-1)
        return flat[3:].view(shape)
    if layout == "expanded" and made.ndim and shape[0] > 0:
        return made[:1].expand(shape)
    return made


def run(fn, inputs, grad):
    """The value and all gradients, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items() if value is not None}
    output = fn(**{**inputs, **leaves})
    gradients = torch.autograd.grad(output, list(leaves.values()), grad.expand_as(output))
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(ours, theirs, reference):
    """Ours interpreted and watched, against torch's and the reference's results."""
    with use_backend("triton"), memory_check():
        found = ours()
    plain = theirs()
    assert found.keys() == plain.keys()
    for name, value in found.items():
        assert_matches(value, plain[name], reference[name], name)


def referenced(module, inputs, grad, **options):
    """The same from a reference module, whose backward returns gradients in the order of the inputs."""
    arrays = {name: to_numpy(value) for name, value in inputs.items()}
    output = module.forward(**arrays, **options)
    gradients = module.backward(to_numpy(grad.expand(output.shape)), **arrays, **options)
    return {"output": output, **dict(zip(inputs, gradients, strict=True))}


@fuzz
@given(st.data())
def test_matmul(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    m, k, n = (data.draw(SIZES) for _ in range(3))
    batch = data.draw(st.lists(st.integers(1, 3), max_size=2))
    batches = [[1 if data.draw(st.booleans()) else size for size in batch][data.draw(st.integers(0, len(batch))) :]
               for _ in range(2)]  # fmt: skip
    inputs: dict[str, Tensor | None] = {
        "input": tensor(data.draw, (*batches[0], m, k), dtype),
        "other": tensor(data.draw, (*batches[1], k, n), dtype),
        "bias": tensor(data.draw, (n,), dtype) if data.draw(st.booleans()) else None,
    }
    grad = tensor(data.draw, (*torch.broadcast_shapes(*batches), m, n), dtype)

    def plain(input, other, bias):
        product = torch.matmul(input, other)
        return product if bias is None else product + bias

    check(
        lambda: run(matmul, inputs, grad),
        lambda: run(plain, inputs, grad),
        referenced(matmul_reference, inputs, grad),
    )


@fuzz
@given(st.data())
def test_mse(data):
    mse_case(data)


def mse_case(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.lists(SIZES, max_size=2))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    inputs = {
        "input": tensor(data.draw, shape, dtype),
        "target": tensor(data.draw, shape, dtype),
        "weight": tensor(data.draw, shape, dtype)
        if reduction != "mean" and data.draw(st.booleans())
        else None,
    }
    grad = tensor(data.draw, shape if reduction == "none" else (), dtype)

    def plain(input, target, weight):
        if weight is not None:  # torch's has no gradient for the weight
            elementwise = weight * (input - target) ** 2
            return elementwise if reduction == "none" else elementwise.sum()
        return functional.mse_loss(input, target, reduction=reduction)

    check(
        lambda: run(lambda **kw: mse_loss(**kw, reduction=reduction), inputs, grad),
        lambda: run(plain, inputs, grad),
        referenced(mse, inputs, grad, reduction=reduction),
    )


@fuzz
@given(st.data())
def test_mse_twice_differentiated(data):
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    shape = data.draw(st.lists(NONZERO, min_size=1, max_size=2))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    input, target, direction = (tensor(data.draw, shape, dtype) for _ in range(3))
    grad = tensor(data.draw, shape if reduction == "none" else (), dtype)

    def second(loss):
        leaves = [input.detach().requires_grad_(), target.detach().requires_grad_()]
        (first,) = torch.autograd.grad(loss(*leaves, reduction=reduction), leaves[0], grad, create_graph=True)
        names = ("input", "target")
        return dict(zip(names, torch.autograd.grad(first, leaves, direction), strict=True))

    scale = 1 / input.numel() if reduction == "mean" else 1.0
    product = 2 * scale * to_numpy(grad) * to_numpy(direction)
    check(
        lambda: second(mse_loss), lambda: second(functional.mse_loss), {"input": product, "target": -product}
    )


@fuzz
@given(st.data())
def test_linear_mse(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    n, d = data.draw(SIZES), data.draw(SIZES)
    k = data.draw(st.sampled_from([1, 1, 1, 2, 3, 8, 9, 33]))
    reduction = data.draw(st.sampled_from(["mean", "sum"]))
    inputs = {
        "input": tensor(data.draw, (n, d), dtype),
        "weight": tensor(data.draw, (k, d), dtype),
        "target": tensor(data.draw, (n, k), dtype),
        "bias": tensor(data.draw, (k,), dtype) if data.draw(st.booleans()) else None,
    }
    grad = tensor(data.draw, (), dtype)

    def plain(input, weight, target, bias):
        return functional.mse_loss(functional.linear(input, weight, bias), target, reduction=reduction)

    arrays = {name: to_numpy(value) for name, value in inputs.items()}
    gradients = linear_mse.backward(to_numpy(grad), **arrays, reduction=reduction)
    reference = dict(zip(inputs, gradients, strict=False))
    reference["output"] = linear_mse.forward(**arrays, reduction=reduction)
    check(
        lambda: run(lambda **kw: linear_mse_loss(**kw, reduction=reduction), inputs, grad),
        lambda: run(plain, inputs, grad),
        reference,
    )


RATES = st.sampled_from([0.0, 0.01, 0.1])
ADAM = st.fixed_dictionaries(
    {"lr": RATES, "weight_decay": RATES, "amsgrad": st.booleans(), "maximize": st.booleans()}
)
SGD = st.fixed_dictionaries(
    {"lr": RATES, "weight_decay": RATES, "momentum": st.sampled_from([0.0, 0.9]), "maximize": st.booleans()}
)


@fuzz
@given(st.data())
def test_optimizers(data):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    ours, theirs, options, step = data.draw(
        st.one_of(
            st.tuples(st.just(FusedSGD), st.just(torch.optim.SGD), SGD, st.just(sgd.step)),
            st.tuples(st.just(FusedAdam), st.just(torch.optim.Adam), ADAM, st.just(adam.step)),
            st.tuples(st.just(FusedAdamW), st.just(torch.optim.AdamW), ADAM, st.just(adam.step)),
        )
    )
    shapes = data.draw(st.lists(st.lists(SIZES, max_size=2), min_size=1, max_size=4))
    layouts = LAYOUTS.filter(lambda layout: layout != "expanded")
    values = [tensor(data.draw, shape, dtype, layouts) for shape in shapes]
    steps = [[tensor(data.draw, shape, dtype) for shape in shapes] for _ in range(2)]

    def stepped(make, **more):
        # clone() keeps the strides of what is dense: a copy may not overlap itself.
        params = [value.clone().requires_grad_() for value in values]
        optimizer = make(params, **options, **more)
        for grads in steps:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
        state = [
            (f"{key} {i}", value) for i, p in enumerate(params) for key, value in optimizer.state[p].items()
        ]
        found = {f"param {i}": param.detach() for i, param in enumerate(params)}
        return found | {
            name: value for name, value in state if isinstance(value, Tensor) and "step" not in name
        }

    more = {"decoupled_weight_decay": True} if ours is FusedAdamW else {}
    reference = {}
    for i, value in enumerate(values):
        new, state = to_numpy(value), None
        for grads in steps:
            new, state = step(new, to_numpy(grads[i]), state, **options, **more)
        reference |= {f"param {i}": new, **{f"{key} {i}": array for key, array in (state or {}).items()}}
    check(lambda: stepped(ours), lambda: stepped(theirs, foreach=False), reference)


def test_the_fuzzer_finds_a_planted_fault(monkeypatch):
    """A backward that is wrong for odd sizes only."""
    import gradkernels.triton.mse as launchers

    original = launchers.mse_backward

    def faulty(grad_output, input, *rest):
        found = original(grad_output, input, *rest)
        return [grad * 2 for grad in found] if input.numel() % 2 else found

    monkeypatch.setattr(launchers, "mse_backward", faulty)
    with pytest.raises(AssertionError, match="OVER the budget"):
        settings(fuzz, phases=[Phase.generate])(given(st.data())(mse_case))()
