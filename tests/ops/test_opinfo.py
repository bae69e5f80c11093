"""torch's own sample inputs and error inputs (torch.testing._internal) put to our ops.

What the databases lack is elsewhere: square matrix products, through which alone a wrong transpose passes no test, in
cases.py, and reductions long enough to expose a 16-bit accumulator in test_mse.py and test_matmul.py.
"""

from collections.abc import Callable, Iterator

import gradkernels
import pytest
import torch
from gradkernels import nn
from torch import Tensor

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from ..cases import label, value_and_gradients
from ..helpers import DTYPES, assert_matches, to_numpy

OURS: dict[str, Callable[..., Tensor]] = {  # by torch's name
    "nn.functional.mse_loss": gradkernels.mse_loss,
    "nn.functional.linear": gradkernels.linear,
    "matmul": gradkernels.matmul,
    "mm": gradkernels.matmul,
    "bmm": gradkernels.matmul,
    "mv": gradkernels.matmul,
    "dot": gradkernels.matmul,
}
INFOS = {info.name: info for info in op_db if info.name in OURS and not info.variant_test_name}
MODULES = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls in (torch.nn.Linear, torch.nn.MSELoss)
}


def test_the_databases_have_what_is_asked_of_them() -> None:
    assert set(INFOS) == set(OURS)
    assert set(MODULES) == {"Linear", "MSELoss"}


def samples(
    name: str, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Callable[..., Tensor], list[Tensor]]]:
    """A function of the sample's tensors, once for ours and once for torch's, contiguous and not."""
    info = INFOS[name]
    for sample in info.sample_inputs(str(device), dtype, requires_grad=False):
        for variant in (sample, sample.noncontiguous()):
            tensors = [arg for arg in (variant.input, *variant.args) if isinstance(arg, Tensor)]
            rest = [arg for arg in variant.args if not isinstance(arg, Tensor)]
            assert not any(arg is not None for arg in rest)
            if name == "nn.functional.mse_loss" and len({tensor.shape for tensor in tensors}) > 1:
                continue  # broadcasts, which ours refuses
            yield (lambda function, kwargs=variant.kwargs: lambda *x: function(*x, **kwargs)), tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("name", OURS)
def test_samples(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    count = 0
    found = list(samples(name, dtype, device))
    # The interpreter is slow: every other one, contiguous ones for some dtypes and strided ones for the others.
    some = found if backend == "fallback" or len(found) < 4 else found[DTYPES.index(dtype) % 2 :: 2]
    for bound, tensors in some:
        ours, theirs = (
            value_and_gradients(bound(function))(*tensors) for function in (OURS[name], INFOS[name].op)
        )
        exact = value_and_gradients(bound(INFOS[name].op))(*(tensor.double() for tensor in tensors))
        for number, (mine, torchs, reference) in enumerate(zip(ours, theirs, exact, strict=True)):
            assert_matches(mine, torchs, to_numpy(reference), f"sample {count}, result {number}")
        count += 1
    assert count


def test_error_inputs() -> None:
    """What torch refuses, ours refuses with the same type of exception; where dtypes differ, with a TypeError."""
    count = 0
    for name, info in INFOS.items():
        for error in info.error_inputs("cpu") if info.error_inputs_func is not None else ():
            tensors = [error.sample_input.input, *error.sample_input.args]
            if name == "dot" and any(tensor.dim() != 1 for tensor in tensors):
                continue  # matmul takes what dot refuses
            with pytest.raises(error.error_type):
                info.op(*tensors, **error.sample_input.kwargs)
            same = len({tensor.dtype for tensor in tensors}) == 1
            with pytest.raises(error.error_type if same else TypeError):
                OURS[name](*tensors, **error.sample_input.kwargs)
            count += 1
    assert count


@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("name", ["Linear", "MSELoss"])
def test_modules(backend: str, device: torch.device, name: str, dtype: torch.dtype) -> None:
    info = MODULES[name]
    count = 0
    for sample in info.module_inputs_func(
        info, device=str(device), dtype=dtype, requires_grad=False, training=True
    ):
        made, called = sample.constructor_input, sample.forward_input
        if called is None:
            continue
        placed = {} if name == "MSELoss" else {"device": device, "dtype": dtype}
        theirs = info.module_cls(*made.args, **made.kwargs, **placed)
        ours = getattr(nn, name)(*made.args, **made.kwargs, **placed)
        ours.load_state_dict(theirs.state_dict())
        tensors = [*called.args, *called.kwargs.values()]
        if name == "MSELoss" and tensors[0].shape != tensors[1].shape:
            continue
        exact = info.module_cls(*made.args, **made.kwargs).double().to(device)
        exact.load_state_dict(theirs.state_dict())
        results = [
            value_and_gradients(module)(*(tensor.to(kind) for tensor in tensors))
            for module, kind in ((ours, dtype), (theirs, dtype), (exact, torch.float64))
        ]
        for module, result in zip((ours, theirs, exact), results, strict=True):
            result += [parameter.grad for parameter in module.parameters()]
        for number, (mine, torchs, reference) in enumerate(zip(*results, strict=True)):
            assert_matches(mine, torchs, to_numpy(reference), f"sample {count}, result {number}")
        count += 1
    assert count
