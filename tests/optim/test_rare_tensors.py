"""What goes through torch's own loop, or has no values: sparse, complex, differentiable, fake, subclasses."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from .optimizers import (
    FULL_OPTIONS,
    NAMES,
    SMALL,
    assert_close,
    assert_equal_bits,
    assert_same_bits,
    bits,
    copies,
    failure,
    make_pair,
    make_params,
    ours_for,
    pair_over,
    parameters,
    run,
    set_gradients,
    some_gradients,
    spread,
    step_by,
    step_by_ones,
    theirs_for,
    values_of,
)


def test_sparse_gradients(name: str) -> None:
    ours, theirs = make_pair(name, shapes=((20, 3), (7,)), lr=0.01)
    dense = [grads[0] * (torch.arange(20) % 4 == 0).unsqueeze(1) for grads in some_gradients(theirs, 10)]
    plain = [torch.ones(7) * step for step in range(10)]
    if name != "SGD":
        refusals = []
        for optimizer in (ours, theirs):
            set_gradients(optimizer, [dense[0].to_sparse(), plain[0]])
            before = bits(optimizer)
            refusals.append(failure(optimizer.step))
            assert_same_bits(before, bits(optimizer))
        assert refusals[0] == refusals[1]
        return
    for grad, other in zip(dense, plain, strict=True):
        for optimizer in (ours, theirs):
            step_by(optimizer, [grad.to_sparse(), other])
    assert_close(ours, theirs)


def complex_params() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.complex(spread((9,), 0.03), spread((9,), 0.03))), *make_params(((65,),))]


def test_complex_parameters(name: str) -> None:
    params = complex_params()
    ours, theirs = pair_over(params, name, **FULL_OPTIONS[name])
    for _ in range(10):
        grads = [torch.complex(spread((9,), 4.0), spread((9,), 4.0)), spread((65,), 4.0, torch.float32)]
        for optimizer in (ours, theirs):
            step_by(optimizer, grads)
    assert torch.equal(parameters(ours)[0], parameters(theirs)[0])  # torch's own loop: the same bits
    torch.testing.assert_close(parameters(ours)[1], parameters(theirs)[1])
    for key, value in theirs.state[parameters(theirs)[0]].items():
        assert torch.equal(ours.state[parameters(ours)[0]][key], value), key


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_clipped(name: str, dtype: torch.dtype) -> None:
    start = torch.complex(spread((9,), 0.03), spread((9,), 0.03)).to(dtype)
    ours, theirs = pair_over([torch.nn.Parameter(start)], name, shared={"max_norm": 0.5}, lr=0.01)
    for _ in range(10):
        grad = torch.complex(spread((9,), 4.0), spread((9,), 4.0)).to(dtype)
        for optimizer in (ours, theirs):
            parameters(optimizer)[0].grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters(theirs), 0.5, foreach=False)
        ours.step()
        theirs.step()
        assert torch.equal(parameters(ours)[0].grad, grad)
    rtol = 1e-5 if dtype == torch.complex64 else 1e-13
    torch.testing.assert_close(ours.grad_norm, norm, rtol=rtol, atol=0)
    assert_close(ours, theirs, rtol=rtol, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11, once, though they are asked for
@pytest.mark.parametrize(("name", "kind"), [*((name, "complex") for name in NAMES), ("SGD", "sparse")])
def test_scale_guard_and_clip_reach_torch_s_own_loop(name: str, kind: str) -> None:
    """Beside a parameter that a launch updates; the third gradient is not finite, and its step is skipped."""
    dtype = torch.complex64 if kind == "complex" else torch.float32
    start = [torch.randn(6, 3, dtype=dtype), torch.randn(4)]
    ours, theirs = pair_over(start, name, shared={"max_norm": 0.5, "on_nonfinite": "skip"}, lr=0.01)
    ours.grad_scale = torch.tensor(4.0)
    places = torch.tensor([[0, 2, 2, 5]])  # one row twice: the norm is that of their sum
    for step in range(5):
        values = torch.randn(6 if kind == "complex" else 4, 3, dtype=dtype)
        values[1, 1] = torch.inf if step == 2 else values[1, 1]
        if kind == "sparse":
            values = torch.sparse_coo_tensor(places, values, (6, 3), check_invariants=True)
        grads = [values, torch.randn(4)]
        before = bits(ours)
        step_by(ours, [4 * grad for grad in grads])
        if step == 2:
            assert_same_bits(before, bits(ours))
            continue
        dense = [grad.to_dense() for grad in grads]
        norm = torch.nn.utils.get_total_norm([dense[0].abs(), dense[1]])
        torch.testing.assert_close(ours.grad_norm, norm)
        step_by(theirs, [grad * (0.5 / norm).clamp(max=1.0) for grad in grads])
        for param, grad in zip(parameters(ours), dense, strict=True):
            torch.testing.assert_close(param.grad.to_dense(), grad)  # unscaled and not clipped
    assert ours.steps_skipped == 1
    assert_close(ours, theirs)


def test_differentiable(name: str) -> None:
    """The steps themselves are differentiated: by the gradient and by every rate that may be a tensor."""
    results = []
    grad = spread((5,), 4.0).requires_grad_()
    start = spread((5,), 0.03)
    for cls in (ours_for(name), theirs_for(name)):
        lr, decay, *betas = (
            torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.01, 0.3, 0.8, 0.9)
        )
        options = {} if name == "SGD" else {"betas": tuple(betas)}
        leaf = start.clone().requires_grad_().clone()
        optimizer = cls([start.clone()], lr=lr, weight_decay=decay, differentiable=True, **options)
        optimizer.param_groups[0]["params"] = [leaf]
        for each in (grad, grad.square() - 1):
            leaf.grad = each.clone()
            optimizer.step()
        rates = [lr, decay, *options.get("betas", ())]
        results.append(torch.autograd.grad((leaf * torch.arange(5.0)).sum(), [grad, *rates]))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)
        assert int(mine.count_nonzero()) > 0


def test_differentiable_through_the_clip(name: str) -> None:
    """The factor depends on the gradients too."""
    start = spread((5,), 0.03)
    options = {} if name == "SGD" else {"eps": 1.0}  # else the size of the gradients hardly counts

    def updated(grad: Tensor) -> Tensor:
        optimizer = ours_for(name)([start.clone()], lr=1.0, differentiable=True, max_norm=0.5, **options)
        leaf = parameters(optimizer)[0].requires_grad_().clone()
        optimizer.param_groups[0]["params"] = [leaf]
        leaf.grad = grad
        optimizer.step()
        return leaf

    assert torch.autograd.gradcheck(updated, spread((5,), 4.0).requires_grad_())


def test_clipped_complex_without_values() -> None:
    """As torch's loop, which serves them: clip and update ask for no value."""
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
        param.grad = torch.ones_like(param)
        optimizer = ours_for("SGD")([param], lr=0.1, momentum=0.9, max_norm=0.5)
        optimizer.step()
        assert isinstance(optimizer.state[param]["momentum_buffer"], FakeTensor)


GUARDS: list[dict[str, Any]] = [
    {},
    {"max_norm": 0.5},
    {"on_nonfinite": "skip"},
    {"max_norm": 0.5, "on_nonfinite": "raise"},
    {"master_weights": True},
    {"stochastic_rounding": True},
]


@pytest.mark.parametrize("options", GUARDS, ids=str)
@pytest.mark.parametrize("kind", ["fake", "fake outside its mode", "meta"])
def test_tensors_without_values(name: str, kind: str, options: dict[str, Any]) -> None:
    """What tools that estimate memory run: state of the right shapes and dtypes, and no value wanted anywhere."""
    mode = FakeTensorMode()
    device = "meta" if kind == "meta" else "cpu"
    with nullcontext() if kind == "meta" else mode:
        shapes = {torch.bfloat16: (3, 4), torch.float32: (5,)}
        params = [
            torch.nn.Parameter(torch.randn(s, dtype=dtype, device=device)) for dtype, s in shapes.items()
        ]
    with mode if kind == "fake" else nullcontext():
        ours = ours_for(name)(params, **FULL_OPTIONS[name], **options)
        for _ in range(3):
            step_by_ones(ours)
        assert (ours.grad_norm is None) == (not options.keys() & {"max_norm", "on_nonfinite"})
        assert ours.grad_norm is None or type(ours.grad_norm) is type(torch.empty_like(params[0]))
    real = ours_for(name)(
        [torch.nn.Parameter(torch.zeros(p.shape, dtype=p.dtype)) for p in params],
        **FULL_OPTIONS[name],
        **options,
    )
    step_by_ones(real)
    for param, other in zip(params, parameters(real), strict=True):
        state, expected = ours.state[param], real.state[other]
        assert state.keys() == expected.keys()
        for key, value in state.items():
            assert isinstance(value, FakeTensor) == (kind != "meta"), key
            assert (value.shape, value.dtype) == (expected[key].shape, expected[key].dtype), key
            assert value.device == param.device


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
@pytest.mark.parametrize("options", GUARDS, ids=str)
def test_make_fx_traces_the_step(name: str, options: dict[str, Any], tracing_mode: str) -> None:
    """The graph does what the step does, by the same operators that torch.compile captures."""
    start = make_params(((3, 4), (5,)), torch.bfloat16)
    grads = [torch.randn_like(param) for param in start]
    ours, plain = (ours_for(name)(copies(start), **FULL_OPTIONS[name], **options) for _ in range(2))
    for optimizer in (ours, plain):
        run(optimizer, [grads])  # the state is there before the graph, which takes it for constant tensors
    before = values_of(ours)

    def step(x: Tensor) -> Tensor:
        ours.step()
        return x + 1

    graph = make_fx(step, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(torch.zeros(()))
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("optimizer_step" in target for target in targets) == 1, targets
    if tracing_mode == "fake":
        assert_same_bits(values_of(ours), before)
    else:
        plain.step()
    graph(torch.zeros(()))
    plain.step()
    assert_equal_bits(ours, plain)
    ours.step()  # nothing of the trace is left behind
    plain.step()
    assert_equal_bits(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_a_subclass_keeps_in_other_tensors(name: str, dtype: torch.dtype) -> None:
    """Quantized training weights, for one: only torch's own operations know how to write them. They have no master."""
    start = [spread((5, 3), 0.03, dtype), spread((7,), 0.03, torch.float32)]
    options = {**FULL_OPTIONS[name], "lr": 0.01}

    def params() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(TwoTensor(start[0].clone(), 2 * start[0])), *copies(start[1:])]

    theirs = theirs_for(name)(params(), foreach=False, **options)
    ours = ours_for(name)(params(), max_norm=0.7, master_weights=True, **options)
    for grads in some_gradients(theirs, 5):
        set_gradients(theirs, grads)
        set_gradients(ours, grads)
        torch.nn.utils.clip_grad_norm_(parameters(theirs), 0.7, foreach=False)
        ours.step()
        theirs.step()
    double, plain = parameters(ours)
    other_double, other_plain = parameters(theirs)
    for mine, other in ((double.a, other_double.a), (double.b, other_double.b), (plain, other_plain)):
        torch.testing.assert_close(mine, other)
    assert not torch.equal(double.b, 2 * start[0])
    state, expected = ours.state[double], theirs.state[other_double]
    assert {key: type(value) for key, value in state.items()} == {
        key: type(value) for key, value in expected.items()
    }


def test_gradients_that_a_subclass_keeps_in_other_tensors(name: str) -> None:
    """Beside ordinary parameters: torch's own operations again, whatever the subclass makes of them."""
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    for each in some_gradients(theirs, 3):
        for optimizer in (ours, theirs):
            step_by(optimizer, each, lambda grad: TwoTensor(grad.clone(), 3 * grad))
    assert_close(ours, theirs)


@pytest.mark.parametrize("what", ["complex", "sparse", "integer", "meta"])
def test_fused_true_refuses_what_torch_s_refuses(name: str, what: str) -> None:
    refusals = []
    for cls in (ours_for(name), theirs_for(name)):
        if what == "complex":
            params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))]
            grads = [torch.ones(3, dtype=torch.complex64)]
        elif what == "integer":
            params = [torch.ones(3, dtype=torch.int64)]
            grads = [torch.ones(3, dtype=torch.int64)]
        elif what == "meta":
            params = list(torch.nn.Linear(2, 3, device="meta").parameters())
            grads = [torch.ones_like(param) for param in params]
        else:
            params, grads = make_params(((5, 3),)), [torch.ones(5, 3).to_sparse()]
        optimizer = cls(params, lr=1, fused=True)  # construction passes, as torch's does
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        refusals.append(failure(optimizer.step))
        assert what != "meta" or not any(optimizer.state.values()), "a refused step leaves no state behind"
    assert refusals[0] == refusals[1]
    assert refusals[0][0] is RuntimeError


def test_a_group_that_is_listed_twice_is_saved_twice(name: str) -> None:
    states = []
    for optimizer in make_pair(name, shapes=SMALL):
        run(optimizer, some_gradients(optimizer, 1))
        optimizer.param_groups.extend(optimizer.param_groups)
        states.append(optimizer.state_dict())
        assert states[-1]["param_groups"][0] == states[-1]["param_groups"][1]
    assert states[0]["state"].keys() == states[1]["state"].keys()


@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}], ids=str
)
def test_foreach_and_fused_select_nothing(name: str, flags: dict[str, bool]) -> None:
    results = []
    gradients = None
    for given in ({}, flags):
        torch.manual_seed(1)
        ours = ours_for(name)(make_params(SMALL), **FULL_OPTIONS[name], **given)
        gradients = gradients or some_gradients(ours, 4)
        run(ours, gradients)
        results.append(ours)
        for key, value in given.items():
            assert ours.param_groups[0][key] is value
    assert_equal_bits(*results)
