"""Random calls of the public ops: shapes, strides, dtypes, reductions, masks and upstream gradients by hypothesis.

Values and gradients against the references by the tolerance policy, in as many draws of the numbers as it asks for;
and calls that do not fit, of which the documented exception has to name the argument.
"""

from collections.abc import Callable, Sequence
from typing import Any

import gradkernels
import numpy as np
import pytest
import torch
from gradkernels import nn
from gradkernels.verify.tolerance import DRAWS
from torch import Tensor
from torch.func import functional_call

pytest.importorskip("hypothesis")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ..cases import ARGUMENTS, OPS, Case
from ..helpers import DTYPES, Draws, exactly
from ..strategies import calls, fuzz, tensors

Data = Any  # what st.data() draws
WEIGHTS = {name: op.weighting for name, op in OPS.items() if op.weighting is not None}
FIRST = {  # the names by which a module takes what is not its parameter
    "linear": ("input",),
    "mse_loss": ("input", "target"),
    "linear_mse_loss": ("input", "target", "sample_weight"),
}


def as_module(case: Case) -> Callable[..., Tensor] | None:
    """The call by the op's module; None where that cannot make it."""
    if case.op == "mse_loss":
        module = None if "weight" in case.shapes else nn.MSELoss(**case.options)
    elif case.op != "matmul" and len(case.shapes["weight"]) == 2:
        # Parameters of one element, for which those of the call are put in.
        bias = "bias" in case.shapes
        module = (
            nn.Linear(1, 1, bias) if case.op == "linear" else nn.LinearMSELoss(1, 1, bias, **case.options)
        )
    else:
        module = None
    if module is None:
        return None

    def run(*given: Tensor) -> Tensor:
        named = dict(zip(case.shapes, given, strict=True))
        inputs = [named.pop(name) for name in FIRST[case.op] if name in named]
        return functional_call(module, named, tuple(inputs))

    return run


def value_and_gradients(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], mask: Sequence[bool], upstream: Tensor
) -> dict[int, Tensor]:
    """The result at -1, and the gradients by the argument's place."""
    leaves = [tensor.detach().requires_grad_(needs) for tensor, needs in zip(arguments, mask, strict=True)]
    result = function(*leaves)
    places = [place for place, needs in enumerate(mask) if needs]
    grads = torch.autograd.grad(result, [leaves[place] for place in places], upstream) if places else ()
    return {-1: result.detach(), **dict(zip(places, grads, strict=True))}


def sources(draw: Callable[..., Any], case: Case, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """What each argument is drawn from; the weights of a mean, by whose sum it divides, are positive."""
    return {
        name: tensors(draw, shape, dtype, positive=name == WEIGHTS.get(case.op))
        for name, shape in case.shapes.items()
    }


def measurable(case: Case, name: str, arrays: Sequence[Any], dtype: torch.dtype) -> bool:
    """Whether there is anything to measure by.

    A mean of errors that are equal, or equal but for the dtype's rounding, has no slope in a weight but by rounding.
    """
    if name != WEIGHTS.get(case.op) or case.options["reduction"] != "mean":
        return True
    plain = {other: shape for other, shape in case.shapes.items() if other != name}
    others = [array for other, array in zip(case.shapes, arrays, strict=True) if other != name]
    errors = Case(case.op, plain, {"reduction": "none"}).forward(*others)
    return bool(errors.size == 0 or np.ptp(errors) > torch.finfo(dtype).eps * np.abs(errors).max())


def rounds_to_one_side(name: str, input: Any) -> bool:
    """Whether the interpreter's sum over rows does, as NumPy adds one after the other; compiled kernels add in a tree.

    Rows of equal predictions have the same low bits in all errors.
    """
    return name == "bias" and input.ndim > 1 and input.size > 0 and not np.ptp(input, axis=-2).any()


def check_call(op: str, device: torch.device, data: Data) -> None:
    case = calls(data.draw, op)
    dtype = data.draw(st.sampled_from(DTYPES))
    mask = [data.draw(st.booleans()) for _ in case.shapes]
    made = sources(data.draw, case, dtype)
    result = case.theirs(*(torch.empty(shape, device="meta") for shape in case.shapes.values()))
    upstreams = tensors(data.draw, result.shape, dtype)
    ours = (as_module(case) if data.draw(st.booleans()) else None) or case.ours
    draws = Draws()
    for _ in range(DRAWS):
        arguments = [source().to(device) for source in made.values()]
        upstream = upstreams().to(device)
        arrays = [exactly(tensor) for tensor in arguments]
        mine, theirs = (value_and_gradients(f, arguments, mask, upstream) for f in (ours, case.theirs))
        draws.add("result", mine.pop(-1), theirs[-1], case.forward(*arrays))
        exact = case.backward(exactly(upstream), *arrays)
        for place, grad in mine.items():
            name = list(case.shapes)[place]
            if measurable(case, name, arrays, dtype):
                draws.add(f"grad_{name}", grad, theirs[place], exact[place])
    draws.assert_match()


@pytest.mark.parametrize("op", ARGUMENTS)
@fuzz(12)
@given(data=st.data())
def test_calls(backend: str, device: torch.device, op: str, data: Data) -> None:
    check_call(op, device, data)


def loss_and_grad(case: Case, wrt: Sequence[str]) -> Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]:
    function = getattr(gradkernels, f"{case.op}_and_grad")
    return lambda *given: function(**dict(zip(case.shapes, given, strict=True)), **case.options, wrt=wrt)


@pytest.mark.parametrize("op", WEIGHTS)
@fuzz(12)
@given(data=st.data())
def test_loss_and_grad(backend: str, device: torch.device, op: str, data: Data) -> None:
    case = calls(data.draw, op)
    reduction = "sum" if case.options["reduction"] == "sum" else "mean"
    shapes = {name: shape for name, shape in case.shapes.items() if name != "sample_weight"}
    case = Case(op, shapes, {"reduction": reduction})
    dtype = data.draw(st.sampled_from(DTYPES))
    mask = [data.draw(st.booleans()) for _ in shapes]
    wrt = [name for name, wanted in zip(shapes, mask, strict=True) if wanted]
    made = sources(data.draw, case, dtype)
    names = [name for name in ARGUMENTS[op] if name != "sample_weight"]
    draws = Draws()
    for _ in range(DRAWS):
        arguments = [source().to(device) for source in made.values()]
        arrays = [exactly(tensor) for tensor in arguments]
        loss, found = loss_and_grad(case, wrt)(*arguments)
        theirs = value_and_gradients(case.theirs, arguments, mask, torch.ones_like(loss))
        draws.add("loss", loss, theirs[-1], case.forward(*arrays))
        exact = dict(zip(shapes, case.backward(np.ones(()), *arrays), strict=True))
        for name, grad in zip(names, found, strict=True):
            if name not in wrt:
                assert grad is None
            elif measurable(case, name, arrays, dtype) and not (
                backend == "triton" and device.type == "cpu" and rounds_to_one_side(name, arrays[0])
            ):
                draws.add(f"grad_{name}", grad, theirs[list(shapes).index(name)], exact[name])
    draws.assert_match()


def misfit(
    draw: Callable[..., Any], case: Case, device: torch.device
) -> tuple[list[Any], str, type[Exception]]:
    """Arguments of which one does not fit, its name, and the documented exception."""
    arguments: list[Any] = [torch.zeros(shape, device=device) for shape in case.shapes.values()]
    place = draw(st.integers(0, len(arguments) - 1))
    name, tensor = list(case.shapes)[place], arguments[place]
    kinds = ["served", "device", "type", "layout", "shape", "shape"]
    if case.op != "mse_loss":  # whose operands may have different dtypes
        kinds.append("dtype")
    kind = draw(st.sampled_from(kinds))
    error: type[Exception] = TypeError
    if kind == "dtype":
        arguments[place] = tensor.to(draw(st.sampled_from([torch.float64, torch.float16, torch.bfloat16])))
    elif kind == "served":
        arguments[place] = tensor.to(draw(st.sampled_from([torch.int64, torch.bool, torch.complex64])))
    elif kind == "type":
        arguments[place] = draw(st.sampled_from([1.0, [1.0], np.zeros(3), "zeros"]))
    elif kind == "device":
        arguments[place], error = tensor.to("meta"), RuntimeError
    elif kind == "layout":
        arguments[place], error = torch.zeros_like(tensor, layout=torch.sparse_coo), RuntimeError
    else:
        shape = list(tensor.shape) or [1008]
        inner = -2 if name == "other" and len(shape) > 1 else -1
        shape[inner] += 1
        arguments[place] = torch.zeros(shape, device=device)
        operands = ("input", "other", "weight") if case.op != "mse_loss" else ()
        error = RuntimeError if name in operands else ValueError
    return arguments, name, error


@pytest.mark.parametrize("op", ARGUMENTS)
@fuzz(60)
@given(data=st.data())
def test_misfits(backend: str, device: torch.device, op: str, data: Data) -> None:
    case = calls(data.draw, op)
    arguments, name, error = misfit(data.draw, case, device)
    with pytest.raises(error, match=rf"^{op}: .*\b{name}\b") as raised:
        case.ours(*arguments)
    assert raised.type is error
    if op in WEIGHTS and "sample_weight" not in case.shapes and case.options["reduction"] != "none":
        with pytest.raises(error, match=rf"^{op}_and_grad: .*\b{name}\b"):
            loss_and_grad(case, ())(*arguments)


Launch = Callable[..., list[Tensor]]


def twice_if_odd(launch: Launch) -> Launch:
    def faulty(grad_output: Tensor, input: Tensor, *rest: Any) -> list[Tensor]:
        return [grad * (1 + input.numel() % 2) for grad in launch(grad_output, input, *rest)]

    return faulty


def strides_forgotten(launch: Launch) -> Launch:
    """Transposed matrices are read as if they were contiguous."""

    def faulty(grad_output: Tensor, input: Tensor, *rest: Any) -> list[Tensor]:
        dense = torch.ops.aten.is_non_overlapping_and_dense(input)
        read = input.as_strided(input.shape, torch.empty(input.shape).stride()) if dense else input
        return launch(grad_output, read, *rest)

    return faulty


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("fault", [twice_if_odd, strides_forgotten])
def test_a_planted_fault_is_found(
    backend: str, device: torch.device, fault: Callable[[Launch], Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    launchers = pytest.importorskip("gradkernels.triton.mse")
    monkeypatch.setattr(launchers, "mse_backward", fault(launchers.mse_backward))
    search = settings(fuzz(50), phases=[Phase.generate])
    with pytest.raises(AssertionError, match="OVER the budget"):
        search(given(data=st.data())(lambda data: check_call("mse_loss", device, data)))()
