"""SGD in plain torch: torch's fused kernel, in batches where it cannot do what is asked alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import acc_dtype
from ..optim.bucket import Bucket, Guard, Models, SGDOptions
from . import fused
from .multi_tensor import GO, Decision, by_group, decide, is_native, picked, raise_steps, run
from .stacked import stacked_sgd_step

Tensors = list[Tensor] | tuple[Tensor, ...]

# Smaller factors are lost in ``1 - dampening``, which torch computes in float64.
SMALLEST_CLIP = 2.0**-20


def sgd_step(bucket: Bucket, options: Sequence[SGDOptions], guard: Guard) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states, all optional: ``momentum_buffer``, ``step``, ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
    """
    steps = bucket.states.get("step", [])
    if steps and not steps[0].is_cpu:
        _step_on_device(bucket, options, guard)
        return
    decision = decide(guard)
    if decision.skip is True:
        return
    fresh = steps and {i for i, step in enumerate(steps) if step.item() == 0}
    raise_steps(steps, False)
    for group, chosen in by_group(bucket):
        if not fresh:
            _update(bucket, chosen, options[group], decision)
            continue
        # A fresh buffer is 0, and takes the first gradient whole.
        for entries, given in (
            ([i for i in chosen if i in fresh], options[group]._replace(dampening=0.0)),
            ([i for i in chosen if i not in fresh], options[group]),
        ):
            if entries:
                _update(bucket, entries, given, decision)


def _update(bucket: Bucket, chosen: list[int], options: SGDOptions, decision: Decision) -> None:
    clip = decision.clip
    # float16 may not hold the larger decay, and ``1 - dampening`` would lose digits of float64.
    foldable = bucket.params[0].dtype == torch.float32 and not options.nesterov
    if foldable and isinstance(clip, float) and SMALLEST_CLIP <= clip < 1:
        options, decision = _folded(options, clip), decision._replace(clip=1.0)
    # On a device a comparison with GO would wait for it.
    if is_native(bucket) and _is_one_addition(bucket, options) and decision == GO:
        _loop(picked(bucket.params, chosen), picked(bucket.grads, chosen), [], options)
        return

    def kernel(
        params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]], scale: Tensor | None
    ) -> None:
        if _needs_foreach_loop(params[0]):  # else they are wide copies of 16-bit ones
            _loop(params, grads, states.get("momentum_buffer", []), options)
        else:
            fused.sgd(options, params, grads, states, scale, decision.skip)

    run(bucket, chosen, decision, kernel, one_pass=not _needs_foreach_loop(bucket.params[0]))


def _folded(options: SGDOptions, clip: float) -> SGDOptions:
    """Return the options with which a step by unclipped gradients equals ``options``' step by clipped ones."""
    decayed = options._replace(weight_decay=float(options.weight_decay) / clip)
    if options.momentum == 0:
        return decayed._replace(lr=float(options.lr) * clip)
    return decayed._replace(dampening=1 - (1 - options.dampening) * clip)


def _needs_foreach_loop(param: Tensor) -> bool:
    """Return whether torch's loop must serve instead of its fused kernel."""
    return param.is_cpu and param.element_size() == 2


def _is_one_addition(bucket: Bucket, options: SGDOptions) -> bool:
    """Return whether torch's loop is one call: for small tensors it starts no threads, as its fused kernel does."""
    plain = "momentum_buffer" not in bucket.states and not options.maximize
    return plain and bucket.params[0].is_cpu and float(options.weight_decay) == 0


def _loop(params: Tensors, grads: Tensors, buffers: Tensors, options: SGDOptions) -> None:
    """Run torch's own loop (``foreach=False``), each operation over all tensors; each one rounds."""
    decay = float(options.weight_decay)
    if options.maximize:
        grads = torch._foreach_neg(grads)
    if decay != 0:
        grads = torch._foreach_add(grads, params, alpha=decay)
    if buffers:
        # A bare number would be rounded to the buffers' dtype, which Tensor.mul_ does not do.
        momentum = buffers[0].new_tensor(options.momentum, dtype=acc_dtype(buffers[0]))
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=1 - options.dampening)
        grads = (
            torch._foreach_add(grads, buffers, alpha=float(options.momentum)) if options.nesterov else buffers
        )
    torch._foreach_add_(params, grads, alpha=-float(options.lr))


def _step_on_device(bucket: Bucket, options: Sequence[SGDOptions], guard: Guard) -> None:
    """Step by stacks of one model, where only the device knows which steps are first ones."""
    states = {key: [tensor.unsqueeze(0) for tensor in tensors] for key, tensors in bucket.states.items()}
    params, grads = ([tensor.unsqueeze(0) for tensor in tensors] for tensors in (bucket.params, bucket.grads))
    one = Bucket(params, grads, states, bucket.groups, bucket.indices, bucket.seed, bucket.memory)
    numbers = [
        each._replace(lr=_number(each.lr), weight_decay=_number(each.weight_decay)) for each in options
    ]
    norms = None if guard.norms is None else guard.norms.unsqueeze(-1)
    stacked_sgd_step(one, numbers, guard._replace(norms=norms), Models(1))


def _number(option: float | Tensor) -> float | Tensor:
    """Return an option without dimensions, which may come as a tensor of one element, of any shape."""
    return option.squeeze() if isinstance(option, Tensor) else option
