"""Each fault planted in a gradient gets its own name, and a right gradient gets none.

Over 500 lines, since each fault is a function of its own.
"""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from gradkernels.verify import GradientError, gradcheck
from torch import Tensor

from .functions import function

F64 = torch.float64


def problem(rows: int = 7, features: int = 3, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, rows and targets; no size is 2, so that a factor 2 is never a size."""
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(shape, generator=generator, dtype=F64).to(dtype)
        for shape in ((features,), (rows, features), (rows,))
    )


def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (x @ w - y).square().mean()


def by_hand(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return 2 / len(x) * x.T @ (x @ w - y)


def check_w(gradient, fn=loss, inputs=None, **options):
    """Check a hand-written gradient of the first input only."""
    w, *rest = problem() if inputs is None else inputs
    return gradcheck(fn, (w.clone().requires_grad_(), *rest), gradient=gradient, **options)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_caller_s_block_does_not_matter(mode):
    w, x, y = problem()
    with mode():
        assert gradcheck(loss, (w.requires_grad_(), x, y))


def test_right_gradients_pass_without_a_diagnosis():
    assert check_w(by_hand).names == ()
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    inputs = torch.randn(7, 3, dtype=F64)
    report = gradcheck(model, inputs)
    assert report.passed
    assert report.names == ()
    assert [entry.name for entry in report.inputs] == ["input", "0.weight", "0.bias", "2.weight", "2.bias"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        report = gradcheck(loss, problem(dtype=dtype))
        assert report, report
        assert any("differences were taken on float64 copies" in sentence for sentence in report.tried)


def test_an_optimum_passes():
    w, x, _ = problem()
    assert gradcheck(loss, (w, x, x @ w + 0))


@pytest.mark.parametrize(
    ("factor", "name", "words"),
    [
        (-1, "sign flipped", "uphill"),
        (2, "constant factor", "2 (a chain-rule factor twice"),
        (0.5, "constant factor", "0.5 times the slope: the 2 of the square is missing"),
        (0.5, "constant factor", "1/2 (a half too many)"),
        (7, "constant factor", "7 = x.shape[0] times the slope: a sum where a mean belongs"),
        (1 / 7, "constant factor", "1/7 of the slope"),
        (-2, "constant factor", "minus 2"),
        (1.37, "constant factor", "1.37 times the slope, everywhere"),
    ],
)
def test_constant_factors(factor, name, words):
    report = check_w(lambda w, x, y: factor * by_hand(w, x, y))
    assert not report
    assert report.names == (name,)
    assert words in str(report)


def test_an_explanation_is_given_once():
    """That of the recorded square, and as a guess what else may be 1/2."""
    report = check_w(lambda w, x, y: by_hand(w, x, y) / 2)
    assert str(report).count("the 2 of the square is missing") == 1


def test_missing_feature_one_row():
    def left_out(w, x, y):
        return 2 * (w * x - y)

    report = gradcheck(
        lambda w, x, y: (w * x - y).square(),
        (
            torch.tensor(3.0, dtype=F64, requires_grad=True),
            torch.tensor(2.0, dtype=F64),
            torch.tensor(5.0, dtype=F64),
        ),
        gradient=left_out,
        names=("w", "x", "y"),
    )
    assert report.names == ("missing feature",)
    assert "times x" in str(report)


def test_missing_feature_in_a_batch():
    report = check_w(lambda w, x, y: (2 / len(x) * (x @ w - y).sum()).expand_as(w))
    assert report.names == ("missing feature",)
    assert "times x" in str(report)


def test_missing_feature_in_a_function():
    scaled = function(torch.mul, lambda g, x, w: (g, g * x))
    report = gradcheck(scaled, (torch.randn(4, dtype=F64), torch.randn(4, dtype=F64)), names=("x", "w"))
    assert [entry.passed for entry in report.inputs] == [False, True]
    assert report.names == ("missing feature",)
    assert "times w" in str(report)


def test_feature_once_too_often():
    report = check_w(lambda w, x, y: w * by_hand(w, x, y))
    assert report.names == ("missing feature",)
    assert "once too often" in str(report)


def test_transposed_operand_also_under_a_loss():
    x, w, y = torch.randn(5, 3, dtype=F64), torch.randn(3, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    product = function(torch.matmul, lambda g, x, w: (g @ w, x.T @ g))
    for fn in (lambda x, w, y: product(x, w), lambda x, w, y: (product(x, w) - y).square().mean()):
        report = gradcheck(fn, (x.clone().requires_grad_(), w, y))
        assert report.names == ("transposed",)
        assert "operand w stands transposed on the right" in str(report)


def test_transposed_operand_from_the_left():
    left = function(torch.matmul, lambda g, a, x: (None, a @ g))
    inputs = torch.randn(3, 3, dtype=F64), torch.randn(3, 5, dtype=F64, requires_grad=True)
    report = gradcheck(left, inputs, names=("a", "x"))
    assert report.names == ("transposed",)
    assert "operand a stands transposed on the left" in str(report)


def test_transposed_gradient():
    w, x, y = torch.randn(3, 3, dtype=F64), torch.randn(7, 3, dtype=F64), torch.randn(7, 3, dtype=F64)
    report = check_w(lambda w, x, y: (2 / 21 * x.T @ (x @ w - y)).T, inputs=(w, x, y))
    assert report.names == ("transposed",)


def test_one_path_overwritten():
    """Lesson A.5: one shared weight scales both features; the paths give 4 and 2, the gradient is 6."""
    w = torch.tensor([2.0, 0.5, 1.0], dtype=F64, requires_grad=True)
    x = torch.tensor([[2.0, 1.0, 3.0], [1.0, 4.0, -1.0]], dtype=F64)

    def fn(w, x):
        return (w * x[0]).sum() + (w * x[1]).sin().sum()

    report = gradcheck(fn, (w, x), gradient=lambda w, x: x[1] * torch.cos(w * x[1]))
    assert report.names == ("path overwritten",)
    assert "used 2 times" in str(report)
    assert gradcheck(fn, (w, x), gradient=lambda w, x: x[0] + x[1] * torch.cos(w * x[1]))


def test_one_path_overwritten_inside_a_function():
    shared = function(
        lambda w, x: (w * x).sum() + (w.exp() * x).sum(), lambda g, w, x: (g * w.exp() * x, None)
    )
    w = torch.randn(4, dtype=F64, requires_grad=True)
    report = gradcheck(shared, (w, torch.randn(4, dtype=F64)))
    assert report.names == ("path overwritten",)
    assert "came through exp but not through mul" in str(report)


def test_two_uses_of_one_kind_are_told_apart():
    w, x = torch.randn(4, dtype=F64, requires_grad=True), torch.randn(4, dtype=F64)
    report = gradcheck(
        lambda w, x: (w * x).exp().sum() + (w * 2).sum(), (w, x), gradient=lambda w, x: 2 + 0 * w
    )
    assert report.names[0] == "path overwritten"
    assert "came through mul (use 2) but not through mul (use 1)" in str(report)


def test_stale_gradient_of_a_hand_written_loop():
    """Lesson A.8: backward twice without clearing."""
    left = torch.zeros(3, dtype=F64)

    def accumulating(w, x, y):
        left.add_(by_hand(w, x, y))
        return left

    report = check_w(accumulating)
    assert not report
    assert report.names == ("stale gradient",)
    assert "twice the first" in str(report)


def test_stale_gradient_of_a_function_that_scales_what_it_saved():
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.grad = 2 * x
            return x.square().sum()

        @staticmethod
        def backward(ctx, grad):
            ctx.grad.mul_(3 * grad)
            return ctx.grad / 3

    report = gradcheck(lambda x: InPlace.apply(x), torch.randn(4, dtype=F64))
    assert not report
    assert report.names == ("stale gradient",)


@pytest.mark.parametrize("later", [float("nan"), None])
def test_stale_gradient_that_is_none_or_no_number(later):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.calls = 0
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            ctx.calls += 1
            return 2 * grad if ctx.calls == 1 else None if later is None else later * grad

    report = gradcheck(lambda x: Once.apply(x), torch.randn(4, dtype=F64))
    assert not report
    assert report.names == ("stale gradient",)


def test_no_signal_is_named_beside_a_pass():
    """Lesson C.5: a feature that is always zero."""
    w, x, y = problem()
    x[:, 1] = 0
    report = check_w(None, inputs=(w, x, y))
    assert report.passed
    assert report.names == ("no signal",)
    assert "[1]: the slope is exactly zero while the loss is" in str(report)


def test_no_signal_where_there_should_be_one_fails():
    report = check_w(None, fn=lambda w, x, y: loss(w.detach() + 0 * w, x, y))
    assert not report
    assert report.names == ("no signal",)
    w, x, y = problem()
    w.requires_grad_()
    report = gradcheck(lambda w, x, y: loss(w.detach(), x, y) + w[0], (w, x, y))
    assert not report


def test_wrong_shape():
    report = check_w(lambda w, x, y: by_hand(w, x, y)[:, None])
    assert report.names == ("wrong shape",)
    assert "(3, 1), the input (3,)" in str(report)

    turned = function(lambda x: x.square().sum(), lambda g, x: torch.ones(4, 3, dtype=F64) * g)
    report = gradcheck(turned, torch.randn(3, 4, dtype=F64))
    assert report.names == ("wrong shape",)
    assert "transposed" in str(report)


def test_dtype_noise_suggests_a_step_that_works():
    w, x, y = (value.float() for value in problem())

    def narrow(w, x, y):
        return loss(w.float(), x.float(), y.float())

    assert gradcheck(narrow, (w, x, y))
    report = gradcheck(narrow, (w, x, y), step=1e-7)
    assert not report
    assert report.names == ("dtype noise",)
    step = float(str(report).rpartition("use step=")[2].partition(",")[0])
    assert gradcheck(narrow, (w, x, y), step=step)


def test_dtype_noise_on_the_way():
    """x + 1000 rounds to halves in float16; the formula is right."""

    def fn(x):
        return ((x + 1000) - 1000).square().sum()

    x = torch.tensor([0.3, 1.1, -0.6], dtype=F64)
    report = gradcheck(fn, x.half())
    assert report.names == ("lost digits",)
    assert "on float64 copies the gradient is right: in float16" in str(report)
    assert gradcheck(fn, x)


def test_step_too_large_for_the_curvature():
    report = gradcheck(lambda x: (3 * x).sin().sum(), torch.tensor([0.3, 0.9], dtype=F64), step=0.05)
    assert report.names == ("difference step too large",)


def test_default_step_too_large_for_the_curvature():
    """The step of float32 is 0.15 for an angle of 30."""
    x = 30 * torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=F64)
    for factor in (1, 1.01):
        report = gradcheck(
            lambda x: x.float().sin().sum().double(), x, gradient=lambda x, c=factor: c * x.cos()
        )
        assert bool(report) == (factor == 1), report


@pytest.mark.parametrize(
    ("at", "words"),
    [(0.0, "left and from the right differ"), (2e-6, "a kink lies within")],
    ids=["at", "near"],
)
def test_non_differentiable_point(at, words):
    x = torch.tensor([at, 1.0, -1.0], dtype=F64)
    report = gradcheck(lambda x: torch.relu(x).sum(), x)
    assert report.names[-1] == "non-differentiable"
    assert words in str(report)
    assert gradcheck(lambda x: torch.relu(x).sum(), torch.tensor([0.5, 1.0, -1.0], dtype=F64))


def test_non_deterministic():
    report = gradcheck(torch.nn.Dropout(0.5), torch.ones(8, dtype=F64))
    assert report.names == ("non-deterministic",)
    assert gradcheck(torch.nn.Dropout(0.5).eval(), torch.ones(8, dtype=F64))


def test_update_uphill_and_step_too_large():
    """Lesson A.3: the gradient 4 is right; lr 0.1 goes down to 0.04, lr 1 up to 49."""
    inputs = [torch.tensor(v, dtype=F64) for v in (3.0, 2.0, 5.0)]
    inputs[0].requires_grad_()

    def fn(w, x, y):
        return (w * x - y).square()

    assert gradcheck(fn, inputs, lr=0.1).names == ()
    report = gradcheck(fn, inputs, lr=1.0)
    assert report.names == ("step too large",)
    assert "up to 49" in str(report)
    report = gradcheck(fn, inputs, gradient=lambda w, x, y: -2 * x * (w * x - y), lr=0.1)
    assert report.names == ("uphill", "sign flipped")


def test_unknown_says_what_was_looked_for():
    report = check_w(lambda w, x, y: by_hand(w, x, y) + torch.tensor([0.3, -0.2, 0.9], dtype=F64))
    assert report.names == ("unknown",)
    assert "one path of several" in str(report)


def test_only_one_wrong_element_of_many_is_found_and_shown():
    w, x, y = problem(features=40)

    def wrong(w, x, y):
        gradient = by_hand(w, x, y)
        gradient[17] *= 1.01
        return gradient

    report = check_w(wrong, inputs=(w, x, y))
    assert not report
    assert report.inputs[0].worst == (17,)


def test_sampled_elements_are_said():
    w, x, y = problem(features=40)
    report = check_w(by_hand, inputs=(w, x, y), max_elements=10)
    assert report
    assert (report.inputs[0].checked, report.inputs[0].elements) == (10, 40)
    assert "10 of 40 elements" in str(report)


def test_report_as_json_and_as_exception():
    report = check_w(lambda w, x, y: -by_hand(w, x, y))
    entry = json.loads(report.to_json())["inputs"][0]
    assert entry["diagnoses"][0]["name"] == "sign flipped"
    assert math.isclose(entry["analytic"], -entry["numerical"], rel_tol=1e-6)
    with pytest.raises(GradientError, match="sign flipped"):
        check_w(lambda w, x, y: -by_hand(w, x, y), raise_exception=True)
    assert check_w(by_hand, raise_exception=True)


def test_numpy_gradients_and_strided_inputs():
    w, x, y = problem(rows=8, features=6)
    w, x = torch.randn(12, dtype=F64)[::2], x.T.contiguous().T
    report = check_w(lambda w, x, y: by_hand(w, x, y).numpy(), inputs=(w, x, y))
    assert report, report


def test_bad_arguments():
    w, x, y = problem()
    with pytest.raises(ValueError, match="none is a floating-point tensor"):
        gradcheck(lambda i: i, torch.arange(3))
    with pytest.raises(ValueError, match="expected 3 gradients"):
        gradcheck(loss, (w, x, y), gradient=by_hand)
    with pytest.raises(ValueError, match="need a scalar function"):
        gradcheck(lambda x: x * 2, w, lr=0.1)
    with pytest.raises(TypeError, match="must return real tensors"):
        gradcheck(lambda x: 3.0, w)


def test_nan_is_named():
    assert gradcheck(lambda x: (x - 2).log().sum(), torch.ones(2, dtype=F64)).names == ("non-finite",)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("max_elements", [256, 1])
def test_a_gradient_that_is_not_finite_fails(value, max_elements):
    """At an element that is not differenced too; an infinite one must not widen the tolerance."""
    x = torch.randn(64, dtype=F64)

    def gradient(x):
        return torch.where(torch.arange(64) == 17, value, 2 * x)

    report = gradcheck(lambda x: x.square().sum(), x, gradient=gradient, max_elements=max_elements)
    assert report.names == ("non-finite",)
    assert f"is {value} at [17]" in str(report)


def in_float32(x: Tensor, w: Tensor) -> Tensor:
    """RMS norm as language models have it."""
    wide = x.to(torch.float32)
    return w * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_a_function_that_computes_in_float32_whatever_it_is_given(dtype):
    x, w = torch.randn(4, 8, dtype=dtype), torch.randn(8, dtype=dtype)
    report = gradcheck(in_float32, (x, w))
    assert report, report
    scores = torch.randn(3, 4, dtype=dtype)
    assert gradcheck(lambda x: torch.softmax(x, -1, dtype=torch.float32).to(x.dtype), scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_kink_does_not_widen_the_tolerance(dtype):
    x = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=dtype)
    assert not gradcheck(lambda x: x.relu().sum(), x, gradient=lambda x: 3 * (x > 0))
    report = gradcheck(lambda x: x.relu().sum(), x)
    assert report.names == ("non-differentiable",)
    assert report.inputs[0].tolerance < 0.5


def test_a_kink_whose_slope_is_small_beside_others():
    report = gradcheck(lambda x: (x.relu() * torch.tensor([1, 1e-3])).sum(), torch.zeros(2))
    assert report.names == ("non-differentiable",)


near = function(torch.square, lambda g, x: 2.1 * x * g)  # 5 % too large
near_with_mask = function(lambda x: (x.sign().bfloat16(), torch.square(x))[1], lambda g, x: 2.1 * x * g)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x.detach().bfloat16().mean(), near(x))[1],
        lambda x: (x.detach().bfloat16() > 0, near(x))[1],
        lambda x: (near(x), x.detach().bfloat16().mean()),
        near_with_mask,
    ],
    ids=["for the log", "mask", "output", "inside"],
)
def test_what_is_narrow_beside_the_function_widens_nothing(fn):
    report = gradcheck(fn, torch.randn(4, 3, dtype=F64))
    assert not report
    assert report.inputs[0].tolerance < 1e-4


def test_noise_in_a_function_that_computes_in_bfloat16():
    report = gradcheck(
        lambda x: x.bfloat16().double() * (1 + 0.05 * torch.rand(1)), torch.randn(4, 3, dtype=F64)
    )
    assert report.names == ("non-deterministic",)
    factors = itertools.cycle((1.0, 1.1))
    report = gradcheck(lambda x: x.bfloat16() * next(factors), torch.randn(4, 3))
    assert report.names == ("non-deterministic",)


def in_numpy(x):
    """The square of a kernel that computes in float32 inside, which torch does not see."""
    return torch.from_numpy(np.square(x.numpy(), dtype=np.float32, casting="same_kind")).to(x)


square_in_float32 = function(in_numpy, lambda g, x: 2 * x * g)


def test_rounding_hides_less_where_the_step_is_larger():
    """The step is relative to the size of the input."""
    x = 1e4 * torch.randn(12, generator=torch.Generator().manual_seed(0))
    assert gradcheck(square_in_float32, x)
    report = gradcheck(function(in_numpy, lambda g, x: 2.2 * x * g), x)
    assert report.names == ("constant factor",)
    assert report.inputs[0].error > report.inputs[0].tolerance


def near_softmax_backward(g, x):
    """10 % too large."""
    y = torch.softmax(x, -1)
    return 1.1 * y * (g - (y * g).sum(-1, keepdim=True))


near_softmax = function(lambda x: torch.softmax(x, -1), near_softmax_backward)


def test_a_large_element_where_the_function_is_flat_hides_nothing():
    """As a score that is masked with -1e9."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    x[0, 2] = -1e9
    assert gradcheck(lambda x: torch.softmax(x, -1), x)
    assert gradcheck(near_softmax, x).names == ("constant factor",)
    assert gradcheck(torch.tanh, torch.tensor([1e200, 0.3], dtype=F64))


def test_what_is_narrow_where_autograd_does_not_look():
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert gradcheck(function(lambda x: x.bfloat16().square().to(x.dtype), lambda g, x: 2 * x * g), x)
    for dtype in (torch.float32, F64):
        report = gradcheck(square_in_float32, x.to(dtype))
        assert report, report
    assert gradcheck(lambda x: torch.func.vmap(lambda y: y.float().pow(3))(x).to(x.dtype), x)
    narrow = gradcheck(
        lambda x: x.detach().bfloat16().square().sum().to(x.dtype), x, gradient=lambda x: 2 * x
    )
    assert narrow, narrow
    noisy = gradcheck(lambda x: (x.float() * (1 + 1e-6 * torch.rand(()))).square().sum().to(x.dtype), x)
    assert noisy, noisy


def test_outputs_in_a_class_of_ones_own():
    class Output(dict):
        pass

    x = torch.randn(4, 3, dtype=F64)
    for output in (Output, dataclasses.make_dataclass("Fields", ["loss", "count"], slots=True)):
        report = gradcheck(lambda x, output=output: output(loss=(x * 2).sum(), count=x.detach().sum()), x)
        assert report, report
        assert "without the outputs that require no gradient: 1" in report.tried


def test_an_infinite_difference_does_not_widen_the_tolerance():
    wall = function(lambda x: torch.where(x <= 3, x, torch.inf), lambda g, x: 3 * g)
    report = gradcheck(wall, torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    assert not report
    assert report.inputs[0].tolerance < 1e-3
    assert "difference step too large" not in report.names


def test_differences_at_the_edge_of_where_the_function_is_finite():
    report = gradcheck(torch.log, torch.tensor([1e-7, 0.5], dtype=F64))
    assert report.names == ("difference step too large",)
    assert gradcheck(torch.log, torch.tensor([1e-7, 0.5], dtype=F64), step=1e-12)


def test_nested_outputs_and_those_without_a_gradient():
    x = torch.randn(5, dtype=F64)

    without_the_2 = function(lambda x: (x.clone(), x * x), lambda one, two, x: one + two * x)

    def nested(x):
        first, second = without_the_2(x)
        return first, (second, {"norm": x.detach().norm()})

    assert not gradcheck(nested, x)
    assert gradcheck(lambda x: {"loss": x.square().sum(), "size": x.detach().abs().sum()}, x)
    assert not gradcheck(lambda x: x.detach().square(), x)


def test_sparse_gradients_and_tensors_of_inference_mode():
    embedding = torch.nn.Embedding(7, 3, sparse=True)
    assert gradcheck(embedding, torch.tensor([1, 5, 1]))
    with torch.inference_mode():
        assert gradcheck(torch.sin, torch.randn(3, dtype=F64))


def test_a_factor_of_one_explains_nothing():
    """Two elements, so that 2 / 2 is a size's factor too."""
    x = torch.tensor([1.0, 2.0], dtype=F64)
    report = gradcheck(lambda x: x.square().sum(), x, gradient=lambda x: 2 * x + torch.tensor([5e-4, -5e-4]))
    assert report.names == ("unknown",)


def four() -> Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=F64)


def test_the_upstream_gradients_are_not_the_inputs():
    """RMS norm does not change along its input: the slopes would be zero."""
    for seed in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        fn = function(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True)), lambda g, x: 0 * g)
        assert not gradcheck(fn, x, seed=seed)


@pytest.mark.parametrize("limit", [1.0, 1.5])
def test_an_upstream_gradient_that_is_clipped(limit):
    """Half of it is not."""
    clipped = function(lambda x: x.square().sum(), lambda g, x: 2 * x * g.clamp(-limit, limit))
    assert gradcheck(clipped, four()).names == ("not linear in grad_output",)


def test_an_upstream_gradient_that_is_clipped_beside_a_larger_one():
    fn = function(
        lambda x: (x.square(), 1e9 * x.sin()),
        lambda g, h, x: 2 * x * g.clamp(-2.5, 2.5) + 1e9 * x.cos() * h,
    )
    assert gradcheck(fn, four()).names == ("not linear in grad_output",)


@pytest.mark.parametrize(
    "other",
    [lambda x: x.sin().bfloat16(), lambda x: 1e9 * x.sin()],
    ids=["coarse", "large"],
)
def test_an_output_beside_another_that_hides_it(other):
    def backward(g, h, x, factor):
        return 2 * factor * x * g + torch.func.grad(lambda x: (other(x).double() * h).sum())(x)

    for factor in (1, 1.05):
        fn = function(lambda x: (x.square(), other(x)), lambda g, h, x, c=factor: backward(g, h, x, c))
        report = gradcheck(fn, four())
        assert bool(report) == (factor == 1), report
        assert ("output 0 by itself" if factor > 1 else "each output by itself") in report.tried


def test_several_outputs_take_few_calls_more_than_one():
    calls = 0

    def fn(x, count):
        nonlocal calls
        calls += 1
        return [(k + 1) * x.sin() for k in range(count)]

    def called(count):
        nonlocal calls
        calls = 0
        assert gradcheck(fn, (torch.linspace(-1, 1, 200, dtype=F64), count))
        return calls

    assert called(5) < 1.5 * called(1)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [-1e9, torch.finfo(F64).min])
def test_large_outputs_that_stay_as_they_are_hide_nothing(value, dtype):
    """As scores that a mask has set."""
    masked = torch.tensor([True, False, False, False])
    for factor in (1, 1.01):
        fn = function(
            lambda x: x.to(dtype).sin().double().masked_fill(masked, value),
            lambda g, x, c=factor: c * x.cos() * g.masked_fill(masked, 0),
        )
        report = gradcheck(fn, four())
        assert bool(report) == (factor == 1), report


def chain(x):
    for _ in range(60):
        x = 1.01 * x
    return 1e12 * x * x


@pytest.mark.parametrize(
    ("fn", "scale", "wrong"),
    [
        (lambda x: 1e12 * x * x, 1e-6, 1.1),
        (chain, 1e-6, 1.1),
        (lambda x: x * torch.rsqrt(x.square().mean()), 1e-3, 1.002),
    ],
    ids=["square", "chain", "norm"],
)
def test_small_inputs_hide_nothing(fn, scale, wrong):
    """Their roundings are small too, those of sixty products as well, and where a function is flat along them."""
    for factor in (1, wrong):
        off = function(fn, lambda g, x, c=factor: c * torch.func.grad(lambda x: (fn(x) * g).sum())(x))
        assert bool(gradcheck(off, scale * four().float())) == (factor == 1)


def test_small_inputs_beside_an_output_that_rounds_larger_numbers():
    x = 1e-6 * four().float()
    for factor in (1, 1.1):
        fn = function(
            lambda x: (1e12 * x * x, 1e6 * (x + 1)), lambda g, h, x, c=factor: 2e12 * c * x * g + 1e6 * h
        )
        assert bool(gradcheck(fn, x)) == (factor == 1)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x + 1).var(),
        lambda x: torch.nn.functional.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.5)),
        lambda x: torch.nn.functional.mse_loss(x.softmax(-1), torch.full_like(x, 0.25)),
    ],
    ids=["var", "bce", "mse of softmax"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_inputs_of_larger_numbers(fn, dtype):
    """Whose roundings are not as small as the inputs'."""
    for scale in (1e-6, 1e-3, 0.02):
        assert gradcheck(fn, (scale * four()).to(dtype)), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_inputs_of_a_function_that_narrows_them(dtype):
    """A step away they are no longer small."""
    for scale in (1e-6, 1e-3):
        assert gradcheck(lambda x: x.to(dtype).square().double(), scale * four()), scale
    for factor in (1, 1.4):
        off = function(lambda x: 1 * x, lambda g, x, c=factor: c * g)
        report = gradcheck(lambda x, off=off: off(x).to(dtype).square().double(), four())
        assert bool(report) == (factor == 1)


def test_kinks_at_some_elements():
    assert gradcheck(torch.relu, torch.tensor([0.0, 2e-6, 1.0], dtype=F64)).names == ("non-differentiable",)
    x = torch.cat([torch.zeros(40), torch.rand(4) + 0.5]).double()
    report = gradcheck(function(torch.relu, lambda g, x: 1.2 * g * (x > 0)), x)
    assert report.names == ("unknown",)


def test_a_gradient_of_zero_is_no_kink_in_bfloat16():
    """Over a step of less than a rounding the function looks flat."""
    x = torch.tensor([1.25, 1.125], dtype=F64)
    fn = function(lambda x: x.bfloat16().square().double(), lambda g, x: 0 * g)
    assert gradcheck(fn, x).names == ("no signal",)


def test_an_infinite_input_beside_a_wrong_gradient():
    """Where warnings are errors."""
    mask = torch.tensor([0.0, -math.inf, 0.0], dtype=F64)
    x = torch.tensor([[0.3, 0.0, 1.0], [0.1, 0.2, 0.3]], dtype=F64, requires_grad=True)
    report = gradcheck(lambda x, mask: near_softmax(x + mask), (x, mask))
    assert report.names == ("constant factor",)


def test_random_numbers_are_drawn_whatever_the_default_device_is() -> None:
    """In float64, and in bfloat16, where roundings are looked at as well."""
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(5, dtype=dtype, requires_grad=True)
        with torch.device("meta"):
            assert gradcheck(lambda x: x * x + x, x)
