"""Steps under a GradScaler: scaled gradients, skipped steps, what a copy or checkpoint keeps of them."""

import copy
import itertools
from typing import Any

import gradkernels.optim.step
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..helpers import to_numpy
from .optimizers import (
    COPIES,
    FULL_OPTIONS,
    SCALE,
    SMALL,
    STEPS,
    Feed,
    ReferenceRun,
    amp_step,
    assert_follows,
    assert_moved,
    assert_only_zero_state,
    assert_same_bits,
    assert_same_run,
    assert_same_state,
    bits,
    cases_on_both_backends,
    clipped,
    copies,
    make_pair,
    make_params,
    on_both_backends,
    ours_for,
    parameters,
    set_gradients,
    set_values,
    step_by,
    theirs_for,
    transposed,
)


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
    options = FULL_OPTIONS[name] if name == "SGD" else {**FULL_OPTIONS[name], "eps": 0.01}
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
        assert_follows(ours, theirs, reference, gradients, f"at step {step}")
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
    ours = ours_for(name)(params, max_norm=1.0, on_nonfinite="skip", **FULL_OPTIONS[name])
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
    options = {**FULL_OPTIONS[name], "lr": 0.1} if clip and name == "SGD" else FULL_OPTIONS[name]
    ours, theirs = make_pair(name, device, shapes=SMALL, shared={"fused": fused}, **options)
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
        first = cls(make_params(SMALL), **FULL_OPTIONS[name], **flags)
        copied = [clone(first) for clone in COPIES.values()] if cls is ours_for(name) else []
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
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    feed, reference = Feed(parameters(theirs)), ReferenceRun(theirs)
    for step in range(1, 5):
        gradients = feed(step)
        set_gradients(ours, [grad * (scale or 1.0) for grad in gradients])
        amp_step(ours, scale, overflow)
        assert_follows(ours, theirs, reference, gradients, f"at step {step}")


@pytest.mark.parametrize("overflow", [False, True])
@on_both_backends
def test_scale_and_overflow_may_have_a_dimension(name: str, overflow: bool, device: torch.device) -> None:
    """As gathered over devices, (1,): the state keeps its shapes."""
    ours, _ = make_pair(name, device, shapes=SMALL, **FULL_OPTIONS[name])
    plain = copy.deepcopy(ours)
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


def loaded(optimizer: Any) -> Any:
    """Another optimizer of the same class and parameters, after ``load_state_dict``."""
    other = type(optimizer)(copies(parameters(optimizer)))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


CLONES = {**COPIES, "state_dict": loaded}


@pytest.mark.parametrize("clone", CLONES)
def test_the_first_step_taken_is_the_first_even_after_a_skip_and_a_copy(name: str, clone: str) -> None:
    """No copy may take the zero buffer of a skipped step for one that has been set."""
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    set_gradients(ours, [torch.full(shape, float("inf")) for shape in SMALL])
    amp_step(ours, SCALE, True)
    assert_same_run(CLONES[clone](ours), theirs, steps=6)
    # Saving has left the original as it was, too.
    assert_same_run(
        ours, theirs_for(name)(copies(parameters(ours)), **FULL_OPTIONS[name], foreach=False), steps=6
    )


def test_a_checkpoint_loaded_after_a_skipped_first_step_is_past_its_first(name: str) -> None:
    """What was known of the old state, a buffer not yet set, must not outlive it."""
    ours, theirs = make_pair(name, shapes=SMALL, **FULL_OPTIONS[name])
    gradients = Feed(parameters(theirs))(1)
    set_gradients(ours, [torch.full(shape, float("inf")) for shape in SMALL])
    amp_step(ours, SCALE, True)
    step_by(theirs, gradients)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    set_values(ours, parameters(theirs))
    assert_same_run(ours, theirs, steps=6)


def test_amp_survives_deepcopy(name: str) -> None:
    ours = copy.deepcopy(ours_for(name)(make_params(SMALL)))
    set_gradients(ours, [torch.full(shape, SCALE) for shape in SMALL])
    amp_step(ours, SCALE, False)
    assert all(bool((param.grad == 1).all()) for param in parameters(ours))


@on_both_backends
def test_strided_and_expanded_gradients_are_unscaled_too(name: str, device: torch.device) -> None:
    ours, theirs = make_pair(name, device, shapes=((6, 5), (7, 9)), **FULL_OPTIONS[name])
    gradients = [torch.randn(6, 5), torch.randn(7, 9)]
    set_gradients(ours, [grad * SCALE for grad in gradients], transposed)
    amp_step(ours, SCALE, False)
    assert_follows(ours, theirs, ReferenceRun(theirs), gradients)
    for param, grad in zip(parameters(ours), gradients, strict=True):
        assert torch.equal(param.grad.cpu(), grad)
