"""Tracing: torch.compile, export, opcheck, fake and meta tensors, checkpoints, and the way without private parts."""

import textwrap
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from gradkernels import mse_loss, operator
from gradkernels.operator import OPERATORS
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, grad_and_value, jvp, vmap
from torch.utils.checkpoint import checkpoint

from ..cases import CASES, Case, assert_same_results, label, on_both_backends, value_and_gradients
from ..helpers import python
from . import test_layouts

ENGINES = ("eager", "aot_eager", "inductor")
PROBLEMS: dict[str, Callable[[int], Case]] = {  # by the number of samples
    "matmul": lambda n: Case("matmul", {"input": (2, n, 3), "other": (3, 2), "bias": (2,)}),
    "linear": lambda n: Case("linear", {"input": (n, 3), "weight": (2, 3), "bias": (2,)}),
    "mse": lambda n: Case("mse_loss", {"input": (n, 2), "target": (n, 2)}),
    "mse none": lambda n: Case("mse_loss", {"input": (n, 2), "target": (n, 2)}, {"reduction": "none"}),
    "weighted mse": lambda n: Case("mse_loss", {"input": (n, 2), "target": (n, 2), "weight": (n, 2)}),
    "linear mse, K = 1": lambda n: Case("linear_mse_loss", {"input": (n, 3), "weight": (3,), "target": (n,)}),
    "linear mse": lambda n: Case(
        "linear_mse_loss", {"input": (n, 3), "weight": (2, 3), "target": (n, 2), "bias": (2,)}
    ),
    "weighted linear mse": lambda n: Case(
        "linear_mse_loss",
        {"input": (n, 3), "weight": (2, 3), "target": (n, 2), "bias": (2,), "sample_weight": (n,)},
    ),
}
SLOW = "inductor"  # compiles C++, some seconds for each graph


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "problem", "engine", "dynamic"),
    on_both_backends(
        product(PROBLEMS, ENGINES, (False, True)),
        triton=lambda problem, engine, dynamic: [] if engine == SLOW else [problem, (engine, dynamic)],
        fallback=lambda problem, engine, dynamic: [
            (engine, PROBLEMS[problem](1).op) if engine == SLOW else (engine, problem),
            (engine, dynamic),
        ],
    ),
    indirect=["backend"],
)
def test_compile(backend: str, device: torch.device, problem: str, engine: str, dynamic: bool) -> None:
    compiled = torch.compile(PROBLEMS[problem](5).ours, backend=engine, fullgraph=True, dynamic=dynamic)
    for samples in (5, 7):
        case = PROBLEMS[problem](samples)
        some = [position == 1 for position in range(len(case.shapes))]
        for mask in (some, None):
            assert_same_results(
                value_and_gradients(compiled, mask),
                value_and_gradients(case.theirs, mask),
                case.arguments(device=device),
            )


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiled_with_dimensions_that_change(
    backend: str, device: torch.device, dynamic: bool | None
) -> None:
    """Numbers that dynamo traces as symbols: at the first call, or at the second, when it sees another number."""

    def loss(p: Tensor, t: Tensor, dim: int | tuple[int, ...], last: int) -> Tensor:
        return mse_loss(p, t, dim=dim).sum() + mse_loss(p, t, dim=(last, -3)).sum()

    compiled = torch.compile(loss, backend="eager", fullgraph=True, dynamic=dynamic)
    p, t = torch.randn(2, 3, 5, 4, device=device).unbind()
    for call in (((2, -3), 1), ((0, 1), 2), (1, 2), (-1, 1)):
        assert torch.equal(compiled(p, t, *call), loss(p, t, *call))


def step(f: Callable[..., Tensor]) -> Callable[..., Any]:
    def stepped(*tensors: Tensor) -> list[Tensor | None]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        f(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    return stepped


STEPS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "backward": step,
    "checkpoint": lambda f: step(lambda *x: checkpoint(f, *x, use_reentrant=False)),
    "grad": lambda f: grad(f, (0, 1)),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("problem", ["matmul", "mse none", "weighted mse", "linear mse"])
def test_compiled_steps_with_their_backward(
    backend: str, device: torch.device, problem: str, kind: str, in_graph: bool
) -> None:
    """Dynamo comes by all Python that a graph runs, or that runs beside one: it may not trace our backward."""
    case = PROBLEMS[problem](5)
    ours, theirs = (lambda *x, f=f: f(*x).square().sum() for f in (case.ours, case.theirs))
    tensors = case.arguments(device=device)
    loss, plain = (f if in_graph else torch.compiler.disable(f) for f in (ours, theirs))
    try:
        torch.compile(STEPS[kind](plain), backend="eager")(*tensors)
    except AssertionError:  # torch 2.11: grad of what is disabled
        pytest.skip("torch does not compile its own ops there")
    compiled = torch.compile(STEPS[kind](loss), backend="eager")
    assert_same_results(compiled, STEPS[kind](theirs), tensors)


def test_nothing_below_an_operator_is_compiled(backend: str, device: torch.device) -> None:
    """A compiled vmap runs what is no graph itself, and dynamo comes by all Python that the dispatcher calls there."""
    p, t = (torch.randn(3, 5, device=device, requires_grad=True) for _ in range(2))
    files: list[str] = []
    hook = torch._dynamo.convert_frame.register_bytecode_hook(lambda code, _: files.append(code.co_filename))
    try:
        loss = torch.compiler.disable(mse_loss, recursive=False)
        torch.compile(vmap(loss), backend="aot_eager")(p, t)
    finally:
        hook.remove()
    assert files
    assert operator.__file__ not in files


FUNCTIONS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad_and_value": lambda f: lambda *x: grad_and_value(lambda *x: f(*x).square().sum(), (0, 1))(*x),
    "jvp": lambda f: lambda *x: jvp(f, x, tuple(tensor.cos() for tensor in x)),
    "jvp of grad": lambda f: (
        lambda *x: jvp(grad(lambda *x: f(*x).square().sum(), (0, 1)), x, tuple(tensor.cos() for tensor in x))
    ),
    "vmap of grad": lambda f: (
        lambda *x: vmap(grad(lambda *x: f(*x).square().sum(), (0, 1)))(
            *(torch.stack([tensor, tensor.cos()]) for tensor in x)
        )
    ),
}


@pytest.mark.parametrize(
    ("backend", "problem", "function", "engine"),
    on_both_backends(
        product(PROBLEMS, FUNCTIONS, ENGINES),
        triton=lambda problem, function, engine: (
            [] if engine == SLOW else [function, PROBLEMS[problem](1).op]
        ),
        fallback=lambda problem, function, engine: (
            [engine] if engine == SLOW else [(function, PROBLEMS[problem](1).op)]
        ),
    ),
    indirect=["backend"],
)
def test_compiled_functions(
    backend: str, device: torch.device, problem: str, function: str, engine: str
) -> None:
    case = PROBLEMS[problem](5)
    ours, theirs = (FUNCTIONS[function](f) for f in (case.ours, case.theirs))
    compiled = torch.compile(ours, backend=engine, fullgraph=True)
    assert_same_results(compiled, theirs, case.arguments(device=device))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_export(backend: str, device: torch.device, problem: str) -> None:
    case = PROBLEMS[problem](5)

    class Model(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return case.ours(*tensors)

    tensors = case.arguments(torch.float32, device)
    program = torch.export.export(Model(), tuple(tensors))
    assert_same_results(program.module(), case.theirs, tensors)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend: str, device: torch.device, reentrant: bool) -> None:
    case = PROBLEMS["linear mse"](5)
    assert_same_results(
        value_and_gradients(lambda *x: checkpoint(case.ours, *x, use_reentrant=reentrant)),
        value_and_gradients(case.theirs),
        case.arguments(device=device),
    )


def described(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    """Shape, dtype and the strides that count: not those of dimensions of size 1."""
    return [
        (
            tuple(tensor.shape),
            tensor.dtype,
            [n for n, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1],
        )
        for tensor in tensors
    ]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_fake_and_meta(case: Case) -> None:
    """Their results have the real ones' shapes, dtypes and strides; transposed arguments included."""
    for layout in ("contiguous", "transposed"):
        tensors = [LAYOUTS[layout](tensor) for tensor in case.arguments(torch.bfloat16)]
        real = described(value_and_gradients(case.ours)(*tensors))
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(tensor) for tensor in tensors]
            assert described(value_and_gradients(case.ours)(*fakes)) == real
        meta = value_and_gradients(case.ours)(*(tensor.to("meta") for tensor in tensors))
        assert described(meta) == real
        assert all(tensor.is_meta for tensor in meta)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


LAYOUTS = {
    **{name: test_layouts.LAYOUTS[name] for name in ("contiguous", "transposed", "strided")},
    "permuted": lambda tensor: (
        tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1) if tensor.dim() == 3 else tensor
    ),
}


# Start and end of the rows of two models; the last of five rows is of none.
BOUNDS = torch.tensor([0, 2, 4]).unfold(0, 2, 1)


def operator_arguments(name: str) -> list[tuple[Any, ...]]:
    """Calls of each operator that between them use every argument."""
    one, wide, x = random(), torch.float64, [random(2, 3, 4) for _ in range(6)]
    rows, weight, target = random(5, 3), random(2, 3), random(5, 2)
    own = random(2, 5, 3), random(2, 2, 3), random(2, 5, 2)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "matmul": [
            (x[0], random(4, 5), random(5), [], wide),
            (x[0], random(2, 4, 5), None, [0], wide),
            (random(3, 4), random(2, 4, 5), random(2, 3, 5), [], wide),
        ],
        "mse": [
            (*x[:2], None, "mean", 0, wide),
            (*x[:3], "none", 0, wide),
            (*x[:3], "sum", 1, wide),
        ],
        "mse_backward": [
            (one, *x[:2], None, "mean", 0, [True, True, False]),
            (x[3], *x[:3], "none", 0, [True] * 3),
            (random(2), *x[:3], "sum", 1, [False, True, True]),
            (one, *x[:2], random(2, 3, 1), "mean", 0, [True] * 3),
        ],
        "mse_forward_backward": [
            (*x[:2], None, None, "mean", [True, True, False], wide),
            (*x[:3], one, "sum", [False, True, True], wide),
        ],
        "mse_hvp": [
            (one, *x[:3], one.clone(), *x[3:], "mean", 0, [True] * 4),
            (None, *x[:3], None, x[3], None, None, "sum", 0, [True, False, False, False]),
            (one, *x[:2], random(2, 3, 1), None, x[2], None, random(2, 3, 1), "sum", 0, [True] * 4),
            (x[3], *x[:2], None, x[2], None, x[4], None, "none", 0, [True, True, True, False]),
        ],
        "linear_mse": [
            (rows, weight, target, random(2), None, "mean", [True] * 3, wide),
            (rows, weight, target, None, random(5, 1).expand(5, 2), "sum", [False] * 3, wide),
        ],
        "linear_mse_backward": [
            (one, target, weight, 0.5, [True, True]),
            (one, target, weight, 0.5, [False, True]),
        ],
        "linear_mse_models": [
            (*own, random(2, 2), random(2, 5, 1), None, "mean", [True] * 3, wide),
            (rows, *own[1:], None, None, None, "sum", [False] * 3, wide),
            (rows, own[1], target, None, None, BOUNDS, "mean", [True] * 3, wide),
        ],
        "linear_mse_models_product": [(rows, random(2, 4, 3), BOUNDS, wide)],
        "linear_mse_models_outer": [(random(5, 4), rows, BOUNDS, wide)],
    }
    return calls[name]


@pytest.mark.parametrize(
    ("backend", "name", "layout"),
    on_both_backends(
        product([operator.name for operator in OPERATORS], LAYOUTS),
        triton=lambda name, layout: [name, layout],
        fallback=lambda name, layout: [name, layout],
    ),
    indirect=["backend"],
)
# torch's own: the check asks each tensor that an operator passes on to another for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(backend: str, device: torch.device, name: str, layout: str) -> None:
    (overload,) = (operator.overload for operator in OPERATORS if operator.name == name)
    for call in operator_arguments(name):
        arguments = [
            value.to(device)
            if value is BOUNDS
            else LAYOUTS[layout](value.to(device)).requires_grad_()
            if isinstance(value, Tensor)
            else value
            for value in call
        ]
        results = torch.library.opcheck(overload, tuple(arguments))
        assert len(results) == 4
        assert set(results.values()) == {"SUCCESS"}


def test_without_the_private_apply() -> None:
    """Where torch has no single-level apply, eager mode and torch.func work all the same."""
    script = """
        import torch
        import torch._functorch.utils
        from torch.func import grad, hessian, jvp, vmap
        from torch.autograd import gradcheck, gradgradcheck
        del torch._functorch.utils.enable_single_level_autograd_function
        import gradkernels
        from gradkernels import torch_private
        assert torch_private.single_level is None

        def loss(x, w, y):
            return gradkernels.linear_mse_loss(x, w, y)

        def plain(x, w, y):
            return ((x @ w.mT - y) ** 2).mean()

        x, w, y = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (2, 3), (4, 2)))
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w, y)]
        assert gradcheck(loss, leaves, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(loss, leaves, check_fwd_over_rev=True)
        batch = torch.randn(5, 4, 3, dtype=torch.float64)
        close = torch.testing.assert_close
        for f in (lambda f: vmap(grad(f, 1), (0, None, None))(batch, w, y), lambda f: hessian(f, 1)(x, w, y),
                  lambda f: jvp(f, (x, w, y), (x.cos(), w.cos(), y.cos()))):
            close(f(loss), f(plain))
        print("served", gradkernels.mse_loss(x, x).item())
    """
    assert python("-c", textwrap.dedent(script)).split() == ["served", "0.0"]
