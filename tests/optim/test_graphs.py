"""Steps that a CUDA graph captures: what is refused, what replays see, and where they write their norms."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD, linear_mse_fit

from .optimizers import copies


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Pretend from now on that the stream is being captured, or that it is not: FusedSGD's capturable runs on a CPU."""

    def pretend(captured: bool) -> None:
        for name in ("linear_mse_fit", "optim.step", "optim.plan"):
            monkeypatch.setattr(import_module(f"gradkernels.{name}"), "capturing", lambda: captured)

    return pretend


@pytest.mark.gpu
@pytest.mark.parametrize("ours", [FusedAdam, FusedAdamW])
def test_a_captured_step_replays_with_live_rates(ours: type) -> None:
    device = torch.device("cuda")
    start = [torch.randn(size) for size in (7, 5000)]
    params, eager = copies(start, device), copies(start, device)
    rates = [torch.tensor(1e-3, device=device) for _ in range(2)]
    optimizer = ours(
        params, lr=rates[0], weight_decay=0.1, capturable=True, max_norm=1.0, on_nonfinite="skip"
    )
    plain = ours(eager, lr=rates[1], weight_decay=0.1, capturable=True, max_norm=1.0, on_nonfinite="skip")
    for p, q in zip(params, eager, strict=True):
        p.grad, q.grad = torch.randn_like(p), torch.zeros_like(q)
        q.grad.copy_(p.grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(4):
        for p, q in zip(params, eager, strict=True):
            p.grad.copy_(torch.randn_like(p) if step != 2 else torch.full_like(p, torch.nan))
            q.grad.copy_(p.grad)
        for rate in rates:
            rate.fill_(1e-2 / (step + 1))
        graph.replay()
        plain.step()
        for p, q in zip(params, eager, strict=True):
            assert torch.equal(p, q)
            for key, value in optimizer.state[p].items():
                assert torch.equal(value, plain.state[q][key]), key
        assert torch.equal(optimizer.grad_norm, plain.grad_norm) or step == 2
    assert optimizer.steps_skipped == plain.steps_skipped == 1


def test_refusals_of_a_capture_without_a_gpu(capture: Callable[[bool], None]) -> None:
    # The same conditions as below.
    def captured(optimizer: torch.optim.Optimizer) -> None:
        capture(True)
        try:
            optimizer.step()
        finally:
            capture(False)

    params = [torch.nn.Parameter(torch.randn(5)) for _ in range(2)]
    params[0].grad = torch.randn(5)
    with pytest.raises(RuntimeError, match="capturable is False"):
        captured(FusedSGD(params))
    with pytest.raises(RuntimeError, match="on the host"):
        captured(FusedSGD(params, capturable=True, on_nonfinite="raise"))
    optimizer = FusedSGD(params, capturable=True, momentum=0.9)
    with pytest.raises(RuntimeError, match="parameter 0 has made no step yet"):
        captured(optimizer)
    optimizer.step()
    with pytest.raises(RuntimeError, match="parameter 1 has no gradient"):
        captured(optimizer)
    params[1].grad = torch.randn(5)  # its state would be made inside the graph
    with pytest.raises(RuntimeError, match="parameter 1 has made no step yet"):
        captured(optimizer)
    optimizer.step()
    captured(optimizer)


def test_rounds_are_captured_after_some_that_made_the_state(capture: Callable[[bool], None]) -> None:
    # What the first rounds make, each replay would make anew: zeros.
    x, y, weight = torch.randn(9, 3), torch.randn(9), torch.zeros(3, requires_grad=True)
    options = {"lr": 0.1, "momentum": 0.9, "max_norm": 1.0, "on_nonfinite": "skip"}

    def fit(optimizer: FusedSGD, captured: bool) -> None:
        capture(captured)
        linear_mse_fit(x, weight, y, optimizer=optimizer, steps=2)

    with pytest.raises(RuntimeError, match="capturable is False"):
        fit(FusedSGD([weight], **options), captured=True)
    optimizer = FusedSGD([weight], **options, capturable=True)
    with pytest.raises(RuntimeError, match="it has made no rounds yet"):
        fit(optimizer, captured=True)
    assert not optimizer.state
    places = []
    for captured in (False, True, True, False):
        fit(optimizer, captured)
        places.append(optimizer._norms.data_ptr())
    assert len(set(places[1:])) == 1
    optimizer.param_groups[0]["dampening"] = 0.5  # which counts steps
    with pytest.raises(RuntimeError, match="with these parameters, options and states"):
        fit(optimizer, captured=True)
    fit(optimizer, captured=False)
    fit(optimizer, captured=True)
    optimizer.state.clear()
    with pytest.raises(RuntimeError, match="with these parameters, options and states"):
        fit(optimizer, captured=True)


def test_rounds_with_another_parameter_are_not_captured_before_some(capture: Callable[[bool], None]) -> None:
    x, y, weight, bias = torch.randn(9, 3), torch.randn(9, 1), torch.zeros(1, 3), torch.zeros(1)
    optimizer = FusedAdam([weight.requires_grad_()], capturable=True, fused=True)
    linear_mse_fit(x, weight, y, optimizer=optimizer, steps=2)
    optimizer.add_param_group({"params": [bias.requires_grad_()]})
    for captured in (True, False, True):
        capture(captured)
        refused = captured and bias not in optimizer.state
        with pytest.raises(RuntimeError, match="it has made no rounds yet") if refused else nullcontext():
            linear_mse_fit(x, weight, y, bias, optimizer=optimizer, steps=2)
        assert (bias in optimizer.state) != refused


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64)], ids=["part", "parts"])
def test_graphs_and_steps_write_their_norms_to_one_tensor(
    dtypes: tuple[torch.dtype, ...], capture: Callable[[bool], None]
) -> None:
    # A replay writes to where its capture wrote, and grad_norm cannot know which graph was replayed last.
    params = [torch.nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in dtypes]
    optimizer = FusedSGD(params, lr=0.1, capturable=True, max_norm=1.0)
    places = []
    for step, captured in enumerate((False, True, True, False), start=1):
        capture(captured)
        for p in params:
            p.grad = torch.full_like(p, step)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(2 * step * len(params) ** 0.5)
        places.append(optimizer._norms.data_ptr())
    assert len(set(places[1:])) == 1


def test_a_step_beside_a_graph_that_was_captured_in_inference_mode(capture: Callable[[bool], None]) -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = FusedSGD([param], lr=0.1, capturable=True, max_norm=1.0)
    for captured in (False, True, False):
        capture(captured)
        param.grad = torch.ones(4)
        with torch.inference_mode(captured):
            optimizer.step()
        assert optimizer.grad_norm.item() == 2


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_graph_keeps_the_tables_of_copies(
    device: torch.device, capture: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The norm and the step have copies, and so tables, of their own; replays upload both from the host's memory.
    from gradkernels.triton import multi_tensor

    made = []

    def note(self: Any, *args: Any) -> None:
        make(self, *args)
        made.append(weakref.ref(self))

    make = multi_tensor.Tables.__init__
    p = torch.nn.Parameter(torch.zeros(2, 3, device=device))
    p.grad = torch.ones(3, 2, device=device).t()
    optimizer = FusedSGD([p], lr=0.1, capturable=True, max_norm=1.0)
    optimizer.step()
    capture(True)
    monkeypatch.setattr(multi_tensor.Tables, "__init__", note)
    optimizer.step()
    gc.collect()
    assert len(made) == 2
    assert all(tables() is not None for tables in made)


@pytest.mark.gpu
def test_capture_is_refused_where_it_cannot_be_right() -> None:
    device = torch.device("cuda")
    params = [torch.nn.Parameter(torch.randn(5, device=device)) for _ in range(2)]
    for p in params:
        p.grad = torch.randn_like(p)
    reasons = [
        ({"capturable": False}, "capturable is False"),
        ({"capturable": True}, "has made no step yet"),
        ({"capturable": True, "on_nonfinite": "raise"}, "on the host"),
    ]
    for options, reason in reasons:
        optimizer = FusedAdam(params, **options)
        with pytest.raises(RuntimeError, match=reason), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
    optimizer = FusedAdam(params, capturable=True)
    optimizer.step()
    params[1].grad = None
    with (
        pytest.raises(RuntimeError, match="parameter 1 has no gradient"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
