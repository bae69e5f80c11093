"""torch.compile of a training step: the update is one operator in one graph, with the numbers of the plain step."""

from collections.abc import Iterator
from typing import Any

import gradkernels
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs

from .optimizers import assert_close, assert_equal_bits, ours_for, parameters

STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.01, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "Adam": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
}

# Dynamo says so of torch's optimizers as well: it leaves out the profiler's label, and it looks at the loss's grad.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Profiler record function"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)).to(device, dtype)
    return model, ours_for(name)(model.parameters(), **{**OPTIONS[name], **options})


def batches(
    steps: int, device: torch.device | str = "cpu", bad: tuple[int, ...] = ()
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        input = torch.randn(8, 6, generator=generator)
        target = input.sum(1, keepdim=True) * (float("nan") if step in bad else 1.0)
        yield input.to(device), target.to(device)


def train(model: nn.Module, optimizer: Any, input: Tensor, target: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    loss = torch.nn.functional.mse_loss(model(input.to(dtype)).float(), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def assert_same_run(
    compiled: tuple[nn.Module, Any],
    plain: tuple[nn.Module, Any],
    given: list[tuple[Tensor, Tensor]],
    step: Any,
) -> None:
    """Losses, parameters, state and norm, bit for bit."""
    for input, target in given:
        loss = step(*compiled, input, target)
        torch.testing.assert_close(loss, train(*plain, input, target), rtol=0, atol=0, equal_nan=True)
    assert_equal_bits(compiled[1], plain[1])
    norms = [optimizer.grad_norm for _, optimizer in (compiled, plain)]
    assert norms == [None, None] or torch.equal(*norms)


def step_calls(recorder: EagerAndRecordGraphs) -> list[int]:
    """How often each recorded graph calls the step's operator."""
    operator = getattr(torch.ops, gradkernels.__name__).optimizer_step.default
    return [sum(node.target is operator for node in graph.graph.nodes) for graph in recorder.graphs]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {}),
    "Adam": ("Adam", {}),
    "AdamW": ("AdamW", {}),
    "clipped": ("AdamW", {"max_norm": 0.5}),
    "guarded": ("SGD", {"on_nonfinite": "skip", "max_norm": 0.5}),
    "bfloat16": ("AdamW", {"dtype": torch.bfloat16}),
    "masters": ("SGD", {"dtype": torch.bfloat16, "master_weights": True}),
    "stochastic": ("AdamW", {"dtype": torch.bfloat16, "stochastic_rounding": True}),
}


@pytest.mark.parametrize("label", CASES)
def test_the_step_is_one_operator_in_one_graph(label: str) -> None:
    """Two graphs: forward and loss, then the step. torch's fused=True leaves the second uncaptured."""
    name, options = CASES[label]
    recorder = EagerAndRecordGraphs()
    bad = (2,) if "on_nonfinite" in options else ()
    compiled = make(name, **options)
    assert_same_run(
        compiled, make(name, **options), list(batches(STEPS, bad=bad)), torch.compile(train, backend=recorder)
    )
    assert step_calls(recorder) == [0, 1]
    assert compiled[1].steps_skipped == len(bad)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_parameter_given_twice_stays_outside_the_graph(name: str) -> None:
    """An operator may not write to one tensor twice; the step does, one mention after the other."""

    def twice() -> tuple[nn.Module, Any]:
        model, optimizer = make(name)
        optimizer.param_groups[0]["params"].append(model[0].weight)
        return model, optimizer

    recorder = EagerAndRecordGraphs()
    assert_same_run(twice(), twice(), list(batches(3)), torch.compile(train, backend=recorder))
    assert not any(step_calls(recorder))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_two_groups_are_two_operators_in_one_graph(name: str) -> None:
    """Each with its own options; nothing else of the step is left in the graph."""

    def both() -> tuple[nn.Module, Any]:
        model, _ = make(name)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.03}]
        return model, ours_for(name)(groups, **OPTIONS[name])

    recorder = EagerAndRecordGraphs()
    assert_same_run(both(), both(), list(batches(STEPS)), torch.compile(train, backend=recorder))
    assert step_calls(recorder) == [0, 2]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_step_alone_compiles_without_a_graph_break(name: str) -> None:
    model, optimizer = make(name)
    plain_model, plain = make(name)
    step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="eager")
    for input, target in batches(STEPS):
        for each in (model, plain_model):
            each.zero_grad()
            torch.nn.functional.mse_loss(each(input), target).backward()
        step()
        plain.step()
    assert_equal_bits(optimizer, plain)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_functionalized(name: str) -> None:
    """Under AOTAutograd the operator's schema must tell of every tensor that it writes."""
    options = {"max_norm": 0.5, "on_nonfinite": "skip"}
    step = torch.compile(train, backend="aot_eager")
    assert_same_run(make(name, **options), make(name, **options), list(batches(STEPS, bad=(1,))), step)


@pytest.mark.full
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_inductor(name: str) -> None:
    """The whole compiler. Its fused forward may round otherwise, so the losses are close, not equal."""
    compiled, plain = make(name, max_norm=0.5), make(name, max_norm=0.5)
    step = torch.compile(train)
    for input, target in batches(STEPS):
        torch.testing.assert_close(step(*compiled, input, target), train(*plain, input, target))
    assert_close(compiled[1], plain[1])


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_kernels_run_inside_the_graph(device: torch.device) -> None:
    """The backend is resolved when the operator runs, not while the graph is traced."""
    recorder = EagerAndRecordGraphs()
    given = list(batches(3, device))
    compiled, plain = make("AdamW", device), make("AdamW", device)
    assert_same_run(compiled, plain, given, torch.compile(train, backend=recorder))
    assert step_calls(recorder) == [0, 1]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_a_scheduled_learning_rate_is_not_baked_in(name: str, kind: str) -> None:
    """A tensor is read at each run of the same graph; a float may be traced anew, as in torch."""
    runs = []
    for step, recorder in (
        (train, None),
        (torch.compile(train, backend=(seen := EagerAndRecordGraphs())), seen),
    ):
        model, optimizer = make(name, lr=torch.tensor(0.01) if kind == "tensor" else 0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
        for input, target in batches(STEPS):
            step(model, optimizer, input, target)
            scheduler.step()
        runs.append([param.detach().clone() for param in model.parameters()])
        if recorder is not None:
            calls = step_calls(recorder)
            assert 1 <= sum(calls) <= (1 if kind == "tensor" else STEPS), calls
    for mine, other in zip(*runs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_plain_and_compiled_steps_mix(name: str) -> None:
    """State made by one is state for the other; the version counters move under the graph too."""
    compiled, plain = make(name), make(name)
    step = torch.compile(train, backend="eager")
    given = list(batches(STEPS))
    versions = [param._version for param in parameters(compiled[1])]
    for index, (input, target) in enumerate(given):
        (step if index % 2 else train)(*compiled, input, target)
        train(*plain, input, target)
        now = [param._version for param in parameters(compiled[1])]
        assert all(new > old for new, old in zip(now, versions, strict=True)), f"step {index}"
        versions = now
    assert_equal_bits(compiled[1], plain[1])
