"""SGD and Adam over a batch of models in plain torch: each model by options, a step, a clip and a guard of its own.

A stack is seen as a matrix, a row per model, and is updated in batches of rows (of columns too, where one row is long)
that fit a cache. What has one value per model is a column beside them. Tensors of another dtype than the arithmetic's,
and rows that may not be written, are worked on in copies.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import acc_dtype
from ..optim.bucket import AdamOptions, Bucket, Guard, Models, SGDOptions
from .multi_tensor import batch_size, draw_words, stochastic_bfloat16, tensor_key
from .threads import is_small, one_thread

# Of a batch a dozen tensors are in the cache at once.
SHARE = 8

# torch's loops over a matrix and a column are slow where rows are shorter: the column is then spread first.
SHORT = 64

Value = float | Tensor  # a number, or one per model


class Decision(NamedTuple):
    """What guard and ``active`` say.

    Attributes:
        keep: (B,) bool, the models that make the step; None for all.
        scale: 0-d; gradients are divided by it, and written back so.
        clip: (B,), what gradients are multiplied by, or None.
    """

    keep: Tensor | None
    scale: Tensor | None
    clip: Tensor | None


class Block(NamedTuple):
    """Rows and columns of the matrices of a batch."""

    rows: slice
    columns: slice

    def of(self, matrix: Tensor) -> Tensor:
        return matrix[self.rows, self.columns]

    def column(self, value: Value) -> Value:
        """A number as it is; of one value per model those of the rows, to stand beside the matrices."""
        if isinstance(value, float) or value.dim() == 0:
            return value
        column = value[self.rows].unsqueeze(1)
        width = self.columns.stop - self.columns.start
        return column.expand(-1, width).contiguous() if column.is_cpu and width < SHORT else column


Rule = Callable[[Tensor, Tensor, dict[str, Tensor], Callable[[Value], Any]], None]


def stacked_grad_norm(bucket: Bucket, grad_scale: Tensor | None, models: Models, out: Tensor) -> None:
    """Write each model's sum of squares of the unscaled gradients, and the number of its non-finite tensors.

    Args:
        bucket: its ``grads`` are read.
        grad_scale: 0-d float32, or None for 1.
        models: how many, and which are active; the others get nan and 0.
        out: (2, B), overwritten.
    """
    out.zero_()
    for grad in bucket.grads:
        with one_thread(is_small(grad)):
            matrix = _matrix(grad, models.B)
            bad = torch.zeros(models.B, dtype=torch.bool, device=out.device)
            for block in _blocks(matrix, out.dtype):
                wide = block.of(matrix).to(out.dtype)
                if grad_scale is not None:
                    wide = wide / grad_scale
                out[0, block.rows] += wide.square().sum(1)
                bad[block.rows] |= ~wide.isfinite().all(1)
            out[1] += bad
    if models.active is not None:
        out[0].masked_fill_(~models.active, math.nan)
        out[1].masked_fill_(~models.active, 0)


def stacked_sgd_step(bucket: Bucket, options: Sequence[SGDOptions], guard: Guard, models: Models) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states, all optional: ``momentum_buffer``, ``step``, ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
        models: how many, which are active, and the factors of their rates.
    """
    decision = _decide(guard, models)
    if decision is None:
        return
    for i, group in enumerate(bucket.groups):
        _update(bucket, i, decision, models, _sgd_rule(bucket, i, options[group], models))


def stacked_adam_step(bucket: Bucket, options: Sequence[AdamOptions], guard: Guard, models: Models) -> None:
    """Update every parameter of ``bucket`` in place, its states and steps with it.

    Args:
        bucket: states ``exp_avg``, ``exp_avg_sq``, ``step``, perhaps ``max_exp_avg_sq`` and ``master_param``.
        options: of each group, by the index that ``bucket.groups`` holds.
        guard: scale, clipping and whether to skip.
        models: how many, which are active, and the factors of their rates.
    """
    decision = _decide(guard, models)
    if decision is None:
        return
    for i, group in enumerate(bucket.groups):
        _update(bucket, i, decision, models, _adam_rule(bucket, i, options[group], models))


def _decide(guard: Guard, models: Models) -> Decision | None:
    """Read the guard, and count the skipped steps; None if no model makes the step, where that costs no wait."""
    skip, clip, keep = None, None, models.active
    if guard.found_inf is not None:
        skip = (guard.found_inf != 0).expand(models.B)
    if guard.norms is not None:
        squares, nonfinite = guard.norms.sum(0)
        if guard.skip_nonfinite:
            skip = nonfinite != 0 if skip is None else skip | (nonfinite != 0)
        if guard.max_norm is not None:
            clip = (guard.max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)  # NaN stays
    if skip is not None:
        skipped = skip if keep is None else skip & keep
        if guard.skipped is not None:
            guard.skipped.add_(skipped)
        keep = ~skip if keep is None else keep & ~skip
    if keep is not None and keep.is_cpu:
        if keep.all():
            keep = None
        elif not keep.any():
            return None
    if clip is not None and clip.is_cpu and (clip == 1).all():
        clip = None
    return Decision(keep, guard.grad_scale, clip)


def _matrix(tensor: Tensor, models: int) -> Tensor:
    """The tensor's memory as a row per model; it has no holes, and the models are its outermost dimension."""
    width = tensor.numel() // max(1, models)
    return tensor.as_strided((models, width), (width, 1))


def _blocks(matrix: Tensor, dtype: torch.dtype) -> Iterator[Block]:
    rows, columns = matrix.shape
    if matrix.numel() == 0:
        return
    most = batch_size(matrix.device, dtype) // SHARE
    wide = min(columns, most)
    high = max(1, most // columns)
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            yield Block(slice(top, min(top + high, rows)), slice(left, min(left + wide, columns)))


def _update(bucket: Bucket, i: int, decision: Decision, models: Models, rule: Rule) -> None:
    param = bucket.params[i]
    with one_thread(is_small(param)):
        matrices = {key: _matrix(t[i], models.B) for key, t in bucket.states.items() if key != "step"}
        matrices = {"param": _matrix(param, models.B), **matrices}
        grad = _matrix(bucket.grads[i], models.B)
        step = bucket.states["step"][i] if "step" in bucket.states else None
        for block in _blocks(grad, acc_dtype(param)):
            _update_block(bucket, i, decision, rule, block, grad, matrices, step)
        if step is not None:
            step += 1 if decision.keep is None else decision.keep


def _update_block(
    bucket: Bucket,
    i: int,
    decision: Decision,
    rule: Rule,
    block: Block,
    grad: Tensor,
    matrices: dict[str, Tensor],
    step: Tensor | None,
) -> None:
    dtype = acc_dtype(bucket.params[i])
    keep = None if decision.keep is None else decision.keep[block.rows].unsqueeze(1)
    narrow = {key: block.of(matrix) for key, matrix in matrices.items()}
    place = block.of(grad)
    g = place.to(dtype)
    if decision.scale is not None:
        g = g / decision.scale
        place.copy_(g if keep is None else torch.where(keep, g.to(place.dtype), place))
    if decision.clip is not None:
        g = g * block.column(decision.clip.to(dtype))

    # Whatever may not be written as it comes is computed in a copy.
    work = {key: value.to(dtype, copy=keep is not None) for key, value in narrow.items()}
    p = work.pop("param")
    if "master_param" in work:
        followed = narrow["master_param"].to(narrow["param"].dtype) == narrow["param"]
        p = torch.where(followed, work.pop("master_param"), p)
    rule(p, g, work, block.column)

    results = {"param": p, **work}
    if "master_param" in narrow:
        results["master_param"] = p
    words = _draws(bucket, i, block, grad, step) if bucket.seed is not None else []
    for (key, value), out in zip(results.items(), (narrow[key] for key in results), strict=True):
        if value is out:
            continue
        if words and key != "master_param":
            value = stochastic_bfloat16(value.contiguous(), words.pop(0))
        value = value.to(out.dtype)
        out.copy_(value if keep is None else torch.where(keep, value, out))


def _draws(bucket: Bucket, i: int, block: Block, grad: Tensor, step: Tensor | None) -> list[Tensor]:
    """The random bits of the block's elements, by their places in memory and the updates that their model has made."""
    assert step is not None
    assert bucket.seed is not None
    rows, columns = (torch.arange(s.start, s.stop, device=grad.device) for s in block)
    place = rows.unsqueeze(1) * grad.shape[1] + columns
    return draw_words(place, tensor_key(bucket.seed, bucket.indices[i], step[block.rows].unsqueeze(1)))


def _number(value: Any, dtype: torch.dtype) -> Value:
    """An option as a float; as a tensor of ``dtype`` if it is one per model, or if only the device knows it."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.dim() == 0 and value.is_cpu:
        return float(value)
    return value.to(dtype)


def _rate(lr: Any, models: Models, dtype: torch.dtype) -> Value:
    rate = _number(lr, dtype)
    return rate if models.lr_scale is None else models.lr_scale.to(dtype) * rate


def _add_scaled(tensor: Tensor, other: Tensor, factor: Any) -> Tensor:
    """``tensor + factor * other``, anew."""
    if isinstance(factor, float):
        return torch.add(tensor, other, alpha=factor) if factor != 0 else tensor
    return torch.addcmul(tensor, other, factor)


def _sgd_rule(bucket: Bucket, i: int, options: SGDOptions, models: Models) -> Rule:
    dtype = acc_dtype(bucket.params[i])
    lr = _rate(options.lr, models, dtype)
    decay, momentum = _number(options.weight_decay, dtype), _number(options.momentum, dtype)
    share = 1 - float(options.dampening)
    fresh = bucket.states["step"][i] == 0 if "momentum_buffer" in bucket.states and share != 1 else None

    def rule(p: Tensor, g: Tensor, states: dict[str, Tensor], column: Callable[[Value], Any]) -> None:
        g = -g if options.maximize else g
        g = _add_scaled(g, p, column(decay))
        if "momentum_buffer" in states:
            buffer, mu = states["momentum_buffer"], column(momentum)
            new = (buffer * mu).add_(g, alpha=share)
            if fresh is not None:
                new = torch.where(column(fresh), g, new)
            ahead = _add_scaled(g, new, mu) if options.nesterov else new
            if isinstance(mu, Tensor):  # a model without momentum leaves its buffer as it is
                buffer.copy_(torch.where(mu == 0, buffer, new))
                g = torch.where(mu == 0, g, ahead)
            else:
                buffer.copy_(new)
                g = ahead
        rate = column(lr)
        if isinstance(rate, float):
            p.add_(g, alpha=-rate)
        else:
            p.addcmul_(g, rate, value=-1)

    return rule


def _adam_rule(bucket: Bucket, i: int, options: AdamOptions, models: Models) -> Rule:
    dtype = acc_dtype(bucket.params[i])
    lr = _rate(options.lr, models, dtype)
    decay, beta1, beta2 = (_number(x, dtype) for x in (options.weight_decay, options.beta1, options.beta2))
    step = bucket.states["step"][i].to(dtype) + 1
    correction1, correction2 = _correction(beta1, step), _correction(beta2, step)
    step_size = lr / correction1
    root = correction2.sqrt() if isinstance(correction2, Tensor) else math.sqrt(correction2)
    shrink = 1 - lr * decay if options.decoupled else 1.0
    less1, less2 = 1 - beta1, 1 - beta2

    def rule(p: Tensor, g: Tensor, states: dict[str, Tensor], column: Callable[[Value], Any]) -> None:
        m, v = states["exp_avg"], states["exp_avg_sq"]
        g = -g if options.maximize else g
        if not options.decoupled:
            g = _add_scaled(g, p, column(decay))
        elif not isinstance(shrink, float) or shrink != 1:
            p.mul_(column(shrink))
        m.lerp_(g, column(less1))
        fresh = column(less2)
        if isinstance(fresh, float):
            v.mul_(column(beta2)).addcmul_(g, g, value=fresh)
        else:
            v.mul_(column(beta2)).addcmul_(g * g, fresh)
        largest = v
        if "max_exp_avg_sq" in states:
            largest = torch.maximum(states["max_exp_avg_sq"], v, out=states["max_exp_avg_sq"])
        denominator = largest.sqrt().div_(column(root)).add_(options.eps)
        size = column(step_size)
        if isinstance(size, float):
            p.addcdiv_(m, denominator, value=-size)
        else:
            p.addcmul_(torch.div(m, denominator, out=denominator), size, value=-1)

    return rule


def _correction(beta: Value, step: Tensor) -> Value:
    """``1 - beta^step``; a number where the step of all models is known to be one."""
    if isinstance(beta, float):
        if step.is_cpu and len(step) > 0:
            low, high = step.aminmax()
            if low == high:
                return 1 - beta ** float(low)
        power = math.log1p(beta - 1) if beta > 0 else -math.inf
        return -torch.expm1(step * power)
    return -torch.expm1(step * torch.log1p(beta - 1))
