"""What each process of tests/optim/test_distributed.py runs: torchrun ... distributed_worker.py FOLDER CASE...

Every case trains one small model on all ranks and compares it with torch.optim in one process on the whole batch.
A rank writes ``FOLDER/<case>.<rank>``: empty if the case passed, else the traceback.
"""

import copy
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import gradkernels
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gradkernels.optim.plan import local_gradient
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

STEPS = 10
BAD_STEP = 4
MAX_NORM = 4.0  # between the norms met
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01},
    "AdamW": {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True},
}
OURS = {"SGD": gradkernels.FusedSGD, "AdamW": gradkernels.FusedAdamW}


def make_model() -> nn.Module:
    """7, 5 and 1 rows: over four ranks every shard is uneven, and some are empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        size = 4 * dist.get_world_size()
        input = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        yield input, 3 * torch.sin(input).sum(1, keepdim=True)


def loss_of(model: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    return (model(input) - target).square().mean()


def one_process(name: str) -> tuple[list[float], list[float], nn.Module]:
    """Losses, gradient norms and the model after torch's own clipped steps; BAD_STEP is left out."""
    model = make_model()
    optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIONS[name], foreach=False)
    losses, norms = [], []
    for step, (input, target) in enumerate(batches()):
        loss = loss_of(model, input, target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=False).item())
        if step != BAD_STEP:
            optimizer.step()
    assert min(norms) < MAX_NORM < max(norms), norms
    return losses, norms, model


def spoil(param: Tensor) -> None:
    """Make one stored element of a gradient NaN, on this rank alone."""
    grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
    grad.view(-1)[-1] = float("nan")


def assert_close(ours: Any, theirs: Any, what: str) -> None:
    torch.testing.assert_close(ours, theirs, msg=lambda text: f"{what}: {text}")


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_training(name: str, model: nn.Module, optimizer: Any, inner: Any, bad_param: Tensor | None) -> None:
    """Train on this rank's rows, and hold losses, norms and parameters against one process.

    ``inner`` is the optimizer of ours in ``optimizer``; the gradient of ``bad_param`` is spoilt at BAD_STEP, on
    the ranks where it is not None.
    """
    losses, norms, expected = one_process(name)
    rank, world = dist.get_rank(), dist.get_world_size()
    for step, (input, target) in enumerate(batches()):
        loss = loss_of(model, input[rank::world], target[rank::world])
        optimizer.zero_grad()
        loss.backward()
        if step == BAD_STEP and bad_param is not None:
            spoil(bad_param)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        assert_close(total.item() / world, losses[step], f"loss at step {step}")
        if step != BAD_STEP:
            norm = float(full(inner.grad_norm))
            assert_close(norm, norms[step], f"norm at step {step}")
        assert inner.steps_skipped == (step >= BAD_STEP), f"step {step}"
    for (label, param), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_close(full(param.detach()), other.detach(), label)
        mine = full(param.detach()).clone()
        dist.broadcast(mine, 0)
        assert torch.equal(mine, full(param.detach())), f"{label} differs between the ranks"


def ddp(name: str) -> None:
    """Gradients are views of a bucket, at any offset."""
    model = DistributedDataParallel(make_model(), gradient_as_bucket_view=True)
    optimizer = OURS[name](model.parameters(), **OPTIONS[name], max_norm=MAX_NORM, on_nonfinite="skip")
    params = list(model.parameters())
    check_training(name, model, optimizer, optimizer, params[1])


def sharded(mesh: Any) -> nn.Module:
    model = make_model()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(name: str) -> None:
    """Only rank 1 sees the NaN in its shard; all must skip. The state is sharded as the parameters are."""
    model = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = OURS[name](model.parameters(), **OPTIONS[name], max_norm=MAX_NORM, on_nonfinite="skip")
    params = list(model.parameters())
    check_training(name, model, optimizer, optimizer, params[0] if dist.get_rank() == 1 else None)
    for param in params:
        for key, value in optimizer.state[param].items():
            if key != "step":
                assert isinstance(value, DTensor), key
                assert (value.placements, value.device_mesh) == (param.placements, param.device_mesh)


def hsdp(name: str) -> None:
    """Replicated over one mesh dimension and sharded over the other: each element counts once in the norm."""
    model = sharded(
        init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    )
    optimizer = OURS[name](model.parameters(), **OPTIONS[name], max_norm=MAX_NORM, on_nonfinite="skip")
    params = list(model.parameters())
    check_training(name, model, optimizer, optimizer, params[0])


def placements(name: str) -> None:
    """Sharded, replicated and ordinary parameters together, and gradients not always placed as their parameters.

    Each element counts once in the norm, whoever holds it, and whoever updates it: SGD's last one is torch's loop's.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(2)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def placed(value: Tensor, place: Any, on_its_way: bool = False) -> Tensor:
        if place is None:
            return value.clone()
        if on_its_way and place != part:
            return placed(value, part).redistribute(mesh, [place], async_op=True)
        if place == part:  # what each rank has is to be added
            return DTensor.from_local(value * 2 * (dist.get_rank() + 1) / (world * (world + 1)), mesh, [part])
        return distribute_tensor(value.clone(), mesh, [place])

    world = dist.get_world_size()
    shard, whole, part = Shard(0), Replicate(), Partial()
    kinds = [  # shape, the parameter's placement, its gradient's at even steps and at odd ones
        ((7, 3), shard, shard, whole),
        ((5,), shard, whole, whole),
        ((4, 4), whole, part, whole),
        ((3, 6), whole, shard, part),
        ((6,), None, None, None),
        ((7, 2), shard, shard, whole),
    ]
    start = [random(shape) for shape, *_ in kinds]
    params = [nn.Parameter(placed(value, place)) for value, (_, place, *_) in zip(start, kinds, strict=True)]
    expected = [nn.Parameter(value.clone()) for value in start]
    # torch's differentiable Adam corrects the bias in float32
    groups = [{"params": params[:-1]}, {"params": params[-1:], "differentiable": name == "SGD"}]
    ours = OURS[name](groups, **OPTIONS[name], max_norm=MAX_NORM)
    theirs = getattr(torch.optim, name)(expected, **OPTIONS[name], foreach=False)
    for step in range(STEPS):
        for param, other, (shape, _, *places) in zip(params, expected, kinds, strict=True):
            other.grad = random(shape) * 2.0 ** (step % 3 - 1)
            param.grad = placed(other.grad, places[step % 2], on_its_way=step % 4 > 1)
            local = local_gradient(param.grad, param)
            assert type(local) is Tensor, "kernels read memory"
        norm = nn.utils.clip_grad_norm_(expected, MAX_NORM, foreach=False)
        ours.step()
        theirs.step()
        assert_close(full(ours.grad_norm), norm, f"norm at step {step}")
        for i, (param, other) in enumerate(zip(params, expected, strict=True)):
            assert_close(full(param.detach()), other.detach(), f"parameter {i} at step {step}")


def zero(name: str) -> None:
    """Each rank owns some of the parameters; the norm and the guard are taken over ``norm_group``."""
    model = DistributedDataParallel(make_model())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(),
        OURS[name],
        **OPTIONS[name],
        max_norm=MAX_NORM,
        on_nonfinite="skip",
        norm_group=dist.group.WORLD,
    )
    params = list(model.parameters())
    inner = optimizer.optim
    owned = {id(param) for group in inner.param_groups for param in group["params"]}
    check_training(name, model, optimizer, inner, params[0] if id(params[0]) in owned else None)


def guard_raises(name: str) -> None:
    """``raise`` raises on every rank, though one alone holds the NaN; nothing moves anywhere."""
    model = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = OURS[name](model.named_parameters(), **OPTIONS[name], on_nonfinite="raise")
    input, target = next(batches())
    loss_of(model, input, target).backward()
    if dist.get_rank() == 1:
        spoil(next(model.parameters()))
    before = [param.to_local().clone() for param in model.parameters()]
    text = ""
    try:
        optimizer.step()
    except FloatingPointError as error:
        text = str(error)
    assert "0.weight" in text if dist.get_rank() == 1 else "none on this rank" in text, text
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.to_local(), value)


def checkpoint(name: str) -> None:
    """Saved sharded in mid-run, loaded into new objects, continued: the bits of the uninterrupted run.

    Once from ours to ours, and once from torch's class to ours.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    given = list(batches())

    def train(model: nn.Module, optimizer: Any, part: list[tuple[Tensor, Tensor]]) -> None:
        for input, target in part:
            optimizer.zero_grad()
            loss_of(model, input, target).backward()
            optimizer.step()

    for label, first_class in (("ours", OURS[name]), ("torch", getattr(torch.optim, name))):
        model = sharded(mesh)
        optimizer = first_class(model.parameters(), **OPTIONS[name])
        train(model, optimizer, given[:4])
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        path = str(Path(shared[0]) / label)
        dcp.save(copy.deepcopy(state), checkpoint_id=path)

        resumed = sharded(mesh)
        other = OURS[name](resumed.parameters(), **{**OPTIONS[name], "lr": 9.0})
        blank = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, other)}
        dcp.load(blank, checkpoint_id=path)
        resumed.load_state_dict(blank["model"])
        set_optimizer_state_dict(resumed, other, blank["optimizer"])
        assert other.param_groups[0]["lr"] == OPTIONS[name]["lr"]
        train(model, optimizer, given[4:])
        train(resumed, other, given[4:])
        for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
            if label == "ours":
                assert torch.equal(one.to_local(), two.to_local())
            torch.testing.assert_close(one.to_local(), two.to_local())


CASES: dict[str, Callable[[str], None]] = {
    case.__name__: case for case in (ddp, fsdp, hsdp, placements, zero, guard_raises, checkpoint)
}


def main() -> None:
    folder, labels = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    for label in labels:
        case, name = label.split("-")
        report = folder / f"{label}.{dist.get_rank()}"
        try:
            CASES[case](name)
        except BaseException:
            report.write_text(traceback.format_exc())
            raise  # the other ranks may be waiting for this one: go no further
        report.write_text("")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
