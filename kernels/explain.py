"""Why a shape gets its plan, and what that compiles to: ``python -m gradkernels explain``.

The launchers themselves run, on contiguous tensors without memory, under a driver that compiles for the wanted chip
and launches nothing (triton/compile_only.py): so what is shown is what a call launches. The reasons are those that the
functions of triton/config.py return with a plan.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .checks import acc_dtype
from .ops import OPS, OPTIMIZERS, Shaped
from .triton import config, linear_mse, linear_mse_fit, linear_mse_models, matmul, mse
from .triton import launch as launch_module
from .triton.compile_only import CHIPS, null_driver, update_of, usage
from .triton.dims import coalesce_dims

# Tensors of a parameter's size that a step reads, and writes: parameter, gradient and states.
_STEP_TRAFFIC = {"sgd": (3, 2), "adam": (4, 3)}


@dataclass(frozen=True)
class Launch:
    """One kernel that a call launches.

    Attributes:
        kernel: its name.
        programs: of the grid.
        warps: of a program.
        constants: its constexpr arguments.
        bytes: predicted: each tensor that it is given moves once.
        registers: per thread. spills: bytes of stack on NVIDIA, registers on AMD. shared: bytes per program.
    """

    kernel: str
    programs: int
    warps: int
    constants: dict[str, str]
    bytes: int
    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Explanation:
    """The plan of a call.

    Attributes:
        what: op, sizes, dtype and target.
        plan: its name. reason: what it does and when it serves.
        refused: why other plans are not taken, by their names.
        rest: the plans that it is preferred to wherever it serves.
        config: what the plan chose.
        launches: the kernels of each pass, by its name.
        bytes: predicted, for an op whose kernels are not compiled here.
    """

    what: str
    plan: str
    reason: str
    refused: dict[str, str]
    rest: tuple[str, ...]
    config: dict[str, Any]
    launches: dict[str, list[Launch]] = field(default_factory=dict)
    bytes: int = 0

    def lines(self) -> Iterator[str]:
        """Return the explanation as text."""
        yield self.what
        yield f"plan {self.plan}: {self.reason}"
        for name, why in self.refused.items():
            yield f"  not {name}: {why}"
        if self.rest:
            yield f"  not {', '.join(self.rest)}: {self.plan} is preferred wherever it serves"
        if self.config:
            yield "  " + ", ".join(f"{name} {value}" for name, value in self.config.items())
        if self.bytes:
            yield f"  predicted {self.bytes:,} bytes; `bench aot` shows what the kernels of a step compile to"
        for title, launches in self.launches.items():
            yield f"{title}: predicted {sum(launch.bytes for launch in launches):,} bytes"
            for launch in launches:
                yield (
                    f"  {launch.kernel}: {launch.programs} programs of {launch.warps} warps, "
                    f"{launch.registers} registers, {launch.spills} spilt, {launch.shared} B shared, "
                    f"predicted {launch.bytes:,} bytes"
                )
                yield "    " + ", ".join(f"{name} {value}" for name, value in launch.constants.items())


def plan_of(op: str, sizes: tuple[int, ...], dtype: torch.dtype, target: config.Target) -> Explanation:
    """Return the plan alone, without its launches."""
    record = OPS[op]
    axes = (record.axes or "any sizes") if isinstance(record, Shaped) else "sizes of one parameter"
    what = f"{op} {'x'.join(map(str, sizes))} ({axes}), {str(dtype).removeprefix('torch.')}"
    what += f", {target.backend} {target.arch}; contiguous, aligned"
    x, y, *_ = _operands(op, sizes, dtype)
    plan, moved = None, 0
    if op == "matmul":
        plans, plan = config.MATMUL_PLANS, matmul.prepare(x, y, None, [], dtype).plan
    elif op == "linear_mse":
        plans, plan = config.LINEAR_MSE_PLANS, linear_mse.plan(x, y, acc_dtype(x, y))
    elif op == "linear_mse_models":
        plans, plan = config.LINEAR_MSE_MODELS_PLANS, linear_mse_models.plan(x, y, None, acc_dtype(x, y))
    elif op == "linear_mse_fit":
        _, N, D, K = sizes
        plans, plan = config.LINEAR_MSE_FIT_PLANS, config.linear_mse_fit(N, K, D, dtype, target)
    elif op == "mse":
        square = mse.plan(coalesce_dims((), x, y), config.MSE_BLOCK)
        plans, plan = config.MSE_PLANS, config.Plan(square.plan, square)
    else:
        numel = math.prod(sizes)
        span = config.step_span(numel)
        tile = {"CHUNK": span, "programs": max(1, launch_module.cdiv(numel, span))}
        tile |= config.optimizer(dtype.itemsize, target)
        plans, plan = config.STEP_PLANS, config.Plan("chunks", tile)
        moved = sum(_STEP_TRAFFIC[op]) * numel * dtype.itemsize
    assert plan is not None
    name, tile, refused, _ = plan
    found = tile._asdict() if hasattr(tile, "_asdict") else tile or {}
    rest = tuple(other for other in plans if other != name and other not in refused)
    return Explanation(what, name, plans[name], refused, rest, found, bytes=moved)


def explain(op: str, sizes: tuple[int, ...], dtype: torch.dtype, target: str) -> Explanation:
    """Return the plan of a call on a chip of CHIPS, and the kernels that it launches.

    Sets Triton's active driver for the rest of the process.

    Raises:
        ValueError: sizes that are not the op's.
    """
    import triton

    calls: list[tuple[str, tuple[Any, ...]]] = []
    driver = null_driver(target, [])
    driver.launcher_cls = lambda source, metadata: lambda *args: calls.append((metadata.hash, args))
    triton.runtime.driver.set_active(driver)
    chip = CHIPS[target]
    if 0 in sizes:
        raise ValueError(f"{op}: no size may be 0, got {'x'.join(map(str, sizes))}")
    explanation = plan_of(op, sizes, dtype, config.Target(chip.backend, chip.arch))
    for title, call in _passes(op, sizes, dtype):
        calls.clear()
        call()
        kernels = {compiled.hash: compiled for compiled, _ in launch_module._compiled.values()}
        explanation.launches[title] = [_launch(kernels[key], args) for key, args in calls]
    return explanation


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _operands(op: str, sizes: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    """Return the tensor arguments of a call, without memory."""
    record = OPS[op]
    shapes = record.problem(sizes) if isinstance(record, Shaped) else {"param": sizes, "grad": sizes}
    return [_meta(*shape, dtype=dtype) for shape in shapes.values()]


def _passes(op: str, sizes: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, Callable[[], object]]]:
    """Return the calls that launch for an op, each after the name of its pass."""
    if op in OPTIMIZERS:
        return []
    x, *others = _operands(op, sizes, dtype)
    g = _meta(dtype=dtype)
    if op == "matmul":
        return [("forward", lambda: matmul.matmul_forward(x, others[0], None, [], dtype))]
    if op == "mse":
        (y,), needs = others, [True, False, False]
        return [
            ("forward", lambda: mse.mse_forward(x, y, None, "mean", 0, dtype)),
            ("loss and gradient", lambda: mse.mse_forward_backward(x, y, None, None, "mean", needs, dtype)),
            ("backward", lambda: mse.mse_backward(g, x, y, None, "mean", 0, needs)),
        ]
    w, y, bias = others
    needs = [False, True, True]
    if op == "linear_mse_models":
        of_models = linear_mse_models.linear_mse_models_forward
        return [
            (
                "losses, gradients of weights and biases",
                lambda: of_models(x, w, y, bias, None, None, "mean", needs, dtype),
            )
        ]
    if op == "linear_mse":
        return [
            (
                "loss, gradients of weight and bias",
                lambda: linear_mse.linear_mse_forward(x, w, y, bias, None, "mean", needs, dtype),
            ),
            ("gradient of input", lambda: linear_mse.linear_mse_backward(g, y, w, 2.0, [True, False])),
        ]
    losses = _meta(100, len(w), dtype=dtype)
    rounds = partial(linear_mse_fit.linear_mse_fit_rounds, x, w, y, bias, None, None, sizes[1], losses)
    return [(f"all rounds, {rule}", partial(rounds, update_of(rule, [w, bias]))) for rule in _STEP_TRAFFIC]


def _launch(compiled: Any, args: tuple[Any, ...]) -> Launch:
    """Return one launch, from what Triton hands to its launcher."""
    params, values = compiled.src.fn.params, args[9:]
    constants = {
        param.name: str(value) for param, value in zip(params, values, strict=True) if param.is_constexpr
    }
    return Launch(
        compiled.metadata.name, math.prod(args[:3]), compiled.metadata.num_warps, constants,
        moved(values), *usage(compiled), compiled.metadata.shared,
    )  # fmt: skip


def moved(args: Sequence[Any]) -> int:
    """Return the bytes of the tensors among a kernel's arguments, each of which moves once."""
    return sum(map(_bytes, args))


def _bytes(value: Any) -> int:
    """Return the bytes of a kernel's argument; an element that strides of 0 repeat counts once."""
    if isinstance(value, Tensor):
        sizes = zip(value.shape, value.stride(), strict=True)
        return math.prod(size for size, stride in sizes if stride) * value.element_size()
    if isinstance(value, tuple):
        return sum(map(_bytes, value))
    return _bytes(value.base) if hasattr(value, "block_shape") else 0
