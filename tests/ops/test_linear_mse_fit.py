"""``linear_mse_fit``: clause by clause of its contract, on every backend, against loops in NumPy and of our ops.

Where a test says nothing else, the rounds run in one launch: ``launched`` sees to it that they did.
Over 500 lines, since it follows the contract clause by clause.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD, linear_mse_fit, linear_mse_loss, use_backend
from gradkernels import linear_mse_fit as fit
from gradkernels.backends import module
from gradkernels.reference import adam, sgd
from gradkernels.reference import linear_mse_fit as reference
from torch import Tensor

from ..helpers import python, to_numpy

BACKENDS = ("fallback", "triton", "reference")
CLASSES: dict[str, tuple[type[Any], Callable[..., Any], dict[str, Any]]] = {
    "sgd": (FusedSGD, sgd.step, {"lr": 0.1}),
    "momentum": (FusedSGD, sgd.step, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "nesterov": (FusedSGD, sgd.step, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (FusedAdam, adam.step, {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1}),
    "amsgrad": (FusedAdam, adam.step, {"lr": 0.1, "amsgrad": True, "maximize": True}),
    "adamw": (FusedAdamW, adam.step, {"lr": 0.1, "weight_decay": 0.2}),
}


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was served by the launcher."""
    served: list[bool] = []
    for backend in BACKENDS:
        launchers = module(backend, "linear_mse_fit")

        def counted(*args: Any, launcher: Any = launchers.linear_mse_fit_rounds) -> bool:
            served.append(launcher(*args))
            return served[-1]

        monkeypatch.setattr(launchers, "linear_mse_fit_rounds", counted)
    return served


def leaf(*values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(*values, dtype=dtype).requires_grad_()


def drawn(
    N: int = 7, D: int = 3, K: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, target, bias and one weight per row."""
    x, w, y, b = (torch.randn(shape).to(dtype) for shape in ((N, D), (K, D), (N, K), (K,)))
    return x, w.requires_grad_(), y, b.requires_grad_(), (torch.rand(N) + 0.5).to(dtype)


def copies(*params: Tensor) -> list[Tensor]:
    return [param.detach().clone().requires_grad_() for param in params]


def by_rounds(
    x: Tensor, w: Tensor, y: Tensor, b: Tensor, s: Tensor | None, optimizer: Any, steps: int, size: int
) -> Tensor:
    """The loop of the contract, of our ops."""
    losses = []
    for t in range(steps):
        rows = [(t * size + i) % len(x) for i in range(size)]
        optimizer.zero_grad()
        loss = linear_mse_loss(x[rows], w, y[rows], b, sample_weight=None if s is None else s[rows])
        loss.sum().backward()
        losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses)


def everything(optimizer: Any) -> dict[str, Tensor]:
    """Parameters, state, norm."""
    found = {}
    for i, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        found[f"parameter {i}"] = param.detach()
        found |= {f"{key} {i}": value for key, value in optimizer.state.get(param, {}).items()}
    if optimizer.grad_norm is not None:
        found["grad_norm"] = optimizer.grad_norm
    return found


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """To rounding: by some ulps of the largest finite number, in the dtype."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert ours[name].shape == value.shape
        finite = value.isfinite()
        assert torch.equal(ours[name][~finite].nan_to_num(), value[~finite].nan_to_num()), name
        mine, wanted = ours[name][finite].double(), value[finite].double()
        error, largest = ((x.abs().max() if x.numel() else 0.0) for x in (mine - wanted, wanted))
        assert error <= 32 * torch.finfo(dtype).eps * largest + 1e-12, (name, error)


# The lessons' trajectories, to the printed digits.

ROWS = [[1, 0.5], [2, 1], [3, 0.5], [4, 2]], [2.5, 5, 6.5, 10]
DELIVERED = [0.7288, 0.5650, 0.5116, 0.4833, 0.4613, 0.4415, 0.4228, 0.4050, 0.3881, 0.3719, 0.3565, 0.3418]
DELIVERIES = [[2, 3], [1.5, 1], [4, 5], [0.8, 0.5], [3.2, 2.5]], [5, 3.2, 9.5, 2.1, 6.8]


@pytest.fixture(params=BACKENDS)
def on(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def test_lessons_one_weight_and_a_bad_step(on: str, launched: list[bool]) -> None:
    for lr, printed in ((0.1, [1.0, 0.04, 0.0016, 6.4e-05, 3e-06]), (1.0, [1.0, 49.0])):
        w = leaf([3.0])
        optimizer = FusedSGD([w], lr=lr)
        losses = fit(torch.tensor([[2.0]]), w, torch.tensor([5.0]), optimizer=optimizer, steps=len(printed))
        assert [round(loss, 6) for loss in losses.tolist()] == printed
    assert launched == [True, True]


def test_lesson_four_rows(on: str) -> None:
    x, y = (torch.tensor(rows, dtype=torch.float64) for rows in ROWS)
    w = leaf([0.0, 0.0], dtype=torch.float64)
    losses = fit(x, w, y, optimizer=FusedSGD([w], lr=0.03), steps=101)
    assert [round(losses[t].item(), 6) for t in (0, 1, 10, 100)] == [43.375, 9.852759, 0.003643, 0.000709]
    assert [round(value, 4) for value in w.tolist()] == [2.0257, 0.937]


def half(x: list[float], y: list[float], w: float, b: float) -> tuple[Tensor, ...]:
    """Rows whose mean loss is half the squared error: a second output, that is 0, has as much weight."""
    input = torch.tensor([[float(value)] for value in x])
    target = torch.tensor([[value, 0.0] for value in y])
    return input, leaf([[w], [0.0]]), target, leaf([b, 0.0]), torch.full(target.shape, 0.5)


def test_lesson_shipment_by_half_losses(on: str) -> None:
    for lr, printed in (
        (0.1, [8, 2, 0.5, 0.125, 0.031]),
        (0.01, [8, 7.220, 6.516, 5.881, 5.307]),
        (0.5, [8, 18, 40.5, 91.125, 205.031]),
    ):
        x, w, y, b, s = half([2], [6], 1, 0)
        losses = fit(x, w, y, b, optimizer=FusedSGD([w, b], lr=lr), steps=5, sample_weight=s)
        assert [round(loss, 3) for loss in losses.tolist()] == printed
    x, w, y, b, s = half([2], [6], 1, 0)
    fit(x, w, y, b, optimizer=FusedSGD([w, b], lr=0.1), steps=5, sample_weight=s)
    assert [round(value, 3) for value in (w[0].item(), b[0].item())] == [2.55, 0.775]


def test_lesson_three_shipments(on: str) -> None:
    x, w, y, b, s = half([1, 2, 3], [3, 5, 7], 0, 0)
    losses = fit(x, w, y, b, optimizer=FusedSGD([w, b], lr=0.08), steps=20, sample_weight=s)
    assert [round(losses[t].item(), 4) for t in (0, 1, 19)] == [13.8333, 4.2812, 0.0005]
    assert [round(value, 3) for value in (w[0].item(), b[0].item())] == [2.037, 0.917]


def test_lesson_delivery_time(on: str) -> None:
    x, y = map(torch.tensor, DELIVERIES)
    w = leaf([0.8, 1.5])
    losses = fit(x, w, y, optimizer=FusedSGD([w], lr=0.05), steps=12)
    assert [round(loss, 4) for loss in losses.tolist()] == DELIVERED
    w = leaf([0.8, 1.5])
    losses = fit(x, w, y, optimizer=FusedSGD([w], lr=1.5), steps=2)
    assert round(losses[1].item(), 1) == 333.8


# The rounds: against NumPy, and against the loop of our ops.


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_rounds(on: str, name: str, dtype: torch.dtype, launched: list[bool]) -> None:
    """A batch that does not divide N, sample weights, bias; parameters, state, step and losses."""
    make, step, options = CLASSES[name]
    x, w, y, b, s = drawn(dtype=dtype)
    initial, ours = [to_numpy(param.clone()) for param in (w, b)], make([w, b], **options)
    losses = fit(x, w, y, b, optimizer=ours, steps=9, batch_size=3, sample_weight=s)
    weight, bias = initial
    given: dict[str, Any] = {**options, **({"decoupled_weight_decay": True} if make is FusedAdamW else {})}
    expected, params, states = reference.fit(
        *(to_numpy(x), weight, to_numpy(y), bias, to_numpy(s)), step=step, steps=9, batch_size=3, **given
    )
    theirs = {"losses": torch.tensor(expected).to(dtype)}
    found = {"losses": losses}
    for i, (param, state) in enumerate(zip((w, b), states, strict=True)):
        theirs[f"parameter {i}"] = torch.tensor(params[i]).to(dtype)
        found[f"parameter {i}"] = param.detach()
        for key, value in state.items():
            theirs[f"{key} {i}"] = torch.tensor(value).to(torch.float32 if key == "step" else dtype)
            found[f"{key} {i}"] = ours.state[param][key]
        assert len(ours.state.get(param, {})) == len(state)
    assert_same(found, theirs, dtype)
    assert launched == [True]


@pytest.mark.parametrize("guard", [{}, {"max_norm": 0.3, "on_nonfinite": "skip"}], ids=["", "guarded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loop_of_our_ops(on: str, dtype: torch.dtype, guard: dict[str, Any]) -> None:
    """Twice: the second call goes on from the state of the first, with the first batch."""
    x, w, y, b, s = drawn(dtype=dtype)
    v, c = copies(w, b)
    ours, theirs = FusedAdam([w, b], lr=0.1, **guard), FusedAdam([v, c], lr=0.1, **guard)
    for weights, size in ((s, 5), (None, 7)):
        losses = fit(x, w, y, b, optimizer=ours, steps=4, batch_size=size, sample_weight=weights)
        expected = by_rounds(x, v, y, c, weights, theirs, 4, size)
        assert losses.dtype == expected.dtype == dtype
        found, wanted = everything(ours) | {"losses": losses}, everything(theirs) | {"losses": expected}
        assert_same(found, wanted, dtype)


def test_round_t_uses_rows_cyclically(on: str) -> None:
    """With no step to speak of, the losses name the rows: 0 1 2, 3 4 0, 1 2 3, ..."""
    x, y = torch.zeros(5, 1), torch.arange(1.0, 6.0)
    for size in range(1, 6):
        w = leaf([0.0])
        losses = fit(x, w, y, optimizer=FusedSGD([w], lr=0.0), steps=11, batch_size=size)
        squares = [sum(((t * size + i) % 5 + 1) ** 2 for i in range(size)) / size for t in range(11)]
        assert losses.tolist() == pytest.approx(squares)
        s = y.flip(0)
        losses = fit(x, w, y, optimizer=FusedSGD([w], lr=0.0), steps=11, batch_size=size, sample_weight=s)
        rows = [[(t * size + i) % 5 for i in range(size)] for t in range(11)]
        weighted = [sum((5 - r) * (r + 1) ** 2 for r in row) / sum(5 - r for r in row) for row in rows]
        assert losses.tolist() == pytest.approx(weighted)


def test_shapes_of_one_model(on: str, launched: list[bool]) -> None:
    """Leading dimensions are rows; a weight (D,) has a target without K; a bias of one element has any shape."""
    x, s = torch.randn(2, 3, 4), torch.rand(2, 3) + 0.5
    for K, bias in ((2, (2,)), (None, (1,)), (None, ()), (None, None)):
        outputs = () if K is None else (K,)
        w, y = torch.randn(*outputs, 4).requires_grad_(), torch.randn(2, 3, *outputs)
        b = None if bias is None else torch.randn(bias).requires_grad_()
        params = [w] if b is None else [w, b]
        others = copies(*params)
        for weights in (s, s.unsqueeze(-1).expand_as(y) if K else s):
            losses = fit(
                *(x, w, y, b),
                optimizer=FusedSGD(params, lr=0.1),
                steps=3,
                batch_size=4,
                sample_weight=weights,
            )
            flat = x.reshape(6, 4), others[0], y.reshape(6, *outputs), others[1] if b is not None else None
            expected = by_rounds(
                *flat, weights.reshape(6, *weights.shape[2:]), FusedSGD(others, lr=0.1), 3, 4
            )
            found = dict(enumerate([losses, *(param.detach() for param in params)]))
            wanted = dict(enumerate([expected, *(param.detach() for param in others)]))
            assert_same(found, wanted, torch.float32)
    assert all(launched)


@pytest.mark.parametrize(
    "kind", ["rows", "weight", "negative input", "negative target", "negative sample_weight"]
)
def test_operands_in_any_layout(on: str, kind: str, launched: list[bool]) -> None:
    """Strided, and with a sign yet to change: the memory of a conjugate's imaginary part holds the negative values."""
    x, w, y, b, s = drawn(6, 4, 3)
    plain = {"input": x, "weight": w, "target": y, "sample_weight": s}
    if kind == "rows":
        strided = x.T.contiguous().T, y.repeat_interleave(2, 1)[:, ::2], s.repeat_interleave(3)[::3]
        changed = dict(zip(("input", "target", "sample_weight"), strided, strict=True))
    elif kind == "weight":
        changed = {"weight": w.detach().T.contiguous().T}
        assert not changed["weight"].is_contiguous()
    else:
        name = kind.removeprefix("negative ")
        changed = {name: torch._neg_view(-plain[name])}
    results = []
    for given in (plain, plain | changed):
        weight, (bias,) = given["weight"].detach().clone().requires_grad_(), copies(b)
        optimizer = FusedAdam([weight, bias], lr=0.1)
        losses = fit(**given | {"weight": weight}, bias=bias, optimizer=optimizer, steps=3)
        results.append({"": losses, "w": weight.detach(), "b": bias.detach()})
    assert_same(results[1], results[0], torch.float32)
    if kind == "rows":  # a lazy sign goes by the loop, and on Triton such a weight too
        assert launched == [True, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's address space")
def test_offsets_beyond_32_bits() -> None:
    """Columns 2^30 elements apart: an offset that wraps leaves the tensor. A process of its own, since that kills."""
    code = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from gradkernels import FusedSGD, linear_mse_fit, use_backend
near = [torch.randn(2, 3).half() for _ in range(3)]
def trained(x, y, s):
    w = torch.zeros(3, 3, dtype=torch.float16, requires_grad=True)
    with use_backend("triton"):
        losses = linear_mse_fit(x, w, y, optimizer=FusedSGD([w], lr=0.1), steps=2, sample_weight=s)
    return torch.cat([losses, w.detach().flatten()])
for which in range(3):
    given = list(near)
    given[which] = torch.empty(2**31 + 2, dtype=torch.float16).as_strided((2, 3), (1, 2**30)).copy_(near[which])
    assert torch.equal(trained(*given), trained(*near))
"""
    python("-c", code)


def assert_as_the_loop(
    make: Callable[[list[Tensor]], Any],
    data: tuple[Tensor, ...] | None = None,
    steps: int = 4,
    size: int | None = None,
    weights: Tensor | None = None,
) -> tuple[Any, Tensor]:
    """The optimizer that ``make`` gives of weight and bias, after rounds which are those of our ops; their losses."""
    x, w, y, b, _ = drawn() if data is None else data
    v, c = copies(w, b)
    ours, theirs = make([w, b]), make([v, c])
    losses = fit(x, w, y, b, optimizer=ours, steps=steps, batch_size=size, sample_weight=weights)
    expected = by_rounds(x, v, y, c, weights, theirs, steps, size or len(x))
    assert_same(everything(ours) | {"": losses}, everything(theirs) | {"": expected}, torch.float32)
    assert ours.steps_skipped == theirs.steps_skipped
    return ours, losses


def skipping(params: list[Tensor]) -> FusedAdam:
    return FusedAdam(params, lr=0.1, on_nonfinite="skip")


def test_two_groups_have_options_of_their_own(on: str, launched: list[bool]) -> None:
    def grouped(params: list[Tensor]) -> FusedAdam:
        weight = {"params": params[:1], "weight_decay": 0.5}
        return FusedAdam([{"params": params[1:], "lr": 0.3, "betas": (0.5, 0.9)}, weight], lr=0.1)

    assert_as_the_loop(grouped)
    assert launched == [True]


def test_a_bias_that_has_made_fewer_steps(on: str) -> None:
    def stepped(params: list[Tensor]) -> FusedAdam:
        optimizer = FusedAdam(params, lr=0.1)
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        return optimizer

    ours, _ = assert_as_the_loop(stepped)
    assert [state["step"].item() for state in ours.state.values()] == [5, 4]


def test_options_in_tensors(on: str) -> None:
    betas = torch.tensor(0.9), torch.tensor(0.99)
    assert_as_the_loop(lambda params: FusedAdam(params, lr=torch.tensor(0.1), betas=betas))


# Losses and gradients.


def test_losses_are_of_before_the_update_and_detached(on: str) -> None:
    w, x, y = leaf([2.0, 2.0]), torch.tensor([[2.0, 1.0]]), torch.tensor([5.0])
    losses = fit(x, w, y, optimizer=FusedSGD([w], lr=0.1), steps=2)
    assert losses.tolist() == pytest.approx([1.0, 0.0], abs=1e-12)
    assert not losses.requires_grad
    assert losses.grad_fn is None


def test_grad_is_left_as_it_was(on: str) -> None:
    x, w, y, b, _ = drawn()
    x.requires_grad_()
    w.grad = kept = torch.full_like(w, 7.0)
    for hooked in (False, True):
        optimizer = FusedSGD([w, b], lr=0.1)
        if hooked:
            optimizer.register_step_post_hook(lambda *_: None)
        fit(x, w, y, b, optimizer=optimizer, steps=2)
        assert w.grad is kept
        assert (kept == 7).all()
        assert b.grad is None
        assert x.grad is None


def test_no_steps(on: str) -> None:
    x, w, y, b, _ = drawn()
    optimizer, before = FusedAdam([w, b]), w.detach().clone()
    losses = fit(x, w, y, b, optimizer=optimizer, steps=0)
    assert losses.shape == (0,)
    assert losses.dtype == torch.float32
    assert torch.equal(w, before)
    assert not optimizer.state


def test_losses_of_a_divergence(on: str) -> None:
    w = leaf([1.0])
    losses = fit(torch.tensor([[1e15]]), w, torch.tensor([0.0]), optimizer=FusedSGD([w], lr=1.0), steps=4)
    assert losses[0].isfinite()
    assert not losses[2:].isfinite().any()
    assert not w.isfinite().all()


def test_a_gradient_that_is_not_finite_is_skipped(on: str, launched: list[bool]) -> None:
    """Row 1 is infinite: each batch with it is skipped, and counted; the others go on."""
    data = drawn(6)
    data[0][1, 0] = math.inf
    ours, losses = assert_as_the_loop(skipping, data, steps=5, size=2)
    assert ours.steps_skipped == 2
    assert losses.isfinite().tolist() == [False, True, True, False, True]
    assert ours.state[data[1]]["step"] == 3
    assert launched == [True]


@pytest.mark.parametrize("per_output", [False, True])
def test_a_zero_sum_of_sample_weights_gives_nan(on: str, per_output: bool, launched: list[bool]) -> None:
    """The batch of rows 2 and 3 has such weights: it is skipped, and counted; the others go on."""
    data = drawn(6)
    s = data[-1]
    s[2], s[3] = 1, -1
    s = s[:, None].repeat(1, 2) if per_output else s
    ours, losses = assert_as_the_loop(skipping, data, size=2, weights=s)
    assert losses.isnan().tolist() == [False, True, False, False]
    assert ours.steps_skipped == 1
    assert launched == [True]


def test_ignore_lets_it_in(on: str) -> None:
    w, x = leaf([1.0]), torch.tensor([[1.0], [math.inf]])
    fit(x, w, torch.zeros(2), optimizer=FusedSGD([w], lr=0.1), steps=1)
    assert not w.isfinite().all()


def test_grad_norm_is_that_of_the_last_round(on: str) -> None:
    w, x = leaf([3.0]), torch.tensor([[2.0]])
    optimizer = FusedSGD([w], lr=0.1, max_norm=0.5)
    fit(x, w, torch.tensor([5.0]), optimizer=optimizer, steps=3)
    assert w.item() == pytest.approx(3.0 - 3 * 0.1 * 0.5, rel=1e-5)
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx(2 * 2 * (2 * 2.9 - 5), rel=1e-5)


# Where the rounds are gone through one by one.


def test_step_hooks_see_each_round(on: str, launched: list[bool]) -> None:
    w, x, y = leaf([3.0]), torch.tensor([[2.0]]), torch.tensor([5.0])
    optimizer, seen = FusedSGD([w], lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: seen.append((round(w.item(), 4), round(w.grad.item(), 4))))
    losses = fit(x, w, y, optimizer=optimizer, steps=3)
    assert seen == [(3.0, 4.0), (2.6, 0.8), (2.52, 0.16)]
    assert losses.tolist() == pytest.approx([1.0, 0.04, 0.0016], rel=1e-4)
    assert not launched


def test_raise_names_the_round_by_stopping_there(on: str, launched: list[bool]) -> None:
    """Lesson A9: a clear error before the update corrupts the weights."""
    w, y = leaf([3.0]), torch.tensor([5.0, math.nan])
    optimizer = FusedSGD([w], lr=0.1, on_nonfinite="raise")
    kept = w.grad = torch.ones(1)
    with pytest.raises(FloatingPointError, match="non-finite gradients"):
        fit(torch.tensor([[2.0], [2.0]]), w, y, optimizer=optimizer, steps=3, batch_size=1)
    assert w.item() == pytest.approx(2.6)
    assert w.grad is kept
    assert not launched


@pytest.mark.parametrize("kind", ["tensor", "accumulated", "subclass", "patched"])
def test_whoever_watches_sees_each_round(kind: str, launched: list[bool]) -> None:
    w, x, y = leaf([3.0]), torch.tensor([[2.0]]), torch.tensor([5.0])
    seen: list[Any] = []

    class Watched(FusedSGD):
        def step(self, closure: Any = None) -> Any:
            seen.append("step")
            return super().step(closure)

    optimizer = (Watched if kind == "subclass" else FusedSGD)([w], lr=0.1)
    if kind == "tensor":
        w.register_hook(seen.append)
    if kind == "accumulated":
        w.register_post_accumulate_grad_hook(seen.append)
    if kind == "patched":
        step = optimizer.step
        optimizer.step = lambda *args: (seen.append("step"), step(*args))  # type: ignore[method-assign]
    fit(x, w, y, optimizer=optimizer, steps=3)
    assert len(seen) == 3
    assert not launched


def test_a_scheduler_may_hold_the_optimizer(launched: list[bool], recwarn: pytest.WarningsRecorder) -> None:
    w, x, y = leaf([3.0]), torch.tensor([[2.0]]), torch.tensor([5.0])
    optimizer = FusedSGD([w], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    fit(x, w, y, optimizer=optimizer, steps=2)
    scheduler.step()
    losses = fit(x, w, y, optimizer=optimizer, steps=2)
    assert launched == [True, True]
    assert losses.tolist() == pytest.approx([0.0016, 0.0016 * 0.6**2], rel=1e-4)
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_a_frozen_bias_stays(on: str) -> None:
    x, w, y, b, _ = drawn()
    b.requires_grad_(False)
    before = b.clone()
    b.grad = torch.ones_like(b)  # from before it was frozen: zero_grad clears it in each round
    fit(x, w, y, b, optimizer=FusedSGD([w, b], lr=0.1), steps=2)
    assert torch.equal(b, before)
    with pytest.raises(RuntimeError, match="requires grad"):
        fit(x, w.requires_grad_(False), y, b, optimizer=FusedSGD([w, b], lr=0.1), steps=2)


def test_grad_modes_do_not_matter(on: str) -> None:
    """The loop under no_grad and inference_mode too: what is called trains."""
    for mode in (torch.no_grad, torch.inference_mode):
        for hooked in (False, True):
            # Rows that have to be copied to be joined.
            w, x, y = leaf([3.0]), torch.full((2, 3, 1), 2.0).transpose(0, 1), torch.full((3, 2), 5.0)
            optimizer = FusedSGD([w], lr=0.1)
            if hooked:
                optimizer.register_step_post_hook(lambda *_: None)
            with mode():
                fit(x, w, y, optimizer=optimizer, steps=1)
            assert w.item() == pytest.approx(2.6)


def test_autocast_is_that_of_the_loop() -> None:
    x, w, y, b, _ = drawn()
    v, c = copies(w, b)
    with torch.autocast("cpu", torch.bfloat16):
        losses = fit(x, w, y, b, optimizer=FusedSGD([w, b], lr=0.1), steps=3)
        expected = by_rounds(x, v, y, c, None, FusedSGD([v, c], lr=0.1), 3, len(x))
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected)
    assert torch.equal(w, v)


@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}], ids=str)
def test_16_bit_options(on: str, options: dict[str, Any]) -> None:
    if on == "reference" and "stochastic_rounding" in options:
        pytest.skip("the reference has no random numbers")
    x, w, y, b, _ = drawn(dtype=torch.bfloat16)
    v, c = copies(w, b)
    ours, theirs = FusedAdam([w, b], lr=0.1, **options), FusedAdam([v, c], lr=0.1, **options)
    losses = fit(x, w, y, b, optimizer=ours, steps=3)
    expected = by_rounds(x, v, y, c, None, theirs, 3, len(x))
    assert torch.equal(losses, expected)
    assert all(torch.equal(value, everything(theirs)[name]) for name, value in everything(ours).items())


def test_a_model_that_does_not_fit_a_program(launched: list[bool]) -> None:
    with use_backend("triton"):
        assert_as_the_loop(lambda params: FusedSGD(params, lr=1e-4), drawn(4, 600, 2), steps=2)
    assert launched == [False]


def test_no_rows(on: str) -> None:
    w = leaf([1.0, 2.0])
    losses = fit(torch.zeros(0, 2), w, torch.zeros(0), optimizer=FusedSGD([w], lr=0.1, momentum=0.9), steps=3)
    assert losses.isnan().all()
    assert w.tolist() == [1, 2]


@pytest.mark.parametrize("shape", [(0,), (1, 0), (2, 0)])
def test_no_features(on: str, shape: tuple[int, ...]) -> None:
    w, y = torch.zeros(shape, requires_grad=True), torch.ones(3, *shape[:-1])
    losses = fit(torch.zeros(3, 0), w, y, optimizer=FusedSGD([w], lr=0.1), steps=2)
    assert losses.tolist() == [1, 1]


def test_version_counters_rise(on: str) -> None:
    x, w, y, b, _ = drawn()
    before = w._version
    fit(x, w, y, b, optimizer=FusedSGD([w, b], lr=0.1), steps=1)
    assert w._version > before


def test_inputs_are_not_written(on: str) -> None:
    x, w, y, b, s = drawn()
    before = [tensor.clone() for tensor in (x, y, s)]
    fit(x, w, y, b, optimizer=FusedAdam([w, b]), steps=2, batch_size=3, sample_weight=s)
    assert all(torch.equal(*pair) for pair in zip((x, y, s), before, strict=True))


# Errors.


def test_the_optimizer_is_checked() -> None:
    x, w, y, b, _ = drawn()
    with pytest.raises(TypeError, match="optimizer must be a FusedSGD, FusedAdam or FusedAdamW, got SGD"):
        fit(x, w, y, b, optimizer=torch.optim.SGD([w, b]), steps=1)
    other = torch.zeros_like(w, requires_grad=True)
    for held in ([w], [w, b, other], [other, b], [w.detach().requires_grad_(), b]):
        with pytest.raises(ValueError, match="must hold exactly the given weight and bias"):
            fit(x, w, y, b, optimizer=FusedSGD(held), steps=1)
    with pytest.raises(ValueError, match="exactly the given weight;"):
        fit(x, w, y, optimizer=FusedSGD([w, b]), steps=1)
    with pytest.raises(TypeError, match="optimizer"):
        fit(x, w, y, b, steps=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps is -1, expected at least 0"),
        ({"steps": 1.0}, TypeError, "steps must be an int, got float"),
        ({"steps": True}, TypeError, "steps must be an int, got bool"),
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected 1 to the number of rows, 7"),
        ({"batch_size": 8}, ValueError, "batch_size is 8, expected 1 to the number of rows, 7"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an int"),
        ({"sample_weight": torch.ones(6)}, ValueError, r"sample_weight has shape \(6,\)"),
        ({"target": torch.ones(7, 3)}, ValueError, r"target has shape \(7, 3\)"),
        ({"input": torch.ones(7, 2)}, RuntimeError, r"input has shape \(7, 2\) and weight \(2, 3\)"),
        ({"target": torch.ones(7, 2).double()}, TypeError, "float64"),
        ({"input": None}, TypeError, "input must be a torch.Tensor"),
    ],
    ids=str,
)
def test_arguments_are_checked_and_nothing_is_written(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, w, y, b, _ = drawn()
    optimizer, before = FusedAdam([w, b]), w.detach().clone()
    given = {"input": x, "weight": w, "target": y, "bias": b, "optimizer": optimizer, "steps": 0, **options}
    with pytest.raises(error, match=message):
        linear_mse_fit(**given)
    assert torch.equal(w, before)
    assert not optimizer.state


def test_the_reference_takes_lists() -> None:
    losses, (weight,), _ = reference.fit([[2.0]], [3.0], [5.0], step=sgd.step, lr=0.1, steps=2)
    assert losses == pytest.approx([1.0, 0.04])
    assert weight == pytest.approx([2.52])
