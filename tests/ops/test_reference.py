"""The NumPy references against two oracles that share no formula with them.

``reference.scalar`` computes each output by loops over numbers and its gradients by walking the graph;
centered finite differences need no derivative at all. torch's float64 result sets the budget of the first.
"""

import doctest
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import (
    FusedAdam,
    FusedAdamW,
    FusedSGD,
    linear,
    linear_mse_loss_and_grad,
    mse_loss,
    use_backend,
)
from gradkernels.ops import torch_linear_mse_loss, torch_matmul, torch_mse_loss
from gradkernels.reference import linear_mse, matmul, mse
from gradkernels.reference.scalar import Value

from ..cases import LINEAR_MSE_SHAPES, MATMUL_SHAPES, REDUCTIONS
from ..helpers import assert_matches, finite_differences

ZERO_SIZES = [((2, 0), (0, 3)), ((0, 2), (2, 3)), ((0, 2, 3), (1, 3, 2))]


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal numbers that nothing can write to: a reference that writes into its inputs fails."""
    array = np.asarray(rng.standard_normal(shape))
    array.flags.writeable = False
    return array


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    array = np.asarray(rng.uniform(0.5, 2.0, shape))
    array.flags.writeable = False
    return array


def scalar_matmul(input: np.ndarray, other: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    rows = input if input.ndim > 1 else input[None, :]
    columns = other if other.ndim > 1 else other[:, None]
    batch = np.broadcast_shapes(rows.shape[:-2], columns.shape[:-2])
    rows = np.broadcast_to(rows, batch + rows.shape[-2:])
    columns = np.broadcast_to(columns, batch + columns.shape[-2:])
    output = np.empty((*batch, rows.shape[-2], columns.shape[-1]), dtype=object)
    for *b, m, n in np.ndindex(output.shape):
        output[(*b, m, n)] = Value(0.0) if bias is None else bias.flat[n] * 1.0
        for k in range(rows.shape[-1]):
            output[(*b, m, n)] += rows[(*b, m, k)] * columns[(*b, k, n)]
    squeezed = tuple(axis for axis, operand in ((-2, input), (-1, other)) if operand.ndim == 1)
    return output.squeeze(squeezed)


def scalar_mse(
    input: np.ndarray, target: np.ndarray, weight: np.ndarray | None = None, *, reduction: str
) -> np.ndarray:
    loss = np.empty(input.shape, dtype=object)
    total_weight = Value(0.0)
    for i in np.ndindex(input.shape):
        one = Value(1.0) if weight is None else weight[i]
        loss[i] = one * (input[i] - target[i]) ** 2
        total_weight += one
    if reduction == "none":
        return loss
    total = sum(loss.flat, Value(0.0))
    return np.array(total / total_weight if reduction == "mean" else total, dtype=object)


def scalar_linear_mse(
    input: np.ndarray,
    weight: np.ndarray,
    target: np.ndarray,
    bias: np.ndarray | None = None,
    sample_weight: np.ndarray | None = None,
    *,
    reduction: str,
) -> np.ndarray:
    prediction = scalar_matmul(input, weight.T, bias)
    if sample_weight is not None and sample_weight.ndim < prediction.ndim:
        sample_weight = np.broadcast_to(sample_weight[..., None], prediction.shape)
    return scalar_mse(prediction, target, sample_weight, reduction=reduction)


def check(
    module: object,
    scalar: Callable,
    theirs: Callable,
    rng: np.random.Generator,
    *arrays: np.ndarray | None,
    **options: str,
) -> None:
    """Forward and backward of a reference against the scalar engine and against finite differences."""
    output = module.forward(*arrays, **options)
    grad_output = random(rng, *output.shape)
    grads = module.backward(grad_output, *arrays, **options)
    assert [grad is None for grad in grads] == [array is None for array in arrays[: len(grads)]]

    leaves = [
        None if array is None else np.array(np.vectorize(Value, otypes=[object])(array)) for array in arrays
    ]
    nodes = scalar(*leaves, **options)
    sum((g * node for g, node in zip(grad_output.flat, nodes.flat, strict=True)), Value(0.0)).backward()

    tensors = [None if array is None else torch.tensor(array, requires_grad=True) for array in arrays]
    torch_output = theirs(*tensors, **options)
    torch_output.backward(torch.tensor(grad_output))

    assert_matches(torch.from_numpy(output), torch_output, numbers(nodes, "data"), "forward")
    for i, (grad, leaf, tensor) in enumerate(zip(grads, leaves, tensors, strict=True)):
        if grad is not None:
            assert_matches(
                torch.from_numpy(grad), tensor.grad, numbers(leaf, "grad"), f"gradient of argument {i}"
            )

    def objective(*values: np.ndarray | None) -> float:
        return float((grad_output * module.forward(*values, **options)).sum())

    for i, grad in enumerate(grads):
        if grad is not None:
            slope = finite_differences(lambda x, i=i: objective(*arrays[:i], x, *arrays[i + 1 :]), arrays[i])
            # The tolerances of torch.autograd.gradcheck.
            np.testing.assert_allclose(grad, slope, rtol=1e-3, atol=1e-5, err_msg=f"gradient of argument {i}")


def numbers(nodes: np.ndarray, name: str) -> np.ndarray:
    return np.vectorize(lambda node: getattr(node, name), otypes=[float])(nodes)


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("input_shape", "other_shape"), [*MATMUL_SHAPES, *ZERO_SIZES], ids=str)
def test_matmul(input_shape: tuple[int, ...], other_shape: tuple[int, ...], with_bias: bool) -> None:
    rng = np.random.default_rng(0)
    columns = other_shape[-1] if len(other_shape) > 1 else 1
    bias = random(rng, columns) if with_bias else None
    check(
        matmul, scalar_matmul, torch_matmul, rng, random(rng, *input_shape), random(rng, *other_shape), bias
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_mse(shape: tuple[int, ...], reduction: str, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    weight = weights(rng, *shape) if weighted else None
    if 0 in shape and reduction == "mean":
        assert np.isnan(mse.forward(random(rng, *shape), random(rng, *shape), weight))
        for grad in mse.backward(1.0, random(rng, *shape), random(rng, *shape), weight):
            assert grad is None or grad.shape == shape
        return
    check(
        mse,
        scalar_mse,
        torch_mse_loss,
        rng,
        random(rng, *shape),
        random(rng, *shape),
        weight,
        reduction=reduction,
    )


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shapes", LINEAR_MSE_SHAPES, ids=str)
def test_linear_mse(shapes: tuple, reduction: str, with_bias: bool) -> None:
    rng = np.random.default_rng(0)
    input_shape, weight_shape, target_shape, sample_weight_shapes = shapes
    arrays = [random(rng, *input_shape), random(rng, *weight_shape), random(rng, *target_shape)]
    bias = random(rng, weight_shape[0] if len(weight_shape) > 1 else 1) if with_bias else None
    for sample_weight in (None, *(weights(rng, *shape) for shape in sample_weight_shapes)):
        check(
            linear_mse,
            scalar_linear_mse,
            torch_linear_mse_loss,
            rng,
            *arrays,
            bias,
            sample_weight,
            reduction=reduction,
        )


def test_results_are_float64_whatever_comes() -> None:
    half = np.array([[1, 2], [3, 4]], dtype=np.float16)
    results = [
        matmul.forward(half, half),
        *matmul.backward(half, half, half, half[0]),
        mse.forward(half, half),
        *mse.backward(1, half, half, half),
        linear_mse.forward(half, half, half),
        *linear_mse.backward(1, half, half, half, half[0], half[0]),
    ]
    assert {result.dtype for result in results} == {np.dtype(np.float64)}


def test_mismatched_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target must have input's shape \(3, 1\), got \(3,\)"):
        mse.forward(np.ones((3, 1)), np.ones(3))
    with pytest.raises(ValueError, match=r"weight \(2,\) does not broadcast to input's shape \(3,\)"):
        mse.backward(1.0, np.ones(3), np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match=r"target must have input's shape \(4, 1\), got \(4,\)"):
        linear_mse.forward(np.ones((4, 3)), np.ones((1, 3)), np.ones(4))
    with pytest.raises(ValueError, match=r"weight \(3,\) does not broadcast to input's shape \(4,\)"):
        linear_mse.forward(np.ones((4, 3)), np.ones(3), np.ones(4), sample_weight=np.ones(3))
    with pytest.raises(ValueError, match="matmul"):
        matmul.forward(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="reshape"):
        matmul.forward(np.ones((2, 3)), np.ones((3, 4)), np.ones(1))


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="median is not a valid value for reduction"):
        mse.forward([1.0], [1.0], reduction="median")


@pytest.mark.parametrize("dim", [2, -3, (0, 0), (1, -1)], ids=str)
def test_a_dimension_that_is_not_there_or_named_twice_is_refused(dim: Any) -> None:
    x, y = np.ones((2, 3)), np.zeros((2, 3))
    with pytest.raises(ValueError, match="axis"):
        mse.forward(x, y, dim=dim)
    with pytest.raises(ValueError, match="axis"):
        mse.backward(np.ones(3), x, y, dim=dim)
    assert mse.forward(x, y, dim=-2).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="axis"):
        mse.forward(1.0, 2.0, dim=dim)
    assert mse.forward(1.0, 2.0, dim=-1) == 1


def test_nonfinite_numbers_travel_without_a_warning() -> None:
    infinite = [[np.inf, 1.0]]
    assert np.isnan(mse.forward(infinite, infinite))
    assert np.isnan(matmul.forward(infinite, [[0.0], [1.0]])).all()
    assert np.isnan(mse.forward([1.0], [2.0], [0.0]))
    assert np.isposinf(linear_mse.forward(infinite, [[1.0, 1.0]], [[0.0]]))


OPERATIONS = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    lambda a, b: a / b,
    lambda a, b: a**3 - b**-1.5,
    lambda a, b: -a * b,
    lambda a, b: 2 + a * (3 - b),
    lambda a, b: 2 * a + 1 / b,
    lambda a, b: (a * b + a) * (a * b - b) / (a + b) ** 2,
    lambda a, b: a * a * a + b * 0 + a**0,
]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_scalar_engine_agrees_with_torch(operation: Callable) -> None:
    a, b = Value(1.25), Value(0.7)
    result = operation(a, b)
    result.backward()
    x, y = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.25, 0.7))
    expected = operation(x, y)
    expected.backward()
    assert (result.data, a.grad, b.grad) == pytest.approx(
        (expected.item(), x.grad.item(), y.grad.item()), rel=1e-14
    )


def test_scalar_engine_adds_up_over_paths_and_calls() -> None:
    a = Value(3)
    square = a * a
    total = square + square * a
    total.backward()
    assert (total.data, a.grad, square.grad) == (36.0, 33.0, 4.0)
    total.backward()
    assert (a.grad, square.grad, total.grad) == (66.0, 8.0, 2.0)
    a.grad = 0.0
    total.backward()
    assert a.grad == 33.0


def test_scalar_engine_follows_long_chains() -> None:
    a = total = Value(1.0)
    for _ in range(20_000):
        total = total + a
    total.backward()
    assert a.grad == 20_001.0


def test_scalar_engine_refuses_what_it_cannot_differentiate() -> None:
    with pytest.raises(TypeError, match="exponent must be a number, not Value"):
        Value(2.0) ** Value(3.0)


def test_scalar_engine_power_at_zero() -> None:
    zero = Value(0.0)
    (zero**0 + zero**1 + zero**2).backward()
    assert zero.grad == 1.0


@pytest.mark.parametrize("name", ["linear_mse", "matmul", "mse", "scalar"])
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"gradkernels.reference.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


OPTIMIZERS = [
    (FusedSGD, {"lr": 0.1}),
    (FusedSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01, "maximize": True}),
    (FusedSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "max_norm": 0.5, "on_nonfinite": "skip"}),
    (FusedSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "master_weights": True}),
    (FusedAdam, {"lr": 0.1, "weight_decay": 0.1, "max_norm": 0.5}),
    (FusedAdam, {"lr": 0.1, "amsgrad": True, "maximize": True, "on_nonfinite": "skip"}),
    (FusedAdamW, {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3, "master_weights": True}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("optimizer", "options"), OPTIMIZERS, ids=lambda v: "-".join(v) if isinstance(v, dict) else v.__name__
)
def test_reference_backend_serves_the_optimizers(
    optimizer: type[torch.optim.Optimizer], options: dict[str, object], dtype: torch.dtype
) -> None:
    """Ten steps under a loss scale, two of them with a NaN if that is skipped, beside the fallback's."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4), (5,), ())]
    grads = [[torch.randn(p.shape, generator=generator).to(dtype) for p in start] for _ in range(10)]
    if options.get("on_nonfinite") == "skip":
        grads[0][1][2] = grads[4][0][1, 1] = math.nan

    def outcome(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        params = [p.to(dtype, copy=True).requires_grad_() for p in start]
        stepper = optimizer(params, **options)
        norms = []
        with use_backend(backend):
            for row in grads:
                for param, grad in zip(params, row, strict=True):
                    param.grad = (4 * grad).to(dtype)
                stepper.grad_scale, stepper.found_inf = torch.tensor(4.0), torch.tensor(0.0)
                stepper.step()
                norms.append(stepper.grad_norm)
        results = {"parameters": params, "gradients": [p.grad for p in params]}
        results |= {key: [stepper.state[p][key] for p in params] for key in stepper.state[params[0]]}
        if norms[0] is not None:
            results["norms"] = norms
        results["steps skipped"] = [torch.tensor(stepper.steps_skipped, dtype=torch.float64)]
        return {name: torch.cat([t.detach().ravel() for t in tensors]) for name, tensors in results.items()}

    ours, theirs, exact = (
        outcome(*way) for way in (("reference", dtype), ("fallback", dtype), ("fallback", torch.float64))
    )
    assert set(ours) == set(theirs)
    for name, result in ours.items():
        exactly = exact[name.replace("master_param", "parameters")]
        assert_matches(result, theirs[name], exactly.double().numpy(), name)


def test_reference_backend_refuses_stochastic_rounding() -> None:
    param = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    param.grad = torch.ones_like(param)
    with use_backend("reference"), pytest.raises(RuntimeError, match="no stochastic rounding"):
        FusedSGD([param], lr=0.1, stochastic_rounding=True).step()


def test_reference_backend_takes_infinity_without_a_warning() -> None:
    x = torch.tensor([[math.inf, 1.0]])
    with use_backend("reference"):
        assert linear(x, torch.ones(1, 2), torch.tensor([-math.inf])).isnan().all()
        _, (gradient, _, _, _) = linear_mse_loss_and_grad(
            x, torch.tensor([[1.0, 0.0]]), torch.ones(1, 1), wrt=("input",)
        )
    assert gradient is not None
    assert gradient.isinf().tolist() == [[True, False]]


def test_reference_backend_differentiates_twice_without_cancellation() -> None:
    """Along a direction 10^9 times as large as the point."""
    x, w = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1e-3, 0.5))
    along = (torch.tensor(1e6, dtype=torch.float64), torch.tensor(3e6, dtype=torch.float64))
    with use_backend("reference"):
        loss = mse_loss(x, torch.zeros_like(x), weight=w, reduction="sum")
        found = torch.autograd.grad(loss, (x, w), create_graph=True)
        slopes = torch.autograd.grad(found, (x, w), along)
    expected = 2 * 0.5 * 1e6 + 2 * 1e-3 * 3e6, 2 * 1e-3 * 1e6  # of w x^2
    torch.testing.assert_close([slope.item() for slope in slopes], list(expected), rtol=1e-14, atol=0)
