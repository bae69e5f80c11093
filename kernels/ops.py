"""The list of ops: one record each, from which whatever goes through the ops takes them.

That is ``verify``, ``warmup``, ``info``, the benchmarks, the compile report, the traffic report and the tests. A new
op is its files and one record. The files are found by its name:

    <op>.py  triton/<op>.py  fallback/<op>.py  reference/<op>.py  bench/bench_<op>.py  tests/ops/test_<op>.py

A record says what these cannot: what the op means in torch's own terms, and on which sizes it is tried. Modules are
imported when they are asked for, so that ``import gradkernels`` needs neither Triton nor NumPy.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import backends
from .operator import OPERATORS, Operator

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Public:
    """A public callable.

    Attributes:
        torch: the same in plain torch; None where torch has nothing that takes these arguments.
        shapes, in_torch: its row of the README's table.
    """

    torch: Callable[..., Any] | None
    shapes: str
    in_torch: str


@dataclass(frozen=True)
class Call:
    """A call that sizes do not describe: with further arguments, dtypes or options.

    Attributes:
        shapes: of the tensor arguments, by name and in order.
        dtypes: of those whose dtype is not the one at hand.
        options: the arguments that are no tensors.
    """

    shapes: Mapping[str, Sizes]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        for name, shape in self.shapes.items():
            dtype = str(self.dtypes.get(name, "")).removeprefix("torch.")
            words.append(f"{name} ({', '.join(map(str, shape))}){dtype and ' ' + dtype}")
        return ", ".join(words)


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: of its files.
        public: its public callables by name; the first is the op itself. None of an op that serves other arguments
            of another's, ``of``.
        samples: the sizes on which ``verify`` tries it.
    """

    name: str
    public: Mapping[str, Public]
    samples: tuple[Sizes, ...]
    of: str | None = field(default=None, kw_only=True)

    def function(self, name: str | None = None) -> Callable[..., Any]:
        """Return a public callable; the op itself by default."""
        if self.of is not None:
            return OPS[self.of].function(name)
        module = importlib.import_module(f".{self.name}", __package__)
        return getattr(module, next(iter(self.public)) if name is None else name)

    @property
    def torch(self) -> Callable[..., Any]:
        """Return the op in plain torch."""
        if self.of is not None:
            return OPS[self.of].torch
        twin = next(iter(self.public.values())).torch
        assert twin is not None
        return twin

    @property
    def reference(self) -> Any:
        """Return the module of its NumPy reference."""
        return importlib.import_module(f".reference.{self.name}", __package__)

    def launchers(self, backend: str = "fallback") -> dict[str, Callable[..., Any]]:
        """Return its launchers on a backend, by name."""
        found = vars(backends.module(backend, self.name)).items()
        return {name: value for name, value in found if name.startswith(f"{self.name}_") and callable(value)}

    def readme(self) -> list[str]:
        """Return its rows of the README's table."""
        return [
            f"| `{name}{_signature(self.function(name))}` | {public.shapes} | {public.in_torch} |"
            for name, public in self.public.items()
        ]


@dataclass(frozen=True)
class Shaped(Op):
    """An op whose tensor arguments have shapes that follow from a few sizes.

    Attributes:
        axes: a letter for each size of a problem, such as ``"[B x] M x K x N"``; empty where any sizes will do.
        shapes: maps the sizes to the shapes of the tensor arguments, by name and in order.
    """

    axes: str
    shapes: Callable[..., dict[str, Sizes]]

    @property
    def arguments(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the arguments that are given by position: those that must be, and those that may be."""
        parameters = inspect.signature(self.function()).parameters.values()
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        required = tuple(p.name for p in positional if p.default is p.empty)
        return required, tuple(p.name for p in positional[len(required) :])

    def problem(self, sizes: Sizes) -> dict[str, Sizes]:
        """Return the shapes of the tensor arguments; ValueError unless there is a size for each axis."""
        most = sum(letter.isupper() for letter in self.axes)
        if self.axes and not most - self.axes.count("[") <= len(sizes) <= most:
            raise ValueError(f"{self.name} takes sizes {self.axes}, got {'x'.join(map(str, sizes))}")
        return self.shapes(*sizes)


@dataclass(frozen=True)
class Function(Shaped):
    """An op on tensors, with derivatives.

    Attributes:
        gradients: the arguments that a training step takes gradients for.
        calls: what ``verify`` tries beside ``samples``.
        weighting: the argument by whose sum a mean divides, if there is one: random ones are positive.
    """

    gradients: tuple[str, ...]
    calls: tuple[Call, ...] = field(default=(), kw_only=True)
    weighting: str | None = field(default=None, kw_only=True)

    @property
    def operators(self) -> list[Operator]:
        """Return its torch operators."""
        self.function()  # its module registers them
        return [operator for operator in OPERATORS if operator.op == self.name]


@dataclass(frozen=True)
class Optimizer(Op):
    """An op on parameters and their state.

    Attributes:
        options: what ``verify`` constructs it with, for a dtype.
        variants: the options that take kernels of their own, for ``warmup`` to compile.
    """

    options: Callable[[torch.dtype], dict[str, Any]]
    variants: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Training(Shaped):
    """An op that trains some of its tensor arguments with an optimizer.

    Attributes:
        trained: the names of these.
        optimizers: the records of the optimizers that it takes.
    """

    trained: tuple[str, ...]
    optimizers: tuple[str, ...]


def _signature(function: Callable[..., Any]) -> str:
    """Return the arguments as the README writes them; a class has none there."""
    if isinstance(function, type):
        return ""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty)).replace("'", '"')


def torch_matmul(input: Tensor, other: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``matmul`` in plain torch."""
    result = torch.matmul(input, other)
    if bias is None:
        return result
    return result + (bias if other.dim() > 1 else bias.reshape(())).to(result.dtype)  # for autocast


def torch_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``linear`` in plain torch, whose own has no bias for a weight of one dimension, and no vmap over one."""
    return functional.linear(input, weight, bias) if weight.dim() > 1 else torch_matmul(input, weight, bias)


def torch_mse_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    dim: int | Sequence[int] | None = None,
) -> Tensor:
    """Compute ``mse_loss`` in plain torch, whose own neither broadcasts a weight nor has ``dim``.

    Up to torch 2.11 its backward refuses two dtypes too.
    """
    if input.dtype != target.dtype:
        dtype = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(dtype), target.to(dtype)
    if weight is None and dim is None:
        return functional.mse_loss(input, target, reduction=reduction)
    losses = functional.mse_loss(input, target, reduction="none")
    weight = None if weight is None else weight.to(losses.dtype).expand_as(losses)  # to: for autocast
    losses = losses if weight is None else losses * weight
    if reduction == "none":
        return losses
    dims = tuple(range(losses.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    if weight is None:
        return losses.mean(dims) if reduction == "mean" else losses.sum(dims)
    return losses.sum(dims) / weight.sum(dims) if reduction == "mean" else losses.sum(dims)


def torch_linear_mse_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute ``linear_mse_loss`` in plain torch."""
    if weight.dim() == 3:
        return _torch_models_loss(input, weight, target, bias, sample_weight, reduction)
    if sample_weight is not None and sample_weight.shape != target.shape:
        sample_weight = sample_weight.unsqueeze(-1).expand(target.shape)
    predictions = torch_linear(input, weight, bias)
    return functional.mse_loss(predictions, target, weight=sample_weight, reduction=reduction)  # type: ignore[call-arg]


def torch_linear_mse_fit(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> Tensor:
    """Run ``linear_mse_fit`` of a batch of models in plain torch, on all rows, with one optimizer's options for all."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch_linear_mse_loss(input, weight, target, bias)
        loss.sum().backward()
        losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses)


def _torch_models_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """Return the losses of models whose rows are their own or shared."""
    predictions = torch.matmul(input, weight.mT)
    losses = (predictions if bias is None else predictions + bias.unsqueeze(1)) - target
    losses = losses.square()
    if sample_weight is not None:
        of_rows = sample_weight.shape in (losses.shape[:2], losses.shape[1:2])
        weights = (sample_weight.unsqueeze(-1) if of_rows else sample_weight).expand(losses.shape)
        losses = losses * weights
        if reduction == "mean":
            return losses.sum((1, 2)) / weights.sum((1, 2))
    return (
        losses if reduction == "none" else losses.sum((1, 2)) if reduction == "sum" else losses.mean((1, 2))
    )


def _matmul_shapes(*sizes: int) -> dict[str, Sizes]:
    *batch, M, K, N = sizes
    return {"input": (*batch, M, K), "other": (*batch, K, N), "bias": (N,)}


def _models_shapes(B: int, N: int, D: int, K: int) -> dict[str, Sizes]:
    return {"input": (B, N, D), "weight": (B, K, D), "target": (B, N, K), "bias": (B, K)}


def _mse_call(
    sizes: Sizes, weight: Sizes | None = None, float32: tuple[str, ...] = (), **options: Any
) -> Call:
    """Return a call; ``weight``: its shape, ``float32``: the arguments in float32 whatever the others are in."""
    shapes = {"input": sizes, "target": sizes, **({} if weight is None else {"weight": weight})}
    return Call(shapes, dict.fromkeys(float32, torch.float32), options)


_RECORDS: tuple[Op, ...] = (
    Function(
        "matmul",
        public={
            "matmul": Public(
                torch_matmul, "as `torch.matmul`; bias `(N,)`", "`torch.matmul(input, other) + bias`"
            ),
            "linear": Public(torch_linear, "`(*, D)`, `(K, D)` or `(D,)`, `(K,)`", "`F.linear`"),
        },
        axes="[B x] M x K x N",
        shapes=_matmul_shapes,
        samples=((1, 1, 1), (3, 5, 2), (65, 33, 17), (1, 300, 1), (2, 33, 65, 9)),
        gradients=("input", "other", "bias"),
    ),
    Function(
        "mse",
        public={
            "mse_loss": Public(
                torch_mse_loss,
                "input and target of one shape, to which weight broadcasts",
                "`F.mse_loss`, over `dim`",
            ),
            "mse_loss_and_grad": Public(None, "the same", "loss and gradients in one pass, without autograd"),
        },
        axes="",
        shapes=lambda *sizes: {"input": sizes, "target": sizes},
        samples=((1,), (1023,), (65, 63), (5000,)),
        gradients=("input",),
        calls=(
            _mse_call((40, 2, 3, 2), (40, 1, 1, 1), ("target", "weight")),
            _mse_call((65, 33), (), reduction="sum"),
            _mse_call((5, 3, 7), (3, 1), ("target",), reduction="none"),
            _mse_call((5, 3, 7), (5, 3, 7), ("input",)),
            _mse_call((5, 30, 10), dim=(0, -1)),
            _mse_call((2, 1500), None, ("input",), dim=-1, reduction="sum"),
            _mse_call((2, 3), (3,), dim=-1),
            _mse_call((4, 30, 3), (30, 1), ("target",), dim=0, reduction="sum"),
        ),
        weighting="weight",
    ),
    Function(
        "linear_mse_models",
        of="linear_mse",
        public={},
        axes="B x N x D x K",
        shapes=_models_shapes,
        samples=((1, 1, 1, 1), (3, 4, 2, 1), (5, 40, 7, 1), (2, 33, 65, 3), (3, 20, 9, 17)),
        gradients=("weight", "bias"),
        weighting="sample_weight",
    ),
    Function(
        "linear_mse",
        public={
            "linear_mse_loss": Public(
                torch_linear_mse_loss,
                "`(*, D)`, `(K, D)` or `(D,)`, `(*, K)` or `(*)`; B models: weight `(B, K, D)`",
                "`F.mse_loss(F.linear(input, weight, bias), target)`",
            ),
            "linear_mse_loss_and_grad": Public(
                None, "the same", "loss and gradients in one pass, without autograd"
            ),
        },
        axes="N x D x K",
        shapes=lambda N, D, K: {"input": (N, D), "weight": (K, D), "target": (N, K), "bias": (K,)},
        samples=((1, 1, 1), (4, 2, 1), (100, 65, 1), (65, 33, 3), (40, 20, 33)),
        gradients=("weight", "bias"),
        weighting="sample_weight",
    ),
    Training(
        "linear_mse_fit",
        public={
            "linear_mse_fit": Public(
                torch_linear_mse_fit,
                "as `linear_mse_loss`; losses `(steps,)` or `(steps, B)`",
                "`steps` rounds of `zero_grad`, loss, `backward`, `step`",
            )
        },
        axes="B x N x D x K",
        shapes=_models_shapes,
        samples=((1, 1, 1, 1), (3, 4, 2, 1), (2, 9, 5, 3)),
        trained=("weight", "bias"),
        optimizers=("sgd", "adam"),
    ),
    Optimizer(
        "sgd",
        public={"FusedSGD": Public(torch.optim.SGD, "any parameters", "`torch.optim.SGD`")},
        samples=((1,), (1023,), (65, 63)),
        options=lambda dtype: {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        variants=({"lr": 0.0}, {"lr": 0.0, "momentum": 0.9}),
    ),
    Optimizer(
        "adam",
        public={
            "FusedAdam": Public(torch.optim.Adam, "any parameters", "`torch.optim.Adam`"),
            "FusedAdamW": Public(torch.optim.AdamW, "any parameters", "`torch.optim.AdamW`"),
        },
        samples=((1,), (1023,), (65, 63)),
        # In float16 torch's own eps of 1e-8 is 0, and its second moments underflow: its result is then not finite.
        options=lambda dtype: {
            "lr": 0.1,
            "weight_decay": 0.01,
            "amsgrad": True,
            "eps": 1e-3 if dtype == torch.float16 else 1e-8,
        },
        variants=({"lr": 0.0},),
    ),
)
OPS: Mapping[str, Op] = {op.name: op for op in _RECORDS}
FUNCTIONS: Mapping[str, Function] = {op.name: op for op in _RECORDS if isinstance(op, Function)}
TRAININGS: Mapping[str, Training] = {op.name: op for op in _RECORDS if isinstance(op, Training)}
OPTIMIZERS: Mapping[str, Optimizer] = {op.name: op for op in _RECORDS if isinstance(op, Optimizer)}


def op_name(name: str) -> str:
    """Return the name of the op to which the public callable ``name`` belongs; any other name as it is."""
    return next((op.name for op in _RECORDS if name in op.public), name)
