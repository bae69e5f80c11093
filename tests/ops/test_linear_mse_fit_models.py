"""``linear_mse_fit`` over a batch of models: each as by itself, with its own rows, options, clip, guard and count."""

import math
from typing import Any

import pytest
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD, linear_mse_loss, use_backend
from gradkernels import linear_mse_fit as fit
from torch import Tensor

from .test_linear_mse_fit import DELIVERED, DELIVERIES, assert_same, copies, everything, half, launched, on

__all__ = ["launched", "on"]
B, N, D, K = 3, 5, 2, 2


def stacks(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def model(tensor: Tensor | None, b: int, own: bool) -> Tensor | None:
    """A copy of what model b has of a tensor."""
    return None if tensor is None else (tensor[b] if own else tensor).detach().clone()


def one_by_one(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    b: Tensor | None,
    s: Tensor | None,
    make: Any,
    rows: Any = None,
    **options: Any,
) -> list[tuple[Tensor, dict[str, Tensor], Any]]:
    """Each model by itself, in NumPy: losses, everything, optimizer. ``make(params, model)``; ``rows``: its slice."""
    results = []
    for i in range(len(w)):
        params = [param[i].detach().clone().requires_grad_() for param in (w, b) if param is not None]
        if rows is not None:
            data = [None if tensor is None else tensor[rows[i]] for tensor in (x, y, s)]
        else:
            of_model = s is not None and (s.dim() == 3 or s.shape == (len(w), x.shape[-2]))
            data = [
                model(x, i, x.dim() == 3),
                model(y, i, y.dim() == 3),
                model(s, i, of_model),
            ]
        optimizer = make(params, i)
        with use_backend("reference"):
            losses = fit(
                *(data[0], params[0], data[1], params[1] if len(params) > 1 else None),
                optimizer=optimizer, sample_weight=data[2], **options,
            )  # fmt: skip
        results.append((losses, everything(optimizer), optimizer))
    return results


def assert_each_as_by_itself(
    losses: Tensor, optimizer: Any, singles: Any, dtype: torch.dtype = torch.float32
) -> None:
    found = everything(optimizer)
    for b, (expected, wanted, _) in enumerate(singles):
        # Stacked, SGD counts its steps in the state, and has a buffer where another model has momentum.
        ours = {key: value[b] for key, value in found.items() if key in wanted}
        assert_same(ours | {"losses": losses[:, b]}, wanted | {"losses": expected}, dtype)


ROWS = {
    "own rows": ((B, N, D), (B, N, K), (B, N)),
    "shared input": ((N, D), (B, N, K), (B, N, K)),
    "shared target": ((B, N, D), (N, K), (N,)),
    "all shared": ((N, D), (N, K), (N, K)),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_rows(on: str, rows: str, stacked: bool, launched: list[bool]) -> None:
    x, y, s = (torch.randn(shape) for shape in ROWS[rows])
    s = s.abs() + 0.5
    w, b = stacks((B, K, D), (B, K))
    singles = one_by_one(x, w, y, b, s, lambda p, _: FusedAdam(p, lr=0.1), steps=4, batch_size=3)
    optimizer = FusedAdam([w, b], lr=0.1, stacked=stacked)
    losses = fit(x, w, y, b, optimizer=optimizer, steps=4, batch_size=3, sample_weight=s)
    assert losses.shape == (4, B)
    assert all(launched)
    if not stacked:  # there is one step for all
        for state in optimizer.state.values():
            assert state["step"].item() == 4
            state["step"] = state["step"].expand(B)
    assert_each_as_by_itself(losses, optimizer, singles)


# Numbers that float32 holds.
RATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (FusedSGD, {"lr": [0.125, 0.0625, 0.0]}),
    "momentum": (
        FusedSGD,
        {"lr": 0.125, "momentum": [0.875, 0.0, 0.5], "dampening": 0.25, "weight_decay": [0.125, 0.0, 0.5]},
    ),
    "nesterov": (
        FusedSGD,
        {"lr": [0.0625, 0.125, 0.25], "momentum": 0.875, "nesterov": True, "maximize": True},
    ),
    "adam": (
        FusedAdam,
        {
            "lr": [0.125, 0.25, 0.0],
            "betas": ([0.875, 0.5, 0.0], [0.9375, 0.75, 0.5]),
            "weight_decay": [0.0, 0.125, 0.25],
        },
    ),
    "amsgrad": (FusedAdam, {"lr": [0.125, 0.25, 0.5], "amsgrad": True, "maximize": True}),
    "adamw": (FusedAdamW, {"lr": [0.125, 0.25, 0.5], "betas": (0.875, [0.9375, 0.75, 0.5])}),
}


def of_model(value: Any, b: int | None) -> Any:
    """An option of model b, or of all as a tensor."""
    if isinstance(value, tuple):
        return tuple(of_model(each, b) for each in value)
    if isinstance(value, list):
        return torch.tensor(value) if b is None else value[b]
    return value


@pytest.mark.parametrize("guard", [{}, {"max_norm": 0.5, "on_nonfinite": "skip"}], ids=["", "guarded"])
@pytest.mark.parametrize("name", RATES)
def test_options_of_each_model(on: str, name: str, guard: dict[str, Any], launched: list[bool]) -> None:
    make, options = RATES[name]
    double = torch.float64
    x, y = torch.randn(B, N, D, dtype=double), torch.randn(B, N, K, dtype=double)
    w, b = stacks((B, K, D), (B, K), dtype=double)

    def single(params: list[Tensor], i: int) -> Any:
        return make(params, **{key: of_model(value, i) for key, value in options.items()}, **guard)

    singles = one_by_one(x, w, y, b, None, single, steps=5, batch_size=3)
    optimizer = make(
        [w, b], **{key: of_model(value, None) for key, value in options.items()}, **guard, stacked=True
    )
    losses = fit(x, w, y, b, optimizer=optimizer, steps=5, batch_size=3)
    assert_each_as_by_itself(losses, optimizer, singles, double)
    assert all(launched)
    if name == "momentum":  # the first step of momentum is yet to come where there was none
        assert all(state["step"].tolist() == [5, 0, 5] for state in optimizer.state.values())


def test_lr_scale_multiplies_the_rate(on: str) -> None:
    x, y = torch.randn(B, N, D), torch.randn(B, N, K)
    w, b = stacks((B, K, D), (B, K))
    scale = [1.0, 0.5, 0.0]
    singles = one_by_one(
        x, w, y, b, None, lambda p, i: FusedAdamW(p, lr=0.1 * scale[i], weight_decay=0.3), steps=3
    )
    optimizer = FusedAdamW([w, b], lr=0.1, weight_decay=0.3, stacked=True, lr_scale=torch.tensor(scale))
    losses = fit(x, w, y, b, optimizer=optimizer, steps=3)
    assert_each_as_by_itself(losses, optimizer, singles)


@pytest.mark.parametrize("make", [FusedSGD, FusedAdam])
def test_an_inactive_model_is_left_out(on: str, make: Any) -> None:
    """It keeps parameters, state and step, its grad_norm is nan; its losses are those of what it has."""
    x, y = torch.randn(B, N, D), torch.randn(B, N, K)
    w, b = stacks((B, K, D), (B, K))
    options: dict[str, Any] = {"momentum": 0.9} if make is FusedSGD else {}
    optimizer = make([w, b], lr=0.1, max_norm=0.5, on_nonfinite="skip", stacked=True, **options)
    fit(x, w, y, b, optimizer=optimizer, steps=2)
    v, c = copies(w, b)
    before = {key: value.clone() for key, value in everything(optimizer).items()}
    optimizer.active = torch.tensor([True, False, True])
    losses = fit(x, w, y, b, optimizer=optimizer, steps=3, batch_size=2)
    after = everything(optimizer)
    for key, value in before.items():
        if key != "grad_norm":
            assert torch.equal(after[key][1], value[1]), key
            assert not torch.equal(after[key][0], value[0]), key
    assert after["grad_norm"].isnan().tolist() == [False, True, False]
    frozen = [linear_mse_loss(x[1, rows], v[1], y[1, rows], c[1]).item() for rows in ([0, 1], [2, 3], [4, 0])]
    assert losses[:, 1].tolist() == pytest.approx(frozen, rel=1e-5)


def test_a_model_that_is_not_finite_stops_alone(on: str, launched: list[bool]) -> None:
    """Model 1 has an infinite row, 3: it misses the rounds with it, and they are not counted in its step.

    The second call begins with unequal steps.
    """
    x, y = torch.randn(B, 6, D), torch.randn(B, 6, K)
    x[1, 3, 0] = math.inf
    w, b = stacks((B, K, D), (B, K))
    optimizer = FusedAdam([w, b], lr=0.1, on_nonfinite="skip", stacked=True)
    singles = [[param[i].detach().clone().requires_grad_() for param in (w, b)] for i in range(B)]
    alone = [FusedAdam(params, lr=0.1, on_nonfinite="skip") for params in singles]
    for call in (1, 2):
        losses = fit(x, w, y, b, optimizer=optimizer, steps=4, batch_size=2)
        for i, (v, c) in enumerate(singles):
            with use_backend("reference"):
                expected = fit(x[i], v, y[i], c, optimizer=alone[i], steps=4, batch_size=2)
            ours = {key: value[i] for key, value in everything(optimizer).items()}
            assert_same(ours | {"": losses[:, i]}, everything(alone[i]) | {"": expected}, torch.float32)
        assert optimizer.steps_skipped.tolist() == [each.steps_skipped for each in alone] == [0, call, 0]
        assert optimizer.state[w]["step"].tolist() == [4 * call, 3 * call, 4 * call]
        assert losses.isfinite().all(0).tolist() == [True, False, True]
    assert all(launched)


@pytest.mark.parametrize("ends", [None, [0, 4, 4, 8]], ids=str)
def test_a_zero_sum_of_sample_weights_gives_nan(on: str, ends: list[int] | None) -> None:
    """To the first model alone; the second of the ragged rows has none, and stays as it is."""
    rows = (8,) if ends else (B, 4)
    x, y, s = torch.randn(*rows, D), torch.randn(*rows, K), torch.rand(rows) + 0.5
    s.view(-1)[:4] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    w, b = stacks((B, K, D), (B, K))
    before = w[1].detach().clone()
    given = {"sample_weight": s, "offsets": torch.tensor(ends) if ends else None}
    losses = fit(x, w, y, b, optimizer=FusedSGD([w, b], lr=0.1), steps=2, **given)
    assert losses.isnan().tolist() == [[True, ends is not None, False]] * 2
    assert w.isnan().flatten(1).all(1).tolist() == b.isnan().all(1).tolist() == [True, False, False]
    assert w[1:].isfinite().all()
    assert torch.equal(w[1], before) == (ends is not None)


def test_a_divergence_touches_no_other_model(on: str) -> None:
    x, y = torch.randn(N, D) * 1e12, torch.randn(N, K)
    (w,) = stacks((B, K, D))
    rates = torch.tensor([0.0, 1e3, 1e-26])
    optimizer = FusedSGD([w], lr=rates, stacked=True)
    losses = fit(x, w, y, optimizer=optimizer, steps=8)
    assert losses.isfinite().all(0).tolist() == [True, False, True]
    assert w.isfinite().flatten(1).all(1).tolist() == [True, False, True]
    assert losses[-1, 2] < losses[0, 2]


def test_clipping_without_stacked_is_by_the_norm_of_all(on: str) -> None:
    x, y = torch.randn(B, N, D), torch.randn(B, N, K)
    w, b = stacks((B, K, D), (B, K))
    v, c = copies(w, b)
    ours, theirs = (FusedAdam(p, lr=0.1, max_norm=0.3, on_nonfinite="skip") for p in ([w, b], [v, c]))
    losses = fit(x, w, y, b, optimizer=ours, steps=3)
    expected = []
    for _ in range(3):
        theirs.zero_grad()
        loss = linear_mse_loss(x, v, y, c)
        loss.sum().backward()
        expected.append(loss.detach())
        theirs.step()
    found, wanted = everything(ours) | {"": losses}, everything(theirs) | {"": torch.stack(expected)}
    assert_same(found, wanted, torch.float32)


def test_weights_of_a_batch_are_told_from_weights_of_models(on: str) -> None:
    """A batch of sample_weight (N, K) has B rows and as many columns as rows: it stays what it was."""
    x, y, s = torch.randn(4, D), torch.randn(4, 2), torch.rand(4, 2) + 0.1
    (w,) = stacks((2, 2, D))
    for hooked in (False, True):
        (v,) = copies(w)
        singles = one_by_one(x, v, y, None, s, lambda p, _: FusedSGD(p, lr=0.1), steps=3, batch_size=2)
        optimizer = FusedSGD([v], lr=0.1, stacked=True)
        if hooked:
            optimizer.register_step_post_hook(lambda *_: None)
        losses = fit(x, v, y, optimizer=optimizer, steps=3, batch_size=2, sample_weight=s)
        assert_each_as_by_itself(losses, optimizer, singles)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_ragged_rows(on: str, kind: torch.dtype) -> None:
    """The second model has no rows: its losses are nan, its gradients 0; row 6 is of no model."""
    ends = [0, 2, 2, 6]
    x, y, s = torch.randn(7, D), torch.randn(7, K), torch.rand(7) + 0.5
    x[6] = y[6] = math.nan
    w, b = stacks((B, K, D), (B, K))
    before = w[1].detach().clone()
    rows = [slice(*ends[i : i + 2]) for i in range(B)]
    for weights in (None, s, s.unsqueeze(1) * torch.tensor([1.0, 2.0])):
        v, c = copies(w, b)
        singles = one_by_one(
            x, v, y, c, weights, lambda p, _: FusedAdam(p, lr=0.1, weight_decay=0.1), rows, steps=3
        )
        optimizer = FusedAdam([v, c], lr=0.1, weight_decay=0.1, stacked=True)
        cuts = torch.tensor(ends, dtype=kind)
        losses = fit(x, v, y, c, optimizer=optimizer, steps=3, sample_weight=weights, offsets=cuts)
        assert losses.isnan().tolist() == [[False, True, False]] * 3
        del singles[1]
        for key, value in everything(optimizer).items():
            assert value.isfinite().all(), key
        kept = torch.tensor([0, 2])
        found = {key: value[kept] for key, value in everything(optimizer).items()}
        for place, (expected, wanted, _) in enumerate(singles):
            ours = {key: value[place] for key, value in found.items()}
            assert_same(ours | {"": losses[:, kept[place]]}, wanted | {"": expected}, torch.float32)
    (v,) = copies(w)
    fit(x, v, y, optimizer=FusedSGD([v], lr=0.1), steps=2, offsets=torch.tensor(ends))
    assert torch.equal(v[1], before)
    (u,) = copies(w)
    strided = torch.tensor(ends, dtype=kind).repeat_interleave(2)[::2]
    fit(x, u, y, optimizer=FusedSGD([u], lr=0.1), steps=2, offsets=strided)
    assert torch.equal(u, v)


def test_ragged_rows_are_checked() -> None:
    x, y = torch.randn(7, D), torch.randn(7, K)
    (w,) = stacks((B, K, D))
    optimizer = FusedSGD([w], lr=0.1)
    with pytest.raises(ValueError, match="batch_size is 2, but ragged rows"):
        fit(x, w, y, optimizer=optimizer, steps=1, batch_size=2, offsets=torch.tensor([0, 1, 2, 3]))
    for wrong in ([0, 3, 2, 7], [0, 1, 2, 8], [-1, 1, 2, 7]):
        for steps in (0, 1):
            with pytest.raises(ValueError, match="offsets"):
                fit(x, w, y, optimizer=optimizer, steps=steps, offsets=torch.tensor(wrong))
    with pytest.raises(ValueError, match="offsets"):
        fit(x, w, y, optimizer=optimizer, steps=1, offsets=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="offsets"):
        fit(x, *copies(w[0]), y, optimizer=optimizer, steps=1, offsets=torch.tensor([0, 7]))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_share_of_the_models_has_the_same_bits(device: torch.device) -> None:
    """A program per model: it does not matter how many others there are. (torch's products on a CPU round by that.)"""
    x, y = torch.randn(5, N, D, device=device), torch.randn(5, N, K, device=device)
    rates, start = torch.linspace(0.01, 0.5, 5, device=device), torch.randn(5, K, D, device=device)

    def trained(models: slice) -> tuple[Tensor, Tensor]:
        w = start[models].clone().requires_grad_()
        optimizer = FusedAdam([w], lr=rates[models], stacked=True, max_norm=1.0)
        return fit(x[models], w, y[models], optimizer=optimizer, steps=3), w.detach()

    losses, weights = trained(slice(0, 5))
    for models in (slice(0, 2), slice(2, 5), slice(4, 5)):
        own, w = trained(models)
        assert torch.equal(own, losses[:, models])
        assert torch.equal(w, weights[models])


def test_no_models(on: str) -> None:
    w = torch.zeros(0, K, D, requires_grad=True)
    losses = fit(
        torch.randn(N, D), w, torch.randn(N, K), optimizer=FusedSGD([w], lr=0.1, stacked=True), steps=2
    )
    assert losses.shape == (2, 0)
    (w,) = stacks((B, K, D))
    optimizer = FusedSGD([w], lr=0.1, stacked=True)
    assert fit(torch.randn(N, D), w, torch.randn(N, K), optimizer=optimizer, steps=0).shape == (0, B)


def test_wrong_sizes() -> None:
    (w,) = stacks((B, K, D))
    optimizer = FusedSGD([w], lr=0.1)
    for x, y in (((2, N, D), (N, K)), ((N, D), (2, N, K)), ((N, 7), (N, K)), ((B, N, D), (B, N))):
        with pytest.raises(ValueError, match=r"\(3, 2, 2\)"):
            fit(torch.randn(x), w, torch.randn(y), optimizer=optimizer, steps=1)
    with pytest.raises(ValueError, match="batch_size is 6"):
        fit(torch.randn(N, D), w, torch.randn(N, K), optimizer=optimizer, steps=1, batch_size=6)


def test_a_stack_of_one_models_rows(on: str, launched: list[bool]) -> None:
    """With stacked=True a weight (K, D) is K models to the optimizer, and one to the loss."""
    x, y = torch.randn(N, D), torch.randn(N, K)
    (w,) = stacks((K, D))
    (v,) = copies(w)
    rates = torch.tensor([0.1, 0.0])
    losses = fit(x, w, y, optimizer=FusedSGD([w], lr=rates, stacked=True), steps=2)
    assert losses.shape == (2,)
    assert torch.equal(w[1], v[1])
    assert not torch.equal(w[0], v[0])
    assert not launched


def test_whoever_watches_sees_all_models(on: str, launched: list[bool]) -> None:
    x, y = torch.randn(B, N, D), torch.randn(B, N, K)
    w, b = stacks((B, K, D), (B, K))
    v, c = copies(w, b)
    rates = torch.tensor([0.1, 0.2, 0.3])
    ours, plain = (FusedAdam(p, lr=rates, stacked=True) for p in ([w, b], [v, c]))
    norms: list[Any] = []
    ours.register_step_pre_hook(lambda *_: norms.append(w.grad.norm().item()))
    losses = fit(x, w, y, b, optimizer=ours, steps=3, batch_size=4)
    assert not launched
    expected = fit(x, v, y, c, optimizer=plain, steps=3, batch_size=4)
    assert_same(everything(ours) | {"": losses}, everything(plain) | {"": expected}, torch.float32)
    assert len(norms) == 3


def test_raise_names_the_models(on: str) -> None:
    x, y = torch.randn(B, N, D), torch.randn(B, N, K)
    x[1] = math.inf
    w, b = stacks((B, K, D), (B, K))
    (before,) = copies(w)
    optimizer = FusedAdam([w, b], on_nonfinite="raise", stacked=True)
    with pytest.raises(FloatingPointError, match="model 1"):
        fit(x, w, y, b, optimizer=optimizer, steps=3)
    assert torch.equal(w, before)
    assert w.grad is None


# The lessons, each rate being one of a thousand.


def a_thousand(lr: float) -> tuple[Tensor, int]:
    rates = torch.logspace(-4, 0, 1000)
    rates[617] = lr
    return rates, 617


@pytest.mark.parametrize("backend", ["fallback", pytest.param("triton", marks=pytest.mark.full)])
def test_lessons_in_a_thousand(backend: str) -> None:
    with use_backend(backend):
        x, w, y, b, s = half([1, 2, 3], [3, 5, 7], 0, 0)
        rates, at = a_thousand(0.08)
        ws, bs = (param.detach().expand(1000, *param.shape).clone().requires_grad_() for param in (w, b))
        optimizer = FusedSGD([ws, bs], lr=rates, stacked=True)
        losses = fit(x, ws, y, bs, optimizer=optimizer, steps=20, sample_weight=s)
        assert [round(losses[t, at].item(), 4) for t in (0, 1, 19)] == [13.8333, 4.2812, 0.0005]
        assert [round(value, 3) for value in (ws[at, 0].item(), bs[at, 0].item())] == [2.037, 0.917]

        x, y = map(torch.tensor, DELIVERIES)
        rates, at = a_thousand(0.05)
        ws = torch.tensor([0.8, 1.5]).expand(1000, 1, 2).clone().requires_grad_()
        losses = fit(x, ws, y.unsqueeze(1), optimizer=FusedSGD([ws], lr=rates, stacked=True), steps=12)
        assert [round(loss, 4) for loss in losses[:, at].tolist()] == DELIVERED
