"""``stacked=True`` on the Triton kernels: launches, long models, what is read where it lies; torch.compile; graphs."""

from typing import Any

import pytest
import torch
from gradkernels import FusedAdamW, FusedSGD
from gradkernels.optim.bucket import Bucket
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs

from ..conftest import GPU
from .optimizers import copies, make_params, ours_for, parameters, set_gradients, step_by, step_by_ones
from .stacks import B, SeparateRuns, advance, assert_same, make
from .test_compile import step_calls
from .test_stacked_contract import OPTIONS, TWO, VECTOR, assert_equal, snapshot

on_kernels = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@on_kernels
@pytest.mark.parametrize("guard", [{}, {"max_norm": 1.0, "on_nonfinite": "skip"}], ids=str)
def test_one_launch_for_any_number_of_models(
    guard: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two with clipping or guard; a device tensor is handed over as it is, so nothing of a step grows with B."""
    from gradkernels.triton import stacked

    seen: list[Any] = []
    real = stacked.launch
    monkeypatch.setattr(stacked, "launch", lambda *a, **k: (seen.append(a), real(*a, **k)))
    for count in (1, 300):
        params = [nn.Parameter(torch.randn(count, *rest, device=device)) for rest in ((3,), (), (2, 2))]
        groups = [{"params": params[:1], "lr": torch.rand(count, device=device)}, {"params": params[1:]}]
        ours = FusedAdamW(groups, stacked=True, lr_scale=torch.rand(count, device=device), **guard)
        ours.active = torch.rand(count, device=device) < 0.5
        for _ in range(2):
            seen.clear()
            step_by(ours, [torch.randn_like(p) for p in params])
            assert len(seen) == 1 + bool(guard)


@on_kernels
@pytest.mark.parametrize("name", ["SGD", pytest.param("AdamW", marks=pytest.mark.full)])
def test_a_model_of_several_programs(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long rows: several programs read one step, and add up one norm."""
    from gradkernels.triton import stacked

    if not GPU:  # shorter pieces are fewer interpreted blocks; a compiled kernel may not change its constants
        monkeypatch.setattr(stacked, "CHUNK", type(stacked.CHUNK)(512))
    shapes = ((2, 4 * stacked.CHUNK.value + 100), (2, 3))
    options = {**OPTIONS[name], "lr": torch.tensor([0.1, 0.02])}
    ours, runs, feed = make(name, device, shapes=shapes, shared={"max_norm": 5.0}, **options)
    for step in (1, 2):
        norms = advance(ours, runs, step, feed(step), [True, step != 1], 5.0)
        assert ours.grad_norm[0].item() == pytest.approx(norms[0], rel=1e-6)
    ours.active = None
    first = ours.grad_norm
    ours.step()
    assert torch.equal(ours.grad_norm, first), "the same gradients have the same norm"


@pytest.mark.parametrize("width", [4, 12, 16, 20])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float64",) * 2])
def test_vectors_end_where_rows_of_every_operand_do(width: int, dtypes: tuple[str, str]) -> None:
    """A row of narrow gradients may begin within 16 bytes, though those of the parameters do not."""
    pytest.importorskip("triton")
    from gradkernels.triton.stacked import ALIGNED, StackedTables

    stack, grads = (torch.zeros(B, width, dtype=getattr(torch, name)) for name in dtypes)
    tables = StackedTables(Bucket([stack], [grads], {"momentum_buffer": [stack]}, [0], [0]), B, 1024)
    tables.refresh([grads])
    rows = [width * tensor.element_size() % 16 == 0 for tensor in (stack, grads)]
    assert bool(tables.rows.array[0, ALIGNED.value]) is all(rows)
    assert not all(rows) or width % tables.vector == 0


@pytest.mark.parametrize(
    ("name", "backend"),
    [("SGD", "fallback"), ("AdamW", "fallback"), ("AdamW", "triton")],
    indirect=["backend"],
)
def test_options_may_be_views(name: str, device: torch.device) -> None:
    """Columns of tables of settings, an expanded factor, every other element of a mask."""
    table, other = (torch.rand(B, 4, device=device) / 10 + 0.01 for _ in range(2))
    mask = torch.tensor([b % 4 != 1 for b in range(2 * B)], device=device)[::2]
    given = {"lr": table[:, 1], "weight_decay": other[:, 3]}
    start = make_params(TWO)
    runs = SeparateRuns(name, start, **{key: value.cpu() for key, value in given.items()})
    ours = ours_for(name)(
        copies(start, device), stacked=True, **given, lr_scale=torch.ones(1, device=device).expand(B)
    )
    ours.active = mask
    for step in (1, 2, 3):
        table.mul_(0.9)
        runs.set(lr=table[:, 1].cpu(), weight_decay=other[:, 3].cpu())
        gradients = [torch.randn(shape) for shape in TWO]
        set_gradients(ours, gradients)
        runs.step(gradients, mask.tolist())
        ours.step()
        assert_same(ours, runs, f"at step {step}")


@on_kernels
def test_a_model_that_is_left_out_is_not_read(device: torch.device) -> None:
    """Its gradients may be anything, and its step's first read of them is the first that counts."""
    ours, runs, feed = make("AdamW", device, shapes=TWO, shared={"max_norm": 1.0}, **OPTIONS["AdamW"])
    ours.active = torch.tensor([True, False, True, True, True], device=device)
    gradients = feed(1)
    spoilt = [grad.clone() for grad in gradients]
    for grad in spoilt:
        grad[1] = torch.nan
    set_gradients(ours, spoilt)
    runs.step(gradients, ours.active.tolist(), 1.0)
    ours.step()
    assert_same(ours, runs)
    assert ours.grad_norm.isnan().tolist() == [False, True, False, False, False]


# torch.compile.

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": VECTOR}),
    "Adam": ("Adam", {"betas": (VECTOR, 0.99)}),
    "AdamW guarded": ("AdamW", {"lr": VECTOR, "max_norm": 1.0, "on_nonfinite": "skip", "lr_scale": VECTOR}),
}


@pytest.mark.parametrize("label", CASES)
@pytest.mark.filterwarnings("ignore:Profiler record function")
def test_a_compiled_step_is_one_operator_and_reads_its_options_anew(label: str) -> None:
    """Rates, factors and masks changed in place steer the same graph."""
    torch._dynamo.reset()
    name, options = CASES[label]
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        kept = {key: value.clone() if isinstance(value, Tensor) else value for key, value in options.items()}
        made.append(ours_for(name)(make_params(TWO), stacked=True, **{**OPTIONS[name], **kept}))
        made[-1].active = torch.ones(B, dtype=torch.bool)
    recorder = EagerAndRecordGraphs()
    compiled, plain = made
    step = torch.compile(lambda: compiled.step(), fullgraph=True, backend=recorder)
    for index in range(5):
        gradients = [torch.randn(shape) for shape in TWO]
        if index == 2:
            gradients[0][3, 0] = torch.inf
        for optimizer in made:
            set_gradients(optimizer, gradients)
            optimizer.active.copy_(torch.tensor([True, index < 2, True, index != 3, True]))
            if isinstance(optimizer.param_groups[0]["lr"], Tensor):
                optimizer.param_groups[0]["lr"].mul_(0.8)
            if optimizer.lr_scale is not None:
                optimizer.lr_scale.add_(0.1)
        step()
        plain.step()
        assert_equal(snapshot(compiled), snapshot(plain))
    assert sum(step_calls(recorder)) == 1
    assert torch.equal(compiled.steps_skipped, plain.steps_skipped)
    if "max_norm" in options:
        assert torch.equal(compiled.grad_norm.isnan(), plain.grad_norm.isnan())
        assert compiled.steps_skipped.tolist() == [0, 0, 0, 1, 0]
    torch._dynamo.reset()


def test_tensors_without_values() -> None:
    """On meta a step makes the state and does nothing else."""
    for name in OPTIONS:
        params = [nn.Parameter(torch.ones(shape, device="meta")) for shape in TWO]
        ours = ours_for(name)(params, stacked=True, max_norm=1.0, **OPTIONS[name])
        step_by_ones(ours)
        assert ours.state[params[0]]["step"].shape == (B,)


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [FusedSGD, FusedAdamW])
def test_a_captured_step_reads_rates_factors_and_masks_at_each_replay(cls: Any) -> None:
    device = torch.device("cuda")
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        lr, factors = VECTOR.to(device), VECTOR.to(device)
        params = copies(make_params(TWO), device)
        made.append(cls(params, stacked=True, lr=lr, lr_scale=factors, capturable=True, max_norm=1.0))
        made[-1].active = torch.ones(B, dtype=torch.bool, device=device)
        step_by_ones(made[-1])
    captured, eager = made
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for index in range(3):
        gradients = [torch.randn(shape, device=device) for shape in TWO]
        for optimizer in made:
            for param, grad in zip(parameters(optimizer), gradients, strict=True):
                param.grad.copy_(grad)
            optimizer.active[index] = False
            optimizer.lr_scale.mul_(0.5)
            optimizer.param_groups[0]["lr"].add_(0.1)
        graph.replay()
        eager.step()
        assert_equal(snapshot(captured), snapshot(eager))
