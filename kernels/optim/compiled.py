"""The optimizers' step as operators that torch.compile captures, under the importing name's namespace.

``optimizer_step`` writes its arguments in place and says so in its schema; ``optimizer_norm`` measures gradients.
Both sort what they are given into buckets anew and launch as the eager step does.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bucket import AdamOptions, Guard, Models, SGDOptions
from .plan import Entry, measure_gradients, partition, update_parameters

_OPTIONS: dict[str, Any] = {"sgd": SGDOptions, "adam": AdamOptions}
_SWITCHES = {"nesterov", "maximize", "decoupled"}
_NAMESPACE = __name__.partition(".")[0]
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_library.define(
    "optimizer_step(str operator, str[] keys, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, "
    "int[] positions, int? seed, float[] numbers, Tensor[] live, int[] columns, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? norms, float? max_norm, bool skip_nonfinite, Tensor(d!)? skipped, int? models, "
    "Tensor? active, Tensor? lr_scale) -> ()"
)
_library.define(
    "optimizer_norm(Tensor[] grads, Tensor? grad_scale, int? models, Tensor? active, Tensor(a!) out) -> ()"
)


@torch.no_grad()
def _step(
    operator: str,
    keys: Sequence[str],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    positions: Sequence[int],
    seed: int | None,
    numbers: Sequence[float],
    live: Sequence[Tensor],
    columns: Sequence[int],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norms: Tensor | None,
    max_norm: float | None,
    skip_nonfinite: bool,
    skipped: Tensor | None,
    models: int | None,
    active: Tensor | None,
    lr_scale: Tensor | None,
) -> None:
    """Update one parameter group.

    Args:
        operator: ``"sgd"`` or ``"adam"``.
        keys: the state keys; ``states`` holds for each of them in turn a tensor per parameter.
        numbers: the group's options in order; those in ``columns`` are given by the tensors ``live`` instead.
        models: how many models the parameters stack; None for plain parameters.
        The rest is as in Entry, Guard and Models.
    """
    kind = _OPTIONS[operator]
    options: dict[str, Any] = dict(zip(kind._fields, numbers, strict=True))
    options |= {kind._fields[column]: tensor for column, tensor in zip(columns, live, strict=True)}
    options |= {name: bool(options[name]) for name in _SWITCHES & options.keys()}
    count = len(params)
    by_key = {key: states[i * count : (i + 1) * count] for i, key in enumerate(keys)}
    entries = [
        Entry(0, positions[i], params[i], grads[i], {key: by_key[key][i] for key in keys}, seed)
        for i in range(count)
    ]
    parts = partition(entries, models)
    for part in parts:
        part.bucket.grads = [grads[slot] for slot in part.slots]
    guard = Guard(grad_scale, found_inf, norms, max_norm, skip_nonfinite, skipped)
    given = None if models is None else Models(models, active, lr_scale)
    update_parameters(operator, parts, [kind(**options)], guard, given)


@torch.no_grad()
def _norm(
    grads: Sequence[Tensor], grad_scale: Tensor | None, models: int | None, active: Tensor | None, out: Tensor
) -> None:
    """Write the sum of squares of the unscaled gradients and the count of non-finite ones to ``out``.

    Its shape is (1, 2), or (1, 2, B) for B models.
    """
    parts = partition((Entry(0, i, grad, grad, {}, None) for i, grad in enumerate(grads)), models)
    for part in parts:
        part.bucket.grads = [grads[slot] for slot in part.slots]
    given = None if models is None else Models(models, active)
    out.copy_(measure_gradients(parts, grad_scale, out.device, given).sum(0, keepdim=True))


_library.impl("optimizer_step", _step, "CompositeExplicitAutograd")
_library.impl("optimizer_norm", _norm, "CompositeExplicitAutograd")
torch.library.register_fake(f"{_NAMESPACE}::optimizer_step", lambda *args: None, lib=_library)
torch.library.register_fake(f"{_NAMESPACE}::optimizer_norm", lambda *args: None, lib=_library)

optimizer_step = getattr(torch.ops, _NAMESPACE).optimizer_step.default
optimizer_norm = getattr(torch.ops, _NAMESPACE).optimizer_norm.default
