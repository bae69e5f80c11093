"""What training asks of a step beyond the update: AMP, clipping, the guard, low precision done well."""

import copy
import io
import itertools
import pickle
from typing import Any

import gradkernels.optim.step
import numpy as np
import pytest
import torch
from gradkernels import use_backend
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from ..helpers import assert_matches, to_numpy
from .optimizers import (
    NAMES,
    STEPS,
    Feed,
    ReferenceRun,
    assert_moved,
    assert_same_run,
    assert_same_state,
    cases_on_both_backends,
    copies,
    make_pair,
    make_params,
    on_both_backends,
    ours_for,
    parameters,
    set_gradients,
    spread,
    theirs_for,
)

SMALL = ((65,), (7, 9), ())
SCALE = 256.0  # a power of two: scaling and unscaling are exact
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.004, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "Adam": {"lr": 0.004, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.004, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True},
}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def bits(optimizer: Optimizer) -> list[Tensor]:
    """Copies of the parameters and of every state tensor that is not all zero.

    A first step skipped on the device may leave zeros where torch, which decides on the host, leaves nothing.
    """
    kept = [param.detach().clone() for param in parameters(optimizer)]
    for state in optimizer.state.values():
        kept += [value.clone() for value in state.values() if value.count_nonzero()]
    return kept


def assert_same_bits(before: list[Tensor], after: list[Tensor]) -> None:
    assert len(before) == len(after), "state appeared"
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def assert_only_zero_state(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            assert value.isfinite().all(), key
            assert int(value.count_nonzero()) == 0, key


# AMP.


def amp_step(optimizer: Any, scale: float | None, overflow: bool | None) -> None:
    """What GradScaler.step does to an optimizer that takes the scale itself."""
    device = parameters(optimizer)[0].device
    if scale is not None:
        optimizer.grad_scale = torch.tensor(scale, device=device)
    if overflow is not None:
        optimizer.found_inf = torch.tensor(float(overflow), device=device)
    optimizer.step()
    for name in ("grad_scale", "found_inf"):
        if hasattr(optimizer, name):
            delattr(optimizer, name)


@cases_on_both_backends(
    "skipped dtype",
    itertools.product([(1, 2, 6), (5,)], (torch.float32, torch.float16)),
    lambda skipped, dtype: (dtype is torch.float32) == (skipped[0] == 1),
)
def test_a_skipped_step_never_happened(
    name: str, skipped: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Overflow on the very first steps too: torch's fused SGD then uses memory that nobody wrote.

    Dampening makes the first step that is taken count as the first, whatever was skipped before it.
    """
    options = OPTIONS[name] if name == "SGD" else {**OPTIONS[name], "eps": 0.01}
    ours, theirs = make_pair(name, device, dtype, SMALL, **options)
    feed, reference = Feed(parameters(theirs)), ReferenceRun(theirs)
    start = [to_numpy(param).copy() for param in parameters(theirs)]
    for step in range(1, STEPS + 1):
        gradients = feed(step)
        set_gradients(ours, [grad * SCALE for grad in gradients])
        if step in skipped:
            parameters(ours)[1].grad[-1, -1] = float("inf")
            before = bits(ours)
            amp_step(ours, SCALE, True)
            assert_same_bits(before, bits(ours))
            if step <= 2 and skipped[0] == 1:
                assert_only_zero_state(ours)
            continue
        amp_step(ours, SCALE, False)
        for param, grad in zip(parameters(ours), gradients, strict=True):
            assert torch.equal(param.grad.cpu(), grad), "the unscaled gradient is left behind, as torch does"
        set_gradients(theirs, gradients)
        reference.step(gradients)
        theirs.step()
        assert_same_state(ours, theirs, reference, f"at step {step}")
    assert_moved(theirs, reference, start)
    assert ours.steps_skipped == len(skipped)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["SGD"])
def test_the_guard_sees_every_place_of_a_large_gradient(
    name: str, value: float, device: torch.device
) -> None:
    """Whole chunks at aligned addresses are the main path of every real model; their ends, and the rest after them."""
    places = (0, 1, 1023, 1024, 2048, 4095, 4096, 4999)
    param = torch.nn.Parameter(torch.ones(5000, device=device))
    ours = ours_for(name)([param], lr=0.1, on_nonfinite="skip")
    for count, place in enumerate(places, start=1):
        param.grad = torch.ones_like(param)
        assert param.grad.data_ptr() % 16 == 0
        param.grad[place] = value
        ours.step()
        assert ours.steps_skipped == count, f"place {place}"
        assert bool((param == 1).all()), f"place {place}"
    param.grad = torch.full_like(param, 2.0**127)  # finite, though the sum of squares is not one of float32
    ours.step()
    assert ours.steps_skipped == len(places)


@pytest.mark.parametrize("by", ["launches", "operators"])
def test_a_step_that_is_skipped_in_several_launches_counts_once(by: str, device: torch.device) -> None:
    """One launch per dtype; one operator per dtype and group."""
    params = copies(make_params(((5,),), torch.float32) + make_params(((4,), (3,)), torch.float64), device)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    ours = ours_for("SGD")(groups, lr=0.1, on_nonfinite="skip")
    for param in params:
        param.grad = torch.zeros_like(param)
    ours.step()
    params[1].grad[2] = torch.nan
    skips: list[Tensor] = []
    if by == "launches":
        ours.step()
    else:
        real = gradkernels.optim.step.optimizer_step

        def record(*args: Any) -> None:
            skips.append(args[-1])
            real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gradkernels.optim.step, "optimizer_step", record)
            assert ours._step_by_operators(compiling=True)
        assert len(skips) == 3
    assert ours.steps_skipped == 1


class ReadNothing(TorchDispatchMode):
    """Refuses what waits for a device: a tensor's value wanted on the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_step_on_the_kernels_reads_no_value(name: str, device: torch.device) -> None:
    """Neither the scale nor the overflow nor the norm; with a GPU, tests/optim/test_adam.py asks CUDA itself."""
    params = copies(make_params(SMALL), device)
    ours = ours_for(name)(params, max_norm=1.0, on_nonfinite="skip", **OPTIONS[name])
    feed = Feed(params)
    for step, overflow in ((1, True), (2, False), (3, False)):
        set_gradients(ours, feed(step))
        with ReadNothing():
            amp_step(ours, SCALE, overflow)
    assert ours.steps_skipped == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True], ids=["step", "unscale_clip_step"])
@on_both_backends
def test_grad_scaler(name: str, clip: bool, fused: bool, device: torch.device) -> None:
    """torch's own GradScaler on both: the same scales, the same numbers, overflow at steps 1 and 5."""
    options = {**OPTIONS[name], "lr": 0.1} if clip and name == "SGD" else OPTIONS[name]
    ours, theirs = make_pair(name, device, shapes=SMALL, **options)
    ours = ours_for(name)(parameters(ours), fused=fused, **options)
    feed, reference = Feed(parameters(theirs)), ReferenceRun(theirs)
    start = [to_numpy(param).copy() for param in parameters(theirs)]
    scalers = {
        optimizer: torch.amp.GradScaler(kind, init_scale=64.0, growth_interval=3, backoff_factor=0.5)
        for optimizer, kind in ((ours, device.type), (theirs, "cpu"))
    }
    for step in range(1, STEPS + 1):
        gradients = feed(step)
        for optimizer, scaler in scalers.items():
            scaler.scale(
                torch.zeros((), device=parameters(optimizer)[0].device)
            )  # makes the scale on first use
            set_gradients(optimizer, [grad * scaler.get_scale() for grad in gradients])
            if step in (1, 5):
                parameters(optimizer)[1].grad[0, 0] = float("nan")
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters(optimizer), 2.0, foreach=False)
            scaler.step(optimizer)
            scaler.update()
            assert not hasattr(optimizer, "grad_scale")
        assert scalers[ours].get_scale() == scalers[theirs].get_scale()
        if step in (1, 5):
            continue
        if clip:
            gradients = clipped(gradients, 2.0)[0]
        reference.step(gradients)
        assert_same_state(ours, theirs, reference, f"at step {step}")
    assert scalers[ours].get_scale() != 64.0
    assert_moved(theirs, reference, start)


@pytest.mark.parametrize("flags", [{}, {"fused": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_grad_scaler_calls_the_steps_that_it_calls_of_torch_s(name: str, flags: dict[str, bool]) -> None:
    """Training libraries take a step that GradScaler left out for skipped, and leave their scheduler out too."""
    called: list[list[int]] = []
    for cls in (ours_for(name), theirs_for(name)):
        first = cls(make_params(SMALL), **OPTIONS[name], **flags)
        copied = [copy.deepcopy(first), pickle.loads(pickle.dumps(first))] if cls is ours_for(name) else []
        for optimizer in (first, *copied):
            steps: list[bool] = []
            optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(True))
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            for value in (torch.inf, 1.0, torch.nan, 1.0):
                scaler.scale(torch.zeros(()))
                set_gradients(optimizer, [torch.full_like(p, value) for p in parameters(optimizer)])
                assert hasattr(optimizer, "_step_supports_amp_scaling") == flags.get("fused", False)
                before = len(steps)
                scaler.step(optimizer)
                scaler.update()
                steps += [False] * (len(steps) == before)
            called.append(steps)
    assert called == [[True] * 4 if flags.get("fused") else [False, True] * 2] * 4


@pytest.mark.parametrize(
    ("scale", "overflow"), [(4.0, None), (None, False)], ids=["scale_only", "found_inf_only"]
)
def test_either_half_of_the_protocol_works_alone(
    name: str, scale: float | None, overflow: bool | None
) -> None:
    """A user may set ``grad_scale`` without a scaler; after ``unscale_`` only ``found_inf`` comes."""
    ours, theirs = make_pair(name, shapes=SMALL, **OPTIONS[name])
    feed, reference = Feed(parameters(theirs)), ReferenceRun(theirs)
    for step in range(1, 5):
        gradients = feed(step)
        set_gradients(ours, [grad * (scale or 1.0) for grad in gradients])
        amp_step(ours, scale, overflow)
        set_gradients(theirs, gradients)
        reference.step(gradients)
        theirs.step()
        assert_same_state(ours, theirs, reference, f"at step {step}")


@pytest.mark.parametrize("overflow", [False, True])
@on_both_backends
def test_scale_and_overflow_may_have_a_dimension(name: str, overflow: bool, device: torch.device) -> None:
    """As gathered over devices, (1,): the state keeps its shapes."""
    ours, plain = (make_pair(name, device, shapes=SMALL, **OPTIONS[name])[0] for _ in range(2))
    for mine, other in zip(parameters(ours), parameters(plain), strict=True):
        mine.data.copy_(other.detach())
    for gradients in (Feed(parameters(plain))(step) for step in range(3)):
        for optimizer, shape in ((ours, (1,)), (plain, ())):
            set_gradients(optimizer, gradients)
            optimizer.grad_scale = torch.full(shape, SCALE, device=device)
            optimizer.found_inf = torch.full(shape, float(overflow), device=device)
            optimizer.step()
    assert_same_bits(bits(plain), bits(ours))
    assert [[value.shape for value in state.values()] for state in ours.state.values()] == [
        [value.shape for value in state.values()] for state in plain.state.values()
    ]


CLONES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "state_dict": lambda optimizer: loaded(optimizer),
}


def loaded(optimizer: Any) -> Any:
    """Another optimizer of the same class and parameters, after ``load_state_dict``."""
    other = type(optimizer)(copies(parameters(optimizer)))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


@pytest.mark.parametrize("clone", CLONES)
def test_the_first_step_taken_is_the_first_even_after_a_skip_and_a_copy(name: str, clone: str) -> None:
    """No copy may take the zero buffer of a skipped step for one that has been set."""
    ours, theirs = make_pair(name, shapes=SMALL, **OPTIONS[name])
    set_gradients(ours, [torch.full(shape, float("inf")) for shape in SMALL])
    amp_step(ours, SCALE, True)
    assert_same_run(CLONES[clone](ours), theirs, steps=6)
    # Saving has left the original as it was, too.
    assert_same_run(ours, theirs_for(name)(copies(parameters(ours)), **OPTIONS[name], foreach=False), steps=6)


def test_a_checkpoint_loaded_after_a_skipped_first_step_is_past_its_first(name: str) -> None:
    """What was known of the old state, a buffer not yet set, must not outlive it."""
    ours, theirs = make_pair(name, shapes=SMALL, **OPTIONS[name])
    gradients = Feed(parameters(theirs))(1)
    set_gradients(ours, [torch.full(shape, float("inf")) for shape in SMALL])
    amp_step(ours, SCALE, True)
    set_gradients(theirs, gradients)
    theirs.step()
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    with torch.no_grad():
        for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
            mine.copy_(other)
    assert_same_run(ours, theirs, steps=6)


def test_amp_survives_deepcopy(name: str) -> None:
    ours = copy.deepcopy(ours_for(name)(make_params(SMALL)))
    set_gradients(ours, [torch.full(shape, SCALE) for shape in SMALL])
    amp_step(ours, SCALE, False)
    assert all(bool((param.grad == 1).all()) for param in parameters(ours))


@on_both_backends
def test_strided_and_expanded_gradients_are_unscaled_too(name: str, device: torch.device) -> None:
    ours, theirs = make_pair(name, device, shapes=((6, 5), (7, 9)), **OPTIONS[name])
    reference = ReferenceRun(theirs)
    gradients = [torch.randn(6, 5), torch.randn(7, 9)]
    set_gradients(ours, gradients, lambda grad: (grad * SCALE).t().contiguous().t())
    amp_step(ours, SCALE, False)
    set_gradients(theirs, gradients)
    reference.step(gradients)
    theirs.step()
    assert_same_state(ours, theirs, reference)
    for param, grad in zip(parameters(ours), gradients, strict=True):
        assert torch.equal(param.grad.cpu(), grad)


# Clipping.


def clipped(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    """The float64 gradients scaled as clip_grad_norm_ does, and their norm."""
    norm = float(np.sqrt(sum(float(grad.double().square().sum()) for grad in gradients)))
    return [grad.double() * min(1.0, max_norm / (norm + 1e-6)) for grad in gradients], norm


@cases_on_both_backends(
    "dtype scale",
    itertools.product((torch.float32, torch.bfloat16, torch.float64), (None, SCALE)),
    lambda dtype, scale: (dtype is torch.float32) == (scale is not None),
)
def test_max_norm_is_clip_grad_norm_then_step(
    name: str, dtype: torch.dtype, scale: float | None, device: torch.device
) -> None:
    """Large, small and middling gradients in turn: some steps are clipped and some are not."""
    options = {**OPTIONS[name], "lr": 0.1} if name == "SGD" else OPTIONS[name]
    _, theirs = make_pair(name, device, dtype, ((1023,), (7, 9), (0, 3), ()), **options)
    params = copies(parameters(theirs), device)
    ours = ours_for(name)([{"params": params[:2]}, {"params": params[2:]}], **options, max_norm=2.0)
    feed, reference = Feed(parameters(theirs)), ReferenceRun(theirs)
    start = [to_numpy(param).copy() for param in parameters(theirs)]
    was_clipped = []
    for step in range(1, STEPS + 1):
        gradients = [grad * 2.0 ** (-(step % 3) * 4) for grad in feed(step)]
        exact, norm = clipped(gradients, 2.0)
        was_clipped.append(norm > 2.0)
        given = [grad * (scale or 1.0) for grad in gradients]
        set_gradients(ours, given)
        amp_step(ours, scale, None if scale is None else False)
        set_gradients(theirs, gradients)
        their_norm = torch.nn.utils.clip_grad_norm_(parameters(theirs), 2.0, foreach=False)
        theirs.step()
        reference.step(exact)
        assert_same_state(ours, theirs, reference, f"at step {step}")
        assert_matches(ours.grad_norm.to(their_norm.dtype), their_norm, np.asarray(norm), "grad_norm")
        for param, grad in zip(parameters(ours), gradients, strict=True):
            assert torch.equal(param.grad.cpu(), grad), "p.grad stays unclipped (and unscaled)"
    assert set(was_clipped) == {True, False}
    assert_moved(theirs, reference, start)


@on_both_backends
def test_max_norm_over_mixed_dtypes_and_missing_gradients(name: str, device: torch.device) -> None:
    """One norm for everything: three dtypes, strides of all kinds, a parameter without a gradient."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    params = [param for dtype in dtypes for param in make_params(((9, 7), (33,)), dtype)]
    options = {**OPTIONS[name], "lr": 0.05}
    if name != "SGD":
        options["eps"] = 0.01
    ours = ours_for(name)(copies(params, device), **options, max_norm=0.5)
    theirs = theirs_for(name)(params, **options, foreach=False)
    feed, reference = Feed(params), ReferenceRun(theirs)
    for step in range(1, 11):
        gradients: list[Any] = [None if i == step % 6 else grad for i, grad in enumerate(feed(step))]
        present = iter(clipped([grad for grad in gradients if grad is not None], 0.5)[0])
        exact = [None if grad is None else next(present) for grad in gradients]
        set_gradients(
            ours, gradients, lambda grad: grad.t().contiguous().t() if grad.ndim == 2 else grad.clone()
        )
        ours.step()
        for param, grad in zip(parameters(theirs), exact, strict=True):
            param.grad = None if grad is None else grad.to(param.dtype)
        theirs.step()
        reference.step(exact)
        assert_same_state(ours, theirs, reference, f"at step {step}")


@on_both_backends
def test_clipping_non_finite_gradients_does_what_clip_grad_norm_does(name: str, device: torch.device) -> None:
    for bad, most in itertools.product((float("inf"), float("nan")), (1.0, float("inf"))):
        _, theirs = make_pair(name, device, shapes=SMALL, lr=0.1)
        ours = ours_for(name)(copies(parameters(theirs), device), lr=0.1, max_norm=most)
        for step in range(3):
            gradients = [torch.ones(shape) for shape in SMALL]
            if step == 1:
                gradients[0][3] = bad
            set_gradients(ours, gradients)
            set_gradients(theirs, gradients)
            torch.nn.utils.clip_grad_norm_(parameters(theirs), most, foreach=False)
            ours.step()
            theirs.step()
        for one, other in zip(parameters(ours), parameters(theirs), strict=True):
            assert torch.equal(one.isnan().cpu(), other.isnan()), (bad, most)
            torch.testing.assert_close(one.cpu(), other, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_long_gradient_keeps_its_digits(dtype: torch.dtype) -> None:
    """torch's own is off by 1e-5 in float32: it has too few running sums. And by 1e-3 in bfloat16."""
    param = torch.nn.Parameter(torch.zeros(1_000_003, dtype=dtype))
    param.grad = torch.randn(1_000_003).to(dtype)
    ours = ours_for("SGD")([param], max_norm=1.0)
    ours.step()
    exact = np.linalg.norm(to_numpy(param.grad))
    assert abs(ours.grad_norm.item() - exact) <= 4 * torch.finfo(torch.float32).eps * exact


@on_both_backends
def test_grad_norm_without_clipping(name: str, device: torch.device) -> None:
    """An infinite max_norm measures and never clips."""
    ours, theirs = make_pair(name, device, shapes=SMALL, **OPTIONS[name])
    ours = ours_for(name)(copies(parameters(theirs), device), **OPTIONS[name], max_norm=float("inf"))
    assert ours.grad_norm is None
    feed = Feed(parameters(theirs))
    norms = []

    def watched(step: int) -> list[Any]:
        gradients = feed(step)
        norms.append(clipped(gradients, 1.0)[1])
        return gradients

    def look(optimizer: Optimizer, step: int) -> None:
        if optimizer is ours:
            assert float(ours.grad_norm) == pytest.approx(norms[-1], rel=1e-6)

    assert_same_run(ours, theirs, watched, steps=6, after_step=look)


# The guard.

BAD_PLACES = [(0, 0), (0, 64), (1, 62), (2, 0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@on_both_backends
def test_skip_leaves_everything_untouched(name: str, bad: float, device: torch.device) -> None:
    """Wherever the one bad element is, at the first step and later, with and without clipping."""
    _, theirs = make_pair(name, device, shapes=SMALL, **OPTIONS[name])
    clip = {} if bad > 0 else {"max_norm": 1e6}
    ours = ours_for(name)(copies(parameters(theirs), device), **OPTIONS[name], on_nonfinite="skip", **clip)
    feed, reference = Feed(parameters(theirs)), ReferenceRun(theirs)
    assert ours.steps_skipped == 0
    skipped = 0
    for step in range(1, 11):
        gradients = feed(step)
        if step in (1, 2, 5, 9):
            tensor, element = BAD_PLACES[skipped]
            spoilt = [grad.clone() for grad in gradients]
            spoilt[tensor].view(-1)[element] = bad
            set_gradients(ours, spoilt)
            before = bits(ours)
            ours.step()
            assert_same_bits(before, bits(ours))
            skipped += 1
            assert ours.steps_skipped == skipped
            continue
        set_gradients(ours, gradients)
        set_gradients(theirs, gradients)
        ours.step()
        theirs.step()
        reference.step(gradients)
        assert_same_state(ours, theirs, reference, f"at step {step}")
    assert ours.steps_skipped == 4


@on_both_backends
def test_large_finite_gradients_are_not_taken_for_infinite(name: str, device: torch.device) -> None:
    """The squares, 1e38 each, overflow float32 in sum: the guard must look at the gradients, not their norm."""
    start = make_params(((65,),))
    ours = ours_for(name)(copies(start, device), lr=1e-20 if name == "SGD" else 0.01, on_nonfinite="skip")
    set_gradients(ours, [torch.full((65,), 1e19)])
    ours.step()
    assert ours.steps_skipped == 0
    assert not torch.equal(parameters(ours)[0].cpu(), start[0])
    assert bool(parameters(ours)[0].isfinite().all())


@on_both_backends
def test_raise_names_the_parameters_and_changes_nothing(name: str, device: torch.device) -> None:
    named = dict(zip(("encoder.weight", "bias", "scale"), copies(make_params(SMALL), device), strict=True))
    ours = ours_for(name)(named.items(), **OPTIONS[name], on_nonfinite="raise", max_norm=1.0)
    plain = ours_for(name)(make_params(SMALL), **OPTIONS[name], on_nonfinite="raise")
    for step in range(3):
        good = [torch.ones(shape) for shape in SMALL]
        bad = [good[0] * (float("nan") if step else 1.0), good[1], good[2] * float("-inf")]
        for optimizer in (ours, plain):
            set_gradients(optimizer, bad)
            before = bits(optimizer)
            with pytest.raises(FloatingPointError) as caught:
                optimizer.step()
            assert_same_bits(before, bits(optimizer))
            text = str(caught.value)
            if optimizer is ours:
                assert "scale" in text
                assert "bias" not in text
                assert ("encoder.weight" in text) == (step > 0)
            else:
                assert "2" in text
            set_gradients(optimizer, good)
            optimizer.step()
    if name != "SGD":
        assert ours.state[named["bias"]]["step"].item() == 3


def test_the_guard_is_off_unless_asked_for(name: str) -> None:
    ours = ours_for(name)(make_params(SMALL), lr=0.1)
    set_gradients(ours, [torch.full(shape, float("nan")) for shape in SMALL])
    ours.step()
    assert all(bool(param.isnan().all()) for param in parameters(ours))
    assert ours.steps_skipped == 0


# Low precision.


def stalled(optimizer_class: Any, device: torch.device | str, steps: int = 30, **options: Any) -> Any:
    """1000 weights of 1.0 in bfloat16, each step worth -0.001: a quarter of the way to the next."""
    param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device))
    optimizer = optimizer_class([param], lr=0.001, **options)
    for _ in range(steps):
        param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_master_weights_train_where_plain_bfloat16_stalls(name: str, device: torch.device) -> None:
    for optimizer_class in (theirs_for(name), ours_for(name)):
        (plain,) = parameters(stalled(optimizer_class, "cpu"))
        assert bool((plain == 1.0).all()), "the stall itself"
    optimizer = stalled(ours_for(name), device, master_weights=True)
    (param,) = parameters(optimizer)
    master = optimizer.state[param]["master_param"]
    assert float((master - 0.97).abs().max()) < 30 * torch.finfo(torch.float32).eps
    assert torch.equal(param, master.bfloat16())


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_stochastic_rounding_trains_where_plain_bfloat16_stalls(name: str, device: torch.device) -> None:
    """On average each step counts in full: mean and spread of 1000 weights, to six of their standard errors.

    Between neighbours at the distance d, here 2^-8, a step of 0.001 has the variance 0.001 (d - 0.001). The
    variances of the steps add up only if each step draws anew.
    """
    optimizer = stalled(ours_for(name), device, stochastic_rounding=True)
    (param,) = parameters(optimizer)
    assert param.dtype == torch.bfloat16
    deviation = (30 * 0.001 * (2**-8 - 0.001)) ** 0.5
    values = param.detach().double()
    assert abs(float(values.mean()) - 0.97) < 6 * deviation / 1000**0.5
    assert abs(float(values.std()) - deviation) < 6 * deviation / 2000**0.5
    again = parameters(stalled(ours_for(name), device, stochastic_rounding=True))[0]
    other = parameters(stalled(ours_for(name), device, stochastic_rounding=True, seed=1))[0]
    assert torch.equal(param, again)
    assert not torch.equal(param, other)
    # Independent draws: neighbours, and halves of the tensor, agree no more often than chance has it.
    spread = (values - values.mean()) / values.std()
    for shift in (1, 2, 32, 500):
        correlation = float((spread * spread.roll(shift)).mean())
        assert abs(correlation) < 6 / 1000**0.5, f"distance {shift}"


def test_stochastic_rounding_never_moves_a_representable_result(device: torch.device) -> None:
    param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device))
    optimizer = ours_for("SGD")([param], lr=2.0**-8, stochastic_rounding=True)
    for step in range(1, 5):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert bool((param == 1 - step * 2.0**-8).all())


def test_scale_and_clip_reach_stochastic_rounding(device: torch.device) -> None:
    """Unscaled, each step is 2^-8, which leaves nothing to chance; clipped to nothing, there is no step."""
    for max_norm, move in ((None, 2.0**-8), (0.0, 0.0)):
        param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device))
        optimizer = ours_for("SGD")([param], lr=2.0**-8, stochastic_rounding=True, max_norm=max_norm)
        for step in range(1, 4):
            param.grad = torch.full_like(param, SCALE)
            amp_step(optimizer, SCALE, False)
            assert bool((param == 1 - step * move).all())
            assert bool((param.grad == 1).all())


def test_momentum_switched_on_in_mid_run_under_stochastic_rounding(device: torch.device) -> None:
    """The buffer starts with the whole gradient then too, whatever the dampening and the steps made before."""
    param = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16, device=device))
    optimizer = ours_for("SGD")([param], lr=2.0**-8, stochastic_rounding=True)
    for step in range(1, 3):
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.param_groups[0].update(momentum=0.5, dampening=0.5)
        assert bool((param == 1 - step * 2.0**-8).all())
    assert bool((optimizer.state[param]["momentum_buffer"] == 1).all())


def test_every_seed_draws_its_own_numbers(device: torch.device) -> None:
    """All 64 bits of a seed count, and its sign."""
    seeds = (0, 1, 2**32, 2**32 + 1, 2**40, 2**63, -1, 2**32 - 1)
    results = []
    for seed in (*seeds, 2**40):
        param = torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16, device=device))
        optimizer = ours_for("SGD")([param], lr=2.0**-10, stochastic_rounding=True, seed=seed)
        param.grad = torch.ones_like(param)
        optimizer.step()
        results.append(tuple(param.tolist()))
    assert len(set(results)) == len(seeds)
    assert results[-1] == results[seeds.index(2**40)]


def test_stochastic_rounding_keeps_infinities(device: torch.device) -> None:
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device=device))
    optimizer = ours_for("SGD")([param], lr=1.0, stochastic_rounding=True)
    param.grad = torch.tensor(
        [float("inf"), float("-inf"), float("nan"), 0.0], dtype=torch.bfloat16, device=device
    )
    optimizer.step()
    expected = torch.tensor([float("-inf"), float("inf"), float("nan"), 1.0], dtype=torch.bfloat16)
    torch.testing.assert_close(param.detach().cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_both_backends_draw_the_same_numbers() -> None:
    """With powers of two nothing but the draw decides, so the bits must agree."""
    results = []
    gradients = 2.0 ** -torch.randint(0, 4, (6, 1023)).float()
    for backend in ("fallback", "triton"):
        params = [
            torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((1023,), (33, 31))
        ]
        with use_backend(backend):
            optimizer = ours_for("SGD")(params, lr=2.0**-10, stochastic_rounding=True, seed=3)
            for grad in gradients:
                for param in params:
                    param.grad = grad.view(param.shape).bfloat16()
                optimizer.step()
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(results[0][0], results[0][1].view(-1)), "two tensors must not share their draws"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_both_backends
def test_master_weights_are_the_float32_run(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Master and moments are those of a float32 model under the same (16-bit) gradients; float32 has none."""
    low = make_params(SMALL, dtype)
    theirs = theirs_for(name)(
        [torch.nn.Parameter(p.detach().float()) for p in low], **OPTIONS[name], foreach=False
    )
    wide = make_params(((5,),))
    ours = ours_for(name)([*copies(low, device), *copies(wide, device)], **OPTIONS[name], master_weights=True)
    feed, reference = Feed(low), ReferenceRun(theirs)
    for step in range(1, 11):
        gradients = feed(step)
        set_gradients(ours, [*gradients, torch.ones(5)])
        set_gradients(theirs, [grad.float() for grad in gradients])
        ours.step()
        theirs.step()
        reference.step(gradients)
        for mine, other in zip(parameters(ours), parameters(theirs), strict=False):
            state = dict(ours.state[mine])
            master = state.pop("master_param")
            assert torch.equal(mine, master.to(dtype))
            assert state.keys() == theirs.state[other].keys()
            state.pop("step", None)
            for key, value in {"param": master, **state}.items():
                expected = theirs.state[other][key] if key != "param" else other.detach()
                scale = reference.scales[other][key]
                assert_matches(value, expected, reference.values[other][key], f"{key} at step {step}", scale)
    assert "master_param" not in ours.state[parameters(ours)[-1]]


def step_scaled_and_clipped(
    ours: Any, theirs: Optimizer, reference: ReferenceRun, gradients: list[Tensor], max_norm: float
) -> None:
    """Ours by scaled gradients, clipping inside the step; torch's and the reference by those gradients clipped."""
    set_gradients(ours, [grad * SCALE for grad in gradients])
    amp_step(ours, SCALE, False)
    set_gradients(theirs, [grad.float() for grad in gradients])
    torch.nn.utils.clip_grad_norm_(parameters(theirs), max_norm, foreach=False)
    theirs.step()
    reference.step(clipped(gradients, max_norm)[0])


@on_both_backends
def test_master_weights_under_clipping_and_amp(name: str, device: torch.device) -> None:
    """The scale and the clip reach masters as they reach parameters."""
    low = make_params(SMALL, torch.bfloat16)
    options = {**OPTIONS[name], "lr": 0.1} if name == "SGD" else OPTIONS[name]
    theirs = theirs_for(name)([torch.nn.Parameter(p.detach().float()) for p in low], **options, foreach=False)
    ours = ours_for(name)(copies(low, device), **options, master_weights=True, max_norm=2.0)
    feed, reference = Feed(low), ReferenceRun(theirs)
    for step in range(1, 7):
        step_scaled_and_clipped(ours, theirs, reference, feed(step), 2.0)
        for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
            master = ours.state[mine]["master_param"]
            scale = reference.scales[other]["param"]
            assert_matches(master, other, reference.values[other]["param"], f"step {step}", scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_both_backends
def test_what_is_written_to_a_parameter_with_a_master_stays(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """By ``load_state_dict``, in place, or past the version counter; elements not written keep their masters."""
    low = make_params(((4096 + 65,), (7, 9), ()), dtype)
    theirs = theirs_for(name)(
        [torch.nn.Parameter(p.detach().float()) for p in low], **OPTIONS[name], foreach=False
    )
    ours = ours_for(name)(copies(low, device), **OPTIONS[name], master_weights=True, max_norm=1e9)
    feed = Feed(low)
    for step in range(1, 7):
        gradients = feed(step)
        set_gradients(ours, gradients)
        set_gradients(theirs, [grad.float() for grad in gradients])
        ours.step()
        theirs.step()
        for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
            master = ours.state[mine]["master_param"]
            torch.testing.assert_close(master.cpu(), other.detach())
            assert torch.equal(mine, master.to(dtype))
            value = spread(mine.shape, 0.03, dtype)
            written = (torch.rand(mine.shape) < 0.3) & (value != mine.detach().cpu())
            new = torch.where(written, value, mine.detach().cpu()).to(device)
            with torch.no_grad():
                other[written] = value[written].float()
                if step % 2:
                    mine.copy_(new)
                else:
                    mine.data = new


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
def test_low_precision_runs_resume_with_the_same_bits(name: str, option: str) -> None:
    gradients = [[torch.randn(65).bfloat16()] for _ in range(8)]

    def go(optimizer: Any, part: list[list[Tensor]]) -> Any:
        for each in part:
            set_gradients(optimizer, each)
            optimizer.step()
        return optimizer

    start = make_params(((65,),), torch.bfloat16)
    straight = go(ours_for(name)(copies(start), **OPTIONS[name], **{option: True}), gradients)
    first = go(ours_for(name)(copies(start), **OPTIONS[name], **{option: True}), gradients[:4])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = ours_for(name)(copies(parameters(first)), **{option: True})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    go(resumed, gradients[4:])
    assert torch.equal(parameters(straight)[0], parameters(resumed)[0])
    state, other = straight.state[parameters(straight)[0]], resumed.state[parameters(resumed)[0]]
    assert state.keys() == other.keys()
    for key, value in state.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


def test_post_hooks_of_loading_see_masters_and_moments_as_they_are(name: str) -> None:
    """And what a hook writes there stays: loading is over by then, as in torch."""
    low = make_params(((65,),), torch.bfloat16)
    ours = ours_for(name)(low, **OPTIONS[name], master_weights=True)
    set_gradients(ours, [torch.randn(65).bfloat16()])
    ours.step()
    saved = copy.deepcopy(ours.state_dict())
    expected = saved["state"][0]

    def look(optimizer: Optimizer) -> None:
        state = optimizer.state[parameters(optimizer)[0]]
        for key, value in expected.items():
            assert value.dtype == torch.float32
            assert state[key].dtype == value.dtype, key
            assert torch.equal(state[key], value), key
        state["master_param"] = state["master_param"] + 1

    again = ours_for(name)(copies(low), **OPTIONS[name], master_weights=True)
    again.register_load_state_dict_post_hook(look)
    again.load_state_dict(saved)
    assert torch.equal(again.state[parameters(again)[0]]["master_param"], expected["master_param"] + 1)


def test_master_weights_and_torch_checkpoints(name: str) -> None:
    """Torch's has no masters: they are made from the parameters. Ours loads there, extra key and all."""
    gradients = [torch.randn(65).bfloat16()]
    theirs = theirs_for(name)(make_params(((65,),), torch.bfloat16), **OPTIONS[name], foreach=False)
    set_gradients(theirs, gradients)
    theirs.step()
    ours = ours_for(name)(copies(parameters(theirs)), **OPTIONS[name], master_weights=True)
    ours.load_state_dict(theirs.state_dict())
    set_gradients(ours, gradients)
    ours.step()
    state = ours.state[parameters(ours)[0]]
    assert state["master_param"].dtype == torch.float32
    assert torch.equal(state["master_param"].bfloat16(), parameters(ours)[0])
    theirs.load_state_dict(ours.state_dict())
    set_gradients(theirs, gradients)
    theirs.step()


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float16)],
    ids=str,
)
@on_both_backends
def test_gradients_of_another_dtype(
    name: str, dtype: torch.dtype, grad_dtype: torch.dtype, device: torch.device
) -> None:
    """``Parameter.grad_dtype``: no gradient is rounded to the parameter's dtype on the way."""
    ours, theirs = make_pair(name, device, dtype, SMALL, **OPTIONS[name])
    for param in parameters(ours):
        param.grad_dtype = grad_dtype
    feed = Feed([torch.empty(shape, dtype=grad_dtype) for shape in SMALL])
    assert_same_run(ours, theirs, feed)
    assert all(param.grad.dtype == grad_dtype for param in parameters(ours))
