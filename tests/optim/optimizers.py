"""What the optimizers' tests share: runs beside torch.optim and NumPy, compared after every step."""

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import gradkernels
import numpy as np
import pytest
import torch
from gradkernels.reference import adam, sgd
from gradkernels.verify.tolerance import compare
from torch import Tensor
from torch.optim import Optimizer

from ..helpers import to_numpy

FUSED = {
    torch.optim.SGD: gradkernels.FusedSGD,
    torch.optim.Adam: gradkernels.FusedAdam,
    torch.optim.AdamW: gradkernels.FusedAdamW,
}
NAMES = ("SGD", "Adam", "AdamW")
SHAPES = ((1023,), (7, 9), (65,), (0, 3), (1,), ())
STEPS = 12

FULL_OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.004, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "Adam": {"lr": 0.004, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.004, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True},
}
SMALL = ((65,), (7, 9), ())

SCALE = 256.0  # a power of two: scaling and unscaling are exact

Gradients = list["Tensor | None"]


def cases_on_both_backends(
    argnames: str, cases: Iterable[tuple[Any, ...]], on_kernels: Callable[..., bool]
) -> pytest.MarkDecorator:
    """Every optimizer and every case on both implementations.

    An interpreted program is slow: on the kernels only the cases that ``on_kernels`` accepts are run by default,
    and Adam, which shares AdamW's kernel, waits for the full run.
    """
    listed = list(cases)
    params = [
        pytest.param(
            name,
            backend,
            *case,
            marks=() if backend == "fallback" or (name != "Adam" and on_kernels(*case)) else pytest.mark.full,
            id="-".join(map(str, (name, backend, *case))),
        )
        for backend in ("fallback", "triton")
        for name in NAMES
        for case in listed
    ]
    return pytest.mark.parametrize(("name", "backend", *argnames.split()), params, indirect=["backend"])


on_both_backends = cases_on_both_backends("", [()], lambda: True)


def theirs_for(name: str) -> Any:
    """torch.optim's class of this name."""
    return getattr(torch.optim, name)


def ours_for(name: str) -> Any:
    """The drop-in for torch.optim's class of this name."""
    return FUSED[theirs_for(name)]


def spread(shape: Iterable[int], centre: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random signs; sizes from a quarter of ``centre`` to four times it, so that no element hides another."""
    size = 2 ** (4 * torch.rand(tuple(shape), dtype=torch.float64) - 2)
    sign = torch.randint(0, 2, tuple(shape), dtype=torch.float64) * 2 - 1
    return (centre * sign * size).to(dtype)


def make_params(
    shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Parameters small enough for a few steps to be seen in bfloat16."""
    return [torch.nn.Parameter(spread(shape, 0.03, dtype)) for shape in shapes]


def copies(params: Iterable[Tensor], device: torch.device | str = "cpu") -> list[torch.nn.Parameter]:
    """The same values and strides again, as parameters on ``device``."""
    return [torch.nn.Parameter(param.detach().clone().to(device)) for param in params]


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The param groups without their parameters and without what selects among torch's implementations."""
    left_out = ("params", "foreach", "fused")
    return [{k: v for k, v in group.items() if k not in left_out} for group in optimizer.param_groups]


class Feed:
    """Gradients for every step: each element keeps its direction, and all are tiny in steps 5 to 8.

    Only where a second moment falls does amsgrad differ.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._base = [spread(param.shape, 4.0) for param in params]
        self._dtypes = [param.dtype for param in params]

    def __call__(self, step: int) -> Gradients:
        size = 0.02 if 4 < step <= 8 else 1.0
        return [
            (size * base * (1 + 0.3 * torch.randn_like(base))).to(dtype)
            for base, dtype in zip(self._base, self._dtypes, strict=True)
        ]


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, group by group."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_gradients(
    optimizer: Optimizer, gradients: Gradients, lay_out: Callable[[Tensor], Tensor] = torch.clone
) -> None:
    """Give each parameter its own copy of a gradient; ``lay_out`` may choose other strides."""
    for param, grad in zip(parameters(optimizer), gradients, strict=True):
        param.grad = None if grad is None else lay_out(grad.to(param.device, param.grad_dtype))


def transposed(grad: Tensor) -> Tensor:
    """The same values, the first and the last dimension the other way round in memory."""
    return grad.transpose(0, -1).contiguous().transpose(0, -1) if grad.ndim > 1 else grad.clone()


class ReferenceRun:
    """The NumPy steps beside a torch optimizer, under whatever its param groups say when each step is taken.

    Each parameter starts from the value and the state that it has when the run first meets it.
    """

    def __init__(self, optimizer: Optimizer, sgd_step: Any = sgd.step, adam_step: Any = adam.step) -> None:
        self._optimizer = optimizer
        self._step = sgd_step if isinstance(optimizer, torch.optim.SGD) else adam_step
        self._names = (
            ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
            if isinstance(optimizer, torch.optim.SGD)
            else ("lr", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
        )
        self.values: dict[Tensor, dict[str, np.ndarray]] = {}
        self.scales: dict[Tensor, dict[str, np.ndarray]] = {}

    def step(self, gradients: Gradients) -> None:
        """Step every parameter that has a gradient, and widen the scales to the largest values met so far."""
        given = iter(gradients)
        for group in self._optimizer.param_groups:
            options: dict[str, Any] = {name: float(group[name]) for name in self._names}
            if "betas" in group:
                options["betas"] = tuple(float(beta) for beta in group["betas"])
            for param in group["params"]:
                grad = next(given)
                if param not in self.values:
                    state = {k: to_numpy(v) for k, v in self._optimizer.state.get(param, {}).items()}
                    self._record(param, {"param": to_numpy(param).copy(), **state})
                if grad is None:
                    continue
                state = dict(self.values[param])
                value, state = self._step(state.pop("param"), to_numpy(grad), state, **options)
                self._record(param, {"param": value, **state})

    def _record(self, param: Tensor, values: dict[str, np.ndarray]) -> None:
        self.values[param] = values
        scales = self.scales.setdefault(param, {})
        for name, array in values.items():
            scales[name] = np.maximum(scales.get(name, 0.0), np.abs(array))


def assert_same_state(ours: Optimizer, theirs: Optimizer, reference: ReferenceRun, when: str = "") -> None:
    """Every parameter and every state tensor: the same keys and dtypes, the values within the policy.

    Each element is measured on its own scale, the largest value that it has had in this run.
    """
    for index, (mine, other) in enumerate(zip(parameters(ours), parameters(theirs), strict=True)):
        where = f"parameter {index} {tuple(other.shape)} {other.dtype} {when}"
        assert (mine in ours.state) == (other in theirs.state), f"state of {where}"
        my_state, other_state = ours.state.get(mine, {}), theirs.state.get(other, {})
        assert my_state.keys() == other_state.keys(), where
        for name, tensor in {"param": other, **other_state}.items():
            result = mine if name == "param" else my_state[name]
            if name == "step":
                assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape), where
                assert result.device == mine.device, where
                assert result.item() == tensor.item(), f"step of {where}: {result} for {tensor}"
                continue
            if tensor is None:
                assert result is None, where
                continue
            expected, scale = reference.values[other][name], reference.scales[other][name]
            comparison = compare(result, tensor, expected, scale)
            assert comparison.passed, f"{name} of {where}: {comparison}"


def assert_follows(
    ours: Optimizer, theirs: Optimizer, reference: ReferenceRun, gradients: Gradients, when: str = ""
) -> None:
    """Let torch's and the reference take the step that ours has taken, by these gradients, and compare."""
    set_gradients(theirs, gradients)
    reference.step(gradients)
    theirs.step()
    assert_same_state(ours, theirs, reference, when)


def assert_moved(theirs: Optimizer, reference: ReferenceRun, start: list[np.ndarray]) -> None:
    """Assert that steps which do nothing would be noticed: the run went further than the tolerance."""
    for param, before in zip(parameters(theirs), start, strict=True):
        if param.numel() == 0:
            continue
        expected, scale = reference.values[param]["param"], reference.scales[param]["param"]
        stuck = compare(torch.from_numpy(before).to(param.dtype), param, expected, scale)
        assert not stuck.passed, f"the run of {tuple(param.shape)} {param.dtype} is too short: {stuck}"


def assert_same_run(
    ours: Optimizer,
    theirs: Optimizer,
    feed: Callable[[int], Gradients] | None = None,
    steps: int = STEPS,
    lay_out: Callable[[Tensor], Tensor] = torch.clone,
    after_step: Callable[[Optimizer, int], None] = lambda optimizer, step: None,
    reference: ReferenceRun | None = None,
) -> ReferenceRun:
    """Step both with the same gradients, comparing after each; ``after_step`` runs schedulers and such.

    A run that goes on from an earlier one passes that one's ``reference``.
    """
    feed = Feed(parameters(theirs)) if feed is None else feed
    reference = ReferenceRun(theirs) if reference is None else reference
    start = [to_numpy(param).copy() for param in parameters(theirs)]
    for step in range(1, steps + 1):
        gradients = feed(step)
        set_gradients(ours, gradients, lay_out)
        ours.step()
        for param, grad in zip(parameters(ours), gradients, strict=True):
            assert grad is None or torch.equal(param.grad.to("cpu"), grad), "a gradient was written"
        assert_follows(ours, theirs, reference, gradients, f"at step {step}")
        for optimizer in (theirs, ours):
            after_step(optimizer, step)
        assert settings(ours) == settings(theirs), f"param groups at step {step}"
    assert_moved(theirs, reference, start)
    return reference


def make_pair(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    shapes: Iterable[tuple[int, ...]] = SHAPES,
    shared: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Ours and torch's optimizer of this name, on equal parameters. ``shared`` goes to ours alone."""
    return pair_over(make_params(shapes, dtype), name, device, shared=shared, **options)


def pair_over(
    params: list[torch.nn.Parameter],
    name: str,
    device: torch.device | str = "cpu",
    shared: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Ours, on copies of these parameters, and torch's. ``shared`` goes to ours alone, and may have its own copies."""
    given = {"params": copies(params, device), **options, **(shared or {})}
    return ours_for(name)(**given), theirs_for(name)(params, foreach=False, **options)


def step_by(
    optimizer: Optimizer, gradients: Gradients, lay_out: Callable[[Tensor], Tensor] = torch.clone
) -> None:
    """One step with copies of these gradients."""
    set_gradients(optimizer, gradients, lay_out)
    optimizer.step()


def step_by_ones(optimizer: Optimizer) -> None:
    """One step with gradients of 1 that lie as the parameters do."""
    for param in parameters(optimizer):
        param.grad = torch.ones_like(param)
    optimizer.step()


def run(optimizer: Optimizer, gradients: list[list[Tensor]]) -> None:
    for each in gradients:
        step_by(optimizer, each)


def some_gradients(optimizer: Optimizer, steps: int) -> list[list[Tensor]]:
    feed = Feed(parameters(optimizer))
    return [feed(step) for step in range(1, steps + 1)]


def values_of(optimizer: Optimizer) -> list[Tensor]:
    """Copies of the parameters."""
    return [param.detach().clone() for param in parameters(optimizer)]


@torch.no_grad()
def set_values(optimizer: Optimizer, values: Iterable[Tensor]) -> None:
    for param, value in zip(parameters(optimizer), values, strict=True):
        param.copy_(value)


def assert_close(ours: Optimizer, theirs: Optimizer, **tolerance: Any) -> None:
    """The parameters, within torch's own tolerance where none is given."""
    for mine, other in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(mine.cpu(), other, **tolerance)


def assert_equal_bits(first: Optimizer, second: Optimizer) -> None:
    """Parameters and state tensors, bit for bit."""
    for one, other in zip(parameters(first), parameters(second), strict=True):
        assert torch.equal(one, other)
        assert first.state[one].keys() == second.state[other].keys()
        for key, value in first.state[one].items():
            assert torch.equal(value, second.state[other][key]), key


def failure(make: Callable[[], Any]) -> tuple[type[BaseException], str]:
    """The exception of a call that must fail, as its type and text."""
    with pytest.raises((Exception, UserWarning)) as caught:
        make()
    return caught.type, str(caught.value)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


def bits(optimizer: Optimizer) -> list[Tensor]:
    """Copies of the parameters and of every state tensor that is not all zero.

    A first step skipped on the device may leave zeros where torch, which decides on the host, leaves nothing.
    """
    kept = values_of(optimizer)
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


def clipped(gradients: list[Tensor], max_norm: float) -> tuple[list[Tensor], float]:
    """The float64 gradients scaled as clip_grad_norm_ does, and their norm."""
    norm = float(np.sqrt(sum(float(grad.double().square().sum()) for grad in gradients)))
    return [grad.double() * min(1.0, max_norm / (norm + 1e-6)) for grad in gradients], norm
