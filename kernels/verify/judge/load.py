"""Reading a file under judgement: which functions it offers, with their inputs and references."""

import importlib.util
import inspect
import random
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.random import manual_seed  # whatever becomes of the name

CHECK = "check_"


class NotJudgedError(Exception):
    """The file, or a function in it, cannot be judged; the message is the reason."""


@dataclass(frozen=True)
class Problem:
    """A function under judgement, its inputs, and the reference if there is one.

    Attributes:
        function: a callable or a module.
        inputs: its positional arguments.
        reference: what should give the same.
    """

    function: Callable[..., Any]
    inputs: list[Any]
    reference: Callable[..., Any] | None

    def shared_parameters(self) -> list[str]:
        """Return the names of the parameters that both models have, in the same shapes."""
        if not isinstance(self.function, torch.nn.Module) or not isinstance(self.reference, torch.nn.Module):
            return []
        ours, theirs = dict(self.function.named_parameters()), dict(self.reference.named_parameters())
        return [
            n
            for n, p in theirs.items()
            if n in ours and ours[n].shape == p.shape and ours[n].dtype == p.dtype
        ]


@dataclass(frozen=True)
class Target:
    """A name in the file that is to be judged.

    Attributes:
        name: the function, class or ``ModelNew``.
        where, backward: file and line of its definition, and of its backward where it has one.
        make: builds its problem; another seed gives other values where the file draws them at random.
    """

    name: str
    where: str
    backward: str
    make: Callable[[int], Problem]


def seed_all(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def load(path: Path) -> types.ModuleType:
    """Import the file as a module of its own; its folder is on the path, as for a script."""
    name = f"{path.stem}_under_judgement" if path.stem in sys.modules else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NotJudgedError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # inspect, pickle and dataclasses look there
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def targets(module: types.ModuleType, name: str | None) -> list[Target]:
    """Return what the file offers to judge, or the one of that name."""
    checks = [check for check in vars(module) if check.startswith(CHECK) and _speaks(module, check, name)]
    found = [_checked(module, check) for check in checks]
    if hasattr(module, "Model") and hasattr(module, "ModelNew") and hasattr(module, "get_inputs"):
        place = where(module.ModelNew)
        found.insert(0, Target("ModelNew", place, place, lambda seed: _models(module, seed)))
    if not found:
        raise NotJudgedError(
            "there is nothing to judge: expected Model, ModelNew and get_inputs, or a check_<name>() that returns "
            "(function, inputs) or (function, inputs, reference)"
        )
    if name is None:
        return found
    chosen = [target for target in found if name in (target.name, CHECK + target.name)]
    if not chosen:
        names = ", ".join(target.name for target in found)
        raise NotJudgedError(f"there is no {name} to judge here, only {names}")
    return chosen


def _speaks(module: types.ModuleType, check: str, name: str | None) -> bool:
    """Return whether ``check`` can be called without arguments and stands in this file, or is the one asked for."""
    if name in (check, check.removeprefix(CHECK)):
        return True
    thing = getattr(module, check)
    others = [getattr(other, "__dict__", {}) for other in list(sys.modules.values()) if other is not module]
    imported = any(x is thing for names in others for x in list(names.values()))
    if imported or not callable(thing):
        return False
    try:
        function = thing.fn if type(thing).__module__.startswith("triton.") else thing
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # it is written in C
        return True
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _checked(module: types.ModuleType, check: str) -> Target:
    name = check.removeprefix(CHECK)
    thing = getattr(module, name, getattr(module, check))
    backward = vars(thing).get("backward") if isinstance(thing, type) else None
    place = where(thing)
    at = place if backward is None else where(getattr(backward, "__func__", backward))
    return Target(name, place, at, lambda seed: _check(module, check, seed))


def _check(module: types.ModuleType, check: str, seed: int) -> Problem:
    seed_all(seed)
    given = getattr(module, check)()
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        raise NotJudgedError(f"{check}() must return (function, inputs) or (function, inputs, reference)")
    function, inputs = given[:2]
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        function = function.apply
    if not callable(function):
        raise NotJudgedError(f"{check}() returned {type(function).__name__} where a function belongs")
    return Problem(function, _sequence(inputs), given[2] if len(given) == 3 else None)


def _models(module: types.ModuleType, seed: int) -> Problem:
    """Build both models of KernelBench's convention from one seed; the parameters that they share are equal."""
    initial = module.get_init_inputs() if hasattr(module, "get_init_inputs") else []
    options = initial if isinstance(initial, dict) else {}
    positional = [] if isinstance(initial, dict) else list(initial)

    def build(model: Callable[..., torch.nn.Module]) -> torch.nn.Module:
        seed_all(seed)
        built = model(*positional, **options)
        return built.to("cuda") if torch.cuda.is_available() else built

    reference, ours = build(module.Model), build(module.ModelNew)
    seed_all(seed + 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [v.to(device) if isinstance(v, Tensor) else v for v in _sequence(module.get_inputs())]
    return Problem(ours, inputs, reference)


def _sequence(inputs: Any) -> list[Any]:
    return list(inputs) if isinstance(inputs, Sequence) and not isinstance(inputs, str) else [inputs]


def where(thing: Any) -> str:
    """Return file and line of a definition; empty if it has none."""
    try:
        thing = inspect.unwrap(thing)
        thing = getattr(thing, "fn", thing)  # a Triton kernel
        _, line = inspect.getsourcelines(thing)
        return f"{Path(inspect.getsourcefile(thing) or '').name}:{line}"
    except (TypeError, OSError):
        return ""
