"""A test of the tests: optimizers with one planted fault each, which the optimizers' own comparison must catch.

A mutant is the NumPy step with one expression of its source replaced, run as a torch optimizer over the same
configurations of torch's database, against torch, as the real ones are.
"""

import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels.reference import adam, sgd

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from ..helpers import DTYPES, to_numpy
from .optimizers import NAMES, assert_same_run, copies, make_params, theirs_for
from .test_db import DATABASE, options_of


@dataclass(frozen=True)
class Mutant:
    """A fault: in the source of ``module``, ``old`` (which occurs once) becomes ``new``.

    ``dtypes`` are those in which it must be caught; some are too small for a coarse one.
    """

    module: ModuleType
    old: str
    new: str
    dtypes: tuple[torch.dtype, ...] = DTYPES


FINE = (torch.float64, torch.float32)
MUTANTS = {
    "dampening at step 1": Mutant(sgd, "b = g\n", "b = (1 - dampening) * g\n"),
    "no dampening": Mutant(sgd, "(1 - dampening) * g\n        else", "g\n        else"),
    "nesterov ignored": Mutant(sgd, "if nesterov else b", "if False else b"),
    "nesterov looks ahead from the old buffer": Mutant(
        sgd, "g + momentum * b if", "g + momentum * (b - g) / momentum if"
    ),
    "buffer starts at zero": Mutant(sgd, "b = g\n", "b = 0 * g\n"),
    "lr inside the buffer": Mutant(sgd, "np.array(b)", "np.array(lr * b)"),
    "sgd: maximize ignored": Mutant(sgd, "g = -g\n    ", "pass\n    "),
    "sgd: maximize flips the decay too": Mutant(
        sgd, "g = g + weight_decay * p", "g = g + weight_decay * p * (-1 if maximize else 1)", FINE
    ),
    "sgd: decay not averaged": Mutant(
        sgd, "b = momentum *", "g = g - weight_decay * p; b = momentum *", FINE
    ),
    "sgd: weights never move": Mutant(sgd, "p - lr * g", "p"),
    "no bias correction": Mutant(
        adam, "(m / _correction(beta1, t)) / (np.sqrt(w / _correction(beta2, t))", "m / (np.sqrt(w)"
    ),
    "no bias correction of the first moment": Mutant(adam, "m / _correction(beta1, t)", "m"),
    "bias correction one step late": Mutant(adam, "_correction(beta1, t)", "_correction(beta1, t + 1)"),
    "second bias correction one step late": Mutant(
        adam, "_correction(beta2, t)", "_correction(beta2, t + 1)"
    ),
    "step counted twice": Mutant(adam, "np.asarray(0.0)) + 1", "np.asarray(0.0)) + 2"),
    "eps inside the root": Mutant(
        adam,
        "np.sqrt(w / _correction(beta2, t)) + eps",
        "np.sqrt(w / _correction(beta2, t) + eps)",
        (*FINE[:1], torch.float16),
    ),
    "eps before the correction": Mutant(
        adam,
        "np.sqrt(w / _correction(beta2, t)) + eps",
        "(np.sqrt(w) + eps) / np.sqrt(_correction(beta2, t))",
        (*FINE[:1], torch.float16),
    ),
    "weight decay after the update": Mutant(
        adam,
        "    return np.asarray(p), new_state",
        "    p = p - (lr * weight_decay * (p - np.asarray(param)) if decoupled_weight_decay else 0)\n"
        "    return np.asarray(p), new_state",
        FINE,
    ),
    "decoupled decay coupled": Mutant(adam, "p = p - lr * weight_decay * p", "g = g + weight_decay * p"),
    "coupled decay decoupled": Mutant(adam, "g = g + weight_decay * p", "p = p - lr * weight_decay * p"),
    "decay without lr": Mutant(adam, "p - lr * weight_decay * p", "p - weight_decay * p"),
    "1 - beta2 in float32": Mutant(
        adam, "(1 - beta2) * g**2", "float(np.float32(1) - np.float32(beta2)) * g**2", FINE
    ),
    "1 - beta1 in float32": Mutant(
        adam, "(1 - beta1) * g", "float(np.float32(1) - np.float32(beta1)) * g", FINE[:1]
    ),
    "amsgrad of the corrected moment": Mutant(adam, "zeros), v)", "zeros), v / _correction(beta2, t))"),
    "amsgrad ignored": Mutant(adam, "w = np.maximum(", "w = v; np.maximum(", FINE),
    "adam: maximize ignored": Mutant(adam, "g = -g\n    ", "pass\n    "),
    "adam: weights never move": Mutant(adam, "p = p - lr * (m", "p = p - 0 * (m"),
}


def mutated(module: ModuleType, old: str, new: str) -> ModuleType:
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} must occur once in {module.__name__}"
    mutant = ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
    return mutant


def optimizer_of(name: str, module: ModuleType) -> Any:
    """A torch optimizer that takes its steps by the ``step`` of ``module``, in float64, rounded once."""

    class Stepper(theirs_for(name)):  # type: ignore[misc]
        @torch.no_grad()
        def step(self) -> None:
            for group in self.param_groups:
                options = {
                    key: tuple(map(float, value)) if key == "betas" else float(value)
                    for key, value in group.items()
                    if key in inspect.signature(module.step).parameters
                }
                for param in group["params"]:
                    before = {key: to_numpy(value) for key, value in self.state.get(param, {}).items()}
                    value, after = module.step(to_numpy(param), to_numpy(param.grad), before, **options)
                    param.copy_(torch.from_numpy(value))
                    for key, array in after.items():
                        dtype = torch.float32 if key == "step" else param.dtype
                        self.state[param][key] = torch.from_numpy(np.asarray(array, np.float64)).to(dtype)

    return Stepper


def runs_like_torch(name: str, module: ModuleType, index: int, dtype: torch.dtype) -> None:
    options = options_of(name, index, dtype)
    params = make_params(((65,), (7, 9)), dtype)
    theirs = theirs_for(name)(params, foreach=False, **options)
    assert_same_run(optimizer_of(name, module)(copies(params), **options), theirs)


def is_caught(name: str, module: ModuleType, index: int, dtype: torch.dtype) -> bool:
    """Whether the comparison fails, and over a number: not because a state tensor is absent, say."""
    try:
        runs_like_torch(name, module, index, dtype)
    except AssertionError as error:
        return "OVER the budget" in str(error) or str(error).startswith("step of")
    return False


def configurations_of(name: str) -> range:
    return range(len(DATABASE[name].optim_inputs_func("cpu")))


def by_default(dtypes: tuple[torch.dtype, ...], dtype: torch.dtype) -> tuple[pytest.MarkDecorator, ...]:
    """float32 and bfloat16 where they show the fault, else all; the rest waits for the full run."""
    usual = {torch.float32, torch.bfloat16} & set(dtypes)
    return () if not usual or dtype in usual else (pytest.mark.full,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_fault_all_pass(name: str, dtype: torch.dtype) -> None:
    for index in configurations_of(name):
        runs_like_torch(name, sgd if name == "SGD" else adam, index, dtype)


@pytest.mark.parametrize(
    ("label", "dtype"),
    [
        pytest.param(label, dtype, id=f"{label}-{str(dtype)[6:]}", marks=by_default(mutant.dtypes, dtype))
        for label, mutant in MUTANTS.items()
        for dtype in mutant.dtypes
    ],
)
def test_each_mutant_is_caught(label: str, dtype: torch.dtype) -> None:
    mutant = MUTANTS[label]
    module = mutated(mutant.module, mutant.old, mutant.new)
    names = ("SGD",) if mutant.module is sgd else ("Adam", "AdamW")
    cases = [(name, index) for name in names for index in configurations_of(name)]
    assert any(is_caught(name, module, index, dtype) for name, index in cases), f"{label} passes in {dtype}"
