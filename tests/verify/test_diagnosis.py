"""Mistakes of backwards written by hand: each is named, in the terms of the operator that it is made in."""

import math

import pytest
import torch
from gradkernels.verify import GradientReport, gradcheck
from torch import Tensor

from .functions import function

F64 = torch.float64
DTYPES = (F64, torch.float32, torch.bfloat16, torch.float16)
softplus = torch.nn.functional.softplus


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def texts(report: GradientReport) -> str:
    found = [*report.diagnoses, *(d for entry in report.inputs for d in entry.diagnoses)]
    return "\n".join(str(diagnosis) for diagnosis in found)


# The upstream gradient

UPSTREAM = {
    "mse": (lambda p, t: (p - t).square().mean(), lambda g, p, t: (2 * (p - t) / p.numel(), None), "multiplied"),
    "sum of squares, absolute value": (
        lambda p, t: (p - t).square().sum(), lambda g, p, t: (2 * (p - t) * g.abs(), None), "absolute value",
    ),
    "squared": (lambda p, t: (p * t).sum(), lambda g, p, t: (t * g * g, None), "square"),
    "one only": (
        lambda p, t: (p * t).sum(), lambda g, p, t: (t * (1.0 if bool(g) else 0.0), None), "same gradient",
    ),
    "rows": (lambda p, t: (p * t).sum(1), lambda g, p, t: (t.clone(), None), "multiplied"),
    "added": (lambda p, t: (p * t).sum(), lambda g, p, t: (t * (g - 1) + t, None), None),
    "strides": (
        lambda p, t: p * t, lambda g, p, t: (t * g.as_strided(p.shape, p.stride()), None), "transposed memory",
    ),
    "row stride": (
        lambda p, t: p * t,
        lambda g, p, t: (t * (g.as_strided(p.shape, p.stride()) if g.stride(-1) == 1 else g), None),
        "padded memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", UPSTREAM)
def test_upstream_gradient(fault, dtype):
    forward, backward, words = UPSTREAM[fault]
    inputs = randn(5, 3).to(dtype).requires_grad_(), randn(5, 3, seed=4).to(dtype)
    report = gradcheck(function(forward, backward), inputs)
    assert report.passed == (words is None), report
    assert words is None or words in texts(report)
    assert words is None or "grad_output" in report.names[0]


def test_the_upstream_gradient_of_one_output_of_two():
    def forward(x, y):
        return (x * y).sum(), x.square()

    report = gradcheck(
        function(forward, lambda g, h, x, y: (y + 2 * x * h, None)),
        (randn(4).requires_grad_(), randn(4, seed=1)),
    )
    assert report.names[0] == "not multiplied by grad_output"
    assert "multiplied by grad_output of output 0" in texts(report)
    report = gradcheck(
        function(forward, lambda g, h, x, y: (g * y + 2 * x * h.abs() * h.sign(), None)),
        (randn(4).requires_grad_(), randn(4, seed=1)),
    )
    assert report, report


def test_a_backward_may_refuse_an_upstream_gradient_that_is_not_contiguous():
    def backward(g, x):
        assert g.is_contiguous()
        return 2 * x * g

    report = gradcheck(function(torch.square, backward), randn(4, 3).requires_grad_())
    assert report, report
    assert "in padded memory (refused: AssertionError)" in str(report.tried)
    assert "memory" not in str(gradcheck(lambda x: x.square().sum(), randn(4, 3)).tried)


def test_sums_in_another_order_where_few_elements_are_differenced():
    scale = torch.ones(1000, 1)
    scale[[3, 500]] = 1e6
    shift = torch.randn(1000, 300, generator=torch.Generator().manual_seed(3))
    report = gradcheck(
        lambda x: x * scale.to(x) + shift.to(x), randn(1000, 1).float().requires_grad_(), max_elements=16
    )
    assert report, report


def test_an_input_that_is_written_where_the_upstream_gradient_is_not_contiguous():
    def backward(g, x):
        if not g.is_contiguous():
            x.detach().zero_()
        return 2 * x * g

    report = gradcheck(function(torch.square, backward), randn(4, 3).requires_grad_())
    assert report.names == ("mutated input",), report


def test_differences_that_fail_are_not_blamed_on_the_upstream_gradient():
    report = gradcheck(lambda x: x.exp(), torch.full((3,), -torch.inf))
    assert math.isnan(report.inputs[0].tolerance)
    assert not any("grad_output" in name for name in report.names), report


# One wrong derivative, inside a function or by hand

ACTIVATIONS = {
    "tanh": (torch.tanh, lambda z, y: 1, "the derivative of tanh, 1 - tanh(z)^2, is missing"),
    "sigmoid": (torch.sigmoid, lambda z, y: 1, "the derivative of sigmoid"),
    "sigmoid of z": (torch.sigmoid, lambda z, y: z * (1 - z), "z (1 - z) stands for"),
    "tanh of z": (torch.tanh, lambda z, y: 1 - z * z, "1 - z^2 stands for"),
    "sigmoid twice": (torch.sigmoid, lambda z, y: y.sigmoid() * (1 - y.sigmoid()), "taken at the output"),
    "half a sigmoid": (torch.sigmoid, lambda z, y: y, "lacks 1 - y"),
    "gelu": (torch.nn.functional.gelu, lambda z, y: 1, "the derivative of gelu"),
    "silu": (torch.nn.functional.silu, lambda z, y: z.sigmoid() * 0 + 1, "the derivative of silu"),
    "softplus": (softplus, lambda z, y: 1, "the derivative of softplus, sigmoid(z), is missing"),
    "relu": (torch.relu, lambda z, y: 1, "the mask z > 0 of relu is missing"),
    "clamp": (lambda z: z.clamp(-0.5, 0.5), lambda z, y: 1, "the mask min < z < max of clamp is missing"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", ACTIVATIONS)
def test_activation(fault, dtype):
    forward, slope, words = ACTIVATIONS[fault]
    wrong = function(forward, lambda g, z: g * slope(z, forward(z)))
    report = gradcheck(wrong, randn(5, 7).to(dtype))
    name = "mask" if "mask" in words else "activation derivative"
    assert report.names[0] == name, report
    assert words in texts(report)


@pytest.mark.parametrize("fault", ACTIVATIONS)
def test_activation_of_a_hidden_layer(fault):
    """By hand, in a network: the fault is two products away from the input and from the loss."""
    activation, slope, words = ACTIVATIONS[fault]
    x, w, v, t = randn(6, 3), randn(3, 4, seed=1), randn(4, 2, seed=2), randn(6, 2, seed=5)

    def loss(w, x, v, t):
        return (activation(x @ w) @ v - t).square().mean()

    def gradient(w, x, v, t):
        z = x @ w
        y = activation(z)
        return x.T @ (2 / t.numel() * (y @ v - t) @ v.T * slope(z, y))

    report = gradcheck(loss, (w.requires_grad_(), x, v, t), gradient=gradient)
    assert report.names[0] == ("mask" if "mask" in words else "activation derivative"), report
    assert words in texts(report)


def test_mask_of_dropout():
    keep = (randn(5, 7, seed=8) > 0).double()
    report = gradcheck(function(lambda x: x.exp() * keep, lambda g, x: g * x.exp()), randn(5, 7))
    assert report.names[0] == "mask"
    assert "the mask that mul applies is missing" in texts(report)


SOFTMAX = {
    "diagonal": (lambda g, s: g * s * (1 - s), "off-diagonal terms", "only the diagonal of the Jacobian of softmax"),
    "no sum": (lambda g, s: g * s, "off-diagonal terms", "the term s sum(s g)"),
    "axis": (lambda g, s: s * (g - (s * g).sum(0, keepdim=True)), "wrong axis", "runs over dimension 0"),
    "missing": (lambda g, s: g.clone(), "activation derivative", "the derivative of softmax is missing"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", SOFTMAX)
def test_softmax(fault, dtype):
    backward, name, words = SOFTMAX[fault]
    wrong = function(lambda x: x.softmax(-1), lambda g, x: backward(g, x.softmax(-1)))
    report = gradcheck(wrong, randn(5, 7).to(dtype))
    assert report.names[0] == name, report
    assert words in texts(report)


def test_log_softmax_and_layer_norm():
    wrong = function(lambda x: x.log_softmax(-1), lambda g, x: g - x.softmax(-1) * g.sum(0, keepdim=True))
    report = gradcheck(wrong, randn(5, 7))
    assert report.names[0] == "wrong axis", report

    def norm(x):
        return torch.nn.functional.layer_norm(x, (7,))

    wrong = function(norm, lambda g, x: g / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt())
    report = gradcheck(wrong, randn(5, 7))
    assert report.names[0] == "off-diagonal terms", report


def test_reduction_over_the_wrong_axis():
    wrong = function(lambda x: x.sum(1), lambda g, x: g[None, :].expand_as(x))
    report = gradcheck(wrong, randn(5, 5))
    assert report.names[0] == "wrong axis", report
    assert "over dimension 1 is spread over dimension 0" in texts(report)
    wrong = function(
        lambda x, b: (x + b).tanh(), lambda g, x, b: (None, (g * (1 - (x + b).tanh() ** 2)).sum(1))
    )
    report = gradcheck(wrong, (randn(5, 5), randn(5, seed=9).requires_grad_()))
    assert report.names[0] == "wrong axis", report
    assert "add broadcasts over dimension 0 (operand 2) is reduced over dimension 1" in texts(report)


@pytest.mark.parametrize("gone", [None, 0], ids=["None", "zero"])
def test_forgotten_bias_gradient(gone):
    def backward(g, x, w, b):
        return g @ w.T, x.T @ g, None if gone is None else torch.zeros_like(b)

    inputs = [randn(5, 3), randn(3, 4), randn(4)]
    report = gradcheck(function(lambda x, w, b: x @ w + b, backward), inputs, names=("x", "w", "b"))
    assert [entry.passed for entry in report.inputs] == [True, True, False]
    assert report.names == ("missing bias gradient",)
    assert f"the gradient is {'None' if gone is None else 'zero'}, yet add adds b to every row" in texts(
        report
    )


def test_saved_tensor_written_afterwards():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.y = x.tanh()
            return ctx.y.mul_(3)

        @staticmethod
        def backward(ctx, g):
            return g * 3 * (1 - ctx.y**2)

    report = gradcheck(lambda x: Scaled.apply(x), randn(5, 3))
    assert report.names[0] == "mutated saved tensor", report
    assert "mul_ has written in place" in texts(report)

    def refused(x):
        y = x.exp()
        y.mul_(2)
        return y

    report = gradcheck(refused, randn(5, 3))
    assert report.names == ("mutated saved tensor",)
    assert "autograd refuses to read it" in texts(report)


def test_inputs_written():
    x = randn(5, 3)
    report = gradcheck(function(torch.square, lambda g, x: x.mul_(2) * g), x)
    assert report.names == ("mutated input",)
    assert "the backward writes into" in texts(report)
    report = gradcheck(lambda x: x.clamp_(min=0).sum(), x)
    assert report.names == ("mutated input",)
    assert "the function writes into x" in texts(report)


def test_unreduced_gradient():
    x, b, t = randn(7, 3), randn(3, seed=1), randn(7, 3, seed=2)

    def loss(b, x, t):
        return (x + b - t).square().mean()

    def check(gradient):
        return gradcheck(loss, (b.clone().requires_grad_(), x, t), gradient=gradient)

    report = check(lambda b, x, t: 2 / 21 * (x + b - t))
    assert report.names == ("unreduced gradient",)
    assert "sum over dimension 0" in texts(report)
    assert "the sum is the slope" in texts(report)
    report = check(lambda b, x, t: x)
    assert "the sum is the slope" not in texts(report)
    report = check(lambda b, x, t: (2 / 21 * (x + b - t)).sum(1))
    assert report.names == ("wrong shape",)
    assert "7 is x.shape[0]: reduced over the wrong axis" in texts(report)


# Several explanations


def test_a_detached_factor_comes_before_the_half_that_it_looks_like():
    def fn(x, w):
        h = x @ w
        return (h * h.detach()).sum()

    report = gradcheck(fn, (randn(5, 3), randn(3, 4).requires_grad_()))
    assert report.names == ("detached path", "constant factor"), report
    assert "a detach() stops the gradient" in texts(report)
    assert "1/2 (the 2 of the square" in texts(report)


def test_a_lost_factor_comes_before_a_size_that_is_equal():
    report = gradcheck(function(lambda x: (5 * x.sin()).sum(), lambda g, x: g * x.cos()), randn(7, 5))
    lines = texts(report).splitlines()
    assert "the factor 5 of mul is missing" in lines[0], report
    assert "a mean where a sum belongs" in lines[1]
    report = gradcheck(function(lambda x: x.sin().mean(), lambda g, x: g * x.cos()), randn(5))
    lines = texts(report).splitlines()
    assert "a sum where a mean belongs" in lines[0], report


def test_the_number_of_rows_is_told_from_a_constant():
    """One row at a time, what comes of the number of rows goes."""
    x, w, t = randn(5, 3), randn(3), randn(5, seed=1)

    def loss(w, x, t):
        return (x @ w - t).square().mean()

    def check(gradient):
        return texts(gradcheck(loss, (w.clone().requires_grad_(), x, t), gradient=gradient)).splitlines()

    lines = check(lambda w, x, t: 2 * x.T @ (x @ w - t))
    assert "5 = x.shape[0] times the slope: a sum where a mean belongs" in lines[0]
    assert not any("everywhere" in line for line in lines)
    lines = check(lambda w, x, t: 5 * 2 / len(x) * x.T @ (x @ w - t))
    assert "5 times the slope, everywhere, on one row of the batch too" in lines[0]


def test_a_residual_path_left_out():
    w, x = randn(3, 3), randn(4, 3)

    def loss(w, x):
        h = x @ w
        return (h + h.tanh()).square().sum()

    def gradient(w, x):
        h = x @ w
        return x.T @ (2 * (h + h.tanh()) * (1 - h.tanh() ** 2))

    report = gradcheck(loss, (w.requires_grad_(), x), gradient=gradient)
    assert report.names == ("detached path",), report
    assert "the path through add (operand 1) is left out" in texts(report)

    def turned(w, x):
        h = x @ w
        return x.T @ (2 * (h + h.tanh()) * (1 - (1 - h.tanh() ** 2)))

    report = gradcheck(loss, (w.detach().requires_grad_(), x), gradient=turned)
    assert report.names == ("sign flipped",), report


def test_a_transposed_weight_of_a_hidden_layer():
    x, w, v = randn(4, 3), randn(3, 3, seed=1), randn(3, 3, seed=2)

    def loss(w, x, v):
        return ((x @ w).tanh() @ v).square().sum()

    def gradient(w, x, v):
        h = (x @ w).tanh()
        return x.T @ ((2 * h @ v) @ v * (1 - h * h))

    report = gradcheck(loss, (w.requires_grad_(), x, v), gradient=gradient)
    assert report.names[0] == "transposed", report


# No false alarm

CORRECT = {
    "gelu mlp": lambda x, y: torch.nn.functional.gelu(x @ y.T) @ y,
    "softmax": lambda x, y: (x.softmax(-1) * y).sum(0),
    "attention": lambda x, y: torch.nn.functional.scaled_dot_product_attention(x[None], y[None], y[None]),
    "in place": lambda x, y: (x * y).add_(x).mul_(2),
    "two outputs": lambda x, y: (x.sin(), (x * y).sum()),
    "a constant output": lambda x, y: (x * y, torch.ones_like(y)),
    "cross entropy": lambda x, y: torch.nn.functional.cross_entropy(x, y.softmax(-1)),
    "exact function": function(lambda x, y: (x * y).sum(), lambda g, x, y: (g * y, g * x)),
    "tiny": lambda x, y: 1e-4 * (x * y).sum(),
    "large": lambda x, y: 300 * (x * y),
    "exp and tanh": lambda x, y: x.exp() * y.tanh(),
    "logsumexp": lambda x, y: torch.logsumexp(x @ y.T, -1),
    "huber": lambda x, y: torch.nn.functional.huber_loss(x, y),
    "layer_norm": lambda x, y: torch.nn.functional.layer_norm(x, (5,)) * y,
    "beside a large constant": lambda x, y: 1e4 + (x - y).sum(),
    "a tiny mean": lambda x, y: 1e-6 * (x - y).square().mean(),
    "cumsum and norm": lambda x, y: x.cumsum(0) + y.norm(),
    "max": lambda x, y: x.max() + (x * 0 * y).sum(),
}
ZERO_SLOPES = ("max", "a tiny mean")  # which are named beside the pass: the mean's in float16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CORRECT)
def test_no_false_alarm(name, dtype):
    for seed in range(3):
        inputs = [randn(4, 5, seed=10 * seed + k).to(dtype) for k in range(2)]
        report = gradcheck(CORRECT[name], inputs)
        assert report, report
        assert report.names in ((), ("no signal",) * (name in ZERO_SLOPES)), report
