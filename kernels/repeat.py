"""Calls that repeat: the way from a public function to its kernels, found by one dictionary look-up.

On Triton's backend the third call with the same key, which is all that a call goes by except for values, is served
by a function that allocates and launches (triton/replay.py). Each Operator has such replays by the key of its own
arguments; a public function under ``repeatable`` has them by the key of the user's, so that the checks and views
between the two are left out as well. Nothing is kept for calls that the dispatcher has to see: ``needs_dispatcher``.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import backends
from . import torch_private as private
from .torch_private import needs_dispatcher

Call = Callable[..., Any]
F = TypeVar("F", bound=Call)

TENSORS = frozenset((Tensor, torch.nn.Parameter))
# Keys that a function or an operator remembers. A training loop has few; where every call has new sizes, they must
# not pile up: all are forgotten at once.
MAX_KEYS = 512

# What an operator did on behalf of a public function: itself, its arguments, its replay (None: none was used), whether
# it was differentiated, and its outputs.
Note = tuple[Any, tuple[Any, ...], Call | None, bool, Any]
watched: dict[int, list[Note]] = {}  # by thread, while one of its calls is watched
_any_replay = False
_compiling = torch.compiler.is_compiling


def key_function(parameters: Mapping[str, str], differentiated: bool = False) -> Call:
    """Return what a call goes by, as a function of its arguments; None for subclasses of Tensor.

    A tensor counts by its dtype, sizes, strides, address modulo 16 and device, and whether it holds its values.
    Everything else counts as it is.

    Args:
        parameters: names, as in a signature (``name``, ``name=default`` or ``*``), and types.
        differentiated: add to the key whether reverse mode has to differentiate the call.
    """
    terms, conditions, needs = ["current()", "precision()"], [], []
    for parameter, kind in parameters.items():
        name = parameter.partition("=")[0]
        if "Tensor" in kind:
            # A tensor of zeros that has no memory has the address 0.
            place = f"({name}.data_ptr() or -0.5) % 16, {name}.device"
            seen = f"({name}.dtype, {name}.shape, {name}.stride(), {place}, {name}.is_neg())"
            optional = "None" in kind or "?" in kind or "Optional" in kind
            conditions.append(f"({f'{name} is None or ' * optional}type({name}) in TENSORS)")
            needs.append(f"({f'{name} is not None and ' * optional}{name}.requires_grad)")
            terms.append(f"None if {name} is None else {seen}" if optional else f"*{seen}")
        elif "Sequence" in kind:  # of ints: 1, 1.0 and True are equal, but the checks tell them apart
            terms.append(f"{name} is None or repr({name})")
        elif name != "*":
            terms.append(f"tuple({name})" if "List" in kind else name)
    if differentiated:
        terms.append(f"is_grad_enabled() and ({' or '.join(needs)})")
    scope = {
        "current": backends.current, "precision": private.matmul_precision, "TENSORS": TENSORS,
        "is_grad_enabled": torch.is_grad_enabled,
    }  # fmt: skip
    key = f"({', '.join(terms)},) if {' and '.join(conditions)} else None"
    return eval(f"lambda {', '.join(parameters)}: {key}", scope)


def keep(replays: dict[Any, Any], key: Any, value: Any) -> None:
    """Set ``replays[key]``, within the bounds of memory."""
    global _any_replay
    if len(replays) >= MAX_KEYS and key not in replays:
        replays.clear()
    replays[key] = value
    _any_replay = True


def note(
    operator: Any, args: tuple[Any, ...], replay: Call | None, differentiated: bool, outputs: Any
) -> None:
    """Tell ``repeatable`` of a call of an operator, if it watches this thread."""
    if (notes := watched.get(threading.get_ident())) is not None:
        notes.append((operator, args, replay, differentiated, outputs))


def repeatable(function: F) -> F:
    """Make repeated calls of a public function skip its checks.

    A call is remembered if it came down to one call of an operator, on its own arguments' memory, whose output it
    returned, as it was or as a view.
    """
    signature = inspect.signature(function)
    parameters: dict[str, str] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            parameters.setdefault("*", "")
        default = parameter.default
        parameters[name if default is parameter.empty else f"{name}={default!r}"] = str(parameter.annotation)
    key_of = key_function(parameters, differentiated=True)
    shortcuts: dict[Any, Any] = {}  # by key; False where there can be none

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not _compiling() and _any_replay and not needs_dispatcher():
            try:
                key = key_of(*args, **options)
                shortcut = shortcuts.get(key)
            except (AttributeError, RuntimeError, TypeError):
                # Not an argument of this function, or without an address.
                return function(*args, **options)
            if shortcut:
                return shortcut(*args, **options)
            if shortcut is None and key is not None:
                return _watched(function, signature, shortcuts, key, args, options)
        return function(*args, **options)

    call.shortcuts = shortcuts  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _watched(
    function: Call,
    signature: inspect.Signature,
    shortcuts: dict[Any, Any],
    key: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """Call ``function``, and make the call a shortcut if it may be one."""
    thread = threading.get_ident()
    if thread in watched:  # called by another one
        return function(*args, **options)
    notes = watched[thread] = []
    try:
        result = function(*args, **options)
    finally:
        del watched[thread]
    if all(differentiated or replay is not None for _, _, replay, differentiated, _ in notes):
        keep(shortcuts, key, len(notes) == 1 and _shortcut(signature, args, options, notes[0], result))
    return result


def _shortcut(
    signature: inspect.Signature, args: tuple[Any, ...], options: dict[str, Any], noted: Note, result: Any
) -> Call | bool:
    """Return what a call came down to, as a function of the same parameters; False if that was several operators."""
    operator, values, replay, differentiated, outputs = noted
    arguments = signature.bind(*args, **options).arguments
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    by_address = {value.data_ptr(): name for name, value in tensors.items()}
    # Memory that is passed twice may be passed once at the next call.
    if not (differentiated or replay) or len(by_address) < len(tensors) or not isinstance(result, Tensor):
        return False
    scope: dict[str, Any] = {"replay": replay, "differentiated": operator.differentiated}
    terms: list[str] = []
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            name = by_address.get(value.data_ptr())
            # A replay goes by addresses alone; autograd goes by the tensors.
            source = _view(name, tensors[name], value) if name and differentiated else name
            if source is None:
                return False
            terms.append(source)
        else:
            scope[f"c{index}"] = value
            terms.append(f"c{index}")
    body = f"differentiated(({', '.join(terms)},))" if differentiated else f"replay({', '.join(terms)})"
    given = outputs if isinstance(outputs, list) else [outputs]
    place = next((i for i, output in enumerate(given) if output.data_ptr() == result.data_ptr()), None)
    if place is None or given[place].numel() != result.numel():
        return False
    if not result.is_inference() and result._version:  # tensors of inference mode count no changes
        return False  # more was done to the output
    if isinstance(outputs, list):
        body += f"[{place}]"
    source = body if result is given[place] else _view(body, given[place], result)
    if source is None:
        return False
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    names = str(inspect.Signature(parameters))[1:-1]
    return eval(f"lambda {names}: {source}", scope)


def _view(source: str, tensor: Tensor, view: Tensor) -> str | None:
    """Return ``view`` as an expression of ``tensor``, whose source is given, if a public function may have made it."""

    def seen(tensor: Tensor) -> Any:
        return tensor.data_ptr(), tensor.shape, tensor.stride()

    candidates = {source: tensor}
    if tensor.dim() > 1:
        if tensor.shape[-1] > 1 and seen(tensor.mT) == seen(tensor):
            return None  # an expanded number, say: which of the two it is shows in gradients alone
        candidates[f"{source}.mT"] = tensor.mT
    if tensor.numel() == view.numel():
        candidates[f"{source}.reshape({tuple(view.shape)})"] = tensor.reshape(view.shape)

    return next((name for name, candidate in candidates.items() if seen(candidate) == seen(view)), None)
