"""Tensors as they lie in memory: strides, views, the negative bit, sizes, addresses that change."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from gradkernels import backend_for
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer

from .optimizers import (
    FULL_OPTIONS,
    SMALL,
    STEPS,
    ReferenceRun,
    assert_close,
    assert_follows,
    assert_same_bits,
    assert_same_run,
    cases_on_both_backends,
    copies,
    make_pair,
    make_params,
    on_both_backends,
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
    transposed,
    values_of,
)


@cases_on_both_backends("dims", [(1,), (2,)], lambda dims: dims == 1)
def test_a_rate_of_one_element_may_have_dimensions(name: str, dims: int, device: torch.device) -> None:
    rate = torch.full([1] * dims, 2.0**-8)
    ours, theirs = make_pair(name, device, shapes=SMALL, **{**FULL_OPTIONS[name], "lr": rate})
    assert_same_run(ours, theirs)
    assert ours.param_groups[0]["lr"].shape == rate.shape


def every_other(grad: Tensor) -> Tensor:
    """The same values with a NaN between any two: a kernel that walks raw memory picks them up."""
    wide = torch.full((*grad.shape, 2), float("nan"), dtype=grad.dtype, device=grad.device)
    wide[..., 0] = grad
    return wide[..., 0]


def misaligned(grad: Tensor) -> Tensor:
    flat = torch.full((grad.numel() + 3,), float("nan"), dtype=grad.dtype, device=grad.device)
    view = flat[1 : 1 + grad.numel()].view(grad.shape)
    return view.copy_(grad)


def as_before(grad: Tensor) -> Tensor:
    return grad.clone()


LAYOUTS = {function.__name__: function for function in (transposed, every_other, misaligned)}
LAID_OUT = ((33, 5), (4, 3, 2, 5), (65,), ())


@cases_on_both_backends(
    "layout of",
    itertools.product(LAYOUTS, ("gradient", "parameter", "both")),
    lambda layout, of: of == "both" or (layout, of) == ("transposed", "gradient"),
)
def test_any_strides(name: str, layout: str, of: str, device: torch.device) -> None:
    """torch's fused=True walks raw memory here and goes silently wrong (pytorch#110758)."""
    params = make_params(LAID_OUT)
    ours_params = copies(params, device)
    if of != "gradient":
        ours_params = [torch.nn.Parameter(LAYOUTS[layout](param.detach())) for param in ours_params]
    ours, theirs = pair_over(params, name, shared={"params": ours_params}, **FULL_OPTIONS[name])
    assert_same_run(ours, theirs, lay_out=LAYOUTS[layout] if of != "parameter" else as_before)


@on_both_backends
def test_channels_last_against_contiguous(name: str, device: torch.device) -> None:
    params = make_params(((4, 3, 5, 5), (2, 3, 4, 4)))
    ours_params = [
        torch.nn.Parameter(param.detach().clone().to(memory_format=torch.channels_last).to(device))
        for param in params
    ]
    ours, theirs = pair_over(params, name, shared={"params": ours_params}, **FULL_OPTIONS[name])
    assert_same_run(ours, theirs)
    assert all(param.is_contiguous(memory_format=torch.channels_last) for param in parameters(ours))
    if name != "SGD":  # whose buffer is a clone of the first gradient
        for param in parameters(ours):
            for key, value in ours.state[param].items():
                assert key == "step" or value.stride() == param.stride()


@on_both_backends
def test_expanded_gradients(name: str, device: torch.device) -> None:
    """One stored value for all: what ``param.sum().backward()`` gives."""
    ours, theirs = make_pair(name, device, shapes=((33, 5), (65,), ()), **FULL_OPTIONS[name])
    sizes = [spread((), 4.0, torch.float32) for _ in parameters(theirs)]

    def constant(step: int) -> list[Tensor | None]:
        return [size.expand(param.shape) * 1.0 for size, param in zip(sizes, parameters(theirs), strict=True)]

    assert_same_run(ours, theirs, constant, lay_out=lambda grad: grad.flatten()[0].clone().expand(grad.shape))


@on_both_backends
def test_gradients_with_the_negative_bit(name: str, device: torch.device) -> None:
    """Autograd hands out 0-d and one-element ones where conjugates are; memory has them with the other sign."""
    ours, theirs = make_pair(name, device, shapes=((), (1,), (7, 9), (65,)), **FULL_OPTIONS[name])
    for param in parameters(ours)[:2]:
        value = torch.complex(torch.ones_like(param), param)
        (value.conj() * (1 + 2j)).imag.sum().backward()
        assert param.grad.is_neg()

    # The address stays: only the bit tells one step from the next.
    buffers = [torch.empty_like(param) for param in parameters(ours)]
    reference = ReferenceRun(theirs)
    for step, grads in enumerate(some_gradients(theirs, STEPS), start=1):
        for param, buffer, grad in zip(parameters(ours), buffers, grads, strict=True):
            param.grad = buffer.copy_(grad) if step % 2 else torch._neg_view(buffer.copy_(-grad))
        ours.step()
        assert_follows(ours, theirs, reference, grads, f"at step {step}")


@on_both_backends
def test_all_else_with_the_negative_bit(name: str, device: torch.device) -> None:
    """A parameter that is the imaginary part of a conjugate, its state, the scale, the learning rate."""

    def negative(tensor: Tensor) -> Tensor:
        return torch._neg_view(-tensor.detach())

    theirs = theirs_for(name)(make_params(((65,), ())), foreach=False, **FULL_OPTIONS[name])
    lr = negative(torch.tensor(theirs.param_groups[0]["lr"], device=device))
    params = [negative(param.to(device)).requires_grad_() for param in parameters(theirs)]
    ours = ours_for(name)(params, **{**FULL_OPTIONS[name], "lr": lr})
    for step, grads in enumerate(some_gradients(theirs, 4)):
        set_gradients(theirs, grads)
        set_gradients(ours, [4 * grad for grad in grads])
        ours.grad_scale = negative(torch.tensor(4.0, device=device))
        ours.found_inf = negative(torch.tensor(float(step == 2), device=device))
        if step == 3:
            ours.load_state_dict(ours.state_dict())
            for state in ours.state.values():
                state.update({key: negative(value) for key, value in state.items() if key != "step"})
        ours.step()
        if step != 2:
            theirs.step()
    assert_close(ours, theirs)


@on_both_backends
def test_expanded_parameters_are_refused_as_torch_does(name: str, device: torch.device) -> None:
    """One number for many elements, of a parameter or of a state: which of them is to be written?"""
    for optimizer in make_pair(name, device, shapes=((4,), (65,)), **FULL_OPTIONS[name]):
        wide = parameters(optimizer)[0].detach()[:1].expand(4).requires_grad_()
        optimizer.add_param_group({"params": [wide]})
        before = values_of(optimizer)
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            step_by_ones(optimizer)
        if optimizer.__class__ is ours_for(name):
            assert_same_bits(values_of(optimizer), before)

    ours, _ = make_pair(name, device, shapes=((4,),), **FULL_OPTIONS[name])
    run(ours, some_gradients(ours, 1))
    state = ours.state[parameters(ours)[0]]
    state.update({key: value[:1].expand(4) for key, value in state.items() if key != "step"})
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        run(ours, some_gradients(ours, 1))


@on_both_backends
def test_a_parameter_given_twice_steps_twice_as_torch_s(name: str, device: torch.device) -> None:
    """One launch over both would let its programs race."""
    options = {**FULL_OPTIONS[name], **({"momentum": 0, "dampening": 0} if name == "SGD" else {})}
    # (torch's SGD makes as many first buffers as there are mentions, and keeps the last.)
    ours, theirs = make_pair(name, device, shapes=((65,), (7, 9)), **options)
    for optimizer in (ours, theirs):
        group = optimizer.param_groups[0]
        group["params"] = [group["params"][i] for i in (0, 1, 0, 0)]
    alias = torch.nn.Parameter(parameters(ours)[1].data)  # another object, the same memory
    ours.add_param_group({"params": [alias]})
    theirs.add_param_group({"params": [torch.nn.Parameter(parameters(theirs)[1].data)]})
    for grads in some_gradients(theirs, 5):
        for optimizer in (ours, theirs):
            step_by(optimizer, grads)
        assert_close(ours, theirs)


@on_both_backends
def test_gradients_without_memory_are_refused(name: str, device: torch.device) -> None:
    """Forward mode makes zeros that no memory holds: refused, save by torch's own addition, which serves them."""
    ours, _ = make_pair(name, device, shapes=SMALL)
    before = values_of(ours)
    for param in parameters(ours):
        param.grad = torch._efficientzerotensor(param.shape, device=device)
    served = name == "SGD" and backend_for(before[0]) == "fallback"
    with nullcontext() if served else pytest.raises(RuntimeError, match=r"clone\(\)"):
        ours.step()
    assert_same_bits(values_of(ours), before)


@on_both_backends
def test_the_same_address_with_other_strides(name: str, device: torch.device) -> None:
    """An allocator hands freed memory out again: a plan must know the gradient's strides, not its address."""
    ours, theirs = make_pair(name, device, shapes=((16, 16),), **FULL_OPTIONS[name])
    buffer = torch.empty(16, 16, device=device)
    param = parameters(ours)[0]
    reference = ReferenceRun(theirs)
    for step, grads in enumerate(some_gradients(theirs, STEPS), start=1):
        view = buffer if step % 3 else buffer.t()
        param.grad = view.copy_(grads[0])
        ours.step()
        assert_follows(ours, theirs, reference, grads, f"at step {step}")


@on_both_backends
def test_parameters_moved_to_other_memory_between_steps(name: str, device: torch.device) -> None:
    """``param.data = ...`` keeps the object and changes what it points to."""
    ours, theirs = make_pair(name, device, shapes=((65,), (7, 9)), **FULL_OPTIONS[name])
    kept = []

    def move(optimizer: Optimizer, step: int) -> None:
        if optimizer is ours and step % 2:
            for param in parameters(ours):
                kept.append(param.data)  # so that the old address is not handed out again
                param.data = param.data.clone()

    assert_same_run(ours, theirs, after_step=move)


def test_dtensors_moved_to_other_memory_between_steps(name: str, mesh: DeviceMesh) -> None:
    """``model.to(...)`` puts another tensor into each DTensor, which stays the same object."""
    results = []
    for optimizer_class in (ours_for(name), theirs_for(name)):
        model = torch.nn.Linear(3, 2)
        for label, param in list(model.named_parameters()):
            value = distribute_tensor(torch.zeros_like(param), mesh, [Shard(0)])
            setattr(model, label, torch.nn.Parameter(value))
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        for _ in range(3):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            model._apply(torch.clone)  # what ``to`` does where it must copy
        results.append([param.full_tensor() for param in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@on_both_backends
def test_a_parameter_that_becomes_another_view_of_its_memory(name: str, device: torch.device) -> None:
    """``param.data = param.data.t()`` and ``param.data = param.data[:5]``: the address stays."""
    for change in (Tensor.t, lambda data: data[:5]):
        if change is not Tensor.t and name != "SGD":
            continue  # the state would keep the old shape
        ours, theirs = make_pair(name, device, shapes=((16, 16),), lr=0.01)
        for step in range(6):
            if step == 3:
                for optimizer in (ours, theirs):
                    optimizer.zero_grad()
                    parameters(optimizer)[0].data = change(parameters(optimizer)[0].data)
            shape = parameters(theirs)[0].shape
            grad = spread(shape, 4.0, torch.float32)
            # Contiguous before and after: only the parameter tells that something has changed.
            step_by(ours, [grad])
            step_by(theirs, [grad])
            assert_close(ours, theirs)


@on_both_backends
def test_a_parameter_that_is_a_view_leaves_its_neighbours_alone(name: str, device: torch.device) -> None:
    """Views of one flat buffer at odd offsets: FSDP's shards."""
    params = make_params(((5,), (64,), (1,), (130,), (4097,)))
    sizes = [param.numel() for param in params]
    flat = torch.full((sum(sizes) + 2 * len(sizes) + 1,), 7.0, device=device)
    views, mask, start = [], torch.ones(len(flat), dtype=torch.bool), 1
    for param in params:
        view = flat[start : start + param.numel()]
        view.copy_(param.detach())
        mask[start : start + param.numel()] = False
        views.append(view.requires_grad_())
        start += param.numel() + 2
    ours, theirs = pair_over(params, name, shared={"params": views}, **FULL_OPTIONS[name])
    assert_same_run(ours, theirs, lay_out=misaligned)
    assert bool((flat.cpu()[mask] == 7.0).all())


@cases_on_both_backends("dtype", [(torch.float32,), (torch.bfloat16,)], lambda dtype: True)
def test_large_tensors(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """More than one program per tensor, whole ones and a rest, aligned and not; each tensor counts one step."""
    shapes = ((4096 * 2 + 33,), (4095,), (4096,), (4097,), (64, 65))
    params = make_params(shapes, dtype)
    ours_params = copies(params, device)
    ours_params[-1] = torch.nn.Parameter(misaligned(ours_params[-1].detach()))
    shared = {"params": ours_params, "max_norm": 1e9}
    ours, theirs = pair_over(params, name, shared=shared, **{**FULL_OPTIONS[name], "lr": 0.02})
    norms = []

    def look(optimizer: Optimizer, step: int) -> None:
        if optimizer is ours:
            norms.append(
                (float(ours.grad_norm), sum(float(p.grad.double().square().sum()) for p in params) ** 0.5)
            )

    assert_same_run(ours, theirs, steps=3, after_step=look)
    for norm, expected in norms:
        assert norm == pytest.approx(expected, rel=1e-6)


@on_both_backends
def test_only_zero_size_tensors(name: str, device: torch.device) -> None:
    ours = ours_for(name)([torch.nn.Parameter(torch.empty(0, 3, device=device))], **FULL_OPTIONS[name])
    run(ours, [[torch.empty(0, 3)]] * 2)
    state = ours.state[parameters(ours)[0]]
    assert {value.shape for key, value in state.items() if key != "step"} == {(0, 3)}
    assert name == "SGD" or state["step"].item() == 2


@on_both_backends
def test_the_version_counter_moves(name: str, device: torch.device) -> None:
    """Backward through a graph recorded before the step must refuse: torch's fused=True lets it pass."""
    ours = ours_for(name)(copies(make_params(((65,),)), device))
    (param,) = parameters(ours)
    loss = (param * param).sum()
    before = param._version
    run(ours, some_gradients(ours, 1))
    assert param._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_version_counter_of_a_dtensor_moves(name: str, mesh: DeviceMesh) -> None:
    """It is not that of its local part, which the kernels write."""
    ones = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    param, late = (torch.nn.Parameter(ones.clone()) for _ in range(2))
    ours = ours_for(name)([param, late])
    loss = (param * param).sum()
    param.grad = ones
    before = late._version
    ours.step()
    assert late._version == before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_unaltered_parameters_keep_their_version(name: str) -> None:
    ours = ours_for(name)(make_params(((65,), (7, 9))))
    before = parameters(ours)[1]._version
    step_by(ours, [torch.ones(65), None])
    assert parameters(ours)[1]._version == before


@on_both_backends
def test_bits_are_the_same_from_run_to_run_and_do_not_depend_on_company(
    name: str, device: torch.device
) -> None:
    """A parameter moves alike alone and among others, in whatever order."""
    params = make_params(((1023,), (7, 9), (65,)))
    gradients = some_gradients(theirs_for(name)(params), 4)
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (0, 1, 2)):
        chosen = copies([params[i] for i in order], device)
        run(ours_for(name)(chosen, **FULL_OPTIONS[name]), [[each[i] for i in order] for each in gradients])
        results.append(dict(zip(order, chosen, strict=True)))
    alone = copies(params[:1], device)
    run(ours_for(name)(alone, **FULL_OPTIONS[name]), [each[:1] for each in gradients])
    for index in range(3):
        assert torch.equal(results[0][index], results[1][index])
        assert torch.equal(results[0][index], results[2][index])
    assert torch.equal(results[0][0], alone[0])
