"""FusedAdam and FusedAdamW: the update rule against NumPy and torch, the tables, one launch."""

from typing import Any
from unittest import mock

import pytest
import torch
from gradkernels import FusedAdam, FusedAdamW, FusedSGD
from gradkernels.fallback import adam as fallback
from gradkernels.fallback.multi_tensor import decide, decide_by_tensors
from gradkernels.reference import adam as reference
from torch import Tensor
from torch.optim import Adam

from ..helpers import DTYPES, assert_matches, to_numpy
from .optimizers import (
    amp_step,
    assert_equal_bits,
    assert_same_run,
    copies,
    make_pair,
    parameters,
    set_gradients,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize(
    "options", [{"lr": 0.1}, {"weight_decay": 0.3, "amsgrad": True, "maximize": True}], ids=str
)
def test_matches_torch_and_numpy(
    name: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    assert_same_run(*make_pair(name, device, dtype, ((65,), (3, 5), (0, 2)), **options), steps=3)


@pytest.mark.parametrize("step", [1, 2, 1000, 10**6, 2**24 - 2])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9999), (0.99, 0.0)], ids=str)
def test_bias_corrections_at_any_step(step: int, betas: tuple[float, float], device: torch.device) -> None:
    start = [torch.randn(64)]
    (p,), (q,) = copies(start, device), copies(start)
    p.grad = torch.randn(64).to(device)
    q.grad = p.grad.cpu()
    state = {"exp_avg": torch.randn(64), "exp_avg_sq": torch.rand(64), "step": torch.tensor(step - 1.0)}
    ours, theirs = FusedAdam([p], betas=betas), Adam([q], betas=betas, foreach=False)
    ours.state[p] = {key: value.clone().to(device) for key, value in state.items()}
    theirs.state[q] = {key: value.clone() for key, value in state.items()}
    value, _ = reference.step(
        to_numpy(p), to_numpy(q.grad), {key: to_numpy(v) for key, v in state.items()}, betas=betas
    )
    ours.step()
    theirs.step()
    assert_matches(p, q, value)
    assert ours.state[p]["step"].item() == step


@pytest.mark.parametrize(("dtype", "grad"), [(torch.float32, 1e-19), (torch.float64, 1e-17)], ids=str)
def test_tiny_second_moments_keep_their_digits(dtype: torch.dtype, grad: float, device: torch.device) -> None:
    # In float32 exp_avg_sq is 1e-41: a root that flushes it to 0 would divide by eps alone.
    start = [torch.zeros(8, dtype=dtype)]
    (p,), (q,) = copies(start, device), copies(start)
    q.grad = torch.full((8,), grad, dtype=dtype)
    p.grad = q.grad.to(device)
    value, _ = reference.step(to_numpy(q), to_numpy(q.grad), eps=1e-30)
    FusedAdam([p], eps=1e-30).step()
    Adam([q], eps=1e-30, foreach=False).step()
    assert_matches(p, q, value)
    assert p.detach().abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "launches"), [({}, 1), ({"max_norm": 1.0, "on_nonfinite": "skip"}, 2)], ids=str
)
@pytest.mark.parametrize("ours", [FusedSGD, FusedAdamW])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_one_launch_for_any_number_of_tensors(
    ours: Any, options: dict[str, Any], launches: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for size in (*range(1, 20), 5000)]
    groups = [{"params": params[:9], "lr": 0.1}, {"params": params[9:], "weight_decay": 0.1}]
    optimizer = ours(groups, **options, **({"momentum": 0.9} if ours is FusedSGD else {}))
    from gradkernels.triton import multi_tensor

    monkeypatch.setattr(multi_tensor, "launch", launch := mock.Mock(wraps=multi_tensor.launch))
    for step in (1, 2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert launch.call_count == step * launches


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_tables_are_uploaded_only_when_they_change(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradkernels.triton.multi_tensor import Tables

    params = [torch.nn.Parameter(torch.randn(5, device=device)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = FusedAdam(params, lr=0.1)
    optimizer.step()
    real, made = Tables.upload, []
    monkeypatch.setattr(Tables, "upload", lambda *args: (made.append(args), real(*args))[1])

    def uploads() -> int:
        made.clear()
        optimizer.step()
        return len(made)

    assert uploads() == 0
    params[1].grad = params[1].grad.clone()  # elsewhere in memory: the rows
    assert uploads() == 1
    optimizer.param_groups[0]["lr"] = 0.05  # the options
    assert uploads() == 1
    params[1].grad, optimizer.param_groups[0]["lr"] = params[1].grad.clone(), 0.1  # both, together
    assert uploads() == 1
    assert uploads() == 0


class OnDevice(Tensor):
    """A number that counts as lying on a device, so that the kernel must read it there."""

    is_cpu = False


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_the_table_of_options_holds_those_of_the_step(device: torch.device) -> None:
    from gradkernels.optim.bucket import AdamOptions, Bucket
    from gradkernels.triton.multi_tensor import tables_of

    def options(bucket: Bucket, rate: Any, limit: float | None) -> list[int]:
        groups = [AdamOptions(rate, 0.9, 0.99, 1e-8, 0.1, True, flag) for flag in (True, False)]
        return tables_of(bucket).options(groups, limit).view(torch.int64).flatten().tolist()

    def bucket() -> Bucket:
        return Bucket([torch.zeros(3, device=device)], [torch.ones(3, device=device)], {}, [0], [0])

    kept, rate = bucket(), torch.tensor(0.25, device=device).as_subclass(OnDevice)
    rates = (0.5, 0.5, rate, 0.5, 0.25, rate, torch.tensor(0.25), rate.clone(), 0.25, 0.0, -0.0, 1, 1.0, 2)
    for limit in (None, 1.0, 0.0):
        for given in (*rates, rate.fill_(0.75)):
            assert options(kept, given, limit) == options(bucket(), given, limit), (given, limit)
    assert len({tuple(options(kept, given, None)) for given in (0.0, -0.0, 1, 2)}) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("ours", [FusedAdam, FusedAdamW])
def test_nothing_waits_for_the_device(ours: type) -> None:
    model = torch.nn.Linear(8, 8, device="cuda")
    optimizer = ours(model.parameters(), fused=True, max_norm=1.0, on_nonfinite="skip")
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for step in range(3):
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            scaler.scale(model(torch.randn(4, 8, device="cuda")).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            norm = optimizer.grad_norm
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(norm)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("ours", "options"),
    [
        (FusedAdamW, {"lr": 0.25}),
        (FusedAdamW, {"betas": (0.75, 0.875)}),
        (FusedAdamW, {"weight_decay": 0.5}),
        (FusedSGD, {"lr": 0.25}),
        (FusedSGD, {"weight_decay": 0.5}),
    ],
    ids=str,
)
def test_options_are_read_on_the_device(ours: Any, options: dict[str, Any], device: torch.device) -> None:
    """Each from its own column of the table, in every group."""

    def on_device(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(on_device, value))
        return torch.tensor(value, device=device).as_subclass(OnDevice)

    start = [torch.randn(7), torch.randn(3)]
    results = []
    for convert in (lambda value: value, on_device):
        params = copies(start, device)
        optimizer = ours([{"params": params[:1], "lr": 0.125}, {"params": params[1:]}])
        optimizer.param_groups[1].update({key: convert(value) for key, value in options.items()})
        for step in range(3):
            for param in params:
                param.grad = torch.full_like(param, 0.5 + step)
            optimizer.step()
        results.append(params)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("finds", ["guard", "scaler"])
def test_the_fallback_decides_on_a_device_as_on_the_host(
    finds: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which steps are skipped, the scale and the clip: there as tensors that nobody reads."""
    start = [torch.randn(shape).to(dtype) for shape in ((65,), (3, 5))]
    shared = {"max_norm": 0.5, "on_nonfinite": "skip", "master_weights": True}
    host, device = (FusedAdamW(copies(start), eps=0.1, **shared) for _ in range(2))
    for step in range(4):
        overflows = step in (0, 2)
        grads = [torch.randn(value.shape).to(dtype) for value in start]
        grads[1][0, 0] = torch.nan if overflows and finds == "guard" else 2.0
        for optimizer, decided in ((host, decide), (device, decide_by_tensors)):
            monkeypatch.setattr(fallback, "decide", decided)
            set_gradients(optimizer, grads)
            amp_step(optimizer, 4.0, overflows if finds == "scaler" else None)
        assert_equal_bits(device, host)
        for one, other in zip(parameters(device), parameters(host), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)
    assert device.steps_skipped == host.steps_skipped == 2


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_bits_do_not_depend_on_what_a_program_updates_at_a_time(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors and what is left of them, element by element, large chunks: the same parameters, states and norm."""
    from gradkernels.triton import config

    sizes = (1, 8, 100, 513, 1000, 4097, 9001)
    start = [torch.randn(size, device=device) for size in sizes]
    grads = [torch.randn(size, device=device) for size in sizes]

    def trained(offset: int) -> list[Tensor]:
        params = [torch.zeros(size + 4, device=device)[offset : size + offset] for size in sizes]
        for param, values, grad in zip(params, start, grads, strict=True):
            param.copy_(values)
            param.grad = grad.clone()
        optimizer = FusedAdamW(params, lr=0.1, max_norm=0.5)
        for _ in range(2):
            optimizer.step()
        norm = optimizer.grad_norm
        assert norm is not None
        moments = [
            optimizer.state[param][key] for param in params for key in ("exp_avg", "exp_avg_sq", "step")
        ]
        return [*params, *moments, norm]

    expected = trained(0)
    monkeypatch.setattr(config, "LARGE_TENSOR", 4097)
    for offset in (0, 1):
        for one, other in zip(trained(offset), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("misaligned", ["nothing", "param", "grad", "momentum_buffer"])
def test_a_tensor_is_read_in_vectors_where_all_its_addresses_allow(
    misaligned: str, device: torch.device
) -> None:
    from gradkernels.optim.bucket import Bucket
    from gradkernels.triton.multi_tensor import ALIGNED, tables_of

    def tensor(name: str) -> Tensor:
        memory = torch.zeros(9, device=device)
        assert memory.data_ptr() % 16 == 0
        return memory[1:] if name == misaligned else memory[:8]

    bucket = Bucket(
        [tensor("param")], [tensor("grad")], {"momentum_buffer": [tensor("momentum_buffer")]}, [0], [0]
    )
    column = tables_of(bucket).rows.tensor[:, ALIGNED.value]
    assert column.tolist() == [misaligned == "nothing"]
    bucket.grads = [torch.zeros(9, device=device)[1:]]
    assert tables_of(bucket).rows.tensor[:, ALIGNED.value].tolist() == [0]
